"""A store of compressed images: files named by what made them, shared by processes, read through a memory of recent ones.

    store/store.json                   format version
    store/ab/abcd...ef.safetensors     an entry (`kv_file`), whose metadata repeats its key
    store/damaged/                     entries that could not be read, moved aside
    store/locks/                       a file per entry being written; the kernel lets go of a lock when its process dies

Entries never change: they appear as a whole and disappear as a whole, so readers need no lock.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import kv_file
from .errors import reject
from .kv_cache import QUANTISED_DTYPES, VocoKV

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
KEY = re.compile(r"[0-9a-f]{64}")
# Seconds after which the temporary file of a writer belongs to one that died.
STALE = 3600
# Entries made under locks at once; each holds a file open, and a process may have 1024 open or fewer.
LOCKS = 256
# Other processes write too; the folder is counted again after so many parts of `max_bytes` have been written.
PARTS = 64


@dataclass(frozen=True)
class Entry:
    """A file of the store: its key, its path, its size in bytes, and when it was last used (seconds since the epoch)."""

    key: str
    path: Path
    nbytes: int
    used: float

    def glance(self) -> VocoKV:
        """Its K/V, mapped but neither read nor checked: for shapes, dtype and meta, however large it is."""
        return kv_file.glance(self.path)


class VocoStore:
    """Compressed images on disk and in memory, by a key that says all that they depend on.

    Several processes and threads may use one store at once. What is returned is shared with later callers: do not write
    into it.

    Args:
        path: the folder; made if need be.
        max_bytes: size of all files above which the least recently used are removed; None for no limit. Several processes
            that write at once may exceed it by about a 64th each.
        memory_bytes: size of what is kept in memory of recently used entries.
        dtype: int8 or float8_e4m3fn to keep K/V quantised, which is then part of their key; None to keep them as they are.

    Raises:
        ValueError: a folder that is something else, or of another format version.
        OSError: a system without POSIX file locks.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_bytes: int | None = None,
        memory_bytes: int = 1 << 28,
        dtype: torch.dtype | None = None,
    ):
        if fcntl is None:
            raise OSError("VocoStore needs POSIX file locks, which this system does not have")
        if max_bytes is not None and max_bytes <= 0:
            reject("max_bytes", "above 0 or None", max_bytes)
        if memory_bytes < 0:
            reject("memory_bytes", "0 or more", memory_bytes)
        if dtype is not None and dtype not in QUANTISED_DTYPES:
            reject("dtype", "int8, float8_e4m3fn or None", dtype)
        self.path, self.max_bytes, self.memory_bytes, self.dtype = Path(path), max_bytes, memory_bytes, dtype
        self._memory: OrderedDict[str, VocoKV] = OrderedDict()
        self._memory_used = 0
        self._guard = threading.Lock()
        self._counts = {"hits": 0, "misses": 0, "made": 0, "damaged": 0, "evicted": 0}
        # Bytes written since the folder was last counted; None before the first count.
        self._written: int | None = None
        self._total = 0
        self._open()

    # ---- entries -----------------------------------------------------------------------------------------------------

    def get(self, key: str) -> VocoKV | None:
        """The entry, on the CPU, or None. An entry that cannot be read is reported as a warning, moved aside and missing."""
        kv = self._find(key)
        self._counts["misses" if kv is None else "hits"] += 1
        return kv

    def _find(self, key: str) -> VocoKV | None:
        path = self._path(key)
        with self._guard:
            kv = self._memory.get(key)
            if kv is not None:
                self._memory.move_to_end(key)
        if kv is None and os.path.lexists(path):
            kv = self._read(key, path)
        if kv is not None and not _is_linked(path):
            with contextlib.suppress(OSError):  # a folder that is only read
                os.utime(path)
        return kv

    def put(self, key: str, kv: VocoKV) -> None:
        """Write an entry; it replaces one of the same key as a whole.

        Raises:
            ValueError: a key that is not 64 hexadecimal digits, or an entry larger than `max_bytes`.
            OSError: the folder cannot be written, or the disk is full; an old entry is still there then.
        """
        self._path(key)
        with self._locked([key]):
            self._write(key, self._form(key, kv))

    def get_or_make(self, keys: Sequence[str], make: Callable[[list[int]], Sequence[VocoKV]]) -> list[VocoKV]:
        """The entries of `keys`, in order; those that are missing are made once, also when processes ask together.

        Args:
            make: takes indices into `keys`, one of each missing key, and returns their K/V.

        It is called once, or for more than 256 missing keys once for each 256. What cannot be written is returned all the
        same, with one warning for each call of `make`.
        """
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        found = {key: self.get(key) for key in dict.fromkeys(keys)}
        missing = [key for key, kv in found.items() if kv is None]
        for begin in range(0, len(missing), LOCKS):
            found |= self._make(missing[begin : begin + LOCKS], lambda left: make([first[key] for key in left]))
        return [found[key] for key in keys]

    def _make(self, missing: list[str], make: Callable[[list[str]], Sequence[VocoKV]]) -> dict[str, VocoKV]:
        failed = []
        with ExitStack() as stack:
            try:
                stack.enter_context(self._locked(missing))
            except OSError as error:  # a folder that is only read: nobody else will write what they could wait for
                failed.append(error)
            # Another process may have made them while this one waited.
            found = {key: self._find(key) for key in missing}
            left = [key for key, kv in found.items() if kv is None]
            made = make(left) if left else []
            if len(made) != len(left):
                reject("make", f"a function that returns {len(left)} VocoKV", f"one that returned {len(made)}")
            for key, kv in zip(left, made):
                found[key] = self._form(key, kv)
                self._counts["made"] += 1
                try:
                    self._write(key, found[key])
                except (OSError, ValueError) as error:
                    failed.append(error)
        if left and failed:
            _warn(f"K/V of {len(left)} keys could not be kept in {self.path}, or not under locks: {failed[0]}")
        return found

    def get_or_compress(self, images: Sequence, model, num_voco_tokens: int | None = None) -> list[VocoKV]:
        """The K/V of images, in order; those that are not in the store are compressed, in one call.

        Args:
            images: as `model.compress` takes them.
            model: offers `store_keys(images, num_voco_tokens)`, a key for each image, and `compress` of the same arguments.
        """
        images = list(images)
        keys = [self.key_of(key) for key in model.store_keys(images, num_voco_tokens)]
        return self.get_or_make(keys, lambda missing: model.compress([images[i] for i in missing], num_voco_tokens))

    def key_of(self, key: str) -> str:
        """The key under which this store keeps what a model calls `key`: quantised K/V are other K/V."""
        if self.dtype is None:
            return key
        return hashlib.sha256(f"{key} {self.dtype}".encode()).hexdigest()

    def remove(self, key: str) -> bool:
        """Remove an entry; whether there was one. OSError where that is not possible."""
        path = self._path(key)
        self._forget(key)
        _refuse_link(path.parent)
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        return True

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read every entry and its checksum; returns the keys of those that are damaged, which it moves aside.

        Args:
            progress: called with (entries done, entries in all).
        """
        entries, damaged = self.entries(), []
        for done, entry in enumerate(entries, start=1):
            self._forget(entry.key)
            try:
                self._load(entry.key, entry.path)
            except FileNotFoundError:  # removed meanwhile
                pass
            except (ValueError, OSError) as error:
                self._move_aside(entry.key, entry.path, error)
                damaged.append(entry.key)
            if progress is not None:
                progress(done, len(entries))
        return damaged

    def entries(self) -> list[Entry]:
        """All entries, the least recently used first."""
        found = []
        for folder in self._folders():
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as files:
                for file in files:
                    key = file.name.removesuffix(SUFFIX)
                    if not (file.name.endswith(SUFFIX) and KEY.fullmatch(key) and key.startswith(folder.name)):
                        continue
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        state = file.stat(follow_symlinks=False)
                        found.append(Entry(key, Path(file.path), state.st_size, state.st_mtime))
        return sorted(found, key=lambda entry: (entry.used, entry.key))

    def keys(self) -> list[str]:
        """The keys of all entries, sorted."""
        return sorted(entry.key for entry in self.entries())

    def stats(self) -> dict[str, int | None]:
        """Entries and bytes on disk and in memory, and what this object did: hits, misses, made, damaged, evicted."""
        entries = self.entries()
        with self._guard:
            memory = {"memory_entries": len(self._memory), "memory_bytes": self._memory_used}
        size = {"entries": len(entries), "bytes": sum(entry.nbytes for entry in entries), "max_bytes": self.max_bytes}
        return size | memory | self._counts

    def __contains__(self, key: str) -> bool:
        path = self._path(key)
        return path.is_file() and not _is_linked(path)

    def __len__(self) -> int:
        return len(self.entries())

    # ---- files -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        marker = self.path / "store.json"
        if marker.is_file():
            try:
                version = json.loads(marker.read_text())["format_version"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{marker} is not the description of a store: {error!r}") from error
            if version != FORMAT_VERSION:
                raise ValueError(f"{self.path} has format version {version}, and this library reads {FORMAT_VERSION}")
            self._remove_stale()
            return
        if self.path.exists() and not self.path.is_dir():
            reject("path", "a folder", f"{self.path}, which is a file")
        # Another process may be opening the same new store.
        others = [p for p in self.path.glob("*") if not p.name.startswith(f".{marker.name}.")]
        if others and not marker.is_file():
            reject("path", "a store, an empty folder or a new one", f"{self.path}, which holds something else")
        kv_file.write_atomically(marker, json.dumps({"format_version": FORMAT_VERSION}).encode())

    def _path(self, key: str) -> Path:
        if not isinstance(key, str) or not KEY.fullmatch(key):
            reject("key", "64 hexadecimal digits", repr(key))
        return self.path / key[:2] / f"{key}{SUFFIX}"

    def _folder(self, name: str) -> Path:
        """A folder of the store to write to; never one elsewhere that a link stands for."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_link(folder)
        return folder

    def _folders(self) -> list[Path]:
        names = (f"{i:02x}" for i in range(256))
        return [f for f in (self.path / name for name in names) if f.is_dir() and not f.is_symlink()]

    def _form(self, key: str, kv: VocoKV) -> VocoKV:
        """`kv` as it is kept: on the CPU, quantised if wanted, under its key."""
        kv = kv.to("cpu")
        if self.dtype is not None and kv.k.dtype != self.dtype:
            kv = kv.quantised(self.dtype)
        tensors = {name: _own(getattr(kv, name)) for name in kv_file.TENSORS}
        return replace(kv, **tensors, meta={**kv.meta, "key": key})

    def _read(self, key: str, path: Path) -> VocoKV | None:
        try:
            kv = self._load(key, path)
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            self._move_aside(key, path, error)
            return None
        self._remember(key, kv)
        return kv

    def _load(self, key: str, path: Path) -> VocoKV:
        """Read an entry from disk; FileNotFoundError if there is none, another OSError or a ValueError if it is damaged."""
        for folder_or_file in (path.parent, path):
            _refuse_link(folder_or_file)
        before = _identity(path)
        try:
            kv = kv_file.load(path)
        except (ValueError, OSError):
            # Half of an old file and half of a new one are not damage.
            if _identity(path) != before:
                return self._load(key, path)
            raise
        if kv.meta.get("key") != key:
            raise ValueError(f"{path} holds the entry of another key: {kv.meta.get('key')!r}")
        return kv

    def _move_aside(self, key: str, path: Path, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in kv_file.EXHAUSTED:
            raise error
        self._counts["damaged"] += 1
        self._forget(key)
        try:
            target = self._folder("damaged") / f"{key}.{time.time_ns()}{SUFFIX}"
            _refuse_link(path.parent)
            os.replace(path, target)
            said = f"moved to {target}"
        except OSError as failed:
            said = f"it could not be moved aside ({failed})"
        _warn(f"damaged entry of {self.path}, {said}: {error}")

    def _write(self, key: str, kv: VocoKV) -> None:
        data = kv_file.to_bytes(kv)
        if self.max_bytes is not None and len(data) > self.max_bytes:
            reject("kv", f"at most {self.max_bytes} bytes as a file, as the store is", f"of {len(data)}")
        self._folder(key[:2])
        kv_file.write_atomically(self._path(key), data)
        self._remember(key, kv)
        self._keep_to_size(key, len(data))

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _remember(self, key: str, kv: VocoKV) -> None:
        with self._guard:
            self._drop(key)
            if kv.nbytes > self.memory_bytes:
                return
            self._memory[key] = kv
            self._memory_used += kv.nbytes
            while self._memory_used > self.memory_bytes:
                self._drop(next(iter(self._memory)))

    def _forget(self, key: str) -> None:
        with self._guard:
            self._drop(key)

    def _drop(self, key: str) -> None:
        dropped = self._memory.pop(key, None)
        self._memory_used -= 0 if dropped is None else dropped.nbytes

    # ---- size --------------------------------------------------------------------------------------------------------

    def _keep_to_size(self, written: str, size: int) -> None:
        """Remove the least recently used entries above `max_bytes`, never the one just `written`."""
        if self.max_bytes is None:
            return
        with self._guard:
            counted = self._written is not None
            self._written = (self._written or 0) + size
            due = not counted or self._written * PARTS > self.max_bytes or self._total + self._written > self.max_bytes
        if not due:
            return
        entries = self.entries()
        total = sum(entry.nbytes for entry in entries)
        for entry in entries:
            if total <= self.max_bytes:
                break
            if entry.key != written:
                with contextlib.suppress(FileNotFoundError):  # another process did
                    entry.path.unlink()
                    self._counts["evicted"] += 1
                self._forget(entry.key)
                total -= entry.nbytes
        with self._guard:
            self._total, self._written = total, 0

    def _remove_stale(self) -> None:
        """Temporary files of writers that died."""
        for folder in (self.path, *self._folders()):
            for file in folder.glob(f".*{kv_file.PARTIAL}"):
                with contextlib.suppress(OSError):
                    if time.time() - file.lstat().st_mtime > STALE:
                        file.unlink()

    # ---- locks -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, keys: Sequence[str]) -> Iterator[None]:
        """Hold the locks of keys, which other processes and threads then wait for."""
        with ExitStack() as stack:
            folder = self._folder("locks")
            # Always in the same order, so that two that want the same ones do not wait for each other.
            for key in sorted(set(keys)):
                stack.enter_context(_lock(folder / key))
            yield


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made for it and removed behind it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The holder before us may have removed the file; those who come now would lock another of its name.
            identity = _identity(path)
            if identity is not None and identity[0] == os.fstat(descriptor).st_ino:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)


def _own(x: torch.Tensor | None) -> torch.Tensor | None:
    """The same numbers, not as a part of more, which would stay in memory as long as they do."""
    return x if x is None or x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _identity(path: Path) -> tuple[int, int] | None:
    """What changes when another file takes a name: (inode, size); None where there is no file."""
    try:
        state = path.lstat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_size


def _is_linked(path: Path) -> bool:
    return path.is_symlink() or path.parent.is_symlink()


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise OSError(f"{path} is a link, which a store does not follow")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
