"""The K/V path on a device: injection, on a GPU in a captured graph, against loops, copies and an empty kernel."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from voco_llama.bench.measure import LIMIT, OURS, Candidate

from bench.kv_problem import Problem
from bench.shapes import KVShape
from voco_kernels import backends

BACKENDS = ("cuda", "triton")
# As the rows of tables are called.
NOTHING, COPY, LOOP, STATIC, CONCATENATION = (
    "empty kernel", "copy of the same bytes", "loop of index_copy_", "StaticCache.update", "DynamicCache.update",
)  # fmt: skip
# What is wanted of an injection: a small one in microseconds beyond an empty kernel, a large one in times a copy.
MICROSECONDS_TARGET, COPY_TARGET = 3.0, 1.3
HOST_TARGET = 3.0  # microseconds of a call beyond the launch


def unavailable_reason(backend: str) -> str | None:
    """Why a backend of the K/V path cannot run on this machine; None where it can."""
    return backends.load_module(backends.KV, backend).unavailable_reason()


def check(shape: KVShape, device: torch.device, dtype: torch.dtype, backend: str) -> None:
    """Raise AssertionError unless a backend extracts and injects a shape's K/V as the reference does."""
    problem = Problem(shape, device, dtype)
    problem.check_extracted(problem.extract(backend))
    problem.check_injected(problem.inject(backend, problem.static_caches()))


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`run` as one replay of a CUDA graph, captured by the first call; returns what `run` returned. Itself on a CPU."""
    if device.type != "cuda":
        return run
    made: list[tuple[torch.cuda.CUDAGraph, Any]] = []

    def replay() -> Any:
        if not made:
            made.append(_capture(run))
        graph, result = made[0]
        graph.replay()
        return result

    return replay


def _capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `run`, and the tensors that it writes, which hold nothing yet: only the graph can make them right."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    for x in torch.utils._pytree.tree_leaves(result):
        if isinstance(x, torch.Tensor):
            x.zero_()
    return graph, result


def able(device: torch.device) -> tuple[str, ...]:
    """The backends of the K/V path that can run on a device, in the order in which "auto" prefers them."""
    if device.type != "cuda":
        return ("torch",)
    return (*(name for name in BACKENDS if unavailable_reason(name) is None), "torch")


def planned(problem: Problem, names: tuple[str, ...]) -> list[Candidate]:
    """Injections with a plan into static caches: kernels on a GPU from a graph, as a server would; `torch` as it is."""
    return [_planned(problem, name) for name in names]


def _planned(problem: Problem, name: str) -> Candidate:
    run = problem.injection(name, problem.static_caches())
    # The torch backend looks at slots on the host, which a graph cannot.
    is_kernel = name in BACKENDS
    run = captured(run, problem.device) if is_kernel else run
    graph = is_kernel and problem.device.type == "cuda"
    return Candidate(f"voco {name}", run, problem.check_injected, role=OURS, captured=graph)


def peers(problem: Problem) -> list[Candidate]:
    """What does the same without the library, and what says how fast that could be at best."""
    # Half of the bytes of K/V are read, the other half are written.
    source = torch.empty(problem.shape.moved_bytes(problem.dtype) // 2, dtype=torch.int8, device=problem.device)
    target = torch.empty_like(source)
    loop, check = partial(problem.inject_by_index_copy, problem.static_caches()), problem.check_injected
    graph = problem.device.type == "cuda"

    def candidate(name: str, run: Callable[[], Any], **options) -> Candidate:
        return Candidate(name, captured(run, problem.device), **options, captured=graph)

    return [
        candidate(NOTHING, empty_kernel(problem.device), role=LIMIT),
        candidate(COPY, lambda: target.copy_(source), role=LIMIT),
        candidate(LOOP, loop, check=check),
        candidate(STATIC, problem.static_update(), check=check),
        Candidate(CONCATENATION, problem.inject_by_concatenation, check),
    ]


def candidates(problem: Problem, names: tuple[str, ...]) -> list[Candidate]:
    """Injections of a problem; the first is ours."""
    return [*planned(problem, names), *peers(problem)]


def empty_kernel(device: torch.device) -> Callable[[], Any]:
    """A launch of the least kernel there is."""
    if device.type != "cuda":
        return lambda: None
    import triton

    @triton.jit
    def nothing():
        pass

    return lambda: nothing[(1,)]()


def without_tokens(shape: KVShape, device: torch.device | str) -> Problem:
    """The problem of a shape whose images are none: calls do everything but launch."""
    return Problem(replace(shape, images=0), device)


def host_microseconds(shape: KVShape, device: torch.device, backend: str, calls: int = 2000) -> float:
    """What a planned injection costs the host beyond its launch: that of no tokens, which launches nothing."""
    problem = without_tokens(shape, device)
    run = problem.injection(backend, problem.static_caches())
    run()
    best = float("inf")
    for _ in range(5):
        began = perf_counter()
        for _ in range(calls):
            run()
        best = min(best, perf_counter() - began)
    return 1e6 * best / calls
