"""What table 7 of the VoCo-LLaMA paper tells, turned on its side, since we have more measures than systems."""

from collections.abc import Iterable, Mapping, Sequence

from .markdown import FLOPS, Units, escape, number, table, unit_for
from .paper import FULL, NO_CACHE
from .sources import implementations
from .tables import COLUMNS, OK, TIME_DECIMALS, label, mark, reasons

MEGABYTES = ((1e6, "MB"),)  # as in the paper
Rows = Sequence[Mapping | None]  # of each system, in one order; None where a task leaves it out
Line = tuple[str, list[str]]


def measured(tasks: Mapping[str, Sequence[dict]]) -> list[str]:
    """Systems across, no cache and a full one first as in the paper; down K/V, FLOPs, and a time for each task.

    Args:
        tasks: the rows of one shape by task, such as "time to first token". Facts are kv_length, kv_bytes, flops and
            flops_to_first (FLOPs by tokens of text), and of some `targets`: wanted kv_change and flops_change.
    """
    names = _in_order(implementations(tasks.values()))
    by_task = {task: [next((row for row in rows if row["name"] == n), None) for n in names] for task, rows in tasks.items()}
    known = [next(row for row in rows if row is not None) for rows in zip(*by_task.values())]
    lines = _costs(names, [row["facts"] for row in known])
    for task, rows in by_task.items():
        times = [None if row is None else row["p50_ms"] for row in rows]
        lines.append((f"{escape(task)}, ms", [_time(row) for row in rows]))
        lines.append(_changes(names, times, NO_CACHE))
        if any(row is not None and row["target"] is not None for row in rows):
            lines.append(("ratio [target]", ["" if row is None else COLUMNS["ratio"].of(row) or "" for row in rows]))
    body = _table([label(row) for row in known], lines)
    why = reasons({escape(task): rows for task, rows in tasks.items()})
    return [*body, *([""] if why else []), *why]


def published(systems: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """The same of what a paper says of systems: kv_length, kv_bytes, flops and time_ms."""
    names = _in_order(systems)
    times = [systems[name]["time_ms"] for name in names]
    lines = _costs(names, [systems[name] for name in names])
    lines += [("time, ms", [f"{time:.1f}" for time in times]), _changes(names, times, NO_CACHE)]
    return _table([escape(name) for name in names], lines)


def _in_order(names: Iterable[str]) -> list[str]:
    """The same with the two that others are compared with first."""
    return sorted(names, key=lambda name: (name != NO_CACHE, name != FULL))


def _costs(names: Sequence[str], facts: Sequence[Mapping]) -> list[Line]:
    targets = [own.get("targets", {}) for own in facts]
    kv = [own.get("kv_bytes") for own in facts]
    lines = [
        ("K/V length", ["" if own.get("kv_length") is None else str(own["kv_length"]) for own in facts]),
        _values("K/V, {}", kv, MEGABYTES),
        _changes(names, kv, FULL, [own.get("kv_change") for own in targets]),
    ]
    by_text = [own.get("flops_to_first", {"": own.get("flops")}) for own in facts]
    unit = unit_for([flops for own in by_text for flops in own.values()], FLOPS)
    # The target is about the shortest text, which is the first.
    wanted = [own.get("flops_change") for own in targets]
    for text in dict.fromkeys(text for own in by_text for text in own):
        flops = [own.get(text) for own in by_text]
        lines.append(_values("{}" + f" to the first token, {text} tokens of text" * bool(text), flops, (unit,)))
        lines.append(_changes(names, flops, NO_CACHE, wanted))
        wanted = None
    return lines


def _time(row: Mapping | None) -> str:
    if row is None:
        return ""
    return number(row["p50_ms"], TIME_DECIMALS) if row["status"] == OK else mark(row)


def _values(title: str, values: Sequence[float | None], units: Units = ((1, ""),)) -> Line:
    size, unit = unit_for(values, units)
    return title.format(unit), ["" if value is None else number(value / size) for value in values]


def _changes(
    names: Sequence[str], values: Sequence[float | None], base: str, wanted: Sequence[float | None] | None = None
) -> Line:
    """Changes in percent with one digit behind the point, as in the paper: 99.8 % less is far from 99.9 % less."""
    first = dict(zip(names, values)).get(base)
    cells = ["" if not first or not v or name == base else f"{100 * (v / first - 1):.1f}" for name, v in zip(names, values)]
    if wanted is not None:
        cells = [f"{cell} [{100 * want:.1f}]" if want is not None else cell for cell, want in zip(cells, wanted)]
    return f"- against {base}, %", cells


def _table(names: Sequence[str], lines: Iterable[Line]) -> list[str]:
    shown = [[title, *cells] for title, cells in lines if any(cells)]
    return table(["", *names], shown, "l" + "r" * len(names))
