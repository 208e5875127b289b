"""Numbers and tables as Markdown that reads well as plain text too."""

import re
from collections.abc import Iterable, Sequence
from statistics import median_high

# (how many of the base unit, its name), the largest first.
Units = tuple[tuple[float, str], ...]
FLOPS: Units = ((1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))
FLOP_RATES: Units = ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"))
BYTE_RATES: Units = ((1e9, "GB/s"),)
BYTES: Units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def number(value: float, decimals: int = 9) -> str:
    """Three significant digits without an exponent; integers below a million are written in full.

    Args:
        decimals: at most so many digits behind the point, since a file has no more.
    """
    if isinstance(value, int) and abs(value) < 10**6:
        return str(value)
    rounded = f"{value:.2e}"
    exponent = int(rounded.split("e")[1])
    return f"{float(rounded):.{min(max(2 - exponent, 0), decimals)}f}" if float(rounded) else "0"


def unit_for(values: Iterable[float | None], units: Units) -> tuple[float, str]:
    """The largest unit that half of the values reach, so that a column has one; else the smallest."""
    sizes = [abs(value) for value in values if value is not None]
    middle = median_high(sizes) if sizes else 0
    return next((unit for unit in units if middle >= unit[0]), units[-1])


def escape(text: str) -> str:
    """A text of any lines as one line that is nothing but text, also in a cell."""
    return re.sub(r"([|*`\[\]\\])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Lines of a table with aligned columns.

    Args:
        head, rows: cells, which are Markdown already.
        align: "l" or "r" for each column. A last column on the left is not padded: it may have one very long cell.
    """
    widths = [max(3, *(len(row[i]) for row in [head, *rows])) for i in range(len(head))]
    if align[-1] == "l":
        widths[-1] = 0

    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(n) if side == "l" else cell.rjust(n) for cell, n, side in zip(cells, widths, align))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * max(n, 3) if side == "l" else "-" * (n - 1) + ":" for n, side in zip(widths, align)]
    return [line(head), line(rule), *map(line, rows)]
