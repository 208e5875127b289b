// The wrappers of voco/ops.cuh on a CPU, and what else of CUDA a kernel's source needs. Tests only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "scheduler.h"

// CUDA's own headers are behind us: they would not survive these names.
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __grid_constant__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (::voco::host::thread_index)
#define blockIdx (::voco::host::block_index)
#define blockDim (::voco::host::block_size)
#define gridDim (::voco::host::grid_size)
#define __syncthreads() ::voco::sync_block()
#define __syncwarp() ::voco::sync_warp()

// The tag is one per declaration and instantiation, as a __shared__ array is.
#define VOCO_SHARED(T, name, count)      \
  static const char name##_tag = 0;      \
  auto& name = *static_cast<T(*)[count]>( \
      ::voco::host::static_shared(&name##_tag, sizeof(T) * (count), alignof(T) < 16 ? 16 : alignof(T)))

// A last parameter: where the wrapper is called.
#define VOCO_SITE ::voco::host::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace voco {
namespace host {

// In pieces of four bytes, which every sanitizer sees and no compiler merges.
inline void copy_words(void* to, const void* from, int words) {
  for (int i = 0; i < words; ++i) {
    static_cast<volatile uint32_t*>(to)[i] = static_cast<const volatile uint32_t*>(from)[i];
  }
}

inline void check_alignment(const void* pointer, int bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("misaligned address of a vector access", site);
}

inline void perform(Copy copy) {
  static constexpr uint32_t zeros[4] = {};
  copy_words(copy.to, copy.from ? copy.from : zeros, 4);
}

template <class T>
uint32_t to_word(T value) {
  static_assert(sizeof(T) == 4, "shuffles move values of four bytes");
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}

template <class T>
T from_word(uint32_t word) {
  T value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline float to_float(__half x) { return __half2float(x); }
inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
void widen(uint32_t word, float* values) {
  T pair[2];
  std::memcpy(pair, &word, 4);
  values[0] = to_float(pair[0]);
  values[1] = to_float(pair[1]);
}

template <bool kTransposed>
void load_matrices(uint32_t (&registers)[4], uint32_t address, Site site) {
  uint32_t row[kExchangeWords] = {};
  copy_words(row, shared_16_bytes("ldmatrix", address, site), 4);
  const auto rows = exchange("ldmatrix", row, site);
  const int major = lane() / 4, minor = lane() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto matrix_rows = rows + 8 * matrix;
    if (kTransposed) {
      const auto element = [&](int i) { return matrix_rows[i][major / 2] >> 16 * (major % 2) & 0xffffu; };
      registers[matrix] = element(2 * minor) | element(2 * minor + 1) << 16;
    } else {
      registers[matrix] = matrix_rows[major][minor];
    }
  }
}

}  // namespace host

template <class T>
T* shared_memory() {
  return static_cast<T*>(host::dynamic_shared());
}

inline uint32_t smem_address(const void* pointer, VOCO_SITE) { return host::shared_address(pointer, site); }

inline void sync_block(VOCO_SITE) { host::sync_block(site); }
inline void sync_warp(VOCO_SITE) { host::sync_warp(site); }

inline uint4 load16(const void* from, VOCO_SITE) {
  host::check_alignment(from, 16, site);
  if (host::is_shared(from)) from = host::shared_16_bytes("load16", host::shared_address(from, site), site);
  uint4 value;
  host::copy_words(&value, from, 4);
  return value;
}

inline void store16(void* to, uint4 value, VOCO_SITE) {
  host::check_alignment(to, 16, site);
  if (host::is_shared(to)) to = host::shared_16_bytes("store16", host::shared_address(to, site), site);
  host::copy_words(to, &value, 4);
}

inline uint2 load8(const void* from, VOCO_SITE) {
  host::check_alignment(from, 8, site);
  uint2 value;
  host::copy_words(&value, from, 2);
  return value;
}

inline void store8(void* to, uint2 value, VOCO_SITE) {
  host::check_alignment(to, 8, site);
  host::copy_words(to, &value, 2);
}

// CUDA's own, which nvcc knows without a header.
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
// The host build never contracts a product and a sum.
inline float mul_rn(float a, float b) { return a * b; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return chosen;
}

template <class T>
T shfl(T value, int source, VOCO_SITE) {
  return host::from_word<T>(host::exchange("shfl", {host::to_word(value)}, site)[source & 31][0]);
}

template <class T>
T shfl_xor(T value, int mask, VOCO_SITE) {
  const int source = (host::lane() ^ mask) & 31;
  return host::from_word<T>(host::exchange("shfl_xor", {host::to_word(value)}, site)[source][0]);
}

inline uint32_t ballot(bool predicate, VOCO_SITE) {
  const auto votes = host::exchange("ballot", {predicate}, site);
  uint32_t bits = 0;
  for (int lane = 0; lane < host::kWarpSize; ++lane) bits |= votes[lane][0] << lane;
  return bits;
}

inline bool any(bool predicate, VOCO_SITE) { return ballot(predicate, site) != 0; }

inline void cp_async16(uint32_t to, const void* from, bool valid, VOCO_SITE) {
  host::check_alignment(from, 16, site);
  const host::Copy copy = {host::shared_16_bytes("cp.async", to, site), valid ? from : nullptr};
  if (host::lazy_copies()) {
    host::queue_copy(copy);
  } else {
    host::perform(copy);
  }
}

inline void cp_async_commit() { host::commit_copies(); }

template <int kInFlight>
void cp_async_wait() {
  host::Copy copy;
  while (host::take_copy(kInFlight, &copy)) host::perform(copy);
}

inline void ldmatrix_x4(uint32_t (&registers)[4], uint32_t address, VOCO_SITE) {
  host::load_matrices<false>(registers, address, site);
}

inline void ldmatrix_x4_trans(uint32_t (&registers)[4], uint32_t address, VOCO_SITE) {
  host::load_matrices<true>(registers, address, site);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, VOCO_SITE) {
  float wide_a[8], wide_b[4];
  for (int i = 0; i < 4; ++i) host::widen<T>(a[i], wide_a + 2 * i);
  host::widen<T>(b0, wide_b);
  host::widen<T>(b1, wide_b + 2);
  host::multiply(c, wide_a, wide_b, site);
}

inline int atomic_add(int* to, int value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }

inline float atomic_add(float* to, float value) {
  uint32_t* word = reinterpret_cast<uint32_t*>(to);
  uint32_t old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, host::to_word(host::from_word<float>(old) + value), true,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return host::from_word<float>(old);
}

// Runs the kernel to its end. Throws std::runtime_error (see host::run); the return value is always 0.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*, Arguments&&... arguments) {
  const auto thread = [&] {
    kernel(arguments...);
    // Copies that no one waited for still happen some time before the block ends.
    host::Copy copy;
    while (host::take_any_copy(&copy)) host::perform(copy);
  };
  const auto body = [](const void* pointer) { (*static_cast<const decltype(thread)*>(pointer))(); };
  host::run(grid, block, shared_bytes, body, &thread);
  return 0;
}

}  // namespace voco

#undef VOCO_SITE
