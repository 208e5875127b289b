"""Compressed K/V as values of their own: joined, cut, moved, saved."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .errors import reject, require_tensor

KV_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUANTISED_DTYPES = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, eq=False)
class VocoKV:
    """The keys and values of T tokens in all L layers of a model; keys before RoPE, so they fit any position.

    Attributes:
        k, v ([L, T, Hkv, D], same dtype and device): keys before RoPE, and values. float16, bfloat16, float32, or int8 or
            float8_e4m3fn with scales.
        k_scale, v_scale (float32 [L, T, Hkv] or None): factors that dequantise k and v.
        segments: (vision, voco) token counts of the images whose VoCo tokens these are, in order; their VoCo counts sum
            to T. None where the tokens are not images'.
        meta: strings that say where the K/V come from (model fingerprint, image hash, ...).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    segments: list[tuple[int, int]] | None = None
    meta: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        require_tensor("k", self.k, ndim=4)
        require_tensor("v", self.v, ndim=4)
        if self.v.shape != self.k.shape:
            reject("v", f"of the shape of k ({list(self.k.shape)})", f"of shape {list(self.v.shape)}")
        if self.v.dtype != self.k.dtype or self.v.device != self.k.device:
            reject("v", f"{self.k.dtype} on {self.k.device}, as k is", f"{self.v.dtype} on {self.v.device}")
        if self.k.dtype not in KV_DTYPES + QUANTISED_DTYPES:
            reject("k", "floating point, int8 or float8_e4m3fn", self.k.dtype)
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if (scale is not None) != (self.k.dtype in QUANTISED_DTYPES):
                reject(name, "given exactly where k and v are quantised", "given" if scale is not None else "None")
            if scale is None:
                continue
            like = (self.k.shape[:3], torch.float32, self.k.device)
            if (require_tensor(name, scale).shape, scale.dtype, scale.device) != like:
                must = f"float32 on {self.k.device} of shape {list(self.k.shape[:3])}"
                reject(name, must, f"{scale.dtype} on {scale.device} of shape {list(scale.shape)}")
        if self.segments is not None:
            for segment in self.segments:
                is_pair = isinstance(segment, Sequence) and len(segment) == 2
                if not is_pair or not all(isinstance(n, int) and n >= 0 for n in segment):
                    reject("segments", "a list of (vision, voco) counts", self.segments)
            if sum(voco for _, voco in self.segments) != self.num_tokens:
                reject("segments", f"of {self.num_tokens} VoCo tokens together", self.segments)
        if not isinstance(self.meta, dict) or not all(isinstance(x, str) for pair in self.meta.items() for x in pair):
            reject("meta", "a dict of strings", self.meta)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.k.shape[0]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        return sum(x.nbytes for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None)

    def to(self, *args, **kwargs) -> "VocoKV":
        """A copy on another device or in another floating dtype (arguments of `torch.Tensor.to`); scales keep float32."""
        k, v = self.k.to(*args, **kwargs), self.v.to(*args, **kwargs)
        if self.k.dtype in QUANTISED_DTYPES and k.dtype != self.k.dtype:
            reject("dtype", f"{self.k.dtype} for quantised K/V", k.dtype)
        scales = (s if s is None else s.to(k.device) for s in (self.k_scale, self.v_scale))
        return VocoKV(k, v, *scales, self.segments, dict(self.meta))

    def quantised(self, dtype: torch.dtype = torch.int8) -> "VocoKV":
        """K/V in int8 or float8_e4m3fn; a scale for each layer, token and head makes its largest number 127 or 448.

        Raises:
            ValueError: K/V that are quantised already or not finite; another dtype.
        """
        if dtype not in QUANTISED_DTYPES:
            reject("dtype", "int8 or float8_e4m3fn", dtype)
        if self.k_scale is not None:
            reject("kv", "not quantised", self.k.dtype)
        (k, k_scale), (v, v_scale) = (_quantised(name, x, dtype) for name, x in (("k", self.k), ("v", self.v)))
        return VocoKV(k, v, k_scale, v_scale, self.segments, dict(self.meta))

    def dequantised(self, dtype: torch.dtype = torch.float32) -> "VocoKV":
        """K/V of a floating dtype: multiplied by their scales in float32, rounded once. ValueError unless quantised."""
        if self.k_scale is None:
            reject("kv", "quantised", self.k.dtype)
        if dtype not in KV_DTYPES:
            reject("dtype", "float16, bfloat16, float32 or float64", dtype)
        k, v = ((x.float() * s[..., None]).to(dtype) for x, s in ((self.k, self.k_scale), (self.v, self.v_scale)))
        return VocoKV(k, v, segments=self.segments, meta=dict(self.meta))

    def __getitem__(self, tokens: slice) -> "VocoKV":
        """Tokens `tokens` (a slice with step 1). Segments are kept where the slice cuts none of them, else dropped."""
        if not isinstance(tokens, slice) or tokens.step not in (None, 1):
            reject("tokens", "a slice with step 1", repr(tokens))
        begin, end, _ = tokens.indices(self.num_tokens)
        scales = (s if s is None else s[:, begin:end] for s in (self.k_scale, self.v_scale))
        segments = _cut_segments(self.segments, begin, max(begin, end))
        return VocoKV(self.k[:, begin:end], self.v[:, begin:end], *scales, segments, dict(self.meta))

    @staticmethod
    def cat(parts: Sequence["VocoKV"]) -> "VocoKV":
        """The tokens of all parts, one part behind the other; meta entries are kept where all parts agree.

        Raises:
            ValueError: no parts, or parts of different layers, heads, dtype, device or quantisation.
        """
        if not parts:
            reject("parts", "at least one VocoKV", "an empty sequence")
        first = parts[0]
        for index, part in enumerate(parts):
            if not isinstance(part, VocoKV):
                reject(f"parts[{index}]", "a VocoKV", type(part).__name__)
            for name in ("k", "v"):
                x, y = getattr(part, name), getattr(first, name)
                if (x.shape[0], *x.shape[2:], x.dtype, x.device) != (y.shape[0], *y.shape[2:], y.dtype, y.device):
                    must = f"{y.dtype} on {y.device} of shape [{y.shape[0]}, T, {y.shape[2]}, {y.shape[3]}]"
                    reject(f"parts[{index}].{name}", must, f"{x.dtype} on {x.device} of shape {list(x.shape)}")
        tensors = (
            None if getattr(first, name) is None else torch.cat([getattr(p, name) for p in parts], dim=1)
            for name in ("k", "v", "k_scale", "v_scale")
        )
        known = all(part.segments is not None for part in parts)
        segments = [segment for part in parts for segment in part.segments] if known else None
        meta = {key: value for key, value in first.meta.items() if all(p.meta.get(key) == value for p in parts)}
        return VocoKV(*tensors, segments, meta)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a format version and a checksum, atomically (see `kv_file`)."""
        from . import kv_file

        kv_file.save(self, path)

    @staticmethod
    def load(path: str | Path) -> "VocoKV":
        """Read a file that `save` wrote; ValueError if it is not whole, not ours, or of a later format."""
        from . import kv_file

        return kv_file.load(path)


def _quantised(name: str, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float()
    largest = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    if not bool(largest.isfinite().all()):
        reject(name, "finite", "of infinities or NaN")
    limit = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = largest / limit
    # Rows of zeros, or of what is as good as zero, stay zeros.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # A subnormal scale is so coarse that a quotient may pass the limit, and int8 would wrap.
    x = (x / scale[..., None]).clamp(-limit, limit)
    return (x.round() if dtype == torch.int8 else x).to(dtype), scale


def _cut_segments(segments, begin: int, end: int) -> list[tuple[int, int]] | None:
    if segments is None:
        return None
    kept, at = [], 0
    for vision, voco in segments:
        if begin <= at and at + voco <= end:
            kept.append((vision, voco))
        elif at < end and begin < at + voco:
            return None
        at += voco
    return kept
