"""Which runs there are, and what all of them share."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import build, task

COUNTS = (1, 2, 4, 8, 16, 32, 64)  # tokens that VoCo compresses an image to: powers of two up to the number of vision tokens
FEW = (1, 4, 16)  # tokens of the other systems
ELASTIC = (1, 2, 4, 8, 16)  # of which the elastic model draws one for each image
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Settings:
    """What every number depends on, beside the seed. Results of different settings are never in one folder.

    Attributes:
        tower_steps, base_steps, steps: of the image tower; of the uncompressed LLaVA that every run starts from, whatever
            its seed (the part of the paper's LLaVA); and of each system. The first two go on from the demo's model.
        batch: images of a step.
        questions: held-out questions, the kinds in turn.
        smoke: too short to be a result.
    """

    tower_steps: int = 500
    base_steps: int = 600
    steps: int = 300
    batch: int = 32
    tower_learning_rate: float = 1e-3
    base_learning_rate: float = 1e-3
    learning_rate: float = 1e-3
    questions: int = 2400
    smoke: bool = False

    def to_dict(self) -> dict:
        """With the constants of the task and the size of the models."""
        names = ("ROWS", "COLUMNS", "CELL", "STEP", "SIZES", "INK", "MOST", "TURNS", "WORDINGS")
        return {
            **dataclasses.asdict(self),
            "task": {name.lower(): getattr(task, name) for name in names},
            "vision_tokens": build.VISION,
            "elastic": ELASTIC,
        }

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


FULL = Settings()
SMOKE = Settings(tower_steps=200, base_steps=200, steps=80, questions=600, smoke=True)


@dataclass(frozen=True)
class Run:
    """One training: a system, the tokens of an image (several where one is drawn for each image), a seed."""

    system: str
    counts: tuple[int, ...]
    seed: int

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.system}-{self.tokens}-seed{self.seed}"

    @property
    def tokens(self) -> str:
        """The number of tokens in words."""
        return "elastic" if len(self.counts) > 1 else str(self.counts[0])

    @property
    def evaluations(self) -> tuple[tuple[str, int], ...]:
        """The (system, tokens) that its weights are evaluated as."""
        if self.system == "upper_bound":
            return (("upper_bound", 1), ("lower_bound", 1), ("full_caching", 1))
        if self.system == "voco":
            return tuple(("voco", count) for count in COUNTS if count <= max(self.counts))
        return ((self.system, self.counts[0]),)


def all_runs(
    only: Sequence[str] | None = None, counts: Sequence[int] | None = None, seeds: Sequence[int] = SEEDS
) -> Iterator[Run]:
    """The full set, a seed after the other, what the tables need most first.

    Args:
        only: systems; all where None.
        counts: numbers of tokens; all where None, and then the elastic model is among them.
        seeds: of weights and data.

    Raises:
        ValueError: a system or a number that no run has.
    """
    systems = {"upper_bound": (1,), "voco": COUNTS, "avg_pool": FEW, "q_former": FEW, "llama_vid": FEW}
    for name, given, known in (("only", only, systems), ("counts", counts, COUNTS)):
        for one in given or ():
            if one not in known:
                raise ValueError(f"{name} must be of {', '.join(map(str, known))}, but was {one!r}")
    order = [1, 4, 16, *(count for count in COUNTS if count not in FEW)]
    for seed in seeds:
        for count in order:
            for system in systems:
                chosen = (only is None or system in only) and (counts is None or count in counts)
                if chosen and count in systems[system]:
                    yield Run(system, (count,), seed)
        if counts is None and (only is None or "voco" in only):
            yield Run("voco", ELASTIC, seed)


def smoke_runs() -> list[Run]:
    """Three systems, one seed."""
    return [Run(system, (1,), 0) for system in ("upper_bound", "voco", "avg_pool")]
