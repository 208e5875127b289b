"""Forward: softmax(q k^T) v over the two ranges of each row tile, with an online softmax (FlashAttention, arXiv 2205.14135).

Scores are taken in base 2: `scale_log2` is scale * log2(e), so that an exponential is one instruction.
"""

import torch
import triton
import triton.language as tl

from ...tiles import TilePlan
from .launch import (
    launch_of,
    needs_int64,
    num_programs,
    padded_head_dim,
    precision,
    prepared,
    strides_of,
    unpadded,
)
from .steps import (
    SIZES,
    load_pair,
    load_row_tile,
    load_tokens,
    on_device,
    renewed,
    row_tile_tokens,
    store_tokens,
)

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    state, q_tile, rows, source, begin, end, scale_log2,
    K: tl.constexpr, META: tl.constexpr, GATHER: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take the keys `begin` to `end` into the running softmax of a row tile.

    state = (acc [R, BLOCK_D], row_sum [R], row_max [R] of the scores in base 2), all float32. At the EDGE a row sees the
    keys that do not lie behind it, elsewhere every row sees every key.
    """
    acc, row_sum, row_max = state
    PRECISION: tl.constexpr = META[3]
    for start in tl.range(begin, end, K):
        keys, present, k_tile, v_tile = load_pair(source, start, end, K, META, GATHER, EDGE)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if EDGE:
            scores = tl.where(present[None, :] & (keys[None, :] <= rows[:, None]), scores, float("-inf"))
        # Scaled and rounded once, so that weights and lse are relative to the same number.
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        pivot = new_max
        if EDGE:
            # A row that has not seen a key yet has no maximum; -inf minus -inf would be NaN.
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores * scale_log2 - pivot[:, None])
        shrink = tl.exp2(row_max - pivot)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def _row_tile(
    pointers, strides, lists, tile_ptr, scale_log2,
    R: tl.constexpr, K: tl.constexpr, EDGE_K: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """out and lse of one row tile of one head; `pointers` are those of the head."""
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr = pointers
    stride_q, stride_k, stride_v, stride_out = strides
    row_index_ptr, key_index_ptr = lists
    begin, count, public, own = load_row_tile(tile_ptr)
    stride_q, stride_out = renewed(stride_q, begin), renewed(stride_out, begin)
    source = (k_ptr, v_ptr, renewed(stride_k, begin), renewed(stride_v, begin), key_index_ptr)

    rows = row_tile_tokens(row_index_ptr, begin, count, own, R)
    q_tile = load_tokens(q_ptr, rows, stride_q, META)
    acc = tl.zeros([R, META[2]], tl.float32)
    row_sum = tl.zeros([R], tl.float32)
    row_max = tl.full([R], float("-inf"), tl.float32)
    state = (acc, row_sum, row_max)

    edge = public[0] + (public[1] - public[0]) // K * K
    state = _attend(state, q_tile, rows, source, public[0], edge, scale_log2, K, META, True, False)
    state = _attend(state, q_tile, rows, source, edge, public[2], scale_log2, EDGE_K, META, True, True)
    edge = own[0] + (own[1] - own[0]) // K * K
    state = _attend(state, q_tile, rows, source, own[0], edge, scale_log2, K, META, False, False)
    acc, row_sum, row_max = _attend(state, q_tile, rows, source, edge, own[2], scale_log2, EDGE_K, META, False, True)

    # A row that sees nothing has a sum of 0: its output is 0 and its lse log(0) = -inf.
    sees = row_sum != 0.0
    row_sum = tl.where(sees, row_sum, 1.0)
    store_tokens(out_ptr, rows, stride_out, acc / row_sum[:, None], count, META)
    lse = tl.where(sees, (row_max + tl.log2(row_sum)) * LN2, float("-inf"))
    tl.store(lse_ptr + rows, lse, mask=tl.arange(0, R) < count)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, row_index_ptr, key_index_ptr,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_out, stride_outh,
    num_tokens, num_tiles, heads, group, scale_log2,
    ROWS: tl.constexpr, SMALL_ROWS: tl.constexpr, K: tl.constexpr, EDGE_K: tl.constexpr,
    INDEX: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: every grid-th pair of a row tile and a head, heavy tiles first; usually that is one pair.

    All heads of a tile run next to each other: they read the same rows of memory, and with GQA the same keys.
    q [N, heads, D], k and v [N, heads / group, D], out [N, heads, D], lse [heads, N] float32 (natural log); tiles as in
    `voco_kernels.tiles.ROW_TILE`. Accumulation in float32.
    """
    META: tl.constexpr = (INDEX, HEAD_DIM, BLOCK_D, PRECISION)
    strides, lists = (stride_q, stride_k, stride_v, stride_out), (row_index_ptr, key_index_ptr)
    pair = tl.program_id(0)
    count = tl.load(tiles_ptr + pair // heads * 8 + 1)
    while count > 0:
        head = (pair % heads).to(tl.int64)
        tile_ptr = tiles_ptr + pair // heads * 8
        pointers = (
            q_ptr + head * stride_qh,
            k_ptr + head // group * stride_kh,
            v_ptr + head // group * stride_vh,
            out_ptr + head * stride_outh,
            lse_ptr + head * num_tokens,
        )
        if count <= SMALL_ROWS:
            _row_tile(pointers, strides, lists, tile_ptr, scale_log2, SMALL_ROWS, K, EDGE_K, META)
        else:
            _row_tile(pointers, strides, lists, tile_ptr, scale_log2, ROWS, K, EDGE_K, META)
        pair += tl.num_programs(0)
        count = tl.load(tiles_ptr + pair // heads * 8 + 1, mask=pair < num_tiles * heads, other=0)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: TilePlan, scale: float, arch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [N, Hq, D] contiguous, lse [N, Hq] float32, head by head) on a GPU of compute capability `arch` / 10."""
    head_dim = q.shape[2]
    q, k, v = prepared(q), prepared(k), prepared(v)
    n, heads, padded = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Each head's numbers side by side, as the kernels write and read them; not a view, which autograd would guard.
    lse = torch.empty_strided((n, heads), (1, n), dtype=torch.float32, device=q.device)
    launch = launch_of("forward", arch, padded, q.dtype)
    if n:
        with on_device(q):
            forward_kernel[(num_programs(plan.row_tiles, plan, heads),)](
                q, k, v, out, lse, plan.row_tiles, plan.row_index, plan.key_index,
                *strides_of(q), *strides_of(k), *strides_of(v), *strides_of(out),
                n, plan.row_tiles.shape[0], heads, heads // k.shape[1], scale * LOG2E,
                ROWS=plan.geometry.rows, SMALL_ROWS=plan.geometry.small_rows, K=launch.step, EDGE_K=launch.edge_step,
                INDEX=tl.int64 if needs_int64(q, k, v, out) else tl.int32,
                HEAD_DIM=padded, BLOCK_D=padded_head_dim(padded), PRECISION=precision(q.dtype),
                num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True,
            )  # fmt: skip
    return unpadded(out, head_dim), lse
