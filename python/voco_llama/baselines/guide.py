"""The text that guides LLaMA-VID: for each image what is asked about it.

Compressors stand where LLaVA calls its projector, with vision tokens alone; the text reaches them past it, for one forward.
"""

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from ..collator import IGNORED


@dataclass(frozen=True, eq=False)
class Guide:
    """For each image the text about it: ids (int64 [images, L]) and mask (bool [images, L], False at padding)."""

    ids: torch.Tensor
    mask: torch.Tensor


# Not an attribute of the compressor, of which PEFT runs a copy.
_current: ContextVar[Guide | None] = ContextVar("guide", default=None)


@contextlib.contextmanager
def guided_by(guide: Guide) -> Iterator[None]:
    """Compressors inside of it read `guide`."""
    token = _current.set(guide)
    try:
        yield
    finally:
        _current.reset(token)


def current_guide() -> Guide:
    """The guide of this forward; ValueError outside of one."""
    guide = _current.get()
    if guide is None:
        raise ValueError('input_ids must be given to the compressor "llama_vid", which reads the text about an image: call '
                         "the model, not its parts")  # fmt: skip
    return guide


def text_behind_images(
    input_ids: torch.Tensor,
    image_token_id: int,
    tokens_per_image: int,
    longest: int,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Guide:
    """For each image, in order, the text behind the last image of its document that is no answer.

    All images of a document are guided by the same text. LLaMA-VID's code repeats an image for each question of a
    conversation; here that is a document per question, or else all questions guide the image together. Where there are no
    images the guide is that of one image without text, which `forward` may add for the sake of other processes.

    Args:
        input_ids (int64 [B, S]), attention_mask ([B, S], 0 at padding): a document per row.
        cu_seqlens (int32 [documents + 1]): instead, the documents of a packed row.
        labels ([B, S]): answers are not -100; where None there are none yet.
        longest: tokens at most; of a longer text the last ones.
    """
    ids = input_ids.flatten()
    is_image = ids == image_token_id
    text = torch.ones_like(is_image) if labels is None else labels.flatten() == IGNORED
    if attention_mask is not None:
        text &= attention_mask[:, -input_ids.shape[1] :].flatten().bool()
    edges = range(0, len(ids) + 1, input_ids.shape[1]) if cu_seqlens is None else cu_seqlens.tolist()
    texts = []
    for begin, end in itertools.pairwise(edges):
        places = is_image[begin:end].nonzero()[:, 0]
        if len(places):
            behind = slice(begin + int(places[-1]) + 1, end)
            texts += [ids[behind][text[behind]][-longest:]] * (len(places) // tokens_per_image)
    # At least one column, so that every weight takes part in every step.
    texts = texts or [ids[:0]]
    width = max(1, *map(len, texts))
    filler = ids.new_zeros(width)
    lengths = torch.tensor([len(x) for x in texts], device=ids.device)
    padded = pad_sequence([*texts, filler], batch_first=True)[:-1]
    return Guide(padded, torch.arange(width, device=ids.device) < lengths[:, None])
