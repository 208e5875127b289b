// Backward on Hopper: the arithmetic of attention_backward.cuh, in three kernels: delta, the gradient of q over row tiles,
// and the gradients of k and v over key tiles of 128 keys.
#pragma once

#include "voco/attention_hopper.cuh"

namespace voco::attention {

// ---- delta -------------------------------------------------------------------------------------------------------------

constexpr int kDeltaThreads = 256;

// delta = sum(out * grad_out), one row of one head for each four threads: both gradients need it of rows that they do not
// have the outputs of.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kDeltaThreads) delta_kernel(const __grid_constant__ Arguments args) {
  const int64_t all = int64_t{args.num_tokens} * args.heads, i = int64_t{blockIdx.x} * (kDeltaThreads / 4) + threadIdx.x / 4;
  const int64_t row = min(i, all - 1), token = row / args.heads, head = row % args.heads;
  const float delta = dot_rows<T, kHeadDim>(row_of<T>(args.out, token, head), row_of<T>(args.grad_out, token, head));
  if (lane_id() % 4 == 0 && i < all) args.delta[head * args.num_tokens + token] = delta;
}

// ---- the gradient of q -------------------------------------------------------------------------------------------------

// 16 rows of a warp.
template <class T, int kHeadDim>
struct HopperQueryState {
  float sums[kHeadDim / 2];
  float scores[32];
  uint32_t grad_scores[4][4];
  uint32_t queries[kHeadDim / 16][4], grads[kHeadDim / 16][4];
  float lse[2], delta[2];  // of the lane's rows; lse in base 2
  LaneRows lane;
  float scale;

  __device__ void open(const Arguments& args, const RowPart& part, uint32_t matrix) {
    load_operand<kHeadDim>(queries, matrix);
    load_operand<kHeadDim>(grads, matrix + Matrix<kHeadDim>::kBytes);
    lane.open(part);
    scale = args.scale_log2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      lse[half] = part.lse[LaneRows::place(half)];
      delta[half] = part.delta[LaneRows::place(half)];
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) sums[i] = 0;
  }

  __device__ void start_scores(uint32_t keys) {
    wgmma_fence(scores, queries);
    multiply_transposed<T, kHeadDim>(scores, queries, keys);
    wgmma_commit();
  }
  template <int kInFlight>
  __device__ void wait_scores() {
    wgmma_wait<kInFlight>(scores);
  }

  __device__ void start_sums(uint32_t keys, uint32_t) {
    wgmma_fence(sums, grad_scores);
    add_multiplied<T, kHeadDim>(sums, grad_scores, keys);
    wgmma_commit();
  }
  __device__ void wait_sums() { wgmma_wait<0>(sums); }

  __device__ void weigh(const int* tokens) {
#pragma unroll
    for (int i = 0; i < 32; ++i) scores[i] = exp2_approx(fma_rn(scores[i], scale, -lse[i / 2 % 2]));
    lane.hide(scores, tokens, 0);
  }

  // Only now, since the operands of the sums before are no longer needed, there are registers for the gradients of weights.
  __device__ void round(uint32_t values) {
    float grad_weights[32];
    wgmma_fence(grad_weights, grads);
    multiply_transposed<T, kHeadDim>(grad_weights, grads, values);
    wgmma_commit();
    wgmma_wait<0>(grad_weights);
#pragma unroll
    for (int i = 0; i < 32; ++i) scores[i] *= grad_weights[i] - delta[i / 2 % 2];
    as_operands<T>(grad_scores, scores);
  }

  __device__ void store(const Arguments& args) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* row = row_of<T>(args.dq, lane.rows[half], lane.head);
      store_sums<T, kHeadDim>(row, sums, half, args.scale, lane.is_there(half));
    }
  }
};

template <int kHeadDim>
using HopperQueryGradient = RowBlock<kHeadDim, 4, 2>;

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_query_gradient_kernel(const __grid_constant__ HopperArguments args) {
  const HopperQueryGradient<kHeadDim> block(shared_memory<char>());
  run_block(
      block, [&] { produce_for_rows<T>(args, block); },
      [&] { consume_rows<HopperQueryState<T, kHeadDim>>(args.attention, block); });
}

// Two launches: delta, and dq.
template <class T, int kHeadDim>
int launch_hopper_query_gradient(const Arguments& args, int blocks, void* stream) {
  HopperArguments all;
  if (const int code = with_tensor_maps<kHeadDim>(&all, args)) return code;
  constexpr int kShared = HopperQueryGradient<kHeadDim>::kSharedBytes, kRows = kDeltaThreads / 4;
  const auto of_delta = static_cast<unsigned>((int64_t{args.num_tokens} * args.heads + kRows - 1) / kRows);
  if (const int code = launch(delta_kernel<T, kHeadDim>, dim3(of_delta), dim3(kDeltaThreads), 0, stream, args)) return code;
  return launch(hopper_query_gradient_kernel<T, kHeadDim>, dim3(blocks), dim3(kHopperThreads), kShared, stream, all);
}

// ---- the gradients of k and v ------------------------------------------------------------------------------------------

enum RowKind { kOwn, kLate, kReader };

// Rows of a step. Where there is none, lse is infinite, so that its weights are 0.
struct HopperRowNumbers {
  int tokens[kHopperStep];
  float lse[kHopperStep], delta[kHopperStep];  // lse times -log2(e)
  RowKind kind;
};

// Keys of a consumer; those behind the last one are the last one once more.
struct KeyPart {
  int tokens[kPart], after[kPart];
  int count, steps, head;
};

template <int kHeadDim>
using HopperKeyGradient = HopperBlock<kHeadDim, 4, 2, HopperRowNumbers, KeyPart>;

// The keys and values of a tile.
template <class T, class Block>
__device__ inline void bring_keys(Producer<T, Block>& producer, const HopperArguments& all, const int* columns, int key_head,
                                  int steps) {
  const Plan& plan = all.attention.plan;
  const Source sources[] = {{all.attention.k, all.k, key_head}, {all.attention.v, all.v, key_head}};
  const int begin = columns[0], count = columns[1];
  // Private keys are neighbours where no public one is between them.
  const bool are_neighbours = columns[4] > 0 && columns[3] - columns[2] + 1 == count;
  // A part is free when all steps of the tile before are done, the last one too.
  producer.finish();
  for (int consumer = 0; consumer < kConsumers; ++consumer) {
    const Gate gate = producer.block.part_gate(consumer, producer.tile);
    KeyPart& part = producer.block.parts[consumer];
    const int first = kPart * consumer, i = threadIdx.x;
    gate.wait_empty();
    if (i < kPart) {
      const int key = plan.key_index[begin + min(first + i, count - 1)];
      part.tokens[i] = key;
      part.after[i] = plan.after[key];
    }
    if (i == 0) {
      part.count = count - first;
      part.steps = steps;
      part.head = key_head;
    }
    const uint32_t to = producer.block.of_part(consumer);
    if (count <= first) {
      mbarrier_arrive(gate.full);
    } else if (are_neighbours) {
      producer.load(to, sources, columns[2] + first, gate.full);
    } else {
      producer.gather(to, sources, part.tokens, gate.full);
    }
  }
  ++producer.tile;
}

// All of a producer's work for key tiles: every query head of a group has all steps of a tile.
template <class T, class Block>
__device__ inline void produce_for_keys(const HopperArguments& all, const Block& block) {
  const Arguments& args = all.attention;
  const Plan& plan = args.plan;
  Producer<T, Block> producer = {block};
  for_each_tile<10>(plan, args.heads / args.group, [&](const int* columns, int key_head) {
    // Private keys have own rows only; public keys have late rows of their segments, and readers.
    Steps<3, kHopperStep> steps = {{{nullptr, columns[2], columns[4]},
                                    {plan.late_index, columns[5], columns[6]},
                                    {plan.reader_index, columns[7], columns[9]}}};
    steps.count();
    const int lane = threadIdx.x % kHopperStep, of_head = steps.size();
    bring_keys(producer, all, columns, key_head, of_head * args.group);
    for (int head = key_head * args.group; head < (key_head + 1) * args.group; ++head) {
      const Source sources[] = {{args.q, all.q, head}, {args.grad_out, all.grad_out, head}};
      const float* lse = args.lse + int64_t{head} * args.num_tokens;
      const float* delta = args.delta + int64_t{head} * args.num_tokens;
      int upcoming = steps.token(0, lane);
      for (int i = 0; i < of_head; ++i, ++producer.step) {
        const Gate gate = block.gate(producer.step);
        HopperRowNumbers& numbers = block.numbers(producer.step);
        gate.wait_empty();
        if (threadIdx.x < kHopperStep) {
          const bool is_row = upcoming != kAbsent;
          numbers.tokens[lane] = upcoming;
          numbers.lse[lane] = is_row ? lse[upcoming] * -kLog2E : -kInfinity;
          numbers.delta[lane] = is_row ? delta[upcoming] : 0;
        }
        if (threadIdx.x == 0) numbers.kind = i < steps.first[1] ? kOwn : i < steps.first[2] ? kLate : kReader;
        upcoming = i + 1 < of_head ? steps.token(i + 1, lane) : kAbsent;
        const int first = columns[2] + i * kHopperStep;
        if (i < steps.first[1] && first + kHopperStep <= columns[4]) {
          producer.load(block.first(producer.step), sources, first, gate.full);
        } else {
          producer.gather(block.first(producer.step), sources, numbers.tokens, gate.full);
        }
      }
    }
  });
  producer.end();
}

// 16 keys of a warp: scores are transposed, keys by rows.
template <class T, int kHeadDim>
struct HopperKeyState {
  float sums[2][kHeadDim / 2];  // dk, dv
  float scale;

  // Of a step of rows. Which rows see a key: from low to before high; own rows do from the key on, late rows until the
  // segment ends, and readers from there.
  __device__ void collect(uint32_t matrix, uint32_t queries, uint32_t grads, const HopperRowNumbers& numbers,
                          const KeyPart& part) {
    const int *low = numbers.kind == kReader ? part.after : part.tokens, column = lane_id() % 4 * 2;
    const bool is_late = numbers.kind == kLate;
    float scores[32], grad_weights[32];
    uint32_t weights[4][4];
    wgmma_fence(scores);
    multiply_transposed<T, kHeadDim>(scores, matrix, queries);
    wgmma_commit();
    wgmma_fence(grad_weights);
    multiply_transposed<T, kHeadDim>(grad_weights, matrix + Matrix<kHeadDim>::kBytes, grads);
    wgmma_commit();
    wgmma_wait<1>(scores);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[4 * n + i];
        score = exp2_approx(fma_rn(score, scale, numbers.lse[8 * n + column + i % 2]));
      }
    }
    const bool masked = numbers.tokens[0] < low[kPart - 1] || (is_late && numbers.tokens[kHopperStep - 1] >= part.after[0]);
    if (masked) hide(scores, numbers.tokens + column, low, is_late ? part.after : nullptr);
    // From here on weights are the rounded ones: there are not registers for both.
    as_operands<T>(weights, scores);
    wgmma_fence(sums[1], weights);
    add_multiplied<T, kHeadDim>(sums[1], weights, grads);
    wgmma_commit();
    wgmma_wait<1>(grad_weights);
    uint32_t grad_scores[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 weight = unpack<T>(weights[k][i]);
        const float* of_rows = numbers.delta + 16 * k + i / 2 * 8 + column;
        const float *grad = grad_weights + 8 * k + 2 * i;
        grad_scores[k][i] = pack<T>(weight.x * (grad[0] - of_rows[0]), weight.y * (grad[1] - of_rows[1]));
      }
    }
    wgmma_fence(sums[0], grad_scores);
    add_multiplied<T, kHeadDim>(sums[0], grad_scores, queries);
    wgmma_commit();
    wgmma_wait<0>(sums);
  }

 private:
  __device__ void hide(float (&weights)[32], const int* rows, const int* lows, const int* highs) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = threadIdx.x / 32 % 4 * 16 + 8 * half + lane_id() / 4;
      const int low = lows[key], high = highs != nullptr ? highs[key] : kAbsent;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = rows[8 * n + i];
          float& weight = weights[4 * n + 2 * half + i];
          weight = row >= low && row < high ? weight : 0;
        }
      }
    }
  }
};

// All of a consumer's work for key tiles.
template <class T, class Block>
__device__ inline void consume_keys(const Arguments& args, const Block& block) {
  constexpr int kHeadDim = Block::kHeadDim;
  const int consumer = threadIdx.x / kWarpgroupThreads - 1, of_lane = threadIdx.x / 32 % 4 * 16 + lane_id() / 4;
  const uint32_t matrix = block.of_part(consumer);
  const KeyPart& part = block.parts[consumer];
  int step = 0;
  for (int tile = 0;; ++tile) {
    const Gate of_part = block.part_gate(consumer, tile);
    of_part.wait_full();
    if (part.steps == kNoTile) break;
    HopperKeyState<T, kHeadDim> state;
    state.scale = args.scale_log2;
#pragma unroll
    for (auto& sums : state.sums) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) sums[i] = 0;
    }
    for (const int end = step + part.steps; step < end; ++step) {
      const Gate gate = block.gate(step);
      gate.wait_full();
      const HopperRowNumbers& numbers = block.numbers(step);
      // The rows of a step rise, and so do the keys of a part, and where their segments end.
      const int low = numbers.kind == kReader ? part.after[0] : part.tokens[0];
      const int high = numbers.kind == kLate ? part.after[kPart - 1] : kAbsent;
      if (part.count > 0 && numbers.tokens[kHopperStep - 1] >= low && numbers.tokens[0] < high) {
        state.collect(matrix, block.first(step), block.second(step), numbers, part);
      }
      gate.release();
    }
    const int head = part.head, count = part.count - of_lane;
    const int keys[] = {part.tokens[of_lane], part.tokens[of_lane + 8]};
    of_part.release();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = count > 8 * half;
      store_sums<T, kHeadDim>(row_of<T>(args.dk, keys[half], head), state.sums[0], half, args.scale, valid);
      store_sums<T, kHeadDim>(row_of<T>(args.dv, keys[half], head), state.sums[1], half, 1, valid);
    }
  }
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_key_gradient_kernel(const __grid_constant__ HopperArguments args) {
  const HopperKeyGradient<kHeadDim> block(shared_memory<char>());
  run_block(
      block, [&] { produce_for_keys<T>(args, block); }, [&] { consume_keys<T>(args.attention, block); });
}

template <class T, int kHeadDim>
int launch_hopper_key_gradient(const Arguments& args, int blocks, void* stream) {
  HopperArguments all;
  if (const int code = with_tensor_maps<kHeadDim>(&all, args)) return code;
  constexpr int kShared = HopperKeyGradient<kHeadDim>::kSharedBytes;
  return launch(hopper_key_gradient_kernel<T, kHeadDim>, dim3(blocks), dim3(kHopperThreads), kShared, stream, all);
}

}  // namespace voco::attention
