// What the attention kernels share: the tokens of a tile, and the pipeline that brings what a tile meets into shared memory.
//
// A tile meets up to three ranges of tokens, one after the other, kStep tokens at a time. Each token that a step has no more
// of is kAbsent: larger than any token, so that within a step tokens always rise.
#pragma once

#include "voco/attention.h"
#include "voco/mma_tile.cuh"

namespace voco::attention {

constexpr int kAbsent = 0x7fffffff;
constexpr int kKeyStep = 32;  // keys that a row tile takes in at a time, on all GPUs
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr int kInfinityBits = 0x7f800000;

// body(columns of the tile, head) for every gridDim.x-th pair of a tile and a head. All heads of a tile are neighbours in
// the grid, since they read the same rows of memory, and with groups the same keys.
template <int kColumns, class Body>
__device__ inline void for_each_pair(const Plan& plan, int heads, Body body) {
  // Not in a register, of which the body needs all.
  VOCO_SHARED(int, pair, 1);
  if (threadIdx.x == 0) pair[0] = blockIdx.x;
  sync_block();
  while (pair[0] < plan.num_tiles * heads) {
    const int* columns = plan.tiles + kColumns * (pair[0] / heads);
    // Behind the last tile there is nothing.
    if (columns[1] == 0) break;
    body(columns, pair[0] % heads);
    // Everyone is through with the pair before the next one begins, and with all copies for it: of a tile that meets nothing,
    // no step has waited for them. The pair's number was read before the body's first barrier.
    cp_async_wait<0>();
    if (threadIdx.x == 0) pair[0] += gridDim.x;
    sync_block();
  }
}

// The row of a token in one head.
template <class T>
__device__ inline T* row_of(const Rows& rows, int64_t token, int64_t head) {
  return static_cast<T*>(rows.data) + token * rows.token + head * rows.head;
}

// A range of tokens (index is null), or of an index of tokens.
struct Range {
  const int* index;
  int begin, end;
};

// The ranges of a tile, cut into steps of kStep tokens; the last step of a range may have fewer. It lies in shared memory
// while the steps are gone through: in registers it would take more than the products leave.
template <int kRanges, int kStep>
struct Steps {
  Range ranges[kRanges];
  int first[kRanges + 1];  // step of each range, and behind the last

  __device__ void count() {
    first[0] = 0;
#pragma unroll
    for (int r = 0; r < kRanges; ++r) {
      first[r + 1] = first[r] + (max(ranges[r].end - ranges[r].begin, 0) + kStep - 1) / kStep;
    }
  }
  __device__ int size() const { return first[kRanges]; }
  __device__ int token(int step, int lane) const {
    Range range = ranges[0];
    int base = 0;
    // Not indexed by a number that only the GPU knows: the array would lie in memory.
#pragma unroll
    for (int r = 1; r < kRanges; ++r) {
      if (step >= first[r]) {
        range = ranges[r];
        base = first[r];
      }
    }
    const int place = range.begin + (step - base) * kStep + lane;
    return place >= range.end ? kAbsent : range.index ? range.index[place] : place;
  }
};

// The rows of a row tile. Those of a segment are neighbours, and the last of them ends their own range.
struct TileRows {
  const int* index;
  int begin, count, first;

  __device__ TileRows(const Plan& plan, const int* columns)
      : index(plan.row_index), begin(columns[0]), count(columns[1]), first(columns[7] > 0 ? columns[7] - columns[1] : -1) {}
  // Rows behind the last one are the last one once more.
  __device__ int row(int i) const {
    i = min(i, count - 1);
    return first >= 0 ? first + i : index[begin + i];
  }
};

template <int kStep>
__device__ inline Steps<2, kStep> keys_of(const Plan& plan, const int* columns) {
  Steps<2, kStep> steps = {{{plan.key_index, columns[2], columns[4]}, {nullptr, columns[5], columns[7]}}};
  steps.count();
  return steps;
}

// 16 rows of one head as operand A of a warp's products: in its registers, or in a tile in shared memory.
template <int kHeadDim, bool kInRegisters>
struct Operand;

template <int kHeadDim>
struct Operand<kHeadDim, true> {
  uint32_t words[kHeadDim / 16][4];

  // Of a lane's rows g and g + 8, from memory.
  __device__ void load(const void* low, const void* high) {
    uint32_t columns[2][kHeadDim / 8];
    load_row<kHeadDim>(columns[0], low);
    load_row<kHeadDim>(columns[1], high);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) words[k][i] = columns[i % 2][2 * k + i / 2];
    }
  }
  __device__ void fragment(uint32_t (&a)[4], int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = words[k][i];
  }
};

template <int kHeadDim>
struct Operand<kHeadDim, false> {
  uint32_t tile;
  int row;

  __device__ void fragment(uint32_t (&a)[4], int k) const { load_a<kHeadDim>(a, tile, row, k); }
};

// c += a b: `a` is 16 by 16, and `b` the rows `row` to `row` + 15 of a tile.
template <class T, int kHeadDim>
__device__ inline void add_product(float (&c)[kHeadDim / 8][4], const uint32_t (&a)[4], uint32_t tile, int row) {
#pragma unroll
  for (int n = 0; n < kHeadDim / 16; ++n) {
    uint32_t b[4];
    load_b<kHeadDim>(b, tile, row, n);
    mma_m16n8k16<T>(c[2 * n], a, b[0], b[1]);
    mma_m16n8k16<T>(c[2 * n + 1], a, b[2], b[3]);
  }
}

// 16 by 16 results of products, rounded, as operand A of the next.
template <class T>
__device__ inline void as_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// Rows g and g + 8 of accumulators, times a factor, to memory.
template <class T, int kHeadDim>
__device__ inline void store_sums(void* row, const float (&sums)[kHeadDim / 8][4], int half, float factor, bool valid) {
  uint32_t words[kHeadDim / 8];
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) words[n] = pack<T>(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor);
  store_row<kHeadDim>(row, words, valid);
}

// sum(a * b) of two rows in memory, by the four lanes of a row together.
template <class T, int kHeadDim>
__device__ inline float dot_rows(const T* a, const T* b) {
  float sum = 0;
#pragma unroll
  for (int chunk = lane_id() % 4; chunk < kHeadDim / 8; chunk += 4) {
    const uint4 x = load16(a + 8 * chunk), y = load16(b + 8 * chunk);
    const uint32_t left[4] = {x.x, x.y, x.z, x.w}, right[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 l = unpack<T>(left[i]), r = unpack<T>(right[i]);
      sum = fma_rn(l.x, r.x, fma_rn(l.y, r.y, sum));
    }
  }
  sum += shfl_xor(sum, 1);
  return sum + shfl_xor(sum, 2);
}

// Copies the rows of one head of kRows tokens into a tile in shared memory; those of kAbsent become zeros. kUnroll copies
// are prepared at a time: more of them wait less for their tokens, and take more registers.
template <class T, int kHeadDim, int kRows, int kThreads, int kUnroll = 4>
__device__ inline void copy_rows(uint32_t tile, const Rows& rows, int64_t head, const int* tokens) {
  constexpr int kChunks = kHeadDim / 8, kTurns = kRows * kChunks / kThreads;
  static_assert(kTurns * kThreads == kRows * kChunks, "each thread copies as much");
  const T* first = row_of<T>(rows, 0, head);
#pragma unroll kUnroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = turn * kThreads + threadIdx.x, row = i / kChunks, chunk = i % kChunks, token = tokens[row];
    const bool present = token != kAbsent;
    cp_async16(tile + chunk_at<kHeadDim>(row, chunk), present ? first + token * rows.token + chunk * 8 : first, present);
  }
}

// The keys that a row tile meets, on their way through shared memory: kStages stages of kStep keys and values. It also holds
// the tokens of the tile's rows. kUnroll is that of copy_rows.
template <class T, int kHeadDim, int kWarps, int kStages, int kUnroll = 4>
struct KeyPipeline {
  static constexpr int kStep = kKeyStep, kThreads = 32 * kWarps;
  static constexpr int kTileBytes = kStep * kHeadDim * 2, kStageBytes = 2 * kTileBytes;
  // Tokens of the steps that are copied, of the one that is computed, and of the one that comes next.
  static constexpr int kSlots = kStages + 1;
  using KeySteps = Steps<2, kStep>;
  static constexpr int kSharedBytes =
      kStages * kStageBytes + sizeof(KeySteps) + (kSlots * kStep + kTileRows) * static_cast<int>(sizeof(int));

  const Arguments& args;
  const int key_head;
  uint32_t stages;
  KeySteps& steps;
  int *rows, *tokens;

  __device__ KeyPipeline(const Arguments& args, int key_head, char* shared)
      : args(args),
        key_head(key_head),
        stages(smem_address(shared)),
        steps(*reinterpret_cast<KeySteps*>(shared + kStages * kStageBytes)),
        rows(reinterpret_cast<int*>(&steps + 1)),
        tokens(rows + kTileRows) {}

  __device__ uint32_t keys(int step) const { return stages + step % kStages * kStageBytes; }
  __device__ uint32_t values(int step) const { return keys(step) + kTileBytes; }
  __device__ int* of_step(int step) const { return tokens + step % kSlots * kStep; }

  // Looks up rows and the first steps; then copies may begin.
  __device__ void open(const TileRows& tile, const int* columns) const {
    const auto all = keys_of<kStep>(args.plan, columns);
    for (int i = threadIdx.x; i < kTileRows; i += kThreads) rows[i] = tile.row(i);
    for (int step = warp_id(); step < kStages; step += kWarps) of_step(step)[lane_id()] = all.token(step, lane_id());
    if (threadIdx.x == 0) steps = all;
    sync_block();
  }
  __device__ void start() const {
    for (int step = 0; step < kStages - 1; ++step) copy(step);
  }
  // When it returns, a step is there, and the next ones are under way. Returns what keep() needs when the step is done: warp
  // 0 looks up tokens one step before they are copied.
  __device__ int arrive(int step) const {
    cp_async_wait<kStages - 2>();
    sync_block();
    int upcoming = kAbsent;
    if (warp_id() == 0) upcoming = steps.token(step + kStages, lane_id());
    copy(step + kStages - 1);
    return upcoming;
  }
  __device__ void keep(int step, int upcoming) const {
    if (warp_id() == 0) of_step(step + kStages)[lane_id()] = upcoming;
  }

 private:
  __device__ void copy(int step) const {
    if (step < steps.size()) {
      copy_rows<T, kHeadDim, kStep, kThreads, kUnroll>(keys(step), args.k, key_head, of_step(step));
      copy_rows<T, kHeadDim, kStep, kThreads, kUnroll>(values(step), args.v, key_head, of_step(step));
    }
    cp_async_commit();
  }
};

}  // namespace voco::attention
