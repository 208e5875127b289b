"""The shapes that benchmarks measure, each with the reason why it is one of them, and the work that is useful in them."""

from dataclasses import dataclass, replace

import torch

from voco_kernels import Image, Text, VocoLayout
from voco_kernels.tiles import useful_pairs

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

    def moved_bytes(self, dtype: torch.dtype, *, backward: bool) -> int:
        """Bytes of q, k, v and out, read or written once.

        A backward reads q, k, v and out again, and the gradient of out, and writes the gradients of q, k and v.
        """
        tensors = 2 + (4 if backward else 0)  # of each: q's heads, and k's heads
        return self.layout().num_tokens * tensors * (self.heads + self.kv_heads) * self.head_dim * dtype.itemsize

    def shrunk(self, most_tokens: int = 4096, key_heads: int = 1) -> "AttentionShape":
        """The same with few spans, documents and heads, for which N * N numbers fit into memory.

        Long documents keep their first spans and the last one; then as many documents are kept as fit, at least one.
        """
        documents = [d if len(d) <= 6 else (*d[:5], d[-1]) for d in self.documents]
        while len(documents) > 1 and sum(map(_tokens, documents)) > most_tokens:
            documents.pop()
        group = self.heads // self.kv_heads
        return replace(self, documents=tuple(documents), heads=group * key_heads, kv_heads=key_heads)


def _tokens(document: tuple[Text | Image, ...]) -> int:
    return sum(span.length if isinstance(span, Text) else span.vision + span.voco for span in document)


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


@dataclass(frozen=True)
class DecodeShape:
    """One new token of each of `requests` requests, of `own` keys each behind a prefix that all share."""

    name: str
    reason: str
    prefix: int
    requests: int
    own: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def flops(self) -> float:
        """Floating-point operations on the query-key pairs that there are."""
        return 4.0 * self.requests * self.heads * (self.prefix + self.own) * self.head_dim

    def moved_bytes(self, dtype: torch.dtype, stored: torch.dtype) -> int:
        """Bytes of the prefix (scales too where it is quantised), own keys and values, queries and results, each once."""
        rows = self.kv_heads * self.head_dim
        scales = 0 if stored.itemsize > 1 else 2 * 4 * self.prefix * self.kv_heads
        own = 2 * self.requests * self.own * rows + 2 * self.requests * self.heads * self.head_dim
        return 2 * self.prefix * rows * stored.itemsize + scales + own * dtype.itemsize


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

# A LLaMA-7B layer: 32 heads of 128. About 16k tokens, a common pack, except for the long video.
_VIDEO = ((*(Image(vision=256, voco=2) for _ in range(64)), Text(256)),)
GPU = {
    shape.name: shape
    for shape in (
        AttentionShape(
            "sft",
            "image-instruction data, packed: one 24 x 24 image and an answer a document; it replaces a padded batch with a "
            "dense mask",
            ((Image(vision=576, voco=2), Text(300)),) * 19,
            isolated=True,
            heads=32,
            kv_heads=32,
        ),
        AttentionShape(
            "anyres",
            "images of five crops: segments so long that nothing but matmuls counts; flash-attention is at its best",
            ((Image(vision=2880, voco=8), Text(400)),) * 5,
            isolated=True,
            heads=32,
            kv_heads=32,
        ),
        AttentionShape(
            "video",
            "64 frames that do not see each other, then text: what tiles that end with a frame are made for",
            _VIDEO,
            isolated=True,
            heads=32,
            kv_heads=32,
        ),
        AttentionShape(
            "long_video",
            "256 frames: 68k tokens, for which nobody has room for a mask",
            ((*(Image(vision=256, voco=8) for _ in range(256)), Text(512)),),
            isolated=True,
            heads=32,
            kv_heads=32,
        ),
        AttentionShape(
            "chat",
            "16 turns with an image each, in which images see the conversation before them: no varlen split without copies",
            (tuple(span for _ in range(16) for span in (Text(64), Image(vision=576, voco=2), Text(128))),),
            isolated=False,
            heads=32,
            kv_heads=32,
        ),
        AttentionShape(
            "gqa",
            "the video with 8 key heads, as newer models have them",
            _VIDEO,
            isolated=True,
            heads=32,
            kv_heads=8,
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

GPU_KV = {
    **KV,
    "long_video": KVShape(
        "long_video",
        "1,600 frames of 8 tokens, 6.7 GB in half precision: so much that only the memory's speed counts",
        images=1600,
        vision=256,
        voco=8,
    ),
}

DECODE = {
    shape.name: shape
    for shape in (
        DecodeShape(
            "video", "32 questions about a video of 512 frames of 4 tokens", prefix=2048, requests=32, own=32, heads=8,
            kv_heads=2, head_dim=64,
        ),
    )
}  # fmt: skip

GPU_DECODE = {
    shape.name: shape
    for shape in (
        DecodeShape(
            "video", "64 questions about a video of 8k VoCo tokens, with the heads of LLaMA-7B", prefix=8192, requests=64,
            own=64, heads=32, kv_heads=32, head_dim=128,
        ),
        DecodeShape(
            "gqa", "the same with 8 key heads, as newer models have them: 256 rows meet a key", prefix=8192, requests=64,
            own=64, heads=32, kv_heads=8, head_dim=128,
        ),
    )
}  # fmt: skip

# What grows in the scaling suite, and how far. Peers leave off where memory or patience ends.
FRAMES = (1, 4, 16, 64, 256, 2048)
TEXT = (64, 512, 4096)


def frames_shape(frames: int, heads: int, head_dim: int) -> AttentionShape:
    """A video of `frames` frames that do not see each other, and a short text: all work but the text's grows linearly."""
    reason = "how cost grows with a video, of which a mask has the square"
    documents = ((*[Image(vision=256, voco=2)] * frames, Text(128)),)
    return AttentionShape(f"{frames} frames", reason, documents, True, heads, heads, head_dim)


def text_shape(length: int, heads: int, head_dim: int) -> AttentionShape:
    """16 frames and a text of `length` tokens, which is causal and so grows with its square for everyone."""
    reason = "how cost grows with the text, in which there is nothing to skip but frames"
    documents = ((*[Image(vision=256, voco=2)] * 16, Text(length)),)
    return AttentionShape(f"{length} text tokens", reason, documents, True, heads, heads, head_dim)
