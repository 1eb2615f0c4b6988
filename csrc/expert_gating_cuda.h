// C interface of the CUDA kernels of expert_gating. Every tensor is contiguous. Functions that launch are asynchronous
// on `stream` and return a cudaError_t (0: launched); they neither allocate nor wait, so a CUDA graph may capture them.
#pragma once

#include "capt.h"

#ifdef __cplusplus
extern "C" {
#endif

// probs = softmax(x gate^T); weights = the top_k largest of a row (ties to the lower expert), renormalised to sum 1;
// load = share of the tokens whose weight is positive.
struct CaptExpertRouterCuda {
  const void* x;     // [tokens, dim] of dtype
  const void* gate;  // [experts, dim] of dtype
  float* weights;    // [tokens, experts]
  float* probs;      // [tokens, experts]
  float* load;       // [experts]
  int32_t* counter;  // [experts + 1], scratch
  int64_t tokens, dim, experts, top_k;
  int32_t dtype;
};
int capt_expert_router_cuda(const struct CaptExpertRouterCuda* args, void* stream);

struct CaptExpertRouterBackwardCuda {
  const float* grad_weights;  // [tokens, experts]
  const float* grad_probs;    // [tokens, experts]
  const float* weights;       // [tokens, experts]
  const float* probs;         // [tokens, experts]
  const void* x;              // [tokens, dim] of dtype
  const void* gate;           // [experts, dim] of dtype
  float* grad_logits;         // [tokens, experts], scratch
  void* grad_x;               // [tokens, dim] of dtype, or null: not needed
  void* grad_gate;            // [experts, dim] of dtype, or null: not needed
  float* partial;             // scratch of capt_column_sums_cuda_workspace(tokens, experts, dim) bytes
  int64_t tokens, dim, experts;
  int32_t dtype;
};
int capt_expert_router_backward_cuda(const struct CaptExpertRouterBackwardCuda* args, void* stream);

// y[n] = sum_e weights[n, e] (w_out[e] dropout(QuickGELU(w_in[e] x[n] + b_in[e])) + b_out[e]); an expert whose weight
// is 0 is not evaluated.
enum CaptExpertPath { CAPT_EXPERT_DENSE = 1, CAPT_EXPERT_GATHER = 2 };
enum CaptExpertTile { CAPT_EXPERT_SMALL = 1, CAPT_EXPERT_LARGE = 2 };
struct CaptExpertMixCuda {
  const void* x;         // [tokens, dim] of dtype, as all weights and biases
  const float* weights;  // [tokens, experts]
  const void* w_in;      // [experts, hidden, dim]
  const void* b_in;      // [experts, hidden]
  const void* w_out;     // [experts, dim, hidden]
  const void* b_out;     // [experts, dim]
  void* y;               // [tokens, dim] of dtype
  void* workspace;       // capt_expert_mix_cuda_workspace(args) bytes, aligned to 256
  int64_t tokens, dim, hidden, experts;
  int64_t seed;
  double dropout;  // in [0, 1)
  int64_t chunk;   // tokens handled at a time; 0: as many as fit the workspace limit
  int32_t path;    // CaptExpertPath; 0: chosen by the sizes
  int32_t tile;    // CaptExpertTile; 0: chosen by the sizes
  int32_t dtype;
};
// At most 256 MiB, or what 64 tokens need if that is more.
int64_t capt_expert_mix_cuda_workspace(const struct CaptExpertMixCuda* args);
int capt_expert_mix_cuda(const struct CaptExpertMixCuda* args, void* stream);

// The element-wise middle of the backward pass, between the products z = x w_in^T and g = grad_y w_out:
//   z[n, e] <- gradient of the pre-activation, g[e, n] <- weights[n, e] * hidden activation (both in place),
//   grad_weights[n, e] = <grad_y[n], output of expert e>, 0 where the weight is 0.
struct CaptExpertHiddenBackwardCuda {
  void* z;               // [tokens, experts, hidden] of dtype, without bias
  void* g;               // [experts, tokens, hidden] of dtype
  const float* weights;  // [tokens, experts]
  const void* b_in;      // [experts, hidden] of dtype
  const void* b_out;     // [experts, dim] of dtype
  const void* grad_y;    // [tokens, dim] of dtype
  float* grad_weights;   // [tokens, experts]
  int64_t tokens, dim, hidden, experts;
  int64_t seed;
  double dropout;
  int32_t dtype;
};
int capt_expert_hidden_backward_cuda(const struct CaptExpertHiddenBackwardCuda* args, void* stream);

// out[r, c] = sum_n factor[n, r] * value[n, c] in an order that depends on the sizes alone; factor null: 1, rows = 1.
struct CaptColumnSumsCuda {
  const float* factor;  // [tokens, rows] or null
  const void* value;    // [tokens, columns] of dtype
  void* out;            // [rows, columns] of out_dtype
  float* partial;       // scratch of capt_column_sums_cuda_workspace(tokens, rows, columns) bytes
  int64_t tokens, rows, columns;
  int32_t dtype, out_dtype;
};
int64_t capt_column_sums_cuda_workspace(int64_t tokens, int64_t rows, int64_t columns);
int capt_column_sums_cuda(const struct CaptColumnSumsCuda* args, void* stream);

#ifdef __cplusplus
}
#endif
