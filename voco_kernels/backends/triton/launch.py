"""How the kernels are launched: frozen parameters per GPU, head_dim and dtype, and what inputs must look like.

Nothing here needs Triton or a GPU.
"""

from dataclasses import dataclass

import torch

from ...tiles import Geometry, TilePlan

MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 256

# One geometry, so that one plan serves forward and backward of (almost) everything: 64 rows are what Hopper's matrix
# instruction takes, and what registers hold at head_dim 128 beside 64 keys; 16 rows are the least for any tensor core.
GEOMETRY = Geometry(rows=64, small_rows=16, keys=64)
# Two tiles of 64 rows of 256 float32 would leave no room in shared memory for keys.
WIDE_GEOMETRY = Geometry(rows=32, small_rows=16, keys=32)

# Lanes of a run are offset in 32 bits: 64 rows of this stride stay below 2**31.
MAX_ROW_STRIDE = 2**24


@dataclass(frozen=True)
class Launch:
    """Parameters of one kernel.

    Attributes:
        step: keys (dK/dV: rows) per step where nothing is masked.
        edge_step: the same where something may be; a smaller one wastes less where a range ends unevenly.
        warps, stages: as Triton calls them.
    """

    step: int
    edge_step: int
    warps: int
    stages: int


# Keys: (compute capability times ten, head_dim padded to a power of two, "half" or "float32"). No GPU has measured them yet;
# the reason for each is what the compiler reports, which `tests/triton_budget.json` records: no spilled registers in half
# precision up to head_dim 128, and among such parameters the most warps that fit on a multiprocessor. `bench/tune_triton.py`
# measures the alternatives on a GPU and prints tables like these.
FORWARD = {
    # Edges of 32 keys waste less than edges of 64 where a range ends unevenly, and need fewer registers.
    (80, 32, "half"): Launch(64, 32, warps=4, stages=2),
    (80, 64, "half"): Launch(64, 32, warps=4, stages=3),
    # Steps of 64 keys fill the registers: Triton 3.6 spills 15 of them, 3.9 none.
    (80, 128, "half"): Launch(32, 32, warps=4, stages=3),
    # At head_dim 256 the accumulator alone is 128 registers of each thread of four warps.
    (80, 256, "half"): Launch(32, 32, warps=8, stages=2),
    # Products of float32 run on the ordinary cores: eight warps share a tile, smaller steps spare registers.
    (80, 32, "float32"): Launch(32, 32, warps=8, stages=2),
    (80, 64, "float32"): Launch(32, 32, warps=8, stages=2),
    (80, 128, "float32"): Launch(16, 16, warps=8, stages=2),
    (80, 256, "float32"): Launch(16, 16, warps=8, stages=2),
    # 175 and 168 registers: two and three programs of four warps.
    (90, 32, "half"): Launch(64, 32, warps=4, stages=2),
    (90, 64, "half"): Launch(64, 32, warps=4, stages=2),
    # Two programs share a multiprocessor; a third stage would leave shared memory for one.
    (90, 128, "half"): Launch(64, 32, warps=4, stages=2),
    (90, 256, "half"): Launch(32, 32, warps=8, stages=2),
    (90, 32, "float32"): Launch(32, 32, warps=8, stages=2),
    (90, 64, "float32"): Launch(32, 32, warps=8, stages=2),
    (90, 128, "float32"): Launch(16, 16, warps=8, stages=2),
    (90, 256, "float32"): Launch(16, 16, warps=8, stages=2),
}
DQ = {
    # Three products a step need twice the registers of the forward's two beside the accumulator: steps of 32 keys.
    (80, 32, "half"): Launch(64, 32, warps=4, stages=3),
    (80, 64, "half"): Launch(32, 32, warps=4, stages=3),
    (80, 128, "half"): Launch(32, 32, warps=4, stages=3),
    (80, 256, "half"): Launch(32, 32, warps=8, stages=2),
    (80, 32, "float32"): Launch(32, 32, warps=8, stages=2),
    (80, 64, "float32"): Launch(32, 32, warps=8, stages=2),
    (80, 128, "float32"): Launch(16, 16, warps=8, stages=2),
    (80, 256, "float32"): Launch(16, 16, warps=8, stages=2),
    (90, 32, "half"): Launch(64, 32, warps=4, stages=3),
    (90, 64, "half"): Launch(32, 32, warps=4, stages=3),
    # A third stage spills six registers.
    (90, 128, "half"): Launch(32, 32, warps=4, stages=2),
    (90, 256, "half"): Launch(32, 32, warps=8, stages=2),
    (90, 32, "float32"): Launch(32, 32, warps=8, stages=2),
    (90, 64, "float32"): Launch(32, 32, warps=8, stages=2),
    (90, 128, "float32"): Launch(16, 16, warps=8, stages=2),
    (90, 256, "float32"): Launch(16, 16, warps=8, stages=2),
}
DKV = {
    # Two accumulators: eight warps from head_dim 128 on, one program on a multiprocessor, hence a third stage.
    (80, 32, "half"): Launch(32, 32, warps=4, stages=3),
    # A third stage spills 11 registers with Triton 3.6.
    (80, 64, "half"): Launch(32, 32, warps=4, stages=2),
    (80, 128, "half"): Launch(32, 32, warps=8, stages=3),
    (80, 256, "half"): Launch(32, 32, warps=8, stages=2),
    (80, 32, "float32"): Launch(16, 16, warps=8, stages=2),
    (80, 64, "float32"): Launch(16, 16, warps=8, stages=2),
    (80, 128, "float32"): Launch(16, 16, warps=8, stages=2),
    (80, 256, "float32"): Launch(16, 16, warps=8, stages=2),
    (90, 32, "half"): Launch(32, 32, warps=4, stages=3),
    (90, 64, "half"): Launch(32, 32, warps=4, stages=3),
    (90, 128, "half"): Launch(32, 32, warps=8, stages=3),
    # 16 rows a step spill half as many registers as 32.
    (90, 256, "half"): Launch(16, 16, warps=8, stages=2),
    (90, 32, "float32"): Launch(16, 16, warps=8, stages=2),
    (90, 64, "float32"): Launch(16, 16, warps=8, stages=2),
    (90, 128, "float32"): Launch(16, 16, warps=8, stages=2),
    (90, 256, "float32"): Launch(16, 16, warps=8, stages=2),
}
TABLES = {"forward": FORWARD, "dq": DQ, "dkv": DKV}


def geometry_of(head_dim: int, dtype: torch.dtype) -> Geometry:
    """The sizes of tiles for all kernels."""
    return WIDE_GEOMETRY if dtype == torch.float32 and padded_head_dim(head_dim) == 256 else GEOMETRY


def launch_of(kernel: str, arch: int, head_dim: int, dtype: torch.dtype) -> Launch:
    """The parameters of `kernel` for a compute capability (times ten); later GPUs of a family use its first one's."""
    family = 90 if arch >= 90 else 80
    return TABLES[kernel][family, padded_head_dim(head_dim), "float32" if dtype == torch.float32 else "half"]


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a tile has in registers."""
    return max(MIN_HEAD_DIM, 1 << (head_dim - 1).bit_length())


def prepared(x: torch.Tensor) -> torch.Tensor:
    """`x` [N, H, D] as the kernels read it: itself, or a copy with head_dim padded by zeros to a multiple of 16.

    Rows must be contiguous and start at multiples of 16 bytes, else the compiler falls back to narrow loads, and those
    cannot be asynchronous copies. It only knows what divides by 16 as a number: strides in elements, and the address.
    """
    strides = strides_of(x)
    fits = x.stride(2) == 1 and not x.shape[2] % 16 and not any(s % 16 for s in strides) and not x.data_ptr() % 16
    if fits and strides[0] < MAX_ROW_STRIDE:
        return x
    n, heads, head_dim = x.shape
    copy = x.new_zeros(n, heads, -(-head_dim // 16) * 16)
    copy[..., :head_dim] = x
    return copy


def unpadded(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A result [N, H, D] without the columns that `prepared` added, contiguous; itself where there are none."""
    return x if x.shape[2] == head_dim else x[..., :head_dim].contiguous()


def strides_of(x: torch.Tensor) -> tuple[int, int]:
    """(stride of tokens, stride of heads) in elements; 0 where there is only one, whatever the tensor says."""
    return tuple(x.stride(i) if x.shape[i] > 1 else 0 for i in (0, 1))


def needs_int64(*tensors: torch.Tensor) -> bool:
    """Whether a token's offset in one of the tensors may exceed int32."""
    return any(x.shape[0] * strides_of(x)[0] + x.shape[2] >= 2**31 for x in tensors)


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: exactly, unless torch is allowed to use TF32."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 there are two ways to allow it; reading the old one raises once the new one was used.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def num_programs(tiles: torch.Tensor, plan: TilePlan, heads: int) -> int:
    """The grid: a program for every tile and head."""
    return heads * plan.likely(tiles)
