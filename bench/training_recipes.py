"""A pool of image-instruction samples to train on, and the recipes that batch it: ours, and what others do.

All samples are documents of their own, at continuous positions. The recipes differ in how samples lie in a batch, and in
what tells the attention about it:

- ours: packed without padding; the layout and its tiles come from the data loader or, in a second row, are made in the step;
- the published recipe: a padded batch, of samples of like length or as they come, and a dense 4-D mask that is made from the
  batch in every step, as its code does. Here it is boolean and vectorised on the device, where the released code loops over
  samples in Python. "Of like length" means that the pool is sorted. LLaVA's sampler sorts a global batch and then deals it
  out again, so that all devices get about as many tokens: that pads more. Sorting more samples than the pool has pads less.
  Padding stands on the right, which costs what the released code's left costs;
- FlexAttention over our packed rows, all padded to whole blocks of the longest one, so that one graph serves them; its block
  mask, one for all heads (H=None), is made in every step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, LlamaConfig

from bench.attention_masks import MaskRule
from bench.lengths import text_lengths
from tests.reference import dense_attention, mask_of_layout
from voco_kernels import Image, Text, VocoLayout
from voco_kernels.integrations import transformers as voco_transformers

OURS, BUILT, GROUPED, RANDOM, FLEX = (
    "voco, packed",
    "voco, packed, layout made in the step",
    "dense mask, padded, grouped by length",
    "dense mask, padded, random order",
    "FlexAttention, packed, mask made in the step",
)
ALONE = "each sample alone"
REFERENCE_ATTENTION, FLEX_ATTENTION = "bench_reference", "bench_flex"
FLEX_BLOCK = 128


# ---- what is trained ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingShape:
    """A LLaMA and a pool of samples: one image of `vision` + `voco` tokens each, then text.

    Attributes:
        layers: decoder layers; on a GPU as many of them as fit.
        text_divisor: texts are this many times shorter than those of `bench.lengths`.
        batch: samples in a padded micro-batch.
        capacity: tokens in a packed micro-batch at most.
        targets: recipe -> wanted ratio of its time to ours.
        mfu_target: wanted share of the device's peak without gradient checkpointing.
    """

    name: str
    reason: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab: int
    vision: int
    voco: int
    text_divisor: int
    samples: int
    batch: int
    capacity: int
    targets: dict[str, float] = field(default_factory=dict)
    mfu_target: float | None = None

    @property
    def documents(self) -> list[tuple[Image, Text]]:
        """The spans of every sample, in random order."""
        texts = (max(1, length // self.text_divisor) for length in text_lengths(self.samples))
        return [(Image(self.vision, self.voco), Text(text)) for text in texts]

    def config(self) -> LlamaConfig:
        """Of a stock LLaMA; weights are as spread as those of LLaMA-7B, so that attention is far from uniform."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocab,
            max_position_embeddings=4096,
            initializer_range=0.02 * (4096 / self.hidden) ** 0.5,
            tie_word_embeddings=False,
        )


SEVEN_B = TrainingShape(
    "7b",
    "layers and images of LLaVA-1.5-7B; 64 samples are four micro-batches of the published recipe, and four packed ones",
    layers=32,
    hidden=4096,
    heads=32,
    intermediate=11008,
    vocab=32064,
    vision=576,
    voco=2,
    text_divisor=1,
    samples=64,
    batch=16,
    capacity=16384,
    targets={GROUPED: 1.1, RANDOM: 1.4},
    mfu_target=0.4,
)
SMALL = TrainingShape(
    "small",
    "the same a quarter as long, and so narrow that a step takes a CPU less than a second; says nothing about a GPU",
    layers=2,
    hidden=256,
    heads=4,
    intermediate=688,
    vocab=2048,
    vision=144,
    voco=2,
    text_divisor=4,
    samples=12,
    batch=4,
    capacity=1024,
)


class Pool:
    """What a data loader reads from: all samples, one behind the other, on a device.

    Attributes:
        documents: the spans of every sample.
        lengths, begins: tokens of every sample, and where it begins; `begins` ends with the end of the last one.
        tokens: N.
        embeddings ([N, hidden]): inputs, in the model's dtype.
        positions (int64 [N]): place in the sample.
        targets (int64 [N]): the next token where that is text, else -100.
        labelled: how many of them are no -100.
    """

    def __init__(self, shape: TrainingShape, device: torch.device, dtype: torch.dtype):
        self.shape, self.device = shape, device
        self.documents = shape.documents
        self.lengths = [image.vision + image.voco + text.length for image, text in self.documents]
        self.begins = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        self.tokens = self.begins[-1]
        generator = torch.Generator().manual_seed(0)
        self.embeddings = torch.randn(self.tokens, shape.hidden, generator=generator).to(device, dtype)
        self.positions = torch.cat([torch.arange(length) for length in self.lengths]).to(device)
        ids = torch.randint(shape.vocab, (self.tokens,), generator=generator)
        # The last VoCo token predicts the first of the text, and the last token of a sample nothing.
        position, ends = self.positions.cpu(), torch.tensor(self.begins[1:]) - 1
        predicts = position >= shape.vision + shape.voco - 1
        predicts[ends] = False
        self.targets = torch.where(predicts, ids, -100).to(device)
        self.labelled = int(predicts.sum())


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch as a data loader hands it over, on the device: B rows of S tokens.

    Attributes:
        samples: which samples it holds, in order.
        documents: the spans of a packed row, padding as text at its end; of a padded batch those of its samples.
        index (int64 [B, S]): which token of the pool stands where; 0 where there is padding.
        valid (bool [B, S]): what is no padding.
        positions (int64 [B, S]): place in the sample; 0 for padding.
        labelled (int64 [T]): places in B * S that predict `targets` (int64 [T]).
    """

    samples: list[int]
    documents: list
    index: torch.Tensor
    valid: torch.Tensor
    positions: torch.Tensor
    labelled: torch.Tensor
    targets: torch.Tensor

    @cached_property
    def layout(self) -> VocoLayout:
        """The layout of a packed row as a data loader hands it over, with its tiles."""
        return VocoLayout.from_spans(self.documents, isolated=True).prepare().to(self.index.device)

    def new_layout(self) -> VocoLayout:
        """One for which nothing is ready."""
        return VocoLayout.from_spans(self.documents, isolated=True).to(self.index.device)


def batch_of(pool: Pool, rows: list[list[int]], width: int | None = None) -> Batch:
    """Samples packed into rows, and rows padded to the longest one, or to `width` tokens."""
    tokens = [torch.cat([torch.arange(pool.begins[i], pool.begins[i + 1]) for i in row]) for row in rows]
    places = pad_sequence(tokens, batch_first=True, padding_value=-1)
    samples = [i for row in rows for i in row]
    documents = [pool.documents[i] for i in samples]
    if width is not None and width > places.shape[1]:
        documents.append((Text(width - places.shape[1]),))
        places = pad(places, (0, width - places.shape[1]), value=-1)
    valid = (places >= 0).to(pool.device)
    index = places.clamp(min=0).to(pool.device)
    targets = torch.where(valid, pool.targets[index], -100).flatten()
    labelled = (targets >= 0).nonzero().flatten()
    return Batch(samples, documents, index, valid, pool.positions[index] * valid, labelled, targets[labelled])


def bins_of(lengths: list[int], capacity: int) -> list[list[int]]:
    """Which samples go into which packed row: as few rows as it takes to hold them, and about equally long ones.

    Long samples first, each to the row that is the shortest so far.

    Raises:
        ValueError: a sample is longer than `capacity`.
    """
    if max(lengths) > capacity:
        raise ValueError(f"capacity must be at least the longest sample's {max(lengths)} tokens, but was {capacity}")
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for number in count(-(-sum(lengths) // capacity)):
        bins, filled = [[] for _ in range(number)], [0] * number
        for i in longest_first:
            shortest = filled.index(min(filled))
            bins[shortest].append(i)
            filled[shortest] += lengths[i]
        if max(filled) <= capacity:
            return bins


# ---- recipes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Recipe:
    """How samples are batched, and what a model is told about it.

    Attributes:
        attention: attn_implementation.
        batches: the micro-batches of a step.
        made: what the model gets besides inputs and positions, as keywords; called in the step, for each batch.
        absent: why it cannot run on this device; None where it may.
    """

    name: str
    attention: str
    batches: list[Batch]
    made: Callable[[Batch], dict]
    absent: str | None = None

    @property
    def slots(self) -> int:
        """Tokens that go through the layers, padding included."""
        return sum(batch.index.numel() for batch in self.batches)


def recipes_of(pool: Pool, compiler=torch.compile) -> list[Recipe]:
    """Ours, the published one, and packed FlexAttention; over the same samples.

    Args:
        compiler: what FlexAttention and its mask are compiled with.
    """
    voco_transformers.register()
    shape = pool.shape
    packed = [batch_of(pool, [row]) for row in bins_of(pool.lengths, shape.capacity)]
    by_length = sorted(range(shape.samples), key=lambda i: -pool.lengths[i])
    return [
        Recipe(OURS, "voco", packed, lambda batch: {"voco_layout": batch.layout}),
        Recipe(BUILT, "voco", packed, lambda batch: {"voco_layout": batch.new_layout()}),
        *(
            Recipe(name, "sdpa", _padded(pool, order), lambda batch: {"attention_mask": dense_mask(batch, shape)})
            for name, order in ((GROUPED, by_length), (RANDOM, range(shape.samples)))
        ),
        _flex(pool, packed, compiler),
    ]


def alone(pool: Pool) -> Recipe:
    """The truth: each sample by itself, without padding, in plain matmuls under the reference's mask."""
    AttentionInterface.register(REFERENCE_ATTENTION, _reference_attention)

    def made(batch: Batch) -> dict:
        layout = VocoLayout.from_spans(batch.documents, isolated=True)
        return {"visible": torch.from_numpy(mask_of_layout(layout)).to(batch.index.device)}

    return Recipe(ALONE, REFERENCE_ATTENTION, [batch_of(pool, [[i]]) for i in range(pool.shape.samples)], made)


def _padded(pool: Pool, order) -> list[Batch]:
    order, size = list(order), pool.shape.batch
    return [batch_of(pool, [[i] for i in order[begin : begin + size]]) for begin in range(0, len(order), size)]


def dense_mask(batch: Batch, shape: TrainingShape) -> torch.Tensor:
    """bool [B, 1, S, S] of a padded batch. Padding sees itself: a row that sees nothing would be NaN."""
    inside = batch.valid & (batch.positions < shape.vision + shape.voco)
    text, public = batch.valid & ~inside, batch.valid & (batch.positions >= shape.vision)
    token = torch.arange(batch.valid.shape[1], device=batch.valid.device)
    seen = (inside[:, :, None] & inside[:, None, :]) | (text[:, :, None] & public[:, None, :])
    causal = token[None, :] <= token[:, None]
    return ((seen & causal) | (token[None, :] == token[:, None]))[:, None]


def _flex(pool: Pool, packed: list[Batch], compiler) -> Recipe:
    # Everything compiled for another pool counts towards the limit behind which torch.compile gives up.
    torch._dynamo.reset()
    AttentionInterface.register(FLEX_ATTENTION, _flex_attention)
    flex, create = (compiler(x, dynamic=False) for x in (flex_attention, create_block_mask))
    width = -(-max(batch.index.shape[1] for batch in packed) // FLEX_BLOCK) * FLEX_BLOCK

    def made(batch: Batch) -> dict:
        rule = MaskRule.of(batch.layout).mask_mod()
        mask = create(rule, None, None, width, width, device=batch.index.device)
        return {"block_mask": mask, "flex": flex}

    absent = None if pool.device.type == "cuda" else "FlexAttention has no backward on a CPU"
    return Recipe(FLEX, FLEX_ATTENTION, [batch_of(pool, [batch.samples], width) for batch in packed], made, absent)


def _flex_attention(module, query, key, value, attention_mask, scaling=None, block_mask=None, flex=None, **kwargs):
    return flex(query, key, value, block_mask=block_mask, scale=scaling).transpose(1, 2).contiguous(), None


def _reference_attention(module, query, key, value, attention_mask, scaling=None, visible=None, **kwargs):
    out, _ = dense_attention(*(x[0].transpose(0, 1) for x in (query, key, value)), visible, scaling)
    return out[None], None
