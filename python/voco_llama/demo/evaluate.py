"""Held-out accuracy of the demo model, through the same calls that users make: `python -m voco_llama.demo.evaluate`."""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from voco_kernels import VocoKV
from voco_llama import VocoLlavaForConditionalGeneration

from . import CLIPS, MODEL, UNCOMPRESSED, clips
from .clips import Clip, ClipsTask, write_clip
from .digits import KINDS, DigitsTask, Sample, question_prior

BATCH = 100
FILE_FPS = 8  # of the video files; the model looks at one frame a second


def heldout(questions: int) -> list[Sample]:
    """Samples of digits that training never saw, one question each, the kinds in turn."""
    task = DigitsTask("heldout")
    return [task.sample((777, i), kinds=(KINDS[i % len(KINDS)],)) for i in range(questions)]


def heldout_clips(questions: int) -> list[Clip]:
    """Clips of digits that training never saw, one question each, the kinds in turn."""
    task = ClipsTask("heldout")
    return [task.sample((778, i), kinds=(clips.KINDS[i % len(clips.KINDS)],)) for i in range(questions)]


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of hits / total."""
    z, p = 1.96, hits / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return centre - half, centre + half


def answers(
    model: VocoLlavaForConditionalGeneration, samples: Sequence[Sample], num_voco: int, wrong_image: bool = False
) -> list[str]:
    """Answers to the first question of each sample: uncompressed for `num_voco` 0, else in two stages.

    With `wrong_image` every question is asked about the image of another sample.
    """
    processor, given = model.processor, []
    for begin in range(0, len(samples), BATCH):
        batch = samples[begin : begin + BATCH]
        images = [sample.image for sample in batch]
        if wrong_image:
            images = images[7:] + images[:7]
        prompts = [processor.prompt(sample.questions[0].text) for sample in batch]
        inputs = processor(images if num_voco == 0 else None, prompts, num_voco_tokens=num_voco)
        kv = model.compress(images, num_voco) if num_voco else None
        tokens = model.generate(**inputs, voco_kv=kv, max_new_tokens=4, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        given += processor.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in given]


def clip_answers(
    model: VocoLlavaForConditionalGeneration, asked: Sequence[Clip], caches: Sequence[list[VocoKV]], num_voco: int
) -> list[str]:
    """Answers to the first question of each clip over `caches`: per clip its compressed frames, or its compressed file."""
    processor, given = model.processor, []
    for begin in range(0, len(asked), BATCH):
        batch = slice(begin, begin + BATCH)
        frames = [sum(len(kv.segments) for kv in cache) for cache in caches[batch]]
        prompts = [processor.prompt(clip.questions[0].text, [n]) for clip, n in zip(asked[batch], frames)]
        inputs = processor(None, prompts, num_voco_tokens=num_voco)
        flat = [kv for cache in caches[batch] for kv in cache]
        tokens = model.generate(**inputs, voco_kv=flat, max_new_tokens=4, do_sample=False)
        given += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in given]


def score(
    samples: Sequence[Sample] | Sequence[Clip],
    given: Sequence[str],
    kinds: Sequence[str] = KINDS,
    prior_of: Callable[[str], float] = question_prior,
) -> dict[str, dict]:
    """Accuracy with its interval, per kind of question and over all; beside it what the question alone gives."""
    table = {}
    for kind in (*kinds, "all"):
        chosen = [(s.questions[0], a) for s, a in zip(samples, given) if kind in ("all", s.questions[0].kind)]
        hits = sum(question.answer == answer for question, answer in chosen)
        low, high = wilson(hits, len(chosen))
        prior = sum(prior_of(question.kind) for question, _ in chosen) / len(chosen)
        row = {"hits": hits, "total": len(chosen), "accuracy": hits / len(chosen), "interval": [low, high]}
        table[kind] = {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}
        table[kind]["interval"] = [round(x, 4) for x in (low, high)]
        table[kind]["prior"] = round(prior, 4)
    return table


def score_clips(asked: Sequence[Clip], given: Sequence[str]) -> dict[str, dict]:
    """As `score`, for clips; also `unordered`: what one scores who knows the digits of a clip, but not their order."""
    table = score(asked, given, clips.KINDS, clips.question_prior)
    for kind, cell in table.items():
        chosen = [clip for clip in asked if kind in ("all", clip.questions[0].kind)]
        chances = [clips.unordered_prior(clip.questions[0].kind, len(clip.order)) for clip in chosen]
        cell["unordered"] = round(sum(chances) / len(chances), 4)
    return table


def load(folder: Path) -> VocoLlavaForConditionalGeneration:
    """A checkpoint of the demo in float32, ready to answer."""
    logging.disable_progress_bar()
    return VocoLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def evaluate_all(
    model_folder: Path = MODEL,
    uncompressed_folder: Path = UNCOMPRESSED,
    clips_folder: Path = CLIPS,
    questions: int = 2400,
    clip_questions: int = 1000,
) -> dict:
    """Every row of the accuracy table: uncompressed, VoCo counts, another image's cache, the lower bound; then the clips."""
    samples = heldout(questions)
    model, before, after = map(load, (model_folder, uncompressed_folder, clips_folder))
    default = model.config.num_voco_tokens
    rows = {
        "uncompressed": (model, 0, False),
        **{f"voco {n}": (model, n, False) for n in (1, 2, 4, 8)},
        "another image's cache": (model, default, True),
        "lower bound": (before, default, False),
        "upper bound": (before, 0, False),
    }
    results = {"questions": questions, "default_voco": default, "rows": {}}
    for name, (chosen, count, wrong) in rows.items():
        results["rows"][name] = score(samples, answers(chosen, samples, count, wrong))
        _print_row(name, results["rows"][name])
    results["clips"] = {
        "questions": clip_questions,
        "rows": evaluate_clips(after, heldout_clips(clip_questions)),
        "images": {},
    }
    for name, count in (("uncompressed", 0), (f"voco {default}", default)):
        results["clips"]["images"][name] = score(samples, answers(after, samples, count))
        _print_row(f"images, {name}", results["clips"]["images"][name])
    return results


def evaluate_clips(model: VocoLlavaForConditionalGeneration, asked: Sequence[Clip]) -> dict:
    """The rows about clips: VoCo counts, clips as files, and what is left with frames in reverse or of another clip."""
    default = model.config.num_voco_tokens
    one, many = ([model.compress(clip.frames(), n) for clip in asked] for n in (1, default))
    with tempfile.TemporaryDirectory() as folder:
        files = [compress_file(model, clip, Path(folder) / "clip.mp4") for clip in asked]
    rows = {
        "voco 1": (one, 1),
        f"voco {default}": (many, default),
        "mp4": (files, default),
        "frames in reverse": ([cache[::-1] for cache in many], default),
        "another clip's cache": (many[7:] + many[:7], default),
    }
    table = {name: score_clips(asked, clip_answers(model, asked, *row)) for name, row in rows.items()}
    for name, row in table.items():
        _print_row(name, row)
    return table


def compress_file(model: VocoLlavaForConditionalGeneration, clip: Clip, path: Path) -> list[VocoKV]:
    """Write a clip as an mp4 and compress that, one frame a second."""
    write_clip(path, clip.frames(FILE_FPS), FILE_FPS)
    return [model.compress_video(path, fps=1)]


def _print_row(name: str, row: dict[str, dict]) -> None:
    line = " ".join(f"{kind} {100 * cell['accuracy']:.1f}" for kind, cell in row.items())
    print(f"{name}: {line}", flush=True)


def write_json(path: Path, value) -> None:
    """Write JSON to a file that appears, or changes, as a whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def main() -> None:
    """Print the table; with `--out` also write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=2400)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = evaluate_all(questions=arguments.questions)
    if arguments.out:
        write_json(arguments.out, results)


if __name__ == "__main__":
    main()
