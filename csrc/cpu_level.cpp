// Which instruction-set level this CPU runs.

#include "capt.h"

#ifdef CAPT_X86_BF16
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef CAPT_X86_BF16
// Linux keeps the tile registers from a process until it asks for them.
bool tiles_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

int detect_level() {
#ifdef CAPT_X86
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) {
    return CAPT_BASELINE;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))) {
    return CAPT_AVX2;
  }
#ifdef CAPT_X86_BF16
  if (!__builtin_cpu_supports("avx512bf16")) return CAPT_AVX512;
  if (__builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && tiles_granted()) return CAPT_AMX;
  return CAPT_AVX512BF16;
#else
  return CAPT_AVX512;
#endif
#else
  return CAPT_BASELINE;
#endif
}

int limit = CAPT_LEVELS;

}  // namespace

extern "C" int capt_cpu_level(void) {
  static const int detected = detect_level();
  return detected < limit ? detected : limit;
}

extern "C" int capt_limit_cpu_level(int level) {
  limit = level < CAPT_BASELINE ? CAPT_BASELINE : level;
  return capt_cpu_level();
}
