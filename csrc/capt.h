// What the C interfaces of all kernels share: raw pointers, 64-bit sizes, no torch, no exceptions. One header per op.
#pragma once

#include <stdint.h>

enum CaptDtype { CAPT_FLOAT32 = 0, CAPT_FLOAT16 = 1, CAPT_BFLOAT16 = 2 };

// Instruction-set levels of the CPU kernels, each including the ones before it. AVX512BF16 adds dot products of pairs
// of bfloat16, AMX adds tiles of them.
enum CaptLevel {
  CAPT_BASELINE = 0,
  CAPT_AVX2 = 1,
  CAPT_AVX512 = 2,
  CAPT_AVX512BF16 = 3,
  CAPT_AMX = 4,
  CAPT_LEVELS = 5
};

// All levels of a function, for a table indexed by CaptLevel.
#if defined(CAPT_X86_BF16)
#define CAPT_EVERY_LEVEL(name) {name##_baseline, name##_avx2, name##_avx512, name##_avx512bf16, name##_amx}
#elif defined(CAPT_X86)
#define CAPT_EVERY_LEVEL(name) {name##_baseline, name##_avx2, name##_avx512, nullptr, nullptr}
#else
#define CAPT_EVERY_LEVEL(name) {name##_baseline, nullptr, nullptr, nullptr, nullptr}
#endif

#ifdef __cplusplus
extern "C" {
#endif

// The highest level this CPU, this build and the limit allow.
int capt_cpu_level(void);
// Use no level above `level` (tests, comparisons); returns the level in use from now on. Not for concurrent use.
int capt_limit_cpu_level(int level);

#ifdef __cplusplus
}
#endif
