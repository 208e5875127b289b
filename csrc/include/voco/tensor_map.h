// Describes a tensor to TMA, the unit of a Hopper GPU that copies boxes of tensors to shared memory.
#pragma once

#include <cstdint>

namespace voco {

// A box has this many columns: 128 bytes.
constexpr int kBoxColumns = 64;

// A tensor of 16-bit elements, [tokens, heads, columns], whose columns follow each other. Strides are in elements.
struct TensorLayout {
  const void* data;
  int64_t tokens, heads, columns;
  int64_t token_stride, head_stride;
};

// A kernel takes it as a parameter, const __grid_constant__ TensorMap, and gives its address to tma_load.
struct alignas(128) TensorMap {
#ifdef VOCO_HOST
  TensorLayout layout;
  int box_rows;
#else
  uint64_t words[16];  // a CUtensorMap
#endif
};

// Makes *map, for boxes of one head, kBoxColumns columns and box_rows tokens. In shared memory each token has 128 bytes,
// swizzled (swizzle128); zeros stand for what is outside the tensor. Does not throw, and returns a CUDA error code, 0 for
// success: cudaErrorInvalidValue unless data and strides in bytes are multiples of 16, strides (that of a single token or
// head too) positive and less than 2^40 bytes, sizes in 1 .. 2^32, and box_rows in 1 .. 256; cudaErrorInsufficientDriver
// without a driver of CUDA 12 or later.
int make_tensor_map(TensorMap* map, const TensorLayout& layout, int box_rows);

}  // namespace voco
