"""The K/V path in Triton: all layers in one launch, whatever form their caches have.

A program moves a tile of rows, tokens x heads, layer after layer, and computes the sines and cosines of its tokens once.
Half-split RoPE pairs a column with the one half a head further, so a row is read and written as two halves.

Layers may be separate tensors. Triton takes no array as an argument, so a plan makes a table of their places on the device,
in elements from the first layer. A launch costs the host tens of microseconds; `cuda` is the backend for small calls.
"""

import torch
import triton
import triton.language as tl

from ...layers import cache_strides, equal_runs
from . import LEAST_ARCH, arch_of, interpreted
from . import unavailable_reason as unavailable_reason
from .steps import on_device

CACHE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROW_DTYPES = (*CACHE_DTYPES, torch.int8, torch.float8_e4m3fn)
# An access of 16 bytes of a 16-bit type; everything that divides by it is moved so.
UNIT = 8
# Elements of half a tile: eight of each thread of four warps.
TILE = 1024
# With fewer programs than fill the largest GPU twice, a program takes fewer layers.
ENOUGH_PROGRAMS = 2048

_PLACES = tuple(f"{name}_{axis}" for name in ("k_cache", "v_cache") for axis in ("block", "slot", "head"))
_ROWS = tuple(f"{name}_{axis}" for name in ("k", "v", "k_scale", "v_scale") for axis in ("layer", "token", "head"))
# Passed as they are, in units: Triton would compile a kernel for each kind of number, and the unit says all that it needs.
_NUMBERS = ("tokens", "layers", "heads", "block_size", "num_slots", "k_far", "v_far", *_PLACES, *_ROWS)


def unsupported_reason(kv_dtype: torch.dtype, cache: torch.Tensor) -> str | None:
    """Why K/V of `kv_dtype` cannot be moved to or from a layer's cache like `cache`; None where they can."""
    for dtype, known in ((kv_dtype, ROW_DTYPES), (cache.dtype, CACHE_DTYPES)):
        if dtype not in known:
            return f"it does not take {str(dtype).removeprefix('torch.')}"
    if cache.shape[-1] % 2 or not 2 <= cache.shape[-1] <= 2 * TILE:
        return f"it takes an even head_dim up to {2 * TILE}, not {cache.shape[-1]}"
    if interpreted():
        return None
    if cache.device.type != "cuda" or torch.version.cuda is None:
        return f"it needs tensors on an NVIDIA GPU, not on {cache.device}"
    if arch_of(cache.device) < LEAST_ARCH:
        return f"it needs compute capability 8.0, not {arch_of(cache.device) / 10}"
    return None


def injection(k_caches, v_caches, slots, positions, inv_freq, attention_scaling):
    """run(k, v, k_scale, v_scale), which writes K/V into the caches."""
    caches = _cache_groups(k_caches, v_caches)
    slots, positions, inv_freq = slots.contiguous(), positions.contiguous(), inv_freq.float().contiguous()

    def run(k, v, k_scale, v_scale) -> None:
        for group in caches:
            group.launch(inject_kernel, k, v, k_scale, v_scale, slots, positions, inv_freq, attention_scaling)

    return run


def extraction(keys, values, index, positions, inv_freq, attention_scaling, out_k, out_v):
    """run(), which writes the selected K/V into out_k and out_v."""
    caches = _cache_groups(keys, values)
    index = index.contiguous()
    if positions is not None:
        positions, inv_freq = positions.contiguous(), inv_freq.float().contiguous()

    def run() -> None:
        for group in caches:
            group.launch(extract_kernel, out_k, out_v, None, None, index, positions, inv_freq, 1 / attention_scaling)

    return run


# ---- launching ---------------------------------------------------------------------------------------------------------


class _Caches:
    """The caches of layers begin to begin + layers, of equal strides: all that stays the same from call to call."""

    def __init__(self, k_caches: list[torch.Tensor], v_caches: list[torch.Tensor], begin: int):
        self.begin, self.layers, self.kept = begin, len(k_caches), (k_caches, v_caches)
        first = k_caches[0]
        self.strides = (*cache_strides(k_caches[0]), *cache_strides(v_caches[0]))
        self.places = [_places(k_caches), _places(v_caches)]
        self.unit = UNIT if _divides(first, self.strides, self.places) and not v_caches[0].data_ptr() % 16 else 1
        self.far = [_step(places) for places in self.places]
        self.table = None
        if None in self.far:
            self.table = _on_device([[p // self.unit for p in places] for places in self.places], first.device)
            self.far = [0, 0]

    def launch(self, kernel, k, v, k_scale, v_scale, slots, positions, inv_freq, multiplier) -> None:
        """Launch for rows k, v [L, T, H, D] of all layers, of which these are some."""
        first, last = self.begin, self.begin + self.layers
        k, v, k_scale, v_scale = (x if x is None else x[first:last] for x in (k, v, k_scale, v_scale))
        cache, (tokens, heads, head_dim) = self.kept[0][0], k.shape[1:]
        if not k.numel():
            return
        if k.dtype == torch.float8_e4m3fn:
            k, v = k.view(torch.uint8), v.view(torch.uint8)
        half = head_dim // 2
        rows = (k.stride(), v.stride())
        aligned = all(s[3] == 1 and not any(x % UNIT for x in s[:3]) for s in rows) and half % UNIT == 0
        aligned = aligned and not (k.data_ptr() | v.data_ptr()) % 16
        unit = self.unit if aligned else 1
        block = max(2, triton.next_power_of_2(half))
        heads_of_tile = min(triton.next_power_of_2(heads), max(1, TILE // block))
        tokens_of_tile = max(1, TILE // block // heads_of_tile)
        tiles = (triton.cdiv(tokens, tokens_of_tile), triton.cdiv(heads, heads_of_tile))
        shares = min(self.layers, triton.cdiv(ENOUGH_PROGRAMS, tiles[0] * tiles[1]))
        k_cache_dim, v_cache_dim = self.strides[3], self.strides[7]
        places = [x // unit for x in (*self.strides[:3], *self.strides[4:7])]
        scales = [(0, 0, 0) if s is None else s.stride() for s in (k_scale, v_scale)]
        with on_device(cache):
            kernel[(tiles[0], tiles[1], shares)](
                k, v, k_scale, v_scale, cache, self.kept[1][0], self.table, slots, positions, inv_freq,
                multiplier, tokens, self.layers, heads, max(1, cache.shape[-3]), cache.shape[:-2].numel(),
                *(x // unit for x in self.far), *places, *(x // unit for s in rows for x in s[:3]), *scales[0], *scales[1],
                k_cache_dim, v_cache_dim, rows[0][3], rows[1][3],
                HALF=half, BLOCK=block, TOKENS=tokens_of_tile, HEADS=heads_of_tile, UNIT=unit, TABLE_UNIT=self.unit,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


def _cache_groups(k_caches, v_caches) -> list[_Caches]:
    runs = equal_runs(k_caches, v_caches, len(k_caches))
    return [_Caches(k_caches[begin:end], v_caches[begin:end], begin) for begin, end in runs]


def _places(layers: list[torch.Tensor]) -> list[int]:
    """Where each layer begins, in elements from the first; addresses of one dtype differ by whole elements."""
    first, size = layers[0].data_ptr(), layers[0].element_size()
    return [(x.data_ptr() - first) // size for x in layers]


def _step(places: list[int]) -> int | None:
    """The distance from layer to layer where it is always the same, as in one stacked tensor."""
    step = places[1] if len(places) > 1 else 0
    return step if places == [i * step for i in range(len(places))] else None


def _divides(first: torch.Tensor, strides: tuple[int, ...], places: list[list[int]]) -> bool:
    """Whether every half of a row begins at a multiple of 16 bytes."""
    numbers = (*strides[:3], *strides[4:7], *places[0], *places[1], first.shape[-1] // 2)
    return strides[3] == strides[7] == 1 and not first.data_ptr() % 16 and not any(x % UNIT for x in numbers)


def _on_device(table: list[list[int]], device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "backend 'triton' needs a plan that was made before the capture began where layers are separate tensors: their "
            "places have to be copied to the device"
        )
    return torch.tensor(table, dtype=torch.int64).to(device)


# ---- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _sincos(angle):
    """(sin, cos) of |angle| up to 2^20 to 1.3e-7, without the library's detour through local memory for large angles.

    angle = n pi/2 + r: the first product is exact and so is its difference, two more take off what float32 leaves out of
    pi/2 (Cody and Waite). Then minimax polynomials on [-pi/4, pi/4], as in Cephes.
    """
    # Float32 has no fractions from 2^23 to 2^24, so adding 1.5 * 2^23 rounds to an integer.
    n = (angle * 0.636619772367581343 + 12582912.0) - 12582912.0
    r = tl.fma(n, -1.57079637050628662109375, angle)
    r = tl.fma(n, 4.371138828673793e-8, r)
    r = tl.fma(n, 1.71512451e-15, r)
    z = r * r
    s = tl.fma(z, -1.9515295891e-4, 8.3321608736e-3)
    s = tl.fma(z, s, -1.6666654611e-1)
    s = tl.fma(r * z, s, r)
    c = tl.fma(z, 2.443315711809948e-5, -1.388731625493765e-3)
    c = tl.fma(z, c, 4.166664568298827e-2)
    c = tl.fma(z * z, c, tl.fma(z, -0.5, 1.0))
    quadrant = n.to(tl.int32) & 3
    swapped = (quadrant & 1) != 0
    sine, cosine = tl.where(swapped, c, s), tl.where(swapped, s, c)
    return tl.where((quadrant & 2) != 0, -sine, sine), tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def _tile(tokens, heads, HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """(token [TOKENS, 1, 1], head [1, HEADS, 1], column [1, 1, BLOCK], which of the tile's elements there are)."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[None, :, None]
    column = tl.arange(0, BLOCK).to(tl.int64)[None, None, :]
    present = (token < tokens) & (head < heads)
    if BLOCK != HALF:
        present = present & (column < HALF)
    else:
        present = present & (column >= 0)
    return token, head, column, present


@triton.jit
def _turn(position_ptr, inv_freq_ptr, token, tokens, column, multiplier, HALF: tl.constexpr):
    """(sine, cosine) [TOKENS, 1, BLOCK] of the tokens' positions, times `multiplier`."""
    position = tl.load(position_ptr + token, mask=token < tokens, other=0).to(tl.float32)
    frequency = tl.load(inv_freq_ptr + column, mask=column < HALF, other=0.0)
    sine, cosine = _sincos(position * frequency)
    return sine * multiplier, cosine * multiplier


@triton.jit
def _slot(slot_ptr, token, tokens, block_size, num_slots):
    """(block, row within it, whether there is such a slot), each [TOKENS, 1, 1]."""
    slot = tl.load(slot_ptr + token, mask=token < tokens, other=-1).to(tl.int64)
    inside = (slot >= 0) & (slot < num_slots)
    slot = tl.where(inside, slot, 0)
    return slot // block_size, slot % block_size, inside


@triton.jit
def _begin_of_layer(table_ptr, side: tl.constexpr, layer, layers, far, UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr):
    """Elements from the first layer's cache to this one's."""
    if table_ptr is None:
        begin = layer.to(tl.int64) * far * UNIT
    else:
        begin = tl.load(table_ptr + side * layers + layer) * TABLE_UNIT
    return begin


@triton.jit
def _half(stride_dim, HALF: tl.constexpr):
    """Elements from a column to the one that RoPE pairs it with."""
    return tl.cast(stride_dim, tl.int64) * HALF


@triton.jit
def _number(x):
    """As float32. Bytes are float8_e4m3fn, which Triton knows only on later GPUs: shifted, they are a float16 over 2^8."""
    if x.dtype == tl.uint8:
        wide = x.to(tl.uint16)
        bits = ((wide & 0x7F) << 7) | ((wide & 0x80) << 8)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        number = tl.where((wide & 0x7F) == 0x7F, float("nan"), number)
    else:
        number = x.to(tl.float32)
    return number


@triton.jit
def _rotated(low, high, sine, cosine):
    """Half-split RoPE (RoFormer, arXiv 2104.09864, in the layout of LLaMA)."""
    return tl.fma(low, cosine, -(high * sine)), tl.fma(high, cosine, low * sine)


@triton.jit(do_not_specialize=_NUMBERS)
def inject_kernel(
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_cache_ptr, v_cache_ptr, table_ptr, slot_ptr, position_ptr, inv_freq_ptr,
    multiplier, tokens, layers, heads, block_size, num_slots,
    k_far, v_far, k_cache_block, k_cache_slot, k_cache_head, v_cache_block, v_cache_slot, v_cache_head,
    k_layer, k_token, k_head, v_layer, v_token, v_head,
    k_scale_layer, k_scale_token, k_scale_head, v_scale_layer, v_scale_token, v_scale_head,
    k_cache_dim, v_cache_dim, k_dim, v_dim,
    HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr,
):  # fmt: skip
    """Rows k, v [layers, tokens, heads, 2 HALF] into the caches; grid: tiles of tokens, tiles of heads, shares of layers."""
    token, head, column, present = _tile(tokens, heads, HALF, BLOCK, TOKENS, HEADS)
    sine, cosine = _turn(position_ptr, inv_freq_ptr, token, tokens, column, multiplier, HALF)
    block, row, inside = _slot(slot_ptr, token, tokens, block_size, num_slots)
    k_to = k_cache_ptr + (block * k_cache_block + row * k_cache_slot + head.to(tl.int64) * k_cache_head) * UNIT
    v_to = v_cache_ptr + (block * v_cache_block + row * v_cache_slot + head.to(tl.int64) * v_cache_head) * UNIT
    far_token, far_head, written = token.to(tl.int64), head.to(tl.int64), present & inside
    k_from = k_ptr + (far_token * k_token + far_head * k_head) * UNIT + column * k_dim
    v_from = v_ptr + (far_token * v_token + far_head * v_head) * UNIT + column * v_dim
    one_per_row = (token < tokens) & (head < heads)
    for layer in range(tl.program_id(2), layers, tl.num_programs(2)):
        far = tl.cast(layer, tl.int64)
        k = k_from + far * k_layer * UNIT
        v = v_from + far * v_layer * UNIT
        low, high = tl.load(k, mask=present), tl.load(k + _half(k_dim, HALF), mask=present)
        v_low, v_high = tl.load(v, mask=present), tl.load(v + _half(v_dim, HALF), mask=present)
        low, high = _number(low), _number(high)
        if k_scale_ptr is not None:
            k_at = far * k_scale_layer + far_token * k_scale_token + far_head * k_scale_head
            v_at = far * v_scale_layer + far_token * v_scale_token + far_head * v_scale_head
            k_scale = tl.load(k_scale_ptr + k_at, mask=one_per_row, other=0.0)
            v_scale = tl.load(v_scale_ptr + v_at, mask=one_per_row, other=0.0)
            low, high = low * k_scale, high * k_scale
            v_low, v_high = _number(v_low) * v_scale, _number(v_high) * v_scale
        low, high = _rotated(low, high, sine, cosine)
        to = k_to + _begin_of_layer(table_ptr, 0, far, layers, k_far, UNIT, TABLE_UNIT) + column * k_cache_dim
        tl.store(to, low.to(k_cache_ptr.dtype.element_ty), mask=written)
        tl.store(to + _half(k_cache_dim, HALF), high.to(k_cache_ptr.dtype.element_ty), mask=written)
        to = v_to + _begin_of_layer(table_ptr, 1, far, layers, v_far, UNIT, TABLE_UNIT) + column * v_cache_dim
        tl.store(to, v_low.to(v_cache_ptr.dtype.element_ty), mask=written)
        tl.store(to + _half(v_cache_dim, HALF), v_high.to(v_cache_ptr.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=_NUMBERS)
def extract_kernel(
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_cache_ptr, v_cache_ptr, table_ptr, slot_ptr, position_ptr, inv_freq_ptr,
    multiplier, tokens, layers, heads, block_size, num_slots,
    k_far, v_far, k_cache_block, k_cache_slot, k_cache_head, v_cache_block, v_cache_slot, v_cache_head,
    k_layer, k_token, k_head, v_layer, v_token, v_head,
    k_scale_layer, k_scale_token, k_scale_head, v_scale_layer, v_scale_token, v_scale_head,
    k_cache_dim, v_cache_dim, k_dim, v_dim,
    HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr,
):  # fmt: skip
    """Rows of the caches into k, v, which are not quantised; without `inv_freq_ptr` keys are copied. The same grid."""
    token, head, column, present = _tile(tokens, heads, HALF, BLOCK, TOKENS, HEADS)
    block, row, inside = _slot(slot_ptr, token, tokens, block_size, num_slots)
    k_from = k_cache_ptr + (block * k_cache_block + row * k_cache_slot + head.to(tl.int64) * k_cache_head) * UNIT
    v_from = v_cache_ptr + (block * v_cache_block + row * v_cache_slot + head.to(tl.int64) * v_cache_head) * UNIT
    far_token, far_head, read = token.to(tl.int64), head.to(tl.int64), present & inside
    k_to = k_ptr + (far_token * k_token + far_head * k_head) * UNIT + column * k_dim
    v_to = v_ptr + (far_token * v_token + far_head * v_head) * UNIT + column * v_dim
    if inv_freq_ptr is not None:
        sine, cosine = _turn(position_ptr, inv_freq_ptr, token, tokens, column, multiplier, HALF)
    for layer in range(tl.program_id(2), layers, tl.num_programs(2)):
        far = tl.cast(layer, tl.int64)
        k = k_from + _begin_of_layer(table_ptr, 0, far, layers, k_far, UNIT, TABLE_UNIT) + column * k_cache_dim
        v = v_from + _begin_of_layer(table_ptr, 1, far, layers, v_far, UNIT, TABLE_UNIT) + column * v_cache_dim
        # A token that is not there becomes NaN: nobody checks what a captured graph reads.
        low = tl.load(k, mask=read, other=float("nan"))
        high = tl.load(k + _half(k_cache_dim, HALF), mask=read, other=float("nan"))
        v_low = tl.load(v, mask=read, other=float("nan"))
        v_high = tl.load(v + _half(v_cache_dim, HALF), mask=read, other=float("nan"))
        if inv_freq_ptr is not None:
            low, high = _rotated(low.to(tl.float32), high.to(tl.float32), -sine, cosine)
        to = k_to + far * k_layer * UNIT
        tl.store(to, low.to(k_ptr.dtype.element_ty), mask=present)
        tl.store(to + _half(k_dim, HALF), high.to(k_ptr.dtype.element_ty), mask=present)
        to = v_to + far * v_layer * UNIT
        tl.store(to, v_low, mask=present)
        tl.store(to + _half(v_dim, HALF), v_high, mask=present)
