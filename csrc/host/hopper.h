// The wrappers of voco/hopper.cuh on a CPU. Tests only.
//
// Copies of TMA and products of wgmma happen as late as they may (lazy), or at once (eager), as set_lazy_copies() says.
#pragma once

#include <type_traits>

#include "scheduler.h"
#include "voco/tensor_map.h"

// A last parameter: where the wrapper is called.
#define VOCO_SITE ::voco::host::Site site = {__builtin_FILE(), __builtin_LINE()}
// The functions of hopper.cpp and wgmma.cpp take the place they return to for the kernel's.
#define VOCO_INLINE inline __attribute__((always_inline))

namespace voco {
namespace host {

// What the threads of a warpgroup agree on.
struct Wgmma {
  bool bf16, accumulate, a_in_registers, a_mn_major, b_mn_major;
  int columns;
  uint64_t a, b;
};

void mbarrier_init(uint32_t barrier, int arrivals, Site site);
void fence_mbarriers();
void mbarrier_arrive(uint32_t barrier, uint32_t bytes, Site site);
void mbarrier_wait(uint32_t barrier, int parity, Site site);
void tma_load(uint32_t to, const TensorMap* map, int column, int head, int token, uint32_t barrier, Site site);
void fence_async();
void named_barrier(int barrier, int threads, bool waits, Site site);
void set_registers(int registers, Site site);
void wgmma_fence(Site site);
// `a` is null unless it is in registers; `sums` are the thread's, columns / 2 of them.
void wgmma(const Wgmma& operation, const uint32_t* a, float* sums, Site site);
void wgmma_commit(Site site);
// The sums that will be used then, or null.
void wgmma_wait(int in_flight, const float* sums, int count, Site site);

template <class T>
constexpr bool is_bf16() {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "T is __half or __nv_bfloat16");
  return std::is_same_v<T, __nv_bfloat16>;
}

constexpr bool is_width(int columns) {
  return columns == 32 || columns == 64 || columns == 96 || columns == 128 || columns == 192 || columns == 256;
}

}  // namespace host

VOCO_INLINE void mbarrier_init(uint32_t barrier, int arrivals, VOCO_SITE) { host::mbarrier_init(barrier, arrivals, site); }
VOCO_INLINE void fence_mbarriers() { host::fence_mbarriers(); }
VOCO_INLINE void mbarrier_arrive(uint32_t barrier, VOCO_SITE) { host::mbarrier_arrive(barrier, 0, site); }
VOCO_INLINE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes, VOCO_SITE) {
  host::mbarrier_arrive(barrier, bytes, site);
}
VOCO_INLINE void mbarrier_wait(uint32_t barrier, int parity, VOCO_SITE) { host::mbarrier_wait(barrier, parity, site); }

VOCO_INLINE void tma_load(uint32_t to, const TensorMap* map, int column, int head, int token, uint32_t barrier, VOCO_SITE) {
  host::tma_load(to, map, column, head, token, barrier, site);
}
inline void tma_prefetch(const TensorMap* map, VOCO_SITE) {
  if (reinterpret_cast<uintptr_t>(map) % alignof(TensorMap)) host::fail("misaligned address of a tensor map", site);
}
VOCO_INLINE void fence_async() { host::fence_async(); }

VOCO_INLINE void named_barrier_sync(int barrier, int threads, VOCO_SITE) {
  host::named_barrier(barrier, threads, true, site);
}
VOCO_INLINE void named_barrier_arrive(int barrier, int threads, VOCO_SITE) {
  host::named_barrier(barrier, threads, false, site);
}

template <int kRegisters>
void increase_registers(VOCO_SITE) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "a multiple of 8 in 24 .. 256");
  host::set_registers(kRegisters, site);
}
template <int kRegisters>
void decrease_registers(VOCO_SITE) {
  increase_registers<kRegisters>(site);
}

inline void wgmma_fence(VOCO_SITE) { host::wgmma_fence(site); }
template <class A, int kA>
void wgmma_fence(A (&)[kA], VOCO_SITE) {
  host::wgmma_fence(site);
}
template <class A, class B, int kA, int kB>
void wgmma_fence(A (&)[kA], B (&)[kB], VOCO_SITE) {
  host::wgmma_fence(site);
}

VOCO_INLINE void wgmma_commit(VOCO_SITE) { host::wgmma_commit(site); }

template <int kInFlight>
VOCO_INLINE void wgmma_wait(VOCO_SITE) {
  host::wgmma_wait(kInFlight, nullptr, 0, site);
}
template <int kInFlight, class T, int kCount>
VOCO_INLINE void wgmma_wait(T (&sums)[kCount], VOCO_SITE) {
  host::wgmma_wait(kInFlight, reinterpret_cast<const float*>(sums), sizeof(sums) / sizeof(float), site);
}

template <class T, Major kMajorA, Major kMajorB, int kCount>
VOCO_INLINE void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate, VOCO_SITE) {
  static_assert(host::is_width(2 * kCount), "no such width");
  const host::Wgmma operation = {host::is_bf16<T>(),     accumulate, false, kMajorA == Major::kMN,
                                 kMajorB == Major::kMN, 2 * kCount, a,     b};
  host::wgmma(operation, nullptr, d, site);
}
template <class T, Major kMajorB, int kCount>
VOCO_INLINE void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate, VOCO_SITE) {
  static_assert(host::is_width(2 * kCount), "no such width");
  const host::Wgmma operation = {host::is_bf16<T>(), accumulate, true, false, kMajorB == Major::kMN, 2 * kCount, 0, b};
  host::wgmma(operation, a, d, site);
}

}  // namespace voco

#undef VOCO_SITE
#undef VOCO_INLINE
