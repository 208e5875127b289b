"""The configuration of a training run: one YAML file, every key of it checked before anything is loaded."""

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import TrainingArguments

from voco_llama.systems import system_of

# What the run itself decides, or what would break its promises, and why.
RESERVED = {
    "output_dir": "the folder is `out`",
    "resume_from_checkpoint": "a run goes on by itself; --fresh starts it again",
    "use_liger_kernel": "that is `liger`",
    "liger_kernel_config": "that is `liger`",
    "label_names": "batches have fields of their own",
    "remove_unused_columns": "batches have fields of their own",
    "label_smoothing_factor": "the loss is `objective`",
    "train_sampling_strategy": "every record is used once an epoch, in an order drawn from the seed",
    "group_by_length": "batches are packed, so nothing is padded",
    "save_only_model": "a run could not go on from such a checkpoint",
    "push_to_hub": "upload the folder `model` of a finished run",
}


class _Loader(yaml.SafeLoader):
    """Reads 2e-5 as a number, as YAML 1.2 does; PyYAML follows 1.1, where it is text without a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class VideoConfig:
    """Which frames of a video are taken (`voco_llama.video.frames_of`): one of the two."""

    fps: float | None = None
    num_frames: int | None = None

    def __post_init__(self):
        if self.fps is not None and self.num_frames is not None:
            raise ValueError(f"data.video must have fps or num_frames, but had both ({self.fps} and {self.num_frames})")
        if (self.fps is not None and not 0 < self.fps < math.inf) or (self.num_frames is not None and self.num_frames < 1):
            raise ValueError(
                "data.video.fps must be above 0 and data.video.num_frames at least 1, but were "
                f"{self.fps} and {self.num_frames}"
            )


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
        conversations: JSON or JSON-lines files in LLaVA's format (`image` or `video`, `conversations`).
        images: the folder of images and videos, or webdataset shards (`shards/{000..127}.tar`).
        on_error: what a broken record does: "stop" the run, or "skip" it, counted in a report file.
        max_length: tokens of a sample at most; longer ones lose text at the end. They do so at the end of the model's
            context, too, where each token takes a position of it ("continuous").
        video: which frames of videos are taken.
    """

    conversations: tuple[Path, ...]
    images: str | None = None
    on_error: Literal["stop", "skip"] = "stop"
    max_length: int = 2048
    video: VideoConfig = field(default_factory=VideoConfig)

    def __post_init__(self):
        if self.max_length < 1:
            raise ValueError(f"data.max_length must be at least 1, but was {self.max_length}")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised.

    Attributes:
        kind: "sft" (cross-entropy of answers), "distill" (KL from the uncompressed model, equations 1 and 5 of
            VoCo-LLaMA), or "mixed": (1 - weight) * sft + weight * distill.
        teacher: a checkpoint folder or hub name that stays frozen; "self" for the trained weights under the causal mask.
        weight: of the distillation in "mixed".
        temperature: of both distributions in the distillation.
    """

    kind: Literal["sft", "distill", "mixed"] = "sft"
    teacher: str = "self"
    weight: float = 0.5
    temperature: float = 1.0


@dataclass(frozen=True)
class LoraConfig:
    """LoRA of the LLaMA's linear layers; the projector and the VoCo token's embedding are trained in full beside it."""

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05

    def __post_init__(self):
        if self.r < 1 or self.alpha < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                "lora.r and lora.alpha must be at least 1 and lora.dropout from 0 to below 1, but were "
                f"{self.r}, {self.alpha} and {self.dropout}"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """One training run.

    Attributes:
        model: a checkpoint folder or hub name with llava-hf or VoCo weights (`voco convert` makes one of others).
        out: folder for checkpoints, logs, curves and, at the end, the model.
        data: what is trained on; None where the records are given in Python.
        stage: "align" trains the projector alone, without VoCo tokens; "sft" the projector and the LLaMA.
        system: a word of `voco_llama.systems`.
        num_voco_tokens: tokens that an image is compressed to; several numbers for one drawn per image.
        objective: what is minimised.
        lora: train LoRA instead of the LLaMA's weights; None for all weights.
        liger: Liger's kernels: True, False, or "auto" where there is a GPU and the package.
        positions: "continuous" or "compact" (`VocoLlavaConfig`); the checkpoint's where None.
        trainer: anything of transformers' TrainingArguments (`arguments_of` says what differs from its defaults).
    """

    model: str
    out: Path
    data: DataConfig | None = None
    stage: Literal["align", "sft"] = "sft"
    system: str = "voco"
    num_voco_tokens: tuple[int, ...] = (2,)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig | None = None
    liger: bool | Literal["auto"] = "auto"
    positions: Literal["continuous", "compact"] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        system = system_of(self.system)
        if not system.trains:
            raise ValueError(
                f"system must be one that is trained, but was {self.system!r}: it uses the weights of {system.weights_of}"
            )
        counts = self.num_voco_tokens
        if not counts or any(count < 1 for count in counts):
            raise ValueError(f"num_voco_tokens must be numbers of at least 1, but was {list(counts)}")
        if len(set(counts)) > 1 and not system.voco_tokens:
            raise ValueError(f"num_voco_tokens must be one number for system {self.system!r}, but was {list(counts)}")
        if self.objective.kind != "sft" and (not system.masked or self.stage == "align"):
            raise ValueError(
                f"objective.kind must be 'sft' for system {self.system!r} in stage {self.stage!r}, which hides nothing from "
                f"the text, but was {self.objective.kind!r}"
            )
        if not 0 < self.objective.weight < 1 or self.objective.temperature <= 0:
            raise ValueError(
                "objective.weight must be between 0 and 1 and objective.temperature above 0, but were "
                f"{self.objective.weight} and {self.objective.temperature}"
            )
        if self.lora is not None and self.stage == "align":
            raise ValueError("lora must be absent in stage 'align', which trains the projector alone, but was given")
        _check_trainer(self.trainer)

    @classmethod
    def load(cls, path: str | Path) -> "TrainingConfig":
        """Read a YAML file. Paths in it are relative to its folder.

        Raises:
            ValueError: no YAML; an unknown key, a missing one, or a value of another type, each named.
            FileNotFoundError: there is no such file.
        """
        path = Path(path)
        try:
            content = yaml.load(path.read_text(), _Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{path} must be YAML, but cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold keys and values, but holds {type(content).__name__}")
        config = _build(cls, content, "")
        return config._relative_to(path.parent)

    def _relative_to(self, folder: Path) -> "TrainingConfig":
        """With paths that are relative, to a folder; a model that is no folder there stays a hub name."""
        data = self.data
        if data is not None:
            data = dataclasses.replace(
                data,
                conversations=tuple(_at(folder, file) for file in data.conversations),
                images=None if data.images is None else str(_at(folder, data.images)),
            )
        objective = dataclasses.replace(self.objective, teacher=_model_at(folder, self.objective.teacher))
        return dataclasses.replace(
            self, out=_at(folder, self.out), data=data, model=_model_at(folder, self.model), objective=objective
        )

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values; written as YAML they can be loaded again."""
        return _plain(dataclasses.asdict(self))


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, Path) else value


def _at(folder: Path, path: str | Path) -> Path:
    return (folder / Path(path).expanduser()).resolve()


def _model_at(folder: Path, name: str) -> str:
    local = _at(folder, name)
    return str(local) if local.is_dir() else name


def _check_trainer(settings: dict[str, Any]) -> None:
    hints = typing.get_type_hints(TrainingArguments)
    known = {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init}
    for name, value in settings.items():
        if name in RESERVED:
            raise ValueError(f"trainer.{name} must be absent ({RESERVED[name]}), but was {value!r}")
        if name not in known:
            hint = _hint(str(name), list(known))
            raise ValueError(f"trainer.{name} is no argument of transformers' TrainingArguments{hint}")
        # Its other types (names of schedulers, or text or a mapping) TrainingArguments checks itself.
        kinds = set(typing.get_args(known[name])) or {known[name]}
        if kinds - {type(None)} <= {bool, int, float}:
            _value(known[name], value, f"trainer.{name}")


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _build(cls, content: dict, prefix: str):
    """A dataclass from a mapping, each value checked against its annotation."""
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for name in content:
        if name not in fields:
            raise ValueError(f"{prefix}{name} is no setting{_hint(str(name), list(fields))}")
    for name, f in fields.items():
        if name not in content and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}{name} must be given, but is missing")
    return cls(**{name: _value(hints[name], value, f"{prefix}{name}") for name, value in content.items()})


def _value(kind, value, name: str):
    """`value` as `kind`, an annotation of the dataclasses above."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        errors = []
        for one in (x for x in arguments if x is not type(None)):
            try:
                return _value(one, value, name)
            except ValueError as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        wanted = " or ".join(_spell(x) for x in arguments if x is not type(None))
        raise ValueError(f"{name} must be {wanted}, but was {value!r}")
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _build(kind, value, f"{name}.")
    if origin is Literal and any(value is x or (isinstance(value, str) and value == x) for x in arguments):
        return value
    if origin is tuple:
        return tuple(_value(arguments[0], x, name) for x in (value if isinstance(value, list) else [value]))
    if origin is dict and isinstance(value, dict):
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (str, bool, int) and type(value) is kind:
        return value
    raise ValueError(f"{name} must be {_spell(kind)}, but was {value!r}")


def _spell(kind) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(x) for x in typing.get_args(kind))
    if dataclasses.is_dataclass(kind):
        return "a mapping of " + ", ".join(f.name for f in dataclasses.fields(kind))
    names = {Path: "a path", str: "text", bool: "true or false", int: "a whole number", float: "a number", dict: "a mapping"}
    return names.get(typing.get_origin(kind) or kind, str(kind))
