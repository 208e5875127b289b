"""Attention in CUDA, forward and backward, for 16-bit numbers: csrc/include/voco/attention.h on tensors.

One kernel family serves all GPUs from compute capability 8.0 on; Hopper has kernels of its own, with larger tiles. Design
and limits are in DESIGN.md.
"""

from functools import cache, partial

import torch

from ... import tiled
from ...layout import VocoLayout
from ...tiles import Geometry, TilePlan, tile_plan
from . import kernels_unavailable_reason, load, multiprocessors, pairs, unserved_reason

# As csrc/include/voco/dtype.h numbers them.
DTYPES = {torch.float16: 0, torch.bfloat16: 1}
HEAD_DIMS = (64, 96, 128, 256)
GEOMETRY = Geometry(rows=64, small_rows=16, keys=64)
# No small tiles: the least that Hopper's products take are 64 rows.
HOPPER_GEOMETRY = Geometry(rows=128, small_rows=0, keys=128)
HOPPER_HEAD_DIMS = (64, 128)
NOTHING = (0, 0, 0)

unavailable_reason = kernels_unavailable_reason


def unsupported_reason(q: torch.Tensor, layout: VocoLayout | None = None) -> str | None:
    """Why these inputs cannot be served; None where they can. Every layout can."""
    if q.dtype not in DTYPES:
        return f"it takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[2] not in HEAD_DIMS:
        return f"it takes head_dim {', '.join(map(str, HEAD_DIMS))}, not {q.shape[2]}"
    return unserved_reason(q.device, q.shape[2], load().attention_shared(q.shape[2]))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VocoLayout, scale: float, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) in one launch; differentiable by autograd. Tensors whose rows are not contiguous or aligned are copied."""
    plan = plan_of(layout, q)
    kernels = tiled.Kernels(partial(forward, plan=plan, scale=scale), partial(backward, plan=plan, scale=scale))
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
    """(dq, dk, dv) in two launches, on Hopper three."""
    return backward(grad_out, q, k, v, out, lse, plan_of(layout, q), scale)


def plan_of(layout: VocoLayout, q: torch.Tensor) -> TilePlan:
    """The tiles of a layout for such queries: those of Hopper's kernels on GPUs that have them."""
    # Called up to where layouts are prepared; only there it is known what builds plans on a GPU.
    from ...planning import prepared_tiles

    return tile_plan(layout, HOPPER_GEOMETRY if _has_wgmma(q) else GEOMETRY, prepared_tiles)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: TilePlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [N, Hq, D] contiguous, lse [N, Hq] float32, head by head)."""
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = _per_row(q)
    _launch("forward", plan, scale, {"q": q, "k": k, "v": v, "out": out}, lse)
    return out, lse


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: TilePlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous, from what the forward took and returned."""
    q, k, v, out, grad = _aligned(q), _aligned(k), _aligned(v), _aligned(out), _aligned(grad_out)
    lse = lse.t().contiguous().t()  # itself, as the forward returns it
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = _per_row(q)
    rows = {"q": q, "k": k, "v": v, "out": out, "grad_out": grad, "dq": dq, "dk": dk, "dv": dv}
    _launch("dq", plan, scale, rows, lse, delta)
    _launch("dkv", plan, scale, rows, lse, delta)
    return dq, dk, dv


def computed_pairs(layout: VocoLayout, head_dim: int, which: str) -> int:
    """(query, key) pairs that kernel `which` computes for a layout."""
    layout = layout.to("cpu")
    plan = tile_plan(layout, GEOMETRY)
    if which == "dkv":
        return pairs.of_key_tiles(plan)
    return pairs.of_row_tiles(layout, plan, 32 if which == "forward" and head_dim <= 128 else 16)


def _launch(kernel: str, plan: TilePlan, scale: float, rows: dict, lse: torch.Tensor, delta: torch.Tensor | None = None):
    """Hopper's own kernels for a plan of their geometry."""
    q, k = rows["q"], rows["k"]
    tokens, heads, head_dim = q.shape
    if not tokens:
        return
    tiles, per_tile = (plan.key_tiles, k.shape[1]) if kernel == "dkv" else (plan.row_tiles, heads)
    lists = (tiles, plan.row_index, plan.key_index, plan.reader_index, plan.late_index, plan.after)
    names = ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv")
    device = q.device.index if q.is_cuda else -1
    # A block for each pair of a tile and a head; Hopper's blocks stay, one on each multiprocessor.
    on_hopper, pairs_of_all = plan.geometry == HOPPER_GEOMETRY, plan.likely(tiles) * per_tile
    load().attention(
        kernel=f"hopper {kernel}" if on_hopper else kernel,
        device=device,
        stream=0 if device < 0 else torch._C._cuda_getCurrentRawStream(device),
        dtype=DTYPES[q.dtype],
        head_dim=head_dim,
        blocks=min(pairs_of_all, multiprocessors(q.device)) if on_hopper else pairs_of_all,
        rows=[_address(rows[name]) if name in rows else NOTHING for name in names],
        lse=lse.data_ptr(),
        delta=0 if delta is None else delta.data_ptr(),
        plan=[x.data_ptr() for x in lists],
        num_tiles=tiles.shape[0],
        num_tokens=tokens,
        heads=heads,
        group=heads // k.shape[1],
        scale=scale,
    )


def _has_wgmma(q: torch.Tensor) -> bool:
    """Whether Hopper's own kernels serve such queries."""
    return q.is_cuda and q.shape[2] in HOPPER_HEAD_DIMS and _is_hopper(q.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0) and "sm_90a" in load().compiled_archs()


def _per_row(q: torch.Tensor) -> torch.Tensor:
    """Room for a float32 [N, Hq] whose heads lie one behind the other, as kernels read and write it."""
    tokens, heads = q.shape[:2]
    return torch.empty_strided((tokens, heads), (1, tokens), dtype=torch.float32, device=q.device)


def _address(x: torch.Tensor) -> tuple[int, int, int]:
    """Address, and the strides of tokens and of heads in elements."""
    return x.data_ptr(), x.stride(0), x.stride(1)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x` [N, H, D], or a copy where its rows are not contiguous or do not start at multiples of 16 bytes."""
    strides = (x.stride(i) for i in (0, 1) if x.shape[i] > 1)
    # Expanded tensors are copied, too: TMA does not take a stride of 0.
    fits = x.stride(2) == 1 and x.data_ptr() % 16 == 0 and not any(stride % 8 or not stride for stride in strides)
    return x if fits else x.clone(memory_format=torch.contiguous_format)
