"""Conversations in LLaVA's JSON format: read from files, checked, and turned into token ids and labels."""

import codecs
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from voco_llama.processing import VocoProcessor

IGNORED = -100
ROLES = ("human", "gpt")
KINDS = ("image", "video")


@dataclass(frozen=True)
class Conversation:
    """A checked record.

    Attributes:
        turns: questions and answers in turn, without markers of images.
        kind: of the sources: "image" or "video".
        sources: the images or the videos that the conversation is about, as the record gives them; none for text alone.
    """

    turns: tuple[str, ...]
    kind: str
    sources: tuple

    @classmethod
    def of(cls, record: Mapping, placeholders: tuple[str, ...]) -> "Conversation":
        """The conversation of a record in LLaVA's format.

        Args:
            record: `conversations`, and `image` or `video`: one, or a list. One `<image>` or `<video>` for each must stand
                at the start or the end of the first question; it is removed: the chat template puts images in front.
            placeholders: tokens that the model takes for an image, which no text may hold.

        Raises:
            ValueError: whatever is wrong with it, named.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"record must hold keys and values, but was {type(record).__name__}")
        given = [kind for kind in KINDS if record.get(kind) is not None]
        if len(given) == 2:
            raise ValueError("video must be absent where image is given, but both were given")
        kind = given[0] if given else "image"
        sources = record[kind] if given else []
        sources = tuple(sources) if isinstance(sources, list | tuple) else (sources,)
        turns = _turns(record.get("conversations"))
        if sources:
            turns[0] = _without_markers(turns[0], kind, len(sources))
        for i, turn in enumerate(turns):
            for token in placeholders:
                if token in turn:
                    raise ValueError(
                        f"conversations[{i}]['value'] must not hold {token}, except for one <image> per image at the start "
                        f"or the end of the first question, but was {turn!r:.80}"
                    )
        return cls(tuple(turns), kind, sources)


def _turns(conversations) -> list[str]:
    """The questions and answers in turn.

    As in LLaVA an answer without a question before it and a question without an answer behind it are left out; some of its
    data have them.
    """
    if not isinstance(conversations, list | tuple) or not conversations:
        raise ValueError(f"conversations must be a list of questions and answers in turn, but was {conversations!r:.80}")
    if isinstance(conversations[0], Mapping) and conversations[0].get("from") == ROLES[1]:
        conversations = conversations[1:]
    for i, turn in enumerate(conversations):
        if not isinstance(turn, Mapping):
            raise ValueError(f"conversations[{i}] must hold from and value, but was {turn!r:.80}")
        if turn.get("from") != ROLES[i % 2]:
            raise ValueError(f"conversations[{i}]['from'] must be {ROLES[i % 2]!r}, but was {turn.get('from')!r:.80}")
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"conversations[{i}]['value'] must be text, but was {turn.get('value')!r:.80}")
        if any("\ud800" <= character <= "\udfff" for character in turn["value"]):
            raise ValueError(f"conversations[{i}]['value'] must be whole characters, but was {turn['value']!r:.80}")
    if len(conversations) < 2:
        raise ValueError("conversations must hold an answer of 'gpt' to a question, but hold none")
    return [turn["value"] for turn in conversations[: len(conversations) // 2 * 2]]


def _without_markers(question: str, kind: str, count: int) -> str:
    """A question without the markers at its edges, of which there must be `count`."""
    # Much video data calls a video <image>, too.
    marker = "(?:<image>|<video>)" if kind == "video" else "<image>"
    edges = re.fullmatch(rf"((?:\s*{marker})*)(.*?)((?:{marker}\s*)*)", question, re.DOTALL)
    found = len(re.findall(marker, edges[1] + edges[3]))
    if found != count:
        raise ValueError(
            f"conversations[0]['value'] must hold one <{kind}> per {kind} ({count}) at its start or end, but holds {found}"
        )
    return edges[2].strip()


# ---- token ids and labels ----------------------------------------------------------------------------------------------


def encode(
    processor: VocoProcessor, turns: tuple[str, ...], frames: list[int], counts: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, labels), int64 [S], of a whole conversation; answers and the tokens that end them are labels, else -100.

    The text is made and cut into tokens in one piece, as `preprocess_v1` of LLaVA does, so what stands before an answer has
    the tokens of the prompt that `VocoProcessor` makes of it.

    Args:
        frames: images side by side for each source.
        counts: VoCo tokens of each of these images.

    Raises:
        ValueError: the chat template or the tokenizer sees the beginning of a conversation differently once it goes on.
    """
    text, image = processor.conversation(turns, frames), processor.image_token
    answers = []
    for i in range(1, len(turns), 2):
        prompt, answered = processor.conversation(turns[:i], frames), processor.conversation(turns[: i + 1], frames)
        in_front = prompt.count(image) == text.count(image) == len(counts)
        if not (in_front and answered.startswith(prompt) and text.startswith(answered)):
            raise ValueError(
                "chat_template must render a conversation as its beginning and then the rest, with one marker per image "
                f"before the first answer, but renders {answered!r:.200} and then {text!r:.200}"
            )
        answers.append((len(prompt), len(answered)))
    expanded = processor.expand(text, iter(counts))
    tokens = processor.tokenizer(expanded, return_offsets_mapping=True, verbose=False)
    ids, (begins, ends) = np.array(tokens["input_ids"]), np.array(tokens["offset_mapping"]).T
    labels = np.full_like(ids, IGNORED)
    # Whatever comes behind the images moves by what they take when they are written out.
    for begin, end in np.array(answers) + len(expanded) - len(text):
        for edge in (begin, end):
            if ((begins < edge) & (edge < ends)).any():
                raise ValueError(
                    "tokenizer must end a token where an answer begins and where it ends, but joins "
                    f"{expanded[edge - 9 : edge + 9]!r}"
                )
        answer = (begins >= begin) & (ends <= end) & (begins < ends)
        labels[answer] = ids[answer]
    return torch.from_numpy(ids), torch.from_numpy(labels)


def check_processor(processor: VocoProcessor) -> None:
    """ValueError where a processor's tokenizer or chat template cannot be trained with."""
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        raise ValueError("tokenizer must be a fast one, which knows where in the text a token is, but was a slow one")
    ids, labels = encode(processor, ("one", "two", "three", "four"), [1], [0])
    last = ids[(labels != IGNORED) & (labels.roll(-1) == IGNORED)]
    if last.tolist() != [tokenizer.eos_token_id] * 2:
        raise ValueError(
            f"chat_template must end each answer with {tokenizer.eos_token!r}, but renders "
            f"{processor.conversation(['one', 'two', 'three', 'four'])!r}"
        )


# ---- files -------------------------------------------------------------------------------------------------------------


class Records:
    """Records as JSON in one block of memory, which data-loader workers share; one is a dict only while it is in use."""

    def __init__(self):
        self._data, self._ends = bytearray(), array("q", [0])

    def append(self, record) -> None:
        """Put anything that JSON can hold behind the others."""
        self._data += json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int):
        return json.loads(self._data[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass"))


class Place(NamedTuple):
    """Where a record is: its file, and what it is called there."""

    file: str
    record: str

    def __str__(self) -> str:
        return ", ".join(self)

    def named(self, record) -> "Place":
        """With the record's own id, if it has one."""
        has_id = isinstance(record, Mapping) and "id" in record
        return Place(self.file, f"{self.record} (id {record['id']!r:.80})") if has_id else self


# Called with the place of a record and what is wrong with it; raises, or takes note so that reading goes on.
Broken = Callable[[Place, str], None]


def read(file: Path, broken: Broken) -> Iterator[tuple[Place, object]]:
    """(place, record) of a file: a JSON array, or a record in each line.

    Args:
        broken: for lines that are no JSON.

    Raises:
        ValueError: an array that is no JSON, or a file that cannot be read.
    """
    try:
        with file.open("rb") as stream:
            begin = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
            stream.seek(0)
            yield from _array(file, stream.read()) if begin.startswith(b"[") else _lines(file, stream, broken)
    except OSError as error:
        raise ValueError(f"data.conversations must be files, but {file} cannot be read: {error.strerror}") from error


def _array(file: Path, content: bytes) -> Iterator[tuple[Place, object]]:
    try:
        records = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file} must be a JSON array or hold a record in each line, but is broken: {error}") from error
    for i, record in enumerate(records):
        yield Place(str(file), f"record {i}").named(record), record


def _lines(file: Path, stream: Iterable[bytes], broken: Broken) -> Iterator[tuple[Place, object]]:
    for number, line in enumerate(stream, 1):
        place = Place(str(file), f"line {number}")
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            broken(place, f"must be JSON, but is broken: {error}")
        else:
            yield place.named(record), record
