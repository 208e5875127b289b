"""Attention on a device: inputs of a shape, the truth for some of their heads, ours, and everyone that it is compared with.

Peers get queries, keys and values in the layout they like best and without paying for it; the library gets [N, H, D].
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from bench.measure import Candidate
from bench.shapes import AttentionShape
from tests.reference import PADDING, assert_error_rule, kinds_of
from voco_kernels import VocoLayout, voco_attention
from voco_kernels.backends import flash
from voco_kernels.layout import document_of

RESULTS = ("out", "lse", "dq", "dk", "dv")
OURS, SPLIT, FLEX, FLEX_BUILT, FLEX_MASK, DENSE = (
    "ours", "varlen split", "FlexAttention", "FlexAttention, mask built", "FlexAttention's mask", "SDPA, dense mask",
)  # fmt: skip

# Short documents, or a single one of 16k tokens: a padded batch and its mask fit into memory. No GQA.
DENSE_SHAPES = ("sft", "video")

# What our kernels are built for: (peer, backward) -> shape -> its median divided by ours.
TARGETS = {
    (SPLIT, False): {"video": 1.5, "long_video": 1.5, "gqa": 1.5, "sft": 1.15, "anyres": 1.0},
    (SPLIT, True): {"video": 1.2, "sft": 1.0, "anyres": 0.8},
    (FLEX, False): dict.fromkeys(("sft", "anyres", "video", "long_video", "chat", "gqa"), 1.5),
    (FLEX, True): dict.fromkeys(("sft", "anyres", "video", "long_video", "chat", "gqa"), 1.5),
    (DENSE, False): {"sft": 4.0, "video": 70.0},
}
# The same for the share of the lower roof that the forward reaches.
ROOF_TARGETS = {"video": 0.60, "long_video": 0.60, "anyres": 0.42}


def results_of(q, k, v, grad, layout: VocoLayout, backend: str) -> dict[str, torch.Tensor]:
    """out, lse and the gradients of sum(out * grad), as `tests.reference.dense_results` names them."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = voco_attention(*leaves, layout, backend=backend, return_lse=True)
    gradients = torch.autograd.grad(out, leaves, grad)
    return dict(zip(RESULTS, (out.detach(), lse.detach(), *gradients), strict=True))


def error_over_bound(x: torch.Tensor, eager: torch.Tensor, x64: torch.Tensor, kinds) -> float:
    """How much of what `assert_error_rule` allows a result uses, at most over the kinds of rows: 1 is all of it."""
    shares = [x.new_zeros((), dtype=torch.float64)]
    for kind in sorted(set(kinds) - {PADDING}):
        rows = torch.from_numpy(kinds == kind).to(x.device)
        got, allowed, true = (t[rows].double() for t in (x, eager, x64))
        error = (got - true).abs().max()
        bound = 2 * (allowed - true).abs().max() + 4 * torch.finfo(x.dtype).eps * true.abs().max()
        shares.append(torch.where(error == 0, 0.0, error / bound))
    return float(torch.stack(shares).max())  # NaN, where one of them is


def inputs_of(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random q, k, v and the gradient of out."""
    generator = torch.Generator(device).manual_seed(0)
    n, d = shape.layout().num_tokens, shape.head_dim
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    return [torch.randn(n, h, d, generator=generator, device=device, dtype=dtype) for h in heads]


class Problem:
    """A shape at full size, with the truth for its first and its last key head, which no other head touches.

    The truth is the torch backend in float64, which needs no N * N numbers, and "eager" the same in `dtype`. The torch
    backend itself is held to the dense reference by the tests and, on shrunken shapes, by `bench.gpu_checks`. Its lse is
    that of float32 scores; the rule means scores that matmuls rounded to `dtype`, so eager's is the true one rounded.
    """

    def __init__(self, shape: AttentionShape, device: torch.device, dtype: torch.dtype, backend: str):
        self.shape, self.backend = shape, backend
        host = shape.layout()
        self.layout, self.kinds = host.to(device), kinds_of(host)
        self.packed = inputs_of(shape, device, dtype)
        group = shape.heads // shape.kv_heads
        last = shape.kv_heads - 1
        self.chosen = [(slice(h * group, (h + 1) * group), slice(h, h + 1)) for h in sorted({0, last})]

    @cached_property
    def batched(self) -> list[torch.Tensor]:
        """q, k, v and the gradient as [1, H, N, D]."""
        return [x.transpose(0, 1)[None].contiguous() for x in self.packed]

    @cached_property
    def truth(self) -> list[tuple[dict, dict]]:
        """(float64, eager) results of the chosen heads."""
        pairs = []
        for query_heads, key_heads in self.chosen:
            sides = (query_heads, key_heads, key_heads, query_heads)
            some = [x[:, heads] for x, heads in zip(self.packed, sides, strict=True)]
            true = results_of(*(x.double() for x in some), self.layout, "torch")
            eager = results_of(*some, self.layout, "torch")
            pairs.append((true, eager | {"lse": true["lse"].to(some[0].dtype)}))
        return pairs

    def compared(self, results: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(name, result, eager, float64) of the chosen heads; results are [N, H, D], lse [N, H]."""
        for (query_heads, key_heads), (true, eager) in zip(self.chosen, self.truth, strict=True):
            for name, x in results.items():
                yield name, x[:, key_heads if name in ("dk", "dv") else query_heads], eager[name], true[name]

    def check(self, results: tuple[torch.Tensor, ...], unpack: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Raise AssertionError unless (out, dq, dk, dv), or only its beginning, keep the error rule once unpacked."""
        named = {name: unpack(x) for name, x in zip(("out", "dq", "dk", "dv"), results)}
        for name, x, eager, true in self.compared(named):
            assert_error_rule(name, x, eager, true, self.kinds)

    def candidate(self, name: str, attention, inputs, unpack, *, backward: bool) -> Candidate:
        """A candidate that runs `attention(q, k, v)` on (q, k, v, grad) and, where asked, the backward."""
        *inputs, grad = inputs

        def forward():
            with torch.no_grad():
                return (attention(*inputs),)

        def forward_backward():
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = attention(*leaves)
            return out.detach(), *torch.autograd.grad(out, leaves, grad)

        target = TARGETS.get((name, backward), {}).get(self.shape.name)
        return Candidate(name, forward_backward if backward else forward, partial(self.check, unpack=unpack), target)


def candidates(problem: Problem, *, backward: bool, compiler=torch.compile) -> list[Candidate]:
    """Ours first, then its peers. One that cannot serve the shape, or cannot run here, says so when it is run.

    Args:
        compiler: what FlexAttention is compiled with; None leaves it out.
    """
    layout, packed = problem.layout, problem.packed
    found = [
        problem.candidate(
            OURS, lambda q, k, v: voco_attention(q, k, v, layout, backend=problem.backend), packed, _same,
            backward=backward,
        ),
        problem.candidate(SPLIT, split(layout), packed, _same, backward=backward),
    ]  # fmt: skip
    if compiler is not None:
        found += _flex_candidates(problem, backward, compiler)
    if problem.shape.name in DENSE_SHAPES:
        attention, inputs, unpack = dense(problem)
        found.append(problem.candidate(DENSE, attention, inputs, unpack, backward=backward))
    return found


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _unbatched(x: torch.Tensor) -> torch.Tensor:
    return x[0].transpose(0, 1)


# ---- the varlen split --------------------------------------------------------------------------------------------------


def split(layout: VocoLayout):
    """The varlen split as the library's own backend has it, or with copies of what segments see where it refuses them."""
    return split_with_copies(layout) if not layout.isolated else partial(voco_attention, layout=layout, backend="flash")


def split_with_copies(layout: VocoLayout, varlen=None):
    """The varlen split of a layout whose segments see the public keys before them: attention(q, k, v).

    Call A gives every segment a copy of the public keys before it, in front of its own. Call B is causal over all public
    tokens of a document, also its VoCo tokens, whose rows it computes in vain: only so is it one call.
    """
    device = layout.device
    segment, public, ends = (x.cpu() for x in (layout.segment_ids, layout.public, layout.cu_seqlens.long()))
    document = document_of(ends, len(segment))
    keys, lengths = [], []
    for number in segment[segment > 0].unique().tolist():
        own = (segment == number).nonzero().flatten()
        before = ends[document[own[0]]] + public[ends[document[own[0]]] : own[0]].nonzero().flatten()
        keys.append(torch.cat([before, own]))
        lengths.append(len(own))
    rows_a, keys_a = (segment > 0).nonzero().flatten(), torch.cat(keys)
    rows_b = public.nonzero().flatten()
    call_a = _ends([torch.tensor(lengths), torch.tensor([len(k) for k in keys])], device)
    per_document = torch.bincount(document[rows_b], minlength=len(ends) - 1)
    call_b = _ends([per_document[per_document > 0]] * 2, device)
    text = (segment[rows_b] == 0).nonzero().flatten().to(device)
    rows_a, keys_a, rows_b = (x.to(device) for x in (rows_a, keys_a, rows_b))

    def attention(q, k, v):
        call = varlen or _varlen()
        scale = 1 / math.sqrt(q.shape[-1])
        out_a, _ = call(q[rows_a], k[keys_a], v[keys_a], *call_a, scale)
        out_b, _ = call(q[rows_b], k[rows_b], v[rows_b], *call_b, scale)
        out = torch.zeros_like(q).index_copy(0, rows_a, out_a)
        return out.index_copy(0, rows_b[text], out_b[text])

    return attention


def _varlen():
    found = flash.unavailable_reason() or flash.implementation()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found.varlen


def _ends(lengths: list[torch.Tensor], device: torch.device):
    """(cu_q, cu_k, max_q, max_k) of sequences with these lengths."""
    cu = (torch.cat([x.new_zeros(1), x.cumsum(0)]).int().to(device) for x in lengths)
    return *cu, *(int(x.max()) for x in lengths)


# ---- FlexAttention -----------------------------------------------------------------------------------------------------


def mask_rule(layout: VocoLayout):
    """The mask rule of a layout without padding, as FlexAttention takes it."""
    segment, public, isolated = layout.segment_ids, layout.public, layout.isolated
    document = document_of(layout.cu_seqlens, layout.num_tokens)

    def visible(batch, head, row, key):
        own = (segment[row] == segment[key]) & (segment[row] > 0)
        outside = public[key] & (segment[row] == 0) if isolated else public[key]
        return (document[row] == document[key]) & (key <= row) & (own | outside)

    return visible


def _flex_candidates(problem: Problem, backward: bool, compiler) -> list[Candidate]:
    # Everything compiled for another shape counts towards the limit behind which torch.compile gives up.
    torch._dynamo.reset()
    layout, shape = problem.layout, problem.shape
    n, rule = layout.num_tokens, mask_rule(layout)
    flex, create = compiler(flex_attention, dynamic=False), compiler(create_block_mask, dynamic=False)
    grouped = shape.heads != shape.kv_heads
    known = []

    def build():
        return create(rule, None, None, n, n, device=layout.device)

    def with_mask(q, k, v):
        if not known:
            known.append(build())
        return flex(q, k, v, block_mask=known[0], enable_gqa=grouped)

    def with_built_mask(q, k, v):
        return flex(q, k, v, block_mask=build(), enable_gqa=grouped)

    found = [problem.candidate(FLEX, with_mask, problem.batched, _unbatched, backward=backward)]
    if not backward:
        found.append(problem.candidate(FLEX_BUILT, with_built_mask, problem.batched, _unbatched, backward=False))
        found.append(Candidate(FLEX_MASK, build))
    return found


# ---- SDPA --------------------------------------------------------------------------------------------------------------


def dense(problem: Problem):
    """(attention, inputs, unpack): one padded row per document and a dense mask for all of them."""
    layout = problem.layout
    lengths = layout.cu_seqlens.long().diff().tolist()
    longest, device = max(lengths), layout.device
    mask = torch.zeros(len(lengths), 1, longest, longest, dtype=torch.bool, device=device)
    token = torch.arange(longest, device=device)
    # A padded row that sees nothing would be NaN.
    mask[:, 0, token, token] = True
    rule, begin = mask_rule(layout), 0
    for document, length in enumerate(lengths):
        row = begin + token[:length]
        mask[document, 0, :length, :length] = rule(0, 0, row[:, None], row[None, :])
        begin += length

    def padded(x):
        return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2).contiguous()

    def unpack(x):
        return torch.cat([row.transpose(0, 1)[:length] for row, length in zip(x, lengths, strict=True)])

    def attention(q, k, v):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attention, [padded(x) for x in problem.packed], unpack
