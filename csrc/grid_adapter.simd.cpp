// Diff-Manner Adapter on the CPU: depth-wise 3x3 stencil in token layout (channels contiguous).
//
//   out[b, p, c]          = x[b, p, c] + a_b * sum_t w[t, c] * x[b, p + t, c]      t over the 3x3 neighbourhood
//   partial[b, t, c]      = sum_p g[b, p, c] * x[b, p + t, c]
//
// Both walk along a grid row with the 3x3 window of one vector of channels in registers, so that a step loads three
// new vectors and does nine multiply-adds. Compulsory traffic: tokens read once, result written once.
// Compiled once per instruction-set level; CAPT_LEVEL_NAME is the suffix of the exported functions.

#include "grid_adapter.h"

#include "common/simd.h"

namespace {

struct Window {
  Vector left[3], middle[3], right[3];
};

// Column x of the three grid rows around the current one; outside the grid everything is zero.
template <bool kFull, typename T>
inline void column(const T* const rows[3], int64_t stride, int64_t x, int64_t width, int count, Vector into[3]) {
  for (int i = 0; i < 3; ++i) {
    into[i] = rows[i] != nullptr && x < width ? fetch<kFull>(rows[i] + x * stride, count) : Vector{};
  }
}

template <bool kFull, typename T>
void stencil_row(const T* const rows[3], int64_t stride, int64_t width, const float* packed, int64_t dim, float alpha,
                 T* out, int count) {
  Vector weight[9];
  for (int tap = 0; tap < 9; ++tap) weight[tap] = fetch<kFull>(packed + tap * dim, count);
  Window window = {};
  column<kFull>(rows, stride, 0, width, count, window.middle);
  for (int64_t x = 0; x < width; ++x) {
    column<kFull>(rows, stride, x + 1, width, count, window.right);
    Vector sum = {};
    for (int i = 0; i < 3; ++i) {
      sum +=
          weight[3 * i] * window.left[i] + weight[3 * i + 1] * window.middle[i] + weight[3 * i + 2] * window.right[i];
    }
    put<kFull>(out + x * dim, window.middle[1] + alpha * sum, count);
    for (int i = 0; i < 3; ++i) {
      window.left[i] = window.middle[i];
      window.middle[i] = window.right[i];
    }
  }
}

template <typename T>
void copy_tokens(const CaptGridAdapter& args, const T* image, T* out, int64_t from, int64_t to) {
  for (int64_t token = from; token < to; ++token) {
    memcpy(out + token * args.dim, image + token * args.token_stride, (size_t)args.dim * sizeof(T));
  }
}

// Task = one grid row of one image, or (last task of an image) the tokens outside the grid.
template <typename T>
void adapter_task(const CaptGridAdapter& args, const float* packed, int64_t task) {
  const int64_t b = task / (args.height + 1), y = task % (args.height + 1);
  const T* image = static_cast<const T*>(args.tokens) + b * args.batch_stride;
  T* out = static_cast<T*>(args.out) + b * args.length * args.dim;
  if (y == args.height) {
    copy_tokens(args, image, out, 0, args.n_prefix);
    copy_tokens(args, image, out, args.n_prefix + args.height * args.width, args.length);
    return;
  }
  const float alpha = args.scale * (args.alpha != nullptr ? args.alpha[b * args.alpha_stride] : 1.0f);
  const T* grid = image + args.n_prefix * args.token_stride;
  const int64_t pitch = args.width * args.token_stride;
  T* target = out + (args.n_prefix + y * args.width) * args.dim;
  for (int64_t c = 0; c < args.dim; c += kWidth) {
    const T* here = grid + y * pitch + c;
    const T* rows[3] = {y > 0 ? here - pitch : nullptr, here, y + 1 < args.height ? here + pitch : nullptr};
    const int count = args.dim - c < kWidth ? (int)(args.dim - c) : kWidth;
    if (count == kWidth) {
      stencil_row<true>(rows, args.token_stride, args.width, packed + c, args.dim, alpha, target + c, count);
    } else {
      stencil_row<false>(rows, args.token_stride, args.width, packed + c, args.dim, alpha, target + c, count);
    }
  }
}

// Sums of one image and one vector of channels.
template <bool kFull, typename T>
void correlate_channels(const CaptGridCorrelate& args, const T* grid, const T* grad, float* partial, int count) {
  Vector sum[9] = {};
  const int64_t pitch = args.width * args.token_stride;
  for (int64_t y = 0; y < args.height; ++y) {
    const T* here = grid + y * pitch;
    const T* rows[3] = {y > 0 ? here - pitch : nullptr, here, y + 1 < args.height ? here + pitch : nullptr};
    const T* grad_row = grad + y * args.width * args.grad_token_stride;
    Window window = {};
    column<kFull>(rows, args.token_stride, 0, args.width, count, window.middle);
    for (int64_t x = 0; x < args.width; ++x) {
      column<kFull>(rows, args.token_stride, x + 1, args.width, count, window.right);
      const Vector g = fetch<kFull>(grad_row + x * args.grad_token_stride, count);
      for (int i = 0; i < 3; ++i) {
        sum[3 * i] += g * window.left[i];
        sum[3 * i + 1] += g * window.middle[i];
        sum[3 * i + 2] += g * window.right[i];
        window.left[i] = window.middle[i];
        window.middle[i] = window.right[i];
      }
    }
  }
  for (int tap = 0; tap < 9; ++tap) put<kFull>(partial + tap * args.dim, sum[tap], count);
}

// Task = one image and CAPT_TASK_CHANNELS channels.
template <typename T>
void correlate_task(const CaptGridCorrelate& args, int64_t task) {
  const int64_t blocks = (args.dim + CAPT_TASK_CHANNELS - 1) / CAPT_TASK_CHANNELS;
  const int64_t b = task / blocks, first = task % blocks * CAPT_TASK_CHANNELS;
  const int64_t last = first + CAPT_TASK_CHANNELS < args.dim ? first + CAPT_TASK_CHANNELS : args.dim;
  const T* grid = static_cast<const T*>(args.tokens) + b * args.batch_stride + args.n_prefix * args.token_stride;
  const T* grad =
      static_cast<const T*>(args.grad) + b * args.grad_batch_stride + args.n_prefix * args.grad_token_stride;
  float* partial = args.partial + b * 9 * args.dim;
  for (int64_t c = first; c < last; c += kWidth) {
    const int count = last - c < kWidth ? (int)(last - c) : kWidth;
    if (count == kWidth) {
      correlate_channels<true>(args, grid + c, grad + c, partial + c, count);
    } else {
      correlate_channels<false>(args, grid + c, grad + c, partial + c, count);
    }
  }
}

}  // namespace

#define CAPT_PASTE(name, level) name##_##level
#define CAPT_NAME(name, level) CAPT_PASTE(name, level)

extern "C" void CAPT_NAME(capt_grid_adapter, CAPT_LEVEL_NAME)(const CaptGridAdapter* args, const float* packed,
                                                              int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    switch (args->dtype) {
      case CAPT_FLOAT32:
        adapter_task<float>(*args, packed, task);
        break;
      case CAPT_FLOAT16:
        adapter_task<Half>(*args, packed, task);
        break;
      default:
        adapter_task<Bfloat>(*args, packed, task);
    }
  }
}

extern "C" void CAPT_NAME(capt_grid_correlate, CAPT_LEVEL_NAME)(const CaptGridCorrelate* args, int64_t begin,
                                                                int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    switch (args->dtype) {
      case CAPT_FLOAT32:
        correlate_task<float>(*args, task);
        break;
      case CAPT_FLOAT16:
        correlate_task<Half>(*args, task);
        break;
      default:
        correlate_task<Bfloat>(*args, task);
    }
  }
}
