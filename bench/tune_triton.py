"""Measures launch parameters of the Triton kernels on this machine's GPU, and prints tables for launch.py.

    python -m bench.tune_triton --kernel forward --head-dim 128 --shapes video anyres --minutes 8

Each candidate has to give the shipped parameters' result, but for rounding, before it is timed; one that the compiler
refuses is left out. The score is the geometric mean of the medians over the shapes. Nothing
is written: whoever changes launch.py reads the table, and takes the reason for each line from it.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import monotonic

import torch
from voco_llama.bench.clock import Clock
from voco_llama.bench.measure import first_line

from bench.shapes import GPU, AttentionShape
from voco_kernels.backends.triton import arch_of, launch
from voco_kernels.backends.triton.launch import Launch
from voco_kernels.tiles import Geometry, build_tiles

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def candidates(shipped: Launch) -> Iterator[Launch]:
    """The shipped parameters first, then all others near enough to be plausible."""
    yield shipped
    for step, edge, warps, stages in itertools.product((16, 32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3, 4)):
        if edge <= step and (other := Launch(step, edge, warps, stages)) != shipped:
            yield other


class Problem:
    """Inputs of one shape, and the kernels' work on them."""

    def __init__(
        self, shape: AttentionShape, head_dim: int, dtype: torch.dtype, device: torch.device, geometry: Geometry
    ):
        shape = replace(shape, head_dim=head_dim)
        layout = shape.layout()
        heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        self.q, self.k, self.v, self.grad = (
            torch.randn(layout.num_tokens, h, head_dim, device=device, dtype=dtype) for h in heads
        )
        self.plan = build_tiles(layout, geometry).to(device)
        self.arch = arch_of(device)
        self.scale = 1 / math.sqrt(head_dim)
        self.out, self.lse = self.forward()

    def forward(self) -> tuple[torch.Tensor, ...]:
        from voco_kernels.backends.triton.forward import forward

        return forward(self.q, self.k, self.v, self.plan, self.scale, self.arch)

    def backward(self) -> tuple[torch.Tensor, ...]:
        from voco_kernels.backends.triton.backward import backward

        return backward(self.grad, self.q, self.k, self.v, self.out, self.lse, self.plan, self.scale, self.arch)

    def run(self, kernel: str) -> tuple[torch.Tensor, ...]:
        """What `kernel` takes part in; only its parameters change, so that differences are its own."""
        return self.forward() if kernel == "forward" else self.backward()


def measured(problems: list[Problem], kernel: str, wanted: list[tuple[torch.Tensor, ...]], time: Callable) -> float | str:
    """Geometric mean of the medians in milliseconds, or why there is none."""
    try:
        for problem, want in zip(problems, wanted, strict=True):
            for x, y in zip(problem.run(kernel), want, strict=True):
                # Another order of additions may round differently, no more.
                limit = 8 * torch.finfo(y.dtype).eps * y.abs().max()
                if not (x - y).abs().max() <= limit:
                    return "wrong"
        return 1e3 * math.prod(time(lambda p=p: p.run(kernel)) for p in problems) ** (1 / len(problems))
    except Exception as error:  # out of shared memory, or refused by the compiler
        return first_line(error)


def tune(kernel: str, problems: list[Problem], head_dim: int, dtype: torch.dtype, time: Callable, deadline: float):
    """(milliseconds, parameters) of every candidate that ran, best first; prints each as it comes."""
    family = 90 if problems[0].arch >= 90 else 80
    key = (family, launch.padded_head_dim(head_dim), "float32" if dtype == torch.float32 else "half")
    table = launch.TABLES[kernel]
    shipped = table[key]
    wanted = [problem.run(kernel) for problem in problems]
    found = []
    try:
        for candidate in candidates(shipped):
            if monotonic() > deadline:
                print("out of time; the candidates that follow were not tried", flush=True)
                break
            table[key] = candidate
            score = measured(problems, kernel, wanted, time)
            print(f"{kernel} {key} {candidate}: {score if isinstance(score, str) else f'{score:.4f} ms'}", flush=True)
            if not isinstance(score, str):
                found.append((score, candidate))
    finally:
        table[key] = shipped
    return sorted(found, key=lambda pair: pair[0])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=launch.TABLES, nargs="+", default=list(launch.TABLES))
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16"])
    parser.add_argument("--shapes", choices=GPU, nargs="+", default=["video", "anyres", "sft"])
    parser.add_argument("--rows", type=int, default=launch.GEOMETRY.rows, help="rows of a row tile (%(default)s)")
    parser.add_argument("--keys", type=int, default=launch.GEOMETRY.keys, help="keys of a key tile (%(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune_triton needs an NVIDIA GPU, and there is none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    geometry = Geometry(options.rows, launch.GEOMETRY.small_rows, options.keys)
    clock, deadline = Clock(device), monotonic() + 60 * options.minutes
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}", flush=True)
    for dtype, head_dim in itertools.product(options.dtype, options.head_dim):
        problems = [Problem(GPU[name], head_dim, DTYPES[dtype], device, geometry) for name in options.shapes]
        for kernel in options.kernel:
            best = tune(kernel, problems, head_dim, DTYPES[dtype], clock.median, deadline)
            print(f"\nbest of {kernel}, head_dim {head_dim}, {dtype}, {geometry}, over {', '.join(options.shapes)}:")
            for score, parameters in best[:5]:
                print(f"  {score:.4f} ms  {parameters}")
            print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
