// Exact top-k lists of 64-bit keys: survivors of a threshold are buffered in shared memory and folded, 32 at a time and
// by one warp, into a sorted list in global memory (in practice in the L2 cache), so that k has no limit.
//
// A key orders by score, then by lower row, and no two keys of a list are equal: the k largest keys are one set,
// whatever the order in which blocks and threads meet. Thresholds only ever drop keys that k others beat, so stale
// ones cost time and never change the result.
#pragma once

#include "common/device.cuh"

namespace topk {

using Key = unsigned long long;  // ordered score << 32 | ~row; 0: none

constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
constexpr int kLanes = 32;
constexpr int kBuffered = kLanes;            // survivors of a query between two folds
constexpr float kLowest = -3.402823466e38f;  // first threshold: drops -inf, and NaN fails every comparison

// Larger floats have larger codes; 0 is the code of no number. -0 and +0 share one.
__device__ __forceinline__ uint32_t ordered(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float score_of(uint32_t code) {
  return __uint_as_float(code & 0x80000000u ? code ^ 0x80000000u : ~code);
}
__device__ __forceinline__ Key make_key(float score, int64_t row) {
  return Key{ordered(score)} << 32 | static_cast<uint32_t>(~row);
}
__device__ __forceinline__ uint32_t code_of(Key key) { return static_cast<uint32_t>(key >> 32); }
__device__ __forceinline__ int64_t row_of(Key key) { return static_cast<uint32_t>(~key); }

// Reads past the first-level cache, which may hold a line from before another block wrote to it.
template <typename T>
__device__ __forceinline__ T load_l2(const T* source) {
#ifdef __CUDACC__
  return __ldcg(source);
#else
  return *source;
#endif
}

__device__ __forceinline__ Key larger(Key a, Key b) { return a > b ? a : b; }
__device__ __forceinline__ Key smaller(Key a, Key b) { return a < b ? a : b; }

// Bitonic sort over the lanes of a warp, largest in lane 0.
__device__ __forceinline__ Key sort_lanes(Key key, int lane) {
#pragma unroll 1
  for (int width = 2; width <= kLanes; width *= 2) {
#pragma unroll 1
    for (int step = width / 2; step > 0; step /= 2) {
      const Key other = __shfl_xor_sync(kWholeWarp, key, step);
      const bool keeps_larger = ((lane & step) == 0) == ((lane & width) == 0);
      key = keeps_larger ? larger(key, other) : smaller(key, other);
    }
  }
  return key;
}

// How many lanes hold more than `key`, their values descending from lane 0.
__device__ __forceinline__ int lanes_above(Key sorted, Key key) {
  int count = 0;
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    if (__shfl_sync(kWholeWarp, sorted, count + step - 1) > key) count += step;
  }
  return count + (__shfl_sync(kWholeWarp, sorted, count) > key);
}

// A sorted list and how far it is filled; the whole warp holds the same values.
struct List {
  Key* keys;   // [k], global memory, descending
  int length;  // filled so far
  Key last;    // the k-th key, 0 until the list is full: smaller keys need not come
};

// Merges one key a lane (0: none) into a list in place. Entries move towards the end only, so chunks are moved from the
// end to the front; the walk stops where nothing moves any more.
__device__ __forceinline__ void fold(List& list, int k, Key key, int lane) {
  key = sort_lanes(key, lane);
  const int added = __popc(__ballot_sync(kWholeWarp, key != 0));
  const Key most = __shfl_sync(kWholeWarp, key, 0);
  int above = 0;  // entries of the list before my key
  int start = (list.length - 1) / kLanes * kLanes;
  Key next = start + lane < list.length ? load_l2(list.keys + start + lane) : 0;
  for (; list.length > 0 && start >= 0; start -= kLanes) {
    const Key entry = next;
    const int at = start + lane;
    if (start > 0) next = load_l2(list.keys + at - kLanes);
    if (__shfl_sync(kWholeWarp, entry, kLanes - 1) > most) {
      above += start + kLanes;
      break;
    }
    above += lanes_above(entry, key);
    const int moved = at + lanes_above(key, entry);
    if (at < list.length && moved < k) list.keys[moved] = entry;
  }
  if (key != 0 && lane + above < k) list.keys[lane + above] = key;
  list.length = list.length + added < k ? list.length + added : k;
  __syncwarp();
  list.last = list.length == k ? load_l2(list.keys + k - 1) : 0;
}

// Turns a finished list, which may lie in `index` itself, into scores and row numbers.
__device__ __forceinline__ void write_out(const List& list, int k, float* scores, int64_t* index, int lane) {
  __syncwarp();
  for (int i = lane; i < k; i += kLanes) {
    const Key key = i < list.length ? load_l2(list.keys + i) : 0;
    scores[i] = key != 0 ? score_of(code_of(key)) : __uint_as_float(0xFF800000u);
    index[i] = key != 0 ? row_of(key) : -1;
  }
}

// Merges the lists of all parts of a query: every lane walks lists of its own until one falls below what is still
// needed. keys: [parts, k], lengths: [parts], buffer: 32 keys of shared memory, code: no score below it is needed.
__device__ __forceinline__ void merge_parts(List& list, int k, const Key* keys, const int* lengths, int parts,
                                            uint32_t code, Key* buffer, int lane) {
  const Key least = Key{code} << 32;
  int part = lane, at = 0, length = part < parts ? load_l2(lengths + part) : 0, buffered = 0;
  for (bool more = true; more;) {
    Key key = 0;
    if (part < parts) {
      if (at < length) key = load_l2(keys + int64_t{part} * k + at);
      if (key > list.last && key >= least) {
        ++at;
      } else {  // the list descends: the rest of it is not needed either
        key = 0;
        part += kLanes;
        at = 0;
        length = part < parts ? load_l2(lengths + part) : 0;
      }
    }
    const unsigned found = __ballot_sync(kWholeWarp, key != 0);
    more = __any_sync(kWholeWarp, part < parts);
    if (buffered + __popc(found) > kBuffered || !more) {
      fold(list, k, lane < buffered ? buffer[lane] : 0, lane);
      buffered = 0;
    }
    if (key != 0) buffer[buffered + __popc(found & ((1u << lane) - 1u))] = key;
    buffered += __popc(found);
    __syncwarp();
  }
}

}  // namespace topk
