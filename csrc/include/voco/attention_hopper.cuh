// Forward on Hopper: the same arithmetic as attention_forward.cuh, in the form of FlashAttention-3 (arXiv 2407.08608).
//
// A block has two consumer warpgroups of 64 rows each, and a producer warpgroup that brings keys and values, 64 tokens a
// step, into a ring of stages: by TMA where 64 tokens are neighbours (in the own range), by cp.async where an index names
// them (the public range). A consumer computes the scores of the next step while the weights of this one are multiplied with
// the values. Blocks go on to further tiles, so the producer is ahead of the consumers there, too.
#pragma once

#include "voco/attention_steps.cuh"
#include "voco/hopper.cuh"

namespace voco::attention {

template <int kHeadDim>
struct HopperForward {
  static constexpr int kKeys = 64, kStages = 4, kConsumers = kHopperRows / 64;
  static constexpr int kThreads = kWarpgroupThreads * (1 + kConsumers), kConsumerWarps = 4 * kConsumers;
  // A tile has 64 columns of all keys of a step: 128 bytes a row, as TMA and wgmma want them.
  static constexpr int kTiles = kHeadDim / 64, kTileBytes = kKeys * 128, kStageBytes = 2 * kTiles * kTileBytes;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kNumbersBytes = kKeys * sizeof(int) + 2 * sizeof(uint64_t);  // of a stage: tokens and barriers
  static constexpr int kSharedBytes = kSwizzledTile + kStages * (kStageBytes + kNumbersBytes);
  static_assert(kHeadDim % 64 == 0, "TMA copies 64 columns at a time");
  static_assert(kStages >= 3, "copies by index are announced a step late, while another one waits to be empty");
};

struct HopperArguments {
  Arguments attention;
  TensorMap k, v;  // boxes of kKeys rows
};

// The ring of stages. Steps are numbered through all tiles of a block; step i is in stage i % kStages.
template <int kHeadDim>
struct Ring {
  using Shape = HopperForward<kHeadDim>;

  uint32_t stages, barriers;
  int* tokens;

  __device__ explicit Ring(char* shared) {
    const uint32_t begin = smem_address(shared), skipped = (kSwizzledTile - begin % kSwizzledTile) % kSwizzledTile;
    stages = begin + skipped;
    char* behind = shared + skipped + Shape::kStages * Shape::kStageBytes;
    barriers = smem_address(behind);
    tokens = reinterpret_cast<int*>(behind + 2 * Shape::kStages * sizeof(uint64_t));
  }
  __device__ uint32_t keys(int step) const { return stages + step % Shape::kStages * Shape::kStageBytes; }
  __device__ uint32_t values(int step) const { return keys(step) + Shape::kTiles * Shape::kTileBytes; }
  __device__ int* of_step(int step) const { return tokens + step % Shape::kStages * Shape::kKeys; }
  __device__ uint32_t full(int step) const { return barriers + step % Shape::kStages * 8; }
  __device__ uint32_t empty(int step) const { return full(step) + Shape::kStages * 8; }
  __device__ static int parity(int step) { return step / Shape::kStages % 2; }

  // Every thread of the producer says that a stage is full, and every warp of the consumers that it is empty.
  __device__ void init() const {
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      mbarrier_init(full(stage), kWarpgroupThreads);
      mbarrier_init(empty(stage), Shape::kConsumerWarps);
    }
    fence_mbarriers();
  }
  __device__ void wait_full(int step) const { mbarrier_wait(full(step), parity(step)); }
  // A new ring is empty.
  __device__ void wait_empty(int step) const { mbarrier_wait(empty(step), parity(step) ^ 1); }
  __device__ void release(int step) const {
    sync_warp();
    if (lane_id() == 0) mbarrier_arrive(empty(step));
  }
};

// ---- the producer ------------------------------------------------------------------------------------------------------

template <class T, int kHeadDim>
struct Producer {
  using Shape = HopperForward<kHeadDim>;

  const HopperArguments& args;
  const Ring<kHeadDim> ring;
  int step = 0;       // the next one, over all tiles
  int announced = 0;  // steps before it are known to the consumers

  // Steps whose copies this thread has waited for are full, as far as it is concerned.
  __device__ void announce(int until) {
    if (announced == until) return;
    fence_async();
    for (; announced < until; ++announced) mbarrier_arrive(ring.full(announced));
  }

  // Copies by index are announced one step late, so that they overlap.
  __device__ void gather(int key_head) {
    const int* tokens = ring.of_step(step);
    copy(ring.keys(step), args.attention.k, key_head, tokens);
    copy(ring.values(step), args.attention.v, key_head, tokens);
    cp_async_commit();
    cp_async_wait<1>();
    announce(step);
    ++step;
  }

  __device__ void load(int first_token, int key_head) {
    cp_async_wait<0>();
    announce(step);
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(ring.full(step), Shape::kStageBytes);
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; ++tile) {
        tma_load(ring.keys(step) + tile * Shape::kTileBytes, &args.k, 64 * tile, key_head, first_token, ring.full(step));
        tma_load(ring.values(step) + tile * Shape::kTileBytes, &args.v, 64 * tile, key_head, first_token, ring.full(step));
      }
    } else {
      mbarrier_arrive(ring.full(step));
    }
    announced = ++step;
  }

  __device__ void finish() {
    cp_async_wait<0>();
    announce(step);
  }

  // All steps of a tile.
  __device__ void bring(const int* columns, int key_head) {
    const auto steps = keys_of<Shape::kKeys>(args.attention.plan, columns);
    const int lane = threadIdx.x % Shape::kKeys;
    int upcoming = steps.token(0, lane);
    for (int i = 0; i < steps.size(); ++i) {
      ring.wait_empty(step);
      if (threadIdx.x < Shape::kKeys) ring.of_step(step)[lane] = upcoming;
      named_barrier_sync(1, kWarpgroupThreads);
      upcoming = i + 1 < steps.size() ? steps.token(i + 1, lane) : kAbsent;
      const Range& own = steps.ranges[1];
      const int first = own.begin + (i - steps.first[1]) * Shape::kKeys;
      // What lies behind the own range may be NaN, which a weight of 0 does not hide: a last step that is not full gets
      // zeros.
      if (i < steps.first[1] || first + Shape::kKeys > own.end) {
        gather(key_head);
      } else {
        load(first, key_head);
      }
    }
  }

 private:
  __device__ void copy(uint32_t stage, const Rows& rows, int key_head, const int* tokens) {
    constexpr int kChunks = kHeadDim / 8;
    const T* first = row_of<T>(rows, 0, key_head);
#pragma unroll 4
    for (int i = threadIdx.x; i < Shape::kKeys * kChunks; i += kWarpgroupThreads) {
      const int row = i / kChunks, chunk = i % kChunks, token = tokens[row];
      const bool present = token != kAbsent;
      const uint32_t to = stage + chunk / 8 * Shape::kTileBytes + swizzle128(row * 128 + chunk % 8 * 16);
      cp_async16(to, present ? first + token * rows.token + chunk * 8 : first, present);
    }
  }
};

// ---- the consumers -----------------------------------------------------------------------------------------------------

// 16 rows of a warp. Maxima are of scaled scores in base 2.
template <class T, int kHeadDim>
struct Consumer {
  using Shape = HopperForward<kHeadDim>;
  static constexpr int kKeys = Shape::kKeys;

  float out[kHeadDim / 2];        // [kHeadDim / 8][4]
  float scores[kKeys / 2];        // [kKeys / 8][4]
  uint32_t weights[kKeys / 16][4];
  uint32_t queries[kHeadDim / 16][4];
  float sum[2], highest[2], shrink[2];  // rows g and g + 8; a lane's sum is of its own keys
  int rows[2], first_row;               // of the warp
  float scale;

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = 0;
      highest[half] = -kInfinity;
    }
  }

  __device__ void start_scores(uint32_t keys) {
    wgmma_fence(scores, queries);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      wgmma<T, Major::kK>(scores, queries[k], k_major_operand(keys + k / 4 * Shape::kTileBytes + k % 4 * 32), k > 0);
    }
    wgmma_commit();
  }

  __device__ void start_out(uint32_t values) {
    wgmma_fence(out, weights);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      wgmma<T, Major::kMN>(out, weights[k], mn_major_operand(values + k * 2048, Shape::kTileBytes), true);
    }
    wgmma_commit();
  }

  // Scores become weights relative to the highest score so far; sums follow, out is left to rescale().
  __device__ void weigh(const int* tokens) {
    if (tokens[kKeys - 1] > first_row) hide(tokens);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -kInfinity;
#pragma unroll
      for (int i = 2 * half; i < kKeys / 2; i += 4) top = fmaxf(top, fmaxf(scores[i], scores[i + 1]));
      top = fmaxf(top, shfl_xor(top, 1));
      top = fmaxf(top, shfl_xor(top, 2));
      // Scaled and rounded once, so that weights and lse are relative to the same number.
      const float before = highest[half], now = fmaxf(before, mul_rn(top, scale));
      // A row that has not seen a key yet has no maximum; -inf minus -inf would be NaN.
      const float pivot = now == -kInfinity ? 0 : now;
      shrink[half] = exp2_approx(before - pivot);
      highest[half] = now;
      float added = 0;
#pragma unroll
      for (int i = 2 * half; i < kKeys / 2; i += 4) {
#pragma unroll
        for (int j = i; j < i + 2; ++j) {
          scores[j] = exp2_approx(fma_rn(scores[j], scale, -pivot));
          added += scores[j];
        }
      }
      sum[half] = fma_rn(sum[half], shrink[half], added);
    }
  }

  __device__ void rescale() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= shrink[i / 2 % 2];
  }

  __device__ void round_weights() {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[k][i] = pack<T>(scores[8 * k + 2 * i], scores[8 * k + 2 * i + 1]);
    }
  }

 private:
  // A row does not see the keys behind it.
  __device__ void hide(const int* tokens) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = tokens[8 * n + lane_id() % 4 * 2 + i];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (key > rows[half]) scores[4 * n + 2 * half + i] = -kInfinity;
        }
      }
    }
  }
};

// One tile of a consumer warpgroup, whose first step is `step`; the steps of the tile behind it are over then.
template <class T, int kHeadDim>
__device__ void consume(const Arguments& args, const Ring<kHeadDim>& ring, const int* columns, int head, int first,
                        int& step) {
  using Shape = HopperForward<kHeadDim>;
  const TileRows rows(args.plan, columns);
  const int end = step + keys_of<Shape::kKeys>(args.plan, columns).size();
  const int of_warp = first + threadIdx.x / 32 % 4 * 16, lane = lane_id(), last_row = rows.row(first + 63);

  Consumer<T, kHeadDim> state;
  state.clear();
  state.scale = args.scale_log2;
  state.first_row = rows.row(of_warp);
  uint32_t words[2][kHeadDim / 8];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.rows[half] = rows.row(of_warp + 8 * half + lane / 4);
    load_row<kHeadDim>(words[half], row_of<T>(args.q, state.rows[half], head));
  }
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.queries[k][i] = words[i % 2][2 * k + i / 2];
  }

  // The steps that a warpgroup has nothing to see in are the last ones.
  const auto sees = [&] {
    if (step == end) return false;
    ring.wait_full(step);
    return first < rows.count && ring.of_step(step)[0] <= last_row;
  };
  if (sees()) {
    state.start_scores(ring.keys(step));
    wgmma_wait<0>(state.scores);
    state.weigh(ring.of_step(step));
    state.round_weights();
    ++step;
    while (sees()) {
      state.start_scores(ring.keys(step));
      state.start_out(ring.values(step - 1));
      wgmma_wait<1>(state.scores);
      state.weigh(ring.of_step(step));
      wgmma_wait<0>(state.out);
      ring.release(step - 1);
      state.rescale();
      state.round_weights();
      ++step;
    }
    state.start_out(ring.values(step - 1));
    wgmma_wait<0>(state.out);
    ring.release(step - 1);
  }
  for (; step < end; ++step) {
    ring.wait_full(step);
    ring.release(step);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = state.rows[half];
    const bool valid = of_warp + 8 * half + lane / 4 < rows.count;
    float sum = state.sum[half];
    sum += shfl_xor(sum, 1);
    sum += shfl_xor(sum, 2);
    // A row that sees nothing has a sum of 0: its output is 0 and its lse log(0) = -inf.
    const float factor = sum == 0 ? 0 : 1 / sum;
    uint32_t out[kHeadDim / 8];
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      out[n] = pack<T>(state.out[4 * n + 2 * half] * factor, state.out[4 * n + 2 * half + 1] * factor);
    }
    store_row<kHeadDim>(row_of<T>(args.out, row, head), out, valid);
    if (lane % 4 == 0 && valid) {
      args.lse[int64_t{head} * args.num_tokens + row] = sum == 0 ? -kInfinity : (state.highest[half] + log2f(sum)) * kLn2;
    }
  }
}

// Row tiles of up to kHopperRows rows; otherwise as forward_kernel.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(HopperForward<kHeadDim>::kThreads, 1)
    hopper_forward_kernel(const __grid_constant__ HopperArguments args) {
  using Shape = HopperForward<kHeadDim>;
  const Ring<kHeadDim> ring(shared_memory<char>());
  const Plan& plan = args.attention.plan;
  const int heads = args.attention.heads, pairs = plan.num_tiles * heads;
  if (threadIdx.x == 0) {
    ring.init();
    tma_prefetch(&args.k);
    tma_prefetch(&args.v);
  }
  sync_block();
  // Behind the last tile there is nothing.
  const auto columns_of = [&](int pair) { return pair < pairs ? plan.tiles + 8 * (pair / heads) : nullptr; };
  const auto is_tile = [](const int* columns) { return columns != nullptr && columns[1] > 0; };
  if (threadIdx.x < kWarpgroupThreads) {
    decrease_registers<Shape::kProducerRegisters>();
    Producer<T, kHeadDim> producer = {args, ring};
    for (int pair = blockIdx.x; is_tile(columns_of(pair)); pair += gridDim.x) {
      producer.bring(columns_of(pair), pair % heads / args.attention.group);
    }
    producer.finish();
  } else {
    increase_registers<Shape::kConsumerRegisters>();
    const int first = (threadIdx.x / kWarpgroupThreads - 1) * 64;
    int step = 0;
    for (int pair = blockIdx.x; is_tile(columns_of(pair)); pair += gridDim.x) {
      consume<T, kHeadDim>(args.attention, ring, columns_of(pair), pair % heads, first, step);
    }
  }
}

template <class T, int kHeadDim>
int launch_hopper_forward(const Arguments& args, int blocks, void* stream) {
  using Shape = HopperForward<kHeadDim>;
  HopperArguments all = {args, {}, {}};
  const int key_heads = args.heads / args.group;
  const auto describe = [&](TensorMap* map, const Rows& rows) {
    // The stride of a single token or head is never used, but must be one that TMA takes.
    const int64_t token = args.num_tokens > 1 ? rows.token : kHeadDim, head = key_heads > 1 ? rows.head : kHeadDim;
    return make_tensor_map(map, {rows.data, args.num_tokens, key_heads, kHeadDim, token, head}, Shape::kKeys);
  };
  if (const int code = describe(&all.k, args.k)) return code;
  if (const int code = describe(&all.v, args.v)) return code;
  return launch(hopper_forward_kernel<T, kHeadDim>, dim3(blocks), dim3(Shape::kThreads), Shape::kSharedBytes, stream, all);
}

}  // namespace voco::attention
