"""The mask of a layout as others want it, and what is made once per batch: what is right passes, what is wrong is found."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from reference import mask_of_layout
from test_attention_peers import CPU, SHAPES, TINY, settings_of_the_compiler, uncompiled  # noqa: F401 (a fixture)
from torch.nn.attention.flex_attention import create_block_mask
from voco_llama.bench import measure
from voco_llama.bench.clock import Clock

import voco_kernels.backends.torch as torch_backend
from bench import test_attention, test_plan
from bench.attention_masks import MaskRule, PaddedMask, block_masks, key_intervals
from bench.attention_problem import unplanned
from bench.shapes import AttentionShape
from voco_kernels import Image, Text, VocoLayout
from voco_kernels.backends import flash
from voco_kernels.backends.triton.launch import GEOMETRY
from voco_kernels.tiles import build_tiles

# ---- masks -------------------------------------------------------------------------------------------------------------

# A segment that begins with a public token, one document without text and one that is empty.
GIST = VocoLayout.from_ids(
    torch.tensor([0, 0, 1, 1, 1, 0, 2, 2, 2, 3, 3, 0, 0]),
    torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool),
    torch.tensor([0, 6, 9, 9, 13]),
    isolated=False,
)
LAYOUTS = {name: shape.layout() for name, shape in TINY.items()} | {
    "gist": GIST,
    "gist, isolated": VocoLayout(GIST.segment_ids, GIST.public, GIST.cu_seqlens, GIST.position_ids, True),
}
MASKS = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@MASKS
def test_the_rule_for_pairs(layout):
    token = torch.arange(layout.num_tokens)
    visible = MaskRule.of(layout).mask_mod()(0, 0, token[:, None], token[None])
    assert torch.equal(visible, torch.from_numpy(mask_of_layout(layout)))


@MASKS
def test_key_intervals(layout):
    bounds, token = key_intervals(layout), torch.arange(layout.num_tokens)[:, None]
    assert bounds.dtype == torch.int32 and bounds.shape[0] == 1 and bounds.shape[1] % 2 and bounds.is_contiguous()
    bounds = bounds[0].long()
    assert (bounds.diff(dim=0) >= 0).all() and bounds.min() >= 0 and bounds.max() <= layout.num_tokens
    visible = token < bounds[0]
    for begin, end in zip(bounds[1::2], bounds[2::2], strict=True):
        visible |= (token >= begin) & (token < end)
    assert torch.equal(visible.T, torch.from_numpy(mask_of_layout(layout)))


@MASKS
def test_the_mask_of_a_padded_batch(layout):
    added, reference = PaddedMask(layout).build(), torch.from_numpy(mask_of_layout(layout))
    mask = added == 0
    assert added.dtype == torch.float32 and (mask | (added == -torch.inf)).all()
    for row, begin, end in zip(mask[:, 0], layout.cu_seqlens[:-1], layout.cu_seqlens[1:], strict=True):
        n = end - begin
        assert torch.equal(row[:n, :n], reference[begin:end, begin:end])
        assert not row[:n, n:].any() and torch.equal(row[n:], torch.eye(len(row), dtype=torch.bool)[n:])


@pytest.mark.parametrize("block", [64, (256, 128)])
def test_blocks_are_as_large_as_they_are_asked_for(block):
    build = block_masks(TINY["video"].layout(), create_block_mask)
    size, default = build(block).BLOCK_SIZE, build().BLOCK_SIZE
    assert size == (block if isinstance(block, tuple) else (block, block)) and default == (128, 128)


def test_an_unplanned_layout_gets_a_plan_of_its_own():
    layout = TINY["video"].layout()
    plan, other = flash._split_of(layout), unplanned(layout)
    assert flash._split_of(layout) is plan and flash._split_of(other) is not plan
    assert other.segment_ids.data_ptr() == layout.segment_ids.data_ptr()


# ---- what is made once per batch ---------------------------------------------------------------------------------------


@SHAPES
def test_what_is_made_once_per_batch(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", uncompiled)
    host = TINY[name].layout()
    candidates = [*test_plan._ours(TINY[name], host, host), *test_plan._others(host)]
    rows = {row.name: row for row in measure.compare(candidates, Clock(CPU), seconds=0)}
    lists = rows.pop(test_plan.LISTS).status
    assert lists == "ok" if name in ("sft", "video") else lists.startswith("not run: layout must ")
    assert {row.status for row in rows.values()} == {"ok"}, {row.name: row.status for row in rows.values()}
    assert list(rows)[:3] == [test_plan.BLOCKS, test_plan.PLAN_CPU, test_plan.LAYOUT]


LONG = AttentionShape("long", "", ((*[Image(126, 2)] * 4, Text(40)),), True)


def test_comparisons_of_the_suites(monkeypatch):
    """Plans have no x: shapes of as many tokens would be one."""
    calls = []

    def measure(*said, **options):
        calls.append((said[:2], options))

    test_plan.test_plan(measure, CPU, TINY["sft"])
    test_attention.test_attention(measure, CPU, TINY["sft"], True)
    (plan, options), (attention, others) = calls
    assert plan == (test_plan.PLAN, "sft") and options.get("x") is None
    assert attention == ("forward + backward", "sft") and others["dtype"] == torch.float32
    assert (others["work"].flops, others["work"].moved_bytes) == (
        TINY["sft"].flops(backward=True), TINY["sft"].moved_bytes(torch.float32, backward=True),
    )  # fmt: skip


@SHAPES
def test_pairs_counted_by_spans(name):
    assert test_plan.pairs_of(TINY[name]) == mask_of_layout(TINY[name].layout()).sum()


def test_wrong_plans_are_found():
    host, long = TINY["sft"].layout(), LONG.layout()
    causal = create_block_mask(lambda b, h, row, key: key <= row, None, None, *[long.num_tokens] * 2, device=CPU)
    tiles, blind = build_tiles(host, GEOMETRY), build_tiles(replace(host, isolated=False), GEOMETRY)
    for check, made, layout, reason in (
        (test_plan.check_rows, replace(tiles, row_tiles=tiles.row_tiles[1:]), TINY["sft"], "some rows are missing"),
        (test_plan.check_rows, replace(tiles, key_tiles=tiles.key_tiles[1:]), TINY["sft"], "some rows are missing"),
        (test_plan.check_rows, blind, replace(TINY["sft"], documents=TINY["video"].documents), "some rows are missing"),
        (test_plan.check_rows, build_tiles(TINY["chat"].layout(), GEOMETRY), TINY["turns"], "pairs, not"),
        (test_plan.check_blocks, torch_backend._build_blocks(host)[:-1], host, "some rows are missing"),
        (test_plan.check_lists, replace(split := flash._build_split(host), calls=split.calls * 2), host, "more than once"),
        (test_plan.check_layout, replace(host, public=~host.public), host, "public differs"),
        (test_plan.check_dense, PaddedMask(host).build().tril(), host, "pairs, not"),
        (test_plan.check_flex, block_masks(long, create_block_mask)(), long, None),
        (test_plan.check_flex, causal, long, "other blocks"),
    ):
        with pytest.raises(AssertionError, match=reason) if reason else nullcontext():
            check(made, layout)
