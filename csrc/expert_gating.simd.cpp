// Router and experts on the CPU.
//
//   probs = softmax(x gate^T)     y = sum_e w_e (W_out_e act(W_in_e x + b_in_e) + b_out_e)     act: QuickGELU, dropout
//
// Lanes are tokens: the tokens of an expert are gathered once into vectors [K][lanes], every weight is broadcast over
// them, and the weights stay in their row-major layout and are read once a chunk of tokens. The hidden activation
// leaves the first product in the layout the second one reads. bfloat16 pairs go through AMX tiles, whose left operand
// is again the plain weight matrix, or through dot products of pairs. Sums run in one fixed order, whatever the threads
// do. Compiled once per instruction-set level; CAPT_LEVEL_NAME is the suffix of the exported functions.

#include "expert_gating.h"

#include "common/simd.h"

namespace {

constexpr int kRows = CAPT_EXPERT_ROWS;  // weight rows of a task
constexpr int kBlock = 192;              // terms of a partial sum: its operands fit the first-level cache
constexpr int kGroup = 3;                // vectors of lanes that share a broadcast weight
constexpr int kMaxVectors = CAPT_EXPERT_CHUNK / kWidth;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

inline Vector where(Mask mask, Vector yes, Vector no) { return (Vector)(((Mask)yes & mask) | ((Mask)no & ~mask)); }

// Within 2 units in the last place, subnormal results included; NaN stays NaN.
inline Vector exponential(Vector x) {
  x = where(x < splat(-104.0f), splat(-104.0f), x);
  x = where(x > splat(89.0f), splat(89.0f), x);
  const Vector magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector n = (x * 1.44269504088896341f + magic) - magic;
  const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Mask exponent = __builtin_convertvector(n, Mask), half = exponent >> 1;  // 2^n in two factors: no overflow
  return p * (Vector)((half + 127) << 23) * (Vector)((exponent - half + 127) << 23);
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

// Sum of the lanes, by halves.
inline float total(Vector value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);
#else
  float part[kWidth];
  store(part, value);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
#endif
}

inline Words mix32(Words v) {
  v = (v ^ (v >> 16)) * 0x7feb352du;
  v = (v ^ (v >> 15)) * 0x846ca68bu;
  return v ^ (v >> 16);
}

// One vector, or the last channels of a row.
template <typename T>
inline Vector load_upto(const T* source, int64_t count) {
  return count >= kWidth ? load(source) : load_some(source, (int)count);
}

template <typename T>
inline void store_upto(T* target, Vector value, int64_t count) {
  if (count >= kWidth) {
    store(target, value);
  } else {
    store_some(target, value, (int)count);
  }
}

// ---- router ------------------------------------------------------------------------------------------------------

// out [expert][kWidth], one lane a token.
template <int kTokens, int kExperts, typename T>
void logits_tile(const CaptExpertRouter& args, const T* x, const float* gate, float* out) {
  Vector sum[kTokens][kExperts] = {};
  int64_t k = 0;
  for (; k + kWidth <= args.dim; k += kWidth) {
    Vector weight[kExperts];
    for (int e = 0; e < kExperts; ++e) weight[e] = load(gate + e * args.dim + k);
    for (int t = 0; t < kTokens; ++t) {
      const Vector value = load(x + t * args.dim + k);
      for (int e = 0; e < kExperts; ++e) sum[t][e] += value * weight[e];
    }
  }
  if (k < args.dim) {
    const int count = (int)(args.dim - k);
    for (int t = 0; t < kTokens; ++t) {
      const Vector value = load_some(x + t * args.dim + k, count);
      for (int e = 0; e < kExperts; ++e) sum[t][e] += value * load_some(gate + e * args.dim + k, count);
    }
  }
  for (int e = 0; e < kExperts; ++e) {
    for (int t = 0; t < kTokens; ++t) out[e * kWidth + t] = total(sum[t][e]);
  }
}

template <int kTokens, typename T>
void logits(const CaptExpertRouter& args, const T* x, float* out) {
  int64_t e = 0;
  for (; e + 4 <= args.n_experts; e += 4) logits_tile<kTokens, 4>(args, x, args.gate + e * args.dim, out + e * kWidth);
  const float* gate = args.gate + e * args.dim;
  switch (args.n_experts - e) {
    case 1:
      return logits_tile<kTokens, 1>(args, x, gate, out + e * kWidth);
    case 2:
      return logits_tile<kTokens, 2>(args, x, gate, out + e * kWidth);
    case 3:
      return logits_tile<kTokens, 3>(args, x, gate, out + e * kWidth);
  }
}

// Softmax and selection of kWidth tokens, one a lane. In a row of NaN nothing is larger, nothing is kept, and 0 / 0
// makes all its weights NaN.
void select_lanes(const CaptExpertRouter& args, float* probs, float* weights) {
  const int64_t n = args.n_experts;
  Vector largest = load(probs), sum = {}, kept = {};
  for (int64_t e = 1; e < n; ++e) {
    const Vector value = load(probs + e * kWidth);
    largest = where(value > largest, value, largest);
  }
  for (int64_t e = 0; e < n; ++e) {
    const Vector value = exponential(load(probs + e * kWidth) - largest);
    store(probs + e * kWidth, value);
    sum += value;
  }
  for (int64_t e = 0; e < n; ++e) {
    store(probs + e * kWidth, load(probs + e * kWidth) / sum);
    store(weights + e * kWidth, Vector{});
  }
  for (int64_t k = 0; k < args.top_k; ++k) {
    Vector best = splat(-1.0f);
    Mask index = (Mask)Vector{} - 1;
    for (int64_t e = 0; e < n; ++e) {
      const Vector value = load(probs + e * kWidth);
      const Mask better = (value > best) & (load(weights + e * kWidth) == Vector{});
      best = where(better, value, best);
      index = (((Mask)Vector{} + (int32_t)e) & better) | (index & ~better);
    }
    kept += where(best >= Vector{}, best, Vector{});
    for (int64_t e = 0; e < n; ++e) {  // 1 marks the kept ones until they are divided
      const Vector mark = where(index == (int32_t)e, splat(1.0f), load(weights + e * kWidth));
      store(weights + e * kWidth, mark);
    }
  }
  for (int64_t e = 0; e < n; ++e) {
    const Vector value = where(load(weights + e * kWidth) > Vector{}, load(probs + e * kWidth), Vector{});
    store(weights + e * kWidth, value / kept);
  }
}

// Task = CAPT_ROUTER_ROWS tokens.
template <typename T>
void router_task(const CaptExpertRouter& args, int64_t task) {
  const int64_t n = args.n_experts, first = task * CAPT_ROUTER_ROWS;
  const int64_t last = smaller(first + CAPT_ROUTER_ROWS, args.n_tokens);
  alignas(64) float probs[CAPT_ROUTER_EXPERTS * kWidth], weights[CAPT_ROUTER_EXPERTS * kWidth];
  int64_t* used = args.used + task * n;
  for (int64_t e = 0; e < n; ++e) used[e] = 0;
  for (int64_t token = first; token < last; token += kWidth) {
    const T* x = static_cast<const T*>(args.x) + token * args.dim;
    const int64_t count = smaller(kWidth, last - token);
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) logits<4>(args, x + t * args.dim, probs + t);
    for (; t < count; ++t) logits<1>(args, x + t * args.dim, probs + t);
    for (; t < kWidth; ++t) {
      for (int64_t e = 0; e < n; ++e) probs[e * kWidth + t] = 0.0f;
    }
    select_lanes(args, probs, weights);
    for (t = 0; t < count; ++t) {
      for (int64_t e = 0; e < n; ++e) {
        args.probs[(token + t) * n + e] = probs[e * kWidth + t];
        args.weights[(token + t) * n + e] = weights[e * kWidth + t];
        used[e] += weights[e * kWidth + t] > 0.0f;
      }
    }
  }
}

// Tasks: CAPT_ROUTER_ROWS tokens of the gradient of the logits, and of grad_x if it is asked for.
template <typename T>
void router_back_task(const CaptExpertRouterBack& args, int64_t task) {
  const int64_t n = args.n_experts, first = task * CAPT_ROUTER_ROWS;
  for (int64_t t = first; t < smaller(first + CAPT_ROUTER_ROWS, args.n_tokens); ++t) {
    const float *weights = args.weights + t * n, *probs = args.probs + t * n;
    const float *grad_weights = args.grad_weights + t * n, *grad_probs = args.grad_probs + t * n;
    float* out = args.grad_logits + t * n;
    float along = 0.0f, sum = 0.0f;
    for (int64_t e = 0; e < n; ++e) along += grad_weights[e] * weights[e];
    for (int64_t e = 0; e < n; ++e) {
      out[e] = weights[e] * (grad_weights[e] - along) + probs[e] * grad_probs[e];
      sum += out[e];
    }
    for (int64_t e = 0; e < n; ++e) out[e] -= probs[e] * sum;
    if (args.grad_x == nullptr) continue;
    T* row = static_cast<T*>(args.grad_x) + t * args.dim;
    for (int64_t k = 0; k < args.dim; k += kWidth) {
      Vector value = {};
      for (int64_t e = 0; e < n; ++e) value += out[e] * load_upto(args.gate + e * args.dim + k, args.dim - k);
      store_upto(row + k, value, args.dim - k);
    }
  }
}

// Task = one vector of columns of grad_gate, the tokens in order; narrower levels make narrower tasks.
template <typename T>
void router_gate_task(const CaptExpertRouterBack& args, int64_t task) {
  const T* x = static_cast<const T*>(args.x);
  for (int64_t k = task * 16; k < smaller(task * 16 + 16, args.dim); k += kWidth) {
    for (int64_t e = 0; e < args.n_experts; ++e) {
      Vector sum = {};
      for (int64_t t = 0; t < args.n_tokens; ++t) {
        sum += args.grad_logits[t * args.n_experts + e] * load_upto(x + t * args.dim + k, args.dim - k);
      }
      store_upto(args.grad_gate + e * args.dim + k, sum, args.dim - k);
    }
  }
}

template <typename T>
void router_back(const CaptExpertRouterBack& args, bool gate, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    if (gate) {
      router_gate_task<T>(args, task);
    } else {
      router_back_task<T>(args, task);
    }
  }
}

// ---- products ----------------------------------------------------------------------------------------------------

// Left operand a[row, k], right operand b[k, lanes], result c[row, lanes]: strides in floats. `outer` repeats the sum
// over k with both operands moved on. ahead: distance of the elements to fetch into the cache meanwhile, 0: none.
struct Left {
  const float* data;
  int64_t row, k, outer, ahead;
};
struct Right {
  const float* data;
  int64_t k, vector, outer;
};
struct Result {
  float* data;
  int64_t row, vector;
};

template <int R, int V>
void product_tile(Left a, Right b, Result c, int64_t n_outer, int64_t n_k, bool add) {
  Vector sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(c.data + r * c.row + v * c.vector) : Vector{};
  }
  for (int64_t outer = 0; outer < n_outer; ++outer) {
    const float* left = a.data + outer * a.outer;
    const float* right = b.data + outer * b.outer;
    for (int64_t k = 0; k < n_k; ++k, left += a.k, right += b.k) {
      if (a.ahead != 0 && k % 16 == 0) {
        for (int r = 0; r < R; ++r) __builtin_prefetch(left + r * a.row + a.ahead);
      }
      Vector lanes[V];
      for (int v = 0; v < V; ++v) lanes[v] = load(right + v * b.vector);
      for (int r = 0; r < R; ++r) {
        const Vector weight = splat(left[r * a.row]);
        for (int v = 0; v < V; ++v) sum[r][v] += weight * lanes[v];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(c.data + r * c.row + v * c.vector, sum[r][v]);
  }
}

template <int V>
void product_rows(Left a, int64_t rows, Right b, Result c, int64_t n_outer, int64_t n_k, bool add) {
#if defined(__AVX512F__)
  constexpr int R = V == 1 ? 16 : 8;
#else
  constexpr int R = V == 1 ? 8 : 4;
#endif
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    product_tile<R, V>({a.data + r * a.row, a.row, a.k, a.outer, a.ahead}, b, {c.data + r * c.row, c.row, c.vector},
                       n_outer, n_k, add);
  }
  for (; r < rows; ++r) {
    product_tile<1, V>({a.data + r * a.row, a.row, a.k, a.outer, a.ahead}, b, {c.data + r * c.row, c.row, c.vector},
                       n_outer, n_k, add);
  }
}

// Vectors of the next group out of `left` ones: four are two and two.
inline int group_of(int64_t left) { return left == 4 ? 2 : (int)smaller(left, kGroup); }

void product(Left a, int64_t rows, Right b, int64_t vectors, Result c, int64_t n_outer, int64_t n_k, bool add) {
  for (int64_t v = 0; v < vectors;) {
    const Right lanes = {b.data + v * b.vector, b.k, b.vector, b.outer};
    const Result out = {c.data + v * c.vector, c.row, c.vector};
    const int group = group_of(vectors - v);
    if (group == 3) {
      product_rows<3>(a, rows, lanes, out, n_outer, n_k, add);
    } else if (group == 2) {
      product_rows<2>(a, rows, lanes, out, n_outer, n_k, add);
    } else {
      product_rows<1>(a, rows, lanes, out, n_outer, n_k, add);
    }
    v += group;
    a.ahead = 0;
  }
}

// Weight rows as stored. transposed: element (row, k) lies at k * stride + row instead of row * stride + k. next: the
// rows of the following task.
template <typename T>
struct Weights {
  const T* data;
  int64_t stride;
  bool transposed;
  const T* next;
};

// c = weights [rows, n_k] times lanes, block by block; 16-bit and transposed weights are widened into a buffer first.
template <typename T>
void weights_times_lanes(Weights<T> a, int64_t rows, int64_t n_k, Right b, int64_t vectors, Result c) {
  alignas(64) float buffer[kRows * kBlock];
  for (int64_t k = 0; k < n_k; k += kBlock) {
    const int64_t count = smaller(kBlock, n_k - k);
    Left left = {buffer, kBlock, 1, 0, 0};
    if (a.transposed) {
      left = {buffer, 1, kRows, 0, 0};
      for (int64_t i = 0; i < count; ++i) {
        const T* source = a.data + (k + i) * a.stride;
        for (int64_t r = 0; r < rows; r += kWidth) store(buffer + i * kRows + r, load_upto(source + r, rows - r));
      }
    } else if (sizeof(T) == sizeof(float)) {
      const int64_t ahead = k + kBlock < n_k ? kBlock : a.next - (a.data + k);
      left = {reinterpret_cast<const float*>(a.data + k), a.stride, 1, 0, ahead};
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        const T* source = a.data + r * a.stride + k;
        for (int64_t i = 0; i < count; i += kWidth) store(buffer + r * kBlock + i, load_upto(source + i, count - i));
      }
    }
    product(left, rows, {b.data + k * b.k, b.k, b.vector, 0}, vectors, c, 1, count, k > 0);
  }
}

// ---- layout ------------------------------------------------------------------------------------------------------

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

// ---- experts -----------------------------------------------------------------------------------------------------

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

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;

template <int R, int V>
void pairs_tile(const Bfloat* a, int64_t stride, int64_t n_k, const uint32_t* b, int64_t vector, float* c) {
  __m512 sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < n_k; k += 2) {
    __m512bh lanes[V];
    for (int v = 0; v < V; ++v) lanes[v] = (__m512bh)_mm512_loadu_si512(b + v * vector + k * 8);
    for (int r = 0; r < R; ++r) {
      int pair;
      memcpy(&pair, a + r * stride + k, sizeof pair);
      const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], weight, lanes[v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + (v * kRows + r) * 16, sum[r][v]);
  }
}

template <int V>
void pairs_rows(const Bfloat* a, int64_t stride, int64_t rows, int64_t n_k, const uint32_t* b, int64_t vector,
                float* c) {
  constexpr int R = V == 1 ? 16 : 8;
  int64_t r = 0;
  for (; r + R <= rows; r += R) pairs_tile<R, V>(a + r * stride, stride, n_k, b, vector, c + r * 16);
  for (; r < rows; ++r) pairs_tile<1, V>(a + r * stride, stride, n_k, b, vector, c + r * 16);
}

#if defined(__AMX_BF16__)
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// c [V][32][16] = a [32, n_k] times V vectors of pairs; n_k a multiple of 32.
template <int V>
void amx_tile(const Bfloat* a, int64_t stride, int64_t n_k, const uint32_t* b, int64_t vector, float* c) {
  _tile_zero(0);
  _tile_zero(1);
  if (V > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < n_k; k += 32) {
    _tile_loadd(4, a + k, stride * 2);
    _tile_loadd(5, a + 16 * stride + k, stride * 2);
    _tile_loadd(6, b + k * 8, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (V > 1) {
      _tile_loadd(7, b + vector + k * 8, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  if (V > 1) {
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
  }
}
#endif

// Vectors of lanes that share a weight row: four tiles of sums are two by two.
#if defined(__AMX_BF16__)
constexpr int kPairGroup = 2;
#else
constexpr int kPairGroup = kGroup;
#endif

// c [group][kRows][16] = weight rows times `group` vectors of pairs.
void pairs_product(const Bfloat* a, int64_t stride, int64_t rows, int64_t n_k, const uint32_t* b, int group, float* c) {
  const int64_t vector = n_k * 8;
#if defined(__AMX_BF16__)
  if (rows == kRows && n_k % 32 == 0) {
    if (group == 2) {
      amx_tile<2>(a, stride, n_k, b, vector, c);
    } else {
      amx_tile<1>(a, stride, n_k, b, vector, c);
    }
    return;
  }
#endif
  if (group == 3) return pairs_rows<3>(a, stride, rows, n_k, b, vector, c);
  if (group == 2) return pairs_rows<2>(a, stride, rows, n_k, b, vector, c);
  pairs_rows<1>(a, stride, rows, n_k, b, vector, c);
}
#else
constexpr bool kHasPairs = false;
#endif

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

extern "C" void CAPT_NAME(capt_expert_router, CAPT_LEVEL_NAME)(const CaptExpertRouter* args, int64_t begin,
                                                               int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    switch (args->dtype) {
      case CAPT_FLOAT32:
        router_task<float>(*args, task);
        break;
      case CAPT_FLOAT16:
        router_task<Half>(*args, task);
        break;
      default:
        router_task<Bfloat>(*args, task);
    }
  }
}

extern "C" void CAPT_NAME(capt_expert_router_back, CAPT_LEVEL_NAME)(const CaptExpertRouterBack* args, int gate,
                                                                    int64_t begin, int64_t end) {
  switch (args->dtype) {
    case CAPT_FLOAT32:
      return router_back<float>(*args, gate != 0, begin, end);
    case CAPT_FLOAT16:
      return router_back<Half>(*args, gate != 0, begin, end);
    default:
      return router_back<Bfloat>(*args, gate != 0, begin, end);
  }
}

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
