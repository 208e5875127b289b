"""Files of results as a report shows them: by device, by comparison, and in one order."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .markdown import escape
from .measure import LIMIT, OURS, PART, PEER
from .results import load

# What a complete report has, in this order; other suites come after them.
SUITES = ("attention", "plan", "kv", "two_stage", "table7", "scaling", "training")
KINDS = {"cpu": "a CPU", "cuda": "a GPU"}
ROLES = (OURS, PEER, PART, LIMIT)
# Peers stand in this order, so that every table and plot is alike: of these words, the first one in a name says where.
FAMILIES = ("split", "flex", "flash", "cudnn", "sdpa", "dense", "dynamic", "static", "loop")

Key = tuple[str, str, str]  # suite, task, shape


@dataclass(frozen=True, eq=False)
class Source:
    """A file of results.

    Attributes:
        path: where it is.
        content: what it holds, as `results.load` returns it.
    """

    path: Path
    content: dict

    @property
    def device(self) -> str:
        """The device, for readers; files with the same text are of one device."""
        threads = self.content["threads"]
        name = escape(self.content["device"])
        return name if self.content["kind"] == "cuda" else f"{name}, {threads} thread{'s' * (threads != 1)}"

    @property
    def commit(self) -> str:
        """The commit, with + where files were changed."""
        known = self.content["commit"] or "unknown"
        return known + "+" * bool(self.content["uncommitted_changes"])

    def comparisons(self) -> dict[Key, list[dict]]:
        """Rows by suite, task and shape: suites in the order of SUITES, rows in that of `implementations`.

        The first row of the file is ours, whatever its role says, and stays the first.
        """
        found: dict[Key, list[dict]] = {}
        for row in sorted(self.content["rows"], key=lambda row: _place(SUITES, row["suite"])):
            found.setdefault((row["suite"], row["task"], row["shape"]), []).append(row)
        return {key: _ordered([rows[0] | {"role": OURS}, *rows[1:]]) for key, rows in found.items()}

    def restricted(self, tables: Sequence[str]) -> "Source":
        """Only the rows that any of `tables`, each suite[/task[/shape]], names; all where there are none of these."""
        rows = self.content["rows"]
        named = [row for row in rows if any(is_named((row["suite"], row["task"], row["shape"]), t) for t in tables)]
        return replace(self, content=self.content | {"rows": named if tables else rows})

    def select(self, tables: Sequence[str]) -> dict[Key, list[dict]]:
        """The comparisons that any of `tables`, each suite[/task[/shape]], names; all where there are none of these."""
        return {key: rows for key, rows in self.comparisons().items() if not tables or any(is_named(key, t) for t in tables)}


def is_named(key: Key, table: str) -> bool:
    """Whether suite[/task[/shape]] names a comparison."""
    return table in {"/".join(key[:n]) for n in (1, 2, 3)}


def open_sources(paths: Iterable[Path]) -> list[Source]:
    """All files, the oldest first where they are of one device.

    Raises:
        ValueError: one is no file of results.
    """
    sources = [Source(Path(path), load(path)) for path in paths]
    devices = list(dict.fromkeys(source.device for source in sources))
    return sorted(sources, key=lambda source: (devices.index(source.device), source.content["date"]))


def by_device(sources: Sequence[Source]) -> dict[str, list[Source]]:
    """Files of each device."""
    found: dict[str, list[Source]] = {}
    for source in sources:
        found.setdefault(source.device, []).append(source)
    return found


def newest(sources: Iterable[Source]) -> dict[Key, list[dict]]:
    """All comparisons of some files, of which the last has the last word."""
    found: dict[Key, list[dict]] = {}
    for source in sources:
        found |= source.comparisons()
    return dict(sorted(found.items(), key=lambda item: _place(SUITES, item[0][0])))


def commits(sources: Iterable[Source], suite: str) -> list[str]:
    """The commits behind the comparisons of a suite that `newest` chooses."""
    behind: dict[Key, str] = {}
    for source in sources:
        behind |= dict.fromkeys(source.comparisons(), source.commit)
    return list(dict.fromkeys(commit for key, commit in behind.items() if key[0] == suite))


def implementations(comparisons: Iterable[Sequence[dict]]) -> list[str]:
    """The names of all rows: ours, then peers by family, parts and limits; alike ones as they appear."""
    ranks: dict[str, tuple[int, int]] = {}
    for row in (row for rows in comparisons for row in rows):
        family = 0 if row["role"] == OURS else _family(row["name"])
        rank = (_place(ROLES, row["role"]), family)
        ranks[row["name"]] = min(rank, ranks.get(row["name"], rank))
    return sorted(ranks, key=lambda name: ranks[name])


def _ordered(rows: Sequence[dict]) -> list[dict]:
    order = implementations([rows])
    return sorted(rows, key=lambda row: order.index(row["name"]))


def missing(sources: Sequence[Source]) -> list[str]:
    """A line for each kind of device: the suites of which no file has a row; and for files in which some was not reached."""
    lines = []
    for kind, device in KINDS.items():
        there = {row["suite"] for source in sources if source.content["kind"] == kind for row in source.content["rows"]}
        if absent := [suite for suite in SUITES if suite not in there]:
            lines.append(f"not run: {', '.join(absent[:-1])}{' and ' * (len(absent) > 1)}{absent[-1]} on {device}")
    for source in sources:
        for suite, cases in source.content.get("unfinished", {}).items():
            lines.append(f"not reached in time: {cases} of {escape(suite)} on {source.device}")
    return lines


def _family(name: str) -> int:
    found = re.search("|".join(FAMILIES), name.lower())
    return FAMILIES.index(found[0]) if found else len(FAMILIES)


def _place(known: Sequence[str], value: str) -> int:
    return known.index(value) if value in known else len(known)
