// Prompt attention over keys that all prompts of an image share: C interface, and the path without tensor cores.
//
//   score = scale * q . k     p = softmax over the keys     out = sum p * v     lse = log sum exp score
// Backward, with g the gradient of out and delta = g . out - (gradient of lse):
//   slope = p * (g . v - delta)    dq = scale * sum slope * k    dk = scale * sum slope * q    dv = sum p * g
//
// The rows of both kinds are stacked. A block owns 64 rows (or keys) of one head and 64 of its channels: 256 threads,
// each with 4 x 4 of a 64 x 64 tile; operands stand in shared memory as float32 and heads wider than 64 pass through in
// steps, so that any width works. float32 takes this path, and 16-bit heads that the tensor cores cannot take
// (prompt_attention_tensor.cu).
//
//   forward  grid ((image, head, row tile), channel step): keys in turn, online softmax
//   delta    a thread per (image, row, head)
//   keys     grid ((image, head, key tile), channel step): dk, dv over all rows
//   query    grid ((image, head, row tile), channel step): dq over all keys and, if the queries are shared, all images
// Only what is asked for runs. No atomics: each sum has one owner and a fixed order.
#include "prompt_attention_shared.cuh"

namespace {

constexpr int kTile = 64;
constexpr int kPitch = kTile + 4;  // float32; rows start in different banks and stay aligned for 16-byte loads
constexpr int kSide = 16;          // threads in each direction
constexpr int kThreads = kSide * kSide;
constexpr int kEach = kTile / kSide;
constexpr size_t kSharedBytes = 3 * kTile * kPitch * sizeof(float);
static_assert(kSharedBytes <= kMostShared, "more shared memory than every device from sm_80 on has");

using Quad = Pack<float, 4>;

// A tile of `rows` rows, `width` channels of each, filled up with zeros; row(i) points at the first channel of row i.
template <typename Row>
__device__ __forceinline__ void load_tile(float* tile, int rows, int width, Row row) {
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int r = i / kTile, c = i % kTile;
    tile[r * kPitch + c] = r < rows && c < width ? widen(row(r)[c]) : 0.0f;
  }
}

__device__ __forceinline__ Quad quad(const float* tile, int row, int column) {
  return *reinterpret_cast<const Quad*>(tile + row * kPitch + column);
}

// sum[i][j] += row (ty + 16 i) of left . row (tx + 16 j) of right, over the first `width` channels.
__device__ __forceinline__ void add_products(const float* left, const float* right, int width,
                                             float (&sum)[kEach][kEach]) {
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int c = 0; c < width; c += 4) {
    Quad a[kEach], b[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      a[i] = quad(left, ty + kSide * i, c);
      b[i] = quad(right, tx + kSide * i, c);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[i][j] += a[i].value[k] * b[j].value[k];
      }
    }
  }
}

// sum[i][j] += sum over n < count of factor[ty + 16 i][n] * tile[n][4 tx + j].
__device__ __forceinline__ void add_weighted(const float* factor, const float* tile, int count,
                                             float (&sum)[kEach][kEach]) {
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int n = 0; n < count; n += 4) {
    Quad f[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) f[i] = quad(factor, ty + kSide * i, n);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Quad v = quad(tile, n + k, 4 * tx);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sum[i][j] += f[i].value[k] * v.value[j];
      }
    }
  }
}

__device__ __forceinline__ void store_factors(float* tile, const float (&value)[kEach][kEach]) {
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) tile[(ty + kSide * i) * kPitch + tx + kSide * j] = value[i][j];
  }
}

template <typename T>
__device__ __forceinline__ void store_rows(T* target, int64_t pitch, int rows, int width,
                                           const float (&value)[kEach][kEach], float factor) {
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (ty + kSide * i < rows && 4 * tx + j < width) {
        narrow(factor * value[i][j], target[(ty + kSide * i) * pitch + 4 * tx + j]);
      }
    }
  }
}

// Sum, or maximum, over the 16 threads that share a row.
__device__ __forceinline__ float side_sum(float value) {
#pragma unroll
  for (int bits = kSide / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, bits);
  return value;
}
__device__ __forceinline__ float side_max(float value) {
#pragma unroll
  for (int bits = kSide / 2; bits > 0; bits /= 2) value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, bits));
  return value;
}

__device__ __forceinline__ int tile_part(int64_t first, int64_t stop) {
  return static_cast<int>(stop - first < kTile ? stop - first : kTile);
}

// Every block: image b, head h and tile number out of blockIdx.x.
struct Place {
  int64_t b, h, tile;
};
__device__ __forceinline__ Place place(const CaptPromptAttentionSharedCuda& args, unsigned tiles) {
  const unsigned heads = static_cast<unsigned>(args.heads), rest = blockIdx.x / tiles;
  return {rest / heads, rest % heads, blockIdx.x % tiles};
}

// left . right for all channels of the head, in steps; both are read through the two tiles.
template <typename Left, typename Right>
__device__ __forceinline__ void head_products(float* left_tile, float* right_tile, int64_t head_dim, int left_rows,
                                              int right_rows, Left left, Right right, float (&sum)[kEach][kEach]) {
  for (int64_t c = 0; c < head_dim; c += kTile) {
    const int width = tile_part(c, head_dim);
    __syncthreads();
    load_tile(left_tile, left_rows, width, [&](int r) { return left(r) + c; });
    load_tile(right_tile, right_rows, width, [&](int r) { return right(r) + c; });
    __syncthreads();
    add_products(left_tile, right_tile, width, sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) shared_forward_kernel(CaptPromptAttentionSharedCuda args, unsigned tiles) {
  CAPT_DYNAMIC_SHARED(float, left);
  float* const right = left + kTile * kPitch;
  float* const factors = right + kTile * kPitch;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const Place at = place(args, tiles);
  const int64_t first = at.tile * kTile, column = int64_t{blockIdx.y} * kTile;
  const int rows = tile_part(first, stacked_rows(args)), width = tile_part(column, args.head_dim);
  float most[kEach], total[kEach] = {}, out[kEach][kEach] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i) most[i] = -INFINITY;
  for (int64_t start = 0; start < args.length; start += kTile) {
    const int keys = tile_part(start, args.length);
    float score[kEach][kEach] = {};
    head_products(
        left, right, args.head_dim, rows, keys, [&](int r) { return query_row<T>(args, first + r, at.b, at.h); },
        [&](int n) { return key_row<T>(args, start + n, at.b, at.h); }, score);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float found = most[i];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        score[i][j] = tx + kSide * j < keys ? score[i][j] * args.scale : -INFINITY;
        found = fmaxf(found, score[i][j]);
      }
      found = side_max(found);
      const float base = found == -INFINITY ? 0.0f : found, fade = expf(most[i] - base);
      total[i] *= fade;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        score[i][j] = expf(score[i][j] - base);
        total[i] += score[i][j];
        out[i][j] *= fade;
      }
      most[i] = found;
    }
    store_factors(factors, score);
    __syncthreads();
    load_tile(right, keys, width, [&](int n) { return value_row<T>(args, start + n, at.b, at.h) + column; });
    __syncthreads();
    add_weighted(factors, right, keys, out);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int r = ty + kSide * i;
    const float sum = side_sum(total[i]);
    if (r >= rows) continue;
    const StackedRow row = stacked_row(args, first + r);
    T* target = static_cast<T*>(row.second ? args.query[1].out : args.query[0].out) +
                dense_offset(args, row, at.b, at.h) + column;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (4 * tx + j < width) narrow(out[i][j] / sum, target[4 * tx + j]);
    }
    if (tx == 0 && blockIdx.y == 0) {
      float* lse = row.second ? args.query[1].lse : args.query[0].lse;
      lse[number_offset(args, row, at.b, at.h)] = most[i] == INFINITY ? most[i] : most[i] + logf(sum);
    }
  }
}

// A thread per (image, row, head). Its sum runs in the order of the products g . v above: for a single key the two
// then cancel exactly, as they should.
template <typename T>
__global__ void __launch_bounds__(kThreads) shared_delta_kernel(CaptPromptAttentionSharedCuda args) {
  const int64_t rows = stacked_rows(args), heads = args.heads;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= args.batch * rows * heads) return;
  const int64_t h = i % heads, x = i / heads % rows, b = i / heads / rows;
  const StackedRow at = stacked_row(args, x);
  const T* out =
      static_cast<const T*>(at.second ? args.query[1].out : args.query[0].out) + dense_offset(args, at, b, h);
  const float* grad_lse = at.second ? args.query[1].grad_lse : args.query[0].grad_lse;
  const T* grad = grad_row<T>(args, x, b, h);
  float sum = 0.0f;
  for (int64_t c = 0; c < args.head_dim; ++c) sum += widen(grad[c]) * widen(out[c]);
  row_delta(args, x, b, h) = sum - grad_lse[number_offset(args, at, b, h)];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) shared_keys_kernel(CaptPromptAttentionSharedCuda args, unsigned tiles) {
  CAPT_DYNAMIC_SHARED(float, left);
  float* const right = left + kTile * kPitch;
  float* const factors = right + kTile * kPitch;
  const int tx = threadIdx.x % kSide;
  const Place at = place(args, tiles);
  const int64_t first = at.tile * kTile, column = int64_t{blockIdx.y} * kTile, all = stacked_rows(args);
  const int keys = tile_part(first, args.length), width = tile_part(column, args.head_dim);
  float grad_keys[kEach][kEach] = {}, grad_values[kEach][kEach] = {};
  const auto query = [&](int64_t x) { return query_row<T>(args, x, at.b, at.h); };
  const auto grad = [&](int64_t x) { return grad_row<T>(args, x, at.b, at.h); };
  for (int64_t start = 0; start < all; start += kTile) {
    const int rows = tile_part(start, all);
    float p[kEach][kEach] = {};  // keys x rows
    head_products(
        left, right, args.head_dim, keys, rows, [&](int n) { return key_row<T>(args, first + n, at.b, at.h); },
        [&](int r) { return query(start + r); }, p);
    float delta[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int r = tx + kSide * j;
      const float lse = r < rows ? row_lse(args, start + r, at.b, at.h) : 0.0f;
      delta[j] = r < rows ? row_delta(args, start + r, at.b, at.h) : 0.0f;
#pragma unroll
      for (int i = 0; i < kEach; ++i) p[i][j] = r < rows ? expf(p[i][j] * args.scale - lse) : 0.0f;
    }
    if (args.grad_values != nullptr) {
      store_factors(factors, p);
      __syncthreads();
      load_tile(right, rows, width, [&](int r) { return grad(start + r) + column; });
      __syncthreads();
      add_weighted(factors, right, rows, grad_values);
    }
    if (args.grad_keys != nullptr) {
      float slope[kEach][kEach] = {};
      head_products(
          left, right, args.head_dim, keys, rows, [&](int n) { return value_row<T>(args, first + n, at.b, at.h); },
          [&](int r) { return grad(start + r); }, slope);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          slope[i][j] = tx + kSide * j < rows ? p[i][j] * (slope[i][j] - delta[j]) : 0.0f;
        }
      }
      store_factors(factors, slope);
      __syncthreads();
      load_tile(right, rows, width, [&](int r) { return query(start + r) + column; });
      __syncthreads();
      add_weighted(factors, right, rows, grad_keys);
    }
  }
  const int64_t pitch = args.heads * args.head_dim;
  const int64_t offset = (at.b * args.length + first) * pitch + at.h * args.head_dim + column;
  if (args.grad_keys != nullptr) {
    store_rows(static_cast<T*>(args.grad_keys) + offset, pitch, keys, width, grad_keys, args.scale);
  }
  if (args.grad_values != nullptr) {
    store_rows(static_cast<T*>(args.grad_values) + offset, pitch, keys, width, grad_values, 1.0f);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) shared_query_kernel(CaptPromptAttentionSharedCuda args, unsigned tiles) {
  CAPT_DYNAMIC_SHARED(float, left);
  float* const right = left + kTile * kPitch;
  float* const factors = right + kTile * kPitch;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const Place at = place(args, tiles);
  const QueryTile tile = query_tile(args, at.tile, kTile);
  if (at.b >= (tile.per_image ? args.batch : 1)) return;
  const int64_t column = int64_t{blockIdx.y} * kTile;
  const int rows = tile_part(tile.first, tile.stop), width = tile_part(column, args.head_dim);
  float grad_query[kEach][kEach] = {};
  const int64_t images = tile.per_image ? at.b + 1 : args.batch;
  for (int64_t b = at.b; b < images; ++b) {
    float lse[kEach], delta[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int r = ty + kSide * i;
      lse[i] = r < rows ? row_lse(args, tile.first + r, b, at.h) : 0.0f;
      delta[i] = r < rows ? row_delta(args, tile.first + r, b, at.h) : 0.0f;
    }
    for (int64_t start = 0; start < args.length; start += kTile) {
      const int keys = tile_part(start, args.length);
      float p[kEach][kEach] = {}, slope[kEach][kEach] = {};  // rows x keys
      head_products(
          left, right, args.head_dim, rows, keys, [&](int r) { return query_row<T>(args, tile.first + r, b, at.h); },
          [&](int n) { return key_row<T>(args, start + n, b, at.h); }, p);
      head_products(
          left, right, args.head_dim, rows, keys, [&](int r) { return grad_row<T>(args, tile.first + r, b, at.h); },
          [&](int n) { return value_row<T>(args, start + n, b, at.h); }, slope);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          const float weight = expf(p[i][j] * args.scale - lse[i]);
          slope[i][j] = tx + kSide * j < keys ? weight * (slope[i][j] - delta[i]) : 0.0f;
        }
      }
      store_factors(factors, slope);
      __syncthreads();
      load_tile(right, keys, width, [&](int n) { return key_row<T>(args, start + n, b, at.h) + column; });
      __syncthreads();
      add_weighted(factors, right, keys, grad_query);
    }
  }
  if (rows <= 0) return;
  const StackedRow row = stacked_row(args, tile.first);
  T* target = static_cast<T*>(row.second ? args.query[1].grad_query : args.query[0].grad_query) +
              dense_offset(args, row, tile.per_image ? at.b : 0, at.h) + column;
  store_rows(target, args.heads * args.head_dim, rows, width, grad_query, args.scale);
}

unsigned tiles_of(int64_t count) { return static_cast<unsigned>((count + kTile - 1) / kTile); }

// More than 48 KB of shared memory has to be allowed for each kernel.
#define CAPT_TILED(kernel, images, tiles)                                                                      \
  do {                                                                                                         \
    const int refused = CAPT_ALLOW_SHARED((kernel), kSharedBytes);                                             \
    if (refused != 0) return refused;                                                                          \
    const unsigned number = tiles;                                                                             \
    const int64_t owners = (images) * args.heads * number;                                                     \
    if (owners > kMostBlocks) return kTooManyBlocks;                                                           \
    CAPT_LAUNCH_SHARED((kernel), dim3(static_cast<unsigned>(owners), tiles_of(args.head_dim)), dim3(kThreads), \
                       kSharedBytes, stream, args, number);                                                    \
    const int error = CAPT_LAST_ERROR();                                                                       \
    if (error != 0) return error;                                                                              \
  } while (0)

template <typename T>
int forward(const CaptPromptAttentionSharedCuda& args, void* stream) {
  if (capt_shared_tensor_fits(args)) return capt_shared_tensor_forward(args, stream);
  CAPT_TILED(shared_forward_kernel<T>, args.batch, tiles_of(stacked_rows(args)));
  return 0;
}

template <typename T>
int backward(const CaptPromptAttentionSharedCuda& args, void* stream) {
  const int64_t rows = stacked_rows(args);
  const int64_t numbers = args.batch * rows * args.heads;
  if (numbers > 0) {
    const int64_t blocks = (numbers + kThreads - 1) / kThreads;
    if (blocks > kMostBlocks) return kTooManyBlocks;
    CAPT_LAUNCH((shared_delta_kernel<T>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, args);
    const int error = CAPT_LAST_ERROR();
    if (error != 0) return error;
  }
  const bool tensor = capt_shared_tensor_fits(args);
  if (args.batch > 0 && (args.grad_keys != nullptr || args.grad_values != nullptr)) {
    if (tensor) {
      const int error = capt_shared_tensor_keys(args, stream);
      if (error != 0) return error;
    } else {
      CAPT_TILED(shared_keys_kernel<T>, args.batch, tiles_of(args.length));
    }
  }
  if (rows > 0 && (args.query[0].grad_query != nullptr || args.query[1].grad_query != nullptr)) {
    if (tensor) return capt_shared_tensor_query(args, stream);
    CAPT_TILED(shared_query_kernel<T>, query_images(args), static_cast<unsigned>(query_tiles(args, kTile)));
  }
  return 0;
}

}  // namespace

extern "C" int capt_prompt_attention_shared_cuda(const CaptPromptAttentionSharedCuda* args, void* stream) {
  if (args->batch == 0 || stacked_rows(*args) == 0 || args->head_dim == 0) return 0;
  switch (args->dtype) {
    case CAPT_FLOAT32:
      return forward<float>(*args, stream);
    case CAPT_FLOAT16:
      return forward<HalfBits>(*args, stream);
    default:
      return forward<BfloatBits>(*args, stream);
  }
}

extern "C" int64_t capt_prompt_attention_shared_cuda_workspace(const CaptPromptAttentionSharedCuda* args) {
  return args->batch * args->heads * stacked_rows(*args);
}

extern "C" int capt_prompt_attention_shared_backward_cuda(const CaptPromptAttentionSharedCuda* args, void* stream) {
  if (args->head_dim == 0) return 0;
  switch (args->dtype) {
    case CAPT_FLOAT32:
      return backward<float>(*args, stream);
    case CAPT_FLOAT16:
      return backward<HalfBits>(*args, stream);
    default:
      return backward<BfloatBits>(*args, stream);
  }
}
