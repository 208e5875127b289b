"""What backends with kernels over tiles share: autograd around a forward and a backward that take a plan of tiles."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .tiles import TilePlan


class Kernels(NamedTuple):
    """A backend's two functions.

    Attributes:
        forward: (q, k, v, plan, scale) -> (out, lse).
        backward: (grad_out, q, k, v, out, lse, plan, scale) -> (dq, dk, dv).
    """

    forward: Callable
    backward: Callable


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: TilePlan, scale: float, kernels: Kernels
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [N, Hq, D], lse [N, Hq] float32), differentiable by q, k and v."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _Attention.apply(q, k, v, plan, scale, kernels)
    return kernels.forward(q, k, v, plan, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, kernels):
        out, lse = kernels.forward(q, k, v, plan, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.kernels = plan, scale, kernels
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        return *ctx.kernels.backward(grad_out, *ctx.saved_tensors, ctx.plan, ctx.scale), None, None, None
