"""Where VoCo segments lie in a packed batch: a handful of integers per token, never a mask.

`VocoLayout` answers the one question that every other part of the library asks: which key may a query see? Its answer is
the predicate of `VocoLayout.dense_mask`; attention backends read the same integers and never build that mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .errors import reject, require_integers, require_tensor

if TYPE_CHECKING:
    from .tiles import TilePlan

POSITION_POLICIES = ("continuous", "compact")

# Stands for padding among token ids: no id of a vocabulary, and none of the negative ids that mark images (-1, -200).
PADDING_ID = torch.iinfo(torch.int32).min


@dataclass(frozen=True)
class Text:
    """A run of `length` text tokens, for `VocoLayout.from_spans`."""

    length: int


@dataclass(frozen=True)
class Image:
    """One image: `vision` vision tokens, then `voco` VoCo tokens, for `VocoLayout.from_spans`."""

    vision: int
    voco: int


@dataclass(frozen=True, eq=False)
class VocoLayout:
    """Documents, segments and public keys of N packed tokens.

    Make one with `from_spans`, `from_ids` or `from_input_ids`. The tensors belong to the layout and must not be changed
    afterwards: backends keep what they derive from them.

    Attributes:
        segment_ids (int32 [N]): 0 for text (an open row), > 0 for a token of that segment, -1 for padding.
        public (bool [N]): True where later rows outside the token's segment may see its key.
        cu_seqlens (int32 [B+1]): document b holds tokens cu_seqlens[b] to cu_seqlens[b+1]; documents may be empty.
        position_ids (int64 [N]): RoPE position of each token; 0 for padding.
        isolated: True if segments see nothing outside themselves; else they see earlier public keys too.
        tiles: what `prepare` made; None before.
    """

    segment_ids: torch.Tensor
    public: torch.Tensor
    cu_seqlens: torch.Tensor
    position_ids: torch.Tensor
    isolated: bool
    # No field, so that `dataclasses.replace` (torch uses it, too) never takes it to a layout that it is not the plan of.
    tiles: ClassVar["TilePlan | None"] = None

    # ---- constructors ------------------------------------------------------------------------------------------------

    @classmethod
    def from_spans(
        cls, documents: Sequence[Sequence[Text | Image]], *, isolated: bool, positions: str = "continuous"
    ) -> "VocoLayout":
        """Lay out documents that are written as lists of `Text` and `Image` spans.

        Args:
            documents: one list of spans per document, packed in this order. Lengths of 0 are allowed. An image without
                VoCo tokens, or VoCo tokens without vision tokens, become open text.
            isolated: whether segments see nothing outside themselves.
            positions: "continuous" or "compact" (see `from_ids` for the first; compact gives public tokens consecutive
                positions after a gap as long as the document's longest private run).

        Raises:
            ValueError: a span of another type or of negative length; an unknown position policy; compact positions for a
                layout that does not allow them.

        Example:
            >>> layout = VocoLayout.from_spans([[Text(1), Image(vision=3, voco=1), Text(2)]], isolated=False)
            >>> layout.segment_ids.tolist()
            [0, 1, 1, 1, 1, 0, 0]
        """
        lengths, ids, visible, ends, next_id = [], [], [], [0], 1
        for index, document in enumerate(documents):
            for span in document:
                runs, is_segment = _runs_of_span(span, f"documents[{index}]")
                for length, is_public in runs:
                    lengths.append(length)
                    ids.append(next_id if is_segment else 0)
                    visible.append(is_public or not is_segment)
                next_id += is_segment
            ends.append(sum(lengths))
        repeats = torch.tensor(lengths, dtype=torch.int64)
        return cls.from_ids(
            torch.tensor(ids, dtype=torch.int32).repeat_interleave(repeats),
            torch.tensor(visible, dtype=torch.bool).repeat_interleave(repeats),
            torch.tensor(ends, dtype=torch.int32),
            isolated=isolated,
            positions=positions,
        )

    @classmethod
    def from_ids(
        cls,
        segment_ids: torch.Tensor,
        public: torch.Tensor,
        cu_seqlens: torch.Tensor,
        *,
        isolated: bool,
        position_ids: torch.Tensor | None = None,
        positions: str = "continuous",
        check: bool = False,
    ) -> "VocoLayout":
        """Lay out tokens from their segment ids and public flags: the general form.

        A segment whose tokens are all private or all public becomes open text.

        Args:
            segment_ids (int32 or int64 [N]): 0 open text, > 0 segment, -1 padding. A segment is one contiguous run inside
                one document, and its id occurs nowhere else.
            public (bool [N]): True where `segment_ids == 0`, False where `segment_ids == -1`, free inside segments.
            cu_seqlens (int32 or int64 [B+1]): starts at 0, never decreases, ends at N.
            isolated: whether segments see nothing outside themselves.
            position_ids (int32 or int64 [N]): RoPE positions; where None they follow `positions`: "continuous" counts
                the document's tokens other than padding from 0.
            check: also check the values of tensors that are not on the CPU (this synchronises with the device). Values on
                the CPU are always checked.

        Raises:
            ValueError: any of the above is broken.
        """
        require_integers("segment_ids", segment_ids)
        require_tensor("segment_ids", segment_ids, ndim=1)
        n = segment_ids.shape[0]
        if require_tensor("public", public).dtype != torch.bool or public.shape != (n,):
            reject("public", f"a bool tensor of shape [{n}]", f"{public.dtype} of shape {list(public.shape)}")
        require_integers("cu_seqlens", cu_seqlens)
        require_tensor("cu_seqlens", cu_seqlens, ndim=1)
        if cu_seqlens.shape[0] < 1:
            reject("cu_seqlens", "of shape [B+1]", "empty")
        for name, tensor in (("public", public), ("cu_seqlens", cu_seqlens)):
            if tensor.device != segment_ids.device:
                reject(name, f"on the device of segment_ids ({segment_ids.device})", f"on {tensor.device}")
        if not isinstance(isolated, bool):
            reject("isolated", "True or False", repr(isolated))
        if positions not in POSITION_POLICIES:
            reject("positions", f"one of {POSITION_POLICIES}", repr(positions))
        if check or segment_ids.device.type == "cpu":
            check_ids(segment_ids, public, cu_seqlens)

        segment_ids, cu_seqlens = segment_ids.to(torch.int32), cu_seqlens.to(torch.int32)
        segment_ids, public = _open_one_sided_segments(segment_ids, public)
        if position_ids is not None:
            require_integers("position_ids", position_ids, shape=(n,))
            position_ids = position_ids.to(device=segment_ids.device, dtype=torch.int64)
        elif positions == "continuous":
            position_ids = _rank_in_document(segment_ids >= 0, cu_seqlens)
        else:
            position_ids = _compact_positions(segment_ids, public, cu_seqlens, check)
        return cls(segment_ids, public, cu_seqlens, position_ids, isolated)

    @classmethod
    def from_input_ids(
        cls,
        input_ids: torch.Tensor,
        *,
        image_token_id: int,
        voco_token_id: int,
        isolated: bool,
        positions: str = "continuous",
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        hide_prefix: bool = False,
        keep_padding: bool = False,
        image_start_id: int | None = None,
    ) -> "VocoLayout":
        """Find images and their VoCo tokens in token ids.

        A segment runs from an image's first token to the end of the run of VoCo tokens that follows it; what stands
        between them (a newline) is private. An image that no VoCo tokens follow is open text.

        Args:
            input_ids (int32 or int64 [B, S], or [1, N] with `cu_seqlens`): vision tokens are runs of `image_token_id`.
            attention_mask ([B, S]): 0 or False marks padding. Not together with `cu_seqlens`.
            cu_seqlens (int32 or int64 [D+1]): the D documents of a packed row.
            hide_prefix: start a document's first segment at the document's start, as the released VoCo-LLaMA code does.
            keep_padding: keep all B*S tokens, padding as segment -1, so that a padded batch is used in place; else
                padding is dropped (which synchronises with a device).
            image_start_id: a token with this id directly before an image belongs to its segment (a BOS token that every
                image brings with it).

        Raises:
            ValueError: wrong shapes or dtypes, equal token ids, `attention_mask` and `cu_seqlens` together.
        """
        require_integers("input_ids", input_ids)
        require_tensor("input_ids", input_ids, ndim=2)
        if image_token_id == voco_token_id:
            reject("voco_token_id", f"different from image_token_id ({image_token_id})", voco_token_id)
        if image_start_id in (image_token_id, voco_token_id):
            reject("image_start_id", "different from image_token_id and voco_token_id", image_start_id)
        rows, width = input_ids.shape
        device = input_ids.device
        if cu_seqlens is None:
            cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=device) * width
        elif attention_mask is not None:
            reject("attention_mask", "None where cu_seqlens is given", "given")
        elif rows != 1:
            reject("input_ids", "of shape [1, N] where cu_seqlens is given", f"of shape {list(input_ids.shape)}")
        else:
            require_integers("cu_seqlens", cu_seqlens)
            check_cu_seqlens(require_tensor("cu_seqlens", cu_seqlens, ndim=1), width, force=False)
            cu_seqlens = cu_seqlens.to(device=device, dtype=torch.int32)
        if attention_mask is None:
            valid = torch.ones(rows * width, dtype=torch.bool, device=device)
        elif require_tensor("attention_mask", attention_mask).shape != input_ids.shape:
            reject("attention_mask", f"of shape {list(input_ids.shape)}", f"of shape {list(attention_mask.shape)}")
        else:
            valid = attention_mask.to(device=device).reshape(-1) != 0

        ids = input_ids.reshape(-1)
        segment_ids = _find_segments(
            torch.where(valid, ids, PADDING_ID),
            cu_seqlens,
            image_token_id,
            voco_token_id,
            hide_prefix=hide_prefix,
            image_start_id=image_start_id,
        )
        public = valid & ((segment_ids == 0) | (ids == voco_token_id))
        segment_ids = torch.where(valid, segment_ids, -1)
        if attention_mask is not None and not keep_padding:
            kept = torch.zeros(ids.shape[0] + 1, dtype=torch.int64, device=device)
            kept[1:] = valid.cumsum(0)
            segment_ids, public, cu_seqlens = segment_ids[valid], public[valid], kept[cu_seqlens.long()]
        return cls.from_ids(segment_ids, public, cu_seqlens, isolated=isolated, positions=positions)

    # ---- use ---------------------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """N, padding included."""
        return self.segment_ids.shape[0]

    @property
    def num_documents(self) -> int:
        """B, empty documents included."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """The device of all tensors of the layout."""
        return self.segment_ids.device

    def to(self, device: torch.device | str) -> "VocoLayout":
        """The same layout on `device`, with its tiles where it has them; `self` if it is there already."""
        if torch.device(device) == self.device:
            return self
        moved = (t.to(device) for t in (self.segment_ids, self.public, self.cu_seqlens, self.position_ids))
        layout = VocoLayout(*moved, self.isolated)
        return layout if self.tiles is None else layout._keep(self.tiles.to(device))

    def prepare(self) -> "VocoLayout":
        """Work out the tiles that GPU backends need, and return the layout itself.

        Meant for a data loader: tiles travel with the layout through `to` and pickling, and the device has nothing left to
        do. Without it they are made at the layout's first use, on its device and without synchronising with it. Prepare a
        layout that several streams use before they part, and one that a CUDA graph uses before it is captured, unless the
        graph makes the layout itself; it must live as long as the graph.

        Two plans of other tiles are still made at first use: of "cuda" on Hopper at head_dim 64 and 128, and of "triton" for
        float32 at head_dims above 128.
        """
        from .planning import prepared_tiles
        from .tiles import Geometry

        return self._keep(prepared_tiles(self, Geometry()))

    def _keep(self, tiles: "TilePlan") -> "VocoLayout":
        from .tiles import keep

        object.__setattr__(self, "tiles", tiles)
        keep(self, tiles)
        return self

    def tile_efficiency(self, head_dim: int = 128, backend: str = "triton", *, which: str = "forward") -> float:
        """Useful (query, key) pairs divided by those that a backend's kernel computes, counted from its tiles.

        Args:
            head_dim: 32 to 256 (cuda: 64, 96, 128, 256). Launch parameters depend on it; they are those for bfloat16, for
                triton on sm_90, for cuda of the kernels for sm_80.
            backend: "triton" or "cuda", those with tiles.
            which: "forward", or one of the two kernels of the backward pass, "dq" and "dkv".

        Returns:
            0 to 1; 1 where nothing is computed. Synchronises where the layout is on a device.

        Raises:
            ValueError: another backend, head_dim or kernel.
        """
        from .planning import tile_efficiency

        return tile_efficiency(self, head_dim, backend, which)

    def dense_mask(self) -> torch.Tensor:
        """bool [N, N], True where query i (row) sees key j (column). For tests and pictures: it costs N * N bytes."""
        index = torch.arange(self.num_tokens, device=self.device)
        document = document_of(self.cu_seqlens, self.num_tokens)
        row, key = self.segment_ids[:, None], self.segment_ids[None, :]
        causal_in_document = (document[:, None] == document[None, :]) & (index[None, :] <= index[:, None])
        own = (row == key) & (row > 0)
        outside = self.public[None, :] & (row == 0 if self.isolated else row >= 0)
        return causal_in_document & (row >= 0) & (key >= 0) & (own | outside)


def check_ids(segment_ids: torch.Tensor, public: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """Raise ValueError where values break the contract of `VocoLayout.from_ids` (synchronises with a device)."""
    n = segment_ids.shape[0]
    check_cu_seqlens(cu_seqlens, n, force=True)
    if n == 0:
        return
    if int(segment_ids.min()) < -1:
        reject("segment_ids", "at least -1", f"{int(segment_ids.min())} at token {int(segment_ids.argmin())}")
    for value, wanted, must in ((0, True, "True for open text (segment 0)"), (-1, False, "False for padding")):
        wrong = ((segment_ids == value) & (public != wanted)).nonzero()
        if wrong.numel():
            reject("public", must, f"{not wanted} at token {int(wrong[0])}")
    document = document_of(cu_seqlens, n)
    starts = _run_starts(segment_ids, document) & (segment_ids > 0)
    run_ids, order = segment_ids[starts].sort(stable=True)
    repeated = (run_ids[1:] == run_ids[:-1]).nonzero()
    if repeated.numel():
        at = starts.nonzero()[order, 0]
        first, second = int(at[repeated[0, 0]]), int(at[repeated[0, 0] + 1])
        where = f"in documents {int(document[first])} and {int(document[second])}"
        if document[first] == document[second]:
            where = f"twice in document {int(document[first])}"
        reject(
            "segment_ids",
            "one contiguous run per id, inside one document",
            f"id {int(run_ids[repeated[0, 0]])} {where} (runs at tokens {first} and {second})",
        )


def check_cu_seqlens(cu_seqlens: torch.Tensor, num_tokens: int, *, force: bool) -> None:
    """Raise ValueError unless `cu_seqlens` rises from 0 to `num_tokens`; device tensors are read only with `force`."""
    if not force and cu_seqlens.device.type != "cpu":
        return
    values = cu_seqlens.tolist()
    if not values or values[0] != 0:
        reject("cu_seqlens", "0 at its start", values[:1])
    for index in range(1, len(values)):
        if values[index] < values[index - 1]:
            reject("cu_seqlens", "non-decreasing", f"{values[index - 1]} then {values[index]} at index {index}")
    if values[-1] != num_tokens:
        reject("cu_seqlens", f"{num_tokens} (the number of tokens) at its end", values[-1])


def document_of(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """int64 [N]: the document of each token."""
    index = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, index, right=True) - 1


def _runs_of_span(span: Text | Image, where: str) -> tuple[list[tuple[int, bool]], bool]:
    """The (length, public) runs of a span, and whether they form a segment."""
    if isinstance(span, Text):
        runs = [(span.length, True)]
    elif isinstance(span, Image):
        runs = [(span.vision, False), (span.voco, True)]
    else:
        reject(where, "a list of Text and Image spans", f"a list with {span!r}")
    for length, _ in runs:
        if not isinstance(length, int) or isinstance(length, bool) or length < 0:
            reject(where, "spans of lengths that are integers of at least 0", repr(span))
    return runs, len(runs) == 2 and all(length > 0 for length, _ in runs)


def _run_starts(segment_ids: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    """bool [N]: True where a run of one segment id inside one document begins."""
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[1:] = (segment_ids[1:] != segment_ids[:-1]) | (document[1:] != document[:-1])
    return starts


def _open_one_sided_segments(segment_ids: torch.Tensor, public: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn segments that have no private or no public tokens into open text.

    Segment ids are contiguous runs, so a run number is enough to count per segment, without a host synchronisation.
    """
    if segment_ids.shape[0] == 0:
        return segment_ids, public
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[1:] = segment_ids[1:] != segment_ids[:-1]
    run = starts.cumsum(0) - 1
    counts = torch.zeros(2, segment_ids.shape[0], dtype=torch.int64, device=segment_ids.device)
    counts[0].scatter_add_(0, run, public.long())
    counts[1].scatter_add_(0, run, (~public).long())
    opened = (segment_ids > 0) & (counts == 0).any(0)[run]
    return torch.where(opened, 0, segment_ids), public | opened


def _rank_in_document(counted: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """int64 [N]: how many `counted` tokens of its document precede each token; 0 for tokens that are not counted."""
    n = counted.shape[0]
    before = torch.zeros(n + 1, dtype=torch.int64, device=counted.device)
    before[1:] = counted.cumsum(0)
    document_start = cu_seqlens.long()[document_of(cu_seqlens, n)]
    return torch.where(counted, before[:-1] - before[document_start], 0)


def _compact_positions(
    segment_ids: torch.Tensor, public: torch.Tensor, cu_seqlens: torch.Tensor, check: bool
) -> torch.Tensor:
    """Positions of the compact policy: public tokens are consecutive from a base, the longest private run.

    The private tokens of a segment stand just before its first public token, so every image uses the same positions and
    the context window is spent on public tokens alone.
    """
    n = segment_ids.shape[0]
    device = segment_ids.device
    document = document_of(cu_seqlens, n)
    run = _run_starts(segment_ids, document).cumsum(0) - 1 if n else document
    private = (segment_ids > 0) & ~public
    private_before = torch.zeros(n + 1, dtype=torch.int64, device=device)
    private_before[1:] = private.cumsum(0)
    index = torch.arange(n, device=device)
    run_start = torch.full((n,), n, device=device).scatter_reduce(0, run, index, "amin")
    rank_in_run = private_before[:-1] - private_before[run_start[run]] if n else index
    private_in_run = torch.zeros(n, dtype=torch.int64, device=device).scatter_add(0, run, private.long())

    if n and (check or device.type == "cpu"):
        mixed = private[1:] & public[:-1] & (run[1:] == run[:-1]) & (rank_in_run[1:] > 0)
        if bool(mixed.any()):
            token = int(mixed.nonzero()[0]) + 1
            reject(
                "positions",
                "'continuous' where public tokens stand between the private tokens of a segment",
                f"'compact' (segment {int(segment_ids[token])}, token {token})",
            )

    base = torch.zeros(cu_seqlens.shape[0], dtype=torch.int64, device=device)
    base = base.scatter_reduce(0, document, private_in_run[run] if n else index, "amax")
    public_position = base[document] + _rank_in_document(public, cu_seqlens)
    far = torch.iinfo(torch.int64).max
    first_public = torch.full((n,), far, device=device)
    first_public = first_public.scatter_reduce(0, run, torch.where(public, public_position, far), "amin")
    private_position = first_public[run] - private_in_run[run] + rank_in_run
    return torch.where(public, public_position, torch.where(private, private_position, 0))


def _find_segments(
    ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    image_token_id: int,
    voco_token_id: int,
    *,
    hide_prefix: bool,
    image_start_id: int | None,
) -> torch.Tensor:
    """int32 [N]: the segment id of each token, numbered over the whole pack; `ids` holds PADDING_ID at padding."""
    n = ids.shape[0]
    if n == 0:
        return ids.to(torch.int32)
    index = torch.arange(n, device=ids.device)
    document = document_of(cu_seqlens, n)
    is_voco = ids == voco_token_id
    begins_document = torch.ones_like(is_voco)
    begins_document[1:] = document[1:] != document[:-1]

    def run_starts(member: torch.Tensor) -> torch.Tensor:
        follows = torch.zeros_like(member)
        follows[1:] = member[:-1]
        return member & (begins_document | ~follows)

    def latest(marks: torch.Tensor) -> torch.Tensor:
        return torch.where(marks, index, -1).cummax(0).values

    document_start = cu_seqlens.long()[document]
    image_start = latest(run_starts(ids == image_token_id))
    voco_before = torch.full_like(index, -1)
    voco_before[1:] = latest(is_voco)[:-1]
    # The run of VoCo tokens that begins here closes the image before it, unless another run did so already.
    closes = run_starts(is_voco) & (image_start >= document_start) & (image_start > voco_before)
    start = image_start
    if image_start_id is not None:
        has_start = (start > document_start) & (ids[(start - 1).clamp_min(0)] == image_start_id)
        start = start - has_start.long()
    if hide_prefix:
        real_start = torch.full((cu_seqlens.shape[0],), n, device=ids.device)
        real_start = real_start.scatter_reduce(0, document, torch.where(ids == PADDING_ID, n, index), "amin")
        start = torch.where(_rank_in_document(closes, cu_seqlens) == 0, real_start[document], start)

    # Padding may stand inside a row only outside of segments, so the run of VoCo tokens ends where its neighbour differs.
    continues = torch.zeros_like(is_voco)
    continues[:-1] = is_voco[1:] & ~begins_document[1:]
    run_end = torch.where(is_voco & ~continues, index, n).flip(0).cummin(0).values.flip(0)
    edges = torch.zeros(n + 2, dtype=torch.int64, device=ids.device)
    opens = torch.zeros_like(edges)
    opens.scatter_add_(0, torch.where(closes, start, n + 1), torch.ones_like(index))
    edges += opens
    edges.scatter_add_(0, torch.where(closes, run_end + 1, n + 1), -torch.ones_like(index))
    inside = edges[:n].cumsum(0) > 0
    return torch.where(inside, opens[:n].cumsum(0), 0).to(torch.int32)
