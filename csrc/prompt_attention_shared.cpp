// CPU entry points of prompt_attention_shared: task counts, dispatch to an instruction-set level.

#include "prompt_attention_shared.h"

#include "prompt_attention_shared_split.h"

#define CAPT_DECLARE(level)                                                                                           \
  extern "C" int capt_prompt_attention_shared_##level(const CaptSharedAttention*, int64_t, int64_t);                  \
  extern "C" int capt_prompt_attention_shared_backward_##level(const CaptSharedAttentionBackward*, int64_t, int64_t); \
  extern "C" void capt_prompt_attention_shared_reduce_##level(const CaptSharedAttentionBackward*, int64_t, int64_t);

CAPT_DECLARE(baseline)
CAPT_DECLARE(avx2)
CAPT_DECLARE(avx512)
CAPT_DECLARE(avx512bf16)
CAPT_DECLARE(amx)

namespace {

using Forward = int (*)(const CaptSharedAttention*, int64_t, int64_t);
using Backward = int (*)(const CaptSharedAttentionBackward*, int64_t, int64_t);
using Reduce = void (*)(const CaptSharedAttentionBackward*, int64_t, int64_t);

constexpr Forward kForward[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_prompt_attention_shared);
constexpr Backward kBackward[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_prompt_attention_shared_backward);
constexpr Reduce kReduce[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_prompt_attention_shared_reduce);

bool runs(int level) { return level >= 0 && level <= capt_cpu_level(); }

}  // namespace

extern "C" int64_t capt_prompt_attention_shared_tasks(const CaptSharedAttention* args) {
  return args->batch * args->n_heads * row_blocks(*args);
}

extern "C" int capt_prompt_attention_shared_cpu(const CaptSharedAttention* args, int level, int64_t begin,
                                                int64_t end) {
  return runs(level) ? kForward[level](args, begin, end) : 1;
}

extern "C" int64_t capt_prompt_attention_shared_groups(const CaptSharedAttentionBackward* args) {
  return backward_groups(*args);
}

extern "C" int64_t capt_prompt_attention_shared_backward_tasks(const CaptSharedAttentionBackward* args) {
  return backward_groups(*args) * args->forward.n_heads * backward_row_blocks(*args);
}

extern "C" int capt_prompt_attention_shared_backward_cpu(const CaptSharedAttentionBackward* args, int level,
                                                         int64_t begin, int64_t end) {
  return runs(level) ? kBackward[level](args, begin, end) : 1;
}

extern "C" int64_t capt_prompt_attention_shared_reduce_tasks(const CaptSharedAttentionBackward* args) {
  return sums_images(*args, 0) || sums_images(*args, 1) ? args->forward.rows[0] + args->forward.rows[1] : 0;
}

extern "C" int capt_prompt_attention_shared_reduce_cpu(const CaptSharedAttentionBackward* args, int level,
                                                       int64_t begin, int64_t end) {
  if (!runs(level)) return 1;
  kReduce[level](args, begin, end);
  return 0;
}
