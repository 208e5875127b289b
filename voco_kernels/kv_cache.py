"""Compressed K/V as values of their own: take them out of a model's keys and values, keep them, put them into a cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import backends, ops
from .errors import reject, require_integers, require_tensor

KV_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUANTISED_DTYPES = (torch.int8, torch.float8_e4m3fn)
MAX_POSITION = 1 << 20


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


def extract_kv(
    keys: torch.Tensor | Sequence[torch.Tensor],
    values: torch.Tensor | Sequence[torch.Tensor],
    index: torch.Tensor,
    positions: torch.Tensor | None = None,
    inv_freq: torch.Tensor | None = None,
    attention_scaling: float = 1.0,
    backend: str = "auto",
    *,
    check: bool = False,
) -> VocoKV:
    """Take the K/V of selected tokens out of a model's keys and values. Not differentiable.

    Keys that went through RoPE are rotated back: R(-position) k / attention_scaling in float32, rounded once.

    Args:
        keys, values: L tensors [N, Hkv, D] or one [L, N, Hkv, D]; any strides. A Hugging Face cache layer [B, Hkv, S, D] is
            passed as `layer.keys[b].transpose(0, 1)`.
        index (int64 [T]): tokens to take, 0 to N-1.
        positions (int64 [T]): positions of the selected tokens; given exactly where the keys are after RoPE.
        inv_freq (float [D/2]), attention_scaling: of the model's rotary embedding; needed with `positions`.
        backend: "auto" or "torch".
        check: check the values of `index` and `positions` on a device too (synchronises).

    Returns:
        VocoKV with k, v [L, T, Hkv, D], copies of the dtype of the inputs.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value.
    """
    keys, values = _layers("keys", keys, (3,)), _layers("values", values, (3,))
    _check_layers("values", values, keys)
    n, _, head_dim = keys[0].shape
    require_integers("index", index)
    require_tensor("index", index, ndim=1)
    _check_device("index", index, keys[0])
    _check_range("index", index, 0, n - 1, check)
    if (positions is None) != (inv_freq is None):
        reject("inv_freq", "given exactly where positions are", "None" if inv_freq is None else "given")
    if positions is not None:
        _check_rotation(positions, inv_freq, attention_scaling, index.shape[0], head_dim, keys[0], check)
    name = "torch" if backend == "auto" else backend
    with torch.no_grad():
        if torch.compiler.is_compiling():
            k, v = ops.extract_kv_op(keys, values, index, positions, inv_freq, float(attention_scaling), name)
        else:
            module = backends.load(backends.KV, name)
            k, v = module.extract_kv(keys, values, index, positions, inv_freq, attention_scaling)
    return VocoKV(k, v)


def inject_kv(
    kv: VocoKV,
    k_cache: torch.Tensor | Sequence[torch.Tensor],
    v_cache: torch.Tensor | Sequence[torch.Tensor],
    slots: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float = 1.0,
    backend: str = "auto",
    *,
    check: bool = False,
) -> None:
    """Write K/V into the cache of a model, keys rotated to their positions. Not differentiable.

    A key becomes `attention_scaling * R(position) k` in float32 (the angle is the float32 product position x inv_freq, as in
    transformers), rounded once to the cache's dtype; values are copied. Slots that are not named keep their bits.

    Args:
        kv: T tokens of L layers.
        k_cache, v_cache: written in place. L tensors or one with a leading dimension L; each [slots, Hkv, D], or paged
            [blocks, block, Hkv, D] where slot s is row s % block of block s // block. Any strides: a Hugging Face cache
            [B, Hkv, S, D] is passed as `.transpose(1, 2)`, B blocks of S slots.
        slots (int64 [T]): where each token goes; -1 skips it; otherwise no slot twice.
        positions (int64 [T]): RoPE positions, -2^20 to 2^20.
        inv_freq (float [D/2]), attention_scaling: of the model's rotary embedding.
        backend: "auto" or "torch".
        check: check the values of `slots` and `positions` on a device too (synchronises).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value; nothing is written then.
    """
    if not isinstance(kv, VocoKV):
        reject("kv", "a VocoKV", type(kv).__name__)
    k_caches, v_caches = _layers("k_cache", k_cache, (3, 4)), _layers("v_cache", v_cache, (3, 4))
    _check_layers("v_cache", v_caches, k_caches)
    if len(k_caches) != kv.num_layers:
        reject("k_cache", f"of {kv.num_layers} layers, as kv is", f"of {len(k_caches)}")
    if tuple(k_caches[0].shape[-2:]) != tuple(kv.k.shape[-2:]):
        must = f"of {kv.k.shape[2]} heads of {kv.k.shape[3]}, as kv is"
        reject("k_cache", must, f"of shape {list(k_caches[0].shape)}")
    for name, caches in (("k_cache", k_caches), ("v_cache", v_caches)):
        for x in caches:
            if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
                reject(name, "memory of its own for every element", f"expanded (strides {list(x.stride())})")
    _check_device("kv", kv.k, k_caches[0])
    require_integers("slots", slots, shape=(kv.num_tokens,))
    _check_device("slots", slots, k_caches[0])
    num_slots = k_caches[0].shape[:-2].numel()
    _check_range("slots", slots, -1, num_slots - 1, check)
    if _may_read(slots, check):
        used, counts = slots[slots >= 0].unique(return_counts=True)
        if bool((counts > 1).any()):
            reject("slots", "different from each other (or -1)", f"{int(used[counts > 1][0])} more than once")
    _check_rotation(positions, inv_freq, attention_scaling, kv.num_tokens, kv.k.shape[3], k_caches[0], check)
    name = "torch" if backend == "auto" else backend
    arguments = (kv.k, kv.v, kv.k_scale, kv.v_scale, k_caches, v_caches, slots, positions, inv_freq)
    with torch.no_grad():
        if torch.compiler.is_compiling():
            ops.inject_kv_op(*arguments, float(attention_scaling), name)
        else:
            backends.load(backends.KV, name).inject_kv(*arguments, attention_scaling)


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


def _layers(name: str, tensors: torch.Tensor | Sequence[torch.Tensor], ndims: tuple[int, ...]) -> list[torch.Tensor]:
    """One tensor per layer, all of one shape, dtype and device."""
    if isinstance(tensors, torch.Tensor):
        if tensors.ndim - 1 not in ndims:
            must = " or ".join(f"[L, {'blocks, block' if n == 4 else 'N'}, Hkv, D]" for n in ndims)
            reject(name, f"of shape {must}, or a list of layers", f"of shape {list(tensors.shape)}")
        tensors = tensors.unbind(0)
    layers = [require_tensor(f"{name}[{i}]", x) for i, x in enumerate(tensors)]
    if not layers:
        reject(name, "at least one layer", "empty")
    first = layers[0]
    for i, x in enumerate(layers):
        if x.ndim not in ndims or x.dtype not in KV_DTYPES:
            must = f"floating point of {' or '.join(map(str, ndims))} dimensions"
            reject(f"{name}[{i}]", must, f"{x.dtype} of shape {list(x.shape)}")
        if (x.shape, x.dtype, x.device) != (first.shape, first.dtype, first.device):
            must = f"{first.dtype} on {first.device} of shape {list(first.shape)}, as {name}[0] is"
            reject(f"{name}[{i}]", must, f"{x.dtype} on {x.device} of shape {list(x.shape)}")
    return layers


def _check_layers(name: str, layers: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    x, y = layers[0], others[0]
    if len(layers) != len(others) or (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device):
        must = f"{len(others)} layers, {y.dtype} on {y.device} of shape {list(y.shape)}"
        reject(name, must, f"{len(layers)} layers, {x.dtype} on {x.device} of shape {list(x.shape)}")


def _check_device(name: str, x: torch.Tensor, like: torch.Tensor) -> None:
    if x.device != like.device:
        reject(name, f"on {like.device}", f"on {x.device}")


def _may_read(x: torch.Tensor, check: bool) -> bool:
    """Whether values may be looked at: always on the CPU, on a device when asked to, never while a graph is traced."""
    return (check or x.device.type == "cpu") and not torch.compiler.is_compiling()


def _check_range(name: str, x: torch.Tensor, low: int, high: int, check: bool) -> None:
    if _may_read(x, check) and x.numel():
        least, most = int(x.min()), int(x.max())
        if least < low or most > high:
            reject(name, f"between {low} and {high}", least if least < low else most)


def _check_rotation(positions, inv_freq, attention_scaling, tokens: int, head_dim: int, like, check: bool) -> None:
    require_integers("positions", positions, shape=(tokens,))
    _check_device("positions", positions, like)
    _check_range("positions", positions, -MAX_POSITION, MAX_POSITION, check)
    if not require_tensor("inv_freq", inv_freq).is_floating_point() or tuple(inv_freq.shape) != (head_dim // 2,):
        must = f"floating point of shape [{head_dim // 2}] (half of head_dim {head_dim})"
        reject("inv_freq", must, f"{inv_freq.dtype} of shape {list(inv_freq.shape)}")
    _check_device("inv_freq", inv_freq, like)
    if head_dim % 2:
        reject("head_dim", "even for RoPE", head_dim)
    if not 0 < attention_scaling < math.inf:
        reject("attention_scaling", "finite and above 0", attention_scaling)
