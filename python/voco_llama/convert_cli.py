"""`voco convert`: a LLaVA checkpoint of others becomes one of this package."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table

messages = Console(stderr=True)
output = Console()


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a LLaVA-1.5 (llava-hf or original) or of VoCo-LLaMA.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the checkpoint.")],
    tower: Annotated[
        Path | None, typer.Option("--tower", help="Folder of the CLIP model, which original checkpoints only name.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="Folder of the tokenizer; SOURCE if absent.")] = None,
    voco: Annotated[int, typer.Option("--voco", min=1, help="VoCo tokens per image that the weights are for.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Convert a LLaVA-1.5 or VoCo-LLaMA checkpoint into one that this package trains and runs."""
    from transformers.utils import logging

    from .convert import convert

    logging.set_verbosity_error()
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True) as progress:
        task = progress.add_task("convert", total=None)
        done = convert(
            source,
            out,
            tower=tower,
            tokenizer=tokenizer,
            num_voco_tokens=voco,
            progress=lambda written, total: progress.update(task, completed=written, total=total),
        )
    if as_json:
        sys.stdout.write(json.dumps(asdict(done), indent=1) + "\n")
        return
    table = Table("", "", show_header=False)
    table.add_row("source", f"{done.kind} in {done.source}")
    table.add_row("written", done.out)
    table.add_row("tensors", f"{done.tensors} of {', '.join(done.dtypes)}, {done.bytes:,} bytes")
    table.add_row("vision tower", done.tower)
    table.add_row("vocabulary", f"{done.vocabulary[0]} -> {done.vocabulary[1]} rows, {done.added} of them new")
    table.add_row("tokens", ", ".join(f"{token} {i}" for token, i in done.tokens.items()))
    if done.moved is not None:
        table.add_row("moved", "<voco> from row {} to {}".format(*done.moved))
    if done.dropped:
        table.add_row("left out", f"{done.dropped} buffers that the model computes")
    output.print(table, highlight=False)
