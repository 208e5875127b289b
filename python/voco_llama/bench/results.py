"""Files of results: JSON rows, and the machine and the commit that they come from."""

import hashlib
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
from .measure import LIMIT, OURS, PART, PEER, Comparison

FORMAT_VERSION = 2
ROLES = (OURS, PEER, LIMIT, PART)
ROW_KEYS = {
    "suite", "task", "shape", "x", "dtype", "name", "role", "status", "p20_ms", "p50_ms", "p80_ms", "rounds", "ratio",
    "target", "flops", "bytes", "roof", "peak_bytes", "facts",
}  # fmt: skip
PACKAGES = ("triton", "transformers", "flash-attn", "flash-attn-4", "nvidia-cudnn-frontend", "liger-kernel")
# What every file says of where its rows come from, beside what is None where it does not apply.
MACHINE_KEYS = {
    "device", "kind", "threads", "python", "torch", "triton", "transformers", "voco_kernels", "commit",
    "uncommitted_changes", "date",
}  # fmt: skip
# All rows of a file come from one of these, so none may differ when a run goes on.
IDENTITY = (
    *sorted(MACHINE_KEYS - {"date", "uncommitted_changes"}), "changes", "capability", "driver", "cuda",
    *(name.replace("-", "_") for name in PACKAGES),
)  # fmt: skip


def describe_machine(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What numbers depend on: device, threads, versions, commit and date.

    Args:
        commit: where this is no git checkout.
    """
    found, changes = _commit()
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
        "uncommitted_changes": None if found is None else changes is not None,
        "changes": changes,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def file_name(machine: dict) -> str:
    """The name that a machine's file of results has unless someone chooses another."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    threads = "" if machine["kind"] == "cuda" else f"-{machine['threads']}-thread{'s' * (machine['threads'] > 1)}"
    return f"{'' if machine['kind'] == 'cuda' else 'cpu-'}{device}{threads}.json"


def differences(content: dict, machine: dict) -> list[str]:
    """Where the content of a file and a machine differ, in words; empty where one may go on with the other."""
    pairs = [(key, content.get(key), machine.get(key)) for key in IDENTITY]
    return [f"{key} ({new}) but was of {old}" for key, old, new in pairs if old != new]


class Results:
    """A file that grows row by row, and that a later run of the same commit on the same machine goes on with.

    Attributes:
        content: what the file holds.
        path: where it is written; None where it is not.
    """

    def __init__(self, path: Path | None, machine: dict, *, resume: bool = False):
        """Raises ValueError where `resume` finds a file of something else than `machine`."""
        self.path = path
        self.content: dict = {"format_version": FORMAT_VERSION, **machine, "ceilings": {}, "unfinished": {}, "rows": []}
        if resume and path is not None and path.is_file():
            self.content = {"unfinished": {}} | load(path)
            if changed := differences(self.content, machine):
                raise ValueError(
                    f"{path} must be of this run's {changed[0]}; remove it, or write to another file, to measure anew"
                )

    def has(self, suite: str, task: str, shape: str) -> bool:
        """Whether a comparison is there already, and ours did not fail in it: what failed is measured again."""
        rows = [row for row in self.content["rows"] if _key(row) == (suite, task, shape)]
        return any(row["role"] == OURS for row in rows) and not failures(rows)

    def set_ceilings(self, dtype: str, ceilings: Ceilings) -> None:
        """Keep what the device does at best in a dtype."""
        self.content["ceilings"][dtype] = ceilings.as_dict()

    def ceilings(self, dtype: str | None) -> Ceilings | None:
        """What the device does at best in a dtype; None where nobody measured it."""
        kept = self.content["ceilings"].get(dtype)
        return None if kept is None else Ceilings(kept["matmul_tflops"] * 1e12, kept["copy_gb_per_s"] * 1e9)

    def add(self, *comparisons: Comparison) -> None:
        """Add all rows of comparisons in place of older ones of the same name, and write the file."""
        for comparison in comparisons:
            new = comparison.as_rows(self.ceilings(comparison.dtype))
            kept = [row for row in self.content["rows"] if _key(row) != _key(new[0])]
            self.content["rows"] = kept + new
        self.write()

    def drop(self, suites: Iterable[str]) -> None:
        """Remove all rows of suites, which are to be measured again."""
        self.content["rows"] = [row for row in self.content["rows"] if row["suite"] not in set(suites)]

    def set_unfinished(self, suite: str, cases: int) -> None:
        """Keep how many cases of a suite were not reached; 0 where all were."""
        self.content["unfinished"].pop(suite, None)
        if cases:
            self.content["unfinished"][suite] = cases
        self.write()

    def write(self) -> None:
        """Write the file whole or not at all."""
        if self.path is not None:
            text = json.dumps(self.content, indent=1, allow_nan=False) + "\n"
            write_atomically(self.path, text.encode())


def failures(rows: Iterable[dict]) -> list[str]:
    """What of ours failed in the rows of a comparison, in words. A peer may fail; the library's own results must not."""
    ours = (row for row in rows if row["role"] == OURS)
    return [f"{row['name']}: {row['status']}" for row in ours if not row["status"].startswith(("ok", "not run"))]


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
        for key in ("device", "date"):
            _require_that(isinstance(content[key], str), f"{key} must be text")
        for dtype, ceilings in content["ceilings"].items():
            _require(f"ceilings of {dtype}", ceilings, ("matmul_tflops", "copy_gb_per_s"))
        for i, row in enumerate(content["rows"]):
            _require(f"row {i}", row, ROW_KEYS)
            _check_row(f"row {i}", row)
        names = [(*_key(row), row["name"]) for row in content["rows"]]
        _require_that(len(set(names)) == len(names), "rows must be there once")
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no file of results: {reason}") from error
    return content


def _check_row(what: str, row: dict) -> None:
    times = [row[f"p{p}_ms"] for p in (20, 50, 80)]
    texts = (*_key(row), row["name"], row["status"])
    _require_that(all(isinstance(text, str) for text in texts), f"{what}: names and status must be text")
    _require_that(row["role"] in ROLES, f"{what}: role must be one of {', '.join(ROLES)}")
    _require_that(isinstance(row["facts"], dict), f"{what}: facts must be a dict")
    if row["status"] == "ok":
        numbers = all(isinstance(x, int | float) for x in times)
        _require_that(numbers and 0 <= times[0] <= times[1] <= times[2], f"{what}: times must be numbers that rise")
    else:
        _require_that(times == [None] * 3, f"{what}: times must be null where the status is not ok")


def _require(what: str, found: dict, keys: Iterable[str]) -> None:
    if missing := sorted(set(keys) - set(found)):
        raise ValueError(f"{what} lacks {', '.join(missing)}")


def _require_that(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _key(row: dict) -> tuple[str, str, str]:
    return row["suite"], row["task"], row["shape"]


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


def _commit() -> tuple[str | None, str | None]:
    """(commit, digest of what was changed since in files that it knows) of the checkout that this runs from.

    None where it is no checkout, or where nothing was changed. Results and documents do not count, since runs write them.
    """
    root = Path(voco_kernels.__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None, None  # installed somewhere inside another project's checkout
        changes = git("diff", "HEAD", "--", ".", ":(exclude)bench/results", ":(exclude)*.md", ":(exclude)*.png")
        digest = hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else None
        return git("rev-parse", "--short=12", "HEAD"), digest
    except (OSError, subprocess.CalledProcessError):
        return None, None
