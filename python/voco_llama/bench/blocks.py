"""Blocks of Markdown documents that show files of results, and never anything else.

    <!-- begin: voco bench report --summary ratio --table attention/forward bench/results/x.json -->
    (what that command prints)
    <!-- end -->

Both comments stand at the beginning of a line; the first may go on over several. Blocks in fenced code are none. Arguments
are split as a shell does, files are named from the root of the document's repository, and links lead there from its folder:

    FILE...             files of results
    --table SUITE[/TASK[/SHAPE]]    what to show; may be repeated. "files" is the table of the files, with devices,
                        versions and ceilings, "missing" lists the suites that none of them has, "paper" is table 7 as
                        it was published. The whole report without any.
    --summary COLUMN    one table: implementations down, shapes across, in its cells ratio, p50, memory, rate, bandwidth,
                        roof, tokens or mfu. Without it a table for each task and shape.
    --row NAME          only these implementations; may be repeated, as may the next
    --column NAME       only these shapes of a summary; or only these columns of other tables: p50, ratio, rate, bandwidth,
                        roof, memory, tokens, mfu, or any of the rows' facts

A NAME of a row or a shape may be "NAME as TITLE". Below the tables of each file a line says what they come from.
"""

import argparse
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .report import View, render

BEGIN, CLOSE, END = "<!-- begin: voco bench report", "-->", "<!-- end -->"
FENCE = re.compile(r" {0,3}(```+|~~~+)")


@dataclass(frozen=True)
class Block:
    """A block of a document.

    Attributes:
        line: where it begins, from 1.
        arguments: what stands behind "voco bench report".
        first, last: the lines between its comments are lines[first:last].
    """

    line: int
    arguments: str
    first: int
    last: int


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def view_of(arguments: str) -> View:
    """The view that a block's arguments ask for.

    Raises:
        ValueError: they are none.
    """
    parser = _Parser(prog="", add_help=False, allow_abbrev=False)
    parser.add_argument("files", nargs="*", type=Path)
    for name in ("table", "row", "column"):
        parser.add_argument(f"--{name}", action="append", default=[])
    parser.add_argument("--summary")
    found = parser.parse_intermixed_args(shlex.split(arguments))
    return View(tuple(found.files), tuple(found.table), found.summary, tuple(found.row), tuple(found.column))


def blocks(text: str) -> list[Block]:
    """All blocks of a document, from top to bottom.

    Raises:
        ValueError: one has no end, or there is an end without a beginning; it names the line.
    """
    found: list[Block] = []
    opened: tuple[int, str, int] | None = None
    lines = _visible(text.split("\n"))
    for i, line in lines:
        if line.startswith(BEGIN):
            if opened:
                raise ValueError(f"line {opened[0]} begins a block, which must end with {END} before line {i + 1}")
            start, words = i, line
            while CLOSE not in words:
                i, more = next(lines, (i, None))
                if more is None:
                    raise ValueError(f"line {start + 1} begins a block, whose comment must be closed with {CLOSE}")
                words += f"\n{more}"
            opened = start + 1, words[len(BEGIN) :].partition(CLOSE)[0], i + 1
        elif line.rstrip() == END:
            if not opened:
                raise ValueError(f"line {i + 1} must end a block that begins with {BEGIN} ... {CLOSE}, but none is open")
            found.append(Block(*opened, i))
            opened = None
    if opened:
        raise ValueError(f"line {opened[0]} begins a block, which must end with {END}, but the document ends")
    return found


def _visible(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Lines outside of fenced code, with their indices."""
    fence = None
    for i, line in enumerate(lines):
        mark = FENCE.match(line)
        if fence is None and mark is None:
            yield i, line
        elif fence is None:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and line.strip() == mark[1]:
            fence = None


def root_of(document: Path) -> Path:
    """The repository of a document: the nearest folder with .git or pyproject.toml; its own folder where there is none."""
    folders = document.resolve().parents
    return next((f for f in folders if (f / ".git").exists() or (f / "pyproject.toml").is_file()), folders[0])


def rewritten(document: Path) -> tuple[str, list[int]]:
    """A document's text as its files of results want it, and the lines of the blocks in which that is something new.

    Raises:
        ValueError: the document or one of its blocks is wrong; it names the document and the line.
    """
    if not document.is_file():
        raise ValueError(f"documents must be Markdown files, but {document} is none")
    text = document.read_bytes().decode("utf-8")
    lines, changed = text.split("\n"), []
    try:
        found = blocks(text)
    except ValueError as error:
        raise ValueError(f"{document}: {error}") from error
    for block in reversed(found):  # from below, so that the others stay where they are
        try:
            new = render(view_of(block.arguments), root_of(document), document.resolve().parent).split("\n")
        except ValueError as error:
            raise ValueError(f"{document}:{block.line}: {error}") from error
        if lines[block.first : block.last] != new:
            changed.insert(0, block.line)
        lines[block.first : block.last] = new
    return "\n".join(lines), changed


def updates(documents: Iterable[Path]) -> dict[Path, bytes]:
    """What documents must hold that hold something else. Raises ValueError as `rewritten` does."""
    texts = {document: rewritten(document) for document in documents}
    return {document.resolve(): text.encode() for document, (text, changed) in texts.items() if changed}


def differences(documents: Iterable[Path]) -> list[str]:
    """document:line of every block that does not hold what it must. Raises ValueError as `rewritten` does."""
    return [f"{document}:{line}" for document in documents for line in rewritten(document)[1]]
