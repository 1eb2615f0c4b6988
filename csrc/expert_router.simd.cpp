// Router on the CPU: probs = softmax(x gate^T), the top_k largest renormalised; one token a lane.
//
// Sums run in one fixed order, whatever the threads do. Compiled once per instruction-set level; CAPT_LEVEL_NAME is the
// suffix of the exported functions.

#include "common/activation.h"
#include "expert_gating.h"

namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// out [expert][kWidth], one lane a token.
template <int kTokens, int kExperts, typename T>
void logits_tile(const CaptExpertRouter& args, const T* x, const float* gate, float* out) {
  Vector sum[kTokens][kExperts] = {};
  int64_t k = 0;
  for (; k + kWidth <= args.dim; k += kWidth) {
    Vector weight[kExperts];
    for (int e = 0; e < kExperts; ++e) weight[e] = load(gate + e * args.dim + k);
    for (int t = 0; t < kTokens; ++t) {
      const Vector value = load(x + t * args.dim + k);
      for (int e = 0; e < kExperts; ++e) sum[t][e] += value * weight[e];
    }
  }
  if (k < args.dim) {
    const int count = (int)(args.dim - k);
    for (int t = 0; t < kTokens; ++t) {
      const Vector value = load_some(x + t * args.dim + k, count);
      for (int e = 0; e < kExperts; ++e) sum[t][e] += value * load_some(gate + e * args.dim + k, count);
    }
  }
  for (int e = 0; e < kExperts; ++e) {
    for (int t = 0; t < kTokens; ++t) out[e * kWidth + t] = total(sum[t][e]);
  }
}

template <int kTokens, typename T>
void logits(const CaptExpertRouter& args, const T* x, float* out) {
  int64_t e = 0;
  for (; e + 4 <= args.n_experts; e += 4) logits_tile<kTokens, 4>(args, x, args.gate + e * args.dim, out + e * kWidth);
  const float* gate = args.gate + e * args.dim;
  switch (args.n_experts - e) {
    case 1:
      return logits_tile<kTokens, 1>(args, x, gate, out + e * kWidth);
    case 2:
      return logits_tile<kTokens, 2>(args, x, gate, out + e * kWidth);
    case 3:
      return logits_tile<kTokens, 3>(args, x, gate, out + e * kWidth);
  }
}

// Softmax and selection of kWidth tokens, one a lane. In a row of NaN nothing is larger, nothing is kept, and 0 / 0
// makes all its weights NaN.
void select_lanes(const CaptExpertRouter& args, float* probs, float* weights) {
  const int64_t n = args.n_experts;
  Vector largest = load(probs), sum = {}, kept = {};
  for (int64_t e = 1; e < n; ++e) {
    const Vector value = load(probs + e * kWidth);
    largest = where(value > largest, value, largest);
  }
  for (int64_t e = 0; e < n; ++e) {
    const Vector value = exponential(load(probs + e * kWidth) - largest);
    store(probs + e * kWidth, value);
    sum += value;
  }
  for (int64_t e = 0; e < n; ++e) {
    store(probs + e * kWidth, load(probs + e * kWidth) / sum);
    store(weights + e * kWidth, Vector{});
  }
  for (int64_t k = 0; k < args.top_k; ++k) {
    Vector best = splat(-1.0f);
    Mask index = (Mask)Vector{} - 1;
    for (int64_t e = 0; e < n; ++e) {
      const Vector value = load(probs + e * kWidth);
      const Mask better = (value > best) & (load(weights + e * kWidth) == Vector{});
      best = where(better, value, best);
      index = (((Mask)Vector{} + (int32_t)e) & better) | (index & ~better);
    }
    kept += where(best >= Vector{}, best, Vector{});
    for (int64_t e = 0; e < n; ++e) {  // 1 marks the kept ones until they are divided
      const Vector mark = where(index == (int32_t)e, splat(1.0f), load(weights + e * kWidth));
      store(weights + e * kWidth, mark);
    }
  }
  for (int64_t e = 0; e < n; ++e) {
    const Vector value = where(load(weights + e * kWidth) > Vector{}, load(probs + e * kWidth), Vector{});
    store(weights + e * kWidth, value / kept);
  }
}

// Task = CAPT_ROUTER_ROWS tokens.
template <typename T>
void router_task(const CaptExpertRouter& args, int64_t task) {
  const int64_t n = args.n_experts, first = task * CAPT_ROUTER_ROWS;
  const int64_t last = smaller(first + CAPT_ROUTER_ROWS, args.n_tokens);
  alignas(64) float probs[CAPT_ROUTER_EXPERTS * kWidth], weights[CAPT_ROUTER_EXPERTS * kWidth];
  int64_t* used = args.used + task * n;
  for (int64_t e = 0; e < n; ++e) used[e] = 0;
  for (int64_t token = first; token < last; token += kWidth) {
    const T* x = static_cast<const T*>(args.x) + token * args.dim;
    const int64_t count = smaller(kWidth, last - token);
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) logits<4>(args, x + t * args.dim, probs + t);
    for (; t < count; ++t) logits<1>(args, x + t * args.dim, probs + t);
    for (; t < kWidth; ++t) {
      for (int64_t e = 0; e < n; ++e) probs[e * kWidth + t] = 0.0f;
    }
    select_lanes(args, probs, weights);
    for (t = 0; t < count; ++t) {
      for (int64_t e = 0; e < n; ++e) {
        args.probs[(token + t) * n + e] = probs[e * kWidth + t];
        args.weights[(token + t) * n + e] = weights[e * kWidth + t];
        used[e] += weights[e * kWidth + t] > 0.0f;
      }
    }
  }
}

// Tasks: CAPT_ROUTER_ROWS tokens of the gradient of the logits, and of grad_x if it is asked for.
template <typename T>
void router_back_task(const CaptExpertRouterBack& args, int64_t task) {
  const int64_t n = args.n_experts, first = task * CAPT_ROUTER_ROWS;
  for (int64_t t = first; t < smaller(first + CAPT_ROUTER_ROWS, args.n_tokens); ++t) {
    const float *weights = args.weights + t * n, *probs = args.probs + t * n;
    const float *grad_weights = args.grad_weights + t * n, *grad_probs = args.grad_probs + t * n;
    float* out = args.grad_logits + t * n;
    float along = 0.0f, sum = 0.0f;
    for (int64_t e = 0; e < n; ++e) along += grad_weights[e] * weights[e];
    for (int64_t e = 0; e < n; ++e) {
      out[e] = weights[e] * (grad_weights[e] - along) + probs[e] * grad_probs[e];
      sum += out[e];
    }
    for (int64_t e = 0; e < n; ++e) out[e] -= probs[e] * sum;
    if (args.grad_x == nullptr) continue;
    T* row = static_cast<T*>(args.grad_x) + t * args.dim;
    for (int64_t k = 0; k < args.dim; k += kWidth) {
      Vector value = {};
      for (int64_t e = 0; e < n; ++e) value += out[e] * load_upto(args.gate + e * args.dim + k, args.dim - k);
      store_upto(row + k, value, args.dim - k);
    }
  }
}

// Task = one vector of columns of grad_gate, the tokens in order; narrower levels make narrower tasks.
template <typename T>
void router_gate_task(const CaptExpertRouterBack& args, int64_t task) {
  const T* x = static_cast<const T*>(args.x);
  for (int64_t k = task * 16; k < smaller(task * 16 + 16, args.dim); k += kWidth) {
    for (int64_t e = 0; e < args.n_experts; ++e) {
      Vector sum = {};
      for (int64_t t = 0; t < args.n_tokens; ++t) {
        sum += args.grad_logits[t * args.n_experts + e] * load_upto(x + t * args.dim + k, args.dim - k);
      }
      store_upto(args.grad_gate + e * args.dim + k, sum, args.dim - k);
    }
  }
}

template <typename T>
void router_back(const CaptExpertRouterBack& args, bool gate, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    if (gate) {
      router_gate_task<T>(args, task);
    } else {
      router_back_task<T>(args, task);
    }
  }
}

}  // namespace

#define CAPT_PASTE(name, level) name##_##level
#define CAPT_NAME(name, level) CAPT_PASTE(name, level)

extern "C" void CAPT_NAME(capt_expert_router, CAPT_LEVEL_NAME)(const CaptExpertRouter* args, int64_t begin,
                                                               int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    switch (args->dtype) {
      case CAPT_FLOAT32:
        router_task<float>(*args, task);
        break;
      case CAPT_FLOAT16:
        router_task<Half>(*args, task);
        break;
      default:
        router_task<Bfloat>(*args, task);
    }
  }
}

extern "C" void CAPT_NAME(capt_expert_router_back, CAPT_LEVEL_NAME)(const CaptExpertRouterBack* args, int gate,
                                                                    int64_t begin, int64_t end) {
  switch (args->dtype) {
    case CAPT_FLOAT32:
      return router_back<float>(*args, gate != 0, begin, end);
    case CAPT_FLOAT16:
      return router_back<Half>(*args, gate != 0, begin, end);
    default:
      return router_back<Bfloat>(*args, gate != 0, begin, end);
  }
}
