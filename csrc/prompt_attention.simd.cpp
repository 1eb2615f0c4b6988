// Gathered prompt attention on the CPU: per image and stream, with r over the k * s rows of the image's pairs,
//
//   score[r] = scale * <query, row[r]> + log_prior[pair of r]     weight = softmax(score)     out = sum_r weight[r]
//   row[r] back[r]  = <grad, row[r]>     grad_score[r] = weight[r] * (back[r] - sum_r weight[r] back[r]) grad_query =
//   scale * sum_r grad_score[r] row[r]     grad_row[r] = weight[r] grad + scale * grad_score[r] query
//
// The rows of an image (15 rows of 512 channels are 30 KB) are read from memory once: the second pass finds them in the
// first-level cache. The table gradient goes by table rows, each summed by one task over its users in ascending order.
// Compiled once per instruction-set level; CAPT_LEVEL_NAME is the suffix of the exported functions.

#include "prompt_attention.h"

#include <math.h>

#include "common/exp2.h"
#include "common/simd.h"

namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int kBlock = 4;  // vectors of channels, or rows, worked on together

// dots[i] = <a, b_i> for kRows rows that lie dim apart.
template <int kRows, typename T>
inline void dots(const T* a, const T* b, int64_t dim, float* out) {
  Vector sum[kRows] = {}, more[kRows] = {};
  int64_t c = 0;
  for (; c + 2 * kWidth <= dim; c += 2 * kWidth) {
    const Vector one = load(a + c), two = load(a + c + kWidth);
    for (int i = 0; i < kRows; ++i) {
      sum[i] += one * load(b + i * dim + c);
      more[i] += two * load(b + i * dim + c + kWidth);
    }
  }
  for (; c < dim; c += kWidth) {
    const int count = dim - c < kWidth ? (int)(dim - c) : kWidth;
    const Vector one = load_some(a + c, count);
    for (int i = 0; i < kRows; ++i) sum[i] += one * load_some(b + i * dim + c, count);
  }
  for (int i = 0; i < kRows; ++i) out[i] = total(sum[i] + more[i]);
}

template <typename T>
inline void dots_of(const T* a, const T* b, int64_t rows, int64_t dim, float* out) {
  int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) dots<kBlock>(a, b + r * dim, dim, out + r);
  for (; r < rows; ++r) dots<1>(a, b + r * dim, dim, out + r);
}

// sum[j] += factor[r] * rows[r] for the channels of kVectors vectors.
template <int kVectors, bool kFull, typename T>
inline void mix(const T* rows, const float* factor, int64_t n_rows, int64_t dim, Vector* sum, int count) {
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int j = 0; j < kVectors; ++j) sum[j] += factor[r] * fetch<kFull>(rows + r * dim + j * kWidth, count);
  }
}

// out[c] = factor * sum over the streams and pairs of an image of weight[j, r] * row[j, r][c].
template <int kVectors, bool kFull, typename T>
inline void mix_image(const CaptPromptAttention& args, int64_t b, int from, int to, const float* const weight[2],
                      int64_t c, float factor, T* out, int count) {
  Vector sum[kVectors] = {};
  for (int i = from; i < to; ++i) {
    const int64_t* index = args.index[i] + b * args.k;
    const T* table = static_cast<const T*>(args.table[i]) + c;
    for (int64_t j = 0; j < args.k; ++j) {
      if (index[j] < 0) continue;
      mix<kVectors, kFull>(table + index[j] * args.rows[i] * args.dim, weight[i] + (b * args.k + j) * args.rows[i],
                           args.rows[i], args.dim, sum, count);
    }
  }
  for (int j = 0; j < kVectors; ++j) put<kFull>(out + c + j * kWidth, factor * sum[j], count);
}

template <typename T>
inline void mix_channels(const CaptPromptAttention& args, int64_t b, int from, int to, const float* const weight[2],
                         float factor, T* out) {
  int64_t c = 0;
  for (; c + kBlock * kWidth <= args.dim; c += kBlock * kWidth) {
    mix_image<kBlock, true>(args, b, from, to, weight, c, factor, out, kWidth);
  }
  for (; c + kWidth <= args.dim; c += kWidth) {
    mix_image<1, true>(args, b, from, to, weight, c, factor, out, kWidth);
  }
  if (c < args.dim) mix_image<1, false>(args, b, from, to, weight, c, factor, out, (int)(args.dim - c));
}

// Softmax in place over the rows of present pairs; zeros where a pair is absent, or everywhere when nothing is above
// -infinity (a NaN is not).
inline void softmax(const int64_t* index, int64_t k, int64_t rows, float* weight) {
  float top = -INFINITY;
  for (int64_t at = 0; at < k * rows; ++at) {
    if (weight[at] > top) top = weight[at];
  }
  float sum = 0.0f;
  if (top > -INFINITY) {
    for (int64_t at = 0; at < k * rows; at += kWidth) {
      const int count = k * rows - at < kWidth ? (int)(k * rows - at) : kWidth;
      const Vector e = exp2_vector((load_some(weight + at, count) - top) * kLog2E);
      store_some(weight + at, e, count);
    }
    for (int64_t at = 0; at < k * rows; ++at) sum += index[at / rows] < 0 ? 0.0f : weight[at];
  }
  for (int64_t at = 0; at < k * rows; ++at) {
    weight[at] = top > -INFINITY && index[at / rows] >= 0 ? weight[at] / sum : 0.0f;
  }
}

// Task = one image.
template <typename T>
void forward_task(const CaptPromptAttention& args, int64_t b) {
  const T* query = static_cast<const T*>(args.query) + b * args.dim;
  for (int i = 0; i < 2; ++i) {
    const int64_t rows = args.rows[i];
    const int64_t* index = args.index[i] + b * args.k;
    float* weight = args.weight[i] + b * args.k * rows;
    for (int64_t j = 0; j < args.k; ++j) {
      float* score = weight + j * rows;
      if (index[j] >= 0) {
        dots_of(query, static_cast<const T*>(args.table[i]) + index[j] * rows * args.dim, rows, args.dim, score);
      }
      const float prior = args.log_prior != nullptr ? args.log_prior[b * args.k + j] : 0.0f;
      for (int64_t r = 0; r < rows; ++r) score[r] = index[j] < 0 ? -INFINITY : args.scale * score[r] + prior;
    }
    softmax(index, args.k, rows, weight);
    const float* const weights[2] = {args.weight[0], args.weight[1]};
    mix_channels(args, b, i, i + 1, weights, 1.0f, static_cast<T*>(args.out[i]) + b * args.dim);
  }
}

// Task = one image: gradients of its scores, query and priors.
template <typename T>
void backward_task(const CaptPromptAttentionBackward& args, int64_t b) {
  const CaptPromptAttention& given = args.forward;
  for (int i = 0; i < 2; ++i) {
    const int64_t rows = given.rows[i];
    const int64_t* index = given.index[i] + b * given.k;
    const T* grad = static_cast<const T*>(args.grad[i]) + b * given.dim;
    const float* weight = given.weight[i] + b * given.k * rows;
    float* back = args.grad_score[i] + b * given.k * rows;
    float mean = 0.0f;
    for (int64_t j = 0; j < given.k; ++j) {
      if (index[j] >= 0) {
        const T* table = static_cast<const T*>(given.table[i]) + index[j] * rows * given.dim;
        dots_of(grad, table, rows, given.dim, back + j * rows);
      }
      for (int64_t r = j * rows; r < (j + 1) * rows; ++r) {
        if (index[j] < 0) back[r] = 0.0f;
        mean += weight[r] * back[r];
      }
    }
    for (int64_t r = 0; r < given.k * rows; ++r) back[r] = weight[r] * (back[r] - mean);
  }
  if (args.grad_prior != nullptr) {
    for (int64_t j = b * given.k; j < (b + 1) * given.k; ++j) {
      float sum = 0.0f;
      for (int i = 0; i < 2; ++i) {
        for (int64_t r = 0; r < given.rows[i]; ++r) sum += args.grad_score[i][j * given.rows[i] + r];
      }
      args.grad_prior[j] = sum;
    }
  }
  if (args.grad_query != nullptr) {
    const float* const scores[2] = {args.grad_score[0], args.grad_score[1]};
    mix_channels(given, b, 0, 2, scores, given.scale, static_cast<T*>(args.grad_query) + b * given.dim);
  }
}

template <int kVectors, bool kFull, typename T>
inline void table_row(const CaptPromptAttentionBackward& args, int i, int64_t pair, int64_t r, int64_t c, int count) {
  const CaptPromptAttention& given = args.forward;
  const T* grad = static_cast<const T*>(args.grad[i]) + c;
  const T* query = static_cast<const T*>(given.query) + c;
  Vector sum[kVectors] = {}, more[kVectors] = {};
  for (int64_t use = args.first[i][pair]; use < args.first[i][pair + 1]; ++use) {
    const int64_t at = args.uses[i][use], b = at / given.k;
    const float weight = given.weight[i][at * given.rows[i] + r];
    const float score = args.grad_score[i][at * given.rows[i] + r];
    for (int j = 0; j < kVectors; ++j) {
      sum[j] += weight * fetch<kFull>(grad + b * given.dim + j * kWidth, count);
      more[j] += score * fetch<kFull>(query + b * given.dim + j * kWidth, count);
    }
  }
  T* out = static_cast<T*>(args.grad_table[i]) + (pair * given.rows[i] + r) * given.dim + c;
  for (int j = 0; j < kVectors; ++j) put<kFull>(out + j * kWidth, sum[j] + given.scale * more[j], count);
}

// Task = all rows of one pair of one stream, CAPT_PROMPT_CHANNELS channels.
template <typename T>
void tables_task(const CaptPromptAttentionBackward& args, int64_t task) {
  const CaptPromptAttention& given = args.forward;
  const int64_t blocks = (given.dim + CAPT_PROMPT_CHANNELS - 1) / CAPT_PROMPT_CHANNELS;
  const int64_t begin = task % blocks * CAPT_PROMPT_CHANNELS;
  const int64_t end = begin + CAPT_PROMPT_CHANNELS < given.dim ? begin + CAPT_PROMPT_CHANNELS : given.dim;
  const int i = task / blocks < given.pairs[0] ? 0 : 1;
  const int64_t pair = task / blocks - (i ? given.pairs[0] : 0);
  if (args.first[i][pair] == args.first[i][pair + 1]) {
    for (int64_t r = 0; r < given.rows[i]; ++r) {
      T* out = static_cast<T*>(args.grad_table[i]) + (pair * given.rows[i] + r) * given.dim;
      memset(out + begin, 0, (size_t)(end - begin) * sizeof(T));
    }
    return;
  }
  for (int64_t r = 0; r < given.rows[i]; ++r) {
    int64_t c = begin;
    for (; c + kBlock * kWidth <= end; c += kBlock * kWidth) table_row<kBlock, true, T>(args, i, pair, r, c, kWidth);
    for (; c + kWidth <= end; c += kWidth) table_row<1, true, T>(args, i, pair, r, c, kWidth);
    if (c < end) table_row<1, false, T>(args, i, pair, r, c, (int)(end - c));
  }
}

}  // namespace

#define CAPT_PASTE(name, level) name##_##level
#define CAPT_NAME(name, level) CAPT_PASTE(name, level)
#define CAPT_TASKS(function, dtype)                \
  for (int64_t task = begin; task < end; ++task) { \
    switch (dtype) {                               \
      case CAPT_FLOAT32:                           \
        function<float>(*args, task);              \
        break;                                     \
      case CAPT_FLOAT16:                           \
        function<Half>(*args, task);               \
        break;                                     \
      default:                                     \
        function<Bfloat>(*args, task);             \
    }                                              \
  }

extern "C" void CAPT_NAME(capt_prompt_attention, CAPT_LEVEL_NAME)(const CaptPromptAttention* args, int64_t begin,
                                                                  int64_t end) {
  CAPT_TASKS(forward_task, args->dtype)
}

extern "C" void CAPT_NAME(capt_prompt_attention_backward, CAPT_LEVEL_NAME)(const CaptPromptAttentionBackward* args,
                                                                           int64_t begin, int64_t end) {
  CAPT_TASKS(backward_task, args->forward.dtype)
}

extern "C" void CAPT_NAME(capt_prompt_attention_tables, CAPT_LEVEL_NAME)(const CaptPromptAttentionBackward* args,
                                                                         int64_t begin, int64_t end) {
  CAPT_TASKS(tables_task, args->forward.dtype)
}
