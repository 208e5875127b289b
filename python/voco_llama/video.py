"""Frames of videos, chosen by their timestamps and decoded as a stream: memory does not grow with a video's length."""

import math
import numbers
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import av

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".gif")
DEFAULT_FPS = 1
# Containers round timestamps to their clock, Matroska's to milliseconds: a frame due at 66.67 ms stands at 67 ms.
CLOCK = Fraction(1, 2000)
# A file that ends this many seconds before it says it does, and no pause within explains that, was cut off.
MISSING = Fraction(1, 2)


def frames_of(source, *, fps: float | None = None, num_frames: int | None = None) -> Iterable:
    """The frames of a video file, or of frames that are at hand already.

    Where the number of frames is known, as it is for every file, the result has a length.

    Args:
        source: a path to a video file; or an iterable of frames: PIL images, paths of images or uint8 arrays [H, W, 3].
        fps: of a file, the frame that is shown at each multiple of 1 / fps seconds from the first frame on: the last one
            with a timestamp at or before it. 1 where neither fps nor num_frames is given.
        num_frames: the frames in the middle of so many equal parts of the video (in time) or of the sequence of frames; a
            frame repeats where there are fewer.

    Returns:
        For a file, `VideoFrames`; else the frames as they were given, or those that num_frames takes of them.

    Raises:
        ValueError: fps or num_frames that is not positive, or both; a file that is missing, damaged, cut off or without a
            video stream; frames that have no timestamps (for fps) or no length (for num_frames).
        ImportError: a file, without the package `av`.
    """
    if fps is not None and num_frames is not None:
        raise ValueError(f"num_frames must be None where fps is given, but was {num_frames!r}")
    real = isinstance(fps, numbers.Real) and not isinstance(fps, bool)
    if fps is not None and not (real and 0 < fps < math.inf):
        raise ValueError(f"fps must be a positive number, but was {fps!r}")
    whole = isinstance(num_frames, int) and not isinstance(num_frames, bool)
    if num_frames is not None and not (whole and num_frames > 0):
        raise ValueError(f"num_frames must be a positive integer, but was {num_frames!r}")
    if isinstance(source, str | os.PathLike):
        return _frames_of_file(Path(source), fps, num_frames)
    if fps is not None:
        raise ValueError(f"fps must be None for frames without timestamps, but was {fps!r}")
    return _frames_at_hand(source, num_frames)


@dataclass(frozen=True)
class VideoFrames:
    """Frames of a video file at equally spaced times; each iteration decodes the file anew, frame by frame.

    Yields RGB PIL images, turned upright where the file says how, of the pixels that are stored (their aspect ratio is
    ignored); one size need not be that of the next. A frame that cannot be decoded is a ValueError that names the second.

    Attributes:
        path: of the file.
        first: the time of the first frame to yield, step: between one and the next; seconds, on the file's own clock.
        count: how many, which is also the length.
    """

    path: Path
    first: Fraction
    step: Fraction
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Image.Image]:
        given, shown = 0, None
        for time, frame in _decode(self.path):
            # Until this frame comes, the one before it is shown.
            while shown is not None and given < self.count and self.first + given * self.step + CLOCK < time:
                yield _picture(shown)
                given += 1
            if given == self.count:
                return
            shown = frame
        if shown is None:
            raise ValueError(f"video {self.path} must hold frames, but none of it can be decoded")
        for _ in range(given, self.count):
            yield _picture(shown)


def _frames_at_hand(source, num_frames: int | None) -> Iterable:
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise ValueError(f"video must be frames [T, H, W, 3] where it is an array, but was of shape {list(source.shape)}")
    if not isinstance(source, Iterable):
        raise ValueError(f"video must be a path or an iterable of frames, but was {type(source).__name__}")
    if num_frames is None:
        return source
    if not isinstance(source, Sequence | np.ndarray) or not len(source):
        raise ValueError(
            f"num_frames must be None for frames that are no sequence or an empty one, but was {num_frames}"
        )
    return [source[(2 * k + 1) * len(source) // (2 * num_frames)] for k in range(num_frames)]


def _frames_of_file(path: Path, fps: float | None, num_frames: int | None) -> VideoFrames:
    start, end = _span_of(path)
    if num_frames is not None:
        step = (end - start) / num_frames
        return VideoFrames(path, start + step / 2, step, num_frames)
    # Through its decimal digits: 0.1 is meant to be a tenth.
    rate = Fraction(str(DEFAULT_FPS if fps is None else fps))
    return VideoFrames(path, start, 1 / rate, math.ceil((end - start - CLOCK) * rate))


def _span_of(path: Path) -> tuple[Fraction, Fraction]:
    """When the first frame comes and the last one ends, in seconds, from the packets: all are read, none is decoded.

    ValueError for a file that is not whole: to read some of those is no error, they only seem to be shorter.
    """
    frames, reached, pause = (), Fraction(0), MISSING
    with _open(path) as (container, stream):
        for packet in container.demux():
            if packet.pts is None or packet.is_discard:
                continue
            begin = _seconds(packet.pts, packet)
            # Not every packet says how long it lasts; even so, what comes at the very end is a part of the video.
            end = begin + max(_seconds(packet.duration or 0, packet), 2 * CLOCK)
            pause, reached = max(pause, begin - reached), max(reached, end)
            if packet.stream.index == stream.index:
                frames = (min(frames[0], begin), max(frames[1], end)) if frames else (begin, end)
                if packet.is_corrupt:
                    raise _damaged(path, begin - frames[0])
        missing = Fraction(container.duration or 0, 1_000_000) - reached
        if missing > pause or (container.format.name == "gif" and not _has_trailer(path)):
            raise _damaged(path, _length(frames))
        if not frames:
            raise ValueError(f"video {path} must hold frames with timestamps, but holds none")
    return frames


def _length(span: tuple) -> Fraction:
    return span[1] - span[0] if span else Fraction(0)


def _has_trailer(gif: Path) -> bool:
    """Whether a GIF, which says nowhere how long it is, ends as a whole one does."""
    with gif.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b";"


def _decode(path: Path) -> Iterator[tuple[Fraction, "av.VideoFrame"]]:
    """(time in seconds, frame), in the order in which frames are shown."""
    from av import FFmpegError

    first = time = None
    with _open(path) as (container, stream):
        # Frame threads would be faster, but lose the errors of frames that are under way when the file ends.
        stream.thread_type = "SLICE"
        try:
            for frame in container.decode(stream):
                time = time if frame.pts is None else _seconds(frame.pts, frame)
                if time is None:
                    continue
                first = time if first is None else first
                if frame.is_corrupt:
                    raise _damaged(path, time - first)
                yield time, frame
        except FFmpegError as error:
            raise _damaged(path, _length((first, time) if time is not None else ())) from error


@contextmanager
def _open(path: Path):
    """The container and its video stream; ValueError where FFmpeg finds none."""
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need PyAV: pip install 'voco-kernels[video]'") from error
    try:
        # With "file:" no name is taken for an address.
        with av.open(f"file:{path}") as container:
            stream = container.streams.best("video")
            # The picture of a song's album is a video stream, too.
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise ValueError(f"video {path} must hold a video stream, but holds none")
            yield container, stream
    except FileNotFoundError as error:
        raise ValueError(f"video {path} does not exist") from error
    except av.FFmpegError as error:
        raise ValueError(f"video {path} is not a video file that can be read: {error.strerror}") from error


def _seconds(ticks: int, unit) -> Fraction:
    """Ticks of the clock of a packet or a frame in seconds."""
    return Fraction(ticks * unit.time_base.numerator, unit.time_base.denominator)


def _damaged(path: Path, seconds: Fraction) -> ValueError:
    return ValueError(f"video {path} must be whole, but is damaged or cut off at second {float(seconds):.2f}")


def _picture(frame) -> Image.Image:
    """RGB, turned as the file says it is to be shown."""
    return frame.to_image().rotate(frame.rotation, expand=True)
