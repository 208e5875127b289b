"""The systems that are compared: compressors against plain formulas, what guides them, and every word from end to end."""

import copy

import numpy as np
import pytest
import torch
from models import (
    BOS,
    FIRST_TEXT,
    GENERATED,
    IMAGE,
    SPREAD,
    VISION,
    masked_eager,
    picture,
    pixels,
    processor,
    stock_of,
    voco_llava,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from voco_llama import (
    VocoCollator,
)
from voco_llama.baselines import with_compressor
from voco_llama.baselines.guide import text_behind_images
from voco_llama.systems import SYSTEMS, answer, prepare

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
COMPRESSORS = ["avg_pool", "q_former", "llama_vid"]
TRAINED = [system.name for system in SYSTEMS.values() if system.trains]
QUESTIONS = ["how many?", "what is the sum of all of it?", "hi"]
IMAGES = [[picture(0)], [picture(1), picture(2)], []]
ANSWER = {name: value for name, value in GENERATED.items() if name != "do_sample"}


def system(name, num_tokens=2, **settings):
    """A tiny model of a system. Its compressor's weights are large enough for images and text to matter."""
    torch.manual_seed(0)
    settings = {"initializer_range": SPREAD, **settings}
    small = {"qformer_config": SMALL} if name in COMPRESSORS else {}
    return prepare(name, voco_llava(**settings), processor(), num_tokens, **small)[0].eval()


def document(name_or_model, images, text=7, answered=3, seed=0):
    """A sample: images, `text` tokens that ask, `answered` that answer."""
    model = name_or_model
    random = torch.Generator().manual_seed(seed)
    asked = torch.randint(FIRST_TEXT, 64, (text + answered,), generator=random)
    ids = torch.cat([torch.tensor([BOS] + [IMAGE] * model.config.tokens_per_image)] * images + [asked])
    labels = ids.clone()
    labels[: len(ids) - answered] = -100
    sample = {"input_ids": ids, "labels": labels}
    return {**sample, "pixel_values": pixels(images, seed)} if images else sample


def features_of(model, batch):
    """[images, tokens, E] that reach the LLaMA in a forward of `batch`."""
    caught = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda module, given, out: caught.append(out))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return caught[0]


# ---- compressors by their formulas ---------------------------------------------------------------------------------------


def pooled(features, rows, columns):
    """Means over cells of the 3 * 3 grid, by loops."""
    grid, edge = features.reshape(3, 3, -1), 3
    cells = []
    for r in range(rows):
        for c in range(columns):
            ys = slice(r * edge // rows, -(-(r + 1) * edge // rows))
            xs = slice(c * edge // columns, -(-(c + 1) * edge // columns))
            cells.append(grid[ys, xs].reshape(-1, grid.shape[-1]).mean(0))
    return np.stack(cells)


def linear(module, x):
    return x @ module.weight.detach().double().numpy().T + module.bias.detach().double().numpy()


def vision_tokens(count=2):
    return torch.randn(count, VISION, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("tokens", "cells"), [(1, (1, 1)), (2, (1, 2)), (4, (2, 2)), (6, (2, 3)), (9, (3, 3))])
@pytest.mark.parametrize("with_class_token", [False, True])
def test_average_pooling_is_the_mean_of_cells(tokens, cells, with_class_token):
    compressor = system("avg_pool", tokens).model.multi_modal_projector
    x = vision_tokens()
    given = torch.cat([torch.full((2, 1, 32), 1e3), x], dim=1) if with_class_token else x
    found = compressor(given).detach().numpy()
    wanted = np.stack([linear(compressor.linear, pooled(one, *cells)) for one in x.double().numpy()])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_number_that_the_grid_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="num_compressed_tokens must be rows .* but was 5"):
        system("avg_pool", 5)


def test_llama_vid_is_its_formula():
    model = system("llama_vid", 4)
    compressor, asked = model.model.multi_modal_projector, []
    compressor.decoder.register_forward_hook(lambda module, given, out: asked.append(out.last_hidden_state))
    raw = []
    compressor.register_forward_pre_hook(lambda module, given: raw.append(given[0]))
    found = features_of(model, VocoCollator(model.config)([document(model, 2)]))
    assert found.shape == (2, 5, 64)
    for x, states, tokens in zip(raw[0].double().numpy(), asked[0].detach().double().numpy(), found.numpy(), strict=True):
        queries, keys = linear(compressor.query, states[:32]), linear(compressor.key, x)
        context = np.zeros(32)
        for query in queries:
            scores = np.exp([query @ key / 32**0.5 for key in keys])
            context += (scores[:, None] / scores.sum() * x).sum(0) / len(queries)
        np.testing.assert_allclose(tokens[0], linear(compressor.context, context), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(tokens[1:], linear(compressor.content, pooled(x, 2, 2)), rtol=1e-4, atol=1e-4)


def test_a_query_reads_the_whole_image():
    """Each vision token changes each token of a Q-Former."""
    compressor = system("q_former", 3).model.multi_modal_projector
    x = vision_tokens(1).requires_grad_()
    for i in range(3):
        (slope,) = torch.autograd.grad(compressor(x)[0, i].square().sum(), x)
        assert (slope[0].abs().amax(-1) > 1e-6).all()
    tokens = compressor(x)[0]
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-3)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_several_layers_of_the_tower(name):
    """As in LLaVA, their vision tokens stand side by side."""
    model = system(name, vision_feature_layer=[-2, -1])
    assert features_of(model, VocoCollator(model.config)([document(model, 1)])).isfinite().all()


# ---- what guides an image -------------------------------------------------------------------------------------------------


def test_the_question_guides_the_context_token_alone():
    model = system("llama_vid")
    one = features_of(model, VocoCollator(model.config)([document(model, 2)]))
    asked = document(model, 2)
    asked["input_ids"][-4] = FIRST_TEXT if asked["input_ids"][-4] != FIRST_TEXT else FIRST_TEXT + 1
    other = features_of(model, VocoCollator(model.config)([asked]))
    assert (one[:, 0] - other[:, 0]).abs().amax(-1).min() > 1e-3
    assert torch.equal(one[:, 1:], other[:, 1:])


def test_the_answer_does_not_guide():
    model = system("llama_vid")
    one = features_of(model, VocoCollator(model.config)([document(model, 1)]))
    told = document(model, 1)
    for name in ("input_ids", "labels"):
        told[name][-3:] = FIRST_TEXT
    assert torch.equal(one, features_of(model, VocoCollator(model.config)([told])))


def test_of_a_long_text_the_end_guides():
    ids = torch.tensor([[BOS, IMAGE, IMAGE, 9, IMAGE, IMAGE, *range(10, 20), BOS, IMAGE, IMAGE, 30]])
    guide = text_behind_images(ids, IMAGE, 2, 4, cu_seqlens=torch.tensor([0, 16, 20], dtype=torch.int32))
    assert [row[mask].tolist() for row, mask in zip(guide.ids, guide.mask)] == [[16, 17, 18, 19]] * 2 + [[30]]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_packed_documents_are_each_as_alone(name):
    model = system(name)
    documents = [document(model, n, text=5 + n, seed=n) for n in (1, 0, 3, 2)]
    pack = VocoCollator(model.config)
    packed = pack(documents)
    features = features_of(model, packed).split([1, 3, 2])
    alone = [features_of(model, pack([one])) for one in documents if "pixel_values" in one]
    for a, b in zip(features, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        logits = model(**packed).logits[0].split([len(one["input_ids"]) for one in documents])
        for rows, one in zip(logits, documents, strict=True):
            torch.testing.assert_close(rows, model(**pack([one])).logits[0], atol=1e-4, rtol=1e-4)


def test_padding_does_not_guide():
    model = system("llama_vid")
    alone = features_of(model, model.processor(IMAGES[0], model.processor.prompt(QUESTIONS[0])))
    for side in ("left", "right"):
        prompts = [model.processor.prompt(q, len(x)) for q, x in zip(QUESTIONS, IMAGES, strict=True)]
        batch = model.processor(IMAGES[0] + IMAGES[1], prompts, padding_side=side)
        torch.testing.assert_close(features_of(model, batch)[:1], alone, atol=1e-5, rtol=1e-5)


def test_an_image_without_text_and_parts_without_a_prompt():
    model = system("llama_vid")
    ids = torch.tensor([[BOS] + [IMAGE] * 3])
    assert features_of(model, {"input_ids": ids, "pixel_values": pixels(1)}).isfinite().all()
    with pytest.raises(ValueError, match="input_ids must be given to the compressor"):
        model.model.get_image_features(pixel_values=pixels(1))
    with pytest.raises(ValueError, match="use_cache must be True"):
        model.generate(ids, pixel_values=pixels(1), use_cache=False)
    with pytest.raises(ValueError, match="compressor must be one that does not read the question"):
        model.cache_images(ids, pixels(1))


# ---- every system ---------------------------------------------------------------------------------------------------------


def batch_for(model, name):
    if name in COMPRESSORS:
        return VocoCollator(model.config)([document(model, 2), document(model, 0, seed=1), document(model, 1, seed=2)])
    ids = torch.tensor([BOS] + [IMAGE] * VISION + [FIRST_TEXT] + [4, 4] + list(range(10, 20)))
    labels = torch.where(torch.arange(len(ids)) < len(ids) - 5, -100, ids)
    return VocoCollator(model.config)([{"input_ids": ids, "labels": labels, "pixel_values": pixels(1)}])


# Softmax does not see a shift of all scores, and nothing reads the text behind the decoder's last layer.
WITHOUT_SLOPE = ("key.bias", "decoder.encoder.layer.1.intermediate.", "decoder.encoder.layer.1.output.")


@pytest.mark.parametrize("name", TRAINED)
def test_a_system_trains_saves_reloads(name, tmp_path):
    model = system(name)
    model.model.vision_tower.requires_grad_(False)
    batch = batch_for(model, name)
    model.train()(**batch).loss.backward()
    for key, x in model.named_parameters():
        if x.requires_grad:
            assert x.grad is not None and x.grad.isfinite().all(), key
            assert bool(x.grad.any()) or ("projector" in key and any(part in key for part in WITHOUT_SLOPE)), key
    model.eval().save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config.masked == model.config.masked
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    given = {"questions": QUESTIONS, "images": IMAGES, "num_tokens": 2, **ANSWER}
    assert answer(name, again, **given) == answer(name, model, **given)
    # What ask takes to be the number of tokens is that of the system.
    assert again.ask(QUESTIONS[1], images=IMAGES[1], **ANSWER) == answer(name, model, **given)[1]
    assert AutoProcessor.from_pretrained(tmp_path).num_image_tokens == model.processor.num_image_tokens


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_batch_is_answered_as_each_question_alone(name):
    model = system(SYSTEMS[name].weights_of)
    before = copy.deepcopy(model.config)
    together = answer(name, model, QUESTIONS, IMAGES, 2, **ANSWER)
    alone = [answer(name, model, [q], [x], 2, **ANSWER)[0] for q, x in zip(QUESTIONS, IMAGES, strict=True)]
    assert together == alone and len(set(together)) == 3
    assert model.config.to_dict() == before.to_dict()
    assert answer(name, model, [], [], 2) == []


def test_upper_bound_is_stock_llava_and_lower_bound_is_voco():
    upper = system("upper_bound")
    tokens = upper.processor(IMAGES[1], upper.processor.prompt(QUESTIONS[1], 2))
    ids = tokens["input_ids"]
    stock = stock_of(upper)
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(upper(**tokens).logits, stock(**tokens).logits, atol=1e-4, rtol=1e-4)
    decode = upper.processor.batch_decode
    for name, output in (
        ("upper_bound", stock.generate(**tokens, **GENERATED)),
        ("full_caching", None),
        ("lower_bound", None),
        ("voco", None),
    ):
        if name == "full_caching":
            plain = upper.processor(IMAGES[1], upper.processor.prompt(QUESTIONS[1], 2), 0)
            output, length = stock.generate(**plain, **GENERATED), plain["input_ids"].shape[1]
        else:
            length = ids.shape[1]
        if output is None:
            masked = copy.deepcopy(upper)
            masked.config.masked = True
            output = masked_eager(stock_of(upper), masked.layout_of)(ids, tokens["pixel_values"])
        wanted = decode(output[:, length:], skip_special_tokens=True)[0].strip()
        assert answer(name, upper, [QUESTIONS[1]], [IMAGES[1]], 2, **ANSWER) == [wanted], name


def test_a_processor_serves_another_system_afterwards():
    used = system("llama_vid").processor
    model, used = prepare("voco", voco_llava(), used, 2)
    assert used.num_image_tokens == VISION
    assert answer("voco", model, QUESTIONS[:1], IMAGES[:1], 2, **ANSWER)
    assert model.fingerprint() != system("avg_pool").fingerprint() != system("q_former").fingerprint()


@pytest.mark.parametrize("name", COMPRESSORS)
def test_beams_are_those_of_each_question_alone(name):
    model, options = system(name), {**ANSWER, "num_beams": 3}
    together = answer(name, model, QUESTIONS, IMAGES, 2, **options)
    assert together == [answer(name, model, [q], [x], 2, **options)[0] for q, x in zip(QUESTIONS, IMAGES, strict=True)]


def test_full_caching_reads_the_images_once():
    model, calls = system("upper_bound"), []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    answer("full_caching", model, QUESTIONS[:1], IMAGES[:1], 2, **ANSWER)
    assert len(calls) == 1


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_compressor_shares_the_rest_and_starts_as_llava_does(name):
    base = voco_llava(initializer_range=SPREAD)
    model = with_compressor(base, name, 2, SMALL)
    assert not model.training and with_compressor(base.train(), name, 2, SMALL).training
    low = with_compressor(voco_llava().bfloat16(), name, 2, SMALL)
    assert {x.dtype for x in low.parameters()} == {torch.bfloat16}
    shared = {key: x.data_ptr() for key, x in base.state_dict().items() if "projector" not in key}
    own = {key: x.data_ptr() for key, x in model.state_dict().items() if "projector" not in key}
    assert own == shared
    matrices = {k: x for k, x in model.named_parameters() if "projector" in k and x.ndim == 2 and x.numel() > 500}
    for key, x in matrices.items():
        assert abs(float(x.detach().std()) / SPREAD - 1) < 0.2, key
    assert all(not x.any() for k, x in model.named_parameters() if "projector" in k and k.endswith("linear.bias"))


def test_what_does_not_fit_is_refused(tmp_path):
    model = system("avg_pool")
    for name, count, problem in (
        ("avg_pool", 3, r"num_tokens must be .* \(2\), but was 3"),
        ("voco", 2, "model must have the compressor None for voco, but has avg_pool"),
        ("avg_pool", 0, "num_tokens must be at least 1, but was 0"),
        ("mean", 2, "system must be one of"),
    ):
        with pytest.raises(ValueError, match=problem):
            prepare(name, model, model.processor, count)
    with pytest.raises(ValueError, match="qformer_config must be None"):
        prepare("avg_pool", model, model.processor, 2, qformer_config=SMALL)
    with pytest.raises(ValueError, match="input_ids must hold one closed segment a row"):
        model.compress([picture(0)], 0)
    with pytest.raises(ValueError, match="voco, upper_bound, lower_bound, full_caching, avg_pool, q_former, llama_vid"):
        prepare("mean", model, model.processor, 2)
    with pytest.raises(ValueError, match="compressor avg_pool for avg_pool, but has None"):
        answer("avg_pool", system("voco"), QUESTIONS, IMAGES, 2)
    with pytest.raises(ValueError, match="images must hold a list for each of the 3 questions, but holds 1"):
        answer("avg_pool", model, QUESTIONS, IMAGES[:1], 2)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.endswith("multi_modal_projector.linear.weight"))
    save_file({name: x for name, x in weights.items() if name != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks: .*multi_modal_projector.linear.weight"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
