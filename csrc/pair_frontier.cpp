// CPU entry points of pair_frontier: what all rows share, scratch memory, dispatch to an instruction-set level.

#include "pair_frontier.h"

#include <algorithm>

#define CAPT_DECLARE(level) \
  extern "C" void capt_pair_frontier_##level(const CaptPairFrontier*, const int32_t*, void*, int64_t, int64_t);

CAPT_DECLARE(baseline)
CAPT_DECLARE(avx2)
CAPT_DECLARE(avx512)
CAPT_DECLARE(avx512bf16)
CAPT_DECLARE(amx)

namespace {

using Rows = void (*)(const CaptPairFrontier*, const int32_t*, void*, int64_t, int64_t);

constexpr Rows kRows[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_pair_frontier);

}  // namespace

extern "C" int64_t capt_pair_frontier_columns_bytes(const CaptPairFrontier* args) {
  return capt_pair_frontier_padded(args->n_pairs) * (args->term != 0 ? 3 : 1) * 4;
}

extern "C" int capt_pair_frontier_columns(const CaptPairFrontier* args, void* columns) {
  int32_t* code = static_cast<int32_t*>(columns);
  const int64_t n = args->n_pairs, whole = capt_pair_frontier_padded(n);
  const auto n_groups = static_cast<uint64_t>(args->n_groups);
  bool outside = false;
  for (int64_t k = 0; k < n; ++k) {
    const uint64_t group = static_cast<uint64_t>(args->group[k]) + 1;
    outside |= group > n_groups;
    code[k] = static_cast<int32_t>(group);
  }
  std::fill(code + n, code + whole, 0);
  if (args->term != 0) {
    int32_t *state = code + whole, *object = state + whole;
    const auto n_states = static_cast<uint64_t>(args->n_states), n_objects = static_cast<uint64_t>(args->n_objects);
    for (int64_t k = 0; k < n; ++k) {
      const auto s = static_cast<uint64_t>(args->pairs[2 * k]), o = static_cast<uint64_t>(args->pairs[2 * k + 1]);
      outside |= (s >= n_states) | (o >= n_objects);
      state[k] = static_cast<int32_t>(s);
      object[k] = static_cast<int32_t>(o);
    }
    std::fill(state + n, state + whole, 0);
    std::fill(object + n, object + whole, 0);
  }
  return outside ? 2 : 0;
}

extern "C" int64_t capt_pair_frontier_workspace(const CaptPairFrontier* args) {
  return capt_pair_frontier_padded(args->n_groups + 1) * (8 + 4 + 4);
}

extern "C" int capt_pair_frontier_cpu(const CaptPairFrontier* args, const void* columns, void* workspace, int level,
                                      int64_t begin, int64_t end) {
  if (level < 0 || level > capt_cpu_level()) return 1;
  kRows[level](args, static_cast<const int32_t*>(columns), workspace, begin, end);
  return 0;
}
