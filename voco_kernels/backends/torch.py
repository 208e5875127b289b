"""Portable attention: the two ranges as a few SDPA calls, on any device, in O(N) memory.

Work is cut into blocks. A block is a set of equally long row runs that share one shape: `rows` queries which see a prefix of
`prefix` keys and then themselves, causally. Segments of equal length (the frames of a video) become one batched block; a
document's open rows become one block over its public subsequence. No block ever holds a mask of more than `ROW_CHUNK` rows.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from ..layout import VocoLayout
from ..plan import PlanCache, build_plan

# Rows per masked SDPA call. 256 was the fastest of 128, 256 and 512 on a CPU (prefixes of 32 to 2,048 keys).
ROW_CHUNK = 256

# A CPU's SDPA leaves out keys behind the diagonal in steps of 512 only, so shorter runs are cut into chunks that see no more
# keys than they need: 64 rows were 10 to 25 % faster than one causal call or chunks of 128 or 256 (runs of 128 to 700 rows,
# one thread). From 768 rows SDPA takes larger tiles, and with a long prefix few keys are wasted: there fewer calls win.
CPU_ROW_CHUNK = 64
LONG_RUN = 768


@dataclass(frozen=True, eq=False)
class Block:
    """A batch of row runs of one shape.

    Attributes:
        batch, rows, prefix: `batch` runs of `rows` queries; each sees `prefix` keys, then its own run causally.
        own: where the runs lie: a slice of all tokens, or an int64 index [batch * rows].
        prefix_index (int64 [batch * prefix]): tokens of the prefix keys; None without a prefix.
        kept (int64): which of the batch * rows outputs are results; None for all of them.
        target: the rows of the output that they become; a slice or an int64 index.
    """

    batch: int
    rows: int
    prefix: int
    own: slice | torch.Tensor
    prefix_index: torch.Tensor | None
    kept: torch.Tensor | None
    target: slice | torch.Tensor


def unavailable_reason() -> str | None:
    """This backend runs everywhere torch does."""
    return None


def unsupported_reason(q: torch.Tensor, layout: VocoLayout) -> str | None:
    """Why these inputs cannot be served; None where they can."""
    return None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VocoLayout, scale: float, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by SDPA calls; differentiable by autograd. `lse` costs a second, chunked matmul."""
    blocks = _blocks_of(layout)
    if torch.is_grad_enabled():
        q, scale = _scaled_by_power_of_two(q, scale)
    queries, keys, values = _gather(blocks, q, k, v)
    pieces = []
    for block, bq, bk, bv in zip(blocks, queries, keys, values, strict=True):
        out = _block_attention(block, bq, bk, bv, scale).flatten(0, 1)
        pieces.append(out if block.kept is None else out[block.kept])
    # Padding rows are in no piece and stay zero.
    is_whole = sum(piece.shape[0] for piece in pieces) == q.shape[0]
    out = q.new_empty(q.shape) if is_whole else q.new_zeros(q.shape)
    if blocks:
        out = _Assemble.apply(out, [block.target for block in blocks], *pieces)
    else:
        # No row sees anything: zeros that still have gradients, so that a batch of padding can be trained on.
        out = out + sum(x[:0].sum() for x in (q, k, v))
    if not return_lse:
        return out, None
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full(q.shape[:2], float("-inf"), dtype=wide, device=q.device)
    with torch.no_grad():
        for block, bq, bk in zip(blocks, queries, keys, strict=True):
            value = _block_lse(block, bq, bk, scale, wide).transpose(1, 2).flatten(0, 1)
            lse[block.target] = value if block.kept is None else value[block.kept]
    return out, lse


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
    """(dq, dk, dv) with recomputed weights, a chunk of rows at a time, in float32 (float64 for float64).

    `out` and `lse` are not read. Only a compiled graph needs it: the registered operator runs below autograd, where SDPA
    records nothing.
    """
    blocks = _blocks_of(layout)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    totals = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v)]
    for block, bq, bk, bv in zip(blocks, *_gather(blocks, q, k, v), strict=True):
        grad = grad_out.new_zeros(block.batch * block.rows, *grad_out.shape[1:])
        grad[slice(None) if block.kept is None else block.kept] = grad_out[block.target]
        bk, bv = (x.repeat_interleave(groups, dim=1).to(wide) for x in (bk, bv))
        grads = _block_backward(block, _batched(grad, block.batch).to(wide), bq.to(wide), bk, bv, scale)
        for total, x in zip(totals, grads, strict=True):
            x = x.unflatten(1, (total.shape[1], -1)).sum(2).transpose(1, 2)  # [batch, (prefix +) rows, H, D]
            prefix = x.shape[1] - block.rows
            if prefix:
                total.index_add_(0, block.prefix_index, x[:, :prefix].flatten(0, 1))
            _add_rows(total, block.own, x[:, prefix:].flatten(0, 1))
    return tuple(total.to(x.dtype) for total, x in zip(totals, (q, k, v), strict=True))


def _block_backward(block: Block, grad, q, k, v, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for begin, end, visible in _row_chunks(block, q.device):
        rows, keys = slice(begin, end), slice(0, block.prefix + end)
        scores = q[:, :, rows] @ k[:, :, keys].transpose(2, 3) * scale
        weights = scores.masked_fill_(~visible, float("-inf")).softmax(-1)
        grad_weights = grad[:, :, rows] @ v[:, :, keys].transpose(2, 3)
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
        dq[:, :, rows] = grad_scores @ k[:, :, keys]
        dk[:, :, keys] += grad_scores.transpose(2, 3) @ q[:, :, rows]
        dv[:, :, keys] += weights.transpose(2, 3) @ grad[:, :, rows]
    return dq, dk, dv


def _scaled_by_power_of_two(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """q and scale for SDPA. Its fused float32 backward on a CPU is four times less accurate where the scale is not a power
    of two (measured at head_dim 32), so there the rest of the scale goes to the queries."""
    mantissa, exponent = math.frexp(scale)
    if q.dtype != torch.float32 or q.device.type != "cpu" or mantissa == 0.5:
        return q, scale
    return q * mantissa, math.ldexp(1.0, exponent)


def _gather(blocks: list[Block], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    """Per block its queries [batch, Hq, rows, D], keys and values [batch, Hkv, prefix + rows, D]."""
    own = [block.own for block in blocks]
    prefixes = [block.prefix_index for block in blocks if block.prefix]
    queries = [_batched(x, block.batch) for x, block in zip(_Take.apply(q, own), blocks, strict=True)]
    taken = (_Take.apply(x, own + prefixes) for x in (k, v))
    keys, values = (_join(blocks, x[: len(blocks)], x[len(blocks) :]) for x in taken)
    return queries, keys, values


def _batched(x: torch.Tensor, batch: int) -> torch.Tensor:
    """[batch * rows, H, D] -> [batch, H, rows, D]"""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _join(blocks: list[Block], own: tuple[torch.Tensor, ...], prefixes: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Per block the keys [batch, H, prefix + rows, D]: its prefix, then its own run."""
    prefixes = iter(prefixes)
    joined = []
    for block, x in zip(blocks, own, strict=True):
        x = _batched(x, block.batch)
        joined.append(torch.cat([_batched(next(prefixes), block.batch), x], dim=2) if block.prefix else x)
    return joined


def _block_attention(block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[batch, rows, Hq, D]"""
    shared = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if block.rows >= LONG_RUN and 0 < block.prefix <= block.rows:
        # Rows of zeros in front make it one causal square: the backward would keep all masks, O(N * N) bytes.
        square = pad(q, (0, 0, block.prefix, 0))
        out = scaled_dot_product_attention(square, k, v, is_causal=True, **shared)
        return out[:, :, block.prefix :].transpose(1, 2)
    chunk = _rows_per_call(block, q.device)
    if block.prefix == 0 and block.rows <= chunk:
        return scaled_dot_product_attention(q, k, v, is_causal=True, **shared).transpose(1, 2)
    ends = [min(begin + chunk, block.rows) for begin in range(0, block.rows, chunk)]
    seen = [(slice(None), slice(None), slice(block.prefix + end)) for end in ends]
    chunks = _row_chunks(block, q.device, chunk)
    parts = zip(chunks, q.split(chunk, dim=2), _Take.apply(k, seen), _Take.apply(v, seen), strict=True)
    outs = []
    for (begin, _, visible), rows, keys, values in parts:
        square = block.prefix + begin == 0
        mask = {"is_causal": True} if square else {"attn_mask": visible}
        outs.append(scaled_dot_product_attention(rows, keys, values, **mask, **shared).transpose(1, 2))
    return torch.cat(outs, dim=1)


def _rows_per_call(block: Block, device: torch.device) -> int:
    if device.type == "cpu" and block.rows < LONG_RUN and block.prefix < block.rows:
        return CPU_ROW_CHUNK
    # Without a prefix one causal call serves all rows, without a mask.
    return ROW_CHUNK if block.prefix else block.rows


def _block_lse(block: Block, q: torch.Tensor, k: torch.Tensor, scale: float, wide: torch.dtype) -> torch.Tensor:
    k = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    parts = []
    for begin, end, visible in _row_chunks(block, q.device):
        scores = q[:, :, begin:end].to(wide) @ k[:, :, : block.prefix + end].transpose(2, 3) * scale
        parts.append(scores.masked_fill_(~visible, float("-inf")).logsumexp(-1))
    return torch.cat(parts, dim=2)


def _row_chunks(block: Block, device: torch.device, chunk: int | None = None):
    """(begin, end, bool [end - begin, prefix + end]) of chunks of rows and the keys that each of them sees."""
    chunk = chunk or ROW_CHUNK
    for begin in range(0, block.rows, chunk):
        end = min(begin + chunk, block.rows)
        visible = torch.ones(end - begin, block.prefix + end, dtype=torch.bool, device=device)
        yield begin, end, visible.tril_(block.prefix + begin)


class _Take(torch.autograd.Function):
    """x[rows] for each of many row sets, with one gradient buffer for all of them (indexing would make one per set).

    The buffer is float32 for half precision: a key that hundreds of segments see would be rounded at every one of them.
    """

    @staticmethod
    def forward(ctx, x, targets):
        ctx.shape, ctx.dtype, ctx.targets = x.shape, x.dtype, targets
        ctx.set_materialize_grads(False)
        return tuple(x[target] for target in targets)

    @staticmethod
    def backward(ctx, *grads):
        wide = torch.promote_types(ctx.dtype, torch.float32)
        total = next(g for g in grads if g is not None).new_zeros(ctx.shape, dtype=wide)
        for target, grad in zip(ctx.targets, grads, strict=True):
            if grad is not None:
                _add_rows(total, target, grad.to(wide))
        return total.to(ctx.dtype), None


class _Assemble(torch.autograd.Function):
    """Write pieces into disjoint rows of `out`; one copy forward, one read backward, whatever the number of pieces."""

    @staticmethod
    def forward(ctx, out, targets, *pieces):
        ctx.targets = targets
        for target, piece in zip(targets, pieces, strict=True):
            out[target] = piece
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return None, None, *(grad[target] for target in ctx.targets)


def _add_rows(total: torch.Tensor, rows: slice | tuple[slice, ...] | torch.Tensor, x: torch.Tensor) -> None:
    if isinstance(rows, torch.Tensor):
        total.index_add_(0, rows, x)
    else:
        total[rows] += x


def _build_blocks(layout: VocoLayout) -> list[Block]:
    plan = build_plan(layout)
    device = layout.device
    public = plan.public_index.cpu().numpy()
    # (rows, prefix) -> runs of that shape: (tokens of the run, tokens of its prefix, which rows are results)
    shapes: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]] = {}
    segments = zip(plan.segment_start, plan.segment_length, plan.prefix_begin, plan.prefix_limit, strict=True)
    for start, length, begin, limit in segments:
        run = (np.arange(start, start + length), public[begin:limit], None)
        shapes.setdefault((int(length), int(limit - begin)), []).append(run)
    for begin, limit in zip(plan.document_begin, plan.document_limit, strict=True):
        is_open = plan.public_is_open[begin:limit]
        if is_open.any():
            # Public keys before the first open row are a plain prefix. VoCo tokens behind it ride along as rows, so that
            # the rows stay one causal run; their results come from their own segments.
            first = int(is_open.argmax())
            run = (public[begin + first : limit], public[begin : begin + first], is_open[first:])
            shapes.setdefault((len(run[0]), first), []).append(run)
    return [_make_block(rows, prefix, runs, device) for (rows, prefix), runs in shapes.items()]


def _make_block(rows: int, prefix: int, runs: list, device: torch.device) -> Block:
    own = np.concatenate([run[0] for run in runs])
    kept = np.concatenate([np.ones(rows, bool) if run[2] is None else run[2] for run in runs])
    prefix_index = np.concatenate([run[1] for run in runs])
    return Block(
        batch=len(runs),
        rows=rows,
        prefix=prefix,
        own=_as_index(own, device),
        prefix_index=torch.from_numpy(prefix_index).to(device) if prefix else None,
        kept=None if kept.all() else torch.from_numpy(np.flatnonzero(kept)).to(device),
        target=_as_index(own[kept], device),
    )


def _as_index(tokens: np.ndarray, device: torch.device) -> slice | torch.Tensor:
    """A slice where the tokens are consecutive (no copy), else an index tensor."""
    if tokens[-1] - tokens[0] + 1 == len(tokens) and (np.diff(tokens) == 1).all():
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    return torch.from_numpy(tokens).to(device)


_blocks_of = PlanCache(_build_blocks)
