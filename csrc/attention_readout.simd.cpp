// Group-wise attention of one query on the CPU: one image and head at a time, keys and values read once for all
// variants. Compiled once per instruction-set level; CAPT_LEVEL_NAME is the suffix of the exported functions.
//
//   scores     s_j = scale <query, key_j>, a vector of keys at a time
//   arrange    keys by group and column (equal biases): a column of a group is a segment
//   sums       x_c = sum over the keys of a segment of exp(s_j - S) value_j, S the largest score of the group
//   variants   mean_m = (sum_c f_mc x_c) / (sum_c f_mc z_c), f = exp(bias - top), z_c as x_c without the values: a
//   small
//              matrix product, whose exponentials were formed once per call
//
// Where scores and biases pull so far apart that the divisor of a variant becomes tiny, that variant and group is
// formed from the scores alone, which is also the way of a single variant.

#include "attention_readout_workspace.h"
#include "common/activation.h"
#include "common/dots.h"
#include "common/logarithm.h"

namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLeastMass = 1e-12f;  // what a product of factors below FLT_MIN may lose is nothing beside it

// A register tile of variants and channels of the matrix product.
constexpr int kTileVariants = 6;
#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 2;
#endif
constexpr int64_t kStreamed = 4 << 20;  // bytes of results that no second-level cache would keep
constexpr int64_t kPanel = kPanelVectors * kWidth;

// Subnormal weights change nothing and are slow.
inline Vector weight_of(Vector x) {
  const Vector value = exponential(x);
  return where(value < splat(__FLT_MIN__), Vector{}, value);
}

inline float logarithm_of(float value) { return logarithm(splat(value))[0]; }

// The largest of `count` numbers; NaN if one is.
inline float largest(const float* values, int64_t count) {
  float top = -kInfinity;
  bool undefined = false;
  for (int64_t i = 0; i < count; ++i) {
    top = values[i] > top ? values[i] : top;
    undefined |= values[i] != values[i];
  }
  return undefined ? __builtin_nanf("") : top;
}

// weights[i] = exp(scores[i] - top); returns their sum.
inline float weigh(const float* scores, float top, int64_t count, float* weights) {
  Vector sum = {};
  for (int64_t i = 0; i < count; i += kWidth) {
    Vector value = weight_of(load_upto(scores + i, count - i) - top);
    if (count - i < kWidth) {
      for (int64_t lane = count - i; lane < kWidth; ++lane) value[lane] = 0.0f;
    }
    store_upto(weights + i, value, count - i);
    sum += value;
  }
  return total(sum);
}

// out[key] = scale <query, key>; query is zero beyond dim.
template <typename T>
void score_keys(const T* keys, int64_t stride, int64_t length, int64_t dim, const float* query, float scale,
                float* out) {
  const int64_t whole = dim / kWidth * kWidth;
  for (int64_t first = 0; first < length; first += kWidth) {
    const T* row[kWidth];
    const T* next[kWidth];
    for (int r = 0; r < kWidth; ++r) {
      row[r] = keys + (first + r < length ? first + r : length - 1) * stride;
      next[r] = keys + (first + r + kKeysAhead < length ? first + r + kKeysAhead : length - 1) * stride;
    }
    Vector sum[kWidth] = {};
    for (int64_t c = 0; c < whole; c += kWidth) {
      const Vector factor = load(query + c);
      for (int r = 0; r < kWidth; ++r) {
        sum[r] += factor * load(row[r] + c);
        __builtin_prefetch(next[r] + c);
      }
    }
    if (whole < dim) {
      const Vector factor = load(query + whole);
      for (int r = 0; r < kWidth; ++r) sum[r] += factor * load_some(row[r] + whole, (int)(dim - whole));
    }
    store_upto(out + first, fold(sum) * scale, length - first);
  }
}

// Channels c .. of the weighted sum of rows, kVectors vectors of them.
template <bool kFull, int kVectors, typename T>
inline void sum_tile(const T* values, int64_t stride, const int32_t* keys, const float* weights, int64_t count,
                     int64_t channels, float* out, int64_t panel_stride, int64_t c) {
  Vector sum[kVectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    const T* row = values + keys[i] * stride + c;
    const char* ahead = reinterpret_cast<const char*>(values + keys[i + kKeysAhead] * stride + c);
    const Vector factor = splat(weights[i]);
    for (int v = 0; v < kVectors; ++v) {
      sum[v] += factor * fetch<kFull>(row + v * kWidth, (int)(channels - c));
      if (v * kWidth * sizeof(T) % 64 == 0) __builtin_prefetch(ahead + v * kWidth * sizeof(T));
    }
  }
  for (int v = 0; v < kVectors; ++v, c += kWidth) store(out + c / kPanel * panel_stride + c % kPanel, sum[v]);
}

// sum_i weights[i] values[keys[i]], in panels that lie panel_stride apart. keys: kKeysAhead more of them can be read.
template <typename T>
void weighted_sum(const T* values, int64_t stride, const int32_t* keys, const float* weights, int64_t count,
                  int64_t channels, float* out, int64_t panel_stride) {
  int64_t c = 0;
  auto step = [&](auto tile, int64_t vectors) __attribute__((always_inline)) {
    tile(values, stride, keys, weights, count, channels, out, panel_stride, c);
    c += vectors * kWidth;
  };
  while (channels - c >= 8 * kWidth) step(sum_tile<true, 8, T>, 8);
  if (channels - c >= 4 * kWidth) step(sum_tile<true, 4, T>, 4);
  while (channels - c >= kWidth) step(sum_tile<true, 1, T>, 1);
  if (c < channels) step(sum_tile<false, 1, T>, 1);
}

// Past the caches, which the results of many variants would only sweep out. The place is a multiple of the vector size.
inline void stream(float* target, Vector value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(target, (__m512)value);
#elif defined(__AVX2__)
  _mm256_stream_ps(target, (__m256)value);
#else
  store(target, value);
#endif
}

// Streamed results become visible to other threads.
inline void finish_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// out[i, channel] = inverse[i] sum_k factors[k, i] sums[k, channel] of kRows variants and a panel.
template <bool kStream, int kRows, int kVectors>
inline void mix_tile(int64_t depth, const float* factors, int64_t pitch, const float* sums, const float* inverse,
                     float* out, int64_t stride, int64_t channels) {
  Vector sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(sums + k * kPanel + v * kWidth);
    for (int i = 0; i < kRows; ++i) {
      const Vector factor = splat(factors[k * pitch + i]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] += factor * row[v];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* place = out + i * stride + v * kWidth;
      if constexpr (kStream) {
        stream(place, sum[i][v] * splat(inverse[i]));
      } else {
        store_upto(place, sum[i][v] * splat(inverse[i]), channels - v * kWidth);
      }
    }
  }
}

template <bool kStream, int kVectors>
void mix_panel(int64_t variants, int64_t depth, const float* factors, int64_t pitch, const float* sums,
               const float* inverse, float* out, int64_t stride, int64_t channels) {
  int64_t m = 0;
  auto step = [&](auto tile, int64_t rows) __attribute__((always_inline)) {
    tile(depth, factors + m, pitch, sums, inverse + m, out + m * stride, stride, channels);
    m += rows;
  };
  while (variants - m >= kTileVariants) step(mix_tile<kStream, kTileVariants, kVectors>, kTileVariants);
  if (variants - m >= 4) step(mix_tile<kStream, 4, kVectors>, 4);
  if (variants - m >= 2) step(mix_tile<kStream, 2, kVectors>, 2);
  if (variants - m >= 1) step(mix_tile<kStream, 1, kVectors>, 1);
}

// All variants and channels of a group.
template <bool kStream>
void mix(const CaptAttentionReadout& args, int64_t depth, const float* factors, int64_t pitch, const float* sums,
         const float* inverse, float* out, int64_t stride) {
  for (int64_t c = 0; c < args.dim; c += kPanel, sums += depth * kPanel) {
    const int64_t left = args.dim - c;
    auto panel = [&](auto tiles) __attribute__((always_inline)) {
      tiles(args.variants, depth, factors, pitch, sums, inverse, out + c, stride, left);
    };
    if (left <= kWidth) {
      panel(mix_panel<kStream, 1>);
    } else if (left <= 2 * kWidth || kPanelVectors == 2) {
      panel(mix_panel<kStream, 2>);
    } else if (left <= 3 * kWidth) {
      panel(mix_panel<kStream, 3>);
    } else {
      panel(mix_panel<kStream, 4>);
    }
  }
}

// Places of `keys` (null: 0, 1, ...) in stable order of key_class, and where each class begins.
template <typename Class>
void counting_sort(const int32_t* keys, int64_t count, int64_t classes, Class key_class, int32_t* out, int32_t* begin) {
  memset(begin, 0, (size_t)(classes + 1) * sizeof *begin);
  for (int64_t i = 0; i < count; ++i) ++begin[key_class(keys == nullptr ? i : keys[i]) + 1];
  for (int64_t c = 0; c < classes; ++c) begin[c + 1] += begin[c];
  for (int64_t i = 0; i < count; ++i) {
    const int32_t key = keys == nullptr ? (int32_t)i : keys[i];
    out[begin[key_class(key)]++] = key;
  }
  for (int64_t c = classes; c > 0; --c) begin[c] = begin[c - 1];
  begin[0] = 0;
}

template <typename T>
class Readout {
 public:
  Readout(const CaptAttentionReadout& args, const CaptReadoutColumns& columns, void* workspace)
      : args_(args), columns_(columns), space_(args, workspace) {
    const int64_t bytes = args.variants * variant_stride() * args.dim * (int64_t)sizeof(float);
    streams_ = bytes >= kStreamed && args.dim % kLargestWidth == 0 && (uintptr_t)args.mean % 64 == 0;
  }

  void run(int64_t begin, int64_t end) {
    // Heads outermost where each has its own arrangement of the keys of all images.
    const bool by_head = args_.group_batch_stride == 0 && args_.bias_heads > 1;
    const int64_t* arranged_groups = nullptr;
    int64_t arranged_head = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = by_head ? task % args_.batch : task / args_.heads;
      const int64_t head = by_head ? task / args_.batch : task % args_.heads;
      const int64_t* groups = args_.groups + image * args_.group_batch_stride;
      const int64_t bias_head = args_.bias_heads > 1 ? head : 0;
      if (arranged_groups != groups || arranged_head != bias_head) arrange(groups, bias_head);
      arranged_groups = groups;
      arranged_head = bias_head;
      one(image, head, bias_head);
    }
    if (streams_) finish_stream();
  }

 private:
  const CaptAttentionReadout& args_;
  const CaptReadoutColumns& columns_;
  const ReadoutWorkspace space_;
  bool streams_;
  const T* values_ = nullptr;  // of the image and head at work
  float* mean_ = nullptr;
  float* log_mass_ = nullptr;

  void arrange(const int64_t* groups, int64_t head) {
    const int64_t length = args_.length;
    auto group_of = [=](int64_t key) { return groups[key]; };
    if (args_.variants == 1) {
      counting_sort(nullptr, length, args_.n_groups, group_of, space_.order, space_.group_begin);
    } else {
      const int32_t* column = columns_.column_of + head * length;
      auto column_of = [=](int64_t key) { return column[key]; };
      counting_sort(nullptr, length, columns_.count[head], column_of, space_.other, space_.counts);
      counting_sort(space_.other, length, args_.n_groups, group_of, space_.order, space_.group_begin);
      split(column, columns_.factors + head * length * columns_.pitch);
    }
    for (int64_t i = 0; i < kKeysAhead; ++i) {
      space_.order[length + i] = length > 0 ? space_.order[length - 1] : 0;
    }
  }

  // Segments of every group, and their factors side by side.
  void split(const int32_t* column_of, const float* factors) {
    int32_t segment = 0;
    for (int64_t g = 0; g < args_.n_groups; ++g) {
      space_.group_segment[g] = segment;
      for (int32_t i = space_.group_begin[g]; i < space_.group_begin[g + 1]; ++i) {
        const int32_t column = column_of[space_.order[i]];
        if (i > space_.group_begin[g] && column == column_of[space_.order[i - 1]]) continue;
        space_.segment_begin[segment] = i;
        memcpy(space_.factors + segment * columns_.pitch, factors + column * columns_.pitch,
               (size_t)columns_.pitch * sizeof(float));
        ++segment;
      }
    }
    space_.group_segment[args_.n_groups] = segment;
    space_.segment_begin[segment] = space_.group_begin[args_.n_groups];
  }

  void one(int64_t image, int64_t head, int64_t bias_head) {
    const int64_t place = (image * args_.heads + head) * args_.n_groups;
    const T* query =
        static_cast<const T*>(args_.query) + image * args_.query_batch_stride + head * args_.query_head_stride;
    const T* keys = static_cast<const T*>(args_.keys) + image * args_.key_batch_stride + head * args_.key_head_stride;
    values_ = static_cast<const T*>(args_.values) + image * args_.value_batch_stride + head * args_.value_head_stride;
    mean_ = args_.mean + place * args_.dim;
    log_mass_ = args_.log_mass + place;
    memset(space_.query, 0, (size_t)rounded_up(args_.dim, kLargestPanel) * sizeof(float));
    widen_row(query, args_.dim, space_.query);
    score_keys(keys, args_.key_token_stride, args_.length, args_.dim, space_.query, args_.scale, space_.scores);
    for (int64_t i = 0; i < args_.length; ++i) space_.arranged[i] = space_.scores[space_.order[i]];
    for (int64_t g = 0; g < args_.n_groups; ++g) {
      if (args_.variants == 1) {
        alone(0, g, bias_head);
      } else {
        together(g, bias_head);
      }
    }
  }

  int64_t variant_stride() const { return args_.batch * args_.heads * args_.n_groups; }

  // Every variant of a group.
  void together(int64_t g, int64_t bias_head) {
    const int32_t begin = space_.group_begin[g], count = space_.group_begin[g + 1] - begin;
    const int32_t first = space_.group_segment[g], segments = space_.group_segment[g + 1] - first;
    const float largest_score = largest(space_.arranged + begin, count);
    const bool plain = largest_score - largest_score == 0.0f;  // finite
    if (plain) {
      weigh(space_.arranged + begin, largest_score, count, space_.weights + begin);
      for (int32_t s = 0; s < segments; ++s) {
        const int32_t from = space_.segment_begin[first + s], keys = space_.segment_begin[first + s + 1] - from;
        float mass = 0.0f;
        for (int32_t i = 0; i < keys; ++i) mass += space_.weights[from + i];
        space_.masses[s] = mass;
        weighted_sum(values_, args_.value_token_stride, space_.order + from, space_.weights + from, keys, args_.dim,
                     space_.sums + s * kPanel, segments * kPanel);
      }
      const float* factors = space_.factors + first * columns_.pitch;
      divisors(segments, factors);
      (streams_ ? mix<true> : mix<false>)(args_, segments, factors, columns_.pitch, space_.sums, space_.inverse,
                                          mean_ + g * args_.dim, variant_stride() * args_.dim);
    }
    const int64_t section = columns_.sections == 1 ? 0 : g;
    const float* top = columns_.top + (bias_head * columns_.sections + section) * args_.variants;
    for (int64_t m = 0; m < args_.variants; ++m) {
      const float mass = space_.variant_mass[m];
      if (plain && mass >= kLeastMass) {
        log_mass_[m * variant_stride() + g] = largest_score + top[m] + logarithm_of(mass);
      } else if (plain && top[m] == -kInfinity) {
        nothing(m, g);
      } else {
        alone(m, g, bias_head);
      }
    }
  }

  // variant_mass = sum over segments of factor times mass, and its inverse.
  void divisors(int64_t segments, const float* factors) {
    for (int64_t m = 0; m < columns_.pitch; m += kWidth) {
      Vector even = {}, odd = {};
      int64_t s = 0;
      for (; s + 1 < segments; s += 2) {
        even += load(factors + s * columns_.pitch + m) * space_.masses[s];
        odd += load(factors + (s + 1) * columns_.pitch + m) * space_.masses[s + 1];
      }
      if (s < segments) even += load(factors + s * columns_.pitch + m) * space_.masses[s];
      const Vector mass = even + odd;
      store(space_.variant_mass + m, mass);
      store(space_.inverse + m, 1.0f / where(mass >= kLeastMass, mass, splat(1.0f)));
    }
  }

  // One variant of a group by its own softmax.
  void alone(int64_t m, int64_t g, int64_t bias_head) {
    const int32_t begin = space_.group_begin[g], count = space_.group_begin[g + 1] - begin;
    const int32_t* keys = space_.order + begin;
    float* scores = space_.masses;
    memcpy(scores, space_.arranged + begin, (size_t)count * sizeof(float));
    if (args_.bias != nullptr) {
      const float* bias = args_.bias + (m * args_.bias_heads + bias_head) * args_.length;
      for (int32_t i = 0; i < count; ++i) scores[i] += bias[keys[i]];
    }
    const float top = largest(scores, count);
    if (top == -kInfinity) return nothing(m, g);
    const float mass = weigh(scores, top, count, space_.weights);
    log_mass_[m * variant_stride() + g] = top == kInfinity ? top : top + logarithm_of(mass);
    weighted_sum(values_, args_.value_token_stride, keys, space_.weights, count, args_.dim, space_.sums, kPanel);
    const float inverse = 1.0f / mass;
    float* out = mean_ + (m * variant_stride() + g) * args_.dim;
    for (int64_t c = 0; c < args_.dim; c += kWidth) store_upto(out + c, load(space_.sums + c) * inverse, args_.dim - c);
  }

  void nothing(int64_t m, int64_t g) {
    log_mass_[m * variant_stride() + g] = -kInfinity;
    memset(mean_ + (m * variant_stride() + g) * args_.dim, 0, (size_t)args_.dim * sizeof(float));
  }
};

template <typename T>
void run_tasks(const CaptAttentionReadout& args, const CaptReadoutColumns& columns, void* workspace, int64_t begin,
               int64_t end) {
  Readout<T>(args, columns, workspace).run(begin, end);
}

}  // namespace

#define CAPT_PASTE(name, level) name##_##level
#define CAPT_NAME(name, level) CAPT_PASTE(name, level)

extern "C" void CAPT_NAME(capt_attention_readout_factors, CAPT_LEVEL_NAME)(const CaptAttentionReadout* args,
                                                                           const CaptReadoutColumns* columns) {
  for (int64_t head = 0; head < args->bias_heads; ++head) {
    for (int32_t c = 0; c < columns->count[head]; ++c) {
      const int64_t key = columns->key_of[head * args->length + c];
      const int64_t section = columns->sections == 1 ? 0 : args->groups[key];
      const float* top = columns->top + (head * columns->sections + section) * args->variants;
      float* factors = columns->factors + (head * args->length + c) * columns->pitch;
      for (int64_t m = 0; m < columns->pitch; ++m) {
        const float bias = m < args->variants ? args->bias[(m * args->bias_heads + head) * args->length + key] : 0.0f;
        factors[m] = m < args->variants && top[m] > -kInfinity ? bias - top[m] : -kInfinity;
      }
      for (int64_t m = 0; m < columns->pitch; m += kWidth) store(factors + m, weight_of(load(factors + m)));
    }
  }
}

extern "C" void CAPT_NAME(capt_attention_readout, CAPT_LEVEL_NAME)(const CaptAttentionReadout* args,
                                                                   const CaptReadoutColumns* columns, void* workspace,
                                                                   int64_t begin, int64_t end) {
  switch (args->dtype) {
    case CAPT_FLOAT32:
      return run_tasks<float>(*args, *columns, workspace, begin, end);
    case CAPT_FLOAT16:
      return run_tasks<Half>(*args, *columns, workspace, begin, end);
    default:
      return run_tasks<Bfloat>(*args, *columns, workspace, begin, end);
  }
}
