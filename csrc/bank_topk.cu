// Exact top-k inner products on a GPU: the bank is streamed once, scores live in registers only.
//
//   block (x, y): queries 16 x .. or 64 x .., row tiles of part y              grid = (query tiles, parts)
//
//     rows of the bank -> shared memory, 3 stages of 128 bytes a row, by cp.async
//       |  warp w: rows 16 w .. 16 w + 15 of the tile (M), all queries of the block (N): mma.sync m16n8k16, or FFMA
//       v
//     128 x N scores in registers -> threshold of the query -> buffer (shared) -> sorted list (L2) -> last block merges
//
// Bank rows are the M side of the product also for one query: the padding is 8 or 16 queries, not 128 rows. All parts
// share one threshold per query, raised by atomicMax; see common/topk_lists.cuh for why the result does not depend on
// who comes first. Blocks of neighbouring query tiles read the same rows at the same time, out of L2.
//
// HBM traffic, compulsory: N * D elements of the bank, once. Limits: any N < 2^32, D, k, Q; 64-bit offsets.
// With ranges a warp takes rows one by one (each row serves one query, so there is no matrix product to be had).

#include "bank_topk.cuh"
#include "common/tensor_core.cuh"

namespace {

using bank::Block;
using bank::kLanes;
using bank::kSliceBytes;
using bank::kTileRows;
using bank::Share;
using bank::Task;
using topk::Key;

constexpr int kStages = 3;
constexpr int kChunks = kSliceBytes / 16;

// ---- the whole bank ---------------------------------------------------------------------------------------------

// Chunk c (16 bytes) of line r lies at c ^ (r % 8): neither the stores nor the fragment loads meet in a bank.
__device__ __forceinline__ unsigned char* chunk_at(unsigned char* tile, int line, int chunk) {
  return tile + line * kSliceBytes + (chunk ^ line % 8) * 16;
}
__device__ __forceinline__ const unsigned char* chunk_at(const unsigned char* tile, int line, int chunk) {
  return tile + line * kSliceBytes + (chunk ^ line % 8) * 16;
}

// One slice of kLines lines [.., dim] from line `first` of `lines` on; zeros beyond both ends. aligned: every line
// starts at a multiple of 16 bytes.
template <typename T, int kLines>
__device__ __forceinline__ void load_slice(unsigned char* tile, const T* source, int64_t first, int64_t lines,
                                           int64_t dim, int64_t slice, bool aligned) {
  constexpr int kValues = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < (kLines * kChunks + bank::kThreads - 1) / bank::kThreads; ++i) {
    const int at = i * bank::kThreads + threadIdx.x;
    if (kLines * kChunks % bank::kThreads != 0 && at >= kLines * kChunks) break;
    const int line = at / kChunks, chunk = at % kChunks;
    const int64_t column = slice * (kSliceBytes / static_cast<int>(sizeof(T))) + chunk * kValues;
    unsigned char* into = chunk_at(tile, line, chunk);
    const bool inside = first + line < lines && column < dim;
    const T* from = source + (inside ? (first + line) * dim + column : 0);
    if (aligned) {
      copy_async_16(into, from, inside);
    } else {
      Pack<T, kValues> pack;
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        if (inside && column + j < dim) {
          pack.value[j] = from[j];
        } else {
          narrow(0.0f, pack.value[j]);
        }
      }
      *reinterpret_cast<Pack<T, kValues>*>(into) = pack;
    }
  }
}

// Adds the product of a warp's 16 rows and the block's queries over one slice; `columns` are left from it on.
template <typename T, int kQueries>
struct Multiply {
  static __device__ __forceinline__ void add(float (&sum)[kQueries / 2], const unsigned char* rows,
                                             const unsigned char* queries, int64_t columns) {
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (step * 16 >= columns) break;
      FragmentA a;
      load_matrices(a.word, chunk_at(rows, warp * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < kQueries / 16; ++j) {
        uint32_t word[4];
        load_matrices(word, chunk_at(queries, j * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* c = sum + 8 * j + 4 * half;
          FragmentC fragment{{c[0], c[1], c[2], c[3]}};
          multiply_add(fragment, a, FragmentB{{word[2 * half], word[2 * half + 1]}}, T{});
#pragma unroll
          for (int i = 0; i < 4; ++i) c[i] = fragment.value[i];
        }
      }
    }
  }
};

// float32 without tensor cores, each thread with the same scores as in a fragment. A slice is summed by itself: shorter
// chains of additions, smaller error.
template <int kQueries>
struct Multiply<float, kQueries> {
  static __device__ __forceinline__ void add(float (&sum)[kQueries / 2], const unsigned char* rows,
                                             const unsigned char* queries, int64_t columns) {
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const int row = warp * 16 + lane / 4, pair = lane % 4 * 2;
    float slice[kQueries / 2] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks && chunk * 4 < columns; ++chunk) {
      const auto upper = *reinterpret_cast<const Pack<float, 4>*>(chunk_at(rows, row, chunk));
      const auto lower = *reinterpret_cast<const Pack<float, 4>*>(chunk_at(rows, row + 8, chunk));
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j) {
        const auto left = *reinterpret_cast<const Pack<float, 4>*>(chunk_at(queries, 8 * j + pair, chunk));
        const auto right = *reinterpret_cast<const Pack<float, 4>*>(chunk_at(queries, 8 * j + pair + 1, chunk));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          slice[4 * j] += upper.value[i] * left.value[i];
          slice[4 * j + 1] += upper.value[i] * right.value[i];
          slice[4 * j + 2] += lower.value[i] * left.value[i];
          slice[4 * j + 3] += lower.value[i] * right.value[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kQueries / 2; ++i) sum[i] += slice[i];
  }
};

template <int kQueries>
constexpr int kStageBytes = (kTileRows + kQueries) * kSliceBytes;

template <typename T, int kQueries>
__global__ void __launch_bounds__(bank::kThreads, 2) bank_topk_kernel(Task task, bool aligned) {
  CAPT_DYNAMIC_SHARED(unsigned char, stages);
  const CaptBankTopkCuda& args = task.args;
  const Share share = bank::share_of<kQueries>(task);
  Block<kQueries> block(stages + kStages * kStageBytes<kQueries>);
  block.clear(share.queries);
  constexpr int kColumns = kSliceBytes / sizeof(T);
  const int64_t slices = args.dim > kColumns ? (args.dim + kColumns - 1) / kColumns : 1;
  const int64_t steps = (share.end_tile - share.first_tile) * slices;

  // Where the loads are, kStages - 1 steps ahead of the product.
  int64_t load_tile = share.first_tile, load_slice_at = 0;
  int load_stage = 0;
  const auto load_next = [&] {
    if (load_tile < share.end_tile) {
      unsigned char* rows = stages + load_stage * kStageBytes<kQueries>;
      load_slice<T, kTileRows>(rows, static_cast<const T*>(args.rows), load_tile * kTileRows, args.n_rows, args.dim,
                               load_slice_at, aligned);
      load_slice<T, kQueries>(rows + kTileRows * kSliceBytes, static_cast<const T*>(args.queries), share.first_query,
                              args.n_query, args.dim, load_slice_at, aligned);
      load_stage = load_stage + 1 < kStages ? load_stage + 1 : 0;
      if (++load_slice_at == slices) {
        load_slice_at = 0;
        ++load_tile;
      }
    }
    copy_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load_next();

  float sum[kQueries / 2] = {};
  int64_t tile = share.first_tile, slice = 0;
  int stage = 0, round = 0;
  for (int64_t step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this stage has arrived, and everyone has left the one that is loaded next
    load_next();
    const unsigned char* rows = stages + stage * kStageBytes<kQueries>;
    stage = stage + 1 < kStages ? stage + 1 : 0;
    if (tile * kTileRows + threadIdx.x / kLanes * 16 < args.n_rows) {
      Multiply<T, kQueries>::add(sum, rows, rows + kTileRows * kSliceBytes, args.dim - slice * kColumns);
    }
    if (++slice == slices) {
      bank::select<kQueries>(task, block, share, sum, tile, round, [] { __syncthreads(); });
      slice = 0;
      ++tile;
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) sum[i] = 0.0f;
    }
  }
  __syncthreads();
  bank::finish(task, block, share, [] { __syncthreads(); });
}

// ---- ranges -----------------------------------------------------------------------------------------------------

constexpr int kGroup = 4;       // rows whose reads a warp keeps in flight
constexpr int kRangeWarps = 8;  // at most, each with a part of its own

struct Range {
  int64_t start, stop;
};

__device__ __forceinline__ Range range_at(const CaptBankTopkCuda& args, int64_t list, int64_t s) {
  const int64_t* bounds = args.ranges + (list * args.n_ranges + s) * 2;
  const int64_t start = bounds[0] > 0 ? bounds[0] : 0;
  const int64_t stop = bounds[1] < args.n_rows ? bounds[1] : args.n_rows;
  return {start, stop > start ? stop : start};
}

// Scores of up to kGroup rows, that of row first + i in lane i. kValues: elements of one load.
template <typename T, int kValues>
__device__ __forceinline__ float group_scores(const CaptBankTopkCuda& args, int64_t query, int64_t first, int64_t rows,
                                              int lane) {
  const T* q = static_cast<const T*>(args.queries) + query * args.dim;
  const T* row = static_cast<const T*>(args.rows) + first * args.dim;
  float sum[kGroup] = {};
  for (int64_t c = lane * kValues; c < args.dim; c += kLanes * kValues) {
    const auto left = *reinterpret_cast<const Pack<T, kValues>*>(q + c);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const auto right = *reinterpret_cast<const Pack<T, kValues>*>(row + (i < rows ? i : 0) * args.dim + c);
#pragma unroll
      for (int j = 0; j < kValues; ++j) sum[i] += widen(left.value[j]) * widen(right.value[j]);
    }
  }
  float mine = 0.0f;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum[i] += __shfl_xor_sync(topk::kWholeWarp, sum[i], step);
    if (lane == i) mine = sum[i];
  }
  return mine;
}

// One warp: the rows of one part of one list, in the order of the ranges.
template <typename T, int kValues>
__device__ __forceinline__ void scan_ranges(const Task& task, int64_t list_number, int64_t part, topk::List& list,
                                            Key* buffer, int lane) {
  const CaptBankTopkCuda& args = task.args;
  const int64_t query = list_number / args.n_pairs;
  const int k = static_cast<int>(args.k);
  int64_t total = 0;
  for (int64_t s = 0; s < args.n_ranges; ++s) {
    const Range range = range_at(args, list_number, s);
    total += range.stop - range.start;
  }
  const int64_t begin = total / task.parts * part + total % task.parts * part / task.parts;
  const int64_t end = total / task.parts * (part + 1) + total % task.parts * (part + 1) / task.parts;
  float threshold = topk::kLowest;
  int buffered = 0;
  int64_t before = 0;  // rows of the ranges so far
  for (int64_t s = 0; s < args.n_ranges && before < end; ++s) {
    const Range range = range_at(args, list_number, s);
    const int64_t first = range.start + (begin > before ? begin - before : 0);
    const int64_t last = before + (range.stop - range.start) < end ? range.stop : range.start + (end - before);
    before += range.stop - range.start;
    if (first >= last) continue;
    // A row that an earlier range holds as well belongs to that one.
    bool overlaps = false;
    for (int64_t other = lane; other < s; other += kLanes) {
      const Range earlier = range_at(args, list_number, other);
      overlaps |= earlier.start < last && first < earlier.stop && earlier.start < earlier.stop;
    }
    overlaps = __any_sync(topk::kWholeWarp, overlaps);
    for (int64_t row = first; row < last; row += kGroup) {
      const int64_t rows = last - row < kGroup ? last - row : kGroup;
      const float score = group_scores<T, kValues>(args, query, row, rows, lane);
      if (task.parts > 1 && (row - first) / kGroup % 8 == 7) {
        const uint32_t code = topk::load_l2(task.threshold + list_number);
        if (code != 0) threshold = fmaxf(threshold, topk::score_of(code));
      }
      Key key = 0;
      if (lane < rows && score >= threshold) {
        key = topk::make_key(score, row + lane);
        if (key <= list.last || bank::excluded(args, query, row + lane)) key = 0;
        for (int64_t other = 0; overlaps && key != 0 && other < s; ++other) {
          const Range earlier = range_at(args, list_number, other);
          if (row + lane >= earlier.start && row + lane < earlier.stop) key = 0;
        }
      }
      const unsigned found = __ballot_sync(topk::kWholeWarp, key != 0);
      if (found == 0) continue;
      if (buffered + __popc(found) > topk::kBuffered) {
        topk::fold(list, k, lane < buffered ? buffer[lane] : 0, lane);
        buffered = 0;
        const uint32_t code = topk::code_of(list.last);
        if (code != 0) {
          threshold = fmaxf(threshold, topk::score_of(code));
          if (lane == 0 && task.parts > 1) atomicMax(task.threshold + list_number, code);
        }
      }
      if (key != 0) buffer[buffered + __popc(found & ((1u << lane) - 1u))] = key;
      buffered += __popc(found);
      __syncwarp();
    }
  }
  topk::fold(list, k, lane < buffered ? buffer[lane] : 0, lane);
  if (lane == 0 && task.parts > 1 && list.last != 0) {
    atomicMax(task.threshold + list_number, topk::code_of(list.last));
  }
}

// Block (x, y): list x (and x + gridDim.x, ..), parts blockDim.x / 32 * y .. of it, one for each warp.
template <typename T, int kValues>
__global__ void __launch_bounds__(kLanes* kRangeWarps, 2) bank_topk_ranges_kernel(Task task) {
  CAPT_SHARED(Key, buffers, kRangeWarps * topk::kBuffered);
  CAPT_SHARED(int, last_block, 1);
  const CaptBankTopkCuda& args = task.args;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int k = static_cast<int>(args.k);
  const int64_t part = int64_t{blockIdx.y} * (blockDim.x / kLanes) + warp;
  Key* buffer = buffers + warp * topk::kBuffered;
  for (int64_t number = blockIdx.x; number < args.n_query * args.n_pairs; number += gridDim.x) {
    topk::List list{bank::list_of(task, number, part), 0, 0};
    scan_ranges<T, kValues>(task, number, part, list, buffer, lane);
    bool writes = warp == 0;
    if (task.parts > 1) {
      if (lane == 0) task.lengths[number * task.parts + part] = list.length;
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) last_block[0] = atomicAdd(task.arrived + number, 1u) + 1 == gridDim.y;
      __syncthreads();
      writes = writes && last_block[0] != 0;
      if (writes) {
        __threadfence();
        list = {reinterpret_cast<Key*>(args.index) + number * k, 0, 0};
        topk::merge_parts(list, k, task.keys + number * task.parts * k, task.lengths + number * task.parts, task.parts,
                          topk::load_l2(task.threshold + number), buffer, lane);
      }
    }
    if (writes) topk::write_out(list, k, args.scores + number * k, args.index + number * k, lane);
    __syncthreads();
  }
}

// ---- planning and launch ----------------------------------------------------------------------------------------

constexpr int64_t kBudget = int64_t{64} << 20;  // bytes of workspace
constexpr int64_t kMostParts = 1024;
constexpr int kNotSupported = 801;  // cudaErrorNotSupported

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    cudaGetLastError();
    count = 132;
  }
  return count;
#else
  return 2;
#endif
}

int set_to_zero(void* pointer, int64_t bytes, void* stream) {
#ifdef __CUDACC__
  return static_cast<int>(cudaMemsetAsync(pointer, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
#else
  (void)stream;
  memset(pointer, 0, static_cast<size_t>(bytes));
  return 0;
#endif
}

struct Layout {
  bool hopper;
  int64_t queries;  // of a tile
  int64_t lists, parts;
  int64_t zeros, bytes;  // of workspace: cleared before the launch, all
};

int64_t element_bytes(const CaptBankTopkCuda& args) { return args.dtype == CAPT_FLOAT32 ? 4 : 2; }

bool is_aligned(const CaptBankTopkCuda& args) {
  return args.dim * element_bytes(args) % 16 == 0 &&
         (reinterpret_cast<uintptr_t>(args.rows) | reinterpret_cast<uintptr_t>(args.queries)) % 16 == 0;
}

// The number of parts with the least (waves of blocks) * (tiles of a part): whole waves, no more lists than pay.
int64_t whole_bank_parts(int64_t query_tiles, int64_t row_tiles, int64_t resident, int64_t most) {
  constexpr int64_t kOwnCost = 2;  // filling the pipeline, the first folds and the merge, in tiles
  int64_t best = 1, least = INT64_MAX;
  for (int64_t parts = 1; parts <= smaller(row_tiles, most);) {
    const int64_t tiles = divide_up(row_tiles, parts);
    const int64_t cost = divide_up(query_tiles * parts, resident) * (tiles + kOwnCost);
    if (cost < least) {
      least = cost;
      best = parts;
    }
    if (tiles == 1) break;
    parts = divide_up(row_tiles, tiles - 1);  // parts in between have as many tiles, and are more blocks
  }
  return best;
}

Layout layout_of(const CaptBankTopkCuda& args) {
  Layout layout{};
  layout.lists = args.n_query * args.n_pairs;
  const int64_t most =
      larger(1, smaller(kMostParts, (kBudget - 8 * layout.lists) / larger(1, layout.lists * (8 * args.k + 4))));
  const int64_t processors = multiprocessors();
  layout.parts = args.parts;
  if (args.ranges != nullptr) {
    // Sixteen warps a multiprocessor; whole blocks of kRangeWarps parts once there are that many.
    const int64_t wanted = smaller(most, smaller(512, divide_up(processors * 16, larger(1, layout.lists))));
    if (layout.parts == 0) layout.parts = wanted >= kRangeWarps ? wanted / kRangeWarps * kRangeWarps : 1;
  } else {
    layout.hopper = args.path != CAPT_BANK_TOPK_PORTABLE && bank::hopper_can(args);
    // A bank that fits the L2 cache is cheap to read again, and small query tiles merge on more blocks.
    const bool cached = args.n_rows * args.dim * element_bytes(args) <= (int64_t{16} << 20) && args.n_query <= 256;
    layout.queries = args.n_query <= 16 || cached ? 16 : args.n_query <= 64 || !layout.hopper ? 64 : 256;
    if (args.tile > 0) layout.queries = args.tile;
    const int64_t resident = processors * (layout.hopper && layout.queries > 16 ? 1 : 2);
    if (layout.parts == 0) {
      layout.parts =
          whole_bank_parts(divide_up(args.n_query, layout.queries), divide_up(args.n_rows, kTileRows), resident, most);
    }
  }
  if (layout.parts == 1) return layout;
  layout.zeros = divide_up(layout.lists * 8, 16) * 16;
  layout.bytes = layout.zeros + layout.lists * layout.parts * (8 * args.k + 4);
  return layout;
}

template <typename T, int kQueries>
int launch_portable(const Task& task, const Layout& layout, void* stream) {
  constexpr int kBytes = kStages * kStageBytes<kQueries> + Block<kQueries>::kBytes;
  static_assert(kBytes <= 101376, "more shared memory than a block has on sm_86 and sm_89");
  auto* kernel = bank_topk_kernel<T, kQueries>;
  if (const int error = CAPT_ALLOW_SHARED(kernel, kBytes); error != 0) return error;
  const dim3 grid(static_cast<unsigned>(divide_up(task.args.n_query, kQueries)), static_cast<unsigned>(layout.parts));
  const bool aligned = is_aligned(task.args);
  CAPT_LAUNCH_SHARED(kernel, grid, dim3(bank::kThreads), kBytes, stream, task, aligned);
  return CAPT_LAST_ERROR();
}

template <typename T, int kValues>
int launch_ranges(const Task& task, const Layout& layout, void* stream) {
  const int64_t warps = layout.parts % kRangeWarps == 0 ? kRangeWarps : 1;
  const dim3 grid(static_cast<unsigned>(smaller(layout.lists, INT32_MAX)), static_cast<unsigned>(layout.parts / warps));
  auto* kernel = bank_topk_ranges_kernel<T, kValues>;
  CAPT_LAUNCH(kernel, grid, dim3(static_cast<unsigned>(warps * kLanes)), stream, task);
  return CAPT_LAST_ERROR();
}

template <typename T>
int launch(const Task& task, const Layout& layout, void* stream) {
  if (task.args.ranges != nullptr) {
    return is_aligned(task.args) ? launch_ranges<T, 16 / sizeof(T)>(task, layout, stream)
                                 : launch_ranges<T, 1>(task, layout, stream);
  }
  return layout.queries == 16 ? launch_portable<T, 16>(task, layout, stream)
                              : launch_portable<T, 64>(task, layout, stream);
}

}  // namespace

extern "C" int64_t capt_bank_topk_cuda_workspace(CaptBankTopkCuda* args) {
  const Layout layout = layout_of(*args);
  args->parts = static_cast<int32_t>(layout.parts);
  return layout.bytes;
}

extern "C" int capt_bank_topk_cuda(const CaptBankTopkCuda* args, void* stream) {
  const Layout layout = layout_of(*args);
  if (layout.lists == 0) return 0;
  if (args->path == CAPT_BANK_TOPK_HOPPER && !layout.hopper) return kNotSupported;
  Task task{*args, static_cast<int>(layout.parts), nullptr, nullptr, nullptr, nullptr};
  if (layout.parts > 1) {
    auto* memory = static_cast<unsigned char*>(args->workspace);
    const int64_t lengths = layout.lists * layout.parts;
    task.threshold = reinterpret_cast<uint32_t*>(memory);
    task.arrived = task.threshold + layout.lists;
    task.keys = reinterpret_cast<Key*>(memory + layout.zeros);
    task.lengths = reinterpret_cast<int*>(task.keys + lengths * args->k);
    if (const int error = set_to_zero(memory, layout.zeros, stream); error != 0) return error;
  }
  if (layout.hopper) return bank::launch_hopper(task, static_cast<int>(layout.queries), stream);
  switch (args->dtype) {
    case CAPT_FLOAT32:
      return launch<float>(task, layout, stream);
    case CAPT_FLOAT16:
      return launch<HalfBits>(task, layout, stream);
    default:
      return launch<BfloatBits>(task, layout, stream);
  }
}
