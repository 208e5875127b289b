#if defined(VOCO_HOPPER) || defined(VOCO_HOST)
#include "voco/attention_hopper.cuh"
#endif
#include "voco/attention_launch.cuh"

namespace voco::attention {

int run_hopper_forward(const Arguments& args, Dtype dtype, int head_dim, int blocks, void* stream) {
#if defined(VOCO_HOPPER) || defined(VOCO_HOST)
  return with_instance(dtype, head_dim, [&](auto instance) {
    using Instance = decltype(instance);
    if constexpr (Instance::kHeadDim == 64 || Instance::kHeadDim == 128) {
      return launch_hopper_forward<typename Instance::Element, Instance::kHeadDim>(args, blocks, stream);
    } else {
      return kInvalidValue;
    }
  });
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice
  return kNoKernelImage;
#endif
}

}  // namespace voco::attention
