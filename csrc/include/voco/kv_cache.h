// Moves K/V between the rows of a VocoKV ([layers, tokens, heads, head_dim]) and the caches of a model, all layers in one
// launch. No function throws; each returns a CUDA error code, 0 for success.
#pragma once

#include <cstdint>

#include "voco/dtype.h"

namespace voco {

// Injection writes rows into caches, extraction reads rows out of caches.
enum class Direction : int { kInject, kExtract };

// The addresses of all layers travel as kernel parameters (4 KiB on every GPU), so that no table has to be copied to the
// device and a captured graph holds them itself.
constexpr int kMaxLayers = 128;

// Strides in elements.
struct CacheStrides {
  int64_t block, slot, head, dim;
};
struct RowStrides {
  int64_t layer, token, head, dim;
};

// What a launch moves: the parameter of the kernels.
struct KvMove {
  // Caches: slot s is row s % block_size of block s / block_size.
  void* k_cache[kMaxLayers];
  void* v_cache[kMaxLayers];
  CacheStrides k_cache_strides, v_cache_strides;
  int64_t block_size, num_slots;
  // Rows of the first of these layers.
  void* k;
  void* v;
  RowStrides k_strides, v_strides;
  const float* k_scale;  // null unless the rows are quantised; their strides have no dim
  const float* v_scale;
  RowStrides k_scale_strides, v_scale_strides;
  // Per token: its slot (injection: negative or too large is skipped; extraction: then the row becomes NaN), its position.
  const void* slots;
  const void* positions;
  bool wide_slots, wide_positions;  // int64 rather than int32
  const float* inv_freq;            // [half]; null copies keys as they are
  float multiplier;                 // of the rotated keys: attention_scaling, or one over it when extracting
  int layers, tokens, heads, half;  // half of head_dim
  // Threads that share a token's layers * heads rows; set by move_kv, as are the steps they go on by.
  int splits, step_layers, step_heads;
};

// Launches on `stream` of the current device, without allocating or waiting. `rows` is the dtype of k and v, `cache` that of
// the caches; extraction keeps the dtype. Invalid arguments (too many layers or tokens, no such pair of dtypes) are
// cudaErrorInvalidValue.
int move_kv(const KvMove& move, Direction direction, Dtype rows, Dtype cache, void* stream);

}  // namespace voco
