"""Reports as Markdown from any set of files of results: whole ones, or what a View of them names.

Numbers have three significant digits, and stand only where a file has them. Whatever was not run is marked, with its reason.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import paper, table7_view, tables
from .markdown import BYTE_RATES, FLOP_RATES, escape, number, table, unit_for
from .sources import Key, Source, by_device, implementations, is_named, missing, open_sources

# What --table may name beside the suites of files.
FILES, MISSING, PAPER = SPECIAL = "files", "missing", "paper"
TABLE7 = "table7"
# What a file says of ceilings: its words for readers, its key, and in which unit that is.
CEILINGS = (("matmul", "matmul_tflops", 1e12, FLOP_RATES), ("copy", "copy_gb_per_s", 1e9, BYTE_RATES))
HOW_TO_READ = """\
Times are medians [20th to 80th percentile] of rounds in which every implementation has one turn. A ratio is a median
divided by that of the first line, ours, in the same rounds; what is wanted stands in brackets. FLOP/s and GB/s count
useful work: the pairs that the mask allows, and inputs and results moved once. The roof is the least time that the
device's measured matmul and copy rates allow for that work, as a share of the time taken. Peak memory is what torch
allocates beyond what was held before; it does not see numpy, with which a CPU makes plans. "limit" is another
result, to see how far ours is from it; "part" is some of the work of other lines. What had fewer than 5 rounds
says how many. Empty: nobody measured it."""


@dataclass(frozen=True)
class View:
    """What to show of files of results, as the options of `voco bench report` say it.

    Attributes:
        files: files of results.
        tables: which comparisons, each suite[/task[/shape]]; "files" is the table of files, "missing" the list of what
            no file has, "paper" the paper's table 7. Everything where there are none.
        summary: a name of COLUMNS for one table with implementations down and shapes across; a table per comparison
            where None.
        rows: which implementations, each NAME or "NAME as TITLE"; all where there are none.
        columns: which columns, likewise: of a summary shapes, of a comparison names of COLUMNS or facts.
    """

    files: tuple[Path, ...]
    tables: tuple[str, ...] = ()
    summary: str | None = None
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether it is a report on everything."""
        return self.summary is None and not (self.tables or self.rows or self.columns)


def render(view: View, root: Path, folder: Path) -> str:
    """What a view shows, as Markdown without a last line break.

    Args:
        root: where the names of its files begin.
        folder: where links begin: that of the document.

    Raises:
        ValueError: a file is none of results, or has nothing of what is named.
    """
    sources = open_sources(root / path for path in view.files)
    if not sources:
        raise ValueError("files must name at least one file of results, but there was none")
    if view.is_whole:
        return "\n".join(whole(sources, folder, {}, missing(sources)))
    blocks = [_special(name, sources, folder) for name in view.tables if name in SPECIAL]
    chosen = [name for name in view.tables if name not in SPECIAL]
    if chosen or not blocks:
        found = {source: source.select(chosen) for source in sources}
        _require_known(view, chosen, found)
        blocks += [_shown(view, source, _renamed(some, view.rows), folder) for source, some in found.items()]
    return "\n".join(_joined(blocks))


def of_content(content: dict) -> str:
    """Tables of what was measured just now, as Markdown."""
    return "\n".join(_joined(_comparisons(Source(Path(), content).comparisons())))


def _shown(view: View, source: Source, found: Mapping[Key, list[dict]], folder: Path) -> list[str]:
    """Tables of one file and what they come from; nothing where it has nothing of what is wanted."""
    if view.summary is None:
        lines = _joined(_comparisons(found, _titles(view.columns)))
    else:
        lines = _summary(found, view)
    return [*lines, "", provenance(source, found.values(), folder)] if lines else []


def _special(name: str, sources: Sequence[Source], folder: Path) -> list[str]:
    if name == PAPER:
        return paper_table()
    return files_table(sources, folder) if name == FILES else [f"- {line}" for line in missing(sources)]


# ---- choosing ----------------------------------------------------------------------------------------------------------


def _titles(options: Sequence[str]) -> dict[str, str]:
    """{name: title} of options "NAME" or "NAME as TITLE"."""
    pairs = [option.partition(" as ") for option in options]
    return {name: title or name for name, _, title in pairs}


def _require_known(view: View, chosen: Sequence[str], found: Mapping[Source, Mapping[Key, list[dict]]]) -> None:
    """Raises ValueError where a view names what no file has, or two things alike."""
    keys = dict.fromkeys(key for source in found for key in source.comparisons())
    for name in chosen:
        if not any(is_named(key, name) for key in keys):
            _reject("table", dict.fromkeys("/".join(key[:2]) for key in keys), name)
    rows = [row for some in found.values() for own in some.values() for row in own]
    if view.summary is not None and view.summary not in tables.COLUMNS:
        _reject("summary", tables.COLUMNS, view.summary)
    shapes = [key[2] for some in found.values() for key in some]
    facts = [*tables.COLUMNS, *(fact for row in rows for fact in row["facts"])]
    for what, options, there in (
        ("row", view.rows, [row["name"] for row in rows]),
        ("column", view.columns, facts if view.summary is None else shapes),
    ):
        wanted = _titles(options)
        for name in wanted:
            if name not in there:
                _reject(what, dict.fromkeys(there), name)
        if len(set(wanted.values())) < len(options):
            raise ValueError(f"--{what} must give different names and titles, but gave {'; '.join(options)}")


def _reject(what: str, there: Iterable[str], name: str):
    raise ValueError(f"--{what} must be one of {'; '.join(there)}, but was {name!r}")


def _renamed(found: Mapping[Key, list[dict]], options: Sequence[str]) -> dict[Key, list[dict]]:
    """The rows that options name, under their titles."""
    if not options:
        return dict(found)
    chosen, kept = _titles(options), {}
    for key, rows in found.items():
        if some := [row | {"name": chosen[row["name"]]} for row in rows if row["name"] in chosen]:
            kept[key] = some
    return kept


# ---- tables of a source ------------------------------------------------------------------------------------------------


def _comparisons(found: Mapping[Key, list[dict]], columns: Mapping[str, str] | None = None) -> list[list[str]]:
    """Blocks of lines: a table per comparison, or one for all that differ in x alone, or the layout of table 7."""
    blocks, seen = [], set()
    for key, rows in found.items():
        suite, task, shape = key
        if rows[0]["x"] is not None:
            if (suite, task) not in seen:
                blocks.append(_scaling(found, suite, task, columns or ("p50", "memory")))
            seen.add((suite, task))
        elif suite == TABLE7 and not columns:
            if (suite, shape) not in seen:
                of_shape = {k[1]: some for k, some in found.items() if (k[0], k[2]) == (suite, shape)}
                blocks.append([_heading((suite, shape), rows), "", *table7_view.measured(of_shape)])
            seen.add((suite, shape))
        else:
            blocks.append([_heading(key, rows), "", *tables.comparison(rows, columns)])
    return blocks


def _scaling(found: Mapping[Key, list[dict]], suite: str, task: str, columns: Iterable[str]) -> list[str]:
    """A table with x across for each of `columns` that has values."""
    of_task = [(rows[0]["x"], key, rows) for key, rows in found.items() if key[:2] == (suite, task)]
    of_task.sort(key=lambda entry: entry[:2])
    plain = len({x for x, _, _ in of_task}) == len(of_task) and all(str(x) in key[2] for x, key, _ in of_task)
    by_x = {str(x) if plain else f"{x} ({escape(key[2])})": rows for x, key, rows in of_task}
    every = [row for rows in by_x.values() for row in rows]
    shown = [one for one in map(_side_by_side, columns) if any(one.of(row) is not None for row in every)]
    grids = [tables.grid(one, by_x, implementations(by_x.values())) for one in shown or [tables.MEDIAN]]
    return _joined([[_heading((suite, task), every)], *grids, tables.reasons(by_x)])


def _side_by_side(key: str) -> tables.Column:
    return tables.MEDIAN if key == "p50" else tables.column(key)


def _summary(found: Mapping[Key, list[dict]], view: View) -> list[str]:
    """One table: implementations down, task after task; shapes across."""
    there = dict.fromkeys(key[2] for key in found)
    shapes = {name: title for name, title in _titles(view.columns or list(there)).items() if name in there}
    if not shapes:
        return []
    tasks = list(dict.fromkeys(key[:2] for key in found))
    several = len({suite for suite, _ in tasks}) > 1
    columns: dict[str, list[dict]] = {title: [] for title in shapes.values()}
    order: list[str] = []
    for suite, task in tasks:
        suffix = f", {suite}: {task}" if several else f", {task}" if len(tasks) > 1 else ""
        of_task = {key: rows for key, rows in found.items() if key[:2] == (suite, task) and key[2] in shapes}
        order += [name + suffix for name in implementations(of_task.values())]
        for key, rows in of_task.items():
            columns[shapes[key[2]]] += [row | {"name": row["name"] + suffix} for row in rows]
    return _joined([tables.grid(_side_by_side(view.summary), columns, order), tables.reasons(columns)])


def _heading(parts: Sequence[str], rows: Sequence[dict]) -> str:
    dtypes = dict.fromkeys(row["dtype"] for row in rows if row["dtype"])
    return f"**{' / '.join(map(escape, parts))}**" + "".join(f", {dtype}" for dtype in dtypes)


def provenance(source: Source, comparisons: Iterable[Sequence[dict]], folder: Path) -> str:
    """One line: the device, versions, commit and date behind numbers, with a link to the file."""
    content = source.content
    dtypes = dict.fromkeys(row["dtype"] for rows in comparisons for row in rows if row["dtype"])
    parts = [
        source.device, *dtypes, f"torch {content['torch']}", f"commit `{source.commit}`", content["date"][:10],
        *([f"load {content['load_average']}"] if content.get("load_average") is not None else []),
    ]  # fmt: skip
    return f"{', '.join(parts)} ({_linked(source, folder)})"


def _linked(source: Source, folder: Path) -> str:
    return f"[{escape(source.path.name)}]({_link(source.path, folder)})"


def _link(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix().replace(" ", "%20")


# ---- whole reports -----------------------------------------------------------------------------------------------------


def build(files: Iterable[Path], out: Path, chosen: Sequence[str] = ()) -> dict[Path, bytes]:
    """A report on all files, or on the tables that are `chosen`, with its plots: what to write where below `out`.

    Raises:
        ValueError: one is no file of results, or none has a table that is chosen.
        ImportError: matplotlib is not installed.
    """
    from .plots import pictures

    sources = open_sources(files)
    _require_known(View((), tuple(chosen)), chosen, {source: {} for source in sources})
    sources = [source.restricted(chosen) for source in sources]
    drawn = pictures(sources)
    plots = {key: out / name for key, (name, _) in drawn.items()}
    absent = () if chosen else missing(sources)
    lines = ["# Benchmarks", "", *whole(sources, out, plots, absent)]
    return {out / "report.md": ("\n".join(lines) + "\n").encode()} | {out / name: data for name, data in drawn.values()}


def whole(
    sources: Sequence[Source], folder: Path, plots: Mapping[tuple[str, str], Path], absent: Sequence[str]
) -> list[str]:
    """Lines of a report on everything, without a title.

    Args:
        plots: by device and suite, pictures to show.
        absent: what no file has, a line each.
    """
    lines = [HOW_TO_READ, "", "## Files", "", *files_table(sources, folder)]
    for device, some in by_device(sources).items():
        lines += ["", f"## {device}"]
        for suite in dict.fromkeys(key[0] for source in some for key in source.comparisons()):
            lines += ["", f"### {escape(suite)}"]
            if (device, suite) in plots:
                lines += ["", f"![{escape(suite)} on {device}]({_link(plots[device, suite], folder)})"]
            for source in some:
                if found := source.select([suite]):
                    lines += ["", f"From {_linked(source, folder)}:", "", *_joined(_comparisons(found))]
            if suite == TABLE7:
                lines += ["", *paper_table()]
    if absent:
        lines += ["", "## What no file has", "", *(f"- {line}" for line in absent)]
    return lines


def paper_table() -> list[str]:
    """The paper's own table, which is of other hardware and must never share one with ours."""
    return [f"**{escape(paper.SOURCE)}**, measured there", "", *table7_view.published(paper.TABLE7)]


def files_table(sources: Sequence[Source], folder: Path) -> list[str]:
    """What the numbers come from: a column per file; lines that are empty throughout are left out."""
    facts = ("kind", "threads", "python", "torch", "triton", "transformers", "cuda", "driver")
    lines = {"device": [escape(source.content["device"]) for source in sources]}
    lines |= {fact: [_plain(source.content.get(fact)) for source in sources] for fact in facts}
    lines["commit (+: changed)"] = [f"`{source.commit}`" for source in sources]
    lines["date"] = [source.content["date"][:16].replace("T", " ") for source in sources]
    lines["load at the beginning"] = [_plain(source.content.get("load_average")) for source in sources]
    ceilings = [source.content["ceilings"] for source in sources]
    for dtype in dict.fromkeys(dtype for one in ceilings for dtype in one):
        for what, key, factor, units in CEILINGS:
            values = [one[dtype][key] * factor if dtype in one else None for one in ceilings]
            size, unit = unit_for(values, units)
            lines[f"{what}, {dtype}, {unit}"] = ["" if value is None else number(value / size) for value in values]
    head = ["", *(_linked(source, folder) for source in sources)]
    return table(head, [[name, *cells] for name, cells in lines.items() if any(cells)], "l" + "r" * len(sources))


def _plain(value) -> str:
    return "" if value is None else escape(str(value))


def _joined(blocks: Iterable[Sequence[str]]) -> list[str]:
    """The lines of all blocks that have some, with an empty line between two of them."""
    lines: list[str] = []
    for block in filter(None, blocks):
        lines += [*([""] if lines else []), *block]
    return lines
