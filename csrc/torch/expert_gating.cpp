// Schemas of capt::expert_router and capt::expert_mix with their backwards, and the CPU registration. No arithmetic.

#include "expert_gating.h"

#include <tuple>
#include <vector>

#include "glue.h"

namespace capt {
namespace {

const char* const kRouter = "capt::expert_router";
constexpr int64_t kChunk = CAPT_EXPERT_CHUNK;
const char* const kMix = "capt::expert_mix";

Tensor in_order(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

Tensor as(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

Tensor floats(const Tensor& tensor) { return in_order(as(tensor, ScalarType::Float)); }

const float* floats_of(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }

// A gradient that was not asked for is an empty tensor.
Tensor room(const Tensor& like, bool needed, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, needed ? sizes : std::vector<int64_t>{0}, dtype);
}

template <typename T>
T* pointer(const Tensor& tensor, bool needed) {
  return needed ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> router_cpu(const Tensor& given, const Tensor& given_gate, int64_t top_k) {
  STD_TORCH_CHECK(given.dim() == 2 && given_gate.dim() == 2 && given.size(1) == given_gate.size(1), kRouter,
                  ": x must be [N, D] and gate [E, D]");
  const Tensor x = in_order(given), gate = floats(given_gate);
  const int64_t n_tokens = x.size(0), n_experts = gate.size(0);
  STD_TORCH_CHECK(top_k >= 1 && top_k <= n_experts, kRouter, ": top_k must lie in 1..E");
  STD_TORCH_CHECK(n_experts <= CAPT_ROUTER_EXPERTS, kRouter, ": at most ", static_cast<int>(CAPT_ROUTER_EXPERTS),
                  " experts on the CPU");
  Tensor weights = room(x, true, {n_tokens, n_experts}, ScalarType::Float);
  Tensor probs = room(x, true, {n_tokens, n_experts}, ScalarType::Float);
  Tensor load = room(x, true, {n_experts}, ScalarType::Float);
  CaptExpertRouter args = {x.data_ptr(),
                           floats_of(gate),
                           pointer<float>(weights, true),
                           pointer<float>(probs, true),
                           nullptr,
                           n_tokens,
                           x.size(1),
                           n_experts,
                           top_k,
                           dtype_code(x, "capt::expert_router: x")};
  const int64_t tasks = capt_expert_router_tasks(&args);
  std::vector<int64_t> used(static_cast<size_t>(tasks * n_experts));
  args.used = used.data();
  const auto work = [&](int64_t begin, int64_t end) { capt_expert_router_cpu(&args, capt_cpu_level(), begin, end); };
  // Waking a thread costs more than a few rows.
  torch::stable::parallel_for(0, tasks, n_tokens * args.dim * n_experts < 1 << 19 ? tasks : 1, work);
  for (int64_t e = 0; e < n_experts; ++e) {
    int64_t count = 0;
    for (int64_t task = 0; task < tasks; ++task) count += used[static_cast<size_t>(task * n_experts + e)];
    pointer<float>(load, true)[e] = n_tokens > 0 ? static_cast<float>(count) / static_cast<float>(n_tokens) : 0.0f;
  }
  return {weights, probs, load};
}

std::tuple<Tensor, Tensor> router_backward_cpu(const Tensor& grad_weights, const Tensor& grad_probs,
                                               const Tensor& weights, const Tensor& probs, const Tensor& given,
                                               const Tensor& given_gate, bool need_x, bool need_gate) {
  const Tensor x = in_order(given), gate = floats(given_gate);
  STD_TORCH_CHECK(x.dim() == 2 && gate.dim() == 2 && gate.size(1) == x.size(1),
                  "capt::expert_router_backward: x must be [N, D] and gate [E, D]");
  const Tensor inputs[4] = {floats(grad_weights), floats(grad_probs), floats(weights), floats(probs)};
  const int64_t n_tokens = x.size(0), dim = x.size(1), n_experts = gate.size(0);
  for (const Tensor& input : inputs) {
    STD_TORCH_CHECK(input.numel() == n_tokens * n_experts, "capt::expert_router_backward: gradients must be [N, E]");
  }
  Tensor grad_logits = room(x, true, {n_tokens, n_experts}, ScalarType::Float);
  Tensor grad_x = room(x, need_x, {n_tokens, dim}, x.scalar_type());
  Tensor grad_gate = room(x, need_gate, {n_experts, dim}, ScalarType::Float);
  const CaptExpertRouterBack args = {floats_of(inputs[0]),
                                     floats_of(inputs[1]),
                                     floats_of(inputs[2]),
                                     floats_of(inputs[3]),
                                     x.data_ptr(),
                                     floats_of(gate),
                                     pointer<float>(grad_logits, true),
                                     pointer<void>(grad_x, need_x),
                                     pointer<float>(grad_gate, need_gate),
                                     n_tokens,
                                     dim,
                                     n_experts,
                                     dtype_code(x, "capt::expert_router_backward: x")};
  for (int step = 0; step <= (need_gate ? 1 : 0); ++step) {
    torch::stable::parallel_for(0, capt_expert_router_back_tasks(&args, step), 1, [&](int64_t begin, int64_t end) {
      capt_expert_router_back_cpu(&args, step, capt_cpu_level(), begin, end);
    });
  }
  return {grad_x, as(grad_gate, given_gate.scalar_type())};
}

uint32_t mix32(uint32_t v) {
  v = (v ^ (v >> 16)) * 0x7feb352du;
  v = (v ^ (v >> 15)) * 0x846ca68bu;
  return v ^ (v >> 16);
}

// The contiguous inputs of one call, and what the kernels read of them.
struct Mix {
  Tensor x, weights, w_in, b_in, w_out, b_out;
  CaptExpertMix args = {};

  Mix(const Tensor& given, const Tensor& given_weights, const Tensor& given_w_in, const Tensor& given_b_in,
      const Tensor& given_w_out, const Tensor& given_b_out, double dropout, int64_t seed)
      : x(in_order(given)),
        weights(floats(given_weights)),
        w_in(in_order(given_w_in)),
        b_in(in_order(given_b_in)),
        w_out(in_order(given_w_out)),
        b_out(in_order(given_b_out)) {
    STD_TORCH_CHECK(x.dim() == 2 && w_in.dim() == 3, kMix, ": x must be [N, D] and w_in [E, H, D]");
    const int64_t n_experts = w_in.size(0), hidden = w_in.size(1), dim = x.size(1);
    STD_TORCH_CHECK(w_in.size(2) == dim && weights.numel() == x.size(0) * n_experts &&
                        b_in.numel() == n_experts * hidden && w_out.numel() == n_experts * dim * hidden &&
                        b_out.numel() == n_experts * dim,
                    kMix, ": weights must be [N, E], b_in [E, H], w_out [E, D, H], b_out [E, D]");
    for (const Tensor& tensor : {w_in, b_in, w_out, b_out}) {
      STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), kMix, ": x and the experts must have one dtype");
    }
    STD_TORCH_CHECK(dropout >= 0.0 && dropout < 1.0, kMix, ": dropout must lie in [0, 1)");
    args.x = x.data_ptr();
    args.weights = floats_of(weights);
    args.w_in = w_in.data_ptr();
    args.b_in = b_in.data_ptr();
    args.w_out = w_out.data_ptr();
    args.b_out = b_out.data_ptr();
    args.n_tokens = x.size(0);
    args.dim = dim;
    args.hidden = hidden;
    args.n_experts = n_experts;
    args.seed_low = mix32(static_cast<uint32_t>(seed));
    args.seed_high = mix32(args.seed_low ^ static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
    args.threshold = static_cast<uint32_t>(dropout * 4294967296.0);
    args.keep_scale = static_cast<float>(1.0 / (1.0 - dropout));
    args.dtype = dtype_code(x, "capt::expert_mix: x");
  }

  // Every chunk of tokens through the phases.
  void run(const std::vector<int>& phases) const {
    const int64_t lanes = capt_expert_mix_lanes(&args);
    if (lanes == 0) return;
    std::vector<int64_t> counts(static_cast<size_t>(2 * args.n_experts + 1));
    std::vector<int32_t> token(static_cast<size_t>(lanes));
    std::vector<float> weight(static_cast<size_t>(lanes));
    CaptExpertChunk chunk = {};
    chunk.start = counts.data();
    chunk.used = counts.data() + args.n_experts + 1;
    chunk.token = token.data();
    chunk.weight = weight.data();
    Tensor workspace;
    int64_t room_for = -1;
    for (chunk.first = 0; chunk.first < args.n_tokens; chunk.first += kChunk) {
      const int64_t left = args.n_tokens - chunk.first;
      chunk.count = left < kChunk ? left : kChunk;
      capt_expert_mix_route(&args, &chunk);
      if (chunk.start[args.n_experts] > room_for) {
        room_for = chunk.start[args.n_experts];
        workspace = torch::stable::new_empty(x, {capt_expert_mix_workspace(&args, room_for)}, ScalarType::Byte);
      }
      chunk.workspace = workspace.data_ptr();
      for (const int phase : phases) {
        torch::stable::parallel_for(0, capt_expert_mix_tasks(&args, &chunk, phase), 1, [&](int64_t begin, int64_t end) {
          capt_expert_mix_cpu(&args, &chunk, phase, capt_cpu_level(), begin, end);
        });
      }
    }
  }
};

Tensor mix_cpu(const Tensor& x, const Tensor& weights, const Tensor& w_in, const Tensor& b_in, const Tensor& w_out,
               const Tensor& b_out, double dropout, int64_t seed) {
  Mix mix(x, weights, w_in, b_in, w_out, b_out, dropout, seed);
  Tensor y = room(x, true, {x.size(0), x.size(1)}, x.scalar_type());
  mix.args.y = y.data_ptr();
  mix.run({CAPT_EXPERT_PACK, CAPT_EXPERT_UP, CAPT_EXPERT_DOWN});
  return y;
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SixTensors mix_backward_cpu(const Tensor& x, const Tensor& weights, const Tensor& w_in, const Tensor& b_in,
                            const Tensor& w_out, const Tensor& b_out, double dropout, int64_t seed,
                            const Tensor& given_grad, bool need_x, bool need_weights, bool need_w_in, bool need_b_in,
                            bool need_w_out, bool need_b_out) {
  Mix mix(x, weights, w_in, b_in, w_out, b_out, dropout, seed);
  CaptExpertMix& args = mix.args;
  const Tensor grad_y = in_order(given_grad);
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type() && grad_y.numel() == x.numel(),
                  "capt::expert_mix_backward: grad_y must have the shape and dtype of x");
  const int64_t n_experts = args.n_experts, hidden = args.hidden, dim = args.dim;
  Tensor grad_x = room(x, need_x, {args.n_tokens, dim}, x.scalar_type());
  Tensor grad_weights = room(x, need_weights, {args.n_tokens, n_experts}, ScalarType::Float);
  Tensor grads[4] = {room(x, need_w_in, {n_experts, hidden, dim}, ScalarType::Float),
                     room(x, need_b_in, {n_experts, hidden}, ScalarType::Float),
                     room(x, need_w_out, {n_experts, dim, hidden}, ScalarType::Float),
                     room(x, need_b_out, {n_experts, dim}, ScalarType::Float)};
  if (need_weights) torch::stable::zero_(grad_weights);  // absent experts
  if (args.n_tokens == 0) {
    for (Tensor& grad : grads) torch::stable::zero_(grad);
  }
  args.grad_y = grad_y.data_ptr();
  args.grad_x = pointer<void>(grad_x, need_x);
  args.grad_weights = pointer<float>(grad_weights, need_weights);
  args.grad_w_in = pointer<float>(grads[0], need_w_in);
  args.grad_b_in = pointer<float>(grads[1], need_b_in);
  args.grad_w_out = pointer<float>(grads[2], need_w_out);
  args.grad_b_out = pointer<float>(grads[3], need_b_out);
  std::vector<int> phases = {CAPT_EXPERT_PACK};
  if (need_x || need_weights || need_w_in || need_b_in || need_w_out) phases.push_back(CAPT_EXPERT_BACK_UP);
  if (need_x) phases.push_back(CAPT_EXPERT_BACK_X);
  if (need_w_in || need_b_in) phases.push_back(CAPT_EXPERT_BACK_IN);
  if (need_w_out || need_b_out) phases.push_back(CAPT_EXPERT_BACK_OUT);
  if (need_weights) phases.push_back(CAPT_EXPERT_BACK_WEIGHTS);
  mix.run(phases);
  for (Tensor& grad : grads) grad = as(grad, x.scalar_type());
  return {grad_x, as(grad_weights, weights.scalar_type()), grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace
}  // namespace capt

STABLE_TORCH_LIBRARY_FRAGMENT(capt, library) {
  library.def("expert_router(Tensor x, Tensor gate, int top_k) -> (Tensor weights, Tensor probs, Tensor load)");
  library.def(
      "expert_router_backward(Tensor grad_weights, Tensor grad_probs, Tensor weights, Tensor probs, Tensor x, "
      "Tensor gate, bool need_x, bool need_gate) -> (Tensor x, Tensor gate)");
  library.def(
      "expert_mix(Tensor x, Tensor weights, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, float dropout, "
      "SymInt seed) -> Tensor");  // drawn anew in every run of a compiled graph
  library.def(
      "expert_mix_backward(Tensor x, Tensor weights, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, "
      "float dropout, SymInt seed, Tensor grad_y, bool need_x, bool need_weights, bool need_w_in, bool need_b_in, "
      "bool need_w_out, bool need_b_out) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(capt, CPU, library) {
  library.impl("expert_router", TORCH_BOX(&capt::router_cpu));
  library.impl("expert_router_backward", TORCH_BOX(&capt::router_backward_cpu));
  library.impl("expert_mix", TORCH_BOX(&capt::mix_cpu));
  library.impl("expert_mix_backward", TORCH_BOX(&capt::mix_backward_cpu));
}
