"""The tensors of a checkpoint folder: read where they lie, written one shard at a time."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SHARD = 2 * 1024**3  # bytes; also what is in memory at a time
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. `dtype` is the name in the file where it is none of DTYPES."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint folder, which stay on disk: safetensors, else pytorch_model.bin; sharded or not."""
    for name, read in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_bin)):
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(set(read_json(index)["weight_map"].values()))
        elif (folder / name).is_file():
            files = [name]
        else:
            continue
        tensors = {}
        for file in files:
            if not (folder / file).is_file():
                raise ValueError(f"source must be whole, but {folder} lacks {file}, which {index.name} names")
            tensors |= read(folder / file)
        return tensors
    if (folder / "mm_projector.bin").is_file():
        raise ValueError(
            f"source must hold a whole model, but {folder} holds a projector alone: load it into its LLaMA with the code it "
            "was trained with, and save that"
        )
    raise ValueError(f"source must have model.safetensors or pytorch_model.bin, or their shards, but {folder} has none")


def _open_safetensors(path: Path) -> dict[str, Stored]:
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    tensors = {}
    for name in file.keys():  # noqa: SIM118 - not a mapping
        part = file.get_slice(name)
        dtype = DTYPES.get(part.get_dtype(), part.get_dtype())
        tensors[name] = Stored(tuple(part.get_shape()), dtype, lambda name=name: file.get_tensor(name))
    return tensors


def _open_bin(path: Path) -> dict[str, Stored]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is not a file of tensors that torch.load can map: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise ValueError(f"{path} must hold a dictionary of tensors, but does not")
    known = set(DTYPES.values())
    return {
        name: Stored(tuple(x.shape), x.dtype if x.dtype in known else str(x.dtype), lambda x=x: x)
        for name, x in state.items()
    }


def write_tensors(folder: Path, stored: dict[str, Stored], progress: Callable[[int, int], None] | None = None) -> None:
    """Write model.safetensors, or its shards and their index, into a folder.

    Args:
        progress: called with the number of bytes written and of all, at first and after each file.

    Raises:
        OSError: a disk that is full or cannot be written to.
    """
    shapes = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in stored.items()}
    plan = split_torch_state_dict_into_shards(shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD)
    total, done = sum(x.nbytes for x in stored.values()), 0
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(errno.ENOSPC, f"the model needs {total:,} bytes, and {free:,} are free", str(folder.parent))
    report = progress or (lambda done, total: None)
    report(done, total)
    for file, names in plan.filename_to_tensors.items():
        try:
            # Copies, so that no two tensors share their memory, which safetensors refuses; gone before the next file's.
            save_file({name: stored[name].read().clone() for name in names}, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder.parent} cannot be written to: {error}") from error
        done += sum(stored[name].nbytes for name in names)
        report(done, total)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(value).__name__}")
    return value
