"""Compressed K/V out of a model's cache and into another: the library, and the loops that one writes without it.

All do the whole job: keys lose their rotation on the way out and get a new one on the way in.
"""

from functools import partial

import torch
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache, StaticCache
from voco_llama.stages import append

from bench.shapes import KVShape
from tests.reference import VOCO, assert_error_rule, eager_rotated, rotated
from voco_kernels import InjectionPlan, VocoKV, extract_kv, inject_kv

# Layers that are compared with the truth in float64.
CHECKED_LAYERS = (0, -1)


class Problem:
    """The cache of one image in all layers, as stage 1 leaves it, and the compressed K/V of all images."""

    def __init__(self, shape: KVShape, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        generator = torch.Generator(device).manual_seed(0)
        random = partial(torch.randn, generator=generator, device=device, dtype=dtype)
        self.shape, self.device, self.dtype = shape, torch.device(device), dtype
        length = shape.vision + shape.voco
        cache = (shape.layers, 1, shape.kv_heads, length, shape.head_dim)
        # Stage 1 runs image after image; every image leaves its K/V in memory of this size, so one image stands for all.
        self.keys, self.values = (list(random(cache).unbind()) for _ in range(2))
        self.index = torch.arange(shape.vision, length, device=device)
        self.inv_freq = 1.0 / 10000 ** (torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim)
        compressed = (shape.layers, shape.tokens, shape.kv_heads, shape.head_dim)
        self.kv = VocoKV(*(random(compressed) for _ in range(2)))
        self.positions = torch.arange(shape.tokens, device=device)

    def check_extracted(self, result: tuple) -> None:
        """Raise AssertionError unless (k, v), by layer [tokens, H, D], are the images' VoCo tokens before RoPE."""
        k, v = result
        index = self.index.cpu()
        for layer in CHECKED_LAYERS:
            source = self.keys[layer][0].transpose(0, 1).cpu()[index]
            copies = (self.shape.images, 1, 1)
            true = rotated(source, index, self.inv_freq.cpu(), inverse=True).repeat(copies)
            eager = eager_rotated(source, -index, self.inv_freq.cpu()).repeat(copies)
            assert_error_rule("k", k[layer].cpu(), eager, true, [VOCO] * self.shape.tokens)
            assert torch.equal(v[layer], self.values[layer][0].transpose(0, 1)[self.index].repeat(copies))

    def check_injected(self, result: tuple) -> None:
        """Raise AssertionError unless (k, v), by layer [1, H, tokens, D], are the compressed K/V after RoPE."""
        k, v = result
        positions, inv_freq = self.positions.cpu(), self.inv_freq.cpu()
        for layer in CHECKED_LAYERS:
            source = self.kv.k[layer].cpu()
            true, eager = rotated(source, positions, inv_freq), eager_rotated(source, positions, inv_freq)
            assert_error_rule("k", k[layer][0].transpose(0, 1).cpu(), eager, true, [VOCO] * self.shape.tokens)
            assert torch.equal(v[layer][0].transpose(0, 1), self.kv.v[layer])

    # ---- out of a cache ----------------------------------------------------------------------------------------------

    def extract(self, backend: str):
        """The library, an image at a time, as stage 1 runs."""
        keys, values = ([x[0].transpose(0, 1) for x in layers] for layers in (self.keys, self.values))
        parts = [
            extract_kv(keys, values, self.index, self.index, self.inv_freq, backend=backend)
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

    def static_caches(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What a static cache holds for keys and for values: a tensor [1, H, S, D] per layer."""
        shape = (1, self.shape.kv_heads, self.shape.tokens, self.shape.head_dim)
        new = partial(torch.zeros, shape, device=self.device, dtype=self.dtype)
        return tuple([new() for _ in range(self.shape.layers)] for _ in "kv")

    def injection(self, backend: str, caches):
        """The library with a plan, into static caches: what a server calls per request."""
        views = ([x.transpose(1, 2) for x in side] for side in caches)
        plan = InjectionPlan(*views, self.positions, self.positions, self.inv_freq, backend=backend)

        def run():
            plan.inject(self.kv)
            return caches

        return run

    def inject(self, backend: str, caches):
        """The library, into static caches."""
        views = ([x.transpose(1, 2) for x in side] for side in caches)
        inject_kv(self.kv, *views, self.positions, self.positions, self.inv_freq, backend=backend)
        return caches

    def inject_by_index_copy(self, caches):
        """A loop over layers, into static caches."""
        cos, sin = self._cos_sin(self.positions)
        for layer, (k_cache, v_cache) in enumerate(zip(*caches)):
            k, v = (x[layer].transpose(0, 1)[None] for x in (self.kv.k, self.kv.v))
            k_cache.index_copy_(2, self.positions, k * cos + rotate_half(k) * sin)
            v_cache.index_copy_(2, self.positions, v)
        return caches

    def static_update(self):
        """transformers' static cache, into which a loop over layers puts rotated keys; filled anew by every call."""
        shape = self.shape
        cache = StaticCache(self._config(), max_cache_len=shape.tokens)
        cos, sin = self._cos_sin(self.positions)

        def run():
            for layer in range(shape.layers):
                k, v = (x[layer].transpose(0, 1)[None] for x in (self.kv.k, self.kv.v))
                if cache.layers[layer].is_initialized:
                    cache.layers[layer].cumulative_length.zero_()
                cache.update(k * cos + rotate_half(k) * sin, v, layer)
            return _tensors_of(cache)

        return run

    def inject_into_dynamic(self):
        """The library, into the cache that `generate` makes by default, as stage 2 does."""
        cache = DynamicCache(config=self._config())
        append(cache, [self.kv], self.positions, self.inv_freq, 1.0, self.dtype)
        return _tensors_of(cache)

    def inject_by_concatenation(self):
        """A loop over layers that concatenates rotated keys to a dynamic cache."""
        cos, sin = self._cos_sin(self.positions)
        cache = DynamicCache()
        for layer in range(self.shape.layers):
            k, v = (x[layer].transpose(0, 1)[None] for x in (self.kv.k, self.kv.v))
            cache.update(k * cos + rotate_half(k) * sin, v, layer)
        return _tensors_of(cache)

    def _config(self) -> LlamaConfig:
        shape = self.shape
        return LlamaConfig(num_hidden_layers=shape.layers, num_attention_heads=shape.kv_heads, head_dim=shape.head_dim)

    def _cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = (positions.float()[:, None] * self.inv_freq).repeat(1, 2)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """As LLaMA's code rotates: [-second half, first half]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _tensors_of(cache: DynamicCache | StaticCache) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
