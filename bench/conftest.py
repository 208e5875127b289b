"""What the suites share: the device, its clock, and one file of results that a later run can go on with."""

from collections.abc import Callable
from pathlib import Path
from time import monotonic

import pytest
import torch
from voco_llama.bench.clock import Clock, measure_ceilings
from voco_llama.bench.measure import MOST_ROUNDS, Candidate, Comparison, Work, compare
from voco_llama.bench.results import Results, describe_machine, failures

SECONDS = 10.0
# The exit status where all passed, but not all was reached in time.
UNFINISHED = 75
SESSION = pytest.StashKey["Session"]()


class Session:
    """A run of the suites on one device.

    Attributes:
        comparisons: what this run added to the results.
        unfinished: by suite, how many cases were not reached in time.
    """

    def __init__(self, options):
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device must be one that is here, but was {self.device}, and torch sees no NVIDIA GPU")
        self.seconds, self.rounds = options.seconds, options.rounds
        self.deadline = monotonic() + 60 * options.minutes
        self.results = Results(options.results, describe_machine(self.device, options.commit), resume=options.resume)
        self.clock = Clock(self.device)
        self.comparisons: list[Comparison] = []
        self.unfinished: dict[str, int] = {}

    def add(self, comparison: Comparison) -> None:
        """Keep a comparison; the ceilings of its dtype are measured before the first one."""
        dtype = comparison.dtype
        if dtype is not None and self.results.ceilings(dtype) is None:
            self.results.set_ceilings(dtype, measure_ceilings(self.clock, getattr(torch, dtype)))
        self.comparisons.append(comparison)
        self.results.add(comparison)


def pytest_addoption(parser):
    group = parser.getgroup("voco benchmarks")
    group.addoption("--results", type=Path, metavar="PATH", help="write the results to this JSON file, row by row")
    group.addoption("--resume", action="store_true", help="go on with that file, and leave out what it holds")
    group.addoption("--commit", help="the commit that this is, where it is no git checkout")
    group.addoption("--device", choices=("cpu", "cuda"), help="the GPU where there is one")
    group.addoption("--minutes", type=float, default=1e6, help="begin nothing after this time")
    group.addoption("--seconds", type=float, default=SECONDS, help="about how long to time a comparison (%(default)s)")
    group.addoption("--rounds", type=int, default=MOST_ROUNDS, help="rounds of a comparison at most (%(default)s)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if config.getoption("--rounds") < 1:
        raise pytest.UsageError("--rounds must be at least 1")
    path = config.getoption("--results")
    if path is not None and not path.absolute().parent.is_dir():
        raise pytest.UsageError(f"--results must be a file in a folder that exists, but was {path}")
    try:
        config.stash[SESSION] = Session(config.option)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    # Its own table would show one mixed row per comparison.
    config.option.benchmark_quiet = True


def pytest_collection_modifyitems(config, items):
    # pytest-benchmark subtracts what its timer returns; so on a GPU it times with CUDA events.
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=config.stash[SESSION].clock.now))


@pytest.fixture(scope="session")
def session(request) -> Session:
    return request.config.stash[SESSION]


@pytest.fixture(scope="session")
def device(session) -> torch.device:
    return session.device


@pytest.fixture(scope="session")
def clock(session) -> Clock:
    return session.clock


@pytest.fixture
def suite(request) -> str:
    """The name of the suite, from that of its file."""
    return request.node.path.stem.removeprefix("test_")


@pytest.fixture(autouse=True)
def begin(session, suite):
    torch.manual_seed(0)
    session.unfinished.setdefault(suite, 0)
    if monotonic() > session.deadline:
        session.unfinished[suite] += 1
        pytest.skip("not run: no time was left; --resume goes on with it")


def pytest_sessionfinish(session, exitstatus):
    ours = session.config.stash[SESSION]
    for suite, cases in ours.unfinished.items():
        ours.results.set_unfinished(suite, cases)
    if exitstatus == pytest.ExitCode.OK and any(ours.unfinished.values()):
        session.exitstatus = UNFINISHED


@pytest.fixture
def measure(benchmark, session, suite) -> Callable:
    """measure(task, shape, candidates, work=None, dtype=None, x=None): check, time in turns, add to the results.

    Candidates and work may also be functions that make them, which are not called where the results are there already.
    """

    def drive(runs: list[Callable]) -> list[float]:
        turns = iter(runs)

        def next_turn():
            session.clock.flush()
            return (next(turns),), {}

        def turn(run):
            run()  # and not its result, which pytest-benchmark would keep in memory during the next turn

        # pytest-benchmark times one function; the function here is whichever candidate's turn it is.
        benchmark.pedantic(turn, setup=next_turn, rounds=len(runs))
        return benchmark.stats.stats.data

    def run(
        task: str,
        shape: str,
        candidates: list[Candidate] | Callable[[], list[Candidate]],
        *,
        work: Work | Callable[[], Work] | None = None,
        dtype: torch.dtype | None = None,
        x: int | None = None,
    ) -> Comparison:
        if session.results.has(suite, task, shape):
            pytest.skip("it is in the results already")
        if callable(candidates):
            candidates = candidates()
        work = work() if callable(work) else work or Work()
        timed = compare(
            candidates,
            session.clock,
            seconds=session.seconds,
            most_rounds=session.rounds,
            drive=drive if benchmark.enabled else None,
        )
        benchmark.skipped = True  # where nothing was timed; else it is not looked at
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        comparison = Comparison(suite, task, shape, timed, work, name, x)
        session.add(comparison)
        failed = failures(comparison.as_rows(None))
        assert timed[0].status == "ok" and not failed, "; ".join(failed) or timed[0].status
        return comparison

    return run


@pytest.fixture
def add_comparison(session) -> Callable[[Comparison], None]:
    """For what times itself: adds a comparison to the results."""
    return session.add


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[SESSION]
    if not session.comparisons:
        return
    machine, write = session.results.content, terminalreporter.write_line
    terminalreporter.section("benchmarks")
    write(
        f"{machine['device']}, {machine['threads']} threads on {machine['cores']} cores, load {machine['load_average']}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}, commit {machine['commit']}"
    )
    write("ratio: median time divided by the first line's; target: the ratio that is wanted")
    for comparison in session.comparisons:
        write("")
        for line in comparison_lines(comparison, session.results):
            write(line)
    if session.results.path is not None:
        path = session.results.path
        write(f"\nwritten to {path}; `voco bench report {path}` makes tables and plots of it")


def comparison_lines(comparison: Comparison, results: Results) -> list[str]:
    """A heading and a line per row."""
    title = f"{comparison.suite}: {comparison.task}, {comparison.shape}"
    lines = [
        f"{title:48} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'roof %':>7} {'MiB':>8} {'ratio':>7} {'target':>7}"
    ]
    for row in comparison.as_rows(results.ceilings(comparison.dtype)):
        if row["p50_ms"] is None:
            lines.append(f"  {row['name']:46} {row['status']}")
            continue
        times = " ".join(f"{row[f'p{p}_ms']:9.3f}" for p in (20, 50, 80))
        roof = "" if row["roof"] is None else f"{100 * row['roof']:.0f}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        target = "" if row["target"] is None else f">= {row['target']:g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"  # the first line may not have been timed
        lines.append(f"  {row['name']:46} {times} {roof:>7} {peak:>8} {ratio:>7} {target:>7}")
    return lines
