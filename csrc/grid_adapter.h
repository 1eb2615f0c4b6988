// C interface of grid_adapter.
#pragma once

#include "capt.h"

#ifdef __cplusplus
extern "C" {
#endif

// out = tokens + scale * alpha[b] * conv3x3(tokens) on the height x width grid that starts at token n_prefix; all other
// tokens are copied. `transpose` mirrors the kernel, which turns the forward into the gradient of its input.
struct CaptGridAdapter {
  const void* tokens;   // [batch, length, dim] of dtype; strides below, channels contiguous
  const float* weight;  // [dim, 3, 3]
  const float* alpha;   // [batch] (alpha_stride 1), [1] (alpha_stride 0) or null: 1
  void* out;            // [batch, length, dim] of dtype, contiguous
  int64_t batch, length, dim, height, width, n_prefix;
  int64_t batch_stride, token_stride;  // of tokens, in elements
  int64_t alpha_stride;
  float scale;
  int32_t transpose;
  int32_t dtype;
};

// partial[b, tap, c] = sum over grid positions p of grad[b, p, c] * tokens[b, p + tap, c]: the weight gradient of one
// image, before the factor alpha. Summed over images by the caller in a fixed order: no atomics.
struct CaptGridCorrelate {
  const void* tokens;  // [batch, length, dim] of dtype
  const void* grad;    // [batch, length, dim] of dtype
  float* partial;      // [batch, 9, dim], contiguous
  int64_t batch, length, dim, height, width, n_prefix;
  int64_t batch_stride, token_stride;            // of tokens, in elements
  int64_t grad_batch_stride, grad_token_stride;  // of grad, in elements
  int32_t dtype;
};

// Channels of one partial-sum task: a multiple of every vector width, so tasks do not depend on the level.
enum { CAPT_TASK_CHANNELS = 64 };

// CPU. A call does the tasks [begin, end) out of capt_*_tasks(); disjoint ranges may run on different threads.
// packed is [9, dim] scratch filled by capt_grid_adapter_pack.
int64_t capt_grid_adapter_tasks(const struct CaptGridAdapter* args);
void capt_grid_adapter_pack(const struct CaptGridAdapter* args, float* packed);
int capt_grid_adapter_cpu(const struct CaptGridAdapter* args, const float* packed, int level, int64_t begin,
                          int64_t end);
int64_t capt_grid_correlate_tasks(const struct CaptGridCorrelate* args);
int capt_grid_correlate_cpu(const struct CaptGridCorrelate* args, int level, int64_t begin, int64_t end);

// CUDA. Asynchronous on `stream`; the return value is a cudaError_t (0: launched).
int capt_grid_adapter_cuda(const struct CaptGridAdapter* args, void* stream);
int capt_grid_correlate_cuda(const struct CaptGridCorrelate* args, void* stream);

#ifdef __cplusplus
}
#endif
