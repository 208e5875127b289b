"""Backward: dQ walks the two ranges of each row tile, dK/dV the rows that see each key tile.

Scores are computed again from q, k and the lse of the forward. Every gradient element is written by exactly one program, in
a fixed order of additions: no atomics, the same bits in every run.

The lse is a float32: weights are off by up to |lse| * 1e-7, which float32 gradients show where scores exceed about 15.
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
    tile_tokens,
)

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def _attend_backward(
    dq, row_data, source, begin, end, scale,
    K: tl.constexpr, META: tl.constexpr, GATHER: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add what the keys `begin` to `end` give to dq [R, BLOCK_D] (float32, without the scale).

    row_data = (q tile, grad tile, rows [R], lse [R] in base 2, delta [R]). Masks as in the forward.
    """
    q_tile, grad_tile, rows, lse, delta = row_data
    PRECISION: tl.constexpr = META[3]
    for start in tl.range(begin, end, K):
        keys, present, k_tile, v_tile = load_pair(source, start, end, K, META, GATHER, EDGE)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        weights = tl.exp2(scores * (scale * LOG2E) - lse[:, None])
        if EDGE:
            weights = tl.where(present[None, :] & (keys[None, :] <= rows[:, None]), weights, 0.0)
        grad_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        dq = tl.dot(grad_scores.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _row_tile(
    pointers, strides, lists, tile_ptr, scale,
    R: tl.constexpr, K: tl.constexpr, EDGE_K: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """dq and delta of one row tile of one head; `pointers` are those of the head."""
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr = pointers
    stride_q, stride_k, stride_v, stride_out, stride_grad, stride_dq = strides
    row_index_ptr, key_index_ptr = lists
    begin, count, public, own = load_row_tile(tile_ptr)
    source = (k_ptr, v_ptr, renewed(stride_k, begin), renewed(stride_v, begin), key_index_ptr)

    rows = row_tile_tokens(row_index_ptr, begin, count, own, R)
    q_tile = load_tokens(q_ptr, rows, renewed(stride_q, begin), META)
    grad_tile = load_tokens(grad_ptr, rows, renewed(stride_grad, begin), META)
    out_tile = load_tokens(out_ptr, rows, renewed(stride_out, begin), META)
    delta = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    tl.store(delta_ptr + rows, delta, mask=tl.arange(0, R) < count)
    row_data = (q_tile, grad_tile, rows, tl.load(lse_ptr + rows) * LOG2E, delta)
    dq = tl.zeros([R, META[2]], tl.float32)

    edge = public[0] + (public[1] - public[0]) // K * K
    dq = _attend_backward(dq, row_data, source, public[0], edge, scale, K, META, True, False)
    dq = _attend_backward(dq, row_data, source, edge, public[2], scale, EDGE_K, META, True, True)
    edge = own[0] + (own[1] - own[0]) // K * K
    dq = _attend_backward(dq, row_data, source, own[0], edge, scale, K, META, False, False)
    dq = _attend_backward(dq, row_data, source, edge, own[2], scale, EDGE_K, META, False, True)
    store_tokens(dq_ptr, rows, renewed(stride_dq, begin), dq * scale, count, META)


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, tiles_ptr, row_index_ptr, key_index_ptr,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_out, stride_outh, stride_grad, stride_gradh,
    stride_dq, stride_dqh, num_tokens, num_tiles, heads, group, scale,
    ROWS: tl.constexpr, SMALL_ROWS: tl.constexpr, K: tl.constexpr, EDGE_K: tl.constexpr,
    INDEX: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dq and delta of every grid-th pair of a row tile and a head, as in `forward_kernel`.

    grad [N, heads, D] is the gradient of out; delta [heads, N] float32 = sum(out * grad) is written for `dkv_kernel`, which
    spares a pass over both.
    """
    META: tl.constexpr = (INDEX, HEAD_DIM, BLOCK_D, PRECISION)
    strides = (stride_q, stride_k, stride_v, stride_out, stride_grad, stride_dq)
    lists = (row_index_ptr, key_index_ptr)
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
            grad_ptr + head * stride_gradh,
            lse_ptr + head * num_tokens,
            delta_ptr + head * num_tokens,
            dq_ptr + head * stride_dqh,
        )
        if count <= SMALL_ROWS:
            _row_tile(pointers, strides, lists, tile_ptr, scale, SMALL_ROWS, K, EDGE_K, META)
        else:
            _row_tile(pointers, strides, lists, tile_ptr, scale, ROWS, K, EDGE_K, META)
        pair += tl.num_programs(0)
        count = tl.load(tiles_ptr + pair // heads * 8 + 1, mask=pair < num_tiles * heads, other=0)


@triton.jit
def _collect(
    state, key_data, pointers, strides, index_ptr, begin, end, group, num_tokens, scale,
    R: tl.constexpr, META: tl.constexpr, GATHER: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add what the rows `begin` to `end` give to state = (dk, dv), [keys, BLOCK_D] float32, dk without the scale.

    key_data = (k tile, v tile, low [keys], high [keys]). Rows are a range of `index_ptr` (GATHER) or of tokens; they come
    once for each of the `group` query heads, of which `pointers` are the first. At the EDGE a key is seen by the rows from
    `low` to before `high`, elsewhere by all. Scores are transposed, keys by rows: the larger side of the product is then the
    one that Hopper's matrix instruction wants to be 64.
    """
    dk, dv = state
    k_tile, v_tile, low, high = key_data
    q_ptr, grad_ptr, lse_ptr, delta_ptr = pointers
    stride_q, stride_qh, stride_grad, stride_gradh = strides
    PRECISION: tl.constexpr = META[3]
    # At least 1 as a divisor: the pipelined loop prepares its first steps even where it has none.
    steps = tl.cdiv(tl.maximum(end - begin, 0), R)
    divisor = tl.maximum(steps, 1)
    for step in tl.range(0, steps * group):
        member = (step // divisor).to(tl.int64)
        source = (q_ptr + member * stride_qh, grad_ptr + member * stride_gradh, stride_q, stride_grad, index_ptr)
        rows, present, q_tile, grad_tile = load_pair(source, begin + step % divisor * R, end, R, META, GATHER, True)
        # A row that is not there has weight exp(0 - inf) = 0.
        lse = tl.load(lse_ptr + member * num_tokens + rows, mask=present, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + member * num_tokens + rows, mask=present, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        weights = tl.exp2(scores * (scale * LOG2E) - lse[None, :])
        if EDGE:
            weights = tl.where((rows[None, :] >= low[:, None]) & (rows[None, :] < high[:, None]), weights, 0.0)
        dv = tl.dot(weights.to(grad_tile.dtype), grad_tile, dv, input_precision=PRECISION)
        grad_weights = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[None, :])
        dk = tl.dot(grad_scores.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _key_tile(
    pointers, outputs, strides, lists, tile_ptr, num_tokens, group, scale,
    KEYS: tl.constexpr, R: tl.constexpr, EDGE_R: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile of one key head; pointers are those of the head, or of its first query head."""
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr = pointers
    dk_ptr, dv_ptr = outputs
    stride_q, stride_qh, stride_k, stride_v, stride_grad, stride_gradh, stride_dk, stride_dv = strides
    key_index_ptr, reader_index_ptr, late_index_ptr, after_ptr = lists
    begin, count = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    own_begin, own_full, own_end = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3), tl.load(tile_ptr + 4)
    late_begin, late_end = tl.load(tile_ptr + 5), tl.load(tile_ptr + 6)
    reader_begin, reader_full, reader_end = tl.load(tile_ptr + 7), tl.load(tile_ptr + 8), tl.load(tile_ptr + 9)

    keys = tile_tokens(key_index_ptr, -1, begin, count, KEYS)
    after = tl.load(after_ptr + keys)
    never = tl.full([KEYS], NEVER, tl.int32)
    k_tile = load_tokens(k_ptr, keys, renewed(stride_k, begin), META)
    v_tile = load_tokens(v_ptr, keys, renewed(stride_v, begin), META)
    state = (tl.zeros([KEYS, META[2]], tl.float32), tl.zeros([KEYS, META[2]], tl.float32))
    rows = (q_ptr, grad_ptr, lse_ptr, delta_ptr)
    of_rows = (renewed(stride_q, begin), stride_qh, renewed(stride_grad, begin), stride_gradh)

    # Private keys have own rows only, public keys late rows and readers; the loops over others are empty.
    data = (k_tile, v_tile, keys, never)
    edge = tl.minimum(own_end, own_begin + tl.cdiv(own_full - own_begin, EDGE_R) * EDGE_R)
    state = _collect(
        state, data, rows, of_rows, key_index_ptr, own_begin, edge, group, num_tokens, scale, EDGE_R, META, False, True
    )
    state = _collect(
        state, data, rows, of_rows, key_index_ptr, edge, own_end, group, num_tokens, scale, R, META, False, False
    )
    data = (k_tile, v_tile, keys, after)
    state = _collect(
        state, data, rows, of_rows, late_index_ptr, late_begin, late_end, group, num_tokens, scale, EDGE_R, META, True, True
    )
    data = (k_tile, v_tile, after, never)
    edge = tl.minimum(reader_end, reader_begin + tl.cdiv(reader_full - reader_begin, EDGE_R) * EDGE_R)
    state = _collect(
        state, data, rows, of_rows, reader_index_ptr, reader_begin, edge, group, num_tokens, scale, EDGE_R, META, True, True
    )
    dk, dv = _collect(
        state, data, rows, of_rows, reader_index_ptr, edge, reader_end, group, num_tokens, scale, R, META, True, False
    )
    store_tokens(dk_ptr, keys, renewed(stride_dk, begin), dk * scale, count, META)
    store_tokens(dv_ptr, keys, renewed(stride_dv, begin), dv, count, META)


@triton.jit(do_not_specialize=SIZES)
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr,
    key_index_ptr, reader_index_ptr, late_index_ptr, after_ptr,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_grad, stride_gradh,
    stride_dk, stride_dkh, stride_dv, stride_dvh, num_tokens, num_tiles, kv_heads, group, scale,
    KEYS: tl.constexpr, R: tl.constexpr, EDGE_R: tl.constexpr,
    INDEX: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of every grid-th pair of a key tile and a key head, heavy tiles first.

    dk and dv [N, kv_heads, D]; lse and delta [kv_heads * group, N]; tiles as in `voco_kernels.tiles.KEY_TILE`.
    """
    META: tl.constexpr = (INDEX, HEAD_DIM, BLOCK_D, PRECISION)
    strides = (stride_q, stride_qh, stride_k, stride_v, stride_grad, stride_gradh, stride_dk, stride_dv)
    lists = (key_index_ptr, reader_index_ptr, late_index_ptr, after_ptr)
    pair = tl.program_id(0)
    count = tl.load(tiles_ptr + pair // kv_heads * 10 + 1)
    while count > 0:
        head = (pair % kv_heads).to(tl.int64)
        first = head * group
        pointers = (
            q_ptr + first * stride_qh,
            k_ptr + head * stride_kh,
            v_ptr + head * stride_vh,
            grad_ptr + first * stride_gradh,
            lse_ptr + first * num_tokens,
            delta_ptr + first * num_tokens,
        )
        outputs = (dk_ptr + head * stride_dkh, dv_ptr + head * stride_dvh)
        tile_ptr = tiles_ptr + pair // kv_heads * 10
        _key_tile(pointers, outputs, strides, lists, tile_ptr, num_tokens, group, scale, KEYS, R, EDGE_R, META)
        pair += tl.num_programs(0)
        count = tl.load(tiles_ptr + pair // kv_heads * 10 + 1, mask=pair < num_tiles * kv_heads, other=0)


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: TilePlan,
    scale: float,
    arch: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous, from what the forward took and returned."""
    head_dim = q.shape[2]
    q, k, v, out, grad = prepared(q), prepared(k), prepared(v), prepared(out), prepared(grad_out)
    lse = lse.t().contiguous().t()  # itself, as the forward returns it
    n, heads, padded = q.shape
    kv_heads = k.shape[1]
    delta = torch.empty_strided(lse.shape, lse.stride(), dtype=lse.dtype, device=lse.device)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    shared = {
        "INDEX": tl.int64 if needs_int64(q, k, v, out, grad, dq, dk, dv) else tl.int32,
        "HEAD_DIM": padded,
        "BLOCK_D": padded_head_dim(padded),
        "PRECISION": precision(q.dtype),
        "enable_fp_fusion": True,
    }
    if n:
        with on_device(q):
            launch = launch_of("dq", arch, padded, q.dtype)
            dq_kernel[(num_programs(plan.row_tiles, plan, heads),)](
                q, k, v, out, grad, lse, delta, dq, plan.row_tiles, plan.row_index, plan.key_index,
                *strides_of(q), *strides_of(k), *strides_of(v), *strides_of(out), *strides_of(grad), *strides_of(dq),
                n, plan.row_tiles.shape[0], heads, heads // kv_heads, scale,
                ROWS=plan.geometry.rows, SMALL_ROWS=plan.geometry.small_rows, K=launch.step, EDGE_K=launch.edge_step,
                num_warps=launch.warps, num_stages=launch.stages, **shared,
            )  # fmt: skip
            launch = launch_of("dkv", arch, padded, q.dtype)
            dkv_kernel[(num_programs(plan.key_tiles, plan, kv_heads),)](
                q, k, v, grad, lse, delta, dk, dv, plan.key_tiles,
                plan.key_index, plan.reader_index, plan.late_index, plan.after,
                *strides_of(q), *strides_of(k), *strides_of(v), *strides_of(grad), *strides_of(dk), *strides_of(dv),
                n, plan.key_tiles.shape[0], kv_heads, heads // kv_heads, scale,
                KEYS=plan.geometry.keys, R=launch.step, EDGE_R=launch.edge_step,
                num_warps=launch.warps, num_stages=launch.stages, **shared,
            )  # fmt: skip
    return tuple(unpadded(x, head_dim) for x in (dq, dk, dv))
