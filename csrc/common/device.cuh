// What a kernel file needs from CUDA, or from its emulation on the CPU when g++ compiles it (csrc/emulation).
//
// Rules that keep one source valid for both: launch through CAPT_LAUNCH, no thread leaves before the last barrier,
// 16-bit types only through widen and narrow, PTX only in functions that have a second body for the CPU
// (common/tensor_core.cuh), and only intrinsics that csrc/emulation/cuda.h has.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CAPT_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define CAPT_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define CAPT_LAST_ERROR() static_cast<int>(cudaGetLastError())
// Before a launch with more than 48 KB of dynamic shared memory; a cudaError_t.
#define CAPT_ALLOW_SHARED(kernel, bytes) \
  static_cast<int>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)))
#define CAPT_SHARED(type, name, extent) __shared__ type name[extent]
#define CAPT_DYNAMIC_SHARED(type, name)                           \
  extern __shared__ __align__(1024) unsigned char capt_dynamic[]; \
  type* const name = reinterpret_cast<type*>(capt_dynamic)

using HalfBits = __half;
using BfloatBits = __nv_bfloat16;
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(HalfBits value) { return __half2float(value); }
__device__ __forceinline__ float widen(BfloatBits value) { return __bfloat162float(value); }
__device__ __forceinline__ void narrow(float value, float& into) { into = value; }
__device__ __forceinline__ void narrow(float value, HalfBits& into) { into = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, BfloatBits& into) { into = __float2bfloat16_rn(value); }

#else
#include "emulation/cuda.h"
#endif

// kCount neighbouring elements, moved by one instruction of kCount * sizeof(T) bytes (at most 16).
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};
