// Decoding: the keys of an item, looked up and copied into shared memory a step at a time.
#pragma once

#include "voco/attention_steps.cuh"
#include "voco/byte_tile.cuh"
#include "voco/decode.h"

namespace voco::decode {

using attention::kAbsent;

constexpr int kKeys = 32;  // of a step

// The keys of a step, before they are copied. Those that there are come first and rise; the others are kAbsent.
struct StepList {
  int key[kKeys];  // as rows know it
  int outer[kKeys], token[kKeys];
  float k_scale[kKeys], v_scale[kKeys];
};

// The keys of an item: `begin` to `end` - 1 of a run, which lies in one place or in blocks.
struct ItemKeys {
  const Keys& keys;
  const int* table;  // of the run, or null
  int outer, num_blocks, block_size;
  int begin, end, head;

  __device__ int steps() const { return (max(end - begin, 0) + kKeys - 1) / kKeys; }
};

__device__ inline int count_bits(uint32_t bits) {
  bits -= bits >> 1 & 0x55555555u;
  bits = (bits & 0x33333333u) + (bits >> 2 & 0x33333333u);
  return ((bits + (bits >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24;
}

// What a lane of the warp that lists a step reads of its key, before the step's list can be written: the block of a paged
// cache, or the scales of bytes, which are never paged.
struct Looked {
  int outer;
  float k_scale, v_scale;

  template <class Stored>
  __device__ static Looked up(const ItemKeys& of, int step) {
    const int key = of.begin + step * kKeys + lane_id();
    Looked looked = {of.outer, 0, 0};
    if (key >= of.end) return looked;
    if constexpr (sizeof(Stored) == 1) {
      const Scales &k = of.keys.k_scale, &v = of.keys.v_scale;
      looked.k_scale = k.data[key * k.token + of.head * k.head];
      looked.v_scale = v.data[key * v.token + of.head * v.head];
    } else if (of.table != nullptr) {
      looked.outer = of.table[key / of.block_size];
    }
    return looked;
  }
  template <class Stored>
  __device__ void list(StepList& list, const ItemKeys& of, int step) const {
    const int key = of.begin + step * kKeys + lane_id();
    int place = lane_id(), token = key;
    bool there = key < of.end;
    if constexpr (sizeof(Stored) == 1) {
      using Numbers = Bytes<Stored>;
      list.k_scale[place] = k_scale * (1 / Numbers::kUnit);
      list.v_scale[place] = v_scale * (Numbers::kLargest / Numbers::kUnit);
    } else if (of.table != nullptr) {
      token = key % of.block_size;
      there = there && outer >= 0 && outer < of.num_blocks;
      const uint32_t all = ballot(there), before = (1u << lane_id()) - 1;
      place = there ? count_bits(all & before) : count_bits(all) + count_bits(~all & before);
    }
    list.key[place] = there ? key : kAbsent;
    list.outer[place] = outer;
    list.token[place] = token;
  }
};

// Copies the rows of one head of a step's keys into a tile; those of kAbsent become zeros.
template <class Stored, int kHeadDim, int kThreads>
__device__ inline void copy_keys(uint32_t tile, const Rows& rows, int64_t head, const StepList& list) {
  constexpr bool kOfBytes = sizeof(Stored) == 1;
  // Where a row of bytes does not fill its place, the threads of the rest have nothing to copy: eight that follow each other
  // then write to eight groups of banks.
  constexpr int kPerChunk = 16 / sizeof(Stored), kChunks = (kOfBytes ? kByteStride<kHeadDim> : kHeadDim) / kPerChunk;
  constexpr int kTurns = kKeys * kChunks / kThreads;
  static_assert(kTurns * kThreads == kKeys * kChunks, "each thread copies as much");
  const Stored* first = static_cast<const Stored*>(rows.data) + head * rows.head;
// More copies that are prepared at a time wait less, and take more registers.
#pragma unroll (kHeadDim * (3 - sizeof(Stored)) <= 192 ? 4 : 1)
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = turn * kThreads + threadIdx.x, chunk = i % kChunks;
    const int row = kOfBytes ? byte_row<kHeadDim>(i / kChunks) : i / kChunks;
    if (chunk * kPerChunk >= kHeadDim) continue;
    const bool present = list.key[row] != kAbsent;
    const Stored* from = first + list.outer[row] * rows.outer + list.token[row] * rows.token + chunk * kPerChunk;
    uint32_t to = tile;
    if constexpr (kOfBytes) {
      to += byte_at<kHeadDim>(row, 16 * chunk);
    } else {
      to += chunk_at<kHeadDim>(row, chunk);
    }
    cp_async16(to, present ? from : first, present);
  }
}

}  // namespace voco::decode
