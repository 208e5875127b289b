"""Attention of one shape: its inputs, the truth for some of their heads, and the check that everyone must pass."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from bench.attention_masks import padded_length
from bench.shapes import ATTENTION, GPU, AttentionShape
from tests.reference import PADDING, assert_error_rule, dense_results, kinds_of, mask_of_layout
from voco_kernels import VocoLayout, voco_attention

RESULTS = ("out", "lse", "dq", "dk", "dv")
CHECKED = ("out", "dq", "dk", "dv")

# Up to here the truth is dense: N * N float64 numbers of a head, several times over.
MOST_DENSE_TOKENS = 4608

# All heads are compared with ours in parts of so many rows, by root mean squares: a row that sees few keys differs much in
# size from head to head, and many rows together do not. A row of zeros of their size stands out even in bfloat16.
ROWS_TOGETHER = 64


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
    """One row per document, [B, H, L, D] with L as `padded_length` says: how a batch is run without packing."""
    length = padded_length(layout)
    if layout.num_documents == 1 and length == layout.num_tokens:
        return BATCHED
    lengths = layout.cu_seqlens.long().diff().tolist()

    def pack(x):
        rows = torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2)
        return torch.nn.functional.pad(rows, (0, 0, 0, length - rows.shape[2])).contiguous()

    def unpack(x):
        return torch.cat([row.transpose(0, 1)[:n] for row, n in zip(x, lengths, strict=True)])

    return Form(pack, unpack)


def parts_of(x: torch.Tensor) -> torch.Tensor:
    """float32 [parts, H]: the root mean square of each part of ROWS_TOGETHER rows of x [N, H, D], the last one filled up."""
    filled = torch.nn.functional.pad(x.float(), (0, 0, 0, 0, 0, -len(x) % ROWS_TOGETHER))
    return filled.unflatten(0, (-1, ROWS_TOGETHER)).square().mean((1, 3)).sqrt()


class Problem:
    """A shape at full size, with the truth for its first and its last key head, which no other head touches.

    The other heads are compared with those of the portable backend.

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
        self.chosen = [self._heads(h) for h in sorted({0, shape.kv_heads - 1})]
        self._inputs: dict[Form, list[torch.Tensor]] = {}

    def _heads(self, key_head: int) -> tuple[slice, slice]:
        group = self.shape.heads // self.shape.kv_heads
        return slice(key_head * group, (key_head + 1) * group), slice(key_head, key_head + 1)

    def _some(self, query_heads: slice, key_heads: slice) -> list[torch.Tensor]:
        sides = (query_heads, key_heads, key_heads, query_heads)
        return [x[:, heads] for x, heads in zip(self.packed, sides, strict=True)]

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
        return [truth_of(self._some(*heads)) for heads in self.chosen]

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
        """Raise AssertionError unless (out, dq, dk, dv), or only its beginning, are right.

        The chosen heads must keep the error rule; all heads must be as near to `whole` as two results that keep it are.
        """
        named = {name: form.unpack(x) for name, x in zip(CHECKED, results)}
        self._check_chosen(named)
        for name, x in named.items():
            self._check_near(name, x)

    def _check_chosen(self, named: dict[str, torch.Tensor]) -> None:
        for name, x, eager, true in self.compared(named):
            assert_error_rule(name, x, eager, true, self.kinds)

    def _check_near(self, name: str, x: torch.Tensor) -> None:
        """The error rule, twice, for parts of rows of one kind; heads are alike, so its allowance is that of chosen ones."""
        for kind in sorted(set(self.kinds)):
            rows = torch.from_numpy(self.kinds == kind).to(x.device)
            ours = self.whole[name][rows]
            error, allowed = parts_of(x[rows].float() - ours.float()), self._eager_error(name, rows)
            bound = 2 * (2 * allowed[:, None] + 4 * torch.finfo(x.dtype).eps * parts_of(ours))
            wrong = ~(error <= bound)  # written so that a NaN is wrong
            if wrong.any():
                part, head = wrong.nonzero()[0].tolist()
                numbers = f"error {error[part, head]:.3e}, bound {bound[part, head]:.3e}"
                raise AssertionError(f"{name}, {kind} rows, part {part} of head {head}: {numbers} (against ours)")

    def _eager_error(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """[parts]: how far the plain implementation is from the truth, in the worst of the chosen heads."""
        errors = [parts_of(eager[name][rows].double() - true[name][rows]) for true, eager in self.truth]
        return torch.cat(errors, 1).amax(1)

    @cached_property
    def whole(self) -> dict[str, torch.Tensor]:
        """out, dq, dk and dv of all heads by the portable backend, head by head so that there is room for it.

        Raises AssertionError unless the chosen heads keep the error rule, and all are finite.
        """
        heads = map(self._heads, range(self.shape.kv_heads))
        parts = [results_of(*self._some(*some), self.layout, "torch") for some in heads]
        found = {name: torch.cat([part[name] for part in parts], 1) for name in CHECKED}
        self._check_chosen(found)
        for name, x in found.items():
            assert x.isfinite().all(), f"{name} of the portable backend is not finite"
        return found

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
