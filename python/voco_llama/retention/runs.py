"""Carries runs out, one by one: whoever is killed goes on from a checkpoint, and several processes share the work.

In the folder of a study are `settings.json`, the tower and the base that all runs start from, a folder per seed with each
run's checkpoints, and `results`, a JSON file per finished run.
"""

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, set_seed

from voco_llama.bench.files import write_atomically
from voco_llama.bench.results import describe_machine
from voco_llama.training import TrainingConfig, train
from voco_llama.training.checkpoints import written_whole

from . import evaluate
from .build import PATCH, build_model, build_processor
from .plan import Run, Settings
from .task import Conversations, heldout
from .tower import CellReader, Cells

# What streams of training images are numbered by, so that no two share any.
TOWER, BASE, RUNS = range(3)
SAVE_STEPS, LOG_STEPS = 100, 50


def open_study(out: Path, settings: Settings) -> None:
    """Make the folder of a study, or find it; ValueError where it is one of other settings."""
    file = out / "settings.json"
    if file.is_file():
        found = json.loads(file.read_text())["digest"]
        if found != settings.digest:
            raise ValueError(f"out must be a folder of the same settings, but {out} holds results of others ({file})")
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out must be a new folder, or one of retention results, but {out} is something else")
    text = json.dumps({"digest": settings.digest, **settings.to_dict()}, indent=1) + "\n"
    write_atomically(file, text.encode())


def carry_out(runs: Iterable[Run], out: Path, settings: Settings) -> None:
    """Train and evaluate what has no result yet; what another process is at is left to it."""
    for run in runs:
        file = result_file(run, out)
        with _lock(out / f"{run.name}.lock", wait=False) as ours:
            if ours and not file.is_file():
                result = _result(run, out, settings)
                write_atomically(file, (json.dumps(result, indent=1) + "\n").encode())
                shutil.rmtree(_folder(run, out))


def result_file(run: Run, out: Path) -> Path:
    """Where a finished run leaves its result."""
    return out / "results" / f"{run.name}.json"


def _folder(run: Run, out: Path) -> Path:
    return out / f"seed{run.seed}" / run.name


def _result(run: Run, out: Path, settings: Settings) -> dict:
    base = _base(out, settings)
    begin = time.time()
    trained = train(
        TrainingConfig(
            model=str(base),
            out=_folder(run, out),
            system=run.system,
            num_voco_tokens=run.counts,
            trainer=_trainer(settings.steps, settings.learning_rate, settings.batch, run.seed),
        ),
        Conversations(settings.steps * settings.batch, (RUNS, run.seed)),
    )
    trained_in = time.time() - begin
    samples = heldout(settings.questions)
    scores = [
        {"system": system, "tokens": tokens, "scores": evaluate.score(trained.model, system, tokens, samples)}
        for system, tokens in run.evaluations
    ]
    return {
        "system": run.system,
        "counts": run.counts,
        "seed": run.seed,
        "smoke": settings.smoke,
        "evaluations": scores,
        "losses": trained.losses,
        "seconds": {"training": round(trained_in, 1), "evaluation": round(time.time() - begin - trained_in, 1)},
        "digest": settings.digest,
        "settings": settings.to_dict(),
        "machine": describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def _base(out: Path, settings: Settings) -> Path:
    """The uncompressed LLaVA that all runs start from."""
    folder = out / "base"
    with _lock(out / "base.lock"):
        if not (folder / "model").is_dir():
            train(
                TrainingConfig(
                    model=str(_tower(out, settings)),
                    out=folder,
                    system="upper_bound",
                    num_voco_tokens=(1,),
                    trainer=_trainer(settings.base_steps, settings.base_learning_rate, settings.batch, 0),
                ),
                Conversations(settings.base_steps * settings.batch, (BASE,)),
            )
    return folder / "model"


def _tower(out: Path, settings: Settings) -> Path:
    """The demo's model with a tower that reads this task's images. It takes a few minutes, and is never half there."""
    folder = out / "tower"
    if folder.is_dir():
        return folder
    set_seed(0)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    data = Cells(settings.tower_steps * settings.batch, processor.image_processor, PATCH, (TOWER,))
    options = _trainer(settings.tower_steps, settings.tower_learning_rate, settings.batch, 0) | {"save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(folder.parent), remove_unused_columns=False, label_names=["labels"], **options
    )
    Trainer(model=CellReader(model.model.vision_tower), args=arguments, train_dataset=data).train()
    with written_whole(folder) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
    return folder


def _trainer(steps: int, learning_rate: float, batch: int, seed: int) -> dict:
    """Options of transformers' TrainingArguments."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "weight_decay": 0.05,
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "logging_steps": min(LOG_STEPS, steps),
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


@contextlib.contextmanager
def _lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a file's lock, which a process that dies loses; without `wait`, whether it is ours."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
