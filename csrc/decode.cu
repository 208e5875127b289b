#include "voco/decode.cuh"

#include "voco/attention_launch.cuh"

namespace voco::decode {

int run_splits(const Arguments& arguments, Dtype dtype, int head_dim, void* stream) {
  return attention::with_instance(dtype, head_dim, [&](auto instance) {
    using Instance = decltype(instance);
    using Element = typename Instance::Element;
    return launch_splits<Element, Element, Instance::kHeadDim>(arguments, stream);
  });
}

int run(const Arguments& arguments, Dtype dtype, Dtype stored, int head_dim, void* stream) {
  if (stored != dtype && stored != Dtype::kInt8 && stored != Dtype::kFloat8) return attention::kInvalidValue;
  if (arguments.requests == 0) return 0;
  const auto run_first = stored == Dtype::kInt8     ? run_splits_int8
                         : stored == Dtype::kFloat8 ? run_splits_float8
                                                    : run_splits;
  if (const int code = run_first(arguments, dtype, head_dim, stream)) return code;
  const auto run_second = dtype == Dtype::kFloat16 ? launch_merge<__half> : launch_merge<__nv_bfloat16>;
  return run_second(arguments, head_dim, stream);
}

int shared_bytes(int head_dim, Dtype stored) {
  int bytes = 0;
  attention::with_instance(Dtype::kFloat16, head_dim, [&](auto instance) {
    constexpr int kHeadDim = decltype(instance)::kHeadDim;
    switch (stored) {
      case Dtype::kFloat16:
      case Dtype::kBFloat16: bytes = kLaunchBytes<__half, __half, kHeadDim>; break;
      case Dtype::kInt8:
      case Dtype::kFloat8: bytes = kLaunchBytes<__half, int8_t, kHeadDim>; break;
      default: break;
    }
    return 0;
  });
  return bytes;
}

}  // namespace voco::decode
