// Runs the CPU kernel of asymmetric_loss at one instruction-set level with buffers of exact size, for the sanitizers,
// and compares it with the definition in double. "overrun" gives logits that are one short: the check itself is
// checked.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "asymmetric_loss.h"
#include "asymmetric_loss.simd.cpp"

namespace {

// From -130 to 130, some NaN or infinite.
float value(int64_t i) {
  if (i % 29 == 7) return NAN;
  if (i % 31 == 5) return i % 2 == 0 ? INFINITY : -INFINITY;
  return static_cast<float>((i * 37 + i / 11) % 261 - 130) / (i % 3 == 0 ? 1.0f : 16.0f);
}

template <typename T>
float wide(T number) {
  T lanes[kWidth] = {number};
  return load(lanes)[0];
}

bool close(double found, double want) {
  return found == want || (std::isnan(found) && std::isnan(want)) ||
         std::fabs(found - want) <= 1e-5 * std::fabs(want) + 1e-6;
}

template <typename T, typename Y>
int64_t check(int64_t size, int dtype, double gamma_pos, double gamma_neg, double margin, int64_t missing = 0) {
  std::vector<T> logits(static_cast<size_t>(size));
  std::vector<Y> targets(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) {
    store_some(&logits[static_cast<size_t>(i)], splat(value(i)), 1);
    targets[static_cast<size_t>(i)] = i % 5 == 0;
  }
  logits.resize(static_cast<size_t>(size - missing));
  logits.shrink_to_fit();
  const int64_t block = capt_asymmetric_loss_block(), blocks = (size + block - 1) / block;
  std::vector<float> slope(static_cast<size_t>(size)), loss(static_cast<size_t>(size));
  std::vector<double> partial(static_cast<size_t>(blocks));
  const double eps = 1e-8;
  const CaptAsymmetricLoss args{logits.data(), targets.data(), slope.data(),  loss.data(), partial.data(),
                                size,          gamma_pos,      gamma_neg,     margin,      eps,
                                1.0,           dtype,          sizeof(Y) == 4};
  if (capt_asymmetric_loss_cpu(&args, CAPT_BASELINE, 0, blocks) != 0) return -1;
  int64_t wrong = 0;
  for (int64_t i = 0; i < size; ++i) {
    const auto at = static_cast<size_t>(i);
    const double x = wide(logits[at]), p = 1 / (1 + std::exp(-x)), q = 1 / (1 + std::exp(x));
    double want, want_slope;
    if (targets[at] != 0) {
      want = -std::pow(q, gamma_pos) * std::log(std::fmax(p, eps));
      want_slope = p < eps ? 0.0 : -std::pow(q, gamma_pos) * q;
    } else {
      const double focus = std::pow(std::fmax(p - margin, 0), gamma_neg);
      want = -focus * std::log(std::fmax(std::fmin(q + margin, 1), eps));
      want_slope = p < margin || q + margin < eps ? 0.0 : focus * p * (margin > 0 ? q / (q + margin) : 1);
    }
    if (std::isnan(x)) want = want_slope = x;
    wrong += !close(loss[at], want) || !close(slope[at], want_slope);
  }
  return wrong;
}

template <typename T>
int64_t check_targets(bool floats, int64_t size, int dtype, double gamma_pos, double gamma_neg, double margin) {
  return floats ? check<T, float>(size, dtype, gamma_pos, gamma_neg, margin)
                : check<T, uint8_t>(size, dtype, gamma_pos, gamma_neg, margin);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "overrun") == 0) return check<float, float>(33, 0, 0, 4, 0.05, 1) != 0;
  const int64_t sizes[] = {1, 17, 333, 2500};
  const double options[][3] = {{0, 4, 0.05}, {1, 2, 0}, {0.5, 1.5, 0.3}};
  int cases = 0;
  for (const int64_t size : sizes) {
    for (const auto& option : options) {
      for (const bool floats : {false, true}) {
        const int64_t wrong[] = {check_targets<float>(floats, size, CAPT_FLOAT32, option[0], option[1], option[2]),
                                 check_targets<Half>(floats, size, CAPT_FLOAT16, option[0], option[1], option[2]),
                                 check_targets<Bfloat>(floats, size, CAPT_BFLOAT16, option[0], option[1], option[2])};
        for (const int64_t number : wrong) {
          if (number != 0) {
            std::fprintf(stderr, "size %ld gamma %g %g margin %g: %ld wrong\n", static_cast<long>(size), option[0],
                         option[1], option[2], static_cast<long>(number));
            return 1;
          }
          ++cases;
        }
      }
    }
  }
  std::printf("asymmetric_loss: %d cases\n", cases);
  return 0;
}
