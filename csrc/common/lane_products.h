// Weight matrices, row-major as they are stored, times a few vectors whose lanes are tokens. Included only by
// *.simd.cpp files.
#pragma once

#include "common/activation.h"

namespace {

constexpr int kRows = 32;    // weight rows of a task
constexpr int kBlock = 192;  // terms of a partial sum: its operands fit the first-level cache
constexpr int kGroup = 3;    // vectors of lanes that share a broadcast weight

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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
  if (n_k == 0) return product({buffer, 0, 0, 0, 0}, rows, b, vectors, c, 1, 0, false);  // zeros
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

}  // namespace
