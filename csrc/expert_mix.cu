// Experts of a mixture and their weighted sum.
//
//   hidden[e, n]       = dropout(QuickGELU(w_in[e] x[n] + b_in[e]))           first product
//   contribution[e, n] = weights[n, e] (w_out[e] hidden[e, n] + b_out[e])     second product, weight in its epilogue
//   y[n]               = sum over the experts with weight != 0, e ascending   combine, float32, rounded once
//
//   route    (gather path) one block an expert: its tokens in ascending order, and each token's place in that list.
//            Expert e owns rows [e * tokens, e * tokens + count[e]) of hidden and contribution: no offsets to wait for.
//   product  block = a tile of rows of one expert x a tile of columns x a split of the depth. Tiles are found from the
//            counts on the device, so the host never waits for the routing. Rows and matrix come in through
//            asynchronous copies, two or three stages of 128 bytes a row, padded to 144 against bank conflicts; 16-bit
//            storage is multiplied by tensor cores (16x8x16), float32 by multiply-adds.
//   dense path: every token is a row of every expert; a tile without a positive weight is left out.
//
//            depth ->  stage 0   stage 1   stage 2                warps, 128 x 128:  | 64x32 64x32 64x32 64x32 |
//      rows     |    [128 bytes|128 bytes|128 bytes] 16 padding                      | 64x32 64x32 64x32 64x32 |
//
// Limits: any sizes, 64-bit offsets; 16-byte copies where depth and addresses allow, single elements elsewhere. No
// atomics: results are bitwise repeatable. Dropout: see capt/reference.py (dropout_mask); the same bits here.

#include "common/tensor_core.cuh"
#include "expert_gating.cuh"
#include "expert_gating_cuda.h"

namespace {

constexpr int kRowBytes = 128;               // of depth in a stage
constexpr int kPitchBytes = kRowBytes + 16;  // of a row in shared memory
constexpr int kChunks = kRowBytes / 16;

// ---- routing -----------------------------------------------------------------------------------------------------

constexpr int kRouteThreads = 512;

struct Route {
  const float* weights;  // [tokens, experts]
  int32_t* token;        // [experts, tokens]: tokens of an expert, ascending
  int32_t* place;        // [tokens, experts]: where a token stands in that list
  int32_t* count;        // [experts]
  int64_t tokens, experts;
};

// kTokens: neighbouring tokens a thread.
template <int kTokens>
__global__ void __launch_bounds__(kRouteThreads) expert_route_kernel(Route route) {
  CAPT_SHARED(int32_t, warp_total, kRouteThreads / kLanes);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t e = blockIdx.x;
  int32_t base = 0;
  for (int64_t start = 0; start < route.tokens; start += kRouteThreads * kTokens) {
    const int64_t first = start + int64_t{threadIdx.x} * kTokens;
    unsigned chosen = 0;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      if (first + j < route.tokens && route.weights[(first + j) * route.experts + e] != 0.0f) chosen |= 1u << j;
    }
    const int32_t mine = __popc(chosen);
    int32_t sum = mine;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const int32_t other = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == kLanes - 1) warp_total[warp] = sum;
    __syncthreads();
    int32_t at = base + sum - mine;
    for (int w = 0; w < kRouteThreads / kLanes; ++w) {
      if (w < warp) at += warp_total[w];
      base += warp_total[w];
    }
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      if ((chosen >> j & 1u) != 0) {
        route.token[e * route.tokens + at] = static_cast<int32_t>(first + j);
        route.place[(first + j) * route.experts + e] = at++;
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) route.count[e] = base;
}

// ---- products ----------------------------------------------------------------------------------------------------

struct Product {
  const void* source;    // first: x [tokens, depth]; second: hidden [experts * tokens, depth]
  const void* matrix;    // [experts, columns, depth]
  const void* bias;      // [experts, columns]
  void* out;             // first: hidden [experts * tokens, columns]; second: [splits, experts * tokens, columns] float
  const float* weights;  // [tokens, experts]
  const int32_t* token;  // [experts, tokens], null: dense
  const int32_t* count;  // [experts], null: dense
  int64_t tokens, experts, columns, depth;
  int64_t splits, split_depth;
  int64_t first_token;  // what token 0 is called in the dropout
  Dropout dropout;
  int32_t second;   // which product
  int32_t vectors;  // whether rows of source and matrix are aligned to 16 bytes
};

// A tile of kRows x kColumns by kThreads threads.
template <typename T, bool kLarge>
struct Tile {
  static constexpr bool kTensor = sizeof(T) == 2;
  static constexpr int kRows = kLarge ? (kTensor ? 128 : 64) : 32;
  static constexpr int kColumns = kLarge ? 128 : 64;
  static constexpr int kThreads = kLarge ? 256 : 128;
  static constexpr int kDepth = kRowBytes / sizeof(T);
  static constexpr int kPitch = kPitchBytes / sizeof(T);
  static constexpr int kStage = (kRows + kColumns) * kPitch;  // elements
  // Three stages of the largest tile are more shared memory than sm_86, sm_89 and sm_12x give a block.
  static constexpr int kStages = kLarge && kTensor ? 2 : 3;
  static constexpr int kBytes = kStages * kStage * static_cast<int>(sizeof(T));
  // Tensor cores: warps as kWarpRows x kWarpColumns, each with kM x kN fragments of 16x8.
  static constexpr int kWarpRows = kLarge ? 2 : 1;
  static constexpr int kWarpColumns = 4;
  static constexpr int kM = kRows / kWarpRows / 16;
  static constexpr int kN = kColumns / kWarpColumns / 8;
  // Multiply-adds: threads as kThreadRows x 16, each with kA x kB values, interleaved.
  static constexpr int kThreadRows = kThreads / 16;
  static constexpr int kA = kRows / kThreadRows;
  static constexpr int kB = kColumns / 16;
  static_assert(kBytes <= 101376, "more shared memory than every device from sm_80 on has");
  static_assert(kTensor || (kA == 4 && kB % 4 == 0), "shapes of the float32 tiles");
};

struct Place {
  int64_t expert, row, rows;  // row: of the expert, where the tile begins; rows: of the expert
  int64_t column, split;
};

__device__ __forceinline__ int64_t rows_of(const Product& p, int64_t e) {
  return p.count == nullptr ? p.tokens : p.count[e];
}

// The tile of a block; false past the last one. Row tiles are neighbours, so that they share the matrix in L2.
__device__ __forceinline__ bool find_tile(const Product& p, int tile_rows, int tile_columns, int64_t tile,
                                          Place& place) {
  int64_t row_tiles = 0;
  for (int64_t e = 0; e < p.experts; ++e) row_tiles += (rows_of(p, e) + tile_rows - 1) / tile_rows;
  const int64_t column_tiles = (p.columns + tile_columns - 1) / tile_columns;
  if (tile >= row_tiles * column_tiles * p.splits) return false;
  int64_t row_tile = tile % row_tiles;
  place.column = tile / row_tiles % column_tiles * tile_columns;
  place.split = tile / row_tiles / column_tiles;
  place.expert = 0;
  for (;; ++place.expert) {
    place.rows = rows_of(p, place.expert);
    const int64_t here = (place.rows + tile_rows - 1) / tile_rows;
    if (row_tile < here) break;
    row_tile -= here;
  }
  place.row = row_tile * tile_rows;
  return true;
}

__device__ __forceinline__ int64_t token_of(const Product& p, const Place& place, int64_t row) {
  return p.token == nullptr ? row : p.token[place.expert * p.tokens + row];
}

// Whether some row of the tile uses the expert; the same answer in every thread.
__device__ __forceinline__ bool is_used(const Product& p, const Place& place, int tile_rows) {
  if (p.count != nullptr) return true;
  bool used = false;
  const int64_t end = place.row + tile_rows < place.rows ? place.row + tile_rows : place.rows;
  for (int64_t n = place.row + threadIdx.x % kLanes; n < end; n += kLanes) {
    used |= p.weights[n * p.experts + place.expert] != 0.0f;
  }
  return __any_sync(kAll, used) != 0;
}

// 16 bytes of a row into shared memory, zeros past `end`.
template <typename T>
__device__ __forceinline__ void load_chunk(T* into, const T* row, int64_t k, int64_t end, bool valid, bool vectors) {
  constexpr int kCount = 16 / sizeof(T);
  if (vectors) {
    const bool inside = valid && k < end;
    copy_async_16(into, inside ? row + k : row, inside);
    return;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (valid && k + j < end) {
      into[j] = row[k + j];
    } else {
      narrow(0.0f, into[j]);
    }
  }
}

// Two neighbouring values of one row: bias, activation and dropout, or bias and weight; the second one if it exists.
template <typename T>
__device__ __forceinline__ void finish_pair(const Product& p, const Place& place, int64_t row, int64_t column,
                                            float left, float right) {
  if (row >= place.rows || column >= p.columns) return;
  const bool both = column + 1 < p.columns, packed = p.columns % 2 == 0;
  const int64_t token = token_of(p, place, row);
  float value[2] = {left, right};
  const T* bias = static_cast<const T*>(p.bias) + place.expert * p.columns + column;
  if (place.split == 0) {
    value[0] += widen(bias[0]);
    if (both) value[1] += widen(bias[1]);
  }
  const int64_t at = (place.expert * p.tokens + row) * p.columns + column;
  if (p.second != 0) {
    const float weight = p.weights[token * p.experts + place.expert];
    float* out = static_cast<float*>(p.out) + place.split * p.experts * p.tokens * p.columns + at;
    const Pack<float, 2> pair{{weight * value[0], weight * value[1]}};
    if (packed) {
      *reinterpret_cast<Pack<float, 2>*>(out) = pair;
    } else {
      out[0] = pair.value[0];
      if (both) out[1] = pair.value[1];
    }
    return;
  }
  const RowDropout survives(p.dropout, p.first_token + token, place.expert);
  T* out = static_cast<T*>(p.out) + at;
  Pack<T, 2> pair;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float active = value[j] * sigmoid(value[j]);
    if (p.dropout.threshold != 0) {
      const float scale = survives(column + j);
      active = scale != 0.0f ? active * scale : 0.0f;
    }
    narrow(active, pair.value[j]);
  }
  if (packed) {
    *reinterpret_cast<Pack<T, 2>*>(out) = pair;
  } else {
    out[0] = pair.value[0];
    if (both) out[1] = pair.value[1];
  }
}

// One stage of a 16-bit tile; only the first `depth` columns of the stage hold anything.
template <typename T, typename Shape>
__device__ __forceinline__ void multiply_stage(const T* rows, const T* matrix, int depth,
                                               FragmentC (&sum)[Shape::kM][Shape::kN]) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int m = warp / Shape::kWarpColumns * Shape::kM * 16, n = warp % Shape::kWarpColumns * Shape::kN * 8;
#pragma unroll
  for (int k = 0; k < Shape::kDepth; k += 16) {
    if (k >= depth) break;
    FragmentA a[Shape::kM];
#pragma unroll
    for (int i = 0; i < Shape::kM; ++i) {
      load_matrices(a[i].word, rows + (m + i * 16 + lane % 16) * Shape::kPitch + k + lane / 16 * 8);
    }
#pragma unroll
    for (int j = 0; j < Shape::kN; j += 2) {
      uint32_t word[4];
      load_matrices(word, matrix + (n + j * 8 + lane / 16 * 8 + lane % 8) * Shape::kPitch + k + lane / 8 % 2 * 8);
      const FragmentB left{{word[0], word[1]}}, right{{word[2], word[3]}};
#pragma unroll
      for (int i = 0; i < Shape::kM; ++i) {
        multiply_add(sum[i][j], a[i], left, T{});
        multiply_add(sum[i][j + 1], a[i], right, T{});
      }
    }
  }
}

template <typename T, typename Shape>
__device__ __forceinline__ void finish_tile(const Product& p, const Place& place,
                                            const FragmentC (&sum)[Shape::kM][Shape::kN]) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t row = place.row + warp / Shape::kWarpColumns * Shape::kM * 16 + lane / 4;
  const int64_t column = place.column + warp % Shape::kWarpColumns * Shape::kN * 8 + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < Shape::kM; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kN; ++j) {
      finish_pair<T>(p, place, row + i * 16, column + j * 8, sum[i][j].value[0], sum[i][j].value[1]);
      finish_pair<T>(p, place, row + i * 16 + 8, column + j * 8, sum[i][j].value[2], sum[i][j].value[3]);
    }
  }
}

// float32: thread (r, c) holds rows r + kThreadRows * i and columns 32 * (j / 2) + 2 * c + j % 2.
template <typename Shape>
__device__ __forceinline__ void multiply_stage(const float* rows, const float* matrix, int depth,
                                               float (&sum)[Shape::kA][Shape::kB]) {
  const int r = threadIdx.x / 16, c = threadIdx.x % 16;
#pragma unroll
  for (int k = 0; k < Shape::kDepth; k += 4) {
    if (k >= depth) break;
    Pack<float, 4> a[Shape::kA];
#pragma unroll
    for (int i = 0; i < Shape::kA; ++i) {
      a[i] = *reinterpret_cast<const Pack<float, 4>*>(rows + (r + Shape::kThreadRows * i) * Shape::kPitch + k);
    }
#pragma unroll
    for (int j = 0; j < Shape::kB; ++j) {
      const int column = j / 2 * 32 + 2 * c + j % 2;
      const auto b = *reinterpret_cast<const Pack<float, 4>*>(matrix + column * Shape::kPitch + k);
#pragma unroll
      for (int i = 0; i < Shape::kA; ++i) {
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[i][j] += a[i].value[q] * b.value[q];
      }
    }
  }
}

template <typename Shape>
__device__ __forceinline__ void finish_tile(const Product& p, const Place& place,
                                            const float (&sum)[Shape::kA][Shape::kB]) {
  const int r = threadIdx.x / 16, c = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < Shape::kA; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kB; j += 2) {
      finish_pair<float>(p, place, place.row + r + Shape::kThreadRows * i, place.column + j / 2 * 32 + 2 * c, sum[i][j],
                         sum[i][j + 1]);
    }
  }
}

template <typename T, bool kLarge>
__global__ void __launch_bounds__(Tile<T, kLarge>::kThreads) expert_product_kernel(Product p) {
  using Shape = Tile<T, kLarge>;
  CAPT_DYNAMIC_SHARED(T, stages);
  constexpr int kStep = Shape::kThreads / kChunks;  // rows a pass of all threads loads
  const int chunk_row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const int chunk_at = chunk_row * Shape::kPitch + chunk * (16 / static_cast<int>(sizeof(T)));
  Place place;
  for (int64_t tile = blockIdx.x; find_tile(p, Shape::kRows, Shape::kColumns, tile, place); tile += gridDim.x) {
    if (!is_used(p, place, Shape::kRows)) continue;
    const T* row[Shape::kRows / kStep];
    bool row_valid[Shape::kRows / kStep];
#pragma unroll
    for (int i = 0; i < Shape::kRows / kStep; ++i) {
      const int64_t r = place.row + chunk_row + i * kStep;
      row_valid[i] = r < place.rows;
      const int64_t of_source = !row_valid[i] ? 0 : p.second != 0 ? place.expert * p.tokens + r : token_of(p, place, r);
      row[i] = static_cast<const T*>(p.source) + of_source * p.depth;
    }
    const T* matrix = static_cast<const T*>(p.matrix) + (place.expert * p.columns + place.column) * p.depth;
    const int64_t begin = place.split * p.split_depth;
    const int64_t end = begin + p.split_depth < p.depth ? begin + p.split_depth : p.depth;
    const int64_t steps = (end - begin + Shape::kDepth - 1) / Shape::kDepth;
    auto load = [&](int64_t step) {
      if (step < steps) {
        T* into = stages + step % Shape::kStages * Shape::kStage + chunk_at;
        const int64_t k = begin + step * Shape::kDepth + chunk * (16 / static_cast<int>(sizeof(T)));
#pragma unroll
        for (int i = 0; i < Shape::kRows / kStep; ++i) {
          load_chunk(into + i * kStep * Shape::kPitch, row[i], k, end, row_valid[i], p.vectors != 0);
        }
        into += Shape::kRows * Shape::kPitch;
#pragma unroll
        for (int i = 0; i < Shape::kColumns / kStep; ++i) {
          const int64_t c = chunk_row + i * kStep;
          const bool valid = place.column + c < p.columns;
          load_chunk(into + i * kStep * Shape::kPitch, matrix + (valid ? c : 0) * p.depth, k, end, valid,
                     p.vectors != 0);
        }
      }
      copy_async_commit();
    };
    auto accumulate = [&](auto& sum, auto multiply) {
      for (int step = 0; step < Shape::kStages - 1; ++step) load(step);
      for (int64_t step = 0; step < steps; ++step) {
        copy_async_wait<Shape::kStages - 2>();
        __syncthreads();  // the stage is complete, and nobody reads the one that is filled next
        load(step + Shape::kStages - 1);
        const T* stage = stages + step % Shape::kStages * Shape::kStage;
        const int64_t left = end - begin - step * Shape::kDepth;
        multiply(stage, stage + Shape::kRows * Shape::kPitch,
                 static_cast<int>(left < Shape::kDepth ? left : Shape::kDepth), sum);
      }
      copy_async_wait<0>();
      __syncthreads();
    };
    if constexpr (Shape::kTensor) {
      FragmentC sum[Shape::kM][Shape::kN] = {};
      accumulate(sum, [](const T* a, const T* b, int depth, auto& c) { multiply_stage<T, Shape>(a, b, depth, c); });
      finish_tile<T, Shape>(p, place, sum);
    } else {
      float sum[Shape::kA][Shape::kB] = {};
      accumulate(sum, [](const T* a, const T* b, int depth, auto& c) { multiply_stage<Shape>(a, b, depth, c); });
      finish_tile<Shape>(p, place, sum);
    }
  }
}

// ---- combine -----------------------------------------------------------------------------------------------------

struct Combine {
  const float* contribution;  // [splits, experts * tokens, dim]
  const float* weights;       // [tokens, experts]
  const int32_t* place;       // [tokens, experts], null: dense
  void* y;                    // [tokens, dim]
  int64_t tokens, experts, dim, splits;
};

constexpr int kCombineThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kCombineThreads) expert_combine_kernel(Combine c) {
  const int64_t d = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x;
  if (d >= c.dim) return;
  for (int64_t n = blockIdx.y; n < c.tokens; n += gridDim.y) {
    float sum = 0.0f;
    for (int64_t e = 0; e < c.experts; ++e) {
      if (c.weights[n * c.experts + e] == 0.0f) continue;
      const int64_t row = e * c.tokens + (c.place == nullptr ? n : c.place[n * c.experts + e]);
      for (int64_t s = 0; s < c.splits; ++s) {
        sum += c.contribution[(s * c.experts * c.tokens + row) * c.dim + d];
      }
    }
    narrow(sum, static_cast<T*>(c.y)[n * c.dim + d]);
  }
}

// ---- host side ---------------------------------------------------------------------------------------------------

constexpr int64_t kWorkspaceLimit = int64_t{256} << 20;
constexpr int64_t kFewTokens = 64;     // up to here small tiles: the time goes into reading the weights
constexpr int64_t kDenseTokens = 256;  // up to here no routing: every expert's weights are read anyway
constexpr int64_t kBlocks = 132;       // split the depth of the second product until about so many blocks work
constexpr int64_t kMinSplitDepth = 256;
constexpr int64_t kMaxSplits = 8;

int64_t padded(int64_t bytes) { return divide_up(bytes, 256) * 256; }
bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// How a call is cut up.
struct Cut {
  int64_t chunk, splits, split_depth;
  bool gather, large;
  int64_t hidden, contribution, token, place, count, bytes;  // offsets into the workspace
};

Cut cut_of(const CaptExpertMixCuda& args) {
  const int64_t size = args.dtype == CAPT_FLOAT32 ? 4 : 2;
  Cut cut{};
  // With one or two experts dense evaluation wastes at most half of the arithmetic. top_k is not known here.
  cut.gather = args.path == CAPT_EXPERT_GATHER || (args.path == 0 && args.experts > 2 && args.tokens > kDenseTokens);
  cut.large = args.tile == 0 ? args.tokens > kFewTokens : args.tile == CAPT_EXPERT_LARGE;
  const int64_t tile_rows = cut.large ? (size == 2 ? 128 : 64) : 32, tile_columns = cut.large ? 128 : 64;
  const int64_t tiles = args.experts * divide_up(args.tokens, tile_rows) * divide_up(args.dim, tile_columns);
  const int64_t wanted = smaller(kMaxSplits, divide_up(kBlocks, larger(1, tiles)));
  cut.split_depth = larger(kMinSplitDepth, divide_up(divide_up(args.hidden, larger(1, wanted)), 64) * 64);
  cut.splits = larger(1, divide_up(args.hidden, cut.split_depth));
  const int64_t row_bytes = args.experts * (args.hidden * size + cut.splits * args.dim * 4 + 8);
  cut.chunk = args.chunk > 0 ? args.chunk : larger(64, kWorkspaceLimit / larger(1, row_bytes) / 128 * 128);
  cut.chunk = larger(1, smaller(cut.chunk, args.tokens));
  cut.contribution = padded(args.experts * cut.chunk * args.hidden * size);
  cut.token = cut.contribution + padded(cut.splits * args.experts * cut.chunk * args.dim * 4);
  cut.place = cut.token + padded(args.experts * cut.chunk * 4);
  cut.count = cut.place + padded(args.experts * cut.chunk * 4);
  cut.bytes = cut.count + padded(args.experts * 4);
  return cut;
}

template <typename T, bool kLarge>
int launch_product(const Product& product, void* stream) {
  using Shape = Tile<T, kLarge>;
  const int64_t tiles = product.experts * divide_up(product.tokens, Shape::kRows) *
                        divide_up(product.columns, Shape::kColumns) * product.splits;
  const int error = CAPT_ALLOW_SHARED((expert_product_kernel<T, kLarge>), Shape::kBytes);
  if (error != 0) return error;
  CAPT_LAUNCH_SHARED((expert_product_kernel<T, kLarge>), dim3(static_cast<unsigned>(smaller(tiles, 65536))),
                     dim3(Shape::kThreads), Shape::kBytes, stream, product);
  return CAPT_LAST_ERROR();
}

template <typename T>
int run_mix(const CaptExpertMixCuda& args, void* stream) {
  const Cut cut = cut_of(args);
  auto* const memory = static_cast<unsigned char*>(args.workspace);
  const Dropout dropout = dropout_of(args.dropout, args.seed);
  for (int64_t first = 0; first < args.tokens; first += cut.chunk) {
    const int64_t tokens = smaller(cut.chunk, args.tokens - first);
    const float* weights = args.weights + first * args.experts;
    auto* const token = cut.gather ? reinterpret_cast<int32_t*>(memory + cut.token) : nullptr;
    auto* const place = cut.gather ? reinterpret_cast<int32_t*>(memory + cut.place) : nullptr;
    auto* const count = cut.gather ? reinterpret_cast<int32_t*>(memory + cut.count) : nullptr;
    if (cut.gather) {
      CAPT_LAUNCH(expert_route_kernel<8>, dim3(static_cast<unsigned>(args.experts)), dim3(kRouteThreads), stream,
                  Route{weights, token, place, count, tokens, args.experts});
    }
    Product product{};
    product.source = static_cast<const T*>(args.x) + first * args.dim;
    product.matrix = args.w_in;
    product.bias = args.b_in;
    product.out = memory;
    product.weights = weights;
    product.token = token;
    product.count = count;
    product.tokens = tokens;
    product.experts = args.experts;
    product.columns = args.hidden;
    product.depth = args.dim;
    product.splits = 1;
    product.split_depth = args.dim;
    product.first_token = first;
    product.dropout = dropout;
    constexpr int64_t kCount = 16 / sizeof(T);
    product.vectors = args.dim % kCount == 0 && aligned(args.x) && aligned(args.w_in);
    int error = cut.large ? launch_product<T, true>(product, stream) : launch_product<T, false>(product, stream);
    if (error != 0) return error;
    product.source = memory;
    product.matrix = args.w_out;
    product.bias = args.b_out;
    product.out = memory + cut.contribution;
    product.columns = args.dim;
    product.depth = args.hidden;
    product.splits = cut.splits;
    product.split_depth = cut.split_depth;
    product.second = 1;
    product.vectors = args.hidden % kCount == 0 && aligned(args.w_out);
    error = cut.large ? launch_product<T, true>(product, stream) : launch_product<T, false>(product, stream);
    if (error != 0) return error;
    const dim3 grid(static_cast<unsigned>(divide_up(args.dim, kCombineThreads)),
                    static_cast<unsigned>(smaller(tokens, 65535)));
    CAPT_LAUNCH(expert_combine_kernel<T>, grid, dim3(kCombineThreads), stream,
                Combine{reinterpret_cast<const float*>(memory + cut.contribution), weights, place,
                        static_cast<T*>(args.y) + first * args.dim, tokens, args.experts, args.dim, cut.splits});
    error = CAPT_LAST_ERROR();
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace

extern "C" int64_t capt_expert_mix_cuda_workspace(const CaptExpertMixCuda* args) { return cut_of(*args).bytes; }

extern "C" int capt_expert_mix_cuda(const CaptExpertMixCuda* args, void* stream) {
  if (args->tokens == 0 || args->dim == 0) return 0;
  switch (args->dtype) {
    case CAPT_FLOAT32:
      return run_mix<float>(*args, stream);
    case CAPT_FLOAT16:
      return run_mix<HalfBits>(*args, stream);
    default:
      return run_mix<BfloatBits>(*args, stream);
  }
}
