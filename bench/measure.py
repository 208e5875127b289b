"""Timing of implementations that do the same thing: held to the truth first, then run in turns.

The machine may be shared and its speed may drift. Every round therefore runs each implementation once, in an order that
rotates, and only medians over the same rounds are divided by each other.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from statistics import quantiles
from time import perf_counter
from typing import Any

# Slow comparisons get fewer rounds: as many as fit into this time, but never fewer than LEAST_ROUNDS.
SECONDS_PER_COMPARISON = 25
LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Candidate:
    """One implementation of a task.

    Attributes:
        name: how tables call it.
        run: does the task once and returns its result.
        check: raises AssertionError where the result is wrong; None where there is nothing to compare.
        target: the wanted ratio of its median to the first candidate's; for tables, never enforced.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], None] | None = None
    target: float | None = None


@dataclass
class Row:
    """What became of one candidate: `status` is "ok", "wrong: ..." or "cannot run: ..."; seconds only for "ok"."""

    name: str
    status: str
    target: float | None
    seconds: list[float] = field(default_factory=list)

    def percentile(self, percent: int) -> float:
        """Seconds, interpolated between rounds."""
        if len(self.seconds) == 1:
            return self.seconds[0]
        return quantiles(self.seconds, n=100, method="inclusive")[percent - 1]


@dataclass
class Comparison:
    """All rows of one task; ratios are relative to the first row. `work` is useful work per run, in `unit`."""

    task: str
    shape: str
    rows: list[Row]
    work: float | None = None
    unit: str = ""

    def ratio(self, row: Row) -> float | None:
        """How many times longer `row` takes than the first row; None where either was not timed."""
        first = self.rows[0]
        return row.percentile(50) / first.percentile(50) if first.seconds and row.seconds else None

    def as_dict(self) -> dict:
        """For JSON: milliseconds, and work per second."""
        return {"task": self.task, "shape": self.shape, "unit": self.unit, "rows": [*map(self._row_as_dict, self.rows)]}

    def _row_as_dict(self, row: Row) -> dict:
        entry = {"name": row.name, "status": row.status}
        if row.seconds:
            entry |= {f"p{p}_ms": round(row.percentile(p) * 1e3, 4) for p in (20, 50, 80)}
            entry["rounds"] = len(row.seconds)
            entry["rate"] = self.rate(row)
            entry["ratio"] = None if self.ratio(row) is None else round(self.ratio(row), 3)
        return entry | {"target": row.target}

    def rate(self, row: Row) -> float | None:
        """Useful work per second at the median."""
        return None if self.work is None or not row.seconds else round(self.work / row.percentile(50), 3)


def compare(benchmark, candidates: list[Candidate], most_rounds: int) -> list[Row]:
    """Check every candidate once, then time those that passed in up to `most_rounds` rounds of turns."""
    rows = [Row(candidate.name, _status(candidate), candidate.target) for candidate in candidates]
    timed = [(row, candidate) for row, candidate in zip(rows, candidates, strict=True) if row.status == "ok"]
    if not timed:
        benchmark.skipped = True
        return rows
    began = perf_counter()
    for _, candidate in timed:
        candidate.run()  # also a warm-up
    fitting = int(SECONDS_PER_COMPARISON / (perf_counter() - began))
    rounds = min(most_rounds, max(LEAST_ROUNDS, fitting))
    order = [pair for turn in range(rounds) for pair in _rotated(timed, turn)]
    # pytest-benchmark times one function; the function here is whichever candidate's turn it is.
    turns = cycle(order)
    benchmark.pedantic(
        lambda run: run(),
        setup=lambda: ((next(turns)[1].run,), {}),
        rounds=len(order),
    )
    if benchmark.enabled:
        for (row, _), seconds in zip(order, benchmark.stats.stats.data, strict=True):
            row.seconds.append(seconds)
    return rows


def _status(candidate: Candidate) -> str:
    try:
        result = candidate.run()
    # A peer that this machine cannot run (no compiler, not enough memory) is a line of the table, not the end of it.
    except Exception as error:
        return f"cannot run: {_first_line(error)}"
    try:
        if candidate.check is not None:
            candidate.check(result)
    except AssertionError as error:
        return f"wrong: {_first_line(error)}"
    return "ok"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rotated(items: list, by: int) -> list:
    by %= len(items)
    return items[by:] + items[:by]
