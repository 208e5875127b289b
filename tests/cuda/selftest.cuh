// Kernels that use each function of voco/ops.cuh, and defects to seed in them: the emulation must catch every one.
#pragma once

#include "voco/ops.cuh"

namespace voco::selftest {

enum class Defect {
  kNone,
  kUnmaskedTail,           // copy: the last vector reaches behind the end
  kMisaligned,             // copy: vectors start at the second element
  kSlotOffByOne,           // scatter
  kHalfWarp,               // sum: half a warp calls a function of the full warp
  kDivergentBarrier,       // sum: one barrier for the first warp, another for the rest
  kReturnBeforeBarrier,    // sum: the last warp has nothing to add
  kMissingWarpBarrier,     // rotate
  kMissingBarrier,         // transpose: reads before all have written
  kSharedOverflow,         // transpose: writes behind the shared memory
  kLaxWait,                // matmul: reads a tile whose copies may be under way
  kMissingCommit,          // matmul: waits for a group that was never closed
  kMissingBarrierAfterWait,  // matmul: reads what other threads have copied
  kPrefetchBeforeBarrier,  // matmul: overwrites a stage that slower warps still read
  kPrefetchIntoUsedStage,  // matmul
  kNoSwizzle,              // matmul: right, but slow
  kOutsideShared,          // matmul: ldmatrix of a row that is not there
  kPlainAdd,               // histogram: += instead of an atomic addition
};

constexpr int kWarp = 32;

// to[i] = from[i], and the coordinates of the thread that copied it; 16 bytes a thread, then what is left singly.
struct CopyArgs {
  const __half* from;
  __half* to;
  int count;
  Defect defect;
};

__global__ void copy(const __grid_constant__ CopyArgs args) {
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int i = ((blockIdx.z * gridDim.y + blockIdx.y) * threads + thread) * 8;
  const int shift = args.defect == Defect::kMisaligned;
  if (i + 8 <= args.count || (args.defect == Defect::kUnmaskedTail && i < args.count)) {
    store16(args.to + i, load16(args.from + i + shift));
  } else if (i + 4 <= args.count) {
    store8(args.to + i, load8(args.from + i));
    for (int j = i + 4; j < args.count; ++j) args.to[j] = args.from[j];
  } else {
    for (int j = i; j < args.count; ++j) args.to[j] = args.from[j];
  }
}

// to[slots[i]] = scale from[i] + shift, rounded once.
struct ScatterArgs {
  const float* from;
  const int* slots;
  float* to;
  float scale, shift;
  int count;
  Defect defect;
};

__global__ void scatter(const __grid_constant__ ScatterArgs args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= args.count) return;
  int slot = args.slots[i];
  if (args.defect == Defect::kSlotOffByOne) slot = (slot + 1) % args.count;
  args.to[slot] = fma_rn(args.scale, args.from[i], args.shift);
}

// Numbers that no other lane sees: powers[i] = 2^from[i], and bytes that selectors name.
struct NumbersArgs {
  const float* from;
  const uint32_t *words, *selectors;
  float* powers;
  uint32_t* chosen;
  int count;
};

__global__ void numbers(const __grid_constant__ NumbersArgs args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= args.count) return;
  args.powers[i] = exp2_approx(args.from[i]);
  args.chosen[i] = permute_bytes(args.words[i], ~args.words[i], args.selectors[i]);
}

// Of one row a block: its sum, whether any element is above 0.99, and the signs of each warp's first 32 elements.
struct SumArgs {
  const float* rows;
  float* sums;
  int* above;
  uint32_t* signs;
  int columns;
  Defect defect;
};

__device__ float warp_sum(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += shfl_xor(value, distance);
  return value;
}

constexpr int kSumThreads = 128, kSumWarps = kSumThreads / kWarp;

__global__ void sum(const __grid_constant__ SumArgs args) {
  VOCO_SHARED(float, partial, kSumWarps);
  VOCO_SHARED(int, found, kSumWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const float* row = args.rows + blockIdx.x * args.columns;
  if (args.defect == Defect::kReturnBeforeBarrier && warp == kSumWarps - 1) return;
  float value = 0;
  bool above = false;
  for (int i = threadIdx.x; i < args.columns; i += kSumThreads) {
    value += row[i];
    above |= row[i] > 0.99f;
  }
  if (args.defect != Defect::kHalfWarp || lane < kWarp / 2) value = warp_sum(value);
  above = any(above);
  const uint32_t signs = ballot(row[threadIdx.x] < 0);
  if (lane == 0) {
    partial[warp] = value;
    found[warp] = above;
    args.signs[blockIdx.x * kSumWarps + warp] = signs;
  }
  if (args.defect == Defect::kDivergentBarrier && warp == 0) {
    sync_block();
  } else {
    __syncthreads();
  }
  if (warp != 0) return;
  value = warp_sum(lane < kSumWarps ? partial[lane] : 0.0f);
  above = any(lane < kSumWarps && found[lane % kSumWarps]);
  // Any lane has the sum; the last one writes what the first one sends.
  value = shfl(value, 0);
  if (lane == kWarp - 1) {
    args.sums[blockIdx.x] = value;
    args.above[blockIdx.x] = above;
  }
}

// Each warp rotates its 32 numbers by one place.
struct RotateArgs {
  int* numbers;
  Defect defect;
};

__global__ void rotate(const __grid_constant__ RotateArgs args) {
  VOCO_SHARED(int, numbers, 64);
  const int thread = threadIdx.x, next = thread / kWarp * kWarp + (thread + 1) % kWarp;
  numbers[thread] = args.numbers[thread];
  if (args.defect != Defect::kMissingWarpBarrier) sync_warp();
  args.numbers[thread] = numbers[next];
}

// to[columns, rows] = from[rows, columns] transposed, in tiles of 32; both sizes are multiples of 4.
struct TransposeArgs {
  const float* from;
  float* to;
  int rows, columns;
  Defect defect;
};

constexpr int kTile = 32, kPitch = kTile + 4, kTransposeThreads = 256;
constexpr int kTransposeShared = kTile * kPitch * sizeof(float);

__global__ void transpose(const __grid_constant__ TransposeArgs args) {
  float* tile = shared_memory<float>();
  const int line = threadIdx.x / 8, place = threadIdx.x % 8 * 4;
  const int row = blockIdx.y * kTile + line, column = blockIdx.x * kTile + place;
  if (row < args.rows && column < args.columns) {
    store16(tile + line * kPitch + place, load16(args.from + row * args.columns + column));
  }
  if (args.defect == Defect::kSharedOverflow && threadIdx.x == 0) tile[kTile * kPitch] = 0;
  if (args.defect != Defect::kMissingBarrier) sync_block();
  const int to_row = blockIdx.x * kTile + line, to_column = blockIdx.y * kTile + place;
  if (to_row < args.columns && to_column < args.rows) {
    float values[4];
    for (int i = 0; i < 4; ++i) values[i] = tile[(place + i) * kPitch + line];
    store16(args.to + to_row * args.rows + to_column, *reinterpret_cast<uint4*>(values));
  }
}

// c[rows, columns] = a[rows, depth] b[depth, columns]; depth and columns are multiples of 8. A block of two warps
// computes 32 by 32, in steps of 32 of the depth; while it computes one step, the next is copied into the other stage.
template <class T>
struct MatmulArgs {
  const T *a, *b;
  float* c;
  int rows, columns, depth;
  Defect defect;
};

constexpr int kMatmulThreads = 64, kTileBytes = kTile * kTile * 2, kStageBytes = 2 * kTileBytes;
constexpr int kMatmulShared = 2 * kStageBytes;

// The place of 16 bytes in a tile whose rows have 64 bytes: one chunk of eight rows is in eight different groups of banks.
__device__ uint32_t chunk_offset(int row, int chunk, Defect defect) {
  const int swizzle = defect == Defect::kNoSwizzle ? 0 : row / 2 % 4;
  return row * 64 + (chunk ^ swizzle) * 16;
}

template <class T>
__device__ void copy_tile(uint32_t to, const T* from, int rows, int columns, int row, int column, Defect defect) {
  for (int i = threadIdx.x; i < kTile * 4; i += kMatmulThreads) {
    const int r = row + i / 4, c = column + i % 4 * 8;
    const bool valid = r < rows && c < columns;
    cp_async16(to + chunk_offset(i / 4, i % 4, defect), valid ? from + r * columns + c : from, valid);
  }
}

template <class T>
__device__ void multiply_tiles(float (&sums)[4][4], uint32_t a_tile, uint32_t b_tile, Defect defect) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int k = 0; k < 2; ++k) {
    uint32_t a[4], b[4];
    ldmatrix_x4(a, a_tile + chunk_offset(16 * warp + lane % 16, 2 * k + lane / 16, defect));
    for (int pair = 0; pair < 2; ++pair) {
      ldmatrix_x4_trans(b, b_tile + chunk_offset(16 * k + lane % 16, 2 * pair + lane / 16, defect));
      mma_m16n8k16<T>(sums[2 * pair], a, b[0], b[1]);
      mma_m16n8k16<T>(sums[2 * pair + 1], a, b[2], b[3]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMatmulThreads) matmul(const __grid_constant__ MatmulArgs<T> args) {
  const uint32_t shared = smem_address(shared_memory<T>());
  const int row = blockIdx.y * kTile, column = blockIdx.x * kTile, steps = (args.depth + kTile - 1) / kTile;
  const Defect defect = args.defect;

  const auto prefetch = [&](int step, int stage) {
    if (step < steps) {
      const uint32_t to = shared + stage * kStageBytes;
      copy_tile(to, args.a, args.rows, args.depth, row, step * kTile, defect);
      copy_tile(to + kTileBytes, args.b, args.depth, args.columns, step * kTile, column, defect);
    }
    if (defect != Defect::kMissingCommit) cp_async_commit();
  };

  float sums[4][4] = {};
  prefetch(0, 0);
  for (int step = 0; step < steps; ++step) {
    const int stage = step % 2, next_stage = defect == Defect::kPrefetchIntoUsedStage ? stage : 1 - stage;
    if (defect == Defect::kLaxWait) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    if (defect == Defect::kPrefetchBeforeBarrier) prefetch(step + 1, next_stage);
    // Behind it all copies of this step have arrived, and no one reads the other stage any more.
    if (defect != Defect::kMissingBarrierAfterWait) sync_block();
    if (defect != Defect::kPrefetchBeforeBarrier) prefetch(step + 1, next_stage);
    const uint32_t a_tile = shared + (defect == Defect::kOutsideShared ? kMatmulShared : stage * kStageBytes);
    multiply_tiles<T>(sums, a_tile, shared + stage * kStageBytes + kTileBytes, defect);
  }

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int tile = 0; tile < 4; ++tile) {
    for (int i = 0; i < 4; ++i) {
      const int r = row + 16 * warp + lane / 4 + i / 2 * 8, c = column + 8 * tile + lane % 4 * 2 + i % 2;
      if (r < args.rows && c < args.columns) args.c[r * args.columns + c] = sums[tile][i];
    }
  }
}

// The number of values in each bin and twice their sum, by block first.
struct HistogramArgs {
  const int* bins;
  const float* values;
  int* counts;
  float* sum;
  int count;
  Defect defect;
};

constexpr int kBins = 5;

__global__ void histogram(const __grid_constant__ HistogramArgs args) {
  VOCO_SHARED(int, counts, kBins);
  VOCO_SHARED(float, sum, 1);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x < kBins) counts[threadIdx.x] = 0;
  if (threadIdx.x == 0) sum[0] = 0;
  sync_block();
  if (i < args.count) {
    atomic_add(counts + args.bins[i], 1);
    atomic_add(sum, mul_rn(args.values[i], 2));
  }
  sync_block();
  if (threadIdx.x < kBins) atomic_add(args.counts + threadIdx.x, counts[threadIdx.x]);
  if (threadIdx.x != 0) return;
  if (args.defect == Defect::kPlainAdd) {
    *args.sum += sum[0];
  } else {
    atomic_add(args.sum, sum[0]);
  }
}

}  // namespace voco::selftest
