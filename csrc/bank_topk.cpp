// CPU entry points of bank_topk: sizes, running lists, dispatch to an instruction-set level.

#include "bank_topk.h"

#include <string.h>

#include <algorithm>
#include <functional>
#include <limits>

#define CAPT_DECLARE(level)                                                             \
  extern "C" void capt_bank_pack_##level(const CaptBankTopk*, int64_t, int64_t, void*); \
  extern "C" void capt_bank_scan_##level(const CaptBankTopk*, const void*, int64_t, int64_t, CaptTopkLists*, void*);

CAPT_DECLARE(baseline)
CAPT_DECLARE(avx2)
CAPT_DECLARE(avx512)
CAPT_DECLARE(avx512bf16)
CAPT_DECLARE(amx)

namespace {

using Pack = void (*)(const CaptBankTopk*, int64_t, int64_t, void*);
using Scan = void (*)(const CaptBankTopk*, const void*, int64_t, int64_t, CaptTopkLists*, void*);

constexpr Pack kPack[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_bank_pack);
constexpr Scan kScan[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_bank_scan);

// Inverse of the ordered integer in the upper half of a key.
float key_score(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  const uint32_t bits = ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered;
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

int64_t padded(int64_t dim) { return (dim + 31) / 32 * 32; }

}  // namespace

extern "C" int64_t capt_bank_packed_bytes(const CaptBankTopk* args, int64_t count) {
  return ((count + 31) / 32 * 32 + 1) * padded(args->dim) * 4;  // one row more: scratch of packing
}

extern "C" int64_t capt_bank_scratch_bytes(const CaptBankTopk* args) { return 32 * padded(args->dim) * 4 + 8192; }

extern "C" int capt_bank_pack(const CaptBankTopk* args, int level, int64_t first, int64_t count, void* packed) {
  if (level < 0 || level > capt_cpu_level()) return 1;
  kPack[level](args, first, count, packed);
  return 0;
}

extern "C" int capt_bank_scan(const CaptBankTopk* args, int level, const void* packed, int64_t begin, int64_t end,
                              CaptTopkLists* lists, void* scratch) {
  if (level < 0 || level > capt_cpu_level()) return 1;
  kScan[level](args, packed, begin, end, lists, scratch);
  return 0;
}

extern "C" int64_t capt_topk_capacity(int64_t k, int64_t n_rows) {
  const int64_t kept = std::min(k, n_rows);
  return std::max<int64_t>(1, std::min(kept + std::max<int64_t>(kept, 32), n_rows));
}

extern "C" void capt_topk_clear(CaptTopkLists* lists) {
  const int64_t lanes = (lists->count + 31) / 32 * 32;
  for (int64_t q = 0; q < lanes; ++q) {
    // No score passes the lanes without a query.
    lists->thresholds[q] = std::numeric_limits<float>::infinity() * (q < lists->count ? -1.0f : 1.0f);
    if (q < lists->count) lists->lengths[q] = 0;
  }
}

extern "C" void capt_topk_cut(CaptTopkLists* lists, int64_t list) {
  if (lists->lengths[list] < lists->k) return;
  uint64_t* keys = lists->keys + list * lists->capacity;
  std::nth_element(keys, keys + lists->k - 1, keys + lists->lengths[list], std::greater<uint64_t>());
  lists->lengths[list] = lists->k;
  lists->thresholds[list] = key_score(keys[lists->k - 1]);
}

extern "C" void capt_topk_write(uint64_t* keys, int64_t count, int64_t k, float* scores, int64_t* index) {
  const int64_t kept = std::min(k, count);
  if (kept < count) std::nth_element(keys, keys + kept, keys + count, std::greater<uint64_t>());
  std::sort(keys, keys + kept, std::greater<uint64_t>());
  for (int64_t i = 0; i < kept; ++i) {
    scores[i] = key_score(keys[i]);
    index[i] = static_cast<int64_t>(~static_cast<uint32_t>(keys[i]));
  }
  std::fill(scores + kept, scores + k, -std::numeric_limits<float>::infinity());
  std::fill(index + kept, index + k, -1);
}
