// Registration of capt::grid_adapter and capt::grid_adapter_correlate (CPU and CUDA). No arithmetic here.

#include "grid_adapter.h"

#include <optional>
#include <vector>

#include "glue.h"

namespace capt {
namespace {

using OptionalTensor = std::optional<Tensor>;

CaptGridAdapter adapter_args(const Tensor& tokens, const Tensor& weight, const OptionalTensor& alpha, double scale,
                             int64_t height, int64_t width, int64_t n_prefix, bool transpose, Tensor& out) {
  STD_TORCH_CHECK(tokens.dim() == 3, "capt::grid_adapter: tokens must be [B, L, D]");
  const int64_t batch = tokens.size(0), length = tokens.size(1), dim = tokens.size(2);
  STD_TORCH_CHECK(
      height > 0 && width > 0 && n_prefix >= 0 && n_prefix <= length && height <= (length - n_prefix) / width,
      "capt::grid_adapter: grid ", height, "x", width, " after ", n_prefix, " prefix tokens does not fit into ", length,
      " tokens");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.numel() == dim * 9 && weight.is_contiguous(),
                  "capt::grid_adapter: weight must be contiguous float32 [D, 3, 3]");
  int64_t alpha_stride = 0;
  if (alpha.has_value()) {
    STD_TORCH_CHECK(alpha->scalar_type() == ScalarType::Float && alpha->is_contiguous() &&
                        (alpha->numel() == 1 || (alpha->dim() == 1 && alpha->numel() == batch)),
                    "capt::grid_adapter: alpha must be contiguous float32 with 1 or B entries");
    alpha_stride = alpha->dim() == 1 && alpha->numel() == batch ? 1 : 0;
  }
  return CaptGridAdapter{tokens.data_ptr(),
                         static_cast<const float*>(weight.data_ptr()),
                         alpha.has_value() ? static_cast<const float*>(alpha->data_ptr()) : nullptr,
                         out.data_ptr(),
                         batch,
                         length,
                         dim,
                         height,
                         width,
                         n_prefix,
                         tokens.stride(0),
                         tokens.stride(1),
                         alpha_stride,
                         static_cast<float>(scale),
                         transpose,
                         dtype_code(tokens, "capt::grid_adapter: tokens")};
}

Tensor adapter_output(const Tensor& tokens) {
  STD_TORCH_CHECK(tokens.dim() == 3, "capt::grid_adapter: tokens must be [B, L, D]");
  return torch::stable::new_empty(tokens, {tokens.size(0), tokens.size(1), tokens.size(2)});
}

Tensor adapter_cpu(const Tensor& given, const Tensor& weight, const OptionalTensor& alpha, double scale, int64_t height,
                   int64_t width, int64_t n_prefix, bool transpose) {
  const Tensor tokens = channels_contiguous(given);
  Tensor out = adapter_output(tokens);
  const auto args = adapter_args(tokens, weight, alpha, scale, height, width, n_prefix, transpose, out);
  if (out.numel() == 0) return out;
  std::vector<float> packed(static_cast<size_t>(9 * args.dim));
  capt_grid_adapter_pack(&args, packed.data());
  torch::stable::parallel_for(0, capt_grid_adapter_tasks(&args), 1, [&](int64_t begin, int64_t end) {
    capt_grid_adapter_cpu(&args, packed.data(), capt_cpu_level(), begin, end);
  });
  return out;
}

CaptGridCorrelate correlate_args(const Tensor& tokens, const Tensor& grad, int64_t height, int64_t width,
                                 int64_t n_prefix, Tensor& partial) {
  STD_TORCH_CHECK(tokens.dim() == 3 && grad.dim() == 3 && tokens.size(0) == grad.size(0) &&
                      tokens.size(1) == grad.size(1) && tokens.size(2) == grad.size(2) &&
                      tokens.scalar_type() == grad.scalar_type(),
                  "capt::grid_adapter_correlate: tokens and grad must have one shape [B, L, D] and one dtype");
  STD_TORCH_CHECK(height > 0 && width > 0 && n_prefix >= 0 && n_prefix <= tokens.size(1) &&
                      height <= (tokens.size(1) - n_prefix) / width,
                  "capt::grid_adapter_correlate: the grid does not fit into the tokens");
  return CaptGridCorrelate{tokens.data_ptr(),
                           grad.data_ptr(),
                           static_cast<float*>(partial.data_ptr()),
                           tokens.size(0),
                           tokens.size(1),
                           tokens.size(2),
                           height,
                           width,
                           n_prefix,
                           tokens.stride(0),
                           tokens.stride(1),
                           grad.stride(0),
                           grad.stride(1),
                           dtype_code(tokens, "capt::grid_adapter_correlate: tokens")};
}

Tensor correlate_output(const Tensor& tokens) {
  STD_TORCH_CHECK(tokens.dim() == 3, "capt::grid_adapter_correlate: tokens must be [B, L, D]");
  return torch::stable::new_empty(tokens, {tokens.size(0), 9, tokens.size(2)}, ScalarType::Float);
}

Tensor correlate_cpu(const Tensor& given, const Tensor& given_grad, int64_t height, int64_t width, int64_t n_prefix) {
  const Tensor tokens = channels_contiguous(given), grad = channels_contiguous(given_grad);
  Tensor partial = correlate_output(tokens);
  const auto args = correlate_args(tokens, grad, height, width, n_prefix, partial);
  if (partial.numel() == 0) return partial;
  torch::stable::parallel_for(0, capt_grid_correlate_tasks(&args), 1, [&](int64_t begin, int64_t end) {
    capt_grid_correlate_cpu(&args, capt_cpu_level(), begin, end);
  });
  return partial;
}

#ifdef CAPT_WITH_CUDA
Tensor adapter_cuda(const Tensor& given, const Tensor& weight, const OptionalTensor& alpha, double scale,
                    int64_t height, int64_t width, int64_t n_prefix, bool transpose) {
  torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Tensor tokens = channels_contiguous(given);
  Tensor out = adapter_output(tokens);
  const auto args = adapter_args(tokens, weight, alpha, scale, height, width, n_prefix, transpose, out);
  check_cuda(capt_grid_adapter_cuda(&args, current_stream(given.get_device_index())), "capt::grid_adapter");
  return out;
}

Tensor correlate_cuda(const Tensor& given, const Tensor& given_grad, int64_t height, int64_t width, int64_t n_prefix) {
  torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Tensor tokens = channels_contiguous(given), grad = channels_contiguous(given_grad);
  Tensor partial = correlate_output(tokens);
  const auto args = correlate_args(tokens, grad, height, width, n_prefix, partial);
  check_cuda(capt_grid_correlate_cuda(&args, current_stream(given.get_device_index())), "capt::grid_adapter_correlate");
  return partial;
}
#endif

}  // namespace
}  // namespace capt

STABLE_TORCH_LIBRARY_FRAGMENT(capt, library) {
  library.def(
      "grid_adapter(Tensor tokens, Tensor weight, Tensor? alpha, float scale, int height, int width, int n_prefix, "
      "bool transpose) -> Tensor");
  library.def("grid_adapter_correlate(Tensor tokens, Tensor grad, int height, int width, int n_prefix) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(capt, CPU, library) {
  library.impl("grid_adapter", TORCH_BOX(&capt::adapter_cpu));
  library.impl("grid_adapter_correlate", TORCH_BOX(&capt::correlate_cpu));
}

#ifdef CAPT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(capt, CUDA, library) {
  library.impl("grid_adapter", TORCH_BOX(&capt::adapter_cuda));
  library.impl("grid_adapter_correlate", TORCH_BOX(&capt::correlate_cuda));
}
#endif
