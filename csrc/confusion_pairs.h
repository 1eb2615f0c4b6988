// C interface of confusion_pairs.
#pragma once

#include "capt.h"

#ifdef __cplusplus
extern "C" {
#endif

// Pseudo label p of each row of logits and the k classes with the highest confusion score
// S_i = (1 + n_i / sum n) * softmax(logits)_i, i != p; n is row p of the statistics.
struct CaptConfusionPairs {
  const void* logits;      // [batch, n_classes] of dtype, classes contiguous
  const int64_t* offsets;  // [n_classes + 1], or null: no statistics
  const int64_t* classes;  // [n_counts]; offsets and classes that point outside are refused (status 2)
  const float* counts;     // [n_counts], >= 0
  int64_t* pseudo;         // [batch]
  int64_t* index;          // [batch, k]
  float* score;            // [batch, k]
  int64_t batch, n_classes, n_counts;
  int64_t k;           // 0 <= k < n_classes
  int64_t row_stride;  // elements
  int32_t dtype;       // CaptDtype
};

// Bytes of scratch memory that one caller of capt_confusion_pairs_cpu needs; 8-byte aligned.
int64_t capt_confusion_pairs_workspace(const struct CaptConfusionPairs* args);
// Rows [begin, end). 0: done, 1: this CPU does not run `level`, 2: statistics point outside.
int capt_confusion_pairs_cpu(const struct CaptConfusionPairs* args, void* workspace, int level, int64_t begin,
                             int64_t end);

#ifdef __cplusplus
}
#endif
