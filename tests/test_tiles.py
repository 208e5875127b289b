"""The plan of tiles: it covers every visible pair once, wastes little, starts with what is heavy, and travels."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import mask_of_layout
from strategies import attention_layouts, documents, packs

from voco_kernels import Image, Text, VocoLayout
from voco_kernels.tiles import Geometry, build_tiles, executed_pairs, tile_plan, useful_pairs

GEOMETRY = Geometry()
SMALL = Geometry(rows=8, small_rows=2, keys=4)  # so that short runs have inner edges
EQUAL = Geometry(rows=8, small_rows=0, keys=8)
LISTS = ("row_index", "key_index", "reader_index", "late_index", "after")

layouts = st.booleans().flatmap(
    lambda isolated: attention_layouts(isolated)
    | packs().map(lambda pack: pack.layout(isolated))
    | documents().map(lambda docs: VocoLayout.from_spans(docs, isolated=isolated))
)


def pairs_of_row_tiles(plan, n) -> np.ndarray:
    """[N, N]: how often each (query, key) pair is computed and not masked, tile by tile as a kernel reads the table."""
    times = np.zeros((n, n), int)
    rows_of, keys_of = plan.row_index.numpy(), plan.key_index.numpy()
    for begin, count, *ranges in plan.row_tiles.tolist():
        assert 0 < count <= plan.geometry.rows
        for row in rows_of[begin : begin + count]:
            for (first, full, end), tokens in ((ranges[:3], keys_of), (ranges[3:], np.arange(n))):
                assert 0 <= first <= full <= end <= n
                times[row, tokens[first:full]] += 1
                edge = tokens[full:end]
                times[row, edge[edge <= row]] += 1
    return times


def pairs_of_key_tiles(plan, n) -> np.ndarray:
    """The same for the key tiles."""
    times = np.zeros((n, n), int)
    key_index, readers, late, after = (getattr(plan, f"{name}").numpy() for name in ("key_index", *LISTS[2:]))
    for begin, count, *ranges in plan.key_tiles.tolist():
        assert 0 < count <= plan.geometry.keys
        (own_begin, own_full, own_end), (late_begin, late_end) = ranges[:3], ranges[3:5]
        reader_begin, reader_full, reader_end = ranges[5:]
        for key in key_index[begin : begin + count]:
            own = np.arange(own_begin, own_end)
            assert (own[own >= own_full] >= key).all()
            times[own[own >= key], key] += 1
            rows = late[late_begin:late_end]
            times[rows[(rows >= key) & (rows < after[key])], key] += 1
            rows = readers[reader_begin:reader_end]
            assert (readers[reader_full:reader_end] >= after[key]).all() and reader_begin <= reader_full <= reader_end
            times[rows[rows >= after[key]], key] += 1
    return times


@pytest.mark.parametrize("geometry", [SMALL, EQUAL, GEOMETRY], ids=["small", "equal", "shipped"])
@given(layout=layouts)
def test_every_visible_pair_is_computed_once(geometry, layout):
    plan, n, mask = build_tiles(layout, geometry), layout.num_tokens, mask_of_layout(layout)
    np.testing.assert_array_equal(pairs_of_row_tiles(plan, n), mask)
    np.testing.assert_array_equal(pairs_of_key_tiles(plan, n), mask)
    assert useful_pairs(layout) == mask.sum()


@pytest.mark.parametrize("geometry", [SMALL, EQUAL, GEOMETRY], ids=["small", "equal", "shipped"])
@given(layout=layouts)
def test_every_row_and_every_key_is_written_once(geometry, layout):
    plan, n = build_tiles(layout, geometry), layout.num_tokens
    for tiles, index in ((plan.row_tiles, plan.row_index), (plan.key_tiles, plan.key_index)):
        slots = [slot for begin, count, *_ in tiles.tolist() for slot in range(begin, begin + count)]
        assert sorted(slots) == sorted(index.tolist()) == list(range(n))


def test_without_small_tiles_the_rest_of_a_run_comes_first():
    """Where a row sees least: rows 0 to 2 see three keys, the last 8 all 19."""
    plan = build_tiles(VocoLayout.from_spans([[Image(17, 2), Text(16)]], isolated=True), EQUAL)
    assert plan.row_tiles[:, :2].tolist() == [[27, 8], [19, 8], [11, 8], [3, 8], [0, 3]]
    assert plan.row_tiles[2:, 7].tolist() == [19, 11, 3]


@given(layout=layouts)
def test_tiles_stay_inside_runs_and_tails_are_small(layout):
    plan = build_tiles(layout, SMALL)
    document = np.repeat(np.arange(layout.num_documents), np.diff(layout.cu_seqlens))
    segment = layout.segment_ids.numpy()
    for begin, count, *_ in plan.row_tiles.tolist():
        rows = plan.row_index[begin : begin + count].numpy()
        if segment[rows[0]] >= 0:
            assert len(set(segment[rows])) == 1 and len(set(document[rows])) == 1
    # A rest of at most two small tiles is cut into those.
    assert {int(count) for count in plan.row_tiles[:, 1]} <= {1, 2, 5, 6, 7, 8}


@given(layout=layouts)
def test_types(layout):
    plan = build_tiles(layout, SMALL)
    assert plan.counted
    for field in dataclasses.fields(plan)[2:]:
        tensor = getattr(plan, field.name)
        assert tensor.dtype == torch.int32 and tensor.is_contiguous(), field.name
    assert all(getattr(plan, name).shape == (layout.num_tokens,) for name in LISTS)


def test_heavy_runs_come_first_and_in_them_heavy_tiles():
    layout = VocoLayout.from_spans(
        [[Image(30, 2), Text(4)], [Image(900, 4), Text(300)], [Image(30, 2), Text(600)]], isolated=True
    )
    plan = build_tiles(layout, GEOMETRY)
    steps = (plan.row_tiles[:, 4] - plan.row_tiles[:, 2] + plan.row_tiles[:, 7] - plan.row_tiles[:, 5]).tolist()
    runs = [[904, 896, 832, 768, 704, 640, 576, 512, 448, 384, 320, 256, 192, 128, 64], [602, 578, 514, 450, 386, 322]]
    assert [s for s in steps if s in runs[0]][:15] == runs[0]
    assert steps[0] == 904 and steps[-1] < 40
    ends = (plan.key_tiles[:, 4] - plan.key_tiles[:, 2]).tolist()
    assert ends[0] == 904 and ends[:14] == sorted(ends[:14], reverse=True)


# ---- efficiency --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vision", "voco", "least"), [(144, 4, 0.58), (256, 2, 0.72), (576, 2, 0.85), (2880, 8, 0.96)], ids=str
)
def test_efficiency_of_segments(vision, voco, least):
    layout = VocoLayout.from_spans([[Image(vision, voco)] * 4], isolated=True)
    assert least <= layout.tile_efficiency(head_dim=128) <= 1
    for which in ("dq", "dkv"):
        assert 0.4 < layout.tile_efficiency(128, which=which) <= 1


def test_text_over_many_frames_walks_full_tiles():
    layout = VocoLayout.from_spans([[*[Image(256, 2)] * 256, Text(512)]], isolated=True)
    plan = build_tiles(layout, GEOMETRY)
    text = plan.row_tiles[plan.row_tiles[:, 0] >= 256 * 258]
    assert len(text) == 512 // 64
    begin, full, end = text[:, 2], text[:, 3], text[:, 4]
    # The VoCo tokens of 256 frames are 4 tiles of 128 keys; behind them only the text's own triangle.
    assert (full - begin).tolist() == [512 + 64 * i + 1 for i in reversed(range(8))]
    assert (end - begin).tolist() == [512 + 64 * (i + 1) for i in reversed(range(8))]


def executed_by_counting(plan, which, full_step, edge_step) -> int:
    """Step by step, as the kernels' loops run."""

    def full_then_edge(begin, full, end):
        at = begin
        while at + full_step <= full:
            at += full_step
        while at < end:
            at += edge_step
        return at - begin

    def edge_then_full(begin, full, end):
        at = begin
        while at < min(full, end):
            at += edge_step
        while at < end:
            at += full_step
        return at - begin

    total = 0
    if which == "dkv":
        for _, _, *r in plan.key_tiles.tolist():
            steps = edge_then_full(*r[:3]) + edge_then_full(r[3], r[4], r[4]) + edge_then_full(*r[5:])
            total += plan.geometry.keys * steps
        return total
    for _, count, *r in plan.row_tiles.tolist():
        rows = plan.geometry.small_rows if count <= plan.geometry.small_rows else plan.geometry.rows
        total += rows * (full_then_edge(*r[:3]) + full_then_edge(*r[3:]))
    return total


@pytest.mark.parametrize("steps", [(4, 4), (8, 2), (6, 3)], ids=str)
@pytest.mark.parametrize("which", ["forward", "dq", "dkv"])
@given(layout=layouts)
def test_executed_pairs(which, steps, layout):
    plan = build_tiles(layout, SMALL)
    assert executed_pairs(plan, which, *steps) == executed_by_counting(plan, which, *steps) >= useful_pairs(layout)


def test_efficiency_of_nothing():
    assert VocoLayout.from_spans([], isolated=True).tile_efficiency() == 1.0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"backend": "torch"}, "backend"),
        ({"backend": "fast"}, "backend"),
        ({"head_dim": 16}, "head_dim"),
        ({"head_dim": 257}, "head_dim"),
        ({"which": "backward"}, "which"),
    ],
)
def test_what_efficiency_refuses(arguments, name):
    with pytest.raises(ValueError, match=rf"^{name} must be .+, but was .+"):
        VocoLayout.from_spans([[Text(3)]], isolated=True).tile_efficiency(**arguments)


# ---- where plans are kept ----------------------------------------------------------------------------------------------

LAYOUT = VocoLayout.from_spans([[Image(20, 2), Text(9)], [Text(3)]], isolated=True)


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)[2:])


def test_a_plan_is_made_once():
    layout = dataclasses.replace(LAYOUT)
    assert tile_plan(layout, GEOMETRY) is tile_plan(layout, GEOMETRY)
    assert tile_plan(layout, SMALL) is not tile_plan(layout, GEOMETRY)


def test_prepared_layouts_carry_their_plan():
    layout = dataclasses.replace(LAYOUT)
    assert layout.tiles is None and layout.prepare() is layout
    assert layout.tiles is tile_plan(layout, GEOMETRY)
    sent = pickle.loads(pickle.dumps(layout))
    assert same(sent.tiles, layout.tiles) and tile_plan(sent, GEOMETRY) is sent.tiles
    moved = sent.to("meta")
    assert moved.tiles.row_tiles.device.type == "meta" and tile_plan(moved, GEOMETRY) is moved.tiles
    assert layout.to("meta").tiles.counted


def test_a_layout_of_the_same_tensors_finds_the_plan():
    """As inside a compiled graph, where only the tensors arrive."""
    layout = dataclasses.replace(LAYOUT).prepare()
    again = VocoLayout(layout.segment_ids, layout.public, layout.cu_seqlens, layout.segment_ids, layout.isolated)
    assert again.tiles is None and tile_plan(again, GEOMETRY) is layout.tiles


def test_a_moved_plan_is_found_by_the_tensors_alone():
    moved = dataclasses.replace(LAYOUT).prepare().to("meta")
    again = VocoLayout(moved.segment_ids, moved.public, moved.cu_seqlens, moved.segment_ids, moved.isolated)
    assert tile_plan(again, GEOMETRY) is moved.tiles


def test_changed_tensors_get_a_new_plan():
    """Layouts must not be changed; whoever does it all the same gets no stale plan."""
    layout = dataclasses.replace(LAYOUT, public=LAYOUT.public.clone())
    before = tile_plan(layout, GEOMETRY)
    layout.public[3] = True
    assert not torch.equal(tile_plan(layout, GEOMETRY).key_tiles, before.key_tiles)


def test_torch_may_rebuild_a_layout():
    """FSDP and DDP with mixed precision take dataclasses among the arguments apart and put them together again."""
    from torch.distributed.utils import _apply_to_tensors

    layout = dataclasses.replace(LAYOUT).prepare()
    rebuilt = _apply_to_tensors(lambda x: x.clone(), {"voco_layout": layout})["voco_layout"]
    assert rebuilt.tiles is None and torch.equal(rebuilt.segment_ids, layout.segment_ids)


def test_pickled_plans_are_small():
    layout = VocoLayout.from_spans([[*[Image(256, 2)] * 16, Text(100)]], isolated=True).prepare()
    size = sum(getattr(layout.tiles, f.name).nbytes for f in dataclasses.fields(layout.tiles)[2:])
    assert len(pickle.dumps(layout.tiles)) < size + 4096


def test_what_a_graph_captures_is_not_kept(monkeypatch):
    """It has no values before the graph is replayed; what was made before may be used inside."""
    layout = dataclasses.replace(LAYOUT, segment_ids=LAYOUT.segment_ids.clone())
    monkeypatch.setattr("voco_kernels.plan._is_captured", lambda layout: True)
    assert tile_plan(layout, SMALL) is not tile_plan(layout, SMALL)
    monkeypatch.setattr("voco_kernels.plan._is_captured", lambda layout: False)
    kept = tile_plan(layout, SMALL)
    monkeypatch.setattr("voco_kernels.plan._is_captured", lambda layout: True)
    assert tile_plan(layout, SMALL) is kept


def test_another_layout_does_not_inherit_a_plan():
    layout = dataclasses.replace(LAYOUT).prepare()
    other = dataclasses.replace(layout, isolated=False)
    assert other.tiles is None
    assert same(tile_plan(other, GEOMETRY), build_tiles(other, GEOMETRY))
