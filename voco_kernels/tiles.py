"""The tiles that a kernel works through: which rows meet which keys, without a mask.

A *row tile* (forward and dQ) is a set of rows that share their two ranges: rows of one segment, or open rows of one
document. A *key tile* (dK/dV) is a set of private keys of one segment, or of public keys of one document; it is complete, so
that no two tiles ever add to the same gradient. Rows and keys that are not neighbours in memory are reached through index
lists, so tiles are full even where text stands in short runs between images, or where 256 frames have two VoCo tokens each.

Everything is computed with a few dozen tensor operations in O(N), on the device of the layout and without asking the device
for a number; arrays are as long as the layout could need at worst, and end in empty tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial

import torch

from .layout import VocoLayout, document_of
from .plan import PlanCache


@dataclass(frozen=True)
class Geometry:
    """How many rows or keys a tile has.

    Attributes:
        rows: rows of a row tile.
        small_rows: rows of the tiles that finish a run whose rest is at most two of them; 0 where no tile is smaller. Then
            the rest of a run comes first.
        keys: keys of a key tile.
    """

    rows: int = 64
    small_rows: int = 16
    keys: int = 64


# Tiles are sorted by weights from 1 to WEIGHTS - 1 (0 stands for no tile). LIGHTEST is the logarithm of 32 in quarters of an
# octave, as a float32 has it: its exponent, which counts from -127, and the first two bits behind the point.
WEIGHTS = 64
LIGHTEST = 4 * (127 + 5)

# Columns of `TilePlan.row_tiles`. Public ranges are positions in `key_index`, own ranges are tokens. Every row of the tile
# sees the range up to `full`; from there to `end` a row sees the keys that do not lie behind it.
ROW_TILE = ("begin", "count", "public_begin", "public_full", "public_end", "own_begin", "own_full", "own_end")

# Columns of `TilePlan.key_tiles`. Own rows are tokens, late rows positions in `late_index`, readers in `reader_index`. Every
# key of the tile is seen by the rows from `full` on; late rows and those before `full` see the keys that they may.
KEY_TILE = (
    "begin", "count", "own_begin", "own_full", "own_end", "late_begin", "late_end",
    "reader_begin", "reader_full", "reader_end",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The tiles of a layout, heavy ones first. All tensors are int32 and on one device.

    Attributes:
        geometry: the sizes of the tiles.
        counted: whether the lists hold tiles only; else they are as long as they could have to be, and end in zeros.
        row_tiles ([T, 8]): columns as in ROW_TILE. `begin` and `count` are a range of `row_index`.
        key_tiles ([T', 10]): columns as in KEY_TILE. `begin` and `count` are a range of `key_index`.
        row_index ([N]): all tokens: rows of segments in order, then open rows, then padding.
        key_index ([N]): all tokens: private keys in order, then public keys, then padding.
        reader_index ([N]): rows that see public keys outside their segment, in order; the rest is 0.
        late_index ([N]): rows of segments at or after the first public key of their segment, in order; the rest is 0.
        after ([N]): for the key of each token the first token that may see it from outside its segment: the end of its
            segment, or for an open key the token itself.
    """

    geometry: Geometry
    counted: bool
    row_tiles: torch.Tensor
    key_tiles: torch.Tensor
    row_index: torch.Tensor
    key_index: torch.Tensor
    reader_index: torch.Tensor
    late_index: torch.Tensor
    after: torch.Tensor

    def likely(self, tiles: torch.Tensor) -> int:
        """How many of a list's entries are tiles: their number where that is known, else about as many as there may be.

        Programs go on to further tiles, so that any number of them is right. Images of 256 tokens have a tile per 51 tokens;
        programs that find nothing cost more than ones that go on.
        """
        known = tiles.shape[0]
        return known if self.counted else min(known, self.row_index.shape[0] // 48 + 16)

    def to(self, device: torch.device | str) -> "TilePlan":
        """The same plan on `device`."""
        tensors = (getattr(self, field.name).to(device) for field in fields(self)[2:])
        return TilePlan(self.geometry, self.counted, *tensors)


def tile_plan(
    layout: VocoLayout, geometry: Geometry, build: Callable[[VocoLayout, Geometry], TilePlan] | None = None
) -> TilePlan:
    """The tiles of a layout: those that it carries, or that were made for it before, else made now, by `build` if given."""
    if layout.tiles is not None and layout.tiles.geometry == geometry:
        return layout.tiles
    return _plans(geometry)(layout, build and partial(build, geometry=geometry))


def keep(layout: VocoLayout, plan: TilePlan) -> None:
    """Make `plan` what `tile_plan` returns for `layout`, and for a layout of the same tensors."""
    _plans(plan.geometry).put(layout, plan)


@cache
def _plans(geometry: Geometry) -> PlanCache:
    return PlanCache(partial(build_tiles, geometry=geometry))


def build_tiles(layout: VocoLayout, geometry: Geometry) -> TilePlan:
    """Work out the tiles of a layout on its device. Values are taken as `VocoLayout` promises them, unchecked."""
    tokens = _Tokens(layout)
    row_tiles, key_tiles = _row_tiles(tokens, geometry), _key_tiles(tokens, geometry)
    counted = layout.device.type == "cpu"
    if counted:
        # A copy, because a slice would be pickled with all that it is a slice of.
        row_tiles, key_tiles = (tiles[tiles[:, 1] > 0] for tiles in (row_tiles, key_tiles))
    return TilePlan(
        geometry,
        counted,
        row_tiles,
        key_tiles,
        tokens.row_index,
        tokens.key_index,
        tokens.compact(tokens.reader, tokens.readers_before[:-1]),
        tokens.compact(tokens.late, tokens.late_before[:-1]),
        tokens.after.to(torch.int32),
    )


def useful_pairs(layout: VocoLayout) -> int:
    """How many (query, key) pairs the mask of a layout allows, in O(N)."""
    tokens = _Tokens(layout)
    before = tokens.public_before
    outside = before[torch.where(tokens.open, tokens.token + 1, tokens.segment_begin)] - before[tokens.document_begin]
    if layout.isolated:
        outside = torch.where(tokens.open, outside, 0)
    own = torch.where(tokens.in_segment, tokens.token - tokens.segment_begin + 1, 0)
    return int(torch.where(tokens.padding, 0, outside + own).sum())


def executed_pairs(plan: TilePlan, which: str, full_step: int, edge_step: int) -> int:
    """How many (query, key) pairs a kernel computes, the masked ones included (synchronises with a device).

    Args:
        which: "forward" and "dq" walk keys for each row tile, "dkv" walks rows for each key tile.
        full_step, edge_step: keys (rows) per step where nothing is masked, and where something may be.
    """
    if which == "dkv":
        _, count, *ranges = plan.key_tiles.long().unbind(1)
        own, late, readers = ranges[:3], ranges[3:5], ranges[5:]
        steps = sum(_edge_then_full(*r, full_step, edge_step) for r in (own, readers))
        steps = steps + _rounded_up(late[1] - late[0], edge_step)
        return int((steps * plan.geometry.keys)[count > 0].sum())
    _, count, *ranges = plan.row_tiles.long().unbind(1)
    steps = sum(_full_then_edge(*r, full_step, edge_step) for r in (ranges[:3], ranges[3:]))
    rows = torch.where(count <= plan.geometry.small_rows, plan.geometry.small_rows, plan.geometry.rows)
    return int((steps * rows)[count > 0].sum())


def _full_then_edge(begin, full, end, full_step: int, edge_step: int) -> torch.Tensor:
    whole = (full - begin) // full_step * full_step
    return whole + _rounded_up(end - begin - whole, edge_step)


def _edge_then_full(begin, full, end, full_step: int, edge_step: int) -> torch.Tensor:
    edge = torch.minimum(_rounded_up(full - begin, edge_step), _rounded_up(end - begin, edge_step))
    return edge + _rounded_up((end - begin - edge).clamp(min=0), full_step)


def _rounded_up(x: torch.Tensor, step: int) -> torch.Tensor:
    return (x + step - 1) // step * step


class _Tokens:
    """What is known about each of N tokens: its kind, its segment and document, and how many of each kind stand before it.

    All tensors are int64 or bool of shape [N], and those named `..._before` int64 [N + 1].
    """

    def __init__(self, layout: VocoLayout):
        n = layout.num_tokens
        self.isolated = layout.isolated
        self.token = torch.arange(n, device=layout.device)
        segment, self.public = layout.segment_ids, layout.public
        self.in_segment, self.open, self.padding = segment > 0, segment == 0, segment < 0
        self.private = self.in_segment & ~self.public
        document = document_of(layout.cu_seqlens, n)
        ends = layout.cu_seqlens.long()
        self.document_begin, self.document_end = ends[document], ends[document + 1]

        differs = torch.ones(n + 1, dtype=torch.bool, device=layout.device)
        differs[1:n] = segment[1:] != segment[:-1]
        if n:
            self.segment_begin = torch.where(differs[:-1], self.token, 0).cummax(0).values
            self.segment_end = torch.where(differs[1:], self.token + 1, n).flip(0).cummin(0).values.flip(0)
        else:
            self.segment_begin = self.segment_end = self.token

        self.public_before = _counted_before(self.public)
        self.private_before = _counted_before(self.private)
        self.open_before = _counted_before(self.open)
        self.segment_rows_before = _counted_before(self.in_segment)
        self.padding_before = _counted_before(self.padding)
        self.late = self.in_segment & (self.public_before[1:] > self.public_before[self.segment_begin])
        self.late_before = _counted_before(self.late)
        self.reader = self.open if self.isolated else ~self.padding
        self.readers_before = _counted_before(self.reader)
        self.after = torch.where(self.in_segment, self.segment_end, self.token)

        segment_rows, open_rows = self.segment_rows_before[-1], self.open_before[-1]
        self.row_slot = torch.where(
            self.in_segment,
            self.segment_rows_before[:-1],
            segment_rows + torch.where(self.open, self.open_before[:-1], open_rows + self.padding_before[:-1]),
        )
        private_keys, public_keys = self.private_before[-1], self.public_before[-1]
        self.public_slots = private_keys + self.public_before
        self.key_slot = torch.where(
            self.private,
            self.private_before[:-1],
            private_keys + torch.where(self.public, self.public_before[:-1], public_keys + self.padding_before[:-1]),
        )
        everything = torch.ones_like(self.open)
        self.row_index = self.compact(everything, self.row_slot)
        self.key_index = self.compact(everything, self.key_slot)

    def compact(self, chosen: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """int32 [N]: the chosen tokens, each at its slot; 0 elsewhere."""
        n = self.token.shape[0]
        out = torch.zeros(n + 1, dtype=torch.int32, device=self.token.device)
        return out.scatter_(0, torch.where(chosen, slot, n), self.token.to(torch.int32))[:n]


def _counted_before(chosen: torch.Tensor) -> torch.Tensor:
    before = torch.zeros(chosen.shape[0] + 1, dtype=torch.int64, device=chosen.device)
    torch.cumsum(chosen, 0, out=before[1:])
    return before


def _row_tiles(t: _Tokens, geometry: Geometry) -> torch.Tensor:
    opens = t.open_before[t.document_end] - t.open_before[t.document_begin]
    length = _by_kind(t, t.segment_end - t.segment_begin, opens, t.padding_before[-1])
    at = _by_kind(
        t, t.token - t.segment_begin, t.open_before[:-1] - t.open_before[t.document_begin], t.padding_before[:-1]
    )
    begins, count = _tile_begins(at, length, geometry.rows, geometry.small_rows)
    last = t.row_index[(t.row_slot + count - 1).clamp(max=max(0, t.token.shape[0] - 1))].long()

    public_begin = t.public_slots[t.document_begin]
    seen_by_segment = public_begin if t.isolated else t.public_slots[t.segment_begin]
    columns = (
        t.row_slot,
        count,
        _by_kind(t, public_begin, public_begin, 0),
        _by_kind(t, seen_by_segment, t.public_slots[t.token + 1], 0),
        _by_kind(t, seen_by_segment, t.public_slots[last + 1], 0),
        _by_kind(t, t.segment_begin, 0, 0),
        _by_kind(t, t.token + 1, 0, 0),
        _by_kind(t, t.token + count, 0, 0),
    )
    # The last tile of a run sees most keys, so the list starts at the end.
    longest = _by_kind(t, seen_by_segment - public_begin + length, t.public_slots[t.document_end] - public_begin, 0)
    return _listed(begins, columns, longest, t.row_slot.shape[0] - 1 - t.row_slot)


def _key_tiles(t: _Tokens, geometry: Geometry) -> torch.Tensor:
    def by_kind(private, public, padding):
        return torch.where(t.private, private, torch.where(t.public, public, padding))

    privates = t.private_before[t.segment_end] - t.private_before[t.segment_begin]
    publics = t.public_before[t.document_end] - t.public_before[t.document_begin]
    length = by_kind(privates, publics, t.padding_before[-1])
    at = by_kind(
        t.private_before[:-1] - t.private_before[t.segment_begin],
        t.public_before[:-1] - t.public_before[t.document_begin],
        t.padding_before[:-1],
    )
    begins, count = _tile_begins(at, length, geometry.keys, geometry.keys)
    last = t.key_index[(t.key_slot + count - 1).clamp(max=max(0, t.token.shape[0] - 1))].long()

    readers_end = t.readers_before[t.document_end]
    columns = (
        t.key_slot,
        count,
        by_kind(t.token, 0, 0),
        by_kind(last, 0, 0),
        by_kind(t.segment_end, 0, 0),
        by_kind(0, t.late_before[t.token], 0),
        by_kind(0, t.late_before[t.after[last]], 0),
        by_kind(0, t.readers_before[t.after], 0),
        by_kind(0, t.readers_before[t.after[last]], 0),
        by_kind(0, readers_end, 0),
    )
    longest = by_kind(t.segment_end - t.segment_begin, readers_end - t.readers_before[t.document_begin], 0)
    return _listed(begins, columns, longest, t.key_slot)


def _by_kind(t: _Tokens, of_segment, of_open, of_padding) -> torch.Tensor:
    """[N]: one of three values for each row."""
    return torch.where(t.in_segment, of_segment, torch.where(t.open, of_open, of_padding))


def _tile_begins(at: torch.Tensor, length: torch.Tensor, size: int, small: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether a tile begins at each token, and with how many members).

    `at` is a token's place in its run and `length` how long the run is. A rest that fits into two small tiles is cut into
    those, any other one is a tile of its own. Without small tiles the rest comes first, where a row sees least: its tile has
    a whole one's height, whatever its rows.
    """
    if small == 0:
        before = (-length) % size  # what the first tile lacks
        return ((at + before) % size == 0) | (at == 0), torch.minimum(length - at, size - torch.where(at == 0, before, 0))
    block = at - at % size
    rest = length - block
    is_small = (rest < size) & (rest <= 2 * small)
    step = torch.where(is_small, small, size)
    return (at - block) % step == 0, torch.minimum(length - at, step)


def _listed(begins: torch.Tensor, columns: tuple[torch.Tensor, ...], longest: torch.Tensor, order: torch.Tensor):
    """int32 [N, columns]: the tiles, runs with the longest ranges first, within a run by `order`; the rest is 0.

    Lengths are compared in quarters of an octave, so that runs of about one length stay together as they lie in memory: what
    tiles of one segment read is then still in the cache. The float's bits are that logarithm, rounded down. Lengths below 40
    are all alike, and so are those from 1.5 * 2**20 on, so that a counting sort needs only WEIGHTS counters.
    """
    n = begins.shape[0]
    quarters = (longest.to(torch.float32).view(torch.int32) >> 21).long()
    weight = torch.where(begins, (quarters - LIGHTEST).clamp(0, WEIGHTS - 2) + 1, 0)
    by_order = torch.empty_like(order).scatter_(0, order, torch.arange(n, device=order.device))
    ranked = by_order[weight[by_order].sort(stable=True, descending=True).indices]
    tiles = torch.stack([column.expand(n) for column in columns], dim=1).to(torch.int32)[ranked]
    return torch.where(begins[ranked, None], tiles, 0)
