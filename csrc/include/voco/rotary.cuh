// Rotary position embedding in float32: the same bits on a GPU and on the host.
#pragma once

#include "voco/ops.cuh"

namespace voco {

// sin and cos of |angle| up to 2^20, to 1.3e-7. The library functions spill to local memory for large angles.
__device__ inline void sincos_of(float angle, float* sine, float* cosine) {
  // angle = n * pi/2 + r. The float32 of pi/2 ends at 2^-23, so the first product is exact and so is its difference; what
  // it leaves out of pi/2 is taken off in two further steps (Cody and Waite).
  const float n = rintf(angle * 0.636619772367581343f);
  float r = fma_rn(n, -1.57079637050628662109375f, angle);
  r = fma_rn(n, 4.371138828673793e-8f, r);
  r = fma_rn(n, 1.71512451e-15f, r);
  // Minimax polynomials on [-pi/4, pi/4], as in Cephes' sinf and cosf.
  const float z = r * r;
  float s = fma_rn(z, -1.9515295891e-4f, 8.3321608736e-3f);
  s = fma_rn(z, s, -1.6666654611e-1f);
  s = fma_rn(r * z, s, r);
  float c = fma_rn(z, 2.443315711809948e-5f, -1.388731625493765e-3f);
  c = fma_rn(z, c, 4.166664568298827e-2f);
  c = fma_rn(z * z, c, fma_rn(z, -0.5f, 1.0f));
  const int quadrant = static_cast<int>(n) & 3;
  const float odd_sine = quadrant & 1 ? c : s, odd_cosine = quadrant & 1 ? s : c;
  *sine = quadrant & 2 ? -odd_sine : odd_sine;
  *cosine = (quadrant + 1) & 2 ? -odd_cosine : odd_cosine;
}

// Rotates the pair (low, high) of half-split RoPE (RoFormer, arXiv 2104.09864, in the layout of LLaMA).
__device__ inline void rotate(float* low, float* high, float sine, float cosine) {
  const float turned = fma_rn(*low, cosine, -mul_rn(*high, sine));
  *high = fma_rn(*high, cosine, mul_rn(*low, sine));
  *low = turned;
}

}  // namespace voco
