"""The K/V path on a CPU, in float32, against loops of torch operations."""

from functools import partial

import pytest
import torch
from cuda_backend import emulated

from bench.gpu_kv import without_tokens
from bench.kv_problem import Problem
from bench.measure import Candidate
from bench.shapes import KV


@pytest.fixture(scope="module", params=KV)
def problem(request):
    return Problem(KV[request.param])


def test_extract(measure, problem):
    measure(
        "K/V out of a cache",
        problem.shape.name,
        [
            Candidate("voco torch", partial(problem.extract, "torch"), problem.check_extracted),
            Candidate("loop of index_select", problem.extract_by_loop, problem.check_extracted),
        ],
        work=problem.shape.moved_bytes(torch.float32) / 1e9,
        unit="GB/s",
    )


def test_inject(measure, problem):
    ours, planned, theirs = (problem.static_caches() for _ in range(3))
    check = problem.check_injected
    measure(
        "K/V into a cache",
        problem.shape.name,
        [
            Candidate("voco torch", partial(problem.inject, "torch", ours), check),
            Candidate("voco torch, plan", problem.injection("torch", planned), check),
            Candidate("loop of index_copy_", partial(problem.inject_by_index_copy, theirs), check),
            Candidate("voco torch, dynamic cache", partial(problem.inject_into_dynamic, "torch"), check),
            Candidate("loop of torch.cat, dynamic cache", problem.inject_by_concatenation, check),
        ],
        work=problem.shape.moved_bytes(torch.float32) / 1e9,
        unit="GB/s",
    )


def test_host_cost(measure):
    """All of a call but its launch, since there are no tokens; a run is 1,000 calls, so its ms are microseconds a call."""
    with emulated():
        problem = without_tokens(KV["image"], "cpu")
        calls = {
            "voco cuda, plan": problem.injection("cuda", problem.static_caches()),
            "voco cuda, inject_kv": partial(problem.inject, "cuda", problem.static_caches()),
        }
        measure(
            "1,000 calls without a launch",
            "32 separate layers",
            [Candidate(name, partial(_repeat, call)) for name, call in calls.items()],
        )


def _repeat(call):
    for _ in range(1000):
        call()
