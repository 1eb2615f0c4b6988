// Runs CUDA kernels on the CPU, so that a machine without a GPU executes their indexing, masking, barriers and
// shared-memory use. Each thread of a block is a fiber; blocks run one after the other. Every barrier must be reached
// by all threads of the block that have not ended: otherwise the emulation stops with a message.
//
// It shows no data races between barriers, no bank conflicts and no timing: those need a GPU (compute-sanitizer,
// benchmarks/gpu.py). Shared memory is poisoned with NaN before each block.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

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

constexpr size_t kStackBytes = 64 * 1024;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  dim3 index;
  bool ended = false;
};

struct Block {
  dim3 index, size, grid;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  unsigned alive = 0, waiting = 0;
  const std::function<void()>* body = nullptr;
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
  Shared() { shared_arrays().push_back({value, sizeof value}); }
};

inline void yield() { swapcontext(&current->running->context, &current->scheduler); }

inline void enter() {
  (*current->body)();
  current->running->ended = true;
  --current->alive;
  yield();
}

inline void barrier() {
  ++current->waiting;
  yield();
}

inline void run_block(Block& block) {
  const unsigned threads = block.size.x * block.size.y * block.size.z;
  for (const SharedArray& array : shared_arrays()) memset(array.data, 0xFF, array.bytes);
  current = &block;
  block.alive = threads;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.ended = false;
    fiber.index = dim3(i % block.size.x, i / block.size.x % block.size.y, i / (block.size.x * block.size.y));
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  while (block.alive > 0) {
    block.waiting = 0;
    const unsigned before = block.alive;
    for (Fiber& fiber : block.fibers) {
      if (fiber.ended) continue;
      block.running = &fiber;
      swapcontext(&block.scheduler, &fiber.context);
    }
    // One sweep runs every live thread to its next barrier or to its end: a mixture is a divergent barrier.
    if (block.waiting != 0 && block.alive != before) {
      fprintf(stderr, "emulation: %u threads wait at a barrier that %u others never reach\n", block.waiting,
              before - block.alive);
      abort();
    }
  }
  current = nullptr;
}

inline void launch(const std::function<void()>& body, dim3 grid, dim3 size) {
  Block block;
  block.size = size;
  block.grid = grid;
  block.body = &body;
  block.fibers.resize(size_t{size.x} * size.y * size.z);
  for (Fiber& fiber : block.fibers) fiber.stack.resize(kStackBytes);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block.index = dim3(x, y, z);
        run_block(block);
      }
    }
  }
}

}  // namespace emulation

#define threadIdx (emulation::current->running->index)
#define blockIdx (emulation::current->index)
#define blockDim (emulation::current->size)
#define gridDim (emulation::current->grid)

inline void __syncthreads() { emulation::barrier(); }

// "extent" counts all elements of a (possibly multi-dimensional) static shared array, used flat.
#define CAPT_SHARED(type, name, extent)             \
  static emulation::Shared<type, extent> name##_of; \
  type* const name = name##_of.value
#define CAPT_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), emulation::launch([=] { kernel(__VA_ARGS__); }, grid, block))
#define CAPT_LAST_ERROR() 0

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
