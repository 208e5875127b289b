"""The demo task: questions in words about a grid of real handwritten digits.

Every image is a grid of UCI digits (8 x 8 scans that ship in scikit-learn). A question is about a place, a digit or
an order, and its answer is one token. The answers are balanced: given only a question, every possible answer is
equally likely, so a model that does not see the image scores :func:`question_prior` and no more.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

CELL = 16  # pixels of one grid cell, each way
KINDS = ("position", "count", "largest", "smallest", "presence", "neighbour")

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PLURALS = ("zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines")
_SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
_VERTICAL, _HORIZONTAL = ("top", "middle", "bottom"), ("left", "middle", "right")

_WORDINGS = {
    "position": (
        "which digit is in row {row} column {column}",
        "what is in row {row} column {column}",
        "which digit is in column {column} of row {row}",
        "what digit is at the {corner}",
    ),
    "count": (
        "how many {plural}",
        "how many {plural} are there",
        "count the {plural}",
        "how often is there {a} {digit}",
    ),
    "largest": (
        "largest digit",
        "what is the largest digit",
        "which digit is the biggest",
        "what is the maximum",
    ),
    "smallest": (
        "smallest digit",
        "what is the smallest digit",
        "which digit is the lowest",
        "what is the minimum",
    ),
    "presence": (
        "is there {a} {digit}",
        "is there {a} {digit} in the image",
        "does the image contain {a} {digit}",
        "can you see {a} {digit}",
    ),
    "neighbour": (
        "which digit is {side} the {digit}",
        "what is {side} the {digit}",
        "what digit is {side} the {digit}",
    ),
}


class Question(NamedTuple):
    """One question about an image; ``answer`` is a numeral or yes / no."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """An RGB image of ``rows * CELL`` by ``columns * CELL`` pixels, its digits by row, and questions about it."""

    image: Image.Image
    grid: tuple[tuple[int, ...], ...]
    questions: tuple[Question, ...]


@functools.cache
def load_digits(split: str, seed: int = 0) -> tuple[np.ndarray, ...]:
    """The scans of one split as ten arrays, the n-th of digit n: uint8 ``[count, 8, 8]``, values 0 to 16.

    ``split`` is "train" (1,437 scans) or "heldout" (360, 36 of each digit); each scan is in exactly one of them.
    """
    from sklearn.datasets import load_digits as load_uci  # only the demo needs scikit-learn

    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    data = load_uci()
    # RandomState, not default_rng: its stream is frozen, so the split is the same under every NumPy version.
    order = np.random.RandomState(seed).permutation(len(data.target))
    scans, labels = data.images[order].astype(np.uint8), data.target[order]
    part = slice(36) if split == "heldout" else slice(36, None)
    return tuple(scans[labels == digit][part] for digit in range(10))


def question_prior(kind: str, rows: int = 2, columns: int = 2) -> float:
    """The best accuracy without the image: one over the number of possible answers to the question."""
    # A neighbour differs from the digit it stands beside, since that digit must occur only once.
    choices = {"count": rows * columns + 1, "presence": 2, "neighbour": 9}
    return 1 / choices.get(kind, 10)


def draw_scan(
    scan: np.ndarray, side: int, centre: Sequence[float], scale: float, angle: float, gain: float
) -> Image.Image:
    """One scan, uint8 ``[8, 8]``, as a grey image of ``side`` x ``side`` pixels.

    Args:
        centre: the pixel (x, y) that the middle of the scan comes to.
        scale: pixels of the scan per pixel of the image.
        angle: by which it is turned, in radians.
        gain: what one step of the scan's values adds to a pixel.
    """
    image = Image.fromarray((scan * gain).astype(np.uint8))
    # The affine map from a pixel of the image to the scan: both centres coincide.
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    x, y = centre
    matrix = (cos, -sin, 4 - cos * x + sin * y, sin, cos, 4 - sin * x - cos * y)
    return image.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def vocabulary() -> list[str]:
    """All words that questions and answers can contain, sorted; numerals appear as single digits."""
    words = {
        "answer",
        "yes",
        "no",
        "a",
        "an",
        "row",
        "column",
        "s",
        "to",
        "in",
        "corner",
        *map(str, range(10)),
    }
    words.update(WORDS, _PLURALS, _VERTICAL, _HORIZONTAL, *(side.split() for side in _SIDES))
    for wordings in _WORDINGS.values():
        words.update(word for text in wordings for word in text.split() if not word.startswith("{"))
    return sorted(words)


def reading(grid: Sequence[Sequence[int]]) -> Question:
    """The question whose answer is every digit, row by row.

    Training asks it in every document: it is the densest thing that can be learnt from an image, and without it the model
    stays for long at guessing which digits there are without knowing where.
    """
    return Question("reading", "what is in the image", " ".join(str(digit) for row in grid for digit in row))


class DigitsTask:
    """Draws samples of one split; the same ``seed`` always gives the same sample.

    Args:
        split: "train" or "heldout", the scans to draw from.
        rows, columns: digits in the image, at most 3 each way.
        augment: shift, scale, turn and fade each scan a little (for training only).
    """

    def __init__(self, split: str, rows: int = 2, columns: int = 2, augment: bool = False):
        if not (1 <= rows <= 3 and 1 <= columns <= 3 and rows * columns > 1):
            raise ValueError(
                f"rows and columns must be 1 to 3 with at least two digits, got {rows} x {columns}"
            )
        self.scans = load_digits(split)
        self.rows, self.columns, self.augment = rows, columns, augment

    def sample(
        self, seed: int | tuple[int, ...], num_questions: int = 1, kinds: Sequence[str] = KINDS
    ) -> Sample:
        """One image with up to ``num_questions`` different questions of the given kinds.

        The grid is drawn for one question, of a random kind, such that its answers are balanced; an evaluation
        asks only that one. Further questions take the grid as it is, with answers as balanced as it allows, and
        all stand in random order.
        """
        rng = np.random.default_rng(seed)
        kind = kinds[rng.integers(len(kinds))]
        cells, argument = self._draw(kind, rng)
        asked = [(kind, argument)]
        for _ in range(3 * (num_questions - 1)):  # a repeated question would teach copying, not seeing
            kind = kinds[rng.integers(len(kinds))]
            argument = self._choose(kind, cells, rng)
            impossible = argument is None and kind == "neighbour"
            if len(asked) < num_questions and not impossible and (kind, argument) not in asked:
                asked.append((kind, argument))
        questions = tuple(self._question(*asked[i], cells, rng) for i in rng.permutation(len(asked)))
        grid = tuple(tuple(cells[r * self.columns : (r + 1) * self.columns]) for r in range(self.rows))
        return Sample(self.render(grid, rng), grid, questions)

    def render(self, grid, rng: np.random.Generator) -> Image.Image:
        """Draw a random scan of each digit of ``grid`` (rows of ints) into its cell: RGB, white on black."""
        canvas = Image.new("L", (len(grid[0]) * CELL, len(grid) * CELL))
        for r, row in enumerate(grid):
            for c, digit in enumerate(row):
                scan = self.scans[digit][rng.integers(len(self.scans[digit]))]
                canvas.paste(self._render_cell(scan, rng), (c * CELL, r * CELL))
        return canvas.convert("RGB")

    def _render_cell(self, scan: np.ndarray, rng: np.random.Generator) -> Image.Image:
        """One scan, uint8 ``[8, 8]``, as a grey image of ``CELL`` x ``CELL`` pixels."""
        scale, angle, shift, gain = 0.55, 0.0, (0.0, 0.0), 255 / 16
        if self.augment:
            scale *= rng.uniform(0.88, 1.15)
            angle, shift, gain = (
                rng.uniform(-0.2, 0.2),
                rng.uniform(-1.3, 1.3, 2),
                gain * rng.uniform(0.7, 1.0),
            )
        centre = (CELL / 2 + shift[0], CELL / 2 + shift[1])
        return draw_scan(scan, CELL, centre, scale, angle, gain)

    def _draw(self, kind: str, rng: np.random.Generator):
        """Digits by cell, and the argument of the question, such that the answers of ``kind`` are uniform."""
        size = self.rows * self.columns
        digit = int(rng.integers(10))
        others = [d for d in range(10) if d != digit]
        if kind == "position":
            return rng.integers(10, size=size).tolist(), int(rng.integers(size))
        if kind in ("largest", "smallest"):
            cells = rng.integers(digit + 1, size=size)
            while cells.max() != digit:
                cells = rng.integers(digit + 1, size=size)
            return (cells if kind == "largest" else 9 - cells).tolist(), None
        cells = rng.choice(others, size=size)
        if kind == "count":
            cells[rng.permutation(size)[: rng.integers(size + 1)]] = digit
        elif kind == "presence":
            cells[rng.permutation(size)[: rng.integers(2)]] = digit
        else:
            cell, side = self._sides()[rng.integers(len(self._sides()))]
            cells[cell] = digit
            return cells.tolist(), (digit, side)
        return cells.tolist(), digit

    def _choose(self, kind: str, cells: list[int], rng: np.random.Generator):
        """The argument of one more question of ``kind`` about a given grid; None where none can be asked."""
        counts = Counter(dict.fromkeys(range(10), 0))
        counts.update(cells)
        if kind == "position":
            return int(rng.integers(len(cells)))
        if kind in ("count", "presence"):  # first the answer, then a digit that has it
            key = counts if kind == "count" else {digit: min(count, 1) for digit, count in counts.items()}
            answer = rng.choice(sorted(set(key.values())))
            return int(rng.choice([digit for digit in range(10) if key[digit] == answer]))
        if kind == "neighbour":
            choices = [(cells[cell], side) for cell, side in self._sides() if counts[cells[cell]] == 1]
            return choices[rng.integers(len(choices))] if choices else None
        return None

    def _sides(self) -> list[tuple[int, str]]:
        """All (cell, side) whose neighbour on that side exists."""
        return [
            (r * self.columns + c, side)
            for r in range(self.rows)
            for c in range(self.columns)
            for side, (down, right) in _SIDES.items()
            if 0 <= r + down < self.rows and 0 <= c + right < self.columns
        ]

    def _answer(self, kind: str, cells: list[int], argument) -> str:
        if kind == "position":
            return str(cells[argument])
        if kind == "count":
            return str(cells.count(argument))
        if kind == "presence":
            return "yes" if argument in cells else "no"
        if kind == "neighbour":
            digit, side = argument
            down, right = _SIDES[side]
            return str(cells[cells.index(digit) + down * self.columns + right])
        return str(max(cells) if kind == "largest" else min(cells))

    def _question(self, kind: str, argument, cells: list[int], rng: np.random.Generator) -> Question:
        """Put a question into words: a random wording, with digits as words or numerals."""
        fields = {}
        if kind == "position":
            row, column = divmod(argument, self.columns)
            corner = f"{_name(_VERTICAL, row, self.rows)} {_name(_HORIZONTAL, column, self.columns)}"
            fields = {"row": row + 1, "column": column + 1, "corner": corner}
        elif argument is not None:
            digit, fields["side"] = argument if kind == "neighbour" else (argument, None)
            numeral = rng.random() < 0.3
            fields["digit"] = str(digit) if numeral else WORDS[digit]
            fields["plural"] = f"{digit}s" if numeral else _PLURALS[digit]
            fields["a"] = "an" if digit == 8 else "a"
        wording = _WORDINGS[kind][rng.integers(len(_WORDINGS[kind]))]
        return Question(kind, wording.format(**fields), self._answer(kind, cells, argument))


def _name(names: tuple[str, str, str], index: int, size: int) -> str:
    """The name of a row or column: first, middle, last."""
    return names[0] if index == 0 else names[2] if index == size - 1 else names[1]
