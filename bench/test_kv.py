"""The K/V path against loops over layers, copies of the same bytes, and transformers' caches."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cuda_backend import emulated
from voco_llama.bench.measure import OURS, Candidate, Work

from bench import gpu_kv
from bench.kv_problem import Problem
from bench.shapes import GPU_KV, KV, KVShape

SHAPES = GPU_KV if torch.cuda.is_available() else KV


@pytest.fixture(params=SHAPES)
def problem(request, device) -> Callable[[], Problem]:
    """Makes the problem of a shape; `shape` says of which."""
    make = partial(Problem, SHAPES[request.param], device, dtype_of(device))
    make.shape = SHAPES[request.param]
    return make


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def work_of(shape: KVShape, device: torch.device) -> Work:
    return Work(moved_bytes=shape.moved_bytes(dtype_of(device)))


def test_extract(measure, problem, device):
    def candidates():
        made = problem()
        check = made.check_extracted
        ours = [
            Candidate(f"voco {name}", partial(made.extract, name), check, role=OURS) for name in gpu_kv.able(device)
        ]
        return [*ours, Candidate("loop of index_select", made.extract_by_loop, check)]

    measure("out of a cache", problem.shape.name, candidates, work=work_of(problem.shape, device), dtype=dtype_of(device))


def test_inject(measure, problem, device):
    def candidates():
        made, names = problem(), gpu_kv.able(device)
        static = made.static_caches
        check = made.check_injected
        return [
            *gpu_kv.planned(made, names),
            Candidate(f"voco {names[0]}, without a plan", partial(made.inject, names[0], static()), check, role=OURS),
            *gpu_kv.peers(made),
            Candidate("voco, DynamicCache", made.inject_into_dynamic, check, role=OURS),
        ]

    measure("into a cache", problem.shape.name, candidates, work=work_of(problem.shape, device), dtype=dtype_of(device))


def test_host_cost(measure, device):
    """All of a call but its launch, since there are no tokens; a run is 1,000 calls, so its ms are microseconds a call."""
    if device.type == "cuda":
        pytest.skip("gpu_check measures it with the real runtime")
    with emulated():
        problem = gpu_kv.without_tokens(KV["image"], "cpu")
        calls = {
            "voco cuda, plan": problem.injection("cuda", problem.static_caches()),
            "voco cuda, without a plan": partial(problem.inject, "cuda", problem.static_caches()),
        }
        measure(
            "1,000 calls without a launch",
            "32 separate layers",
            [
                Candidate(name, partial(_repeat, call), role=OURS, unchecked="no tokens, so nothing is written")
                for name, call in calls.items()
            ],
        )


def _repeat(call):
    for _ in range(1000):
        call()
