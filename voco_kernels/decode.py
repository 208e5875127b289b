"""`decode_attention`: the newest tokens of many requests, groups of which share one prefix of VoCo tokens."""

import math
from dataclasses import dataclass

import torch

from . import backends, ops
from .attention import DTYPES
from .errors import reject, require_tensor
from .kv_cache import QUANTISED_DTYPES, VocoKV
from .kv_path import inject_kv

MOST_TOKENS = 16


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """Keys and values that groups of requests share, one layer's; such as those of a video about which many ask.

    Group g is the requests cu_requests[g] to cu_requests[g+1] - 1, all of which see the tokens cu_prefix[g] to
    cu_prefix[g+1] - 1. Every request is in one group; a group may have no tokens.

    Attributes:
        k, v ([P, Hkv, D], same dtype and device): keys after RoPE, and values; of the dtype of the queries, or int8 or
            float8_e4m3fn with scales. Any strides.
        cu_prefix, cu_requests (int32 [G+1], on that device, non-decreasing): ends of the groups' tokens and requests. They
            may be changed in place between calls.
        k_scale, v_scale (float32 [P, Hkv] or None): factors that dequantise k and v, for each token and head.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """

    k: torch.Tensor
    v: torch.Tensor
    cu_prefix: torch.Tensor
    cu_requests: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def __post_init__(self):
        require_tensor("prefix.k", self.k, ndim=3)
        require_tensor("prefix.v", self.v, ndim=3)
        if self.k.dtype not in DTYPES + QUANTISED_DTYPES:
            reject("prefix.k", "floating point, int8 or float8_e4m3fn", self.k.dtype)
        _require_like("prefix.v", self.v, self.k.shape, self.k.dtype, self.k.device)
        for name, scale in (("prefix.k_scale", self.k_scale), ("prefix.v_scale", self.v_scale)):
            if (scale is not None) != (self.k.dtype in QUANTISED_DTYPES):
                reject(name, "given exactly where k and v are quantised", "given" if scale is not None else "None")
            if scale is not None:
                _require_like(name, require_tensor(name, scale), self.k.shape[:2], torch.float32, self.k.device)
        groups = require_tensor("prefix.cu_prefix", self.cu_prefix, ndim=1).shape[0] - 1
        if groups < 1:
            reject("prefix.cu_prefix", "of at least one group (two elements)", f"of shape {list(self.cu_prefix.shape)}")
        for name, x in (("prefix.cu_prefix", self.cu_prefix), ("prefix.cu_requests", self.cu_requests)):
            _require_like(name, require_tensor(name, x), (groups + 1,), torch.int32, self.k.device)

    @staticmethod
    def from_kv(
        kv: VocoKV,
        layer: int,
        positions: torch.Tensor,
        inv_freq: torch.Tensor,
        attention_scaling: float = 1.0,
        *,
        dtype: torch.dtype,
        cu_prefix: torch.Tensor,
        cu_requests: torch.Tensor,
    ) -> "SharedPrefix":
        """One layer of stored K/V as a prefix: keys rotated to their positions in float32, then rounded or quantised once.

        Args:
            kv: of P tokens; quantised or not.
            layer: which of its layers.
            positions (int64 [P]), inv_freq (float [D/2]), attention_scaling: as in `inject_kv`.
            dtype: of the prefix; int8 and float8_e4m3fn get scales (`VocoKV.quantised`, which waits for a device).
            cu_prefix, cu_requests: as in the class.

        Raises:
            ValueError: as `inject_kv`, `VocoKV.quantised` and the class.
        """
        if not isinstance(kv, VocoKV):
            reject("kv", "a VocoKV", type(kv).__name__)
        if not isinstance(layer, int) or not 0 <= layer < kv.num_layers:
            reject("layer", f"from 0 to {kv.num_layers - 1}", repr(layer))
        if dtype not in DTYPES + QUANTISED_DTYPES:
            reject("dtype", "floating point, int8 or float8_e4m3fn", dtype)
        scales = (s if s is None else s[layer : layer + 1] for s in (kv.k_scale, kv.v_scale))
        one = VocoKV(kv.k[layer : layer + 1], kv.v[layer : layer + 1], *scales)
        quantise = dtype in QUANTISED_DTYPES
        k, v = (torch.empty(one.k.shape, dtype=torch.float32 if quantise else dtype, device=one.k.device) for _ in "kv")
        slots = torch.arange(one.num_tokens, device=one.k.device)
        inject_kv(one, k, v, slots, positions, inv_freq, attention_scaling)
        done = VocoKV(k, v).quantised(dtype) if quantise else VocoKV(k, v)
        scales = (s if s is None else s[0] for s in (done.k_scale, done.v_scale))
        return SharedPrefix(done.k[0], done.v[0], cu_prefix, cu_requests, *scales)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    prefix: SharedPrefix | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    check: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of the newest tokens of each request to its own keys and to the prefix of its group. Not differentiable.

    Query t of a request sees its own keys 0 to length - T + t, and all tokens of the prefix. The prefix is read once for the
    requests of a group, not once for each; what comes of it and of the own keys is merged by the log-sum-exp.

    Args:
        q ([R, T, Hq, D]): the T newest tokens of each request, T from 1 to 16; float16, bfloat16, float32 (or float64 for
            tests). Any strides.
        k_cache, v_cache ([R, S, Hkv, D], or [blocks, block, Hkv, D] with a block table): own keys after RoPE, those of the
            query tokens included, and values; dtype and device of q, any strides. Hq is a multiple of Hkv.
        lengths (int32 [R], on the device of q): own keys of each request, at most S or max_blocks * block. Where a length
            is below T, the queries before the first key see the prefix only.
        block_table (int32 [R, max_blocks]): key i of request r is row i % block of block block_table[r, i // block]. Keys of
            an entry that is no block are never read, and nobody sees them.
        prefix: of R requests, with the heads and head_dim of the caches.
        scale: factor on the scores, above 0; 1/sqrt(D) where None.
        backend: "auto" or "torch" (any device; waits for the values of lengths and groups), or "cuda" (float16 and bfloat16,
            head_dim 64, 96, 128, 256; waits for nothing, so a CUDA graph can hold it, and lengths, tables and groups may be
            changed in place between its replays). "auto" is "torch" everywhere: no GPU has measured the other yet.
        return_lse: also return the log-sum-exp of the scaled scores.
        check: check the values of lengths, cu_prefix and cu_requests on a device too (synchronises); on the CPU they always
            are; in graphs of torch.compile never. Unchecked, what lies outside is cut off, and what a request in no group or
            in two gets nobody knows.

    Returns:
        out ([R, T, Hq, D], dtype of q): zeros for a query that sees nothing.
        lse ([R, T, Hq], float32; float64 for float64), only with `return_lse`: natural log, -inf for such a query.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype, device or value, one that requires a gradient while
            gradients are recorded, or a backend that cannot serve.

    Example:
        >>> k = v = torch.randn(2, 8, 1, 32)
        >>> lengths = torch.tensor([3, 8], dtype=torch.int32)
        >>> decode_attention(torch.randn(2, 1, 4, 32), k, v, lengths).shape
        torch.Size([2, 1, 4, 32])
    """
    capacity = _check_inputs(q, k_cache, v_cache, lengths, block_table, scale)
    if prefix is not None:
        _check_prefix(prefix, q, k_cache)
    _check_values(q.shape[0], capacity, lengths, prefix, check)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if torch.compiler.is_compiling():
        out, lse = ops.decode_attention(q, k_cache, v_cache, lengths, block_table, prefix, scale, backend)
    else:
        stored = None if prefix is None else prefix.k.dtype
        module = backends.load_decode(backends.resolved_decode(backend), q, stored)
        with torch.no_grad():
            out, lse = module.decode(q, k_cache, v_cache, lengths, block_table, prefix, scale)
    return (out, lse) if return_lse else out


def _check_inputs(q, k_cache, v_cache, lengths, block_table, scale) -> int:
    """The most keys that a request may have."""
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        require_tensor(name, x, ndim=4)
        if x.dtype not in DTYPES:
            reject(name, "of dtype float16, bfloat16, float32 or float64", x.dtype)
        if x.dtype != q.dtype or x.device != q.device:
            reject(name, f"{q.dtype} on {q.device}, as q is", f"{x.dtype} on {x.device}")
        if torch.is_grad_enabled() and x.requires_grad:
            reject(name, "without a gradient (decoding has none; use torch.no_grad())", "a tensor that requires one")
    requests, tokens, heads, head_dim = q.shape
    if not 1 <= tokens <= MOST_TOKENS:
        reject("q", f"of 1 to {MOST_TOKENS} tokens a request", f"of shape {list(q.shape)}")
    if heads < 1 or head_dim < 1:
        reject("q", "of at least one head and head_dim at least 1", f"of shape {list(q.shape)}")
    if v_cache.shape != k_cache.shape:
        reject("v_cache", f"of the shape of k_cache ({list(k_cache.shape)})", f"of shape {list(v_cache.shape)}")
    if k_cache.shape[3] != head_dim:
        reject("k_cache", f"of the head_dim of q ({head_dim})", f"of shape {list(k_cache.shape)}")
    if k_cache.shape[2] < 1 or heads % k_cache.shape[2]:
        reject("q", f"of a number of heads that is a multiple of k_cache's ({k_cache.shape[2]})", f"of {heads} heads")
    _require_like("lengths", require_tensor("lengths", lengths), (requests,), torch.int32, q.device)
    if scale is not None and not (isinstance(scale, int | float) and 0 < scale < math.inf):
        reject("scale", "a finite number above 0", repr(scale))
    if block_table is None:
        if k_cache.shape[0] != requests:
            reject("k_cache", f"of {requests} requests, as q is", f"of shape {list(k_cache.shape)}")
        return k_cache.shape[1]
    require_tensor("block_table", block_table, ndim=2)
    _require_like("block_table", block_table, (requests, block_table.shape[1]), torch.int32, q.device)
    if k_cache.shape[1] < 1:
        reject("k_cache", "of blocks of at least one key", f"of shape {list(k_cache.shape)}")
    return block_table.shape[1] * k_cache.shape[1]


def _check_prefix(prefix, q: torch.Tensor, k_cache: torch.Tensor) -> None:
    if not isinstance(prefix, SharedPrefix):
        reject("prefix", "a SharedPrefix", type(prefix).__name__)
    if prefix.k.shape[1:] != k_cache.shape[2:]:
        must = f"of {k_cache.shape[2]} heads of {k_cache.shape[3]}, as k_cache is"
        reject("prefix.k", must, f"of shape {list(prefix.k.shape)}")
    if prefix.k_scale is None and prefix.k.dtype != q.dtype:
        reject("prefix.k", f"of the dtype of q ({q.dtype}), or quantised", prefix.k.dtype)
    if prefix.k.device != q.device:
        reject("prefix.k", f"on the device of q ({q.device})", f"on {prefix.k.device}")
    for name in ("k", "v"):
        if torch.is_grad_enabled() and getattr(prefix, name).requires_grad:
            must = "without a gradient (decoding has none; use torch.no_grad())"
            reject(f"prefix.{name}", must, "a tensor that requires one")


def _check_values(requests: int, capacity: int, lengths, prefix, check: bool) -> None:
    """What only the values of integers tell; on a device they are looked at where the caller asks for it."""
    if torch.compiler.is_compiling() or not (check or lengths.device.type == "cpu"):
        return
    if requests:
        least, most = (int(x) for x in lengths.aminmax())
        if least < 0 or most > capacity:
            reject("lengths", f"between 0 and {capacity}", least if least < 0 else most)
    if prefix is None:
        return
    for name, x, most in (("cu_prefix", prefix.cu_prefix, prefix.k.shape[0]), ("cu_requests", prefix.cu_requests, requests)):
        ends = x.tolist()
        if ends != sorted(ends) or ends[0] < 0 or ends[-1] > most:
            reject(f"prefix.{name}", f"non-decreasing, from 0 to {most}", ends)
    if (prefix.cu_requests[0], prefix.cu_requests[-1]) != (0, requests):
        reject("prefix.cu_requests", f"from 0 to {requests}: every request in a group", prefix.cu_requests.tolist())


def _require_like(name: str, x: torch.Tensor, shape, dtype: torch.dtype, device: torch.device) -> None:
    if (tuple(x.shape), x.dtype, x.device) != (tuple(shape), dtype, device):
        must = f"{dtype} on {device} of shape {list(shape)}"
        reject(name, must, f"{x.dtype} on {x.device} of shape {list(x.shape)}")
