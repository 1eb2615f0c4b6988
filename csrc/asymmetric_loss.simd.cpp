// Asymmetric loss and its slope on the CPU, a vector of entries at a time: one exponential, one logarithm, one or two
// divisions. A vector of negatives below the margin, which is what a trained model sees most, is zero after a
// comparison. Compiled once per instruction-set level; CAPT_LEVEL_NAME is the suffix of the exported function.

#include "asymmetric_loss.h"

#include "common/activation.h"
#include "common/logarithm.h"
#include "common/simd.h"

namespace {

constexpr int kEntriesAtOnce = 256;  // added up in float; more of them in double
constexpr int kLargestPower = 64;    // by multiplications

inline Vector load(const uint8_t* source) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#elif defined(__AVX2__)
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
#else
  Vector value;
  for (int i = 0; i < kWidth; ++i) value[i] = source[i];
  return value;
#endif
}

inline Vector load_targets(const uint8_t* source, int count) {
  if (count == kWidth) return load(source);
  uint8_t buffer[kWidth] = {};
  memcpy(buffer, source, (size_t)count);
  return load(buffer);
}

inline Vector load_targets(const float* source, int count) {
  return count == kWidth ? load(source) : load_some(source, count);
}

inline Vector power(Vector base, int exponent) {
  Vector value = splat(1.0f);
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) value = value * base;
    base = base * base;
  }
  return value;
}

struct Loss {
  const CaptAsymmetricBounds& bounds;
  float margin, scale, gamma_pos, gamma_neg;
  int power_pos, power_neg;
  bool whole;  // both exponents are small integers

  Loss(const CaptAsymmetricLoss& args, const CaptAsymmetricBounds& bounds)
      : bounds(bounds),
        margin((float)args.margin),
        scale((float)args.scale),
        gamma_pos((float)args.gamma_pos),
        gamma_neg((float)args.gamma_neg) {
    whole = args.gamma_pos <= kLargestPower && args.gamma_neg <= kLargestPower;
    power_pos = whole ? (int)args.gamma_pos : 0;
    power_neg = whole ? (int)args.gamma_neg : 0;
    whole = whole && power_pos == args.gamma_pos && power_neg == args.gamma_neg;
  }

  // q^gamma_pos of positives, over^gamma_neg of negatives.
  Vector focus(Mask positive, Vector q, Vector over) const {
    if (whole) return where(positive, power(q, power_pos), power(over, power_neg));
    const Vector base = where(positive, q, over), gamma = where(positive, splat(gamma_pos), splat(gamma_neg));
    const Vector least = splat(__FLT_MIN__);
    const Vector value = exponential(gamma * logarithm(where(base < least, least, base)));
    return where((base > 0.0f) | (gamma == 0.0f), value, Vector{});
  }

  // Loss of every lane; its slope goes to `slope`.
  Vector operator()(Vector x, Mask positive, Vector& slope) const {
    const Vector zero = {}, one = splat(1.0f);
    const Vector e = exponential((Vector)((Mask)x | (Mask)splat(-0.0f)));  // of -|x|
    const Vector sum = one + e, r = one / sum, s = e * r;
    const Vector rest = (e - (sum - one)) * r;  // of log(1 + e), which the rounding of the sum loses
    const Vector p = where(x >= 0.0f, r, s), q = where(x >= 0.0f, s, r);
    Vector value, kept;
    if (margin > 0.0f) {
      Vector argument = q + margin;
      kept = q / argument;
      argument = where(argument < splat(__FLT_MIN__), splat(__FLT_MIN__), argument);
      const Vector log = logarithm(where(positive, sum, argument));
      value = where(positive, where(x > 0.0f, zero, x) - (log + rest), where(log > 0.0f, zero, log));
    } else {
      kept = one;
      const Vector signed_x = where(positive, x, -x);
      value = where(signed_x > 0.0f, zero, signed_x) - (logarithm(sum) + rest);
    }
    value = where(value < splat(bounds.log_eps), splat(bounds.log_eps), value);
    Vector over = p - margin;
    over = where(over < 0.0f, zero, over);
    const Vector weight = focus(positive, q, over);
    const Mask below = ~positive & (x < bounds.negative_low);
    const Mask dead = where_mask(positive, x < bounds.positive_low, below | (x > bounds.negative_high));
    slope = where(dead, zero, weight * where(positive, -q, p * kept)) * scale;
    return where(x != x, x, where(below, zero, -weight * value));
  }

  static Mask where_mask(Mask mask, Mask yes, Mask no) { return (yes & mask) | (no & ~mask); }
};

template <typename T, typename Y>
void entries(const CaptAsymmetricLoss& args, const CaptAsymmetricBounds& bounds, int64_t begin, int64_t end) {
  const T* logits = static_cast<const T*>(args.logits);
  const Y* targets = static_cast<const Y*>(args.targets);
  const Loss loss(args, bounds);
  double sum = 0.0;
  for (int64_t first = begin; first < end; first += kEntriesAtOnce) {
    const int64_t last = end - first < kEntriesAtOnce ? end : first + kEntriesAtOnce;
    Vector losses = {};
    for (int64_t at = first; at < last; at += kWidth) {
      const int count = last - at < kWidth ? (int)(last - at) : kWidth;
      const Vector x = count == kWidth ? load(logits + at) : load_some(logits + at, count);
      const Mask positive = load_targets(targets + at, count) != 0.0f;
      Vector value = {}, slope = {};
      if (bits_of(positive | ~(x < bounds.negative_low)) != 0) value = loss(x, positive, slope);
      store_upto(args.slope + at, slope, last - at);
      if (args.loss != nullptr) store_upto(args.loss + at, value, last - at);
      if (count < kWidth) {
        for (int i = count; i < kWidth; ++i) value[i] = 0.0f;
      }
      losses = losses + value;
    }
    sum += total(losses);
  }
  args.partial[begin / capt_asymmetric_loss_block()] = sum;
}

template <typename T>
void entries_of(const CaptAsymmetricLoss& args, const CaptAsymmetricBounds& bounds, int64_t begin, int64_t end) {
  (args.float_targets != 0 ? entries<T, float> : entries<T, uint8_t>)(args, bounds, begin, end);
}

}  // namespace

#define CAPT_PASTE(name, level) name##_##level
#define CAPT_NAME(name, level) CAPT_PASTE(name, level)

extern "C" void CAPT_NAME(capt_asymmetric_loss, CAPT_LEVEL_NAME)(const CaptAsymmetricLoss* args,
                                                                 const CaptAsymmetricBounds* bounds, int64_t begin,
                                                                 int64_t end) {
  switch (args->dtype) {
    case CAPT_FLOAT32:
      return entries_of<float>(*args, *bounds, begin, end);
    case CAPT_FLOAT16:
      return entries_of<Half>(*args, *bounds, begin, end);
    default:
      return entries_of<Bfloat>(*args, *bounds, begin, end);
  }
}
