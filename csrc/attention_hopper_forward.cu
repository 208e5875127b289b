#include "voco/attention_hopper_forward.cuh"
#include "voco/attention_launch.cuh"

namespace voco::attention {

int run_hopper_forward(const Arguments& args, Dtype dtype, int head_dim, int blocks, void* stream) {
  return with_hopper_instance(dtype, head_dim, [&](auto instance) {
    using Instance = decltype(instance);
    return launch_hopper_forward<typename Instance::Element, Instance::kHeadDim>(args, blocks, stream);
  });
}

}  // namespace voco::attention
