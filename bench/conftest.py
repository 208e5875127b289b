"""One table at the end of a run of benchmarks, and the same numbers as JSON where `--results PATH` asks for them."""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import pytest
import torch

import voco_kernels
from bench.measure import Candidate, Comparison, Row, compare
from bench.verified import write_atomically

FORMAT_VERSION = 1
DEFAULT_ROUNDS = 25
COMPARISONS = pytest.StashKey[list[Comparison]]()


def pytest_addoption(parser):
    group = parser.getgroup("voco benchmarks")
    group.addoption("--results", type=Path, metavar="PATH", help="write the results to this JSON file")
    group.addoption(
        "--rounds", type=int, default=DEFAULT_ROUNDS, help="rounds of a comparison at most (default %(default)s)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if config.getoption("--rounds") < 1:
        raise pytest.UsageError("--rounds must be at least 1")
    path = config.getoption("--results")
    if path is not None and not path.absolute().parent.is_dir():
        raise pytest.UsageError(f"--results must be a file in a folder that exists, but was {path}")
    config.stash[COMPARISONS] = []
    # Its own table would show one mixed row per comparison.
    config.option.benchmark_quiet = True


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def measure(benchmark, request):
    """measure(task, shape, candidates, work=None, unit=""): check, time in turns, and add a comparison to the table."""

    def run(task: str, shape: str, candidates: list[Candidate], *, work: float | None = None, unit: str = ""):
        rows = compare(benchmark, candidates, request.config.getoption("--rounds"))
        request.config.stash[COMPARISONS].append(Comparison(task, shape, rows, work, unit))
        # A peer may fail; the library's own result must not.
        assert rows[0].status == "ok", rows[0].status

    return run


def pytest_terminal_summary(terminalreporter, config):
    comparisons = config.stash[COMPARISONS]
    if not comparisons:
        return
    terminalreporter.section("benchmarks")
    machine = describe_machine()
    terminalreporter.write_line(
        f"{machine['device']}, {machine['threads']} threads on {machine['cores']} cores, load {machine['load_average']}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}, commit {machine['commit']}"
    )
    terminalreporter.write_line("ratio: median time divided by the first line's; target: the ratio that is wanted")
    for comparison in comparisons:
        terminalreporter.write_line("")
        terminalreporter.write_line(_header(comparison))
        for row in comparison.rows:
            terminalreporter.write_line(_line(comparison, row))
    path = config.getoption("--results")
    if path is not None:
        write_results(path, machine, comparisons)
        terminalreporter.write_line(f"\nwritten to {path}")


def _header(comparison: Comparison) -> str:
    title = f"{comparison.task}, {comparison.shape}"
    return f"{title:44} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {comparison.unit:>9} {'ratio':>7} {'target':>7}"


def _line(comparison: Comparison, row: Row) -> str:
    if not row.seconds:
        return f"  {row.name:42} {row.status}"
    times = " ".join(f"{row.percentile(p) * 1e3:9.3f}" for p in (20, 50, 80))
    rate = comparison.rate(row)
    rate = "" if rate is None else f"{rate:.1f}"
    ratio = comparison.ratio(row)
    ratio = "" if ratio is None else f"{ratio:.2f}"
    target = "" if row.target is None else f">= {row.target:g}"
    return f"  {row.name:42} {times} {rate:>9} {ratio:>7} {target:>7}"


def describe_machine() -> dict:
    """What the numbers depend on: device, threads, versions, commit and date."""
    commit, changed = _commit()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        # At the end of the run. Far above the number of threads, the machine was shared and its times are doubtful.
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version_of("transformers"),
        "voco_kernels": voco_kernels.__version__,
        "commit": commit,
        "uncommitted_changes": changed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_results(path: Path, machine: dict, comparisons: list[Comparison]) -> None:
    """Write the JSON file whole or not at all."""
    content = {
        "format_version": FORMAT_VERSION,
        **machine,
        "comparisons": [comparison.as_dict() for comparison in comparisons],
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """(commit, whether files that it knows were changed); None where this is no git checkout."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None
