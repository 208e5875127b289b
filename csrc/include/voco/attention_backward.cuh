// Backward: scores are computed again from q, k and the lse of the forward (FlashAttention-2, arXiv 2307.08691, algorithm
// 2).
//
// The gradient of q goes through the keys of a row tile, as the forward does, and the gradients of k and v through the rows
// that see a key tile. Every element is written by one thread, in a fixed order of additions: no atomics, the same bits in
// every run.
#pragma once

#include "voco/attention_steps.cuh"

namespace voco::attention {

// ---- the gradient of q -------------------------------------------------------------------------------------------------

template <int kHeadDim>
struct QueryGradient {
  static constexpr int kWarps = kTileRows / 16, kThreads = 32 * kWarps, kStages = kHeadDim <= 128 ? 3 : 2;
  static constexpr bool kInRegisters = kHeadDim <= 128;
  static constexpr int kRowBytes = kInRegisters ? 0 : kTileRows * kHeadDim * 2;  // of the queries, and of the gradients

  template <class T>
  using Pipeline = KeyPipeline<T, kHeadDim, kWarps, kStages, 2>;
  static constexpr int kSharedBytes = 2 * kRowBytes + Pipeline<__half>::kSharedBytes;
};

template <class T, int kHeadDim>
struct QueryState {
  using Shape = QueryGradient<kHeadDim>;

  Operand<kHeadDim, Shape::kInRegisters> queries, grads;
  float sums[kHeadDim / 8][4];
  float lse[2], delta[2];  // of rows g and g + 8; lse in base 2
  const int* rows;

  __device__ void attend(uint32_t keys, uint32_t values, const int* tokens, float scale) {
    float scores[4][4] = {}, grad_weights[4][4] = {};
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t q[4], grad[4];
      queries.fragment(q, k);
      grads.fragment(grad, k);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t b[4];
        load_b_transposed<kHeadDim>(b, keys, 16 * n, k);
        mma_m16n8k16<T>(scores[2 * n], q, b[0], b[1]);
        mma_m16n8k16<T>(scores[2 * n + 1], q, b[2], b[3]);
        load_b_transposed<kHeadDim>(b, values, 16 * n, k);
        mma_m16n8k16<T>(grad_weights[2 * n], grad, b[0], b[1]);
        mma_m16n8k16<T>(grad_weights[2 * n + 1], grad, b[2], b[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = exp2_approx(fma_rn(scores[n][i], scale, -lse[i / 2]));
    }
    if (tokens[kKeyStep - 1] > rows[0]) hide(scores, tokens);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] *= grad_weights[n][i] - delta[i / 2];
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t a[4];
      as_operand<T>(a, scores[2 * k], scores[2 * k + 1]);
      add_product<T, kHeadDim>(sums, a, keys, 16 * k);
    }
  }

 private:
  // A row does not see the keys behind it.
  __device__ void hide(float (&weights)[4][4], const int* tokens) const {
    const int low_row = rows[lane_id() / 4], high_row = rows[8 + lane_id() / 4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = tokens[8 * n + lane_id() % 4 * 2 + i];
        weights[n][i] = key <= low_row ? weights[n][i] : 0;
        weights[n][2 + i] = key <= high_row ? weights[n][2 + i] : 0;
      }
    }
  }
};

template <class T, int kHeadDim>
__device__ void query_gradient_tile(const Arguments& args, const int* columns, int head) {
  using Shape = QueryGradient<kHeadDim>;
  char* shared = shared_memory<char>();
  const uint32_t query_tile = smem_address(shared), grad_tile = query_tile + Shape::kRowBytes;
  const typename Shape::template Pipeline<T> pipeline(args, head / args.group, shared + 2 * Shape::kRowBytes);
  const TileRows rows(args.plan, columns);
  const int warp = warp_id(), lane = lane_id();

  pipeline.open(rows, columns);
  if constexpr (!Shape::kInRegisters) {
    copy_rows<T, kHeadDim, kTileRows, Shape::kThreads>(query_tile, args.q, head, pipeline.rows);
    copy_rows<T, kHeadDim, kTileRows, Shape::kThreads>(grad_tile, args.grad_out, head, pipeline.rows);
  }
  pipeline.start();

  QueryState<T, kHeadDim> state;
  state.rows = pipeline.rows + 16 * warp;
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.sums[n][i] = 0;
  }
  const int* of_lane = state.rows + lane / 4;
  if constexpr (Shape::kInRegisters) {
    state.queries.load(row_of<T>(args.q, of_lane[0], head), row_of<T>(args.q, of_lane[8], head));
    state.grads.load(row_of<T>(args.grad_out, of_lane[0], head), row_of<T>(args.grad_out, of_lane[8], head));
  } else {
    state.queries = {query_tile, 16 * warp};
    state.grads = {grad_tile, 16 * warp};
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = 16 * warp + 8 * half + lane / 4, row = pipeline.rows[place];
    const int64_t of_head = int64_t{head} * args.num_tokens + row;
    state.lse[half] = args.lse[of_head] * kLog2E;
    state.delta[half] = dot_rows<T, kHeadDim>(row_of<T>(args.out, row, head), row_of<T>(args.grad_out, row, head));
    if (lane % 4 == 0 && place < rows.count) args.delta[of_head] = state.delta[half];
  }

  for (int step = 0; step < pipeline.steps.size(); ++step) {
    const int upcoming = pipeline.arrive(step);
    const int* tokens = pipeline.of_step(step);
    if (16 * warp < rows.count && tokens[0] <= state.rows[15]) {
      state.attend(pipeline.keys(step), pipeline.values(step), tokens, args.scale_log2);
    }
    pipeline.keep(step, upcoming);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = 16 * warp + 8 * half + lane / 4;
    T* row = row_of<T>(args.dq, pipeline.rows[place], head);
    store_sums<T, kHeadDim>(row, state.sums, half, args.scale, place < rows.count);
  }
}

// dq, and delta = sum(out * grad_out) for the gradient of k and v, which spares a pass over both. Grid as in forward_kernel.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(QueryGradient<kHeadDim>::kThreads)
    query_gradient_kernel(const __grid_constant__ Arguments args) {
  for_each_pair<8>(args.plan, args.heads,
                   [&](const int* columns, int head) { query_gradient_tile<T, kHeadDim>(args, columns, head); });
}

template <class T, int kHeadDim>
int launch_query_gradient(const Arguments& args, int blocks, void* stream) {
  using Shape = QueryGradient<kHeadDim>;
  return launch(query_gradient_kernel<T, kHeadDim>, dim3(blocks), dim3(Shape::kThreads), Shape::kSharedBytes, stream, args);
}

// ---- the gradients of k and v ------------------------------------------------------------------------------------------

// Scores are transposed, keys by rows: weights then are operands of the products that sum over rows as they are.
template <int kHeadDim>
struct KeyGradient {
  // At 256 a warp has no registers for both gradients: half of the warps sum up dk, the others dv.
  static constexpr bool kSplit = kHeadDim > 128, kInRegisters = !kSplit;
  static constexpr int kKeyWarps = kTileKeys / 16, kWarps = kKeyWarps * (kSplit ? 2 : 1), kThreads = 32 * kWarps;
  static constexpr int kStep = 32, kStages = 2, kTileBytes = kStep * kHeadDim * 2, kStageBytes = 2 * kTileBytes;
  static constexpr int kSlots = kStages + 1;  // as in KeyPipeline
  static constexpr int kKeyBytes = kInRegisters ? 0 : kTileKeys * kHeadDim * 2;  // of the keys, and of the values
  using RowSteps = Steps<3, kStep>;
  // Of the rows: token, lse, delta. Of the keys: token, and the first token behind the segment.
  static constexpr int kSharedBytes = 2 * kKeyBytes + kStages * kStageBytes + sizeof(RowSteps) +
                                      (3 * kSlots * kStep + 2 * kTileKeys) * sizeof(int);
};

// What of the rows of a step is needed beside the rows themselves.
struct RowNumbers {
  int* tokens;
  float* lse;  // infinite where there is no row, whose weights then are 0
  float* delta;
};

// Which rows see each of a warp's 16 keys: from low to before high. Own rows do from the key on, late rows until the segment
// ends, and readers from there.
struct KeyLimits {
  const int* keys;  // tokens; kTileKeys further on, the first token behind the segment
  bool is_late, is_reader;

  __device__ int low(int key) const { return keys[is_reader ? kTileKeys + key : key]; }
  __device__ int high(int key) const { return is_late ? keys[kTileKeys + key] : kAbsent; }
};

template <class T, int kHeadDim>
struct KeyState {
  using Shape = KeyGradient<kHeadDim>;

  Operand<kHeadDim, Shape::kInRegisters> keys, values;
  float sums[Shape::kSplit ? 1 : 2][kHeadDim / 8][4];  // dk and dv, or one of them
  bool is_dv;                                          // where they are split

  // Takes 16 rows in.
  __device__ void collect(uint32_t queries, uint32_t grads, int row, const RowNumbers& numbers, bool masked,
                          const KeyLimits& limits, float scale) {
    float weights[2][4] = {};
    multiply(weights, keys, queries, row);
    const int column = row + lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[n][i] = exp2_approx(fma_rn(weights[n][i], scale, numbers.lse[column + 8 * n + i % 2] * -kLog2E));
      }
    }
    if (masked) hide(weights, numbers.tokens + column, limits);
    uint32_t a[4];
    if (!Shape::kSplit || is_dv) {
      as_operand<T>(a, weights[0], weights[1]);
      add_product<T, kHeadDim>(sums[Shape::kSplit ? 0 : 1], a, grads, row);
    }
    if (!Shape::kSplit || !is_dv) {
      float grad_weights[2][4] = {};
      multiply(grad_weights, values, grads, row);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[n][i] *= grad_weights[n][i] - numbers.delta[column + 8 * n + i % 2];
      }
      as_operand<T>(a, weights[0], weights[1]);
      add_product<T, kHeadDim>(sums[0], a, queries, row);
    }
  }

 private:
  __device__ void hide(float (&weights)[2][4], const int* rows, const KeyLimits& limits) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = 8 * half + lane_id() / 4, from = limits.low(key), to = limits.high(key);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = rows[8 * n + i];
          weights[n][2 * half + i] = row >= from && row < to ? weights[n][2 * half + i] : 0;
        }
      }
    }
  }

  // 16 keys or values times 16 rows of a tile.
  __device__ void multiply(float (&c)[2][4], const Operand<kHeadDim, Shape::kInRegisters>& of_keys, uint32_t tile, int row) {
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[4], b[4];
      of_keys.fragment(a, k);
      load_b_transposed<kHeadDim>(b, tile, row, k);
      mma_m16n8k16<T>(c[0], a, b[0], b[1]);
      mma_m16n8k16<T>(c[1], a, b[2], b[3]);
    }
  }
};

template <class T, int kHeadDim>
__device__ void key_gradient_tile(const Arguments& args, const int* columns, int key_head) {
  using Shape = KeyGradient<kHeadDim>;
  constexpr int kStages = Shape::kStages, kStep = Shape::kStep, kSlotSize = Shape::kSlots * kStep;
  char* shared = shared_memory<char>();
  const uint32_t key_tile = smem_address(shared), value_tile = key_tile + Shape::kKeyBytes;
  const uint32_t stages = value_tile + Shape::kKeyBytes;
  auto& steps = *reinterpret_cast<typename Shape::RowSteps*>(shared + 2 * Shape::kKeyBytes + kStages * Shape::kStageBytes);
  int* key_tokens = reinterpret_cast<int*>(&steps + 1);
  int* after = key_tokens + kTileKeys;
  int* tokens = after + kTileKeys;
  float* lse = reinterpret_cast<float*>(tokens + kSlotSize);
  float* delta = lse + kSlotSize;
  const int warp = warp_id(), lane = lane_id(), begin = columns[0], count = columns[1];
  const Plan& plan = args.plan;
  // Private keys have own rows only; public keys have late rows of their segments, and readers.
  if (threadIdx.x == 0) {
    steps.ranges[0] = {nullptr, columns[2], columns[4]};
    steps.ranges[1] = {plan.late_index, columns[5], columns[6]};
    steps.ranges[2] = {plan.reader_index, columns[7], columns[9]};
    steps.count();
  }
  for (int i = threadIdx.x; i < kTileKeys; i += Shape::kThreads) {
    const int key = plan.key_index[begin + min(i, count - 1)];
    key_tokens[i] = key;
    after[i] = plan.after[key];
  }
  sync_block();
  const int of_head = steps.size(), all = of_head * args.group;  // every query head of the group has all steps

  // Of lane's row in a step: the first warp looks up tokens, the second one lse, the third one delta.
  const auto look_up = [&](int step) {
    const int absent = warp == 0 ? kAbsent : warp == 1 ? kInfinityBits : 0;
    if (warp >= 3 || step >= all) return absent;
    const int token = steps.token(step % of_head, lane);
    if (token == kAbsent) return absent;
    if (warp == 0) return token;
    const int64_t at = int64_t{key_head * args.group + step / of_head} * args.num_tokens + token;
    return reinterpret_cast<const int*>(warp == 1 ? args.lse : args.delta)[at];
  };
  const auto keep = [&](int step, int number) {
    if (warp < 3) tokens[warp * kSlotSize + step % Shape::kSlots * kStep + lane] = number;
  };
  const auto copy_step = [&](int step) {
    if (step < all) {
      const int head = key_head * args.group + step / of_head;
      const uint32_t stage = stages + step % kStages * Shape::kStageBytes;
      const int* of_step = tokens + step % Shape::kSlots * kStep;
      copy_rows<T, kHeadDim, kStep, Shape::kThreads, 2>(stage, args.q, head, of_step);
      copy_rows<T, kHeadDim, kStep, Shape::kThreads, 2>(stage + Shape::kTileBytes, args.grad_out, head, of_step);
    }
    cp_async_commit();
  };

  for (int step = 0; step < kStages; ++step) keep(step, look_up(step));
  sync_block();
  if constexpr (!Shape::kInRegisters) {
    copy_rows<T, kHeadDim, kTileKeys, Shape::kThreads>(key_tile, args.k, key_head, key_tokens);
    copy_rows<T, kHeadDim, kTileKeys, Shape::kThreads>(value_tile, args.v, key_head, key_tokens);
  }
  for (int step = 0; step < kStages - 1; ++step) copy_step(step);

  KeyState<T, kHeadDim> state;
  const int first = warp % Shape::kKeyWarps * 16;
  const int* lane_keys = key_tokens + first + lane / 4;
  state.is_dv = warp >= Shape::kKeyWarps;
#pragma unroll
  for (auto& sums : state.sums) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = 0;
    }
  }
  if constexpr (Shape::kInRegisters) {
    state.keys.load(row_of<T>(args.k, lane_keys[0], key_head), row_of<T>(args.k, lane_keys[8], key_head));
    state.values.load(row_of<T>(args.v, lane_keys[0], key_head), row_of<T>(args.v, lane_keys[8], key_head));
  } else {
    state.keys = {key_tile, first};
    state.values = {value_tile, first};
  }

  for (int step = 0; step < all; ++step) {
    cp_async_wait<kStages - 2>();
    sync_block();
    // Looked up one step before it is copied.
    const int upcoming = look_up(step + kStages);
    copy_step(step + kStages - 1);
    const uint32_t queries = stages + step % kStages * Shape::kStageBytes;
    const int slot = step % Shape::kSlots * kStep, in_head = step % of_head;
    const RowNumbers numbers = {tokens + slot, lse + slot, delta + slot};
    const bool is_reader = in_head >= steps.first[2];
    const KeyLimits limits = {key_tokens + first, !is_reader && in_head >= steps.first[1], is_reader};
#pragma unroll 1
    for (int row = 0; row < kStep; row += 16) {
      const int first_row = numbers.tokens[row], last_row = numbers.tokens[row + 15];
      if (first >= count || last_row < limits.low(0) || first_row >= limits.high(15)) continue;
      const bool masked = first_row < limits.low(15) || last_row >= limits.high(0);
      state.collect(queries, queries + Shape::kTileBytes, row, numbers, masked, limits, args.scale_log2);
    }
    keep(step + kStages, upcoming);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool valid = first + 8 * half + lane / 4 < count;
    T* dk = row_of<T>(args.dk, lane_keys[8 * half], key_head);
    T* dv = row_of<T>(args.dv, lane_keys[8 * half], key_head);
    if constexpr (Shape::kSplit) {
      store_sums<T, kHeadDim>(state.is_dv ? dv : dk, state.sums[0], half, state.is_dv ? 1 : args.scale, valid);
    } else {
      store_sums<T, kHeadDim>(dk, state.sums[0], half, args.scale, valid);
      store_sums<T, kHeadDim>(dv, state.sums[1], half, 1, valid);
    }
  }
}

// dk and dv [N, heads / group, D]. A block takes every gridDim.x-th pair of a key tile and a head of keys.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(KeyGradient<kHeadDim>::kThreads)
    key_gradient_kernel(const __grid_constant__ Arguments args) {
  for_each_pair<10>(args.plan, args.heads / args.group,
                    [&](const int* columns, int key_head) { key_gradient_tile<T, kHeadDim>(args, columns, key_head); });
}

template <class T, int kHeadDim>
int launch_key_gradient(const Arguments& args, int blocks, void* stream) {
  using Shape = KeyGradient<kHeadDim>;
  return launch(key_gradient_kernel<T, kHeadDim>, dim3(blocks), dim3(Shape::kThreads), Shape::kSharedBytes, stream, args);
}

}  // namespace voco::attention
