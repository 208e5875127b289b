"""Held-out accuracy of the demo model, through the same calls that users make: `python -m voco_llama.demo.evaluate`."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from voco_llama import VocoLlavaForConditionalGeneration

from . import MODEL, UNCOMPRESSED
from .digits import KINDS, DigitsTask, Sample, question_prior

BATCH = 100


def heldout(questions: int) -> list[Sample]:
    """Samples of digits that training never saw, one question each, the kinds in turn."""
    task = DigitsTask("heldout")
    return [task.sample((777, i), kinds=(KINDS[i % len(KINDS)],)) for i in range(questions)]


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


def score(samples: Sequence[Sample], given: Sequence[str]) -> dict[str, dict]:
    """Accuracy with its interval, per kind of question and over all; beside it what the question alone gives."""
    table = {}
    for kind in (*KINDS, "all"):
        chosen = [(s.questions[0], a) for s, a in zip(samples, given) if kind in ("all", s.questions[0].kind)]
        hits = sum(question.answer == answer for question, answer in chosen)
        low, high = wilson(hits, len(chosen))
        prior = sum(question_prior(question.kind) for question, _ in chosen) / len(chosen)
        row = {"hits": hits, "total": len(chosen), "accuracy": hits / len(chosen), "interval": [low, high]}
        table[kind] = {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}
        table[kind]["interval"] = [round(x, 4) for x in (low, high)]
        table[kind]["prior"] = round(prior, 4)
    return table


def load(folder: Path) -> VocoLlavaForConditionalGeneration:
    """A checkpoint of the demo in float32, ready to answer."""
    logging.disable_progress_bar()
    return VocoLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def evaluate_all(model_folder: Path = MODEL, uncompressed_folder: Path = UNCOMPRESSED, questions: int = 2400) -> dict:
    """Every row of the accuracy table: uncompressed, VoCo counts, another image's cache, the lower bound."""
    samples = heldout(questions)
    model, before = load(model_folder), load(uncompressed_folder)
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
        row = results["rows"][name]
        line = " ".join(f"{kind} {100 * row[kind]['accuracy']:.1f}" for kind in (*KINDS, "all"))
        print(f"{name}: {line}", flush=True)
    return results


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
