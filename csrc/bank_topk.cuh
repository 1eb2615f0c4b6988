// What the portable and the Hopper kernel of bank_topk share: the filter behind the product, and how a block keeps,
// ends and merges its lists.
#pragma once

#include "bank_topk_cuda.h"
#include "common/topk_lists.cuh"

namespace bank {

using topk::Key;
using topk::kLanes;

constexpr int kTileRows = 128;             // bank rows of a tile: 16 for each of the warps that filter
constexpr int kWarps = kTileRows / 16;     // warps that filter
constexpr int kThreads = kWarps * kLanes;  // threads that filter: the first ones of a block
constexpr int kSliceBytes = 128;           // of a row or query, in one stage of shared memory
constexpr int kRefresh = 4;                // tiles between two looks at the thresholds of other blocks

// A call and its workspace.
struct Task {
  CaptBankTopkCuda args;
  int parts;            // lists per (query, pair)
  uint32_t* threshold;  // [lists] ordered score below which nothing is needed, raised by all parts; 0 at first
  uint32_t* arrived;    // [lists] or [query tiles]: parts that are done; 0 at first
  int* lengths;         // [lists, parts]
  Key* keys;            // [lists, parts, k]; with one part the list is built in args.index
};

// Queries of a block, in shared memory.
template <int kQueries>
struct Block {
  Key* buffer;       // [kQueries, 32]
  Key* last;         // [kQueries] k-th key of the list, 0 until it is full
  float* threshold;  // [kQueries] a lower score is not needed
  int* count;        // [kQueries] keys that asked for a place in the buffer
  int* length;       // [kQueries] of the list
  int* wanted;       // [3] of the last rounds: 1 a buffer is full, 2 and some key found no place

  static constexpr int kBytes = kQueries * (topk::kBuffered * 8 + 8 + 3 * 4) + 4 * 4;

  __device__ explicit Block(unsigned char* memory) {
    buffer = reinterpret_cast<Key*>(memory);
    last = buffer + kQueries * topk::kBuffered;
    threshold = reinterpret_cast<float*>(last + kQueries);
    count = reinterpret_cast<int*>(threshold + kQueries);
    length = count + kQueries;
    wanted = length + kQueries;
  }

  // Queries beyond the last one get a threshold that no product of their zeros reaches. A barrier must follow.
  __device__ void clear(int64_t queries) {
    for (int q = threadIdx.x; q < kQueries; q += blockDim.x) {
      last[q] = 0;
      threshold[q] = q < queries ? topk::kLowest : __uint_as_float(0x7F800000u);
      count[q] = 0;
      length[q] = 0;
    }
    if (threadIdx.x < 3) wanted[threadIdx.x] = 0;
  }
};

// What a block works on: up to kQueries queries from first_query on, a share of the row tiles.
struct Share {
  int64_t first_query, queries;
  int64_t first_tile, end_tile;
};

template <int kQueries>
__device__ __forceinline__ Share share_of(const Task& task) {
  const int64_t tiles = (task.args.n_rows + kTileRows - 1) / kTileRows;
  const int64_t first = int64_t{blockIdx.x} * kQueries;
  const int64_t left = task.args.n_query - first;
  return {first, left < kQueries ? left : kQueries, tiles * blockIdx.y / task.parts,
          tiles * (blockIdx.y + 1) / task.parts};
}

__device__ __forceinline__ bool excluded(const CaptBankTopkCuda& args, int64_t query, int64_t row) {
  if (args.row_ids == nullptr) return false;
  const int64_t id = args.exclude[query];
  return id >= 0 && args.row_ids[row] == id;
}

// One round of a thread over its products: value[4 * j + i] belongs to row first_row + (i < 2 ? 0 : 8) and to query
// 8 * j + 2 * (lane % 4) + i % 2 of the block. Survivors go to the buffers and leave -inf behind; those which found
// their buffer full stay for the next round.
template <int kQueries>
__device__ __forceinline__ void filter(const Task& task, const Block<kQueries>& block, float (&value)[kQueries / 2],
                                       int64_t first_row, int64_t first_query, int round) {
  const int pair = threadIdx.x % 4 * 2;
  int wanted = 0;
#pragma unroll
  for (int j = 0; j < kQueries / 8; ++j) {
    const int q = 8 * j + pair;
    const float low = block.threshold[q], next_low = block.threshold[q + 1];
    float* v = value + 4 * j;
    if (v[0] >= low || v[1] >= next_low || v[2] >= low || v[3] >= next_low) {
      float kept[4] = {v[0], v[1], v[2], v[3]};
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        // Rotated rather than indexed: registers have no addresses.
        const float score = kept[0];
        const int query = q + i % 2;
        const int64_t row = first_row + i / 2 * 8;
        bool stays = false;
        if (score >= (i % 2 ? next_low : low) && row < task.args.n_rows) {
          const Key key = topk::make_key(score, row);
          if (key > block.last[query] && !excluded(task.args, first_query + query, row)) {
            const int place = atomicAdd(block.count + query, 1);
            if (place < topk::kBuffered) block.buffer[query * topk::kBuffered + place] = key;
            stays = place >= topk::kBuffered;
            if (place >= topk::kBuffered - 1) wanted = stays || wanted == 2 ? 2 : 1;
          }
        }
        kept[0] = kept[1];
        kept[1] = kept[2];
        kept[2] = kept[3];
        kept[3] = stays ? score : __uint_as_float(0xFF800000u);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = kept[i];
    }
  }
  if (wanted != 0) atomicMax(block.wanted + round % 3, wanted);
}

__device__ __forceinline__ Key* list_of(const Task& task, int64_t list, int64_t part) {
  return task.parts == 1 ? reinterpret_cast<Key*>(task.args.index) + list * task.args.k
                         : task.keys + (list * task.parts + part) * task.args.k;
}

// Folds the buffers of a warp's own queries (q % kWarps == warp) that hold at least `least` keys.
template <int kQueries>
__device__ __forceinline__ void fold_buffers(const Task& task, const Block<kQueries>& block, const Share& share,
                                             int least) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int k = static_cast<int>(task.args.k);
  for (int q = warp; q < kQueries; q += kWarps) {
    const int asked = block.count[q], held = asked < topk::kBuffered ? asked : topk::kBuffered;
    if (held < least) continue;
    topk::List list{list_of(task, share.first_query + q, blockIdx.y), block.length[q], block.last[q]};
    topk::fold(list, k, lane < held ? block.buffer[q * topk::kBuffered + lane] : 0, lane);
    if (lane == 0) {
      block.count[q] = 0;
      block.length[q] = list.length;
      block.last[q] = list.last;
      const uint32_t code = topk::code_of(list.last);
      if (code != 0) {
        block.threshold[q] = fmaxf(block.threshold[q], topk::score_of(code));
        if (task.parts > 1) atomicMax(task.threshold + share.first_query + q, code);
      }
    }
    __syncwarp();
  }
}

// Thresholds that other blocks raised meanwhile; by the warp that owns the query.
template <int kQueries>
__device__ __forceinline__ void refresh(const Task& task, const Block<kQueries>& block, const Share& share) {
  const int q = threadIdx.x / kLanes + kWarps * (threadIdx.x % kLanes);
  if (q < share.queries) {
    const uint32_t code = topk::load_l2(task.threshold + share.first_query + q);
    if (code != 0) block.threshold[q] = fmaxf(block.threshold[q], topk::score_of(code));
  }
  __syncwarp();
}

// All products of a tile through the filter, by the kThreads threads that `barrier` joins. first_row: of this thread.
template <int kQueries, typename Barrier>
__device__ __forceinline__ void select(const Task& task, const Block<kQueries>& block, const Share& share,
                                       float (&value)[kQueries / 2], int64_t tile, int& round, Barrier barrier) {
  const int64_t first_row = tile * kTileRows + threadIdx.x / kLanes * 16 + threadIdx.x % kLanes / 4;
  const bool look = task.parts > 1 && tile % kRefresh == kRefresh - 1;
  for (bool again = true; again; ++round) {
    filter<kQueries>(task, block, value, first_row, share.first_query, round);
    barrier();
    const int wanted = block.wanted[round % 3];
    // Everyone read this entry before the barrier of the last round, and nobody writes it before that of the next.
    if (threadIdx.x == 0) block.wanted[(round + 2) % 3] = 0;
    again = wanted == 2;
    if (wanted != 0 || look) {
      if (look) refresh(task, block, share);
      fold_buffers(task, block, share, topk::kBuffered);
      barrier();
    }
  }
}

// After the last tile, by the same threads: the last keys, and the results if this is the only part or the last one to
// arrive.
template <int kQueries, typename Barrier>
__device__ __forceinline__ void finish(const Task& task, const Block<kQueries>& block, const Share& share,
                                       Barrier barrier) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int k = static_cast<int>(task.args.k);
  fold_buffers(task, block, share, 1);
  if (task.parts > 1) {
    for (int q = warp; q < share.queries; q += kWarps) {
      if (lane == 0) task.lengths[(share.first_query + q) * task.parts + blockIdx.y] = block.length[q];
    }
    __threadfence();
    barrier();
    if (threadIdx.x == 0) {
      block.wanted[0] = atomicAdd(task.arrived + blockIdx.x, 1u) + 1 == static_cast<unsigned>(task.parts);
    }
    barrier();
    if (block.wanted[0] == 0) return;
    __threadfence();
  }
  for (int q = warp; q < share.queries; q += kWarps) {
    const int64_t number = share.first_query + q;
    topk::List list{reinterpret_cast<Key*>(task.args.index) + number * k, 0, 0};
    if (task.parts > 1) {
      topk::merge_parts(list, k, task.keys + number * task.parts * k, task.lengths + number * task.parts, task.parts,
                        topk::load_l2(task.threshold + number), block.buffer + q * topk::kBuffered, lane);
    } else {
      list.length = block.length[q];
    }
    topk::write_out(list, k, task.args.scores + number * k, task.args.index + number * k, lane);
  }
}

// In csrc/bank_topk_hopper.cu. queries: of a tile, 16, 64 or 256.
bool hopper_can(const CaptBankTopkCuda& args);
int launch_hopper(const Task& task, int queries, void* stream);

}  // namespace bank
