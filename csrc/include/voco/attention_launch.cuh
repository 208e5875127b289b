// Which instances of the attention kernels there are. Each kernel is launched in a file of its own, so that they compile in
// parallel.
#pragma once

#include "voco/attention.h"
#include "voco/ops.cuh"

namespace voco::attention {

// As cudaErrorInvalidValue and cudaErrorNoKernelImageForDevice.
constexpr int kInvalidValue = 1, kNoKernelImage = 209;

template <class T, int kColumns>
struct Instance {
  using Element = T;
  static constexpr int kHeadDim = kColumns;
};

// launcher(Instance<T, head_dim>{}), or kInvalidValue where there is no such instance.
template <class Launcher>
int with_instance(Dtype dtype, int head_dim, Launcher launcher) {
  const auto with_element = [&](auto element) {
    using T = decltype(element);
    switch (head_dim) {
      case 64: return launcher(Instance<T, 64>{});
      case 96: return launcher(Instance<T, 96>{});
      case 128: return launcher(Instance<T, 128>{});
      case 256: return launcher(Instance<T, 256>{});
      default: return kInvalidValue;
    }
  };
  switch (dtype) {
    case Dtype::kFloat16: return with_element(__half{});
    case Dtype::kBFloat16: return with_element(__nv_bfloat16{});
    default: return kInvalidValue;
  }
}

// The same for the kernels that only Hopper has.
template <class Launcher>
int with_hopper_instance(Dtype dtype, int head_dim, Launcher launcher) {
#if defined(VOCO_HOPPER) || defined(VOCO_HOST)
  return with_instance(dtype, head_dim, [&](auto instance) {
    constexpr int kHeadDim = decltype(instance)::kHeadDim;
    if constexpr (kHeadDim == 64 || kHeadDim == 128) {
      return launcher(instance);
    } else {
      return kInvalidValue;
    }
  });
#else
  return kNoKernelImage;
#endif
}

}  // namespace voco::attention
