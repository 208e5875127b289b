// The Python module voco_kernels._cuda: the only file that knows Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "voco/attention.h"
#include "voco/decode.h"
#include "voco/device.h"
#include "voco/kv_cache.h"

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

// Kernels run on the device of their tensors; -1 is the host, on which tests emulate them.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) : index_(index), previous_(index) {
    if (index_ >= 0) check(voco::enter_device(index_, &previous_), "CUDA device");
  }
  ~DeviceGuard() {
    int entered = 0;
    if (previous_ != index_) voco::enter_device(previous_, &entered);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int index_, previous_;
};

using Address = uint64_t;
using Strides = std::array<int64_t, 4>;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }
const float* floats(Address address) { return reinterpret_cast<const float*>(address); }

voco::CacheStrides cache_strides(const Strides& s) { return {s[0], s[1], s[2], s[3]}; }
voco::RowStrides row_strides(const Strides& s) { return {s[0], s[1], s[2], s[3]}; }

// The launch of one group of layers: everything that stays the same from call to call.
class KvMover {
 public:
  KvMover(bool inject, int device, int first_layer, const std::vector<Address>& k_caches,
          const std::vector<Address>& v_caches, int cache_dtype, const Strides& k_cache_strides,
          const Strides& v_cache_strides, int64_t block_size, int64_t num_slots, Address slots, bool wide_slots,
          Address positions, bool wide_positions, Address inv_freq, float multiplier, int tokens, int heads, int half)
      : direction_(inject ? voco::Direction::kInject : voco::Direction::kExtract),
        device_(device),
        first_layer_(first_layer),
        cache_(static_cast<voco::Dtype>(cache_dtype)),
        rows_(cache_) {
    if (k_caches.size() != v_caches.size() || k_caches.size() > voco::kMaxLayers) {
      throw std::invalid_argument("too many layers for one launch");
    }
    move_.layers = static_cast<int>(k_caches.size());
    for (int layer = 0; layer < move_.layers; ++layer) {
      move_.k_cache[layer] = pointer(k_caches[layer]);
      move_.v_cache[layer] = pointer(v_caches[layer]);
    }
    move_.k_cache_strides = cache_strides(k_cache_strides);
    move_.v_cache_strides = cache_strides(v_cache_strides);
    move_.block_size = block_size;
    move_.num_slots = num_slots;
    move_.slots = pointer(slots);
    move_.wide_slots = wide_slots;
    move_.positions = pointer(positions);
    move_.wide_positions = wide_positions;
    move_.inv_freq = floats(inv_freq);
    move_.multiplier = multiplier;
    move_.tokens = tokens;
    move_.heads = heads;
    move_.half = half;
  }

  void set_rows(int dtype, int64_t bytes, const Strides& k, const Strides& v, const Strides& k_scale,
                const Strides& v_scale) {
    rows_ = static_cast<voco::Dtype>(dtype);
    move_.k_strides = row_strides(k);
    move_.v_strides = row_strides(v);
    move_.k_scale_strides = row_strides(k_scale);
    move_.v_scale_strides = row_strides(v_scale);
    k_begin_ = first_layer_ * k[0] * bytes;
    v_begin_ = first_layer_ * v[0] * bytes;
    k_scale_begin_ = first_layer_ * k_scale[0] * sizeof(float);
    v_scale_begin_ = first_layer_ * v_scale[0] * sizeof(float);
  }

  void launch(Address k, Address v, Address k_scale, Address v_scale, Address stream) {
    move_.k = pointer(k + k_begin_);
    move_.v = pointer(v + v_begin_);
    move_.k_scale = k_scale == 0 ? nullptr : floats(k_scale + k_scale_begin_);
    move_.v_scale = v_scale == 0 ? nullptr : floats(v_scale + v_scale_begin_);
    const DeviceGuard guard(device_);
    check(voco::move_kv(move_, direction_, rows_, cache_, pointer(stream)), "K/V kernel");
  }

 private:
  voco::KvMove move_{};
  voco::Direction direction_;
  int device_;
  int64_t first_layer_;
  voco::Dtype cache_, rows_;
  int64_t k_begin_ = 0, v_begin_ = 0, k_scale_begin_ = 0, v_scale_begin_ = 0;  // bytes
};

// One attention kernel: everything that a launch needs, as numbers.
using RowsArgument = std::tuple<Address, int64_t, int64_t>;

voco::attention::Rows rows_argument(const RowsArgument& rows) {
  return {pointer(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows)};
}

const int* ints(Address address) { return reinterpret_cast<const int*>(address); }
float* writable_floats(Address address) { return reinterpret_cast<float*>(address); }

void attention(const std::string& kernel, int device, Address stream, int dtype, int head_dim, int blocks,
               const std::array<RowsArgument, 8>& rows, Address lse, Address delta, const std::array<Address, 6>& plan,
               int num_tiles, int num_tokens, int heads, int group, float scale) {
  voco::attention::Arguments a{};
  voco::attention::Rows* members[] = {&a.q, &a.k, &a.v, &a.out, &a.grad_out, &a.dq, &a.dk, &a.dv};
  for (size_t i = 0; i < rows.size(); ++i) *members[i] = rows_argument(rows[i]);
  a.lse = writable_floats(lse);
  a.delta = writable_floats(delta);
  a.plan = {ints(plan[0]), ints(plan[1]), ints(plan[2]), ints(plan[3]), ints(plan[4]), ints(plan[5]), num_tiles};
  a.num_tokens = num_tokens;
  a.heads = heads;
  a.group = group;
  a.scale = scale;
  a.scale_log2 = scale * 1.4426950408889634f;
  const auto run = kernel == "forward"          ? voco::attention::run_forward
                   : kernel == "dq"             ? voco::attention::run_query_gradient
                   : kernel == "dkv"            ? voco::attention::run_key_gradient
                   : kernel == "hopper forward" ? voco::attention::run_hopper_forward
                   : kernel == "hopper dq"      ? voco::attention::run_hopper_query_gradient
                   : kernel == "hopper dkv"     ? voco::attention::run_hopper_key_gradient
                                                : throw std::invalid_argument("no such kernel: " + kernel);
  const DeviceGuard guard(device);
  check(run(a, static_cast<voco::Dtype>(dtype), head_dim, blocks, pointer(stream)), "attention kernel");
}

// Address, and the strides of outer, token and head; of scales, of token and head.
using CacheArgument = std::tuple<Address, int64_t, int64_t, int64_t>;

voco::decode::Rows rows_argument(const CacheArgument& rows) {
  return {pointer(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows), std::get<3>(rows)};
}

voco::decode::Scales scales_argument(const RowsArgument& scales) {
  return {floats(std::get<0>(scales)), std::get<1>(scales), std::get<2>(scales)};
}

void decode(int device, Address stream, int dtype, int stored, int head_dim, const std::array<CacheArgument, 3>& rows,
            Address lengths, Address table, int64_t table_stride, int num_blocks, int block_size, int capacity,
            const std::array<CacheArgument, 2>& prefix_rows, const std::array<RowsArgument, 2>& prefix_scales,
            const std::array<Address, 2>& prefix_ends, int groups, int prefix_tokens, const std::array<Address, 4>& results,
            int requests, int tokens, int heads, int group, int own_splits, int prefix_splits, float scale) {
  voco::decode::Arguments a{};
  a.q = rows_argument(rows[0]);
  a.own.keys.k = rows_argument(rows[1]);
  a.own.keys.v = rows_argument(rows[2]);
  a.own.lengths = ints(lengths);
  a.own.table = ints(table);
  a.own.table_stride = table_stride;
  a.own.num_blocks = num_blocks;
  a.own.block_size = block_size;
  a.own.capacity = capacity;
  a.prefix.keys = {rows_argument(prefix_rows[0]), rows_argument(prefix_rows[1]), scales_argument(prefix_scales[0]),
                   scales_argument(prefix_scales[1])};
  a.prefix.ends = ints(prefix_ends[0]);
  a.prefix.request_ends = ints(prefix_ends[1]);
  a.prefix.groups = groups;
  a.prefix.tokens = prefix_tokens;
  a.out = pointer(results[0]);
  a.lse = writable_floats(results[1]);
  a.partial_out = writable_floats(results[2]);
  a.partial_lse = writable_floats(results[3]);
  a.requests = requests;
  a.tokens = tokens;
  a.heads = heads;
  a.group = group;
  a.own_splits = own_splits;
  a.prefix_splits = prefix_splits;
  a.scale_log2 = scale * 1.4426950408889634f;
  const DeviceGuard guard(device);
  check(voco::decode::run(a, static_cast<voco::Dtype>(dtype), static_cast<voco::Dtype>(stored), head_dim, pointer(stream)),
        "decoding kernel");
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
  m.attr("MAX_LAYERS") = voco::kMaxLayers;
#ifdef VOCO_HOST
  m.attr("DEVICE_TYPE") = "cpu";
#else
  m.attr("DEVICE_TYPE") = "cuda";
#endif
  m.def("attention", &attention, py::kw_only(), py::arg("kernel"), py::arg("device"), py::arg("stream"), py::arg("dtype"),
        py::arg("head_dim"), py::arg("blocks"), py::arg("rows"), py::arg("lse"), py::arg("delta"), py::arg("plan"),
        py::arg("num_tiles"), py::arg("num_tokens"), py::arg("heads"), py::arg("group"), py::arg("scale"),
        "Launch `kernel` (forward, dq or dkv, or one of them behind `hopper`): rows are (address, stride of tokens, stride of "
        "heads) of q, k, v, out, grad_out, dq, dk, dv; plan the addresses of tiles, row_index, key_index, reader_index, "
        "late_index, after.");
  m.def("attention_shared", &voco::attention::shared_bytes, py::arg("head_dim"),
        "Bytes of shared memory that a block of the attention kernels takes at most.");
  m.def("decode", &decode, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("dtype"), py::arg("stored"),
        py::arg("head_dim"), py::arg("rows"), py::arg("lengths"), py::arg("table"), py::arg("table_stride"),
        py::arg("num_blocks"), py::arg("block_size"), py::arg("capacity"), py::arg("prefix_rows"), py::arg("prefix_scales"),
        py::arg("prefix_ends"), py::arg("groups"), py::arg("prefix_tokens"), py::arg("results"), py::arg("requests"),
        py::arg("tokens"), py::arg("heads"), py::arg("group"), py::arg("own_splits"), py::arg("prefix_splits"),
        py::arg("scale"),
        "Launch decoding: rows are (address, strides of outer, token, head) of q, k_cache, v_cache; prefix_rows of k and v; "
        "prefix_scales (address, strides of token, head); prefix_ends the addresses of cu_prefix and cu_requests; results those "
        "of out, lse, partial_out, partial_lse. 0 stands for what there is not.");
  m.def("decode_shared",
        [](int head_dim, int stored) { return voco::decode::shared_bytes(head_dim, static_cast<voco::Dtype>(stored)); },
        py::arg("head_dim"), py::arg("stored"),
        "Bytes of shared memory that a block of the decoding kernels takes, for a prefix of the dtype `stored`.");
  // Local, so that a second build of this module, for another device, can be loaded beside it.
  py::class_<KvMover>(m, "KvMover", py::module_local(),
                      "Injection or extraction for one group of layers whose caches have the same strides.")
      .def(py::init<bool, int, int, const std::vector<Address>&, const std::vector<Address>&, int, const Strides&,
                    const Strides&, int64_t, int64_t, Address, bool, Address, bool, Address, float, int, int, int>(),
           py::kw_only(), py::arg("inject"), py::arg("device"), py::arg("first_layer"), py::arg("k_caches"),
           py::arg("v_caches"), py::arg("cache_dtype"), py::arg("k_cache_strides"), py::arg("v_cache_strides"),
           py::arg("block_size"), py::arg("num_slots"), py::arg("slots"), py::arg("wide_slots"), py::arg("positions"),
           py::arg("wide_positions"), py::arg("inv_freq"), py::arg("multiplier"), py::arg("tokens"), py::arg("heads"),
           py::arg("half"))
      .def("set_rows", &KvMover::set_rows, "dtype, bytes of an element, strides of k, v and their scales in elements.")
      .def("launch", &KvMover::launch, "Addresses of k, v, k_scale, v_scale (0: none), and the stream.");
}
