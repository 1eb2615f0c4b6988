// Registration of capt::bank_topk and capt::bank_topk_ranges for CUDA tensors. No arithmetic here.

#ifdef CAPT_WITH_CUDA

#include "bank_topk_cuda.h"

#include <optional>
#include <tuple>

#include "glue.h"

namespace capt {
namespace {

using OptionalTensor = std::optional<Tensor>;

// An int64 tensor on the device of the queries, contiguous; copied once if it is not.
Tensor integers(const Tensor& given, const Tensor& queries, int64_t numel, const char* name) {
  STD_TORCH_CHECK(given.scalar_type() == ScalarType::Long && given.numel() == numel && given.is_cuda() &&
                      given.get_device_index() == queries.get_device_index(),
                  "capt::bank_topk: ", name, " must be int64 with ", numel, " entries on the device of queries");
  return torch::stable::contiguous(given);
}

std::tuple<Tensor, Tensor> search(const Tensor& given_queries, const Tensor& given_rows, const Tensor* given_ranges,
                                  int64_t k, const OptionalTensor& given_ids, const OptionalTensor& given_exclude) {
  STD_TORCH_CHECK(given_queries.dim() == 2 && given_rows.dim() == 2 && given_queries.size(1) == given_rows.size(1),
                  "capt::bank_topk: queries must be [Q, d] and rows [N, d]");
  STD_TORCH_CHECK(given_queries.scalar_type() == given_rows.scalar_type() && given_rows.is_cuda() &&
                      given_rows.get_device_index() == given_queries.get_device_index(),
                  "capt::bank_topk: rows must have the dtype and the device of queries");
  STD_TORCH_CHECK(given_rows.size(0) <= 0xFFFFFFFFLL, "capt::bank_topk: rows has ", given_rows.size(0),
                  " entries, at most 4294967295 are supported");
  STD_TORCH_CHECK(k > 0 && k < 0x7FFFFFBFLL, "capt::bank_topk: k is ", k, ", expected 1 to 2147483582");
  STD_TORCH_CHECK(given_ids.has_value() == given_exclude.has_value(),
                  "capt::bank_topk: row_ids and exclude belong together");
  torch::stable::accelerator::DeviceGuard guard(given_queries.get_device_index());
  const Tensor queries = torch::stable::contiguous(given_queries), rows = torch::stable::contiguous(given_rows);
  const int64_t n_query = queries.size(0), n_rows = rows.size(0);
  OptionalTensor ranges, row_ids, exclude;
  int64_t n_pairs = 1, n_ranges = 0;
  if (given_ranges != nullptr) {
    STD_TORCH_CHECK(given_ranges->dim() == 4 && given_ranges->size(0) == n_query && given_ranges->size(3) == 2,
                    "capt::bank_topk_ranges: ranges must be [Q, P, S, 2]");
    n_pairs = given_ranges->size(1);
    n_ranges = given_ranges->size(2);
    ranges = integers(*given_ranges, queries, n_query * n_pairs * n_ranges * 2, "ranges");
  }
  if (given_ids.has_value()) {
    row_ids = integers(*given_ids, queries, n_rows, "row_ids");
    exclude = integers(*given_exclude, queries, n_query, "exclude");
  }
  const auto address = [](const OptionalTensor& tensor) {
    return tensor.has_value() ? static_cast<const int64_t*>(tensor->data_ptr()) : nullptr;
  };
  const auto empty = [&](ScalarType dtype) {
    return given_ranges != nullptr ? torch::stable::new_empty(queries, {n_query, n_pairs, k}, dtype)
                                   : torch::stable::new_empty(queries, {n_query, k}, dtype);
  };
  Tensor scores = empty(ScalarType::Float), index = empty(ScalarType::Long);
  CaptBankTopkCuda args{queries.data_ptr(),
                        rows.data_ptr(),
                        nullptr,
                        address(row_ids),
                        address(exclude),
                        static_cast<float*>(scores.data_ptr()),
                        static_cast<int64_t*>(index.data_ptr()),
                        nullptr,
                        n_query,
                        n_rows,
                        queries.size(1),
                        n_pairs,
                        n_ranges,
                        k,
                        dtype_code(queries, "capt::bank_topk: queries"),
                        CAPT_BANK_TOPK_AUTO,
                        0,
                        0};
  // Without a single range every list is empty; a null pointer would mean the whole bank.
  static const int64_t nothing[2] = {0, 0};
  if (given_ranges != nullptr) args.ranges = n_ranges > 0 ? address(ranges) : nothing;
  const Tensor workspace = torch::stable::new_empty(queries, {capt_bank_topk_cuda_workspace(&args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  check_cuda(capt_bank_topk_cuda(&args, current_stream(queries.get_device_index())), "capt::bank_topk");
  return {scores, index};
}

std::tuple<Tensor, Tensor> bank_topk_cuda(const Tensor& queries, const Tensor& rows, int64_t k,
                                          const OptionalTensor& row_ids, const OptionalTensor& exclude) {
  return search(queries, rows, nullptr, k, row_ids, exclude);
}

std::tuple<Tensor, Tensor> bank_topk_ranges_cuda(const Tensor& queries, const Tensor& rows, const Tensor& ranges,
                                                 int64_t k, const OptionalTensor& row_ids,
                                                 const OptionalTensor& exclude) {
  return search(queries, rows, &ranges, k, row_ids, exclude);
}

}  // namespace
}  // namespace capt

STABLE_TORCH_LIBRARY_IMPL(capt, CUDA, library) {
  library.impl("bank_topk", TORCH_BOX(&capt::bank_topk_cuda));
  library.impl("bank_topk_ranges", TORCH_BOX(&capt::bank_topk_ranges_cuda));
}

#endif
