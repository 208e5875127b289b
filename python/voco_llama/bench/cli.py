"""`voco bench`: commands that measure, and that report what was measured."""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .report_cli import report

app = typer.Typer(no_args_is_help=True, help="Measure, and report what was measured.")
app.command()(report)
messages = Console(stderr=True)
output = Console()


class Name(str, Enum):
    """The models of table 7; a test holds them to `table7.MODELS`, which would import torch."""

    demo = "demo"
    llava_7b = "llava-7b"
    llama3_8b = "llama3-8b"


DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda; the GPU if absent and there is one.")]
ModelOption = Annotated[
    Name, typer.Option("--model", help="The packaged model, or the shapes of a large one with random weights in bfloat16.")
]
VocoOption = Annotated[
    list[int] | None,
    typer.Option("--voco", help="VoCo tokens per image; repeatable. 1 2 4 8 for the demo, else 1 2 8 128, if absent."),
]
TextOption = Annotated[int, typer.Option("--text", help="Tokens of the question.")]
NewOption = Annotated[int, typer.Option("--new-tokens", help="Tokens of the answer.")]
SecondsOption = Annotated[float, typer.Option("--seconds", help="About how long to time one comparison.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write the results to this JSON file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of tables.")]


@app.command()
def table7(
    device: DeviceOption = None,
    model: ModelOption = Name.demo,
    voco: VocoOption = None,
    text: TextOption = 32,
    new_tokens: NewOption = 32,
    seconds: SecondsOption = 3.0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """A question about an image without a cache, over all its cached K/V, and over VoCo tokens: table 7 of the paper."""
    from .table7 import Settings

    settings = Settings(vocos=tuple(voco) if voco else None, text=text, new_tokens=new_tokens, seconds=seconds)
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"--out must be a file in a folder that exists, but was {out}")
    content = _measured(_device(device), model.value, settings, out)
    if as_json:
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
        return
    from .report import of_content, paper_table

    text = "\n".join([of_content(content), "", *paper_table()])
    output.print(text, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        messages.print(f"written to {out}")


def _device(name: str | None):
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, but was {name}")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device must be one that is here, but was {name}, and torch sees no NVIDIA GPU")
    return torch.device(name)


def _measured(device, model: str, settings, out: Path | None) -> dict:
    """The content of a file of results, written as it grows."""
    from transformers.utils import logging

    from .results import Results, describe_machine
    from .table7 import comparisons

    logging.disable_progress_bar()
    results = Results(out, describe_machine(device))
    with messages.status(model) as status:
        for comparison in comparisons(device, model, settings, lambda step: status.update(f"{model}: {step}")):
            results.add(comparison)
    return results.content
