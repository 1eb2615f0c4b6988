// What the kernels of expert_gating share: dropout, activation, sizes.
#pragma once

#include "common/device.cuh"

namespace {

constexpr int kLanes = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;

// Dropout of hidden units by a counter-based generator; capt/reference.py (dropout_mask) defines it.
struct Dropout {
  uint32_t low, high;  // words of the seed
  uint32_t threshold;  // a unit survives if its word is not below
  float scale;         // of survivors
};

__device__ __forceinline__ uint32_t mix32(uint32_t word) {
  word = (word ^ (word >> 16)) * 0x7FEB352Du;
  word = (word ^ (word >> 15)) * 0x846CA68Bu;
  return word ^ (word >> 16);
}

// Scale of the hidden units of one token and expert.
struct RowDropout {
  uint32_t first, second, threshold;
  float scale;
  __device__ __forceinline__ RowDropout(const Dropout& dropout, int64_t token, int64_t expert)
      : first(0), second(0), threshold(dropout.threshold), scale(dropout.scale) {
    if (threshold == 0) return;
    const uint32_t low = mix32(dropout.low), high = mix32(low ^ dropout.high);
    first = mix32(mix32(high ^ static_cast<uint32_t>(token)) ^ static_cast<uint32_t>(expert));
    second = mix32(mix32(low ^ static_cast<uint32_t>(token)) + static_cast<uint32_t>(expert));
  }
  __device__ __forceinline__ float operator()(int64_t column) const {
    return mix32(mix32(first ^ static_cast<uint32_t>(column)) ^ second) >= threshold ? scale : 0.0f;
  }
};

inline Dropout dropout_of(double probability, int64_t seed) {
  const auto bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32),
          static_cast<uint32_t>(probability * 4294967296.0), static_cast<float>(1.0 / (1.0 - probability))};
}

__device__ __forceinline__ float sigmoid(float value) { return 1.0f / (1.0f + expf(-1.702f * value)); }

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
