"""Images and videos by name: in a folder, or in webdataset shards (tar files), which are read at random."""

import io
import json
import os
import posixpath
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from voco_llama.processing import open_image
from voco_llama.video import VIDEO_SUFFIXES

from .conversations import KINDS, Broken, Place

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def media_at(images: str | None) -> "Folder | Shards":
    """The images and videos at `data.images`: a folder, or shards by their pattern; where None, names are paths."""
    return Shards(images) if images is not None and images.endswith(".tar") else Folder(images)


class Folder:
    """Files below a folder, which no name leaves; without a folder, names are paths as they are."""

    def __init__(self, root: str | os.PathLike | None):
        self.root = None if root is None else Path(root)
        if self.root is not None and not self.root.is_dir():
            raise ValueError(f"data.images must be a folder or .tar shards, but {self.root} is neither")

    def image(self, name: str | os.PathLike) -> Image.Image:
        """An RGB image; ValueError that says why there is none."""
        return open_image(self._path(name))

    @contextmanager
    def video(self, name: str | os.PathLike) -> Iterator[Path]:
        """The path of a video file."""
        yield self._path(name)

    def _path(self, name) -> Path:
        return Path(name) if self.root is None else self.root / inside(name)


class Shards:
    """Members of tar files by name, found through an index of the headers.

    No file is held open, so it can be pickled and forked: each read opens its shard.

    Args:
        pattern: one .tar file, or many with a range of numbers (`shards/{000..127}.tar`).

    Raises:
        ValueError: a shard that cannot be read or is compressed; a name that is in two places.
    """

    def __init__(self, pattern: str | os.PathLike):
        self.pattern = os.fspath(pattern)
        self._shards = shards_of(self.pattern)
        self._members: dict[str, tuple[int, int, int]] = {}
        for number, shard in enumerate(self._shards):
            for name, offset, size in _index_of(shard):
                if name in self._members:
                    other = self._shards[self._members[name][0]]
                    raise ValueError(f"shards must hold a name once, but {name} is in {other} and again in {shard}")
                self._members[name] = (number, offset, size)

    def image(self, name: str | os.PathLike) -> Image.Image:
        """An RGB image; ValueError that says why there is none."""
        return open_image(io.BytesIO(self.read(name, "image")), name=f"{name} in {self.pattern}")

    @contextmanager
    def video(self, name: str | os.PathLike) -> Iterator[Path]:
        """The path of a copy of a video, which is there until the context ends."""
        with tempfile.NamedTemporaryFile(suffix=posixpath.splitext(os.fspath(name))[1]) as copy:
            copy.write(self.read(name, "video"))
            copy.flush()
            yield Path(copy.name)

    def read(self, name: str | os.PathLike, kind: str = "file") -> bytes:
        """The content of a member; ValueError where there is none of that name."""
        try:
            number, offset, size = self._members[inside(name)]
        except KeyError:
            raise ValueError(f"{kind} {name} must be in the shards {self.pattern}, but is in none of them") from None
        with open(self._shards[number], "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise ValueError(f"shard {self._shards[number]} must be whole, but ends within {name}")
        return content

    def conversations(self, broken: Broken) -> Iterator[tuple[Place, object]]:
        """(place, record) of each `.json` member, with the image or video of the same key as its own, if there is one."""
        media: dict[str, list[tuple[str, str]]] = {}
        for name in self._members:
            key, suffix = _split(name)
            if suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES:
                media.setdefault(key, []).append(("image" if suffix in IMAGE_SUFFIXES else "video", name))
        for name, (number, _, _) in self._members.items():
            key, suffix = _split(name)
            if suffix != ".json":
                continue
            place = Place(str(self._shards[number]), name)
            content = self.read(name)
            try:
                record = json.loads(content)
            except ValueError as error:
                broken(place, f"must be JSON, but is broken: {error}")
                continue
            found = media.get(key, [])
            if len(found) > 1:
                broken(place, f"key {key} must have one image or video, but has {', '.join(x for _, x in found)}")
                continue
            if found and isinstance(record, dict):
                record = {k: v for k, v in record.items() if k not in KINDS} | dict(found)
            yield place.named(record), record


def inside(name) -> str:
    """A name in its plain form; ValueError where it leads out of the folder that it is looked up in."""
    plain = posixpath.normpath(os.fspath(name))
    if posixpath.isabs(plain) or os.path.isabs(plain) or plain in (".", "..") or plain.startswith("../"):
        raise ValueError(f"image and video must be paths inside of data.images, but were {os.fspath(name)!r}")
    return plain


def shards_of(pattern: str) -> list[Path]:
    """The files of a pattern, with every `{000..127}` replaced by each number of the range, which keeps its zeros."""
    numbers = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if numbers is None:
        return [Path(pattern)]
    first, last = numbers.groups()
    if int(first) > int(last):
        raise ValueError(f"shards must be numbered upwards, but the pattern was {pattern}")
    head, tail = pattern[: numbers.start()], shards_of(pattern[numbers.end() :])
    return [Path(f"{head}{n:0{len(first)}d}{end}") for n in range(int(first), int(last) + 1) for end in tail]


def _index_of(shard: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each plain file in a tar file; headers alone are read."""
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    yield posixpath.normpath(member.name), member.offset_data, member.size
    except FileNotFoundError as error:
        raise ValueError(f"shard {shard} does not exist") from error
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"shard {shard} must be a tar file that is not compressed, but cannot be read: {error}") from error


def _split(name: str) -> tuple[str, str]:
    """Key and suffix as webdataset has them: the key ends at the first dot of the file's name."""
    folder, file = posixpath.split(name)
    key, dot, suffix = file.partition(".")
    return posixpath.join(folder, key), (dot + suffix).lower()
