"""Results of finished runs, and the statistics that tables and plots show."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KEYS = {"system", "counts", "seed", "smoke", "evaluations", "losses", "seconds", "digest", "settings", "machine"}
# How many standard errors upper and lower bound must be apart for a share of their distance to mean something.
APART = 3


@dataclass(frozen=True)
class Row:
    """Weights and what they are shown: trained as `trained` (a system), at `counts` tokens, answering at `tokens`."""

    trained: str
    counts: tuple[int, ...]
    system: str
    tokens: int


UPPER = Row("upper_bound", (1,), "upper_bound", 1)
LOWER = Row("upper_bound", (1,), "lower_bound", 1)


def row_of(system: str, tokens: int) -> Row:
    """A system evaluated at the number of tokens that it was trained with."""
    return Row(system, (tokens,), system, tokens)


@dataclass(frozen=True)
class Value:
    """Mean and sample standard deviation (None for one seed) over seeds."""

    mean: float
    spread: float | None
    seeds: int


class Scores:
    """Hits of every row, seed and kind of question, of results of the same settings."""

    def __init__(self, results: Sequence[dict]):
        self.results = list(results)
        self._cells: dict[Row, dict[int, dict[str, dict[str, int]]]] = {}
        for result in self.results:
            for one in result["evaluations"]:
                row = Row(result["system"], tuple(result["counts"]), one["system"], one["tokens"])
                self._cells.setdefault(row, {})[result["seed"]] = one["scores"]

    def accuracy(self, row: Row, kinds: Sequence[str]) -> Value | None:
        """Mean accuracy over kinds of questions, 0 to 1; None where no run of it has finished."""
        return _value([_mean(scores, kinds)[0] for scores in self._cells.get(row, {}).values()])

    def retention(self, row: Row, kinds: Sequence[str]) -> Value | str | None:
        """(result - lower) / (upper - lower), the bounds being those of the same seed.

        Returns:
            None where a seed's result or bound is not there; a text that says so where the bounds of a seed are too close.
        """
        rates = []
        for seed, scores in self._cells.get(row, {}).items():
            bounds = [self._cells.get(bound, {}).get(seed) for bound in (UPPER, LOWER)]
            if None in bounds:
                continue
            (upper, variance), (lower, other) = (_mean(bound, kinds) for bound in bounds)
            if upper - lower <= APART * math.sqrt(variance + other):
                return "bounds too close"
            rates.append((_mean(scores, kinds)[0] - lower) / (upper - lower))
        return _value(rates)


def _mean(scores: dict[str, dict[str, int]], kinds: Sequence[str]) -> tuple[float, float]:
    """Mean accuracy over kinds, each of the same weight, and its binomial variance."""
    shares = [(scores[kind]["hits"] / scores[kind]["total"], scores[kind]["total"]) for kind in kinds]
    n = len(shares)
    return sum(p for p, _ in shares) / n, sum(p * (1 - p) / total for p, total in shares) / n**2


def _value(numbers: Sequence[float]) -> Value | None:
    if not numbers:
        return None
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Value(statistics.fmean(numbers), spread, len(numbers))


def load(out: Path) -> list[dict]:
    """All results in the folder of a study.

    Raises:
        ValueError: a file that is no result, or results of different settings.
    """
    results = []
    for file in sorted((out / "results").glob("*.json")):
        try:
            result = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} must be a result, but is no JSON: {error}") from error
        if not isinstance(result, dict) or KEYS - result.keys():
            raise ValueError(f"{file} must be a result, but lacks some of {', '.join(sorted(KEYS))}")
        if results and result["digest"] != results[0]["digest"]:
            raise ValueError(f"results must be of the same settings, but {file} is of others")
        results.append(result)
    return results
