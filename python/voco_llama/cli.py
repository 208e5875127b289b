"""The `voco` command."""

import itertools
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from . import cache_cli, convert_cli, train_cli
from .bench import cli as bench_cli
from .demo import dataset

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compress images and videos into a few K/V tokens of a LLaMA, and ask about them.",
)
app.add_typer(cache_cli.app, name="cache")
app.add_typer(bench_cli.app, name="bench")
app.command()(convert_cli.convert)
app.command()(train_cli.train)
app.command()(train_cli.recipe)
app.command()(dataset.digits)
# Results go to standard output, everything else to standard error, so that --json can be piped.
messages = Console(stderr=True)
output = Console()

ModelOption = Annotated[Path | None, typer.Option("--model", help="Checkpoint folder; a packaged demo model if absent.")]
VocoOption = Annotated[int | None, typer.Option("--voco", help="VoCo tokens per image; the model's default if absent.")]
FpsOption = Annotated[float | None, typer.Option("--fps", help="Frames per second to take of videos; 1 if absent.")]
FramesOption = Annotated[int | None, typer.Option("--frames", help="Frames to take of each video, instead of --fps.")]
StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Folder that keeps compressed images and frames, and is asked for them first.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

CACHE_SUFFIX = ".safetensors"


def main() -> None:
    """Run the command line; a mistake of the caller is one line on standard error and exit status 1."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        messages.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


@app.command()
def compress(
    sources: Annotated[list[Path], typer.Argument(help="Image and video files.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for one cache file per image or video.")],
    model: ModelOption = None,
    voco: VocoOption = None,
    fps: FpsOption = None,
    frames: FramesOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compress images and videos, each into a cache file of its VoCo tokens' K/V."""
    targets = [out / f"{source.stem}{CACHE_SUFFIX}" for source in sources]
    for target in targets:
        if targets.count(target) > 1:
            raise ValueError(f"sources must have different names, but two would be written to {target}")
    opened = _open(sources, fps, frames, caches=False)
    rows = []
    for path, kv, target in zip(sources, _compressed(_load(model, opened), opened, voco, store), targets, strict=True):
        kv.save(target)
        counts = {"frames": len(kv.segments), "voco": kv.num_tokens, "bytes": kv.nbytes}
        rows.append({"source": str(path), "cache": str(target), **counts})
    if as_json:
        _print_json(rows)
        return
    table = Table("source", "cache", "frames", "VoCo tokens", "bytes")
    for row in rows:
        table.add_row(row["source"], row["cache"], str(row["frames"]), str(row["voco"]), f"{row['bytes']:,}")
    output.print(table)


@app.command()
def ask(
    sources: Annotated[list[Path], typer.Argument(help="Image and video files, or cache files of `voco compress`.")],
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    model: ModelOption = None,
    voco: VocoOption = None,
    fps: FpsOption = None,
    frames: FramesOption = None,
    store: StoreOption = None,
    uncompressed: Annotated[bool, typer.Option("--uncompressed", help="Show the whole images to the model.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Ask about images and videos, compressed or not, all in one prompt."""
    opened = _open(sources, fps, frames, caches=True)
    if uncompressed and (voco is not None or store is not None or not all(map(_is_image, opened))):
        raise ValueError("--uncompressed must be used with image files alone, without caches, videos, --voco and --store")
    llava = _load(model, opened)
    if uncompressed:
        answer = llava.ask(question, images=opened, num_voco_tokens=0, max_new_tokens=max_tokens)
    else:
        answer = llava.ask(question, voco_kv=list(_compressed(llava, opened, voco, store)), max_new_tokens=max_tokens)
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
    """Answer questions about real digits in images and in a clip: uncompressed, in two stages, and from saved caches."""
    from .demo import show

    with _progress() as progress:
        task = progress.add_task("load the model", total=7)

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

    from voco_kernels import backend_status, chosen_on_gpus, compiled_module

    packages = ("voco-kernels", "torch", "triton", "transformers", "flash-attn", "numpy", "safetensors")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "devices": devices,
        "compiled module": compiled_module(),
        "auto": chosen_on_gpus(),
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
    table.add_row("auto on GPUs", report["auto"])
    for name, row in report["backends"].items():
        table.add_row(f"backend {name}", row["missing"] or f"ready: {', '.join(row['serves'])}")
    output.print(table)


def _load(folder: Path | None, opened: list):
    """The model of a checkpoint folder; without one, the packaged model that made the caches, or that knows clips."""
    from transformers.utils import logging

    from voco_kernels import VocoKV

    from . import VocoLlavaForConditionalGeneration
    from .demo import CLIPS, MODEL

    logging.disable_progress_bar()

    def load(path: Path):
        if not (path / "config.json").is_file():
            raise ValueError(f"--model must be a checkpoint folder with a config.json, but was {path}")
        return VocoLlavaForConditionalGeneration.from_pretrained(path, dtype="auto").float().eval()

    if folder is not None:
        return load(folder)
    makers = {x.meta.get("model") for x in opened if isinstance(x, VocoKV)} - {None}
    first, second = (MODEL, CLIPS) if all(map(_is_single, opened)) else (CLIPS, MODEL)
    model = load(first)
    # A video that is still to be compressed needs the model that knows clips; caches of another one are then refused.
    unread = any(not isinstance(x, VocoKV) and not _is_single(x) for x in opened)
    if not unread and makers and makers != {model.fingerprint()}:
        other = load(second)
        model = other if makers == {other.fingerprint()} else model
    return model


def _is_single(opened) -> bool:
    """Whether it is an image, or the cache of one, rather than a video."""
    from voco_kernels import VocoKV

    return len(opened.segments or ()) < 2 if isinstance(opened, VocoKV) else _is_image(opened)


def _open(sources: list[Path], fps: float | None, frames: int | None, *, caches: bool) -> list:
    """Of each file the PIL image, the VideoFrames, or (with `caches`) the VocoKV."""
    from voco_kernels import VocoKV

    from .processing import open_image
    from .video import VIDEO_SUFFIXES, frames_of

    if fps is not None and frames is not None:
        raise ValueError("--fps must be used without --frames")
    videos = [source.suffix.lower() in VIDEO_SUFFIXES for source in sources]
    if not any(videos) and (fps is not None or frames is not None):
        raise ValueError("--fps and --frames must be used with a video, but there was none")
    opened = []
    for source, is_video in zip(sources, videos, strict=True):
        if is_video:
            opened.append(frames_of(source, fps=fps, num_frames=frames))
        elif caches and source.suffix == CACHE_SUFFIX:
            opened.append(VocoKV.load(source))
        else:
            opened.append(open_image(source))
    return opened


def _is_image(opened) -> bool:
    from PIL import Image

    return isinstance(opened, Image.Image)


def _compressed(llava, opened: list, voco: int | None, folder: Path | None) -> Iterator:
    """The VocoKV of each opened file in turn, behind a bar that counts images and frames."""
    from .video import VideoFrames

    store = _store(folder)
    counts = [len(x) if isinstance(x, VideoFrames) else 1 for x in opened]
    with _progress() as progress:
        task = progress.add_task("compress", total=sum(counts))
        for x, before, count in zip(opened, itertools.accumulate(counts, initial=0), counts):
            yield _kv_of(llava, x, voco, store, lambda n, _, before=before: progress.update(task, completed=before + n))
            progress.update(task, completed=before + count)


def _kv_of(llava, opened, voco: int | None, store, progress):
    from voco_kernels import VocoKV

    from .video import VideoFrames

    if isinstance(opened, VocoKV):
        return opened
    if isinstance(opened, VideoFrames):
        return llava.compress_video(opened, voco, store=store, progress=progress)
    (kv,) = llava.compress([opened], voco) if store is None else store.get_or_compress([opened], llava, voco)
    return kv


def _store(folder: Path | None):
    if folder is None:
        return None
    from voco_kernels import VocoStore

    return VocoStore(folder)


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
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=messages, transient=True) as progress:
        yield progress


def _print_json(value) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
