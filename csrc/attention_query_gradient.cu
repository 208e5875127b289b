#include "voco/attention_backward.cuh"
#include "voco/attention_launch.cuh"

namespace voco::attention {

int run_query_gradient(const Arguments& arguments, Dtype dtype, int head_dim, int blocks, void* stream) {
  return with_instance(dtype, head_dim, [&](auto instance) {
    using Instance = decltype(instance);
    using Shape = QueryGradient<Instance::kHeadDim>;
    return launch(query_gradient_kernel<typename Instance::Element, Instance::kHeadDim>, dim3(blocks), dim3(Shape::kThreads),
                  Shape::kSharedBytes, stream, arguments);
  });
}

}  // namespace voco::attention
