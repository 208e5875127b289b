"""Attention in float32: the two ranges against what a user has without them.

Peers get queries, keys and values in the layout they like best, [1, H, N, D] contiguous; the library gets [N, H, D].
FlexAttention has no backward on a CPU.
"""

import math
from functools import cache, partial

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from bench.measure import Candidate
from bench.shapes import ATTENTION, AttentionShape
from tests.reference import assert_error_rule, dense_results, kinds_of, mask_of_layout
from voco_kernels import VocoLayout, voco_attention
from voco_kernels.tiles import useful_pairs

# Ratios that the library is built for: peer's median over the library's.
FORWARD_TARGET = {"image": 2.7, "frames": 11.0}
FLEX_TARGET = {"image": 1.4, "frames": 2.2}
BACKWARD_TARGET = {"image": 2.0, "frames": 8.0}

compiled_flex = torch.compile(flex_attention, dynamic=False)


class Problem:
    """Inputs of one shape for every implementation, and the truth for them."""

    def __init__(self, shape: AttentionShape):
        generator = torch.Generator().manual_seed(0)
        self.layout = shape.layout()
        self.scale = 1 / math.sqrt(shape.head_dim)
        n = self.layout.num_tokens
        heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        self.packed = [torch.randn(n, h, shape.head_dim, generator=generator) for h in heads]
        self.batched = [x.transpose(0, 1)[None].contiguous() for x in self.packed]
        self.mask = self.layout.dense_mask()
        self.block_mask = flex_block_mask(self.layout)
        self.kinds = kinds_of(self.layout)
        groups = shape.heads // shape.kv_heads
        # The truth takes N * N float64 numbers a head many times over, so only the first and the last key head and their
        # query heads are compared; no other head touches their results.
        self.checked = [
            (slice(h * groups, (h + 1) * groups), slice(h, h + 1)) for h in sorted({0, shape.kv_heads - 1})
        ]
        self.truth = [self._truth_of(*heads) for heads in self.checked]
        assert int(self.mask.sum()) == useful_pairs(self.layout)

    def _truth_of(self, query_heads: slice, key_heads: slice) -> tuple[dict, dict]:
        """(float64, eager) results of some heads."""
        chosen = (query_heads, key_heads, key_heads, query_heads)
        inputs = [x[:, heads] for x, heads in zip(self.packed, chosen, strict=True)]
        mask = mask_of_layout(self.layout)
        return tuple(dense_results(*(x.to(t) for x in inputs), mask, self.scale) for t in (torch.float64, torch.float32))

    def check(self, results: tuple[torch.Tensor, ...], *, transposed: bool) -> None:
        """Raise AssertionError unless (out, dq, dk, dv), or only its beginning, keep the error rule."""
        for name, x in zip(("out", "dq", "dk", "dv"), results):
            x = x[0].transpose(0, 1) if transposed else x
            for (query_heads, key_heads), (true, eager) in zip(self.checked, self.truth, strict=True):
                chosen = x[:, key_heads if name in ("dk", "dv") else query_heads].detach()
                assert_error_rule(name, chosen, eager[name], true[name], self.kinds)

    def candidate(self, name: str, attention, *, packed: bool, backward: bool, target: float | None = None) -> Candidate:
        """A candidate that runs `attention(q, k, v)`."""
        *inputs, grad = self.packed if packed else self.batched

        def forward():
            with torch.no_grad():
                return (attention(*inputs),)

        def forward_backward():
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = attention(*leaves)
            return out, *torch.autograd.grad(out, leaves, grad)

        run = forward_backward if backward else forward
        return Candidate(name, run, partial(self.check, transposed=not packed), target)


@cache
def problem_of(name: str) -> Problem:
    return Problem(ATTENTION[name])


def flex_block_mask(layout: VocoLayout):
    """The mask rule as FlexAttention takes it; an isolated layout of one document."""
    assert layout.isolated and layout.num_documents == 1
    segment, public = layout.segment_ids, layout.public

    def visible(batch, head, row, key):
        return (key <= row) & ((segment[row] == segment[key]) & (segment[row] > 0) | public[key] & (segment[row] == 0))

    n = layout.num_tokens
    return create_block_mask(visible, None, None, n, n, device=layout.device)


def fresh(layout: VocoLayout) -> VocoLayout:
    """The same layout in other tensors, so that nothing is cached for it."""
    moved = (layout.segment_ids.clone(), layout.public.clone(), layout.cu_seqlens.clone(), layout.position_ids)
    return VocoLayout(*moved, layout.isolated)


@pytest.mark.parametrize("name", ATTENTION)
def test_forward(measure, name):
    problem = problem_of(name)
    layout, mask, block_mask = problem.layout, problem.mask, problem.block_mask
    ours = partial(problem.candidate, packed=True, backward=False)
    peer = partial(problem.candidate, packed=False, backward=False)
    measure(
        "attention forward",
        name,
        [
            ours("voco torch", lambda q, k, v: voco_attention(q, k, v, layout, backend="torch")),
            ours("voco torch, plan built", lambda q, k, v: voco_attention(q, k, v, fresh(layout), backend="torch")),
            peer(
                "SDPA, dense mask",
                lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask),
                target=FORWARD_TARGET.get(name),
            ),
            peer(
                "SDPA, dense mask built",
                lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=layout.dense_mask()),
            ),
            peer(
                "FlexAttention, compiled",
                lambda q, k, v: compiled_flex(q, k, v, block_mask=block_mask),
                target=FLEX_TARGET.get(name),
            ),
        ],
        work=ATTENTION[name].flops(backward=False) / 1e9,
        unit="GFLOP/s",
    )


@pytest.mark.parametrize("name", ATTENTION)
def test_forward_backward(measure, name):
    problem = problem_of(name)
    layout, mask = problem.layout, problem.mask
    measure(
        "attention forward + backward",
        name,
        [
            problem.candidate(
                "voco torch",
                lambda q, k, v: voco_attention(q, k, v, layout, backend="torch"),
                packed=True,
                backward=True,
            ),
            problem.candidate(
                "SDPA, dense mask",
                lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask),
                packed=False,
                backward=True,
                target=BACKWARD_TARGET.get(name),
            ),
        ],
        work=ATTENTION[name].flops(backward=True) / 1e9,
        unit="GFLOP/s",
    )


@pytest.mark.parametrize("name", ATTENTION)
def test_setup(measure, name):
    from voco_kernels.backends import torch as backend

    layout = problem_of(name).layout
    measure(
        "what is made once per batch",
        name,
        [
            Candidate("voco torch plan", lambda: backend._build_blocks(layout)),
            Candidate("dense mask", layout.dense_mask),
            Candidate("FlexAttention block mask", lambda: flex_block_mask(layout)),
        ],
    )
