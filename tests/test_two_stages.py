"""Stage 1 + injection + stage 2 equals one masked pass: in logits, for layouts of every form, RoPE types and dtypes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FIRST_TEXT, IMAGE, VOCAB, VOCO, additive_mask, exact_logits, llama, twin
from reference import OPEN, assert_error_rule
from transformers import DynamicCache, StaticCache
from voco_llama import stages

from voco_kernels import Image, Text, VocoKV, VocoLayout, extract_kv, inject_kv
from voco_kernels.integrations.transformers import CACHE_NAME

# Nothing here may call transformers under a name that it gave up.
pytestmark = pytest.mark.filterwarnings("error:.*`past_key_values`:FutureWarning")

FIXED_ROPES = ("default", "linear", "llama3", "yarn")


@st.composite
def conversations(draw):
    """One document: text (perhaps none), one to four images of unequal sizes with text (perhaps none) between, text."""
    spans = [Text(draw(st.integers(0, 4)))]
    for _ in range(draw(st.integers(1, 4))):
        spans += [Image(draw(st.integers(1, 9)), draw(st.integers(1, 3))), Text(draw(st.integers(0, 3)))]
    return [*spans, Text(draw(st.integers(1, 6)))]


def token_ids(layout: VocoLayout) -> torch.Tensor:
    """[1, N]: text of many ids, and placeholders in segments."""
    text = FIRST_TEXT + torch.arange(layout.num_tokens) * 7 % (VOCAB - FIRST_TEXT)
    inside = torch.where(layout.public, VOCO, IMAGE)
    return torch.where(layout.segment_ids == 0, text, inside)[None]


def embeddings(model, layout: VocoLayout) -> torch.Tensor:
    """[1, N, E]: each vision token has an embedding of its own, as the tokens of an image have."""
    x = model.get_input_embeddings()(token_ids(layout)).detach().clone()
    vision = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * x.std()
    private = ~layout.public
    x[0, private] = vision[0, private].to(x.dtype)
    return x


def two_stages(model, layout: VocoLayout, x: torch.Tensor, shift: int, stored=None) -> torch.Tensor:
    """Logits [text tokens, V] of the text runs."""
    runs = stages.runs_of(layout, 0, layout.num_tokens)
    cache, hidden = stages.forward_runs(model.model, runs, shift, lambda run: x[:, run.tokens], stored)
    assert stages.length_of(cache) == int(layout.public.sum())
    return model.lm_head(torch.cat(hidden, dim=1))[0]


def assert_equal_to_single_pass(model, layout: VocoLayout, shift: int, stored=None) -> None:
    """The error rule for the logits of text, with transformers' eager masked pass as the implementation to compare with."""
    x = embeddings(model, layout)
    is_open = layout.segment_ids == 0
    with torch.no_grad():
        got = two_stages(model, layout, x, shift, stored)
        eager = twin(model, "eager")(
            inputs_embeds=x, attention_mask=additive_mask(layout, 1, x.dtype), position_ids=layout.position_ids[None]
        ).logits[0, is_open]
    exact = exact_logits(model, token_ids(layout), layout, x)[0, is_open]
    assert_error_rule("logits", got, eager, exact, [OPEN] * len(got))


@pytest.fixture(scope="module", params=FIXED_ROPES)
def model(request):
    torch.manual_seed(0)
    return llama(rope=request.param)


# ---- any layout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["continuous", "compact"])
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "not isolated"])
@settings(max_examples=8)
@given(document=conversations(), shifted=st.booleans())
def test_two_stages_equal_the_masked_pass(model, positions, isolated, document, shifted):
    layout = VocoLayout.from_spans([document], isolated=isolated, positions=positions)
    shift = stages.shift_of(stages.runs_of(layout, 0, layout.num_tokens)) if shifted else 0
    assert_equal_to_single_pass(model, layout, shift)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=25)
@given(
    document=conversations(),
    isolated=st.booleans(),
    positions=st.sampled_from(["continuous", "compact"]),
    shifted=st.booleans(),
)
def test_two_stages_equal_the_masked_pass_many_times(model, dtype, document, isolated, positions, shifted):
    layout = VocoLayout.from_spans([document], isolated=isolated, positions=positions)
    shift = stages.shift_of(stages.runs_of(layout, 0, layout.num_tokens)) if shifted else 0
    assert_equal_to_single_pass(copy.deepcopy(model).to(dtype), layout, shift)


# ---- named layouts -----------------------------------------------------------------------------------------------------

NAMED = {
    "one image, then text": [Image(6, 2), Text(4)],
    "text before": [Text(3), Image(6, 2), Text(4)],
    "text before and between": [Text(2), Image(5, 2), Text(3), Image(8, 1), Text(4)],
    "two images side by side": [Image(5, 2), Image(7, 3), Text(3)],
    "a short image after a long one": [Image(40, 4), Text(2), Image(1, 1), Text(5)],
    "four unequal images": [Text(1), Image(3, 1), Image(9, 3), Text(1), Image(2, 2), Image(6, 1), Text(6)],
    "more VoCo than vision tokens": [Image(2, 5), Text(3)],
    "text only": [Text(7)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("positions", ["continuous", "compact"])
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "not isolated"])
@pytest.mark.parametrize("document", NAMED.values(), ids=NAMED)
def test_named_layouts(document, isolated, positions, dtype):
    layout = VocoLayout.from_spans([document], isolated=isolated, positions=positions)
    shift = stages.shift_of(stages.runs_of(layout, 0, layout.num_tokens))
    assert_equal_to_single_pass(llama().to(dtype), layout, shift)


def test_grouped_and_single_query_heads():
    layout = VocoLayout.from_spans([NAMED["text before and between"]], isolated=True)
    for heads in (1, 4):
        assert_equal_to_single_pass(llama(num_key_value_heads=heads), layout, 0)


def test_public_tokens_inside_a_segment():
    """Gist tokens: a segment need not end with its public tokens."""
    segment = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 0, 0])
    public = torch.tensor([1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1]).bool()
    for isolated in (True, False):
        layout = VocoLayout.from_ids(segment, public, torch.tensor([0, 14]), isolated=isolated)
        assert_equal_to_single_pass(llama(), layout, 0)


# ---- runs and positions ------------------------------------------------------------------------------------------------


def runs_of(*spans, isolated=False, positions="continuous"):
    layout = VocoLayout.from_spans([list(spans)], isolated=isolated, positions=positions)
    return stages.runs_of(layout, 0, layout.num_tokens)


def test_runs_of_a_document():
    runs = runs_of(Text(2), Image(3, 1), Image(2, 2), Text(1))
    assert [(run.tokens.start, run.tokens.stop) for run in runs] == [(0, 2), (2, 6), (6, 10), (10, 11)]
    assert [run.segment > 0 for run in runs] == [False, True, True, False]
    assert runs[1].public.tolist() == [False, False, False, True]
    assert runs[1].positions.tolist() == [2, 3, 4, 5]


def test_runs_leave_out_padding_and_other_documents():
    segment = torch.tensor([0, 0, -1, -1, 5, 5, 0, -1])
    public = torch.tensor([1, 1, 0, 0, 0, 1, 1, 0]).bool()
    layout = VocoLayout.from_ids(segment, public, torch.tensor([0, 2, 8]), isolated=True)
    runs = stages.runs_of(layout, 2, 8)
    assert [(run.tokens.start, run.tokens.stop, run.segment) for run in runs] == [(2, 4, 5), (4, 5, 0)]
    assert [run.positions.tolist() for run in runs] == [[0, 1], [2]]


def test_only_segments_with_nothing_public_before_them_are_closed():
    def closed(*spans, isolated):
        return [run.closed for run in runs_of(*spans, isolated=isolated) if run.segment]

    assert closed(Image(2, 1), Image(2, 1), Text(1), isolated=False) == [True, False]
    assert closed(Text(1), Image(2, 1), Text(1), isolated=False) == [False]
    assert closed(Text(1), Image(2, 1), Text(1), Image(2, 1), Text(1), isolated=True) == [True, True]


def test_the_last_text_run_stands_where_a_plain_prompt_has_it():
    spans = (Image(9, 2), Text(3), Image(4, 1), Text(5))
    for positions in ("continuous", "compact"):
        runs = runs_of(*spans, isolated=True, positions=positions)
        assert int(runs[-1].positions[0]) - stages.shift_of(runs) == 2 + 3 + 1


# ---- what is stored ----------------------------------------------------------------------------------------------------


def stored_alone(model, x: torch.Tensor, run: stages.Run) -> VocoKV:
    """Stage 1 of a closed segment at positions 0, 1, 2, ..., as `compress` does it."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.model(inputs_embeds=x[:, run.tokens], use_cache=True, **{CACHE_NAME: cache})
    index = run.public.nonzero()[:, 0]
    keys, values = ([y[0].transpose(0, 1) for y in layers] for layers in zip(*key_values(cache), strict=True))
    return extract_kv(keys, values, index, index, *stages.rotary_of(model.model))


def key_values(cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("positions", ["continuous", "compact"])
def test_stored_segments_serve_any_place(model, positions):
    """K/V that were made at position 0 are right wherever their segment stands."""
    layout = VocoLayout.from_spans(
        [[Text(3), Image(6, 2), Text(2), Image(3, 1), Text(4)]], isolated=True, positions=positions
    )
    runs = stages.runs_of(layout, 0, layout.num_tokens)
    x = embeddings(model, layout)
    stored = [stored_alone(model, x, run) for run in runs if run.segment]
    for shift in (0, stages.shift_of(runs)):
        assert_equal_to_single_pass(model, layout, shift, iter(stored))


def test_stored_keys_are_those_before_rope(model):
    """Layer 0's stored keys are the key projection itself: no rotation, no attention_scaling."""
    layout = VocoLayout.from_spans([[Image(6, 2), Text(1)]], isolated=True)
    run = stages.runs_of(layout, 0, layout.num_tokens)[0]
    x = embeddings(model, layout)
    kv = stored_alone(model, x, run)
    first = model.model.layers[0]
    with torch.no_grad():
        projected = first.self_attn.k_proj(first.input_layernorm(x[0, run.tokens][run.public])).unflatten(-1, (2, 16))
    torch.testing.assert_close(kv.k[0], projected, rtol=1e-5, atol=1e-5)


def test_yarn_scales_attention():
    """The RoPE types of this file include one whose rotation also scales, or the tests above would not cover that."""
    assert stages.rotary_of(llama(rope="yarn").model)[1] > 1.1
    assert stages.rotary_of(llama(rope="default").model)[1] == 1.0


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_length_are_refused(rope):
    model = llama(rope=rope)
    with pytest.raises(ValueError, match=rf"rope_type must be .*fixed frequencies.* but was '{rope}'"):
        stages.rotary_of(model.model)
    layout = VocoLayout.from_spans([[Image(3, 1), Text(2)]], isolated=True)
    with pytest.raises(ValueError, match="rope_type"):
        two_stages(model, layout, embeddings(model, layout), 0)


# ---- serving: stage 2 is a plain causal LLaMA ---------------------------------------------------------------------------


@pytest.fixture
def compressed_prompt():
    """A document of one image and text, its greedy continuation by masked passes, and the image's K/V."""
    model = llama(max_position_embeddings=128)
    text, new = 5, 6
    layout = VocoLayout.from_spans([[Image(9, 3), Text(text)]], isolated=True)
    x, eager, tokens = embeddings(model, layout), twin(model, "eager"), []
    ids = token_ids(layout)[:, -text:]
    kv = stored_alone(model, x, stages.runs_of(layout, 0, layout.num_tokens)[0])
    with torch.no_grad():
        for step in range(new):
            layout = VocoLayout.from_spans([[Image(9, 3), Text(text + step)]], isolated=True)
            mask = additive_mask(layout, 1)
            logits = eager(inputs_embeds=x, attention_mask=mask, position_ids=layout.position_ids[None]).logits
            tokens.append(int(logits[0, -1].argmax()))
            x = torch.cat([x, model.get_input_embeddings()(torch.tensor([tokens[-1:]]))], dim=1)
    return model, kv, ids, tokens


def injected(model, kv: VocoKV, cache):
    """A cache of transformers that begins with the K/V at positions 0, 1, 2, ..."""
    k, v = (torch.empty_like(kv.k) for _ in "kv")
    at = torch.arange(kv.num_tokens)
    inject_kv(kv, k, v, at, at, *stages.rotary_of(model.model))
    for layer in range(kv.num_layers):
        cache.update(k[layer].transpose(0, 1)[None], v[layer].transpose(0, 1)[None], layer)
    return cache


@pytest.mark.parametrize("attention", ["voco", "sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_stock_generate_over_injected_keys(compressed_prompt, attention, cache):
    """With VoCo keys at positions 0, 1, 2, ... no position ids and no mask are needed, whatever the attention and cache."""
    model, kv, ids, tokens = compressed_prompt
    model = twin(model, attention)
    empty = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=32)
    prompt = torch.cat([torch.full((1, kv.num_tokens), VOCO), ids], dim=1)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(tokens),
        do_sample=False,
        eos_token_id=None,
        **{CACHE_NAME: injected(model, kv, empty)},
    )
    assert out[0, prompt.shape[1] :].tolist() == tokens


def test_keys_of_another_rotation_give_other_tokens(compressed_prompt):
    """The test above would notice keys that were not rotated to their places."""
    model, kv, ids, tokens = compressed_prompt
    cache = injected(model, kv, DynamicCache(config=model.config))
    for layer in cache.layers:
        layer.keys = layer.keys.roll(1, dims=2)
    prompt = torch.cat([torch.full((1, kv.num_tokens), VOCO), ids], dim=1)
    with torch.no_grad():
        wrong = model(ids, position_ids=torch.arange(3, 8)[None], **{CACHE_NAME: cache}).logits[0, -1]
        right = model(ids, **{CACHE_NAME: injected(model, kv, DynamicCache(config=model.config))}).logits[0, -1]
    assert prompt.shape[1] == 8
    assert int(right.argmax()) == tokens[0]
    assert (wrong - right).abs().max() > 0.01 * right.abs().max()
