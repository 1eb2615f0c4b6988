// Registration of capt::pair_frontier (CPU). No arithmetic here.

#include "pair_frontier.h"

#include <memory>
#include <optional>
#include <tuple>

#include "glue.h"

namespace capt {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kPairsPerTask = 1 << 15;  // smaller pieces cost more to hand out than they take

bool is_matrix(const Tensor& tensor, ScalarType dtype, int64_t rows, int64_t columns) {
  return tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.dim() == 2 && tensor.size(0) == rows &&
         (columns < 0 || tensor.size(1) == columns);
}

template <typename V>
const V* data_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const V*>(tensor->data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor> frontier_cpu(const Tensor& given, const Tensor& group, int64_t n_groups, int64_t start,
                                        const OptionalTensor& state, const OptionalTensor& object,
                                        const OptionalTensor& pairs, const OptionalTensor& previous_score,
                                        const OptionalTensor& previous_pair) {
  STD_TORCH_CHECK(given.dim() == 2 && n_groups >= 1 && n_groups < (int64_t{1} << 31) && start >= 0,
                  "capt::pair_frontier: scores must be [B, K], n_groups at least 1, start at least 0");
  const int64_t batch = given.size(0), n_pairs = given.size(1);
  STD_TORCH_CHECK(group.scalar_type() == ScalarType::Long && group.is_contiguous() && group.numel() == n_pairs,
                  "capt::pair_frontier: group must be contiguous int64 [K]");
  const bool term = state.has_value() && object.has_value() && pairs.has_value();
  STD_TORCH_CHECK(
      !term || (is_matrix(*state, ScalarType::Float, batch, -1) && is_matrix(*object, ScalarType::Float, batch, -1) &&
                is_matrix(*pairs, ScalarType::Long, n_pairs, 2)),
      "capt::pair_frontier: state and object must be contiguous float32 [B, n], pairs int64 [K, 2]");
  const ScalarType dtype = term ? ScalarType::Float : given.scalar_type();
  const bool earlier = previous_score.has_value() && previous_pair.has_value();
  STD_TORCH_CHECK(!earlier || (is_matrix(*previous_score, dtype, batch, n_groups) &&
                               is_matrix(*previous_pair, ScalarType::Long, batch, n_groups)),
                  "capt::pair_frontier: previous must be contiguous [B, G] of the result's dtype, and int64 [B, G]");
  const Tensor scores = given.stride(1) != 1 && n_pairs > 1 ? torch::stable::contiguous(given) : given;
  Tensor score = torch::stable::new_empty(scores, {batch, n_groups}, dtype);
  Tensor pair = torch::stable::new_empty(scores, {batch, n_groups}, ScalarType::Long);
  const CaptPairFrontier args{scores.data_ptr(),
                              static_cast<const int64_t*>(group.data_ptr()),
                              data_of<int64_t>(pairs),
                              data_of<float>(state),
                              data_of<float>(object),
                              earlier ? previous_score->data_ptr() : nullptr,
                              data_of<int64_t>(previous_pair),
                              score.data_ptr(),
                              static_cast<int64_t*>(pair.data_ptr()),
                              batch,
                              n_pairs,
                              n_groups,
                              term ? state->size(1) : 0,
                              term ? object->size(1) : 0,
                              start,
                              scores.stride(0),
                              dtype_code(scores, "capt::pair_frontier: scores"),
                              term};
  if (batch == 0) return {score, pair};
  const auto size = static_cast<size_t>(capt_pair_frontier_columns_bytes(&args));
  const std::unique_ptr<uint64_t[]> columns(new uint64_t[size / 8]);
  STD_TORCH_CHECK(capt_pair_frontier_columns(&args, columns.get()) == 0,
                  "capt::pair_frontier: group must lie in [-1, n_groups), pairs among the states and objects");
  const int64_t grain = n_pairs == 0 ? batch : (kPairsPerTask + n_pairs - 1) / n_pairs;
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    const auto bytes = static_cast<size_t>(capt_pair_frontier_workspace(&args));
    const std::unique_ptr<uint64_t[]> workspace(new uint64_t[bytes / 8]);
    capt_pair_frontier_cpu(&args, columns.get(), workspace.get(), capt_cpu_level(), begin, end);
  });
  return {score, pair};
}

}  // namespace
}  // namespace capt

STABLE_TORCH_LIBRARY_FRAGMENT(capt, library) {
  library.def(
      "pair_frontier(Tensor scores, Tensor group, int n_groups, int start, Tensor? state, Tensor? object, "
      "Tensor? pairs, Tensor? previous_score, Tensor? previous_pair) -> (Tensor score, Tensor pair)");
}

STABLE_TORCH_LIBRARY_IMPL(capt, CPU, library) { library.impl("pair_frontier", TORCH_BOX(&capt::frontier_cpu)); }
