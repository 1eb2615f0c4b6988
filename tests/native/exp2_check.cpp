// Largest error of exp2_vector() in units in the last place, over every float in [-126, 0] with the lowest bits cut,
// and its special values. Compiled once per instruction-set level by tests/test_prompt_attention.py.

#include <math.h>
#include <stdio.h>

#include "common/exp2.h"

namespace {

float at(float x) { return exp2_vector(splat(x))[kWidth - 1]; }

}  // namespace

int main() {
  double worst = 0.0;
  for (uint32_t bits = 0x80000000u; bits <= 0xC2FC0000u; bits += 997u) {
    float x;
    memcpy(&x, &bits, sizeof x);
    const double exact = exp2((double)x);
    int exponent;
    frexp(exact, &exponent);
    const double error = fabs((double)at(x) - exact) / ldexp(1.0, exponent - 24);
    if (error > worst) worst = error;
  }
  const bool special = at(0.0f) == 1.0f && at(-INFINITY) == 0.0f && at(-1e30f) == 0.0f && at(-126.5f) == 0.0f &&
                       isnan(at(NAN)) && at(3.0f) == 8.0f;
  printf("%g %s\n", worst, special ? "special values hold" : "special values are wrong");
  return 0;
}
