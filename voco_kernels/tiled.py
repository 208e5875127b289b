"""What backends with kernels over tiles share: autograd around a forward and a backward."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Kernels(NamedTuple):
    """A backend's two functions, which know the plan and the scale of a call.

    Attributes:
        forward: (q, k, v) -> (out, lse).
        backward: (grad_out, q, k, v, out, lse) -> (dq, dk, dv).
    """

    forward: Callable
    backward: Callable


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernels: Kernels) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [N, Hq, D], lse [N, Hq] float32), differentiable by q, k and v."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _Attention.apply(q, k, v, kernels)
    return kernels.forward(q, k, v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, kernels):
        out, lse = kernels.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernels = kernels
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        return *ctx.kernels.backward(grad_out, *ctx.saved_tensors), None
