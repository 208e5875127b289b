"""The varlen split that an expert writes by hand, over FlashAttention's varlen kernels; also the peer to beat.

Two calls serve a whole pack. Call A takes every segment as a causal sequence of its own. Call B takes the text rows of every
document against the document's public keys; its causal mask is aligned to the bottom right, so the last row sees every key
and each row before it one key less. That is exact where segments see nothing outside themselves and no VoCo token stands
between the text rows of a document. Other layouts are refused.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np
import torch

from ..layout import VocoLayout
from ..plan import PlanCache, TwoRangePlan, build_plan

MAX_HEAD_DIM = 256


def unavailable_reason() -> str | None:
    """Why this machine cannot run it: it needs an NVIDIA GPU from Ampere on, and flash-attn or torch's varlen_attn."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"FlashAttention needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    found = implementation()
    return found if isinstance(found, str) else None


def unsupported_reason(q: torch.Tensor, layout: VocoLayout) -> str | None:
    """Why these inputs cannot be served; None where they can. Reads a device's layout once, at its first use."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q must be of dtype float16 or bfloat16, but was {q.dtype}"
    if q.shape[2] % 8 or q.shape[2] > MAX_HEAD_DIM:
        return f"q must be of a head_dim that is a multiple of 8 and at most {MAX_HEAD_DIM}, but was of {q.shape[2]}"
    if q.device.type != "cuda":
        return f"q must be on a CUDA device, but was on {q.device}"
    return _split_of(layout).refusal


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VocoLayout, scale: float, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by at most two varlen calls; differentiable by autograd, with FlashAttention's own backward.

    Gradients may differ in the last bits from run to run, because that backward adds up dq in any order.
    """
    out, calls, pieces = _attend(q, k, v, layout, scale, implementation)
    if not return_lse:
        return out, None
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    for call, piece in zip(calls, pieces, strict=True):
        lse[call.rows] = piece.detach()
    return out, lse


def attention_over(
    found: "Implementation", q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VocoLayout, scale: float
) -> torch.Tensor:
    """out of the same calls over a chosen implementation, so that benchmarks can compare all that are there.

    Its lse is not read. Raises ValueError where the layout cannot be split.
    """
    return _attend(q, k, v, layout, scale, lambda: found)[0]


def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: VocoLayout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) by running the forward again, for graphs in which a registered operator stands.

    `out` and `lse` are not read.
    """
    # Inside an operator torch passes autograd by, with or without enable_grad; leaving inference mode brings it back.
    with torch.inference_mode(False):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = attention(*leaves, layout, scale, False)
        return torch.autograd.grad(out, leaves, grad_out)


# ---- the kernels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """Somebody's varlen attention: causal, aligned to the bottom right, differentiable.

    Attributes:
        name: for reports.
        varlen: (q [R, Hq, D], k and v [K, Hkv, D], cu_q, cu_k, max_q, max_k, scale) -> (out [R, Hq, D], lse [R, Hq]);
            cu_q and cu_k are int32 [S+1] on the device, the maxima are the longest sequences between them.
    """

    name: str
    varlen: Callable[..., tuple[torch.Tensor, torch.Tensor]]


@cache
def implementation() -> Implementation | str:
    """The first of `LOADERS` that can be used here, or why none can."""
    reasons = []
    for load in LOADERS:
        found = load()
        if isinstance(found, Implementation):
            return found
        reasons.append(found)
    return "; ".join(reasons)


def load_flash_attn() -> Implementation | str:
    """The package flash-attn; since 2.1 its masks are aligned to the bottom right, and from 2.7 on its lse is [Hq, R]."""
    try:
        import flash_attn
    except ImportError as error:
        return f"flash_attn cannot be imported ({error})"
    # The package flash-attn-4 alone fills the same name with other modules.
    function = getattr(flash_attn, "flash_attn_varlen_func", None)
    if function is None:
        return "flash_attn has no flash_attn_varlen_func"
    version = flash_attn.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 7):
        return f"flash_attn is {version}, older than 2.7"

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale):
        # Without dropout the third result, the probabilities, is never computed.
        out, lse, _ = function(
            q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True, return_attn_probs=True
        )
        return out, lse.t()

    return Implementation(f"flash_attn {version}", varlen)


def load_torch() -> Implementation | str:
    """torch's varlen_attn from 2.11 on: FlashAttention 2, whose causal mask is aligned to the bottom right."""
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= set(parameters):
        return f"varlen_attn of torch {torch.__version__} takes no scale; 2.11 is the first that does"
    takes_gqa = "enable_gqa" in parameters

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale):
        options = {}
        if q.shape[1] != k.shape[1]:
            if takes_gqa:
                options["enable_gqa"] = True
            else:
                # torch 2.11 documents equal heads only. The copies cost traffic that flash-attn and torch 2.12 do without.
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        # Exactly this tuple means causal.
        options |= {"scale": scale, "window_size": (-1, 0), "return_aux": AuxRequest(lse=True)}
        out, lse = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options)
        return out, lse.t()

    return Implementation(f"torch {torch.__version__} varlen_attn", varlen)


LOADERS = (load_flash_attn, load_torch)


# ---- running the calls -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Call:
    """One varlen call: sequences of rows, and for each the keys of which its last row sees all.

    Attributes:
        rows, keys: tokens of the queries and of the keys, sequence by sequence; a slice or an int64 index.
        cu_rows, cu_keys (int32 [S+1], the layout's device): where the sequences end; none is empty.
        max_rows, max_keys: the longest of them.
    """

    rows: slice | torch.Tensor
    keys: slice | torch.Tensor
    cu_rows: torch.Tensor
    cu_keys: torch.Tensor
    max_rows: int
    max_keys: int


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VocoLayout, scale: float, choose: Callable
) -> tuple[torch.Tensor, tuple[Call, ...], list[torch.Tensor]]:
    """out [N, Hq, D], its calls, and for each the lse [R, Hq] of its rows; `choose` finds the implementation."""
    split = _split_of(layout)
    if split.refusal is not None:
        raise ValueError(f"backend 'flash' cannot serve this call: {split.refusal}")
    if split.calls:
        return _run(split.calls, q, k, v, scale, choose().varlen)
    # No row sees anything: zeros that still have gradients, so that a batch of padding can be trained on.
    return q.new_zeros(q.shape) + sum(x[:0].sum() for x in (q, k, v)), (), []


def _run(
    calls: tuple[Call, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, varlen: Callable
) -> tuple[torch.Tensor, tuple[Call, ...], list[torch.Tensor]]:
    """The same, where there are calls."""
    rows, keys = [call.rows for call in calls], [call.keys for call in calls]
    taken = zip(calls, _Take.apply(q, rows), _Take.apply(k, keys), _Take.apply(v, keys), strict=True)
    outs, lses = [], []
    for call, *inputs in taken:
        cu = (call.cu_rows, call.cu_keys, call.max_rows, call.max_keys)
        out, lse = varlen(*map(_readable, inputs), *cu, scale)
        outs.append(out)
        lses.append(lse)
    return _Assemble.apply(q.shape, rows, *outs), calls, lses


def _readable(x: torch.Tensor) -> torch.Tensor:
    """`x` where the kernels, which load 16 bytes at a time and check only the last stride, can read it; else a copy."""
    step = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % step == 0 and x.stride(1) % step == 0
    return x if aligned and x.stride(2) == 1 else x.clone(memory_format=torch.contiguous_format)


class _Take(torch.autograd.Function):
    """x[rows] for each of a few row sets, with one gradient buffer for all of them."""

    @staticmethod
    def forward(ctx, x, targets):
        ctx.shape, ctx.targets = x.shape, targets
        return tuple(x[target] for target in targets)

    @staticmethod
    def backward(ctx, *grads):
        total = grads[0].new_zeros(ctx.shape)
        for target, grad in zip(ctx.targets, grads, strict=True):
            if isinstance(target, slice):
                total[target] += grad
            else:
                # No token occurs twice in an index, so that the order of a GPU's additions does not matter.
                total.index_add_(0, target, grad)
        return total, None


class _Assemble(torch.autograd.Function):
    """Pieces written into disjoint rows of zeros [N, H, D]."""

    @staticmethod
    def forward(ctx, shape, targets, *pieces):
        ctx.targets = targets
        out = pieces[0].new_zeros(shape)
        for target, piece in zip(targets, pieces, strict=True):
            out[target] = piece
        return out

    @staticmethod
    def backward(ctx, grad):
        return None, None, *(_readable(grad[target]) for target in ctx.targets)


# ---- the split ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """The calls that serve a layout: none where no row sees anything, or where `refusal` says why it cannot be served."""

    calls: tuple[Call, ...]
    refusal: str | None


def _build_split(layout: VocoLayout) -> Split:
    # Autograd cannot save what was made in inference mode, and a layout may see its first use there.
    with torch.inference_mode(False):
        plan = build_plan(layout)
        ends = layout.cu_seqlens.cpu().numpy()
        public = plan.public_index.cpu().numpy()
        refusal = _seeing_segment(plan, ends) or _interrupted_text(plan, public)
        if refusal is not None:
            return Split((), refusal)
        calls = _segment_call(plan, layout.device), _text_call(plan, public, layout.device)
        return Split(tuple(call for call in calls if call is not None), None)


def _seeing_segment(plan: TwoRangePlan, ends: np.ndarray) -> str | None:
    """The refusal that names a segment which sees keys outside itself; a segment with none before it never does."""
    seeing = np.flatnonzero(plan.prefix_limit > plan.prefix_begin)
    if not seeing.size:
        return None
    start = int(plan.segment_start[seeing[0]])
    document = int(np.searchsorted(ends, start, side="right")) - 1
    return (
        "layout must be isolated, so that segments see nothing outside themselves, "
        f"but in document {document} the segment at token {start} sees public tokens before it"
    )


def _interrupted_text(plan: TwoRangePlan, public: np.ndarray) -> str | None:
    """The refusal that names a VoCo token between two text rows: aligned to the bottom right, the first would see it."""
    for document, (begin, limit) in enumerate(zip(plan.document_begin, plan.document_limit, strict=True)):
        text = begin + np.flatnonzero(plan.public_is_open[begin:limit])
        gaps = np.flatnonzero(np.diff(text) > 1)
        if gaps.size:
            before, behind = text[gaps[0] : gaps[0] + 2]
            return (
                f"layout must have no VoCo token between the text tokens of a document, but in document {document} "
                f"VoCo token {public[before + 1]} stands between text tokens {public[before]} and {public[behind]}"
            )
    return None


def _segment_call(plan: TwoRangePlan, device: torch.device) -> Call | None:
    """Call A: segments, one behind the other."""
    runs = [np.arange(s, s + n) for s, n in zip(plan.segment_start, plan.segment_length, strict=True)]
    return _make_call(runs, runs, device)


def _text_call(plan: TwoRangePlan, public: np.ndarray, device: torch.device) -> Call | None:
    """Call B: the text rows of each document that has some, and its public keys up to the last of these rows."""
    rows, keys = [], []
    for begin, limit in zip(plan.document_begin, plan.document_limit, strict=True):
        text = begin + np.flatnonzero(plan.public_is_open[begin:limit])
        if text.size:
            rows.append(public[text])
            # A segment behind the text is seen by none of its rows.
            keys.append(public[begin : text[-1] + 1])
    return _make_call(rows, keys, device)


def _make_call(rows: list[np.ndarray], keys: list[np.ndarray], device: torch.device) -> Call | None:
    if not rows:
        return None
    (cu_rows, max_rows), (cu_keys, max_keys) = (_ends(runs, device) for runs in (rows, keys))
    return Call(_as_index(rows, device), _as_index(keys, device), cu_rows, cu_keys, max_rows, max_keys)


def _ends(runs: list[np.ndarray], device: torch.device) -> tuple[torch.Tensor, int]:
    """int32 [S+1] where each run ends in their concatenation, and the length of the longest."""
    lengths = [len(run) for run in runs]
    ends = np.fromiter(chain([0], np.cumsum(lengths)), np.int32)
    return torch.from_numpy(ends).to(device), max(lengths)


def _as_index(runs: list[np.ndarray], device: torch.device) -> slice | torch.Tensor:
    """A slice where the tokens are consecutive (no copy), else an index tensor."""
    tokens = np.concatenate(runs)
    if tokens[-1] - tokens[0] + 1 == len(tokens) and (np.diff(tokens) == 1).all():
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    return torch.from_numpy(tokens).to(device)


_split_of = PlanCache(_build_split)
