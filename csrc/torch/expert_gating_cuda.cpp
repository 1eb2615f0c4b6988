// expert_gating on CUDA tensors: arguments, scratch memory, and the plain matrix products of the backward pass, which
// are torch's. Nothing waits for the device.

#ifdef CAPT_WITH_CUDA

#include "expert_gating_cuda.h"

#include <tuple>
#include <vector>

#include "glue.h"

namespace capt {
namespace {

namespace stable = torch::stable;
using stable::accelerator::DeviceGuard;

template <typename T = float>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}
template <typename T = float>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

Tensor scratch(const Tensor& like, int64_t bytes) { return stable::new_empty(like, {bytes}, ScalarType::Byte); }

Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

Tensor absent(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }

void check_matrix(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, " must be [", rows,
                  ", ", columns, "]");
}

// float32 and contiguous.
Tensor floats(const Tensor& tensor) {
  return stable::contiguous(tensor.scalar_type() == ScalarType::Float ? tensor : stable::to(tensor, ScalarType::Float));
}

std::tuple<Tensor, Tensor, Tensor> router(const Tensor& given, const Tensor& given_gate, int64_t top_k) {
  STD_TORCH_CHECK(given.dim() == 2, "capt::expert_router: x must be [N, D]");
  const int64_t tokens = given.size(0), dim = given.size(1), experts = given_gate.size(0);
  check_matrix(given_gate, experts, dim, "capt::expert_router: gate");
  STD_TORCH_CHECK(given_gate.scalar_type() == given.scalar_type(),
                  "capt::expert_router: gate must have the dtype of x");
  STD_TORCH_CHECK(top_k >= 1 && top_k <= experts, "capt::expert_router: top_k must lie in [1, ", experts, "], found ",
                  top_k);
  const DeviceGuard guard(given.get_device_index());
  const Tensor x = stable::contiguous(given), gate = stable::contiguous(given_gate);
  const Tensor weights = empty(x, {tokens, experts}, ScalarType::Float);
  const Tensor probs = empty(x, {tokens, experts}, ScalarType::Float), load = empty(x, {experts}, ScalarType::Float);
  const Tensor counter = empty(x, {experts + 1}, ScalarType::Int);
  CaptExpertRouterCuda args{};
  args.x = x.data_ptr();
  args.gate = gate.data_ptr();
  args.weights = write(weights);
  args.probs = write(probs);
  args.load = write(load);
  args.counter = write<int32_t>(counter);
  args.tokens = tokens;
  args.dim = dim;
  args.experts = experts;
  args.top_k = top_k;
  args.dtype = dtype_code(x, "capt::expert_router: x");
  check_cuda(capt_expert_router_cuda(&args, current_stream(x.get_device_index())), "capt::expert_router");
  return {weights, probs, load};
}

std::tuple<Tensor, Tensor> router_backward(const Tensor& given_grad_weights, const Tensor& given_grad_probs,
                                           const Tensor& given_weights, const Tensor& given_probs, const Tensor& given,
                                           const Tensor& given_gate, bool need_x, bool need_gate) {
  const int64_t tokens = given.size(0), dim = given.size(1), experts = given_gate.size(0);
  check_matrix(given_gate, experts, dim, "capt::expert_router_backward: gate");
  STD_TORCH_CHECK(given_gate.scalar_type() == given.scalar_type(),
                  "capt::expert_router_backward: gate must have the dtype of x");
  check_matrix(given_grad_weights, tokens, experts, "capt::expert_router_backward: grad_weights");
  check_matrix(given_grad_probs, tokens, experts, "capt::expert_router_backward: grad_probs");
  check_matrix(given_weights, tokens, experts, "capt::expert_router_backward: weights");
  check_matrix(given_probs, tokens, experts, "capt::expert_router_backward: probs");
  const DeviceGuard guard(given.get_device_index());
  const Tensor x = stable::contiguous(given), gate = stable::contiguous(given_gate);
  const Tensor grad_weights = floats(given_grad_weights), grad_probs = floats(given_grad_probs);
  const Tensor weights = floats(given_weights), probs = floats(given_probs);
  Tensor grad_x = need_x ? empty(x, {tokens, dim}, x.scalar_type()) : absent(x);
  Tensor grad_gate = need_gate ? empty(x, {experts, dim}, gate.scalar_type()) : absent(gate);
  if (!need_x && !need_gate) return {grad_x, grad_gate};
  const Tensor grad_logits = empty(x, {tokens, experts}, ScalarType::Float);
  const Tensor partial = scratch(x, need_gate ? capt_column_sums_cuda_workspace(tokens, experts, dim) : 0);
  CaptExpertRouterBackwardCuda args{};
  args.grad_weights = read(grad_weights);
  args.grad_probs = read(grad_probs);
  args.weights = read(weights);
  args.probs = read(probs);
  args.x = x.data_ptr();
  args.gate = gate.data_ptr();
  args.grad_logits = write(grad_logits);
  args.grad_x = need_x ? grad_x.data_ptr() : nullptr;
  args.grad_gate = need_gate ? grad_gate.data_ptr() : nullptr;
  args.partial = write(partial);
  args.tokens = tokens;
  args.dim = dim;
  args.experts = experts;
  args.dtype = dtype_code(x, "capt::expert_router_backward: x");
  check_cuda(capt_expert_router_backward_cuda(&args, current_stream(x.get_device_index())),
             "capt::expert_router_backward");
  return {grad_x, grad_gate};
}

// Contiguous inputs of the experts, of one dtype.
struct Experts {
  Tensor x, weights, w_in, b_in, w_out, b_out;
  int64_t tokens, dim, hidden, count;

  Experts(const Tensor& x_, const Tensor& weights_, const Tensor& w_in_, const Tensor& b_in_, const Tensor& w_out_,
          const Tensor& b_out_)
      : x(stable::contiguous(x_)),
        weights(floats(weights_)),
        w_in(stable::contiguous(w_in_)),
        b_in(stable::contiguous(b_in_)),
        w_out(stable::contiguous(w_out_)),
        b_out(stable::contiguous(b_out_)) {
    STD_TORCH_CHECK(x.dim() == 2 && w_in.dim() == 3, "capt::expert_mix: x must be [N, D] and w_in [E, H, D]");
    tokens = x.size(0);
    dim = x.size(1);
    count = w_in.size(0);
    hidden = w_in.size(1);
    check_matrix(weights, tokens, count, "capt::expert_mix: weights");
    check_matrix(b_in, count, hidden, "capt::expert_mix: b_in");
    check_matrix(b_out, count, dim, "capt::expert_mix: b_out");
    STD_TORCH_CHECK(w_in.size(2) == dim && w_out.dim() == 3 && w_out.size(0) == count && w_out.size(1) == dim &&
                        w_out.size(2) == hidden,
                    "capt::expert_mix: w_in must be [E, H, D] and w_out [E, D, H]");
    const auto dtype = x.scalar_type();
    STD_TORCH_CHECK(w_in.scalar_type() == dtype && b_in.scalar_type() == dtype && w_out.scalar_type() == dtype &&
                        b_out.scalar_type() == dtype,
                    "capt::expert_mix: w_in, b_in, w_out and b_out must have the dtype of x");
  }
};

void check_dropout(double dropout) {
  STD_TORCH_CHECK(dropout >= 0.0 && dropout < 1.0, "capt::expert_mix: dropout must lie in [0, 1), found ", dropout);
}

Tensor mix(const Tensor& x, const Tensor& weights, const Tensor& w_in, const Tensor& b_in, const Tensor& w_out,
           const Tensor& b_out, double dropout, int64_t seed) {
  check_dropout(dropout);
  const DeviceGuard guard(x.get_device_index());
  const Experts experts(x, weights, w_in, b_in, w_out, b_out);
  Tensor y = empty(experts.x, {experts.tokens, experts.dim}, experts.x.scalar_type());
  CaptExpertMixCuda args{};
  args.x = experts.x.data_ptr();
  args.weights = read(experts.weights);
  args.w_in = experts.w_in.data_ptr();
  args.b_in = experts.b_in.data_ptr();
  args.w_out = experts.w_out.data_ptr();
  args.b_out = experts.b_out.data_ptr();
  args.y = y.data_ptr();
  args.tokens = experts.tokens;
  args.dim = experts.dim;
  args.hidden = experts.hidden;
  args.experts = experts.count;
  args.seed = seed;
  args.dropout = dropout;
  args.dtype = dtype_code(experts.x, "capt::expert_mix: x");
  const Tensor workspace = scratch(experts.x, capt_expert_mix_cuda_workspace(&args));
  args.workspace = workspace.data_ptr();
  check_cuda(capt_expert_mix_cuda(&args, current_stream(x.get_device_index())), "capt::expert_mix");
  return y;
}

// out[r, c] = sum_n factor[n, r] * value[n, c]; without factor one row.
Tensor column_sums(const Tensor* factor, const Tensor& value, std::vector<int64_t> sizes, void* stream) {
  const Tensor out = empty(value, std::move(sizes), value.scalar_type());
  CaptColumnSumsCuda args{};
  args.factor = factor == nullptr ? nullptr : read(*factor);
  args.value = value.data_ptr();
  args.out = out.data_ptr();
  args.tokens = value.size(0);
  args.rows = factor == nullptr ? 1 : factor->size(1);
  args.columns = value.size(1);
  args.dtype = args.out_dtype = dtype_code(value, "capt::expert_mix_backward: x");
  const Tensor partial = scratch(value, capt_column_sums_cuda_workspace(args.tokens, args.rows, args.columns));
  args.partial = write(partial);
  check_cuda(capt_column_sums_cuda(&args, stream), "capt::expert_mix_backward");
  return out;
}

// The hidden activation is computed again. Every expert sees every token: rows of zeros where it was not chosen.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mix_backward(
    const Tensor& x, const Tensor& weights, const Tensor& w_in, const Tensor& b_in, const Tensor& w_out,
    const Tensor& b_out, double dropout, int64_t seed, const Tensor& given_grad, bool need_x, bool need_weights,
    bool need_w_in, bool need_b_in, bool need_w_out, bool need_b_out) {
  check_dropout(dropout);
  const DeviceGuard guard(x.get_device_index());
  const Experts experts(x, weights, w_in, b_in, w_out, b_out);
  const int64_t tokens = experts.tokens, dim = experts.dim, hidden = experts.hidden, count = experts.count;
  check_matrix(given_grad, tokens, dim, "capt::expert_mix_backward: grad_y");
  STD_TORCH_CHECK(given_grad.scalar_type() == x.scalar_type(),
                  "capt::expert_mix_backward: grad_y must have the dtype of x");
  const Tensor grad = stable::contiguous(given_grad);
  void* const stream = current_stream(x.get_device_index());
  Tensor grad_x = absent(experts.x), grad_weights = absent(experts.weights), grad_w_in = absent(experts.x);
  Tensor grad_b_in = absent(experts.x), grad_w_out = absent(experts.x), grad_b_out = absent(experts.x);
  if (need_b_out) grad_b_out = column_sums(&experts.weights, grad, {count, dim}, stream);
  if (need_x || need_weights || need_w_in || need_b_in || need_w_out) {
    const Tensor flat = stable::view(experts.w_in, {count * hidden, dim});
    // z [N, E * H] and g [E, N, H]: pre-activation without bias, and gradient of an expert's hidden activation.
    const Tensor z = stable::contiguous(stable::matmul(experts.x, stable::transpose(flat, 0, 1)));
    const Tensor g = stable::contiguous(stable::matmul(stable::unsqueeze(grad, 0), experts.w_out));
    grad_weights = empty(experts.x, {tokens, count}, ScalarType::Float);
    CaptExpertHiddenBackwardCuda args{};
    args.z = z.data_ptr();
    args.g = g.data_ptr();
    args.weights = read(experts.weights);
    args.b_in = experts.b_in.data_ptr();
    args.b_out = experts.b_out.data_ptr();
    args.grad_y = grad.data_ptr();
    args.grad_weights = write(grad_weights);
    args.tokens = tokens;
    args.dim = dim;
    args.hidden = hidden;
    args.experts = count;
    args.seed = seed;
    args.dropout = dropout;
    args.dtype = dtype_code(experts.x, "capt::expert_mix_backward: x");
    check_cuda(capt_expert_hidden_backward_cuda(&args, stream), "capt::expert_mix_backward");
    if (!need_weights) grad_weights = absent(experts.weights);
    if (need_x) grad_x = stable::matmul(z, flat);
    if (need_w_in) {
      grad_w_in = stable::view(stable::matmul(stable::transpose(z, 0, 1), experts.x), {count, hidden, dim});
    }
    if (need_b_in) grad_b_in = column_sums(nullptr, z, {count, hidden}, stream);
    if (need_w_out) grad_w_out = stable::matmul(stable::unsqueeze(stable::transpose(grad, 0, 1), 0), g);
  }
  return {grad_x, grad_weights, grad_w_in, grad_b_in, grad_w_out, grad_b_out};
}

}  // namespace
}  // namespace capt

STABLE_TORCH_LIBRARY_IMPL(capt, CUDA, library) {
  library.impl("expert_router", TORCH_BOX(&capt::router));
  library.impl("expert_router_backward", TORCH_BOX(&capt::router_backward));
  library.impl("expert_mix", TORCH_BOX(&capt::mix));
  library.impl("expert_mix_backward", TORCH_BOX(&capt::mix_backward));
}

#endif
