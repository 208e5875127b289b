"""What must hold on a GPU before anything is timed there: tests, sanitizers, the same bits twice, and the error rule."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import monotonic
from xml.etree import ElementTree

import torch

from bench.attention_problem import RESULTS, Problem, error_over_bound, inputs_of, results_of, unplanned
from bench.shapes import AttentionShape
from bench.verified import ROOT
from tests.reference import assert_error_rule, dense_results, kinds_of, mask_of_layout
from voco_kernels.tiles import TilePlan, build_tiles

# Backends that are held to the dense reference beside the one that is checked.
OTHER_BACKENDS = ("cuda", "reference", "torch", "flash")
PLAN_ARRAYS = tuple(field.name for field in fields(TilePlan) if field.name not in ("geometry", "counted"))
# racecheck does not follow how torch's own kernels synchronise, so it gets ours only: those of Triton are no C++ names, and
# those in CUDA are in a namespace of their own.
SANITIZERS = ("memcheck", "synccheck", "racecheck of triton", "racecheck of cuda")
WATCHED = {"racecheck of triton": ("--kernel-name-exclude", "kns=_Z"), "racecheck of cuda": ("--kernel-name", "kns=4voco")}
SANITIZER_LIMIT = 150
BUILD_LIMIT = 120
CUDA_FOLDERS = ("/usr/local/cuda", "/opt/cuda")


# ---- other processes ---------------------------------------------------------------------------------------------------


def run_command(command: list[str], limit: float) -> tuple[int | None, str]:
    """(exit status, all output) of a command in the repository; status None where it took more than `limit` seconds."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            status = process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            # The whole session, since tests start processes of their own.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        output.seek(0)
        return status, output.read()


@dataclass
class Tests:
    """Counts of a run of tests, and the names of those that failed or passed."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: int = 0

    def counts(self) -> dict[str, int]:
        """For reports."""
        return {"passed": len(self.passed), "failed": len(self.failed), "skipped": self.skipped}


def start_gpu_tests(pool: ThreadPoolExecutor, tests: Path, reports: Path, deadline: float) -> dict[str, Future]:
    """Start the tests that need a GPU, file by file, since most of their time goes into compiling kernels on one core.

    Files without such tests are not even collected: they may import what this environment lacks. Each future is the
    `Tests` of a file.
    """
    files = [path for path in sorted(tests.glob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    return {path.name: pool.submit(_run_tests, path, reports / f"{path.stem}.xml", deadline) for path in files}


def _run_tests(path: Path, report: Path, deadline: float) -> Tests:
    command = [sys.executable, "-m", "pytest", str(path), "-m", "gpu", "-q", "--junitxml", str(report)]
    return collect_tests(path.name, run_command(command, deadline - monotonic()), report)


def collect_tests(name: str, done: tuple[int | None, str], report: Path) -> Tests:
    """Count one file's tests; a file that broke off counts as one failure."""
    status, output = done
    tests = Tests()
    for case in ElementTree.parse(report).iter("testcase") if report.is_file() else ():
        title = f"{name}::{case.get('name')}"
        if case.find("skipped") is not None:
            tests.skipped += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            tests.failed.append(title)
        else:
            tests.passed.append(title)
    # 5: no test was collected.
    if status not in (0, 5) and not tests.failed:
        reason = "took too long" if status is None else f"exit status {status}: {_last_line(output)}"
        tests.failed.append(f"{name}: {reason}")
    return tests


def build_module(deadline: float) -> str:
    """Compile the CUDA module into the source tree where it is missing; what came of it."""
    from voco_kernels.backends import cuda

    if cuda.unavailable_reason() is None:
        return f"is there, for {', '.join(cuda.load().compiled_archs())}"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, output = run_command(command, min(BUILD_LIMIT, deadline - monotonic()))
    cuda._import.cache_clear()
    if (reason := cuda.unavailable_reason()) is not None:
        return f"not built: {reason if status == 0 else _last_line(output)}"
    return f"built for {', '.join(cuda.load().compiled_archs())}"


def compiled_archs() -> list[str]:
    """What the CUDA module was compiled for; nothing where there is none."""
    from voco_kernels.backends import cuda

    return [] if cuda.unavailable_reason() else cuda.load().compiled_archs()


# ---- compute-sanitizer -------------------------------------------------------------------------------------------------


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH or in a CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *CUDA_FOLDERS]
    folders = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def run_sanitizer(
    tool: str, device: str, backends: tuple[str, ...], kv_backends: tuple[str, ...], deadline: float
) -> str:
    """Run `bench.sanitized` under a tool: "pass", "fail: ...", or "not run: ..." with what the tool says."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return "not run: there is no compute-sanitizer on PATH or in a CUDA toolkit"
    command = [sanitizer, "--tool", tool.split()[0], "--error-exitcode", "99"]
    command += WATCHED.get(tool, ())
    limit = min(SANITIZER_LIMIT, deadline - monotonic())
    command += [sys.executable, "-m", "bench.sanitized", "--device", device]
    command += ["--backends", *backends, "--kv-backends", *kv_backends]
    return verdict(*run_command(command, limit), limit)


def verdict(status: int | None, output: str, limit: float = SANITIZER_LIMIT) -> str:
    """What a sanitizer's exit status and output mean."""
    said = [line.strip("= ") for line in output.splitlines() if line.startswith("=========") and line.strip("= ")]
    if unsupported := [line for line in said if "not supported" in line]:
        return f"not run: {unsupported[0]}"
    summaries = [line for line in said if "SUMMARY:" in line]
    if summaries and status == 0 and re.search(r"SUMMARY: 0 (errors|hazards)", summaries[-1]):
        return "pass"
    if summaries and not re.search(r"SUMMARY: 0 (errors|hazards)", summaries[-1]):
        return f"fail: {summaries[-1]}; {said[1] if len(said) > 2 else ''}"
    if status is None:
        return f"not run: it took more than {limit:.0f} seconds"
    if "Traceback" in output:
        return f"fail: {_last_line(output, skip='=========')}"
    return f"not run: {(said or [_last_line(output)])[-1]}"


def _last_line(text: str, skip: str = "\0") -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(skip)]
    return lines[-1] if lines else "no output"


# ---- the same bits, and the error rule ---------------------------------------------------------------------------------


def check_repeatable(shape: AttentionShape, device: torch.device, dtype: torch.dtype, backend: str) -> None:
    """Raise AssertionError unless two runs, each with a plan of its own, give the same bits for every result."""
    inputs, host = inputs_of(shape, device, dtype), shape.layout()
    first, second = (results_of(*inputs, unplanned(host.to(device)), backend) for _ in range(2))
    for name in RESULTS:
        assert torch.equal(first[name], second[name]), f"{name} differs from run to run"


def check_plan(shape: AttentionShape, device: torch.device) -> None:
    """Raise AssertionError unless the plan's kernels on `device` make what tensor operations make on the CPU."""
    # Only here is Triton needed.
    from voco_kernels.backends.triton.launch import GEOMETRY
    from voco_kernels.backends.triton.plan import build_tiles_on_gpu

    host = shape.layout()
    check_tiles(build_tiles_on_gpu(host.to(device), GEOMETRY), build_tiles(host, GEOMETRY))


def check_tiles(plan: TilePlan, want: TilePlan) -> None:
    """Raise AssertionError unless a device's plan is `want`, made on the CPU, where lists are cut to their length."""
    got = plan.to("cpu")
    for name in PLAN_ARRAYS:
        x, true = getattr(got, name), getattr(want, name)
        assert torch.equal(x[: len(true)], true) and not x[len(true) :].any(), f"the plan's {name} differs from the CPU's"


def small_errors(shape: AttentionShape, device: torch.device, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """Hold a shrunken shape to the error rule against the dense float64 reference: error / bound by result."""
    small = shape.shrunk()
    inputs, host = inputs_of(small, device, dtype), small.layout()
    mask, kinds = torch.from_numpy(mask_of_layout(host)).to(device), kinds_of(host)
    scale = small.head_dim**-0.5
    true, eager = (dense_results(*(x.to(t) for x in inputs), mask, scale) for t in (torch.float64, dtype))
    got = results_of(*inputs, host.to(device), backend)
    return _judged(((name, got[name], eager[name], true[name]) for name in RESULTS), kinds)


def full_errors(problem: Problem) -> dict[str, float]:
    """Hold the first and the last key head of the full shape to the error rule: error / bound by result."""
    got = results_of(*problem.packed, problem.layout, problem.backend)
    return _judged(problem.compared(got), problem.kinds)


def _judged(compared, kinds) -> dict[str, float]:
    """Assert the rule for every (name, x, eager, x64); the largest error / bound by name."""
    shares: dict[str, float] = {}
    for name, x, eager, true in compared:
        assert_error_rule(name, x, eager, true, kinds)
        shares[name] = max(shares.get(name, 0.0), error_over_bound(x, eager, true, kinds))
    return shares


def merged(*errors: dict[str, float]) -> dict[str, float]:
    """The largest share of each result, rounded for reports."""
    return {name: round(max(e.get(name, 0.0) for e in errors), 3) for name in RESULTS}
