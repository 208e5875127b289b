// The kernels of the K/V path. Everything is bound by memory: each thread owns the same eight columns of both halves of
// a row of keys and of values, so that a rotation stays within a thread, and keeps sines and cosines for its token's rows.
#pragma once

#include "voco/kv_cache.h"
#include "voco/ops.cuh"
#include "voco/rotary.cuh"

namespace voco {

constexpr int kThreads = 128;  // a block
constexpr int kColumns = 8;    // of each half, per thread: 16 bytes of a 16-bit type

// ---- eight columns in registers ----------------------------------------------------------------------------------------

template <typename T>
struct alignas(sizeof(T) * kColumns < 16 ? 8 : 16) Columns {
  T x[kColumns];
};

// Wide accesses, 16 bytes each, or one of 8 for bytes; the address divides by the width.
template <typename T>
__device__ inline Columns<T> load_columns(const T* from) {
  Columns<T> columns;
  if constexpr (sizeof(columns) == 8) {
    const uint2 bits = load8(from);
    memcpy(&columns, &bits, 8);
  } else {
    for (size_t i = 0; i < sizeof(columns) / 16; ++i) {
      const uint4 bits = load16(reinterpret_cast<const char*>(from) + 16 * i);
      memcpy(reinterpret_cast<char*>(&columns) + 16 * i, &bits, 16);
    }
  }
  return columns;
}

template <typename T>
__device__ inline void store_columns(T* to, const Columns<T>& columns) {
  static_assert(sizeof(columns) % 16 == 0, "caches and extracted rows are at least 16 bits wide");
  for (size_t i = 0; i < sizeof(columns) / 16; ++i) {
    uint4 bits;
    memcpy(&bits, reinterpret_cast<const char*>(&columns) + 16 * i, 16);
    store16(reinterpret_cast<char*>(to) + 16 * i, bits);
  }
}

// ---- numbers -----------------------------------------------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(int8_t x) { return static_cast<float>(x); }
__device__ inline float to_float(__nv_fp8_e4m3 x) { return static_cast<float>(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float(float x) { return x; }
template <>
__device__ inline __half from_float(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

// A value as it is, or with its scale where it is quantised; bits are kept where the types agree.
template <typename To, typename From>
__device__ inline To converted(From x, float scale) {
  if constexpr (kSame<To, From>) {
    return x;
  } else {
    return from_float<To>(to_float(x) * scale);
  }
}

__device__ inline float not_a_number() { return nanf(""); }

// ---- who moves what ----------------------------------------------------------------------------------------------------

__device__ inline int64_t integer_at(const void* values, bool wide, int index) {
  return wide ? static_cast<const int64_t*>(values)[index] : static_cast<const int32_t*>(values)[index];
}

// A token and the first of its rows (layer, head) that this thread moves.
struct Work {
  int token, layer, head;
};

__device__ inline bool find_work(const KvMove& move, int lanes, Work* work) {
  const int per_block = kThreads / lanes, item_of_block = threadIdx.x / lanes;
  if (item_of_block >= per_block) return false;
  // Threads of one token are neighbours: what they move lies side by side.
  const int64_t item = static_cast<int64_t>(blockIdx.x) * per_block + item_of_block;
  work->token = static_cast<int>(item / move.splits);
  const int row = static_cast<int>(item % move.splits);
  work->layer = row / move.heads;
  work->head = row % move.heads;
  return work->token < move.tokens;
}

__device__ inline void go_on(const KvMove& move, Work* work) {
  work->head += move.step_heads;
  work->layer += move.step_layers;
  if (work->head >= move.heads) {
    work->head -= move.heads;
    ++work->layer;
  }
}

__device__ inline int64_t offset_of(const RowStrides& strides, const Work& work) {
  return work.layer * strides.layer + work.token * strides.token + work.head * strides.head;
}

// A token's place in the caches; `inside` is false for one that is to be skipped.
struct Slot {
  int64_t block, row;
  bool inside;
};

__device__ inline Slot slot_of(const KvMove& move, int token) {
  const int64_t slot = integer_at(move.slots, move.wide_slots, token);
  if (slot < 0 || slot >= move.num_slots) return {0, 0, false};
  const int64_t block = move.block_size == move.num_slots ? 0 : slot / move.block_size;
  return {block, slot - block * move.block_size, true};
}

__device__ inline int64_t offset_of(const CacheStrides& strides, const Slot& slot, int head) {
  return slot.block * strides.block + slot.row * strides.slot + head * strides.head;
}

// Sine and cosine of one column's angle, times the factor of the keys; extraction turns back.
template <Direction direction>
__device__ inline void angle_of(const KvMove& move, float position, int column, float* sine, float* cosine) {
  sincos_of(position * move.inv_freq[column], sine, cosine);
  *sine *= direction == Direction::kInject ? move.multiplier : -move.multiplier;
  *cosine *= move.multiplier;
}

// ---- aligned rows ------------------------------------------------------------------------------------------------------

// Both halves of eight columns.
template <typename T>
struct Pair {
  Columns<T> low, high;
};

template <typename T>
__device__ inline Pair<T> load_pair(const T* row, int half) {
  return {load_columns(row), load_columns(row + half)};
}

template <typename To, typename From>
__device__ inline Pair<To> rotated(const Pair<From>& in, float scale, const float* sines, const float* cosines) {
  Pair<To> out;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    float low = to_float(in.low.x[i]) * scale, high = to_float(in.high.x[i]) * scale;
    rotate(&low, &high, sines[i], cosines[i]);
    out.low.x[i] = from_float<To>(low);
    out.high.x[i] = from_float<To>(high);
  }
  return out;
}

template <typename To, typename From>
__device__ inline Pair<To> copied(const Pair<From>& in, float scale) {
  Pair<To> out;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    out.low.x[i] = converted<To>(in.low.x[i], scale);
    out.high.x[i] = converted<To>(in.high.x[i], scale);
  }
  return out;
}

template <typename T>
__device__ inline void store_pair(T* row, int half, const Pair<T>& pair) {
  store_columns(row, pair.low);
  store_columns(row + half, pair.high);
}

template <typename T>
__device__ inline Pair<T> not_numbers() {
  Pair<T> pair;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) pair.low.x[i] = pair.high.x[i] = from_float<T>(not_a_number());
  return pair;
}

__device__ inline float scale_of(const float* scales, const RowStrides& strides, const Work& work) {
  return scales == nullptr ? 1.0f : scales[offset_of(strides, work)];
}

// Grid: items of kThreads / (half / 8) a block; an item is a token and one of `splits` shares of its layers * heads rows.
template <typename Row, typename Cache>
__global__ void __launch_bounds__(kThreads) inject_aligned(const __grid_constant__ KvMove move) {
  const int lanes = move.half / kColumns, column = threadIdx.x % lanes * kColumns;
  Work work;
  if (!find_work(move, lanes, &work)) return;
  const Slot slot = slot_of(move, work.token);
  if (!slot.inside) return;
  float sines[kColumns], cosines[kColumns];
  const float position = static_cast<float>(integer_at(move.positions, move.wide_positions, work.token));
#pragma unroll
  for (int i = 0; i < kColumns; ++i) angle_of<Direction::kInject>(move, position, column + i, &sines[i], &cosines[i]);
  for (; work.layer < move.layers; go_on(move, &work)) {
    const Pair<Row> k = load_pair(static_cast<const Row*>(move.k) + offset_of(move.k_strides, work) + column, move.half);
    const Pair<Row> v = load_pair(static_cast<const Row*>(move.v) + offset_of(move.v_strides, work) + column, move.half);
    const float k_scale = scale_of(move.k_scale, move.k_scale_strides, work);
    const float v_scale = scale_of(move.v_scale, move.v_scale_strides, work);
    Cache* k_cache = static_cast<Cache*>(move.k_cache[work.layer]) + offset_of(move.k_cache_strides, slot, work.head);
    Cache* v_cache = static_cast<Cache*>(move.v_cache[work.layer]) + offset_of(move.v_cache_strides, slot, work.head);
    store_pair(k_cache + column, move.half, rotated<Cache>(k, k_scale, sines, cosines));
    store_pair(v_cache + column, move.half, copied<Cache>(v, v_scale));
  }
}

// The same grid.
template <typename T>
__global__ void __launch_bounds__(kThreads) extract_aligned(const __grid_constant__ KvMove move) {
  const int lanes = move.half / kColumns, column = threadIdx.x % lanes * kColumns;
  Work work;
  if (!find_work(move, lanes, &work)) return;
  const Slot slot = slot_of(move, work.token);
  float sines[kColumns], cosines[kColumns];
  if (move.inv_freq != nullptr) {
    const float position = static_cast<float>(integer_at(move.positions, move.wide_positions, work.token));
#pragma unroll
    for (int i = 0; i < kColumns; ++i) angle_of<Direction::kExtract>(move, position, column + i, &sines[i], &cosines[i]);
  }
  for (; work.layer < move.layers; go_on(move, &work)) {
    T* k = static_cast<T*>(move.k) + offset_of(move.k_strides, work) + column;
    T* v = static_cast<T*>(move.v) + offset_of(move.v_strides, work) + column;
    if (!slot.inside) {
      store_pair(k, move.half, not_numbers<T>());
      store_pair(v, move.half, not_numbers<T>());
      continue;
    }
    const T* k_cache = static_cast<const T*>(move.k_cache[work.layer]) + offset_of(move.k_cache_strides, slot, work.head);
    const T* v_cache = static_cast<const T*>(move.v_cache[work.layer]) + offset_of(move.v_cache_strides, slot, work.head);
    const Pair<T> old_k = load_pair(k_cache + column, move.half), old_v = load_pair(v_cache + column, move.half);
    store_pair(k, move.half, move.inv_freq == nullptr ? old_k : rotated<T>(old_k, 1.0f, sines, cosines));
    store_pair(v, move.half, old_v);
  }
}

// ---- any strides and alignment -----------------------------------------------------------------------------------------

__device__ inline float load_any(const void* from, int64_t index, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16: return to_float(static_cast<const __half*>(from)[index]);
    case Dtype::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(from)[index]);
    case Dtype::kFloat32: return static_cast<const float*>(from)[index];
    case Dtype::kInt8: return to_float(static_cast<const int8_t*>(from)[index]);
    case Dtype::kFloat8: return to_float(static_cast<const __nv_fp8_e4m3*>(from)[index]);
  }
  return not_a_number();
}

__device__ inline void store_any(void* to, int64_t index, Dtype dtype, float x) {
  switch (dtype) {
    case Dtype::kFloat16: static_cast<__half*>(to)[index] = from_float<__half>(x); break;
    case Dtype::kBFloat16: static_cast<__nv_bfloat16*>(to)[index] = from_float<__nv_bfloat16>(x); break;
    default: static_cast<float*>(to)[index] = x;
  }
}

// Bits, not numbers: a NaN stays the NaN that it is. Only caches' types are ever copied like this.
__device__ inline void copy_any(void* to, int64_t to_index, const void* from, int64_t from_index, Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    static_cast<uint32_t*>(to)[to_index] = static_cast<const uint32_t*>(from)[from_index];
  } else {
    static_cast<uint16_t*>(to)[to_index] = static_cast<const uint16_t*>(from)[from_index];
  }
}

// One column of both halves of one row of one token.
template <Direction direction>
__global__ void __launch_bounds__(kThreads) move_any(const __grid_constant__ KvMove move, Dtype rows, Dtype caches) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, per_token = move.layers * move.heads;
  const int64_t row = thread / move.half, token = row / per_token;
  if (token >= move.tokens) return;
  const int column = static_cast<int>(thread % move.half), in_token = static_cast<int>(row % per_token);
  const Work work{static_cast<int>(token), in_token / move.heads, in_token % move.heads};
  const Slot slot = slot_of(move, work.token);
  const int64_t k = offset_of(move.k_strides, work) + column * move.k_strides.dim;
  const int64_t v = offset_of(move.v_strides, work) + column * move.v_strides.dim;
  const int64_t k_half = move.half * move.k_strides.dim, v_half = move.half * move.v_strides.dim;
  if (!slot.inside) {
    if (direction == Direction::kInject) return;
    store_any(move.k, k, rows, not_a_number());
    store_any(move.k, k + k_half, rows, not_a_number());
    store_any(move.v, v, rows, not_a_number());
    store_any(move.v, v + v_half, rows, not_a_number());
    return;
  }
  void *k_cache = move.k_cache[work.layer], *v_cache = move.v_cache[work.layer];
  const int64_t k_at = offset_of(move.k_cache_strides, slot, work.head) + column * move.k_cache_strides.dim;
  const int64_t v_at = offset_of(move.v_cache_strides, slot, work.head) + column * move.v_cache_strides.dim;
  const int64_t k_at_half = move.half * move.k_cache_strides.dim, v_at_half = move.half * move.v_cache_strides.dim;
  float sine = 0.0f, cosine = 1.0f;
  if (move.inv_freq != nullptr) {
    const float position = static_cast<float>(integer_at(move.positions, move.wide_positions, work.token));
    angle_of<direction>(move, position, column, &sine, &cosine);
  }
  if constexpr (direction == Direction::kInject) {
    const float scale = scale_of(move.k_scale, move.k_scale_strides, work);
    float low = load_any(move.k, k, rows) * scale, high = load_any(move.k, k + k_half, rows) * scale;
    rotate(&low, &high, sine, cosine);
    store_any(k_cache, k_at, caches, low);
    store_any(k_cache, k_at + k_at_half, caches, high);
    if (rows == caches) {
      copy_any(v_cache, v_at, move.v, v, caches);
      copy_any(v_cache, v_at + v_at_half, move.v, v + v_half, caches);
    } else {
      const float v_scale = scale_of(move.v_scale, move.v_scale_strides, work);
      store_any(v_cache, v_at, caches, load_any(move.v, v, rows) * v_scale);
      store_any(v_cache, v_at + v_at_half, caches, load_any(move.v, v + v_half, rows) * v_scale);
    }
  } else {
    if (move.inv_freq == nullptr) {
      copy_any(move.k, k, k_cache, k_at, rows);
      copy_any(move.k, k + k_half, k_cache, k_at + k_at_half, rows);
    } else {
      float low = load_any(k_cache, k_at, rows), high = load_any(k_cache, k_at + k_at_half, rows);
      rotate(&low, &high, sine, cosine);
      store_any(move.k, k, rows, low);
      store_any(move.k, k + k_half, rows, high);
    }
    copy_any(move.v, v, v_cache, v_at, rows);
    copy_any(move.v, v + v_half, v_cache, v_at + v_at_half, rows);
  }
}

}  // namespace voco
