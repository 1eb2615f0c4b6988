// Registration of capt::confusion_pairs (CPU). No arithmetic here.

#include "confusion_pairs.h"

#include <atomic>
#include <memory>
#include <optional>
#include <tuple>

#include "glue.h"

namespace capt {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kClassesPerTask = 1 << 15;  // smaller pieces cost more to hand out than they take

void check_statistics(const Tensor& offsets, const Tensor& classes, const Tensor& counts, int64_t n_classes) {
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.is_contiguous() && offsets.dim() == 1 &&
                      offsets.numel() == n_classes + 1,
                  "capt::confusion_pairs: offsets must be contiguous int64 [C + 1]");
  STD_TORCH_CHECK(classes.scalar_type() == ScalarType::Long && classes.is_contiguous(),
                  "capt::confusion_pairs: classes must be contiguous int64 [nnz]");
  STD_TORCH_CHECK(
      counts.scalar_type() == ScalarType::Float && counts.is_contiguous() && counts.numel() == classes.numel(),
      "capt::confusion_pairs: counts must be contiguous float32 [nnz]");
}

std::tuple<Tensor, Tensor, Tensor> pairs_cpu(const Tensor& given, int64_t k, const OptionalTensor& offsets,
                                             const OptionalTensor& classes, const OptionalTensor& counts) {
  STD_TORCH_CHECK(given.dim() == 2 && given.size(1) >= 2 && given.size(1) < (int64_t{1} << 32) && k >= 1,
                  "capt::confusion_pairs: logits must be [B, C] with at least 2 classes, and k at least 1");
  const bool counted = offsets.has_value() && classes.has_value() && counts.has_value();
  const int64_t batch = given.size(0), n_classes = given.size(1);
  if (counted) check_statistics(*offsets, *classes, *counts, n_classes);
  const Tensor logits = given.stride(1) != 1 ? torch::stable::contiguous(given) : given;
  const int64_t kept = k < n_classes ? k : n_classes - 1;
  Tensor pseudo = torch::stable::new_empty(logits, {batch}, ScalarType::Long);
  Tensor index = torch::stable::new_empty(logits, {batch, kept}, ScalarType::Long);
  Tensor score = torch::stable::new_empty(logits, {batch, kept}, ScalarType::Float);
  const CaptConfusionPairs args{logits.data_ptr(),
                                counted ? static_cast<const int64_t*>(offsets->data_ptr()) : nullptr,
                                counted ? static_cast<const int64_t*>(classes->data_ptr()) : nullptr,
                                counted ? static_cast<const float*>(counts->data_ptr()) : nullptr,
                                static_cast<int64_t*>(pseudo.data_ptr()),
                                static_cast<int64_t*>(index.data_ptr()),
                                static_cast<float*>(score.data_ptr()),
                                batch,
                                n_classes,
                                counted ? classes->numel() : 0,
                                kept,
                                logits.stride(0),
                                dtype_code(logits, "capt::confusion_pairs: logits")};
  if (batch == 0) return {pseudo, index, score};
  const int64_t grain = n_classes < kClassesPerTask ? kClassesPerTask / n_classes : 1;
  std::atomic<int> status{0};
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    const auto size = static_cast<size_t>(capt_confusion_pairs_workspace(&args));
    const std::unique_ptr<uint64_t[]> workspace(new uint64_t[(size + 7) / 8]);
    const int found = capt_confusion_pairs_cpu(&args, workspace.get(), capt_cpu_level(), begin, end);
    if (found != 0) status.store(found);
  });
  STD_TORCH_CHECK(status.load() == 0, "capt::confusion_pairs: offsets must lie in [0, nnz], classes in [0, C)");
  return {pseudo, index, score};
}

}  // namespace
}  // namespace capt

STABLE_TORCH_LIBRARY_FRAGMENT(capt, library) {
  library.def(
      "confusion_pairs(Tensor logits, int k, Tensor? offsets, Tensor? classes, Tensor? counts) "
      "-> (Tensor pseudo, Tensor index, Tensor score)");
}

STABLE_TORCH_LIBRARY_IMPL(capt, CPU, library) { library.impl("confusion_pairs", TORCH_BOX(&capt::pairs_cpu)); }
