// What kernels use of a Hopper GPU beyond ops.cuh: one function per feature, PTX for sm_90a and an emulation on a CPU.
//
// For kernels that are compiled for sm_90a alone. The rules, beside those of ops.cuh:
// - A warpgroup is 128 threads of a block, the first of them a multiple of 128. A warpgroup function takes part with all of
//   them, always, with the same arguments apart from registers.
// - Operands of wgmma and boxes of TMA lie in tiles of shared memory that begin at a multiple of 1024: rows of 128 bytes, of
//   which swizzle128() gives the place of each 16.
// - TMA and wgmma see what threads have written to shared memory, cp.async too, only behind fence_async() of the thread that
//   wrote it, and a barrier.
#pragma once

#include "voco/ops.cuh"
#include "voco/tensor_map.h"

namespace voco {

constexpr int kWarpgroupThreads = 128;
constexpr int kSwizzledTile = 1024;  // the alignment of tiles, in bytes

// The place of a byte in a swizzled tile: row r has its chunk c of 16 bytes where chunk c ^ r % 8 would be.
__device__ constexpr uint32_t swizzle128(uint32_t offset) { return offset ^ (offset >> 3 & 0x70); }

// Which dimension of an operand follows in a row of its tile: K, the depth of the product, or M or N.
enum class Major { kK = 0, kMN = 1 };

// Operands of wgmma, 16 of the depth from shared address `start` on. These are the matrix descriptors of PTX; bit 62 stands
// for the swizzle.
// K-major: the tile's rows are those of A or B^T, 64 of the depth in each; the next 16 of the depth begin 32 bytes further.
__device__ constexpr uint64_t k_major_operand(uint32_t start) {
  // Eight rows have 1024 bytes; the other distance is not used.
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (start >> 4 & 0x3fff);
}
// MN-major: a row has 64 of M or N at one place of the depth, and the next 64 lie in another tile, tile_bytes further. The
// next 16 of the depth begin 2048 bytes further.
__device__ constexpr uint64_t mn_major_operand(uint32_t start, uint32_t tile_bytes) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{tile_bytes >> 4 & 0x3fff} << 16 | (start >> 4 & 0x3fff);
}

}  // namespace voco

#ifdef VOCO_HOST
#include "hopper.h"
#else

namespace voco {

// ---- Barriers in shared memory: 8 bytes each, at a multiple of 8 ----

// A phase of the barrier is complete after that many arrivals, when all expected bytes have come; then the next one begins.
// One thread makes all barriers of a block, then calls fence_mbarriers(), before a sync_block().
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_mbarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// What a thread did before its arrival comes before what others do behind their wait.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// And the phase has to wait for bytes that TMA copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the latest phase of that parity; phases count from 0. On a new barrier, parity 1 does not wait.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  uint32_t complete;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(complete)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!complete);
}

// ---- TMA ----

// Starts to copy the box whose first element is given, which may be outside the tensor, to a tile at `to`. When it is there,
// all of the box counts as bytes of the barrier: box_rows * 128. Called by one thread.
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap* map, int column, int head, int token,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];\n" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(token)
      : "memory");
}

// Reads the description ahead of the first tma_load.
__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Lets TMA and wgmma see what this thread has written to shared memory, by stores and by cp.async that it has waited for.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// ---- Named barriers: 1 to 15; the block's own is 0 ----

// Waits until `threads` threads, whole warps, have come to the barrier: by this function or by named_barrier_arrive, which
// does not wait. What they did before comes before what this thread does behind.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- Registers of a warpgroup, for each thread: a multiple of 8 in 24 .. 256. An increase waits until they are free ----

template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "a multiple of 8 in 24 .. 256");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "a multiple of 8 in 24 .. 256");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// ---- wgmma: d[64, N] = a[64, 16] b[16, N] (+ d), by a warpgroup ----

// Nothing that the compiler does with the registers, float or uint32_t in arrays of any rank, moves across this place.
template <class T, int kCount>
__device__ __forceinline__ void pin(T (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_array_v<T>) {
      pin(registers[i]);
    } else if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

// Before the first wgmma of a group: orders it behind what the thread did with registers, the named ones: sums, operands.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
template <class A, int kA>
__device__ __forceinline__ void wgmma_fence(A (&a)[kA]) {
  pin(a);
  wgmma_fence();
}
template <class A, class B, int kA, int kB>
__device__ __forceinline__ void wgmma_fence(A (&a)[kA], B (&b)[kB]) {
  pin(a);
  wgmma_fence(b);
}

// Closes a group: all wgmma since the last one.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until at most kInFlight groups, the newest, are under way: then the others have read shared memory, as far as this
// warp's part of them goes, and their sums may be used, by those who name them here.
template <int kInFlight>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kInFlight) : "memory");
}
template <int kInFlight, class T, int kCount>
__device__ __forceinline__ void wgmma_wait(T (&sums)[kCount]) {
  wgmma_wait<kInFlight>();
  pin(sums);
}

// wgmma<T, kMajorA, kMajorB>(d, a, b, accumulate): both operands in shared memory.
// wgmma<T, kMajorB>(d, a, b, accumulate): a in registers.
// T is __half or __nv_bfloat16, N is 2 kCount for float (&d)[kCount]: 32, 64, 96, 128, 192 or 256. A thread holds, with
// w = thread % 128 / 32, g = lane / 4 and t = lane % 4,
//   a: rows 16 w + g, 16 w + g + 8, and again, at columns 2t, 2t, 2t + 8, 2t + 8, each with the next column;
//   d[4 j ..]: row 16 w + g at columns 8 j + 2t and 8 j + 2t + 1, then row 16 w + g + 8.
// These are the layouts of mma_m16n8k16. Where accumulate is false, d need not be set.

// "%10, %11, ..., %19": nvcc knows operands by their number only.
#define VOCO_TEN(tens)                                                                                                     \
  "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens "6, %" #tens "7, %" #tens "8, %" \
  #tens "9"
#define VOCO_NAMES_16 VOCO_TEN() ", %10, %11, %12, %13, %14, %15"
#define VOCO_NAMES_32 VOCO_TEN() ", " VOCO_TEN(1) ", " VOCO_TEN(2) ", %30, %31"
#define VOCO_NAMES_40 VOCO_TEN() ", " VOCO_TEN(1) ", " VOCO_TEN(2) ", " VOCO_TEN(3)
#define VOCO_NAMES_48 VOCO_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define VOCO_NAMES_60 VOCO_NAMES_40 ", " VOCO_TEN(4) ", " VOCO_TEN(5)
#define VOCO_NAMES_64 VOCO_NAMES_60 ", %60, %61, %62, %63"
#define VOCO_NAMES_90 VOCO_NAMES_60 ", " VOCO_TEN(6) ", " VOCO_TEN(7) ", " VOCO_TEN(8)
#define VOCO_NAMES_96 VOCO_NAMES_90 ", %90, %91, %92, %93, %94, %95"
#define VOCO_NAMES_120 VOCO_NAMES_90 ", " VOCO_TEN(9) ", " VOCO_TEN(10) ", " VOCO_TEN(11)
#define VOCO_NAMES_128 VOCO_NAMES_120 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define VOCO_SUMS_8(i)                                                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define VOCO_SUMS_16(i) VOCO_SUMS_8(i), VOCO_SUMS_8(i + 8)
#define VOCO_SUMS_32(i) VOCO_SUMS_16(i), VOCO_SUMS_16(i + 16)
#define VOCO_SUMS_48(i) VOCO_SUMS_32(i), VOCO_SUMS_16(i + 32)
#define VOCO_SUMS_64(i) VOCO_SUMS_32(i), VOCO_SUMS_32(i + 32)
#define VOCO_SUMS_96(i) VOCO_SUMS_64(i), VOCO_SUMS_32(i + 64)
#define VOCO_SUMS_128(i) VOCO_SUMS_64(i), VOCO_SUMS_64(i + 64)

// The operands behind the sums, n0 and so on, are a and b, then whether to accumulate, then whether they are MN-major. The
// two ones before the latter are the signs of a and b.
#define VOCO_WGMMA_SHARED(type, columns, count, n0, n1, n2, n3, n4)                                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns           \
               "k16.f32." type "." type " {" VOCO_NAMES_##count "}, %" #n0 ", %" #n1 ", p, 1, 1, %" #n3 ", %" #n4    \
               ";\n}\n"                                                                                              \
               : VOCO_SUMS_##count(0)                                                                                \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kMajorA)), "n"(int(kMajorB))                          \
               : "memory")
#define VOCO_WGMMA_REGISTERS(type, columns, count, n0, n1, n2, n3, n4, n5, n6)                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns           \
               "k16.f32." type "." type " {" VOCO_NAMES_##count "}, {%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4 \
               ", p, 1, 1, %" #n6 ";\n}\n"                                                                           \
               : VOCO_SUMS_##count(0)                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kMajorB))         \
               : "memory")

#define VOCO_WGMMA(columns, count, n0, n1, n2, n3, n4, n5, n6)                                                           \
  template <class T, Major kMajorA, Major kMajorB>                                                                       \
  __device__ __forceinline__ void wgmma(float (&d)[count], uint64_t a, uint64_t b, bool accumulate) {                    \
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "T is __half or __nv_bfloat16");        \
    if constexpr (std::is_same_v<T, __half>) {                                                                           \
      VOCO_WGMMA_SHARED("f16", columns, count, n0, n1, n2, n3, n4);                                                      \
    } else {                                                                                                             \
      VOCO_WGMMA_SHARED("bf16", columns, count, n0, n1, n2, n3, n4);                                                     \
    }                                                                                                                    \
  }                                                                                                                      \
  template <class T, Major kMajorB>                                                                                      \
  __device__ __forceinline__ void wgmma(float (&d)[count], const uint32_t (&a)[4], uint64_t b, bool accumulate) {        \
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "T is __half or __nv_bfloat16");        \
    if constexpr (std::is_same_v<T, __half>) {                                                                           \
      VOCO_WGMMA_REGISTERS("f16", columns, count, n0, n1, n2, n3, n4, n5, n6);                                           \
    } else {                                                                                                             \
      VOCO_WGMMA_REGISTERS("bf16", columns, count, n0, n1, n2, n3, n4, n5, n6);                                          \
    }                                                                                                                    \
  }
VOCO_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
VOCO_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
VOCO_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
VOCO_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
VOCO_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
VOCO_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef VOCO_TEN
#undef VOCO_NAMES_16
#undef VOCO_NAMES_32
#undef VOCO_NAMES_40
#undef VOCO_NAMES_48
#undef VOCO_NAMES_60
#undef VOCO_NAMES_64
#undef VOCO_NAMES_90
#undef VOCO_NAMES_96
#undef VOCO_NAMES_120
#undef VOCO_NAMES_128
#undef VOCO_SUMS_8
#undef VOCO_SUMS_16
#undef VOCO_SUMS_32
#undef VOCO_SUMS_48
#undef VOCO_SUMS_64
#undef VOCO_SUMS_96
#undef VOCO_SUMS_128
#undef VOCO_WGMMA_SHARED
#undef VOCO_WGMMA_REGISTERS
#undef VOCO_WGMMA

}  // namespace voco

#endif  // VOCO_HOST
