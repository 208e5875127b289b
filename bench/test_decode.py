"""Decoding with a prefix of VoCo tokens that all requests share, against the same prefix in every request's cache."""

from functools import partial

import pytest
import torch
from voco_llama.bench.measure import OURS, Candidate, Work

from bench.decode_problem import Problem, able
from bench.shapes import DECODE, GPU_DECODE

SHAPES = GPU_DECODE if torch.cuda.is_available() else DECODE
# Over the same without sharing, on a GPU.
TARGET = 3.0


@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=["as queries", "int8", "float8"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decode(measure, device, shape, stored):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    stored = stored or dtype

    def candidates():
        problem, names = Problem(shape, device, dtype, stored), able(device)
        target = TARGET if device.type == "cuda" else None
        return [
            *(Candidate(f"voco {name}", partial(problem.shared, name), problem.check, role=OURS) for name in names),
            Candidate(f"voco {names[0]}, not shared", partial(problem.repeated, names[0]), problem.check, target=target),
            Candidate("SDPA, not shared", problem.sdpa, problem.check),
        ]

    measure(
        f"one token, prefix in {str(stored).removeprefix('torch.')}",
        shape.name,
        candidates,
        work=Work(shape.flops, shape.moved_bytes(dtype, stored)),
        dtype=dtype,
    )
