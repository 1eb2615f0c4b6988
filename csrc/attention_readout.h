// C interface of attention_readout.
#pragma once

#include "capt.h"

#ifdef __cplusplus
extern "C" {
#endif

// Of image b, head h, variant m and group g, over the keys j of the group:
//   s_j      = scale <query, key_j> + bias[m, h, j]
//   log_mass = log sum_j exp s_j                        -inf if every s_j is, or there is no key
//   mean     = sum_j exp(s_j - log_mass) value_j        0 then
struct CaptAttentionReadout {
  const void* query;      // [batch, heads, dim] of dtype, channels contiguous
  const void* keys;       // [batch, length, heads, dim] of dtype, channels contiguous
  const void* values;     // the same
  const int64_t* groups;  // [length] or [batch, length], keys contiguous, in [0, n_groups)
  const float* bias;      // [variants, bias_heads, length], or null with one variant
  float* mean;            // [variants, batch, heads, n_groups, dim]
  float* log_mass;        // [variants, batch, heads, n_groups]
  int64_t batch, length, heads, dim, n_groups;
  int64_t variants, bias_heads;                                 // bias_heads: heads or 1
  int64_t query_batch_stride, query_head_stride;                // batch stride 0: a learned query
  int64_t key_batch_stride, key_token_stride, key_head_stride;  // in elements
  int64_t value_batch_stride, value_token_stride, value_head_stride;
  int64_t group_batch_stride;  // 0: all images have the same groups
  float scale;
  int32_t dtype;  // CaptDtype
};

// Keys with the same bias in every variant are one column: their values are summed before the variants see them. Where
// images share the groups, a column also belongs to one group. A section is a group then, otherwise all keys.
struct CaptReadoutColumns {
  int32_t* column_of;  // [bias_heads, length], by key
  int32_t* key_of;     // [bias_heads, length], a key of each column
  int32_t* count;      // [bias_heads]
  float* top;      // [bias_heads, sections, variants], the largest bias of a section; -inf: each of its keys has that
  float* factors;  // [bias_heads, length, pitch], exp(bias - top) by column
  int64_t sections;
  int64_t pitch;  // variants, rounded up to whole vectors
};

// Columns of all keys in `memory`, which must outlive them. 0: done, 1: this CPU does not run `level`, 2: a group lies
// outside [0, n_groups).
int64_t capt_attention_readout_columns_bytes(const struct CaptAttentionReadout* args);
int capt_attention_readout_columns(const struct CaptAttentionReadout* args, int level, void* memory,
                                   struct CaptReadoutColumns* columns);
// Images and heads [begin, end) of batch * heads; one workspace for each call at work. 0: done, 1: no such level.
int64_t capt_attention_readout_workspace(const struct CaptAttentionReadout* args);
int capt_attention_readout_cpu(const struct CaptAttentionReadout* args, const struct CaptReadoutColumns* columns,
                               void* workspace, int level, int64_t begin, int64_t end);

#ifdef __cplusplus
}
#endif
