"""`python -m voco_llama.retention`, or `make retention`."""

import argparse
import logging
import multiprocessing
import signal
import sys
from pathlib import Path

from transformers.utils import logging as transformers_logging

from voco_llama.bench.files import write_atomically

from . import plots, results, runs, tables
from .plan import FULL, SEEDS, SMOKE, Run, Settings, all_runs, smoke_runs


class TimeUp(Exception):
    """The minutes are over."""


def main(arguments: list[str] | None = None) -> int:
    """Carry out what has no result yet, and write `tables.md` and plots; 2 for bad options, else 0."""
    asked = _parser().parse_args(arguments)
    settings = SMOKE if asked.smoke else FULL
    try:
        if asked.smoke and (asked.only or asked.counts or asked.seeds):
            raise ValueError("smoke must stand alone, but only, counts or seeds were given, too")
        wanted = smoke_runs() if asked.smoke else list(all_runs(asked.only, asked.counts, asked.seeds or SEEDS))
        _check(asked.out, settings)
        runs.open_study(asked.out, settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not asked.tables:
        _work(wanted, asked.out, settings, asked.minutes, asked.jobs)
    scores = results.Scores(results.load(asked.out))
    write_atomically(asked.out / "tables.md", tables.markdown(scores).encode())
    for name, picture in plots.pictures(scores).items():
        write_atomically(asked.out / name, picture)
    missing = [run.name for run in wanted if not runs.result_file(run, asked.out).is_file()]
    print(f"{asked.out / 'tables.md'}: {len(wanted) - len(missing)} of {len(wanted)} runs are done")
    return 0


def _work(wanted: list[Run], out: Path, settings: Settings, minutes: float | None, jobs: int) -> None:
    """Share runs among processes, each of which takes what no other is at."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_until, args=(wanted, out, settings, minutes)) for _ in range(jobs - 1)]
    for other in others:
        other.start()
    _until(wanted, out, settings, minutes)
    for other in others:
        other.join()


def _until(wanted: list[Run], out: Path, settings: Settings, minutes: float | None) -> None:
    """Carry runs out until the time is up; the one at hand goes on from its checkpoint the next time."""

    def stop(*_):
        raise TimeUp

    if minutes is not None:
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        runs.carry_out(wanted, out, settings)
    except TimeUp:
        print("the time is up", file=sys.stderr)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _check(out: Path, settings: Settings) -> None:
    """Smoke runs are no results, and results are kept in one place."""
    if settings.smoke and {"bench", "results"} <= set(out.resolve().parts):
        raise ValueError(f"out must be outside of bench/results for a smoke run, but was {out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m voco_llama.retention", description=main.__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs, results, tables and plots")
    parser.add_argument("--only", type=_words, help="systems: upper_bound,voco,avg_pool,q_former,llama_vid")
    parser.add_argument("--counts", type=_numbers, help="numbers of tokens; without it, the elastic model is trained, too")
    parser.add_argument("--seeds", type=_numbers, help="default: 0,1,2")
    parser.add_argument("--minutes", type=float, help="stop then; called again, it goes on")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the runs")
    parser.add_argument("--smoke", action="store_true", help="three systems, one seed, a few steps: no result")
    parser.add_argument("--tables", action="store_true", help="train nothing, only write tables and plots")
    return parser


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
