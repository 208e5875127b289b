// Decoding on small problems, in memory without a byte to spare, against arithmetic in double precision. Run under
// sanitizers; with VOCO_BRIEF it does fewer of them. An argument makes something wrong, which must be seen: "short" says
// that a cache has a key more than it has, "block" that it has a block more, "twice" puts a request into two groups,
// "length" is not the one of the reference.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "voco/decode.cuh"

namespace {

constexpr int kTokens = 4, kGroup = 3, kBlock = 8, kOwnSplits = 2;
// 3 requests of the first group are 36 rows that meet a head of keys: more than those of a warp. A length is below kTokens.
const std::vector<int> kLengths = {37, 1, 12, 70}, kPrefixEnds = {0, 230, 235}, kRequestEnds = {0, 3, 4};

// As much memory as there are elements, so that a sanitizer sees the first access behind it.
template <class T>
struct Array {
  explicit Array(int64_t count) : data(new T[count]), count(count) {}
  std::unique_ptr<T[]> data;
  int64_t count;
};

float random_number() { return static_cast<float>(std::rand() % 401 - 200) / 100; }

template <class T>
T number(float x) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, int8_t>) return static_cast<int8_t>(60 * x);
  if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) return __nv_fp8_e4m3(x);
  if constexpr (std::is_same_v<T, float>) return 0.01f + 0.005f * std::fabs(x);
}

double value(__half x) { return __half2float(x); }
double value(__nv_bfloat16 x) { return __bfloat162float(x); }
double value(int8_t x) { return x; }
double value(__nv_fp8_e4m3 x) { return static_cast<float>(x); }

template <class T>
Array<T> random_array(int64_t count) {
  Array<T> array(count);
  for (int64_t i = 0; i < count; ++i) array.data[i] = number<T>(random_number());
  return array;
}

int failures = 0;

void expect(double got, double wanted, double allowed, const char* what) {
  if (std::fabs(got - wanted) <= allowed * (1 + std::fabs(wanted)) || got == wanted) return;
  if (++failures < 10) std::printf("%s: %g, but should be %g\n", what, got, wanted);
}

template <class T, class Stored, int kHeadDim>
void decode(bool paged, int prefix_splits, int key_heads, const std::string& wrong) {
  const int heads = key_heads * kGroup;
  constexpr bool kQuantised = sizeof(Stored) == 1;
  const int requests = static_cast<int>(kLengths.size()), longest = *std::max_element(kLengths.begin(), kLengths.end());
  const int64_t row = int64_t{key_heads} * kHeadDim, prefix_tokens = kPrefixEnds.back();
  const auto q = random_array<T>(int64_t{requests} * kTokens * heads * kHeadDim);
  const int per_request = (longest + kBlock - 1) / kBlock, blocks = requests * per_request;
  const int64_t slots = paged ? int64_t{blocks} * kBlock : int64_t{requests} * longest;
  const auto k = random_array<T>(slots * row), v = random_array<T>(slots * row);
  const auto pk = random_array<Stored>(prefix_tokens * row), pv = random_array<Stored>(prefix_tokens * row);
  const auto k_scale = random_array<float>(prefix_tokens * key_heads), v_scale = random_array<float>(prefix_tokens * key_heads);
  std::vector<int> lengths = kLengths, request_ends = kRequestEnds, prefix_ends = kPrefixEnds, table(blocks);
  for (int i = 0; i < blocks; ++i) table[i] = (i * 5 + 2) % blocks;
  // Never looked at, and hidden.
  if (paged) table[0] = wrong == "block" ? blocks : -1;

  voco::decode::Arguments a{};
  a.q = {q.data.get(), kTokens * heads * kHeadDim, heads * kHeadDim, kHeadDim};
  const int64_t outer = (paged ? kBlock : longest) * row;
  a.own.keys.k = {k.data.get(), outer, row, kHeadDim};
  a.own.keys.v = {v.data.get(), outer, row, kHeadDim};
  a.own.table = paged ? table.data() : nullptr;
  a.own.table_stride = per_request;
  a.own.num_blocks = blocks;
  a.own.block_size = kBlock;
  a.own.capacity = longest;
  a.prefix.keys = {{pk.data.get(), 0, row, kHeadDim}, {pv.data.get(), 0, row, kHeadDim}, {}, {}};
  if (kQuantised) {
    a.prefix.keys.k_scale = {k_scale.data.get(), key_heads, 1};
    a.prefix.keys.v_scale = {v_scale.data.get(), key_heads, 1};
  }
  a.prefix.tokens = static_cast<int>(prefix_tokens);
  if (wrong == "short") lengths.back() = a.own.capacity = longest + 1;
  if (wrong == "block") a.own.num_blocks = blocks + 1;
  if (wrong == "length") --lengths[0];
  if (wrong == "twice") request_ends = {0, 4, 3, 4}, prefix_ends = {0, 230, 230, 235};
  a.own.lengths = lengths.data();
  a.prefix.ends = prefix_ends.data();
  a.prefix.request_ends = request_ends.data();
  a.prefix.groups = static_cast<int>(prefix_ends.size()) - 1;
  const int64_t rows = int64_t{requests} * kTokens * heads, splits = kOwnSplits + prefix_splits;
  Array<T> out(rows * kHeadDim);
  Array<float> lse(rows), partial_out(splits * rows * kHeadDim), partial_lse(splits * rows);
  a.out = out.data.get();
  a.lse = lse.data.get();
  a.partial_out = partial_out.data.get();
  a.partial_lse = partial_lse.data.get();
  a.requests = requests, a.tokens = kTokens, a.heads = heads, a.group = kGroup;
  a.own_splits = kOwnSplits, a.prefix_splits = prefix_splits;
  const double scale = 1 / std::sqrt(static_cast<double>(kHeadDim));
  a.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  if (voco::decode::launch_splits<T, Stored, kHeadDim>(a, nullptr) || voco::decode::launch_merge<T>(a, kHeadDim, nullptr)) ++failures;

  const double allowed = std::is_same_v<T, __half> ? 4e-3 : 3e-2;
  for (int64_t i = 0; i < rows; ++i) {
    const int head = i % heads, token = i / heads % kTokens, request = static_cast<int>(i / heads / kTokens);
    const int key_head = head / kGroup, group = request < kRequestEnds[1] ? 0 : 1;
    std::vector<double> weights, sums(kHeadDim);
    double total = 0;
    const auto take = [&](const auto* key, const auto* of_value, double key_scale, double value_scale) {
      double score = 0;
      for (int d = 0; d < kHeadDim; ++d) score += value(q.data[i * kHeadDim + d]) * value(key[d]);
      const double weight = std::exp(score * key_scale * scale);
      total += weight;
      for (int d = 0; d < kHeadDim; ++d) sums[d] += weight * value(of_value[d]) * value_scale;
    };
    for (int key = kPrefixEnds[group]; key < kPrefixEnds[group + 1]; ++key) {
      const int64_t at = key * row + key_head * kHeadDim, of_scale = int64_t{key} * key_heads + key_head;
      take(&pk.data[at], &pv.data[at], kQuantised ? k_scale.data[of_scale] : 1, kQuantised ? v_scale.data[of_scale] : 1);
    }
    for (int key = 0; key < kLengths[request] - kTokens + token + 1; ++key) {
      int64_t slot = int64_t{request} * longest + key;
      if (paged) {
        const int block = table[request * per_request + key / kBlock];
        if (block < 0 || block >= blocks) continue;
        slot = int64_t{block} * kBlock + key % kBlock;
      }
      take(&k.data[slot * row + key_head * kHeadDim], &v.data[slot * row + key_head * kHeadDim], 1, 1);
    }
    expect(lse.data[i], std::log(total), 1e-4, "lse");
    for (int d = 0; d < kHeadDim; ++d) expect(value(out.data[i * kHeadDim + d]), sums[d] / total, allowed, "out");
  }
}

// Loads of less than 16 bytes are not counted in kernels, so here: a cycle serves 128 bytes, in 32 different banks.
template <int kHeadDim>
void expect_no_conflicts() {
  const auto count = [](int width, auto address_of) {
    for (int first = 0; first < 32; first += 128 / width) {
      unsigned banks = 0;
      for (int lane = first; lane < std::min(32, first + 128 / width); ++lane) {
        for (int i = 0; i < width / 4; ++i) banks |= 1u << (address_of(lane) / 4 + i) % 32;
      }
      if (banks != ~0u && ++failures < 10) std::printf("loads of %d bytes meet in a bank at head_dim %d\n", width, kHeadDim);
    }
  };
  constexpr int kWidth = voco::kValueWidth<kHeadDim>;
  for (int key = 0; key < 32; key += 8) {
    for (int j = 0; j < kHeadDim / 32; ++j) {
      count(8, [&](int lane) { return voco::byte_at<kHeadDim>(key + lane / 4, 32 * j + lane % 4 * 8); });
    }
    for (int part = 0; part < kHeadDim / (8 * kWidth); ++part) {
      for (int i = 0; i < 2; ++i) {
        count(kWidth, [&](int lane) { return voco::byte_at<kHeadDim>(key + lane % 4 * 2 + i, (8 * part + lane / 4) * kWidth); });
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string wrong = argc > 1 ? argv[1] : "";
  voco::host::reset_bank_conflicts();
  expect_no_conflicts<64>();
  expect_no_conflicts<96>();
  expect_no_conflicts<128>();
  expect_no_conflicts<256>();
  // So many steps that stages are used again.
  decode<__half, __half, 64>(true, 1, 1, wrong);
  decode<__nv_bfloat16, int8_t, 128>(false, 1, 1, wrong);
#ifndef VOCO_BRIEF
  for (const int prefix_splits : {1, 9}) {
    decode<__nv_bfloat16, __nv_bfloat16, 128>(false, prefix_splits, 1, wrong);
    decode<__half, __half, 256>(true, prefix_splits, 1, wrong);
    decode<__half, __half, 96>(false, prefix_splits, 1, wrong);
    decode<__half, __nv_fp8_e4m3, 64>(false, prefix_splits, 2, wrong);
    decode<__half, int8_t, 96>(false, prefix_splits, 1, wrong);
    decode<__nv_bfloat16, __nv_fp8_e4m3, 256>(true, prefix_splits, 1, wrong);
  }
#endif
  std::printf("%d failures, %llu bank conflicts\n", failures, static_cast<unsigned long long>(voco::host::bank_conflicts()));
  return failures != 0 && wrong.empty();
}
