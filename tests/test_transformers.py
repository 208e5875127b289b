"""VoCo attention in stock Hugging Face models, against transformers' own eager attention under an explicit 4-D mask."""

import dataclasses
import inspect
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from models import (
    EOS,
    GENERATED,
    IMAGE,
    PAD,
    VISION,
    VOCAB,
    VOCO,
    additive_mask,
    batch_of,
    builder,
    exact_logits,
    llama,
    llama_config,
    llava,
    masked_eager,
    pixels,
    twin,
)
from reference import PADDING, assert_error_rule, kinds_of
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from voco_kernels import VocoLayout
from voco_kernels.integrations import transformers as voco_transformers
from voco_kernels.integrations.transformers import (
    CACHE_NAME,
    CACHE_NAMES,
    PrefillMask,
    attach,
    decode_mask,
    keep_public_keys,
    voco_mask,
)

# Nothing here may call transformers under a name that it gave up.
pytestmark = pytest.mark.filterwarnings("error:.*`past_key_values`:FutureWarning")

ROOT = Path(__file__).parents[1]

# Rows of a batch: b BOS, v vision, c VoCo, t text.
BATCHES = {
    "one image": ["bvvvvvvccttt"],
    "left padding": ["bvvvvvvccttt", "btvvvvct", "bttt"],
    "several images": ["bvvvccttvvvvvcttt", "tvvctvvccvcttt"],
    "no image": ["bttttt", "btt"],
    "an image without VoCo tokens": ["bvvvvtt", "bvvcctt"],
}
KINDS = [
    pytest.param({"isolated": True, "hide_prefix": True}, id="isolated, prefix hidden"),
    pytest.param({"isolated": True, "hide_prefix": False}, id="isolated"),
    pytest.param({"isolated": False, "hide_prefix": False}, id="not isolated"),
    pytest.param({"isolated": False, "hide_prefix": True, "positions": "compact"}, id="not isolated, compact"),
]


@pytest.fixture
def model():
    return llama()


def single_pass(model, ids, layout, mask=None, **kwargs):
    """The masked forward under test."""
    positions = layout.position_ids.view(ids.shape)
    return model(ids, attention_mask=mask, position_ids=positions, voco_layout=layout, **kwargs)


def eager_pass(model, ids, layout, **kwargs):
    """The same by transformers' eager attention with an additive 4-D mask."""
    positions = layout.position_ids.view(ids.shape)
    mask = additive_mask(layout, ids.shape[0], model.dtype)
    return twin(model, "eager")(ids, attention_mask=mask, position_ids=positions, **kwargs)


def assert_logits(got, eager, exact, layout) -> None:
    kinds = kinds_of(layout)
    seen = torch.from_numpy(kinds != PADDING)
    got, eager, exact = (x.detach().flatten(0, 1)[seen] for x in (got, eager, exact))
    assert_error_rule("logits", got, eager, exact, kinds[seen.numpy()])


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters()}


def assert_same_gradients(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys() and got
    for name, x in expected.items():
        assert x.abs().max() > 0, name
        torch.testing.assert_close(got[name], x, rtol=0, atol=2e-5 * x.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}")


def labels_of(ids, mask):
    """Every token that another token of its row stands before."""
    follows = torch.nn.functional.pad(mask, (1, 0))[:, :-1] * mask
    return ids.masked_fill(follows == 0, -100)


# ---- masked single pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_logits_equal_eager_with_a_mask(model, rows, kind):
    ids, mask = batch_of(*rows)
    layout = builder(**kind)(ids, attention_mask=mask)
    with torch.no_grad():
        got, eager = single_pass(model, ids, layout, mask).logits, eager_pass(model, ids, layout).logits
    assert_logits(got, eager, exact_logits(model, ids, layout), layout)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 2, 4], ids=lambda n: f"{n} key heads")
def test_loss_and_gradients_equal_eager_with_a_mask(kind, heads):
    model = llama(num_key_value_heads=heads)
    ids, mask = batch_of(*BATCHES["several images"], *BATCHES["left padding"])
    layout, labels = builder(**kind)(ids, attention_mask=mask), labels_of(ids, mask)
    other = twin(model, "eager")
    got = single_pass(model, ids, layout, mask, labels=labels).loss
    positions, dense = layout.position_ids.view(ids.shape), additive_mask(layout, len(ids))
    expected = other(ids, attention_mask=dense, position_ids=positions, labels=labels).loss
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)
    assert_same_gradients(gradients(model, got), gradients(other, expected))


def test_a_wrong_mask_is_noticed(model):
    """The comparisons above can fail: leaving out one kind of visibility changes logits by their own size."""
    ids, mask = batch_of("bvvvccttvvvvvcttt")
    with torch.no_grad():
        logits = {
            name: single_pass(model, ids, builder(**options)(ids)).logits[0, -1]
            for name, options in (
                ("isolated", {"isolated": True, "hide_prefix": False}),
                ("not isolated", {"isolated": False, "hide_prefix": False}),
                ("hidden", {"isolated": True, "hide_prefix": True}),
            )
        }
        logits["causal"] = model(ids, attention_mask=mask).logits[0, -1]
    for name, x in logits.items():
        for other, y in logits.items():
            assert name == other or (x - y).abs().max() > 0.01 * x.abs().max(), (name, other)


def test_packed_rows(model):
    """[1, N] with several documents: the same logits as each document alone."""
    rows = ["bvvvcctt", "btt", "tvvctvvccttt"]
    documents = [batch_of(row)[0] for row in rows]
    packed = torch.cat(documents, dim=1)
    ends = torch.tensor([0, *(x.shape[1] for x in documents)]).cumsum(0)
    layout = builder(hide_prefix=False)(packed, cu_seqlens=ends)
    with torch.no_grad():
        got, eager = single_pass(model, packed, layout).logits, eager_pass(model, packed, layout).logits
        alone = [single_pass(model, x, builder(hide_prefix=False)(x)).logits for x in documents]
    assert_logits(got, eager, exact_logits(model, packed, layout), layout)
    torch.testing.assert_close(got, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_padding_does_not_matter(model):
    """A row's logits are the same alone, padded on the left and padded on the right."""
    short, long = "btvvvvcctt", "bvvvvvvvvvvcctttttt"
    expected = single_pass(model, batch_of(short)[0], builder()(batch_of(short)[0])).logits[0]
    for side in ("left", "right"):
        ids, mask = batch_of(short, long, pad=side)
        got = single_pass(model, ids, builder()(ids, attention_mask=mask), mask).logits[0, mask[0].bool()]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_extra_keywords_of_trainers_are_accepted(model):
    ids, mask = batch_of("bvvvcctt")
    layout = builder()(ids)
    plain = single_pass(model, ids, layout, mask, labels=ids).loss
    with_count = single_pass(model, ids, layout, mask, labels=ids, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(with_count, plain * (ids.shape[1] - 1) / 7)


def test_autocast(model):
    """As trainers run it: float32 weights, products in bfloat16; logits and gradients as close as eager's under autocast."""
    ids, mask = batch_of("bvvvcctt", "btvvvvcctttt")
    layout, labels = builder()(ids, attention_mask=mask), labels_of(ids, mask)
    dense, positions = additive_mask(layout, len(ids)), layout.position_ids.view(ids.shape)
    other = twin(model, "eager")
    with torch.autocast("cpu", torch.bfloat16):
        got = single_pass(model, ids, layout, mask, labels=labels)
        eager = other(ids, attention_mask=dense, position_ids=positions, labels=labels)
    exact = exact_logits(model, ids, layout)
    seen = torch.from_numpy(kinds_of(layout) != PADDING)
    errors = [(x.logits.double().flatten(0, 1)[seen] - exact.flatten(0, 1)[seen]).abs().max() for x in (got, eager)]
    assert 0 < errors[0] <= 2 * errors[1]
    for (name, x), y in zip(gradients(model, got.loss).items(), gradients(other, eager.loss).values()):
        assert (x - y).abs().max() <= 0.1 * y.abs().max(), name


# ---- plain causal, without a layout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [["btttttt"], ["btttttt", "bt", "bttt"]], ids=["no padding", "padding"])
def test_without_a_layout_attention_is_causal(model, rows, side):
    """The 2-D padding mask is not dropped."""
    ids, mask = batch_of(*rows, pad=side)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    seen = mask.bool()
    other = twin(model, "eager")
    labels = labels_of(ids, mask)
    got = model(ids, attention_mask=mask, position_ids=positions, labels=labels)
    expected = other(ids, attention_mask=mask, position_ids=positions, labels=labels)
    torch.testing.assert_close(got.logits[seen], expected.logits[seen], rtol=1e-4, atol=1e-4)
    assert_same_gradients(gradients(model, got.loss), gradients(other, expected.loss))


def test_a_4d_mask_of_the_callers_own_is_obeyed(model):
    ids, _ = batch_of("bvvvvccttt")
    mask = additive_mask(builder()(ids), 1)
    with torch.no_grad():
        got, expected = (m(ids, attention_mask=mask).logits for m in (model, twin(model, "eager")))
        causal = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - causal).abs().max() > 0.1
    with pytest.raises(ValueError, match="attention_mask must be a 2-D mask or None where a layout is given"):
        model(ids, attention_mask=mask, voco_layout=builder()(ids))


# ---- loading -----------------------------------------------------------------------------------------------------------


def test_loading_and_saving(model, tmp_path):
    """The implementation is chosen at every load and never saved."""
    model.save_pretrained(tmp_path)
    assert "voco" not in (tmp_path / "config.json").read_text()
    ids, mask = batch_of("bvvvcctt", "btt")
    layout = builder()(ids, attention_mask=mask)
    expected = single_pass(model, ids, layout, mask).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="voco")
    assert torch.equal(single_pass(loaded, ids, layout, mask).logits, expected)
    default = LlamaForCausalLM.from_pretrained(tmp_path)
    assert default.config._attn_implementation == "sdpa"
    default.set_attn_implementation("voco")
    assert torch.equal(single_pass(default, ids, layout, mask).logits, expected)


def test_registering_again_changes_nothing(model):
    ids, _ = batch_of("bvvvcctt")
    before = single_pass(model, ids, builder()(ids)).logits
    voco_transformers.register()
    assert torch.equal(single_pass(model, ids, builder()(ids)).logits, before)


# ---- gradient checkpointing --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing(model, reentrant):
    """The layout is there when a layer is computed again, also when backward runs long after forward."""
    ids, mask = batch_of("bvvvvccttt", "btvvct")
    layout, labels = builder()(ids, attention_mask=mask), labels_of(ids, mask)
    model.train()
    expected = gradients(model, single_pass(model, ids, layout, mask, labels=labels).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    loss = single_pass(model, ids, layout, mask, labels=labels).loss
    # Another forward in between, with another layout: nothing global may be left over from it.
    other, _ = batch_of("bvvcttttt")
    single_pass(model, other, builder(isolated=False)(other))
    assert_same_gradients(gradients(model, loss), expected)


# ---- attach and generate -----------------------------------------------------------------------------------------------

PROMPTS = {
    "one row": ["bvvvvvvccttt"],
    "rows of one length": ["bvvvvvvccttt", "bvvvvvvccttt"],
    "different numbers of public keys": ["bvvvvvvccttt", "btvvvvct", "bvvvccttvvvvvcttt"],
    "rows without images": ["bvvvvvvccttt", "bttt", "bttttt"],
    "a row without images as long as the batch": ["bvvvvvvccttt", "bttttttttttt"],
    "a row without images longer than the others": ["bvvvvvvccttt", "btttttttttttttt"],
    "text only": ["btttt", "bt"],
}
# Left padding among public keys does not change whether a mask is needed at all; without padding there is none.
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS)
def test_attached_generate_equals_masked_passes(model, rows, cache):
    ids, mask = batch_of(*rows)
    build = builder()
    expected = masked_eager(model, build)(ids, attention_mask=mask)
    attach(model, build)
    assert torch.equal(model.generate(ids, attention_mask=mask, **CACHES[cache], **GENERATED), expected)


@pytest.mark.parametrize("kind", KINDS[1:3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_attached_generate_where_text_precedes_images(model, kind, cache):
    ids, mask = batch_of("bttvvvvccttt", "btvvcttvvvcctt", "bttt")
    build = builder(**kind)
    expected = masked_eager(model, build)(ids, attention_mask=mask)
    attach(model, build)
    assert torch.equal(model.generate(ids, attention_mask=mask, **CACHES[cache], **GENERATED), expected)


@pytest.mark.parametrize("rows", list(PROMPTS.values())[2:5], ids=list(PROMPTS)[2:5])
@pytest.mark.parametrize("cache", CACHES)
def test_attached_beam_search(model, rows, cache):
    ids, mask = batch_of(*rows)
    build, beams = builder(), {"num_beams": 3, "num_return_sequences": 2}
    expected = masked_eager(model, build)(ids, attention_mask=mask, **beams)
    attach(model, build)
    got = model.generate(ids, attention_mask=mask, **beams, **CACHES[cache], **GENERATED)
    assert torch.equal(got, expected)


def test_attached_generate_with_compact_positions(model):
    ids, mask = batch_of("bvvvvvvccttt", "bvvct")
    build = builder(positions="compact")
    expected = masked_eager(model, build)(ids, attention_mask=mask)
    positions = build(ids, attention_mask=mask).position_ids.view(ids.shape)
    attach(model, build)
    assert torch.equal(model.generate(ids, attention_mask=mask, position_ids=positions, **GENERATED), expected)


def test_attached_generate_with_a_static_cache_object(model):
    """Also a second time after reset(), for prompts whose cache is nothing like the one before."""
    build = builder()
    reference = masked_eager(model, build)
    attach(model, build)
    cache = StaticCache(model.config, max_cache_len=40)
    padded, plain = ["bttttttt", "btttttt", "bttttt"], ["bttttttt"] * 3
    for rows in (PROMPTS["different numbers of public keys"], plain, ["bvvccttt", "bt", "bvct"], padded, ["bvvccttt"] * 3):
        ids, mask = batch_of(*rows)
        got = model.generate(ids, attention_mask=mask, **{CACHE_NAME: cache}, **GENERATED)
        assert torch.equal(got, reference(ids, attention_mask=mask))
        cache.reset()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_conversation_goes_on_behind_its_cache(model, static):
    """The second call gets all ids, as transformers wants it, though the cache holds fewer keys than there are ids."""
    ids, mask = batch_of("bvvvvvvccttt", "btvvvvct")
    build = builder()
    reference = masked_eager(model, build)
    attach(model, build)
    cache = StaticCache(model.config, max_cache_len=60) if static else DynamicCache(config=model.config)
    first = model.generate(ids, attention_mask=mask, **{CACHE_NAME: cache}, **GENERATED)
    more = torch.cat([first, batch_of("ttt", "ttt")[0]], dim=1)
    mask = torch.cat([mask, mask.new_ones(2, more.shape[1] - mask.shape[1])], dim=1)
    expected = reference(more, attention_mask=mask)
    assert torch.equal(model.generate(more, attention_mask=mask, **{CACHE_NAME: cache}, **GENERATED), expected)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_an_image_behind_a_filled_cache_is_refused(model, name):
    """It would be read as plain text: later text would see what it must not."""
    attach(model, builder())
    cache = DynamicCache(config=model.config)
    model(batch_of("bvvcctt")[0], **{name: cache})
    with pytest.raises(ValueError, match="input_ids must be text, .* behind a filled cache"):
        model(batch_of("vvvcctt")[0], **{name: cache})


def test_the_cache_keeps_only_public_keys(model):
    ids, mask = batch_of("bvvvvvvccttt", "btvvvvct")
    attach(model, builder())
    cache = getattr(model(ids, attention_mask=mask, use_cache=True), CACHE_NAME)
    assert cache.get_seq_length() == 5
    assert cache.voco_prefix_mask.tolist() == [[True] * 5, [False] * 3 + [True] * 2]


def test_detach_restores_the_model(model):
    ids, mask = batch_of("bvvvvccttt", "btvvct")
    plain = model(ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, **GENERATED)
    detach = attach(model, builder())
    assert not torch.equal(model(ids, attention_mask=mask).logits, plain[0])
    detach()
    assert torch.equal(model(ids, attention_mask=mask).logits, plain[0])
    assert torch.equal(model.generate(ids, attention_mask=mask, **GENERATED), plain[1])
    assert "prepare_inputs_for_generation" not in vars(model) and not model._forward_pre_hooks


def test_attach_needs_the_implementation():
    with pytest.raises(ValueError, match='model must be one with attn_implementation="voco", but was .*"sdpa"'):
        attach(llama("sdpa"), builder())


def test_attached_forward_with_embeddings_needs_a_layout(model):
    ids, mask = batch_of("bvvvcctt")
    attach(model, builder())
    x, layout = model.get_input_embeddings()(ids), builder()(ids)
    with pytest.raises(ValueError, match="input_ids must be given"):
        model(inputs_embeds=x)
    got = model(inputs_embeds=x, voco_layout=layout).logits
    torch.testing.assert_close(got, model(ids, attention_mask=mask).logits)


def test_generate_of_a_stock_model_knows_no_layout(model):
    """transformers refuses keywords that `forward` does not name; a layout is never ignored in silence."""
    ids, _ = batch_of("bvvvcctt")
    with pytest.raises(ValueError, match="voco_layout"):
        model.generate(ids, voco_layout=builder()(ids), **GENERATED)


# ---- the names of the cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [LlamaForCausalLM, LlavaForConditionalGeneration])
def test_the_name_of_the_cache_is_that_of_transformers(stock):
    """As a keyword of forward, and as a field of the output."""
    assert CACHE_NAME in inspect.signature(stock.forward).parameters
    model = llama("sdpa") if stock is LlamaForCausalLM else llava()
    output = model(batch_of("btt")[0], use_cache=True)
    assert CACHE_NAME in {field.name for field in dataclasses.fields(output)}
    assert getattr(output, CACHE_NAME).get_seq_length() == 3


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_rename_cache(name):
    cache = DynamicCache()
    (other,) = set(CACHE_NAMES) - {name}
    kwargs = {name: cache, other: None, "use_cache": True}
    assert voco_transformers.rename_cache(kwargs) is cache
    assert kwargs == {CACHE_NAME: cache, "use_cache": True}
    assert voco_transformers.rename_cache(kwargs) is cache and len(kwargs) == 2
    nothing = {name: None}
    assert voco_transformers.rename_cache(nothing) is None and nothing == {}
    with pytest.raises(ValueError, match=r"cache must be None where past_key_values \(its other name\) is given"):
        voco_transformers.rename_cache({name: cache, other: DynamicCache()})


def test_attached_models_take_one_cache(model):
    attach(model, builder())
    caches = {name: DynamicCache(config=model.config) for name in CACHE_NAMES}
    with pytest.raises(ValueError, match="cache must be None where past_key_values"):
        model(batch_of("bvvcctt")[0], **caches)


def test_attached_models_use_no_deprecated_name(model, monkeypatch):
    """What transformers logs once; its warnings are errors in this file."""
    said = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, message, *_, **__: said.append(message))
    ids, mask = batch_of("bvvvvvvccttt", "btvvvvct")
    attach(model, builder())
    model.generate(ids, attention_mask=mask, **GENERATED)
    model(ids, attention_mask=mask, use_cache=True)
    assert not [message for message in said if "past_key_values" in message]


# ---- the cache after a masked prefill ----------------------------------------------------------------------------------


def filled(model, kind: str, ids, mask, layout):
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=30)
    single_pass(model, ids, layout, mask, **{CACHE_NAME: cache})
    return cache


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_keep_public_keys(model, kind):
    ids, mask = batch_of("bvvvvccttt", "btvvct", "bttttttttt")
    layout = builder()(ids, attention_mask=mask)
    cache = filled(model, kind, ids, mask, layout)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    keep_public_keys(cache, layout, len(ids))
    kept = cache.voco_prefix_mask
    assert cache.get_seq_length() == kept.shape[1] == 10
    public = layout.public.view(ids.shape)
    for layer, old in zip(cache.layers, before, strict=True):
        for now, then in zip((layer.keys, layer.values), old, strict=True):
            for row in range(len(ids)):
                slots = torch.zeros(now.shape[2], dtype=torch.bool)
                slots[: kept.shape[1]] = kept[row]
                tokens = torch.zeros(then.shape[2], dtype=torch.bool)
                tokens[: ids.shape[1]] = public[row]
                assert torch.equal(now[row, :, slots], then[row, :, tokens])


def test_keep_public_keys_leaves_a_cache_without_private_keys_alone(model):
    ids, mask = batch_of("btttt", "bt")
    layout = builder()(ids, attention_mask=mask)
    cache = filled(model, "dynamic", ids, mask, layout)
    keys = cache.layers[0].keys
    keep_public_keys(cache, layout, 2)
    assert cache.layers[0].keys is keys and cache.get_seq_length() == 5
    assert decode_mask(cache, mask, 1) is mask


def test_keep_public_keys_refuses_other_caches(model):
    ids, mask = batch_of("bvvvcctt")
    layout = builder()(ids)
    longer = filled(model, "dynamic", ids, mask, layout)
    model(torch.tensor([[7]]), **{CACHE_NAME: longer})
    with pytest.raises(ValueError, match="cache must be one that holds 8 tokens, but was one with 9"):
        keep_public_keys(longer, layout, 1)
    sliding = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4))
    for i in range(2):
        sliding.update(torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16), i)
    with pytest.raises(ValueError, match="cache must be made of full-attention layers, .*Sliding"):
        keep_public_keys(sliding, layout, 1)


def test_decode_mask_can_be_applied_twice(model):
    """`generate` makes a static cache's mask before the forward, which sees it again."""
    for rows in (["bvvvvccttt", "btvvct"], ["bvvvvccttt", "bttttttttt"]):
        ids, mask = batch_of(*rows)
        layout = builder()(ids, attention_mask=mask)
        cache = filled(model, "dynamic", ids, mask, layout)
        keep_public_keys(cache, layout, 2)
        kept = cache.voco_prefix_mask
        longer = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        once = decode_mask(cache, longer, 1)
        assert once.bool().tolist() == torch.cat([kept, kept.new_ones(2, 1)], dim=1).tolist()
        assert torch.equal(decode_mask(cache, once, 1), once)


def test_decode_mask_without_a_mask(model):
    ids, mask = batch_of("bvvvvccttt", "bvvvvvvcct")
    layout = builder()(ids)
    cache = filled(model, "dynamic", ids, mask, layout)
    keep_public_keys(cache, layout, 2)
    got = decode_mask(cache, None, 2)
    assert got.tolist() == [[True] * 7, [False, False, *[True] * 5]]
    assert decode_mask(None, mask, 1) is mask


def test_decode_mask_for_more_rows_than_the_prefill_had(model):
    ids, mask = batch_of("bvvvvccttt", "bvvvvvvcct")
    layout = builder()(ids)
    cache = filled(model, "dynamic", ids, mask, layout)
    keep_public_keys(cache, layout, 2)
    cache.batch_repeat_interleave(2)
    longer = torch.ones(4, ids.shape[1] + 1, dtype=torch.long)
    first, second = [1] * 6, [0, 0, 1, 1, 1, 1]
    assert decode_mask(cache, longer, 1).tolist() == [first, first, second, second]


# ---- the mask function, and several tokens behind a cache -------------------------------------------------------------


def test_prefill_mask_passes_through_generate():
    """`generate` makes the mask early and treats it as a tensor; the mask function then sees it again."""
    mask = voco_mask(2, 5, 5, attention_mask=torch.ones(2, 5, dtype=torch.bool))
    assert isinstance(mask, PrefillMask)
    assert mask.contiguous() is mask and mask.ndim == 4 and mask.shape == (2, 1, 5, 5)
    assert voco_mask(2, 5, 5, attention_mask=mask) is mask


def test_the_mask_is_never_a_square():
    mask = voco_mask(1, 4096, 4096, attention_mask=torch.ones(1, 4096, dtype=torch.bool))
    sizes = [x.numel() for x in vars(mask).values() if isinstance(x, torch.Tensor)]
    layout = [x.numel() for x in vars(mask.causal_layout).values() if isinstance(x, torch.Tensor)]
    assert max(sizes + layout) == 4096


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("rows", [["bttttttttt"], ["bttttttttt", "bttttt"]], ids=["no padding", "padding"])
@pytest.mark.parametrize("chunks", [[4, 6], [4, 3, 2, 1], [1, 9]], ids=str)
def test_chunks_behind_a_cache(model, kind, rows, chunks, monkeypatch):
    """Offsets come from the cache: a static cache's keys are always as many as its size."""
    monkeypatch.setattr(voco_transformers, "ROW_CHUNK", 2)
    ids, mask = batch_of(*rows)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = twin(model, "eager")(ids, attention_mask=mask, position_ids=positions).logits
        cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=16)
        parts, begin = [], 0
        for size in chunks:
            now = slice(begin, begin + size)
            part = model(
                ids[:, now],
                attention_mask=mask[:, : now.stop],
                position_ids=positions[:, now],
                **{CACHE_NAME: cache},
            )
            parts.append(part.logits)
            begin += size
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[seen], expected[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_text_in_chunks_behind_public_keys(model, kind, name):
    """A masked prefill, then several tokens at once, for rows with different numbers of public keys."""
    ids, mask = batch_of("bvvvvvvccttt", "btvvvvct")
    more = torch.cat([ids, batch_of("tttt", "tttt")[0]], dim=1)
    longer = torch.cat([mask, mask.new_ones(2, 4)], dim=1)
    layout = builder()(more, attention_mask=longer)
    positions = layout.position_ids.view(more.shape)
    with torch.no_grad():
        expected = eager_pass(model, more, layout).logits[:, -4:]
        attach(model, builder())
        cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=30)
        width = ids.shape[1]
        model(ids, attention_mask=mask, position_ids=positions[:, :width], **{name: cache})
        got = model(more[:, width:], attention_mask=longer, position_ids=positions[:, width:], **{name: cache}).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# ---- torch.compile -----------------------------------------------------------------------------------------------------


def run_in_new_process(script: str) -> None:
    """Compiled graphs of other tests would hide recompilations."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    prelude = """
        import torch
        from models import *
        from transformers import DynamicCache, StaticCache
        torch.set_num_threads(1)
        torch.manual_seed(0)
        compile = lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
        no_recompile = torch._dynamo.config.patch(error_on_recompile=True)
        def close(x, y):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_compiled_forward_with_a_layout():
    """One graph, and no other for new values of the same shapes."""
    run_in_new_process("""
        model, build = llama(num_hidden_layers=1), builder()
        compiled = compile(model)
        def both(*rows):
            ids, mask = batch_of(*rows)
            kwargs = dict(input_ids=ids, attention_mask=mask, voco_layout=build(ids, attention_mask=mask), labels=ids)
            results = []
            for m in (model, compiled):
                model.zero_grad()
                out = m(**kwargs)
                out.loss.backward()
                results.append((out.logits.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()))
            for x, y in zip(*results, strict=True):
                close(x, y)
            return results[1][0]
        first = both("bvvvvvcctttt", "btvvcttt")
        with no_recompile:
            second = both("bvvvctvvcctt", "bttt")
            both("btttttttttt" + "t", "bvvvcttt")
        assert first.shape == second.shape and not torch.equal(first, second)
    """)


@pytest.mark.full
def test_compiled_forward_with_gradient_checkpointing():
    run_in_new_process("""
        model, build = llama().train(), builder()
        ids, mask = batch_of("bvvvvvcctttt", "btvvcttt")
        kwargs = dict(input_ids=ids, attention_mask=mask, voco_layout=build(ids, attention_mask=mask), labels=ids)
        def gradient(m):
            model.zero_grad()
            m(use_cache=False, **kwargs).loss.backward()
            return model.model.layers[0].self_attn.k_proj.weight.grad.clone()
        expected = gradient(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        close(gradient(compile(model)), expected)
    """)


def test_compiled_steps_with_a_static_cache():
    """Prefill with and without a layout, then decoding steps that share one graph."""
    run_in_new_process("""
        from voco_kernels.integrations.transformers import CACHE_NAME, decode_mask, keep_public_keys
        model, build = llama(num_hidden_layers=1), builder()
        ids, mask = batch_of("bvvvvvcctttt", "btvvcttt")
        layout = build(ids, attention_mask=mask)
        ones = mask.new_ones(2, 1)
        def steps(forward, layout):
            cache, logits, seen = StaticCache(model.config, max_cache_len=24), [], mask
            with torch.no_grad():
                out = forward(input_ids=ids, attention_mask=mask, voco_layout=layout, **{CACHE_NAME: cache})
                logits.append(out.logits[:, -1])
                if layout is not None:
                    keep_public_keys(cache, layout, 2)
                for step in range(3):
                    seen = torch.cat([seen, ones], dim=1)
                    now = torch.nn.functional.pad(decode_mask(cache, seen, 1), (0, 24))[:, :24]
                    out = decode[forward](
                        input_ids=logits[-1].argmax(-1, keepdim=True),
                        attention_mask=now,
                        position_ids=seen.sum(1, keepdim=True) - 1,
                        **{CACHE_NAME: cache},
                    )
                    logits.append(out.logits[:, -1])
            return torch.stack(logits)
        prefill = compile(model.forward)
        decode = {model.forward: model.forward, prefill: compile(lambda **kwargs: model(**kwargs))}
        close(steps(prefill, layout), steps(model.forward, layout))
        close(steps(prefill, None), steps(model.forward, None))
        with no_recompile:
            close(steps(prefill, layout), steps(model.forward, layout))
    """)


# ---- what is refused ---------------------------------------------------------------------------------------------------


def test_dropout_is_refused(model):
    ids, _ = batch_of("bvvvcctt")
    model.config.attention_dropout = 0.1
    dropping = LlamaForCausalLM(llama_config(attention_dropout=0.1))
    dropping.set_attn_implementation("voco")
    with pytest.raises(ValueError, match=r"dropout must be 0 .*attention_dropout.*, but was 0\.1"):
        dropping.train()(ids, voco_layout=builder()(ids))
    dropping.eval()(ids, voco_layout=builder()(ids))


def test_sliding_window_is_refused():
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
    )
    model = MistralForCausalLM(config)
    model.set_attn_implementation("voco")
    with pytest.raises(ValueError, match="sliding_window must be None .*, but was 4"):
        model(batch_of("btttttt")[0])
    config.sliding_window = None
    model = MistralForCausalLM(config)
    model.set_attn_implementation("voco")
    ids, _ = batch_of("bvvvvcctt")
    layout = builder()(ids)
    got = model(ids, voco_layout=layout).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(got, model(ids, attention_mask=additive_mask(layout, 1)).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["keyword", "configuration"])
def test_attention_weights_are_refused(model, how):
    ids, _ = batch_of("bvvvcctt")
    if how == "configuration":
        # transformers itself forbids the flag where the implementation is not eager, unless it was set before.
        object.__setattr__(model.config, "_output_attentions", True)
        wanted = {}
    else:
        wanted = {"output_attentions": True}
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, voco_layout=builder()(ids), **wanted)


def test_soft_capped_scores_are_refused(model):
    q = torch.zeros(1, 4, 3, 16)
    with pytest.raises(ValueError, match="softcap must be None .*, but was 50"):
        voco_transformers.voco_attention_forward(model.model.layers[0].self_attn, q, q, q, None, softcap=50.0)


def test_a_layout_of_other_tokens_is_refused(model):
    ids, mask = batch_of("bvvvcctt", "bvvct")
    dropped = VocoLayout.from_input_ids(
        ids, image_token_id=IMAGE, voco_token_id=VOCO, isolated=True, attention_mask=mask, keep_padding=False
    )
    with pytest.raises(ValueError, match=r"voco_layout must be of the 2 x 8 tokens .*keep_padding=True.* 13 tokens"):
        model(ids, attention_mask=mask, voco_layout=dropped)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_layout_with_a_filled_cache_is_refused(model, kind):
    ids, mask = batch_of("bvvvcctt")
    layout = builder()(ids)
    cache = filled(model, kind, ids, mask, layout)
    with pytest.raises(ValueError, match="voco_layout must be .* with an empty cache .*, but was .* 8 keys in the cache"):
        model(ids, voco_layout=layout, **{CACHE_NAME: cache})


def test_caches_as_tuples_are_refused_by_transformers(model):
    """What the K/V path hands over is a Cache for that reason."""
    ids, _ = batch_of("bttt")
    layers = tuple((torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16)) for _ in range(2))
    with pytest.raises((ValueError, TypeError, AttributeError)):
        model.generate(ids, **{CACHE_NAME: layers}, **GENERATED)


# ---- LLaVA -------------------------------------------------------------------------------------------------------------

IMAGE_ROWS = ["b" + "v" * VISION + "ccttt", "btt" + "v" * VISION + "cctt" + "v" * VISION + "ctttt", "btttt"]


def test_llava_with_voco_attention_in_its_language_model():
    ids, mask = batch_of(*IMAGE_ROWS)
    images, build = pixels(3), builder()
    layout = build(ids, attention_mask=mask)
    model = llava()
    other = twin(model, "eager")
    model.set_attn_implementation({"text_config": "voco"})
    assert model.config.vision_config._attn_implementation == "sdpa"
    labels, positions = labels_of(ids, mask), layout.position_ids.view(ids.shape)
    shared = {"pixel_values": images, "position_ids": positions, "labels": labels}
    got = model(ids, attention_mask=mask, voco_layout=layout, **shared)
    expected = other(ids, attention_mask=additive_mask(layout, 3), **shared)
    seen = mask.bool()
    torch.testing.assert_close(got.logits[seen], expected.logits[seen], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=0)
    got.loss.backward()
    expected.loss.backward()
    for (name, x), y in zip(model.named_parameters(), other.parameters(), strict=True):
        # A key bias of the vision tower has no gradient but noise: adding it to all keys changes no weight.
        if y.grad is not None and "k_proj.bias" not in name:
            atol = 5e-5 * y.grad.abs().max().item()
            torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert model.model.vision_tower.get_parameter("embeddings.patch_embedding.weight").grad.abs().max() > 0


@pytest.mark.parametrize("cache", CACHES)
def test_attached_llava_generates_as_masked_passes_do(cache):
    ids, mask = batch_of(*IMAGE_ROWS)
    images, build = pixels(3), builder()
    model = llava()
    expected = masked_eager(model, build)(ids, attention_mask=mask, pixel_values=images)
    model.set_attn_implementation({"text_config": "voco"})
    attach(model, build)
    got = model.generate(ids, attention_mask=mask, pixel_values=images, **CACHES[cache], **GENERATED)
    assert torch.equal(got, expected)


def test_a_vision_tower_that_was_switched_too():
    """Its attention is not causal, and stays so."""
    ids, _ = batch_of(IMAGE_ROWS[0])
    layout, images = builder()(ids), pixels(1)
    model = llava()
    model.set_attn_implementation({"text_config": "voco"})
    expected = model(ids, pixel_values=images, voco_layout=layout).logits
    model.set_attn_implementation("voco")
    assert model.config.vision_config._attn_implementation == "voco"
    torch.testing.assert_close(model(ids, pixel_values=images, voco_layout=layout).logits, expected, rtol=1e-5, atol=1e-5)


def test_generation_stops_at_eos(model):
    """Rows that ended are padded, as in any generate."""
    ids, mask = batch_of("bvvvvvvccttt", "btvvvvct", "bvvvccttvvvvvcttt")
    build = builder()
    free = masked_eager(model, build)(ids, attention_mask=mask)
    stop = int(free[0, ids.shape[1] + 1])
    expected = masked_eager(model, build)(ids, attention_mask=mask, eos_token_id=stop)
    attach(model, build)
    got = model.generate(ids, attention_mask=mask, **{**GENERATED, "eos_token_id": stop})
    assert torch.equal(got, expected)
    assert stop != EOS and got[0, ids.shape[1] + 2 :].eq(PAD).all()
