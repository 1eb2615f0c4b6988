// C interface of asymmetric_loss.
#pragma once

#include "capt.h"

#ifdef __cplusplus
extern "C" {
#endif

// With p = sigmoid(logit), q = 1 - p, m the margin:
//   positive  loss = -q^gamma_pos log max(p, eps)                          slope = -q^gamma_pos q      0 where p < eps
//   negative  loss = -max(p - m, 0)^gamma_neg log max(min(q + m, 1), eps)
//             slope = (p - m)^gamma_neg p q / (q + m)                      0 where p < m or q + m < eps
struct CaptAsymmetricLoss {
  const void* logits;   // [size] of dtype
  const void* targets;  // [size] uint8, or float with float_targets; anything but 0 is positive
  float* slope;         // [size], d loss / d logit times scale
  float* loss;          // [size], or null
  double* partial;      // [blocks], the sum of the losses of each block
  int64_t size;
  double gamma_pos, gamma_neg, margin, eps, scale;
  int32_t dtype;  // CaptDtype
  int32_t float_targets;
};

// The cut-offs as logits, float, so that a float is compared as its exact value would be; +-infinity: none.
struct CaptAsymmetricBounds {
  float positive_low;                 // slope 0 below
  float negative_low, negative_high;  // loss and slope 0 below, slope 0 above
  float log_eps;                      // no logarithm is smaller
};

// Entries a block: the sum of a block does not depend on who forms it.
int64_t capt_asymmetric_loss_block(void);
// Blocks [begin, end). 0: done, 1: this CPU does not run `level`.
int capt_asymmetric_loss_cpu(const struct CaptAsymmetricLoss* args, int level, int64_t begin, int64_t end);

#ifdef __cplusplus
}
#endif
