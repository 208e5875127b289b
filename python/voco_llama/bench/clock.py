"""Time and memory on a device, and what the device does at best."""

import gc
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

WARM_UPS = 2
FLUSHES = 4


class Mark:
    """A moment on a device; the difference of two is in seconds. Making one does not wait for a GPU."""

    def __init__(self, device: torch.device):
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._event = None
            self._time = perf_counter()

    def __sub__(self, earlier: "Mark") -> float:
        if self._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


class Clock:
    """Times single runs on one device; on a GPU each with nothing of its inputs in the cache.

    There a buffer larger than the cache is overwritten before each run, FLUSHES times: that takes longer than the host needs
    to launch a few kernels, so that what is timed is the GPU's work and not Python's.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._flushed = None
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            size = min(max(2**30, 4 * properties.L2_cache_size), properties.total_memory // 16)
            self._flushed = torch.empty(size, dtype=torch.int8, device=device)

    def now(self) -> Mark:
        """This moment."""
        return Mark(self.device)

    def flush(self) -> None:
        """Leave nothing useful in a GPU's cache, and keep it busy for a while."""
        if self._flushed is not None:
            for _ in range(FLUSHES):
                self._flushed.zero_()

    def time(self, run: Callable[[], Any]) -> float:
        """Seconds of one run."""
        self.flush()
        begin = self.now()
        result = run()
        end = self.now()
        seconds = end - begin
        del result
        return seconds

    def drive(self, runs: Sequence[Callable[[], Any]]) -> list[float]:
        """Seconds of each of many runs."""
        return [self.time(run) for run in runs]

    def times(self, run: Callable[[], Any], rounds: int = 15) -> list[float]:
        """Seconds of each of some runs that are warm."""
        for _ in range(WARM_UPS):
            run()
        return self.drive([run] * rounds)

    def median(self, run: Callable[[], Any]) -> float:
        """Median seconds of a run that is warm."""
        return statistics.median(self.times(run))

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """Bytes that torch holds at the peak of a run beyond what it held before, results included."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            result = run()
            torch.cuda.synchronize(self.device)
            del result
            return torch.cuda.max_memory_allocated(self.device) - before
        return _cpu_peak(run)


def _cpu_peak(run: Callable[[], Any]) -> int:
    """As torch's profiler sees every allocation of a CPU tensor."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its own start and end
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    held = peak = 0
    events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def release(device: torch.device) -> None:
    """Give back what a failed run left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best: `flops` of a matmul and `bytes` of a copy (read and written), each per second."""

    flops: float
    bytes: float

    def share(self, flops: float, moved_bytes: float, seconds: float) -> float:
        """How near a run comes to the lower roof: 1 is as fast as its work or its bytes allow at all."""
        return max(flops / self.flops, moved_bytes / self.bytes) / seconds

    def as_dict(self) -> dict:
        """For JSON."""
        return {"matmul_tflops": round(self.flops / 1e12, 4), "copy_gb_per_s": round(self.bytes / 1e9, 2)}


def measure_ceilings(clock: Clock, dtype: torch.dtype, size: int | None = None, copied: int | None = None) -> Ceilings:
    """A square matmul and a copy of `copied` bytes, the best of some runs, so that a busy machine lowers no ceiling.

    Both on random data: zeros draw less power and run faster.
    """
    on_gpu = clock.device.type == "cuda"
    size, copied = size or (8192 if on_gpu else 1536), copied or (2**30 if on_gpu else 2**28)
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    matmul = min(clock.times(lambda: a @ b))
    source = torch.randint(-128, 127, (copied,), dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    return Ceilings(2 * size**3 / matmul, 2 * copied / min(clock.times(lambda: target.copy_(source))))
