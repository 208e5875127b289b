"""Portable decoding: matmuls over the own keys of all requests, and over each group's prefix, merged by their log-sum-exp.

Scores, weights and sums are float32 (float64 for float64). It waits for lengths and groups on the host.
"""

from itertools import pairwise

import torch

# Keys of a prefix that are widened to float32 at a time, so that what is held does not grow with the prefix.
PREFIX_CHUNK = 2048


def unavailable_reason() -> str | None:
    """This backend runs everywhere torch does."""
    return None


def unsupported_reason(q: torch.Tensor, stored: torch.dtype | None) -> str | None:
    """Everything is supported."""
    return None


def decode(q, k_cache, v_cache, lengths, block_table, prefix, scale):
    """(out [R, T, Hq, D] in the dtype of q, lse [R, T, Hq] in float32 or float64)."""
    heads = k_cache.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    # [R, Hkv, T * group, D]: the rows that meet the same head of keys lie one behind the other.
    rows = (q.to(wide) * scale).unflatten(2, (heads, -1)).transpose(1, 2).flatten(2, 3)
    parts = [_own(rows, q.shape[1], k_cache, v_cache, lengths, block_table)]
    if prefix is not None:
        parts += _shared(rows, prefix)
    out, lse = _merged(parts)
    out, lse = (x.unflatten(2, (q.shape[1], -1)).transpose(1, 2).flatten(2, 3) for x in (out, lse))
    return out.to(q.dtype), lse


def _own(rows, tokens: int, k_cache, v_cache, lengths, block_table):
    """Each request over its own keys: (out [R, Hkv, T * group, D], lse [R, Hkv, T * group])."""
    device = rows.device
    longest = int(lengths.max()) if lengths.numel() else 0
    key = torch.arange(longest, device=device)
    there = key < lengths[:, None]
    if block_table is None:
        k, v = k_cache[:, :longest], v_cache[:, :longest]
    else:
        block = block_table[:, key // k_cache.shape[1]].long() if longest else block_table[:, :0].long()
        there = there & (block >= 0) & (block < k_cache.shape[0])
        slot = (block.where(there, torch.zeros_like(block)), key % k_cache.shape[1])
        # With no block at all there is nothing to gather, and nothing that is there.
        k, v = (x[slot] if x.shape[0] else x.new_zeros((*slot[0].shape, *x.shape[2:])) for x in (k_cache, v_cache))
    # One head behind the other, as matmuls read them.
    k, v = (x.transpose(1, 2).to(rows.dtype).contiguous() for x in (k, v))
    if not bool(there.all()):
        # Behind the length there may be anything, and a weight of 0 times NaN is NaN.
        v = v.masked_fill(~there[:, None, :, None], 0)
    last = lengths[:, None] - tokens + torch.arange(tokens, device=device)
    seen = there[:, None, :] & (key <= last[..., None])
    return _attend(rows, k, v, seen.repeat_interleave(rows.shape[2] // tokens, dim=1)[:, None])


def _shared(rows, prefix):
    """Parts like that of the own keys; in the i-th every group has seen its i-th chunk of prefix tokens."""
    chunks: list[tuple[torch.Tensor, torch.Tensor]] = []
    ends, request_ends = prefix.cu_prefix.tolist(), prefix.cu_requests.tolist()
    for group, (begin, end) in enumerate(pairwise(ends)):
        first, last = request_ends[group : group + 2]
        # [Hkv, requests * rows, D]: to a group's requests the prefix is one matrix.
        packed = rows[first:last].transpose(0, 1).flatten(1, 2)
        for number, chunk in enumerate(range(begin, end, PREFIX_CHUNK) if last > first else ()):
            k, v = (_widened(x, s, slice(chunk, min(chunk + PREFIX_CHUNK, end)), rows.dtype) for x, s in _stored(prefix))
            results = _attend(packed, k.transpose(0, 1), v.transpose(0, 1), None)
            if number == len(chunks):
                chunks.append((torch.zeros_like(rows), rows.new_full(rows.shape[:3], float("-inf"))))
            for whole, part in zip(chunks[number], results):
                whole[first:last] = part.unflatten(1, (last - first, -1)).transpose(0, 1)
    return chunks


def _stored(prefix):
    return (prefix.k, prefix.k_scale), (prefix.v, prefix.v_scale)


def _widened(x, scale, tokens: slice, dtype: torch.dtype) -> torch.Tensor:
    return x[tokens].to(dtype) if scale is None else x[tokens].to(dtype) * scale[tokens][..., None]


def _attend(rows, k, v, seen):
    """softmax(rows k^T) v and the log-sum-exp, over the keys that are seen; 0 and -inf where there are none."""
    if not k.shape[-2]:
        return torch.zeros_like(rows), rows.new_full(rows.shape[:-1], float("-inf"))
    scores = rows @ k.transpose(-1, -2)
    if seen is not None:
        scores.masked_fill_(~seen, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    # Of a row that sees nothing, -inf minus -inf would be NaN.
    top.masked_fill_(top == float("-inf"), 0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights @ v).div_(total.where(total > 0, torch.ones_like(total)))
    return out, (top + total.log()).squeeze(-1)


def _merged(parts):
    """One softmax over the keys of all parts."""
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == float("-inf"), 0)).exp_()
    out = parts[0][0] * weights[0][..., None]
    for (part, _), weight in zip(parts[1:], weights[1:]):
        out.addcmul_(part, weight[..., None])
    return out, lse
