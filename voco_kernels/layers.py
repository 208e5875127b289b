"""Layers whose tensors have equal strides: what one launch can move."""

from collections.abc import Sequence

import torch


def equal_runs(k_layers: Sequence[torch.Tensor], v_layers: Sequence[torch.Tensor], most: int) -> list[tuple[int, int]]:
    """Runs [begin, end) of layers with equal strides, at most `most` long: one launch each, and nearly always one in all."""
    runs, begin = [], 0
    for layer in range(1, len(k_layers) + 1):
        at_end = layer == len(k_layers) or layer - begin == most
        if at_end or any(x[layer].stride() != x[begin].stride() for x in (k_layers, v_layers)):
            runs.append((begin, layer))
            begin = layer
    return runs


def cache_strides(cache: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides of block, slot, head and dim of one layer's cache, [slots, H, D] or [blocks, block, H, D]."""
    return cache.stride() if cache.ndim == 4 else (0, *cache.stride())
