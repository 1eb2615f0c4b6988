// What a kernel file needs from CUDA, or from its emulation on the CPU when g++ compiles it (csrc/emulation).
//
// Rules that keep one source valid for both: launch through CAPT_LAUNCH, no thread leaves before the last barrier,
// 16-bit types only through Storage<T>, and no warp intrinsics without a wrapper here.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CAPT_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define CAPT_LAST_ERROR() static_cast<int>(cudaGetLastError())
#define CAPT_SHARED(type, name, extent) __shared__ type name[extent]

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
