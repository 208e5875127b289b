"""The digits as files, for whoever trains a model of their own: `voco digits`."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from . import UNCOMPRESSED
from .digits import KINDS, DigitsTask, Question, reading

TRAINING, HELDOUT = 6400, 600  # images
TURNS = 6  # questions about a training image; then it is read out
CONFIG = """\
# VoCo compression for the digits, from a model that answers about them uncompressed: voco train {file}
model: start
out: run
data:
  conversations: train.json
  images: .
system: voco
num_voco_tokens: 2
trainer:
  num_train_epochs: 1
  per_device_train_batch_size: 32
  learning_rate: 1.2e-3
  lr_scheduler_type: cosine
  warmup_steps: 10
  weight_decay: 0.05
  adam_beta2: 0.98
  save_steps: 50
  save_total_limit: 1
"""


def write(out: Path, training: int = TRAINING, heldout: int = HELDOUT) -> None:
    """Write the folder `out`, as a whole or not at all.

    In it are `images/*.png`; `train.json` and `heldout.json` in LLaVA's format, of scans that are in one of them only; the
    uncompressed model in `start`, and `train.yaml` for `voco train`. An image of `train.json` has several questions, one of
    `heldout.json` one, whose answers are balanced.

    Args:
        training, heldout: numbers of images.

    Raises:
        ValueError: `out` is there already; no images are asked for.
    """
    if out.exists():
        raise ValueError(f"out must be a new folder, but {out} is there already")
    for name, count in (("training", training), ("heldout", heldout)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, but was {count}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        folder = Path(beside) / out.name
        (folder / "images").mkdir(parents=True)
        shutil.copytree(UNCOMPRESSED, folder / "start")
        (folder / "train.yaml").write_text(CONFIG.format(file=out / "train.yaml"))
        _write_split(folder, "train", training)
        _write_split(folder, "heldout", heldout)
        folder.rename(out)


def _write_split(folder: Path, split: str, count: int) -> None:
    task, records = DigitsTask(split, augment=split == "train"), []
    for i in range(count):
        name = f"images/{split}{i:05d}.png"
        if split == "train":
            sample = task.sample((1, i), TURNS)
            # Read last, so that no other answer can be put together from it.
            questions = (*sample.questions, reading(sample.grid))
        else:
            sample = task.sample((2, i), kinds=(KINDS[i % len(KINDS)],))
            questions = sample.questions
        sample.image.save(folder / name)
        records.append({"id": f"{split}{i:05d}", "image": name, "conversations": turns(questions)})
    (folder / f"{split}.json").write_text(json.dumps(records, indent=1) + "\n")


def turns(questions: Sequence[Question]) -> list[dict[str, str]]:
    """Questions about an image and their answers as `conversations` of LLaVA's format."""
    listed = [turn for question in questions for turn in (("human", question.text), ("gpt", question.answer))]
    listed[0] = ("human", f"<image>\n{listed[0][1]}")
    return [{"from": who, "value": text} for who, text in listed]


def digits(
    out: Annotated[Path, typer.Option("--out", help="A new folder.")] = Path("voco-digits"),
    images: Annotated[int, typer.Option("--images", help="Images to train on.")] = TRAINING,
) -> None:
    """Write digits and questions about them as files to train on, with a model to begin with and a configuration."""
    write(out, images)
    print(f"voco train {out / 'train.yaml'}")


if __name__ == "__main__":
    typer.run(digits)
