#include "voco/attention_launch.cuh"
#include "voco/decode.cuh"

namespace voco::decode {

int run_splits_int8(const Arguments& arguments, Dtype dtype, int head_dim, void* stream) {
  return attention::with_instance(dtype, head_dim, [&](auto instance) {
    using Instance = decltype(instance);
    return launch_splits<typename Instance::Element, int8_t, Instance::kHeadDim>(arguments, stream);
  });
}

}  // namespace voco::decode
