"""`voco_attention`: checks, choice of backend, and nothing else."""

import math

import torch

from . import backends, ops
from .errors import reject, require_tensor
from .layout import VocoLayout, check_ids

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def voco_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: VocoLayout,
    scale: float | None = None,
    backend: str = "auto",
    *,
    return_lse: bool = False,
    check: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention under the VoCo mask of `layout` (VoCo-LLaMA, arXiv 2406.12275, section 3.2).

    Args:
        q ([N, Hq, D]): queries; float16, bfloat16, float32 (or float64 for tests). Any strides.
        k, v ([N, Hkv, D]): keys and values of the same dtype and device; Hq is a multiple of Hkv.
        layout: where documents, segments and public keys lie; on the same device, N tokens.
        scale: factor on the scores, above 0; 1/sqrt(D) where None.
        backend: "auto" (on a GPU "triton", or "cuda" where that was measured to be faster; else "torch"), "triton", "cuda"
            (16-bit dtypes, head_dim 64, 96, 128, 256), "torch", "flash" (the varlen split over FlashAttention: isolated
            layouts with trailing text), or "reference" (dense mask, for tests). A backend that cannot serve raises.
        return_lse: also return the log-sum-exp of the scaled scores.
        check: check the layout's values again, also on a device (synchronises).

    Returns:
        out ([N, Hq, D], dtype of q): zeros for padding rows.
        lse ([N, Hq], float32; float64 for float64), only with `return_lse`: natural log, -inf for padding rows, not
        differentiable.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; a backend that cannot serve.

    Example:
        >>> layout = VocoLayout.from_spans([[Image(vision=3, voco=1), Text(2)]], isolated=True)
        >>> q = k = v = torch.randn(6, 2, 32)
        >>> voco_attention(q, k, v, layout).shape
        torch.Size([6, 2, 32])
    """
    _check_inputs(q, k, v, layout, scale)
    if check:
        check_ids(layout.segment_ids, layout.public, layout.cu_seqlens)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if torch.compiler.is_compiling():
        out, lse = ops.attention(q, k, v, layout, scale, backend, return_lse)
    else:
        backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        module = backends.load_for(backends.resolved(backend, q, backward=backward), q, layout)
        out, lse = module.attention(q, k, v, layout, scale, return_lse)
    return (out, lse) if return_lse else out


def _check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VocoLayout, scale: float | None) -> None:
    if not isinstance(layout, VocoLayout):
        reject("layout", "a VocoLayout", type(layout).__name__)
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x, ndim=3)
        if x.dtype not in DTYPES:
            reject(name, "of dtype float16, bfloat16, float32 or float64", x.dtype)
        if x.dtype != q.dtype:
            reject(name, f"of the dtype of q ({q.dtype})", x.dtype)
        if x.device != q.device:
            reject(name, f"on the device of q ({q.device})", f"on {x.device}")
        if x.shape[0] != layout.num_tokens:
            reject(name, f"of {layout.num_tokens} tokens, as the layout is", f"of shape {list(x.shape)}")
    if layout.device != q.device:
        reject("layout", f"on the device of q ({q.device}); use layout.to(device)", f"on {layout.device}")
    if v.shape != k.shape:
        reject("v", f"of the shape of k ({list(k.shape)})", f"of shape {list(v.shape)}")
    if k.shape[2] != q.shape[2]:
        reject("k", f"of the head_dim of q ({q.shape[2]})", f"of shape {list(k.shape)}")
    if q.shape[2] < 1:
        reject("q", "of head_dim at least 1", f"of shape {list(q.shape)}")
    if q.shape[1] < 1:
        reject("q", "of at least one head", f"of shape {list(q.shape)}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        reject("q", f"of a number of heads that is a multiple of k's ({k.shape[1]})", f"of {q.shape[1]} heads")
    if scale is not None and not (isinstance(scale, int | float) and 0 < scale < math.inf):
        # SDPA masks before it scales, so that a factor of 0 or below turns hidden keys into NaN.
        reject("scale", "a finite number above 0", repr(scale))
