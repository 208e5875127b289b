"""Timing on a device: implementations in turns with a cold cache, and what the device does at best."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from bench.measure import Candidate, Row

WARM_UPS = 2
FLUSHES = 4
LEAST_ROUNDS, MOST_ROUNDS = 7, 30


class Clock:
    """Times single runs on one device, each with nothing of its inputs in the cache.

    Before each run a buffer larger than the cache is overwritten, FLUSHES times: on a GPU that takes longer than the host
    needs to launch the run, so that what is timed is the GPU's work and not Python's.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.is_cuda = device.type == "cuda"
        size = 2**20
        if self.is_cuda:
            properties = torch.cuda.get_device_properties(device)
            size = min(max(2**30, 4 * properties.L2_cache_size), properties.total_memory // 16)
        self._flushed = torch.empty(size, dtype=torch.int8, device=device)

    def start(self, run: Callable[[], Any]) -> Any:
        """Run once; `seconds` of the returned mark says how long it took. Does not wait for a GPU."""
        for _ in range(FLUSHES):
            self._flushed.zero_()
        if not self.is_cuda:
            began = perf_counter()
            run()
            return perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        return begin, end

    def seconds(self, mark: Any) -> float:
        """How long the run of a mark took; waits for it."""
        if not self.is_cuda:
            return mark
        begin, end = mark
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def time(self, run: Callable[[], Any]) -> float:
        """Seconds of one run."""
        return self.seconds(self.start(run))

    def times(self, run: Callable[[], Any], rounds: int = 15) -> list[float]:
        """Seconds of each of some runs that are warm."""
        for _ in range(WARM_UPS):
            run()
        return [self.time(run) for _ in range(rounds)]

    def median(self, run: Callable[[], Any]) -> float:
        """Median seconds of a run that is warm."""
        return statistics.median(self.times(run))


def time_in_turns(candidates: list[Candidate], clock: Clock, seconds: float = 3.0) -> list[Row]:
    """Check every candidate, then run those that passed in rounds of one turn each, in an order that rotates.

    Args:
        seconds: about how long the rounds may take; at least LEAST_ROUNDS are run.
    """
    rows = [Row(candidate.name, _status(candidate, clock), candidate.target) for candidate in candidates]
    timed = [(row, candidate.run) for row, candidate in zip(rows, candidates, strict=True) if row.status == "ok"]
    if not timed:
        return rows
    for _, run in timed:
        for _ in range(WARM_UPS - 1):  # the check was the first run
            run()
    began = perf_counter()
    for _, run in timed:
        clock.time(run)
    fitting = int(seconds / (perf_counter() - began))
    for turn in range(min(MOST_ROUNDS, max(LEAST_ROUNDS, fitting))):
        first = turn % len(timed)
        marks = [(row, clock.start(run)) for row, run in timed[first:] + timed[:first]]
        for row, mark in marks:
            row.seconds.append(clock.seconds(mark))
    return rows


def _status(candidate: Candidate, clock: Clock) -> str:
    """ "ok", or why the candidate is a line of the table without numbers."""
    status = "ok"
    try:
        result = candidate.run()
        if candidate.check is not None:
            candidate.check(result)
    except AssertionError as error:
        status = f"wrong: {first_line(error)}"
    # A peer that runs out of memory, or that this version of torch cannot compile, must not end the run.
    except Exception as error:
        status = f"cannot run: {first_line(error)}"
    if status != "ok" and clock.is_cuda:
        torch.cuda.empty_cache()
    return status


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def extra_memory(run: Callable[[], tuple[torch.Tensor, ...]], clock: Clock) -> int | None:
    """Bytes that a run needs at its peak beyond its inputs and its results; None where there is no GPU to ask."""
    if not clock.is_cuda:
        return None
    torch.cuda.synchronize(clock.device)
    torch.cuda.reset_peak_memory_stats(clock.device)
    before = torch.cuda.memory_allocated(clock.device)
    results = run()
    torch.cuda.synchronize(clock.device)
    peak = torch.cuda.max_memory_allocated(clock.device)
    return peak - before - sum(x.nbytes for x in results)


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best: `flops` of a matmul and `bytes` of a copy (read and written), each per second."""

    flops: float
    bytes: float

    def share(self, flops: float, moved_bytes: float, seconds: float) -> float:
        """How near a run comes to the lower roof: 1 is as fast as its work or its bytes allow at all."""
        return max(flops / self.flops, moved_bytes / self.bytes) / seconds


def measure_ceilings(clock: Clock, dtype: torch.dtype, size: int = 8192, copied: int = 2**30) -> Ceilings:
    """A square matmul and a copy of `copied` bytes, both on random data: zeros draw less power and run faster."""
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    matmul = clock.median(lambda: a @ b)
    source = torch.randint(-128, 127, (copied,), dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    return Ceilings(2 * size**3 / matmul, 2 * copied / clock.median(lambda: target.copy_(source)))
