// Vector 2^x with an error of at most 2 units in the last place, for softmax. Included only by *.simd.cpp files.
#pragma once

#include "common/simd.h"

namespace {

// 2^f on [-1/2, 1/2], lowest power first: minimax in relative error (2e-9, below the rounding of the sum).
constexpr float kExp2[7] = {1.0f,           0.693147182f,   0.240226462f,   0.0555032864f,
                            0.00961848907f, 0.00133999309f, 0.000153458124f};

// Split x = n + f with f in [-1/2, 1/2]: 2^x = 2^n * p(f). Below -126 the result is 0 (a subnormal would cost a hundred
// cycles), NaN stays NaN; x must not exceed 127.
inline Vector exp2_vector(Vector x) {
#if defined(__AVX512F__)
  const __mmask16 lives = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const Vector n = (Vector)_mm512_maskz_roundscale_ps(lives, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vector lowest = splat(-126.0f);
  const Mask vanishes = x < lowest;
  x = vanishes ? lowest : x;
  const Vector magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector n = (x + magic) - magic;
#endif
  const Vector f = x - n;
  Vector p = splat(kExp2[6]);
  for (int i = 5; i >= 0; --i) p = p * f + kExp2[i];
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_scalef_ps(lives, (__m512)p, (__m512)n);
#else
  const Vector power = (Vector)((__builtin_convertvector(n, Mask) + 127) << 23);
  return (Vector)((Mask)(p * power) & ~vanishes);
#endif
}

inline float largest(Vector value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)value);
#else
  float top = value[0];
  for (int i = 1; i < kWidth; ++i) top = value[i] > top ? value[i] : top;
  return top;
#endif
}

// Always added in the same order.
inline float total(Vector value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);
#else
  float sum = value[0];
  for (int i = 1; i < kWidth; ++i) sum += value[i];
  return sum;
#endif
}

}  // namespace
