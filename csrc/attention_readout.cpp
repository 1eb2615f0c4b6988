// CPU entry points of attention_readout: columns of equal biases, workspace, dispatch to an instruction-set level.

#include "attention_readout.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "attention_readout_workspace.h"

#define CAPT_DECLARE(level)                                                                                       \
  extern "C" void capt_attention_readout_factors_##level(const CaptAttentionReadout*, const CaptReadoutColumns*); \
  extern "C" void capt_attention_readout_##level(const CaptAttentionReadout*, const CaptReadoutColumns*, void*,   \
                                                 int64_t, int64_t);

CAPT_DECLARE(baseline)
CAPT_DECLARE(avx2)
CAPT_DECLARE(avx512)
CAPT_DECLARE(avx512bf16)
CAPT_DECLARE(amx)

namespace {

using Factors = void (*)(const CaptAttentionReadout*, const CaptReadoutColumns*);
using Tasks = void (*)(const CaptAttentionReadout*, const CaptReadoutColumns*, void*, int64_t, int64_t);

constexpr Factors kFactors[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_attention_readout_factors);
constexpr Tasks kTasks[CAPT_LEVELS] = CAPT_EVERY_LEVEL(capt_attention_readout);

int64_t section_of(const CaptAttentionReadout& args, int64_t key) {
  return args.group_batch_stride == 0 ? args.groups[key] : 0;
}

int64_t slots_of(int64_t length) {
  int64_t slots = 4;
  while (slots < 2 * length) slots *= 2;
  return slots;
}

struct Memory {
  CaptReadoutColumns columns;
  uint64_t* hash;  // [length]
  int32_t* table;  // [slots], open addressing; -1: free
  int64_t bytes;

  Memory(const CaptAttentionReadout& args, void* memory) {
    Carver carver(memory);
    columns.sections = args.group_batch_stride == 0 ? args.n_groups : 1;
    columns.pitch = rounded_up(args.variants, kLargestWidth);
    columns.column_of = carver.take<int32_t>(args.bias_heads * args.length);
    columns.key_of = carver.take<int32_t>(args.bias_heads * args.length);
    columns.count = carver.take<int32_t>(args.bias_heads);
    columns.top = carver.take<float>(args.bias_heads * columns.sections * args.variants);
    columns.factors = carver.take<float>(args.bias_heads * args.length * columns.pitch);
    hash = carver.take<uint64_t>(args.length);
    table = carver.take<int32_t>(slots_of(args.length));
    bytes = carver.bytes();
  }
};

uint32_t bits_of(float value) {
  value += 0.0f;  // -0.0 adds what 0.0 does
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

bool groups_fit(const CaptAttentionReadout& args) {
  const int64_t count = args.group_batch_stride == 0 ? args.length : args.batch * args.length;
  return std::all_of(args.groups, args.groups + count, [&](int64_t g) { return g >= 0 && g < args.n_groups; });
}

bool same_column(const CaptAttentionReadout& args, int64_t head, int64_t a, int64_t b) {
  if (section_of(args, a) != section_of(args, b)) return false;
  for (int64_t m = 0; m < args.variants; ++m) {
    const float* row = args.bias + (m * args.bias_heads + head) * args.length;
    if (bits_of(row[a]) != bits_of(row[b])) return false;
  }
  return true;
}

void find_columns(const CaptAttentionReadout& args, int64_t head, Memory& memory) {
  const CaptReadoutColumns& columns = memory.columns;
  int32_t *column_of = columns.column_of + head * args.length, *key_of = columns.key_of + head * args.length;
  for (int64_t j = 0; j < args.length; ++j) memory.hash[j] = static_cast<uint64_t>(section_of(args, j));
  for (int64_t m = 0; m < args.variants; ++m) {
    const float* row = args.bias + (m * args.bias_heads + head) * args.length;
    for (int64_t j = 0; j < args.length; ++j) {
      memory.hash[j] = (memory.hash[j] ^ bits_of(row[j])) * 0x9E3779B97F4A7C15u;
      memory.hash[j] ^= memory.hash[j] >> 32;
    }
  }
  const int64_t slots = slots_of(args.length);
  std::fill(memory.table, memory.table + slots, -1);
  int32_t count = 0;
  for (int64_t j = 0; j < args.length; ++j) {
    int64_t slot = static_cast<int64_t>(memory.hash[j]) & (slots - 1);
    while (memory.table[slot] >= 0 && !same_column(args, head, key_of[memory.table[slot]], j)) {
      slot = (slot + 1) & (slots - 1);
    }
    if (memory.table[slot] < 0) {
      key_of[count] = static_cast<int32_t>(j);
      memory.table[slot] = count++;
    }
    column_of[j] = memory.table[slot];
  }
  columns.count[head] = count;
}

void find_tops(const CaptAttentionReadout& args, int64_t head, const CaptReadoutColumns& columns) {
  float* top = columns.top + head * columns.sections * args.variants;
  std::fill(top, top + columns.sections * args.variants, -std::numeric_limits<float>::infinity());
  for (int32_t c = 0; c < columns.count[head]; ++c) {
    const int64_t key = columns.key_of[head * args.length + c];
    float* of_section = top + section_of(args, key) * args.variants;
    for (int64_t m = 0; m < args.variants; ++m) {
      of_section[m] = std::max(of_section[m], args.bias[(m * args.bias_heads + head) * args.length + key]);
    }
  }
}

}  // namespace

extern "C" int64_t capt_attention_readout_columns_bytes(const CaptAttentionReadout* args) {
  return Memory(*args, nullptr).bytes;
}

extern "C" int capt_attention_readout_columns(const CaptAttentionReadout* args, int level, void* memory,
                                              CaptReadoutColumns* columns) {
  if (level < 0 || level > capt_cpu_level()) return 1;
  if (!groups_fit(*args)) return 2;
  Memory places(*args, memory);
  *columns = places.columns;
  if (args->variants <= 1) return 0;  // one variant is computed without columns
  for (int64_t head = 0; head < args->bias_heads; ++head) {
    find_columns(*args, head, places);
    find_tops(*args, head, *columns);
  }
  kFactors[level](args, columns);
  return 0;
}

extern "C" int64_t capt_attention_readout_workspace(const CaptAttentionReadout* args) {
  return ReadoutWorkspace(*args, nullptr).bytes;
}

extern "C" int capt_attention_readout_cpu(const CaptAttentionReadout* args, const CaptReadoutColumns* columns,
                                          void* workspace, int level, int64_t begin, int64_t end) {
  if (level < 0 || level > capt_cpu_level()) return 1;
  kTasks[level](args, columns, workspace, begin, end);
  return 0;
}
