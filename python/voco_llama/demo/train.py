"""Trains the demo model from nothing: `make train-demo`, on two CPU cores.

Six phases, each with the Trainer. For images the vision tower learns to read single cells (the part that CLIP's pretraining
plays in LLaVA); the whole model learns to answer without compression; then it learns to answer through VoCo tokens, with
uncompressed documents mixed in so that one checkpoint serves both. The checkpoint of the second phase is kept for the lower
bound. For clips, with images mixed in, the tower learns to read digits anywhere in a frame; then the model learns to put
frames in order, at first mostly with clips, at last mostly with images. That is a checkpoint of its own.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from voco_llama import VocoCollator, VocoLlavaForConditionalGeneration, VocoProcessor

from . import CLIPS, MODEL, UNCOMPRESSED
from .build import build_config, build_processor
from .clips import LONGEST, ClipsTask, sequence
from .digits import DigitsTask, Question, reading
from .evaluate import evaluate_all, write_json


@dataclass(frozen=True)
class Phase:
    """One run of the Trainer: `batch` documents of `turns` questions a step; VoCo counts are drawn per document.

    `clips` of the documents of a step are about clips; their counts are drawn from `clip_counts`. In the share `ramp` of the
    steps clips grow from one second to all lengths: one must read a moving digit before one can order some.
    """

    name: str
    steps: int
    learning_rate: float
    batch: int = 32
    turns: int = 6
    counts: tuple[int, ...] = (0,)
    clips: int = 0
    clip_counts: tuple[int, ...] = ()
    ramp: float = 0.0


TOWER = Phase("tower", steps=500, learning_rate=2e-3, batch=64, turns=1)
UNCOMPRESSED_PHASE = Phase("uncompressed", steps=1500, learning_rate=1.5e-3)
# A quarter of the documents stays uncompressed; few VoCo tokens are the hardest to learn and get the most documents.
VOCO_PHASE = Phase("voco", steps=2000, learning_rate=1.2e-3, counts=(0, 0, 1, 1, 2, 2, 4, 8))
MOVING_TOWER = Phase("moving tower", steps=400, learning_rate=1e-3, batch=64, turns=1)
VIDEO_PHASE = Phase(
    "video", steps=1200, learning_rate=1e-3, counts=VOCO_PHASE.counts, clips=20, clip_counts=(1, 2, 2, 2), ramp=0.6
)
# What the other phase made the model forget about images comes back when there are more of them.
MIXED_PHASE = replace(VIDEO_PHASE, name="mixed", steps=750, learning_rate=8e-4, clips=10, ramp=0.0)
# Where the phases leave their checkpoints; the phases about clips train that of "voco" further.
CHECKPOINTS = {"uncompressed": UNCOMPRESSED.name, "voco": MODEL.name, "video": CLIPS.name, "mixed": CLIPS.name}


class Documents(Dataset):
    """Seeded training documents of one phase, made as they are asked for."""

    def __init__(self, phase: Phase, processor: VocoProcessor, seed: int):
        self.phase, self.processor = phase, processor
        self.task = DigitsTask("train", augment=True)
        # One stream of documents per phase, none of them shared.
        self.seed = (seed, *phase.name.encode())
        self._ids: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return self.phase.steps * self.phase.batch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        seed, phase = (*self.seed, index), self.phase
        rng = np.random.default_rng((*self.seed, 1, index))
        if index % phase.batch < phase.clips:
            clip = ClipsTask("train", (1, self._longest(index)), augment=True).sample(seed, phase.turns)
            # Half of them begin with the whole order: at the end, it could be put together from the answers before it.
            questions = (sequence(clip.order), *clip.questions) if index % 2 else clip.questions
            # Frames between whole seconds, too: the digits of a file need not appear at the moment of a frame.
            return self._document(clip.frames(begin=rng.random()), int(rng.choice(phase.clip_counts)), questions)
        sample = self.task.sample(seed, phase.turns)
        return self._document([sample.image], int(rng.choice(phase.counts)), (*sample.questions, reading(sample.grid)))

    def _longest(self, index: int) -> int:
        """Seconds of a clip, at most."""
        done = index / len(self)
        return LONGEST if done >= self.phase.ramp else max(1, math.ceil(LONGEST * done / self.phase.ramp))

    def _document(self, images: list, count: int, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """Images of `count` VoCo tokens each and questions with their answers, which alone are learnt."""
        processor, tokenizer = self.processor, self.processor.tokenizer
        image = [tokenizer.bos_token_id, *[processor.image_token_id] * processor.num_image_tokens]
        ids = (image + [processor.voco_token_id] * count) * len(images)
        labels = [-100] * len(ids)
        for question in questions:
            asked = self._encode(f"{question.text} answer:")
            answer = [*self._encode(question.answer), tokenizer.eos_token_id]
            ids += asked + answer
            labels += [-100] * len(asked) + answer
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels}

    def _encode(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return self._ids[text]


class Cells(Documents):
    """Images and, per vision token, the digit of its cell and the cell itself."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.task.sample((*self.seed, index), 1, ("position",))
        pixels = self.processor.image_processor([sample.image], return_tensors="pt")["pixel_values"][0]
        side = int(self.processor.num_image_tokens**0.5)
        grid = torch.tensor(sample.grid)
        cell = torch.arange(grid.numel()).view_as(grid)
        spread = [x.repeat_interleave(side // len(grid), 0).repeat_interleave(side // len(grid), 1) for x in (grid, cell)]
        return {"pixel_values": pixels, "labels": torch.stack([x.flatten() for x in spread])}


class Frames(Cells):
    """Single frames of clips in turn with images: the digit of every vision token that shows some of it, and no cell."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index % 2:
            return super().__getitem__(index)
        clip = ClipsTask("train", (1, 1), augment=True).sample((*self.seed, index))
        pixels = self.processor.image_processor(clip.frames(), return_tensors="pt")["pixel_values"][0]
        side = int(self.processor.num_image_tokens**0.5)
        brightness = torch.nn.functional.adaptive_avg_pool2d(pixels, side).mean(0).flatten()
        digit = torch.full_like(brightness, -100, dtype=torch.int64)
        digit[brightness > -0.8] = clip.order[0]
        return {"pixel_values": pixels, "labels": torch.stack([digit, torch.full_like(digit, -100)])}


TOWER_DATA = {TOWER.name: Cells, MOVING_TOWER.name: Frames}


class CellReader(torch.nn.Module):
    """A linear head on the vision tower that tells digit and cell of every vision token; thrown away afterwards."""

    def __init__(self, tower: torch.nn.Module, cells: int):
        super().__init__()
        self.tower = tower
        self.head = torch.nn.Linear(tower.config.hidden_size, 10 + cells)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixel_values [B, 3, H, W], labels [B, 2, vision tokens] -> the loss."""
        hidden = self.tower(pixel_values).last_hidden_state[:, 1:]
        digit, cell = self.head(hidden).split([10, self.head.out_features - 10], dim=-1)
        loss = torch.nn.functional.cross_entropy(digit.flatten(0, 1), labels[:, 0].flatten())
        return {"loss": loss + torch.nn.functional.cross_entropy(cell.flatten(0, 1), labels[:, 1].flatten())}


class InOrder(Trainer):
    """Takes documents as they are numbered; they are random as it is."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class Printer(TrainerCallback):
    """One line per logging step, for a terminal or a file."""

    def __init__(self, phase: Phase):
        self.phase, self.begin = phase, time.time()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print step, loss and minutes."""
        if logs and "loss" in logs:
            minutes = (time.time() - self.begin) / 60
            print(
                f"{self.phase.name} {state.global_step}/{state.max_steps} loss {logs['loss']:.3f} {minutes:.1f} min",
                flush=True,
            )


def fit(
    phase: Phase, model: torch.nn.Module, data: Dataset, collator, seed: int, folder: Path
) -> list[tuple[int, float]]:
    """Train `model` in place; returns (step, loss) pairs."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=phase.steps,
        per_device_train_batch_size=phase.batch,
        learning_rate=phase.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, phase.steps // 10),
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    trainer = InOrder(
        model=model, args=arguments, train_dataset=data, data_collator=collator, callbacks=[Printer(phase)]
    )
    trainer.train()
    return [(entry["step"], round(float(entry["loss"]), 4)) for entry in trainer.state.log_history if "loss" in entry]


def train(out: Path, seed: int, scale: float, questions: int, after: str | None) -> None:
    """Train the checkpoints into `out`, evaluate them, and write `training_log.json` and `results.json` beside them.

    Args:
        after: the phase ("uncompressed" or "voco") whose checkpoint in `out` is trained on; None begins with nothing.
    """
    set_seed(seed)
    phases = {
        phase.name: replace(phase, steps=max(2, round(phase.steps * scale)))
        for phase in (TOWER, UNCOMPRESSED_PHASE, VOCO_PHASE, MOVING_TOWER, VIDEO_PHASE, MIXED_PHASE)
    }
    names = list(phases)
    done = names[: names.index(after) + 1] if after else []
    processor = build_processor()
    config = build_config(processor.tokenizer)
    log_file = out / "training_log.json"
    if after:
        folder = out / CHECKPOINTS[after]
        model = VocoLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        # A checkpoint from before there were clips knows fewer words, and no compact positions.
        model.resize_token_embeddings(len(processor.tokenizer))
        model.config.positions = config.positions
        log = json.loads(log_file.read_text())
        log["phases"] = [entry for entry in log["phases"] if entry["name"] in done]
    else:
        model = VocoLlavaForConditionalGeneration(config)
        log = {"seed": seed, "phases": []}
    model.processor = processor
    collator = VocoCollator(model.config)

    for phase in (phases[name] for name in names[len(done) :]):
        begin = time.time()
        if phase.name in TOWER_DATA:
            reader, data = CellReader(model.model.vision_tower, cells=4), TOWER_DATA[phase.name](phase, processor, seed)
            history = fit(phase, reader, data, None, seed, out)
        else:
            history = fit(phase, model, Documents(phase, processor, seed), collator, seed, out)
            save(model, processor, out / CHECKPOINTS[phase.name])
        minutes = round((time.time() - begin) / 60, 1)
        log["phases"].append({**asdict(phase), "minutes": minutes, "threads": torch.get_num_threads(), "loss": history})
        write_json(log_file, log)
    print("evaluating on held-out digits", flush=True)
    results = evaluate_all(*(out / folder.name for folder in (MODEL, UNCOMPRESSED, CLIPS)), questions)
    write_json(out / "results.json", results)


def save(model: VocoLlavaForConditionalGeneration, processor: VocoProcessor, folder: Path) -> None:
    """Write a checkpoint in float16 (half the size; answers are the same), with its processor."""
    state = {name: x.half() if x.is_floating_point() else x for name, x in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)


def main() -> None:
    """Command line of `make train-demo`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL.parent, help="folder of the checkpoints and the logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all step counts (0.01 for a trial)")
    parser.add_argument("--questions", type=int, default=2400, help="held-out questions about images in the evaluation")
    parser.add_argument("--after", choices=("uncompressed", "voco"), help="go on after this phase's checkpoint in --out")
    arguments = parser.parse_args()
    train(arguments.out, arguments.seed, arguments.scale, arguments.questions, arguments.after)


if __name__ == "__main__":
    main()
