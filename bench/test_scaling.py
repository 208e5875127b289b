"""What grows how fast: attention, its memory and what is made before it, with frames and with text; and first tokens."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from voco_llama.bench import measure as rows
from voco_llama.bench.measure import Candidate, Work

from bench import end_to_end
from bench.attention_masks import block_masks
from bench.attention_peers import DENSE_MASK, FLEX_MASK, OURS
from bench.scaling_problem import Patience, Problem, candidates, dense_absent, size_of
from bench.shapes import FRAMES, TEXT, frames_shape, fresh, text_shape

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
        n = layout.num_tokens
        found = [
            Candidate(OURS, lambda: fresh(layout, device).prepare(), role=rows.OURS),
            Candidate(DENSE_MASK, layout.dense_mask, absent=dense_absent(n, torch.bool, device)),
            Candidate(FLEX_MASK, block_masks(layout, create_of(device))),
        ]
        return patient(task).apply(found, n)

    measure(task, shape.name, made, x=x)


def create_of(device: torch.device):
    """create_block_mask, compiled on a GPU; on a CPU compiling takes longer than any size that fits."""
    return torch.compile(create_block_mask, dynamic=False) if device.type == "cuda" else create_block_mask


@pytest.mark.parametrize("x", FRAMES)
def test_first_token(measure, device, patient, x):
    task = "frames: first token"

    def made():
        problem = end_to_end.Problem(x, device)
        return patient(task).apply(end_to_end.candidates(problem), problem.prompt.shape[1])

    measure(task, f"{x} frames", made, x=x)
