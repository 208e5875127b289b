// Decoding, split over keys (FlashDecoding) and with a prefix that a group of requests reads together (cascade attention).
//
// An item is a head of keys, a block of up to 64 rows, and a split of a range of keys. Rows are pairs of a query token and
// one of the query heads that share the head of keys: of one request over its own keys, or of all requests of a group over
// their prefix, so that tensor cores have rows to multiply, and a key is read once for all of them. A block of threads takes
// one item, 32 keys at a time, and leaves float32 results; a second kernel merges those of all splits.
#pragma once

#include "voco/decode_keys.cuh"
#include "voco/online_softmax.cuh"

namespace voco::decode {

using attention::kInfinity;

constexpr int kTileRows = 64;  // of an item
constexpr int kMergeThreads = 128;

// A block of threads, and its shared memory: queries, stages of keys and values, lists of steps, and each row's last key.
template <class Stored, int kHeadDim>
struct Shape {
  static constexpr bool kOfBytes = sizeof(Stored) == 1;
  // Tiles of 16 rows of a warp: each key that it reads from shared memory serves two products, but at 256 the results of one
  // tile fill half of the registers.
  static constexpr int kTiles = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kWarps = kTileRows / (16 * kTiles), kThreads = 32 * kWarps;
  // Of bytes there are twice as many stages in as much memory.
  static constexpr int kStages = (kHeadDim <= 96 ? 3 : 2) * (kOfBytes ? 2 : 1), kLists = kStages + 1;
  static constexpr bool kQueriesInRegisters = !kOfBytes && kHeadDim <= 96;

  static constexpr int kTileBytes = kKeys * (kOfBytes ? kByteStride<kHeadDim> : 2 * kHeadDim), kStageBytes = 2 * kTileBytes;
  static constexpr int kQueryBytes = kQueriesInRegisters ? 0 : kTileRows * kHeadDim * 2;
  static constexpr int kListBytes = kLists * sizeof(StepList) + kTileRows * sizeof(int);
  static constexpr int kSharedBytes = kQueryBytes + kStages * kStageBytes + kListBytes;

  using Queries = std::conditional_t<kOfBytes, ByteQueries<kHeadDim>, attention::Operand<kHeadDim, kQueriesInRegisters>>;
};

// The rows of an item: `count` of those of a group of requests, from `begin` on.
struct ItemRows {
  int request, begin, count;  // the first request of the group
  int key_head;

  // Where a query token's head is: the request, and the row number among all of the launch. Behind the last one is that one
  // again.
  __device__ int64_t number(const Arguments& args, int i, int* request, int* token, int* head) const {
    const int row = begin + min(i, count - 1), per_request = args.tokens * args.group, in_request = row % per_request;
    *request = this->request + row / per_request;
    *token = in_request / args.group;
    *head = key_head * args.group + in_request % args.group;
    return (int64_t{*request} * args.tokens + *token) * args.heads + *head;
  }
  template <class T>
  __device__ const T* query(const Arguments& args, int i) const {
    int request, token, head;
    number(args, i, &request, &token, &head);
    return static_cast<const T*>(args.q.data) + request * args.q.outer + token * args.q.token + head * args.q.head;
  }
};

// scores += q k^T of a step.
template <class T, class Stored, int kHeadDim, int kUsed, class Queries>
__device__ inline void multiply_keys(float (&scores)[kUsed][4][4], const Queries* queries, const char* keys) {
  if constexpr (sizeof(Stored) == 1) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      uint32_t a[kUsed][2][4];
#pragma unroll
      for (int m = 0; m < kUsed; ++m) {
        queries[m].fragment(a[m][0], 2 * j);
        queries[m].fragment(a[m][1], 2 * j + 1);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[2][2];
        load_keys<T, Stored, kHeadDim>(b, keys, 8 * n, j);
#pragma unroll
        for (int m = 0; m < kUsed; ++m) {
          mma_m16n8k16<T>(scores[m][n], a[m][0], b[0][0], b[0][1]);
          mma_m16n8k16<T>(scores[m][n], a[m][1], b[1][0], b[1][1]);
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[kUsed][4];
#pragma unroll
      for (int m = 0; m < kUsed; ++m) queries[m].fragment(a[m], k);
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t b[4];
        load_b_transposed<kHeadDim>(b, smem_address(keys), 8 * n, k);
#pragma unroll
        for (int m = 0; m < kUsed; ++m) {
          mma_m16n8k16<T>(scores[m][n], a[m], b[0], b[1]);
          mma_m16n8k16<T>(scores[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

// A row does not see the keys behind its last one.
template <int kUsed>
__device__ inline void hide(float (&scores)[kUsed][4][4], const int* keys, const int* limits) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = keys[8 * n + lane_id() % 4 * 2 + i];
#pragma unroll
      for (int m = 0; m < kUsed; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (key > limits[16 * m + 8 * half + lane_id() / 4]) scores[m][n][2 * half + i] = -kInfinity;
        }
      }
    }
  }
}

// Multiplies what belongs to a key by its factor.
template <int kUsed>
__device__ inline void scale_columns(float (&scores)[kUsed][4][4], const float* factors) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float factor = factors[8 * n + lane_id() % 4 * 2 + i];
#pragma unroll
      for (int m = 0; m < kUsed; ++m) {
        scores[m][n][i] *= factor;
        scores[m][n][2 + i] *= factor;
      }
    }
  }
}

// Takes a step in, for the first kUsed tiles of a warp; `limits` are the last keys of its rows.
template <int kUsed, class T, class Stored, int kHeadDim, class Queries>
__device__ inline void attend(SoftmaxRows<kHeadDim>* rows, const Queries* queries, const char* keys, const char* values,
                              const StepList& list, const int* limits, float scale) {
  float scores[kUsed][4][4] = {};
  multiply_keys<T, Stored, kHeadDim>(scores, queries, keys);
  if constexpr (sizeof(Stored) == 1) scale_columns(scores, list.k_scale);
  if (list.key[kKeys - 1] > limits[0]) hide(scores, list.key, limits);
#pragma unroll
  for (int m = 0; m < kUsed; ++m) rows[m].weigh(scores[m], scale);
  if constexpr (sizeof(Stored) == 1) scale_columns(scores, list.v_scale);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    uint32_t a[kUsed][4];
#pragma unroll
    for (int m = 0; m < kUsed; ++m) attention::as_operand<T>(a[m], scores[m][2 * k], scores[m][2 * k + 1]);
    const auto add = [&](int n, uint32_t b0, uint32_t b1) {
#pragma unroll
      for (int m = 0; m < kUsed; ++m) mma_m16n8k16<T>(rows[m].out[n], a[m], b0, b1);
    };
    if constexpr (sizeof(Stored) == 1) {
      with_values<T, Stored, kHeadDim>(values, 16 * k, add);
    } else {
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t b[4];
        load_b<kHeadDim>(b, smem_address(values), 16 * k, n);
        add(2 * n, b[0], b[1]);
        add(2 * n + 1, b[2], b[3]);
      }
    }
  }
}

// A row's results, as a lane has them, to where they are merged.
template <class Stored, int kHeadDim>
__device__ inline void store_partial(float* row, const float (&out)[kHeadDim / 8][4], int half, float factor) {
  const int t = lane_id() % 4;
  if constexpr (sizeof(Stored) == 1) {
    constexpr int kWidth = kValueWidth<kHeadDim>;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 4) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        const float four[4] = {out[n][i] * factor, out[n + 1][i] * factor, out[n + 2][i] * factor, out[n + 3][i] * factor};
        float* to = row + (n / kWidth * 8 + 2 * t + i % 2) * kWidth + n % kWidth;
        store16(to, reinterpret_cast<const uint4&>(four));
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const float two[2] = {out[n][2 * half] * factor, out[n][2 * half + 1] * factor};
      store8(row + 8 * n + 2 * t, reinterpret_cast<const uint2&>(two));
    }
  }
}

// One item: `last` gives the last key that a query token sees.
template <class T, class Stored, int kHeadDim, class Last>
__device__ void attend_item(const Arguments& args, const ItemRows& rows, const ItemKeys& keys, int64_t split, Last last) {
  using Shape = decode::Shape<Stored, kHeadDim>;
  constexpr int kTiles = Shape::kTiles, kStages = Shape::kStages, kThreads = Shape::kThreads;
  char* shared = shared_memory<char>();
  char* stages = shared + Shape::kQueryBytes;
  StepList* lists = reinterpret_cast<StepList*>(stages + kStages * Shape::kStageBytes);
  int* limits = reinterpret_cast<int*>(lists + Shape::kLists);
  const int warp = warp_id(), lane = lane_id(), steps = keys.steps();
  const int first = 16 * kTiles * warp, used = (rows.count - first + 15) / 16;

  const auto copy_step = [&](int step) {
    if (step < steps) {
      const uint32_t stage = smem_address(stages) + step % kStages * Shape::kStageBytes;
      const StepList& list = lists[step % Shape::kLists];
      copy_keys<Stored, kHeadDim, kThreads>(stage, keys.keys.k, keys.head, list);
      copy_keys<Stored, kHeadDim, kThreads>(stage + Shape::kTileBytes, keys.keys.v, keys.head, list);
    }
    cp_async_commit();
  };

  SoftmaxRows<kHeadDim> state[kTiles];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) state[m].clear();
  if (steps > 0) {
    for (int i = threadIdx.x; i < kTileRows; i += kThreads) {
      int request, token, head;
      rows.number(args, i, &request, &token, &head);
      limits[i] = last(token);
    }
    for (int step = warp; step < kStages; step += Shape::kWarps) {
      Looked::up<Stored>(keys, step).template list<Stored>(lists[step], keys, step);
    }
    sync_block();

    typename Shape::Queries queries[kTiles];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int of_tile = first + 16 * m;
      if constexpr (Shape::kOfBytes) queries[m] = {shared + of_tile / 16 * ByteQueries<kHeadDim>::kBytes};
      if constexpr (Shape::kOfBytes || Shape::kQueriesInRegisters) {
        queries[m].load(rows.query<T>(args, of_tile + lane / 4), rows.query<T>(args, of_tile + lane / 4 + 8));
      } else {
        queries[m] = {smem_address(shared), of_tile};
        for (int row = of_tile + lane / 8; row < of_tile + 16; row += 4) {
          const T* from = rows.query<T>(args, row);
          for (int chunk = lane % 8; chunk < kHeadDim / 8; chunk += 8) {
            cp_async16(queries[m].tile + chunk_at<kHeadDim>(row, chunk), from + 8 * chunk, true);
          }
        }
      }
    }
    for (int step = 0; step < kStages - 1; ++step) copy_step(step);

    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      sync_block();
      // Looked up one step before it is copied.
      Looked upcoming;
      if (warp == 0) upcoming = Looked::up<Stored>(keys, step + kStages);
      copy_step(step + kStages - 1);
      const char *of_keys = stages + step % kStages * Shape::kStageBytes, *of_values = of_keys + Shape::kTileBytes;
      const StepList& list = lists[step % Shape::kLists];
      const int* of_warp = limits + first;
      if (used > 0 && list.key[0] <= of_warp[16 * kTiles - 1]) {
        if (kTiles == 2 && used > 1) {
          attend<kTiles, T, Stored>(state, queries, of_keys, of_values, list, of_warp, args.scale_log2);
        } else {
          attend<1, T, Stored>(state, queries, of_keys, of_values, list, of_warp, args.scale_log2);
        }
      }
      if (warp == 0) upcoming.list<Stored>(lists[(step + kStages) % Shape::kLists], keys, step + kStages);
    }
  }

#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = first + 16 * m + 8 * half + lane / 4;
      float sum = state[m].sum[half];
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      if (place >= rows.count) continue;
      int request, token, head;
      const int64_t row = split * args.requests * args.tokens * args.heads + rows.number(args, place, &request, &token, &head);
      if (lane % 4 == 0) args.partial_lse[row] = sum == 0 ? -kInfinity : state[m].highest[half] + log2f(sum);
      // Of a row that saw nothing, nobody reads the results.
      if (sum == 0) continue;
      float factor = 1 / sum;
      if constexpr (Shape::kOfBytes) factor *= 1 / Bytes<Stored>::kLargest;
      store_partial<Stored, kHeadDim>(args.partial_out + row * kHeadDim, state[m].out, half, factor);
    }
  }
}

// The share of `split` among splits of a range, in whole steps.
__device__ inline void share(int split, int splits, int* begin, int* end) {
  const int steps = (max(*end - *begin, 0) + kKeys - 1) / kKeys, each = (steps + splits - 1) / splits;
  // Compared before it is multiplied: there may be more splits than steps.
  const int first = min(split * each, steps), behind = min(first + each, steps);
  *end = min(*end, *begin + behind * kKeys);
  *begin += first * kKeys;
}

__device__ inline int within(int x, int most) { return min(max(x, 0), most); }

// Blocks of rows of a launch: of its requests, and at most of its groups.
__host__ __device__ inline int own_blocks(const Arguments& args) {
  return (args.tokens * args.group + kTileRows - 1) / kTileRows;
}
__host__ __device__ inline int prefix_blocks(const Arguments& args) {
  return static_cast<int>(int64_t{args.requests} * args.tokens * args.group / kTileRows) + args.prefix.groups;
}

// Finds the group that has block `block` of the rows of all groups, and makes `block` its number there; -1 where there are
// fewer.
__device__ inline int find_group(const Arguments& args, int* block) {
  const int per_request = args.tokens * args.group;
  for (int base = 0; base < args.prefix.groups; base += 32) {
    const int group = base + lane_id();
    int blocks = 0;
    if (group < args.prefix.groups) {
      const int first = within(args.prefix.request_ends[group], args.requests);
      const int requests = max(within(args.prefix.request_ends[group + 1], args.requests) - first, 0);
      blocks = (requests * per_request + kTileRows - 1) / kTileRows;
    }
    int up_to = blocks;  // those of all lanes up to this one
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = shfl(up_to, lane_id() - distance);
      if (lane_id() >= distance) up_to += other;
    }
    const uint32_t behind = ballot(*block < up_to);
    if (behind != 0) {
      const int lane = count_bits((behind & -behind) - 1);
      *block -= shfl(up_to - blocks, lane);
      return base + lane;
    }
    *block -= shfl(up_to, 31);
  }
  return -1;
}

// A block of threads is an item: those of prefixes first, which have more to do. Blocks of rows of the same keys are
// neighbours.
template <class T, class Stored, int kHeadDim>
__global__ void __launch_bounds__(Shape<T, kHeadDim>::kThreads) split_kernel(const __grid_constant__ Arguments args) {
  const int key_heads = args.heads / args.group, per_request = args.tokens * args.group;
  const int of_prefix = prefix_blocks(args), prefix_items = of_prefix * key_heads * args.prefix_splits;
  int item = blockIdx.x;
  if (item < prefix_items) {
    int block = item % of_prefix;
    item /= of_prefix;
    const int head = item % key_heads, split = item / key_heads, group = find_group(args, &block);
    if (group < 0) return;
    const Prefix& prefix = args.prefix;
    const int request = within(prefix.request_ends[group], args.requests);
    const int count = (within(prefix.request_ends[group + 1], args.requests) - request) * per_request;
    int begin = within(prefix.ends[group], prefix.tokens), end = within(prefix.ends[group + 1], prefix.tokens);
    share(split, args.prefix_splits, &begin, &end);
    const ItemRows rows = {request, block * kTileRows, min(kTileRows, count - block * kTileRows), head};
    const ItemKeys keys = {prefix.keys, nullptr, 0, 0, 1, begin, end, head};
    attend_item<T, Stored, kHeadDim>(args, rows, keys, args.own_splits + split, [](int) { return kAbsent - 1; });
  } else {
    item -= prefix_items;
    const int head = item % key_heads;
    item /= key_heads;
    const int block = item % own_blocks(args);
    item /= own_blocks(args);
    const int request = item % args.requests, split = item / args.requests;
    const Own& own = args.own;
    const int length = within(own.lengths[request], own.capacity);
    int begin = 0, end = length;
    share(split, args.own_splits, &begin, &end);
    const ItemRows rows = {request, block * kTileRows, min(kTileRows, per_request - block * kTileRows), head};
    const int* table = own.table == nullptr ? nullptr : own.table + request * own.table_stride;
    const ItemKeys keys = {own.keys, table, request, own.num_blocks, own.block_size, begin, end, head};
    const int before = length - args.tokens;
    attend_item<T, T, kHeadDim>(args, rows, keys, split, [before](int token) { return before + token; });
  }
}

// Each thread four columns of a row: sum of 2^(lse_i - lse) out_i over all splits, in their order.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Arguments args, int head_dim) {
  const int64_t thread = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x, row = thread / (head_dim / 4);
  const int64_t rows = int64_t{args.requests} * args.tokens * args.heads;
  const int column = static_cast<int>(thread % (head_dim / 4)) * 4, splits = args.own_splits + args.prefix_splits;
  if (row >= rows) return;
  float highest = -kInfinity;
  for (int split = 0; split < splits; ++split) highest = fmaxf(highest, args.partial_lse[split * rows + row]);
  float sum = 0, out[4] = {};
  for (int split = 0; split < splits; ++split) {
    const float lse = args.partial_lse[split * rows + row];
    if (lse == -kInfinity) continue;
    const float weight = exp2_approx(lse - highest);
    const uint4 bits = load16(args.partial_out + (split * rows + row) * head_dim + column);
    const float4& part = reinterpret_cast<const float4&>(bits);
    sum += weight;
    out[0] = fma_rn(weight, part.x, out[0]);
    out[1] = fma_rn(weight, part.y, out[1]);
    out[2] = fma_rn(weight, part.z, out[2]);
    out[3] = fma_rn(weight, part.w, out[3]);
  }
  const float factor = sum == 0 ? 0 : 1 / sum;
  store8(static_cast<T*>(args.out) + row * head_dim + column,
         make_uint2(pack<T>(out[0] * factor, out[1] * factor), pack<T>(out[2] * factor, out[3] * factor)));
  if (column == 0) args.lse[row] = sum == 0 ? -kInfinity : (highest + log2f(sum)) * attention::kLn2;
}

// Shared memory of a launch, whose blocks take items of both kinds.
template <class T, class Stored, int kHeadDim>
constexpr int kLaunchBytes = Shape<Stored, kHeadDim>::kSharedBytes > Shape<T, kHeadDim>::kSharedBytes
                                 ? Shape<Stored, kHeadDim>::kSharedBytes
                                 : Shape<T, kHeadDim>::kSharedBytes;

template <class T, class Stored, int kHeadDim>
int launch_splits(const Arguments& args, void* stream) {
  const int64_t key_heads = args.heads / args.group, own = int64_t{own_blocks(args)} * args.requests * args.own_splits;
  const int64_t blocks = key_heads * (own + int64_t{prefix_blocks(args)} * args.prefix_splits);
  return launch(split_kernel<T, Stored, kHeadDim>, dim3(static_cast<unsigned>(blocks)), dim3(Shape<T, kHeadDim>::kThreads),
                kLaunchBytes<T, Stored, kHeadDim>, stream, args);
}

template <class T>
int launch_merge(const Arguments& args, int head_dim, void* stream) {
  const int64_t threads = int64_t{args.requests} * args.tokens * args.heads * (head_dim / 4);
  const auto blocks = static_cast<unsigned>((threads + kMergeThreads - 1) / kMergeThreads);
  return launch(merge_kernel<T>, dim3(blocks), dim3(kMergeThreads), 0, stream, args, head_dim);
}

}  // namespace voco::decode
