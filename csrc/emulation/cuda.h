// Runs CUDA kernels on the CPU, so that a machine without a GPU executes their indexing, masking, barriers, warp
// exchanges and shared-memory use. Each thread of a block is a fiber; blocks run one after the other. A barrier that
// some thread of its group never reaches stops the emulation with a message.
//
// It shows no data races between barriers, no bank conflicts and no timing: those need a GPU (compute-sanitizer,
// benchmarks/gpu.py). Shared memory is poisoned with NaN before each block.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <vector>

#include "emulation/fiber.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kSlotBytes = 64;  // what a lane can show to its warp at once
constexpr size_t kDynamicAlignment = 1024;

// Threads wait until `expected` of them have arrived; then the next generation begins.
struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Thread {
  Fiber fiber;
  dim3 index;
  unsigned linear = 0;
  unsigned turn = 0;  // which of the two slots the next exchange uses
  bool ended = false;
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char slot[2][kLanes][kSlotBytes];
};

constexpr unsigned kNamedBarriers = 16;

struct Block {
  dim3 index, size, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier[kNamedBarriers];
  Context scheduler;
  Thread* running = nullptr;
  unsigned alive = 0, waiting = 0;
  bool progress = false;
  const std::function<void()>* body = nullptr;
  unsigned char* dynamic = nullptr;
};

inline Block* current = nullptr;

// Shared arrays register themselves here so that a new block finds them poisoned, not left over.
struct SharedArray {
  void* data;
  size_t bytes;
};
inline std::vector<SharedArray>& shared_arrays() {
  static std::vector<SharedArray> arrays;
  return arrays;
}

template <typename T, size_t kCount>
struct Shared {
  alignas(16) T value[kCount];
  Shared() {
    memset(static_cast<void*>(value), 0xFF, sizeof value);
    shared_arrays().push_back({value, sizeof value});
  }
};

inline void yield() { switch_context(current->running->fiber.context, current->scheduler); }

// The running thread gives way until the condition holds. Every wait goes through here: a sweep over all threads in
// which none of them moves on is a deadlock.
template <typename Condition>
inline void wait_until(Condition condition) {
  while (!condition()) {
    ++current->waiting;
    yield();
  }
  current->progress = true;
}

inline void arrive_and_wait(Barrier& barrier, unsigned expected) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  wait_until([&] { return barrier.generation != generation; });
}

inline void arrive(Barrier& barrier, unsigned expected) {
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}

inline void block_barrier() {
  arrive_and_wait(current->barrier[0], current->size.x * current->size.y * current->size.z);
}

inline unsigned lane() { return current->running->linear % kLanes; }
inline Warp& warp() { return current->warps[current->running->linear / kLanes]; }

inline void warp_barrier(unsigned mask) {
  if ((mask >> lane() & 1u) == 0) {
    fprintf(stderr, "emulation: lane %u takes part in a warp operation whose mask %08x leaves it out\n", lane(), mask);
    abort();
  }
  arrive_and_wait(warp().barrier, static_cast<unsigned>(__builtin_popcount(mask)));
}

// Every lane of the mask shows a value; read(l) then gives the value of lane l. Two slots take turns: a lane that runs
// ahead into the next exchange cannot overwrite what others still read.
template <typename T>
struct Exchange {
  const unsigned char (*slot)[kSlotBytes];
  T read(unsigned source) const {
    T value;
    memcpy(&value, slot[source % kLanes], sizeof value);
    return value;
  }
};

template <typename T>
inline Exchange<T> exchange(unsigned mask, const T& value) {
  static_assert(sizeof(T) <= kSlotBytes, "a slot holds 64 bytes");
  const unsigned turn = current->running->turn++ % 2;
  Warp& mine = warp();
  memcpy(mine.slot[turn][lane()], &value, sizeof value);
  warp_barrier(mask);
  return {mine.slot[turn]};
}

inline void enter() {
  (*current->body)();
  current->running->ended = true;
  current->progress = true;
  --current->alive;
  yield();
}

inline void run_block(Block& block) {
  for (const SharedArray& array : shared_arrays()) memset(array.data, 0xFF, array.bytes);
  current = &block;
  block.alive = static_cast<unsigned>(block.threads.size());
  for (Warp& each : block.warps) each.barrier = Barrier{};
  for (Barrier& each : block.barrier) each = Barrier{};
  for (unsigned i = 0; i < block.threads.size(); ++i) {
    Thread& thread = block.threads[i];
    thread.ended = false;
    thread.turn = 0;
    thread.linear = i;
    thread.index = dim3(i % block.size.x, i / block.size.x % block.size.y, i / (block.size.x * block.size.y));
    thread.fiber.start(enter);
  }
  while (block.alive > 0) {
    block.waiting = 0;
    block.progress = false;
    for (Thread& thread : block.threads) {
      if (thread.ended) continue;
      block.running = &thread;
      switch_context(block.scheduler, thread.fiber.context);
    }
    if (!block.progress && block.waiting == block.alive) {
      fprintf(stderr, "emulation: %u threads wait at a barrier that %zu others never reach\n", block.waiting,
              block.threads.size() - block.alive);
      abort();
    }
  }
  current = nullptr;
}

inline void launch(const std::function<void()>& body, dim3 grid, dim3 size, size_t dynamic_bytes) {
  Block block;
  block.size = size;
  block.grid = grid;
  block.body = &body;
  block.threads.resize(size_t{size.x} * size.y * size.z);
  block.warps.resize((block.threads.size() + kLanes - 1) / kLanes);
  // Exactly as large as asked for, so that the address sanitizer sees a step past the end.
  void* dynamic = nullptr;
  if (dynamic_bytes > 0 && posix_memalign(&dynamic, kDynamicAlignment, dynamic_bytes) != 0) abort();
  block.dynamic = static_cast<unsigned char*>(dynamic);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        if (dynamic_bytes > 0) memset(dynamic, 0xFF, dynamic_bytes);
        block.index = dim3(x, y, z);
        run_block(block);
      }
    }
  }
  free(dynamic);
}

}  // namespace emulation

#define threadIdx (emulation::current->running->index)
#define blockIdx (emulation::current->index)
#define blockDim (emulation::current->size)
#define gridDim (emulation::current->grid)

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { emulation::warp_barrier(mask); }

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::exchange(mask, value).read(static_cast<unsigned>(source));
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
  const unsigned source = emulation::lane() ^ static_cast<unsigned>(bits);
  return emulation::exchange(mask, value).read(source);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = emulation::lane();
  return emulation::exchange(mask, value).read(lane >= delta ? lane - delta : lane);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = emulation::lane();
  return emulation::exchange(mask, value).read(lane + delta < emulation::kLanes ? lane + delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto shown = emulation::exchange(mask, predicate);
  unsigned ballot = 0;
  for (unsigned i = 0; i < emulation::kLanes; ++i) {
    if (mask >> i & 1u) ballot |= unsigned{shown.read(i) != 0} << i;
  }
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// One thread runs at a time and blocks follow each other: plain code is atomic here.
template <typename T>
inline T atomicAdd(T* target, T value) {
  const T old = *target;
  *target = old + value;
  return old;
}
template <typename T>
inline T atomicMax(T* target, T value) {
  const T old = *target;
  if (value > old) *target = value;
  return old;
}
template <typename T>
inline T atomicExch(T* target, T value) {
  const T old = *target;
  *target = value;
  return old;
}
template <typename T>
inline T atomicCAS(T* target, T expected, T value) {
  const T old = *target;
  if (old == expected) *target = value;
  return old;
}
inline void __threadfence() {}

template <typename T>
inline T __ldg(const T* source) {
  return *source;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __float_as_int(float value) {
  int bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline unsigned __float_as_uint(float value) { return static_cast<unsigned>(__float_as_int(value)); }
inline float __int_as_float(int bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }

// "extent" counts all elements of a (possibly multi-dimensional) static shared array, used flat.
#define CAPT_SHARED(type, name, extent)             \
  static emulation::Shared<type, extent> name##_of; \
  type* const name = name##_of.value
#define CAPT_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulation::current->dynamic)
#define CAPT_LAUNCH(kernel, grid, block, stream, ...) CAPT_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)
#define CAPT_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  ((void)(stream), emulation::launch([=] { kernel(__VA_ARGS__); }, grid, block, bytes))
#define CAPT_LAST_ERROR() 0
#define CAPT_ALLOW_SHARED(kernel, bytes) 0

struct HalfBits {
  _Float16 value;
};
struct BfloatBits {
  uint16_t value;
};
inline float widen(float value) { return value; }
inline float widen(HalfBits half) { return static_cast<float>(half.value); }
inline float widen(BfloatBits bfloat) {
  const uint32_t bits = uint32_t{bfloat.value} << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline void narrow(float value, float& into) { into = value; }
inline void narrow(float value, HalfBits& into) { into.value = static_cast<_Float16>(value); }
inline void narrow(float value, BfloatBits& into) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  into.value = value != value ? static_cast<uint16_t>((bits >> 16) | 0x40u)
                              : static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
