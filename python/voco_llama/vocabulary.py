"""Which token has which row, in a checkpoint of another layout and in ours."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from .checkpoints import Stored

IMAGE, PAD, VOCO = "<image>", "<pad>", "<voco>"
ROWS = 64  # rows added to a vocabulary make it a multiple of this, as in llava-hf checkpoints


@dataclass(frozen=True)
class Vocabulary:
    """Which rows of the source's vocabulary go where: those before `kept` stay, one may move, others are new."""

    rows: int
    kept: int
    moved: tuple[int, int] | None = None

    @property
    def added(self) -> int:
        return self.rows - self.kept - (self.moved is not None)

    def apply(self, stored: Stored) -> Stored:
        """An embedding or a head [V, E] with its rows in their new places."""
        if (self.rows, self.moved) == (stored.shape[0], None):
            return stored

        def read() -> torch.Tensor:
            old = stored.read()
            known = old[: self.kept]
            new = known.float().mean(0).to(old.dtype).repeat(self.rows, 1)
            new[: self.kept] = known
            if self.moved is not None:
                new[self.moved[1]] = old[self.moved[0]]
            return new

        return replace(stored, shape=(self.rows, *stored.shape[1:]), read=read)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast | LlamaTokenizer:
    """The tokenizer of a folder: tokenizer.json as it stands, else what transformers makes of tokenizer.model."""
    if (folder / "tokenizer.json").is_file():
        tokens = PreTrainedTokenizerFast.from_pretrained(folder)
    elif (folder / "tokenizer.model").is_file():
        try:
            tokens = LlamaTokenizer.from_pretrained(folder)
        except (ImportError, ValueError) as error:
            raise ImportError(
                f"to read {folder / 'tokenizer.model'} install sentencepiece and protobuf, or give as tokenizer a folder "
                f"with the tokenizer.json of the same tokens ({error})"
            ) from error
    else:
        raise ValueError(f"tokenizer must be a folder with tokenizer.json or tokenizer.model, but was {folder}")
    if tokens.bos_token_id is None or tokens("a").input_ids[0] != tokens.bos_token_id:
        raise ValueError(f"tokenizer must put its BOS token before a text, but that of {folder} does not")
    return tokens


def vocabulary_of_original(tokens: PreTrainedTokenizerFast, rows: int) -> tuple[Vocabulary, int | None]:
    """What is kept of an original layout's vocabulary, and the id of <voco> there."""
    vocab = tokens.get_vocab()
    unnamed = rows - sum(i < rows for i in vocab.values())
    image = vocab.get(IMAGE, rows)
    if unnamed or image < rows:
        problem = f"{unnamed} rows of the embedding's {rows} have no token" if unnamed else f"{IMAGE} has row {image}"
        raise ValueError(f"tokenizer must be the one that the source was trained with, but {problem}")
    voco = vocab.get(VOCO, rows)
    if voco >= rows:
        return Vocabulary(rows, rows), None
    if voco != rows - 1:
        raise ValueError(f"tokenizer must have {VOCO} as the last of the source's {rows} tokens, but its id is {voco}")
    return Vocabulary(rows, voco), voco


def with_image_tokens(tokens: PreTrainedTokenizerFast, *, without_voco: bool) -> PreTrainedTokenizerFast:
    """The same tokenizer with <image>, <pad> and <voco>: those that are new come last, in this order."""
    state = json.loads(tokens.backend_tokenizer.to_str())
    if without_voco:
        state["added_tokens"] = [x for x in state["added_tokens"] if x["content"] != VOCO]
    backend = Tokenizer.from_str(json.dumps(state))
    for token in (IMAGE, PAD, VOCO):
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    special = {name: getattr(tokens, name) for name in ("bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        **{name: str(token) for name, token in special.items() if token is not None},
        extra_special_tokens={"image_token": IMAGE, "voco_token": VOCO},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def enlarged(vocabulary: Vocabulary, tokens: PreTrainedTokenizerFast, voco: int | None) -> Vocabulary:
    """The vocabulary with a row for every token of the tokenizer."""
    rows, needed = vocabulary.rows, max(tokens.get_vocab().values()) + 1
    if needed > rows:
        rows = -(-needed // ROWS) * ROWS
    moved = None if voco is None else (voco, tokens.convert_tokens_to_ids(VOCO))
    return replace(vocabulary, rows=rows, moved=moved)
