// Tiles of 16-bit rows, as tensor cores take them: in swizzled shared memory, and in registers.
//
// A warp's operands are cut into tiles of 16 rows. With g = lane / 4 and t = lane % 4 a lane holds of a tile rows g and g +
// 8, and of each 8 columns number 2t and 2t + 1 (ops.cuh, mma_m16n8k16).
#pragma once

#include "voco/ops.cuh"

namespace voco {

__device__ inline int lane_id() { return threadIdx.x % 32; }
__device__ inline int warp_id() { return threadIdx.x / 32; }

template <class T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class T>
__device__ inline float2 unpack(uint32_t pair);
template <>
__device__ inline float2 unpack<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}
template <>
__device__ inline float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

// The place, in bytes, of 16 bytes (a chunk of eight columns) in a tile of rows of kColumns, which begins at a multiple of
// 128: one chunk of eight rows that follow each other, which is what ldmatrix reads in a cycle, lies in eight different
// groups of banks.
template <int kColumns>
__device__ inline uint32_t chunk_at(int row, int chunk) {
  static_assert(kColumns % 32 == 0, "rows are multiples of 64 bytes");
  // Rows of 64 more bytes than a multiple of 128 alternate between two halves of the banks by themselves.
  const int swizzle = kColumns % 64 == 0 ? row % 8 : row / 2 % 4;
  return row * (2 * kColumns) + (chunk ^ swizzle) * 16;
}

// The address 2 * pairs chunks further in its row than `address`, one of the first two chunks of a row. Only bits change
// that the tile's alignment keeps free, so one register and constants do for a whole row.
template <int kColumns>
__device__ inline uint32_t further(uint32_t address, int pairs) {
  constexpr int kSpan = kColumns % 64 == 0 ? 128 : 64;  // bytes that chunk_at swizzles within
  const int bytes = 32 * pairs;
  return (address ^ bytes % kSpan) + bytes / kSpan * kSpan;
}

// A tile as operand A, k16 being 16 columns of it: rows `row` to `row` + 15.
template <int kColumns>
__device__ inline void load_a(uint32_t (&a)[4], uint32_t tile, int row, int k16) {
  ldmatrix_x4(a, further<kColumns>(tile + chunk_at<kColumns>(row + lane_id() % 16, lane_id() / 16), k16));
}

// A tile's transpose as operand B, 16 of its rows being columns of B: b[0], b[1] those of the first eight, b[2], b[3] of the
// rest.
template <int kColumns>
__device__ inline void load_b_transposed(uint32_t (&b)[4], uint32_t tile, int row, int k16) {
  const int in_tile = row + lane_id() / 16 * 8 + lane_id() % 8;
  ldmatrix_x4(b, further<kColumns>(tile + chunk_at<kColumns>(in_tile, lane_id() / 8 % 2), k16));
}

// A tile as operand B, 16 rows of it being the depth: b[0], b[1] for the first eight of 16 columns, b[2], b[3] for the rest.
template <int kColumns>
__device__ inline void load_b(uint32_t (&b)[4], uint32_t tile, int row, int n16) {
  ldmatrix_x4_trans(b, further<kColumns>(tile + chunk_at<kColumns>(row + lane_id() % 16, lane_id() / 16), n16));
}

// Exchanges words among the four lanes of a row: word i of lane t becomes word t of lane i.
__device__ inline void transpose_in_row(uint32_t (&words)[4]) {
  const int t = lane_id() % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = t & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t other = shfl_xor(high ? words[i] : words[i ^ bit], bit);
      words[i] = high ? other : words[i];
      words[i ^ bit] = high ? words[i ^ bit] : other;
    }
  }
}

// One row's part of a lane's registers, from memory where the row lies: words[c] are columns 8c + 2t and 8c + 2t + 1.
template <int kColumns>
__device__ inline void load_row(uint32_t (&words)[kColumns / 8], const void* row) {
  const uint4* chunks = static_cast<const uint4*>(row);
#pragma unroll
  for (int c = 0; c < kColumns / 8; c += 4) {
    const uint4 chunk = load16(chunks + c + lane_id() % 4);
    uint32_t four[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    transpose_in_row(four);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[c + i] = four[i];
  }
}

// The same to memory; lanes of rows that are not there pass valid = false.
template <int kColumns>
__device__ inline void store_row(void* row, const uint32_t (&words)[kColumns / 8], bool valid) {
  uint4* chunks = static_cast<uint4*>(row);
#pragma unroll
  for (int c = 0; c < kColumns / 8; c += 4) {
    uint32_t four[4] = {words[c], words[c + 1], words[c + 2], words[c + 3]};
    transpose_in_row(four);
    if (valid) store16(chunks + c + lane_id() % 4, make_uint4(four[0], four[1], four[2], four[3]));
  }
}

}  // namespace voco
