// C interface of pair_frontier.
#pragma once

#include "capt.h"

#ifdef __cplusplus
extern "C" {
#endif

// Best score and its pair, for every image and group of pairs, earlier chunks included. Equal scores: the lower pair;
// NaN and -infinity never win; -0.0 is returned as 0.0. With the term, a score is scores + state * object, both
// roundings to float.
struct CaptPairFrontier {
  const void* scores;            // [batch, n_pairs] of dtype, pairs contiguous; of pairs start .. start + n_pairs - 1
  const int64_t* group;          // [n_pairs], -1: no candidate
  const int64_t* pairs;          // [n_pairs, 2] (state, object); read with term
  const float* state;            // [batch, n_states]
  const float* object;           // [batch, n_objects]
  const void* previous_score;    // [batch, n_groups] like score, or null
  const int64_t* previous_pair;  // [batch, n_groups], -1: none
  void* score;                   // [batch, n_groups] of dtype; float with term; -infinity: none
  int64_t* pair;                 // [batch, n_groups], -1: none
  int64_t batch, n_pairs, n_groups, n_states, n_objects;
  int64_t start;
  int64_t row_stride;  // elements
  int32_t dtype;       // CaptDtype
  int32_t term;        // 1: with pairs, state and object, which may be empty
};

// Pairs, or codes of groups, padded to four vectors of the widest level.
static inline int64_t capt_pair_frontier_padded(int64_t count) { return (count + 63) / 64 * 64; }

// Bytes of what capt_pair_frontier_columns writes: group, state and object of every pair as the rows read them.
int64_t capt_pair_frontier_columns_bytes(const struct CaptPairFrontier* args);
// 0: done, 2: group or pairs point outside.
int capt_pair_frontier_columns(const struct CaptPairFrontier* args, void* columns);
// Bytes of scratch memory that one caller of capt_pair_frontier_cpu needs; 8-byte aligned.
int64_t capt_pair_frontier_workspace(const struct CaptPairFrontier* args);
// Rows [begin, end). 0: done, 1: this CPU does not run `level`.
int capt_pair_frontier_cpu(const struct CaptPairFrontier* args, const void* columns, void* workspace, int level,
                           int64_t begin, int64_t end);

#ifdef __cplusplus
}
#endif
