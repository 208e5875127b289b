"""The K/V path: take K/V out of a model's keys and values, put them into a cache of any form."""

import math
from collections.abc import Sequence
from numbers import Real

import torch

from . import backends, ops
from .errors import reject, require_integers, require_tensor
from .kv_cache import KV_DTYPES, VocoKV

MAX_POSITION = 1 << 20


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
        backend: "auto", "torch", "triton" or "cuda"; the last two move all layers in one launch. "auto" takes "cuda" on a
            GPU that the compiled module serves, else "triton", and "torch" everywhere else.
        check: check the values of `index` and `positions` on a device too (synchronises). Unchecked, a token out of range
            becomes NaN ("triton", "cuda") or a device-side assertion ("torch").

    Returns:
        VocoKV with k, v [L, T, Hkv, D], copies of the dtype of the inputs.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value; a backend that cannot serve them.
    """
    keys, values = _checked_extraction(keys, values, index, positions, inv_freq, attention_scaling, check)
    arguments = (keys, values, index, positions, inv_freq, float(attention_scaling))
    if torch.compiler.is_compiling():
        with torch.no_grad():
            return VocoKV(*ops.extract_kv_op(*arguments, backend))
    module = _backend(backend, keys[0].dtype, keys[0])
    out_k, out_v = ops.extracted_like(keys, values, index)
    module.extraction(*arguments, out_k, out_v)()
    return VocoKV(out_k, out_v)


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
    transformers), rounded once to the cache's dtype; values are copied; quantised ones are multiplied by their scale first.
    Slots that are not named keep their bits.

    Args:
        kv: T tokens of L layers.
        k_cache, v_cache: written in place. L tensors or one with a leading dimension L; each [slots, Hkv, D], or paged
            [blocks, block, Hkv, D] where slot s is row s % block of block s // block. Any strides: a Hugging Face cache
            [B, Hkv, S, D] is passed as `.transpose(1, 2)`, B blocks of S slots.
        slots (int64 [T]): where each token goes; -1 skips it; otherwise no slot twice.
        positions (int64 [T]): RoPE positions, -2^20 to 2^20.
        inv_freq (float [D/2]), attention_scaling: of the model's rotary embedding.
        backend: as in `extract_kv`.
        check: check the values of `slots` and `positions` on a device too (synchronises). Unchecked, and inside a graph that
            is traced, a slot outside the caches is skipped, and of a slot that is named twice nobody knows what it holds.

    autograd is not told that the caches change.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, or a backend that cannot serve them; nothing is
            written then.
    """
    caches = _checked_caches(k_cache, v_cache)
    _check_kv(kv, caches[0])
    _check_targets(caches[0], kv.num_tokens, slots, positions, inv_freq, attention_scaling, check)
    where = (*caches, slots, positions, inv_freq, float(attention_scaling))
    if torch.compiler.is_compiling():
        with torch.no_grad():
            ops.inject_kv_op(kv.k, kv.v, kv.k_scale, kv.v_scale, *where, backend)
    else:
        run = _backend(backend, kv.k.dtype, caches[0][0]).injection(*where)
        run(kv.k, kv.v, kv.k_scale, kv.v_scale)


class ExtractionPlan:
    """`extract_kv` prepared for many calls on the same tensors: checked once, and results go to the same place.

    `extract()` neither allocates nor waits (backends "triton" and "cuda"), so a CUDA graph can hold it. It reads the tensors
    as they are then: keys, values, index and positions may be changed in place between calls. Triton compiles at the first
    call, so make one before capturing.

    Args:
        keys, values, index, positions, inv_freq, attention_scaling, backend: as in `extract_kv`. index and positions must be
            contiguous; their values are checked now, on a device too (synchronises).
        out: where the results go, contiguous, [L, T, Hkv, D] of the dtype of the keys; made where None.

    Raises:
        ValueError: as `extract_kv`.
    """

    def __init__(
        self, keys, values, index, positions=None, inv_freq=None, attention_scaling=1.0, backend="auto", *, out=None
    ):
        keys, values = _checked_extraction(keys, values, index, positions, inv_freq, attention_scaling, check=True)
        for name, x in (("index", index), ("positions", positions)):
            _check_contiguous(name, x)
        if out is None:
            out = VocoKV(*ops.extracted_like(keys, values, index))
        elif not isinstance(out, VocoKV):
            reject("out", "a VocoKV", type(out).__name__)
        shape = (len(keys), index.shape[0], *keys[0].shape[1:])
        for name, x in (("out.k", out.k), ("out.v", out.v)):
            if (tuple(x.shape), x.dtype, x.device) != (shape, keys[0].dtype, keys[0].device):
                must = f"{keys[0].dtype} on {keys[0].device} of shape {list(shape)}"
                reject(name, must, f"{x.dtype} on {x.device} of shape {list(x.shape)}")
            _check_contiguous(name, x)
        module = _backend(backend, keys[0].dtype, keys[0])
        self.out = out
        self._run = module.extraction(
            keys, values, index, positions, inv_freq, float(attention_scaling), out.k, out.v
        )

    def extract(self) -> VocoKV:
        """Write the K/V of the selected tokens into `out`, and return it."""
        self._run()
        return self.out


class InjectionPlan:
    """`inject_kv` prepared for many calls into the same slots: everything but the K/V is checked once.

    `inject(kv)` neither allocates nor waits (backends "triton" and "cuda"), so a CUDA graph can hold it. It reads slots and
    positions as they are then, so they may be changed in place between calls. A slot outside the caches is skipped.
    Make the plan on the stream that uses it, and of separate layers before a capture begins; Triton compiles at the first
    call, so make one before, too.

    Args:
        k_cache, v_cache, slots, positions, inv_freq, attention_scaling, backend: as in `inject_kv`. slots and positions must
            be contiguous; their values are checked now, on a device too (synchronises). "auto" chooses for K/V of the dtype
            of the caches or quantised; float64 needs "torch".

    Raises:
        ValueError: as `inject_kv`.
    """

    def __init__(self, k_cache, v_cache, slots, positions, inv_freq, attention_scaling=1.0, backend="auto"):
        self._caches = _checked_caches(k_cache, v_cache)
        first = self._caches[0][0]
        tokens = require_integers("slots", require_tensor("slots", slots, ndim=1)).shape[0]
        _check_targets(self._caches[0], tokens, slots, positions, inv_freq, attention_scaling, check=True)
        for name, x in (("slots", slots), ("positions", positions)):
            _check_contiguous(name, x)
        self._backend = backends.resolved_kv(backend, first.dtype, first)
        module = backends.load_kv(self._backend, first.dtype, first)
        self._form = (first.dtype, (len(self._caches[0]), tokens, *first.shape[-2:]), first.device)
        self._run = module.injection(*self._caches, slots, positions, inv_freq, float(attention_scaling))

    def inject(self, kv: VocoKV) -> None:
        """Write `kv`, T tokens of L layers; ValueError where it does not fit the plan, and nothing is written then."""
        if not isinstance(kv, VocoKV) or (kv.k.dtype, kv.k.shape, kv.k.device) != self._form:
            self._accept(kv)
        self._run(kv.k, kv.v, kv.k_scale, kv.v_scale)

    def _accept(self, kv: VocoKV) -> None:
        _check_kv(kv, self._caches[0])
        _, shape, device = self._form
        if kv.num_tokens != shape[1]:
            reject("kv", f"of {shape[1]} tokens, as the plan is", f"of {kv.num_tokens}")
        backends.load_kv(self._backend, kv.k.dtype, self._caches[0][0])
        self._form = (kv.k.dtype, shape, device)


def _backend(name: str, kv_dtype: torch.dtype, cache: torch.Tensor):
    return backends.load_kv(backends.resolved_kv(name, kv_dtype, cache), kv_dtype, cache)


def _checked_extraction(keys, values, index, positions, inv_freq, attention_scaling, check: bool):
    keys, values = _layers("keys", keys, (3,)), _layers("values", values, (3,))
    _check_layers("values", values, keys)
    n, _, head_dim = keys[0].shape
    require_integers("index", index)
    require_tensor("index", index, ndim=1)
    _check_device("index", index, keys[0])
    _check_range("index", index, 0, n - 1, check)
    if (positions is None) != (inv_freq is None):
        reject("inv_freq", "given exactly where positions are", "None" if inv_freq is None else "given")
    _check_scaling(attention_scaling)
    if positions is not None:
        _check_rotation(positions, inv_freq, index.shape[0], head_dim, keys[0], check)
    return keys, values


def _checked_caches(k_cache, v_cache) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    k_caches, v_caches = _layers("k_cache", k_cache, (3, 4)), _layers("v_cache", v_cache, (3, 4))
    _check_layers("v_cache", v_caches, k_caches)
    for name, caches in (("k_cache", k_caches), ("v_cache", v_caches)):
        for x in caches:
            if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
                reject(name, "memory of its own for every element", f"expanded (strides {list(x.stride())})")
    if not torch.compiler.is_compiling():
        addresses = [x.data_ptr() for x in (*k_caches, *v_caches) if x.numel() and x.device.type != "meta"]
        if len(set(addresses)) < len(addresses):
            reject("v_cache", "memory that neither k_cache nor another layer has", "a tensor that was given twice")
    return k_caches, v_caches


def _check_kv(kv: VocoKV, k_caches: list[torch.Tensor]) -> None:
    if not isinstance(kv, VocoKV):
        reject("kv", "a VocoKV", type(kv).__name__)
    if len(k_caches) != kv.num_layers:
        reject("k_cache", f"of {kv.num_layers} layers, as kv is", f"of {len(k_caches)}")
    if tuple(k_caches[0].shape[-2:]) != tuple(kv.k.shape[-2:]):
        must = f"of {kv.k.shape[2]} heads of {kv.k.shape[3]}, as kv is"
        reject("k_cache", must, f"of shape {list(k_caches[0].shape)}")
    _check_device("kv", kv.k, k_caches[0])


def _check_targets(k_caches, tokens: int, slots, positions, inv_freq, attention_scaling, check: bool) -> None:
    """Where `tokens` tokens go: their slots and positions."""
    require_integers("slots", slots, shape=(tokens,))
    _check_device("slots", slots, k_caches[0])
    _check_range("slots", slots, -1, k_caches[0].shape[:-2].numel() - 1, check)
    if _may_read(slots, check):
        used, counts = slots[slots >= 0].unique(return_counts=True)
        if bool((counts > 1).any()):
            reject("slots", "different from each other (or -1)", f"{int(used[counts > 1][0])} more than once")
    _check_scaling(attention_scaling)
    _check_rotation(positions, inv_freq, tokens, k_caches[0].shape[-1], k_caches[0], check)


def _check_contiguous(name: str, x: torch.Tensor | None) -> None:
    if x is not None and not x.is_contiguous():
        reject(name, "contiguous", f"of strides {list(x.stride())}")


def _layers(name: str, tensors: torch.Tensor | Sequence[torch.Tensor], ndims: tuple[int, ...]) -> list[torch.Tensor]:
    """One tensor per layer, all of one shape, dtype and device."""
    if isinstance(tensors, torch.Tensor):
        if tensors.ndim - 1 not in ndims:
            must = " or ".join(f"[L, {'blocks, block' if n == 4 else 'N'}, Hkv, D]" for n in ndims)
            reject(name, f"of shape {must}, or a list of layers", f"of shape {list(tensors.shape)}")
        tensors = tensors.unbind(0)
    elif not isinstance(tensors, Sequence):
        reject(name, "a tensor or a list of layers", type(tensors).__name__)
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


def _check_scaling(attention_scaling) -> None:
    if not isinstance(attention_scaling, Real) or not 0 < attention_scaling < math.inf:
        reject("attention_scaling", "finite and above 0", attention_scaling)


def _check_rotation(positions, inv_freq, tokens: int, head_dim: int, like, check: bool) -> None:
    require_integers("positions", positions, shape=(tokens,))
    _check_device("positions", positions, like)
    _check_range("positions", positions, -MAX_POSITION, MAX_POSITION, check)
    if not require_tensor("inv_freq", inv_freq).is_floating_point() or tuple(inv_freq.shape) != (head_dim // 2,):
        must = f"floating point of shape [{head_dim // 2}] (half of head_dim {head_dim})"
        reject("inv_freq", must, f"{inv_freq.dtype} of shape {list(inv_freq.shape)}")
    _check_device("inv_freq", inv_freq, like)
    if head_dim % 2:
        reject("head_dim", "even for RoPE", head_dim)
