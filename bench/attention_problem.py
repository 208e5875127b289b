"""Attention of one shape: its inputs, the truth for some of their heads, and the check that everyone must pass."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from bench.shapes import ATTENTION, GPU, AttentionShape
from tests.reference import PADDING, assert_error_rule, dense_results, kinds_of, mask_of_layout
from voco_kernels import VocoLayout, voco_attention

RESULTS = ("out", "lse", "dq", "dk", "dv")
CHECKED = ("out", "dq", "dk", "dv")

# Up to here the truth is dense: N * N float64 numbers of a head, several times over.
MOST_DENSE_TOKENS = 4608


def shapes_of(device: torch.device) -> dict[str, AttentionShape]:
    """The shapes that are measured on a device."""
    return GPU if device.type == "cuda" else ATTENTION


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


def unplanned(layout: VocoLayout) -> VocoLayout:
    """The same layout, without a copy, for which nothing is kept yet: what is kept hangs on the tensor object."""
    return replace(layout, segment_ids=layout.segment_ids[:])


@dataclass(frozen=True, eq=False)
class Form:
    """How an implementation likes its tensors: `pack` makes them from [N, H, D], `unpack` leads back there."""

    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]


PACKED = Form(lambda x: x, lambda x: x)
BATCHED = Form(lambda x: x.transpose(0, 1)[None].contiguous(), lambda x: x[0].transpose(0, 1))  # [1, H, N, D]
ROWS = Form(lambda x: x[None], lambda x: x[0])  # [1, N, H, D]


def padded(layout: VocoLayout) -> Form:
    """One row per document, all as long as the longest, [B, H, L, D]: how a batch is run without packing."""
    if layout.num_documents == 1:
        return BATCHED
    lengths = layout.cu_seqlens.long().diff().tolist()

    def pack(x):
        return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2).contiguous()

    def unpack(x):
        return torch.cat([row.transpose(0, 1)[:n] for row, n in zip(x, lengths, strict=True)])

    return Form(pack, unpack)


class Problem:
    """A shape at full size, with the truth for its first and its last key head, which no other head touches.

    Attributes:
        backend: the library's backend that is looked at first.
        layout: on the device, without padding.
        packed: q, k, v and the gradient of out, [N, H, D].
        kinds: what each token is, as `tests.reference.kinds_of` says.
        chosen: (query heads, key heads) that are compared.
    """

    def __init__(self, shape: AttentionShape, device: torch.device, dtype: torch.dtype, backend: str = "auto"):
        self.shape, self.device, self.dtype, self.backend = shape, device, dtype, backend
        self.host = shape.layout()
        self.layout, self.kinds = self.host.to(device), kinds_of(self.host)
        self.packed = inputs_of(shape, device, dtype)
        group, last = shape.heads // shape.kv_heads, shape.kv_heads - 1
        self.chosen = [(slice(h * group, (h + 1) * group), slice(h, h + 1)) for h in sorted({0, last})]
        self._inputs: dict[Form, list[torch.Tensor]] = {}

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key head."""
        return self.shape.heads != self.shape.kv_heads

    @cached_property
    def padded(self) -> Form:
        """That of a padded batch."""
        return padded(self.layout)

    # ---- the truth -----------------------------------------------------------------------------------------------------

    @cached_property
    def truth(self) -> list[tuple[dict, dict]]:
        """(float64, eager) results of the chosen heads: the dense reference, or the torch backend where N * N is too large.

        The torch backend itself is held to the dense reference by the tests and, on shrunken shapes, by `bench.gpu_checks`.
        """
        truth_of = self._dense_truth if self.host.num_tokens <= MOST_DENSE_TOKENS else self._torch_truth
        pairs = []
        for query_heads, key_heads in self.chosen:
            sides = (query_heads, key_heads, key_heads, query_heads)
            pairs.append(truth_of([x[:, heads] for x, heads in zip(self.packed, sides, strict=True)]))
        return pairs

    def _dense_truth(self, some: list[torch.Tensor]) -> tuple[dict, dict]:
        mask, scale = torch.from_numpy(mask_of_layout(self.host)).to(self.device), self.shape.head_dim**-0.5
        return tuple(dense_results(*(x.to(t) for x in some), mask, scale) for t in (torch.float64, self.dtype))

    def _torch_truth(self, some: list[torch.Tensor]) -> tuple[dict, dict]:
        true = results_of(*(x.double() for x in some), self.layout, "torch")
        eager = results_of(*some, self.layout, "torch")
        # The backend's lse is that of float32 scores; the rule means scores that matmuls rounded to the dtype.
        return true, eager | {"lse": true["lse"].to(self.dtype)}

    def compared(self, results: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(name, result, eager, float64) of the chosen heads; results are [N, H, D], lse [N, H]."""
        for (query_heads, key_heads), (true, eager) in zip(self.chosen, self.truth, strict=True):
            for name, x in results.items():
                yield name, x[:, key_heads if name in ("dk", "dv") else query_heads], eager[name], true[name]

    def check(self, results: tuple[torch.Tensor, ...], form: Form = PACKED) -> None:
        """Raise AssertionError unless (out, dq, dk, dv), or only its beginning, keep the error rule."""
        named = {name: form.unpack(x) for name, x in zip(CHECKED, results)}
        for name, x, eager, true in self.compared(named):
            assert_error_rule(name, x, eager, true, self.kinds)

    # ---- runs ----------------------------------------------------------------------------------------------------------

    def inputs(self, form: Form = PACKED) -> list[torch.Tensor]:
        """q, k, v and the gradient in a form; made once, so that nobody pays for the form that it likes."""
        if form not in self._inputs:
            self._inputs[form] = [form.pack(x) for x in self.packed]
        return self._inputs[form]

    def run(self, attention: Callable[..., torch.Tensor], form: Form = PACKED, *, backward: bool) -> Callable[[], Any]:
        """A function that runs `attention(q, k, v)` once and returns what `check` takes: (out,) or (out, dq, dk, dv)."""

        def forward():
            with torch.no_grad():
                return (attention(*self.inputs(form)[:3]),)

        def forward_backward():
            *inputs, grad = self.inputs(form)
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = attention(*leaves)
            return out.detach(), *torch.autograd.grad(out, leaves, grad)

        return forward_backward if backward else forward
