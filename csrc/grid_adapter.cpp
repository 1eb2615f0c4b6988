// CPU entry points of grid_adapter: task counts, weight packing, dispatch to an instruction-set level.

#include "grid_adapter.h"

#define CAPT_DECLARE(level)                                                                          \
  extern "C" void capt_grid_adapter_##level(const CaptGridAdapter*, const float*, int64_t, int64_t); \
  extern "C" void capt_grid_correlate_##level(const CaptGridCorrelate*, int64_t, int64_t);

CAPT_DECLARE(baseline)
CAPT_DECLARE(avx2)
CAPT_DECLARE(avx512)
CAPT_DECLARE(avx512bf16)
CAPT_DECLARE(amx)

namespace {

using Adapter = void (*)(const CaptGridAdapter*, const float*, int64_t, int64_t);
using Correlate = void (*)(const CaptGridCorrelate*, int64_t, int64_t);

constexpr Adapter kAdapter[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_grid_adapter);
constexpr Correlate kCorrelate[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_grid_correlate);

}  // namespace

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
