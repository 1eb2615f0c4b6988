// Registration of capt::asymmetric_loss (CPU). No arithmetic but the sum of the blocks here.

#include "asymmetric_loss.h"

#include <memory>
#include <tuple>

#include "glue.h"

namespace capt {
namespace {

constexpr int64_t kEntriesPerTask = 1 << 14;  // smaller pieces cost more to hand out than they take

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

std::tuple<Tensor, Tensor> loss_cpu(const Tensor& given, const Tensor& given_targets, double gamma_pos,
                                    double gamma_neg, double margin, double eps, int64_t reduction) {
  STD_TORCH_CHECK(given.dim() == 2 && given_targets.dim() == 2 && given.size(0) == given_targets.size(0) &&
                      given.size(1) == given_targets.size(1),
                  "capt::asymmetric_loss: logits and targets must be [B, C]");
  const ScalarType kind = given_targets.scalar_type();
  STD_TORCH_CHECK(kind == ScalarType::Bool || kind == ScalarType::Byte || kind == ScalarType::Float,
                  "capt::asymmetric_loss: targets must be bool, uint8 or float32");
  STD_TORCH_CHECK(reduction >= kNone && reduction <= kSum, "capt::asymmetric_loss: reduction must be 0, 1 or 2");
  STD_TORCH_CHECK(gamma_pos >= 0 && gamma_neg >= 0 && margin >= 0 && margin < 1 && eps >= 0 && eps < 1,
                  "capt::asymmetric_loss: gammas must be >= 0, margin and eps in [0, 1)");
  const Tensor logits = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const Tensor targets = given_targets.is_contiguous() ? given_targets : torch::stable::contiguous(given_targets);
  const int64_t rows = logits.size(0), columns = logits.size(1), size = logits.numel();
  Tensor slope = torch::stable::new_empty(logits, {rows, columns}, ScalarType::Float);
  Tensor loss = reduction == kNone ? torch::stable::new_empty(logits, {rows, columns}, ScalarType::Float)
                                   : torch::stable::new_empty(logits, {}, ScalarType::Float);
  auto* losses = static_cast<float*>(loss.data_ptr());
  const int64_t block = capt_asymmetric_loss_block(), blocks = (size + block - 1) / block;
  const std::unique_ptr<double[]> partial(new double[static_cast<size_t>(blocks)]);
  const double scale = reduction == kMean ? 1.0 / static_cast<double>(size) : 1.0;
  const CaptAsymmetricLoss args{logits.data_ptr(),
                                targets.data_ptr(),
                                static_cast<float*>(slope.data_ptr()),
                                reduction == kNone ? losses : nullptr,
                                partial.get(),
                                size,
                                gamma_pos,
                                gamma_neg,
                                margin,
                                eps,
                                scale,
                                dtype_code(logits, "capt::asymmetric_loss: logits"),
                                kind == ScalarType::Float};
  torch::stable::parallel_for(0, blocks, kEntriesPerTask / block, [&](int64_t begin, int64_t end) {
    capt_asymmetric_loss_cpu(&args, capt_cpu_level(), begin, end);
  });
  if (reduction != kNone) {
    double sum = 0.0;
    for (int64_t i = 0; i < blocks; ++i) sum += partial[i];
    *losses = static_cast<float>(sum * scale);  // of nothing: the mean is 0 * infinity
  }
  return {loss, slope};
}

}  // namespace
}  // namespace capt

STABLE_TORCH_LIBRARY_FRAGMENT(capt, library) {
  library.def(
      "asymmetric_loss(Tensor logits, Tensor targets, float gamma_pos, float gamma_neg, float margin, float eps, "
      "int reduction) -> (Tensor loss, Tensor slope)");
}

STABLE_TORCH_LIBRARY_IMPL(capt, CPU, library) { library.impl("asymmetric_loss", TORCH_BOX(&capt::loss_cpu)); }
