#include "voco/device.h"

#include <cuda_runtime_api.h>

#include <cstring>

namespace voco {
namespace {

// The runtime also remembers an error; left there, it would be blamed on the next kernel launch.
int forget(cudaError_t code) {
  cudaGetLastError();
  return code;
}

}  // namespace

int runtime_version(int* version) { return forget(cudaRuntimeGetVersion(version)); }

int driver_version(int* version) { return forget(cudaDriverGetVersion(version)); }

int device_count(int* count) {
  *count = 0;
  const cudaError_t code = cudaGetDeviceCount(count);
  return forget(code == cudaErrorNoDevice ? cudaSuccess : code);
}

int device_info(int index, DeviceInfo* info) {
  cudaDeviceProp properties;
  const cudaError_t code = cudaGetDeviceProperties(&properties, index);
  if (code != cudaSuccess) return forget(code);
  static_assert(sizeof(info->name) == sizeof(properties.name), "DeviceInfo::name must hold CUDA's device name");
  std::memcpy(info->name, properties.name, sizeof(info->name));
  info->major = properties.major;
  info->minor = properties.minor;
  info->total_memory = properties.totalGlobalMem;
  info->sm_count = properties.multiProcessorCount;
  info->shared_memory_per_block_optin = properties.sharedMemPerBlockOptin;
  return cudaSuccess;
}

int enter_device(int index, int* previous) {
  const cudaError_t code = cudaGetDevice(previous);
  if (code != cudaSuccess || index == *previous) return forget(code);
  return forget(cudaSetDevice(index));
}

const char* error_name(int code) { return cudaGetErrorName(static_cast<cudaError_t>(code)); }

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace voco
