// Where the operands of a wgmma lie, and the product itself. Part of hopper.cpp and wgmma.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace voco::host {

constexpr int kDepth = 16;

// An operand in shared memory, of `extent` rows (of A, or of B transposed) and 16 of the depth.
struct Operand {
  bool valid, mn_major;
  uint32_t start;
  // In bytes: between tiles of 64 rows (MN-major), and between groups of eight lines of a tile.
  uint32_t tile_stride, group_stride;
};

// The bits of a descriptor: start, distances, what must be 0, the swizzle.
inline Operand decode(uint64_t descriptor, bool mn_major) {
  const auto bytes = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = bytes(0);
  const uint64_t rest = descriptor & ~(uint64_t{0x3fff} | uint64_t{0x3fff} << 16 | uint64_t{0x3fff} << 32);
  // A tile's row is 128 bytes: 4 times 16 of the depth, or 64 rows.
  const bool at_a_row = start % 1024 == 0 || (!mn_major && start % 1024 < 128 && start % 32 == 0);
  return {rest == uint64_t{1} << 62 && at_a_row, mn_major, start, bytes(16), bytes(32)};
}

// As the hardware does it: on addresses. Kernels have a function of their own for offsets in a tile.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// Calls visit(row, depth, address) for all 16 bytes of rows first .. first + extent - 1: eight of the depth of one row, or
// (MN-major) eight rows at one depth.
template <class Visit>
void for_each_chunk(const Operand& operand, int first, int extent, const Visit& visit) {
  if (operand.mn_major) {
    for (int depth = 0; depth < kDepth; ++depth) {
      const uint32_t line = operand.start + depth / 8 * operand.group_stride + depth % 8 * 128;
      for (int row = first; row < first + extent; row += 8) {
        visit(row, depth, swizzled(line + row / 64 * operand.tile_stride + row % 64 * 2));
      }
    }
  } else {
    for (int row = first; row < first + extent; ++row) {
      const uint32_t line = operand.start + row / 8 * operand.group_stride + row % 8 * 128;
      for (int depth = 0; depth < kDepth; depth += 8) visit(row, depth, swizzled(line + 2 * depth));
    }
  }
}

inline float widen_bits(uint16_t bits, bool bf16) {
  uint32_t word = uint32_t{bits} << 16;
  float value;
  if (!bf16) {
    // The exponent has another bias, by 112; this also makes normal numbers of denormal ones.
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    const uint32_t infinite = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    std::memcpy(&word, &value, 4);
    word |= infinite | (bits & 0x8000u) << 16;
  }
  std::memcpy(&value, &word, 4);
  return value;
}

inline void widen(const void* chunk, bool bf16, float (&values)[8]) {
  uint16_t bits[8];
  std::memcpy(bits, chunk, 16);
  for (int i = 0; i < 8; ++i) values[i] = widen_bits(bits[i], bf16);
}

// a[16, 16] out of the registers of a warp's lanes.
inline void widen_registers(const uint32_t (&registers)[32][4], bool bf16, float* a) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const int row = lane / 4 + 8 * (i / 2 % 2), column = lane % 4 * 2 + 8 * (i / 4) + i % 2;
      a[row * kDepth + column] = widen_bits(static_cast<uint16_t>(registers[lane][i / 2] >> 16 * (i % 2)), bf16);
    }
  }
}

// a[16, 16] b[16, columns].
inline std::vector<float> multiply(const float* a, const float* b, int columns) {
  constexpr int kPiece = 16;  // of the columns, which a compiler keeps in registers
  std::vector<float> product(16 * columns);
  for (int row = 0; row < 16; ++row) {
    for (int first = 0; first < columns; first += kPiece) {
      float sums[kPiece] = {};
      for (int k = 0; k < kDepth; ++k) {
        const float factor = a[row * kDepth + k];
        for (int i = 0; i < kPiece; ++i) sums[i] += factor * b[k * columns + first + i];
      }
      std::memcpy(product.data() + row * columns + first, sums, sizeof(sums));
    }
  }
  return product;
}

}  // namespace voco::host
