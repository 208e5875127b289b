"""Which kernels ran on which GPUs, as they are now: `gpu_verified.json`, README's status table, and what tests report.

    python -m bench.verified            # says how things stand
    python -m bench.verified --write    # and writes the table into README.md

`make gpu-check` adds the records. A record counts for a kernel only while every source of it is the file that ran, by its
SHA-256, and all of them ran together. Nothing here needs torch.
"""

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "gpu_verified.json"
README = ROOT / "README.md"
FORMAT_VERSION = 1

_TRITON = "voco_kernels/backends/triton"
_SHARED = (
    "voco_kernels/tiles.py", "voco_kernels/tiled.py", f"{_TRITON}/plan.py", f"{_TRITON}/launch.py", f"{_TRITON}/steps.py",
)  # fmt: skip

# The sources of everything that is verified, by what a report calls it.
GROUPS: dict[str, tuple[str, ...]] = {
    "triton plan": ("voco_kernels/tiles.py", f"{_TRITON}/plan.py"),
    "triton forward": (*_SHARED, f"{_TRITON}/forward.py"),
    "triton backward": (*_SHARED, f"{_TRITON}/backward.py"),
    "torch": ("voco_kernels/plan.py", "voco_kernels/backends/reference.py", "voco_kernels/backends/torch.py"),
    "flash": ("voco_kernels/plan.py", "voco_kernels/backends/flash.py"),
    "torch K/V path": ("voco_kernels/kv_path.py", "voco_kernels/backends/torch_kv.py"),
    "triton K/V path": ("voco_kernels/kv_path.py", "voco_kernels/layers.py", f"{_TRITON}/kv.py"),
    "cuda K/V path": (
        "voco_kernels/kv_path.py", "voco_kernels/layers.py", "voco_kernels/backends/cuda/kv.py",
        "csrc/kv_cache.cu", "csrc/bindings.cpp",
        "csrc/include/voco/kv_cache.h", "csrc/include/voco/kv_cache.cuh", "csrc/include/voco/rotary.cuh",
        "csrc/include/voco/dtype.h", "csrc/include/voco/ops.cuh",
    ),
    "cuda": (
        "voco_kernels/tiles.py", "voco_kernels/tiled.py", "voco_kernels/backends/cuda/attention.py", "csrc/bindings.cpp",
        "csrc/attention.cu", "csrc/attention_forward.cu", "csrc/attention_query_gradient.cu",
        "csrc/attention_key_gradient.cu",
        "csrc/include/voco/attention.h", "csrc/include/voco/attention_forward.cuh",
        "csrc/include/voco/attention_backward.cuh", "csrc/include/voco/attention_launch.cuh",
        "csrc/include/voco/attention_steps.cuh", "csrc/include/voco/online_softmax.cuh", "csrc/include/voco/mma_tile.cuh",
        "csrc/include/voco/dtype.h", "csrc/include/voco/ops.cuh", "voco_kernels/backends/cuda/pairs.py",
    ),
    "cuda on Hopper": (
        "voco_kernels/tiles.py", "voco_kernels/tiled.py", "voco_kernels/backends/cuda/attention.py", "csrc/bindings.cpp",
        "csrc/attention_hopper_forward.cu", "csrc/attention_hopper_query_gradient.cu",
        "csrc/attention_hopper_key_gradient.cu", "csrc/tensor_map.cu", "csrc/include/voco/attention.h",
        "csrc/include/voco/attention_hopper.cuh", "csrc/include/voco/attention_hopper_forward.cuh",
        "csrc/include/voco/attention_hopper_backward.cuh", "csrc/include/voco/attention_launch.cuh",
        "csrc/include/voco/attention_steps.cuh", "csrc/include/voco/mma_tile.cuh", "csrc/include/voco/hopper.cuh",
        "csrc/include/voco/tensor_map.h", "csrc/include/voco/dtype.h", "csrc/include/voco/ops.cuh",
    ),
    "torch decoding": ("voco_kernels/decode.py", "voco_kernels/backends/torch_decode.py"),
    "cuda decoding": (
        "voco_kernels/decode.py", "voco_kernels/backends/cuda/decode.py", "csrc/bindings.cpp",
        "csrc/decode.cu", "csrc/decode_int8.cu", "csrc/decode_float8.cu", "csrc/include/voco/decode.h",
        "csrc/include/voco/decode.cuh", "csrc/include/voco/decode_keys.cuh", "csrc/include/voco/byte_tile.cuh",
        "csrc/include/voco/online_softmax.cuh", "csrc/include/voco/attention_steps.cuh", "csrc/include/voco/mma_tile.cuh",
        "csrc/include/voco/attention.h", "csrc/include/voco/attention_launch.cuh", "csrc/include/voco/dtype.h",
        "csrc/include/voco/ops.cuh",
    ),
    "compiled module": (
        "voco_kernels/backends/cuda/__init__.py", "csrc/bindings.cpp", "csrc/device.cu", "csrc/include/voco/device.h",
    ),
}  # fmt: skip
TRITON_GROUPS = ("triton plan", "triton forward", "triton backward")

# Every record has these.
RECORD_KEYS = {
    "device", "capability", "torch", "triton", "python", "commit", "uncommitted_changes", "date", "errors", "tests",
}  # fmt: skip

NOT_YET = "not yet run on a GPU"


@dataclass(frozen=True)
class TableRow:
    """A row of README's table: `groups` must all be verified; no groups, no GPU columns."""

    name: str
    cpu: str
    groups: tuple[str, ...] = ()


TABLE = (
    TableRow("`reference`, `torch`", "tested", ("torch",)),
    TableRow("`flash`", "needs a GPU; refusals tested", ("flash",)),
    TableRow("`triton` attention", "tested in Triton's interpreter", TRITON_GROUPS),
    TableRow("`triton` K/V path", "tested in Triton's interpreter", ("triton K/V path",)),
    TableRow("`cuda` attention", "tested in an emulation of the GPU", ("cuda",)),
    TableRow("`cuda` attention, Hopper's kernels", "tested in an emulation of the GPU", ("cuda on Hopper",)),
    TableRow("`cuda` decoding", "tested in an emulation of the GPU", ("cuda decoding",)),
    TableRow("`torch` decoding", "tested", ("torch decoding",)),
    TableRow("`cuda` K/V path", "tested in an emulation of the GPU", ("cuda K/V path",)),
    TableRow("`torch` K/V path", "tested", ("torch K/V path",)),
    TableRow("compiled module (device query)", "loads, tested", ("compiled module",)),
)
COLUMNS = {"sm_80": "A100 (sm_80)", "sm_90": "H100, H200 (sm_90)"}
BEGIN = "<!-- begin of what `python -m bench.verified --write` writes -->"
END = "<!-- end of what it writes -->"


# ---- the file ----------------------------------------------------------------------------------------------------------


def family_of(capability: tuple[int, int]) -> str:
    """The device family, such as "sm_90": GPUs for which the same machine code is made."""
    return f"sm_{capability[0]}{capability[1]}"


def hashes_of(sources: Iterable[str], root: Path = ROOT) -> dict[str, str | None]:
    """The SHA-256 of each source; None for one that is not there."""
    paths = {source: root / source for source in sources}
    return {s: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else None for s, p in paths.items()}


def load(path: Path = FILE) -> dict:
    """The checked content of the file: {"format_version": 1, "sources": {source: {sha256: {family: [record]}}}}.

    Nobody verified anything where there is no file.

    Raises:
        ValueError: the file is not one of these.
    """
    if not path.is_file():
        return {"format_version": FORMAT_VERSION, "sources": {}}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format_version"]
        if found != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, but was {found!r}")
        for _, sha, _, record in _records(content):
            if len(sha) != 64 or RECORD_KEYS - set(record):
                raise ValueError(f"a record under {sha!r} lacks {sorted(RECORD_KEYS - set(record))}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of GPU verifications: {error}") from error
    return content


def _records(content: dict) -> Iterator[tuple[str, str, str, dict]]:
    """(source, sha256, family, record) for every record of the file."""
    for source, versions in content["sources"].items():
        for sha, families in versions.items():
            for family, records in families.items():
                for record in records:
                    yield source, sha, family, record


def add(content: dict, family: str, record: dict, hashes: dict[str, str | None]) -> dict:
    """The content with a run on `family` added, which verified `hashes`.

    Of the same family, older versions of these sources are dropped, and then every older run that says nothing beyond what
    the new one says. Records of other families stay as they are.

    Raises:
        ValueError: a source is missing, or the record lacks something.
    """
    if missing := sorted(source for source, sha in hashes.items() if sha is None):
        raise ValueError(f"these sources must be there: {', '.join(missing)}")
    if lacking := sorted(RECORD_KEYS - set(record)):
        raise ValueError(f"the record must have {', '.join(lacking)}")
    kept = [
        (source, sha, other, old)
        for source, sha, other, old in _records(content)
        if other != family or hashes.get(source, sha) == sha
    ]
    elsewhere = [old for source, _, other, old in kept if other == family and source not in hashes]
    kept = [entry for entry in kept if entry[2] != family or entry[3] in elsewhere]
    kept += [(source, sha, family, record) for source, sha in hashes.items()]
    sources: dict = {}
    for source, sha, other, old in sorted(kept, key=lambda entry: entry[:3]):
        sources.setdefault(source, {}).setdefault(sha, {}).setdefault(other, []).append(old)
    return {"format_version": FORMAT_VERSION, "sources": sources}


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: Path, content: dict) -> None:
    """Write `content` as JSON, whole or not at all."""
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


# ---- how things stand --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """How a set of sources stands on one family: never run (no record), verified, or changed since a run.

    Attributes:
        record: the newest run of all of them as they are now, else the newest of any of them, else None.
        changed: the sources that are not as they were in that run.
    """

    record: dict | None
    changed: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether all sources are as they were in the run."""
        return self.record is not None and not self.changed


def standing(content: dict, family: str, sources: Iterable[str], root: Path = ROOT) -> Standing:
    """How `sources` stand on `family`."""
    hashes = hashes_of(sources, root)
    runs: list[tuple[dict, set[str]]] = []  # each run, and which of the sources are as they were in it
    for source, sha, other, record in _records(content):
        if other != family or source not in hashes:
            continue
        same = next((same for run, same in runs if run == record), None)
        if same is None:
            same = set()
            runs.append((record, same))
        if sha == hashes[source]:
            same.add(source)
    if not runs:
        return Standing(None)
    record, same = max(runs, key=lambda run: (len(run[1]) == len(hashes), run[0]["date"]))
    return Standing(record, tuple(source for source in hashes if source not in same))


def families_of(content: dict) -> list[str]:
    """The families of the table, then any other that has records."""
    return [*COLUMNS, *sorted({family for _, _, family, _ in _records(content)} - set(COLUMNS))]


def status_table(content: dict, root: Path = ROOT) -> str:
    """README's status table, in Markdown."""
    families = families_of(content)
    header = ["backend", "CPU", *(COLUMNS.get(family, family) for family in families), "last verified commit"]
    rows = [header, ["---"] * len(header), *(_table_row(content, row, families, root) for row in TABLE)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _table_row(content: dict, row: TableRow, families: list[str], root: Path) -> list[str]:
    if not row.groups:
        return [row.name, row.cpu, *([""] * (len(families) + 1))]
    sources = dict.fromkeys(source for group in row.groups for source in GROUPS[group])
    standings = {family: standing(content, family, sources, root) for family in families}
    commits = [f"`{_commit(s.record)}` ({family})" for family, s in standings.items() if s.record is not None]
    return [row.name, row.cpu, *map(_cell, standings.values()), ", ".join(commits) or "none"]


def _cell(standing: Standing) -> str:
    if standing.record is None:
        return NOT_YET
    return f"{'verified' if standing.verified else 'changed since it ran'} on {standing.record['device']}"


def _commit(record: dict) -> str:
    return (record["commit"] or "unknown") + ("+" if record["uncommitted_changes"] else "")


def report_lines(content: dict | None = None, root: Path = ROOT) -> list[str]:
    """How every group stands on each family that it ran on; what a test run shows."""
    content = load() if content is None else content
    families = [family for family in families_of(content) if any(f == family for _, _, f, _ in _records(content))]
    if not families:
        return [f"GPU kernels: {NOT_YET}; `make gpu-check` on a machine with one records it"]
    return [f"{group}: {_line(content, sources, families, root)}" for group, sources in GROUPS.items()]


def _line(content: dict, sources: tuple[str, ...], families: list[str], root: Path) -> str:
    parts = []
    for family in families:
        found = standing(content, family, sources, root)
        if found.record is None:
            parts.append(f"not yet run on {family}")
        elif found.verified:
            parts.append(f"verified on {family} at {_commit(found.record)}")
        else:
            names = ", ".join(Path(source).name for source in found.changed)
            parts.append(f"CHANGED since it was verified on {family} at {_commit(found.record)}: {names}")
    return "; ".join(parts)


# ---- README ------------------------------------------------------------------------------------------------------------


def with_table(readme: str, table: str) -> str:
    """The text of README with `table` between its markers; ValueError where they are not there once, in order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"README must hold {BEGIN!r} and, behind it, {END!r} once")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.verified", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the status table into README.md")
    write = parser.parse_args(arguments).write
    content = load()
    print("\n".join(report_lines(content)))
    if write:
        write_atomically(README, with_table(README.read_text(encoding="utf-8"), status_table(content)))


if __name__ == "__main__":
    main()
