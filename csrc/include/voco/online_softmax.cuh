// The state of an online softmax (FlashAttention-2, arXiv 2307.08691) over 16 rows, as a warp holds it between steps of
// keys.
#pragma once

#include "voco/mma_tile.cuh"

namespace voco {

template <int kHeadDim>
struct SoftmaxRows {
  float out[kHeadDim / 8][4];
  // Of a lane's rows g and g + 8. A lane's sum is of its own keys; maxima are of scaled scores in base 2.
  float sum[2], highest[2];

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = 0;
      highest[half] = -__builtin_huge_valf();
    }
  }

  // Scores of 8 kBlocks keys to weights relative to the highest score so far, to which sum and out are brought, too. `scale`
  // is the factor on scores, times log2(e).
  template <int kBlocks>
  __device__ void weigh(float (&scores)[kBlocks][4], float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = scores[0][2 * half];
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      top = fmaxf(top, shfl_xor(top, 1));
      top = fmaxf(top, shfl_xor(top, 2));
      // Scaled and rounded once, so that weights and lse are relative to the same number.
      const float before = highest[half], now = fmaxf(before, mul_rn(top, scale));
      // A row that has not seen a key yet has no maximum; -inf minus -inf would be NaN.
      const float pivot = now == -__builtin_huge_valf() ? 0 : now;
      const float shrink = exp2_approx(before - pivot);
      highest[half] = now;
      float added = 0;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[n][i] = exp2_approx(fma_rn(scores[n][i], scale, -pivot));
          added += scores[n][i];
        }
      }
      sum[half] = fma_rn(sum[half], shrink, added);
      // Most steps find no higher score.
      if (any(shrink != 1)) {
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          out[n][2 * half] *= shrink;
          out[n][2 * half + 1] *= shrink;
        }
      }
    }
  }
};

}  // namespace voco
