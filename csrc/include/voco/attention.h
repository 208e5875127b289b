// Attention under the VoCo mask, forward and backward, for 16-bit numbers. No function throws; each returns a CUDA error
// code, 0 for success.
//
// Tiles come from voco_kernels/tiles.py, which says what their columns are: a row tile is a set of rows that share two
// ranges of keys, a key tile a set of keys and the three ranges of rows that see them.
#pragma once

#include <cstdint>

#include "voco/dtype.h"

namespace voco::attention {

// What the kernels are made for. Rows are 16 at a time in a tensor core, and so are keys in the backward.
constexpr int kTileRows = 64, kTileKeys = 64, kHopperTile = 128;

// [N, H, D], strides in elements; columns are neighbours, and rows begin at multiples of 16 bytes.
struct Rows {
  void* data;
  int64_t token, head;
};

struct Plan {
  const int* tiles;  // [num_tiles, 8] row tiles, or [num_tiles, 10] key tiles; what follows the last one has no members
  const int* row_index;
  const int* key_index;
  const int* reader_index;
  const int* late_index;
  const int* after;
  int num_tiles;
};

// One launch's parameter; a kernel reads or writes what it needs of it. Gradients have the dtype of what they belong to.
struct Arguments {
  Rows q, k, v, out;
  Rows grad_out, dq, dk, dv;
  float* lse;    // [heads, N], natural logarithm: the forward writes it, the backward reads it
  float* delta;  // [heads, N], sum(out * grad_out): the gradient of q writes it, that of k and v reads it
  Plan plan;
  int num_tokens, heads, group;  // query heads; query heads that share a head of keys
  float scale, scale_log2;       // of scores; times log2(e)
};

// Each launches `blocks` blocks on `stream` of the current device, which take every blocks-th pair of a tile and a head; any
// number from 1 on is right. `dtype` is kFloat16 or kBFloat16, `head_dim` 64, 96, 128 or 256; else cudaErrorInvalidValue.

// Over row tiles: out and lse.
int run_forward(const Arguments& arguments, Dtype dtype, int head_dim, int blocks, void* stream);
// Over row tiles: dq and delta.
int run_query_gradient(const Arguments& arguments, Dtype dtype, int head_dim, int blocks, void* stream);
// Over key tiles and heads of keys: dk and dv. Reads delta.
int run_key_gradient(const Arguments& arguments, Dtype dtype, int head_dim, int blocks, void* stream);

// The same on GPUs of compute capability 9.0, over tiles of up to kHopperTile rows or keys. `head_dim` is 64 or 128; where the
// module was not compiled for sm_90a, cudaErrorNoKernelImageForDevice.
int run_hopper_forward(const Arguments& arguments, Dtype dtype, int head_dim, int blocks, void* stream);
int run_hopper_query_gradient(const Arguments& arguments, Dtype dtype, int head_dim, int blocks, void* stream);
int run_hopper_key_gradient(const Arguments& arguments, Dtype dtype, int head_dim, int blocks, void* stream);

// The most bytes of shared memory that a block of these kernels takes; 0 for a head_dim that there is none for.
int shared_bytes(int head_dim);

}  // namespace voco::attention
