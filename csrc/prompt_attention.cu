// Gathered prompt attention on a GPU: one query per image, rows gathered from two tables, one softmax for each.
//
//   score[b, j, i] = scale * q[b] . table[index[b, j], i] + log_prior[b, j]        weight = softmax over (j, i)
//   out[b]         = sum weight * row
// Backward, with g the gradient of out:
//   slope          = weight * (g . row - sum weight * (g . row))                   the gradient of the scores
//   dq[b]          = scale * sum slope * row     dprior[b, j] = sum_i slope        (both kinds together)
//   dtable[t, i]   = sum over the (b, j) with index t, in ascending order: weight * g[b] + scale * slope * q[b]
//
//   forward  grid (images, kinds), 4 warps: a warp per row for the scores, a thread per pack of channels for the sum
//   backward grid (images): the same for both kinds in turn
//   tables   grid (table rows, kinds): the uses of a table row are neighbours in the sorted indices, found by bisection
//
// HBM traffic: every gathered row once, then from shared memory; more than kCacheBytes of rows are read again through
// the L2 cache. Scores stand where the weights will be, so the number of rows has no limit. No atomics.
#include <math.h>

#include "common/device.cuh"
#include "prompt_attention_cuda.h"

namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kLanes * kWarps;
constexpr int64_t kCacheBytes = 48 * 1024;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int bits = kLanes / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, bits);
  return value;
}

// NaN is passed over, as in a comparison.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int bits = kLanes / 2; bits > 0; bits /= 2) value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, bits));
  return value;
}

// Rows of one image; fewer than 2^31, because 64-bit division is a function call.
__host__ __device__ __forceinline__ unsigned rows_of_image(const CaptPromptAttentionCuda& args,
                                                           const CaptPromptStream& kind) {
  return static_cast<unsigned>(args.pairs * kind.prompts);
}

// Row r of image b, or null if its pair is absent.
template <typename T>
__device__ __forceinline__ const T* gathered_row(const CaptPromptAttentionCuda& args, const CaptPromptStream& kind,
                                                 int64_t b, unsigned r) {
  const unsigned prompts = static_cast<unsigned>(kind.prompts);
  const int64_t t = kind.index[b * args.pairs + r / prompts];
  if (t < 0 || t >= kind.rows) return nullptr;
  return static_cast<const T*>(kind.table) + (t * prompts + r % prompts) * args.dim;
}

// left . row of a whole warp; the row is kept in `copy` unless that is null.
template <typename T, int kCount>
__device__ __forceinline__ float row_product(const T* left, const T* row, T* copy, int64_t dim) {
  float sum = 0.0f;
  for (int64_t c = threadIdx.x * kCount; c < dim; c += kLanes * kCount) {
    const auto a = *reinterpret_cast<const Pack<T, kCount>*>(left + c);
    const auto v = *reinterpret_cast<const Pack<T, kCount>*>(row + c);
    if (copy != nullptr) *reinterpret_cast<Pack<T, kCount>*>(copy + c) = v;
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum += widen(a.value[j]) * widen(v.value[j]);
  }
  return warp_sum(sum);
}

// into[0..kCount) += sum over the rows of image b of factor[r] * row r, for the channels from c on.
template <typename T, int kCount>
__device__ __forceinline__ void add_rows(const CaptPromptAttentionCuda& args, const CaptPromptStream& kind,
                                         const float* factor, const T* cache, int64_t b, int64_t c,
                                         float (&into)[kCount]) {
  const unsigned n = rows_of_image(args, kind);
  for (unsigned r = 0; r < n; ++r) {
    const T* row = gathered_row<T>(args, kind, b, r);
    if (row == nullptr) continue;
    if (cache != nullptr) row = cache + int64_t{r} * args.dim;
    const auto v = *reinterpret_cast<const Pack<T, kCount>*>(row + c);
#pragma unroll
    for (int j = 0; j < kCount; ++j) into[j] += factor[r] * widen(v.value[j]);
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void store_pack(T* target, const float (&value)[kCount], float factor) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int j = 0; j < kCount; ++j) narrow(factor * value[j], pack.value[j]);
  *reinterpret_cast<Pack<T, kCount>*>(target) = pack;
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) gathered_forward_kernel(CaptPromptAttentionCuda args, int cached) {
  CAPT_DYNAMIC_SHARED(T, image);
  T* cache = cached != 0 ? image : nullptr;
  const CaptPromptStream kind = args.stream[blockIdx.y];
  const unsigned n = rows_of_image(args, kind), thread = threadIdx.y * kLanes + threadIdx.x;
  for (int64_t b = blockIdx.x; b < args.batch; b += gridDim.x) {
    const T* query = static_cast<const T*>(args.query) + b * args.dim;
    float* weight = kind.weight + b * n;
    for (unsigned r = threadIdx.y; r < n; r += kWarps) {
      const T* row = gathered_row<T>(args, kind, b, r);
      float score = -INFINITY;
      if (row != nullptr) {
        score = args.scale *
                row_product<T, kCount>(query, row, cache != nullptr ? cache + int64_t{r} * args.dim : cache, args.dim);
        if (args.log_prior != nullptr)
          score += args.log_prior[b * args.pairs + r / static_cast<unsigned>(kind.prompts)];
      }
      if (threadIdx.x == 0) weight[r] = score;
    }
    __syncthreads();
    // Every warp finds the same maximum and the same sum.
    float most = -INFINITY, total = 0.0f;
    for (unsigned r = threadIdx.x; r < n; r += kLanes) most = fmaxf(most, weight[r]);
    most = warp_max(most);
    for (unsigned r = threadIdx.x; r < n; r += kLanes) total += expf(weight[r] - most);
    total = warp_sum(total);
    __syncthreads();
    const bool alive = most > -INFINITY;
    for (unsigned r = thread; r < n; r += kThreads) {
      weight[r] = alive ? expf(weight[r] - most) / total : 0.0f;
    }
    __syncthreads();
    for (int64_t c = int64_t{thread} * kCount; c < args.dim; c += kThreads * kCount) {
      float sum[kCount] = {};
      add_rows<T, kCount>(args, kind, weight, cache, b, c, sum);
      store_pack<T, kCount>(static_cast<T*>(kind.out) + b * args.dim + c, sum, 1.0f);
    }
    __syncthreads();  // the next image overwrites the cache
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) gathered_backward_kernel(CaptPromptAttentionCuda args, int cached) {
  CAPT_DYNAMIC_SHARED(T, image);
  const unsigned thread = threadIdx.y * kLanes + threadIdx.x;
  for (int64_t b = blockIdx.x; b < args.batch; b += gridDim.x) {
    T* cache[2] = {};
    float* slopes[2];
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const CaptPromptStream& kind = args.stream[which];
      const unsigned n = rows_of_image(args, kind);
      const int64_t before = which == 0 ? 0 : rows_of_image(args, args.stream[0]);
      if (cached != 0) cache[which] = image + before * args.dim;
      float* slope = slopes[which] = args.workspace + args.batch * before + b * n;
      const float* weight = kind.weight + b * n;
      const T* grad = static_cast<const T*>(kind.grad) + b * args.dim;
      for (unsigned r = threadIdx.y; r < n; r += kWarps) {
        const T* row = gathered_row<T>(args, kind, b, r);
        float product = 0.0f;
        if (row != nullptr) {
          product =
              row_product<T, kCount>(grad, row, cached != 0 ? cache[which] + int64_t{r} * args.dim : nullptr, args.dim);
        }
        if (threadIdx.x == 0) slope[r] = product;
      }
      __syncthreads();
      float mean = 0.0f;
      for (unsigned r = threadIdx.x; r < n; r += kLanes) mean += weight[r] * slope[r];
      mean = warp_sum(mean);
      __syncthreads();
      for (unsigned r = thread; r < n; r += kThreads) {
        const bool present = gathered_row<T>(args, kind, b, r) != nullptr;
        slope[r] = present ? weight[r] * (slope[r] - mean) : 0.0f;
      }
      __syncthreads();
    }
    if (args.grad_query != nullptr) {
      for (int64_t c = int64_t{thread} * kCount; c < args.dim; c += kThreads * kCount) {
        float sum[kCount] = {};
        add_rows<T, kCount>(args, args.stream[0], slopes[0], cache[0], b, c, sum);
        add_rows<T, kCount>(args, args.stream[1], slopes[1], cache[1], b, c, sum);
        store_pack<T, kCount>(static_cast<T*>(args.grad_query) + b * args.dim + c, sum, args.scale);
      }
    }
    if (args.grad_prior != nullptr) {
      for (int64_t j = thread; j < args.pairs; j += kThreads) {
        float sum = 0.0f;
        for (int64_t i = 0; i < args.stream[0].prompts; ++i) sum += slopes[0][j * args.stream[0].prompts + i];
        for (int64_t i = 0; i < args.stream[1].prompts; ++i) sum += slopes[1][j * args.stream[1].prompts + i];
        args.grad_prior[b * args.pairs + j] = sum;
      }
    }
    __syncthreads();  // the next image overwrites the cache
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) table_gradient_kernel(CaptPromptAttentionCuda args) {
  const CaptPromptStream kind = args.stream[blockIdx.y];
  if (kind.grad_table == nullptr) return;
  const int64_t n = args.pairs * kind.prompts, entries = args.batch * args.pairs;
  const float* slopes = args.workspace + (blockIdx.y == 0 ? 0 : args.batch * args.pairs * args.stream[0].prompts);
  for (int64_t t = blockIdx.x; t < kind.rows; t += gridDim.x) {
    int64_t first = 0;  // of the sorted indices that are t or more
    for (int64_t stop = entries; first < stop;) {
      const int64_t middle = (first + stop) / 2;
      if (kind.sorted[middle] < t) {
        first = middle + 1;
      } else {
        stop = middle;
      }
    }
    for (int64_t i = 0; i < kind.prompts; ++i) {
      for (int64_t c = threadIdx.x * kCount; c < args.dim; c += kThreads * kCount) {
        float sum[kCount] = {};
        for (int64_t e = first; e < entries && kind.sorted[e] == t; ++e) {
          const int64_t b = kind.order[e] / args.pairs;
          const int64_t r = kind.order[e] % args.pairs * kind.prompts + i;
          const float weight = kind.weight[b * n + r], slope = args.scale * slopes[b * n + r];
          const auto g = *reinterpret_cast<const Pack<T, kCount>*>(static_cast<const T*>(kind.grad) + b * args.dim + c);
          const auto q =
              *reinterpret_cast<const Pack<T, kCount>*>(static_cast<const T*>(args.query) + b * args.dim + c);
#pragma unroll
          for (int j = 0; j < kCount; ++j) sum[j] += weight * widen(g.value[j]) + slope * widen(q.value[j]);
        }
        store_pack<T, kCount>(static_cast<T*>(kind.grad_table) + (t * kind.prompts + i) * args.dim + c, sum, 1.0f);
      }
    }
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

unsigned blocks(int64_t wanted) { return static_cast<unsigned>(wanted < 0x7FFFFFFF ? wanted : 0x7FFFFFFF); }

template <typename T, int kCount>
int forward(const CaptPromptAttentionCuda& args, void* stream) {
  const unsigned first = rows_of_image(args, args.stream[0]), second = rows_of_image(args, args.stream[1]);
  const int64_t bytes = (first > second ? first : second) * args.dim * static_cast<int64_t>(sizeof(T));
  const int cached = bytes <= kCacheBytes;
  CAPT_LAUNCH_SHARED((gathered_forward_kernel<T, kCount>), dim3(blocks(args.batch), 2), dim3(kLanes, kWarps),
                     cached ? static_cast<size_t>(bytes) : 0, stream, args, cached);
  return CAPT_LAST_ERROR();
}

bool needs_tables(const CaptPromptAttentionCuda& args) {
  return args.stream[0].grad_table != nullptr || args.stream[1].grad_table != nullptr;
}

template <typename T, int kCount>
int backward(const CaptPromptAttentionCuda& args, void* stream) {
  const int64_t bytes = (int64_t{rows_of_image(args, args.stream[0])} + rows_of_image(args, args.stream[1])) *
                        args.dim * static_cast<int64_t>(sizeof(T));
  const int cached = args.grad_query != nullptr && bytes <= kCacheBytes;
  if (args.batch > 0) {
    CAPT_LAUNCH_SHARED((gathered_backward_kernel<T, kCount>), dim3(blocks(args.batch)), dim3(kLanes, kWarps),
                       cached ? static_cast<size_t>(bytes) : 0, stream, args, cached);
    const int error = CAPT_LAST_ERROR();
    if (error != 0) return error;
  }
  const int64_t most = args.stream[0].rows > args.stream[1].rows ? args.stream[0].rows : args.stream[1].rows;
  if (needs_tables(args) && most > 0) {
    CAPT_LAUNCH((table_gradient_kernel<T, kCount>), dim3(blocks(most), 2), dim3(kThreads), stream, args);
  }
  return CAPT_LAST_ERROR();
}

// kBackward chooses the pass: 16-byte packs where widths and addresses allow it, single channels otherwise.
template <typename T, bool kBackward>
int dispatch(const CaptPromptAttentionCuda& args, void* stream) {
  constexpr int kCount = 16 / sizeof(T);
  bool packs = args.dim % kCount == 0 && aligned(args.query) && aligned(args.grad_query);
  for (const CaptPromptStream& kind : args.stream) {
    packs = packs && aligned(kind.table) && aligned(kind.out) && aligned(kind.grad) && aligned(kind.grad_table);
  }
  if (kBackward) return packs ? backward<T, kCount>(args, stream) : backward<T, 1>(args, stream);
  return packs ? forward<T, kCount>(args, stream) : forward<T, 1>(args, stream);
}

template <bool kBackward>
int dispatch_dtype(const CaptPromptAttentionCuda& args, void* stream) {
  switch (args.dtype) {
    case CAPT_FLOAT32:
      return dispatch<float, kBackward>(args, stream);
    case CAPT_FLOAT16:
      return dispatch<HalfBits, kBackward>(args, stream);
    default:
      return dispatch<BfloatBits, kBackward>(args, stream);
  }
}

}  // namespace

extern "C" int capt_prompt_attention_cuda(const CaptPromptAttentionCuda* args, void* stream) {
  return args->batch == 0 ? 0 : dispatch_dtype<false>(*args, stream);
}

extern "C" int64_t capt_prompt_attention_cuda_workspace(const CaptPromptAttentionCuda* args) {
  return args->batch * args->pairs * (args->stream[0].prompts + args->stream[1].prompts);
}

extern "C" int capt_prompt_attention_backward_cuda(const CaptPromptAttentionCuda* args, void* stream) {
  if (args->batch == 0 && !needs_tables(*args)) return 0;
  return dispatch_dtype<true>(*args, stream);
}
