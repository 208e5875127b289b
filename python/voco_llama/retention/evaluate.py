"""Held-out accuracy of a trained model, per kind of question."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from voco_llama.systems import answer

from .task import KINDS, Sample, is_right

BATCH = 100
LONGEST = 5  # tokens of an answer: a box, and the end


def score(folder: Path, system: str, tokens: int, samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    """{kind: {"hits", "total"}} of the model in `folder`, its images shown as `system` has them, in `tokens` tokens."""
    given = answers(folder, system, tokens, samples)
    table = {kind: {"hits": 0, "total": 0} for kind in KINDS}
    for sample, text in zip(samples, given, strict=True):
        (question,) = sample.questions
        table[question.kind]["hits"] += is_right(question, text)
        table[question.kind]["total"] += 1
    return table


def answers(folder: Path, system: str, tokens: int, samples: Sequence[Sample]) -> list[str]:
    """Greedy answers to the one question of each sample."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    given = []
    for begin in range(0, len(samples), BATCH):
        batch = samples[begin : begin + BATCH]
        questions, images = [sample.questions[0].text for sample in batch], [[sample.image] for sample in batch]
        given += answer(system, model, questions, images, tokens, max_new_tokens=LONGEST)
    return given
