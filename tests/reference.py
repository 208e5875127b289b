"""The specification in plain arithmetic, which the library is compared with. Nothing here calls the library.

Layouts come in as the integers that define them: segment ids, public flags and the document of every token.
"""

import math

import numpy as np
import torch

OPEN, PRIVATE, VOCO, PADDING = "open", "private", "voco", "padding"


# ---- the mask ----------------------------------------------------------------------------------------------------------


def documents_of(cu_seqlens) -> np.ndarray:
    """[N]: the document of every token."""
    return np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(np.asarray(cu_seqlens)))


def mask_of(segment, public, document, isolated: bool) -> np.ndarray:
    """bool [N, N]: the mask rule, pair by pair."""
    segment, public, document = (np.asarray(x) for x in (segment, public, document))
    token = np.arange(segment.size)
    i, j = token[:, None], token[None, :]
    reachable = (document[i] == document[j]) & (j <= i) & (segment[i] >= 0) & (segment[j] >= 0)
    inside = (segment[i] == segment[j]) & (segment[i] > 0)
    across = public[j] & ((segment[i] == 0) | (not isolated))
    return reachable & (inside | across)


def mask_of_layout(layout) -> np.ndarray:
    """bool [N, N]: the mask rule for the integers that a layout holds."""
    return mask_of(layout.segment_ids, layout.public, documents_of(layout.cu_seqlens), layout.isolated)


def kinds_of(layout) -> np.ndarray:
    """[N]: what each token is; errors are compared kind by kind."""
    segment, public = np.asarray(layout.segment_ids), np.asarray(layout.public)
    return np.select([segment < 0, segment == 0, public], [PADDING, OPEN, VOCO], PRIVATE)


# ---- positions ---------------------------------------------------------------------------------------------------------


def continuous_positions(segment, document) -> list[int]:
    """Index in the document, padding not counted and at 0."""
    seen, positions = {}, []
    for s, d in zip(segment, document):
        positions.append(seen.get(d, 0) if s >= 0 else 0)
        seen[d] = seen.get(d, 0) + (s >= 0)
    return positions


def compact_positions(segment, public, document) -> list[int] | None:
    """Public tokens count on from the longest private run; private ones stand before their segment's first public one.

    None where public tokens stand between private tokens of a segment.
    """
    positions = [0] * len(segment)
    for d in set(document):
        tokens = [t for t in range(len(segment)) if document[t] == d]
        private = {}
        for t in tokens:
            if segment[t] > 0 and not public[t]:
                private.setdefault(segment[t], []).append(t)
        base = max(map(len, private.values()), default=0)
        for rank, t in enumerate(t for t in tokens if public[t]):
            positions[t] = base + rank
        for s, run in private.items():
            if run[-1] - run[0] != len(run) - 1:
                return None
            first_voco = next(t for t in tokens if segment[t] == s and public[t])
            for steps_before, t in enumerate(reversed(run), start=1):
                positions[t] = positions[first_voco] - steps_before
    return positions


# ---- layouts from content ----------------------------------------------------------------------------------------------


def opened(segment, public) -> tuple[list[int], list[bool]]:
    """Segments without private or without public tokens are open text."""
    sides = {}
    for s, p in zip(segment, public):
        sides.setdefault(s, set()).add(bool(p))
    one_sided = {s for s, both in sides.items() if s > 0 and len(both) == 1}
    return (
        [0 if s in one_sided else int(s) for s in segment],
        [True if s in one_sided else bool(p) for s, p in zip(segment, public)],
    )


def scan(ids, image: int, voco: int, start: int | None, hide_prefix: bool) -> list[tuple[int, int]]:
    """The segments (begin, end) of one document's token ids, found by reading them once from left to right."""
    segments, image_begin, i = [], None, 0
    while i < len(ids):
        if ids[i] == image and (i == 0 or ids[i - 1] != image):
            image_begin = i
        if ids[i] != voco:
            i += 1
            continue
        begin = image_begin
        while i < len(ids) and ids[i] == voco:
            i += 1
        if begin is not None:
            if hide_prefix and not segments:
                begin = 0
            elif start is not None and begin > 0 and ids[begin - 1] == start:
                begin -= 1
            segments.append((begin, i))
        image_begin = None
    return segments


# ---- attention ---------------------------------------------------------------------------------------------------------


def dense_attention(q, k, v, mask, scale: float):
    """(out, lse) with matmuls in the dtype of the inputs and the softmax in float32 (float64 for float64)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k).to(wide) * scale
    mask = torch.as_tensor(mask)
    sees_something = mask.any(1)
    scores = scores.masked_fill(~(mask | ~sees_something[:, None]), float("-inf"))
    weights = scores.softmax(-1) * sees_something[:, None]
    out = torch.einsum("hij,jhd->ihd", weights.to(q.dtype), v)
    lse = scores.logsumexp(-1).masked_fill(~sees_something, float("-inf")).T
    return out, lse


def dense_results(q, k, v, grad, mask, scale: float) -> dict[str, torch.Tensor]:
    """out, lse and the gradients of sum(out * grad)."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = dense_attention(q, k, v, mask, scale)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def assert_error_rule(name: str, x, eager, x64, kinds) -> None:
    """The one rule for how far a result may be from the truth: twice as far as an implementation in plain matmuls.

    `x` is what is tested, `eager` that implementation in the same dtype and `x64` the truth in float64. Maxima are taken
    separately over each kind of rows, so that many accurate rows do not excuse a few bad ones. Padding is exact.
    """
    assert x.shape == eager.shape == x64.shape, f"{name}: shapes {x.shape}, {eager.shape}, {x64.shape}"
    assert x64.dtype == torch.float64
    kinds = np.asarray(kinds)
    assert kinds.shape == x.shape[:1]
    for kind in sorted(set(kinds)):
        rows = torch.from_numpy(kinds == kind)
        got, true = x[rows].double(), x64[rows]
        if kind == PADDING:
            assert torch.equal(got, true), f"{name}, padding rows: not exactly what a row that sees nothing gets"
            continue
        if not true.numel():
            continue
        error, allowed = (got - true).abs().max(), (eager[rows].double() - true).abs().max()
        bound = 2 * allowed + 4 * torch.finfo(x.dtype).eps * true.abs().max()
        # Written so that a NaN fails.
        assert error <= bound, f"{name}, {kind} rows: error {error:.3e}, bound {bound:.3e} (eager {allowed:.3e})"


def assert_rounded_once(name: str, x, eager32, x64) -> None:
    """`x` is a float32 result that was rounded once to the dtype of x.

    Each element may be off by what rounding the truth to that dtype costs, and by what the error rule grants in float32,
    where `eager32` is the eager implementation.
    """
    assert x.shape == eager32.shape == x64.shape and eager32.dtype == torch.float32
    if not x.numel():
        return
    allowed = (eager32.double() - x64).abs().max()
    granted = 2 * allowed + 4 * torch.finfo(torch.float32).eps * x64.abs().max()
    rounding = (x64.to(x.dtype).double() - x64).abs()
    excess = ((x.double() - x64).abs() - rounding).max()
    assert excess <= granted, f"{name}: {excess:.3e} further off than one rounding, granted {granted:.3e}"


def assert_attention(runs, layout, scale: float | None = None) -> None:
    """Hold attention of a layout to the error rule.

    `runs` are pairs of results (any of out, lse, dq, dk, dv) and the (q, k, v, grad) that they come from. All runs together
    are one sample for the rule: a maximum over few rows depends on luck.
    """
    mask, kinds = mask_of_layout(layout), np.tile(kinds_of(layout), len(runs))
    got, true, eager = [], [], []
    for results, inputs in runs:
        factor = 1 / math.sqrt(inputs[0].shape[-1]) if scale is None else scale
        got.append(results)
        true.append(dense_results(*(x.double() for x in inputs), mask, factor))
        eager.append(dense_results(*inputs, mask, factor))
    for name in got[0]:
        x, x_eager, x64 = (torch.cat([run[name].detach() for run in part]) for part in (got, eager, true))
        assert x.dtype == x_eager.dtype, f"{name} has dtype {x.dtype}"
        assert_error_rule(name, x, x_eager, x64, kinds)


# ---- rotation ----------------------------------------------------------------------------------------------------------


def rotated(x, positions, inv_freq, scaling: float = 1.0, *, inverse: bool = False) -> torch.Tensor:
    """Half-split RoPE of x [..., T, H, D] in float64 as a product of complex numbers.

    The angle is the float32 product of position and frequency, as in transformers; all else is float64. `inverse` undoes
    the rotation and the scaling.
    """
    angle = (positions.float()[:, None] * inv_freq.float()[None, :]).double().numpy()
    turn = np.exp(1j * angle)[:, None, :] * scaling
    half = x.shape[-1] // 2
    x = x.double().numpy()
    z = x[..., :half] + 1j * x[..., half:]
    z = z / turn if inverse else z * turn
    return torch.from_numpy(np.concatenate([z.real, z.imag], axis=-1))


def eager_rotated(x, positions, inv_freq, scaling: float = 1.0) -> torch.Tensor:
    """The same in the dtype of x, with cos and sin rounded to it: how transformers applies RoPE."""
    angle = (positions.float()[:, None] * inv_freq.float()[None, :]).repeat(1, 2)[:, None, :]
    cos, sin = ((f * scaling).to(x.dtype) for f in (angle.cos(), angle.sin()))
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
