"""The varlen split over every implementation of varlen attention that is installed."""

import math
from collections.abc import Callable
from functools import cache

import torch
from voco_llama.bench.results import version_of

from bench.attention_jit_peers import absent_fa4
from voco_kernels import VocoLayout
from voco_kernels.backends import flash
from voco_kernels.backends.flash import Implementation
from voco_kernels.layout import document_of


def varlen_implementations(device: torch.device) -> dict[str, Implementation | str]:
    """Every implementation by a short name, or why it is not here."""
    loaders = {"torch": flash.load_torch, "flash-attn": flash.load_flash_attn, "FA3": load_fa3, "FA4": load_fa4}
    if device.type != "cuda":
        return dict.fromkeys(loaders, "varlen attention needs an NVIDIA GPU")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return dict.fromkeys(loaders, f"FlashAttention needs compute capability 8.0, not {capability[0]}.{capability[1]}")
    return {name: absent_fa4(device) or load() if name == "FA4" else load() for name, load in loaders.items()}


def load_fa3() -> Implementation | str:
    """FlashAttention 3, as flash-attention's folder `hopper` installs it: always aligned to the bottom right."""
    try:
        from flash_attn_interface import flash_attn_varlen_func
    except ImportError as error:
        return f"FlashAttention 3 cannot be imported ({error})"

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale):
        found = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True)
        # Older versions return the lse, too.
        return found[0] if isinstance(found, tuple) else found, None

    return Implementation("flash_attn_interface", varlen)


def load_fa4() -> Implementation:
    """FlashAttention 4, whose function returns a pair. 4.0.0b36 was compiled for 9.0 without a GPU; it never ran."""

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale):
        from flash_attn.cute import flash_attn_varlen_func

        lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        return flash_attn_varlen_func(q, k, v, **lengths, softmax_scale=scale, causal=True)[0], None

    return Implementation(f"flash-attn-4 {version_of('flash-attn-4')}", varlen)


def split(layout: VocoLayout, found: Implementation) -> Callable[..., torch.Tensor]:
    """attention(q, k, v): the library's split over an implementation, or one with copies for layouts that it refuses."""

    def without_copies(q, k, v):
        return flash.attention_over(found, q, k, v, layout, 1 / math.sqrt(q.shape[-1]))

    # Its lists are made at the first call.
    choose = cache(lambda: without_copies if flash._split_of(layout).refusal is None else split_with_copies(layout, found))
    return lambda q, k, v: choose()(q, k, v)


def split_with_copies(layout: VocoLayout, found: Implementation) -> Callable[..., torch.Tensor]:
    """The varlen split where segments see public keys before them, or where VoCo tokens stand between text.

    Call A gives every segment a copy of the public keys that it sees before it, in front of its own. Call B is causal over
    all public tokens of a document, also its VoCo tokens, whose rows it computes in vain: only so is it one call.
    """
    device = layout.device
    segment, public, ends = (x.cpu() for x in (layout.segment_ids, layout.public, layout.cu_seqlens.long()))
    document = document_of(ends, len(segment))
    keys, lengths = [], []
    for number in segment[segment > 0].unique().tolist():
        own = (segment == number).nonzero().flatten()
        begin = own[0] if layout.isolated else ends[document[own[0]]]
        before = begin + public[begin : own[0]].nonzero().flatten()
        keys.append(torch.cat([before, own]))
        lengths.append(len(own))
    rows_a, keys_a = (segment > 0).nonzero().flatten(), torch.cat(keys)
    rows_b = public.nonzero().flatten()
    call_a = _ends([torch.tensor(lengths), torch.tensor([len(k) for k in keys])], device)
    per_document = torch.bincount(document[rows_b], minlength=len(ends) - 1)
    call_b = _ends([per_document[per_document > 0]] * 2, device)
    text = (segment[rows_b] == 0).nonzero().flatten().to(device)
    rows_a, keys_a, rows_b = (x.to(device) for x in (rows_a, keys_a, rows_b))

    def attention(q, k, v):
        scale = 1 / math.sqrt(q.shape[-1])
        out_a, _ = found.varlen(q[rows_a], k[keys_a], v[keys_a], *call_a, scale)
        out_b, _ = found.varlen(q[rows_b], k[rows_b], v[rows_b], *call_b, scale)
        out = torch.zeros_like(q).index_copy(0, rows_a, out_a)
        return out.index_copy(0, rows_b[text], out_b[text])

    return attention


def _ends(lengths: list[torch.Tensor], device: torch.device):
    """(cu_q, cu_k, max_q, max_k) of sequences with these lengths."""
    cu = (torch.cat([x.new_zeros(1), x.cumsum(0)]).int().to(device) for x in lengths)
    return *cu, *(int(x.max()) for x in lengths)
