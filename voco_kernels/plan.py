"""The two ranges of every query row, worked out once per layout on the host.

Every row attends to at most two ranges of keys of its document:

1. the public range `public_index[begin:limit]`: for an open row all public keys up to itself; for a row of a segment that is
   not isolated all public keys before the segment; for an isolated one nothing;
2. the own range `[segment start, row]`: for a row of a segment; empty for an open row.

The plan lists the segments and, per document, where its public keys lie. Backends turn it into calls or tiles.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .layout import VocoLayout, check_ids


@dataclass(frozen=True, eq=False)
class TwoRangePlan:
    """Host-side integers (numpy int64) of a layout, plus the one index that the device needs.

    Attributes:
        segment_start, segment_length ([G]): token range of each segment, in order.
        prefix_begin, prefix_limit ([G]): its rows see public_index[prefix_begin:prefix_limit] besides themselves.
        document_begin, document_limit ([B]): public keys of document b are public_index[begin:limit].
        public_index (int64 [P], layout's device): tokens that are public keys, in order.
        public_is_open (bool [P]): True where that token is an open row, False where it is a VoCo token.
        num_tokens, num_rows: N, and how many of them are not padding.
    """

    segment_start: np.ndarray
    segment_length: np.ndarray
    prefix_begin: np.ndarray
    prefix_limit: np.ndarray
    document_begin: np.ndarray
    document_limit: np.ndarray
    public_index: torch.Tensor
    public_is_open: np.ndarray
    num_tokens: int
    num_rows: int


def build_plan(layout: VocoLayout) -> TwoRangePlan:
    """Work out the plan of a layout in O(N); copies a device's layout to the host once and checks its values there."""
    host = layout.to("cpu")
    if layout.device.type != "cpu":
        check_ids(host.segment_ids, host.public, host.cu_seqlens)
    segment, public = host.segment_ids.numpy(), host.public.numpy()
    ends = host.cu_seqlens.numpy().astype(np.int64)
    index = np.flatnonzero(public)
    changes = np.flatnonzero(np.diff(segment)) + 1
    run_begin = np.concatenate([[0], changes]).astype(np.int64) if segment.size else np.zeros(0, np.int64)
    run_end = np.concatenate([changes, [segment.size]]).astype(np.int64) if segment.size else run_begin
    is_segment = segment[run_begin] > 0
    start, end = run_begin[is_segment], run_end[is_segment]
    document_begin, document_limit = np.searchsorted(index, ends[:-1]), np.searchsorted(index, ends[1:])
    prefix_begin = document_begin[np.searchsorted(ends, start, side="right") - 1]
    return TwoRangePlan(
        segment_start=start,
        segment_length=end - start,
        prefix_begin=prefix_begin,
        prefix_limit=prefix_begin if layout.isolated else np.searchsorted(index, start),
        document_begin=document_begin,
        document_limit=document_limit,
        public_index=torch.from_numpy(index).to(layout.device),
        public_is_open=segment[index] == 0,
        num_tokens=segment.size,
        num_rows=int((segment >= 0).sum()),
    )


class PlanCache:
    """Keeps what was derived from a layout, by default by `build`, for as long as the layout's tensors live.

    The key is the layout's `segment_ids` tensor, because that object also reaches a registered op inside a compiled graph,
    where the layout itself does not.
    """

    def __init__(self, build):
        self._build = build
        self._entries = WeakTensorKeyDictionary()

    def __call__(self, layout: VocoLayout, build=None):
        """What is kept for the layout; made now, and kept, where there is nothing."""
        entry = self._entries.get(layout.segment_ids)
        if entry is not None and entry[0] == _key(layout):
            return entry[1]
        plan = (build or self._build)(layout)
        # What a CUDA graph captures has no values until it is replayed, and is the graph's own.
        return plan if _is_captured(layout) else self.put(layout, plan)

    def put(self, layout: VocoLayout, plan):
        """Keep `plan` for the layout, and return it."""
        # The tensors in the entry keep the addresses in its key from being used again.
        self._entries[layout.segment_ids] = (_key(layout), plan, layout.cu_seqlens, layout.public)
        return plan


def _is_captured(layout: VocoLayout) -> bool:
    return layout.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _key(layout: VocoLayout) -> tuple:
    tensors = (layout.segment_ids, layout.public, layout.cu_seqlens)
    return layout.isolated, layout.cu_seqlens.data_ptr(), layout.public.data_ptr(), *map(_version, tensors)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
