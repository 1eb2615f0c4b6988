// Warp-wide tensor-core products, matrix loads and asynchronous copies (sm_80 and later), each with a second body that
// the emulation runs.
#pragma once

#include "common/device.cuh"

// Fragments of a 16x8x16 product, lane = 4 * g + t:
//   a[0], a[2]: row g,     columns 2t, 2t + 1 and 2t + 8, 2t + 9        c[0], c[1]: row g,     columns 2t, 2t + 1
//   a[1], a[3]: row g + 8, the same columns                             c[2], c[3]: row g + 8, the same columns
//   b[0], b[1]: column g, rows 2t, 2t + 1 and 2t + 8, 2t + 9            (two 16-bit values in a register, low one
//   first)
struct FragmentA {
  uint32_t word[4];
};
struct FragmentB {
  uint32_t word[2];
};
struct FragmentC {
  float value[4];
};

#ifdef __CUDACC__

__device__ __forceinline__ void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b, HalfBits) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c.value[0]), "+f"(c.value[1]), "+f"(c.value[2]), "+f"(c.value[3])
               : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]));
}

__device__ __forceinline__ void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b, BfloatBits) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.value[0]), "+f"(c.value[1]), "+f"(c.value[2]), "+f"(c.value[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices of 16-bit values: lane l points at row l % 8 (16 bytes, aligned) of matrix l / 8 and receives in
// word j the values 2t, 2t + 1 of row g of matrix j.
__device__ __forceinline__ void load_matrices(uint32_t (&word)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: word j holds column g, rows 2t and 2t + 1, of matrix j.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&word)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory without registers; zeros, and no read, if not valid.
__device__ __forceinline__ void copy_async_16(void* into, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(into)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

namespace emulation {

struct Operands {
  FragmentA a;
  FragmentB b;
};

template <typename T>
inline float half_of(uint32_t word, unsigned which) {
  const auto bits = static_cast<uint16_t>(word >> (16 * which));
  T value;
  memcpy(&value, &bits, sizeof bits);
  return widen(value);
}

inline unsigned holder(unsigned line, unsigned k) { return line % 8 * 4 + k % 8 / 2; }

template <typename T>
inline void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  const auto shown = exchange(0xFFFFFFFFu, Operands{a, b});
  const unsigned g = lane() / 4, t = lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t left = shown.read(holder(row, k)).a.word[row / 8 + k / 8 * 2];
      const uint32_t right = shown.read(holder(column, k)).b.word[k / 8];
      c.value[i] += half_of<T>(left, k % 2) * half_of<T>(right, k % 2);
    }
  }
}

inline uint16_t element(const void* row, unsigned column) {
  uint16_t bits;
  memcpy(&bits, static_cast<const char*>(row) + column * sizeof bits, sizeof bits);
  return bits;
}

}  // namespace emulation

inline void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b, HalfBits) {
  emulation::multiply_add<HalfBits>(c, a, b);
}
inline void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b, BfloatBits) {
  emulation::multiply_add<BfloatBits>(c, a, b);
}

inline void load_matrices(uint32_t (&word)[4], const void* row) {
  const auto shown = emulation::exchange(0xFFFFFFFFu, row);
  const unsigned g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (unsigned j = 0; j < 4; ++j) {
    const void* source = shown.read(8 * j + g);
    word[j] = emulation::element(source, 2 * t) | uint32_t{emulation::element(source, 2 * t + 1)} << 16;
  }
}

inline void load_matrices_transposed(uint32_t (&word)[4], const void* row) {
  const auto shown = emulation::exchange(0xFFFFFFFFu, row);
  const unsigned g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (unsigned j = 0; j < 4; ++j) {
    word[j] = emulation::element(shown.read(8 * j + 2 * t), g) |
              uint32_t{emulation::element(shown.read(8 * j + 2 * t + 1), g)} << 16;
  }
}

inline void copy_async_16(void* into, const void* from, bool valid) {
  if (valid) {
    memcpy(into, from, 16);
  } else {
    memset(into, 0, 16);
  }
}
inline void copy_async_commit() {}
template <int kPending>
inline void copy_async_wait() {}

#endif
