// One vector type per instruction-set level, with loads and stores that widen 16-bit storage to float.
//
// Included only by *.simd.cpp files, each of which is compiled once per level. Everything sits in an anonymous
// namespace and no standard template is used: a function compiled for AVX-512 can then never be the copy that the
// linker keeps for all levels.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define CAPT_VECTOR_WIDTH 16
#elif defined(__AVX2__)
#define CAPT_VECTOR_WIDTH 8
#else
#define CAPT_VECTOR_WIDTH 4
#endif

namespace {

constexpr int kWidth = CAPT_VECTOR_WIDTH;

typedef float Vector __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Words __attribute__((vector_size(kWidth * 4)));
typedef int32_t Mask __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

inline Vector splat(float value) { return value - Vector{}; }

inline Vector load(const float* source) {
  Vector value;
  memcpy(&value, source, sizeof value);
  return value;
}

inline void store(float* target, Vector value) { memcpy(target, &value, sizeof value); }

inline Vector load(const Bfloat* source) {
#if defined(__AVX512F__)  // gcc splits the portable form into four instructions
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))),
                                   16);
#else
  Halves raw;
  memcpy(&raw, source, sizeof raw);
  return (Vector)(__builtin_convertvector(raw, Words) << 16);
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
inline void store(Bfloat* target, Vector value) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Mask is_nan = (Mask)(value != value);
  const Words chosen = (Words)(((Mask)rounded & ~is_nan) | ((Mask)((bits >> 16) | 0x40u) & is_nan));
  const Halves raw = __builtin_convertvector(chosen, Halves);
  memcpy(target, &raw, sizeof raw);
}

#if defined(__AVX512F__)
inline Vector load(const Half* source) {
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
inline void store(Half* target, Vector value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline Vector load(const Half* source) {
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
inline void store(Half* target, Vector value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline float widen(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1Fu;
  const uint32_t fraction = half & 0x3FFu;
  float value;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    value = (float)fraction * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | (fraction << 13);
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);   // NaN
  if (bits >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);  // rounds to 65536 or more: infinity
  if (bits < 0x38800000u) {                                    // below 2^-14: a multiple of 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;  // 2^-1 has 2^-24 as its unit in the last place: the sum rounds to even for us
    memcpy(&bits, &magnitude, sizeof bits);
    return (uint16_t)(sign | (bits - 0x3F000000u));
  }
  bits += 0xFFFu + ((bits >> 13) & 1u);
  return (uint16_t)(sign | ((bits - 0x38000000u) >> 13));
}

inline Vector load(const Half* source) {
  Vector value;
  for (int i = 0; i < kWidth; ++i) value[i] = widen(source[i].bits);
  return value;
}

inline void store(Half* target, Vector value) {
  for (int i = 0; i < kWidth; ++i) target[i].bits = narrow(value[i]);
}
#endif

// One bit for each lane that is set in a comparison's result.
inline uint32_t bits_of(Mask mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= (uint32_t)(mask[i] & 1) << i;
  return bits;
#endif
}

// The last channels of a row when dim is no multiple of the vector width. Never touches memory past `count`.
template <typename T>
inline Vector load_some(const T* source, int count) {
  T buffer[kWidth];
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, source, (size_t)count * sizeof(T));
  return load(buffer);
}

template <typename T>
inline void store_some(T* target, Vector value, int count) {
  T buffer[kWidth];
  store(buffer, value);
  memcpy(target, buffer, (size_t)count * sizeof(T));
}

template <bool kFull, typename T>
inline Vector fetch(const T* source, int count) {
  return kFull ? load(source) : load_some(source, count);
}

template <bool kFull, typename T>
inline void put(T* target, Vector value, int count) {
  if (kFull) {
    store(target, value);
  } else {
    store_some(target, value, count);
  }
}

}  // namespace
