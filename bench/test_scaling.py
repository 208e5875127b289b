"""What grows how fast: attention, its memory and what is made before it, with frames and with text; and first tokens."""

from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from voco_llama.bench import measure as rows
from voco_llama.bench.measure import Candidate, Work

import voco_kernels.backends.torch as torch_backend
from bench import end_to_end
from bench.attention_masks import PaddedMask, block_masks
from bench.attention_peers import DENSE_MASK, FLEX_MASK, OURS, compile_anew
from bench.gpu_checks import check_tiles
from bench.scaling_problem import Patience, Problem, candidates, dense_absent, size_of
from bench.shapes import FRAMES, TEXT, frames_shape, text_shape
from bench.test_plan import check_blocks, check_dense, check_flex
from voco_kernels import VocoLayout
from voco_kernels.backends.triton.launch import GEOMETRY
from voco_kernels.tiles import build_tiles

PATIENCE = 2.0  # seconds a call
SERIES = {"frames": (frames_shape, FRAMES), "text": (text_shape, TEXT)}
ATTENTION = [(what, x) for what, (_, points) in SERIES.items() for x in points]


@pytest.fixture(scope="module")
def patient(session):
    """patient(task): the patience with a task, which knows what its smaller sizes have shown."""
    known: dict[str, Patience] = {}

    def of(task: str) -> Patience:
        found = known.setdefault(task, Patience(PATIENCE))
        found.learn([row for row in session.results.content["rows"] if row["task"] == task])
        return found

    return of


@pytest.mark.parametrize(("what", "x"), ATTENTION, ids=lambda value: str(value))
def test_attention(measure, device, patient, what, x):
    task = f"{what}: attention forward"
    heads, head_dim, dtype = size_of(device)
    shape = SERIES[what][0](x, heads, head_dim)
    work = Work(shape.flops(backward=False), shape.moved_bytes(dtype, backward=False))

    def made():
        problem = Problem(shape, device, dtype)
        return patient(task).apply(candidates(problem), problem.layout.num_tokens)

    measure(task, shape.name, made, work=work, dtype=dtype, x=x)


@pytest.mark.parametrize("x", FRAMES)
def test_plan(measure, device, patient, x):
    task, shape = "frames: plan or mask", frames_shape(x, 1, 1)

    def made():
        layout = shape.layout().to(device)
        found = [_plan(layout), _dense_mask(layout), _block_mask(layout)]
        return patient(task).apply(found, layout.num_tokens)

    measure(task, shape.name, made, x=x)


def _plan(layout: VocoLayout) -> Candidate:
    """What the backend of this device makes of a layout that it has not seen."""
    host = layout.to("cpu")
    if layout.device.type == "cpu":
        build = partial(torch_backend._build_blocks, layout)
        return Candidate(OURS, build, partial(check_blocks, host=host), role=rows.OURS)
    # Only here is Triton needed.
    from voco_kernels.backends.triton.plan import build_tiles_on_gpu

    def check(plan):
        check_tiles(plan, build_tiles(host, GEOMETRY))

    return Candidate(OURS, partial(build_tiles_on_gpu, layout, GEOMETRY), check, role=rows.OURS)


def _dense_mask(layout: VocoLayout) -> Candidate:
    mask = PaddedMask(layout)
    check, absent = partial(check_dense, layout=layout), dense_absent(mask, layout.device)
    return Candidate(DENSE_MASK, mask.build, check, absent=absent)


def _block_mask(layout: VocoLayout) -> Candidate:
    """Compiled on a GPU. On a CPU not: that takes a quarter of a minute for every size; suite "plan" has it for two."""
    check = partial(check_flex, layout=layout)
    if layout.device.type == "cpu":
        return Candidate(f"{FLEX_MASK} (not compiled)", block_masks(layout, create_block_mask), check)
    compile_anew()
    return Candidate(FLEX_MASK, block_masks(layout, torch.compile(create_block_mask, dynamic=False)), check)


@pytest.mark.parametrize("x", FRAMES)
def test_first_token(measure, device, patient, x):
    task = "frames: first token"

    def made():
        problem = end_to_end.Problem(x, device)
        return patient(task).apply(end_to_end.candidates(problem), problem.prompt.shape[1])

    measure(task, f"{x} frames", made, x=x)
