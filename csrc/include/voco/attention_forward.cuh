// Forward: softmax(q k^T) v over the two ranges of keys of a row tile, with an online softmax (FlashAttention-2, arXiv
// 2307.08691).
//
// A block of few warps has a tile of 64 rows and goes through its keys 32 at a time; copies of the next steps are under way
// meanwhile. A warp has 32 rows at head_dim up to 128: each key that it reads from shared memory then serves two products,
// without which the reads would take longer than the products. Warps decide for themselves, by their own rows, which steps
// need a mask and which they have nothing to do in, so that a ragged tile costs what its rows cost.
#pragma once

#include "voco/attention_steps.cuh"
#include "voco/online_softmax.cuh"

namespace voco::attention {

template <int kHeadDim>
struct Forward {
  // Tiles of 16 rows of a warp; at 256 the accumulator of one fills half of the registers.
  static constexpr int kTiles = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kWarps = kTileRows / (16 * kTiles), kThreads = 32 * kWarps, kStages = kHeadDim <= 96 ? 3 : 2;
  // From 128 on the accumulators leave no registers for the queries.
  static constexpr bool kQueriesInRegisters = kHeadDim < 128;
  static constexpr int kQueryBytes = kQueriesInRegisters ? 0 : kTileRows * kHeadDim * 2;

  template <class T>
  using Pipeline = KeyPipeline<T, kHeadDim, kWarps, kStages>;
  static constexpr int kSharedBytes = kQueryBytes + Pipeline<__half>::kSharedBytes;
};

// A warp's rows while it goes through the keys.
template <class T, int kHeadDim>
struct RowState {
  using Shape = Forward<kHeadDim>;
  static constexpr int kTiles = Shape::kTiles, kDepth = kHeadDim / 16;

  SoftmaxRows<kHeadDim> softmax[kTiles];
  const int* rows;  // of the warp, in shared memory
  float scale;      // of scores, with log2(e)
  Operand<kHeadDim, Shape::kQueriesInRegisters> queries[kTiles];

  // Takes a step's keys in; kUsed of the warp's tiles have rows.
  template <int kUsed>
  __device__ void attend(uint32_t keys, uint32_t values, const int* tokens) {
    float scores[kUsed][4][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      uint32_t a[kUsed][4], b[2][4];
#pragma unroll
      for (int m = 0; m < kUsed; ++m) queries[m].fragment(a[m], k);
#pragma unroll
      for (int n = 0; n < 2; ++n) load_b_transposed<kHeadDim>(b[n], keys, 16 * n, k);
#pragma unroll
      for (int m = 0; m < kUsed; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) mma_m16n8k16<T>(scores[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
    if (tokens[kKeyStep - 1] > rows[0]) hide<kUsed>(scores, tokens);
#pragma unroll
    for (int m = 0; m < kUsed; ++m) softmax[m].weigh(scores[m], scale);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t a[kUsed][4];
#pragma unroll
      for (int m = 0; m < kUsed; ++m) as_operand<T>(a[m], scores[m][2 * k], scores[m][2 * k + 1]);
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t b[4];
        load_b<kHeadDim>(b, values, 16 * k, n);
#pragma unroll
        for (int m = 0; m < kUsed; ++m) {
          mma_m16n8k16<T>(softmax[m].out[2 * n], a[m], b[0], b[1]);
          mma_m16n8k16<T>(softmax[m].out[2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

 private:
  // A row does not see the keys behind it.
  template <int kUsed>
  __device__ void hide(float (&scores)[kUsed][4][4], const int* tokens) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = tokens[8 * n + lane_id() % 4 * 2 + i];
#pragma unroll
        for (int m = 0; m < kUsed; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (key > rows[16 * m + 8 * half + lane_id() / 4]) scores[m][n][2 * half + i] = -kInfinity;
          }
        }
      }
    }
  }
};

template <class T, int kHeadDim>
__device__ void forward_tile(const Arguments& args, const int* columns, int head) {
  using Shape = Forward<kHeadDim>;
  constexpr int kTiles = Shape::kTiles;
  char* shared = shared_memory<char>();
  const uint32_t query_tile = smem_address(shared);
  const typename Shape::template Pipeline<T> pipeline(args, head / args.group, shared + Shape::kQueryBytes);
  const TileRows rows(args.plan, columns);
  const int warp = warp_id(), lane = lane_id();

  pipeline.open(rows, columns);
  if constexpr (!Shape::kQueriesInRegisters) {
    copy_rows<T, kHeadDim, kTileRows, Shape::kThreads>(query_tile, args.q, head, pipeline.rows);
  }
  pipeline.start();

  RowState<T, kHeadDim> state;
  for (auto& part : state.softmax) part.clear();
  state.scale = args.scale_log2;
  const int first = 16 * kTiles * warp, used = (rows.count - first + 15) / 16;
  state.rows = pipeline.rows + first;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    if constexpr (Shape::kQueriesInRegisters) {
      const int* of_lane = state.rows + 16 * m + lane / 4;
      state.queries[m].load(row_of<T>(args.q, of_lane[0], head), row_of<T>(args.q, of_lane[8], head));
    } else {
      state.queries[m] = {query_tile, first + 16 * m};
    }
  }

  for (int step = 0; step < pipeline.steps.size(); ++step) {
    const int upcoming = pipeline.arrive(step);
    const int* tokens = pipeline.of_step(step);
    if (used > 0 && tokens[0] <= state.rows[16 * kTiles - 1]) {
      if (kTiles == 2 && used > 1) {
        state.template attend<kTiles>(pipeline.keys(step), pipeline.values(step), tokens);
      } else {
        state.template attend<1>(pipeline.keys(step), pipeline.values(step), tokens);
      }
    }
    pipeline.keep(step, upcoming);
  }

#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = first + 16 * m + 8 * half + lane / 4, row = state.rows[16 * m + 8 * half + lane / 4];
      float sum = state.softmax[m].sum[half];
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      // A row that sees nothing has a sum of 0: its output is 0 and its lse log(0) = -inf.
      const float factor = sum == 0 ? 0 : 1 / sum;
      store_sums<T, kHeadDim>(row_of<T>(args.out, row, head), state.softmax[m].out, half, factor, place < rows.count);
      if (lane % 4 == 0 && place < rows.count) {
        const float highest = state.softmax[m].highest[half];
        args.lse[int64_t{head} * args.num_tokens + row] = sum == 0 ? -kInfinity : (highest + log2f(sum)) * kLn2;
      }
    }
  }
}

// q, out [N, heads, D]; k, v [N, heads / group, D]; lse [heads, N]. A block takes every gridDim.x-th pair of a tile and a
// head; all heads of a tile are neighbours, since they read the same rows of memory, and with groups the same keys.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(Forward<kHeadDim>::kThreads) forward_kernel(const __grid_constant__ Arguments args) {
  for_each_pair<8>(args.plan, args.heads,
                   [&](const int* columns, int head) { forward_tile<T, kHeadDim>(args, columns, head); });
}

template <class T, int kHeadDim>
int launch_forward(const Arguments& args, int blocks, void* stream) {
  using Shape = Forward<kHeadDim>;
  return launch(forward_kernel<T, kHeadDim>, dim3(blocks), dim3(Shape::kThreads), Shape::kSharedBytes, stream, args);
}

}  // namespace voco::attention
