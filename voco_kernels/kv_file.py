"""Files of `VocoKV`: safetensors with a format version, its own metadata, and a checksum over all of it.

safetensors checks that a file is whole, not that its bytes are the ones that were written; the checksum does.
"""

import errno
import hashlib
import json
import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from .kv_cache import VocoKV

FORMAT = "voco-kv"
FORMAT_VERSION = 1
TENSORS = ("k", "v", "k_scale", "v_scale")
# Bytes of the JSON before the tensors: some for each segment, and there may be as many as a long video has frames.
MAX_HEADER = 1 << 24
PARTIAL = ".partial"
# Errors of a process that asks for too much; they say nothing about the file that it wanted.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def save(kv: VocoKV, path: str | Path) -> None:
    """Write `kv` to `path`: a new file appears whole or not at all, and an old one is replaced only by a whole one."""
    write_atomically(Path(path), to_bytes(kv))


def to_bytes(kv: VocoKV) -> bytes:
    """The file of `kv`."""
    tensors = {name: getattr(kv, name) for name in TENSORS if getattr(kv, name) is not None}
    tensors = _without_sharing({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "segments": json.dumps(kv.segments),
        "meta": json.dumps(kv.meta, sort_keys=True),
    }
    header["sha256"] = _checksum(tensors, header)
    return serialise(tensors, metadata=header)


def load(path: str | Path) -> VocoKV:
    """Read a file that `save` wrote, onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be opened, or the process is out of files or memory.
        ValueError: the file is truncated, has flipped bytes, was not written by `save`, or by a later version of it.
    """
    path = Path(path)
    tensors, header = _read(path)
    stated = header.pop("sha256", None)
    if stated != _checksum(tensors, header):
        raise ValueError(f"{path} is damaged: its checksum does not match its contents")
    return _built(path, tensors, header)


def glance(path: str | Path) -> VocoKV:
    """The same without the checksum: tensors are mapped and not read, which costs little however large they are.

    It is for what the header says (shapes, dtype, segments, meta); the numbers may be damaged.
    """
    path = Path(path)
    return _built(path, *_read(path))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, mapped, and the metadata of a file of our format."""
    if not path.is_file():
        raise FileNotFoundError(f"no K/V cache file at {path}")
    _check_header_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Before anything is read: a file of others may hold anything.
            _check_names(path, file.keys())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:  # removed meanwhile
        raise
    except (SafetensorError, OSError, UnicodeDecodeError, RuntimeError) as error:
        # torch and safetensors have words, not numbers, for what the system said.
        for number in EXHAUSTED:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise ValueError(f"{path} is not a whole K/V cache file: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a K/V cache file: its format is {header.get('format')!r}, not {FORMAT!r}")
    if header.get("format_version") != str(FORMAT_VERSION):
        version = header.get("format_version")
        raise ValueError(f"{path} has format version {version}, and this library reads version {FORMAT_VERSION}")
    return tensors, header


def _built(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> VocoKV:
    try:
        segments = json.loads(header["segments"])
        segments = None if segments is None else [tuple(segment) for segment in segments]
        return VocoKV(**tensors, segments=segments, meta=json.loads(header["meta"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not hold a valid VocoKV: {error}") from error


def _check_header_size(path: Path) -> None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise ValueError(f"{path} is not a whole K/V cache file: its header would have {size} bytes")


def _check_names(path: Path, names: list[str]) -> None:
    if not {"k", "v"} <= set(names) <= set(TENSORS):
        some = ", ".join(map(repr, sorted(names)[:8]))
        raise ValueError(f"{path} holds tensors {some} ({len(names)}), and a K/V cache file holds {TENSORS[:2]} and scales")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file in the same folder, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        # Not by tempfile: its files are for their owner alone, and to ask for the umask is to change it for all threads.
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _without_sharing(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, each in memory of its own, which safetensors asks for."""
    used, own = set(), {}
    for name, x in tensors.items():
        address = x.untyped_storage().data_ptr()
        own[name] = x.clone() if address in used else x
        used.add(address)
    return own


def _checksum(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
