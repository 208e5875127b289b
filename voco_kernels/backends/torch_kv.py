"""Portable extraction and injection of K/V: a gather, a rotation in float32 and a scatter per layer."""

import torch


def unavailable_reason() -> str | None:
    """This backend runs everywhere torch does."""
    return None


def unsupported_reason(kv_dtype: torch.dtype, cache: torch.Tensor) -> str | None:
    """Everything is supported."""
    return None


def extraction(keys, values, index, positions, inv_freq, attention_scaling, out_k, out_v):
    """run(): rows `index` of every layer into out_k and out_v [L, T, Hkv, D], keys with their rotation taken off."""

    @torch.no_grad()
    def run() -> None:
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            torch.index_select(k, 0, index, out=out_k[layer])
            torch.index_select(v, 0, index, out=out_v[layer])
        if positions is not None:
            cos, sin = _angles(positions, inv_freq)
            out_k.copy_(_rotate(out_k.float(), cos, -sin) / attention_scaling)

    return run


def injection(k_caches, v_caches, slots, positions, inv_freq, attention_scaling):
    """run(k, v, k_scale, v_scale): keys rotated to their positions, both written into the slots that there are."""

    num_slots = k_caches[0].shape[:-2].numel()

    @torch.no_grad()
    def run(k, v, k_scale, v_scale) -> None:
        cos, sin = (x * attention_scaling for x in _angles(positions, inv_freq))
        # Those that a plan's owner changed to lie outside are skipped like -1, as by the kernels.
        written, to = (slots >= 0) & (slots < num_slots), slots
        if not bool(written.all()):
            k, v, to, cos, sin = k[:, written], v[:, written], slots[written], cos[written], sin[written]
            k_scale, v_scale = (s if s is None else s[:, written] for s in (k_scale, v_scale))
        for layer, (k_cache, v_cache) in enumerate(zip(k_caches, v_caches, strict=True)):
            _write(k_cache, to, _rotate(_dequantised(k, k_scale, layer), cos, sin))
            # Values are copied: no detour through float32 unless they are quantised.
            _write(v_cache, to, v[layer] if v_scale is None else _dequantised(v, v_scale, layer))

    return run


def _angles(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [T, 1, D/2]; the angle is the float32 product that transformers takes."""
    angle = positions[:, None, None].float() * inv_freq.float()
    return angle.cos(), angle.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split RoPE of x [..., T, H, D] (RoFormer, arXiv 2104.09864, in the layout of LLaMA); `-sin` undoes it."""
    low, high = x.chunk(2, dim=-1)
    rotated = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_low, out_high = rotated.chunk(2, dim=-1)
    torch.mul(low, cos, out=out_low).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out_high).addcmul_(low, sin)
    return rotated


def _dequantised(x: torch.Tensor, scale: torch.Tensor | None, layer: int) -> torch.Tensor:
    return x[layer].float() if scale is None else x[layer].float() * scale[layer][..., None]


def _write(cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    if cache.ndim == 3:
        cache.index_copy_(0, slots.long(), rows.to(cache.dtype))
    else:
        cache[slots // cache.shape[1], slots % cache.shape[1]] = rows.to(cache.dtype)
