#include "voco/kv_cache.h"

#include <algorithm>
#include <climits>

#include "voco/kv_cache.cuh"

namespace voco {
namespace {

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

// About what fills the largest GPU (132 multiprocessors of 2,048 threads). With less than that, more threads share a token
// and each computes its sines anew; with more, the tokens alone are enough.
constexpr int64_t kEnoughThreads = 1 << 18;

// Rows that neighbouring threads should move together, so that what they touch is long enough for DRAM.
constexpr int kNeighbours = 4;

int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return 4;
    case Dtype::kFloat16: case Dtype::kBFloat16: return 2;
    default: return 1;
  }
}

// The width in bytes of an access to eight columns.
int64_t access_of(Dtype dtype) { return std::min<int64_t>(16, kColumns * size_of(dtype)); }

bool divides(const void* address, int64_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

bool aligned(const CacheStrides& s, Dtype dtype) {
  const int64_t width = access_of(dtype) / size_of(dtype);
  return s.dim == 1 && s.block % width == 0 && s.slot % width == 0 && s.head % width == 0;
}

bool aligned(const RowStrides& s, Dtype dtype) {
  const int64_t width = access_of(dtype) / size_of(dtype);
  return s.dim == 1 && s.layer % width == 0 && s.token % width == 0 && s.head % width == 0;
}

// Whether eight columns of everything can be moved at once.
bool is_aligned(const KvMove& move, Dtype rows, Dtype caches) {
  if (move.half % kColumns != 0 || move.half > kColumns * kThreads) return false;
  if (!aligned(move.k_strides, rows) || !aligned(move.v_strides, rows)) return false;
  if (!aligned(move.k_cache_strides, caches) || !aligned(move.v_cache_strides, caches)) return false;
  if (!divides(move.k, access_of(rows)) || !divides(move.v, access_of(rows))) return false;
  for (int layer = 0; layer < move.layers; ++layer) {
    if (!divides(move.k_cache[layer], access_of(caches)) || !divides(move.v_cache[layer], access_of(caches))) return false;
  }
  return true;
}

static_assert(sizeof(KvMove) + 2 * sizeof(Dtype) <= 4096, "every GPU takes 4 KiB of parameters, and no more");

using Kernel = void (*)(KvMove);

template <typename Cache>
Kernel injection(Dtype rows) {
  switch (rows) {
    case Dtype::kFloat16: return inject_aligned<__half, Cache>;
    case Dtype::kBFloat16: return inject_aligned<__nv_bfloat16, Cache>;
    case Dtype::kFloat32: return inject_aligned<float, Cache>;
    case Dtype::kInt8: return inject_aligned<int8_t, Cache>;
    default: return inject_aligned<__nv_fp8_e4m3, Cache>;
  }
}

Kernel kernel_of(Direction direction, Dtype rows, Dtype caches) {
  const bool inject = direction == Direction::kInject;
  switch (caches) {
    case Dtype::kFloat16: return inject ? injection<__half>(rows) : extract_aligned<__half>;
    case Dtype::kBFloat16: return inject ? injection<__nv_bfloat16>(rows) : extract_aligned<__nv_bfloat16>;
    default: return inject ? injection<float>(rows) : extract_aligned<float>;
  }
}

int launch_aligned(KvMove move, Direction direction, Dtype rows, Dtype caches, void* stream) {
  const int64_t lanes = move.half / kColumns, per_block = kThreads / lanes, per_token = int64_t{move.layers} * move.heads;
  const int64_t wanted = std::max<int64_t>(kNeighbours, kEnoughThreads / (move.tokens * lanes));
  move.splits = static_cast<int>(std::min(wanted, per_token));
  move.step_layers = move.splits / move.heads;
  move.step_heads = move.splits % move.heads;
  const int64_t blocks = (int64_t{move.tokens} * move.splits + per_block - 1) / per_block;
  if (blocks > INT_MAX) return kInvalidValue;
  return launch(kernel_of(direction, rows, caches), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, move);
}

int launch_any(const KvMove& move, Direction direction, Dtype rows, Dtype caches, void* stream) {
  const int64_t threads = int64_t{move.tokens} * move.layers * move.heads * move.half;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks > INT_MAX) return kInvalidValue;
  const auto kernel = direction == Direction::kInject ? move_any<Direction::kInject> : move_any<Direction::kExtract>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, move, rows, caches);
}

}  // namespace

int move_kv(const KvMove& move, Direction direction, Dtype rows, Dtype caches, void* stream) {
  const bool wide_enough = caches == Dtype::kFloat16 || caches == Dtype::kBFloat16 || caches == Dtype::kFloat32;
  if (!wide_enough || (direction == Direction::kExtract && rows != caches)) return kInvalidValue;
  if (move.layers < 0 || move.layers > kMaxLayers || move.tokens < 0) return kInvalidValue;
  if (move.tokens == 0 || move.layers == 0 || move.heads == 0 || move.half == 0) return 0;
  if (direction == Direction::kInject && move.inv_freq == nullptr) return kInvalidValue;
  return is_aligned(move, rows, caches) ? launch_aligned(move, direction, rows, caches, stream)
                                        : launch_any(move, direction, rows, caches, stream);
}

}  // namespace voco
