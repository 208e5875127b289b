"""The K/V path: taken out of a model's keys, put into caches of any form, by every backend that runs here; bad input."""

import re

import pytest
import torch
from cuda_backend import emulated
from hypothesis import given
from hypothesis import strategies as st
from kv_samples import (
    DTYPES,
    FORMS,
    INV_FREQ,
    POSITIONS,
    SENTINEL,
    WITH_INDEX,
    D,
    H,
    L,
    T,
    assert_tokens,
    quantised_kv,
    random_kv,
    rows_of,
)
from reference import assert_rounded_once, eager_rotated, rotated
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from voco_kernels import ExtractionPlan, InjectionPlan, VocoKV, extract_kv, inject_kv
from voco_kernels.backends import cuda


@pytest.fixture
def emulated_cuda():
    with emulated():
        yield


def usable(request) -> str:
    """The name of a backend, on CPU tensors: kernels run in Triton's interpreter and in the emulation of csrc/host."""
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("kernels are interpreted only where there is no GPU")
    if request.param == "cuda":
        request.getfixturevalue("emulated_cuda")
    return request.param


@pytest.fixture(params=["torch", "triton", "cuda"])
def backend(request):
    """Each backend of the K/V path."""
    return usable(request)


@pytest.mark.parametrize(("dtype", "index_dtype"), WITH_INDEX, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_inject_into_every_form(backend, form, dtype, index_dtype):
    kv = random_kv(dtype)
    (k_cache, read_k), (v_cache, read_v) = form(12, dtype), form(12, dtype)
    slots = torch.tensor([7, 0, -1, 11, 4])
    inject_kv(kv, k_cache, v_cache, slots.to(index_dtype), POSITIONS.to(index_dtype), INV_FREQ, 1.25, backend=backend)
    kept, named = slots >= 0, slots[slots >= 0]
    k, v = read_k(), read_v()
    true, eager = rotated(kv.k, POSITIONS, INV_FREQ, 1.25), eager_rotated(kv.k.float(), POSITIONS, INV_FREQ, 1.25)
    assert_rounded_once("k_cache", k[:, named], eager[:, kept], true[:, kept])
    assert torch.equal(v[:, named], kv.v[:, kept])
    untouched = torch.ones(12, dtype=torch.bool)
    untouched[named] = False
    assert (k[:, untouched] == SENTINEL).all() and (v[:, untouched] == SENTINEL).all()


@pytest.mark.parametrize(("dtype", "index_dtype"), WITH_INDEX, ids=str)
@pytest.mark.parametrize("form", ["stacked", "layers", "hugging_face", "strided"])
def test_extract_from_every_form(backend, form, dtype, index_dtype):
    (keys, all_keys), (values, all_values) = rows_of(form, dtype)
    index = torch.tensor([11, 3, 3, 0, 7])
    plain = extract_kv(keys, values, index.to(index_dtype), backend=backend)
    assert torch.equal(plain.k, all_keys[:, index]) and torch.equal(plain.v, all_values[:, index])
    assert plain.k.data_ptr() not in {x.data_ptr() for x in keys}
    kv = extract_kv(keys, values, index.to(index_dtype), POSITIONS.to(index_dtype), INV_FREQ, 1.25, backend=backend)
    assert kv.k.dtype == kv.v.dtype == dtype and kv.k_scale is None and kv.segments is None
    expected = rotated(all_keys[:, index], POSITIONS, INV_FREQ, 1.25, inverse=True)
    # R(-p) is the rotation to the negative position.
    eager = eager_rotated(all_keys[:, index].float(), -POSITIONS, INV_FREQ, 1 / 1.25)
    assert_rounded_once("k", kv.k, eager, expected)
    assert torch.equal(kv.v, all_values[:, index])


@given(st.data())
def test_what_was_injected_is_extracted(backend, data):
    tokens = data.draw(st.integers(0, 9), "tokens")
    heads, half = data.draw(st.integers(1, 3), "heads"), data.draw(st.integers(1, 20), "head_dim / 2")
    positions = torch.tensor(
        data.draw(st.lists(st.integers(-(2**20), 2**20), min_size=tokens, max_size=tokens), "positions"),
        dtype=torch.int64,
    )
    slots = torch.tensor(data.draw(st.permutations(range(12)), "slots")[:tokens], dtype=torch.int64)
    scaling = data.draw(st.floats(0.5, 2.0), "attention_scaling")
    inv_freq = 10000.0 ** (-torch.arange(half).float() / half)
    kv = random_kv(tokens=tokens, heads=heads, head_dim=2 * half)
    k_cache, v_cache = (torch.full((L, 3, 4, heads, 2 * half), SENTINEL) for _ in "kv")
    inject_kv(kv, k_cache, v_cache, slots, positions, inv_freq, scaling, backend=backend)
    back = extract_kv(k_cache.flatten(1, 2), v_cache.flatten(1, 2), slots, positions, inv_freq, scaling, backend=backend)
    assert_tokens("k", back.k, eager_rotated(kv.k, positions, inv_freq), kv.k.double())
    assert torch.equal(back.v, kv.v)


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inject_casts_once(backend, dtype, cache_dtype):
    kv = random_kv(dtype)
    k_cache, v_cache = (torch.full((L, T, H, D), SENTINEL, dtype=cache_dtype) for _ in "kv")
    inject_kv(kv, k_cache, v_cache, torch.arange(T), POSITIONS, INV_FREQ, backend=backend)
    true = rotated(kv.k, POSITIONS, INV_FREQ)
    assert_rounded_once("k_cache", k_cache, eager_rotated(kv.k.float(), POSITIONS, INV_FREQ), true)
    assert torch.equal(v_cache, kv.v.to(cache_dtype))


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_inject_dequantises(backend, dtype, cache_dtype):
    kv = quantised_kv(dtype)
    k_cache, v_cache = (torch.full((L, 8, H, D), SENTINEL, dtype=cache_dtype) for _ in "kv")
    slots = torch.tensor([3, -1, 7, 0, 4])
    kept, named = slots >= 0, slots[slots >= 0]
    inject_kv(kv, k_cache, v_cache, slots, POSITIONS, INV_FREQ, 0.8, backend=backend)
    k, v = kv.k.float() * kv.k_scale[..., None], kv.v.float() * kv.v_scale[..., None]
    true = rotated(kv.k.double() * kv.k_scale[..., None].double(), POSITIONS, INV_FREQ, 0.8)
    eager = eager_rotated(k, POSITIONS, INV_FREQ, 0.8)
    assert_rounded_once("k_cache", k_cache[:, named], eager[:, kept], true[:, kept])
    assert torch.equal(v_cache[:, named], v[:, kept].to(cache_dtype))
    assert (k_cache[:, [1, 2, 5, 6]] == SENTINEL).all() and (v_cache[:, [1, 2, 5, 6]] == SENTINEL).all()


def test_float64():
    kv = random_kv(torch.float64)
    k_cache, v_cache = (torch.zeros(L, T, H, D, dtype=torch.float64) for _ in "kv")
    inject_kv(kv, k_cache, v_cache, torch.arange(T), POSITIONS, INV_FREQ)
    assert torch.equal(v_cache, kv.v)
    # Keys are rotated in float32, whatever their dtype.
    eager = eager_rotated(kv.k.float(), POSITIONS, INV_FREQ)
    assert_tokens("k_cache", k_cache.float(), eager, rotated(kv.k, POSITIONS, INV_FREQ))


def test_no_tokens(backend):
    nothing = torch.zeros(0, dtype=torch.int64)
    for form in FORMS:
        (k_cache, read_k), (v_cache, read_v) = form(12, torch.float32), form(12, torch.float32)
        inject_kv(random_kv(tokens=0), k_cache, v_cache, nothing, nothing, INV_FREQ, backend=backend)
        assert (read_k() == SENTINEL).all() and (read_v() == SENTINEL).all()
    keys, values = torch.randn(2, L, 12, H, D)
    for rotation in ((), (nothing, INV_FREQ)):
        assert extract_kv(keys, values, nothing, *rotation, backend=backend).k.shape == (L, 0, H, D)
    assert extract_kv(keys[:, :0], values[:, :0], nothing, backend=backend).num_tokens == 0


def test_every_slot_skipped(backend):
    k_cache, v_cache = (torch.full((L, 4, H, D), SENTINEL) for _ in "kv")
    inject_kv(random_kv(), k_cache, v_cache, torch.full((T,), -1), POSITIONS, INV_FREQ, backend=backend)
    assert (k_cache == SENTINEL).all() and (v_cache == SENTINEL).all()


def test_no_gradients():
    leaf = torch.randn(L, T, H, D, requires_grad=True)
    kv = extract_kv(leaf, 2 * leaf, torch.arange(T), POSITIONS, INV_FREQ)
    assert not kv.k.requires_grad and not kv.v.requires_grad
    k_cache, v_cache = (torch.zeros(L, T, H, D) for _ in "kv")
    inject_kv(VocoKV(leaf, leaf), k_cache, v_cache, torch.arange(T), POSITIONS, INV_FREQ)
    assert not k_cache.requires_grad and not v_cache.requires_grad


# ---- the convention of transformers ------------------------------------------------------------------------------------

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4096,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROPE)
def test_keys_are_those_of_transformers(backend, name, dtype):
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        rope_parameters=ROPE[name],
    )
    rope = LlamaRotaryEmbedding(config)
    assert (name == "yarn") == (rope.attention_scaling != 1.0)
    kv = random_kv(dtype, tokens=6, head_dim=32)
    positions = torch.tensor([0, 1, 17, 500, 4095, 8191])
    cos, sin = rope(kv.k, positions[None])
    theirs = apply_rotary_pos_emb(kv.k.transpose(1, 2), kv.k.transpose(1, 2), cos, sin)[1].transpose(1, 2)
    true = rotated(kv.k, positions, rope.inv_freq, rope.attention_scaling)

    k_cache, v_cache = (torch.full((L, 6, 2, 32), SENTINEL, dtype=dtype) for _ in "kv")
    inject_kv(kv, k_cache, v_cache, torch.arange(6), positions, rope.inv_freq, rope.attention_scaling, backend=backend)
    assert_tokens("k_cache", k_cache, theirs, true)

    back = extract_kv(theirs, kv.v, torch.arange(6), positions, rope.inv_freq, rope.attention_scaling, backend=backend)
    assert_tokens("k", back.k, eager_rotated(theirs, -positions, rope.inv_freq, 1 / rope.attention_scaling), kv.k.double())


# ---- beyond what is checked, and forms that only kernels mind --------------------------------------------------------


@pytest.fixture(params=["triton", "cuda"])
def fused(request):
    """The backends that move all layers in one launch."""
    return usable(request)


def assert_injected(name, kv, k_cache, v_cache, slots, positions, inv_freq, scaling=1.0):
    """Caches [L, slots, H, D], stacked, hold `kv` in `slots` and SENTINEL elsewhere."""
    kept = (slots >= 0) & (slots < k_cache.shape[1])
    named = slots[kept]
    k, v = (x.float() if s is None else x.float() * s[..., None] for x, s in ((kv.k, kv.k_scale), (kv.v, kv.v_scale)))
    true, eager = rotated(k, positions, inv_freq, scaling), eager_rotated(k, positions, inv_freq, scaling)
    assert_rounded_once(name, k_cache[:, named], eager[:, kept], true[:, kept])
    assert torch.equal(v_cache[:, named], v[:, kept].to(v_cache.dtype))
    untouched = torch.ones(k_cache.shape[1], dtype=torch.bool)
    untouched[named] = False
    assert (k_cache[:, untouched] == SENTINEL).all() and (v_cache[:, untouched] == SENTINEL).all()


@pytest.mark.parametrize("head_dim", [2, 20, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16), (torch.int8, torch.bfloat16)], ids=str
)
def test_head_dims(fused, head_dim, dtypes):
    kv_dtype, cache_dtype = dtypes
    make = quantised_kv if kv_dtype == torch.int8 else random_kv
    kv = make(kv_dtype, head_dim=head_dim)
    inv_freq = 10000.0 ** (-torch.arange(head_dim // 2).float() / (head_dim // 2))
    k_cache, v_cache = (torch.full((L, 9, H, head_dim), SENTINEL, dtype=cache_dtype) for _ in "kv")
    slots = torch.tensor([8, 3, -1, 0, 5])
    inject_kv(kv, k_cache, v_cache, slots, POSITIONS, inv_freq, 1.25, backend=fused)
    assert_injected("k_cache", kv, k_cache, v_cache, slots, POSITIONS, inv_freq, 1.25)
    back = extract_kv(k_cache, v_cache, slots.clamp(min=0), POSITIONS, inv_freq, 1.25, backend=fused)
    expected = rotated(k_cache[:, slots.clamp(min=0)], POSITIONS, inv_freq, 1.25, inverse=True)
    eager = eager_rotated(k_cache[:, slots.clamp(min=0)].float(), -POSITIONS, inv_freq, 1 / 1.25)
    assert_rounded_once("k", back.k, eager, expected)
    assert torch.equal(back.v, v_cache[:, slots.clamp(min=0)])


def test_layers_of_different_strides(fused):
    """A list of layers that are not laid out alike, nor keys like values."""
    kv = random_kv(torch.float16)
    k_cache, v_cache = (
        [torch.full(shape, SENTINEL, dtype=torch.float16) for shape in shapes]
        for shapes in (((9, H, D), (9, 2 * H, D), (18, H, D)), ((9, 3 * H, D), (9, H, D), (9, H, 2 * D)))
    )
    k_views = [k_cache[0], k_cache[1][:, ::2], k_cache[2][::2]]
    v_views = [v_cache[0][:, ::3], v_cache[1], v_cache[2][..., ::2]]
    slots = torch.tensor([8, 3, -1, 0, 5])
    inject_kv(kv, k_views, v_views, slots, POSITIONS, INV_FREQ, backend=fused)
    assert_injected("k_cache", kv, torch.stack(k_views), torch.stack(v_views), slots, POSITIONS, INV_FREQ)
    assert (k_cache[1][:, 1::2] == SENTINEL).all() and (k_cache[2][1::2] == SENTINEL).all()
    assert (v_cache[0][:, 1::3] == SENTINEL).all() and (v_cache[2][..., 1::2] == SENTINEL).all()
    back = extract_kv(k_views, v_views, torch.tensor([8, 0]), backend=fused)
    assert torch.equal(back.k, torch.stack(k_views)[:, [8, 0]]) and torch.equal(back.v, kv.v[:, [0, 3]])


def strided(x: torch.Tensor, odd: int | str | None) -> torch.Tensor:
    """A copy of x whose every stride is a multiple of 16 but that of dimension `odd`, or its address ("address")."""
    strides, step = [0] * x.ndim, 1
    for axis in reversed(range(x.ndim)):
        strides[axis] = step + (axis == odd)
        step = -(-strides[axis] * x.shape[axis] // 16) * 16
    storage = torch.full((step + 16,), SENTINEL, dtype=torch.float32).to(x.dtype)
    # torch aligns what it allocates to 64 bytes.
    return storage.as_strided(x.shape, strides, int(odd == "address")).copy_(x)


@pytest.mark.parametrize("odd", [None, 0, 1, 2, 3, "address"], ids=str)
@pytest.mark.parametrize("which", ["k", "v", "k_cache", "v_cache"])
def test_every_condition_of_wide_accesses(fused, which, odd):
    """From aligned K/V and paged caches, exactly one stride or address is broken."""
    kv = random_kv(torch.bfloat16, head_dim=32)
    tensors = {"k": kv.k, "v": kv.v}
    # Layers of their own, so that dimension 0 is the block.
    empty = torch.full((3, 4, H, 32), SENTINEL, dtype=torch.bfloat16)
    caches = {name: [strided(empty, odd if which == name else None) for _ in range(L)] for name in ("k_cache", "v_cache")}
    part = VocoKV(*(strided(tensors[name], odd if which == name else None) for name in ("k", "v")))
    slots, inv_freq = torch.tensor([7, 0, -1, 11, 4]), INV_FREQ.repeat(2)
    inject_kv(part, caches["k_cache"], caches["v_cache"], slots, POSITIONS, inv_freq, backend=fused)
    stacked = [torch.stack(caches[name]).flatten(1, 2) for name in ("k_cache", "v_cache")]
    assert_injected("k_cache", kv, *stacked, slots, POSITIONS, inv_freq)


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_one_layer_that_is_not_aligned(fused, name):
    kv = random_kv(torch.bfloat16, head_dim=32)
    empty = torch.full((12, H, 32), SENTINEL, dtype=torch.bfloat16)
    odd = {n: ["address" if n == name and i == L - 1 else None for i in range(L)] for n in ("k_cache", "v_cache")}
    sides = {n: [strided(empty, each) for each in odd[n]] for n in odd}
    slots, inv_freq = torch.tensor([7, 0, -1, 11, 4]), INV_FREQ.repeat(2)
    inject_kv(kv, *sides.values(), slots, POSITIONS, inv_freq, backend=fused)
    assert_injected("k_cache", kv, *map(torch.stack, sides.values()), slots, POSITIONS, inv_freq)


@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize("groups", [False, True], ids=["one stack", "unlike layers"])
def test_keys_and_values_laid_out_differently(fused, groups, head_dim):
    """K and V, their scales, caches and kinds of index share no stride; a plan sees other strides the second time."""
    inv_freq = 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    slots = torch.tensor([7, 0, -1, 11, 4], dtype=torch.int32)
    storage = torch.full((L, 12, 2 * H, head_dim), SENTINEL, dtype=torch.bfloat16)
    k_cache, v_cache = storage[:, :, ::2], torch.full((L, 12, H, head_dim), SENTINEL, dtype=torch.bfloat16)
    if groups:
        wide = torch.full((12, 3 * H, head_dim), SENTINEL, dtype=torch.bfloat16)
        k_cache = [k_cache[0], wide[:, ::3], k_cache[2]]
        v_cache = [v_cache[0], v_cache[1], torch.full((24, H, head_dim), SENTINEL, dtype=torch.bfloat16)[::2]]
    plan = InjectionPlan(k_cache, v_cache, slots, POSITIONS, inv_freq, backend=fused)
    for order in ((0, 2), (1, 2)):
        kv = quantised_kv(torch.int8, head_dim=head_dim)
        v, v_scale = (x.transpose(*order).contiguous().transpose(*order) for x in (kv.v, kv.v_scale))
        mixed = VocoKV(kv.k, v, kv.k_scale, v_scale)
        plan.inject(mixed)
        sides = [x if isinstance(x, torch.Tensor) else torch.stack(x) for x in (k_cache, v_cache)]
        assert_injected("k_cache", kv, *sides, slots.long(), POSITIONS, inv_freq)
    assert (storage[:, :, 1::2] == SENTINEL).all()


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_addresses_that_are_not_aligned(fused, offset):
    kv = random_kv(torch.bfloat16)
    storage = torch.full((2, L * 9 * H * D + offset), SENTINEL, dtype=torch.bfloat16)
    k_cache, v_cache = (x[offset:].view(L, 9, H, D) for x in storage)
    slots = torch.tensor([8, 3, -1, 0, 5])
    inject_kv(kv, k_cache, v_cache, slots, POSITIONS, INV_FREQ, backend=fused)
    assert_injected("k_cache", kv, k_cache, v_cache, slots, POSITIONS, INV_FREQ)
    assert (storage[:, :offset] == SENTINEL).all()


def test_more_layers_than_a_launch_takes(fused):
    layers = 130
    kv = random_kv(torch.float16, layers=layers, tokens=2, heads=1)
    k_cache, v_cache = ([torch.full((3, 1, D), SENTINEL, dtype=torch.float16) for _ in range(layers)] for _ in "kv")
    slots, positions = torch.tensor([2, 0]), torch.tensor([5, 6])
    inject_kv(kv, k_cache, v_cache, slots, positions, INV_FREQ, backend=fused)
    assert_injected("k_cache", kv, torch.stack(k_cache), torch.stack(v_cache), slots, positions, INV_FREQ)


@pytest.mark.parametrize(
    ("layers", "heads", "tokens", "head_dim"), [(3, 2, 60000, D), (5, 7, 9000, D), (2, 3, 5000, 256)]
)
def test_more_tokens_than_threads(emulated_cuda, layers, heads, tokens, head_dim):
    """So many that a thread moves several rows: fewer shares of a token than it has rows."""
    kv = random_kv(torch.float16, layers=layers, tokens=tokens, heads=heads, head_dim=head_dim)
    shape, inv_freq = (layers, tokens, heads, head_dim), 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    k_cache, v_cache = (torch.full(shape, SENTINEL, dtype=torch.float16) for _ in "kv")
    slots, positions = torch.randperm(tokens), torch.arange(tokens)
    inject_kv(kv, k_cache, v_cache, slots, positions, inv_freq, backend="cuda")
    back = extract_kv(k_cache, v_cache, slots, backend="cuda")
    assert_injected("k_cache", kv, k_cache, v_cache, slots, positions, inv_freq)
    assert torch.equal(back.k, k_cache[:, slots]) and torch.equal(back.v, kv.v)


@pytest.mark.parametrize("paged", [False, True])
def test_slots_out_of_range_write_nothing(backend, paged):
    """What a graph replays is not checked: a plan's slots are changed to such that lie outside."""
    kv = random_kv(torch.float16)
    storage = torch.full((2, L, 20, H, D), SENTINEL, dtype=torch.float16)
    k_cache, v_cache = storage[:, :, 4:16]
    caches = [x.unflatten(1, (3, 4)) if paged else x for x in (k_cache, v_cache)]
    slots = torch.arange(T)
    plan = InjectionPlan(*caches, slots, POSITIONS, INV_FREQ, backend=backend)
    slots.copy_(torch.tensor([12, -2, 2**40, -(2**40), 11]))
    plan.inject(kv)
    assert_injected("k_cache", kv, k_cache, v_cache, slots, POSITIONS, INV_FREQ)
    assert (storage[:, :, :4] == SENTINEL).all() and (storage[:, :, 16:] == SENTINEL).all()


def test_an_index_out_of_range_becomes_nan(fused):
    keys, values = torch.randn(2, L, 12, H, D)
    index = torch.arange(T)
    plan = ExtractionPlan(keys, values, index, POSITIONS, INV_FREQ, backend=fused)
    index.copy_(torch.tensor([0, 12, -1, 2**40, 11]))
    kv = plan.extract()
    assert kv.k[:, 1:4].isnan().all() and kv.v[:, 1:4].isnan().all()
    assert torch.equal(kv.v[:, [0, 4]], values[:, [0, 11]]) and not kv.k[:, [0, 4]].isnan().any()


def test_bits_of_values_are_kept(fused):
    """Also those of NaN, which a number's way through float32 may change."""
    bits = torch.tensor([0x7FC1, 0xFFC5, 0x7F81, 0x8000, 0x0001, 0x7F80], dtype=torch.int32).to(torch.int16)
    v = bits.repeat(L * T * H * D // 6).view(torch.bfloat16).view(L, T, H, D)
    kv = VocoKV(torch.zeros_like(v), v)
    for head_dim in (D, D - 4):  # wide and narrow accesses
        part = VocoKV(kv.k[..., :head_dim], kv.v[..., :head_dim])
        k_cache, v_cache = torch.zeros(2, L, T, H, head_dim, dtype=torch.bfloat16)
        inject_kv(part, k_cache, v_cache, torch.arange(T), POSITIONS, INV_FREQ[: head_dim // 2], backend=fused)
        assert torch.equal(v_cache.view(torch.int16), part.v.contiguous().view(torch.int16))
        back = extract_kv(v_cache, v_cache, torch.arange(T), backend=fused)
        assert torch.equal(back.k.view(torch.int16), part.v.contiguous().view(torch.int16))


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_angles_are_accurate(fused, scale):
    """Sine and cosine of every angle that a position can have, against float64."""
    positions = torch.cat([torch.randint(-(2**20), 2**20 + 1, (2000,)), torch.tensor([0, 2**20, -(2**20)])])
    inv_freq = torch.tensor([1.0, 0.7, 0.1, 0.01, 3e-3, 1e-3, 1e-4, 1e-5]) * scale
    k = torch.cat([torch.ones(1, len(positions), 1, 8), torch.zeros(1, len(positions), 1, 8)], -1)
    k_cache, v_cache = torch.zeros(2, 1, len(positions), 1, D)
    inject_kv(VocoKV(k, k), k_cache, v_cache, torch.arange(len(positions)), positions, inv_freq, backend=fused)
    angle = (positions.float()[:, None] * inv_freq).double()
    expected = torch.cat([angle.cos(), angle.sin()], -1)
    assert (k_cache[0, :, 0].double() - expected).abs().max() < 1.5e-7


# ---- plans -------------------------------------------------------------------------------------------------------------


def test_plans_follow_what_changes_in_place(backend):
    one, two = random_kv(torch.float16), random_kv(torch.float16)
    k_cache, v_cache = (torch.full((L, 12, H, D), SENTINEL, dtype=torch.float16) for _ in "kv")
    slots, positions = torch.tensor([7, 0, -1, 11, 4]), POSITIONS.clone()
    plan = InjectionPlan(k_cache, v_cache, slots, positions, INV_FREQ, 1.25, backend)
    plan.inject(one)
    assert_injected("first", one, k_cache, v_cache, slots, positions, INV_FREQ, 1.25)
    k_cache.fill_(SENTINEL), v_cache.fill_(SENTINEL)
    slots.copy_(torch.tensor([1, 2, 3, -1, 5]))
    positions.add_(torch.tensor([3, 3, 3, 3, -3]))
    # K/V of other strides and dtype.
    for kv in (two, VocoKV(two.k.transpose(0, 1).contiguous().transpose(0, 1), two.v), quantised_kv(torch.int8)):
        plan.inject(kv)
        assert_injected("second", kv, k_cache, v_cache, slots, positions, INV_FREQ, 1.25)

    index = slots.clamp(min=0)
    extraction = ExtractionPlan(k_cache, v_cache, index, positions, INV_FREQ, 1.25, backend)
    for _ in range(2):
        kv = extraction.extract()
        again = extract_kv(k_cache, v_cache, index, positions, INV_FREQ, 1.25, backend)
        assert kv is extraction.out and torch.equal(kv.k, again.k) and torch.equal(kv.v, again.v)
        index.copy_(index.flip(0))
        k_cache.add_(1)
    out = VocoKV(torch.empty_like(kv.k), torch.empty_like(kv.v))
    assert ExtractionPlan(k_cache, v_cache, index, backend=backend, out=out).extract() is out
    assert torch.equal(out.k, k_cache[:, index])


def test_bad_plans(backend):
    k_cache, v_cache = torch.zeros(2, L, 12, H, D)
    slots = torch.tensor([7, 0, -1, 11, 4])
    for changes, argument in (
        ({"slots": torch.tensor([7, 0, -1, 12, 4])}, "slots"),
        ({"slots": torch.arange(2 * T)[::2]}, "slots"),
        ({"positions": POSITIONS.repeat_interleave(2)[::2]}, "positions"),
        ({"positions": POSITIONS[1:]}, "positions"),
        ({"v_cache": v_cache[:, 1:]}, "v_cache"),
        ({"backend": "fast"}, "backend"),
    ):
        good = {"k_cache": k_cache, "v_cache": v_cache, "slots": slots, "positions": POSITIONS}
        good |= {"inv_freq": INV_FREQ, "backend": backend}
        InjectionPlan(**good)
        with rejects(argument):
            InjectionPlan(**(good | changes))
    plan = InjectionPlan(k_cache, v_cache, slots, POSITIONS, INV_FREQ, backend=backend)
    for kv, argument in (
        (random_kv(tokens=4), "kv"),
        (random_kv(layers=2), "k_cache"),
        (random_kv(heads=1), "k_cache"),
        (random_kv().to("meta"), "kv"),
        (random_kv().k, "kv"),
    ):
        with rejects(argument):
            plan.inject(kv)
    assert (k_cache == 0).all() and (v_cache == 0).all()
    keys, index = torch.randn(L, 12, H, D), torch.arange(T)
    for out, argument in (
        (VocoKV(*torch.zeros(2, L, T - 1, H, D)), "out.k"),
        (VocoKV(*torch.zeros(2, L, T, H, D).half()), "out.k"),
        (VocoKV(*torch.zeros(2, L, T, H, 2 * D)[..., ::2]), "out.k"),
    ):
        with rejects(argument):
            ExtractionPlan(keys, keys, index, backend=backend, out=out)
    with rejects("out"):
        ExtractionPlan(keys, keys, index, backend=backend, out=(keys, keys))
    with rejects("attention_scaling"):
        extract_kv(keys, keys, index, attention_scaling=0.0, backend=backend)


def test_float64_is_refused_by_kernels(fused):
    kv = random_kv(torch.float64)
    k_cache, v_cache = torch.zeros(2, L, T, H, D)
    for cache, other in ((k_cache.double(), kv), (k_cache, kv)):
        with pytest.raises(ValueError, match=f"backend '{fused}' cannot serve this call: .*float64"):
            inject_kv(other, cache, cache.clone(), torch.arange(T), POSITIONS, INV_FREQ, backend=fused)
    plan = InjectionPlan(k_cache, v_cache, torch.arange(T), POSITIONS, INV_FREQ, backend=fused)
    with pytest.raises(ValueError, match="float64"):
        plan.inject(kv)


# ---- bad input ---------------------------------------------------------------------------------------------------------


def rejects(argument: str):
    return pytest.raises(ValueError, match=rf"^{re.escape(argument)}(\[\d+\])?(\.[kv])? must be .+, but was .+")


def extract_arguments():
    keys, values = torch.randn(2, L, 12, H, D)
    return {"keys": keys, "values": values, "index": torch.arange(T), "positions": POSITIONS, "inv_freq": INV_FREQ}


BAD_EXTRACT = {
    "keys are 3-D": ({"keys": torch.zeros(12, H, D)}, "keys"),
    "no layers": ({"keys": []}, "keys"),
    "a layer is a list": ({"keys": [[1.0]] * L}, "keys"),
    "a layer is 4-D": ({"keys": [torch.zeros(1, 12, H, D)] * L}, "keys"),
    "integer keys": ({"keys": torch.zeros(L, 12, H, D, dtype=torch.int8)}, "keys"),
    "layers of two shapes": ({"keys": [torch.zeros(12, H, D)] * 2 + [torch.zeros(11, H, D)]}, "keys"),
    "layers of two dtypes": ({"keys": [torch.zeros(12, H, D)] * 2 + [torch.zeros(12, H, D).half()]}, "keys"),
    "fewer value layers": ({"values": torch.zeros(L - 1, 12, H, D)}, "values"),
    "values of another shape": ({"values": torch.zeros(L, 11, H, D)}, "values"),
    "values of another dtype": ({"values": torch.zeros(L, 12, H, D).half()}, "values"),
    "values on another device": ({"values": torch.zeros(L, 12, H, D, device="meta")}, "values"),
    "index is a list": ({"index": [0] * T}, "index"),
    "index is float": ({"index": torch.zeros(T)}, "index"),
    "index is 2-D": ({"index": torch.zeros(1, T, dtype=torch.int64)}, "index"),
    "index beyond the end": ({"index": torch.tensor([0, 1, 2, 3, 12])}, "index"),
    "negative index": ({"index": torch.tensor([0, 1, 2, -1, 4])}, "index"),
    "index on another device": ({"index": torch.zeros(T, dtype=torch.int64, device="meta")}, "index"),
    "positions without inv_freq": ({"inv_freq": None}, "inv_freq"),
    "inv_freq without positions": ({"positions": None}, "inv_freq"),
    "positions are float": ({"positions": POSITIONS.float()}, "positions"),
    "positions are short": ({"positions": POSITIONS[1:]}, "positions"),
    "positions beyond the limit": ({"positions": POSITIONS.clamp_min(2**20 + 1)}, "positions"),
    "positions on another device": ({"positions": POSITIONS.to("meta")}, "positions"),
    "inv_freq is a list": ({"inv_freq": INV_FREQ.tolist()}, "inv_freq"),
    "inv_freq of head_dim": ({"inv_freq": INV_FREQ.repeat(2)}, "inv_freq"),
    "inv_freq is integer": ({"inv_freq": INV_FREQ.long()}, "inv_freq"),
    "inv_freq on another device": ({"inv_freq": INV_FREQ.to("meta")}, "inv_freq"),
    "attention_scaling is 0": ({"attention_scaling": 0.0}, "attention_scaling"),
    "attention_scaling is infinite": ({"attention_scaling": float("inf")}, "attention_scaling"),
    "unknown backend": ({"backend": "fast"}, "backend"),
    "attention's backend": ({"backend": "reference"}, "backend"),
}


@pytest.mark.parametrize("name", BAD_EXTRACT)
def test_bad_extract(name):
    changes, argument = BAD_EXTRACT[name]
    extract_kv(**extract_arguments())
    with rejects(argument):
        extract_kv(**(extract_arguments() | changes))


def test_odd_head_dim_has_no_rotation():
    keys, values = torch.randn(2, L, 12, H, 15)
    extract_kv(keys, values, torch.arange(T))
    with rejects("head_dim"):
        extract_kv(keys, values, torch.arange(T), POSITIONS, INV_FREQ[:7])


SLOTS = torch.tensor([7, 0, -1, 11, 4])
CACHE = torch.full((L, 12, H, D), SENTINEL)
BAD_INJECT = {
    "kv is a tensor": ({"kv": random_kv().k}, "kv"),
    "kv on another device": ({"kv": random_kv().to("meta")}, "kv"),
    "cache of other layers": ({"k_cache": CACHE[1:], "v_cache": CACHE[1:].clone()}, "k_cache"),
    "cache of other heads": ({"k_cache": CACHE[:, :, :1], "v_cache": CACHE[:, :, :1].clone()}, "k_cache"),
    "cache of another head_dim": ({"k_cache": CACHE[..., :8], "v_cache": CACHE[..., :8].clone()}, "k_cache"),
    "k_cache is 3-D": ({"k_cache": CACHE[0]}, "k_cache"),
    "k_cache of 2-D layers": ({"k_cache": list(CACHE[:, :, 0])}, "k_cache"),
    "k_cache is None": ({"k_cache": None}, "k_cache"),
    "k_cache for both": ({"k_cache": CACHE, "v_cache": CACHE}, "v_cache"),
    "one layer for all": ({"k_cache": [CACHE[0]] * L}, "v_cache"),
    "quantised k_cache": ({"k_cache": CACHE.char()}, "k_cache"),
    "v_cache of another shape": ({"v_cache": CACHE[:, 1:]}, "v_cache"),
    "v_cache of another dtype": ({"v_cache": CACHE.half()}, "v_cache"),
    "v_cache of fewer layers": ({"v_cache": list(CACHE[1:])}, "v_cache"),
    "v_cache paged and k_cache not": ({"v_cache": CACHE.unflatten(1, (3, 4))}, "v_cache"),
    "v_cache on another device": ({"v_cache": CACHE.to("meta")}, "v_cache"),
    "v_cache is expanded": ({"v_cache": CACHE[:, :1].expand(CACHE.shape)}, "v_cache"),
    "slots are a list": ({"slots": SLOTS.tolist()}, "slots"),
    "slots are float": ({"slots": SLOTS.float()}, "slots"),
    "slots are short": ({"slots": SLOTS[1:]}, "slots"),
    "slots beyond the end": ({"slots": torch.tensor([7, 0, -1, 12, 4])}, "slots"),
    "slots below -1": ({"slots": torch.tensor([7, 0, -2, 11, 4])}, "slots"),
    "slots repeated": ({"slots": torch.tensor([7, 0, -1, 7, 4])}, "slots"),
    "slots on another device": ({"slots": SLOTS.to("meta")}, "slots"),
    "positions are short": ({"positions": POSITIONS[1:]}, "positions"),
    "positions are float": ({"positions": POSITIONS.float()}, "positions"),
    "positions below the limit": ({"positions": POSITIONS - 1}, "positions"),
    "positions are None": ({"positions": None}, "positions"),
    "inv_freq is short": ({"inv_freq": INV_FREQ[1:]}, "inv_freq"),
    "inv_freq is None": ({"inv_freq": None}, "inv_freq"),
    "attention_scaling is negative": ({"attention_scaling": -1.0}, "attention_scaling"),
    "attention_scaling is a word": ({"attention_scaling": "x"}, "attention_scaling"),
    "attention_scaling is NaN": ({"attention_scaling": float("nan")}, "attention_scaling"),
    "unknown backend": ({"backend": "fast"}, "backend"),
}


@pytest.mark.parametrize("name", BAD_INJECT)
def test_bad_inject_writes_nothing(name):
    changes, argument = BAD_INJECT[name]
    good = {"slots": SLOTS, "positions": POSITIONS, "inv_freq": INV_FREQ}
    inject_kv(random_kv(), CACHE.clone(), CACHE.clone(), **good)
    arguments = {"kv": random_kv(), "k_cache": CACHE.clone(), "v_cache": CACHE.clone()} | good | changes
    with rejects(argument):
        inject_kv(**arguments)
    for name in ("k_cache", "v_cache"):
        for layer in () if arguments[name] is None else arguments[name]:
            assert layer.device.type == "meta" or (layer == torch.tensor(SENTINEL).to(layer.dtype)).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_kernel_without_a_device():
    if (reason := cuda.unavailable_reason()) is None:
        reason = "there is no CUDA device"
    with pytest.raises(ValueError, match=re.escape(f"backend 'cuda' cannot be used here: {reason}")):
        extract_kv(**extract_arguments(), backend="cuda")


@pytest.mark.parametrize("backend", ["flash", "reference"])
def test_other_backends_give_the_reason(backend):
    with pytest.raises(ValueError, match=rf"^backend must be one of auto.* was '{backend}': it serves attention only"):
        extract_kv(**extract_arguments(), backend=backend)
