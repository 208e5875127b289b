// Devices, as the CUDA runtime knows them. No function throws; each returns a CUDA error code, 0 for success.
#pragma once

#include <cstddef>

namespace voco {

struct DeviceInfo {
  char name[256];
  int major;  // compute capability
  int minor;
  size_t total_memory;  // bytes
  int sm_count;
  size_t shared_memory_per_block_optin;  // bytes that a kernel may ask for
};

// Versions as CUDA counts them: 13000 is 13.0. Without a driver its version is 0.
int runtime_version(int* version);
int driver_version(int* version);

// A driver without devices is a success with *count == 0; no driver is an error.
int device_count(int* count);
int device_info(int index, DeviceInfo* info);

// Makes `index` the current device of this thread; the one before it is in *previous.
int enter_device(int index, int* previous);

const char* error_name(int code);
const char* error_text(int code);

}  // namespace voco
