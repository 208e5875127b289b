"""`voco bench report`: tables and plots from files of results, and documents that show them."""

from pathlib import Path
from typing import Annotated

import typer

Sources = Annotated[list[Path] | None, typer.Argument(metavar="FILES", help="Files of results (.json) and documents (.md).")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for report.md and its plots; printed without one.")]
Update = Annotated[bool, typer.Option("--update", help="Write what their blocks must hold into the documents.")]
Check = Annotated[bool, typer.Option("--check", help="Exit with 1 where a block of a document holds something else.")]
Tables = Annotated[
    list[str] | None, typer.Option("--table", help="suite, suite/task, suite/task/shape, files, missing, or paper.")
]
Summary = Annotated[str | None, typer.Option("--summary", help="One table, shapes across: ratio, p50, memory, rate, ...")]
Rows = Annotated[list[str] | None, typer.Option("--row", help='Implementations: NAME or "NAME as TITLE"; repeatable.')]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="Shapes of a summary, else columns of tables; like --row, repeatable.")
]


def report(
    files: Sources = None,
    out: Out = None,
    update: Update = False,
    check: Check = False,
    table: Tables = None,
    summary: Summary = None,
    row: Rows = None,
    column: Columns = None,
) -> None:
    """Show files of results: as Markdown and plots in a folder, printed, or in the blocks of documents.

    A document may hold blocks that begin and end like this, each at the beginning of a line:

        <!-- begin: voco bench report --summary ratio --table attention/forward bench/results/x.json -->

        <!-- end -->

    --update puts between them what that command prints, with files named from the root of the repository.
    """
    from .blocks import differences, updates
    from .files import write_atomically
    from .report import View, build, render

    documents = [path for path in files or [] if path.suffix == ".md"]
    results = tuple(path for path in files or [] if path.suffix != ".md")
    view = View(results, tuple(table or ()), summary, tuple(row or ()), tuple(column or ()))
    _require_sense(documents, view, out, update, check)
    # Everything is made before anything is written.
    written = build(results, out, view.tables) if out is not None else {}
    written |= updates(documents) if update else {}
    if results and out is None:
        typer.echo(render(view, Path(), Path()))
    for path, data in written.items():
        write_atomically(path, data)
        typer.echo(f"wrote {path}", err=True)
    if check and (found := differences(documents)):
        for place in found:
            typer.echo(f"{place} does not hold what its files of results say; --update writes it", err=True)
        raise typer.Exit(1)


def _require_sense(documents: list[Path], view, out: Path | None, update: bool, check: bool) -> None:
    """Raises ValueError where arguments do not go together."""
    if not documents and not view.files:
        raise ValueError("FILES must be files of results or Markdown documents, but there was none")
    if bool(documents) != (update or check) or (update and check):
        raise ValueError("documents (.md) must be given with --update or with --check, and each of these with documents")
    if out is not None and not view.files:
        raise ValueError("--out must be given with files of results, but there was none")
    if not view.files and not view.is_whole:
        raise ValueError("--table, --summary, --row and --column must be given with files of results, but there was none")
    if out is not None and (view.summary or view.rows or view.columns):
        raise ValueError("--summary, --row and --column must be given without --out, but were given with it")
