// C interface of prompt_attention: one query per image over the prompt rows of its pairs, two streams.
#pragma once

#include "capt.h"

#ifdef __cplusplus
extern "C" {
#endif

// Everything contiguous. Stream 0 is commonality, stream 1 difference; an absent pair has index -1.
struct CaptPromptAttention {
  const void* query;        // [batch, dim] of dtype
  const void* table[2];     // [pairs[i], rows[i], dim] of dtype
  const int64_t* index[2];  // [batch, k] in [-1, pairs[i])
  const float* log_prior;   // [batch, k] or null: 0
  void* out[2];             // [batch, dim] of dtype
  float* weight[2];         // [batch, k, rows[i]], softmax over the k * rows[i] rows of an image
  int64_t batch, dim, k;
  int64_t pairs[2], rows[2];
  float scale;
  int32_t dtype;
};

// Gradients; a null target is not computed.
struct CaptPromptAttentionBackward {
  struct CaptPromptAttention forward;  // its out is not read
  const void* grad[2];                 // [batch, dim] of dtype: upstream
  float* grad_score[2];                // [batch, k, rows[i]] workspace: gradient of the scores
  void* grad_query;                    // [batch, dim] of dtype
  void* grad_table[2];                 // [pairs[i], rows[i], dim] of dtype
  float* grad_prior;                   // [batch, k]
  // Who uses a pair: uses[i][first[i][p] .. first[i][p + 1]) are the ascending positions of pair p in index[i].
  int64_t* first[2];  // [pairs[i] + 1]
  int64_t* uses[2];   // [batch * k]
};

// Channels of one task of the table gradient: a multiple of every vector width, so tasks do not depend on the level.
enum { CAPT_PROMPT_CHANNELS = 256 };

// 0, or 1 + i when index[i] holds a value outside [-1, pairs[i]): the kernels must not be run then.
int capt_prompt_attention_check(const struct CaptPromptAttention* args);

// CPU. A call does the tasks [begin, end); disjoint ranges may run on different threads. Forward and the first part of
// backward: one task an image. Second part (tables): capt_prompt_attention_tables_tasks() tasks, after
// capt_prompt_attention_invert() filled first and uses and the first part is done.
int capt_prompt_attention_cpu(const struct CaptPromptAttention* args, int level, int64_t begin, int64_t end);
int capt_prompt_attention_backward_cpu(const struct CaptPromptAttentionBackward* args, int level, int64_t begin,
                                       int64_t end);
void capt_prompt_attention_invert(const struct CaptPromptAttentionBackward* args);
int64_t capt_prompt_attention_tables_tasks(const struct CaptPromptAttentionBackward* args);
int capt_prompt_attention_tables_cpu(const struct CaptPromptAttentionBackward* args, int level, int64_t begin,
                                     int64_t end);

#ifdef __cplusplus
}
#endif
