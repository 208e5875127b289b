"""The K/V path in CUDA: all layers in one launch, whatever form their caches have.

Addresses and strides are handed over once; a call then costs reading a few pointers and the launch. Nothing is allocated,
copied to the device or waited for, so CUDA graphs can hold it.
"""

import torch

from ...layers import cache_strides, equal_runs
from . import kernels_unavailable_reason, load, unserved_reason

# As csrc/include/voco/kv_cache.h numbers them.
CACHE_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
ROW_DTYPES = {**CACHE_DTYPES, torch.int8: 3, torch.float8_e4m3fn: 4}
NO_STRIDES = (0, 0, 0, 0)

unavailable_reason = kernels_unavailable_reason


def unsupported_reason(kv_dtype: torch.dtype, cache: torch.Tensor) -> str | None:
    """Why K/V of `kv_dtype` cannot be moved to or from a layer's cache like `cache`; None where they can."""
    for dtype, known in ((kv_dtype, ROW_DTYPES), (cache.dtype, CACHE_DTYPES)):
        if dtype not in known:
            return f"it does not take {str(dtype).removeprefix('torch.')}"
    if cache.shape[-1] % 2:
        return f"it takes an even head_dim, not {cache.shape[-1]}"
    return unserved_reason(cache.device, cache.shape[-1])


def injection(k_caches, v_caches, slots, positions, inv_freq, attention_scaling):
    """run(k, v, k_scale, v_scale), which writes K/V into the caches."""
    return _Move(True, k_caches, v_caches, slots, positions, inv_freq, attention_scaling)


def extraction(keys, values, index, positions, inv_freq, attention_scaling, out_k, out_v):
    """run(), which writes the selected K/V into out_k and out_v."""
    move = _Move(False, keys, values, index, positions, inv_freq, 1 / attention_scaling)
    return lambda: move(out_k, out_v, None, None)


class _Move:
    """Launches of a fixed set of caches, tokens and frequencies, whose tensors it keeps alive."""

    def __init__(self, inject, k_caches, v_caches, slots, positions, inv_freq, multiplier):
        module, first = load(), k_caches[0]
        inv_freq = inv_freq if inv_freq is None else inv_freq.to(torch.float32).contiguous()
        slots, positions = slots.contiguous(), positions if positions is None else positions.contiguous()
        self._kept = (k_caches, v_caches, slots, positions, inv_freq)
        self._device = first.device.index if first.is_cuda else -1
        self._form = None
        self._movers = [
            module.KvMover(
                inject=inject,
                device=self._device,
                first_layer=begin,
                k_caches=[x.data_ptr() for x in k_caches[begin:end]],
                v_caches=[x.data_ptr() for x in v_caches[begin:end]],
                cache_dtype=CACHE_DTYPES[first.dtype],
                k_cache_strides=cache_strides(k_caches[begin]),
                v_cache_strides=cache_strides(v_caches[begin]),
                block_size=first.shape[-3],
                num_slots=first.shape[:-2].numel(),
                slots=slots.data_ptr(),
                wide_slots=slots.dtype == torch.int64,
                positions=0 if positions is None else positions.data_ptr(),
                wide_positions=positions is not None and positions.dtype == torch.int64,
                inv_freq=0 if inv_freq is None else inv_freq.data_ptr(),
                multiplier=multiplier,
                tokens=slots.shape[0],
                heads=first.shape[-2],
                half=first.shape[-1] // 2,
            )
            for begin, end in equal_runs(k_caches, v_caches, module.MAX_LAYERS)
        ]

    def __call__(self, k, v, k_scale, v_scale) -> None:
        form = (k.dtype, k.stride(), v.stride(), k_scale is None or (k_scale.stride(), v_scale.stride()))
        if form != self._form:
            self._set_form(form)
        stream = 0 if self._device < 0 else torch._C._cuda_getCurrentRawStream(self._device)
        scales = (0, 0) if k_scale is None else (k_scale.data_ptr(), v_scale.data_ptr())
        for mover in self._movers:
            mover.launch(k.data_ptr(), v.data_ptr(), *scales, stream)

    def _set_form(self, form) -> None:
        dtype, k, v, scales = form
        scales = (NO_STRIDES, NO_STRIDES) if scales is True else [(*strides, 0) for strides in scales]
        for mover in self._movers:
            mover.set_rows(ROW_DTYPES[dtype], dtype.itemsize, k, v, *scales)
        self._form = form
