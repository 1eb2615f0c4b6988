// C interface of prompt_attention and prompt_attention_shared on a GPU.
#pragma once

#include "capt.h"

#ifdef __cplusplus
extern "C" {
#endif

// One kind of prompts in the gathered op. Everything contiguous.
struct CaptPromptStream {
  const void* table;      // [rows, prompts, dim] of dtype
  const int64_t* index;   // [batch, pairs]; a pair whose index is outside [0, rows) is absent
  float* weight;          // [batch, pairs, prompts] softmax; written by the forward, read by the backward
  void* out;              // forward: [batch, dim] of dtype
  const void* grad;       // backward: [batch, dim] of dtype, gradient of out
  const int64_t* sorted;  // backward with grad_table: the batch * pairs indices in ascending order
  const int64_t* order;   // backward with grad_table: where each of them stood, ascending among equals
  void* grad_table;       // backward: [rows, prompts, dim] of dtype, or null if not needed
  int64_t rows, prompts;
};

struct CaptPromptAttentionCuda {
  const void* query;                  // [batch, dim] of dtype, contiguous
  const float* log_prior;             // [batch, pairs] or null
  struct CaptPromptStream stream[2];  // commonality, difference
  float* workspace;                   // backward: capt_prompt_attention_cuda_workspace floats
  void* grad_query;                   // backward: [batch, dim] of dtype, or null if not needed
  float* grad_prior;                  // backward: [batch, pairs], or null if not needed
  int64_t batch, pairs, dim;
  float scale;
  int32_t dtype;
};

// Asynchronous on `stream`; the return value is a cudaError_t (0: launched).
int capt_prompt_attention_cuda(const struct CaptPromptAttentionCuda* args, void* stream);
int64_t capt_prompt_attention_cuda_workspace(const struct CaptPromptAttentionCuda* args);
int capt_prompt_attention_backward_cuda(const struct CaptPromptAttentionCuda* args, void* stream);

// One kind of queries in the shared op. Everything contiguous.
struct CaptSharedQuery {
  const void* query;      // [rows, dim], or [batch, rows, dim] if per_image
  void* out;              // [batch, rows, dim]; the backward reads it
  float* lse;             // [batch, heads, rows] log-sum-exp of the scaled scores; the backward reads it
  const void* grad;       // backward: [batch, rows, dim], gradient of out
  const float* grad_lse;  // backward: [batch, heads, rows], gradient of lse
  void* grad_query;       // backward: shape of query, or null if not needed
  int64_t rows;
  int32_t per_image;
};

struct CaptPromptAttentionSharedCuda {
  struct CaptSharedQuery query[2];  // commonality, difference
  const void* keys;                 // [batch, length, dim]; strides below, channels contiguous
  const void* values;               // [batch, length, dim]; strides below, channels contiguous
  void* grad_keys;                  // backward: [batch, length, dim] contiguous, or null if not needed
  void* grad_values;                // backward: [batch, length, dim] contiguous, or null if not needed
  float* workspace;                 // backward: capt_prompt_attention_shared_cuda_workspace floats
  int64_t batch, length, heads, head_dim;
  int64_t key_batch_stride, key_token_stride, value_batch_stride, value_token_stride;  // in elements
  float scale;
  int32_t dtype;
};

int capt_prompt_attention_shared_cuda(const struct CaptPromptAttentionSharedCuda* args, void* stream);
int64_t capt_prompt_attention_shared_cuda_workspace(const struct CaptPromptAttentionSharedCuda* args);
int capt_prompt_attention_shared_backward_cuda(const struct CaptPromptAttentionSharedCuda* args, void* stream);

#ifdef __cplusplus
}
#endif
