"""The mask of a layout as others want it: a rule for pairs, a dense mask of a padded batch, intervals of keys."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from voco_kernels import VocoLayout
from voco_kernels.layout import document_of


@dataclass(frozen=True, eq=False)
class MaskRule:
    """The mask of a layout without padding in three integers a token, so that asking about a pair costs little.

    Query i sees key j where j <= i and (j >= own_begin[i] or public_at[j] >= outside_begin[i]).

    Attributes (int32 [N], on the layout's device):
        own_begin: where the segment of i begins; i + 1 for text, which has none.
        outside_begin: where the document of i begins; N where i sees nothing outside its segment.
        public_at: j where that key is public, else -1.
    """

    own_begin: torch.Tensor
    outside_begin: torch.Tensor
    public_at: torch.Tensor

    @classmethod
    def of(cls, layout: VocoLayout) -> "MaskRule":
        """Work it out on the layout's device, without a word to the host."""
        n, segment = layout.num_tokens, layout.segment_ids
        token = torch.arange(n, device=layout.device)
        begins = torch.ones(n, dtype=torch.bool, device=layout.device)
        begins[1:] = segment[1:] != segment[:-1]
        run_begin = torch.where(begins, token, 0).cummax(0).values
        document_begin = layout.cu_seqlens.long()[document_of(layout.cu_seqlens, n)]
        is_text = segment == 0
        outside = document_begin if not layout.isolated else torch.where(is_text, document_begin, n)
        columns = (torch.where(is_text, token + 1, run_begin), outside, torch.where(layout.public, token, -1))
        return cls(*(x.to(torch.int32) for x in columns))

    def mask_mod(self) -> Callable:
        """visible(batch, head, row, key), as FlexAttention asks: whether query `row` sees key `key`."""
        # A closure over tensors is what torch.compile follows best.
        own_begin, outside_begin, public_at = self.own_begin, self.outside_begin, self.public_at

        def visible(batch, head, row, key):
            return (key <= row) & ((key >= own_begin[row]) | (public_at[key] >= outside_begin[row]))

        return visible


def block_masks(layout: VocoLayout, create: Callable) -> Callable:
    """build(block=128): FlexAttention's BlockMask, one for all heads, by its `create_block_mask`, compiled or not.

    A block is (queries, keys) or one number for both. The rule's integers are made before the first mask, not in each.
    """
    rule, n = cache(lambda: MaskRule.of(layout).mask_mod()), layout.num_tokens

    def build(block: int | tuple[int, int] = 128):
        return create(rule(), None, None, n, n, device=layout.device, BLOCK_SIZE=block)

    return build


# ---- a padded batch ----------------------------------------------------------------------------------------------------

# SDPA's kernels on a GPU copy a mask whose rows are not of whole 16 numbers; on a CPU longer rows are only more work.
ROW_MULTIPLE = {"cuda": 16, "cpu": 1}


def dtype_of(device: torch.device) -> torch.dtype:
    """What the suites measure in on a device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def padded_length(layout: VocoLayout) -> int:
    """L of a padded batch [B, L] of one row per document: at least the longest document's length."""
    multiple = ROW_MULTIPLE[layout.device.type]
    return -(-int(layout.cu_seqlens.diff().max()) // multiple) * multiple


class PaddedMask:
    """The mask of a padded batch of one row per document, [B, 1, L, L]: 0 where a query sees a key and -inf elsewhere.

    Numbers of the inputs' dtype, since SDPA makes these of bools in every call, on a CPU as well.
    """

    def __init__(self, layout: VocoLayout, dtype: torch.dtype | None = None):
        """`dtype` is that of the inputs; the one that the suites measure in where None."""
        self._layout, self._length = layout, padded_length(layout)
        self._dtype = dtype or dtype_of(layout.device)

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return self._layout.num_documents * self._length**2

    @property
    def bytes(self) -> int:
        """How large it is."""
        return self.numbers * self._dtype.itemsize

    def build(self) -> torch.Tensor:
        """A new one. Rows of padding see themselves, since a row that sees nothing would be NaN."""
        layout, device = self._layout, self._layout.device
        place = torch.arange(self._length, device=device)
        begin, end = (x[:, None] for x in (layout.cu_seqlens[:-1].long(), layout.cu_seqlens[1:].long()))
        token = begin + place
        # Behind its end a row of the batch would meet the next document, or no token at all.
        inside, token = token < end, token.clamp(max=layout.num_tokens - 1)
        mask = self._visible(0, 0, token[:, :, None], token[:, None, :])
        mask &= inside[:, :, None] & inside[:, None, :]
        mask |= torch.eye(self._length, dtype=torch.bool, device=device)
        seen, hidden = (torch.full((), x, dtype=self._dtype, device=device) for x in (0.0, float("-inf")))
        return torch.where(mask[:, None], seen, hidden)

    @cached_property
    def _visible(self) -> Callable:
        return MaskRule.of(self._layout).mask_mod()


# ---- intervals of keys -------------------------------------------------------------------------------------------------


def key_intervals(layout: VocoLayout) -> torch.Tensor:
    """int32 [1, 2 R + 3, N]: what each query sees as a union of intervals, for R runs of public keys in a document at most.

    For query i with F = result[0, :, i] these are [0, F0), [F1, F2), [F3, F4) and so on, as cuDNN's flex attention wants
    it: never falling, and empty where a query needs fewer. The last interval is the query's own segment.
    """
    rule, n, device = MaskRule.of(layout), layout.num_tokens, layout.device
    document = document_of(layout.cu_seqlens, n)
    begins = layout.public.clone()
    begins[1:] &= ~layout.public[:-1] | (document[1:] != document[:-1])
    ends = layout.public.clone()
    ends[:-1] &= ~layout.public[1:] | (document[1:] != document[:-1])
    run_begin, run_end = begins.nonzero()[:, 0], ends.nonzero()[:, 0] + 1
    first = torch.searchsorted(run_begin, layout.cu_seqlens.long())  # the first run of each document
    limit, most = rule.own_begin.long(), int(first.diff().max())
    nothing = rule.outside_begin == n
    columns = [torch.zeros(n, dtype=torch.int64, device=device)]
    for place in range(most):
        run = first[document] + place
        missing = nothing | (run >= first[document + 1])
        run = run.clamp(max=max(0, len(run_begin) - 1))
        columns += [torch.where(missing, limit, side[run].minimum(limit)) for side in (run_begin, run_end)]
    columns += [limit, torch.arange(1, n + 1, device=device)]
    return torch.stack(columns)[None].to(torch.int32).contiguous()
