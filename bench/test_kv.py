"""Compressed K/V in float32: out of a model's cache and into another, against the loops that one writes without the library.

Both sides do the whole job: keys lose their rotation on the way out and get a new one on the way in.
"""

from functools import partial

import pytest
import torch
from transformers.cache_utils import DynamicCache

from bench.measure import Candidate
from bench.shapes import KV, KVShape
from tests.reference import VOCO, assert_error_rule, eager_rotated, rotated
from voco_kernels import VocoKV, extract_kv, inject_kv

# Layers that are compared with the truth in float64.
CHECKED_LAYERS = (0, -1)


class Problem:
    """The cache of one image in all layers, as stage 1 leaves it, and the compressed K/V of all images."""

    def __init__(self, shape: KVShape):
        generator = torch.Generator().manual_seed(0)
        self.shape = shape
        length = shape.vision + shape.voco
        cache = (shape.layers, 1, shape.kv_heads, length, shape.head_dim)
        # Stage 1 runs image after image; every image leaves its K/V in memory of this size, so one image stands for all.
        self.keys, self.values = (list(torch.randn(cache, generator=generator).unbind()) for _ in range(2))
        self.index = torch.arange(shape.vision, length)
        self.inv_freq = 1.0 / 10000 ** (torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        compressed = (shape.layers, shape.tokens, shape.kv_heads, shape.head_dim)
        self.kv = VocoKV(*(torch.randn(compressed, generator=generator) for _ in range(2)))
        self.positions = torch.arange(shape.tokens)

    def check_extracted(self, result: tuple) -> None:
        """Raise AssertionError unless (k, v), by layer [tokens, H, D], are the images' VoCo tokens before RoPE."""
        k, v = result
        for layer in CHECKED_LAYERS:
            source = self.keys[layer][0].transpose(0, 1)[self.index]
            copies = (self.shape.images, 1, 1)
            true = rotated(source, self.index, self.inv_freq, inverse=True).repeat(copies)
            eager = eager_rotated(source, -self.index, self.inv_freq).repeat(copies)
            assert_error_rule("k", k[layer], eager, true, [VOCO] * self.shape.tokens)
            assert torch.equal(v[layer], self.values[layer][0].transpose(0, 1)[self.index].repeat(copies))

    def check_injected(self, result: tuple) -> None:
        """Raise AssertionError unless (k, v), by layer [1, H, tokens, D], are the compressed K/V after RoPE."""
        k, v = result
        for layer in CHECKED_LAYERS:
            source = self.kv.k[layer]
            true = rotated(source, self.positions, self.inv_freq)
            eager = eager_rotated(source, self.positions, self.inv_freq)
            assert_error_rule("k", k[layer][0].transpose(0, 1), eager, true, [VOCO] * self.shape.tokens)
            assert torch.equal(v[layer][0].transpose(0, 1), self.kv.v[layer])

    # ---- out of a cache ----------------------------------------------------------------------------------------------

    def extract(self):
        """The library, an image at a time, as stage 1 runs."""
        keys, values = ([x[0].transpose(0, 1) for x in layers] for layers in (self.keys, self.values))
        parts = [
            extract_kv(keys, values, self.index, self.index, self.inv_freq, backend="torch")
            for _ in range(self.shape.images)
        ]
        kv = VocoKV.cat(parts) if len(parts) > 1 else parts[0]
        return kv.k, kv.v

    def extract_by_loop(self):
        """A loop over images and layers."""
        cos, sin = self._cos_sin(self.index)
        parts = [[], []]
        for _ in range(self.shape.images):
            k = [x.index_select(2, self.index) for x in self.keys]
            parts[0].append([x * cos - rotate_half(x) * sin for x in k])
            parts[1].append([x.index_select(2, self.index) for x in self.values])
        k, v = ([torch.cat(images, dim=2)[0].transpose(0, 1) for images in zip(*part)] for part in parts)
        return k, v

    # ---- into a cache ------------------------------------------------------------------------------------------------

    def preallocated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A static cache [L, 1, H, S, D] for keys, and one for values."""
        shape = (self.shape.layers, 1, self.shape.kv_heads, self.shape.tokens, self.shape.head_dim)
        return torch.zeros(shape), torch.zeros(shape)

    def inject(self, k: torch.Tensor, v: torch.Tensor):
        """The library, into a cache that is there already."""
        inject_kv(
            self.kv, k.transpose(2, 3), v.transpose(2, 3), self.positions, self.positions, self.inv_freq, backend="torch"
        )
        return k, v

    def inject_into_dynamic(self):
        """The library, then the cache that `generate` makes by default."""
        k, v = torch.empty_like(self.kv.k), torch.empty_like(self.kv.v)
        inject_kv(self.kv, k, v, self.positions, self.positions, self.inv_freq, backend="torch")
        cache = DynamicCache()
        for layer in range(self.shape.layers):
            cache.update(k[layer].transpose(0, 1)[None], v[layer].transpose(0, 1)[None], layer)
        return _tensors_of(cache)

    def inject_by_loop(self):
        """A loop over layers that concatenates rotated keys to a dynamic cache."""
        cos, sin = self._cos_sin(self.positions)
        cache = DynamicCache()
        for layer in range(self.shape.layers):
            k, v = (x[layer].transpose(0, 1)[None] for x in (self.kv.k, self.kv.v))
            cache.update(k * cos + rotate_half(k) * sin, v, layer)
        return _tensors_of(cache)

    def _cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = (positions.float()[:, None] * self.inv_freq).repeat(1, 2)
        return angle.cos(), angle.sin()


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """As LLaMA's code rotates: [-second half, first half]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _tensors_of(cache: DynamicCache) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


@pytest.fixture(scope="module", params=KV)
def problem(request):
    return Problem(KV[request.param])


def test_extract(measure, problem):
    measure(
        "K/V out of a cache",
        problem.shape.name,
        [
            Candidate("voco torch", problem.extract, problem.check_extracted),
            Candidate("loop of index_select", problem.extract_by_loop, problem.check_extracted),
        ],
        work=problem.shape.moved_bytes(torch.float32) / 1e9,
        unit="GB/s",
    )


def test_inject(measure, problem):
    measure(
        "K/V into a cache",
        problem.shape.name,
        [
            Candidate("voco torch", partial(problem.inject, *problem.preallocated()), problem.check_injected),
            Candidate("voco torch, dynamic cache", problem.inject_into_dynamic, problem.check_injected),
            Candidate("loop of torch.cat, dynamic cache", problem.inject_by_loop, problem.check_injected),
        ],
        work=problem.shape.moved_bytes(torch.float32) / 1e9,
        unit="GB/s",
    )
