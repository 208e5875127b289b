#include "voco/tensor_map.h"

#include <cuda_runtime_api.h>

#ifndef VOCO_HOST
#include <cuda.h>

#include <atomic>
#include <cstring>
#endif

namespace voco {
namespace {

bool valid_size(int64_t size) { return size >= 1 && size <= int64_t{1} << 32; }
bool valid_stride(int64_t elements) { return elements > 0 && elements % 8 == 0 && elements < int64_t{1} << 39; }

bool valid(const TensorLayout& layout, int box_rows) {
  return reinterpret_cast<uintptr_t>(layout.data) % 16 == 0 && valid_size(layout.tokens) && valid_size(layout.heads) &&
         valid_size(layout.columns) && valid_stride(layout.token_stride) && valid_stride(layout.head_stride) &&
         box_rows >= 1 && box_rows <= 256;
}

#ifdef VOCO_HOST

int encode(TensorMap* map, const TensorLayout& layout, int box_rows) {
  *map = {layout, box_rows};
  return cudaSuccess;
}

#else

using Encoder = decltype(&cuTensorMapEncodeTiled);

// Asked of the runtime, so that nothing has to be linked with the driver's library; once it is found, not again.
int find_encoder(Encoder* encoder) {
  static std::atomic<Encoder> known{nullptr};
  if ((*encoder = known)) return cudaSuccess;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t code =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t code = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  // The runtime also remembers an error; left there, it would be blamed on the next kernel launch.
  cudaGetLastError();
  if (code != cudaSuccess) return code;
  if (found != cudaDriverEntryPointSuccess || !function) return cudaErrorInsufficientDriver;
  known = *encoder = reinterpret_cast<Encoder>(function);
  return cudaSuccess;
}

int encode(TensorMap* map, const TensorLayout& layout, int box_rows) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap),
                "a TensorMap must have the size and the alignment of CUDA's own");
  Encoder encoder;
  if (const int code = find_encoder(&encoder)) return code;
  const auto size = [](int64_t number) { return static_cast<cuuint64_t>(number); };
  const cuuint64_t sizes[] = {size(layout.columns), size(layout.heads), size(layout.tokens)};
  const cuuint64_t strides[] = {size(layout.head_stride) * 2, size(layout.token_stride) * 2};  // bytes
  const cuuint32_t box[] = {kBoxColumns, 1, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1, 1};
  CUtensorMap made;
  // The driver's codes are the runtime's for what it may say here: 0, and 1 for an invalid value.
  const CUresult result = encoder(&made, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(layout.data), sizes, strides,
                                  box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) std::memcpy(map, &made, sizeof(made));
  return static_cast<int>(result);
}

#endif

}  // namespace

int make_tensor_map(TensorMap* map, const TensorLayout& layout, int box_rows) {
  return valid(layout, box_rows) ? encode(map, layout, box_rows) : cudaErrorInvalidValue;
}

}  // namespace voco
