// CPU entry points of grid_adapter: task counts, weight packing, choice of the instruction-set level.

#include "capt.h"

#define CAPT_DECLARE(level)                                                                          \
  extern "C" void capt_grid_adapter_##level(const CaptGridAdapter*, const float*, int64_t, int64_t); \
  extern "C" void capt_grid_correlate_##level(const CaptGridCorrelate*, int64_t, int64_t);

CAPT_DECLARE(baseline)
#ifdef CAPT_X86
CAPT_DECLARE(avx2)
CAPT_DECLARE(avx512)
#endif

namespace {

using Adapter = void (*)(const CaptGridAdapter*, const float*, int64_t, int64_t);
using Correlate = void (*)(const CaptGridCorrelate*, int64_t, int64_t);

#ifdef CAPT_X86
constexpr Adapter kAdapter[CAPT_LEVELS] = {capt_grid_adapter_baseline, capt_grid_adapter_avx2,
                                           capt_grid_adapter_avx512};
constexpr Correlate kCorrelate[CAPT_LEVELS] = {capt_grid_correlate_baseline, capt_grid_correlate_avx2,
                                               capt_grid_correlate_avx512};

int detect_level() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? CAPT_AVX512 : avx2 ? CAPT_AVX2 : CAPT_BASELINE;
}
#else
constexpr Adapter kAdapter[CAPT_LEVELS] = {capt_grid_adapter_baseline, nullptr, nullptr};
constexpr Correlate kCorrelate[CAPT_LEVELS] = {capt_grid_correlate_baseline, nullptr, nullptr};

int detect_level() { return CAPT_BASELINE; }
#endif

}  // namespace

extern "C" int capt_cpu_level(void) {
  static const int level = detect_level();
  return level;
}

extern "C" int64_t capt_grid_adapter_tasks(const CaptGridAdapter* args) { return args->batch * (args->height + 1); }

extern "C" void capt_grid_adapter_pack(const CaptGridAdapter* args, float* packed) {
  for (int64_t c = 0; c < args->dim; ++c) {
    for (int tap = 0; tap < 9; ++tap) {
      packed[tap * args->dim + c] = args->weight[c * 9 + (args->transpose ? 8 - tap : tap)];
    }
  }
}

extern "C" int capt_grid_adapter_cpu(const CaptGridAdapter* args, const float* packed, int level, int64_t begin,
                                     int64_t end) {
  if (level < 0 || level > capt_cpu_level()) return 1;
  kAdapter[level](args, packed, begin, end);
  return 0;
}

extern "C" int64_t capt_grid_correlate_tasks(const CaptGridCorrelate* args) {
  return args->batch * ((args->dim + CAPT_TASK_CHANNELS - 1) / CAPT_TASK_CHANNELS);
}

extern "C" int capt_grid_correlate_cpu(const CaptGridCorrelate* args, int level, int64_t begin, int64_t end) {
  if (level < 0 || level > capt_cpu_level()) return 1;
  kCorrelate[level](args, begin, end);
  return 0;
}
