// CPU entry points of prompt_attention: index checks, inverted index, dispatch to an instruction-set level.

#include "prompt_attention.h"

#define CAPT_DECLARE(level)                                                                                     \
  extern "C" void capt_prompt_attention_##level(const CaptPromptAttention*, int64_t, int64_t);                  \
  extern "C" void capt_prompt_attention_backward_##level(const CaptPromptAttentionBackward*, int64_t, int64_t); \
  extern "C" void capt_prompt_attention_tables_##level(const CaptPromptAttentionBackward*, int64_t, int64_t);

CAPT_DECLARE(baseline)
CAPT_DECLARE(avx2)
CAPT_DECLARE(avx512)
CAPT_DECLARE(avx512bf16)
CAPT_DECLARE(amx)

namespace {

using Forward = void (*)(const CaptPromptAttention*, int64_t, int64_t);
using Backward = void (*)(const CaptPromptAttentionBackward*, int64_t, int64_t);

constexpr Forward kForward[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_prompt_attention);
constexpr Backward kBackward[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_prompt_attention_backward);
constexpr Backward kTables[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_prompt_attention_tables);

bool runs(int level) { return level >= 0 && level <= capt_cpu_level(); }

}  // namespace

extern "C" int capt_prompt_attention_check(const CaptPromptAttention* args) {
  for (int i = 0; i < 2; ++i) {
    for (int64_t at = 0; at < args->batch * args->k; ++at) {
      if (args->index[i][at] < -1 || args->index[i][at] >= args->pairs[i]) return 1 + i;
    }
  }
  return 0;
}

extern "C" int capt_prompt_attention_cpu(const CaptPromptAttention* args, int level, int64_t begin, int64_t end) {
  if (!runs(level)) return 1;
  kForward[level](args, begin, end);
  return 0;
}

extern "C" int capt_prompt_attention_backward_cpu(const CaptPromptAttentionBackward* args, int level, int64_t begin,
                                                  int64_t end) {
  if (!runs(level)) return 1;
  kBackward[level](args, begin, end);
  return 0;
}

extern "C" void capt_prompt_attention_invert(const CaptPromptAttentionBackward* args) {
  // Counting sort. While filling, first[p + 1] is where the next use of pair p goes.
  for (int i = 0; i < 2; ++i) {
    const int64_t positions = args->forward.batch * args->forward.k, pairs = args->forward.pairs[i];
    const int64_t* index = args->forward.index[i];
    int64_t* first = args->first[i];
    for (int64_t p = 0; p <= pairs; ++p) first[p] = 0;
    for (int64_t at = 0; at < positions; ++at) {
      if (index[at] >= 0 && index[at] + 2 <= pairs) ++first[index[at] + 2];
    }
    for (int64_t p = 1; p <= pairs; ++p) first[p] += first[p - 1];
    for (int64_t at = 0; at < positions; ++at) {
      if (index[at] >= 0) args->uses[i][first[index[at] + 1]++] = at;
    }
  }
}

extern "C" int64_t capt_prompt_attention_tables_tasks(const CaptPromptAttentionBackward* args) {
  const int64_t blocks = (args->forward.dim + CAPT_PROMPT_CHANNELS - 1) / CAPT_PROMPT_CHANNELS;
  return (args->forward.pairs[0] + args->forward.pairs[1]) * blocks;
}

extern "C" int capt_prompt_attention_tables_cpu(const CaptPromptAttentionBackward* args, int level, int64_t begin,
                                                int64_t end) {
  if (!runs(level)) return 1;
  kTables[level](args, begin, end);
  return 0;
}
