"""Files of results: JSON rows, and the machine and the commit that they come from."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import voco_kernels

from .clock import Ceilings
from .files import write_atomically
from .measure import Comparison

FORMAT_VERSION = 2
ROW_KEYS = {
    "suite", "task", "shape", "x", "dtype", "name", "role", "status", "p20_ms", "p50_ms", "p80_ms", "rounds", "ratio",
    "target", "flops", "bytes", "roof", "peak_bytes", "facts",
}  # fmt: skip
# Rows of one file come from one of these, so they must not differ when a run goes on.
IDENTITY = ("device", "threads", "python", "torch", "triton", "transformers", "voco_kernels", "commit")
MACHINE_KEYS = {*IDENTITY, "kind", "uncommitted_changes", "date"}
PACKAGES = ("triton", "transformers", "flash-attn", "flash-attn-4", "nvidia-cudnn-frontend", "liger-kernel")


def describe_machine(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What numbers depend on: device, threads, versions, commit and date.

    Args:
        commit: where this is no git checkout.
    """
    found, changed = _commit()
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "kind": device.type,
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        # At the beginning. Far above zero, the machine was shared and its times are doubtful.
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name.replace("-", "_"): version_of(name) for name in PACKAGES},
        "voco_kernels": voco_kernels.__version__,
        "commit": found or commit,
        "uncommitted_changes": changed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def file_name(machine: dict) -> str:
    """The name that a machine's file of results has unless someone chooses another."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    threads = "" if machine["kind"] == "cuda" else f"-{machine['threads']}-thread{'s' * (machine['threads'] > 1)}"
    return f"{'' if machine['kind'] == 'cuda' else 'cpu-'}{device}{threads}.json"


class Results:
    """A file that grows row by row, and that a later run of the same commit on the same machine goes on with.

    Attributes:
        content: what the file holds.
        path: where it is written; None where it is not.
    """

    def __init__(self, path: Path | None, machine: dict, *, resume: bool = False):
        """Raises ValueError where `resume` finds a file of something else than `machine`."""
        self.path = path
        self.content: dict = {"format_version": FORMAT_VERSION, **machine, "ceilings": {}, "rows": []}
        if resume and path is not None and path.is_file():
            old = load(path)
            for key in IDENTITY:
                if old[key] != machine[key]:
                    raise ValueError(
                        f"{path} must be of this run's {key} ({machine[key]}) to go on with it, but was of {old[key]}; "
                        "remove it, or write to another file"
                    )
            self.content = old | {"uncommitted_changes": old["uncommitted_changes"] or machine["uncommitted_changes"]}

    def has(self, suite: str, task: str, shape: str) -> bool:
        """Whether a comparison is there already."""
        return any((row["suite"], row["task"], row["shape"]) == (suite, task, shape) for row in self.content["rows"])

    def set_ceilings(self, dtype: str, ceilings: Ceilings) -> None:
        """Keep what the device does at best in a dtype."""
        self.content["ceilings"][dtype] = ceilings.as_dict()

    def ceilings(self, dtype: str | None) -> Ceilings | None:
        """What the device does at best in a dtype; None where nobody measured it."""
        kept = self.content["ceilings"].get(dtype)
        return None if kept is None else Ceilings(kept["matmul_tflops"] * 1e12, kept["copy_gb_per_s"] * 1e9)

    def add(self, *comparisons: Comparison) -> None:
        """Add all rows of comparisons, and write the file."""
        for comparison in comparisons:
            self.content["rows"] += comparison.as_rows(self.ceilings(comparison.dtype))
        self.write()

    def write(self) -> None:
        """Write the file whole or not at all."""
        if self.path is not None:
            text = json.dumps(self.content, indent=1, allow_nan=False) + "\n"
            write_atomically(self.path, text.encode())


def load(path: Path) -> dict:
    """The checked content of a file of results.

    Raises:
        ValueError: it is none, or of another format.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, but was {content['format_version']!r}")
        _require("the file", content, MACHINE_KEYS | {"ceilings", "rows"})
        for i, row in enumerate(content["rows"]):
            _require(f"row {i}", row, ROW_KEYS)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no file of results: {reason}") from error
    return content


def _require(what: str, found: dict, keys: Iterable[str]) -> None:
    if missing := sorted(set(keys) - set(found)):
        raise ValueError(f"{what} lacks {', '.join(missing)}")


def version_of(distribution: str) -> str | None:
    """The installed version of a package; None where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _commit() -> tuple[str | None, bool | None]:
    """(commit, whether files that it knows were changed) of the checkout that this runs from; None where it is none."""
    root = Path(voco_kernels.__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None, None  # installed somewhere inside another project's checkout
        return git("rev-parse", "--short=12", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None
