"""The operations as registered torch operators (namespace `voco`), for graphs that torch.compile and torch.export trace.

Eager calls do not come here: they reach the backend directly, which is cheaper by tens of microseconds a call. An operator
receives the tensors of a layout, not the layout; backends find what they derived from it by those tensors.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .layout import VocoLayout


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: VocoLayout, scale: float, backend: str, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """`voco::attention` on a layout's tensors: (out, lse); lse may be empty unless `return_lse`."""
    return voco_attention_op(
        q, k, v, layout.segment_ids, layout.public, layout.cu_seqlens, layout.isolated, scale, backend, return_lse
    )


def _layout(segment_ids: Tensor, public: Tensor, cu_seqlens: Tensor, isolated: bool) -> VocoLayout:
    """The layout of these tensors as far as attention needs it: positions are the caller's business."""
    return VocoLayout(segment_ids, public, cu_seqlens, segment_ids, isolated)


@torch.library.custom_op("voco::attention", mutates_args=())
def voco_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor,
    public: Tensor,
    cu_seqlens: Tensor,
    isolated: bool,
    scale: float,
    backend: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """See `voco_kernels.voco_attention`."""
    layout, backend = _layout(segment_ids, public, cu_seqlens, isolated), backends.resolved(backend, q)
    keep_lse = return_lse or backend in backends.BACKWARD_READS_LSE
    out, lse = backends.load_for(backend, q, layout).attention(q, k, v, layout, scale, keep_lse)
    return out.contiguous(), _empty_lse(q) if lse is None else lse.contiguous()


@voco_attention_op.register_fake
def _(q, k, v, segment_ids, public, cu_seqlens, isolated, scale, backend, return_lse):
    keep_lse = return_lse or backends.resolved(backend, q) in backends.BACKWARD_READS_LSE
    lse = q.new_empty(q.shape[:2], dtype=_empty_lse(q).dtype) if keep_lse else _empty_lse(q)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("voco::attention_backward", mutates_args=())
def voco_attention_backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_ids: Tensor,
    public: Tensor,
    cu_seqlens: Tensor,
    isolated: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `voco::attention`, whose results `out` and `lse` are."""
    layout = _layout(segment_ids, public, cu_seqlens, isolated)
    module = backends.load_for(backends.resolved(backend, q), q, layout)
    return tuple(g.contiguous() for g in module.attention_backward(grad_out, q, k, v, out, lse, layout, scale))


@voco_attention_backward_op.register_fake
def _(grad_out, q, k, v, out, lse, segment_ids, public, cu_seqlens, isolated, scale, backend):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, *ids, ctx.isolated, ctx.scale, ctx.backend, _ = inputs
    ctx.save_for_backward(q, k, v, *output, *ids)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, grad_lse):
    grads = voco_attention_backward_op(grad_out, *ctx.saved_tensors, ctx.isolated, ctx.scale, ctx.backend)
    return *grads, *([None] * 7)


voco_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


class _Prefix(NamedTuple):
    """A `SharedPrefix` as backends read it; the checks were made where the graph was traced."""

    k: Tensor
    v: Tensor
    cu_prefix: Tensor
    cu_requests: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths, block_table, prefix, scale: float, backend: str):
    """`voco::decode_attention` on the tensors of a `SharedPrefix`, or of none: (out, lse)."""
    tensors = [None] * len(_Prefix._fields) if prefix is None else [getattr(prefix, name) for name in _Prefix._fields]
    return decode_attention_op(q, k_cache, v_cache, lengths, block_table, *tensors, scale, backend)


@torch.library.custom_op("voco::decode_attention", mutates_args=())
def decode_attention_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cu_prefix: Tensor | None,
    cu_requests: Tensor | None,
    prefix_k_scale: Tensor | None,
    prefix_v_scale: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """See `voco_kernels.decode_attention`; not differentiable."""
    prefix = stored = None
    if prefix_k is not None:
        prefix = _Prefix(prefix_k, prefix_v, cu_prefix, cu_requests, prefix_k_scale, prefix_v_scale)
        stored = prefix_k.dtype
    module = backends.load_decode(backends.resolved_decode(backend), q, stored)
    out, lse = module.decode(q, k_cache, v_cache, lengths, block_table, prefix, scale)
    return out.contiguous(), lse.contiguous()


@decode_attention_op.register_fake
def _(q, *rest):
    lse = q.new_empty(q.shape[:3], dtype=_empty_lse(q).dtype)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("voco::extract_kv", mutates_args=())
def extract_kv_op(
    keys: list[Tensor],
    values: list[Tensor],
    index: Tensor,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    attention_scaling: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """See `voco_kernels.extract_kv`; keys and values are L tensors [N, Hkv, D]."""
    out_k, out_v = extracted_like(keys, values, index)
    module = backends.load_kv(backends.resolved_kv(backend, keys[0].dtype, keys[0]), keys[0].dtype, keys[0])
    module.extraction(keys, values, index, positions, inv_freq, attention_scaling, out_k, out_v)()
    return out_k, out_v


@extract_kv_op.register_fake
def _(keys, values, index, positions, inv_freq, attention_scaling, backend):
    return extracted_like(keys, values, index)


def extracted_like(keys: list[Tensor], values: list[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the K/V of the selected tokens: two tensors [L, T, Hkv, D]."""
    shape = (len(keys), index.shape[0], *keys[0].shape[1:])
    return keys[0].new_empty(shape), values[0].new_empty(shape)


@torch.library.custom_op("voco::inject_kv", mutates_args=("k_caches", "v_caches"))
def inject_kv_op(
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    slots: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    attention_scaling: float,
    backend: str,
) -> None:
    """See `voco_kernels.inject_kv`; the caches are L tensors [slots, Hkv, D] or [blocks, block, Hkv, D]."""
    module = backends.load_kv(backends.resolved_kv(backend, k.dtype, k_caches[0]), k.dtype, k_caches[0])
    module.injection(k_caches, v_caches, slots, positions, inv_freq, attention_scaling)(k, v, k_scale, v_scale)


@inject_kv_op.register_fake
def _(k, v, k_scale, v_scale, k_caches, v_caches, slots, positions, inv_freq, attention_scaling, backend):
    return None
