// What kernels use of the hardware: one function per feature, PTX on a GPU and an emulation on a CPU.
//
// A kernel's source includes only this file. nvcc compiles it for sm_80 and later; with VOCO_HOST a C++ compiler takes
// the same names from csrc/host/emulation.h, so that tests run the kernel without a GPU, under sanitizers. The rules:
// - Kernels live in namespace voco: outside it, CUDA has functions of the same names.
// - A warp function takes part with all 32 lanes, always: a block that calls one has a multiple of 32 threads.
// - All threads of a block reach the same barrier; none returns before it.
// - Shared memory is 227 KiB at most, and an address of it is a byte offset as smem_address() gives it.
// - load16, store16, cp_async16 and ldmatrix need addresses that are multiples of 16, load8 and store8 of 8.
#pragma once

#ifdef VOCO_HOST
#include "emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

// A static array of the block: VOCO_SHARED(float, row, 128);
#define VOCO_SHARED(T, name, count) __shared__ __align__(alignof(T) < 16 ? 16 : alignof(T)) T name[count]

namespace voco {

constexpr unsigned kFullWarp = 0xffffffffu;

// The dynamic shared memory of the block, whose size the launch gives; aligned to 128 bytes.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char voco_shared_memory[];
  return reinterpret_cast<T*>(voco_shared_memory);
}

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// One access of 16 or 8 bytes, to global or shared memory.
__device__ __forceinline__ uint4 load16(const void* from) { return *static_cast<const uint4*>(from); }
__device__ __forceinline__ void store16(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }
__device__ __forceinline__ uint2 load8(const void* from) { return *static_cast<const uint2*>(from); }
__device__ __forceinline__ void store8(void* to, uint2 value) { *static_cast<uint2*>(to) = value; }

// a * b + c rounded once, and a * b rounded before anything is added to it; nvcc would fuse a plain product and sum.
__device__ __forceinline__ float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
// 2^x to 2 units in the last place; exact at 0 and -inf, and 0 where the result would be denormal.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Four bytes of x (0 to 3) and y (4 to 7): digit i of the selector, in hexadecimal, says which becomes byte i.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
  return __byte_perm(x, y, selector);
}

// The value of another lane; T has four bytes.
template <class T>
__device__ __forceinline__ T shfl(T value, int source) {
  static_assert(sizeof(T) == 4, "shuffles move values of four bytes");
  return __shfl_sync(kFullWarp, value, source);
}

template <class T>
__device__ __forceinline__ T shfl_xor(T value, int mask) {
  static_assert(sizeof(T) == 4, "shuffles move values of four bytes");
  return __shfl_xor_sync(kFullWarp, value, mask);
}

__device__ __forceinline__ uint32_t ballot(bool predicate) { return __ballot_sync(kFullWarp, predicate); }
__device__ __forceinline__ bool any(bool predicate) { return __any_sync(kFullWarp, predicate); }

// Starts a copy of 16 bytes from global to shared memory; zeros, and no access to `from`, where not valid. It is done, for
// this thread, after cp_async_wait() of the group that the next cp_async_commit() closes.
__device__ __forceinline__ void cp_async16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kInFlight of this thread's groups, the newest, are under way.
template <int kInFlight>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kInFlight) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, and receives in register m
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix m; the _trans form, of its column l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8], T is __half or __nv_bfloat16. With g = lane / 4 and t = lane % 4 a lane holds
//   a: rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8, each with the next column: ldmatrix_x4 of the four
//      8x8 quarters, the upper left first, the lower left next;
//   b0, b1: rows 2t and 2t + 8, each with the next row, of column g;
//   c: row g at columns 2t and 2t + 1, then row g + 8.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "T is __half or __nv_bfloat16");
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Returns the old value; orders nothing.
__device__ __forceinline__ int atomic_add(int* to, int value) { return atomicAdd(to, value); }
__device__ __forceinline__ float atomic_add(float* to, float value) { return atomicAdd(to, value); }

// Starts the kernel on the stream (a cudaStream_t) and returns the cudaError_t of the launch as an int. On a CPU it runs the
// kernel to its end, and throws std::runtime_error where a launch or a rule is broken.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments&&... arguments) {
  // More than 48 KiB must be asked for.
  if (shared_bytes > 48 * 1024) {
    const int code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes));
    if (code != cudaSuccess) {
      // The runtime also remembers an error; left there, it would be blamed on the next launch.
      cudaGetLastError();
      return code;
    }
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace voco

#endif  // VOCO_HOST
