"""Packs samples of different lengths into one row: no padding, the layout made in the data loader."""

from collections.abc import Sequence

import torch

from .configuration import VocoLlavaConfig
from .layouts import layout_of

IGNORED = -100


class VocoCollator:
    """Turns samples into one packed batch of plain tensors, which every trainer and every launcher handles.

    Args:
        config: of the model that is trained; decides what the layout of a sample is.

    A sample is a dict with `input_ids` (int64 [S]), `labels` (int64 [S], -100 where nothing is learnt) and `pixel_values`
    (float [images, 3, H, W], absent or empty for text alone). A call returns `input_ids`, `labels`, `position_ids`
    ([1, N]), `segment_ids`, `public` ([N]), `cu_seqlens` ([samples + 1]) and `pixel_values` for the model's `forward`.
    """

    def __init__(self, config: VocoLlavaConfig):
        self.config = config

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pack samples, which stay as they are; ValueError where one holds no tokens, or its fields or length do not fit."""
        limit = self.config.text_config.max_position_embeddings
        if not len(samples):
            raise ValueError("samples must hold at least one, but hold none")
        for i, sample in enumerate(samples):
            ids, labels = sample["input_ids"], sample["labels"]
            if ids.ndim != 1 or ids.dtype != torch.int64 or not len(ids):
                found = f"{ids.dtype} {list(ids.shape)}"
                raise ValueError(f"samples[{i}]['input_ids'] must be int64 [S] with S of at least 1, but was {found}")
            if labels.shape != ids.shape or labels.dtype != torch.int64:
                found = f"{labels.dtype} {list(labels.shape)} for {list(ids.shape)}"
                raise ValueError(f"samples[{i}]['labels'] must be of the shape of its input_ids, int64, but was {found}")
        input_ids = torch.cat([sample["input_ids"] for sample in samples])[None]
        lengths = torch.tensor([0] + [len(sample["input_ids"]) for sample in samples])
        layout = layout_of(self.config, input_ids, cu_seqlens=lengths.cumsum(0).to(torch.int32))
        if int(layout.position_ids.max()) >= limit:
            raise ValueError(
                f"samples must fit the context of {limit} positions, but reach position {int(layout.position_ids.max())}"
            )
        labels = torch.cat([sample["labels"] for sample in samples])
        # A document's first token is no continuation of the document before it.
        labels[layout.cu_seqlens[:-1].long()] = IGNORED
        batch = {
            "input_ids": input_ids,
            "labels": labels[None],
            "position_ids": layout.position_ids[None],
            "segment_ids": layout.segment_ids,
            "public": layout.public,
            "cu_seqlens": layout.cu_seqlens,
        }
        images = _images_of(samples)
        if images:
            batch["pixel_values"] = torch.cat(images)
        return batch


def _images_of(samples: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The pixel values of the samples that have some, all of one kind."""
    images: list[torch.Tensor] = []
    for i, sample in enumerate(samples):
        x = sample.get("pixel_values")
        if x is None or not len(x):
            continue
        first = images[0] if images else x
        if x.ndim != 4 or not x.is_floating_point() or (x.dtype, x.shape[1:]) != (first.dtype, first.shape[1:]):
            wanted = f"like those of the samples before it, {first.dtype} [images, {', '.join(map(str, first.shape[1:]))}]"
            raise ValueError(
                f"samples[{i}]['pixel_values'] must be {wanted if images else 'floating point [images, 3, H, W]'}, "
                f"but was {x.dtype} {list(x.shape)}"
            )
        images.append(x)
    return images
