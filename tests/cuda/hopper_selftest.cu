// Runs the kernels of hopper_selftest.cuh against references in double precision, on a CPU or a Hopper GPU.
//   hopper_selftest CASE [DEFECT]    prints what is wrong; the exit status says what was found
#include "checks.cuh"
#include "hopper_selftest.cuh"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace voco::selftest {
namespace {

const std::map<std::string, Defect> kDefects = {
    {"none", Defect::kNone},
    {"misaligned tile", Defect::kMisalignedTile},
    {"too many tokens", Defect::kTooManyTokens},
    {"no barrier fence", Defect::kNoBarrierFence},
    {"no block barrier", Defect::kNoBlockBarrier},
    {"no wait", Defect::kNoWait},
    {"no swizzle", Defect::kNoSwizzle},
    {"half warpgroup", Defect::kHalfWarpgroup},
    {"other operands", Defect::kOtherOperands},
    {"no proxy fence", Defect::kNoProxyFence},
    {"no register fence", Defect::kNoRegisterFence},
    {"early sums", Defect::kEarlySums},
    {"uncommitted", Defect::kUncommitted},
    {"no product wait", Defect::kNoProductWait},
    {"swapped strides", Defect::kSwappedStrides},
    {"outside shared", Defect::kOutsideShared},
    {"no empty wait", Defect::kNoEmptyWait},
    {"few bytes", Defect::kFewBytes},
    {"many bytes", Defect::kManyBytes},
    {"no full wait", Defect::kNoFullWait},
    {"early release", Defect::kEarlyRelease},
    {"one warp releases", Defect::kOneWarpReleases},
    {"many arrivals", Defect::kManyArrivals},
    {"many registers", Defect::kManyRegisters},
    {"lax copy wait", Defect::kLaxCopyWait},
    {"lax product wait", Defect::kLaxProductWait},
    {"no turn", Defect::kNoTurn},
    {"other count", Defect::kOtherCount},
};

template <class T>
T random_element(size_t) {
  return narrow<T>(random_number());
}

// Two heads of 96 columns, whose last box is ragged.
bool check_boxes(int token_stride, int head_stride, Defect defect) {
  using T = __half;
  const int tokens = 61, heads = 2, columns = 96, boxes = 3, first = -5, step = 25;
  const int described = tokens + (defect == Defect::kTooManyTokens ? 1 : 0);
  Array<T> from((tokens - 1) * token_stride + (heads - 1) * head_stride + columns, random_element<T>);
  const int tiles = ceil_div(columns, kBoxColumns), elements = kBoxRows * kBoxColumns;
  Array<T> to(boxes * heads * tiles * elements);
  BoxArgs args = {{}, reinterpret_cast<uint4*>(to.data()), first, step, defect};
  expect_success(make_tensor_map(&args.map, {from.data(), described, heads, columns, token_stride, head_stride}, kBoxRows));
  start(box, dim3(tiles, heads, boxes), kBoxThreads, kBoxShared, args);
  for (int i = 0; i < boxes * heads * tiles * elements; ++i) {
    const int tile = i / elements, row = i % elements / kBoxColumns;
    const int token = first + step * (tile / tiles / heads) + row, head = tile / tiles % heads;
    const int column = tile % tiles * kBoxColumns + i % kBoxColumns;
    const bool inside = token >= 0 && token < tokens && column < columns;
    const double expected = inside ? widen(from[token * token_stride + head * head_stride + column]) : 0;
    if (!check("element", i, widen(to[i]), expected)) return false;
  }
  return true;
}

// [tokens, heads, columns] with something between tokens, and [heads, tokens, columns].
bool check_box(Defect defect) {
  return check_boxes(2 * 96 + 8, 96, defect) && check_boxes(96, 61 * 96, defect);
}

// What make_tensor_map refuses.
bool check_maps(Defect) {
  Array<__half> data(64);
  TensorMap map;
  const TensorLayout good = {data.data(), 1, 1, 64, 64, 64};
  if (make_tensor_map(&map, good, 8) != 0) return check("code", 0, 1, 0);
  const std::vector<std::pair<TensorLayout, int>> refused = {
      {{data.data() + 1, 1, 1, 64, 64, 64}, 8}, {{data.data(), 1, 1, 64, 60, 64}, 8},
      {{data.data(), 1, 1, 64, 64, 0}, 8},    {{data.data(), 0, 1, 64, 64, 64}, 8},
      {{data.data(), 1, 1, 0, 64, 64}, 8},      {good, 0},
      {good, 257},
  };
  for (size_t i = 0; i < refused.size(); ++i) {
    if (make_tensor_map(&map, refused[i].first, refused[i].second) == 0) return check("code", i + 1, 0, 1);
  }
  return true;
}

// a(row, k) and b(k, column) are elements; compares c[rows, columns].
template <class A, class B>
bool check_products(Array<float>& c, int rows, int columns, int depth, const A& a, const B& b) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      double total = 0, magnitude = 0;
      for (int k = 0; k < depth; ++k) {
        const double term = widen(a(row, k)) * widen(b(k, column));
        total += term;
        magnitude += std::abs(term);
      }
      const int place = row * columns + column;
      // Tensor cores may cut off where a CPU rounds: two units in the last place for each addition.
      if (!check("product", place, c[place], total, magnitude * depth / (1 << 22))) return false;
    }
  }
  return true;
}

template <class T, int kColumns, Major kMajorA, Major kMajorB, bool kRegisters>
bool check_product(Defect defect, int depth) {
  Array<T> a(kProductRows * depth, random_element<T>), b(kColumns * depth, random_element<T>);
  Array<float> c(kProductRows * kColumns);
  start(product<T, kColumns, kMajorA, kMajorB, kRegisters>, 1, kWarpgroupThreads, product_shared<kColumns>(depth),
        ProductArgs<T>{a.data(), b.data(), c.data(), depth, defect});
  return check_products(
      c, kProductRows, kColumns, depth,
      [&](int row, int k) { return kMajorA == Major::kK ? a[row * depth + k] : a[k * kProductRows + row]; },
      [&](int k, int column) { return kMajorB == Major::kK ? b[column * depth + k] : b[k * kColumns + column]; });
}

template <class T>
bool check_shared_product(Defect defect) {
  return check_product<T, 64, Major::kK, Major::kK, false>(defect, 64) &&
         check_product<T, 128, Major::kK, Major::kK, false>(defect, 192);
}

// Every width, and the majors that a backward pass needs.
bool check_widths(Defect defect) {
  using T = __half;
  return check_product<T, 32, Major::kK, Major::kK, false>(defect, 64) &&
         check_product<T, 96, Major::kK, Major::kK, false>(defect, 128) &&
         check_product<T, 192, Major::kMN, Major::kK, false>(defect, 64) &&
         check_product<T, 256, Major::kMN, Major::kMN, false>(defect, 64) &&
         check_product<T, 256, Major::kK, Major::kMN, true>(defect, 64) &&
         check_product<T, 64, Major::kK, Major::kK, true>(defect, 64);
}

template <class T>
bool check_register_product(Defect defect) {
  return check_product<T, 64, Major::kK, Major::kMN, true>(defect, 64) &&
         check_product<T, 128, Major::kK, Major::kMN, true>(defect, 128);
}

// A head of 96 columns fills a tile and a half.
bool check_partial_tiles(Defect defect) {
  return check_product<__half, 96, Major::kK, Major::kMN, true>(defect, 64) &&
         check_product<__half, 32, Major::kK, Major::kMN, true>(defect, 64);
}

// Numbers that are not normal.
bool check_range(Defect defect) {
  const int depth = 64, columns = 64;
  const float scales[] = {0x1p-24f, -0x1p-15f, 1.5f * 0x1p-14f, 65504, -1};
  Array<__half> a(kProductRows * depth, [&](size_t i) { return narrow<__half>(scales[i % 5]); });
  Array<__half> b(columns * depth, [&](size_t i) { return narrow<__half>(i % 7 < 3 ? scales[i % 3] : 0.0f); });
  Array<float> c(kProductRows * columns);
  start(product<__half, columns, Major::kK, Major::kK, false>, 1, kWarpgroupThreads, product_shared<columns>(depth),
        ProductArgs<__half>{a.data(), b.data(), c.data(), depth, defect});
  return check_products(
      c, kProductRows, columns, depth, [&](int row, int k) { return a[row * depth + k]; },
      [&](int k, int column) { return b[column * depth + k]; });
}

template <class T, bool kGather>
bool check_pipeline(Defect defect) {
  const int rows = 150, columns = 56, depth = 64 * 5 + 24, stored = 40;
  Array<T> a(rows * depth, random_element<T>), b((kGather ? stored : columns) * depth, random_element<T>);
  Array<int> indices(columns, [](size_t i) { return int(i * 7 % stored); });
  Array<float> c(rows * columns);
  PipelineArgs<T> args = {{}, {}, b.data(), indices.data(), c.data(), rows, columns, depth, defect};
  expect_success(make_tensor_map(&args.a, {a.data(), rows, 1, depth, depth, depth}, kPipelineRows));
  if (!kGather) expect_success(make_tensor_map(&args.b, {b.data(), columns, 1, depth, depth, depth}, kPipelineColumns));
  start(pipeline<T, kGather>, dim3(ceil_div(columns, kPipelineColumns), ceil_div(rows, kPipelineRows)), kPipelineThreads,
        kPipelineShared, args);
  return check_products(
      c, rows, columns, depth, [&](int row, int k) { return a[row * depth + k]; },
      [&](int k, int column) { return b[(kGather ? indices[column] : column) * depth + k]; });
}

// With whole numbers, so small that nothing is rounded.
bool check_chain(Defect defect) {
  const int rows = 64, columns = 64, tokens = kChainTiles * 64;
  const auto small = [](size_t i) { return narrow<__half>(std::floor(2.5f * float(widen(random_element<__half>(i))))); };
  Array<__half> q(rows * columns, small), k(tokens * columns, small), v(tokens * columns, small);
  Array<float> c(rows * columns);
  ChainArgs args = {{}, {}, {}, c.data(), defect};
  expect_success(make_tensor_map(&args.q, {q.data(), rows, 1, columns, columns, columns}, 64));
  expect_success(make_tensor_map(&args.k, {k.data(), tokens, 1, columns, columns, columns}, 64));
  expect_success(make_tensor_map(&args.v, {v.data(), tokens, 1, columns, columns, columns}, 64));
  start(chain, 1, kWarpgroupThreads, kChainShared, args);
  for (int row = 0; row < rows; ++row) {
    std::vector<double> expected(columns);
    for (int token = 0; token < tokens; ++token) {
      double score = 0;
      for (int i = 0; i < columns; ++i) score += widen(q[row * columns + i]) * widen(k[token * columns + i]);
      for (int i = 0; i < columns; ++i) expected[i] += score * widen(v[token * columns + i]);
    }
    for (int i = 0; i < columns; ++i) {
      if (!check("sum", row * columns + i, c[row * columns + i], expected[i])) return false;
    }
  }
  return true;
}

bool check_turns(Defect defect) {
  Array<int> numbers(kWarpgroupThreads, [](size_t i) { return int(i * i); });
  start(turns, 1, kTurnsThreads, 0, TurnsArgs{numbers.data(), defect});
  for (int i = 0; i < kWarpgroupThreads; ++i) {
    int expected = i * i;
    for (int turn = 0; turn < 2 * kTurns; ++turn) expected = 3 * expected + 1 + turn % 2;
    if (!check("number", i, numbers[i], expected)) return false;
  }
  return true;
}

#ifdef VOCO_HOST
bool check_rules(Defect) {
  const std::pair<Rule, const char*> reports[] = {
      {Rule::kBarrierAlignment, "an mbarrier at shared address 3076, not a multiple of 8"},
      {Rule::kTwoInits, "a second mbarrier_init"},
      {Rule::kNoBarrier, "no mbarrier at shared address 3072"},
      {Rule::kNoSuchParity, "a parity of 2"},
      {Rule::kTooManyBytes, "an mbarrier cannot wait for 1048576 bytes"},
      {Rule::kBoxOutside, "tma_load at shared address 1024, outside every array"},
      {Rule::kBoxNotAwaited, "the block ends with a tma_load that no one has waited for"},
      {Rule::kBoxOverStore, "tma_load at shared address 512, written at"},
      {Rule::kBarrierZero, "no named barrier has the number 0"},
      {Rule::kPartOfAWarp, "a named barrier of 16 threads"},
      {Rule::kPartOfAWarpgroup, "wgmma by less than a warpgroup"},
      {Rule::kNoSwizzleMode, "operand a of wgmma: not the descriptor of a tile swizzled by 128 bytes"},
  };
  const bool lazy = host::lazy_copies();
  host::set_lazy_copies(true);
  bool right = true;
  for (const auto& [rule, report] : reports) {
    Array<__half> data(kBoxRows * kBoxColumns);
    RuleArgs args = {{}, rule};
    expect_success(make_tensor_map(&args.map, {data.data(), kBoxRows, 1, kBoxColumns, kBoxColumns, kBoxColumns}, kBoxRows));
    const int threads = rule == Rule::kNoSwizzleMode ? kWarpgroupThreads : kRuleThreads;
    std::string found = "nothing";
    try {
      start(break_rule, 1, threads, kBoxBytes + 16, args);
    } catch (const std::runtime_error& error) {
      found = error.what();
    }
    if (found.find(report) != std::string::npos) continue;
    std::printf("expected \"%s\", found: %s\n", report, found.c_str());
    right = false;
  }
  host::set_lazy_copies(lazy);
  return right;
}
#endif

const std::map<std::string, bool (*)(Defect)> kCases = {
    {"box", check_box},
    {"maps", check_maps},
    {"product fp16", check_shared_product<__half>},
    {"product bf16", check_shared_product<__nv_bfloat16>},
    {"register product fp16", check_register_product<__half>},
    {"register product bf16", check_register_product<__nv_bfloat16>},
    {"widths", check_widths},
    {"partial tiles", check_partial_tiles},
    {"range", check_range},
    {"pipeline fp16", check_pipeline<__half, false>},
    {"pipeline bf16", check_pipeline<__nv_bfloat16, false>},
    {"gather", check_pipeline<__half, true>},
    {"chain", check_chain},
    {"turns", check_turns},
#ifdef VOCO_HOST
    {"rules", check_rules},
#endif
};

int run(const char* name, const char* defect_name) {
  try {
    const Defect defect = kDefects.at(defect_name);
    bool right = true;
    for (const auto& [case_name, check] : kCases) {
      if (name != case_name && std::strcmp(name, "all") != 0) continue;
      const bool result = check(defect);
      std::printf("%s: %s\n", case_name.c_str(), result ? "right" : "wrong");
      right &= result;
    }
    return right ? kRight : kWrong;
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    return kError;
  }
}

}  // namespace
}  // namespace voco::selftest

// The case "all" is every case. Returns 0: right, 1: wrong values, 2: an error, which it prints.
int main(int count, char** words) {
  return voco::selftest::run(count > 1 ? words[1] : "all", count > 2 ? words[2] : "none");
}
