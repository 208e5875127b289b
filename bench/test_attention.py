"""Attention, forward and with its backward: ours against everyone that can do it here.

A GPU gets the shapes GPU in bfloat16, a CPU the shapes ATTENTION in float32.
"""

from functools import lru_cache

import pytest
from voco_llama.bench.measure import Work

from bench.attention_masks import dtype_of
from bench.attention_peers import candidates
from bench.attention_problem import Problem, shapes_of
from bench.conftest import SESSION


def pytest_generate_tests(metafunc):
    shapes = shapes_of(metafunc.config.stash[SESSION].device)
    metafunc.parametrize("shape", shapes.values(), ids=shapes)


# One at a time: on a GPU a problem may take gigabytes. Tests of a shape follow each other.
problem_of = lru_cache(maxsize=1)(Problem)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
def test_attention(measure, device, shape, backward):
    dtype = dtype_of(device)
    measure(
        "forward + backward" if backward else "forward",
        shape.name,
        lambda: candidates(problem_of(shape, device, dtype), backward=backward),
        work=Work(shape.flops(backward=backward), shape.moved_bytes(dtype, backward=backward)),
        dtype=dtype,
    )
