"""The training data: conversations about images and videos, as samples for `VocoCollator`."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch.utils.data import Dataset

from voco_llama.processing import VocoProcessor, open_image
from voco_llama.systems import system_of
from voco_llama.video import frames_of

from .config import DataConfig, TrainingConfig
from .conversations import IGNORED, KINDS, Conversation, Place, Records, check_processor, encode, read
from .images import Folder, Shards, media_at

REPORT = "skipped.jsonl"


class ConversationDataset(Dataset):
    """Conversations as token ids, labels on their answers, and pixels; made by `of`.

    `dataset[i]` is `input_ids` and `labels` (int64 [S], -100 where nothing is learnt) and, where there are images,
    `pixel_values` (float32 [images, 3, H, W]). Each frame of a video is an image. Where several VoCo counts are configured,
    one is drawn for every image or video, by the seed, the epoch (`set_epoch`) and the index alone.

    With `data.on_error: skip`, another record stands in for a broken one: the next that can be read. Data-loader workers
    share the counts of what was skipped and cut, and the epoch.
    """

    @classmethod
    def of(
        cls,
        config: TrainingConfig,
        processor: VocoProcessor,
        records: Sequence[dict] | None,
        seed: int,
        context: int | None = None,
    ) -> "ConversationDataset":
        """The data of a training run.

        Args:
            records: in place of the files of `config.data.conversations`; records are made and checked when they are asked
                for, those of files at once. An `image` may be a path, a PIL image or a uint8 array, a `video` a path or a
                sequence of frames; either may be a list.
            context: tokens that the model takes, beyond which samples are cut as beyond `config.data.max_length`; None
                where they are not what its context counts.

        Raises:
            ValueError: no records; a broken one (file, record and reason), unless `data.on_error` is "skip"; a processor
                that cannot be trained with.
        """
        check_processor(processor)
        dataset = cls(config, processor, seed, context)
        if records is not None:
            dataset._take(records)
        elif config.data is None:
            raise ValueError("data must be given where there are no records, but was None")
        else:
            dataset._read(config.data)
        return dataset

    def __init__(self, config: TrainingConfig, processor: VocoProcessor, seed: int, context: int | None):
        self.processor, self.seed = processor, seed
        self.data = config.data or DataConfig(conversations=())
        self.limit, self.limited_by = self.data.max_length, "data.max_length"
        if context is not None and context < self.limit:
            self.limit, self.limited_by = context, "the model's context"
        self.report = config.out / REPORT
        # What the run had noted before it went on, or the process before this one has.
        self._noted = set(self.report.read_bytes().splitlines(True)) if self.report.is_file() else set()
        compressed = config.stage != "align" and system_of(config.system).voco_tokens
        self.choices = config.num_voco_tokens if compressed else (0,)
        self._media: list[Folder | Shards] = [media_at(self.data.images)]
        self._counts = Counter()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def _take(self, records: Sequence[dict]) -> None:
        self._records, self._from_files = records, False
        self._ready("records must hold at least one, but hold none")

    def _read(self, data: DataConfig) -> None:
        self._records, self._from_files = Records(), True
        for file in data.conversations:
            if file.suffix == ".tar":
                self._media.append(Shards(file))
                found, media = self._media[-1].conversations(self._drop), len(self._media) - 1
            else:
                found, media = read(file, self._drop), 0
            for place, record in found:
                self._add(media, place, record)
        files, dropped = ", ".join(map(str, data.conversations)), self._counts["skipped at start"]
        self._ready(f"data.conversations must hold a whole record, but {files} hold none ({dropped} broken)")

    def _add(self, media: int, place: Place, record) -> None:
        """Check a record of a file and keep it."""
        try:
            conversation = Conversation.of(record, self._placeholders)
        except ValueError as error:
            self._drop(place, str(error))
            return
        if conversation.sources and media == 0 and self.data.images is None:
            raise ValueError(f"data.images must be given where records have images or videos, as {place} has, but was None")
        self._counts[f"with {conversation.kind}s" if conversation.sources else "text only"] += 1
        kept = {name: record[name] for name in (*KINDS, "conversations") if name in record}
        self._records.append([media, place, kept])

    def _ready(self, none: str) -> None:
        if not len(self._records):
            raise ValueError(none)
        self._skipped, self._truncated = (torch.zeros(len(self), dtype=torch.bool).share_memory_() for _ in range(2))

    # ---- samples -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The sample of a record, or of the next one that can be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, but was {index}")
        for i in ((index + step) % len(self) for step in range(len(self))):
            media, place, record = self._record(i)
            try:
                return self._sample(record, media, i, index)
            except ValueError as error:
                # Tried again each time: what else is read must not hang on what was read before.
                if not self._skipped[i]:
                    self._note(place, str(error), error)
                    self._skipped[i] = True
        raise ValueError(f"records must hold one that can be read, but all {len(self)} are broken; {self.report} says why")

    def set_epoch(self, epoch: int) -> None:
        """Let VoCo counts be drawn anew; in data-loader workers, too."""
        self._epoch.fill_(epoch)

    @property
    def truncated(self) -> int:
        """Records that lost text at the end so far, in this process and its data-loader workers."""
        return int(self._truncated.sum())

    @property
    def skipped(self) -> int:
        """Records that were skipped so far, at the start or later, in this process and its data-loader workers."""
        return self._counts["skipped at start"] + int(self._skipped.sum())

    def gather(self, summed: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Know what other processes skipped and cut, too; `summed` sums int32 [records] over all of them."""
        for found in (self._skipped, self._truncated):
            found.copy_(summed(found.to(torch.int32)) > 0)

    def summary(self) -> dict[str, int]:
        """Counts of records: all that are there, and what was skipped and cut so far; of files also what they are about."""
        counts = {name: self._counts[name] for name in ("with images", "with videos", "text only", "skipped at start")}
        return {
            "records": len(self),
            **(counts if self._from_files else {}),
            "skipped": self.skipped,
            "truncated": self.truncated,
        }

    @property
    def _placeholders(self) -> tuple[str, ...]:
        return self.processor.image_token, self.processor.voco_token

    def _record(self, i: int) -> tuple[Folder | Shards, Place, dict]:
        """Where the record's images are, where the record is, and the record."""
        if not self._from_files:
            record = self._records[i]
            return self._media[0], Place("records", str(i)).named(record), record
        media, place, record = self._records[i]
        return self._media[media], Place(*place), record

    def _sample(self, record, media: Folder | Shards, i: int, index: int) -> dict[str, torch.Tensor]:
        conversation = Conversation.of(record, self._placeholders)
        load = self._image if conversation.kind == "image" else self._video
        pixels = [load(source, media) for source in conversation.sources]
        frames = [len(x) for x in pixels]
        rng = np.random.default_rng((self.seed, int(self._epoch), index))
        drawn = rng.choice(self.choices, size=len(frames)).tolist()
        counts = [count for count, images in zip(drawn, frames) for _ in range(images)]
        ids, labels = encode(self.processor, conversation.turns, frames, counts)
        if len(ids) > self.limit:
            ids, labels = self._cut(ids, labels)
            self._truncated[i] = True
        return {"input_ids": ids, "labels": labels, **({"pixel_values": torch.cat(pixels)} if pixels else {})}

    def _cut(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The beginning of a sample; ValueError where images would be cut, or no answer is left."""
        limit, name = self.limit, f"{self.limited_by} ({self.limit} tokens)"
        placeholders = [self.processor.image_token_id, self.processor.voco_token_id]
        of_images = torch.isin(ids, torch.tensor(placeholders)).nonzero()
        needed = int(of_images.max()) + 1 if len(of_images) else 0
        if needed > limit:
            raise ValueError(f"images must fit {name}, but need {needed}")
        if bool((labels[:limit] == IGNORED).all()):
            first = int((labels != IGNORED).nonzero().min())
            raise ValueError(f"an answer must begin within {name}, but the first is at {first}")
        return ids[:limit].clone(), labels[:limit].clone()

    def _image(self, source, media: Folder | Shards) -> torch.Tensor:
        """float32 [1, 3, H, W]."""
        image = media.image(source) if isinstance(source, str | os.PathLike) else open_image(source)
        return self._pixels(image)

    def _video(self, source, media: Folder | Shards) -> torch.Tensor:
        """float32 [frames, 3, H, W]; frames become pixels as they are decoded."""
        wanted = self.data.video
        with media.video(source) if isinstance(source, str | os.PathLike) else nullcontext(source) as video:
            frames: Iterable = frames_of(video, fps=wanted.fps, num_frames=wanted.num_frames)
            pixels = [self._pixels(open_image(frame)) for frame in frames]
        if not pixels:
            raise ValueError("video must hold at least one frame, but holds none")
        return torch.cat(pixels)

    def _pixels(self, image) -> torch.Tensor:
        return self.processor.image_processor([image], return_tensors="pt")["pixel_values"]

    # ---- what is broken ----------------------------------------------------------------------------------------------

    def _drop(self, place: Place, reason: str) -> None:
        """Leave a broken record of a file out."""
        self._note(place, reason)
        self._counts["skipped at start"] += 1

    def _note(self, place: Place, reason: str, error: Exception | None = None) -> None:
        """Stop the run, or write a broken record into the report, unless it was there at the beginning."""
        if self.data.on_error == "stop":
            raise ValueError(f"{place}: {reason}") from error
        self.report.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"record": place.record, "file": place.file, "reason": reason}, ensure_ascii=False) + "\n"
        line = line.encode("utf-8", "backslashreplace")
        if line in self._noted:
            return
        # Whole lines, whichever of the processes write at once.
        file = os.open(self.report, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)
