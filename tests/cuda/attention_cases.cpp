// The attention kernels on a problem from a file, in memory without a byte to spare, against arithmetic in double precision;
// run under sanitizers. Compiled for one type and head_dim (VOCO_T, VOCO_D); with VOCO_HOPPER for Hopper's kernels.
//
//     attention_cases FILE [WRONG]     prints "N failures" and "bank conflicts: N"
//
// WRONG does something that must be seen: "values" hides a key from the reference, "short" leaves out the last row of keys,
// "twice" has two blocks write the same rows.
//
// The file holds int32 numbers: tokens, heads, group, row tiles, key tiles; then those tiles, row_index, key_index,
// reader_index, late_index, after; tokens x tokens of the mask; and as float32 q, k, v and the gradient of out.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "voco/attention_backward.cuh"
#include "voco/attention_forward.cuh"
#ifdef VOCO_HOPPER
#include "voco/attention_hopper_backward.cuh"
#include "voco/attention_hopper_forward.cuh"
#endif

namespace {

using T = VOCO_T;
constexpr int kHeadDim = VOCO_D;

// Of exactly that size, on the heap: whoever reads behind it is seen.
template <class Element>
struct Array {
  explicit Array(size_t size) : size(size), data(new Element[size]) { std::memset(data.get(), 0xff, size * sizeof(Element)); }
  size_t size;
  std::unique_ptr<Element[]> data;
};

template <class Element>
Array<Element> read(std::ifstream& file, size_t size) {
  Array<Element> array(size);
  file.read(reinterpret_cast<char*>(array.data.get()), size * sizeof(Element));
  if (!file) throw std::runtime_error("the file is too short");
  return array;
}

struct Matrix {  // [tokens, heads, kHeadDim]
  Matrix(int tokens, int heads) : heads(heads), data(size_t(tokens) * heads * kHeadDim) {}
  voco::attention::Rows rows() { return {data.data.get(), int64_t{heads} * kHeadDim, kHeadDim}; }
  double at(int token, int head, int column) const {
    return voco::unpack<T>(bits(data.data[(size_t(token) * heads + head) * kHeadDim + column])).x;
  }
  static uint32_t bits(T x) {
    uint16_t word;
    std::memcpy(&word, &x, 2);
    return word;
  }
  int heads;
  Array<T> data;
};

Matrix read_matrix(std::ifstream& file, int tokens, int heads, int missing = 0) {
  const auto numbers = read<float>(file, size_t(tokens) * heads * kHeadDim);
  Matrix matrix(tokens - missing, heads);
  for (size_t i = 0; i < matrix.data.size; ++i) {
    const uint16_t word = voco::pack<T>(numbers.data[i], 0) & 0xffff;
    std::memcpy(&matrix.data.data[i], &word, 2);
  }
  return matrix;
}

int failures = 0;

void expect(double got, double wanted, double scale, const char* what, int token, int head) {
  constexpr double kEpsilon = std::is_same_v<T, __half> ? 1.0 / 1024 : 1.0 / 128;
  if (got == wanted || std::fabs(got - wanted) <= 4 * kEpsilon * scale) return;
  if (++failures < 10) std::printf("%s of token %d, head %d: %g, but should be %g\n", what, token, head, got, wanted);
}

double largest(const std::vector<double>& x) {
  double most = 0;
  for (const double value : x) most = std::fmax(most, std::fabs(value));
  return most;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string wrong = argc > 2 ? argv[2] : "";
  std::ifstream file(argv[1], std::ios::binary);
  const auto sizes = read<int>(file, 5);
  const int n = sizes.data[0], heads = sizes.data[1], group = sizes.data[2], key_heads = heads / group;
  int num_row_tiles = sizes.data[3];
  const int num_key_tiles = sizes.data[4];
  auto row_tiles = read<int>(file, 8 * num_row_tiles), key_tiles = read<int>(file, 10 * num_key_tiles);
  const auto row_index = read<int>(file, n), key_index = read<int>(file, n), reader_index = read<int>(file, n);
  const auto late_index = read<int>(file, n), after = read<int>(file, n);
  auto mask = read<int>(file, size_t(n) * n);
  Matrix q = read_matrix(file, n, heads), k = read_matrix(file, n, key_heads, wrong == "short");
  Matrix v = read_matrix(file, n, key_heads), grad = read_matrix(file, n, heads);
  if (wrong == "twice") {
    Array<int> more(row_tiles.size + 8);
    std::memcpy(more.data.get(), row_tiles.data.get(), row_tiles.size * sizeof(int));
    std::memcpy(more.data.get() + row_tiles.size, row_tiles.data.get(), 8 * sizeof(int));
    row_tiles = std::move(more);
    ++num_row_tiles;
  }

  Matrix out(n, heads), dq(n, heads), dk(n, key_heads), dv(n, key_heads);
  Array<float> lse(size_t(n) * heads), delta(size_t(n) * heads);
  voco::attention::Arguments args{};
  args.q = q.rows(), args.k = k.rows(), args.v = v.rows(), args.out = out.rows(), args.grad_out = grad.rows();
  args.dq = dq.rows(), args.dk = dk.rows(), args.dv = dv.rows(), args.lse = lse.data.get(), args.delta = delta.data.get();
  args.plan = {row_tiles.data.get(), row_index.data.get(), key_index.data.get(), reader_index.data.get(),
               late_index.data.get(), after.data.get(), num_row_tiles};
  args.num_tokens = n, args.heads = heads, args.group = group;
  args.scale = 1 / std::sqrt(static_cast<float>(kHeadDim));
  args.scale_log2 = args.scale * voco::attention::kLog2E;
  voco::host::reset_bank_conflicts();
#ifdef VOCO_HOPPER
  // Fewer blocks than tiles, so that they go on to further ones.
  int code = voco::attention::launch_hopper_forward<T, kHeadDim>(args, 3, nullptr);
  code |= voco::attention::launch_hopper_query_gradient<T, kHeadDim>(args, 3, nullptr);
  args.plan.tiles = key_tiles.data.get(), args.plan.num_tiles = num_key_tiles;
  code |= voco::attention::launch_hopper_key_gradient<T, kHeadDim>(args, 3, nullptr);
#else
  int code = voco::attention::launch_forward<T, kHeadDim>(args, num_row_tiles * heads, nullptr);
  code |= voco::attention::launch_query_gradient<T, kHeadDim>(args, num_row_tiles * heads, nullptr);
  args.plan.tiles = key_tiles.data.get(), args.plan.num_tiles = num_key_tiles;
  code |= voco::attention::launch_key_gradient<T, kHeadDim>(args, num_key_tiles * key_heads, nullptr);
#endif
  if (code) ++failures;
  const auto conflicts = voco::host::bank_conflicts();

  if (wrong == "values") {
    for (int j = 0; j < n; ++j) mask.data[size_t(n - 1) * n + j] = j == 0 && !mask.data[size_t(n - 1) * n + j];
  }
  std::vector<double> want_out(size_t(n) * heads * kHeadDim), want_dq(want_out.size());
  std::vector<double> want_dk(size_t(n) * key_heads * kHeadDim), want_dv(want_dk.size());
  for (int head = 0; wrong != "short" && head < heads; ++head) {
    const int key_head = head / group;
    for (int i = 0; i < n; ++i) {
      std::vector<double> weight(n), grad_weight(n);
      double sum = 0, delta_sum = 0;
      for (int j = 0; j < n; ++j) {
        if (!mask.data[size_t(i) * n + j]) continue;
        double score = 0;
        for (int d = 0; d < kHeadDim; ++d) {
          score += q.at(i, head, d) * k.at(j, key_head, d);
          grad_weight[j] += grad.at(i, head, d) * v.at(j, key_head, d);
        }
        sum += weight[j] = std::exp(score * args.scale);
      }
      expect(lse.data[size_t(head) * n + i], std::log(sum), 1, "lse", i, head);
      for (int j = 0; j < n; ++j) delta_sum += (weight[j] /= sum == 0 ? 1 : sum) * grad_weight[j];
      for (int j = 0; j < n; ++j) {
        const double grad_score = weight[j] * (grad_weight[j] - delta_sum) * args.scale;
        for (int d = 0; d < kHeadDim; ++d) {
          const size_t row = (size_t(i) * heads + head) * kHeadDim + d, key = (size_t(j) * key_heads + key_head) * kHeadDim + d;
          want_out[row] += weight[j] * v.at(j, key_head, d);
          want_dq[row] += grad_score * k.at(j, key_head, d);
          want_dk[key] += grad_score * q.at(i, head, d);
          want_dv[key] += weight[j] * grad.at(i, head, d);
        }
      }
    }
  }
  const auto compare = [&](const Matrix& got, const std::vector<double>& want, const char* what) {
    const double scale = largest(want);
    for (size_t i = 0; wrong != "short" && i < want.size(); ++i) {
      const int d = i % kHeadDim, head = i / kHeadDim % got.heads, token = i / kHeadDim / got.heads;
      expect(got.at(token, head, d), want[i], scale, what, token, head);
    }
  };
  compare(out, want_out, "out");
  compare(dq, want_dq, "dq");
  compare(dk, want_dk, "dk");
  compare(dv, want_dv, "dv");
  std::printf("%d failures\nbank conflicts: %llu\n", failures, static_cast<unsigned long long>(conflicts));
  return failures != 0 && wrong.empty();
}
