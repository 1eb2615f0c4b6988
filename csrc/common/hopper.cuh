// Hopper only (sm_90a): tensor memory access, barriers in shared memory that count bytes, products of a warpgroup with
// both operands in shared memory. Each has a second body that the emulation runs (emulation/hopper.h).
//
// A tile in shared memory is [lines, 64] of 16-bit values, 128 bytes a line, starting at a multiple of 1024 bytes; 16
// bytes at chunk c of line r lie at chunk c ^ (r % 8). TMA writes this order and WGMMA reads it.
#pragma once

#include "common/device.cuh"

#ifdef __CUDACC__

#include <cuda.h>

#include "common/tensor_core.cuh"

using TensorMap = CUtensorMap;

// A map of [lines, columns] 16-bit values, contiguous, base a multiple of 16 bytes and columns of 8, for boxes of
// [box_lines, 64]. A cudaError_t. The function is looked up, so that the library loads without a driver.
inline int make_tensor_map(TensorMap* map, const void* base, bool bfloat, int64_t lines, int64_t columns,
                           int box_lines) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)
               : nullptr;
  }();
  if (encode == nullptr) return cudaErrorSymbolNotFound;
  const cuuint64_t extent[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(lines)};
  const cuuint64_t stride[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_lines)}, step[] = {1, 1};
  const CUresult result =
      encode(map, bfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(base), extent, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// ---- barriers: a phase ends when `arrivals` threads have arrived and all announced bytes have been written ---------

__device__ __forceinline__ void barrier_start(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// By the thread that started barriers, before the block's barrier: makes them visible to TMA.
__device__ __forceinline__ void barriers_started() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity (0 for the first) has ended; parity 1 passes before the first one has.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  int done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}
// `threads` of the block, by barrier number 1 to 15.
__device__ __forceinline__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// The box at (line, column) into shared memory, zeros outside the tensor; its whole size counts towards the barrier.
__device__ __forceinline__ void load_box(const TensorMap* map, void* into, uint64_t* barrier, int line, int column) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(into)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(line)
      : "memory");
}

// ---- products of a warpgroup ------------------------------------------------------------------------------------

// Descriptor of a tile as above (128-byte swizzle, 1024 bytes from one group of 8 lines to the next), and the one
// `bytes` further along its lines.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 |
         static_cast<uint64_t>((shared_address(tile) & 0x3FFFF) >> 4);
}
__device__ __forceinline__ uint64_t along(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

__device__ __forceinline__ void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// After the wait: no use of the sums may move before it.
template <int kCount>
__device__ __forceinline__ void warpgroup_use(float (&c)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

#define CAPT_WGMMA_8(i)                                                                                       \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define CAPT_WGMMA_16(type)                                       \
  asm volatile(                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"                \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type \
      " {"                                                        \
      "%0, %1, %2, %3, %4, %5, %6, %7"                            \
      "}, %8, %9, p, 1, 1, 0, 0;\n}\n"                            \
      : CAPT_WGMMA_8(0)                                           \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define CAPT_WGMMA_64(type)                                                                   \
  asm volatile(                                                                               \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                            \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                             \
      " {"                                                                                    \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                       \
      "}, %32, %33, p, 1, 1, 0, 0;\n}\n"                                                      \
      : CAPT_WGMMA_8(0), CAPT_WGMMA_8(8), CAPT_WGMMA_8(16), CAPT_WGMMA_8(24)                  \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define CAPT_WGMMA_256(type)                                                                                        \
  asm volatile(                                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                                 \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                                  \
      " {"                                                                                                          \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "                       \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "                       \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "                       \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "                       \
      "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "                       \
      "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "                         \
      "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "                        \
      "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"                                            \
      "}, %128, %129, p, 1, 1, 0, 0;\n}\n"                                                                          \
      : CAPT_WGMMA_8(0), CAPT_WGMMA_8(8), CAPT_WGMMA_8(16), CAPT_WGMMA_8(24), CAPT_WGMMA_8(32), CAPT_WGMMA_8(40),   \
        CAPT_WGMMA_8(48), CAPT_WGMMA_8(56), CAPT_WGMMA_8(64), CAPT_WGMMA_8(72), CAPT_WGMMA_8(80), CAPT_WGMMA_8(88), \
        CAPT_WGMMA_8(96), CAPT_WGMMA_8(104), CAPT_WGMMA_8(112), CAPT_WGMMA_8(120)                                   \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

// c = a * b^T (+ c): 64 lines of a, 16, 64 or 256 lines of b, 16 columns. c[4 * j + i] of the thread with lane
// 4 * g + t of warp w: line 16 * w + g + (i < 2 ? 0 : 8) of a, line 8 * j + 2 * t + i % 2 of b.
#define CAPT_WGMMA(lines, Type, type)                                                                   \
  __device__ __forceinline__ void warpgroup_multiply_add(float (&c)[lines / 2], uint64_t a, uint64_t b, \
                                                         bool accumulate, Type) {                       \
    CAPT_WGMMA_##lines(type);                                                                           \
  }
CAPT_WGMMA(16, HalfBits, "f16")
CAPT_WGMMA(16, BfloatBits, "bf16")
CAPT_WGMMA(64, HalfBits, "f16")
CAPT_WGMMA(64, BfloatBits, "bf16")
CAPT_WGMMA(256, HalfBits, "f16")
CAPT_WGMMA(256, BfloatBits, "bf16")

// Registers of a thread, by all warps of a warpgroup: what one gives up another may take.
template <int kCount>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

#else
#include "emulation/hopper.h"
#endif
