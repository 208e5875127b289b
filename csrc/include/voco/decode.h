// Decoding: the newest tokens of many requests over their own keys, and over a prefix that a group of requests shares, for
// 16-bit numbers. No function throws; each returns a CUDA error code, 0 for success.
//
// Keys are cut into splits, whose results are merged by their log-sum-exp. What splits there are is the caller's choice and
// part of the launch; lengths, tables and groups are read on the device, so that a CUDA graph may be replayed with others.
// What they say beyond the memory that they speak of is cut off.
#pragma once

#include <cstdint>

#include "voco/dtype.h"

namespace voco::decode {

// [outer, tokens, heads, D], strides in elements; columns are neighbours, and rows begin at multiples of 16 bytes. Outer are
// requests, or the blocks of a paged cache.
struct Rows {
  const void* data;
  int64_t outer, token, head;
};

struct Scales {  // [tokens, heads], strides in elements
  const float* data;
  int64_t token, head;
};

struct Keys {
  Rows k, v;
  Scales k_scale, v_scale;  // where they are quantised
};

struct Own {
  Keys keys;
  const int* lengths;  // [requests], the query tokens' keys included
  const int* table;    // [requests, capacity / block_size], or null: then a request is a block
  int64_t table_stride;
  int num_blocks, block_size;
  int capacity;  // the most keys of a request
};

struct Prefix {
  Keys keys;
  const int* ends;          // [groups + 1]: tokens of group g are ends[g] to ends[g + 1] - 1
  const int* request_ends;  // [groups + 1], likewise
  int groups, tokens;
};

struct Arguments {
  Rows q;
  Own own;
  Prefix prefix;
  void* out;           // [requests, tokens, heads, D], contiguous
  float* lse;          // [requests, tokens, heads], natural logarithm
  float* partial_out;  // [own_splits + prefix_splits, requests, tokens, heads, D]
  float* partial_lse;  // [own_splits + prefix_splits, requests, tokens, heads], in base 2
  int requests, tokens, heads, group;  // tokens of a request; query heads; query heads that share a head of keys
  int own_splits, prefix_splits;       // at least 1, and 0 only where there is no prefix
  float scale_log2;                    // factor on scores, times log2(e)
};

// `dtype` is kFloat16 or kBFloat16, `stored`, that of the prefix, the same or kInt8 or kFloat8, `head_dim` 64, 96, 128 or
// 256; else cudaErrorInvalidValue. Two launches on `stream` of the current device, none without requests.
int run(const Arguments& arguments, Dtype dtype, Dtype stored, int head_dim, void* stream);

// Bytes of shared memory that a block takes, the same for both types of queries; 0 where there is no kernel.
int shared_bytes(int head_dim, Dtype stored);

// Of run(): the first launch, for prefixes of one type of numbers each.
int run_splits(const Arguments& arguments, Dtype dtype, int head_dim, void* stream);
int run_splits_int8(const Arguments& arguments, Dtype dtype, int head_dim, void* stream);
int run_splits_float8(const Arguments& arguments, Dtype dtype, int head_dim, void* stream);

}  // namespace voco::decode
