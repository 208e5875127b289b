"""K/V as values: joined, cut, moved; bad input."""

import re

import pytest
import torch
from kv_samples import D, H, L, T, quantised_kv, random_kv

from voco_kernels import VocoKV

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
