"""Layouts: who sees whom, by hand and by the rule; the three constructors; positions; bad input."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    OPEN,
    PADDING,
    PRIVATE,
    VOCO,
    compact_positions,
    continuous_positions,
    documents_of,
    kinds_of,
    mask_of,
    mask_of_layout,
    opened,
    scan,
)
from strategies import (
    IMAGE_ID,
    START_ID,
    VOCO_ID,
    Pack,
    documents,
    expand,
    id_rows,
    ordinary_documents,
    packs,
    token_ids,
)

from voco_kernels import Image, Text, VocoLayout

LETTERS = {"t": OPEN, "v": PRIVATE, "c": VOCO, "p": PADDING}
IDS = {"image_token_id": IMAGE_ID, "voco_token_id": VOCO_ID}


def ids_of(letters: str) -> torch.Tensor:
    """Token ids of letters: v vision, c VoCo, s image start, all others text."""
    known = {"v": IMAGE_ID, "c": VOCO_ID, "s": START_ID}
    return torch.tensor([[known.get(letter, 1) for letter in row] for row in letters.split()])


def same_content(x: VocoLayout, y: VocoLayout) -> bool:
    """Whether two layouts mean the same: equal up to the names of segments."""

    def names(layout):
        order = {}
        return [order.setdefault(s, len(order)) if s > 0 else s - 1 for s in layout.segment_ids.tolist()]

    return (
        names(x) == names(y)
        and all(torch.equal(getattr(x, name), getattr(y, name)) for name in ("public", "cu_seqlens", "position_ids"))
        and x.isolated == y.isolated
    )


def rejects(argument: str):
    return pytest.raises(ValueError, match=rf"^{re.escape(argument)}(\[\d+\])? must be .+, but was .+")


# ---- masks by hand -----------------------------------------------------------------------------------------------------

BY_HAND = {
    "text before and after": (
        lambda: VocoLayout.from_spans([[Text(2), Image(4, 2), Text(4)]], isolated=False),
        "ttvvvvcctttt",
        """
        #...........
        ##..........
        ###.........
        ####........
        #####.......
        ######......
        #######.....
        ########....
        ##....###...
        ##....####..
        ##....#####.
        ##....######
        """,
    ),
    "text before and after, isolated": (
        lambda: VocoLayout.from_spans([[Text(2), Image(4, 2), Text(4)]], isolated=True),
        "ttvvvvcctttt",
        """
        #...........
        ##..........
        ..#.........
        ..##........
        ..###.......
        ..####......
        ..#####.....
        ..######....
        ##....###...
        ##....####..
        ##....#####.
        ##....######
        """,
    ),
    "text between": (
        lambda: VocoLayout.from_spans([[Image(2, 1), Text(2), Image(3, 2), Text(2)]], isolated=False),
        "vvcttvvvcctt",
        """
        #...........
        ##..........
        ###.........
        ..##........
        ..###.......
        ..####......
        ..#####.....
        ..######....
        ..#######...
        ..########..
        ..###...###.
        ..###...####
        """,
    ),
    "text between, isolated": (
        lambda: VocoLayout.from_spans([[Image(2, 1), Text(2), Image(3, 2), Text(2)]], isolated=True),
        "vvcttvvvcctt",
        """
        #...........
        ##..........
        ###.........
        ..##........
        ..###.......
        .....#......
        .....##.....
        .....###....
        .....####...
        .....#####..
        ..###...###.
        ..###...####
        """,
    ),
    "two documents": (
        lambda: VocoLayout.from_spans(
            [[Text(1), Image(2, 1), Text(1)], [Image(2, 2), Text(3)]],
            isolated=False,
        ),
        "tvvctvvccttt",
        """
        #...........
        ##..........
        ###.........
        ####........
        #..##.......
        .....#......
        .....##.....
        .....###....
        .....####...
        .......###..
        .......####.
        .......#####
        """,
    ),
    "padding left and right": (
        lambda: VocoLayout.from_input_ids(
            ids_of("ptvvct vvctpp"),
            **IDS,
            isolated=False,
            attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
            keep_padding=True,
        ),
        "ptvvctvvctpp",
        """
        ............
        .#..........
        .##.........
        .###........
        .####.......
        .#..##......
        ......#.....
        ......##....
        ......###...
        ........##..
        ............
        ............
        """,
    ),
    "hide_prefix": (
        lambda: VocoLayout.from_input_ids(ids_of("ttvvcttvvctt"), **IDS, isolated=False, hide_prefix=True),
        "vvvvcttvvctt",
        """
        #...........
        ##..........
        ###.........
        ####........
        #####.......
        ....##......
        ....###.....
        ....####....
        ....#####...
        ....######..
        ....###..##.
        ....###..###
        """,
    ),
    "image_start_id, isolated": (
        lambda: VocoLayout.from_input_ids(ids_of("svvctsvvcttt"), **IDS, isolated=True, image_start_id=START_ID),
        "vvvctvvvcttt",
        """
        #...........
        ##..........
        ###.........
        ####........
        ...##.......
        .....#......
        .....##.....
        .....###....
        .....####...
        ...##...##..
        ...##...###.
        ...##...####
        """,
    ),
    "open image": (
        lambda: VocoLayout.from_input_ids(ids_of("tvvvtvvccttt"), **IDS, isolated=False),
        "tttttvvccttt",
        """
        #...........
        ##..........
        ###.........
        ####........
        #####.......
        ######......
        #######.....
        ########....
        #########...
        #####..###..
        #####..####.
        #####..#####
        """,
    ),
    "newline between image and VoCo tokens": (
        lambda: VocoLayout.from_input_ids(ids_of("vvncttvvnctt"), **IDS, isolated=False),
        "vvvcttvvvctt",
        """
        #...........
        ##..........
        ###.........
        ####........
        ...##.......
        ...###......
        ...####.....
        ...#####....
        ...######...
        ...#######..
        ...###...##.
        ...###...###
        """,
    ),
    "public tokens anywhere in a segment": (
        lambda: Pack([4] * 5 + [0] + [2] * 4 + [0] * 2, [c != "v" for c in "vcvcctcvvctt"], [0, 12]).layout(False),
        "vcvcctcvvctt",
        """
        #...........
        ##..........
        ###.........
        ####........
        #####.......
        .#.###......
        .#.####.....
        .#.#####....
        .#.######...
        .#.#######..
        .#.####..##.
        .#.####..###
        """,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_mask_by_hand(name):
    make, letters, picture = BY_HAND[name]
    layout = make()
    drawn = np.array([[cell == "#" for cell in row] for row in picture.split()])
    assert drawn.shape == (12, 12)
    assert kinds_of(layout).tolist() == [LETTERS[letter] for letter in letters]
    np.testing.assert_array_equal(mask_of_layout(layout), drawn, "the rule")
    np.testing.assert_array_equal(layout.dense_mask().numpy(), drawn, "dense_mask")


@given(documents(), st.booleans())
def test_spans_mean_what_they_say_and_the_mask_is_the_rule(docs, isolated):
    layout, pack = VocoLayout.from_spans(docs, isolated=isolated), expand(docs)
    assert same_content(layout, pack.layout(isolated))
    assert (layout.segment_ids.tolist(), layout.public.tolist()) == (pack.segment, pack.public)
    assert layout.cu_seqlens.tolist() == pack.cu_seqlens
    assert (layout.num_tokens, layout.num_documents) == (len(pack.segment), len(docs))
    rule = mask_of(pack.segment, np.array(pack.public, bool), documents_of(pack.cu_seqlens), isolated)
    np.testing.assert_array_equal(layout.dense_mask().numpy(), rule)


@given(packs(), st.booleans())
def test_the_mask_of_ids_is_the_rule(pack, isolated):
    layout = pack.layout(isolated)
    segment, public = opened(pack.segment, pack.public)
    assert (layout.segment_ids.tolist(), layout.public.tolist()) == (segment, public)
    rule = mask_of(segment, np.array(public, bool), documents_of(pack.cu_seqlens), isolated)
    np.testing.assert_array_equal(layout.dense_mask().numpy(), rule)


# ---- one content, three constructors -----------------------------------------------------------------------------------


@given(ordinary_documents(), st.booleans(), st.sampled_from(["continuous", "compact"]), st.booleans())
def test_spans_and_input_ids_agree(docs, isolated, positions, pad_left):
    want = VocoLayout.from_spans(docs, isolated=isolated, positions=positions)
    options = {**IDS, "isolated": isolated, "positions": positions}
    ids = [token_ids(document) for document in docs]
    packed = torch.tensor([[i for document in ids for i in document]], dtype=torch.int64)
    for dtype in (torch.int32, torch.int64):
        got = VocoLayout.from_input_ids(packed.to(dtype), cu_seqlens=want.cu_seqlens.to(dtype), **options)
        assert same_content(got, want)

    width = max(map(len, ids), default=0) + 1
    rows, mask = torch.full((len(ids), width), IMAGE_ID), torch.zeros(len(ids), width, dtype=torch.int64)
    for b, row in enumerate(ids):
        where = slice(width - len(row), width) if pad_left else slice(0, len(row))
        rows[b, where], mask[b, where] = torch.tensor(row, dtype=torch.int64), 1
    assert same_content(VocoLayout.from_input_ids(rows, attention_mask=mask, **options), want)
    padded = VocoLayout.from_input_ids(rows, attention_mask=mask.bool(), keep_padding=True, **options)
    kept = mask.reshape(-1).bool()
    assert padded.cu_seqlens.tolist() == [b * width for b in range(len(ids) + 1)]
    assert (padded.segment_ids[~kept] == -1).all()
    assert not padded.public[~kept].any() and not padded.position_ids[~kept].any()
    unpadded = VocoLayout(
        padded.segment_ids[kept], padded.public[kept], want.cu_seqlens, padded.position_ids[kept], isolated
    )
    assert same_content(unpadded, want)


@given(id_rows(), st.booleans(), st.booleans(), st.booleans())
def test_input_ids_in_any_order(rows, hide_prefix, with_start, keep_padding):
    start = START_ID if with_start else None
    ids, mask = rows.tensors()
    layout = VocoLayout.from_input_ids(
        ids,
        **IDS,
        isolated=False,
        attention_mask=mask,
        hide_prefix=hide_prefix,
        image_start_id=start,
        keep_padding=keep_padding,
    )
    want, name = [], 0
    for row in rows.rows:
        kinds = [OPEN] * len(row)
        names = [0] * len(row)
        for begin, end in scan(row, IMAGE_ID, VOCO_ID, start, hide_prefix):
            name += 1
            for i in range(begin, end):
                kinds[i], names[i] = (VOCO if row[i] == VOCO_ID else PRIVATE), name
        padding = [(PADDING, -1)] * (rows.width - len(row) if keep_padding else 0)
        tokens = list(zip(kinds, names))
        want += padding + tokens if rows.pad_left else tokens + padding
    assert list(zip(kinds_of(layout).tolist(), layout.segment_ids.tolist())) == want
    lengths = [rows.width if keep_padding else len(row) for row in rows.rows]
    assert layout.cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]


def test_padding_is_dropped_unless_it_is_kept():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    layout = VocoLayout.from_input_ids(ids_of("vvtvvc vvcvvv"), **IDS, isolated=True, attention_mask=mask)
    assert layout.segment_ids.tolist() == [0, 1, 1, 1, 2, 2, 2]
    assert layout.cu_seqlens.tolist() == [0, 4, 7]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]


@pytest.mark.parametrize("image", [-1, -200])
def test_negative_ids_may_mark_images(image):
    """Ids of -1 were once taken for padding, and a hidden prefix began behind them."""
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    ids = torch.tensor([[1, image, image, VOCO_ID, 1]])
    layout = VocoLayout.from_input_ids(
        ids, image_token_id=image, voco_token_id=VOCO_ID, isolated=True, attention_mask=mask, hide_prefix=True
    )
    assert layout.segment_ids.tolist() == [1, 1, 1, 0]
    assert layout.public.tolist() == [False, False, True, True]


def test_hide_prefix_starts_behind_left_padding():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    layout = VocoLayout.from_input_ids(
        ids_of("vttvct"), **IDS, isolated=True, attention_mask=mask, hide_prefix=True, keep_padding=True
    )
    assert layout.segment_ids.tolist() == [-1, 1, 1, 1, 1, 0]
    assert layout.public.tolist() == [False, False, False, False, True, True]


# ---- positions ---------------------------------------------------------------------------------------------------------


def test_positions_by_hand():
    docs = [[Text(2), Image(4, 2), Text(1), Image(3, 1), Text(2)], [], [Text(2)]]
    layout = VocoLayout.from_spans(docs, isolated=False)
    assert layout.position_ids.tolist() == [*range(15), 0, 1]
    layout = VocoLayout.from_spans(docs, isolated=False, positions="compact")
    # The longest private run has 4 tokens, so public tokens count on from 4: text 4 5, VoCo 6 7, text 8, VoCo 9, ...
    assert layout.position_ids.tolist() == [4, 5, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 9, 10, 11, 0, 1]


@given(packs())
def test_positions_follow_their_formulas(pack):
    segment, public = opened(pack.segment, pack.public)
    document = documents_of(pack.cu_seqlens).tolist()
    assert pack.layout(True).position_ids.tolist() == continuous_positions(segment, document)
    compact = compact_positions(segment, public, document)
    if compact is None:
        with rejects("positions"):
            pack.layout(True, positions="compact")
    else:
        assert pack.layout(True, positions="compact").position_ids.tolist() == compact


@given(documents())
def test_compact_positions_of_spans(docs):
    pack = expand(docs)
    layout = VocoLayout.from_spans(docs, isolated=False, positions="compact")
    assert layout.position_ids.tolist() == compact_positions(*pack[:2], documents_of(pack.cu_seqlens).tolist())


def test_compact_is_refused_where_public_tokens_stand_between_private_ones():
    pack = Pack([0, 5, 5, 5, 5], [True, False, True, False, True], [0, 5])
    with pytest.raises(ValueError, match=r"^positions must be 'continuous' .* \(segment 5, token 3\)"):
        pack.layout(False, positions="compact")
    # Public tokens before all private ones are allowed: the private ones stand before the first of them.
    pack = Pack([0, 5, 5, 5, 5], [True, True, False, False, True], [0, 5])
    assert pack.layout(False, positions="compact").position_ids.tolist() == [2, 3, 1, 2, 4]


def test_positions_may_be_given():
    pack = Pack([0, 0, 0], [True] * 3, [0, 3])
    layout = pack.layout(True, position_ids=torch.tensor([5, -2, 9], dtype=torch.int32))
    assert layout.position_ids.tolist() == [5, -2, 9]
    assert layout.position_ids.dtype == torch.int64


# ---- sizes of nothing, types and devices -------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["continuous", "compact"])
@pytest.mark.parametrize("docs", [[], [[]], [[], [], []], [[Text(0)]], [[Image(0, 0)], []]])
def test_no_tokens(docs, positions):
    layout = VocoLayout.from_spans(docs, isolated=False, positions=positions)
    assert (layout.num_tokens, layout.num_documents) == (0, len(docs))
    assert layout.dense_mask().shape == (0, 0)
    assert layout.position_ids.tolist() == []


@pytest.mark.parametrize("keep_padding", [False, True])
@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0)])
def test_no_input_ids(shape, keep_padding):
    ids = torch.zeros(shape, dtype=torch.int64)
    options = {**IDS, "isolated": True, "keep_padding": keep_padding, "hide_prefix": True}
    for mask in (None, torch.ones(shape)):
        layout = VocoLayout.from_input_ids(ids, attention_mask=mask, **options)
        assert (layout.num_tokens, layout.num_documents) == (0, shape[0])


def test_a_batch_of_padding_alone():
    mask = torch.zeros(2, 3)
    ids = ids_of("vvc vvc")
    layout = VocoLayout.from_input_ids(ids, **IDS, isolated=False, attention_mask=mask, keep_padding=True)
    assert layout.segment_ids.tolist() == [-1] * 6 and not layout.dense_mask().any()
    assert VocoLayout.from_input_ids(ids, **IDS, isolated=False, attention_mask=mask).cu_seqlens.tolist() == [0, 0, 0]


def test_dtypes_of_the_tensors():
    layout = VocoLayout.from_ids(
        torch.tensor([3, 3, 0]), torch.tensor([False, True, True]), torch.tensor([0, 3]), isolated=True
    )
    assert layout.segment_ids.dtype == layout.cu_seqlens.dtype == torch.int32
    assert layout.public.dtype == torch.bool and layout.position_ids.dtype == torch.int64


def test_to_another_device():
    layout = VocoLayout.from_spans([[Image(3, 1), Text(2)]], isolated=True)
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.device.type == "meta" and moved.num_tokens == 6 and moved.isolated is True
    assert {getattr(moved, x).device.type for x in ("public", "cu_seqlens", "position_ids")} == {"meta"}


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "options", "argument"),
    [
        ([[Text(-1)]], {}, "documents"),
        ([[Text(2)], [Image(2, -1)]], {}, "documents"),
        ([[Image(1.0, 1)]], {}, "documents"),
        ([[Text(True)]], {}, "documents"),
        ([[(3, 1)]], {}, "documents"),
        ([[Text(2)]], {"positions": "sparse"}, "positions"),
        ([[Text(2)]], {"isolated": 1}, "isolated"),
    ],
)
def test_bad_spans(documents, options, argument):
    with rejects(argument):
        VocoLayout.from_spans(documents, **{"isolated": True, **options})


def ids_arguments(**changes):
    good = {
        "segment_ids": torch.tensor([0, 1, 1, 1, 0, 2, 2, -1]),
        "public": torch.tensor([True, False, False, True, True, False, True, False]),
        "cu_seqlens": torch.tensor([0, 5, 8]),
        "isolated": False,
    }
    assert set(changes) <= {*good, "position_ids", "positions"}
    return good | changes


BAD_IDS = {
    "ids are a list": ({"segment_ids": [0, 1]}, "segment_ids"),
    "ids are float": ({"segment_ids": torch.zeros(8)}, "segment_ids"),
    "ids are 2-D": ({"segment_ids": torch.zeros(1, 8, dtype=torch.int64)}, "segment_ids"),
    "ids below -1": ({"segment_ids": torch.tensor([0, 1, 1, 1, 0, 2, 2, -2])}, "segment_ids"),
    "ids not contiguous": ({"segment_ids": torch.tensor([0, 1, 1, 1, 0, 1, 1, -1])}, "segment_ids"),
    "ids across documents": ({"cu_seqlens": torch.tensor([0, 3, 8])}, "segment_ids"),
    "public is int": ({"public": torch.ones(8, dtype=torch.int64)}, "public"),
    "public is short": ({"public": torch.ones(7, dtype=torch.bool)}, "public"),
    "public is a list": ({"public": [True] * 8}, "public"),
    "public on another device": ({"public": torch.ones(8, dtype=torch.bool, device="meta")}, "public"),
    "private text": ({"public": torch.tensor([True, False, False, True, False, False, True, False])}, "public"),
    "public padding": ({"public": torch.tensor([True, False, False, True, True, False, True, True])}, "public"),
    "cu_seqlens is float": ({"cu_seqlens": torch.tensor([0.0, 5.0, 8.0])}, "cu_seqlens"),
    "cu_seqlens is 2-D": ({"cu_seqlens": torch.tensor([[0, 5, 8]])}, "cu_seqlens"),
    "cu_seqlens is empty": ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, "cu_seqlens"),
    "cu_seqlens starts late": ({"cu_seqlens": torch.tensor([1, 5, 8])}, "cu_seqlens"),
    "cu_seqlens decreases": ({"cu_seqlens": torch.tensor([0, 6, 5, 8])}, "cu_seqlens"),
    "cu_seqlens ends early": ({"cu_seqlens": torch.tensor([0, 5, 7])}, "cu_seqlens"),
    "cu_seqlens ends late": ({"cu_seqlens": torch.tensor([0, 5, 9])}, "cu_seqlens"),
    "cu_seqlens on another device": ({"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")}, "cu_seqlens"),
    "isolated is None": ({"isolated": None}, "isolated"),
    "unknown positions": ({"positions": None}, "positions"),
    "position_ids are float": ({"position_ids": torch.zeros(8)}, "position_ids"),
    "position_ids are short": ({"position_ids": torch.zeros(7, dtype=torch.int64)}, "position_ids"),
}


@pytest.mark.parametrize("name", BAD_IDS)
def test_bad_ids(name):
    VocoLayout.from_ids(**ids_arguments())
    changes, argument = BAD_IDS[name]
    with rejects(argument):
        VocoLayout.from_ids(**ids_arguments(**changes))


def test_bad_ids_are_located():
    with pytest.raises(ValueError, match=r"id 1 in documents 0 and 1 \(runs at tokens 1 and 3"):
        VocoLayout.from_ids(**ids_arguments(cu_seqlens=torch.tensor([0, 3, 8])))
    with pytest.raises(ValueError, match=r"id 1 twice in document 0 \(runs at tokens 0 and 3"):
        VocoLayout.from_ids(
            **ids_arguments(
                segment_ids=torch.tensor([1, 1, 0, 1, 1, 2, 2, -1]),
                public=torch.tensor([False, True, True, False, True, False, True, False]),
            )
        )
    with pytest.raises(ValueError, match="False at token 4"):
        VocoLayout.from_ids(**ids_arguments(public=torch.tensor([1, 0, 0, 1, 0, 0, 1, 0]).bool()))


ROW = torch.tensor([[IMAGE_ID, IMAGE_ID, VOCO_ID, 1, 1]])
BAD_INPUT_IDS = {
    "ids are a list": ({"input_ids": [[1, 2]]}, "input_ids"),
    "ids are float": ({"input_ids": ROW.float()}, "input_ids"),
    "ids are 1-D": ({"input_ids": ROW[0]}, "input_ids"),
    "equal ids": ({"voco_token_id": IMAGE_ID}, "voco_token_id"),
    "images start with a VoCo token": ({"image_start_id": VOCO_ID}, "image_start_id"),
    "images start with an image token": ({"image_start_id": IMAGE_ID}, "image_start_id"),
    "mask of another shape": ({"attention_mask": torch.ones(1, 4)}, "attention_mask"),
    "mask is a list": ({"attention_mask": [[1] * 5]}, "attention_mask"),
    "mask and cu_seqlens": ({"attention_mask": torch.ones(1, 5), "cu_seqlens": torch.tensor([0, 5])}, "attention_mask"),
    "cu_seqlens for a batch": ({"input_ids": ROW.repeat(2, 1), "cu_seqlens": torch.tensor([0, 5])}, "input_ids"),
    "cu_seqlens is a list": ({"cu_seqlens": [0, 5]}, "cu_seqlens"),
    "cu_seqlens is float": ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens"),
    "cu_seqlens is a number": ({"cu_seqlens": torch.tensor(5)}, "cu_seqlens"),
    "cu_seqlens is 2-D": ({"cu_seqlens": torch.tensor([[0, 5]])}, "cu_seqlens"),
    "cu_seqlens ends early": ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens"),
    "cu_seqlens ends late": ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens"),
    "cu_seqlens ends where int32 wraps": ({"cu_seqlens": torch.tensor([0, 2**32 + 5])}, "cu_seqlens"),
    "cu_seqlens starts late": ({"cu_seqlens": torch.tensor([3, 5])}, "cu_seqlens"),
    "cu_seqlens decreases": ({"cu_seqlens": torch.tensor([0, 4, 3, 5])}, "cu_seqlens"),
    "isolated is None": ({"isolated": None}, "isolated"),
    "unknown positions": ({"positions": "dense"}, "positions"),
}


@pytest.mark.parametrize("name", BAD_INPUT_IDS)
def test_bad_input_ids(name):
    good = {"input_ids": ROW, **IDS, "isolated": True}
    VocoLayout.from_input_ids(**good)
    changes, argument = BAD_INPUT_IDS[name]
    with rejects(argument):
        VocoLayout.from_input_ids(**(good | changes))


def test_isolated_is_required():
    with pytest.raises(TypeError, match="isolated"):
        VocoLayout.from_spans([[Text(1)]])
