// CPU entry points of asymmetric_loss: cut-offs, dispatch to an instruction-set level.

#include "asymmetric_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

#define CAPT_DECLARE(level)                                                                                     \
  extern "C" void capt_asymmetric_loss_##level(const CaptAsymmetricLoss*, const CaptAsymmetricBounds*, int64_t, \
                                               int64_t);

CAPT_DECLARE(baseline)
CAPT_DECLARE(avx2)
CAPT_DECLARE(avx512)
CAPT_DECLARE(avx512bf16)
CAPT_DECLARE(amx)

namespace {

using Entries = void (*)(const CaptAsymmetricLoss*, const CaptAsymmetricBounds*, int64_t, int64_t);

constexpr Entries kEntries[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_asymmetric_loss);
constexpr int64_t kBlock = 1024;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double logit(double p) { return p > 0 ? std::log(p) - std::log1p(-p) : -kInfinity; }

// The smallest float that is not below `value`.
float rounded_up(double value) {
  const auto near = static_cast<float>(value);
  return near < value ? std::nextafter(near, std::numeric_limits<float>::infinity()) : near;
}

CaptAsymmetricBounds bounds_of(const CaptAsymmetricLoss& args) {
  const double needed = args.eps - args.margin;  // the least q of a negative
  return {rounded_up(logit(args.eps)), rounded_up(logit(args.margin)),
          needed > 0 ? -rounded_up(logit(needed)) : static_cast<float>(kInfinity),
          static_cast<float>(std::log(args.eps))};
}

}  // namespace

extern "C" int64_t capt_asymmetric_loss_block(void) { return kBlock; }

extern "C" int capt_asymmetric_loss_cpu(const CaptAsymmetricLoss* args, int level, int64_t begin, int64_t end) {
  if (level < 0 || level > capt_cpu_level()) return 1;
  const CaptAsymmetricBounds bounds = bounds_of(*args);
  for (int64_t block = begin; block < end; ++block) {
    kEntries[level](args, &bounds, block * kBlock, std::min(args->size, (block + 1) * kBlock));
  }
  return 0;
}
