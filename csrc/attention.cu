#include <algorithm>

#include "voco/attention_backward.cuh"
#include "voco/attention_forward.cuh"
#include "voco/attention_launch.cuh"

namespace voco::attention {

int shared_bytes(int head_dim) {
  int most = 0;
  with_instance(Dtype::kFloat16, head_dim, [&](auto instance) {
    constexpr int kHeadDim = decltype(instance)::kHeadDim;
    most = std::max({Forward<kHeadDim>::kSharedBytes, QueryGradient<kHeadDim>::kSharedBytes,
                     KeyGradient<kHeadDim>::kSharedBytes});
    return 0;
  });
  return most;
}

}  // namespace voco::attention
