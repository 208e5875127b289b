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
        """Pack samples; ValueError where a sample's labels or length do not fit."""
        limit = self.config.text_config.max_position_embeddings
        for i, sample in enumerate(samples):
            if sample["labels"].shape != sample["input_ids"].shape:
                shapes = f"{list(sample['labels'].shape)} for {list(sample['input_ids'].shape)}"
                raise ValueError(f"samples[{i}]['labels'] must be of the shape of its input_ids, but was {shapes}")
        input_ids = torch.cat([sample["input_ids"] for sample in samples])[None]
        lengths = torch.tensor([0] + [len(sample["input_ids"]) for sample in samples])
        layout = layout_of(self.config, input_ids, cu_seqlens=lengths.cumsum(0).to(torch.int32))
        if layout.num_tokens and int(layout.position_ids.max()) >= limit:
            raise ValueError(
                f"samples must fit the context of {limit} positions, but reach position {int(layout.position_ids.max())}"
            )
        labels = torch.cat([sample["labels"] for sample in samples])
        # A document's first token is no continuation of the document before it.
        labels[layout.cu_seqlens[:-1][lengths[1:] > 0].long()] = IGNORED
        batch = {
            "input_ids": input_ids,
            "labels": labels[None],
            "position_ids": layout.position_ids[None],
            "segment_ids": layout.segment_ids,
            "public": layout.public,
            "cu_seqlens": layout.cu_seqlens,
        }
        images = [sample["pixel_values"] for sample in samples if sample.get("pixel_values") is not None]
        if images and sum(len(x) for x in images):
            batch["pixel_values"] = torch.cat(images)
        return batch
