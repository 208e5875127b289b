// Runs the kernels of selftest.cuh against references in double precision, on a CPU or a GPU.
//   selftest CASE [DEFECT]    prints what is wrong and the count of bank conflicts; the exit status says what was found
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "checks.cuh"
#include "selftest.cuh"

namespace voco::selftest {
namespace {

const std::map<std::string, Defect> kDefects = {
    {"none", Defect::kNone},
    {"unmasked tail", Defect::kUnmaskedTail},
    {"misaligned", Defect::kMisaligned},
    {"slot off by one", Defect::kSlotOffByOne},
    {"half warp", Defect::kHalfWarp},
    {"divergent barrier", Defect::kDivergentBarrier},
    {"return before barrier", Defect::kReturnBeforeBarrier},
    {"missing warp barrier", Defect::kMissingWarpBarrier},
    {"missing barrier", Defect::kMissingBarrier},
    {"shared overflow", Defect::kSharedOverflow},
    {"lax wait", Defect::kLaxWait},
    {"missing commit", Defect::kMissingCommit},
    {"missing barrier after wait", Defect::kMissingBarrierAfterWait},
    {"prefetch before barrier", Defect::kPrefetchBeforeBarrier},
    {"prefetch into used stage", Defect::kPrefetchIntoUsedStage},
    {"no swizzle", Defect::kNoSwizzle},
    {"outside shared", Defect::kOutsideShared},
    {"plain add", Defect::kPlainAdd},
};

float random_element(size_t) { return random_number(); }

bool check_copy(Defect defect) {
  for (int count : {1, 4, 7, 8, 603}) {
    Array<__half> from(count, [](size_t) { return __float2half_rn(random_number()); });
    Array<__half> to(count);
    start(copy, dim3(1, 2, 2), dim3(8, 4), 0, CopyArgs{from.data(), to.data(), count, defect});
    for (int i = 0; i < count; ++i) {
      if (!check("copy", i, __half2float(to[i]), __half2float(from[i]))) return false;
    }
  }
  return true;
}

bool check_scatter(Defect defect) {
  const int count = 100;
  Array<float> from(count, random_element), to(count);
  Array<int> slots(count, [](size_t i) { return int(i * 37 % count); });
  const float scale = 3 + 1.0f / 1024, shift = -random_number();
  start(scatter, ceil_div(count, 64), 64, 0,
        ScatterArgs{from.data(), slots.data(), to.data(), scale, shift, count, defect});
  for (int i = 0; i < count; ++i) {
    // The product is exact in double precision; the sum may be rounded twice, which these numbers do not show.
    const float expected = static_cast<float>(double{scale} * from[i] + shift);
    if (!check("scattered value", i, to[slots[i]], expected)) return false;
  }
  return true;
}

bool check_sum(Defect defect) {
  const int rows = 3, columns = 333;
  Array<float> values(rows * columns, random_element), sums(rows);
  Array<int> above(rows);
  Array<uint32_t> signs(rows * kSumWarps);
  for (int i = 0; i < columns; ++i) values[columns + i] = std::min(values[columns + i], 0.5f);
  start(sum, rows, kSumThreads, 0,
        SumArgs{values.data(), sums.data(), above.data(), signs.data(), columns, defect});
  for (int row = 0; row < rows; ++row) {
    double total = 0, magnitude = 0;
    bool any_above = false;
    for (int i = 0; i < columns; ++i) {
      const double value = values[row * columns + i];
      total += value;
      magnitude += std::abs(value);
      any_above |= value > 0.99f;
      if (i >= kSumThreads) continue;
      const uint32_t sign = signs[row * kSumWarps + i / kWarp] >> i % kWarp & 1;
      if (!check("sign", i, sign, value < 0)) return false;
    }
    if (!check("sum", row, sums[row], total, magnitude * columns / (1 << 24))) return false;
    if (!check("comparison", row, above[row], any_above)) return false;
  }
  return true;
}

bool check_rotate(Defect defect) {
  Array<int> numbers(64, [](size_t i) { return int(i * i); });
  start(rotate, 1, 64, 0, RotateArgs{numbers.data(), defect});
  for (int i = 0; i < 64; ++i) {
    const int from = i % 32 == 31 ? i - 31 : i + 1;
    if (!check("rotated number", i, numbers[i], from * from)) return false;
  }
  return true;
}

bool check_transpose(Defect defect) {
  const int rows = 36, columns = 44;
  Array<float> from(rows * columns, random_element), to(rows * columns);
  start(transpose, dim3(ceil_div(columns, kTile), ceil_div(rows, kTile)), kTransposeThreads, kTransposeShared,
        TransposeArgs{from.data(), to.data(), rows, columns, defect});
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      const int place = column * rows + row;
      if (!check("transposed element", place, to[place], from[row * columns + column])) return false;
    }
  }
  return true;
}

template <class T>
bool check_matmul(Defect defect) {
  const int rows = 43, columns = 40, depth = 104;
  const auto element = [](size_t) { return narrow<T>(random_number()); };
  Array<T> a(rows * depth, element), b(depth * columns, element);
  Array<float> c(rows * columns);
  start(matmul<T>, dim3(ceil_div(columns, kTile), ceil_div(rows, kTile)), kMatmulThreads, kMatmulShared,
        MatmulArgs<T>{a.data(), b.data(), c.data(), rows, columns, depth, defect});
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      double total = 0, magnitude = 0;
      for (int k = 0; k < depth; ++k) {
        const double product = widen(a[row * depth + k]) * widen(b[k * columns + column]);
        total += product;
        magnitude += std::abs(product);
      }
      const int place = row * columns + column;
      // Tensor cores may cut off where a CPU rounds: two units in the last place for each addition.
      if (!check("product", place, c[place], total, magnitude * depth / (1 << 22))) return false;
    }
  }
  return true;
}

bool check_numbers(Defect) {
  const int count = 400;
  Array<float> from(count, [](size_t i) { return i < 2 ? (i ? -HUGE_VALF : 0.0f) : 126 * random_number(); });
  const auto random_word = [](size_t) { return uint32_t((random_number() + 1) * 0x7fffffff); };
  Array<uint32_t> words(count, random_word), chosen(count);
  Array<uint32_t> selectors(count, [&](size_t i) { return random_word(i) & 0x7777; });
  Array<float> powers(count);
  start(numbers, ceil_div(count, 64), 64, 0,
        NumbersArgs{from.data(), words.data(), selectors.data(), powers.data(), chosen.data(), count});
  for (int i = 0; i < count; ++i) {
    const double power = std::exp2(static_cast<double>(from[i]));
    if (!check("power of two", i, powers[i], power, i < 2 ? 0 : power * 3e-7)) return false;
    for (int byte = 0; byte < 4; ++byte) {
      const int source = selectors[i] >> 4 * byte & 7;
      const uint32_t word = source < 4 ? words[i] : ~words[i];
      if (!check("byte", i, chosen[i] >> 8 * byte & 0xff, word >> source % 4 * 8 & 0xff)) return false;
    }
  }
  return true;
}

bool check_histogram(Defect defect) {
  const int count = 90;
  Array<int> bins(count, [](size_t i) { return int(i * i % kBins); });
  Array<float> values(count, [](size_t i) { return float(i); });
  Array<int> counts(kBins, [](size_t) { return 0; });
  Array<float> sum(1, [](size_t) { return 0.0f; });
  start(histogram, ceil_div(count, 64), 64, 0,
        HistogramArgs{bins.data(), values.data(), counts.data(), sum.data(), count, defect});
  for (int bin = 0; bin < kBins; ++bin) {
    const auto expected = std::count(bins.data(), bins.data() + count, bin);
    if (!check("count", bin, counts[bin], expected)) return false;
  }
  return check("sum", 0, sum[0], count * (count - 1));
}

// Launches that CUDA refuses.
bool check_limits(Defect) {
  struct Launch {
    const char* what;
    dim3 grid, block;
    size_t shared_bytes;
  };
  const Launch refused[] = {
      {"an empty grid", 0, 32, 0},
      {"too many blocks", dim3(1, 65536), 32, 0},
      {"an empty block", 1, 0, 0},
      {"too many threads", 1, 1056, 0},
      {"a block too deep", 1, dim3(1, 1, 65), 0},
      {"too much shared memory", 1, 32, 228 * 1024},
  };
  for (const Launch& launch : refused) {
    try {
      start(scatter, launch.grid, launch.block, launch.shared_bytes, ScatterArgs{});
      std::printf("%s was not refused\n", launch.what);
      return false;
    } catch (const std::runtime_error&) {
    }
  }
  return true;
}

const std::map<std::string, bool (*)(Defect)> kCases = {
    {"copy", check_copy},           {"scatter", check_scatter},
    {"sum", check_sum},             {"rotate", check_rotate},
    {"transpose", check_transpose}, {"matmul fp16", check_matmul<__half>},
    {"histogram", check_histogram}, {"matmul bf16", check_matmul<__nv_bfloat16>},
    {"limits", check_limits},       {"numbers", check_numbers},
};

}  // namespace
}  // namespace voco::selftest

// The case "all" is every case. Returns 0: right, 1: wrong values, 2: an error, which it prints.
extern "C" int selftest_run(const char* name, const char* defect_name) {
  using namespace voco::selftest;
  try {
    const Defect defect = kDefects.at(defect_name);
    bool right = true;
    for (const auto& [case_name, check] : kCases) {
      if (name == case_name || std::strcmp(name, "all") == 0) right &= check(defect);
    }
#ifdef VOCO_HOST
    std::printf("bank conflicts: %llu\n", static_cast<unsigned long long>(voco::host::bank_conflicts()));
#endif
    return right ? kRight : kWrong;
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    return kError;
  }
}

int main(int count, char** words) {
  return selftest_run(count > 1 ? words[1] : "all", count > 2 ? words[2] : "none");
}
