"""The task that systems are compared on: handwritten digits of different sizes in one image, and questions about them.

It is the demo's task made harder: each digit is of its own size and somewhere in its cell, and there are two kinds of
question about boxes: where a digit is (as in referring expression comprehension, REC) and which digit is in a box
(as in referring expression generation, REG). A model that sees only the question scores `question_prior` and no more.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from voco_llama.demo.dataset import turns
from voco_llama.demo.digits import Question, draw_scan, load_digits

ROWS = COLUMNS = 2
CELLS = ROWS * COLUMNS
CELL = 16  # pixels of a cell, each way
EDGE = ROWS * CELL  # pixels of the image, each way
STEP = 2  # pixels between the lines that boxes lie on; a coordinate counts them
LINES = EDGE // STEP + 1
SIZES = (8.0, 13.0)  # pixels of a scan, each way: the smallest and the largest
INK = 48  # of 255: what a pixel must reach to be in its digit's box
TURNS = 2  # questions of each kind about a training image
MOST = 4  # the largest answer to "how often"

GENERAL = ("position", "count", "presence", "neighbour")
LOCATE, REGION = "locate", "region"
KINDS = (*GENERAL, LOCATE, REGION)
WORDINGS = {
    "position": "which digit is in row {row} column {column}",
    "count": "how often is there a {digit}",
    "presence": "is there a {digit}",
    "neighbour": "which digit is {side} the {digit}",
    LOCATE: "where is the {digit}",
    REGION: "which digit is in box {box}",
    "reading": "what is in the image",
}
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


class Box(NamedTuple):
    """Left, top, right, bottom, each the number of a line: a multiple of `STEP` pixels."""

    left: int
    top: int
    right: int
    bottom: int

    def __str__(self) -> str:
        return " ".join(map(str, self))

    @property
    def area(self) -> int:
        return max(self.right - self.left, 0) * max(self.bottom - self.top, 0)

    @classmethod
    def parse(cls, text: str) -> "Box | None":
        """The box that an answer states, or None: four whole numbers, in which something has room."""
        words = text.split()
        if len(words) != 4 or not all(word.isdecimal() for word in words):
            return None
        box = cls(*map(int, words))
        return box if box.left < box.right and box.top < box.bottom else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes that are not empty."""
    both = Box(max(a.left, b.left), max(a.top, b.top), min(a.right, b.right), min(a.bottom, b.bottom)).area
    return both / (a.area + b.area - both)


def is_right(question: Question, given: str) -> bool:
    """Whether an answer counts: the same words, or for a box an IoU above 0.5, as in REC."""
    if question.kind != LOCATE:
        return given.split() == question.answer.split()
    box = Box.parse(given)
    return box is not None and iou(box, Box.parse(question.answer)) > 0.5


def question_prior(kind: str) -> float:
    """The best accuracy without the image.

    A box cannot have an IoU above 0.5 with boxes in two cells (it would have to lie by more than half in each), so for
    `locate` this is a bound: one over the number of cells. Of a cell that is known, one box for all is right two times in
    three.
    """
    # A neighbour differs from the digit it stands beside, since that digit must occur only once.
    choices = {"count": MOST + 1, "presence": 2, "neighbour": 9, LOCATE: CELLS}
    return 1 / choices.get(kind, 10)


def vocabulary() -> list[str]:
    """All words of questions and answers, the numbers first."""
    words = {word for text in WORDINGS.values() for word in text.split() if not word.startswith("{")}
    words.update(("yes", "no", "answer"), *(side.split() for side in SIDES))
    return [*map(str, range(LINES)), *sorted(words)]


@dataclass(frozen=True)
class Sample:
    """An RGB image of `EDGE` pixels each way, its digits and their boxes by cell, row by row, and questions about it."""

    image: Image.Image
    digits: tuple[int, ...]
    boxes: tuple[Box, ...]
    questions: tuple[Question, ...]

    @property
    def reading(self) -> Question:
        """The question whose answer is every digit. It is learnt from fastest, and never part of an evaluation."""
        return Question("reading", WORDINGS["reading"], " ".join(map(str, self.digits)))


class RetentionTask:
    """Draws samples of one split of the scans, "train" or "heldout"; the same seed always gives the same sample.

    Training scans are also turned and faded a little.
    """

    def __init__(self, split: str):
        self.scans = load_digits(split)
        self.augment = split == "train"

    def sample(self, seed: int | tuple[int, ...], kinds: Sequence[str] = KINDS, each: int = 1) -> Sample:
        """An image with up to `each` different questions of each of `kinds`, as far as they can be asked of it.

        The digits are drawn for a question of one of the kinds, such that its answers are balanced; an evaluation asks
        for one kind alone. The other questions take the digits as they are, and all stand in random order.
        """
        rng = np.random.default_rng(seed)
        first = kinds[int(rng.integers(len(kinds)))]
        digits, asked = self._draw(first, rng)
        image, boxes = self._render(digits, rng)
        questions = [question_of(first, asked, digits, boxes)]
        for kind in (kind for kind in kinds for _ in range(each)):
            argument = self._choose(kind, digits, rng)
            if argument is not None:
                questions.append(question_of(kind, argument, digits, boxes))
        # A repeated question would teach copying, not seeing.
        questions = [q for kind in kinds for q in list(dict.fromkeys(x for x in questions if x.kind == kind))[:each]]
        order = rng.permutation(len(questions))
        return Sample(image, tuple(digits), boxes, tuple(questions[i] for i in order))

    def _draw(self, kind: str, rng: np.random.Generator):
        """Digits by cell and the argument of a question of `kind`, whose answers are uniform."""
        if kind in ("position", REGION):
            return rng.integers(10, size=CELLS).tolist(), int(rng.integers(CELLS))
        digit = int(rng.integers(10))
        digits = rng.choice([d for d in range(10) if d != digit], size=CELLS)
        copies = {"count": rng.integers(MOST + 1), "presence": rng.integers(2), LOCATE: 1}
        if kind == "neighbour":
            cell, side = _PLACES[rng.integers(len(_PLACES))]
            digits[cell] = digit
            return digits.tolist(), (digit, side)
        digits[rng.permutation(CELLS)[: copies[kind]]] = digit
        return digits.tolist(), digit

    def _choose(self, kind: str, digits: list[int], rng: np.random.Generator):
        """The argument of a question about given digits; None where none can be asked."""
        counts = Counter(dict.fromkeys(range(10), 0))
        counts.update(digits)
        if kind in ("position", REGION):
            return int(rng.integers(CELLS))
        if kind in ("count", "presence"):  # first the answer, then a digit that has it
            answers = {d: min(n, 1) if kind == "presence" else n for d, n in counts.items() if n <= MOST}
            answer = rng.choice(sorted(set(answers.values())))
            return int(rng.choice([d for d, n in answers.items() if n == answer]))
        if kind == LOCATE:
            choices = [d for d, n in counts.items() if n == 1]
        else:
            choices = [(digits[cell], side) for cell, side in _PLACES if counts[digits[cell]] == 1]
        return choices[rng.integers(len(choices))] if choices else None

    def _render(self, digits: list[int], rng: np.random.Generator) -> tuple[Image.Image, tuple[Box, ...]]:
        """A random scan of each digit at a random size and place in its cell, white on black; and their boxes."""
        canvas, boxes = Image.new("L", (EDGE, EDGE)), []
        for cell, digit in enumerate(digits):
            size = rng.uniform(*SIZES)
            centre = rng.uniform(size / 2, CELL - size / 2, 2)
            angle, gain = (rng.uniform(-0.15, 0.15), rng.uniform(0.75, 1.0)) if self.augment else (0.0, 1.0)
            scan = self.scans[digit][rng.integers(len(self.scans[digit]))]
            drawn = draw_scan(scan, CELL, centre, 8 / size, angle, gain * 255 / 16)
            left, top = cell % COLUMNS * CELL, cell // COLUMNS * CELL
            canvas.paste(drawn, (left, top))
            boxes.append(_box_of(drawn, left, top))
        return canvas.convert("RGB"), tuple(boxes)


# Every (cell, side) that has a neighbour.
_PLACES = [
    (r * COLUMNS + c, side)
    for r in range(ROWS)
    for c in range(COLUMNS)
    for side, (down, right) in SIDES.items()
    if 0 <= r + down < ROWS and 0 <= c + right < COLUMNS
]


def _box_of(drawn: Image.Image, left: int, top: int) -> Box:
    """The smallest box on the lines around the ink of a cell whose corner is at (left, top)."""
    x0, y0, x1, y1 = drawn.point(lambda value: 255 * (value >= INK)).getbbox()
    return Box((left + x0) // STEP, (top + y0) // STEP, -(-(left + x1) // STEP), -(-(top + y1) // STEP))


def question_of(kind: str, argument, digits: Sequence[int], boxes: Sequence[Box]) -> Question:
    """A question in words and its answer.

    Args:
        argument: a cell ("position", "region"), a digit ("count", "presence", "locate"), or a digit and a side.
    """
    if kind == "position":
        row, column = divmod(argument, COLUMNS)
        fields, answer = {"row": row + 1, "column": column + 1}, digits[argument]
    elif kind == REGION:
        fields, answer = {"box": boxes[argument]}, digits[argument]
    elif kind == "neighbour":
        digit, side = argument
        down, right = SIDES[side]
        fields = {"digit": digit, "side": side}
        answer = digits[digits.index(digit) + down * COLUMNS + right]
    else:
        fields, count = {"digit": argument}, digits.count(argument)
        answer = count if kind == "count" else ("yes" if count else "no")
        if kind == LOCATE:
            answer = boxes[digits.index(argument)]
    return Question(kind, WORDINGS[kind].format(**fields), str(answer))


class Conversations(Sequence):
    """`count` training conversations in LLaVA's format, made as they are asked for: questions of each kind, then a reading.

    Read last, so that no other answer can be put together from it.
    """

    def __init__(self, count: int, seed: tuple[int, ...]):
        self.task, self.count, self.seed = RetentionTask("train"), count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        sample = self.task.sample((*self.seed, index), each=TURNS)
        return {"image": sample.image, "conversations": turns((*sample.questions, sample.reading))}


def heldout(questions: int, seed: int = 777) -> list[Sample]:
    """Samples of scans that training never saw, one question each, the kinds in turn."""
    task = RetentionTask("heldout")
    return [task.sample((seed, i), (KINDS[i % len(KINDS)],)) for i in range(questions)]
