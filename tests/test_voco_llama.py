"""The thin model: training batches, one pass and two stages, checkpoints, and what it refuses."""

import copy
import json
import logging
import warnings

import pytest
import torch
from models import (
    EDGE,
    GENERATED,
    IMAGE,
    PAD,
    VISION,
    VOCO,
    additive_mask,
    exact_logits,
    masked_eager,
    picture,
    pictures,
    pixels,
    processor,
    stock_of,
    twin,
    voco_config,
    voco_llava,
)
from reference import PADDING, assert_error_rule, kinds_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, DynamicCache, StaticCache
from voco_llama import VocoCollator, VocoLlavaConfig, VocoLlavaForConditionalGeneration, VocoProcessor

from voco_kernels import VocoKV, VocoLayout
from voco_kernels.integrations.transformers import CACHE_NAME, CACHE_NAMES

# Nothing here may call transformers under a name that it gave up.
pytestmark = pytest.mark.filterwarnings("error:.*`past_key_values`:FutureWarning")

SETTINGS = {
    "default": {},
    "compact": {"positions": "compact"},
    "prefix seen": {"hide_prefix": False},
    "not isolated": {"isolated": False},
    "not isolated, prefix seen, compact": {"isolated": False, "hide_prefix": False, "positions": "compact"},
}
PROMPTS = {
    "one image": ["<image>\nhow many?"],
    "batch": ["<image>\nhow many?", "<image>\nwhat is the sum of it?", "<image>\n?"],
    "several images": ["<image><image>\nsum?", "first <image> and <image>second", "<image>one"],
    "a row without images": ["<image>\nhow many?", "hi"],
    "a long row without images": ["<image>\n?", "a question about nothing that can be seen in any image"],
}
# Where the prefix is hidden, text before the first image is a part of its segment, and K/V made without it do not fit.
IMAGES_FIRST = {**PROMPTS, "several images": ["<image><image>\nsum?", "<image>and <image>second", "<image>one"]}


@pytest.fixture
def model():
    return voco_llava()


def inputs(model, prompts, count=None):
    """The processor's batch of prompts and as many pictures as they have places."""
    return model.processor(pictures(sum(p.count("<image>") for p in prompts)), prompts, count)


def without_pixels(x):
    return {key: value for key, value in x.items() if key != "pixel_values"}


def expected_tokens(model, x, **kwargs):
    """What masked passes of stock LLaVA with eager attention generate."""
    return masked_eager(stock_of(model), model.layout_of)(**{"ids": x["input_ids"], **_rest(x)}, **kwargs)


def _rest(x):
    return {key: value for key, value in x.items() if key != "input_ids"}


# ---- one pass ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_logits_loss_and_gradients_equal_stock_llava_with_a_mask(settings):
    model = voco_llava(**settings)
    x = inputs(model, ["first <image> and <image>second", "<image>\nhow many?", "hi"])
    ids, mask = x["input_ids"], x["attention_mask"]
    layout = model.layout_of(ids, mask)
    follows = torch.nn.functional.pad(mask, (1, 0))[:, :-1] * mask
    labels = ids.masked_fill(follows == 0, -100)
    stock = twin(stock_of(model), "eager")
    got = model(**x, labels=labels)
    expected = stock(
        input_ids=ids,
        pixel_values=x["pixel_values"],
        attention_mask=additive_mask(layout, len(ids)),
        position_ids=layout.position_ids.view(ids.shape),
        labels=labels,
    )
    seen = mask.bool()
    torch.testing.assert_close(got.logits[seen], expected.logits[seen], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(model, got.loss), gradients(stock, expected.loss))


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same_gradients(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys() and got
    for name, x in expected.items():
        # A key bias of the vision tower has no gradient but noise: adding it to all keys changes no weight.
        if "k_proj.bias" not in name:
            atol = 1e-4 * x.abs().max().item()
            torch.testing.assert_close(got[name], x, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_the_language_model_obeys_the_error_rule(model):
    """Its LLaMA against transformers' eager LLaMA and float64, on text with images of VoCo placeholders."""
    x = inputs(model, ["first <image> and <image>second", "<image>\nhow many?"])
    ids = x["input_ids"]
    layout = model.layout_of(ids, x["attention_mask"])
    llama = model.model.language_model
    with torch.no_grad():
        embeddings = torch.randn(*ids.shape, 64)
        positions = layout.position_ids.view(ids.shape)
        got = llama(
            inputs_embeds=embeddings, attention_mask=x["attention_mask"], position_ids=positions, voco_layout=layout
        )
        eager = twin(llama, "eager")(
            inputs_embeds=embeddings, attention_mask=additive_mask(layout, 2), position_ids=positions
        )
        got, eager = (model.lm_head(y.last_hidden_state).flatten(0, 1) for y in (got, eager))
    view = type("View", (), {"model": llama, "lm_head": model.lm_head})
    exact = exact_logits(view, ids, layout, embeddings).flatten(0, 1)
    kinds = kinds_of(layout)
    seen = torch.from_numpy(kinds != PADDING)
    assert_error_rule("logits", got[seen], eager[seen], exact[seen], kinds[seen.numpy()])


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_one_pass_generates_as_masked_passes_do(model, prompts, cache):
    x = inputs(model, prompts)
    options = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}[cache]
    assert torch.equal(model.generate(**x, **options, **GENERATED), expected_tokens(model, x))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_one_pass_in_every_setting(settings):
    model = voco_llava(**settings)
    x = inputs(model, PROMPTS["several images"])
    expected = expected_tokens(model, x)
    assert torch.equal(model.generate(**x, **GENERATED), expected)
    for name in CACHE_NAMES:
        static = StaticCache(model.config.text_config, max_cache_len=120)
        assert torch.equal(model.generate(**x, **{name: static}, **GENERATED), expected)


def test_a_layout_as_a_keyword_of_generate(model):
    """It must say the same as the ids; after the prefill it is not used again."""
    x = inputs(model, PROMPTS["batch"])
    layout = model.layout_of(x["input_ids"], x["attention_mask"])
    expected = model.generate(**x, **GENERATED)
    assert torch.equal(model.generate(**x, voco_layout=layout, **GENERATED), expected)
    with pytest.raises(ValueError, match="voco_layout must be"):
        model.generate(**x, voco_layout=model.layout_of(x["input_ids"][:1]), **GENERATED)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("positions", ["continuous", "compact"])
def test_a_conversation_goes_on_behind_its_cache(positions, name):
    model = voco_llava(positions=positions)
    x = inputs(model, PROMPTS["batch"])
    first = model.generate(**x, return_dict_in_generate=True, **GENERATED)
    more = torch.tensor([[20, 21, 22]] * 3)
    ids = torch.cat([first.sequences, more], dim=1)
    mask = torch.cat([x["attention_mask"], x["attention_mask"].new_ones(3, ids.shape[1] - x["input_ids"].shape[1])], 1)
    expected = expected_tokens(model, {"input_ids": ids, "attention_mask": mask, "pixel_values": x["pixel_values"]})
    cache = {name: getattr(first, CACHE_NAME)}
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **cache, **GENERATED), expected)


# ---- the names of the cache --------------------------------------------------------------------------------------------


def test_forward_takes_a_cache_under_either_name(model):
    """The masked prefill leaves public keys in it, and a later step reads them."""
    x = inputs(model, PROMPTS["batch"])
    new, width = torch.tensor([[20], [21], [22]]), x["input_ids"].shape[1]
    ids = torch.cat([x["input_ids"], new], dim=1)
    mask = torch.cat([x["attention_mask"], x["attention_mask"].new_ones(3, 1)], dim=1)
    positions = model.layout_of(ids, mask).position_ids.view(ids.shape)[:, -1:]
    with torch.no_grad():
        expected = model(ids, x["pixel_values"], mask).logits[:, -1:]
        for name in CACHE_NAMES:
            cache = DynamicCache(config=model.config.text_config)
            assert getattr(model(**x, **{name: cache}), CACHE_NAME) is cache
            assert 0 < cache.get_seq_length() < width
            got = model(new, attention_mask=mask, position_ids=positions, **{name: cache}).logits
            torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_prepare_inputs_takes_a_cache_under_either_name(model, name):
    x = inputs(model, ["<image>\nhow many?", "<image>\nwhat is the sum of it?"])
    cache = DynamicCache(config=model.config.text_config)
    model(**x, **{name: cache})
    ids = torch.cat([x["input_ids"], torch.tensor([[20], [21]])], dim=1)
    mask = torch.cat([x["attention_mask"], x["attention_mask"].new_ones(2, 1)], dim=1)
    got = model.prepare_inputs_for_generation(ids, next_sequence_length=1, attention_mask=mask, **{name: cache})
    assert got[CACHE_NAME] is cache and got["input_ids"].tolist() == [[20], [21]]
    assert got["attention_mask"].shape[1] == cache.get_seq_length() + 1


def test_two_caches_are_refused(model):
    x = inputs(model, ["<image>\nhow many?"])
    caches = {name: DynamicCache(config=model.config.text_config) for name in CACHE_NAMES}
    calls = (
        lambda: model(**x, **caches),
        lambda: model.generate(**x, **caches, **GENERATED),
        lambda: model.prepare_inputs_for_generation(x["input_ids"], **caches),
    )
    for call in calls:
        with pytest.raises(ValueError, match="cache must be None where past_key_values"):
            call()


def test_no_deprecated_name_is_used(model, monkeypatch):
    """What transformers logs once; its warnings are errors in this file."""
    said = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, message, *_, **__: said.append(message))
    x = inputs(model, PROMPTS["batch"])
    model(**x)
    model.generate(**x, **GENERATED)
    model.generate(**x, two_stage=True, **GENERATED)
    model.generate(**without_pixels(x), voco_kv=model.compress(pictures(3)), **GENERATED)
    x = inputs(model, ["<image>\nhow many?"], 0)
    for name in CACHE_NAMES:
        cache = model.cache_images(x["input_ids"][:, : VISION + 1], x["pixel_values"])
        model.generate(**without_pixels(x), **{name: cache}, **GENERATED)
    assert not [message for message in said if "past_key_values" in message]


# ---- two stages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_two_stages_generate_as_masked_passes_do(prompts, settings):
    model = voco_llava(**settings)
    x = inputs(model, prompts)
    assert torch.equal(model.generate(**x, two_stage=True, **GENERATED), expected_tokens(model, x))


@pytest.mark.parametrize("settings", list(SETTINGS.values())[:2], ids=list(SETTINGS)[:2])
@pytest.mark.parametrize("prompts", IMAGES_FIRST.values(), ids=IMAGES_FIRST)
def test_compressed_images_generate_as_masked_passes_do(prompts, settings):
    model = voco_llava(**settings)
    x = inputs(model, prompts)
    kv = model.compress(pictures(len(x["pixel_values"])))
    got = model.generate(**without_pixels(x), voco_kv=kv, **GENERATED)
    assert torch.equal(got, expected_tokens(model, x))


@pytest.mark.parametrize("positions", ["continuous", "compact"])
def test_compressed_images_anywhere(positions):
    """Where the prefix is not hidden, compressed images may stand behind text."""
    model = voco_llava(hide_prefix=False, positions=positions)
    x = inputs(model, PROMPTS["several images"])
    got = model.generate(**without_pixels(x), voco_kv=model.compress(pictures(5)), **GENERATED)
    assert torch.equal(got, expected_tokens(model, x))


@pytest.mark.parametrize("returned", [1, 2])
@pytest.mark.parametrize("prompts", list(IMAGES_FIRST.values())[1:4], ids=list(IMAGES_FIRST)[1:4])
def test_beam_search(model, prompts, returned):
    x = inputs(model, prompts)
    beams = {"num_beams": 3, "num_return_sequences": returned}
    kv = model.compress(pictures(len(x["pixel_values"])))
    expected = expected_tokens(model, x, **beams)
    assert expected.shape[0] == returned * len(prompts)
    assert torch.equal(model.generate(**x, **beams, **GENERATED), expected)
    assert torch.equal(model.generate(**x, two_stage=True, **beams, **GENERATED), expected)
    assert torch.equal(model.generate(**without_pixels(x), voco_kv=kv, **beams, **GENERATED), expected)


def test_sampling_several_answers(model):
    x = inputs(model, PROMPTS["batch"])
    sampled = {**GENERATED, "do_sample": True, "num_return_sequences": 3}
    results = []
    for stages in (False, True):
        torch.manual_seed(1)
        results.append(model.generate(**x, two_stage=stages, **sampled))
    assert results[0].shape[0] == 9 and not torch.equal(results[0][0], results[0][1])
    assert torch.equal(*results)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_returns_a_dict(model, beams):
    x = inputs(model, PROMPTS["batch"])
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "num_beams": beams}
    one, two = (model.generate(**x, two_stage=stages, **wanted, **GENERATED) for stages in (False, True))
    assert torch.equal(one.sequences, two.sequences) and type(one) is type(two)
    assert len(one.logits) == len(two.logits) == 6
    for a, b in zip(one.logits, two.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_lengths_count_the_given_prompt(model):
    x = inputs(model, PROMPTS["batch"])
    options = {"max_length": x["input_ids"].shape[1] + 4, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    one, two = (model.generate(**x, two_stage=stages, **options) for stages in (False, True))
    assert one.shape[1] == options["max_length"] and torch.equal(one, two)
    stop = int(one[0, -4])
    options = {"min_length": options["max_length"], "max_new_tokens": 8, "do_sample": False, "eos_token_id": stop}
    one, two = (model.generate(**x, two_stage=stages, pad_token_id=PAD, **options) for stages in (False, True))
    assert torch.equal(one, two) and one.shape[1] >= options["min_length"]


def test_the_prompt_comes_back_as_it_was_given(model):
    x = inputs(model, PROMPTS["several images"])
    out = model.generate(**x, two_stage=True, **GENERATED)
    assert torch.equal(out[:, : x["input_ids"].shape[1]], x["input_ids"])


def test_text_without_images_in_two_stages(model):
    x = inputs(model, ["hello there", "hi"])
    assert torch.equal(model.generate(**x, two_stage=True, **GENERATED), expected_tokens(model, x))
    assert torch.equal(model.generate(**x, voco_kv=[], **GENERATED), expected_tokens(model, x))


@pytest.mark.parametrize("where", ["last run", "before the last run"])
def test_uncompressed_images_beside_compressed_ones(where):
    """Pixels are those of the images that have no K/V, in order, whatever row they stand in."""
    model = voco_llava(hide_prefix=False)
    counts = [2, 0, 0, 2] if where == "last run" else [0, 2, 2, 0]
    prompts = ["<image>a<image>b", "<image>c<image>d"]
    x = model.processor(pictures(4), prompts, counts)
    expected = expected_tokens(model, x)
    kv = [model.compress(picture(i))[0] for i, count in enumerate(counts) if count]
    left = x["pixel_values"][[i for i, count in enumerate(counts) if not count]]
    assert torch.equal(model.generate(**x, two_stage=True, **GENERATED), expected)
    got = model.generate(**{**x, "pixel_values": left}, voco_kv=kv, **GENERATED)
    assert torch.equal(got, expected)
    beams = {"num_beams": 2}
    got = model.generate(**{**x, "pixel_values": left}, voco_kv=kv, **beams, **GENERATED)
    assert torch.equal(got, expected_tokens(model, x, **beams))


def test_two_stages_after_switching_the_attention(model):
    """Neither stage needs a mask, so any attention serves them."""
    x = inputs(model, PROMPTS["several images"])
    expected = model.generate(**x, **GENERATED)
    for name in ("sdpa", "eager"):
        model.set_attn_implementation({"text_config": name})
        assert torch.equal(model.generate(**x, two_stage=True, **GENERATED), expected)


def test_two_stages_in_bfloat16(model):
    model = model.to(torch.bfloat16)
    x = inputs(model, IMAGES_FIRST["several images"]).to(torch.bfloat16)
    kv = model.compress(pictures(5))
    assert kv[0].k.dtype == torch.bfloat16
    wanted = {"return_dict_in_generate": True, "output_logits": True, **GENERATED, "max_new_tokens": 1}
    one = model.generate(**x, **wanted).logits[0].float()
    for way in ({**x, "two_stage": True}, {**without_pixels(x), "voco_kv": kv}):
        two = model.generate(**way, **wanted).logits[0].float()
        assert (one - two).abs().max() < 0.1 * one.abs().max()


# ---- compressing -------------------------------------------------------------------------------------------------------


def test_what_compress_returns(model):
    images = pictures(3)
    kv = model.compress(images, 4)
    tokens = model.processor(images[:1], "<image>", 4)["input_ids"].shape[1]
    for one in kv:
        assert one.k.shape == (2, 4, 2, 16) and one.segments == [(tokens - 4, 4)]
        assert one.meta["model"] == model.fingerprint() and one.meta["processor"] == model.processor.fingerprint()
    assert len({one.meta["image"] for one in kv}) == 3
    assert kv[0].meta["image"] == model.compress(images[0], 4)[0].meta["image"]
    assert model.compress([]) == []


def test_compress_in_batches_of_any_size(model):
    images = pictures(5)
    expected = model.compress(images)
    for size in (1, 2, 5):
        for a, b in zip(model.compress(images, batch_size=size), expected, strict=True):
            torch.testing.assert_close(a.k, b.k, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(a.v, b.v, rtol=1e-4, atol=1e-4)
            assert a.meta == b.meta


def test_compress_tokens_and_pixels(model):
    images = pictures(2)
    x = model.processor(images, ["<image>"] * 2)
    got = model.compress(input_ids=x["input_ids"], pixel_values=x["pixel_values"])
    for a, b in zip(got, model.compress(images), strict=True):
        assert torch.equal(a.k, b.k) and torch.equal(a.v, b.v) and "processor" not in a.meta


def test_rows_with_voco_tokens_in_different_places(model):
    """What is before the image belongs to its segment, so rows of one width may have more of that and fewer VoCo tokens."""
    config = model.config
    x = model.processor(pictures(4), ["<image>"] * 4, 2)
    ids, word = x["input_ids"], config.text_config.vocab_size - 1
    assert word not in (config.image_token_id, config.voco_token_id, config.image_start_id)
    ids[1::2, 1:] = ids[1::2, :-1].clone()  # one VoCo token less at the end
    ids[1::2, 0] = word
    together = model.compress(input_ids=ids, pixel_values=x["pixel_values"])
    assert [kv.num_tokens for kv in together] == [2, 1, 2, 1]
    for row, kv in enumerate(together):
        rows = slice(row, row + 1)
        (alone,) = model.compress(input_ids=ids[rows], pixel_values=x["pixel_values"][rows])
        torch.testing.assert_close(kv.k, alone.k, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kv.v, alone.v, rtol=1e-4, atol=1e-4)
        assert kv.segments == alone.segments and kv.k.untyped_storage().nbytes() == kv.k.nbytes


def test_compressed_images_differ(model):
    a, b = model.compress(pictures(2))
    assert (a.k - b.k).abs().max() > 0.1 and (a.v - b.v).abs().max() > 0.1


def test_through_a_file(model, tmp_path):
    x = inputs(model, IMAGES_FIRST["several images"])
    kv = model.compress(pictures(5))
    for i, one in enumerate(kv):
        one.save(tmp_path / f"{i}.safetensors")
    loaded = [VocoKV.load(tmp_path / f"{i}.safetensors") for i in range(5)]
    direct, through = (model.generate(**without_pixels(x), voco_kv=y, **GENERATED) for y in (kv, loaded))
    assert torch.equal(direct, through)
    assert torch.equal(direct, expected_tokens(model, x))


def test_one_cache_serves_many_questions(model):
    """A VocoKV is not changed by use, and a single one need not be in a list."""
    model.config.hide_prefix = False
    (kv,) = model.compress(picture(0))
    before = kv.k.clone(), kv.v.clone()
    for question in ("<image>\nhow many?", "look at <image>\nwhat?"):
        x = inputs(model, [question])
        assert torch.equal(model.generate(**without_pixels(x), voco_kv=kv, **GENERATED), expected_tokens(model, x))
    assert torch.equal(kv.k, before[0]) and torch.equal(kv.v, before[1])


@pytest.mark.parametrize("count", [1, 2, 8, 128])
def test_any_number_of_voco_tokens_at_run_time(model, count):
    prompt = "<image>\nhow many?"
    if count > model.processor.max_voco_tokens:
        with pytest.warns(UserWarning, match=f"{count} VoCo tokens .* trained for at most 8"):
            kv = model.compress(picture(0), count)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kv = model.compress(picture(0), count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = model.processor(picture(0), prompt, count)
    assert kv[0].num_tokens == count
    expected = expected_tokens(model, x)
    assert torch.equal(model.generate(**x, **GENERATED), expected)
    assert torch.equal(model.generate(**without_pixels(x), voco_kv=kv, **GENERATED), expected)


def test_no_voco_tokens_is_stock_llava(model):
    """Plain causal attention over the uncompressed image."""
    x = inputs(model, PROMPTS["batch"], 0)
    assert not (x["input_ids"] == VOCO).any()
    stock = stock_of(model)
    assert stock.config.text_config._attn_implementation == "sdpa"
    seen = x["attention_mask"].bool()
    torch.testing.assert_close(model(**x).logits[seen], stock(**x).logits[seen], rtol=2e-4, atol=2e-4)
    expected = stock.generate(**x, **GENERATED)
    assert torch.equal(model.generate(**x, **GENERATED), expected)
    assert torch.equal(model.generate(**x, two_stage=True, **GENERATED), expected)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_full_caching(model, name):
    """The keys of an uncompressed image, kept and used for a question: equal to no cache at all."""
    x = inputs(model, ["<image>\nhow many?"], 0)
    cache = model.cache_images(x["input_ids"][:, : VISION + 1], x["pixel_values"])
    assert cache.get_seq_length() == VISION + 1
    got = model.generate(**without_pixels(x), **{name: cache}, **GENERATED)
    assert torch.equal(got, model.generate(**x, **GENERATED))


def test_ask(model):
    images = pictures(2)
    kv = model.compress(images)
    options = {"max_new_tokens": 5}
    assert model.ask("sum?", images=images, **options) == model.ask("sum?", voco_kv=kv, **options)
    for wrong in ({}, {"images": images, "voco_kv": kv}):
        with pytest.raises(ValueError, match="images or voco_kv must be given"):
            model.ask("sum?", **wrong)


# ---- training batches --------------------------------------------------------------------------------------------------


def samples_of(model, *prompts) -> list[dict]:
    """Training samples whose every token is a label."""
    samples = []
    for i, prompt in enumerate(prompts):
        count = prompt.count("<image>")
        x = model.processor([picture(10 * i + j) for j in range(count)], prompt)
        sample = {"input_ids": x["input_ids"][0], "labels": x["input_ids"][0].clone()}
        if count:
            sample["pixel_values"] = x["pixel_values"]
        samples.append(sample)
    return samples


SAMPLES = ["<image>\nhow many? 3", "no image at all", "a <image>b<image>c", "<image>\n?"]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_packed_batch_is_its_samples_one_by_one(settings):
    model = voco_llava(**settings)
    samples = samples_of(model, *SAMPLES)
    batch = VocoCollator(model.config)(samples)
    assert batch["input_ids"].shape == (1, sum(len(s["input_ids"]) for s in samples))
    got = model(**batch)
    targets = [len(s["labels"]) - 1 for s in samples]
    losses, logits = [], []
    for sample in samples:
        out = model(sample["input_ids"][None], sample.get("pixel_values"), labels=sample["labels"][None])
        losses.append(out.loss)
        logits.append(out.logits)
    expected = sum(loss * n for loss, n in zip(losses, targets, strict=True)) / sum(targets)
    torch.testing.assert_close(got.logits, torch.cat(logits, dim=1), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(got.loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(model, got.loss), gradients(model, expected))


def test_labels_do_not_cross_documents(model):
    samples = samples_of(model, *SAMPLES)
    batch = VocoCollator(model.config)(samples)
    starts = batch["cu_seqlens"][:-1].long()
    assert (batch["labels"][0, starts] == -100).all()
    assert int((batch["labels"] == -100).sum()) == len(samples)
    # Another first document changes nothing for the others.
    other = VocoCollator(model.config)([*samples_of(model, "entirely different"), *samples[1:]])
    n = int(starts[1]), int(other["cu_seqlens"][1])
    with torch.no_grad():
        a, b = (model(**x).logits[0, at:] for x, at in ((batch, n[0]), (other, n[1])))
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("images", ["absent", "empty"])
def test_a_batch_of_text_alone(model, images):
    samples = samples_of(model, "no image", "nor here")
    if images == "empty":
        for sample in samples:
            sample["pixel_values"] = torch.empty(0, 3, EDGE, EDGE)
    batch = VocoCollator(model.config)(samples)
    assert "pixel_values" not in batch
    assert model(**batch).loss.isfinite()
    mixed = VocoCollator(model.config)([*samples, *samples_of(model, "<image>\n?")])
    assert mixed["pixel_values"].shape == (1, 3, EDGE, EDGE)
    assert model(**mixed).loss.isfinite()


def test_the_collator_makes_plain_tensors(model):
    batch = VocoCollator(model.config)(samples_of(model, *SAMPLES))
    assert all(type(x) is torch.Tensor for x in batch.values())
    assert set(batch) == {"input_ids", "labels", "position_ids", "segment_ids", "public", "cu_seqlens", "pixel_values"}


def test_the_collator_refuses_samples_that_do_not_fit():
    model = voco_llava(text={"max_position_embeddings": 20})
    collate = VocoCollator(model.config)
    short, long = samples_of(model, "fits"), samples_of(model, "<image>\nthis is too long for twenty positions")
    with pytest.raises(ValueError, match="samples must fit the context of 20 positions"):
        collate([*short, *long])
    with pytest.raises(ValueError, match=r"samples\[1\]\['labels'\] must be of the shape of its input_ids"):
        collate([*short, {**short[0], "labels": short[0]["labels"][:-1]}])


def test_an_incomplete_packed_batch_is_refused(model):
    batch = VocoCollator(model.config)(samples_of(model, *SAMPLES))
    for name in ("public", "cu_seqlens", "position_ids"):
        with pytest.raises(ValueError, match=f"{name} must be given"):
            model(**{key: value for key, value in batch.items() if key != name})


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_training_with_gradient_checkpointing(model):
    batch = VocoCollator(model.config)(samples_of(model, *SAMPLES))
    model.train()
    expected = gradients(model, model(**batch).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(gradients(model, model(**batch).loss), expected)


# ---- checkpoints -------------------------------------------------------------------------------------------------------


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    x = inputs(model, PROMPTS["batch"])
    classes = (VocoLlavaConfig, VocoProcessor, VocoLlavaForConditionalGeneration)
    config, proc, loaded = (
        auto.from_pretrained(tmp_path) for auto in (AutoConfig, AutoProcessor, AutoModelForImageTextToText)
    )
    assert tuple(map(type, (config, proc, loaded))) == classes
    assert loaded.config.text_config._attn_implementation == "voco"
    assert torch.equal(loaded.eval()(**x).logits, model(**x).logits)
    assert loaded.fingerprint() == model.fingerprint()
    # The processor of the checkpoint belongs to the model, and accepts what the first one compressed.
    assert loaded.processor.fingerprint() == proc.fingerprint() == model.processor.fingerprint()
    kv = model.compress(pictures(3))
    got = loaded.generate(**without_pixels(x), voco_kv=kv, **GENERATED)
    assert torch.equal(got, model.generate(**x, **GENERATED))


def test_save_and_load_keeps_the_settings(tmp_path):
    settings = {"positions": "compact", "isolated": False, "hide_prefix": False, "image_start_id": None}
    model = voco_llava(**settings)
    model.save_pretrained(tmp_path)
    assert '"voco"' not in (tmp_path / "config.json").read_text()
    loaded = VocoLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in settings} == settings


def test_fingerprint(model):
    first = model.fingerprint()
    assert first == model.fingerprint() == copy.deepcopy(model).fingerprint()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    second = model.fingerprint()
    with torch.no_grad():
        model.lm_head.weight[0, 0] -= 1
    model.config.hide_prefix = False
    third = model.fingerprint()
    assert len({first, second, third}) == 3
    # What does not change results does not change it.
    model.config.hide_prefix = True
    model.set_attn_implementation({"text_config": "eager"})
    model.config.use_cache = False
    assert model.fingerprint() == copy.deepcopy(model).fingerprint()
    assert model.to(torch.bfloat16).fingerprint() not in (first, second, third)


def hub_names(model) -> dict[str, torch.Tensor]:
    """The weights under the key names of llava-hf checkpoints."""
    renamed = {}
    for name, x in model.state_dict().items():
        name = name.removeprefix("model.")
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if name.startswith("language_model."):
            name = name.replace("language_model.", "language_model.model.", 1)
        renamed[f"language_model.{name}" if name.startswith("lm_head") else name] = x.clone().contiguous()
    return renamed


def hub_checkpoint(model, path, weights) -> None:
    """A checkpoint as llava-hf writes them: LLaVA's configuration, its key names, nothing of ours."""
    config = stock_of(model).config.to_dict()
    config["image_token_index"] = config.pop("image_token_id", IMAGE)
    config["architectures"] = ["LlavaForConditionalGeneration"]
    assert config["model_type"] == "llava"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


OURS = {"voco_token_id": VOCO, "image_start_id": 1}


def test_llava_hf_checkpoints(model, tmp_path):
    """No key is missing, `lm_head` among them, and logits are equal."""
    weights = hub_names(model)
    assert {"language_model.lm_head.weight", "language_model.model.embed_tokens.weight"} < weights.keys()
    assert {"multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.bias"} < weights.keys()
    assert "vision_tower.vision_model.embeddings.class_embedding" in weights
    hub_checkpoint(model, tmp_path, weights)
    loaded, info = VocoLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True, **OURS)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.model_type == "voco_llava" and loaded.config.image_token_id == IMAGE
    for (name, x), y in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    x = inputs(model, PROMPTS["batch"])
    assert torch.equal(loaded.eval()(**x).logits, model(**x).logits)


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.model.layers.1.self_attn.k_proj.weight", "layers.1.self_attn.k_proj.weight"),
        ("multi_modal_projector.linear_2.bias", "multi_modal_projector.linear_2.bias"),
        ("vision_tower.vision_model.embeddings.class_embedding", "embeddings.class_embedding"),
    ],
)
def test_a_checkpoint_that_lacks_a_tensor(model, tmp_path, removed, named):
    weights = hub_names(model)
    del weights[removed]
    hub_checkpoint(model, tmp_path, weights)
    with pytest.raises(ValueError, match=f"checkpoint .* lacks: .*{named}"):
        VocoLlavaForConditionalGeneration.from_pretrained(tmp_path, **OURS)


def test_a_checkpoint_with_a_tensor_of_another_shape(model, tmp_path):
    weights = hub_names(model)
    weights["language_model.lm_head.weight"] = weights["language_model.lm_head.weight"][:-1].clone()
    hub_checkpoint(model, tmp_path, weights)
    with pytest.raises(ValueError, match=r"checkpoint .* holds in another shape: .*lm_head\.weight"):
        VocoLlavaForConditionalGeneration.from_pretrained(tmp_path, **OURS)


def test_a_sharded_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    loaded = VocoLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.fingerprint() == model.fingerprint()
    weights = load_file(tmp_path / shards[0])
    gone = sorted(weights)[0]
    del weights[gone]
    save_file(weights, tmp_path / shards[0], metadata={"format": "pt"})
    with pytest.raises(ValueError, match="checkpoint .* lacks: "):
        VocoLlavaForConditionalGeneration.from_pretrained(tmp_path)


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(model):
    """A prompt of one image without pixels, and its K/V."""
    return without_pixels(inputs(model, ["<image>\nhow many?"])), model.compress(picture(0))


def test_a_cache_of_another_model(model, asked):
    x, kv = asked
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"voco_kv\[0\] must be made by this model"):
        model.generate(**x, voco_kv=kv, **GENERATED)


def test_a_cache_of_another_processor(model, asked):
    x, kv = asked
    model.processor = processor(vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match=r"voco_kv\[0\] must be made by this processor"):
        model.generate(**x, voco_kv=kv, **GENERATED)


def test_a_cache_of_another_voco_count(model, asked):
    x, _ = asked
    kv = model.compress(picture(0), 3)
    with pytest.raises(ValueError, match=r"voco_kv\[0\] must be of \d+ private and 2 VoCo tokens, .* but was of .*3"):
        model.generate(**x, voco_kv=kv, **GENERATED)


def test_a_cache_of_other_sizes(model, asked):
    x, (kv,) = asked
    wrong = VocoKV(kv.k[:1], kv.v[:1])
    with pytest.raises(ValueError, match=r"voco_kv\[0\] must have \[layers, heads\] \[2, 2\], but was of shape \[1, "):
        model.generate(**x, voco_kv=wrong, **GENERATED)


def test_a_cache_that_lacks_the_hidden_prefix(model, asked):
    """Text before the first image belongs to its segment here, so K/V of the image alone are others."""
    _, kv = asked
    x = without_pixels(inputs(model, ["look at <image>\nhow many?"]))
    with pytest.raises(ValueError, match=r"voco_kv\[0\] must be of 22 private and 2 VoCo tokens, .* but was of .*12"):
        model.generate(**x, voco_kv=kv, **GENERATED)


def test_a_cache_of_another_hidden_prefix(model):
    """A prefix that the segment hides is in its K/V."""
    x = inputs(model, ["look at <image>\nhow many?"])
    end = x["input_ids"][0].tolist().index(VOCO) + 2
    segment, pixel_values = x["input_ids"][:, :end], x["pixel_values"]
    kv = model.compress(input_ids=segment, pixel_values=pixel_values)
    got = model.generate(**without_pixels(x), voco_kv=kv, **GENERATED)
    assert torch.equal(got, expected_tokens(model, x))
    segment = segment.clone()
    segment[0, 3] += 1
    kv = model.compress(input_ids=segment, pixel_values=pixel_values)
    with pytest.raises(ValueError, match=r"voco_kv\[0\] must be made of its segment's tokens in input_ids"):
        model.generate(**without_pixels(x), voco_kv=kv, **GENERATED)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_or_too_many_caches(model, count):
    x = without_pixels(inputs(model, ["<image>and<image>what?"]))
    kv = model.compress(pictures(3))[:count]
    with pytest.raises(ValueError, match=rf"voco_kv must hold one VocoKV per image of the prompts \(2\), but holds {count}"):
        model.generate(**x, voco_kv=kv, **GENERATED)


def test_a_cache_where_its_segment_is_not_closed():
    model = voco_llava(isolated=False, hide_prefix=False)
    x = without_pixels(inputs(model, ["text before <image>\nhow many?"]))
    with pytest.raises(ValueError, match=r"voco_kv\[0\] stands where its segment is not closed .*two_stage=True"):
        model.generate(**x, voco_kv=model.compress(picture(0)), **GENERATED)


def test_prompts_longer_than_the_context():
    model = voco_llava(text={"max_position_embeddings": 24})
    x = inputs(model, ["<image>\nthis question is far too long"])
    kv = model.compress(picture(0))
    calls = (x, {**x, "two_stage": True}, {**without_pixels(x), "voco_kv": kv})
    for call in calls:
        with pytest.raises(ValueError, match="input_ids must fit the context of 24 positions, but reach position"):
            model.generate(**call, **GENERATED)
    with pytest.raises(ValueError, match="input_ids must fit the context"), pytest.warns(UserWarning):
        model.compress(picture(0), 30)


def test_compact_positions_fit_more_images():
    """Two images that exceed the context when counted in full."""
    prompts = ["<image>a<image>b"]
    sizes = {"max_position_embeddings": 26}
    for positions, fits in (("continuous", False), ("compact", True)):
        model = voco_llava(positions=positions, text=sizes)
        x = inputs(model, prompts)
        assert x["input_ids"].shape[1] > 26
        if fits:
            assert model.generate(**x, **{**GENERATED, "max_new_tokens": 1}).shape[0] == 1
        else:
            with pytest.raises(ValueError, match="input_ids must fit the context"):
                model.generate(**x, **GENERATED)


def test_a_prompt_that_ends_with_an_image(model):
    x = inputs(model, ["<image>\nfine", "what is <image>"])
    with pytest.raises(ValueError, match="input_ids must end with text in every row, but row 1 ends with an image"):
        model.generate(**x, two_stage=True, **GENERATED)


@pytest.mark.parametrize("prompt", ["<image>text", "text <image>", "<image><image>", "no image"])
def test_compress_refuses_rows_that_are_not_one_segment(prompt):
    model = voco_llava(hide_prefix=False)
    count = prompt.count("<image>")
    x = model.processor(pictures(count), prompt)
    with pytest.raises(ValueError, match=r"input_ids must hold one closed segment a row .* row 0 .*two_stage=True"):
        model.compress(input_ids=x["input_ids"], pixel_values=x.get("pixel_values", pixels(1)))


def test_compress_refuses_an_open_bos():
    """Without an image start token BOS is text, which the segment would see or not, but never contain."""
    model = voco_llava(hide_prefix=False, image_start_id=None)
    with pytest.raises(ValueError, match="input_ids must hold one closed segment a row"):
        model.compress(picture(0))


def test_compress_needs_images(model):
    with pytest.raises(ValueError, match="images must be given, or input_ids and pixel_values"):
        model.compress()
    with pytest.raises(ValueError, match="does not exist"):
        model.compress(["nowhere.png"])


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rope_types_that_cannot_be_stored(rope):
    model = voco_llava(rope)
    x = inputs(model, ["<image>\nhow many?"])
    for call in (lambda: model.compress(picture(0)), lambda: model.generate(**x, two_stage=True, **GENERATED)):
        with pytest.raises(ValueError, match=f"rope_type must be one with fixed frequencies .*'{rope}'"):
            call()
    assert model.generate(**x, **GENERATED).shape[1] == x["input_ids"].shape[1] + 6


def test_arguments_that_exclude_each_other(model, asked):
    x, kv = asked
    cache = DynamicCache(config=model.config.text_config)
    for name in CACHE_NAMES:
        with pytest.raises(ValueError, match=f"{CACHE_NAME} must be None where voco_kv or two_stage is given"):
            model.generate(**x, voco_kv=kv, **{name: cache}, **GENERATED)
    with pytest.raises(ValueError, match="use_cache must be True where voco_kv or two_stage is given"):
        model.generate(**x, voco_kv=kv, use_cache=False, **GENERATED)
    with pytest.raises(ValueError, match="pixel_values must hold the images of the prompt that have no K/V"):
        model.generate(**x, voco_kv=kv, pixel_values=pixels(1), **GENERATED)


def test_images_without_pixels_and_without_a_cache(model, asked):
    """Placeholders alone would be read as words."""
    x, kv = asked
    with pytest.raises(ValueError, match="pixel_values or voco_kv must be given for input_ids with images"):
        model.generate(**x, **GENERATED)
    with pytest.raises(ValueError, match="pixel_values must hold the images of the prompt that have no K/V"):
        model.generate(**x, two_stage=True, **GENERATED)
    mixed = without_pixels(model.processor(None, "<image>a<image>b", [2, 0]))
    with pytest.raises(ValueError, match="pixel_values must hold the images of the prompt that have no K/V"):
        model.generate(**mixed, voco_kv=kv, **GENERATED)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_other_numbers_of_images_than_the_prompts_have(model, count):
    x = inputs(model, ["<image>and<image>what?"])
    x["pixel_values"] = pixels(count)
    with pytest.raises(ValueError, match="pixel_values must hold the images"):
        model.generate(**x, two_stage=True, **GENERATED)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model.generate(**x, **GENERATED)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_that_does_not_hold_the_images(model, name):
    """Behind a filled cache everything is plain causal: an image there would be seen by all later text."""
    x = inputs(model, ["<image>\nhow many?"])
    out = model.generate(**x, two_stage=True, return_dict_in_generate=True, **GENERATED)
    cache = {name: getattr(out, CACHE_NAME)}
    with pytest.raises(ValueError, match=f"{CACHE_NAME} must come from a single pass over the beginning of input_ids"):
        model.generate(input_ids=out.sequences, **cache, **GENERATED)
    with pytest.raises(ValueError, match="input_ids must be text, .* behind a filled cache"):
        model(**x, **cache)


def test_attention_that_would_ignore_the_mask(model):
    x = inputs(model, ["<image>\nhow many?"])
    for name in ("sdpa", "eager"):
        model.set_attn_implementation({"text_config": name})
        with pytest.raises(ValueError, match=f'attn_implementation must be "voco" .*, but was "{name}"'):
            model(**x)
        with pytest.raises(ValueError, match="attn_implementation"):
            model.generate(**x, **GENERATED)
    model.set_attn_implementation("voco")
    model(**x)


def test_the_configuration_fits_llava_hf():
    config = VocoLlavaConfig()
    assert (config.voco_token_id, config.isolated, config.hide_prefix, config.positions) == (32002, True, True, "continuous")
    assert voco_config().model_type == "voco_llava"


def test_the_layout_of_a_batch(model):
    """Padding is kept, and the prefix of a row belongs to its first image."""
    x = inputs(model, ["text <image>\n?", "hi"])
    layout = model.layout_of(x["input_ids"], x["attention_mask"])
    assert isinstance(layout, VocoLayout) and layout.num_tokens == x["input_ids"].numel()
    rows = layout.segment_ids.view(x["input_ids"].shape)
    assert rows[0, 0] > 0 and rows[0, -1] == 0 and rows[1, 0] == -1 and rows[1, -1] == 0
    assert layout.isolated
