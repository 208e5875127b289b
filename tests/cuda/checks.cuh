// What the self tests compare with: arrays that kernels can use, numbers, launches and checks. For files that define
// voco::selftest.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "voco/ops.cuh"

namespace voco::selftest {

constexpr int kRight = 0, kWrong = 1, kError = 2;

// An array that kernels and the host can use, with nothing behind its last element.
template <class T>
class Array {
 public:
  explicit Array(size_t size) : size_(size) {
#ifdef VOCO_HOST
    data_ = static_cast<T*>(std::malloc(size * sizeof(T)));
#else
    if (cudaMallocManaged(&data_, size * sizeof(T)) != cudaSuccess) data_ = nullptr;
#endif
    if (!data_) throw std::runtime_error("no memory");
    std::memset(static_cast<void*>(data_), 0xff, size * sizeof(T));
  }
  Array(size_t size, const std::function<T(size_t)>& element) : Array(size) {
    for (size_t i = 0; i < size; ++i) data_[i] = element(i);
  }
  Array(const Array&) = delete;
  ~Array() {
#ifdef VOCO_HOST
    std::free(data_);
#else
    cudaFree(data_);
#endif
  }
  T* data() { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t size_;
};

inline double widen(__half x) { return __half2float(x); }
inline double widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
T narrow(float x);
template <>
inline __half narrow(float x) {
  return __float2half_rn(x);
}
template <>
inline __nv_bfloat16 narrow(float x) {
  return __float2bfloat16_rn(x);
}

// In [-1, 1), the same in every run.
inline float random_number() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / (1 << 23) - 1;
}

inline void expect_success(int code) {
  if (code != 0) throw std::runtime_error("CUDA error " + std::to_string(code));
}

template <class Args>
void start(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared_bytes, const Args& args) {
  expect_success(launch(kernel, grid, block, shared_bytes, nullptr, args));
#ifndef VOCO_HOST
  expect_success(cudaDeviceSynchronize());
#endif
}

inline bool check(const char* what, size_t place, double value, double expected, double error = 0) {
  if (std::abs(value - expected) <= error) return true;
  std::printf("wrong %s at %zu: %.9g, expected %.9g\n", what, place, value, expected);
  return false;
}

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace voco::selftest
