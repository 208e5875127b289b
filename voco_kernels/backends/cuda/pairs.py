"""How many (query, key) pairs the attention kernels compute, from a plan: what `VocoLayout.tile_efficiency` divides by.

A warp decides by its own rows or keys which steps it takes part in, so pairs are counted warp by warp.
"""

import torch

from ...layout import VocoLayout
from ...tiles import TilePlan

STEP, TENSOR_ROWS = 32, 16  # keys of a step over row tiles; rows of a tensor core's product, and of a step over key tiles


def of_row_tiles(layout: VocoLayout, plan: TilePlan, warp_rows: int) -> int:
    """Pairs of a kernel over row tiles whose warps have `warp_rows` rows each."""
    begin, count, public_begin, _, public_end, own_begin, _, own_end = plan.row_tiles.long().unbind(1)
    # Places in `key_index` of the public keys before each token; private keys stand in front of all.
    place = ((layout.segment_ids > 0) & ~layout.public).sum() + torch.cat([torch.zeros(1).long(), layout.public.cumsum(0)])
    pairs = 0
    for first in range(0, plan.geometry.rows, warp_rows):
        rows = (count - first).clamp(0, warp_rows)
        last = plan.row_index[(begin + count.clamp(max=first + warp_rows) - 1).clamp(0)].long()
        seen = place[last + 1].minimum(public_end) - public_begin
        steps = _rounded(seen.clamp(min=0), STEP) + torch.where(own_end > 0, _rounded(last + 1 - own_begin, STEP), 0)
        pairs += int((steps * _rounded(rows, TENSOR_ROWS)).sum())
    return pairs


def of_key_tiles(plan: TilePlan) -> int:
    """Pairs of the kernel over key tiles, whose warps have 16 keys each."""
    begin, count, own_begin, _, own_end, late_begin, late_end, reader_begin, _, reader_end = plan.key_tiles.long().unbind(1)
    keys, after, pairs = plan.key_index.long(), plan.after.long(), 0
    for first in range(0, plan.geometry.keys, TENSOR_ROWS):
        low = keys[(begin + first).clamp(max=len(keys) - 1)]
        high = keys[(begin + count.clamp(max=first + TENSOR_ROWS) - 1).clamp(0)]
        rows = _from(own_begin, own_end, low)
        rows = rows + _from(reader_begin, reader_end, _place(plan.reader_index, reader_begin, reader_end, after[low]))
        until = _place(plan.late_index, late_begin, late_end, after[high])
        rows = rows + _from(late_begin, until, _place(plan.late_index, late_begin, late_end, low))
        pairs += int((rows * TENSOR_ROWS)[first < count].sum())
    return pairs


def _from(begin: torch.Tensor, end: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Rows of the steps from `begin` to `end` that reach `first` or lie behind it."""
    skipped = (first.clamp(min=0).minimum(end) - begin).clamp(min=0) // TENSOR_ROWS * TENSOR_ROWS
    return (_rounded(end - begin, TENSOR_ROWS) - skipped).clamp(min=0)


def _place(index: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Of the range of `index` in each tile, which rises, the first place that holds `token` or a later one."""
    low, high = begin.clone(), torch.maximum(begin, end)
    while bool((low < high).any()):
        middle = (low + high) // 2
        before = (low < high) & (index[middle.clamp(max=len(index) - 1)] < token)
        low, high = torch.where(before, middle + 1, low), torch.where(before | (low >= high), high, middle)
    return low


def _rounded(x: torch.Tensor, step: int) -> torch.Tensor:
    return (x + step - 1) // step * step
