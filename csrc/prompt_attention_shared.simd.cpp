// Shared-key prompt attention on the CPU. Per image and head, with rows r of both streams and keys l:
//
//   s[r, l] = scale * <q[r], k[l]>     lse[r] = log sum_l exp s[r, l]     out[r] = sum_l p[r, l] v[l],  p = exp(s -
//   lse) ds[r, l] = p[r, l] * (<do[r], v[l]> - <do[r], out[r]> + dlse[r]) dq[r] = scale * sum_l ds[r, l] k[l]     dk[l]
//   = scale * sum_r ds[r, l] q[r]     dv[l] = sum_r p[r, l] do[r]
//
// A task packs the keys of its image and head once, widened to float, then walks over blocks of rows of both streams;
// the scores of a block (kBlockRows x kBlockKeys) stay in the first- or second-level cache. Up to kBlockKeys keys the
// softmax is the plain one, beyond that it is rescaled block by block. Scores are kept in units of log 2.
// Compiled once per instruction-set level; CAPT_LEVEL_NAME is the suffix of the exported functions.

#include "prompt_attention_shared.h"

#include <math.h>
#include <stdlib.h>

#include "common/exp2.h"
#include "common/gemm.h"
#include "common/simd.h"
#include "prompt_attention_shared_split.h"

namespace {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr int64_t kBlockRows = 4 * kTileRows, kBlockKeys = 512;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Sizes of one head, in floats.
struct Shape {
  int64_t n_keys, width;  // keys, channels of a head
  int64_t channels;       // width rounded up to whole vectors
  int64_t pitch;          // row length of transposed keys: no multiple of 128 bytes, which would collide in cache
  int64_t scores;         // row length of a block of scores
};

inline Shape shape_of(const CaptSharedAttention& args) {
  Shape shape;
  shape.n_keys = args.n_keys;
  shape.width = args.dim / args.n_heads;
  shape.channels = round_up(shape.width, kWidth);
  shape.pitch = round_up(args.n_keys, 32) + 16;
  shape.scores = args.n_keys < kBlockKeys ? round_up(args.n_keys, 16) : kBlockKeys;
  return shape;
}

// Hands out pieces of one allocation.
struct Scratch {
  float* memory;
  int64_t used;
  float* take(int64_t count) {
    float* piece = memory + used;
    used += round_up(count, 16);
    return piece;
  }
};

inline Scratch allocate(int64_t floats) {
  return Scratch{static_cast<float*>(aligned_alloc(64, (size_t)round_up(floats, 16) * sizeof(float))), 0};
}

// out[r, 0..channels) = factor * source[r, 0..width), zero beyond.
template <typename T>
void widen_rows(const T* source, int64_t stride, int64_t rows, const Shape& shape, float factor, float* out) {
  for (int64_t r = 0; r < rows; ++r, source += stride, out += shape.channels) {
    int64_t c = 0;
    for (; c + kWidth <= shape.width; c += kWidth) store(out + c, factor * load(source + c));
    if (c < shape.width) store(out + c, factor * load_some(source + c, (int)(shape.width - c)));
  }
}

// out[c, l] = source[l, c], zero for l >= n_keys.
template <typename T>
void widen_columns(const T* source, int64_t stride, const Shape& shape, float* out) {
  for (int64_t c = 0; c < shape.width; c += kWidth) {
    const int count = shape.width - c < kWidth ? (int)(shape.width - c) : kWidth;
    for (int64_t l = 0; l < shape.n_keys; ++l) {
      const T* place = source + l * stride + c;
      const Vector value = count == kWidth ? load(place) : load_some(place, count);
      for (int j = 0; j < count; ++j) out[(c + j) * shape.pitch + l] = value[j];
    }
    for (int j = 0; j < count; ++j) {
      memset(out + (c + j) * shape.pitch + shape.n_keys, 0, (size_t)(shape.pitch - shape.n_keys) * sizeof(float));
    }
  }
}

template <typename T>
inline void narrow_row(const float* source, float factor, int64_t width, T* out) {
  int64_t c = 0;
  for (; c + kWidth <= width; c += kWidth) store(out + c, factor * load(source + c));
  if (c < width) store_some(out + c, factor * load(source + c), (int)(width - c));
}

inline void scale_row(float* row, float factor, int64_t n) {
  for (int64_t c = 0; c < n; c += kWidth) store(row + c, factor * load(row + c));
}

// Softmax of one row of a block: scores become exponentials against the running maximum. Returns the factor by which
// what was summed before must shrink.
inline float soften(float* score, int64_t n, float* top, float* sum) {
  Vector high = splat(-INFINITY);
  int64_t l = 0;
  for (; l + kWidth <= n; l += kWidth) {
    const Vector value = load(score + l);
    high = value > high ? value : high;
  }
  if (l < n) {  // beyond the last key
    for (int64_t pad = n; pad < l + kWidth; ++pad) score[pad] = -INFINITY;
    const Vector value = load(score + l);
    high = value > high ? value : high;
  }
  const float best = largest(high), old = *top;
  const float now = best > old ? best : old;
  const float base = now > -INFINITY ? now : 0.0f;  // all scores -infinity: all exponentials 0
  Vector total_of = {};
  for (l = 0; l < n; l += kWidth) {
    const Vector e = exp2_vector(load(score + l) - base);
    store(score + l, e);
    total_of += e;
  }
  const float shrink = old > -INFINITY ? exp2f(old - base) : 0.0f;
  *top = now;
  *sum = *sum * shrink + total(total_of);
  return shrink;
}

inline float log_sum(float top, float sum) {
  return top < INFINITY ? (top > -INFINITY ? kLn2 * (top + log2f(sum)) : log2f(sum)) : top;
}

// One head of one image, rows [first, last) of both streams.
template <typename T>
void forward_task(const CaptSharedAttention& args, int64_t image, int64_t head, int64_t first, int64_t last,
                  Scratch scratch) {
  const Shape shape = shape_of(args);
  float* keys = scratch.take(shape.width * shape.pitch);
  float* values = scratch.take(shape.n_keys * shape.channels);
  float* query = scratch.take(kBlockRows * shape.channels);
  float* score = scratch.take(kBlockRows * shape.scores);
  float* mixed = scratch.take(kBlockRows * shape.channels);
  const int64_t channel = head * shape.width;
  widen_columns(static_cast<const T*>(args.keys) + image * args.key_batch_stride + channel, args.key_row_stride, shape,
                keys);
  widen_rows(static_cast<const T*>(args.values) + image * args.value_batch_stride + channel, args.value_row_stride,
             args.n_keys, shape, 1.0f, values);
  for (int i = 0; i < 2; ++i) {
    const T* source = static_cast<const T*>(args.query[i]) + image * args.query_batch_stride[i] + channel;
    T* out = static_cast<T*>(args.out[i]) + image * args.rows[i] * args.dim + channel;
    float* lse = args.lse[i] + (image * args.n_heads + head) * args.rows[i];
    for (int64_t r = first; r < last && r < args.rows[i]; r += kBlockRows) {
      const int64_t end = last < args.rows[i] ? last : args.rows[i];
      const int64_t rows = end - r < kBlockRows ? end - r : kBlockRows;
      widen_rows(source + r * args.query_row_stride[i], args.query_row_stride[i], rows, shape, args.scale * kLog2E,
                 query);
      float top[kBlockRows], sum[kBlockRows];
      for (int64_t j = 0; j < rows; ++j) top[j] = -INFINITY, sum[j] = 0.0f;
      for (int64_t l = 0; l < args.n_keys; l += kBlockKeys) {
        const int64_t n = args.n_keys - l < kBlockKeys ? args.n_keys - l : kBlockKeys;
        gemm(rows, round_up(n, kWidth), shape.width, Left{query, shape.channels, 1}, keys + l, shape.pitch, score,
             shape.scores, false);
        for (int64_t j = 0; j < rows; ++j) {
          const float shrink = soften(score + j * shape.scores, n, top + j, sum + j);
          if (l > 0 && shrink != 1.0f) scale_row(mixed + j * shape.channels, shrink, shape.channels);
        }
        gemm(rows, shape.channels, n, Left{score, shape.scores, 1}, values + l * shape.channels, shape.channels, mixed,
             shape.channels, l > 0);
      }
      for (int64_t j = 0; j < rows; ++j) {
        narrow_row(mixed + j * shape.channels, 1.0f / sum[j], shape.width, out + (r + j) * args.dim);
        lse[r + j] = log_sum(top[j], sum[j]);
      }
    }
  }
}

// Scores and their upstream products become probabilities and gradients of the scores.
inline void score_gradients(float* score, float* back, int64_t n, float lse, float mean) {
  for (int64_t l = 0; l < n; l += kWidth) {
    const Vector p = exp2_vector(load(score + l) - lse);
    store(score + l, p);
    store(back + l, p * (load(back + l) - mean));
  }
}

template <typename T>
inline float dot(const T* a, const T* b, int64_t width) {
  Vector sum = {};
  int64_t c = 0;
  for (; c + kWidth <= width; c += kWidth) sum += load(a + c) * load(b + c);
  if (c < width) sum += load_some(a + c, (int)(width - c)) * load_some(b + c, (int)(width - c));
  return total(sum);
}

// Gradient rows of one block go to their place: rounded, or into the partial sums of a query shared by images.
template <typename T>
void put_query_gradient(const CaptSharedAttentionBackward& args, int i, int64_t image, bool opens, int64_t group,
                        int64_t r, int64_t rows, int64_t channel, int64_t width, int64_t pitch, const float* gradient) {
  const CaptSharedAttention& given = args.forward;
  for (int64_t j = 0; j < rows; ++j, gradient += pitch) {
    if (!sums_images(args, i)) {
      T* out = static_cast<T*>(args.grad_query[i]) + (image * given.rows[i] + r + j) * given.dim + channel;
      narrow_row(gradient, given.scale, width, out);
      continue;
    }
    float* out = args.partial[i] + (group * given.rows[i] + r + j) * given.dim + channel;
    int64_t c = 0;
    for (; c + kWidth <= width; c += kWidth) {
      const Vector before = opens ? Vector{} : load(out + c);
      store(out + c, before + given.scale * load(gradient + c));
    }
    for (; c < width; ++c) out[c] = (opens ? 0.0f : out[c]) + given.scale * gradient[c];
  }
}

// One head of the images of a group, rows [first, last) of both streams.
template <typename T>
void backward_task(const CaptSharedAttentionBackward& args, int64_t group, int64_t from, int64_t to, int64_t head,
                   int64_t first, int64_t last, Scratch scratch) {
  const CaptSharedAttention& given = args.forward;
  const Shape shape = shape_of(given);
  const bool need_query = args.grad_query[0] != nullptr || args.grad_query[1] != nullptr;
  float* keys = scratch.take(shape.width * shape.pitch);
  float* values = scratch.take(shape.width * shape.pitch);
  float* key_rows = scratch.take(shape.n_keys * shape.channels);
  float* grad_keys = scratch.take(shape.n_keys * shape.channels);
  float* grad_values = scratch.take(shape.n_keys * shape.channels);
  float* query = scratch.take(kBlockRows * shape.channels);
  float* grad = scratch.take(kBlockRows * shape.channels);
  float* gradient = scratch.take(kBlockRows * shape.channels);
  float* score = scratch.take(kBlockRows * shape.scores);
  float* back = scratch.take(kBlockRows * shape.scores);
  const int64_t channel = head * shape.width;
  for (int64_t image = from; image < to; ++image) {
    const T* k = static_cast<const T*>(given.keys) + image * given.key_batch_stride + channel;
    const T* v = static_cast<const T*>(given.values) + image * given.value_batch_stride + channel;
    widen_columns(k, given.key_row_stride, shape, keys);
    widen_columns(v, given.value_row_stride, shape, values);
    if (need_query) widen_rows(k, given.key_row_stride, given.n_keys, shape, 1.0f, key_rows);
    memset(grad_keys, 0, (size_t)(shape.n_keys * shape.channels) * sizeof(float));
    memset(grad_values, 0, (size_t)(shape.n_keys * shape.channels) * sizeof(float));
    for (int i = 0; i < 2; ++i) {
      const int64_t base = image * given.rows[i] * given.dim + channel;
      const T* source = static_cast<const T*>(given.query[i]) + image * given.query_batch_stride[i] + channel;
      const T* upstream = static_cast<const T*>(args.grad[i]) + base;
      const T* out = static_cast<const T*>(given.out[i]) + base;
      const int64_t statistics = (image * given.n_heads + head) * given.rows[i];
      for (int64_t r = first; r < last && r < given.rows[i]; r += kBlockRows) {
        const int64_t end = last < given.rows[i] ? last : given.rows[i];
        const int64_t rows = end - r < kBlockRows ? end - r : kBlockRows;
        widen_rows(source + r * given.query_row_stride[i], given.query_row_stride[i], rows, shape, given.scale * kLog2E,
                   query);
        widen_rows(upstream + r * given.dim, given.dim, rows, shape, 1.0f, grad);
        float lse[kBlockRows], mean[kBlockRows];
        for (int64_t j = 0; j < rows; ++j) {
          lse[j] = given.lse[i][statistics + r + j] * kLog2E;
          mean[j] = dot(upstream + (r + j) * given.dim, out + (r + j) * given.dim, shape.width) -
                    args.grad_lse[i][statistics + r + j];
        }
        for (int64_t l = 0; l < given.n_keys; l += kBlockKeys) {
          const int64_t n = given.n_keys - l < kBlockKeys ? given.n_keys - l : kBlockKeys;
          const int64_t padded = round_up(n, kWidth), pitch = shape.scores;
          gemm(rows, padded, shape.width, Left{query, shape.channels, 1}, keys + l, shape.pitch, score, pitch, false);
          gemm(rows, padded, shape.width, Left{grad, shape.channels, 1}, values + l, shape.pitch, back, pitch, false);
          for (int64_t j = 0; j < rows; ++j) {
            score_gradients(score + j * pitch, back + j * pitch, n, lse[j], mean[j]);
          }
          if (args.grad_query[i] != nullptr) {
            gemm(rows, shape.channels, n, Left{back, pitch, 1}, key_rows + l * shape.channels, shape.channels, gradient,
                 shape.channels, l > 0);
          }
          if (args.grad_keys != nullptr) {
            gemm(n, shape.channels, rows, Left{back, 1, pitch}, query, shape.channels, grad_keys + l * shape.channels,
                 shape.channels, true);
          }
          if (args.grad_values != nullptr) {
            gemm(n, shape.channels, rows, Left{score, 1, pitch}, grad, shape.channels, grad_values + l * shape.channels,
                 shape.channels, true);
          }
        }
        if (args.grad_query[i] != nullptr) {
          put_query_gradient<T>(args, i, image, image == from, group, r, rows, channel, shape.width, shape.channels,
                                gradient);
        }
      }
    }
    for (int64_t l = 0; l < given.n_keys; ++l) {
      const int64_t at = (image * given.n_keys + l) * given.dim + channel;
      if (args.grad_keys != nullptr) {  // the query holds scale / ln 2
        narrow_row(grad_keys + l * shape.channels, kLn2, shape.width, static_cast<T*>(args.grad_keys) + at);
      }
      if (args.grad_values != nullptr) {
        narrow_row(grad_values + l * shape.channels, 1.0f, shape.width, static_cast<T*>(args.grad_values) + at);
      }
    }
  }
}

// Sum of the groups' partial gradients, one row at a time in ascending order of groups.
template <typename T>
void reduce_row(const CaptSharedAttentionBackward& args, int i, int64_t groups, int64_t row) {
  const CaptSharedAttention& given = args.forward;
  const float* partial = args.partial[i] + row * given.dim;
  T* out = static_cast<T*>(args.grad_query[i]) + row * given.dim;
  for (int64_t c = 0; c < given.dim; c += kWidth) {
    const int count = given.dim - c < kWidth ? (int)(given.dim - c) : kWidth;
    Vector sum = {};
    for (int64_t g = 0; g < groups; ++g) {
      const float* place = partial + g * given.rows[i] * given.dim + c;
      sum += count == kWidth ? load(place) : load_some(place, count);
    }
    count == kWidth ? store(out + c, sum) : store_some(out + c, sum, count);
  }
}

}  // namespace

#include "prompt_attention_shared_tiles.h"

#define CAPT_PASTE(name, level) name##_##level
#define CAPT_NAME(name, level) CAPT_PASTE(name, level)
#define CAPT_BY_DTYPE(dtype, function, ...) \
  switch (dtype) {                          \
    case CAPT_FLOAT32:                      \
      function<float>(__VA_ARGS__);         \
      break;                                \
    case CAPT_FLOAT16:                      \
      function<Half>(__VA_ARGS__);          \
      break;                                \
    default:                                \
      function<Bfloat>(__VA_ARGS__);        \
  }

extern "C" int CAPT_NAME(capt_prompt_attention_shared, CAPT_LEVEL_NAME)(const CaptSharedAttention* args, int64_t begin,
                                                                        int64_t end) {
  const Shape shape = shape_of(*args);
  int64_t floats =
      shape.width * shape.pitch + (shape.n_keys + 2 * kBlockRows) * shape.channels + kBlockRows * shape.scores + 128;
#ifdef __AMX_BF16__
  const bool tiles = args->dtype == CAPT_BFLOAT16;
  if (tiles) {
    floats = tile_scratch(*args);
    configure_tiles();
  }
#endif
  const Scratch scratch = allocate(floats);
  for (int64_t task = begin; task < end && scratch.memory != nullptr; ++task) {
    const ForwardTask place = forward_split(*args, task);
#ifdef __AMX_BF16__
    if (tiles) {
      forward_tiles(*args, place.image, place.head, place.first, place.last, scratch);
      continue;
    }
#endif
    CAPT_BY_DTYPE(args->dtype, forward_task, *args, place.image, place.head, place.first, place.last, scratch)
  }
#ifdef __AMX_BF16__
  if (tiles) _tile_release();
#endif
  free(scratch.memory);
  return scratch.memory == nullptr ? 2 : 0;
}

extern "C" int CAPT_NAME(capt_prompt_attention_shared_backward,
                         CAPT_LEVEL_NAME)(const CaptSharedAttentionBackward* args, int64_t begin, int64_t end) {
  const Shape shape = shape_of(args->forward);
  int64_t floats = 2 * shape.width * shape.pitch + 3 * (shape.n_keys + kBlockRows) * shape.channels +
                   2 * kBlockRows * shape.scores + 256;
#ifdef __AMX_BF16__
  const bool tiles = args->forward.dtype == CAPT_BFLOAT16 && args->grad_keys == nullptr && args->grad_values == nullptr;
  if (tiles) {
    floats = tile_scratch(args->forward);
    configure_tiles();
  }
#endif
  const Scratch scratch = allocate(floats);
  for (int64_t task = begin; task < end && scratch.memory != nullptr; ++task) {
    const BackwardTask place = backward_split(*args, task);
#ifdef __AMX_BF16__
    if (tiles) {
      backward_tiles(*args, place.group, place.from, place.to, place.head, place.first, place.last, scratch);
      continue;
    }
#endif
    CAPT_BY_DTYPE(args->forward.dtype, backward_task, *args, place.group, place.from, place.to, place.head, place.first,
                  place.last, scratch)
  }
#ifdef __AMX_BF16__
  if (tiles) _tile_release();
#endif
  free(scratch.memory);
  return scratch.memory == nullptr ? 2 : 0;
}

extern "C" void CAPT_NAME(capt_prompt_attention_shared_reduce, CAPT_LEVEL_NAME)(const CaptSharedAttentionBackward* args,
                                                                                int64_t begin, int64_t end) {
  const int64_t groups = backward_groups(*args);
  for (int64_t row = begin; row < end; ++row) {
    const int i = row < args->forward.rows[0] ? 0 : 1;
    if (!sums_images(*args, i)) continue;
    CAPT_BY_DTYPE(args->forward.dtype, reduce_row, *args, i, groups, row - (i ? args->forward.rows[0] : 0))
  }
}
