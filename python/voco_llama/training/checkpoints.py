"""Checkpoints that are complete or not there: written under another name, and checked before a run goes on from one."""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

# Within each checkpoint: its files and their sizes.
CONTENTS = "contents.json"
# Beside the checkpoints: what is being written.
UNFINISHED = ".unfinished"


@contextmanager
def written_whole(target: Path, *, is_main: bool = True, barrier=lambda: None) -> Iterator[Path]:
    """A new folder of the same name that becomes `target` when everything is in it. What was there is kept until then.

    Args:
        is_main: whether this process makes, renames and removes folders; it is one of all that write to `target`.
        barrier: called to wait for the other processes.

    Raises:
        OSError: writing failed (a full disk, for one); nothing of it is left, and what was there before is untouched.
    """
    beside = target.parent / UNFINISHED / target.name
    if is_main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    barrier()
    try:
        yield beside
        barrier()
        if is_main:
            _replace(target, beside)
            # Something else may be on its way there.
            with suppress(OSError):
                beside.parent.rmdir()
    # The libraries that write report a full disk each in its own way.
    except Exception as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(f"{target} cannot be written ({error}); what was saved before is kept") from error
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    barrier()


def newest(out: Path) -> Path | None:
    """The last complete checkpoint in `out`; None where there is none at all. Says which ones are passed over.

    Raises:
        ValueError: there are checkpoints, but none is complete.
    """
    found = all_in(out)
    for checkpoint in reversed(found):
        missing = incomplete(checkpoint)
        if missing is None:
            return checkpoint
        logger.warning(f"checkpoint {checkpoint} is not complete ({missing}); going back to the one before it")
    if found:
        raise ValueError(
            f"out must hold a complete checkpoint to go on from, but all {len(found)} in {out} are damaged; --fresh starts "
            "again"
        )
    return None


def all_in(out: Path) -> list[Path]:
    """The checkpoints in a folder by step, complete or not."""
    steps = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in out.glob("checkpoint-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in steps if match)]


def incomplete(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None where nothing is."""
    try:
        sizes = json.loads((checkpoint / CONTENTS).read_text())
    except (OSError, ValueError):
        return f"{CONTENTS} is missing or damaged"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def rotate(out: Path, limit: int | None) -> None:
    """Remove the oldest complete checkpoints beyond `limit`; None or 0 for no limit."""
    complete = [checkpoint for checkpoint in all_in(out) if incomplete(checkpoint) is None]
    for checkpoint in complete[:-limit] if limit else []:
        shutil.rmtree(checkpoint)


def remove_unfinished(out: Path) -> None:
    """Remove what a killed run was writing."""
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write down names and sizes of all files of a checkpoint, which are on the disk then."""
    sizes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        sizes[str(file.relative_to(folder))] = file.stat().st_size
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    (folder / CONTENTS).write_text(json.dumps(sizes, indent=1))


def _replace(target: Path, new: Path) -> None:
    """A folder cannot be renamed onto another that holds something, so the old one steps aside for a moment."""
    old = new.parent / f"old-{target.name}"
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)
