// C interface of expert_gating on the CPU: router, and the experts with their weighted sum.
#pragma once

#include "capt.h"

#ifdef __cplusplus
extern "C" {
#endif

// probs = softmax(x gate^T); weights = the top_k largest of a row, renormalised, ties to the lower expert.
struct CaptExpertRouter {
  const void* x;      // [n_tokens, dim] of dtype, contiguous
  const float* gate;  // [n_experts, dim]
  float* weights;     // [n_tokens, n_experts]
  float* probs;       // [n_tokens, n_experts]
  int64_t* used;      // [tasks, n_experts]: rows of the task with a positive weight
  int64_t n_tokens, dim, n_experts, top_k;
  int32_t dtype;
};

// Gradients of the router: of its logits always, of x and gate if asked for.
struct CaptExpertRouterBack {
  const float* grad_weights;  // [n_tokens, n_experts]
  const float* grad_probs;    // [n_tokens, n_experts]
  const float* weights;       // [n_tokens, n_experts]
  const float* probs;         // [n_tokens, n_experts]
  const void* x;              // [n_tokens, dim] of dtype, contiguous
  const float* gate;          // [n_experts, dim]
  float* grad_logits;         // [n_tokens, n_experts]
  void* grad_x;               // [n_tokens, dim] of dtype or null
  float* grad_gate;           // [n_experts, dim] or null
  int64_t n_tokens, dim, n_experts;
  int32_t dtype;
};

// y = sum_e weights_e (w_out_e dropout(QuickGELU(w_in_e x + b_in_e)) + b_out_e). All tensors contiguous. The gradient
// pointers are null where not needed, and all of them, with grad_y, in the forward.
struct CaptExpertMix {
  const void* x;         // [n_tokens, dim] of dtype
  const float* weights;  // [n_tokens, n_experts]
  const void* w_in;      // [n_experts, hidden, dim] of dtype
  const void* b_in;      // [n_experts, hidden] of dtype
  const void* w_out;     // [n_experts, dim, hidden] of dtype
  const void* b_out;     // [n_experts, dim] of dtype
  void* y;               // [n_tokens, dim] of dtype
  const void* grad_y;    // [n_tokens, dim] of dtype
  void* grad_x;          // [n_tokens, dim] of dtype
  float* grad_weights;   // [n_tokens, n_experts]
  float* grad_w_in;      // float32 whatever dtype is: summed over chunks of tokens
  float* grad_b_in;
  float* grad_w_out;
  float* grad_b_out;
  int64_t n_tokens, dim, hidden, n_experts;
  uint32_t seed_low, seed_high;  // of the dropout, after mixing: s and t of docs/kernels/expert_gating.md
  uint32_t threshold;            // a unit whose word is below is dropped; 0: none
  float keep_scale;              // 1 / (1 - dropout)
  int32_t dtype;
};

// Tokens that share one pass over the weights; lanes of an expert are padded to a multiple of CAPT_EXPERT_LANES.
enum { CAPT_EXPERT_CHUNK = 256, CAPT_EXPERT_LANES = 16, CAPT_EXPERT_ROWS = 32, CAPT_ROUTER_ROWS = 64 };
// The router keeps the values of a few tokens on the stack.
enum { CAPT_ROUTER_EXPERTS = 512 };

// The routing of one chunk of tokens, and its scratch. A lane is a (token, expert) pair with a weight other than 0.
struct CaptExpertChunk {
  int64_t first, count;  // tokens of the chunk
  int64_t* start;        // [n_experts + 1] first lane of an expert
  int64_t* used;         // [n_experts] lanes that hold a token; the others are padding
  int32_t* token;        // [lanes] row of x, of padding 0
  float* weight;         // [lanes] of padding 0
  void* workspace;       // capt_expert_mix_workspace bytes, 64-byte aligned
};

enum CaptExpertPhase {
  CAPT_EXPERT_PACK,          // tasks: lanes / 16
  CAPT_EXPERT_UP,            // tasks: n_experts * hidden blocks
  CAPT_EXPERT_DOWN,          // tasks: dim blocks
  CAPT_EXPERT_BACK_UP,       // the following are the backward's: tasks as UP
  CAPT_EXPERT_BACK_X,        // tasks: dim blocks
  CAPT_EXPERT_BACK_IN,       // gradient of w_in and b_in; tasks: n_experts * hidden blocks
  CAPT_EXPERT_BACK_OUT,      // gradient of w_out and b_out; tasks: n_experts * dim blocks
  CAPT_EXPERT_BACK_WEIGHTS,  // gradient of weights; tasks: lanes / 16
};

// A call does the tasks [begin, end); disjoint ranges may run on different threads.
int64_t capt_expert_router_tasks(const struct CaptExpertRouter* args);
int capt_expert_router_cpu(const struct CaptExpertRouter* args, int level, int64_t begin, int64_t end);

// First the tokens (gate 0), then, if grad_gate is asked for, the gate (gate 1).
int64_t capt_expert_router_back_tasks(const struct CaptExpertRouterBack* args, int gate);
int capt_expert_router_back_cpu(const struct CaptExpertRouterBack* args, int gate, int level, int64_t begin,
                                int64_t end);

// Fills start, used, token and weight of a chunk (room for capt_expert_mix_lanes entries) from first and count.
void capt_expert_mix_route(const struct CaptExpertMix* args, struct CaptExpertChunk* chunk);
int64_t capt_expert_mix_lanes(const struct CaptExpertMix* args);
int64_t capt_expert_mix_workspace(const struct CaptExpertMix* args, int64_t lanes);
int64_t capt_expert_mix_tasks(const struct CaptExpertMix* args, const struct CaptExpertChunk* chunk, int phase);
int capt_expert_mix_cpu(const struct CaptExpertMix* args, const struct CaptExpertChunk* chunk, int phase, int level,
                        int64_t begin, int64_t end);

#ifdef __cplusplus
}
#endif
