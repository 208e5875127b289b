// Tiles of rows of bytes (int8, or float8 e4m3), in swizzled shared memory, and what tensor cores take of them: 16-bit
// numbers, which are made in registers.
//
// ldmatrix cannot take single bytes apart, so lanes load neighbouring bytes of a row, and products are permuted to fit: in q
// k^T the depth (those are columns of a key), in the weights' product with v the order of the results' columns.
#pragma once

#include "voco/mma_tile.cuh"

namespace voco {

// Bytes from a row to the next; a row of 96 takes the place of 128.
template <int kColumns>
constexpr int kByteStride = kColumns == 64 ? 64 : (kColumns + 127) / 128 * 128;

// The place among rows that a row has, and the row that has a place. Two rows of 64 fill all banks, and of every four the
// middle ones have changed places.
template <int kColumns>
__device__ inline int byte_row(int row) {
  return kColumns == 64 ? row / 4 * 4 + row % 2 * 2 + row / 2 % 2 : row;
}

// The place of a byte: chunks of 16 stay together. Among eight rows that follow each other, four that do so, and four at a
// distance of two, have a pair of chunks each (32 bytes) in four different groups of banks, which is what loads below read
// in a cycle.
template <int kColumns>
__device__ inline uint32_t byte_at(int row, int column) {
  const int swizzle = row % 4 ^ row / 4 % 2;
  return byte_row<kColumns>(row) * kByteStride<kColumns> + (column ^ (kColumns == 64 ? swizzle % 2 : swizzle) * 32);
}

// Four bytes to 16-bit numbers, two in a word. They are the stored ones times kUnit, which is what the type makes cheapest.
template <class Stored>
struct Bytes;

template <>
struct Bytes<int8_t> {
  static constexpr float kUnit = 1;
  // Values' scales are multiplied by it before weights are rounded, so that weights in float16 are as large as with values
  // that are not quantised: a row's largest byte is 127.
  static constexpr float kLargest = 128;

  template <class T>
  __device__ static void widen(uint32_t (&words)[2], uint32_t bytes) {
    if constexpr (std::is_same_v<T, __half>) {
      // 0x6400 + u is 1024 + u, and u is the byte plus 128.
      bytes ^= 0x80808080u;
      words[0] = minus<T>(permute_bytes(bytes, 0x64646464u, 0x4140), 0x64806480u);
      words[1] = minus<T>(permute_bytes(bytes, 0x64646464u, 0x4342), 0x64806480u);
    } else {
      // 0x4300 + u is 128 + u for u below 128, and 0x4380 is 256.
      const uint32_t low = permute_bytes(bytes, 0x43434343u, 0x4140), high = permute_bytes(bytes, 0x43434343u, 0x4342);
      words[0] = minus<T>(low & 0xff7fff7fu, low & 0xff80ff80u);
      words[1] = minus<T>(high & 0xff7fff7fu, high & 0xff80ff80u);
    }
  }

 private:
  template <class T>
  __device__ static uint32_t minus(uint32_t x, uint32_t y) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const Pair difference = __hsub2(reinterpret_cast<const Pair&>(x), reinterpret_cast<const Pair&>(y));
    return reinterpret_cast<const uint32_t&>(difference);
  }
};

template <>
struct Bytes<__nv_fp8_e4m3> {
  static constexpr float kUnit = 1.0f / 256;
  static constexpr float kLargest = 1;  // 448 / 256

  // The bits of exponent and mantissa, moved to where the wider type has them: its exponent is larger by 8, or by 120. NaN,
  // which quantised numbers never are, becomes 480.
  template <class T>
  __device__ static void widen(uint32_t (&words)[2], uint32_t bytes) {
    words[0] = moved<T>(permute_bytes(bytes, 0, 0x1404));
    words[1] = moved<T>(permute_bytes(bytes, 0, 0x3424));
  }

 private:
  template <class T>
  __device__ static uint32_t moved(uint32_t x) {
    const uint32_t sign = x & 0x80008000u;
    if constexpr (std::is_same_v<T, __half>) {
      return sign | (x >> 1 & 0x3f803f80u);
    } else {
      const uint32_t small = sign | (x >> 4 & 0x07f007f0u), factor = 0x77807780u;  // 2^112
      const __nv_bfloat162 product =
          __hmul2(reinterpret_cast<const __nv_bfloat162&>(small), reinterpret_cast<const __nv_bfloat162&>(factor));
      return reinterpret_cast<const uint32_t&>(product);
    }
  }
};

// ---- q k^T -------------------------------------------------------------------------------------------------------------

// 16 rows of queries as operand A against keys of bytes: a lane keeps them in shared memory of its own, in the order in
// which it takes them, 16 bytes at a time. Of the depth, columns 32 j + 8 t to 32 j + 8 t + 7 are lane t's in steps 2 j and
// 2 j + 1.
template <int kHeadDim>
struct ByteQueries {
  static constexpr int kBytes = 16 * kHeadDim * 2;
  char* fragments;  // of the warp

  // Of a lane's rows g and g + 8, from memory.
  __device__ void load(const void* low, const void* high) const {
    const uint4 *of_low = static_cast<const uint4*>(low), *of_high = static_cast<const uint4*>(high);
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      const uint4 x = load16(of_low + 4 * j + lane_id() % 4), y = load16(of_high + 4 * j + lane_id() % 4);
      store16(place(2 * j), make_uint4(x.x, y.x, x.y, y.y));
      store16(place(2 * j + 1), make_uint4(x.z, y.z, x.w, y.w));
    }
  }
  __device__ void fragment(uint32_t (&a)[4], int k) const {
    const uint4 x = load16(place(k));
    a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w;
  }

 private:
  __device__ char* place(int k) const { return fragments + (32 * k + lane_id()) * 16; }
};

// Steps 2 j and 2 j + 1 of a key's depth as operand B, for the keys `key` to `key` + 7.
template <class T, class Stored, int kHeadDim>
__device__ inline void load_keys(uint32_t (&b)[2][2], const char* tile, int key, int j) {
  const uint2 bytes = load8(tile + byte_at<kHeadDim>(key + lane_id() / 4, 32 * j + lane_id() % 4 * 8));
  Bytes<Stored>::template widen<T>(b[0], bytes.x);
  Bytes<Stored>::template widen<T>(b[1], bytes.y);
}

// ---- weights times v ---------------------------------------------------------------------------------------------------

// Neighbouring columns of a value's row that a lane takes at a time. Column c of block n of the results is column
// (n / kValueWidth) 8 kValueWidth + c kValueWidth + n % kValueWidth of the values.
template <int kHeadDim>
constexpr int kValueWidth = kHeadDim % 64 == 0 ? 8 : 4;

template <int kWidth>
__device__ inline void load_words(uint32_t (&words)[kWidth / 4], const char* from) {
  if constexpr (kWidth == 8) {
    const uint2 x = load8(from);
    words[0] = x.x, words[1] = x.y;
  } else {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  }
}

// add(n, b0, b1) for every block n of 8 columns of the results: operand B of the values `key` to `key` + 15.
template <class T, class Stored, int kHeadDim, class Add>
__device__ inline void with_values(const char* tile, int key, Add add) {
  constexpr int kWidth = kValueWidth<kHeadDim>;
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int part = 0; part < kHeadDim / (8 * kWidth); ++part) {
    uint32_t words[4][kWidth / 4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_words<kWidth>(words[i], tile + byte_at<kHeadDim>(key + 2 * t + i % 2 + i / 2 * 8, (8 * part + g) * kWidth));
    }
#pragma unroll
    for (int w = 0; w < kWidth / 4; ++w) {
      uint32_t b[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t one = words[2 * half][w], next = words[2 * half + 1][w];
        uint32_t pairs[2];
        Bytes<Stored>::template widen<T>(pairs, permute_bytes(one, next, 0x5140));
        b[half][0] = pairs[0], b[half][1] = pairs[1];
        Bytes<Stored>::template widen<T>(pairs, permute_bytes(one, next, 0x7362));
        b[half][2] = pairs[0], b[half][3] = pairs[1];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) add(part * kWidth + 4 * w + i, b[0][i], b[1][i]);
    }
  }
}

}  // namespace voco
