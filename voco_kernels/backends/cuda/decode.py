"""Decoding in CUDA, for 16-bit numbers and prefixes that may be quantised: csrc/include/voco/decode.h on tensors.

Two launches: attention over splits of the keys, and the merge of their results. How many splits there are depends on shapes
and on the GPU alone, so nothing is waited for, and a CUDA graph can hold both. Design and limits are in DESIGN.md.
"""

from functools import cache

import torch

from . import kernels_unavailable_reason, load, multiprocessors, unserved_reason

# As csrc/include/voco/dtype.h numbers them.
DTYPES = {torch.float16: 0, torch.bfloat16: 1}
STORED_DTYPES = {**DTYPES, torch.int8: 3, torch.float8_e4m3fn: 4}
HEAD_DIMS = (64, 96, 128, 256)
TILE_ROWS = 64
# By head_dim, blocks of threads for which a multiprocessor has registers. A block also takes shared memory for the system.
MOST_BLOCKS = {64: 4, 96: 4, 128: 4, 256: 2}
SYSTEM_BYTES = 1024
# A split of fewer keys costs more to merge than it saves.
SPLIT_KEYS, MOST_SPLITS = 256, 64
NO_ROWS, NO_SCALES = (0, 0, 0, 0), (0, 0, 0)

unavailable_reason = kernels_unavailable_reason


def unsupported_reason(q: torch.Tensor, stored: torch.dtype | None) -> str | None:
    """Why such queries, and a prefix of dtype `stored`, cannot be served; None where they can."""
    if q.dtype not in DTYPES:
        return f"it takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[3] not in HEAD_DIMS:
        return f"it takes head_dim {', '.join(map(str, HEAD_DIMS))}, not {q.shape[3]}"
    return unserved_reason(q.device, q.shape[3], shared_bytes(q.shape[3], stored or q.dtype))


def decode(q, k_cache, v_cache, lengths, block_table, prefix, scale):
    """(out [R, T, Hq, D], lse [R, T, Hq] float32), contiguous. Tensors of other than aligned rows are copied."""
    requests, tokens, heads, head_dim = q.shape
    q, k, v = (_aligned(x) for x in (q, k_cache, v_cache))
    key_heads = k.shape[2]
    capacity = k.shape[1] if block_table is None else block_table.shape[1] * k.shape[1]
    capacity = min(capacity, 2**31 - 1)
    kept = [q, k, v, lengths.contiguous()]
    table = None if block_table is None else block_table.contiguous()
    rows = tokens * heads // key_heads
    shared = {"prefix_rows": [NO_ROWS, NO_ROWS], "prefix_scales": [NO_SCALES, NO_SCALES], "prefix_ends": [0, 0]}
    groups = prefix_tokens = prefix_splits = 0
    shares_prefix = prefix is not None and prefix.k.shape[0] > 0
    stored = prefix.k.dtype if shares_prefix else q.dtype
    places = multiprocessors(q.device) * blocks_held(q.device, head_dim, stored)
    own_splits = splits(requests * key_heads * -(-rows // TILE_ROWS), capacity, places)
    if shares_prefix:
        pk, pv = (_aligned(x) for x in (prefix.k, prefix.v))
        ends = [x.contiguous() for x in (prefix.cu_prefix, prefix.cu_requests)]
        kept += [pk, pv, *ends]
        prefix_tokens, groups = pk.shape[0], ends[0].shape[0] - 1
        prefix_splits = splits(key_heads * max(-(-requests * rows // TILE_ROWS), groups), prefix_tokens, places)
        shared = {
            "prefix_rows": [(x.data_ptr(), 0, x.stride(0), x.stride(1)) for x in (pk, pv)],
            "prefix_scales": [
                NO_SCALES if s is None else (s.data_ptr(), *s.stride()) for s in (prefix.k_scale, prefix.v_scale)
            ],
            "prefix_ends": [x.data_ptr() for x in ends],
        }
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    partial_out = torch.empty((own_splits + prefix_splits, *q.shape), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partial_out.shape[:-1], dtype=torch.float32, device=q.device)
    device = q.device.index if q.is_cuda else -1
    load().decode(
        device=device,
        stream=0 if device < 0 else torch._C._cuda_getCurrentRawStream(device),
        dtype=DTYPES[q.dtype],
        stored=STORED_DTYPES[stored],
        head_dim=head_dim,
        rows=[(x.data_ptr(), *x.stride()[:3]) for x in (q, k, v)],
        lengths=kept[3].data_ptr(),
        table=0 if table is None else table.data_ptr(),
        table_stride=0 if table is None else table.stride(0),
        num_blocks=k.shape[0],
        block_size=k.shape[1],
        capacity=capacity,
        **shared,
        groups=groups,
        prefix_tokens=prefix_tokens,
        results=[x.data_ptr() for x in (out, lse, partial_out, partial_lse)],
        requests=requests,
        tokens=tokens,
        heads=heads,
        group=heads // key_heads,
        own_splits=own_splits,
        prefix_splits=prefix_splits,
        scale=scale,
    )
    return out, lse


def splits(items: int, keys: int, places: int) -> int:
    """Into how many parts the keys of `items` blocks of threads are cut, for a GPU that holds `places` blocks at once.

    Rounded down: one block more than there are places would wait until another has ended, and the whole launch for it.
    """
    return max(1, min(places // max(items, 1), -(-keys // SPLIT_KEYS), MOST_SPLITS))


@cache
def blocks_held(device: torch.device, head_dim: int, stored: torch.dtype) -> int:
    """Blocks of threads that a multiprocessor holds at once: what all of them copy ahead hides the memory's latency."""
    if device.type != "cuda":
        return MOST_BLOCKS[head_dim]
    memory = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return min(MOST_BLOCKS[head_dim], memory // (shared_bytes(head_dim, stored) + SYSTEM_BYTES))


def shared_bytes(head_dim: int, stored: torch.dtype) -> int:
    """That a block of threads takes."""
    return load().decode_shared(head_dim, STORED_DTYPES[stored])


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy where its rows are not contiguous or do not start at multiples of 16 bytes."""
    step = 16 // x.element_size()
    strides = (x.stride(i) for i in range(x.ndim - 1) if x.shape[i] > 1)
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(stride % step for stride in strides)
    return x if fits else x.clone(memory_format=torch.contiguous_format)
