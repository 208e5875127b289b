"""The specification: attention under the layout's dense mask. For tests; O(N * N) memory."""

import torch

from ..layout import VocoLayout


def unavailable_reason() -> str | None:
    """This backend runs everywhere torch does."""
    return None


def unsupported_reason(q: torch.Tensor, layout: VocoLayout) -> str | None:
    """Why these inputs cannot be served; None where they can."""
    return None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VocoLayout, scale: float, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Matmuls in the dtype of the inputs, softmax in float32 (float64 for float64)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.transpose(0, 1) @ k.transpose(1, 2)).to(wide) * scale
    mask = layout.dense_mask()
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    # A row that sees nothing has lse = -inf; subtracting 0 there gives exp(-inf) = 0 and no NaN in the gradient.
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    out = (weights.to(q.dtype) @ v).transpose(0, 1)
    return out, lse.detach().transpose(0, 1).contiguous() if return_lse else None


def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: VocoLayout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) by autograd's formulas written out, for graphs in which a registered operator stands.

    `out` and `lse` are not read.
    """
    heads_kv = k.shape[1]
    groups = q.shape[1] // heads_kv
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    qh, gh = q.transpose(0, 1).to(wide), grad_out.transpose(0, 1).to(wide)
    kh, vh = (x.repeat_interleave(groups, dim=1).transpose(0, 1).to(wide) for x in (k, v))
    scores = (qh @ kh.transpose(1, 2) * scale).masked_fill(~layout.dense_mask(), float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    grad_weights = gh @ vh.transpose(1, 2)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
    dq = (grad_scores @ kh).transpose(0, 1)
    dk, dv = (
        x.unflatten(0, (heads_kv, groups)).sum(1).transpose(0, 1)
        for x in (grad_scores.transpose(1, 2) @ qh, weights.transpose(1, 2) @ gh)
    )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
