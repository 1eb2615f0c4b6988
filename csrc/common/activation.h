// Vector exponential, sigmoid and sum, for the router and the experts. Included only by *.simd.cpp files.
#pragma once

#include "common/simd.h"

namespace {

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

}  // namespace
