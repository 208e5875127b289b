// The Python module voco_kernels._cuda: the only file that knows Python.
#include <pybind11/pybind11.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "voco/device.h"

namespace py = pybind11;

namespace {

void check(int code, const char* what) {
  if (code == 0) return;
  std::ostringstream message;
  message << what << ": " << voco::error_text(code) << " (" << voco::error_name(code) << ", code " << code << ")";
  throw std::runtime_error(message.str());
}

int runtime_version() {
  int version = 0;
  check(voco::runtime_version(&version), "CUDA runtime version");
  return version;
}

int driver_version() {
  int version = 0;
  check(voco::driver_version(&version), "CUDA driver version");
  return version;
}

py::list compiled_archs() {
  py::list archs;
  std::istringstream names(VOCO_ARCHS);
  for (std::string name; std::getline(names, name, ',');) archs.append(name);
  return archs;
}

py::list device_query() {
  int count = 0;
  check(voco::device_count(&count), "CUDA device query");
  py::list devices;
  for (int index = 0; index < count; ++index) {
    voco::DeviceInfo info;
    check(voco::device_info(index, &info), "CUDA device query");
    py::dict device;
    device["name"] = info.name;
    device["compute_capability"] = py::make_tuple(info.major, info.minor);
    device["total_memory"] = info.total_memory;
    device["sm_count"] = info.sm_count;
    device["shared_memory_per_block_optin"] = info.shared_memory_per_block_optin;
    devices.append(device);
  }
  return devices;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA part of voco_kernels. It loads on a machine without a driver.";
  m.def("version", [] { return VOCO_VERSION; }, "Version of the package that this module was built for.");
  m.def("cuda_runtime_version", &runtime_version, "Version of the CUDA runtime in this module: 13000 is 13.0.");
  m.def("driver_version", &driver_version, "Newest CUDA version that the installed driver serves; 0 without a driver.");
  m.def("compiled_archs", &compiled_archs, "What the kernels were compiled for, such as ['sm_80', 'compute_80', 'sm_90a'].");
  m.def("device_query", &device_query,
        "One dict a device: name, compute_capability, total_memory (bytes), sm_count, shared_memory_per_block_optin (bytes). "
        "RuntimeError with CUDA's own words where the runtime fails, as it does without a driver.");
}
