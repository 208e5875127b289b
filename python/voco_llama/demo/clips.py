"""The demo's task in time: questions in words about the order of real handwritten digits that move through a clip.

The digits of a clip are different and come one after the other, each along a straight path. As with the images, the
answers are balanced: a model that sees none of the frames scores :func:`question_prior` and no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from . import digits
from .digits import Question, draw_scan, load_digits

SIDE = 128  # pixels of a frame, each way
SHORTEST, LONGEST = 4, 12  # seconds of a clip, one frame of which is looked at every second
FEWEST, MOST = 2, 4  # digits of a clip
KINDS = ("first", "last", "after", "before", "number")

_WORDINGS = {
    "first": (
        "which digit came first",
        "what came first",
        "which digit is the first",
        "what is the first digit in the clip",
    ),
    "last": (
        "which digit came last",
        "what came last",
        "which digit is the last",
        "what is the last digit in the clip",
    ),
    "after": (
        "which digit came after the {digit}",
        "what came after the {digit}",
        "what came right after the {digit}",
    ),
    "before": (
        "which digit came before the {digit}",
        "what came before the {digit}",
        "what came right before the {digit}",
    ),
    "number": (
        "how many digits came",
        "how many digits are in the clip",
        "how many digits are there",
    ),
}


@dataclass(frozen=True)
class Passage:
    """One digit on its way: ``scan`` (uint8 ``[8, 8]``) from second ``begin`` up to ``end``.

    ``path`` holds the (x, y) of both of its ends in pixels; the rest is as in :func:`draw_scan`.
    """

    digit: int
    scan: np.ndarray
    begin: int
    end: int
    path: np.ndarray
    scale: float
    angle: float
    gain: float

    def draw(self, second: float) -> Image.Image:
        """The frame at ``second``, between begin and end: a grey image of ``SIDE`` x ``SIDE`` pixels."""
        done = (second - self.begin) / (self.end - self.begin)
        centre = (1 - done) * self.path[0] + done * self.path[1]
        return draw_scan(self.scan, SIDE, centre, self.scale, self.angle, self.gain)


@dataclass(frozen=True)
class Clip:
    """Digits that follow each other within ``seconds``, and questions about their order."""

    seconds: int
    passages: tuple[Passage, ...]
    questions: tuple[Question, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The digits in the order in which they come."""
        return tuple(passage.digit for passage in self.passages)

    def frames(self, fps: int = 1, begin: float = 0.0) -> list[Image.Image]:
        """RGB frames, white on black, at ``begin``, ``begin + 1 / fps``, ... ; black where no digit is."""
        empty = Image.new("L", (SIDE, SIDE))
        seconds = [begin + i / fps for i in range(self.seconds * fps)]
        shown = [next((p for p in self.passages if p.begin <= second < p.end), None) for second in seconds]
        frames = [p.draw(second) if p else empty for p, second in zip(shown, seconds, strict=True)]
        return [frame.convert("RGB") for frame in frames]


def sequence(order: Sequence[int]) -> Question:
    """The question whose answer is every digit in order; training asks it of every clip (see ``digits.reading``)."""
    return Question("sequence", "which digits came", " ".join(map(str, order)))


def question_prior(kind: str) -> float:
    """The best accuracy without the frames: one over the number of possible answers to the question."""
    # The digit after another one differs from it.
    choices = {"after": 9, "before": 9, "number": MOST - FEWEST + 1}
    return 1 / choices.get(kind, 10)


def unordered_prior(kind: str, count: int) -> float:
    """The best accuracy of one who knows which ``count`` digits a clip shows, but not their order."""
    if kind == "number":
        return 1.0
    return 1 / (count - 1 if kind in ("after", "before") else count)


def vocabulary() -> list[str]:
    """The words that questions about images lack, sorted."""
    wordings = [text for texts in _WORDINGS.values() for text in texts] + [sequence(()).text]
    words = {word for text in wordings for word in text.split() if not word.startswith("{")}
    return sorted(words - set(digits.vocabulary()))


def write_clip(path: Path, frames: Sequence[Image.Image], fps: int) -> None:
    """Write RGB frames of one size as an mp4 (MPEG-4 Part 2, which every FFmpeg can write and read)."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(fps))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 1_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))


class ClipsTask:
    """Draws clips of one split; the same ``seed`` always gives the same clip.

    Args:
        split: "train" or "heldout", the scans to draw from.
        seconds: of a clip, at least and at most; one of fewer seconds than digits shows one in each.
        augment: scale, turn and fade each scan a little (for training only).
    """

    def __init__(self, split: str, seconds: tuple[int, int] = (SHORTEST, LONGEST), augment: bool = False):
        if not 1 <= seconds[0] <= seconds[1]:
            raise ValueError(f"seconds must be two numbers of at least 1, the smaller one first, got {seconds}")
        self.scans = load_digits(split)
        self.seconds, self.augment = seconds, augment

    def sample(
        self, seed: int | tuple[int, ...], num_questions: int = 1, kinds: Sequence[str] = KINDS
    ) -> Clip:
        """One clip with up to ``num_questions`` different questions of the given kinds, in random order."""
        rng = np.random.default_rng(seed)
        seconds = int(rng.integers(self.seconds[0], self.seconds[1] + 1))
        order = rng.permutation(10)[: min(seconds, rng.integers(FEWEST, MOST + 1))].tolist()
        cuts = sorted(rng.choice(np.arange(1, seconds), len(order) - 1, replace=False).tolist())
        cuts = [0, *cuts, seconds]
        passages = tuple(self._passage(*part, rng) for part in zip(order, cuts, cuts[1:], strict=False))
        possible = [
            (kind, i)
            for kind in kinds
            for i in (range(len(order) - 1) if kind in ("after", "before") else (None,))
        ]
        # First the kind: questions about two neighbours are many, but as likely as the others.
        asked = []
        while len(asked) < min(num_questions, len(possible)):
            kind = kinds[rng.integers(len(kinds))]
            choices = [choice for choice in possible if choice[0] == kind and choice not in asked]
            if choices:
                asked.append(choices[rng.integers(len(choices))])
        return Clip(seconds, passages, tuple(_question(kind, order, i, rng) for kind, i in asked))

    def _passage(self, digit: int, begin: int, end: int, rng: np.random.Generator) -> Passage:
        """A random scan of ``digit`` on a random path; now and then the last of several seconds stays empty."""
        scan = self.scans[digit][rng.integers(len(self.scans[digit]))]
        if end - begin > 1 and rng.random() < 0.25:
            end -= 1
        scale, angle, gain = 0.125, 0.0, 255 / 16
        if self.augment:
            scale *= rng.uniform(0.88, 1.15)
            angle, gain = rng.uniform(-0.2, 0.2), gain * rng.uniform(0.7, 1.0)
        path = rng.uniform(0.25 * SIDE, 0.75 * SIDE, (2, 2))
        return Passage(digit, scan, begin, end, path, scale, angle, gain)


def _question(kind: str, order: Sequence[int], index: int | None, rng: np.random.Generator) -> Question:
    """Put a question into words: a random wording, with digits as words or numerals.

    The neighbours in time are the digits ``index`` and ``index + 1`` of ``order``.
    """
    fields = {}
    if kind in ("after", "before"):
        digit, answer = order[index : index + 2] if kind == "after" else order[index : index + 2][::-1]
        fields["digit"] = str(digit) if rng.random() < 0.3 else digits.WORDS[digit]
    else:
        answer = {"first": order[0], "last": order[-1], "number": len(order)}[kind]
    wording = _WORDINGS[kind][rng.integers(len(_WORDINGS[kind]))]
    return Question(kind, wording.format(**fields), str(answer))
