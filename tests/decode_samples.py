"""Problems for `decode_attention`, and its specification in plain arithmetic: request by request, over all that it sees."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from reference import OPEN, PADDING, assert_error_rule

from voco_kernels import SharedPrefix, VocoKV, decode_attention

# Not a number: what lies where nobody may look.
POISON = float("nan")


@dataclass(frozen=True)
class Form:
    """What a problem is made from: groups are (requests, prefix tokens), lengths are those of all requests."""

    groups: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    tokens: int = 1
    kv_heads: int = 2
    group_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    stored: torch.dtype | None = None  # of the prefix, where it is quantised
    block: int | None = None
    seed: int = 0


class Problem:
    """Random inputs of a form. Caches are poisoned wherever no request has a key, and some are not dense."""

    def __init__(self, form: Form, device="cpu"):
        self.form = form
        make = torch.Generator().manual_seed(form.seed)
        requests, heads, dim = len(form.lengths), form.kv_heads, form.head_dim

        def normal(*shape):
            return torch.randn(*shape, generator=make)

        capacity = max(form.lengths, default=0) + 3
        own = [normal(2, length, heads, dim).to(form.dtype) for length in form.lengths]
        self.table = None
        if form.block is None:
            caches = torch.full((2, requests, heads, capacity, dim), POISON, dtype=form.dtype).transpose(2, 3)
            for request, kv in enumerate(own):
                caches[:, request, : kv.shape[1]] = kv
        else:
            wide = -(-capacity // form.block)
            blocks = requests * wide + 2
            order = torch.randperm(blocks, generator=make)[: requests * wide].reshape(requests, wide)
            self.table = order.int()
            caches = torch.full((2, blocks, form.block, heads, dim), POISON, dtype=form.dtype)
            for request, kv in enumerate(own):
                for key in range(kv.shape[1]):
                    caches[:, order[request, key // form.block], key % form.block] = kv[:, key]
        self.own = own
        self.k_cache, self.v_cache = caches
        self.q = normal(requests, form.tokens, heads * form.group_heads, dim).to(form.dtype)
        self.lengths = torch.tensor(form.lengths, dtype=torch.int32)
        total = sum(tokens for _, tokens in form.groups)
        kv = VocoKV(*normal(2, 1, total, heads, dim).to(form.dtype))
        if form.stored is not None:
            kv = kv.quantised(form.stored)
        scales = (s if s is None else s[0] for s in (kv.k_scale, kv.v_scale))
        ends = np.cumsum([(0, 0), *((tokens, n) for n, tokens in form.groups)], axis=0, dtype=np.int32)
        cu_prefix, cu_requests = (torch.from_numpy(x.copy()) for x in ends.T)
        self.prefix = SharedPrefix(kv.k[0], kv.v[0], cu_prefix, cu_requests, *scales) if form.groups else None

    def run(self, backend: str, **changes):
        """(out, lse) of the library."""
        caches = (self.q, self.k_cache, self.v_cache, self.lengths)
        arguments = {"block_table": self.table, "prefix": self.prefix, "return_lse": True} | changes
        return decode_attention(*caches, backend=backend, **arguments)

    def expected(self, dtype: torch.dtype, scale: float | None = None):
        """(out, lse) with matmuls of that dtype and a softmax in float32, or all in float64."""
        form = self.form
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale = form.head_dim**-0.5 if scale is None else scale
        out = torch.zeros(self.q.shape, dtype=dtype)
        lse = torch.full(self.q.shape[:3], float("-inf"), dtype=wide)
        group_of = [g for g, (n, _) in enumerate(form.groups) for _ in range(n)] or [None] * len(form.lengths)
        for request, group in enumerate(group_of):
            prefix = self._prefix(group, dtype)
            for token in range(form.tokens):
                seen = max(0, form.lengths[request] - form.tokens + token + 1)
                k, v = (torch.cat([p, x[:seen].to(dtype)]) for p, x in zip(prefix, self.own[request]))
                if not len(k):
                    continue
                for head in range(self.q.shape[2]):
                    q, of = self.q[request, token, head].to(dtype), head // form.group_heads
                    scores = (k[:, of] @ q).to(wide) * scale
                    out[request, token, head] = scores.softmax(0).to(dtype) @ v[:, of]
                    lse[request, token, head] = scores.logsumexp(0)
        return out, lse

    def _prefix(self, group: int | None, dtype: torch.dtype):
        if group is None:
            return torch.zeros(2, 0, self.form.kv_heads, self.form.head_dim, dtype=dtype)
        begin, end = self.prefix.cu_prefix[group : group + 2].tolist()
        pairs = ((self.prefix.k, self.prefix.k_scale), (self.prefix.v, self.prefix.v_scale))
        if self.form.stored is None:
            return [x[begin:end].to(dtype) for x, _ in pairs]
        return [(x[begin:end].double() * scale[begin:end, :, None].double()).to(dtype) for x, scale in pairs]

    def check(self, results) -> None:
        """Hold (out, lse) to the error rule; queries that see nothing get exactly 0 and -inf."""
        eager, true = self.expected(self.form.dtype), self.expected(torch.float64)
        blind = (true[1] == float("-inf")).flatten(0, 1).all(-1)
        kinds = np.where(blind.numpy(), PADDING, OPEN)
        for name, x, x_eager, x64 in zip(("out", "lse"), results, eager, true):
            assert x.dtype == x_eager.dtype and x.shape == x64.shape, name
            assert_error_rule(name, *(y.flatten(0, 1) for y in (x.cpu(), x_eager, x64)), kinds)


@st.composite
def forms(draw, dtypes, stored=(None,), head_dims=(64, 96, 128, 256), longest=70, most_tokens=16):
    """Forms of up to 3 groups of up to 5 requests, with prefixes and own keys of up to `longest` tokens."""
    counts = st.integers(0, 5)
    lengths = st.one_of(st.integers(0, 5), st.integers(0, longest))
    shared = draw(st.booleans()) or stored != (None,)
    groups = draw(st.lists(st.tuples(counts, lengths), min_size=1, max_size=3)) if shared else []
    requests = sum(n for n, _ in groups) if shared else draw(counts)
    return Form(
        groups=tuple(groups),
        lengths=tuple(draw(st.lists(lengths, min_size=requests, max_size=requests))),
        tokens=draw(st.sampled_from([1, 1, 2, 3, most_tokens])),
        kv_heads=draw(st.integers(1, 2)),
        group_heads=draw(st.sampled_from([1, 2, 4, 7])),
        head_dim=draw(st.sampled_from(head_dims)),
        dtype=draw(st.sampled_from(dtypes)),
        stored=draw(st.sampled_from(stored)),
        block=draw(st.sampled_from([None, 1, 4, 16])),
        seed=draw(st.integers(0, 2**20)),
    )
