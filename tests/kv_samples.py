"""K/V, caches of every form, and the expectations of tests of the K/V path."""

import torch
from reference import assert_error_rule

from voco_kernels import VocoKV

L, T, H, D = 3, 5, 2, 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WITH_INDEX = list(zip(DTYPES, (torch.int64, torch.int32, torch.int64)))
SENTINEL = 77.0
INV_FREQ = 10000.0 ** (-torch.arange(0, D, 2).float() / D)
POSITIONS = torch.tensor([0, 1, -1, -(2**20), 2**20])


def random_kv(dtype=torch.float32, layers=L, tokens=T, heads=H, head_dim=D, **options) -> VocoKV:
    k, v = (torch.randn(layers, tokens, heads, head_dim).to(dtype) for _ in "kv")
    return VocoKV(k, v, **options)


def quantised_kv(dtype, tokens=T, **options) -> VocoKV:
    kv = random_kv(tokens=tokens, **options)
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
