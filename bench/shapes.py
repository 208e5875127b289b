"""The shapes that benchmarks measure, each with the reason why it is one of them, and the work that is useful in them."""

from dataclasses import dataclass

import torch

from voco_kernels import Image, Text, VocoLayout

MATMULS_FORWARD = 2  # scores, and weights times values
MATMULS_BACKWARD = 5  # scores again, dV, dWeights, dQ, dK


@dataclass(frozen=True)
class AttentionShape:
    """One packed batch for attention: documents as `VocoLayout.from_spans` takes them, and the heads."""

    name: str
    reason: str
    documents: tuple[tuple[Text | Image, ...], ...]
    isolated: bool
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 128

    def layout(self) -> VocoLayout:
        """A new layout of this shape on the CPU; nothing is cached for it yet."""
        return VocoLayout.from_spans(self.documents, isolated=self.isolated)

    def flops(self, *, backward: bool) -> int:
        """Floating-point operations of the pairs that the mask allows; softmax is not counted."""
        matmuls = MATMULS_FORWARD + (MATMULS_BACKWARD if backward else 0)
        return 2 * matmuls * useful_pairs(self.layout()) * self.heads * self.head_dim


@dataclass(frozen=True)
class KVShape:
    """Compressed K/V of `images` images of `vision` + `voco` tokens, in all layers of a model."""

    name: str
    reason: str
    images: int
    vision: int
    voco: int
    layers: int = 32
    kv_heads: int = 32
    head_dim: int = 128

    @property
    def tokens(self) -> int:
        """VoCo tokens of all images."""
        return self.images * self.voco

    def moved_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the compressed keys and values, read once and written once."""
        return 2 * 2 * self.layers * self.tokens * self.kv_heads * self.head_dim * dtype.itemsize


def useful_pairs(layout: VocoLayout) -> int:
    """How many (query, key) pairs the mask of a layout allows, in O(N)."""
    segment, public = layout.segment_ids.long(), layout.public.long()
    lengths = layout.cu_seqlens.long().diff()
    index = torch.arange(layout.num_tokens)
    begin = layout.cu_seqlens[:-1].long().repeat_interleave(lengths)
    until = torch.cat([public.new_zeros(1), public.cumsum(0)])  # public keys before a token of the pack
    _, run = segment.unique_consecutive(return_inverse=True)
    run_start = torch.full_like(index, layout.num_tokens).scatter_reduce(0, run, index, "amin")[run]
    seen_by_open = until[index + 1] - until[begin]
    seen_by_segment = index - run_start + 1
    if not layout.isolated:
        seen_by_segment = seen_by_segment + until[run_start] - until[begin]
    return int(torch.where(segment > 0, seen_by_segment, seen_by_open)[segment >= 0].sum())


ATTENTION = {
    shape.name: shape
    for shape in (
        AttentionShape(
            "image",
            "a sample of image-instruction data: one 24 x 24 image as one VoCo token, then a long answer; half of all pairs "
            "below the diagonal are useful, so it shows overheads more than skipped work",
            ((Image(vision=576, voco=1), Text(512)),),
            isolated=True,
        ),
        AttentionShape(
            "frames",
            "a sample of video data: 16 frames of 16 x 16 that do not see each other, then a short answer; a dense mask is "
            "94 % empty",
            ((*(Image(vision=256, voco=2) for _ in range(16)), Text(128)),),
            isolated=True,
        ),
    )
}

KV = {
    shape.name: shape
    for shape in (
        KVShape(
            "image",
            "one image in a chat with a 7B LLaVA: 64 small rows in and out, so calls and not bytes cost time",
            images=1,
            vision=576,
            voco=2,
        ),
        KVShape(
            "video",
            "a video of 64 frames, compressed one by one and then put into one cache: 128 tokens in 32 layers",
            images=64,
            vision=256,
            voco=2,
        ),
    )
}
