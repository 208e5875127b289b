"""Tables of rows of results: one comparison, many side by side, and the layout of the paper's table 7."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .derived import derived
from .markdown import BYTE_RATES, BYTES, FLOP_RATES, Units, escape, number, table, unit_for
from .measure import LEAST_ROUNDS, LIMIT, OURS, PART, PEER

OK = "ok"
STATUS = "status"
WHOLE = (OURS, PEER)  # roles that do all of a comparison's work
# Digits behind the point that files have of times in milliseconds, of ratios, and of shares in percent.
TIME_DECIMALS, RATIO_DECIMALS, SHARE_DECIMALS = 5, 4, 2


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading. "{}" is where the unit goes; a part in brackets is left out where no cell has one.
        of: what a row has there, a number or a text; None where it has nothing.
        units: of which one is chosen for the whole column.
    """

    title: str
    of: Callable[[dict], float | str | None]
    units: Units = ((1, ""),)

    def cells(self, rows: Iterable[dict]) -> tuple[str, list[str]]:
        """The heading, and a cell for each row, empty where it has nothing."""
        values = [self.of(row) for row in rows]
        factor, unit = unit_for([value for value in values if isinstance(value, int | float)], self.units)
        cells = [_text(value, factor) for value in values]
        title = self.title if any("[" in cell for cell in cells) else self.title.split(" [")[0]
        return title.replace("{}", unit), cells


def _text(value: float | str | None, factor: float) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else number(value if factor == 1 else value / factor)


def _times(row: dict) -> str | None:
    if row["p50_ms"] is None:
        return None
    low, middle, high = (number(row[f"p{percent}_ms"], TIME_DECIMALS) for percent in (20, 50, 80))
    return f"{middle} [{low} to {high}]"


def _ratio(row: dict) -> str | None:
    parts = [number(row["ratio"], RATIO_DECIMALS)] if row["ratio"] is not None else []
    parts += [f"[{number(row['target'])}]"] if row["target"] is not None else []
    return " ".join(parts) or None


def _per_second(what: str) -> Callable[[dict], float | None]:
    """Of a comparison's work per second; limits and parts do other work."""
    return lambda row: row[what] / row["p50_ms"] * 1e3 if row["p50_ms"] and row[what] and row["role"] in WHOLE else None


def _percent(share: float | None) -> str | None:
    return None if share is None else number(100 * share, SHARE_DECIMALS)


COLUMNS = {
    "p50": Column("p50 ms [p20 to p80]", _times),
    "ratio": Column("ratio [target]", _ratio),
    "rate": Column("{}", _per_second("flops"), FLOP_RATES),
    "bandwidth": Column("{}", _per_second("bytes"), BYTE_RATES),
    "roof": Column("% of roof", lambda row: _percent(row["roof"]) if row["role"] in WHOLE else None),
    "memory": Column("peak {}", lambda row: row["peak_bytes"], BYTES),
    "tokens": Column("tokens/s", lambda row: derived(row).get("tokens_per_s")),
    "mfu": Column("MFU %", lambda row: _percent(derived(row).get("mfu"))),
}
# Where implementations stand side by side there is no room for a spread.
MEDIAN = Column("p50 ms", lambda row: None if row["p50_ms"] is None else number(row["p50_ms"], TIME_DECIMALS))


def column(key: str) -> Column:
    """One of COLUMNS, or the fact of that name."""
    return COLUMNS.get(key) or Column(escape(key), lambda row: _fact(row["facts"].get(key)))


def _fact(value) -> float | str | None:
    return value if value is None or type(value) in (int, float) else escape(str(value))


def said(row: dict) -> str:
    """The status of a row, with the number of its rounds where these are few."""
    few = row["status"] == OK and row["rounds"] < LEAST_ROUNDS
    return f"{OK}, {row['rounds']} round{'s' * (row['rounds'] != 1)}" if few else row["status"]


def label(row: dict) -> str:
    """An implementation's name, and what it is to the comparison unless it takes part in it."""
    return escape(row["name"]) + (f" ({row['role']})" if row["role"] in (LIMIT, PART) else "")


def comparison(rows: Sequence[dict], titles: Mapping[str, str] | None = None) -> list[str]:
    """A line for each implementation; columns that are empty throughout are left out.

    Args:
        titles: which of COLUMNS or facts, in this order, each with its heading or, for that which it has, its name; all of
            COLUMNS where None.
    """
    found = []
    for key, title in (titles or dict(zip(COLUMNS, COLUMNS))).items():
        heading, cells = column(key).cells(rows)
        if any(cells):
            found.append((heading if title == key else title, cells))
    align = "l" + "r" * len(found)
    if any(said(row) != OK for row in rows):
        found.append((STATUS, [escape(said(row)) for row in rows]))
        align += "l"
    head = ["", *(title for title, _ in found)]
    return table(head, [[label(row), *cells] for row, *cells in zip(rows, *(cells for _, cells in found))], align)


def grid(shown: Column, columns: Mapping[str, Sequence[dict]], names: Sequence[str]) -> list[str]:
    """Implementations down, comparisons across; what was not run is marked, and `reasons` says why.

    Args:
        columns: by heading, the rows of a comparison.
        names: of implementations that any of them has, in order.
    """
    every = [row for rows in columns.values() for row in rows]
    title, cells = shown.cells(every)
    # By identity: two comparisons may have equal rows.
    texts = {id(row): cell if row["status"] == OK else mark(row) for row, cell in zip(every, cells)}
    lines = []
    for name in names:
        found = [next((row for row in rows if row["name"] == name), None) for rows in columns.values()]
        first = next(row for row in found if row is not None)
        lines.append([label(first), *("" if row is None else texts[id(row)] for row in found)])
    return table([title, *columns], lines, "l" + "r" * len(columns))


def mark(row: dict) -> str:
    """What became of a row, without the reason: "ok", "wrong", "cannot run" or "not run"."""
    return row["status"].split(":")[0]


def reasons(columns: Mapping[str, Sequence[dict]]) -> list[str]:
    """Why rows of a grid have no value, or one of few rounds.

    Reasons that differ in numbers alone are one, with those of the first.
    """
    where: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for title, rows in columns.items():
        for row in rows:
            if said(row) != OK:
                alike = row["name"], re.sub(r"\d+(\.\d+)?", "", said(row))
                where.setdefault(alike, (said(row), []))[1].append(title)
    lines = []
    for (name, _), (why, titles) in where.items():
        all_of_it = titles == [title for title, rows in columns.items() if any(row["name"] == name for row in rows)]
        place = "" if all_of_it else f" ({', '.join(titles)})"
        lines.append(f"- {escape(name)}{place}: {escape(why)}")
    return lines
