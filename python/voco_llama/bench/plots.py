"""Plots of files of results: ratios to ours as bars, and how time and memory grow.

matplotlib is imported when something is drawn.
"""

import hashlib
import io
import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from .markdown import number
from .measure import LIMIT, OURS, PART
from .sources import Key, Source, by_device, commits, implementations, newest
from .tables import OK, RATIO_DECIMALS, TIME_DECIMALS, mark

WIDTH, DPI = 8.2, 160  # inches; about twice as many pixels as a README is wide
SMALL = 7.5
# Colour-blind safe (Okabe-Ito), ours first.
BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#888888"
COLOURS = (ORANGE, "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#8c510a")
MARKERS = "sD^vP*h<>"
BARS = {OURS: BLUE, PART: "#bbbbbb", LIMIT: "#ffffff"}
BAR = 0.19  # inches from one bar to the next


def pictures(sources: Sequence[Source]) -> dict[tuple[str, str], tuple[str, bytes]]:
    """(file name, PNG) by device and suite: lines where comparisons have an x, bars of ratios for others that were timed."""
    import matplotlib

    drawn = {}
    for device, some in by_device(sources).items():
        found = newest(some)
        for suite in dict.fromkeys(key[0] for key in found):
            of_suite = {key: rows for key, rows in found.items() if key[0] == suite}
            lines = {key: rows for key, rows in of_suite.items() if rows[0]["x"] is not None}
            bars = {k: rows for k, rows in of_suite.items() if k not in lines and any(row["ratio"] for row in rows[1:])}
            title = f"{suite}, {device}"
            if not lines and not bars:
                continue
            name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
            origins = commits(some, suite)
            note = f"\nof several commits: {', '.join(origins)}" if len(origins) > 1 else ""
            with matplotlib.rc_context({"text.parse_math": False}):  # a dollar in a name is a dollar
                styles = _styles(sources, suite)
                figure = _scaling(lines, styles, title, note) if lines else _ratios(bars, title, note)
                drawn[device, suite] = f"{name}.png", _png(figure, digest(of_suite.values()))
    return drawn


def digest(comparisons: Iterable[Sequence[dict]]) -> str:
    """What a picture says of its rows under the keyword "Rows", so that a test can tell whether it is of a file."""
    return hashlib.sha256(json.dumps([rows for rows in comparisons if rows], sort_keys=True).encode()).hexdigest()


def _png(figure, rows: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    # Without other metadata: equal data make equal files.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None, "Rows": rows})
    return buffer.getvalue()


# ---- ratios ------------------------------------------------------------------------------------------------------------


def _ratios(found: Mapping[Key, list[dict]], title: str, note: str = ""):
    """A panel per comparison, two side by side where they have the same implementations in the same places.

    Those that were never timed are named below, and have no place.
    """
    from matplotlib.figure import Figure

    timed = {row["name"] for rows in found.values() for row in rows if row["ratio"] is not None}
    lines = _paired(found)
    names = [[name for name in implementations(found[key] for key in line) if name in timed] for line in lines]
    heights = [BAR * len(some) + 0.4 for some in names]
    columns = max(map(len, lines))
    figure = Figure(figsize=(WIDTH, sum(heights) + 1.0), layout="constrained")
    panels = figure.subplots(len(lines), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, some, row in zip(lines, names, panels):
        for panel, key in zip(row, line):
            _bars(panel, found[key], some)
            panel.set_title(f"{key[1]}, {key[2]}", fontsize=SMALL + 1, loc="left")
        for panel in row[1:]:
            panel.tick_params(labelleft=False)
        for panel in row[len(line) :]:
            panel.set_visible(False)
        _ratio_axis(row, [found[key] for key in line])
    figure.suptitle(f"{title}: time relative to ours (= 1), log scale{note}", fontsize=10)
    _ratio_legend(figure, found.values(), [name for name in implementations(found.values()) if name not in timed])
    return figure


def _paired(found: Mapping[Key, list[dict]]) -> list[list[Key]]:
    """Comparisons of one task in twos, and of two tasks where both have the same implementations."""
    lines: list[list[Key]] = []
    for key in sorted(found, key=lambda key: [other[1] for other in found].index(key[1])):
        if lines and len(lines[-1]) == 1:
            before = lines[-1][0]
            if before[1] == key[1] or set(implementations([found[before]])) == set(implementations([found[key]])):
                lines[-1].append(key)
                continue
        lines.append([key])
    return lines


def _bars(panel, rows: Sequence[dict], names: Sequence[str]) -> None:
    """A bar per implementation from 1 to its ratio, and beside the panel what it says in digits."""
    for row in (row for row in rows if row["name"] in names):
        y, colour = names.index(row["name"]), BARS.get(row["role"], ORANGE)
        if row["ratio"] is not None:
            style = {"hatch": "////", "edgecolor": GREY} if row["role"] == LIMIT else {}
            panel.barh(y, row["ratio"] - 1, left=1, height=0.7, color=colour, zorder=2, **style)
        if row["target"] is not None:
            panel.plot([row["target"]] * 2, [y - 0.42, y + 0.42], color="black", linewidth=1.6, zorder=3)
        panel.text(1.015, y, _said(row, rows[0]), transform=panel.get_yaxis_transform(), fontsize=SMALL, va="center")
    panel.axvline(1, color=BLUE, linewidth=1.6, zorder=3)
    panel.set_yticks(range(len(names)), names, fontsize=SMALL)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    _plain(panel)


def _said(row: dict, first: dict) -> str:
    if row["status"] != OK:
        return mark(row)
    if row is first or row["ratio"] is None:
        return f"{number(row['p50_ms'], TIME_DECIMALS)} ms"
    return number(row["ratio"], RATIO_DECIMALS)


def _plain(panel) -> None:
    panel.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _ratio_axis(panels, comparisons: Iterable[Sequence[dict]]) -> None:
    """One logarithmic axis for panels side by side, with ticks at round numbers.

    Bars of limits and parts may leave it: an empty kernel would make all others look alike.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows = [row for some in comparisons for row in some]
    values = [1.0] + [v for row in rows for v in (row["ratio"], row["target"]) if v and row["role"] not in (LIMIT, PART)]
    others = [row["ratio"] for row in rows if row["ratio"] and row["role"] in (LIMIT, PART)]
    low = min([*values, *(max(value, 0.2) for value in others)]) / 1.15
    high = max([2, *values, *(min(value, 20) for value in others)]) * 1.15
    digits = (1, 1.2, 1.5, 2, 3, 5, 7) if high / low < 5 else (1, 2, 5) if high / low < 300 else (1,)
    ticks = [digit * 10.0**power for power in range(-4, 7) for digit in digits]
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xlim(low, high)
        panel.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.tick_params(axis="x", labelsize=SMALL, labelbottom=True)


def _ratio_legend(figure, comparisons: Iterable[Sequence[dict]], never: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = [row for some in comparisons for row in some]
    roles = {row["role"] for row in rows}
    shown = [Patch(color=BLUE, label="ours"), Patch(color=ORANGE, label="peers")]
    if PART in roles:
        shown.append(Patch(color=BARS[PART], label="a part of the work"))
    if LIMIT in roles:
        shown.append(Patch(facecolor=BARS[LIMIT], edgecolor=GREY, hatch="////", label="limit: another result"))
    if any(row["target"] is not None for row in rows):
        tick = {"color": "black", "marker": "|", "linestyle": "", "markersize": 9, "markeredgewidth": 1.6}
        shown.append(Line2D([], [], label="wanted at least", **tick))
    note = _wrapped(f"not timed: {'; '.join(never)}") if never else None
    style = {"fontsize": SMALL, "title_fontsize": SMALL, "frameon": False}
    figure.legend(handles=shown, title=note, loc="outside lower center", ncols=len(shown), **style)


# ---- scaling -----------------------------------------------------------------------------------------------------------


def _scaling(found: Mapping[Key, list[dict]], styles: dict[str, dict], title: str, note: str = ""):
    """For each task time against x and, where it was measured, memory beside it; below, why lines end."""
    from matplotlib.figure import Figure

    tasks: dict[str, list[list[dict]]] = {}
    for key, rows in sorted(found.items(), key=lambda item: item[1][0]["x"]):
        tasks.setdefault(key[1], []).append(rows)
    notes = {task: _ends(comparisons) for task, comparisons in tasks.items()}
    heights = [2.5 + 0.14 * notes[task].count("\n") for task in tasks]
    figure = Figure(figsize=(WIDTH, sum(heights) + 1.0), layout="constrained")
    parts = figure.subfigures(len(tasks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (task, comparisons) in zip(parts, tasks.items()):
        left, right = part.subplots(1, 2)
        _lines(left, comparisons, styles, "p50_ms", 1, f"{task}, median in ms")
        _lines(right, comparisons, styles, "peak_bytes", 1e6, f"{task}, peak memory in MB")
        part.supxlabel(notes[task], fontsize=SMALL, x=0.01, ha="left")
    figure.suptitle(f"{title}; log scales, x where a line ends early{note}", fontsize=10)
    timed = {row["name"] for rows in found.values() for row in rows if row["p50_ms"] or row["peak_bytes"]}
    _line_legend(figure, {name: style for name, style in styles.items() if name in timed})
    return figure


def _styles(sources: Sequence[Source], suite: str) -> dict[str, dict]:
    """How each implementation that has a line is drawn, in order: ours stands out, limits stand back.

    Of all files at once, so that it looks alike on every device.
    """
    comparisons = [rows for source in sources for rows in source.select([suite]).values()]
    ours = {rows[0]["name"] for rows in comparisons}
    rows = {row["name"]: row for some in comparisons for row in some if row["p50_ms"] or row["peak_bytes"]}
    styles, peers = {}, 0
    for name in (name for name in implementations(comparisons) if name in rows):
        if name in ours:
            styles[name] = {"color": BLUE, "marker": "o", "linewidth": 2.4}
        elif rows[name]["role"] == LIMIT:
            styles[name] = {"color": GREY, "marker": ".", "linewidth": 1.2, "linestyle": "-."}
        else:
            colour, marker = COLOURS[peers % len(COLOURS)], MARKERS[peers % len(MARKERS)]
            styles[name] = {"color": colour, "marker": marker, "linewidth": 1.2}
            peers += 1
    return styles


def _lines(panel, comparisons: Sequence[list[dict]], styles: dict[str, dict], key: str, unit: float, title: str) -> None:
    series = _series(comparisons, key, unit)
    if not series:
        panel.set_visible(False)
        return
    last = comparisons[-1][0]["x"]
    for name in [name for name in styles if name in series][::-1]:  # ours on top
        xs, ys = zip(*series[name])
        panel.plot(xs, ys, markersize=3.5, **styles[name])
        if xs[-1] < last:
            panel.plot(xs[-1], ys[-1], marker="x", markersize=9, markeredgewidth=2, color=styles[name]["color"])
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    _guides(panel, series[next(name for name in styles if name in series)])
    _line_axis(panel, sorted({x for points in series.values() for x, _ in points}))
    panel.set_title(title, fontsize=SMALL + 1, loc="left")


def _series(comparisons: Sequence[list[dict]], key: str, unit: float) -> dict[str, list[tuple[int, float]]]:
    """(x, value) of every implementation that has values above zero."""
    series: dict[str, list[tuple[int, float]]] = {}
    for rows in comparisons:
        for row in rows:
            if row[key]:
                series.setdefault(row["name"], []).append((row["x"], row[key] / unit))
    return series


def _guides(panel, ours: Sequence[tuple[int, float]]) -> None:
    """O(N) and O(N^2) from where our line begins, without a change of the axes."""
    low, high = panel.get_ylim()
    (x, y), end = ours[0], panel.get_xlim()[1]
    for power, style in ((1, "--"), (2, ":")):
        panel.plot([x, end], [y, y * (end / x) ** power], style, color=GREY, linewidth=1, zorder=1)
    panel.set_ylim(low, high)


def _line_axis(panel, xs: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    left, right = panel.get_xlim()
    panel.set_xlim(left, right)
    step = -(-len(xs) // 7)
    panel.xaxis.set_major_locator(FixedLocator(xs[::step]))
    panel.xaxis.set_minor_locator(NullLocator())
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    panel.tick_params(labelsize=SMALL)
    panel.grid(color="#dddddd", linewidth=0.6, zorder=0)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _line_legend(figure, styles: dict[str, dict]) -> None:
    from matplotlib.lines import Line2D

    shown = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    shown += [Line2D([], [], color=GREY, linestyle=style, label=label) for style, label in (("--", "O(N)"), (":", "O(N²)"))]
    figure.legend(handles=shown, loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False)


def _ends(comparisons: Sequence[list[dict]]) -> str:
    """A line for every implementation that does not reach the end, with the first reason why."""
    where: dict[str, tuple[int, str]] = {}
    for rows in comparisons:
        for row in rows:
            if row["status"] != OK:
                where.setdefault(row["name"], (row["x"], row["status"]))
    return "\n".join(_wrapped(f"{name}, from {x} on: {status}") for name, (x, status) in where.items())


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 130, subsequent_indent="   "))
