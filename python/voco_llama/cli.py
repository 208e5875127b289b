"""The `voco` command."""

import json
import platform
import sys
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compress images into a few K/V tokens of a LLaMA, and ask about them.",
)
# Results go to standard output, everything else to standard error, so that --json can be piped.
messages = Console(stderr=True)
output = Console()

ModelOption = Annotated[Path | None, typer.Option("--model", help="Checkpoint folder; the packaged demo model if absent.")]
VocoOption = Annotated[int | None, typer.Option("--voco", help="VoCo tokens per image; the model's default if absent.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

CACHE_SUFFIX = ".safetensors"


def main() -> None:
    """Run the command line; a mistake of the caller is one line on standard error and exit status 1."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        messages.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


@app.command()
def compress(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for one cache file per image.")],
    model: ModelOption = None,
    voco: VocoOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compress images, each into a cache file of its VoCo tokens' K/V."""
    targets = [out / f"{image.stem}{CACHE_SUFFIX}" for image in images]
    for target in targets:
        if targets.count(target) > 1:
            raise ValueError(f"images must have different names, but two would be written to {target}")
    opened = [_open(image) for image in images]
    llava = _load(model)
    rows = []
    with _progress() as progress:
        task = progress.add_task("compress", total=len(images))
        for path, image, target in zip(images, opened, targets, strict=True):
            (kv,) = llava.compress([image], voco)
            kv.save(target)
            rows.append({"image": str(path), "cache": str(target), "voco": kv.num_tokens, "bytes": kv.nbytes})
            progress.advance(task)
    if as_json:
        _print_json(rows)
        return
    table = Table("image", "cache", "VoCo tokens", "bytes")
    for row in rows:
        table.add_row(row["image"], row["cache"], str(row["voco"]), f"{row['bytes']:,}")
    output.print(table)


@app.command()
def ask(
    sources: Annotated[list[Path], typer.Argument(help="Image files, or cache files of `voco compress`.")],
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    model: ModelOption = None,
    voco: VocoOption = None,
    uncompressed: Annotated[bool, typer.Option("--uncompressed", help="Show the whole images to the model.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Ask about images or compressed images, all in one prompt."""
    from voco_kernels import VocoKV

    caches = [source.suffix == CACHE_SUFFIX for source in sources]
    if uncompressed and (any(caches) or voco is not None):
        raise ValueError("--uncompressed must be used with image files alone, without caches and without --voco")
    loaded = [VocoKV.load(s) if is_cache else _open(s) for s, is_cache in zip(sources, caches, strict=True)]
    llava = _load(model)
    if uncompressed:
        answer = llava.ask(question, images=loaded, num_voco_tokens=0, max_new_tokens=max_tokens)
    else:
        kv = [x if is_cache else llava.compress([x], voco)[0] for x, is_cache in zip(loaded, caches, strict=True)]
        answer = llava.ask(question, voco_kv=kv, max_new_tokens=max_tokens)
    if as_json:
        _print_json({"question": question, "answer": answer, "sources": [str(s) for s in sources]})
    else:
        output.print(answer, highlight=False, markup=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for images, caches and the picture.")] = Path("voco-demo"),
    model: ModelOption = None,
    images: Annotated[int, typer.Option("--images", min=1, max=8, help="How many images.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Which images.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer questions about images of real digits: uncompressed, in two stages, and from saved caches."""
    from .demo import show

    with _progress() as progress:
        task = progress.add_task("load the model", total=6)

        def step(name: str) -> None:
            progress.update(task, description=name, advance=1)

        report = show.run(out, model, images, seed, step)
    if as_json:
        _print_json(report)
    else:
        show.print_report(report, output)


@app.command()
def info(as_json: JsonOption = False) -> None:
    """Versions, devices, and which backends can run here."""
    import torch

    from voco_kernels import backend_status, compiled_module

    packages = ("voco-kernels", "torch", "triton", "transformers", "flash-attn", "numpy", "safetensors")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "devices": devices,
        "compiled module": compiled_module(),
        "backends": {row.name: {"serves": list(row.serves), "missing": row.reason} for row in backend_status()},
    }
    if as_json:
        _print_json(report)
        return
    table = Table("", "", show_header=False)
    for name, value in report["versions"].items():
        table.add_row(name, value or "not installed")
    table.add_row("devices", ", ".join(devices))
    table.add_row("compiled CUDA module", report["compiled module"])
    for name, row in report["backends"].items():
        table.add_row(f"backend {name}", row["missing"] or f"ready: {', '.join(row['serves'])}")
    output.print(table)


def _load(folder: Path | None):
    """The model of a checkpoint folder, ready to answer."""
    from transformers.utils import logging

    from . import VocoLlavaForConditionalGeneration
    from .demo import MODEL

    folder = folder or MODEL
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model must be a checkpoint folder with a config.json, but was {folder}")
    logging.disable_progress_bar()
    return VocoLlavaForConditionalGeneration.from_pretrained(folder, dtype="auto").float().eval()


def _open(path: Path):
    from .processing import open_image

    return open_image(path)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        pass
    if name == "voco-kernels":  # run from the source tree
        from voco_kernels import __version__

        return __version__
    return None


@contextmanager
def _progress():
    with Progress(console=messages, transient=True) as progress:
        yield progress


def _print_json(value) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
