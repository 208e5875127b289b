"""Implementations of one task: held to the truth first, then run in turns.

The machine may be shared and its speed may drift. Every round therefore runs each implementation once, in an order that
rotates, and only medians over the same rounds are divided by each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

from .clock import Ceilings, Clock, release

# A round that alone takes longer than all should is repeated FEWEST times.
FEWEST, LEAST_ROUNDS, MOST_ROUNDS = 3, 5, 30

# What a row is to its comparison. A limit gives another result, and says what something simpler costs; a part is some of the
# work of other rows.
OURS, PEER, LIMIT, PART = "ours", "peer", "limit", "part"


@dataclass(frozen=True)
class Candidate:
    """One implementation of a task.

    Attributes:
        name: how tables call it.
        run: does the task once and returns its result.
        check: raises AssertionError where the result is wrong; None where there is nothing to compare.
        target: the wanted ratio of its median to the first candidate's; for tables, never enforced.
        role: OURS, PEER, LIMIT or PART.
        absent: why it is not run here, such as a package that is not installed; None where it is.
        unchecked: why there is no `check` of one that claims to do the whole task; None where there is one.
        captured: whether it replays a CUDA graph, whose memory no allocator sees.
        kept_bytes: what it keeps between calls beside its inputs, such as a mask; it counts as its memory.
        facts: what else a reader wants to know of it, for its row.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], None] | None = None
    target: float | None = None
    role: str = PEER
    absent: str | None = None
    facts: dict = field(default_factory=dict)
    unchecked: str | None = None
    captured: bool = False
    kept_bytes: int = 0


@dataclass(frozen=True)
class Work:
    """What a task has to do, whoever does it.

    Attributes:
        flops: floating-point operations that are useful, from the layout; None where none are counted.
        moved_bytes: bytes of the inputs and the results, each moved once; None where they are not counted.
    """

    flops: float | None = None
    moved_bytes: float | None = None


@dataclass
class Row:
    """What became of one candidate. `seconds` has a time per round, and is empty unless `status` is "ok".

    Attributes:
        status: "ok", "wrong: ...", "cannot run: ..." or "not run: ...".
        peak_bytes: memory at its peak beyond inputs; None where nobody measured.
    """

    name: str
    status: str
    target: float | None = None
    role: str = PEER
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    facts: dict = field(default_factory=dict)

    def percentile(self, percent: int) -> float:
        """Seconds, interpolated between rounds."""
        if len(self.seconds) == 1:
            return self.seconds[0]
        return quantiles(self.seconds, n=100, method="inclusive")[percent - 1]


@dataclass
class Comparison:
    """All rows of one task on one shape; ratios are relative to the first row.

    Attributes:
        suite, task, shape: what was done, from the general to the special.
        dtype: of the inputs, as torch calls it without "torch."; None where that says nothing.
        x: what a scaling plot has on its axis.
    """

    suite: str
    task: str
    shape: str
    rows: list[Row]
    work: Work = Work()
    dtype: str | None = None
    x: int | None = None

    def ratio(self, row: Row) -> float | None:
        """How many times longer `row` takes than the first row; None where either was not timed."""
        first = self.rows[0]
        return row.percentile(50) / first.percentile(50) if first.seconds and row.seconds else None

    def as_rows(self, ceilings: Ceilings | None) -> list[dict]:
        """For JSON: a flat row per candidate, times in milliseconds.

        `roof` says how near a row comes to the lower of the device's two roofs: 1 is as fast as its useful work allows.
        """
        return [self._as_dict(row, ceilings) for row in self.rows]

    def _as_dict(self, row: Row, ceilings: Ceilings | None) -> dict:
        work, measured = self.work, bool(row.seconds)
        ratio = self.ratio(row)
        roof = None
        whole = row.role in (OURS, PEER)  # the others do not do this work
        if measured and whole and ceilings is not None and (work.flops or work.moved_bytes):
            roof = ceilings.share(work.flops or 0, work.moved_bytes or 0, row.percentile(50))
        times = {f"p{p}_ms": round(row.percentile(p) * 1e3, 5) if measured else None for p in (20, 50, 80)}
        return {
            "suite": self.suite,
            "task": self.task,
            "shape": self.shape,
            "x": self.x,
            "dtype": self.dtype,
            "name": row.name,
            "role": row.role,
            "status": row.status,
            **times,
            "rounds": len(row.seconds),
            "ratio": None if ratio is None else round(ratio, 4),
            "target": row.target,
            "flops": work.flops,
            "bytes": work.moved_bytes,
            "roof": None if roof is None else round(roof, 4),
            "peak_bytes": row.peak_bytes,
            "facts": row.facts,
        }


def compare(
    candidates: Sequence[Candidate],
    clock: Clock,
    *,
    seconds: float = 3.0,
    most_rounds: int = MOST_ROUNDS,
    drive: Callable[[list[Callable[[], Any]]], Sequence[float]] | None = None,
) -> list[Row]:
    """Check every candidate, then run those that passed in rounds of one turn each, in an order that rotates.

    Args:
        seconds: about how long the rounds may take; at least LEAST_ROUNDS are run, or FEWEST of very slow ones.
        drive: runs what it is given, one after the other, and returns the seconds of each; the clock where None.
    """
    for c in candidates:
        if c.role in (OURS, PEER) and c.absent is None and (c.check is None) == (c.unchecked is None):
            raise ValueError(f"check or unchecked must be given of {c.name!r}, and not both")
    rows = [Row(c.name, _status(c, clock), c.target, c.role, facts=dict(c.facts)) for c in candidates]
    tried = [(row, candidate) for row, candidate in zip(rows, candidates, strict=True) if row.status == "ok"]
    once = sum(_try_once(row, candidate, clock) for row, candidate in tried)
    timed = [(row, _guarded(row, candidate.run, clock)) for row, candidate in tried if row.status == "ok"]
    if not timed:
        return rows
    least = FEWEST if once > seconds else LEAST_ROUNDS
    rounds = min(most_rounds, max(least, int(seconds / max(once, 1e-9))))
    order = [pair for turn in range(rounds) for pair in _rotated(timed, turn)]
    taken = (drive or clock.drive)([run for _, run in order])
    for (row, _), time in zip(order, taken, strict=True):
        if row.status == "ok":
            row.seconds.append(time)
    return rows


def _guarded(row: Row, run: Callable[[], Any], clock: Clock) -> Callable[[], Any]:
    """`run`, whose failure in some later round ends its own row alone."""

    def guarded() -> Any:
        if row.status != "ok":
            return None
        try:
            return run()
        except Exception as error:
            _fail(row, error, clock)

    return guarded


def _try_once(row: Row, candidate: Candidate, clock: Clock) -> float:
    """Seconds of a run, after one that shows its memory (the second warm-up; the check was the first)."""
    try:
        peak = clock.peak_bytes(candidate.run)
        row.peak_bytes = None if candidate.captured else peak + candidate.kept_bytes
        return clock.time(candidate.run)
    # The check's run may have had more memory than there is now.
    except Exception as error:
        _fail(row, error, clock)
        return 0.0


def _fail(row: Row, error: Exception, clock: Clock) -> None:
    row.status, row.peak_bytes = f"cannot run: {first_line(error)}", None
    release(clock.device)


def _status(candidate: Candidate, clock: Clock) -> str:
    if candidate.absent is not None:
        return f"not run: {candidate.absent}"
    status = "ok"
    try:
        result = candidate.run()
        if candidate.check is not None:
            candidate.check(result)
    except AssertionError as error:
        status = f"wrong: {first_line(error)}"
    # A peer that this machine cannot run (no compiler, not enough memory) is a line of the table, not the end of it.
    except Exception as error:
        status = f"cannot run: {first_line(error)}"
    if status != "ok":
        result = None
        release(clock.device)
    return status


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rotated(items: list, by: int) -> list:
    by %= len(items)
    return items[by:] + items[:by]
