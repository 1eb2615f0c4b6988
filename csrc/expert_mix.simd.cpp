// Experts on the CPU.
//
//   y = sum_e w_e (W_out_e act(W_in_e x + b_in_e) + b_out_e)     act: QuickGELU, dropout
//
// Lanes are tokens: the tokens of an expert are gathered once into vectors [K][lanes], every weight is broadcast over
// them, and the weights stay in their row-major layout and are read once a chunk of tokens. The hidden activation
// leaves the first product in the layout the second one reads. bfloat16 pairs go through AMX tiles, whose left operand
// is again the plain weight matrix, or through dot products of pairs. Sums run in one fixed order, whatever the threads
// do. Compiled once per instruction-set level; CAPT_LEVEL_NAME is the suffix of the exported functions.

#include "common/lane_products.h"
#include "expert_gating.h"

namespace {

static_assert(kRows == CAPT_EXPERT_ROWS, "a task is one panel of weight rows");

inline int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

inline Words mix32(Words v) {
  v = (v ^ (v >> 16)) * 0x7feb352du;
  v = (v ^ (v >> 15)) * 0x846ca68bu;
  return v ^ (v >> 16);
}

// One chunk of one call: sizes and the parts of its workspace.
struct Scratch {
  int64_t lanes, dim, hidden;  // dim and hidden of a padded row
  float* x;                    // [vector][dim][kWidth]
  float* hidden_lanes;         // [vector][hidden][kWidth]; the backward keeps grad_hidden there
  float* grad_y;               // [vector][dim][kWidth]
  float* x_rows;               // [lane][padded dim]
  float* hidden_rows;          // [lane][padded hidden], times the weight of the lane
  float* partial;              // [hidden blocks][lane]
};

Scratch layout(const CaptExpertMix& args, const CaptExpertChunk& chunk) {
  Scratch s;
  s.lanes = chunk.start[args.n_experts];
  s.dim = padded(args.dim);
  s.hidden = padded(args.hidden);
  s.x = static_cast<float*>(chunk.workspace);
  s.hidden_lanes = s.x + s.lanes * s.dim;
  s.grad_y = s.hidden_lanes + s.lanes * s.hidden;
  s.x_rows = s.grad_y + s.lanes * s.dim;
  s.hidden_rows = s.x_rows + s.lanes * s.dim;
  s.partial = s.hidden_rows + s.lanes * s.hidden;
  return s;
}

// [K][kWidth] of the rows that `token` names.
template <typename T>
void pack_lanes(const T* rows, int64_t dim, const int32_t* token, float* out) {
  float buffer[kWidth];
  for (int lane = 0; lane < kWidth; ++lane) {
    const T* row = rows + token[lane] * dim;
    for (int64_t k = 0; k < dim; k += kWidth) {
      const int64_t count = smaller(kWidth, dim - k);
      store(buffer, load_upto(row + k, count));
      for (int64_t i = 0; i < count; ++i) out[(k + i) * kWidth + lane] = buffer[i];
    }
  }
}

#if defined(__AVX512F__)
inline void pack_lanes(const float* rows, int64_t dim, const int32_t* token, float* out) {
  const __m512i index = _mm512_mullo_epi32(_mm512_loadu_si512(token), _mm512_set1_epi32((int)dim));
  for (int64_t k = 0; k < dim; ++k) _mm512_storeu_ps(out + k * 16, _mm512_i32gather_ps(index, rows + k, 4));
}
#endif

#if defined(__AVX512BF16__)
// [K / 2][16] pairs of the rows that `token` names.
inline void pack_pairs(const Bfloat* rows, int64_t dim, const int32_t* token, uint32_t* out) {
  const __m512i index = _mm512_mullo_epi32(_mm512_loadu_si512(token), _mm512_set1_epi32((int)dim));
  for (int64_t k = 0; k < dim; k += 2) _mm512_storeu_si512(out + k * 8, _mm512_i32gather_epi32(index, rows + k, 2));
}
#endif

// rows[token[lane]][0..n) += values[0..n)[lane], rows of kRows floats, for the first `used` lanes.
void add_transposed(const float* values, int64_t n, const int32_t* token, int64_t used, float* rows) {
  for (int64_t lane = 0; lane < used; ++lane) {
    float* row = rows + token[lane] * kRows;
    for (int64_t r = 0; r < n; ++r) row[r] += values[r * kWidth + lane];
  }
}

// Words of the dropout of one vector of lanes, before the column comes in.
struct Keys {
  Words first, second;
};

inline Keys dropout_keys(const CaptExpertMix& args, const CaptExpertChunk& chunk, int64_t lane, int64_t expert) {
  Words token;
  memcpy(&token, chunk.token + lane, sizeof token);
  token += (uint32_t)chunk.first;
  return {mix32(mix32(args.seed_high ^ token) ^ (uint32_t)expert),
          mix32(mix32(args.seed_low ^ token) + (uint32_t)expert)};
}

// What the activation is multiplied with: 0 or keep_scale.
inline Vector dropout_factor(const CaptExpertMix& args, Keys keys, int64_t column) {
  if (args.threshold == 0) return splat(1.0f);
  const Words word = mix32(mix32(keys.first ^ (uint32_t)column) ^ keys.second);
  return where((Mask)(word >= args.threshold), splat(args.keep_scale), Vector{});
}

// bfloat16 pairs instead of widened floats: in the forward, where both sums have an even number of terms.
template <typename T>
inline bool in_pairs(const CaptExpertMix& args) {
  return kHasPairs && T::kPairs && args.grad_y == nullptr && args.dim % 2 == 0 && args.hidden % 2 == 0;
}

struct Float32 {
  typedef float Type;
  static constexpr bool kPairs = false;
};
struct Float16 {
  typedef Half Type;
  static constexpr bool kPairs = false;
};
struct Bfloat16 {
  typedef Bfloat Type;
  static constexpr bool kPairs = true;
};

template <typename D>
struct Experts {
  typedef typename D::Type T;
  const CaptExpertMix& args;
  const CaptExpertChunk& chunk;
  const Scratch s;

  Experts(const CaptExpertMix& a, const CaptExpertChunk& c) : args(a), chunk(c), s(layout(a, c)) {}

  const T* rows_of(const void* tensor) const { return static_cast<const T*>(tensor) + chunk.first * args.dim; }
  int64_t vectors(int64_t expert) const { return (chunk.start[expert + 1] - chunk.start[expert]) / kWidth; }
  // Rows [row, row + kRows) of an expert's matrix, and those that come next: of the next expert, or kRows further down.
  Weights<T> rows_of_expert(const void* tensor, int64_t stride, int64_t e, int64_t row, bool transposed) const {
    const T* data = static_cast<const T*>(tensor);
    const int64_t size = args.hidden * args.dim, step = transposed ? 1 : stride;
    const T* next = data + (e + 1 < args.n_experts ? (e + 1) * size + row * step : (row + kRows) * step);
    return {data + e * size + row * step, stride, transposed, next};
  }
  Weights<T> w_in(int64_t e, int64_t row, bool transposed) const {
    return rows_of_expert(args.w_in, args.dim, e, row, transposed);
  }
  Weights<T> w_out(int64_t e, int64_t row, bool transposed) const {
    return rows_of_expert(args.w_out, args.hidden, e, row, transposed);
  }
  void biases(const void* tensor, int64_t first, int64_t rows, float* out) const {
    const T* source = static_cast<const T*>(tensor) + first;
    for (int64_t r = 0; r < rows; r += kWidth) store(out + r, load_upto(source + r, rows - r));
  }
  // Where the lanes of an expert start in a buffer of `size` floats a lane.
  float* at(float* buffer, int64_t size, int64_t expert) const { return buffer + chunk.start[expert] * size; }

  // Task = 16 lanes.
  void pack(int64_t task) const {
    const int64_t lane = task * CAPT_EXPERT_LANES;
    const int32_t* token = chunk.token + lane;
#if defined(__AVX512BF16__)
    if constexpr (D::kPairs) {
      if (in_pairs<D>(args)) {
        pack_pairs(rows_of(args.x), args.dim, token, reinterpret_cast<uint32_t*>(s.x) + lane * args.dim / 2);
        return;
      }
    }
#endif
    for (int i = 0; i < CAPT_EXPERT_LANES; i += kWidth) {
      pack_lanes(rows_of(args.x), args.dim, token + i, s.x + (lane + i) * args.dim);
      if (args.grad_y == nullptr) continue;
      pack_lanes(rows_of(args.grad_y), args.dim, token + i, s.grad_y + (lane + i) * args.dim);
    }
    if (args.grad_w_in == nullptr) return;
    for (int i = 0; i < CAPT_EXPERT_LANES; ++i) {
      const T* row = rows_of(args.x) + token[i] * args.dim;
      float* out = s.x_rows + (lane + i) * s.dim;
      for (int64_t k = 0; k < args.dim; k += kWidth) store(out + k, load_upto(row + k, args.dim - k));
    }
  }

  // Task = kRows hidden units of one expert, all its lanes.
  void up(int64_t task) const {
    const int64_t e = task % args.n_experts, row = task / args.n_experts * kRows;
    const int64_t rows = smaller(kRows, args.hidden - row), n = vectors(e);
    if (n == 0) return;
    float bias_of[kRows];
    biases(args.b_in, e * args.hidden + row, rows, bias_of);
#if defined(__AVX512BF16__)
    if constexpr (D::kPairs) {
      if (in_pairs<D>(args)) return up_pairs(e, row, rows, n, bias_of);
    }
#endif
    float* out = at(s.hidden_lanes, args.hidden, e) + row * kWidth;
    const int64_t vector = args.hidden * kWidth;
    weights_times_lanes(w_in(e, row, false), rows, args.dim, {at(s.x, args.dim, e), kWidth, args.dim * kWidth, 0}, n,
                        {out, kWidth, vector});
    for (int64_t v = 0; v < n; ++v) {
      const Keys keys = dropout_keys(args, chunk, chunk.start[e] + v * kWidth, e);
      for (int64_t r = 0; r < rows; ++r) {
        float* place = out + v * vector + r * kWidth;
        const Vector value = load(place) + bias_of[r];
        store(place, value * sigmoid(1.702f * value) * dropout_factor(args, keys, row + r));
      }
    }
  }

  // Task = kRows columns of y, every expert in turn.
  void down(int64_t task) const {
    const int64_t row = task * kRows, rows = smaller(kRows, args.dim - row);
    alignas(64) float sum[CAPT_EXPERT_CHUNK * kRows], part[CAPT_EXPERT_CHUNK * kRows];
    memset(sum, 0, (size_t)chunk.count * kRows * sizeof(float));
    for (int64_t e = 0; e < args.n_experts; ++e) {
      const int64_t n = vectors(e);
      if (n == 0) continue;
      float bias_of[kRows];
      biases(args.b_out, e * args.dim + row, rows, bias_of);
#if defined(__AVX512BF16__)
      if constexpr (D::kPairs) {
        if (in_pairs<D>(args)) {
          const uint32_t* lanes = reinterpret_cast<uint32_t*>(s.hidden_lanes) + chunk.start[e] * args.hidden / 2;
          for (int64_t v = 0; v < n;) {
            const int group = (int)smaller(n - v, kPairGroup);
            pairs_product(w_out(e, row, false).data, args.hidden, rows, args.hidden, lanes + v * args.hidden * 8, group,
                          part + v * kRows * 16);
            v += group;
          }
          add_expert(e, rows, n, bias_of, true, part, sum);
          continue;
        }
      }
#endif
      weights_times_lanes(w_out(e, row, false), rows, args.hidden,
                          {at(s.hidden_lanes, args.hidden, e), kWidth, args.hidden * kWidth, 0}, n,
                          {part, kWidth, kRows * kWidth});
      add_expert(e, rows, n, bias_of, true, part, sum);
    }
    put_rows(sum, args.y, row, rows);
  }

  // sum[token] += weight * (part + bias), or part alone.
  void add_expert(int64_t e, int64_t rows, int64_t n, const float* bias_of, bool weighted, float* part,
                  float* sum) const {
    for (int64_t v = 0; v < n; ++v) {
      float* values = part + v * kRows * kWidth;
      const int64_t lane = chunk.start[e] + v * kWidth;
      if (weighted) {
        const Vector weight = load(chunk.weight + lane);
        for (int64_t r = 0; r < rows; ++r) {
          store(values + r * kWidth, weight * (load(values + r * kWidth) + bias_of[r]));
        }
      }
      add_transposed(values, rows, chunk.token + lane, smaller(kWidth, chunk.used[e] - v * kWidth), sum);
    }
  }

  // Columns [row, row + rows) of every token of the chunk, rounded.
  void put_rows(const float* sum, void* tensor, int64_t row, int64_t rows) const {
    T* out = static_cast<T*>(tensor) + chunk.first * args.dim + row;
    for (int64_t t = 0; t < chunk.count; ++t) {
      for (int64_t r = 0; r < rows; r += kWidth) {
        store_upto(out + t * args.dim + r, load(sum + t * kRows + r), rows - r);
      }
    }
  }

#if defined(__AVX512BF16__)
  void up_pairs(int64_t e, int64_t row, int64_t rows, int64_t n, const float* bias_of) const {
    alignas(64) float part[kPairGroup * kRows * 16];
    const uint32_t* lanes = reinterpret_cast<uint32_t*>(s.x) + chunk.start[e] * args.dim / 2;
    uint32_t* out = reinterpret_cast<uint32_t*>(s.hidden_lanes) + chunk.start[e] * args.hidden / 2 + row * 8;
    for (int64_t v = 0; v < n;) {
      const int group = (int)smaller(n - v, kPairGroup);
      pairs_product(w_in(e, row, false).data, args.dim, rows, args.dim, lanes + v * args.dim * 8, group, part);
      for (int i = 0; i < group; ++i, ++v) {
        const Keys keys = dropout_keys(args, chunk, chunk.start[e] + v * 16, e);
        for (int64_t r = 0; r < rows; r += 2) {
          __m512i half[2];
          for (int j = 0; j < 2; ++j) {
            const Vector value = load(part + (i * kRows + r + j) * 16) + bias_of[r + j];
            const Vector active = value * sigmoid(1.702f * value) * dropout_factor(args, keys, row + r + j);
            half[j] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)active));
          }
          _mm512_storeu_si512(out + v * args.hidden * 8 + r * 8,
                              _mm512_or_si512(half[0], _mm512_slli_epi32(half[1], 16)));
        }
      }
    }
  }
#endif

  // Task as up: hidden units again, then the gradient of what enters the activation, and <hidden, W_out^T grad_y>.
  void back_up(int64_t task) const {
    const int64_t e = task % args.n_experts, row = task / args.n_experts * kRows;
    const int64_t rows = smaller(kRows, args.hidden - row), n = vectors(e);
    if (n == 0) return;
    float bias_of[kRows];
    biases(args.b_in, e * args.hidden + row, rows, bias_of);
    alignas(64) float pull[CAPT_EXPERT_CHUNK * kRows];
    float* enter = at(s.hidden_lanes, args.hidden, e) + row * kWidth;
    const int64_t vector = args.hidden * kWidth;
    weights_times_lanes(w_in(e, row, false), rows, args.dim, {at(s.x, args.dim, e), kWidth, args.dim * kWidth, 0}, n,
                        {enter, kWidth, vector});
    weights_times_lanes(w_out(e, row, true), rows, args.dim, {at(s.grad_y, args.dim, e), kWidth, args.dim * kWidth, 0},
                        n, {pull, kWidth, kRows * kWidth});
    for (int64_t v = 0; v < n; ++v) {
      const int64_t lane = chunk.start[e] + v * kWidth;
      const Keys keys = dropout_keys(args, chunk, lane, e);
      const Vector weight = load(chunk.weight + lane);
      Vector along = {};
      for (int64_t r = 0; r < rows; ++r) {
        float* place = enter + v * vector + r * kWidth;
        const Vector value = load(place) + bias_of[r];
        const Vector gate = sigmoid(1.702f * value), factor = dropout_factor(args, keys, row + r);
        const Vector active = value * gate * factor, slope = gate * (1.0f + 1.702f * value * (1.0f - gate)) * factor;
        float* pulled = pull + v * kRows * kWidth + r * kWidth;
        const Vector grad = load(pulled);
        along += active * grad;
        store(place, weight * grad * slope);
        store(pulled, weight * active);
      }
      store(s.partial + row / kRows * s.lanes + lane, along);
      if (args.grad_w_out == nullptr) continue;
      for (int i = 0; i < kWidth; ++i) {
        float* out = s.hidden_rows + (lane + i) * s.hidden + row;
        for (int64_t r = 0; r < rows; ++r) out[r] = pull[(v * kRows + r) * kWidth + i];
      }
    }
  }

  // Task = kRows columns of grad_x, every expert in turn.
  void back_x(int64_t task) const {
    const int64_t row = task * kRows, rows = smaller(kRows, args.dim - row);
    alignas(64) float sum[CAPT_EXPERT_CHUNK * kRows], part[CAPT_EXPERT_CHUNK * kRows];
    memset(sum, 0, (size_t)chunk.count * kRows * sizeof(float));
    for (int64_t e = 0; e < args.n_experts; ++e) {
      const int64_t n = vectors(e);
      if (n == 0) continue;
      weights_times_lanes(w_in(e, row, true), rows, args.hidden,
                          {at(s.hidden_lanes, args.hidden, e), kWidth, args.hidden * kWidth, 0}, n,
                          {part, kWidth, kRows * kWidth});
      add_expert(e, rows, n, nullptr, false, part, sum);
    }
    put_rows(sum, args.grad_x, row, rows);
  }

  // grad [rows, columns] = left [rows, lanes of the expert] times right [lane, columns]; later chunks add to it.
  void outer(int64_t e, const float* left, int64_t left_size, int64_t rows, const float* right, int64_t right_size,
             int64_t columns, float* grad) const {
    alignas(64) float part[kGroup * kRows * kWidth];
    const int64_t whole = chunk.used[e] / kWidth, rest = chunk.used[e] % kWidth;
    const bool add = chunk.first > 0;
    for (int64_t column = 0; column < columns; column += kGroup * kWidth) {
      const int64_t group = smaller(kGroup, (columns - column + kWidth - 1) / kWidth);
      const Left a = {left, kWidth, 1, left_size * kWidth, 0};
      const Right b = {right + column, right_size, kWidth, right_size * kWidth};
      const Result c = {part, kWidth, kRows * kWidth};
      product(a, rows, b, group, c, whole, kWidth, false);
      if (rest > 0) {
        product({left + whole * left_size * kWidth, kWidth, 1, 0, 0}, rows, {b.data + whole * b.outer, b.k, kWidth, 0},
                group, c, 1, rest, true);
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t v = 0; v < group; ++v) {
          float* out = grad + r * columns + column + v * kWidth;
          const int64_t count = columns - column - v * kWidth;
          const Vector value = load(part + (v * kRows + r) * kWidth);
          store_upto(out, add ? load_upto(out, count) + value : value, count);
        }
      }
    }
  }

  // grad[row] = sum over the lanes of the expert of values[lane][row] (* weight); later chunks add to it.
  void row_sums(int64_t e, const float* values, int64_t size, int64_t rows, bool weighted, float* grad) const {
    for (int64_t r = 0; r < rows; ++r) {
      float sum = chunk.first > 0 ? grad[r] : 0.0f;
      for (int64_t i = 0; i < chunk.used[e]; ++i) {
        const float value = values[(i / kWidth * size + r) * kWidth + i % kWidth];
        sum += weighted ? value * chunk.weight[chunk.start[e] + i] : value;
      }
      grad[r] = sum;
    }
  }

  void back_in(int64_t task) const {
    const int64_t e = task % args.n_experts, row = task / args.n_experts * kRows;
    const int64_t rows = smaller(kRows, args.hidden - row);
    const float* left = at(s.hidden_lanes, args.hidden, e) + row * kWidth;
    if (args.grad_w_in != nullptr) {
      outer(e, left, args.hidden, rows, at(s.x_rows, s.dim, e), s.dim, args.dim,
            args.grad_w_in + (e * args.hidden + row) * args.dim);
    }
    if (args.grad_b_in != nullptr) {
      row_sums(e, left, args.hidden, rows, false, args.grad_b_in + e * args.hidden + row);
    }
  }

  void back_out(int64_t task) const {
    const int64_t e = task % args.n_experts, row = task / args.n_experts * kRows;
    const int64_t rows = smaller(kRows, args.dim - row);
    const float* left = at(s.grad_y, args.dim, e) + row * kWidth;
    if (args.grad_w_out != nullptr) {
      outer(e, left, args.dim, rows, at(s.hidden_rows, s.hidden, e), s.hidden, args.hidden,
            args.grad_w_out + (e * args.dim + row) * args.hidden);
    }
    if (args.grad_b_out != nullptr) row_sums(e, left, args.dim, rows, true, args.grad_b_out + e * args.dim + row);
  }

  // Task = 16 lanes: <grad_y, b_out> and the parts of back_up.
  void back_weights(int64_t task) const {
    const int64_t first = task * CAPT_EXPERT_LANES;
    int64_t e = 0;
    while (chunk.start[e + 1] <= first) ++e;
    for (int64_t lane = first; lane < first + CAPT_EXPERT_LANES; lane += kWidth) {
      Vector sum = {};
      for (int64_t row = 0; row < args.hidden; row += kRows) sum += load(s.partial + row / kRows * s.lanes + lane);
      const float* grad = s.grad_y + lane * args.dim;
      for (int64_t row = 0; row < args.dim; row += kRows) {
        const int64_t rows = smaller(kRows, args.dim - row);
        float bias_of[kRows];
        biases(args.b_out, e * args.dim + row, rows, bias_of);
        for (int64_t r = 0; r < rows; ++r) sum += load(grad + (row + r) * kWidth) * bias_of[r];
      }
      for (int i = 0; i < kWidth && lane + i < chunk.start[e] + chunk.used[e]; ++i) {
        args.grad_weights[(chunk.first + chunk.token[lane + i]) * args.n_experts + e] = sum[i];
      }
    }
  }

  void run(int phase, int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      switch (phase) {
        case CAPT_EXPERT_PACK:
          pack(task);
          break;
        case CAPT_EXPERT_UP:
          up(task);
          break;
        case CAPT_EXPERT_DOWN:
          down(task);
          break;
        case CAPT_EXPERT_BACK_UP:
          back_up(task);
          break;
        case CAPT_EXPERT_BACK_X:
          back_x(task);
          break;
        case CAPT_EXPERT_BACK_IN:
          back_in(task);
          break;
        case CAPT_EXPERT_BACK_OUT:
          back_out(task);
          break;
        default:
          back_weights(task);
      }
    }
  }
};

}  // namespace

#define CAPT_PASTE(name, level) name##_##level
#define CAPT_NAME(name, level) CAPT_PASTE(name, level)

extern "C" void CAPT_NAME(capt_expert_mix, CAPT_LEVEL_NAME)(const CaptExpertMix* args, const CaptExpertChunk* chunk,
                                                            int phase, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
  const TileConfig config;
  _tile_loadconfig(&config);
#endif
  switch (args->dtype) {
    case CAPT_FLOAT32:
      Experts<Float32>(*args, *chunk).run(phase, begin, end);
      break;
    case CAPT_FLOAT16:
      Experts<Float16>(*args, *chunk).run(phase, begin, end);
      break;
    default:
      Experts<Bfloat16>(*args, *chunk).run(phase, begin, end);
  }
#if defined(__AMX_BF16__)
  _tile_release();
#endif
}
