// Router of a mixture of experts, and what its backward pass needs beside plain products. The experts are in
// expert_mix.cu.
//
//   probs   = softmax(x gate^T)               weights = top_k of probs, renormalised        load = counts / tokens
//
// Traffic: x is read once for 16 experts, gate stays in L1; 8 * experts bytes written a token.
//
//   router:  one warp a token; lane l multiplies columns l, l + 32, ... by all experts, butterfly sums over the warp.
//            Selection by rank: expert e is kept if fewer than top_k experts come before it (larger, or equal and
//            lower). Counts are integers, so their sum does not depend on the order; the last block writes load.
//   column_sums: 32 columns x a strip of tokens a block, partial sums in global memory, added in order of the strips.
//
// Limits: any sizes, 64-bit offsets. No float atomics: results are bitwise repeatable.

#include "expert_gating.cuh"
#include "expert_gating_cuda.h"

namespace {

constexpr int kWarps = 8;
constexpr int kExperts = 16;      // logits a pass over a token keeps in registers
constexpr int kMaxShared = 8192;  // experts whose counts fit into shared memory
constexpr int kMaxBlocks = 1024;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int bit = kLanes / 2; bit > 0; bit /= 2) value += __shfl_xor_sync(kAll, value, bit);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int bit = kLanes / 2; bit > 0; bit /= 2) value = fmaxf(value, __shfl_xor_sync(kAll, value, bit));
  return value;
}

// Logits of one token into row[0 .. experts), by its warp.
template <typename T, int kCount>
__device__ __forceinline__ void logits_of(const T* x, const T* gate, int64_t dim, int64_t experts, int lane,
                                          float* row) {
  for (int64_t first = 0; first < experts; first += kExperts) {
    float sum[kExperts] = {};
    for (int64_t d = int64_t{lane} * kCount; d < dim; d += kLanes * kCount) {
      const auto value = *reinterpret_cast<const Pack<T, kCount>*>(x + d);
#pragma unroll
      for (int e = 0; e < kExperts; ++e) {
        if (first + e < experts) {
          const auto factor = *reinterpret_cast<const Pack<T, kCount>*>(gate + (first + e) * dim + d);
#pragma unroll
          for (int j = 0; j < kCount; ++j) sum[e] += widen(value.value[j]) * widen(factor.value[j]);
        }
      }
    }
    float mine = 0.0f;
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      if (first + e < experts) {
        const float total = warp_sum(sum[e]);
        if (lane == e) mine = total;
      }
    }
    if (lane < kExperts && first + lane < experts) row[first + lane] = mine;
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kLanes* kWarps) expert_router_kernel(CaptExpertRouterCuda args) {
  CAPT_DYNAMIC_SHARED(int32_t, shared_count);
  CAPT_SHARED(int, is_last, 1);
  const bool counts_shared = args.experts <= kMaxShared;
  int32_t* count = counts_shared ? shared_count : args.counter;
  if (counts_shared) {
    for (int64_t e = threadIdx.x; e < args.experts; e += blockDim.x) count[e] = 0;
  }
  __syncthreads();
  const int lane = threadIdx.x % kLanes;
  for (int64_t n = int64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes; n < args.tokens;
       n += int64_t{gridDim.x} * kWarps) {
    float* row = args.probs + n * args.experts;
    logits_of<T, kCount>(static_cast<const T*>(args.x) + n * args.dim, static_cast<const T*>(args.gate), args.dim,
                         args.experts, lane, row);
    __syncwarp();
    float top = -INFINITY, total = 0.0f;
    for (int64_t e = lane; e < args.experts; e += kLanes) top = fmaxf(top, row[e]);
    top = warp_max(top);
    for (int64_t e = lane; e < args.experts; e += kLanes) {
      const float mass = expf(row[e] - top);
      row[e] = mass;
      total += mass;
    }
    total = warp_sum(total);
    for (int64_t e = lane; e < args.experts; e += kLanes) row[e] /= total;
    __syncwarp();
    float* weight = args.weights + n * args.experts;
    float kept_mass = 0.0f;
    for (int64_t e = lane; e < args.experts; e += kLanes) {
      const float p = row[e];
      int64_t before = 0;
      for (int64_t j = 0; j < args.experts; ++j) before += row[j] > p || (row[j] == p && j < e);
      const float kept = p * (before < args.top_k ? 1.0f : 0.0f);  // a product: NaN stays NaN
      weight[e] = kept;
      kept_mass += kept;
    }
    kept_mass = warp_sum(kept_mass);
    for (int64_t e = lane; e < args.experts; e += kLanes) {
      weight[e] /= kept_mass;
      if (weight[e] > 0.0f) atomicAdd(count + e, 1);
    }
  }
  __syncthreads();
  int32_t* const ticket = args.counter + args.experts;
  if (gridDim.x > 1 || !counts_shared) {
    if (counts_shared) {
      for (int64_t e = threadIdx.x; e < args.experts; e += blockDim.x) atomicAdd(args.counter + e, count[e]);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last[0] = atomicAdd(ticket, 1) == static_cast<int32_t>(gridDim.x) - 1;
    __syncthreads();
    __threadfence();
    if (is_last[0] == 0) return;
    count = args.counter;
  }
  for (int64_t e = threadIdx.x; e < args.experts; e += blockDim.x) {
    const int32_t chosen = count == args.counter ? atomicAdd(count + e, 0) : count[e];
    args.load[e] = args.tokens > 0 ? static_cast<float>(chosen) / static_cast<float>(args.tokens) : 0.0f;
  }
}

// Gradient of the logits of each token, and of x; one warp a token.
//   w_e = p_e / S over the kept experts, so dL/dp_e = grad_p_e + (grad_w_e - <grad_w, w>) / S for them.
template <typename T, int kCount>
__global__ void __launch_bounds__(kLanes* kWarps) expert_router_backward_kernel(CaptExpertRouterBackwardCuda args) {
  const int lane = threadIdx.x % kLanes;
  for (int64_t n = int64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes; n < args.tokens;
       n += int64_t{gridDim.x} * kWarps) {
    const float* weight = args.weights + n * args.experts;
    const float* prob = args.probs + n * args.experts;
    const float* grad_weight = args.grad_weights + n * args.experts;
    const float* grad_prob = args.grad_probs + n * args.experts;
    float* logit = args.grad_logits + n * args.experts;
    float kept_mass = 0.0f, mean = 0.0f, inner = 0.0f;
    for (int64_t e = lane; e < args.experts; e += kLanes) {
      if (weight[e] != 0.0f) {
        kept_mass += prob[e];
        mean += grad_weight[e] * weight[e];
      }
    }
    kept_mass = warp_sum(kept_mass);
    mean = warp_sum(mean);
    for (int64_t e = lane; e < args.experts; e += kLanes) {
      const float grad = grad_prob[e] + (weight[e] != 0.0f ? (grad_weight[e] - mean) / kept_mass : 0.0f);
      logit[e] = grad;
      inner += grad * prob[e];
    }
    inner = warp_sum(inner);
    for (int64_t e = lane; e < args.experts; e += kLanes) logit[e] = prob[e] * (logit[e] - inner);
    __syncwarp();
    if (args.grad_x == nullptr) continue;
    const T* gate = static_cast<const T*>(args.gate);
    T* grad_x = static_cast<T*>(args.grad_x) + n * args.dim;
    for (int64_t d = int64_t{lane} * kCount; d < args.dim; d += kLanes * kCount) {
      float sum[kCount] = {};
      for (int64_t e = 0; e < args.experts; ++e) {
        const auto factor = *reinterpret_cast<const Pack<T, kCount>*>(gate + e * args.dim + d);
        const float grad = logit[e];
#pragma unroll
        for (int j = 0; j < kCount; ++j) sum[j] += grad * widen(factor.value[j]);
      }
      Pack<T, kCount> result;
#pragma unroll
      for (int j = 0; j < kCount; ++j) narrow(sum[j], result.value[j]);
      *reinterpret_cast<Pack<T, kCount>*>(grad_x + d) = result;
    }
  }
}

constexpr int kRows = 4;             // factors a pass over the values serves
constexpr int64_t kStrips = 64;      // at most
constexpr int64_t kStripRows = 128;  // at least

int64_t strip_rows(int64_t tokens) { return larger(kStripRows, divide_up(tokens, kStrips)); }
int64_t strips(int64_t tokens) { return larger(1, divide_up(tokens, strip_rows(tokens))); }

template <typename T>
__global__ void __launch_bounds__(kLanes* kWarps) column_sums_kernel(CaptColumnSumsCuda args, int64_t rows_a_strip) {
  CAPT_SHARED(float, shared, kWarps * kRows * kLanes);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t begin = int64_t{blockIdx.y} * rows_a_strip;
  const int64_t end = begin + rows_a_strip < args.tokens ? begin + rows_a_strip : args.tokens;
  const int64_t c = int64_t{blockIdx.x} * kLanes + lane;
  for (int64_t first = int64_t{blockIdx.z} * kRows; first < args.rows; first += int64_t{gridDim.z} * kRows) {
    float sum[kRows] = {};
    if (c < args.columns) {
#pragma unroll 4
      for (int64_t n = begin + warp; n < end; n += kWarps) {
        const float value = widen(static_cast<const T*>(args.value)[n * args.columns + c]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (first + r < args.rows) {
            sum[r] += (args.factor != nullptr ? args.factor[n * args.rows + first + r] : 1.0f) * value;
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) shared[(warp * kRows + r) * kLanes + lane] = sum[r];
    __syncthreads();
    if (warp < kRows && first + warp < args.rows && c < args.columns) {
      float total = 0.0f;
      for (int w = 0; w < kWarps; ++w) total += shared[(w * kRows + warp) * kLanes + lane];
      args.partial[(int64_t{blockIdx.y} * args.rows + first + warp) * args.columns + c] = total;
    }
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kLanes* kWarps) column_finish_kernel(CaptColumnSumsCuda args, int64_t strip_count) {
  const int64_t size = args.rows * args.columns;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += int64_t{gridDim.x} * blockDim.x) {
    float total = 0.0f;
    for (int64_t s = 0; s < strip_count; ++s) total += args.partial[s * size + i];
    narrow(total, static_cast<T*>(args.out)[i]);
  }
}

// ---- backward: between the products ------------------------------------------------------------------------------

constexpr int kHiddenThreads = 256;

// One block a (token, expert). QuickGELU'(z) = s + 1.702 z s (1 - s) with s = sigmoid(1.702 z).
template <typename T>
__global__ void __launch_bounds__(kHiddenThreads)
    expert_hidden_backward_kernel(CaptExpertHiddenBackwardCuda args, Dropout dropout) {
  CAPT_SHARED(float, shared, kHiddenThreads / kLanes);
  const int64_t e = blockIdx.x;
  for (int64_t n = blockIdx.y; n < args.tokens; n += gridDim.y) {
    T* z = static_cast<T*>(args.z) + (n * args.experts + e) * args.hidden;
    T* g = static_cast<T*>(args.g) + (e * args.tokens + n) * args.hidden;
    const T* bias = static_cast<const T*>(args.b_in) + e * args.hidden;
    const float weight = args.weights[n * args.experts + e];
    const RowDropout survives(dropout, n, e);
    float inner = 0.0f;
    for (int64_t h = threadIdx.x; h < args.hidden; h += kHiddenThreads) {
      float grad_z = 0.0f, weighted = 0.0f;
      if (weight != 0.0f) {
        const float scale = dropout.threshold != 0 ? survives(h) : 1.0f;
        const float value = widen(z[h]) + widen(bias[h]), s = sigmoid(value), grad = widen(g[h]);
        const float active = scale != 0.0f ? value * s * scale : 0.0f;
        inner += active * grad;
        grad_z = weight * grad * scale * (s + 1.702f * value * s * (1.0f - s));  // NaN even where nothing survives
        weighted = weight * active;
      }
      narrow(grad_z, z[h]);
      narrow(weighted, g[h]);
    }
    for (int64_t d = threadIdx.x; d < args.dim; d += kHiddenThreads) {
      inner += widen(static_cast<const T*>(args.grad_y)[n * args.dim + d]) *
               widen(static_cast<const T*>(args.b_out)[e * args.dim + d]);
    }
#pragma unroll
    for (int bit = kLanes / 2; bit > 0; bit /= 2) inner += __shfl_xor_sync(kAll, inner, bit);
    if (threadIdx.x % kLanes == 0) shared[threadIdx.x / kLanes] = inner;
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0.0f;
      for (int w = 0; w < kHiddenThreads / kLanes; ++w) total += shared[w];
      args.grad_weights[n * args.experts + e] = weight != 0.0f ? total : 0.0f;
    }
    __syncthreads();
  }
}

// ---- host side ---------------------------------------------------------------------------------------------------

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int clear(int32_t* data, int64_t count, void* stream) {
#ifdef __CUDACC__
  return static_cast<int>(
      cudaMemsetAsync(data, 0, static_cast<size_t>(count) * sizeof(int32_t), static_cast<cudaStream_t>(stream)));
#else
  (void)stream;
  memset(data, 0, static_cast<size_t>(count) * sizeof(int32_t));
  return 0;
#endif
}

unsigned token_blocks(int64_t tokens) {
  return static_cast<unsigned>(larger(1, smaller(divide_up(tokens, kWarps), kMaxBlocks)));
}

template <typename T, int kCount>
int launch(const CaptExpertRouterCuda& args, void* stream) {
  const unsigned blocks = token_blocks(args.tokens);
  const bool counts_shared = args.experts <= kMaxShared;
  if (blocks > 1 || !counts_shared) {
    const int error = clear(args.counter, args.experts + 1, stream);
    if (error != 0) return error;
  }
  const int64_t bytes = (counts_shared ? args.experts : 1) * static_cast<int64_t>(sizeof(int32_t));
  CAPT_LAUNCH_SHARED((expert_router_kernel<T, kCount>), dim3(blocks), dim3(kLanes * kWarps), static_cast<size_t>(bytes),
                     stream, args);
  return CAPT_LAST_ERROR();
}

template <typename T, int kCount>
int launch(const CaptExpertRouterBackwardCuda& args, void* stream) {
  CAPT_LAUNCH((expert_router_backward_kernel<T, kCount>), dim3(token_blocks(args.tokens)), dim3(kLanes * kWarps),
              stream, args);
  return CAPT_LAST_ERROR();
}

template <typename T, typename Args>
int by_width(const Args& args, const void* grad_x, void* stream) {
  constexpr int kCount = 16 / sizeof(T);
  const bool packs = args.dim % kCount == 0 && aligned(args.x, 16) && aligned(args.gate, 16) && aligned(grad_x, 16);
  return packs ? launch<T, kCount>(args, stream) : launch<T, 1>(args, stream);
}

template <typename Args>
int by_dtype(const Args& args, const void* grad_x, void* stream) {
  switch (args.dtype) {
    case CAPT_FLOAT32:
      return by_width<float>(args, grad_x, stream);
    case CAPT_FLOAT16:
      return by_width<HalfBits>(args, grad_x, stream);
    default:
      return by_width<BfloatBits>(args, grad_x, stream);
  }
}

template <typename T>
int launch_sums(const CaptColumnSumsCuda& args, void* stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(args.columns, kLanes)), static_cast<unsigned>(strips(args.tokens)),
                  static_cast<unsigned>(smaller(divide_up(args.rows, kRows), 65535)));
  CAPT_LAUNCH(column_sums_kernel<T>, grid, dim3(kLanes * kWarps), stream, args, strip_rows(args.tokens));
  return CAPT_LAST_ERROR();
}

template <typename T>
int launch_finish(const CaptColumnSumsCuda& args, void* stream) {
  const int64_t blocks = smaller(divide_up(args.rows * args.columns, kLanes * kWarps), 4096);
  CAPT_LAUNCH(column_finish_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kLanes * kWarps), stream, args,
              strips(args.tokens));
  return CAPT_LAST_ERROR();
}

template <typename T>
int launch_hidden(const CaptExpertHiddenBackwardCuda& args, void* stream) {
  const dim3 grid(static_cast<unsigned>(args.experts), static_cast<unsigned>(smaller(args.tokens, 65535)));
  CAPT_LAUNCH(expert_hidden_backward_kernel<T>, grid, dim3(kHiddenThreads), stream, args,
              dropout_of(args.dropout, args.seed));
  return CAPT_LAST_ERROR();
}

}  // namespace

extern "C" int capt_expert_router_cuda(const CaptExpertRouterCuda* args, void* stream) {
  if (args->experts == 0) return 0;
  return by_dtype(*args, nullptr, stream);
}

extern "C" int64_t capt_column_sums_cuda_workspace(int64_t tokens, int64_t rows, int64_t columns) {
  return strips(tokens) * rows * columns * static_cast<int64_t>(sizeof(float));
}

extern "C" int capt_column_sums_cuda(const CaptColumnSumsCuda* args, void* stream) {
  if (args->rows * args->columns == 0) return 0;
  int (*const sums[])(const CaptColumnSumsCuda&, void*) = {launch_sums<float>, launch_sums<HalfBits>,
                                                           launch_sums<BfloatBits>};
  int (*const finish[])(const CaptColumnSumsCuda&, void*) = {launch_finish<float>, launch_finish<HalfBits>,
                                                             launch_finish<BfloatBits>};
  const int error = sums[args->dtype](*args, stream);
  return error != 0 ? error : finish[args->out_dtype](*args, stream);
}

extern "C" int capt_expert_router_backward_cuda(const CaptExpertRouterBackwardCuda* args, void* stream) {
  if (args->experts == 0) return 0;
  const int error = by_dtype(*args, args->grad_x, stream);
  if (error != 0 || args->grad_gate == nullptr) return error;
  const CaptColumnSumsCuda sums{args->grad_logits, args->x,   args->grad_gate, args->partial, args->tokens,
                                args->experts,     args->dim, args->dtype,     args->dtype};
  return capt_column_sums_cuda(&sums, stream);
}

extern "C" int capt_expert_hidden_backward_cuda(const CaptExpertHiddenBackwardCuda* args, void* stream) {
  if (args->tokens == 0 || args->experts == 0) return 0;
  switch (args->dtype) {
    case CAPT_FLOAT32:
      return launch_hidden<float>(*args, stream);
    case CAPT_FLOAT16:
      return launch_hidden<HalfBits>(*args, stream);
    default:
      return launch_hidden<BfloatBits>(*args, stream);
  }
}
