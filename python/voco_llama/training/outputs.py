"""The folder of a run: which settings it belongs to, and what it was run with."""

import json
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from voco_kernels import __version__
from voco_llama.bench.files import write_atomically

from . import checkpoints, curves
from .config import TrainingConfig
from .dataset import REPORT

SETTINGS = "config.yaml"
FACTS = "run.json"
MODEL = "model"
# Settings that may change while a run is stopped: where things are, and what changes speed or messages but not what is
# learnt. Samples per step, of which the batch sizes are parts, are compared as a number.
FREE = re.compile(
    r"out|liger|data\.(conversations|images)|trainer\.("
    r"logging_.*|log_.*|save_.*|report_to|run_name|disable_tqdm|dataloader_(num|pin|prefetch|persistent|multi).*|"
    r"per_device_train_batch_size|gradient_accumulation_steps|(gradient|activation)_checkpointing.*|"
    r"use_cpu|torch_empty_cache_steps|fsdp.*|deepspeed|ddp_.*|accelerator_config)"
)
FIXED_FACTS = {"samples_per_step": "samples per step", "records": "number of records"}


def check(out: Path, config: TrainingConfig) -> None:
    """ValueError where `out` belongs to a run with other settings, which it names, or to something else."""
    file = out / SETTINGS
    if not file.is_file():
        _check_own(out)
        return
    before, now = _flat(yaml.safe_load(file.read_text())), _flat(config.to_dict())
    differ = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    _refuse(out, {name: (before.get(name), now.get(name)) for name in differ if not FREE.fullmatch(name)})


def check_facts(out: Path, facts: dict[str, Any]) -> None:
    """ValueError where the run in `out` had other data, or took another number of samples per step."""
    file = out / FACTS
    if file.is_file():
        before = json.loads(file.read_text())
        pairs = {text: (before.get(name), facts[name]) for name, text in FIXED_FACTS.items()}
        _refuse(out, {text: (was, now) for text, (was, now) in pairs.items() if was != now})


def _check_own(out: Path) -> None:
    """ValueError where a folder without settings holds what a run would take for its own, and replace."""
    found = [path.name for path in (*checkpoints.all_in(out), out / MODEL) if path.exists()]
    if found:
        raise ValueError(f"out must be a folder of its own, but {out} holds {found[0]} and no {SETTINGS}")


def _refuse(out: Path, changed: dict[str, tuple]) -> None:
    if changed:
        listed = ", ".join(f"{name} (was {was!r}, is {now!r})" for name, (was, now) in changed.items())
        raise ValueError(
            f"out must belong to this configuration, but the run in {out} differs in {listed}; choose another folder, or "
            "delete that run with --fresh (in Python: resume=False)"
        )


def write(out: Path, config: TrainingConfig, facts: dict[str, Any]) -> None:
    """Say in `out` what is run: settings that can be loaded again, and facts about the run."""
    header = "# Settings of the run in this folder. Numbers and versions are in run.json.\n"
    text = header + yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    write_atomically(out / SETTINGS, text.encode())
    write_atomically(out / FACTS, json.dumps(facts, indent=1).encode())


def clear(out: Path) -> None:
    """Delete the run in `out`; other files stay. ValueError where checkpoints or a model there are of something else."""
    if not (out / SETTINGS).is_file():
        _check_own(out)
        # Of a run that never began there is the report at most; any other name is somebody else's.
        (out / REPORT).unlink(missing_ok=True)
        return
    for path in (*checkpoints.all_in(out), out / checkpoints.UNFINISHED, out / MODEL, out / "runs"):
        if path.exists():
            shutil.rmtree(path)
    for name in (curves.LOG, curves.CURVE, REPORT, FACTS, SETTINGS):
        (out / name).unlink(missing_ok=True)


def versions() -> dict[str, str | None]:
    """Versions of what a run depends on; None where a package is not there."""
    packages = ("torch", "transformers", "accelerate", "peft", "liger-kernel", "deepspeed")
    return {"python": platform.python_version(), "voco-kernels": __version__} | {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data.max_length": 2048, ...}; what is not set is left out."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            flat[prefix + name] = value
    return flat
