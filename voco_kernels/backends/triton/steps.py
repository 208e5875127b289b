"""The steps that the kernels share: which tokens a tile has, and how tiles are read and written.

META is a tuple of constants that every step gets: (INDEX, HEAD_DIM, BLOCK_D, PRECISION). INDEX is the type of a token's
offset: int64 where a token times a stride may exceed int32, as in a pack of half a million tokens with 32 heads of 128;
int32 elsewhere, which spares registers. BLOCK_D is head_dim padded to a power of two. PRECISION is that of float32 products.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

# Arguments that change from batch to batch. A kernel for each kind of number (1, a multiple of 16, any other) would be
# compiled in the middle of a training run, and none of them would be faster.
SIZES = ("num_tokens", "num_tiles", "heads", "kv_heads", "group")


def on_device(x: torch.Tensor) -> AbstractContextManager:
    """Launch on the device of `x`, whichever is current; the interpreter has none."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit
def renewed(stride, number):
    """`stride`, as a value that depends on `number`: something of a tile, which is never negative.

    The compiler cannot know that. It would otherwise compute offsets from strides outside the loop over tiles, and hold them
    in registers that the inner loops then lack: 13 spilled at head_dim 128 on sm_80. Strides are multiples of 16, see
    `prepared` in launch.py.
    """
    return tl.multiple_of(stride + (number >> 31), 16)


@triton.jit
def tile_tokens(index_ptr, first, begin, count, SIZE: tl.constexpr):
    """[SIZE] int32: the tokens of a tile; lanes behind `count` repeat its last one, so that no load needs a mask.

    With first >= 0 they are `first`, `first + 1`, ...; that spares most tiles a load that all others wait for.
    """
    lane = tl.minimum(tl.arange(0, SIZE), count - 1)
    if first >= 0:
        tokens = first + lane
    else:
        tokens = tl.load(index_ptr + begin + lane)
    return tokens


@triton.jit
def load_rows(ptr, offsets, META: tl.constexpr):
    """[len(offsets), BLOCK_D]: the rows of one head that begin at `ptr + offsets`. Zeros behind HEAD_DIM."""
    HEAD_DIM: tl.constexpr = META[1]
    BLOCK_D: tl.constexpr = META[2]
    dims = tl.arange(0, BLOCK_D)
    if BLOCK_D == HEAD_DIM:
        tile = tl.load(ptr + offsets[:, None] + dims[None, :])
    else:
        tile = tl.load(ptr + offsets[:, None] + dims[None, :], mask=dims[None, :] < HEAD_DIM, other=0.0)
    return tile


@triton.jit
def load_rows_where(ptr, offsets, present, META: tl.constexpr):
    """The same, with zeros for rows that are not `present`."""
    HEAD_DIM: tl.constexpr = META[1]
    BLOCK_D: tl.constexpr = META[2]
    dims = tl.arange(0, BLOCK_D)
    mask = present[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (dims[None, :] < HEAD_DIM)
    return tl.load(ptr + offsets[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def load_tokens(ptr, tokens, stride, META: tl.constexpr):
    """[len(tokens), BLOCK_D]: one head of the given tokens; `ptr` is that head of token 0."""
    return load_rows(ptr, tokens.to(META[0]) * stride, META)


@triton.jit
def store_tokens(ptr, tokens, stride, tile, count, META: tl.constexpr):
    """Write the first `count` rows of a tile [SIZE, BLOCK_D] to one head of their tokens, in the dtype of `ptr`."""
    HEAD_DIM: tl.constexpr = META[1]
    BLOCK_D: tl.constexpr = META[2]
    offsets = tokens.to(META[0]) * stride
    dims = tl.arange(0, BLOCK_D)
    mask = (tl.arange(0, tile.shape[0]) < count)[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (dims[None, :] < HEAD_DIM)
    tl.store(ptr + offsets[:, None] + dims[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_pair(source, start, end, SIZE: tl.constexpr, META: tl.constexpr, GATHER: tl.constexpr, EDGE: tl.constexpr):
    """(tokens, present, x tile, y tile) of one step over the tokens `start` to at most `end`.

    source = (x_ptr, y_ptr, x_stride, y_stride, index_ptr), one head of two tensors: keys and values, or queries and
    gradients. The range is one of `index_ptr` (GATHER) or of tokens. Only a step at the EDGE may reach behind the end; it
    gets zeros there.
    """
    x_ptr, y_ptr, x_stride, y_stride, index_ptr = source
    INDEX: tl.constexpr = META[0]
    lane = tl.arange(0, SIZE)
    present = lane < end - start
    if GATHER:
        if EDGE:
            tokens = tl.load(index_ptr + start + lane, mask=present, other=0)
        else:
            tokens = tl.load(index_ptr + start + lane)
        x_offsets, y_offsets = tokens.to(INDEX) * x_stride, tokens.to(INDEX) * y_stride
    else:
        # Only the first token's offset may need 64 bits.
        tokens = start + lane
        x_ptr += x_stride.to(INDEX) * start
        y_ptr += y_stride.to(INDEX) * start
        x_offsets, y_offsets = lane * x_stride, lane * y_stride
    if EDGE:
        x_tile, y_tile = load_rows_where(x_ptr, x_offsets, present, META), load_rows_where(y_ptr, y_offsets, present, META)
    else:
        x_tile, y_tile = load_rows(x_ptr, x_offsets, META), load_rows(y_ptr, y_offsets, META)
    return tokens, present, x_tile, y_tile


@triton.jit
def load_row_tile(tile_ptr):
    """(begin, count, public range, own range) of a row tile, the ranges as (begin, full, end)."""
    begin, count = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    public = (tl.load(tile_ptr + 2), tl.load(tile_ptr + 3), tl.load(tile_ptr + 4))
    own = (tl.load(tile_ptr + 5), tl.load(tile_ptr + 6), tl.load(tile_ptr + 7))
    return begin, count, public, own


@triton.jit
def row_tile_tokens(row_index_ptr, begin, count, own, R: tl.constexpr):
    """[R]: the rows of a row tile. Those of a segment are neighbours, and the last of them ends their own range."""
    first = own[2] - tl.where(own[2] > 0, count, 1)
    return tile_tokens(row_index_ptr, first, begin, count, R)
