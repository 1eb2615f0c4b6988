// C interface of prompt_attention_shared: stacked class prompts of two streams attend to the tokens of each image.
#pragma once

#include "capt.h"

#ifdef __cplusplus
extern "C" {
#endif

// Channels of every tensor are contiguous, strides in elements; heads lie side by side in dim. Results are contiguous.
struct CaptSharedAttention {
  const void* query[2];  // [batch, rows[i], dim] of dtype; batch_stride 0: the same for every image
  const void* keys;      // [batch, n_keys, dim] of dtype
  const void* values;    // [batch, n_keys, dim] of dtype
  void* out[2];          // [batch, rows[i], dim] of dtype
  float* lse[2];         // [batch, n_heads, rows[i]]: natural log of the sum of exponentials of the scaled scores
  int64_t batch, rows[2], n_keys, dim, n_heads;
  int64_t query_batch_stride[2], query_row_stride[2];
  int64_t key_batch_stride, key_row_stride, value_batch_stride, value_row_stride;
  float scale;
  int32_t dtype;
};

// Gradients; a null target is not computed.
struct CaptSharedAttentionBackward {
  struct CaptSharedAttention forward;
  const void* grad[2];       // [batch, rows[i], dim] of dtype: upstream of out
  const float* grad_lse[2];  // [batch, n_heads, rows[i]]
  void* grad_query[2];       // [batch, rows[i], dim] of dtype, or [rows[i], dim] when the query is shared by images
  void* grad_keys;           // [batch, n_keys, dim] of dtype
  void* grad_values;         // [batch, n_keys, dim] of dtype
  int32_t sums_images[2];    // the query is [rows[i], dim] and its gradient the sum over the images
  float* partial[2];         // [groups, rows[i], dim] workspace of such a gradient if it is wanted; groups below
};

// CPU. A call does the tasks [begin, end); disjoint ranges may run on different threads. Returns 1 for a level this CPU
// lacks, 2 when its workspace (a few copies of the keys of one head, per call) cannot be allocated.
// Forward task: one head of one image and a block of rows. Backward task: one head of a group of images, and a block of
// rows unless keys or values want a gradient. The reduction of `partial` over groups follows, one task a block of rows.
int64_t capt_prompt_attention_shared_tasks(const struct CaptSharedAttention* args);
int capt_prompt_attention_shared_cpu(const struct CaptSharedAttention* args, int level, int64_t begin, int64_t end);
int64_t capt_prompt_attention_shared_groups(const struct CaptSharedAttentionBackward* args);
int64_t capt_prompt_attention_shared_backward_tasks(const struct CaptSharedAttentionBackward* args);
int capt_prompt_attention_shared_backward_cpu(const struct CaptSharedAttentionBackward* args, int level, int64_t begin,
                                              int64_t end);
int64_t capt_prompt_attention_shared_reduce_tasks(const struct CaptSharedAttentionBackward* args);
int capt_prompt_attention_shared_reduce_cpu(const struct CaptSharedAttentionBackward* args, int level, int64_t begin,
                                            int64_t end);

#ifdef __cplusplus
}
#endif
