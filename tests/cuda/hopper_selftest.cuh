// Kernels that use each function of voco/hopper.cuh, and defects to seed in them: the emulation must catch every one.
#pragma once

#include "voco/hopper.cuh"

namespace voco::selftest {

enum class Defect {
  kNone,
  kMisalignedTile,        // box
  kTooManyTokens,         // box: the description of the tensor has one that is not there
  kNoBarrierFence,        // box: TMA does not know of the mbarrier
  kNoBlockBarrier,        // box: other threads do not know of it
  kNoWait,                // box: reads before the copy is there
  kNoSwizzle,             // box: reads rows as they are in global memory; product: writes them so
  kHalfWarpgroup,         // product
  kOtherOperands,         // product: warps do not agree
  kNoProxyFence,          // product, gather: wgmma may not see what the threads wrote
  kNoRegisterFence,       // product
  kEarlySums,             // product: uses sums before they are there
  kUncommitted,           // product: waits for a group that was never closed
  kNoProductWait,         // product: ends
  kSwappedStrides,        // product: of the descriptor
  kOutsideShared,         // product
  kNoEmptyWait,           // pipeline: refills stages that may be in use
  kFewBytes,              // pipeline: expects less than comes
  kManyBytes,             // pipeline
  kNoFullWait,            // pipeline: multiplies what may not be there
  kEarlyRelease,          // pipeline: gives a stage back that wgmma may still read
  kOneWarpReleases,       // pipeline: and does not wait for the other warps
  kManyArrivals,          // pipeline
  kManyRegisters,         // pipeline
  kLaxCopyWait,           // gather: announces rows that may be under way
  kLaxProductWait,        // chain: uses the sums of a product that may be under way
  kNoTurn,                // turns: does not wait for the other warpgroup
  kOtherCount,            // turns: a barrier of different numbers of threads
};

// nvcc compiles the kernels as they should be: it gives up on wgmma under conditions that it cannot foresee.
__device__ constexpr Defect seeded([[maybe_unused]] Defect defect) {
#ifdef VOCO_HOST
  return defect;
#else
  return Defect::kNone;
#endif
}

constexpr int kWarp = 32, kRowBytes = 128;

// Boxes of a tensor [tokens, heads, columns], to[box, kBoxRows, kBoxColumns], zeros outside. Block (x, y, z) copies the box
// at column 64 x of head y, from token first + step z on.
struct BoxArgs {
  TensorMap map;
  uint4* to;
  int first, step;
  Defect defect;
};

constexpr int kBoxRows = 24, kBoxThreads = 64;
constexpr int kBoxBytes = kBoxRows * kRowBytes, kBoxShared = kBoxBytes + 2 * kSwizzledTile;

// The first shared address that a tile may have.
__device__ inline uint32_t first_tile() {
  return (smem_address(shared_memory<unsigned char>()) + kSwizzledTile - 1) / kSwizzledTile * kSwizzledTile;
}
__device__ inline unsigned char* shared_at(uint32_t address) {
  unsigned char* shared = shared_memory<unsigned char>();
  return shared + (address - smem_address(shared));
}

__global__ void __launch_bounds__(kBoxThreads) box(const __grid_constant__ BoxArgs args) {
  VOCO_SHARED(uint64_t, barrier_word, 1);
  const uint32_t barrier = smem_address(barrier_word);
  const uint32_t tile = first_tile() + (seeded(args.defect) == Defect::kMisalignedTile ? kRowBytes : 0);
  if (threadIdx.x == 0) {
    tma_prefetch(&args.map);
    mbarrier_init(barrier, 1);
    if (seeded(args.defect) != Defect::kNoBarrierFence) fence_mbarriers();
    mbarrier_arrive_expect(barrier, kBoxBytes);
    tma_load(tile, &args.map, blockIdx.x * kBoxColumns, blockIdx.y, args.first + int(blockIdx.z) * args.step, barrier);
  }
  if (seeded(args.defect) != Defect::kNoBlockBarrier) sync_block();
  if (seeded(args.defect) != Defect::kNoWait || threadIdx.x == 0) mbarrier_wait(barrier, 0);
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  for (int i = threadIdx.x; i < kBoxBytes / 16; i += kBoxThreads) {
    const uint32_t place = seeded(args.defect) == Defect::kNoSwizzle ? 16 * i : swizzle128(16 * i);
    args.to[block * (kBoxBytes / 16) + i] = load16(shared_at(tile + place));
  }
}

// c[64, N] = a b, by one warpgroup; depth is a multiple of 64. The operands in global memory are as their rows in shared
// memory shall be: a[64, depth] or (MN-major) [depth, 64], b[N, depth] or (MN-major) [depth, N].
template <class T>
struct ProductArgs {
  const T *a, *b;
  float* c;
  int depth;
  Defect defect;
};

// Writes from[rows, columns] to tiles of 64 columns, one behind the other; the last one may be filled in part.
template <class T>
__device__ void store_tiles(uint32_t to, const T* from, int rows, int columns, Defect defect) {
  const int chunks = columns / 8;
  for (int i = threadIdx.x; i < rows * chunks; i += kWarpgroupThreads) {
    const int row = i / chunks, chunk = i % chunks;
    const uint32_t place = row * kRowBytes + chunk % 8 * 16, tile = to + chunk / 8 * rows * kRowBytes;
    store16(shared_at(tile + (defect == Defect::kNoSwizzle ? place : swizzle128(place))),
            load16(from + row * columns + 8 * chunk));
  }
}

// Sixteen of the depth, from 16 * step on, of an operand of `extent` rows in tiles as store_tiles makes them.
template <Major kMajor>
__device__ uint64_t operand_at(uint32_t tiles, int extent, int depth, int step) {
  if (kMajor == Major::kMN) return mn_major_operand(tiles + step * 16 * kRowBytes, depth * kRowBytes);
  return k_major_operand(tiles + step / 4 * extent * kRowBytes + step % 4 * 32);
}

__device__ inline uint64_t swap_strides(uint64_t operand) {
  const uint64_t field = 0x3fff, leading = operand >> 16 & field, stride = operand >> 32 & field;
  return (operand & ~(field << 16 | field << 32)) | stride << 16 | leading << 32;
}

// The sums of the threads of a warpgroup are c[64, columns].
template <int kCount>
__device__ void write_sums(float* c, const float (&sums)[kCount], int columns) {
  const int warp = threadIdx.x % kWarpgroupThreads / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + lane % 4 * 2 + i % 2;
    c[row * columns + column] = sums[i];
  }
}

constexpr int kProductRows = 64;

template <int kColumns>
constexpr int product_shared(int depth) {
  return (kProductRows + (kColumns + 63) / 64 * 64) * depth * 2 + kSwizzledTile;
}

template <class T, int kColumns, Major kMajorA, Major kMajorB, bool kRegisters>
__global__ void __launch_bounds__(kWarpgroupThreads) product(const __grid_constant__ ProductArgs<T> args) {
  const Defect defect = seeded(args.defect);
  const int depth = args.depth, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t a_tiles = first_tile(), b_tiles = a_tiles + kProductRows * depth * 2;
  store_tiles(a_tiles, args.a, kMajorA == Major::kK ? kProductRows : depth, kMajorA == Major::kK ? depth : kProductRows,
              defect);
  store_tiles(b_tiles, args.b, kMajorB == Major::kK ? kColumns : depth, kMajorB == Major::kK ? depth : kColumns, defect);
  if (defect != Defect::kNoProxyFence) fence_async();
  sync_block();
  if (defect == Defect::kHalfWarpgroup && warp >= 2) return;

  float sums[kColumns / 2];
  const auto b_operand = [&](int k) {
    if (defect == Defect::kSwappedStrides) return swap_strides(operand_at<kMajorB>(b_tiles, kColumns, depth, k));
    if (defect == Defect::kOutsideShared) return k_major_operand(b_tiles + kColumns * depth * 2);
    return operand_at<kMajorB>(b_tiles, kColumns, depth, k) + (defect == Defect::kOtherOperands ? warp : 0);
  };
  for (int first = 0; first < depth / 16; first += 4) {
    uint32_t a[4][4];
    if (kRegisters) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int row = 16 * warp + lane / 4 + 8 * (i % 2), column = 16 * (first + i / 4) + lane % 4 * 2 + 8 * (i / 2 % 2);
        a[i / 4][i % 4] = *reinterpret_cast<const uint32_t*>(args.a + row * depth + column);
      }
    }
    if (defect != Defect::kNoRegisterFence) wgmma_fence(sums);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = first + i;
      if constexpr (kRegisters) {
        wgmma<T, kMajorB>(sums, a[i], b_operand(k), k > 0);
      } else {
        wgmma<T, kMajorA, kMajorB>(sums, operand_at<kMajorA>(a_tiles, kProductRows, depth, k), b_operand(k), k > 0);
      }
    }
    if (defect != Defect::kUncommitted) wgmma_commit();
  }
  if (defect == Defect::kEarlySums) write_sums(args.c, sums, kColumns);
  if (defect != Defect::kNoProductWait) wgmma_wait<0>(sums);
  if (defect != Defect::kEarlySums) write_sums(args.c, sums, kColumns);
}

// c[rows, columns] = a[rows, depth] b^T, b[columns, depth], in tiles of 128 by 64. A warpgroup fills the stages of a ring
// with 64 of the depth, the two others multiply, 64 rows each. kGather: row i of b is row indices[i] of b_rows, by cp.async.
template <class T>
struct PipelineArgs {
  TensorMap a, b;
  const T* b_rows;
  const int* indices;
  float* c;
  int rows, columns, depth;
  Defect defect;
};

constexpr int kStages = 3, kConsumers = 2, kConsumerWarps = kConsumers * kWarpgroupThreads / kWarp;
constexpr int kPipelineThreads = (1 + kConsumers) * kWarpgroupThreads;
constexpr int kPipelineRows = kConsumers * 64, kPipelineColumns = 64, kStep = 64;
constexpr int kATile = kPipelineRows * kRowBytes, kBTile = kPipelineColumns * kRowBytes, kStage = kATile + kBTile;
constexpr int kPipelineShared = kStages * kStage + kSwizzledTile;

// Where a thread is in the ring, and the parity of the phases there.
struct Stage {
  int index = 0, parity = 0;
  __device__ void advance() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// Says that this thread's rows of a stage are there, when at most kInFlight later stages are under way.
template <int kInFlight>
__device__ void announce_rows(uint32_t ready, Defect defect) {
  cp_async_wait<kInFlight>();
  if (defect != Defect::kNoProxyFence) fence_async();
  mbarrier_arrive(ready);
}

template <class T, bool kGather>
__device__ void produce(const PipelineArgs<T>& args, uint32_t tiles, uint32_t full, uint32_t empty, int row, int column) {
  const Defect defect = seeded(args.defect);
  const int thread = threadIdx.x;
  int bytes = kATile + (kGather ? 0 : kBTile);
  if (defect == Defect::kFewBytes) bytes -= 16;
  if (defect == Defect::kManyBytes) bytes += 16;
  Stage stage;
  uint32_t last_ready = 0;
  for (int k = 0; k < args.depth; k += kStep) {
    const uint32_t a_tile = tiles + stage.index * kStage, b_tile = a_tile + kATile, ready = full + 8 * stage.index;
    if (kGather || thread == 0) {
      // The stages are empty at first: the phase before the first one counts as complete.
      if (defect != Defect::kNoEmptyWait) mbarrier_wait(empty + 8 * stage.index, stage.parity ^ 1);
    }
    if (thread == 0) {
      mbarrier_arrive_expect(ready, bytes);
      if (defect == Defect::kManyArrivals) mbarrier_arrive(ready);
      tma_load(a_tile, &args.a, k, 0, row, ready);
      if (!kGather) tma_load(b_tile, &args.b, k, 0, column, ready);
    }
    if (kGather) {
      for (int i = thread; i < kPipelineColumns * 8; i += kWarpgroupThreads) {
        const int place = i / 8, chunk = i % 8;
        const bool valid = column + place < args.columns && k + 8 * chunk < args.depth;
        const T* from = valid ? args.b_rows + args.indices[column + place] * args.depth + k + 8 * chunk : args.b_rows;
        cp_async16(b_tile + swizzle128(16 * i), from, valid);
      }
      cp_async_commit();
      if (k > 0 && defect == Defect::kLaxCopyWait) {
        announce_rows<2>(last_ready, defect);
      } else if (k > 0) {
        announce_rows<1>(last_ready, defect);
      }
      last_ready = ready;
    }
    stage.advance();
  }
  if (kGather) announce_rows<0>(last_ready, defect);
}

template <class T>
__device__ void consume(const PipelineArgs<T>& args, uint32_t tiles, uint32_t full, uint32_t empty, int row, int column) {
  const Defect defect = seeded(args.defect);
  const int group = threadIdx.x / kWarpgroupThreads - 1, lane = threadIdx.x % kWarp;
  float sums[kPipelineColumns / 2];
  Stage stage, last;
  const auto give_back = [&](Stage of) {
    const bool releases = defect == Defect::kOneWarpReleases ? threadIdx.x % kWarpgroupThreads == 0 : lane == 0;
    if (releases) mbarrier_arrive(empty + 8 * of.index);
  };
  for (int k = 0; k < args.depth; k += kStep) {
    const uint32_t a_tile = tiles + stage.index * kStage + group * 64 * kRowBytes;
    const uint32_t b_tile = tiles + stage.index * kStage + kATile;
    if (defect != Defect::kNoFullWait || group == 0) mbarrier_wait(full + 8 * stage.index, stage.parity);
    wgmma_fence(sums);
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
      const uint64_t a = k_major_operand(a_tile + 32 * i), b = k_major_operand(b_tile + 32 * i);
      wgmma<T, Major::kK, Major::kK>(sums, a, b, k > 0 || i > 0);
    }
    wgmma_commit();
    // The products of the stage before are done with it; this stage's go on.
    if (defect != Defect::kEarlyRelease) wgmma_wait<1>();
    if (k > 0) give_back(last);
    if (defect == Defect::kEarlyRelease) wgmma_wait<1>();
    last = stage;
    stage.advance();
  }
  wgmma_wait<0>(sums);
#pragma unroll
  for (int i = 0; i < kPipelineColumns / 2; ++i) {
    const int r = row + 64 * group + 16 * (threadIdx.x % kWarpgroupThreads / kWarp) + lane / 4 + 8 * (i / 2 % 2);
    const int c = column + 8 * (i / 4) + lane % 4 * 2 + i % 2;
    if (r < args.rows && c < args.columns) args.c[r * args.columns + c] = sums[i];
  }
}

template <class T, bool kGather>
__global__ void __launch_bounds__(kPipelineThreads, 1) pipeline(const __grid_constant__ PipelineArgs<T> args) {
  VOCO_SHARED(uint64_t, barriers, 2 * kStages);
  const uint32_t full = smem_address(barriers), empty = full + 8 * kStages, tiles = first_tile();
  const int row = blockIdx.y * kPipelineRows, column = blockIdx.x * kPipelineColumns;
  if (threadIdx.x == 0) {
    const int releases = seeded(args.defect) == Defect::kOneWarpReleases ? kConsumers : kConsumerWarps;
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + 8 * i, 1 + (kGather ? kWarpgroupThreads : 0));
      mbarrier_init(empty + 8 * i, releases);
    }
    fence_mbarriers();
  }
  sync_block();
  if (threadIdx.x < kWarpgroupThreads) {
    decrease_registers<40>();
    produce<T, kGather>(args, tiles, full, empty, row, column);
  } else {
    if (seeded(args.defect) == Defect::kManyRegisters) {
      increase_registers<240>();
    } else {
      increase_registers<232>();
    }
    consume(args, tiles, full, empty, row, column);
  }
}

// c[64, 64] = (q k^T) v in fp16, k and v[kChainTiles * 64, 64], by one warpgroup: the sums of the first product are the
// operand of the second, which goes on while the first begins with the next tile.
struct ChainArgs {
  TensorMap q, k, v;
  float* c;
  Defect defect;
};

constexpr int kChainTiles = 3, kChainTile = 64 * kRowBytes;
constexpr int kChainShared = (1 + 2 * kChainTiles) * kChainTile + kSwizzledTile;

__device__ inline void to_operand(uint32_t (&operand)[4][4], const float (&sums)[32]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const __half2 pair = __floats2half2_rn(sums[2 * i], sums[2 * i + 1]);
    operand[i / 4][i % 4] = reinterpret_cast<const uint32_t&>(pair);
  }
}

__global__ void __launch_bounds__(kWarpgroupThreads) chain(const __grid_constant__ ChainArgs args) {
  VOCO_SHARED(uint64_t, barrier_word, 1);
  const uint32_t barrier = smem_address(barrier_word);
  const uint32_t q = first_tile(), k = q + kChainTile, v = k + kChainTiles * kChainTile;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarriers();
    mbarrier_arrive_expect(barrier, (1 + 2 * kChainTiles) * kChainTile);
    tma_load(q, &args.q, 0, 0, 0, barrier);
    for (int i = 0; i < kChainTiles; ++i) {
      tma_load(k + i * kChainTile, &args.k, 0, 0, 64 * i, barrier);
      tma_load(v + i * kChainTile, &args.v, 0, 0, 64 * i, barrier);
    }
  }
  sync_block();
  mbarrier_wait(barrier, 0);

  float scores[32], sums[32];
  uint32_t operand[4][4];
  const auto multiply_q_k = [&](int tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wgmma<__half, Major::kK, Major::kK>(scores, k_major_operand(q + 32 * i),
                                          k_major_operand(k + tile * kChainTile + 32 * i), i > 0);
    }
    wgmma_commit();
  };
  const auto multiply_by_v = [&](int tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wgmma<__half, Major::kMN>(sums, operand[i], mn_major_operand(v + tile * kChainTile + 2048 * i, kChainTile),
                                tile > 0 || i > 0);
    }
    wgmma_commit();
  };
  wgmma_fence(scores);
  multiply_q_k(0);
  wgmma_wait<0>(scores);
  to_operand(operand, scores);
#pragma unroll 1
  for (int tile = 0; tile + 1 < kChainTiles; ++tile) {
    wgmma_fence(scores);
    multiply_q_k(tile + 1);
    wgmma_fence(sums, operand);
    multiply_by_v(tile);
    if (seeded(args.defect) == Defect::kLaxProductWait) {
      wgmma_wait<2>();
      to_operand(operand, scores);
      wgmma_wait<0>(sums);
    } else {
      wgmma_wait<1>(scores);
      wgmma_wait<0>(sums);
      to_operand(operand, scores);
    }
  }
  wgmma_fence(sums, operand);
  multiply_by_v(kChainTiles - 1);
  wgmma_wait<0>(sums);
  write_sums(args.c, sums, 64);
}

// Two warpgroups take turns on 128 numbers: each makes x into 3 x + 1 or 3 x + 2, kTurns times.
struct TurnsArgs {
  int* numbers;
  Defect defect;
};

constexpr int kTurns = 3, kTurnsThreads = 2 * kWarpgroupThreads;

__global__ void turns(const __grid_constant__ TurnsArgs args) {
  VOCO_SHARED(int, numbers, kWarpgroupThreads);
  const int group = threadIdx.x / kWarpgroupThreads, thread = threadIdx.x % kWarpgroupThreads;
  if (group == 0) numbers[thread] = args.numbers[thread];
  const int mine = 1 + group, others = 2 - group;
  const int count = seeded(args.defect) == Defect::kOtherCount && group ? kTurnsThreads - kWarp : kTurnsThreads;
  if (group == 1) named_barrier_arrive(others, count);
  for (int turn = 0; turn < kTurns; ++turn) {
    if (seeded(args.defect) == Defect::kNoTurn && turn > 0) {
      named_barrier_arrive(mine, count);
    } else {
      named_barrier_sync(mine, count);
    }
    // Not the thread's own number: it has been written by another one, of the other warpgroup too.
    int& x = numbers[(thread + turn + kWarp * group) % kWarpgroupThreads];
    x = 3 * x + 1 + group;
    if (group == 0 || turn + 1 < kTurns) named_barrier_arrive(others, count);
  }
  sync_block();
  if (group == 0) args.numbers[thread] = numbers[thread];
}

#ifdef VOCO_HOST

// What a GPU would not survive, beside the defects: a kernel for the emulation alone.
enum class Rule {
  kBarrierAlignment,
  kTwoInits,
  kNoBarrier,
  kNoSuchParity,
  kTooManyBytes,
  kBoxOutside,
  kBoxNotAwaited,
  kBoxOverStore,
  kBarrierZero,
  kPartOfAWarp,
  kPartOfAWarpgroup,
  kNoSwizzleMode,
};

struct RuleArgs {
  TensorMap map;
  Rule rule;
};

constexpr int kRuleThreads = 32;

__global__ void break_rule(const __grid_constant__ RuleArgs args) {
  const uint32_t tile = first_tile(), barrier = tile + kBoxBytes;
  const bool first = threadIdx.x == 0;
  const Rule rule = args.rule;
  if (rule == Rule::kBarrierZero) named_barrier_sync(0, kRuleThreads);
  if (rule == Rule::kPartOfAWarp) named_barrier_sync(1, kRuleThreads / 2);
  if (rule == Rule::kPartOfAWarpgroup || rule == Rule::kNoSwizzleMode) {
    float sums[16];
    wgmma_fence(sums);
    const uint64_t b = k_major_operand(tile), a = rule == Rule::kNoSwizzleMode ? b & ~(uint64_t{3} << 62) : b;
    wgmma<__half, Major::kK, Major::kK>(sums, a, b, false);
  }
  if (!first) return;
  if (rule == Rule::kNoBarrier) mbarrier_arrive(barrier);
  mbarrier_init(barrier + (rule == Rule::kBarrierAlignment ? 4 : 0), 1);
  fence_mbarriers();
  if (rule == Rule::kTwoInits) mbarrier_init(barrier, 1);
  if (rule == Rule::kNoSuchParity) mbarrier_wait(barrier, 2);
  mbarrier_arrive_expect(barrier, rule == Rule::kTooManyBytes ? 1 << 20 : kBoxBytes);
  if (rule == Rule::kBoxOverStore) store16(shared_at(tile + 512), uint4{});
  tma_load(rule == Rule::kBoxOutside ? tile + kSwizzledTile : tile, &args.map, 0, 0, 0, barrier);
  if (rule != Rule::kBoxNotAwaited) mbarrier_wait(barrier, 0);
}

#endif  // VOCO_HOST

}  // namespace voco::selftest
