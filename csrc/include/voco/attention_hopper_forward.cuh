// Forward on Hopper: the arithmetic of attention_forward.cuh. A consumer computes the scores of the next step while the
// weights of this one are multiplied with the values.
#pragma once

#include "voco/attention_hopper.cuh"

namespace voco::attention {

// 16 rows of a warp. Maxima are of scaled scores in base 2.
template <class T, int kHeadDim>
struct ForwardState {
  float out[kHeadDim / 2];  // [kHeadDim / 8][4]
  float scores[32];         // [kHopperStep / 8][4]
  uint32_t weights[4][4];
  uint32_t queries[kHeadDim / 16][4];
  float sum[2], highest[2], shrink[2];  // of the lane's rows; its sums are of its own keys
  LaneRows lane;
  float scale;

  __device__ void open(const Arguments& args, const RowPart& part, uint32_t matrix) {
    load_operand<kHeadDim>(queries, matrix);
    lane.open(part);
    scale = args.scale_log2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = 0;
      highest[half] = -kInfinity;
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0;
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

  __device__ void start_sums(uint32_t, uint32_t values) {
    wgmma_fence(out, weights);
    add_multiplied<T, kHeadDim>(out, weights, values);
    wgmma_commit();
  }
  __device__ void wait_sums() { wgmma_wait<0>(out); }

  // Scores become weights relative to the highest score so far; sums follow, out is left to round().
  __device__ void weigh(const int* tokens) {
    lane.hide(scores, tokens, -kInfinity);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -kInfinity;
#pragma unroll
      for (int i = 2 * half; i < 32; i += 4) top = fmaxf(top, fmaxf(scores[i], scores[i + 1]));
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
      for (int i = 2 * half; i < 32; i += 4) {
#pragma unroll
        for (int j = i; j < i + 2; ++j) {
          scores[j] = exp2_approx(fma_rn(scores[j], scale, -pivot));
          added += scores[j];
        }
      }
      sum[half] = fma_rn(sum[half], shrink[half], added);
    }
  }

  __device__ void round(uint32_t) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= shrink[i / 2 % 2];
    as_operands<T>(weights, scores);
  }

  __device__ void store(const Arguments& args) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane.rows[half], head = lane.head;
      const bool valid = lane.is_there(half);
      float total = sum[half];
      total += shfl_xor(total, 1);
      total += shfl_xor(total, 2);
      // A row that sees nothing has a sum of 0: its output is 0 and its lse log(0) = -inf.
      const float factor = total == 0 ? 0 : 1 / total;
      store_sums<T, kHeadDim>(row_of<T>(args.out, row, head), out, half, factor, valid);
      if (lane_id() % 4 == 0 && valid) {
        const float lse = total == 0 ? -kInfinity : (highest[half] + log2f(total)) * kLn2;
        args.lse[int64_t{head} * args.num_tokens + row] = lse;
      }
    }
  }
};

template <int kHeadDim>
using HopperForward = RowBlock<kHeadDim, 5, 1>;

// Row tiles of up to kHopperTile rows; otherwise as forward_kernel.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kHopperThreads, 1) hopper_forward_kernel(const __grid_constant__ HopperArguments args) {
  const HopperForward<kHeadDim> block(shared_memory<char>());
  run_block(
      block, [&] { produce_for_rows<T>(args, block); },
      [&] { consume_rows<ForwardState<T, kHeadDim>>(args.attention, block); });
}

template <class T, int kHeadDim>
int launch_hopper_forward(const Arguments& args, int blocks, void* stream) {
  HopperArguments all;
  if (const int code = with_tensor_maps<kHeadDim>(&all, args)) return code;
  constexpr int kShared = HopperForward<kHeadDim>::kSharedBytes;
  return launch(hopper_forward_kernel<T, kHeadDim>, dim3(blocks), dim3(kHopperThreads), kShared, stream, all);
}

}  // namespace voco::attention
