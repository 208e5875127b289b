// move_kv on small problems of every kind, in memory without a byte to spare, against arithmetic in double precision. Run under
// sanitizers. With the argument "brief" it does a few of them; with others it does something wrong in these, which must be seen:
// "short" claims a slot more than a cache has, "twice" puts two tokens into one slot.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "voco/kv_cache.cuh"

using voco::Direction;
using voco::Dtype;

namespace {

constexpr int kLayers = 2, kHeads = 3, kTokens = 5, kBlock = 4, kBlocks = 3, kSlots = kBlock * kBlocks;

int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : dtype <= Dtype::kBFloat16 ? 2 : 1; }

double epsilon_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 1e-6 : dtype == Dtype::kFloat16 ? 1e-3 : 8e-3;
}

// An array of elements of any dtype, each `stride` apart; what lies between them is not allocated at the end.
struct Array {
  Array(Dtype dtype, int64_t count, int64_t stride)
      : dtype(dtype), stride(stride), bytes(((count - 1) * stride + 1) * size_of(dtype)), data(new char[bytes]) {
    for (int64_t i = 0; i < count; ++i) set(i, static_cast<float>(std::rand() % 7 - 3));
  }
  void set(int64_t i, float x) {
    void* to = data.get() + i * stride * size_of(dtype);
    switch (dtype) {
      case Dtype::kInt8: *static_cast<int8_t*>(to) = static_cast<int8_t>(x); break;
      case Dtype::kFloat8: *static_cast<__nv_fp8_e4m3*>(to) = __nv_fp8_e4m3(x); break;
      default: voco::store_any(to, 0, dtype, x);
    }
  }
  double at(int64_t i) const { return voco::load_any(data.get(), i * stride, dtype); }

  Dtype dtype;
  int64_t stride, bytes;
  std::unique_ptr<char[]> data;
};

int failures = 0;

void expect(double got, double wanted, Dtype dtype, const char* what) {
  const bool both_nan = got != got && wanted != wanted;
  if (both_nan || std::fabs(got - wanted) <= epsilon_of(dtype) * (1 + std::fabs(wanted))) return;
  if (++failures < 10) std::printf("%s: %g, but should be %g\n", what, got, wanted);
}

// One problem: `stride` is that of head_dim, the other dimensions lie densely around it.
void move(Direction direction, Dtype rows, Dtype caches, int head_dim, int64_t stride, bool paged, const std::string& wrong) {
  const bool inject = direction == Direction::kInject, quantised = rows > Dtype::kFloat32;
  const int half = head_dim / 2;
  const int64_t row = int64_t{kHeads} * head_dim;
  Array k(rows, kLayers * kTokens * row, 1), v(rows, kLayers * kTokens * row, 1);
  std::vector<Array> k_caches, v_caches;
  for (int layer = 0; layer < kLayers; ++layer) {
    k_caches.emplace_back(caches, kSlots * row, stride);
    v_caches.emplace_back(caches, kSlots * row, stride);
  }
  const Array k_before = [&] { Array copy(caches, kSlots * row, stride);
                               std::memcpy(copy.data.get(), k_caches[0].data.get(), copy.bytes); return copy; }();
  Array k_scale(Dtype::kFloat32, kLayers * kTokens * kHeads, 1), v_scale(Dtype::kFloat32, kLayers * kTokens * kHeads, 1);
  std::vector<int64_t> slots = {7, 0, -1, inject ? int64_t{kSlots} : 3, 11};
  if (wrong == "twice") slots[1] = 7;
  std::vector<int32_t> positions = {0, 1, -1, 1 << 20, -(1 << 20)};
  std::vector<float> inv_freq(half);
  for (int i = 0; i < half; ++i) inv_freq[i] = std::pow(10000.0f, -static_cast<float>(i) / half);

  voco::KvMove m{};
  for (int layer = 0; layer < kLayers; ++layer) {
    m.k_cache[layer] = k_caches[layer].data.get();
    m.v_cache[layer] = v_caches[layer].data.get();
  }
  m.k_cache_strides = m.v_cache_strides = {paged ? kBlock * row * stride : 0, row * stride, head_dim * stride, stride};
  m.block_size = paged ? kBlock : kSlots;
  m.num_slots = kSlots;
  if (wrong == "short") {
    m.num_slots = kSlots + 1;
    m.block_size = paged ? kBlock : kSlots + 1;
    slots[4] = kSlots;
  }
  m.k = k.data.get();
  m.v = v.data.get();
  m.k_strides = m.v_strides = {kTokens * row, row, head_dim, 1};
  if (quantised) {
    m.k_scale = reinterpret_cast<float*>(k_scale.data.get());
    m.v_scale = reinterpret_cast<float*>(v_scale.data.get());
    m.k_scale_strides = m.v_scale_strides = {kTokens * kHeads, kHeads, 1, 0};
  }
  m.slots = slots.data();
  m.wide_slots = true;
  m.positions = positions.data();
  m.inv_freq = inv_freq.data();
  m.multiplier = 1.25f;
  m.layers = kLayers, m.tokens = kTokens, m.heads = kHeads, m.half = half;
  if (const int code = voco::move_kv(m, direction, rows, caches, nullptr)) {
    std::printf("error %d\n", code);
    ++failures;
  }

  for (int layer = 0; layer < kLayers; ++layer) {
    for (int token = 0; token < kTokens; ++token) {
      const int64_t slot = slots[token];
      const bool inside = slot >= 0 && slot < kSlots;
      if (inject && !inside) continue;
      for (int head = 0; head < kHeads; ++head) {
        const int64_t here = (int64_t{layer} * kTokens + token) * row + head * head_dim, there = slot * row + head * head_dim;
        const int64_t scale = (int64_t{layer} * kTokens + token) * kHeads + head;
        for (int i = 0; i < half; ++i) {
          const double angle = static_cast<float>(positions[token]) * inv_freq[i];
          const double c = std::cos(angle) * 1.25, s = std::sin(angle) * (inject ? 1.25 : -1.25);
          const Array &from_k = inject ? k : k_caches[layer], &from_v = inject ? v : v_caches[layer];
          const Array &to_k = inject ? k_caches[layer] : k, &to_v = inject ? v_caches[layer] : v;
          const int64_t from = inject ? here : there, to = inject ? there : here;
          double low = NAN, high = NAN, value = NAN;
          if (inside) {
            const double factor = quantised ? k_scale.at(scale) : 1.0;
            low = from_k.at(from + i) * factor, high = from_k.at(from + half + i) * factor;
            value = from_v.at(from + half + i) * (quantised ? v_scale.at(scale) : 1.0);
          }
          expect(to_k.at(to + i), low * c - high * s, caches, "low half of a key");
          expect(to_k.at(to + half + i), high * c + low * s, caches, "high half of a key");
          expect(to_v.at(to + half + i), value, caches, "value");
        }
      }
    }
  }
  // A slot that nobody named.
  for (int64_t i = 5 * row; i < 6 * row; ++i) {
    if (k_caches[0].at(i) != k_before.at(i)) ++failures;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool brief = argc > 1;
  const std::string wrong = brief && std::string(argv[1]) != "brief" ? argv[1] : "";
  for (int caches = 0; caches < 3; ++caches) {
    for (int rows = 0; rows < 5; ++rows) {
      if (brief && (caches != 1 || (rows != 1 && rows != 3))) continue;
      for (const int head_dim : {16, 20}) {
        for (const int64_t stride : {1, 2}) {
          for (const bool paged : {false, true}) {
            const auto r = static_cast<Dtype>(rows), c = static_cast<Dtype>(caches);
            move(Direction::kInject, r, c, head_dim, stride, paged, wrong);
            if (rows == caches && wrong.empty()) move(Direction::kExtract, r, c, head_dim, stride, paged, wrong);
          }
        }
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures != 0 && wrong.empty();
}
