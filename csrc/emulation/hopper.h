// Second bodies of common/hopper.cuh for the emulation. Copies and products happen at once, in the order of the code;
// a wait that was forgotten shows where the data depends on another thread, not otherwise.
#pragma once

#include "emulation/cuda.h"

#define __grid_constant__

struct TensorMap {
  const char* base;
  int64_t lines, columns;
  int box_lines;
};

inline int make_tensor_map(TensorMap* map, const void* base, bool, int64_t lines, int64_t columns, int box_lines) {
  if (columns % 8 != 0 || reinterpret_cast<uintptr_t>(base) % 16 != 0 || box_lines > 256 || lines >= INT32_MAX)
    return 1;
  *map = {static_cast<const char*>(base), lines, columns, box_lines};
  return 0;
}

namespace emulation {

struct CountingBarrier {
  int16_t expected, missing;
  int32_t bytes_and_phase;  // twice the bytes still to come, plus the parity of the running phase
};

inline CountingBarrier read_barrier(const uint64_t* barrier) {
  CountingBarrier state;
  memcpy(&state, barrier, sizeof state);
  return state;
}

inline void write_barrier(uint64_t* barrier, CountingBarrier state) {
  if (state.missing == 0 && state.bytes_and_phase < 2 && state.bytes_and_phase >= 0) {
    state.missing = state.expected;
    state.bytes_and_phase ^= 1;
  }
  memcpy(barrier, &state, sizeof state);
}

}  // namespace emulation

inline void barrier_start(uint64_t* barrier, int arrivals) {
  const emulation::CountingBarrier state{static_cast<int16_t>(arrivals), static_cast<int16_t>(arrivals), 0};
  memcpy(barrier, &state, sizeof state);
}
inline void barriers_started() {}
inline void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  emulation::CountingBarrier state = emulation::read_barrier(barrier);
  --state.missing;
  state.bytes_and_phase += 2 * bytes;
  emulation::write_barrier(barrier, state);
}
inline void barrier_arrive(uint64_t* barrier) { barrier_arrive_expecting(barrier, 0); }
inline void barrier_wait(uint64_t* barrier, int parity) {
  emulation::wait_until([=] { return (emulation::read_barrier(barrier).bytes_and_phase & 1) != parity; });
}
inline void named_barrier(int number, int threads) {
  emulation::arrive_and_wait(emulation::current->barrier[number], static_cast<unsigned>(threads));
}

inline void load_box(const TensorMap* map, void* into, uint64_t* barrier, int line, int column) {
  constexpr int kBytes = 128, kChunk = 16;
  for (int r = 0; r < map->box_lines; ++r) {
    for (int c = 0; c < kBytes / kChunk; ++c) {
      char* chunk = static_cast<char*>(into) + r * kBytes + (c ^ r % 8) * kChunk;
      const int64_t from_line = int64_t{line} + r, from_column = column + c * 8;
      if (from_line < map->lines && from_column < map->columns) {
        memcpy(chunk, map->base + (from_line * map->columns + from_column) * 2, kChunk);
      } else {
        memset(chunk, 0, kChunk);
      }
    }
  }
  emulation::CountingBarrier state = emulation::read_barrier(barrier);
  state.bytes_and_phase -= 2 * map->box_lines * kBytes;
  emulation::write_barrier(barrier, state);
}

// The address stands for the descriptor; like the hardware, the swizzle is taken from the bits of the final address.
inline uint64_t tile_descriptor(const void* tile) {
  if (reinterpret_cast<uintptr_t>(tile) % 1024 != 0) {
    fprintf(stderr, "emulation: a swizzled tile must start at a multiple of 1024 bytes\n");
    abort();
  }
  return reinterpret_cast<uintptr_t>(tile) >> 4;
}
inline uint64_t along(uint64_t descriptor, int bytes) { return descriptor + (static_cast<unsigned>(bytes) >> 4); }

inline void warpgroup_fence() {}
inline void warpgroup_commit() {}
template <int kPending>
inline void warpgroup_wait() {}
template <int kCount>
inline void warpgroup_use(float (&)[kCount]) {}

namespace emulation {

// 16 values of one line of a tile, widened.
template <typename T>
inline void read_line(uint64_t descriptor, int line, float (&into)[16]) {
  for (int half = 0; half < 2; ++half) {
    uintptr_t address = (descriptor << 4) + static_cast<unsigned>(line * 128 + half * 16);
    address ^= (address >> 7 & 7) << 4;
    T value[8];
    memcpy(value, reinterpret_cast<const void*>(address), sizeof value);
    for (int i = 0; i < 8; ++i) into[8 * half + i] = widen(value[i]);
  }
}

}  // namespace emulation

template <typename T, int kCount>
inline void warpgroup_multiply_add(float (&c)[kCount], uint64_t a, uint64_t b, bool accumulate, T) {
  const int lane = static_cast<int>(emulation::lane()), warp = static_cast<int>(threadIdx.x / emulation::kLanes % 4);
  float left[2][16], right[16];
  for (int i = 0; i < 2; ++i) emulation::read_line<T>(a, warp * 16 + lane / 4 + 8 * i, left[i]);
  for (int j = 0; j < kCount / 4; ++j) {
    for (int column = 0; column < 2; ++column) {
      emulation::read_line<T>(b, 8 * j + lane % 4 * 2 + column, right);
      for (int i = 0; i < 2; ++i) {
        float& sum = c[4 * j + 2 * i + column];
        if (!accumulate) sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += left[i][k] * right[k];
      }
    }
  }
}

template <int kCount>
inline void fewer_registers() {}
template <int kCount>
inline void more_registers() {}
