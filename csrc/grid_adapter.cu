// Diff-Manner Adapter on a GPU: depth-wise 3x3 stencil in token layout (channels contiguous).
//
//   out[b, p, c]     = x[b, p, c] + a_b * sum_t w[c, t] * x[b, p + t, c]           t over the 3x3 neighbourhood
//   partial[b, t, c] = sum_p g[b, p, c] * x[b, p + t, c]                           (weight gradient of one image)
//
// HBM traffic, compulsory: read B*L*D, write B*L*D elements (forward and input gradient); read 2*B*HW*D elements and
// write 9*B*D floats (partial sums).
//
//   block = 32 lanes x 8 warps          lane: kCount neighbouring channels, one load instruction per token
//   grid  = (channel blocks, row blocks + 1, images)
//           channels ->
//      row  |warp 0: ... window slides along x: 3 loads, 9 multiply-adds a channel and step|
//      row+1|warp 1: shares 2 of its 3 input rows with warp 0, through L1                  |
//      last row block: tokens outside the grid, copied
//
// Limits: any sizes (64-bit offsets); channels of a token contiguous. No atomics: results are bitwise repeatable.
// The kernel that is mirrored (transpose) is the gradient of the input.

#include "common/device.cuh"
#include "grid_adapter.h"

namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;

template <typename T, int kCount>
__device__ __forceinline__ void load_pack(const T* source, float* into) {
  const Pack<T, kCount> pack = *reinterpret_cast<const Pack<T, kCount>*>(source);
#pragma unroll
  for (int j = 0; j < kCount; ++j) into[j] = widen(pack.value[j]);
}

// Column x of the three grid rows around row y, zero outside the grid. here: [kCount] channels at (y, 0).
template <typename T, int kCount>
__device__ __forceinline__ void load_column(const T* here, int64_t stride, int64_t pitch, int64_t x, int64_t y,
                                            int64_t width, int64_t height, float (&into)[3][kCount]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int64_t row = y + i - 1;
    if (x < width && row >= 0 && row < height) {
      load_pack<T, kCount>(here + (i - 1) * pitch + x * stride, into[i]);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) into[i][j] = 0.0f;
    }
  }
}

template <typename T, int kCount>
__device__ void stencil_row(const CaptGridAdapter& args, int64_t b, int64_t y, int64_t c) {
  const int64_t pitch = args.width * args.token_stride;
  const T* here =
      static_cast<const T*>(args.tokens) + b * args.batch_stride + args.n_prefix * args.token_stride + y * pitch + c;
  T* out = static_cast<T*>(args.out) + (b * args.length + args.n_prefix + y * args.width) * args.dim + c;
  const float alpha = args.scale * (args.alpha != nullptr ? args.alpha[b * args.alpha_stride] : 1.0f);
  float weight[9][kCount];
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) weight[tap][j] = args.weight[(c + j) * 9 + (args.transpose ? 8 - tap : tap)];
  }
  float left[3][kCount] = {}, middle[3][kCount], right[3][kCount];
  load_column<T, kCount>(here, args.token_stride, pitch, 0, y, args.width, args.height, middle);
  for (int64_t x = 0; x < args.width; ++x) {
    load_column<T, kCount>(here, args.token_stride, pitch, x + 1, y, args.width, args.height, right);
    Pack<T, kCount> result;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        sum += weight[3 * i][j] * left[i][j] + weight[3 * i + 1][j] * middle[i][j] + weight[3 * i + 2][j] * right[i][j];
        left[i][j] = middle[i][j];
      }
      narrow(middle[1][j] + alpha * sum, result.value[j]);
#pragma unroll
      for (int i = 0; i < 3; ++i) middle[i][j] = right[i][j];
    }
    *reinterpret_cast<Pack<T, kCount>*>(out + x * args.dim) = result;
  }
}

template <typename T, int kCount>
__device__ void copy_outside(const CaptGridAdapter& args, int64_t b, int64_t first, int64_t step, int64_t c) {
  const int64_t cells = args.height * args.width;
  for (int64_t i = first; i < args.length - cells; i += step) {
    const int64_t token = i < args.n_prefix ? i : i + cells;
    const T* source = static_cast<const T*>(args.tokens) + b * args.batch_stride + token * args.token_stride + c;
    T* target = static_cast<T*>(args.out) + (b * args.length + token) * args.dim + c;
    *reinterpret_cast<Pack<T, kCount>*>(target) = *reinterpret_cast<const Pack<T, kCount>*>(source);
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kLanes* kWarps) grid_adapter_kernel(CaptGridAdapter args) {
  const int64_t c = (int64_t{blockIdx.x} * kLanes + threadIdx.x) * kCount;
  if (c >= args.dim) return;
  const int64_t row_blocks = (args.height + kWarps - 1) / kWarps;
  for (int64_t b = blockIdx.z; b < args.batch; b += gridDim.z) {
    for (int64_t block = blockIdx.y; block <= row_blocks; block += gridDim.y) {
      const int64_t y = block * kWarps + threadIdx.y;
      if (block == row_blocks) {
        copy_outside<T, kCount>(args, b, threadIdx.y, kWarps, c);
      } else if (y < args.height) {
        stencil_row<T, kCount>(args, b, y, c);
      }
    }
  }
}

// One block: one image, kLanes * kCount channels. Warp w sums rows w, w + 8, ...; the eight sums are then added in warp
// order, so the result does not depend on scheduling.
template <typename T, int kCount>
__global__ void __launch_bounds__(kLanes* kWarps) grid_correlate_kernel(CaptGridCorrelate args) {
  CAPT_SHARED(float, warp_sum, kWarps * kLanes * kCount);
  const int64_t c = (int64_t{blockIdx.x} * kLanes + threadIdx.x) * kCount;
  const bool inside = c < args.dim;
  const int64_t pitch = args.width * args.token_stride;
  for (int64_t b = blockIdx.z; b < args.batch; b += gridDim.z) {
    float sum[9][kCount] = {};
    const T* grid = static_cast<const T*>(args.tokens) + b * args.batch_stride + args.n_prefix * args.token_stride + c;
    const T* grad =
        static_cast<const T*>(args.grad) + b * args.grad_batch_stride + args.n_prefix * args.grad_token_stride + c;
    for (int64_t y = threadIdx.y; inside && y < args.height; y += kWarps) {
      const T* here = grid + y * pitch;
      float left[3][kCount] = {}, middle[3][kCount], right[3][kCount], g[kCount];
      load_column<T, kCount>(here, args.token_stride, pitch, 0, y, args.width, args.height, middle);
      for (int64_t x = 0; x < args.width; ++x) {
        load_column<T, kCount>(here, args.token_stride, pitch, x + 1, y, args.width, args.height, right);
        load_pack<T, kCount>(grad + (y * args.width + x) * args.grad_token_stride, g);
#pragma unroll
        for (int i = 0; i < 3; ++i) {
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            sum[3 * i][j] += g[j] * left[i][j];
            sum[3 * i + 1][j] += g[j] * middle[i][j];
            sum[3 * i + 2][j] += g[j] * right[i][j];
            left[i][j] = middle[i][j];
            middle[i][j] = right[i][j];
          }
        }
      }
    }
    float* mine = warp_sum + (threadIdx.y * kLanes + threadIdx.x) * kCount;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) mine[j] = sum[tap][j];
      __syncthreads();
      const int lane_channel = threadIdx.y * kLanes + threadIdx.x;  // the first kLanes * kCount threads add one channel
      const int64_t channel = int64_t{blockIdx.x} * kLanes * kCount + lane_channel;
      if (lane_channel < kLanes * kCount && channel < args.dim) {
        float total = 0.0f;
        for (int w = 0; w < kWarps; ++w) total += warp_sum[w * kLanes * kCount + lane_channel];
        args.partial[(b * 9 + tap) * args.dim + channel] = total;
      }
      __syncthreads();
    }
  }
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <typename T, int kCount>
int launch_adapter(const CaptGridAdapter& args, void* stream) {
  const int64_t channels = kLanes * kCount;
  const dim3 grid(static_cast<unsigned>((args.dim + channels - 1) / channels),
                  static_cast<unsigned>(smaller((args.height + kWarps - 1) / kWarps + 1, 65535)),
                  static_cast<unsigned>(smaller(args.batch, 65535)));
  CAPT_LAUNCH((grid_adapter_kernel<T, kCount>), grid, dim3(kLanes, kWarps), stream, args);
  return CAPT_LAST_ERROR();
}

template <typename T>
int dispatch_adapter(const CaptGridAdapter& args, void* stream) {
  constexpr int64_t kBytes = 4 * sizeof(T);
  const bool packs = args.dim % 4 == 0 && args.token_stride % 4 == 0 && args.batch_stride % 4 == 0 &&
                     aligned(args.tokens, kBytes) && aligned(args.out, kBytes);
  return packs ? launch_adapter<T, 4>(args, stream) : launch_adapter<T, 1>(args, stream);
}

template <typename T, int kCount>
int launch_correlate(const CaptGridCorrelate& args, void* stream) {
  const int64_t channels = kLanes * kCount;
  const dim3 grid(static_cast<unsigned>((args.dim + channels - 1) / channels), 1,
                  static_cast<unsigned>(smaller(args.batch, 65535)));
  CAPT_LAUNCH((grid_correlate_kernel<T, kCount>), grid, dim3(kLanes, kWarps), stream, args);
  return CAPT_LAST_ERROR();
}

template <typename T>
int dispatch_correlate(const CaptGridCorrelate& args, void* stream) {
  constexpr int64_t kBytes = 4 * sizeof(T);
  const bool packs = args.dim % 4 == 0 && args.token_stride % 4 == 0 && args.batch_stride % 4 == 0 &&
                     args.grad_token_stride % 4 == 0 && args.grad_batch_stride % 4 == 0 &&
                     aligned(args.tokens, kBytes) && aligned(args.grad, kBytes);
  return packs ? launch_correlate<T, 4>(args, stream) : launch_correlate<T, 1>(args, stream);
}

}  // namespace

extern "C" int capt_grid_adapter_cuda(const CaptGridAdapter* args, void* stream) {
  if (args->batch == 0 || args->length == 0 || args->dim == 0) return 0;
  switch (args->dtype) {
    case CAPT_FLOAT32:
      return dispatch_adapter<float>(*args, stream);
    case CAPT_FLOAT16:
      return dispatch_adapter<HalfBits>(*args, stream);
    default:
      return dispatch_adapter<BfloatBits>(*args, stream);
  }
}

extern "C" int capt_grid_correlate_cuda(const CaptGridCorrelate* args, void* stream) {
  if (args->batch == 0 || args->dim == 0) return 0;
  switch (args->dtype) {
    case CAPT_FLOAT32:
      return dispatch_correlate<float>(*args, stream);
    case CAPT_FLOAT16:
      return dispatch_correlate<HalfBits>(*args, stream);
    default:
      return dispatch_correlate<BfloatBits>(*args, stream);
  }
}
