"""`voco cache`: what a store of compressed images holds."""

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="List, check and empty stores of compressed images.")
messages = Console(stderr=True)
output = Console()

StoreArgument = Annotated[Path, typer.Argument(help="Folder of the store.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
SHOWN = 8  # digits of a key or digest


@app.command()
def ls(store: StoreArgument, as_json: JsonOption = False) -> None:
    """List the entries, the least recently used first, as their headers describe them; `verify` checks the numbers."""

    rows = []
    for entry in _open(store).entries():
        row = {"key": entry.key, "bytes": entry.nbytes, "used": datetime.fromtimestamp(entry.used).isoformat(" ", "seconds")}
        try:
            kv = entry.glance()
            row |= {"voco": kv.num_tokens, "layers": kv.num_layers, "dtype": str(kv.k.dtype).removeprefix("torch.")}
            row |= {name: kv.meta.get(name, "") for name in ("model", "image")}
        except (ValueError, OSError) as error:
            row["damaged"] = str(error)
        rows.append(row)
    if as_json:
        _print_json(rows)
        return
    table = Table("key", "VoCo", "layers", "dtype", "bytes", "last used", "model", "image")
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        known = "damaged" not in row
        middle = (str(row["voco"]), str(row["layers"]), row["dtype"]) if known else ("damaged", "", "")
        origin = (row["model"][:SHOWN], row["image"][:SHOWN]) if known else ("", "")
        table.add_row(row["key"][:SHOWN], *middle, f"{row['bytes']:,}", row["used"], *origin)
    output.print(table)


@app.command()
def verify(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Check every entry; damaged ones are moved aside, and the exit status is then 1."""
    opened = _open(store)
    with Progress(console=messages, transient=True) as progress:
        task = progress.add_task("verify", total=None)
        damaged = opened.verify(lambda done, total: progress.update(task, completed=done, total=total))
    if as_json:
        _print_json({"entries": len(opened), "damaged": damaged})
    else:
        output.print(f"{len(opened)} whole entries, {len(damaged)} damaged" + "".join(f"\n{key}" for key in damaged))
    if damaged:
        raise typer.Exit(1)


@app.command()
def rm(
    store: StoreArgument,
    keys: Annotated[list[str] | None, typer.Argument(help="Keys, or beginnings that only one key has.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all entries.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove entries."""
    opened = _open(store)
    if everything == bool(keys):
        raise ValueError("keys must be given, or --all, and not both")
    chosen = opened.keys() if everything else [_only(opened.keys(), prefix) for prefix in keys]
    removed = [key for key in dict.fromkeys(chosen) if opened.remove(key)]
    if as_json:
        _print_json(removed)
    else:
        output.print(f"removed {len(removed)} entries" + "".join(f"\n{key}" for key in removed))


@app.command()
def stats(store: StoreArgument, as_json: JsonOption = False) -> None:
    """How many entries there are, and how large they are."""
    opened = _open(store)
    size = {name: opened.stats()[name] for name in ("entries", "bytes")}
    folder = opened.path / "damaged"
    size["moved aside"] = len(list(folder.iterdir())) if folder.is_dir() else 0
    if as_json:
        _print_json(size)
        return
    table = Table("", "", show_header=False)
    for name, value in size.items():
        table.add_row(name, f"{value:,}")
    output.print(table)


def _open(folder: Path):
    """The store of a folder that must be one: a mistyped name must not become a new store."""
    from voco_kernels import VocoStore

    if not (folder / "store.json").is_file():
        raise ValueError(f"store must be the folder of a VocoStore, but was {folder}")
    return VocoStore(folder)


def _only(keys: list[str], prefix: str) -> str:
    found = [key for key in keys if key.startswith(prefix)]
    if len(found) != 1:
        raise ValueError(f"keys must each be the beginning of one entry's key, but {prefix!r} is that of {len(found)}")
    return found[0]


def _print_json(value) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")
