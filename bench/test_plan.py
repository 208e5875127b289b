"""What is made once per batch: plans of ours, the layout itself, and what others need in their place."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.attention.flex_attention import create_block_mask
from voco_llama.bench.measure import OURS, Candidate

import voco_kernels.backends.torch as torch_backend
from bench.attention_masks import MaskRule, PaddedMask, block_masks
from bench.attention_peers import DENSE_MASK, FLEX_MASK, MOST_MASK_BYTES, SPLIT, compile_anew
from bench.attention_problem import shapes_of
from bench.conftest import SESSION
from bench.gpu_checks import check_tiles
from bench.gpu_table import PLAN, PLAN_CPU, PLAN_DEVICE
from bench.shapes import AttentionShape
from voco_kernels import Text, VocoLayout
from voco_kernels.backends import flash
from voco_kernels.backends.triton.launch import GEOMETRY
from voco_kernels.tiles import TilePlan, build_tiles, useful_pairs

BLOCKS, LAYOUT, LISTS = "blocks of the torch backend", "layout from token ids, on the CPU", f"lists of the {SPLIT}"
TEXT_ID, IMAGE_ID, VOCO_ID = 1, 2, 3


def pytest_generate_tests(metafunc):
    shapes = shapes_of(metafunc.config.stash[SESSION].device)
    metafunc.parametrize("shape", shapes.values(), ids=shapes)


def test_plan(measure, device, shape):
    host = shape.layout()
    layout = host.to(device)
    # Without an x: several shapes have as many tokens, and other plans.
    measure(PLAN, shape.name, lambda: [*_ours(shape, host, layout), *_others(layout)])


def _ours(shape: AttentionShape, host: VocoLayout, layout: VocoLayout) -> Iterator[Candidate]:
    """Nothing here is kept from call to call."""
    if layout.device.type == "cuda":
        # Only here is Triton needed.
        from voco_kernels.backends.triton.plan import build_tiles_on_gpu

        build = partial(build_tiles_on_gpu, layout, GEOMETRY)
        yield Candidate(PLAN_DEVICE, build, lambda x: check_tiles(x, build_tiles(host, GEOMETRY)), role=OURS)
    yield Candidate(BLOCKS, lambda: torch_backend._build_blocks(layout), lambda x: check_blocks(x, host), role=OURS)
    tiles = _on_host(layout, lambda: build_tiles(host, GEOMETRY))
    yield Candidate(PLAN_CPU, tiles, lambda x: check_rows(x, shape), role=OURS)
    ids, options = token_ids(shape), {"image_token_id": IMAGE_ID, "voco_token_id": VOCO_ID}

    def collate():
        return VocoLayout.from_input_ids(ids, cu_seqlens=host.cu_seqlens, isolated=host.isolated, **options)

    yield Candidate(LAYOUT, _on_host(layout, collate), lambda x: check_layout(x, host), role=OURS)


def _others(layout: VocoLayout) -> Iterator[Candidate]:
    mask, absent = PaddedMask(layout), None
    if mask.bytes > MOST_MASK_BYTES:
        absent = f"it would have {mask.bytes / 2**30:.1f} GiB"
    facts = {"mask_bytes": mask.bytes}
    yield Candidate(DENSE_MASK, mask.build, lambda x: check_dense(x, layout), absent=absent, facts=facts)
    compile_anew()
    makers = {"compiled": torch.compile(create_block_mask, dynamic=False)}
    if layout.device.type == "cpu":
        makers["not compiled"] = create_block_mask
    for name, create in makers.items():
        yield Candidate(f"{FLEX_MASK} ({name})", block_masks(layout, create), lambda x: check_flex(x, layout))
    refusal = flash._split_of(layout).refusal
    yield Candidate(LISTS, lambda: flash._build_split(layout), lambda x: check_lists(x, layout), absent=refusal)


def _on_host(layout: VocoLayout, run):
    """`run` for the clock of the layout's device: a GPU must be idle when the work begins, or its clock starts too late."""
    if layout.device.type != "cuda":
        return run

    def after_the_device():
        torch.cuda.synchronize(layout.device)
        return run()

    return after_the_device


def token_ids(shape: AttentionShape) -> torch.Tensor:
    """int64 [1, N]: what a tokenizer and a processor leave of the shape's documents."""
    ids = []
    for span in (span for document in shape.documents for span in document):
        ids += [TEXT_ID] * span.length if isinstance(span, Text) else [IMAGE_ID] * span.vision + [VOCO_ID] * span.voco
    return torch.tensor([ids])


# ---- checks ------------------------------------------------------------------------------------------------------------


def check_blocks(blocks, host: VocoLayout) -> None:
    """Every row is the result of one block."""
    _assert_all_once([block.target for block in blocks], host)


def check_rows(tiles: TilePlan, shape: AttentionShape) -> None:
    """Every row is in one tile, every key too, and rows see as many keys as the spans of the shape say."""
    for index, ranges in ((tiles.row_index, tiles.row_tiles), (tiles.key_index, tiles.key_tiles)):
        parts = [index[begin : begin + count].long() for begin, count, *_ in ranges.tolist()]
        _assert_all_once(parts, shape.layout())
    pairs, want = sum(_pairs_of_tile(tiles, tile) for tile in tiles.row_tiles.tolist()), pairs_of(shape)
    assert pairs == want, f"{pairs} pairs, not {want}"


def _pairs_of_tile(tiles: TilePlan, tile: list[int]) -> int:
    begin, count, public_begin, public_full, public_end, own_begin, own_full, own_end = tile
    rows = tiles.row_index[begin : begin + count, None]
    edge = torch.cat([tiles.key_index[public_full:public_end], torch.arange(own_full, own_end)])
    return count * (public_full - public_begin + own_full - own_begin) + int((edge <= rows).sum())


def pairs_of(shape: AttentionShape) -> int:
    """How many keys all rows see together, counted span by span."""
    pairs = 0
    for document in shape.documents:
        public = 0  # keys so far that are seen from outside their segment
        for span in document:
            text = isinstance(span, Text)
            length = span.length if text else span.vision + span.voco
            pairs += length * (length + 1) // 2 + (length * public if text or not shape.isolated else 0)
            public += length if text else span.voco
    return pairs


def check_lists(split, layout: VocoLayout) -> None:
    """Every row is in one call."""
    _assert_all_once([call.rows for call in split.calls], layout)


def _assert_all_once(parts: list[slice | torch.Tensor], layout: VocoLayout) -> None:
    token = torch.arange(layout.num_tokens, device=layout.device)
    rows = torch.cat([token[part.to(token.device) if isinstance(part, torch.Tensor) else part] for part in parts])
    assert torch.equal(rows.sort().values, token), "some rows are missing, or there more than once"


def check_layout(found: VocoLayout, host: VocoLayout) -> None:
    """Token ids say the same as the spans that they were written from."""
    for name in ("segment_ids", "public", "cu_seqlens", "position_ids"):
        assert torch.equal(getattr(found, name), getattr(host, name)), f"{name} differs from the shape's"


def check_dense(mask: torch.Tensor, layout: VocoLayout) -> None:
    """As many pairs as are visible are 0, but for rows of padding, which see themselves."""
    padding = mask.shape[0] * mask.shape[2] - layout.num_tokens
    pairs, want = int((mask == 0).sum()), useful_pairs(layout) + padding
    assert pairs == want, f"{pairs} pairs, not {want}"


def check_flex(mask, layout: VocoLayout) -> None:
    """Just those blocks are walked in which something is visible."""
    visible, n, block = MaskRule.of(layout).mask_mod(), layout.num_tokens, 128
    token = torch.arange(n, device=layout.device)
    # Block by block of rows, since N * N is too much for a long video.
    seen = [visible(0, 0, rows[:, None], token).any(0) for rows in token.split(block)]
    keys = torch.nn.functional.pad(torch.stack(seen), (0, -n % block))
    want = keys.unflatten(1, (-1, block)).any(2)
    assert torch.equal(mask.to_dense()[0, 0].bool(), want), "other blocks are walked than hold visible pairs"
