"""`voco train` and `voco recipe`."""

import contextlib
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

output = Console()
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; `voco recipe` prints some to begin with.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the run, in place of the file's `out`.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in that folder and start again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model; called again, it goes on from the last checkpoint."""
    # DeepSpeed, where it is installed, talks on standard output, which is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        from accelerate import PartialState
        from transformers.utils import logging as transformers_logging

        from .training import TrainingConfig
        from .training import train as run

        settings = TrainingConfig.load(config)
        if out is not None:
            settings = dataclasses.replace(settings, out=out.resolve())
        transformers_logging.disable_progress_bar()
        handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False, markup=False)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
        result = run(settings, resume=not fresh)
    if not PartialState().is_main_process:
        return
    if as_json:
        sys.stdout.write(json.dumps({"model": str(result.model), "losses": result.losses}) + "\n")
    else:
        output.print(f"model: {result.model}", highlight=False, soft_wrap=True)


def recipe(
    name: Annotated[str | None, typer.Argument(help="Which one; a list of them if absent.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print a shipped training configuration, to be edited and given to `voco train`."""
    from .training.recipes import recipes, title

    shipped = recipes()
    if name is not None and name not in shipped:
        raise ValueError(f"name must be one of {', '.join(shipped)}, but was {name!r}")
    if as_json:
        titles = {key: title(text) for key, text in shipped.items()}
        content = titles if name is None else {"name": name, "text": shipped[name]}
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
    elif name is not None:
        sys.stdout.write(shipped[name])
    else:
        table = Table("recipe", "what it is")
        for key, text in shipped.items():
            table.add_row(key, title(text))
        output.print(table)
