"""K/V as values: taken out of a model's keys, put into caches of any form, joined and cut; bad input."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_error_rule, assert_rounded_once, eager_rotated, rotated
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from voco_kernels import VocoKV, extract_kv, inject_kv

L, T, H, D = 3, 5, 2, 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WITH_INDEX = list(zip(DTYPES, (torch.int64, torch.int32, torch.int64)))
SENTINEL = 77.0
INV_FREQ = 10000.0 ** (-torch.arange(0, D, 2).float() / D)
POSITIONS = torch.tensor([0, 1, -1, -(2**20), 2**20])


def random_kv(dtype=torch.float32, layers=L, tokens=T, heads=H, head_dim=D, **options) -> VocoKV:
    k, v = (torch.randn(layers, tokens, heads, head_dim).to(dtype) for _ in "kv")
    return VocoKV(k, v, **options)


def quantised_kv(dtype, tokens=T) -> VocoKV:
    kv = random_kv(tokens=tokens)
    limit = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    parts = []
    for x in (kv.k, kv.v):
        scale = x.abs().amax(-1) / limit
        x = x / scale[..., None]
        parts.append(((x.round() if dtype == torch.int8 else x).to(dtype), scale))
    return VocoKV(parts[0][0], parts[1][0], parts[0][1], parts[1][1])


def assert_tokens(name, x, eager, x64):
    """The error rule over tokens [L, T, H, D] -> rows [T, ...]; all of one kind."""
    x, eager, x64 = (t.transpose(0, 1) for t in (x, eager, x64))
    assert_error_rule(name, x, eager, x64, ["token"] * len(x))


# ---- forms of a cache --------------------------------------------------------------------------------------------------


def stacked(slots, dtype):
    cache = torch.full((L, slots, H, D), SENTINEL, dtype=dtype)
    return cache, lambda: cache


def layers(slots, dtype):
    cache = [torch.full((slots, H, D), SENTINEL, dtype=dtype) for _ in range(L)]
    return cache, lambda: torch.stack(cache)


def paged(slots, dtype):
    cache = torch.full((L, slots // 4, 4, H, D), SENTINEL, dtype=dtype)
    return cache, lambda: cache.flatten(1, 2)


def paged_layers(slots, dtype):
    cache = [torch.full((slots // 4, 4, H, D), SENTINEL, dtype=dtype) for _ in range(L)]
    return tuple(cache), lambda: torch.stack(cache).flatten(1, 2)


def hugging_face(slots, dtype):
    """[B, H, S, D] of which `.transpose(1, 2)` is B blocks of S slots."""
    cache = [torch.full((2, H, slots // 2, D), SENTINEL, dtype=dtype) for _ in range(L)]
    return [x.transpose(1, 2) for x in cache], lambda: torch.stack(cache).transpose(2, 3).flatten(1, 2)


def every_other(slots, dtype):
    """A view with gaps in every dimension; what lies in the gaps is checked as well."""
    storage = torch.full((L, 2 * slots, 2 * H, 2 * D), SENTINEL, dtype=dtype)

    def read():
        gaps = storage.clone()
        gaps[:, ::2, ::2, 1::2] = SENTINEL
        assert (gaps == SENTINEL).all()
        return storage[:, ::2, ::2, 1::2]

    return storage[:, ::2, ::2, 1::2], read


FORMS = (stacked, layers, paged, paged_layers, hugging_face, every_other)


@pytest.mark.parametrize(("dtype", "index_dtype"), WITH_INDEX, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_inject_into_every_form(form, dtype, index_dtype):
    kv = random_kv(dtype)
    (k_cache, read_k), (v_cache, read_v) = form(12, dtype), form(12, dtype)
    slots = torch.tensor([7, 0, -1, 11, 4])
    inject_kv(kv, k_cache, v_cache, slots.to(index_dtype), POSITIONS.to(index_dtype), INV_FREQ, 1.25)
    kept, named = slots >= 0, slots[slots >= 0]
    k, v = read_k(), read_v()
    true, eager = rotated(kv.k, POSITIONS, INV_FREQ, 1.25), eager_rotated(kv.k.float(), POSITIONS, INV_FREQ, 1.25)
    assert_rounded_once("k_cache", k[:, named], eager[:, kept], true[:, kept])
    assert torch.equal(v[:, named], kv.v[:, kept])
    untouched = torch.ones(12, dtype=torch.bool)
    untouched[named] = False
    assert (k[:, untouched] == SENTINEL).all() and (v[:, untouched] == SENTINEL).all()


def rows_of(form, dtype):
    """keys, values of 12 tokens in a form that extract_kv takes, and the same as [L, N, H, D]."""
    result = []
    for _ in "kv":
        x = torch.randn(L, 12, H, D).to(dtype)
        if form == "stacked":
            result.append((x, x))
        elif form == "layers":
            result.append((list(x.unbind(0)), x))
        elif form == "hugging_face":
            cache = x.transpose(1, 2).contiguous()  # [B = L, H, S, D]
            result.append(([layer.transpose(0, 1) for layer in cache], x))
        else:
            wide = torch.randn(L, 12, 2 * H, D).to(dtype)
            result.append((wide[:, :, ::2], wide[:, :, ::2].clone()))
    return result


@pytest.mark.parametrize(("dtype", "index_dtype"), WITH_INDEX, ids=str)
@pytest.mark.parametrize("form", ["stacked", "layers", "hugging_face", "strided"])
def test_extract_from_every_form(form, dtype, index_dtype):
    (keys, all_keys), (values, all_values) = rows_of(form, dtype)
    index = torch.tensor([11, 3, 3, 0, 7])
    plain = extract_kv(keys, values, index.to(index_dtype))
    assert torch.equal(plain.k, all_keys[:, index]) and torch.equal(plain.v, all_values[:, index])
    assert plain.k.data_ptr() not in {x.data_ptr() for x in keys}
    kv = extract_kv(keys, values, index.to(index_dtype), POSITIONS.to(index_dtype), INV_FREQ, 1.25)
    assert kv.k.dtype == kv.v.dtype == dtype and kv.k_scale is None and kv.segments is None
    expected = rotated(all_keys[:, index], POSITIONS, INV_FREQ, 1.25, inverse=True)
    # R(-p) is the rotation to the negative position.
    eager = eager_rotated(all_keys[:, index].float(), -POSITIONS, INV_FREQ, 1 / 1.25)
    assert_rounded_once("k", kv.k, eager, expected)
    assert torch.equal(kv.v, all_values[:, index])


@given(st.data())
def test_what_was_injected_is_extracted(data):
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
    inject_kv(kv, k_cache, v_cache, slots, positions, inv_freq, scaling)
    back = extract_kv(k_cache.flatten(1, 2), v_cache.flatten(1, 2), slots, positions, inv_freq, scaling)
    assert_tokens("k", back.k, eager_rotated(kv.k, positions, inv_freq), kv.k.double())
    assert torch.equal(back.v, kv.v)


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inject_casts_once(dtype, cache_dtype):
    kv = random_kv(dtype)
    k_cache, v_cache = (torch.full((L, T, H, D), SENTINEL, dtype=cache_dtype) for _ in "kv")
    inject_kv(kv, k_cache, v_cache, torch.arange(T), POSITIONS, INV_FREQ)
    true = rotated(kv.k, POSITIONS, INV_FREQ)
    assert_rounded_once("k_cache", k_cache, eager_rotated(kv.k.float(), POSITIONS, INV_FREQ), true)
    assert torch.equal(v_cache, kv.v.to(cache_dtype))


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_inject_dequantises(dtype, cache_dtype):
    kv = quantised_kv(dtype)
    k_cache, v_cache = (torch.full((L, 8, H, D), SENTINEL, dtype=cache_dtype) for _ in "kv")
    slots = torch.tensor([3, -1, 7, 0, 4])
    kept, named = slots >= 0, slots[slots >= 0]
    inject_kv(kv, k_cache, v_cache, slots, POSITIONS, INV_FREQ, 0.8)
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


def test_no_tokens():
    nothing = torch.zeros(0, dtype=torch.int64)
    for form in FORMS:
        (k_cache, read_k), (v_cache, read_v) = form(12, torch.float32), form(12, torch.float32)
        inject_kv(random_kv(tokens=0), k_cache, v_cache, nothing, nothing, INV_FREQ)
        assert (read_k() == SENTINEL).all() and (read_v() == SENTINEL).all()
    keys, values = torch.randn(2, L, 12, H, D)
    for rotation in ((), (nothing, INV_FREQ)):
        assert extract_kv(keys, values, nothing, *rotation).k.shape == (L, 0, H, D)
    assert extract_kv(keys[:, :0], values[:, :0], nothing).num_tokens == 0


def test_every_slot_skipped():
    k_cache, v_cache = (torch.full((L, 4, H, D), SENTINEL) for _ in "kv")
    inject_kv(random_kv(), k_cache, v_cache, torch.full((T,), -1), POSITIONS, INV_FREQ)
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
def test_keys_are_those_of_transformers(name, dtype):
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
    inject_kv(kv, k_cache, v_cache, torch.arange(6), positions, rope.inv_freq, rope.attention_scaling)
    assert_tokens("k_cache", k_cache, theirs, true)

    back = extract_kv(theirs, kv.v, torch.arange(6), positions, rope.inv_freq, rope.attention_scaling)
    assert_tokens("k", back.k, eager_rotated(theirs, -positions, rope.inv_freq, 1 / rope.attention_scaling), kv.k.double())


# ---- VocoKV ------------------------------------------------------------------------------------------------------------


def test_sizes():
    kv = random_kv(torch.bfloat16)
    assert (kv.num_layers, kv.num_tokens, kv.nbytes) == (L, T, 2 * 2 * L * T * H * D)
    kv = quantised_kv(torch.int8)
    assert kv.nbytes == 2 * L * T * H * D + 2 * 4 * L * T * H


@pytest.mark.parametrize("make", [random_kv, lambda **o: quantised_kv(torch.float8_e4m3fn, **o)], ids=["float", "fp8"])
def test_cat_and_slices_undo_each_other(make):
    whole = make(tokens=9)
    parts = [whole[:2], whole[2:2], whole[2:-1], whole[-1:]]
    assert [part.num_tokens for part in parts] == [2, 0, 6, 1]
    joined = VocoKV.cat(parts)
    for name in ("k", "v", "k_scale", "v_scale"):
        x, y = getattr(joined, name), getattr(whole, name)
        assert (x is None and y is None) or torch.equal(x.float(), y.float()), name
    assert VocoKV.cat([whole]).num_tokens == 9


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        (slice(None), [(9, 2), (4, 1), (16, 2)]),
        (slice(0, 2), [(9, 2)]),
        (slice(2, None), [(4, 1), (16, 2)]),
        (slice(2, 3), [(4, 1)]),
        (slice(-2, None), [(16, 2)]),
        (slice(1, None), None),
        (slice(0, 4), None),
        (slice(3, 3), []),
        (slice(2, 0), []),
        (slice(0, 99), [(9, 2), (4, 1), (16, 2)]),
    ],
)
def test_slices_keep_whole_segments(tokens, kept):
    kv = random_kv(segments=[(9, 2), (4, 1), (16, 2)], meta={"model": "m"})
    part = kv[tokens]
    assert torch.equal(part.k, kv.k[:, tokens]) and torch.equal(part.v, kv.v[:, tokens])
    assert part.segments == kept and part.meta == {"model": "m"}


def test_cat_of_segments_and_meta():
    one = random_kv(segments=[(9, 5)], meta={"model": "m", "image": "a"})
    two = random_kv(segments=[(4, 2), (4, 3)], meta={"model": "m", "image": "b", "more": "x"})
    assert VocoKV.cat([one, two]).segments == [(9, 5), (4, 2), (4, 3)]
    assert VocoKV.cat([one, two]).meta == {"model": "m"}
    assert VocoKV.cat([one, random_kv()]).segments is None
    assert VocoKV.cat([one, random_kv()]).meta == {}


def test_to():
    kv = random_kv(segments=[(9, 5)], meta={"model": "m"})
    half = kv.to(torch.bfloat16)
    assert torch.equal(half.k, kv.k.bfloat16()) and torch.equal(half.v, kv.v.bfloat16())
    assert half.segments == [(9, 5)] and half.meta == {"model": "m"}
    moved = quantised_kv(torch.int8).to("meta")
    assert {x.device.type for x in (moved.k, moved.v, moved.k_scale, moved.v_scale)} == {"meta"}
    with rejects("dtype"):
        quantised_kv(torch.int8).to(torch.float16)


# ---- bad input ---------------------------------------------------------------------------------------------------------


def rejects(argument: str):
    return pytest.raises(ValueError, match=rf"^{re.escape(argument)}(\[\d+\])?(\.[kv])? must be .+, but was .+")


K = torch.zeros(L, T, H, D)
SCALE = torch.ones(L, T, H)
BAD_KV = {
    "k is a list": ({"k": [1.0]}, "k"),
    "k is 3-D": ({"k": K[0]}, "k"),
    "v is 5-D": ({"v": K[None]}, "v"),
    "v of another shape": ({"v": K[:, 1:]}, "v"),
    "v of another dtype": ({"v": K.half()}, "v"),
    "v on another device": ({"v": K.to("meta")}, "v"),
    "integers": ({"k": K.long(), "v": K.long()}, "k"),
    "scales of floats": ({"k_scale": SCALE}, "k_scale"),
    "int8 without k_scale": ({"k": K.char(), "v": K.char(), "v_scale": SCALE}, "k_scale"),
    "int8 without v_scale": ({"k": K.char(), "v": K.char(), "k_scale": SCALE}, "v_scale"),
    "half scales": ({"k": K.char(), "v": K.char(), "k_scale": SCALE.half(), "v_scale": SCALE}, "k_scale"),
    "short scales": ({"k": K.char(), "v": K.char(), "k_scale": SCALE, "v_scale": SCALE[:, 1:]}, "v_scale"),
    "scale is a number": ({"k": K.char(), "v": K.char(), "k_scale": 1.0, "v_scale": SCALE}, "k_scale"),
    "scales elsewhere": ({"k": K.char(), "v": K.char(), "k_scale": SCALE, "v_scale": SCALE.to("meta")}, "v_scale"),
    "segments of other size": ({"segments": [(9, 4)]}, "segments"),
    "segments of three numbers": ({"segments": [(9, 4, 1)]}, "segments"),
    "negative segments": ({"segments": [(9, 6), (9, -1)]}, "segments"),
    "segments of numbers": ({"segments": [5]}, "segments"),
    "meta is a list": ({"meta": ["x"]}, "meta"),
    "meta of numbers": ({"meta": {"x": 1}}, "meta"),
}


@pytest.mark.parametrize("name", BAD_KV)
def test_bad_voco_kv(name):
    changes, argument = BAD_KV[name]
    VocoKV(K, K, segments=[(9, 5)], meta={"x": "y"})
    with rejects(argument):
        VocoKV(**({"k": K, "v": K} | changes))


@pytest.mark.parametrize("tokens", [0, slice(None, None, 2), slice(None, None, -1), torch.tensor([0])])
def test_bad_slices(tokens):
    with rejects("tokens"):
        random_kv()[tokens]


@pytest.mark.parametrize(
    ("parts", "argument"),
    [
        (lambda: [], "parts"),
        (lambda: [random_kv(), random_kv(layers=2)], "parts"),
        (lambda: [random_kv(), random_kv(heads=1)], "parts"),
        (lambda: [random_kv(), random_kv(head_dim=8)], "parts"),
        (lambda: [random_kv(), random_kv(torch.float16)], "parts"),
        (lambda: [random_kv(), random_kv().to("meta")], "parts"),
        (lambda: [quantised_kv(torch.int8), random_kv()], "parts"),
        (lambda: [random_kv(), random_kv().k], "parts"),
    ],
)
def test_bad_cat(parts, argument):
    with rejects(argument):
        VocoKV.cat(parts())


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
    "kv is a tensor": ({"kv": K}, "kv"),
    "kv on another device": ({"kv": random_kv().to("meta")}, "kv"),
    "cache of other layers": ({"k_cache": CACHE[1:], "v_cache": CACHE[1:]}, "k_cache"),
    "cache of other heads": ({"k_cache": CACHE[:, :, :1], "v_cache": CACHE[:, :, :1]}, "k_cache"),
    "cache of another head_dim": ({"k_cache": CACHE[..., :8], "v_cache": CACHE[..., :8]}, "k_cache"),
    "k_cache is 3-D": ({"k_cache": CACHE[0]}, "k_cache"),
    "k_cache of 2-D layers": ({"k_cache": list(CACHE[:, :, 0])}, "k_cache"),
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
    "attention_scaling is NaN": ({"attention_scaling": float("nan")}, "attention_scaling"),
    "unknown backend": ({"backend": "fast"}, "backend"),
    "planned backend": ({"backend": "cuda"}, "backend"),
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
        for layer in arguments[name]:
            assert layer.device.type == "meta" or (layer == torch.tensor(SENTINEL).to(layer.dtype)).all()


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("flash", "serves attention only"), ("triton", "serves attention only"), ("cuda", "not part of this version")],
)
def test_other_backends_give_the_reason(backend, reason):
    with pytest.raises(ValueError, match=rf"^backend must be one of auto, torch, .* was '{backend}': .*{reason}"):
        extract_kv(**extract_arguments(), backend=backend)
