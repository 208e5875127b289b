// What the attention kernels for Hopper share: tiles of 128 rows, or of 128 keys, and the block that goes through what they
// meet, in the form of FlashAttention-3 (arXiv 2407.08608).
//
// A block has two consumer warpgroups, each with a part of 64 members of the tile, and a producer warpgroup. The producer
// brings the parts, and 64 tokens a step of what they meet into a ring of stages, two matrices each: by TMA where 64 tokens
// are neighbours, by cp.async where an index names them. It alone reads the plan, and it is ahead of the consumers, in the
// next tile, too: blocks go on to further tiles.
#pragma once

#include "voco/attention_steps.cuh"
#include "voco/hopper.cuh"

namespace voco::attention {

constexpr int kPart = kHopperTile / 2, kHopperStep = 64, kConsumers = 2;
static_assert(kPart == 64 && kHopperStep == 64, "what a warpgroup multiplies, and a box of all tensor maps");
constexpr int kHopperThreads = kWarpgroupThreads * (1 + kConsumers);
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

struct HopperArguments {
  Arguments attention;
  TensorMap q, k, v, grad_out;  // those that a kernel reads; boxes of 64 rows
};

// 64 rows or keys of one head, as TMA and wgmma want them: tiles of 64 columns, 128 bytes a row.
template <int kHeadDim>
struct Matrix {
  static_assert(kHeadDim % 64 == 0, "TMA copies 64 columns at a time");
  static constexpr int kTiles = kHeadDim / 64, kTileBytes = 64 * 128, kBytes = kTiles * kTileBytes;
};

// Two barriers of a place in shared memory: one says that it is full, the other that it is empty again. A place is used many
// times; `parity` is that of the use.
struct Gate {
  uint32_t full, empty;
  int parity;

  // Every thread of the producer says that a place is full, and every warp that reads it that it is empty.
  __device__ void init(int readers) const {
    mbarrier_init(full, kWarpgroupThreads);
    mbarrier_init(empty, readers);
  }
  __device__ void wait_full() const { mbarrier_wait(full, parity); }
  // A new place is empty.
  __device__ void wait_empty() const { mbarrier_wait(empty, parity ^ 1); }
  __device__ void release() const {
    sync_warp();
    if (lane_id() == 0) mbarrier_arrive(empty);
  }
};

// A block's shared memory. Steps and tiles are numbered through all that a block does. Beside its matrices, a step has a
// Step and a part a Part: numbers, which the producer writes, too.
template <int kHeadDim_, int kStages_, int kPartMatrices_, class Step_, class Part_>
struct HopperBlock {
  using Step = Step_;
  using Part = Part_;
  using Matrix = attention::Matrix<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_, kStages = kStages_, kPartMatrices = kPartMatrices_;
  static constexpr int kStageBytes = 2 * Matrix::kBytes, kPartBytes = kPartMatrices * Matrix::kBytes;
  static constexpr int kGates = kStages + kConsumers;
  static constexpr int kMatrixBytes = kStages * kStageBytes + kConsumers * kPartBytes;
  static constexpr int kNumberBytes = kGates * 2 * 8 + kStages * sizeof(Step) + kConsumers * sizeof(Part);
  static constexpr int kSharedBytes = kSwizzledTile + kMatrixBytes + kNumberBytes;
  static_assert(kStages >= 3, "copies by index are announced a step late, while another one waits to be empty");

  uint32_t matrices, barriers;
  Step* steps;
  Part* parts;

  __device__ explicit HopperBlock(char* shared) {
    const uint32_t begin = smem_address(shared), skipped = (kSwizzledTile - begin % kSwizzledTile) % kSwizzledTile;
    matrices = begin + skipped;
    char* behind = shared + skipped + kMatrixBytes;
    barriers = smem_address(behind);
    steps = reinterpret_cast<Step*>(behind + kGates * 2 * 8);
    parts = reinterpret_cast<Part*>(steps + kStages);
  }
  __device__ uint32_t first(int step) const { return matrices + step % kStages * kStageBytes; }
  __device__ uint32_t second(int step) const { return first(step) + Matrix::kBytes; }
  __device__ uint32_t of_part(int consumer) const { return matrices + kStages * kStageBytes + consumer * kPartBytes; }
  __device__ Step& numbers(int step) const { return steps[step % kStages]; }
  __device__ Gate gate(int step) const { return at(step % kStages, step / kStages % 2); }
  __device__ Gate part_gate(int consumer, int tile) const { return at(kStages + consumer, tile % 2); }

  __device__ void init() const {
    for (int stage = 0; stage < kStages; ++stage) gate(stage).init(4 * kConsumers);
    for (int consumer = 0; consumer < kConsumers; ++consumer) part_gate(consumer, 0).init(4);
    fence_mbarriers();
  }

 private:
  __device__ Gate at(int place, int parity) const { return {barriers + 16 * place, barriers + 16 * place + 8, parity}; }
};

// Behind the last tile a part has as many steps.
constexpr int kNoTile = -1;

// body(columns of the tile, head) for each tile of the block; heads as in for_each_pair.
template <int kColumns, class Body>
__device__ inline void for_each_tile(const Plan& plan, int heads, Body body) {
  for (int pair = blockIdx.x; pair < plan.num_tiles * heads; pair += gridDim.x) {
    const int* columns = plan.tiles + kColumns * (pair / heads);
    // Behind the last tile there is nothing.
    if (columns[1] == 0) break;
    body(columns, pair % heads);
  }
}

// ---- the producer ------------------------------------------------------------------------------------------------------

// One matrix of a step or of a part, in memory.
struct Source {
  const Rows& rows;
  const TensorMap& map;
  int head;
};

// What the producer's threads do together.
template <class T, class Block>
struct Producer {
  using Matrix = typename Block::Matrix;

  const Block block;
  int step = 0, tile = 0;  // the next ones
  uint32_t pending = 0;    // the barrier of copies by index that are under way; 0 for none

  // 64 tokens from `first` on, where they are neighbours: whatever lies behind the last one that is meant. Each thread has
  // written its numbers.
  template <int kMatrices>
  __device__ void load(uint32_t to, const Source (&sources)[kMatrices], int first, uint32_t full) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(full, kMatrices * Matrix::kBytes);
#pragma unroll
      for (int i = 0; i < kMatrices; ++i) {
#pragma unroll
        for (int tile = 0; tile < Matrix::kTiles; ++tile) {
          const uint32_t place = to + i * Matrix::kBytes + tile * Matrix::kTileBytes;
          tma_load(place, &sources[i].map, 64 * tile, sources[i].head, first, full);
        }
      }
    } else {
      mbarrier_arrive(full);
    }
    finish();
  }

  // The 64 tokens of a list in shared memory, zeros for those that are kAbsent. Such copies are announced when the next ones
  // are under way, so that they overlap.
  template <int kMatrices>
  __device__ void gather(uint32_t to, const Source (&sources)[kMatrices], const int* tokens, uint32_t full) {
    named_barrier_sync(1, kWarpgroupThreads);
#pragma unroll
    for (int i = 0; i < kMatrices; ++i) copy(to + i * Matrix::kBytes, sources[i], tokens);
    cp_async_commit();
    cp_async_wait<1>();
    announce(full);
  }

  // Announces all copies; before anything may be waited for that does not come without them.
  __device__ void finish() {
    cp_async_wait<0>();
    announce(0);
  }

  // No further tile.
  __device__ void end() {
    finish();
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      const Gate gate = block.part_gate(consumer, tile);
      gate.wait_empty();
      if (threadIdx.x == 0) block.parts[consumer].steps = kNoTile;
      mbarrier_arrive(gate.full);
    }
  }

 private:
  // The place that is pending is full, as far as this thread is concerned; `next` is pending then.
  __device__ void announce(uint32_t next) {
    if (pending != 0) {
      fence_async();
      mbarrier_arrive(pending);
    }
    pending = next;
  }

  __device__ void copy(uint32_t to, const Source& source, const int* tokens) {
    constexpr int kChunks = Block::kHeadDim / 8;
    const T* first = row_of<T>(source.rows, 0, source.head);
#pragma unroll 4
    for (int i = threadIdx.x; i < 64 * kChunks; i += kWarpgroupThreads) {
      const int row = i / kChunks, chunk = i % kChunks, token = tokens[row];
      const bool present = token != kAbsent;
      const uint32_t place = to + chunk / 8 * Matrix::kTileBytes + swizzle128(row * 128 + chunk % 8 * 16);
      cp_async16(place, present ? first + token * source.rows.token + chunk * 8 : first, present);
    }
  }
};

// ---- kernels over row tiles: the forward, and the gradient of q ----------------------------------------------------------

struct KeyNumbers {
  int tokens[kHopperStep];
};

// Rows of a consumer; those behind the last one are the last one once more. lse, times log2(e), and delta are for the
// backward alone.
struct RowPart {
  int tokens[kPart];
  float lse[kPart], delta[kPart];
  int count, steps, head;
};

template <int kHeadDim, int kStages, int kPartMatrices>
using RowBlock = HopperBlock<kHeadDim, kStages, kPartMatrices, KeyNumbers, RowPart>;

// The rows of a tile: queries, and gradients with kPartMatrices = 2.
template <class T, class Block>
__device__ inline void bring_rows(Producer<T, Block>& producer, const HopperArguments& all, const int* columns, int head,
                                  int steps) {
  const Arguments& args = all.attention;
  const TileRows rows(args.plan, columns);
  for (int consumer = 0; consumer < kConsumers; ++consumer) {
    const Gate gate = producer.block.part_gate(consumer, producer.tile);
    RowPart& part = producer.block.parts[consumer];
    const int first = kPart * consumer, i = threadIdx.x;
    gate.wait_empty();
    if (i < kPart) {
      const int token = rows.row(first + i);
      part.tokens[i] = token;
      if constexpr (Block::kPartMatrices == 2) {
        const int64_t of_head = int64_t{head} * args.num_tokens + token;
        part.lse[i] = args.lse[of_head] * kLog2E;
        part.delta[i] = args.delta[of_head];
      }
    }
    if (i == 0) {
      part.count = rows.count - first;
      part.steps = steps;
      part.head = head;
    }
    const auto bring = [&](const auto& sources) {
      const uint32_t to = producer.block.of_part(consumer);
      if (rows.count <= first) {
        mbarrier_arrive(gate.full);
      } else if (rows.first >= 0) {
        producer.load(to, sources, rows.first + first, gate.full);
      } else {
        producer.gather(to, sources, part.tokens, gate.full);
      }
    };
    if constexpr (Block::kPartMatrices == 2) {
      const Source sources[] = {{args.q, all.q, head}, {args.grad_out, all.grad_out, head}};
      bring(sources);
    } else {
      const Source sources[] = {{args.q, all.q, head}};
      bring(sources);
    }
  }
  ++producer.tile;
}

// All of a producer's work for row tiles.
template <class T, class Block>
__device__ inline void produce_for_rows(const HopperArguments& all, const Block& block) {
  const Arguments& args = all.attention;
  Producer<T, Block> producer = {block};
  for_each_tile<8>(args.plan, args.heads, [&](const int* columns, int head) {
    const auto steps = keys_of<kHopperStep>(args.plan, columns);
    const Source sources[] = {{args.k, all.k, head / args.group}, {args.v, all.v, head / args.group}};
    const Range& own = steps.ranges[1];
    const int lane = threadIdx.x % kHopperStep;
    int upcoming = steps.token(0, lane);
    bring_rows(producer, all, columns, head, steps.size());
    // No step would announce the rows before their place is wanted again.
    if (steps.size() == 0) producer.finish();
    for (int i = 0; i < steps.size(); ++i, ++producer.step) {
      const Gate gate = block.gate(producer.step);
      int* tokens = block.numbers(producer.step).tokens;
      gate.wait_empty();
      if (threadIdx.x < kHopperStep) tokens[lane] = upcoming;
      upcoming = i + 1 < steps.size() ? steps.token(i + 1, lane) : kAbsent;
      const int first = own.begin + (i - steps.first[1]) * kHopperStep;
      // What lies behind the own range may be NaN, which a weight of 0 does not hide: a last step that is not full gets
      // zeros.
      if (i < steps.first[1] || first + kHopperStep > own.end) {
        producer.gather(block.first(producer.step), sources, tokens, gate.full);
      } else {
        producer.load(block.first(producer.step), sources, first, gate.full);
      }
    }
  });
  producer.end();
}

// The rows of a lane, g and g + 8 of its warp's 16.
struct LaneRows {
  int rows[2], first;  // tokens; the first one of the warp
  int head, count;     // of the part, from row g on

  __device__ static int place(int half) { return threadIdx.x / 32 % 4 * 16 + lane_id() / 4 + 8 * half; }
  __device__ void open(const RowPart& part) {
#pragma unroll
    for (int half = 0; half < 2; ++half) rows[half] = part.tokens[place(half)];
    first = part.tokens[place(0) / 16 * 16];
    head = part.head;
    count = part.count - place(0);
  }
  __device__ bool is_there(int half) const { return count > 8 * half; }

  // A row does not see the keys behind it: what belongs to them becomes `hidden`.
  __device__ void hide(float (&scores)[32], const int* keys, float hidden) const {
    if (keys[kHopperStep - 1] <= first) return;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = keys[8 * n + lane_id() % 4 * 2 + i];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (key > rows[half]) scores[4 * n + 2 * half + i] = hidden;
        }
      }
    }
  }
};

// All of a consumer's work for row tiles. A State has 16 rows of a warp, and computes a step's scores while those of the
// step before are multiplied and added up:
//   open(args, part, matrices): takes in the rows; then the part may be overwritten
//   start_scores(keys), wait_scores<in flight>(), weigh(tokens)
//   round(values): what is left to do before the next step's scores may begin
//   start_sums(keys, values), wait_sums()
//   store(args)
template <class State, class Block>
__device__ inline void consume_rows(const Arguments& args, const Block& block) {
  const int consumer = threadIdx.x / kWarpgroupThreads - 1;
  int step = 0;
  for (int tile = 0;; ++tile) {
    const Gate gate = block.part_gate(consumer, tile);
    const RowPart& part = block.parts[consumer];
    gate.wait_full();
    if (part.steps == kNoTile) break;
    const bool is_empty = part.count <= 0;
    const int end = step + part.steps, last_row = part.tokens[kPart - 1];
    State state;
    state.open(args, part, block.of_part(consumer));
    gate.release();

    // The steps that a warpgroup has nothing to see in are the last ones.
    const auto sees = [&] {
      if (step == end) return false;
      block.gate(step).wait_full();
      return !is_empty && block.numbers(step).tokens[0] <= last_row;
    };
    if (sees()) {
      state.start_scores(block.first(step));
      state.template wait_scores<0>();
      state.weigh(block.numbers(step).tokens);
      state.round(block.second(step));
      ++step;
      while (sees()) {
        state.start_scores(block.first(step));
        state.start_sums(block.first(step - 1), block.second(step - 1));
        state.template wait_scores<1>();
        state.weigh(block.numbers(step).tokens);
        state.wait_sums();
        block.gate(step - 1).release();
        state.round(block.second(step));
        ++step;
      }
      state.start_sums(block.first(step - 1), block.second(step - 1));
      state.wait_sums();
      block.gate(step - 1).release();
    }
    for (; step < end; ++step) {
      block.gate(step).wait_full();
      block.gate(step).release();
    }
    state.store(args);
  }
}

// A warp's 16 rows of a part's matrix as operand A of its warpgroup's products.
template <int kHeadDim>
__device__ inline void load_operand(uint32_t (&words)[kHeadDim / 16][4], uint32_t matrix) {
  const int row = threadIdx.x / 32 % 4 * 16 + lane_id() % 16;
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    const uint32_t in_tile = row * 128 + (k % 4 * 2 + lane_id() / 16) * 16;
    ldmatrix_x4(words[k], matrix + k / 4 * Matrix<kHeadDim>::kTileBytes + swizzle128(in_tile));
  }
}

// Products of 64 rows with 64 rows of a matrix, c = a b^T; `a` in registers, or another matrix in shared memory.
template <class T, int kHeadDim>
__device__ inline void multiply_transposed(float (&c)[32], const uint32_t (&a)[kHeadDim / 16][4], uint32_t b) {
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    wgmma<T, Major::kK>(c, a[k], k_major_operand(b + k / 4 * Matrix<kHeadDim>::kTileBytes + k % 4 * 32), k > 0);
  }
}
template <class T, int kHeadDim>
__device__ inline void multiply_transposed(float (&c)[32], uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    const uint32_t at = k / 4 * Matrix<kHeadDim>::kTileBytes + k % 4 * 32;
    wgmma<T, Major::kK, Major::kK>(c, k_major_operand(a + at), k_major_operand(b + at), k > 0);
  }
}

// c += a b; `b` is a matrix of 64 rows.
template <class T, int kHeadDim>
__device__ inline void add_multiplied(float (&c)[kHeadDim / 2], const uint32_t (&a)[4][4], uint32_t b) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma<T, Major::kMN>(c, a[k], mn_major_operand(b + k * 2048, Matrix<kHeadDim>::kTileBytes), true);
  }
}

// 64 columns of results, rounded, as operand A.
template <class T>
__device__ inline void as_operands(uint32_t (&a)[4][4], const float (&c)[32]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = pack<T>(c[8 * k + 2 * i], c[8 * k + 2 * i + 1]);
  }
}

// Row g (half 0) or g + 8 of sums, times a factor, to memory.
template <class T, int kHeadDim>
__device__ inline void store_sums(void* row, const float (&sums)[kHeadDim / 2], int half, float factor, bool valid) {
  uint32_t words[kHeadDim / 8];
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    words[n] = pack<T>(sums[4 * n + 2 * half] * factor, sums[4 * n + 2 * half + 1] * factor);
  }
  store_row<kHeadDim>(row, words, valid);
}

// A kernel's block: `produce` and `consume` are what its threads do.
template <class Block, class Produce, class Consume>
__device__ inline void run_block(const Block& block, Produce produce, Consume consume) {
  if (threadIdx.x == 0) block.init();
  sync_block();
  if (threadIdx.x < kWarpgroupThreads) {
    decrease_registers<kProducerRegisters>();
    produce();
  } else {
    increase_registers<kConsumerRegisters>();
    consume();
  }
}

// Arguments with the tensor maps of those rows that are there; a CUDA error code.
template <int kHeadDim>
int with_tensor_maps(HopperArguments* all, const Arguments& args) {
  *all = {args, {}, {}, {}, {}};
  const auto describe = [&](TensorMap* map, const Rows& rows, int heads) -> int {
    if (rows.data == nullptr) return 0;
    // The stride of a single token or head is never used, but must be one that TMA takes.
    const int64_t token = args.num_tokens > 1 ? rows.token : kHeadDim, head = heads > 1 ? rows.head : kHeadDim;
    return make_tensor_map(map, {rows.data, args.num_tokens, heads, kHeadDim, token, head}, 64);
  };
  const int key_heads = args.heads / args.group;
  for (const int code : {describe(&all->q, args.q, args.heads), describe(&all->k, args.k, key_heads),
                         describe(&all->v, args.v, key_heads), describe(&all->grad_out, args.grad_out, args.heads)}) {
    if (code) return code;
  }
  return 0;
}

}  // namespace voco::attention
