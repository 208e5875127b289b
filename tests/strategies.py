"""Hypothesis strategies for layouts: documents of spans, packs of raw ids, and rows of token ids."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from voco_kernels import Image, Text, VocoLayout

IMAGE_ID, VOCO_ID, START_ID = 9, 8, 7


class Pack(NamedTuple):
    """What `VocoLayout.from_ids` takes, as lists."""

    segment: list[int]
    public: list[bool]
    cu_seqlens: list[int]

    def layout(self, isolated: bool, **options) -> VocoLayout:
        tensors = (
            torch.tensor(self.segment, dtype=torch.int32),
            torch.tensor(self.public, dtype=torch.bool),
            torch.tensor(self.cu_seqlens, dtype=torch.int32),
        )
        return VocoLayout.from_ids(*tensors, isolated=isolated, **options)


texts = st.builds(Text, st.integers(0, 6))
images = st.builds(Image, st.integers(0, 5), st.integers(0, 3))
closed_images = st.builds(Image, st.integers(1, 5), st.integers(1, 3))


def documents(spans=texts | images, max_spans: int = 5):
    """Documents of spans: empty ones, text only, images without VoCo tokens, VoCo tokens without an image, many of them."""
    return st.lists(st.lists(spans, max_size=max_spans), max_size=4) | st.lists(st.lists(spans, max_size=2), max_size=9)


def ordinary_documents():
    """Documents whose images all have vision and VoCo tokens, so that their token ids mean the same."""
    return documents(st.builds(Text, st.integers(1, 6)) | closed_images)


# A run of a pack: ("open" | "padding", length), or ("segment", public flags).
_runs = (
    st.tuples(st.sampled_from(["open", "padding"]), st.integers(1, 5))
    | st.tuples(st.just("segment"), st.lists(st.booleans(), min_size=1, max_size=7))
)


@st.composite
def packs(draw, max_documents: int = 4):
    """Packs with public tokens anywhere inside segments, one-sided segments, padding anywhere, ids in any order."""
    pack = draw(st.lists(st.lists(_runs, max_size=5), max_size=max_documents))
    free_ids = draw(st.permutations(range(1, 1 + sum(map(len, pack)))))
    segment, public, ends = [], [], [0]
    for document in pack:
        for kind, content in document:
            flags = content if kind == "segment" else [kind == "open"] * content
            name = {"open": 0, "padding": -1}.get(kind) if kind != "segment" else free_ids.pop()
            segment += [name] * len(flags)
            public += flags
        ends.append(len(segment))
    return Pack(segment, public, ends)


@st.composite
def attention_layouts(draw, isolated: bool):
    """Layouts of every form, behind one fixed document.

    The fixed document gives every kind of rows some ordinary members: the error rule compares maxima over a kind, which mean
    nothing where all its gradients are exactly zero (rows that see one key).
    """
    if draw(st.booleans()):
        fixed = [Text(9), Image(9, 4), Text(9), Image(8, 3), Text(9)]
        return VocoLayout.from_spans([fixed, *draw(documents())], isolated=isolated)
    segment = [0] * 9 + [5000] * 13 + [0] * 9 + [-1] + [5001] * 11 + [0] * 9
    public = [s >= 0 and (s == 0 or at % 3 == 0) for at, s in enumerate(segment)]
    pack = draw(packs())
    ends = [0, *(len(segment) + end for end in pack.cu_seqlens)]
    return Pack(segment + pack.segment, public + pack.public, ends).layout(isolated)


class Rows(NamedTuple):
    """A padded batch of token ids: one list per row, and padding on its left or right."""

    rows: list[list[int]]
    pad_left: bool
    width: int

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, attention_mask), both [B, width]; padding ids are those of images, which must not matter."""
        ids = np.full((len(self.rows), self.width), IMAGE_ID, dtype=np.int64)
        mask = np.zeros((len(self.rows), self.width), dtype=np.int64)
        for b, row in enumerate(self.rows):
            where = slice(self.width - len(row), self.width) if self.pad_left else slice(0, len(row))
            ids[b, where], mask[b, where] = row, 1
        return torch.from_numpy(ids), torch.from_numpy(mask)


@st.composite
def id_rows(draw):
    """Rows of ids in which images, VoCo tokens, image starts and text follow each other in any order."""
    token = st.sampled_from([IMAGE_ID, IMAGE_ID, VOCO_ID, VOCO_ID, START_ID, 1, 2])
    rows = draw(st.lists(st.lists(token, max_size=12), max_size=4))
    width = max(map(len, rows), default=0) + draw(st.integers(0, 2))
    return Rows(rows, draw(st.booleans()), width)


def expand(docs) -> Pack:
    """What documents of spans mean, token by token."""
    segment, public, ends, name = [], [], [0], 0
    for document in docs:
        for span in document:
            if isinstance(span, Text):
                segment += [0] * span.length
                public += [True] * span.length
            else:
                is_segment = span.vision > 0 and span.voco > 0
                name += is_segment
                segment += [name if is_segment else 0] * (span.vision + span.voco)
                public += [not is_segment] * span.vision + [True] * span.voco
        ends.append(len(segment))
    return Pack(segment, public, ends)


def token_ids(document) -> list[int]:
    """The token ids of a document of spans."""
    ids = []
    for span in document:
        ids += [1] * span.length if isinstance(span, Text) else [IMAGE_ID] * span.vision + [VOCO_ID] * span.voco
    return ids
