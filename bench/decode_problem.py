"""Many questions about one video: the next token of each, the video's VoCo tokens shared or in every cache."""

from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.shapes import DecodeShape
from tests.reference import OPEN, assert_error_rule
from voco_kernels import SharedPrefix, VocoKV, backend_status, decode_attention


def able(device: torch.device) -> list[str]:
    """Backends that decode here, the one for this device first."""
    rows = {row.name: row for row in backend_status()}
    fused = device.type == "cuda" and rows["cuda"].reason is None
    return ["cuda", "torch"] if fused else ["torch"]


class Problem:
    """Requests of equal lengths, which others like best: no cache has a hole, so no mask is needed.

    Attributes:
        whole: what every request would have without sharing, keys and values [R, P + S, Hkv, D] in the dtype of the queries.
    """

    def __init__(self, shape: DecodeShape, device: torch.device, dtype: torch.dtype, stored: torch.dtype):
        generator = torch.Generator(device).manual_seed(0)
        random = partial(torch.randn, generator=generator, device=device, dtype=dtype)
        self.shape, requests = shape, shape.requests
        # So large that some keys stand out: the mean of thousands of random values would be all rounding.
        self.q = 4 * random(requests, 1, shape.heads, shape.head_dim)
        self.own = random(2, requests, shape.own, shape.kv_heads, shape.head_dim)
        shared = kv = VocoKV(*random(2, 1, shape.prefix, shape.kv_heads, shape.head_dim))
        if stored != dtype:
            kv = kv.quantised(stored)
            shared = kv.dequantised(dtype)
        ends = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (shape.prefix, requests))
        self.prefix = SharedPrefix(kv.k[0], kv.v[0], *ends, *(None if s is None else s[0] for s in (kv.k_scale, kv.v_scale)))
        copies = (x.expand(requests, -1, -1, -1) for x in (shared.k, shared.v))
        self.whole = [torch.cat(both, dim=1) for both in zip(copies, self.own, strict=True)]
        self.lengths = torch.full((requests,), shape.own, dtype=torch.int32, device=device)

    def shared(self, backend: str) -> torch.Tensor:
        """out [R, 1, Hq, D] with the prefix read once."""
        return decode_attention(self.q, *self.own, self.lengths, prefix=self.prefix, backend=backend)

    def repeated(self, backend: str) -> torch.Tensor:
        """The same over caches that all begin with the prefix."""
        return decode_attention(self.q, *self.whole, self.lengths + self.shape.prefix, backend=backend)

    def sdpa(self) -> torch.Tensor:
        """The same with torch's own attention."""
        q, k, v = (x.transpose(1, 2) for x in (self.q, *self.whole))
        return scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    def check(self, out: torch.Tensor) -> None:
        """Raise AssertionError unless the first and the last head of keys keep the error rule; the truth is float64."""
        group = self.shape.heads // self.shape.kv_heads
        for head in {0, self.shape.kv_heads - 1}:
            of_head = slice(head * group, (head + 1) * group)
            inputs = (self.q[:, 0, of_head], *(x[:, :, head] for x in self.whole))
            true, eager = self._dense(*(x.double() for x in inputs)), self._dense(*inputs)
            results = (x.cpu() for x in (out[:, 0, of_head], eager, true))
            assert_error_rule("out", *results, [OPEN] * self.shape.requests)

    def _dense(self, q, k, v) -> torch.Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q @ k.transpose(1, 2)).to(wide) * self.shape.head_dim**-0.5
        return scores.softmax(-1).to(q.dtype) @ v
