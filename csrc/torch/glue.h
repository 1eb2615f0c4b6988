// What every registration file needs from torch's stable ABI.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "capt.h"

namespace capt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int32_t dtype_code(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return CAPT_FLOAT32;
    case ScalarType::Half:
      return CAPT_FLOAT16;
    case ScalarType::BFloat16:
      return CAPT_BFLOAT16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
  return -1;
}

// The kernels walk channels as a contiguous run; anything else is copied once.
inline Tensor channels_contiguous(const Tensor& tensor) {
  return tensor.dim() == 3 && tensor.size(2) > 1 && tensor.stride(2) != 1 ? torch::stable::contiguous(tensor) : tensor;
}

#ifdef CAPT_WITH_CUDA
// torch's current stream on `device`, looked up at run time so that the library loads without CUDA too.
void* current_stream(int32_t device);
void check_cuda(int error, const char* op);
#endif

}  // namespace capt
