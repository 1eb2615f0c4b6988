// Vector natural logarithm of positive normal numbers. Included only by *.simd.cpp files.
#pragma once

#include "common/simd.h"

namespace {

// (log(1 + f) - f + f^2 / 2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1], lowest power first: 6e-9 of the logarithm.
constexpr float kLogarithm[8] = {0.333333313f, -0.250008225f, 0.200012267f, -0.166233554f,
                                 0.142017543f, -0.131601915f, 0.127616152f, -0.0763452053f};

// Within 2 units in the last place; meaningless for zero, subnormal and negative numbers, infinity and NaN.
inline Vector logarithm(Vector x) {
  const Mask bits = (Mask)x;
  const Mask n = (bits - 0x3F3504F3) >> 23;  // x = 2^n (1 + f), 1 + f from sqrt(1/2) to sqrt(2)
  const Vector f = (Vector)(bits - (n << 23)) - 1.0f, exponent = __builtin_convertvector(n, Vector);
  Vector p = splat(kLogarithm[7]);
  for (int i = 6; i >= 0; --i) p = p * f + kLogarithm[i];
  p = f * f * (f * p - 0.5f);
  return exponent * 0.693359375f + (f + (p + exponent * -2.12194440e-4f));
}

}  // namespace
