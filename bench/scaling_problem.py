"""Attention on layouts so long that no dense reference fits, and who is still able to follow.

The truth is the mask rule and a float64 softmax for a sample of rows, against all of their keys.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from voco_llama.bench import measure
from voco_llama.bench.clock import release
from voco_llama.bench.measure import LIMIT, PEER, Candidate

from bench.attention_masks import PaddedMask, block_masks
from bench.attention_peers import CAUSAL, DENSE, FLEX, OURS, SPLIT, compile_anew
from bench.shapes import AttentionShape
from tests.reference import assert_error_rule, dense_attention, kinds_of
from voco_kernels import VocoLayout, voco_attention

SAMPLED = 16  # rows of each kind
# How much further than two results that keep the error rule two rows may be apart that no sample has seen.
EVERYWHERE = 4
CPU_BYTES = 8 * 2**30  # for masks on a CPU; on a GPU what is free decides
# On a CPU a block mask is built without the compiler, which would need longer for every size: half a minute at this one.
CPU_FLEX_TOKENS = 33_000


class Problem:
    """q, k and v of a layout of one isolated document, and the truth for some rows."""

    def __init__(self, shape: AttentionShape, device: torch.device, dtype: torch.dtype):
        generator = torch.Generator(device).manual_seed(0)
        self.shape, self.device, self.dtype = shape, device, dtype
        host = shape.layout()
        assert host.num_documents == 1 and host.isolated
        self.layout = host.to(device)
        self.scale = 1 / math.sqrt(shape.head_dim)
        size = (host.num_tokens, shape.heads, shape.head_dim)
        self.q, self.k, self.v = (torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(3))
        kinds = kinds_of(host)
        self.rows = torch.cat([_spread(torch.from_numpy(kinds == kind).nonzero()[:, 0]) for kind in sorted(set(kinds))])
        self.kinds = kinds[self.rows.numpy()]
        self.truth = self._truth()
        self.first: torch.Tensor | None = None

    def _truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(float64, eager) out [rows, H, D], head by head, since scores of all would be too many."""
        rows = self.rows.to(self.device)
        mask = row_mask(self.layout, rows)
        results = []
        for dtype in (torch.float64, self.dtype):
            heads = [
                dense_attention(*(x[:, h : h + 1].to(dtype) for x in (self.q[rows], self.k, self.v)), mask, self.scale)[0]
                for h in range(self.shape.heads)
            ]
            results.append(torch.cat(heads, dim=1))
        return tuple(results)

    def check(self, out: torch.Tensor) -> None:
        """Raise AssertionError unless the sampled rows of out [N, H, D] keep the error rule, and all others are as the first
        result that was checked has them, within what their errors together may be.
        """
        true, eager = self.truth
        assert_error_rule("out", out[self.rows.to(out.device)], eager, true, self.kinds)
        if self.first is None:
            assert bool((out != 0).any(2).all()), "out has rows of zeros"
            self.first = out
        error, bound = (out - self.first).abs().max(), EVERYWHERE * error_bound(eager, true)
        assert error <= bound, f"out is off by {error:.3g} from {OURS}, more than {bound:.3g}"

    def batched(self) -> list[torch.Tensor]:
        """q, k and v as [1, H, N, D], which is what torch's attention functions like best."""
        return [x.transpose(0, 1)[None].contiguous() for x in (self.q, self.k, self.v)]


def error_bound(eager: torch.Tensor, true: torch.Tensor) -> float:
    """What the error rule allows of rows of all kinds together."""
    small = 4 * torch.finfo(eager.dtype).eps * true.abs().max()
    return float(2 * (eager.double() - true).abs().max() + small)


def _spread(tokens: torch.Tensor) -> torch.Tensor:
    """SAMPLED of them, the first and the last among them."""
    return tokens[torch.linspace(0, len(tokens) - 1, SAMPLED).long().unique()]


def row_mask(layout: VocoLayout, rows: torch.Tensor) -> torch.Tensor:
    """bool [rows, N]: the mask rule of an isolated layout of one document, for some of its rows."""
    segment, public = layout.segment_ids, layout.public
    row, key = rows[:, None], torch.arange(layout.num_tokens, device=rows.device)[None]
    own = (segment[row] == segment[key]) & (segment[row] > 0)
    return (key <= row) & (own | public[key] & (segment[row] == 0))


def candidates(problem: Problem, compiler=torch.compile) -> list[Candidate]:
    """Ours first, then those that may be able to follow."""
    layout, packed = problem.layout, (problem.q, problem.k, problem.v)
    found = [
        _candidate(OURS, lambda: voco_attention(*packed, layout), problem.check, role=measure.OURS),
        _dense(problem),
        _sdpa(CAUSAL, problem, role=LIMIT, is_causal=True),
        _flex(problem, compiler),
    ]
    if problem.device.type == "cuda":
        found.append(_candidate(SPLIT, lambda: voco_attention(*packed, layout, backend="flash"), problem.check))
    return found


def _candidate(name: str, attention: Callable, check, role: str = PEER) -> Candidate:
    def run():
        with torch.no_grad():
            return attention()

    return Candidate(name, run, check, role=role)


def _sdpa(name: str, problem: Problem, role: str = PEER, **options) -> Candidate:
    made = []

    def attention():
        made[:] = made or problem.batched()
        return scaled_dot_product_attention(*made, **options)[0].transpose(0, 1)

    return _candidate(name, attention, problem.check if role == PEER else None, role=role)


def _dense(problem: Problem) -> Candidate:
    mask, made, n = PaddedMask(problem.layout, problem.dtype), [], problem.layout.num_tokens

    def attention():
        if not made:
            additive = mask.build()
            # A GPU's kernels like its rows to be of whole 16 numbers, and then inputs must be as long.
            extra = additive.shape[-1] - n
            made.append((additive, [torch.nn.functional.pad(x, (0, 0, 0, extra)) for x in problem.batched()]))
        additive, inputs = made[0]
        return scaled_dot_product_attention(*inputs, attn_mask=additive)[0, :, :n].transpose(0, 1)

    candidate = _candidate(DENSE, attention, problem.check)
    return replace(candidate, absent=dense_absent(mask, problem.device), kept_bytes=mask.bytes)


def dense_absent(mask: PaddedMask, device: torch.device) -> str | None:
    """Why a dense mask cannot be had; None where it can. It is made of two of bools, of a byte a number."""
    needed = mask.bytes + 2 * mask.numbers
    release(device)
    allowed = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else CPU_BYTES
    if needed <= allowed:
        return None
    return f"a mask would take {needed / 2**30:.1f} GiB, more than {allowed / 2**30:.1f}"


def _flex(problem: Problem, compiler) -> Candidate:
    on_gpu, layout, made = problem.device.type == "cuda", problem.layout, []
    if not on_gpu and layout.num_tokens > CPU_FLEX_TOKENS:
        reason = f"its mask of more than {CPU_FLEX_TOKENS} tokens takes too long to build"
        return Candidate(FLEX, lambda: None, absent=reason)
    if on_gpu:
        compile_anew()
    # On a CPU one compilation serves all sizes, at the same speed.
    flex = compiler(flex_attention, dynamic=not on_gpu)
    build = block_masks(layout, compiler(create_block_mask, dynamic=False) if on_gpu else create_block_mask)

    def attention():
        if not made:
            made.append((problem.batched(), build()))
        inputs, block_mask = made[0]
        return flex(*inputs, block_mask=block_mask)[0].transpose(0, 1)

    return _candidate(FLEX, attention, problem.check)


class Patience:
    """Leaves a candidate out once it failed at a smaller size, or would take longer than `seconds` a call.

    What a size costs is taken to grow with the square of its tokens, which rows keep as a fact.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.last: dict[str, tuple[int, float | str]] = {}

    def learn(self, rows: list[dict]) -> None:
        """Remember what rows of results say for larger sizes."""
        for row in rows:
            if row["p50_ms"] is not None:
                self.last[row["name"]] = (row["facts"]["tokens"], row["p50_ms"] / 1e3)
            elif row["status"].startswith("cannot run"):
                self.last[row["name"]] = (row["facts"]["tokens"], row["status"])

    def apply(self, found: list[Candidate], tokens: int) -> list[Candidate]:
        """The candidates for a size, those that are not worth trying as absent."""
        return [replace(c, absent=c.absent or self._reason(c, tokens), facts={"tokens": tokens}) for c in found]

    def _reason(self, candidate: Candidate, tokens: int) -> str | None:
        if candidate.role == measure.OURS or candidate.name not in self.last:
            return None
        size, said = self.last[candidate.name]
        if isinstance(said, str):
            return f"at {size} tokens already: {said}"
        if (expected := said * (tokens / size) ** 2) > self.seconds:
            return f"a call might take {expected:.0f} s ({said:.2g} s at {size} tokens, squared), more than {self.seconds:g}"
        return None


def size_of(device: torch.device) -> tuple[int, int, torch.dtype]:
    """(heads, head_dim, dtype): as wide as a LLaMA-7B layer on a GPU, and narrow on a CPU."""
    return (32, 128, torch.bfloat16) if device.type == "cuda" else (2, 64, torch.float32)
