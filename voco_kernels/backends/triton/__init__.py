"""Triton kernels for VoCo attention on NVIDIA GPUs of compute capability 8.0 and later.

`forward.py` and `backward.py` hold the kernels, `launch.py` how they are launched; the plan of tiles is
`voco_kernels.tiles`. Triton is imported when a kernel is first launched.
"""

from functools import cache, partial
from importlib.util import find_spec

import torch

from ... import tiled
from ...layout import VocoLayout
from ...tiles import Geometry, TilePlan, executed_pairs, tile_plan
from .launch import MAX_HEAD_DIM, MIN_HEAD_DIM, geometry_of, launch_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(MIN_HEAD_DIM, MAX_HEAD_DIM + 1)
LEAST_ARCH = 80
# GPUs with 99 KiB of shared memory for a program; the kernels need up to 131 at head_dim 256.
SMALL_SHARED = (86, 89, 120, 121)


def unavailable_reason() -> str | None:
    """Why Triton kernels cannot run on this machine; None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not interpreted():
        return "there is no CUDA device"
    return None


def unsupported_reason(q: torch.Tensor, layout: VocoLayout | None = None) -> str | None:
    """Why these inputs cannot be served; None where they can. Every layout can."""
    if q.dtype not in DTYPES:
        return f"it takes float16, bfloat16 and float32, not {str(q.dtype).removeprefix('torch.')}"
    if not MIN_HEAD_DIM <= q.shape[2] <= MAX_HEAD_DIM:
        return f"it takes head_dim {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, not {q.shape[2]}"
    if interpreted():
        return None
    if q.device.type != "cuda" or torch.version.cuda is None:
        return f"it needs tensors on an NVIDIA GPU, not on {q.device}"
    arch = arch_of(q.device)
    if arch < LEAST_ARCH:
        return f"it needs compute capability 8.0, not {arch / 10}"
    if q.shape[2] > 128 and arch in SMALL_SHARED:
        return f"head_dim {q.shape[2]} needs more shared memory than compute capability {arch / 10} has"
    return None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VocoLayout, scale: float, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) in one launch; differentiable by autograd. Tensors that are not laid out as the kernels need are copied."""
    plan = _plan(layout, q)
    kernels = tiled.Kernels(partial(_forward, plan=plan, scale=scale), partial(_backward, plan=plan, scale=scale))
    out, lse = tiled.attention(q, k, v, kernels)
    return out, lse if return_lse else None


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
    """(dq, dk, dv) in two launches."""
    return _backward(grad_out, q, k, v, out, lse, _plan(layout, q), scale)


def computed_pairs(layout: VocoLayout, head_dim: int, which: str) -> int:
    """(query, key) pairs that kernel `which` computes for a layout (bfloat16 on sm_90)."""
    launch, geometry = launch_of(which, 90, head_dim, torch.bfloat16), geometry_of(head_dim, torch.bfloat16)
    return executed_pairs(plan_of(layout, geometry), which, launch.step, launch.edge_step)


def _forward(q, k, v, plan: TilePlan, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    from .forward import forward

    return forward(q, k, v, plan, scale, arch_of(q.device))


def _backward(grad_out, q, k, v, out, lse, plan: TilePlan, scale: float) -> tuple[torch.Tensor, ...]:
    from .backward import backward

    return backward(grad_out, q, k, v, out, lse, plan, scale, arch_of(q.device))


def plan_of(layout: VocoLayout, geometry: Geometry) -> TilePlan:
    """The tiles of a layout; on a GPU they are made by four kernels where there are none yet."""
    build = None
    if layout.device.type == "cuda":
        from .plan import build_tiles_on_gpu as build
    return tile_plan(layout, geometry, build)


def _plan(layout: VocoLayout, q: torch.Tensor) -> TilePlan:
    return plan_of(layout, geometry_of(q.shape[2], q.dtype))


@cache
def interpreted() -> bool:
    """Whether Triton was told to run kernels on the CPU (TRITON_INTERPRET=1)."""
    if find_spec("triton") is None:
        return False
    from os import environ

    return environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


@cache
def arch_of(device: torch.device) -> int:
    """Compute capability times ten; the interpreter runs as the least one."""
    if device.type != "cuda":
        return LEAST_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
