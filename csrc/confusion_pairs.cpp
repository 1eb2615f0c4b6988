// CPU entry points of confusion_pairs: scratch memory, dispatch to an instruction-set level.

#include "confusion_pairs.h"

#define CAPT_DECLARE(level) \
  extern "C" int capt_confusion_pairs_##level(const CaptConfusionPairs*, void*, int64_t, int64_t);

CAPT_DECLARE(baseline)
CAPT_DECLARE(avx2)
CAPT_DECLARE(avx512)
CAPT_DECLARE(avx512bf16)
CAPT_DECLARE(amx)

namespace {

using Rows = int (*)(const CaptConfusionPairs*, void*, int64_t, int64_t);

constexpr Rows kRows[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_confusion_pairs);
constexpr int64_t kLargestStep = 64;  // classes a step of the widest level

}  // namespace

extern "C" int64_t capt_confusion_pairs_workspace(const CaptConfusionPairs* args) {
  const int64_t padded = (args->n_classes + kLargestStep - 1) / kLargestStep * kLargestStep;
  return args->k * 8 + padded * 4;
}

extern "C" int capt_confusion_pairs_cpu(const CaptConfusionPairs* args, void* workspace, int level, int64_t begin,
                                        int64_t end) {
  if (level < 0 || level > capt_cpu_level()) return 1;
  return kRows[level](args, workspace, begin, end);
}
