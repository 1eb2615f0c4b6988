// CPU entry points of expert_gating: routing of a chunk, sizes, task counts, dispatch to an instruction-set level.

#include "expert_gating.h"

#define CAPT_DECLARE(level)                                                                            \
  extern "C" void capt_expert_router_##level(const CaptExpertRouter*, int64_t, int64_t);               \
  extern "C" void capt_expert_router_back_##level(const CaptExpertRouterBack*, int, int64_t, int64_t); \
  extern "C" void capt_expert_mix_##level(const CaptExpertMix*, const CaptExpertChunk*, int, int64_t, int64_t);

CAPT_DECLARE(baseline)
CAPT_DECLARE(avx2)
CAPT_DECLARE(avx512)
CAPT_DECLARE(avx512bf16)
CAPT_DECLARE(amx)

namespace {

using Router = void (*)(const CaptExpertRouter*, int64_t, int64_t);
using RouterBack = void (*)(const CaptExpertRouterBack*, int, int64_t, int64_t);
using Mix = void (*)(const CaptExpertMix*, const CaptExpertChunk*, int, int64_t, int64_t);

constexpr Router kRouter[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_expert_router);
constexpr RouterBack kRouterBack[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_expert_router_back);
constexpr Mix kMix[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_expert_mix);

constexpr int64_t kChunk = CAPT_EXPERT_CHUNK;

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

}  // namespace

extern "C" int64_t capt_expert_router_tasks(const CaptExpertRouter* args) {
  return blocks(args->n_tokens, CAPT_ROUTER_ROWS);
}

extern "C" int capt_expert_router_cpu(const CaptExpertRouter* args, int level, int64_t begin, int64_t end) {
  if (level < 0 || level > capt_cpu_level()) return 1;
  kRouter[level](args, begin, end);
  return 0;
}

extern "C" int64_t capt_expert_router_back_tasks(const CaptExpertRouterBack* args, int gate) {
  return gate ? blocks(args->dim, 16) : blocks(args->n_tokens, CAPT_ROUTER_ROWS);
}

extern "C" int capt_expert_router_back_cpu(const CaptExpertRouterBack* args, int gate, int level, int64_t begin,
                                           int64_t end) {
  if (level < 0 || level > capt_cpu_level()) return 1;
  kRouterBack[level](args, gate, begin, end);
  return 0;
}

extern "C" void capt_expert_mix_route(const CaptExpertMix* args, CaptExpertChunk* chunk) {
  int64_t lane = 0;
  for (int64_t e = 0; e < args->n_experts; ++e) {
    chunk->start[e] = lane;
    for (int64_t n = chunk->first; n < chunk->first + chunk->count; ++n) {
      const float weight = args->weights[n * args->n_experts + e];
      if (weight == 0.0f) continue;  // a NaN counts
      chunk->token[lane] = static_cast<int32_t>(n - chunk->first);
      chunk->weight[lane++] = weight;
    }
    chunk->used[e] = lane - chunk->start[e];
    for (; lane % CAPT_EXPERT_LANES != 0; ++lane) {
      chunk->token[lane] = 0;
      chunk->weight[lane] = 0.0f;
    }
  }
  chunk->start[args->n_experts] = lane;
}

extern "C" int64_t capt_expert_mix_lanes(const CaptExpertMix* args) {
  const int64_t tokens = args->n_tokens < kChunk ? args->n_tokens : kChunk;
  return args->n_experts * blocks(tokens, CAPT_EXPERT_LANES) * CAPT_EXPERT_LANES;
}

// Forward: x and hidden of every lane. Backward: x, grad_y, grad_hidden in lane layout, x and hidden in row layout, and
// one partial gradient of the weight a lane and block of hidden rows.
extern "C" int64_t capt_expert_mix_workspace(const CaptExpertMix* args, int64_t lanes) {
  const int64_t dim = blocks(args->dim, 16) * 16, hidden = blocks(args->hidden, 16) * 16;
  const int64_t forward = dim + hidden;
  const int64_t backward = 3 * dim + 2 * hidden + blocks(args->hidden, CAPT_EXPERT_ROWS);
  return lanes * (args->grad_y == nullptr ? forward : backward) * static_cast<int64_t>(sizeof(float));
}

extern "C" int64_t capt_expert_mix_tasks(const CaptExpertMix* args, const CaptExpertChunk* chunk, int phase) {
  switch (phase) {
    case CAPT_EXPERT_PACK:
    case CAPT_EXPERT_BACK_WEIGHTS:
      return chunk->start[args->n_experts] / CAPT_EXPERT_LANES;
    case CAPT_EXPERT_DOWN:
    case CAPT_EXPERT_BACK_X:
      return blocks(args->dim, CAPT_EXPERT_ROWS);
    case CAPT_EXPERT_BACK_OUT:
      return args->n_experts * blocks(args->dim, CAPT_EXPERT_ROWS);
    default:
      return args->n_experts * blocks(args->hidden, CAPT_EXPERT_ROWS);
  }
}

extern "C" int capt_expert_mix_cpu(const CaptExpertMix* args, const CaptExpertChunk* chunk, int phase, int level,
                                   int64_t begin, int64_t end) {
  if (level < 0 || level > capt_cpu_level()) return 1;
  kMix[level](args, chunk, phase, begin, end);
  return 0;
}
