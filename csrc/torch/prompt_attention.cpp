// Schemas of capt::prompt_attention* and registration of the gathered form on the CPU. No arithmetic here.

#include "prompt_attention.h"

#include <optional>
#include <tuple>
#include <vector>

#include "glue.h"

namespace capt {
namespace {

using OptionalTensor = std::optional<Tensor>;
using torch::stable::new_empty;

constexpr int64_t kTaskFlops = 1 << 15;  // arithmetic that is worth waking a thread for

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// Contiguous inputs, held for the length of a call.
struct Inputs {
  Tensor query, table[2], index[2];
  OptionalTensor log_prior;

  Inputs(const Tensor& query, const Tensor& commonality, const Tensor& difference, const Tensor& commonality_index,
         const Tensor& difference_index, const OptionalTensor& prior)
      : query(dense(query)),
        table{dense(commonality), dense(difference)},
        index{dense(commonality_index), dense(difference_index)} {
    if (prior.has_value()) log_prior = dense(*prior);
  }

  CaptPromptAttention arguments(double scale) const {
    STD_TORCH_CHECK(query.dim() == 2, "capt::prompt_attention: query must be [B, d]");
    STD_TORCH_CHECK(index[0].dim() == 2, "capt::prompt_attention: commonality_index must be [B, k]");
    CaptPromptAttention args{};
    args.query = query.data_ptr();
    args.batch = query.size(0);
    args.dim = query.size(1);
    args.k = index[0].size(1);
    args.scale = static_cast<float>(scale);
    args.dtype = dtype_code(query, "capt::prompt_attention: query");
    for (int i = 0; i < 2; ++i) {
      STD_TORCH_CHECK(
          table[i].dim() == 3 && table[i].size(2) == args.dim && table[i].scalar_type() == query.scalar_type(),
          "capt::prompt_attention: tables must be [n, s, d] of the query's dtype");
      STD_TORCH_CHECK(index[i].dim() == 2 && index[i].size(0) == args.batch && index[i].size(1) == args.k &&
                          index[i].scalar_type() == ScalarType::Long,
                      "capt::prompt_attention: indices must be int64 [B, k]");
      args.table[i] = table[i].data_ptr();
      args.index[i] = static_cast<const int64_t*>(index[i].data_ptr());
      args.pairs[i] = table[i].size(0);
      args.rows[i] = table[i].size(1);
    }
    if (log_prior.has_value()) {
      STD_TORCH_CHECK(log_prior->dim() == 2 && log_prior->size(0) == args.batch && log_prior->size(1) == args.k &&
                          log_prior->scalar_type() == ScalarType::Float,
                      "capt::prompt_attention: log_prior must be float32 [B, k]");
      args.log_prior = static_cast<const float*>(log_prior->data_ptr());
    }
    const int wrong = capt_prompt_attention_check(&args);
    STD_TORCH_CHECK(wrong == 0, "capt::prompt_attention: ", wrong == 1 ? "commonality" : "difference",
                    "_index must lie in [-1, ", args.pairs[wrong == 2], ")");
    return args;
  }
};

// Fewest tasks for a thread, given the rows one task touches.
int64_t grain(const CaptPromptAttention& args, int64_t rows) {
  return 1 + kTaskFlops / (1 + 4 * args.dim * (rows < 1 ? 1 : rows));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_cpu(const Tensor& query, const Tensor& commonality,
                                                         const Tensor& difference, const Tensor& commonality_index,
                                                         const Tensor& difference_index, const OptionalTensor& prior,
                                                         double scale) {
  const Inputs inputs(query, commonality, difference, commonality_index, difference_index, prior);
  CaptPromptAttention args = inputs.arguments(scale);
  Tensor out[2] = {new_empty(query, {args.batch, args.dim}), new_empty(query, {args.batch, args.dim})};
  Tensor weight[2] = {new_empty(query, {args.batch, args.k, args.rows[0]}, ScalarType::Float),
                      new_empty(query, {args.batch, args.k, args.rows[1]}, ScalarType::Float)};
  for (int i = 0; i < 2; ++i) {
    args.out[i] = out[i].data_ptr();
    args.weight[i] = static_cast<float*>(weight[i].data_ptr());
  }
  torch::stable::parallel_for(
      0, args.batch, grain(args, args.k * (args.rows[0] + args.rows[1])),
      [&](int64_t begin, int64_t end) { capt_prompt_attention_cpu(&args, capt_cpu_level(), begin, end); });
  return {out[0], out[1], weight[0], weight[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& grad_commonality, const Tensor& grad_difference, const Tensor& query, const Tensor& commonality,
    const Tensor& difference, const Tensor& commonality_index, const Tensor& difference_index,
    const OptionalTensor& prior, double scale, const Tensor& weight_commonality, const Tensor& weight_difference,
    bool need_query, bool need_tables, bool need_prior) {
  const Inputs inputs(query, commonality, difference, commonality_index, difference_index, prior);
  const Tensor grad[2] = {dense(grad_commonality), dense(grad_difference)};
  const Tensor weight[2] = {dense(weight_commonality), dense(weight_difference)};
  CaptPromptAttentionBackward args{};
  args.forward = inputs.arguments(scale);
  CaptPromptAttention& given = args.forward;
  Tensor score[2], out_table[2];
  std::vector<int64_t> users(
      need_tables ? static_cast<size_t>(given.pairs[0] + given.pairs[1] + 2 + 2 * given.batch * given.k) : 0);
  int64_t* free_users = users.data();
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(grad[i].numel() == given.batch * given.dim && grad[i].scalar_type() == query.scalar_type() &&
                        weight[i].numel() == given.batch * given.k * given.rows[i] &&
                        weight[i].scalar_type() == ScalarType::Float,
                    "capt::prompt_attention_backward: gradients and weights must be those of the forward call");
    score[i] = new_empty(query, {given.batch, given.k, given.rows[i]}, ScalarType::Float);
    out_table[i] = need_tables ? new_empty(query, {given.pairs[i], given.rows[i], given.dim}) : new_empty(query, {0});
    args.grad[i] = grad[i].data_ptr();
    given.weight[i] = static_cast<float*>(weight[i].data_ptr());
    args.grad_score[i] = static_cast<float*>(score[i].data_ptr());
    if (need_tables) {
      args.grad_table[i] = out_table[i].data_ptr();
      args.first[i] = free_users;
      args.uses[i] = free_users + given.pairs[i] + 1;
      free_users += given.pairs[i] + 1 + given.batch * given.k;
    }
  }
  Tensor out_query = need_query ? new_empty(query, {given.batch, given.dim}) : new_empty(query, {0});
  Tensor out_prior = new_empty(query, need_prior ? std::vector<int64_t>{given.batch, given.k} : std::vector<int64_t>{0},
                               ScalarType::Float);
  if (need_query) args.grad_query = out_query.data_ptr();
  if (need_prior) args.grad_prior = static_cast<float*>(out_prior.data_ptr());
  torch::stable::parallel_for(
      0, given.batch, grain(given, given.k * (given.rows[0] + given.rows[1])),
      [&](int64_t begin, int64_t end) { capt_prompt_attention_backward_cpu(&args, capt_cpu_level(), begin, end); });
  if (need_tables) {
    capt_prompt_attention_invert(&args);
    torch::stable::parallel_for(
        0, capt_prompt_attention_tables_tasks(&args), grain(given, given.rows[0]),
        [&](int64_t begin, int64_t end) { capt_prompt_attention_tables_cpu(&args, capt_cpu_level(), begin, end); });
  }
  return {out_query, out_table[0], out_table[1], out_prior};
}

}  // namespace
}  // namespace capt

STABLE_TORCH_LIBRARY_FRAGMENT(capt, library) {
  library.def(
      "prompt_attention(Tensor query, Tensor commonality, Tensor difference, Tensor commonality_index, "
      "Tensor difference_index, Tensor? log_prior, float scale) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "prompt_attention_backward(Tensor grad_commonality, Tensor grad_difference, Tensor query, Tensor commonality, "
      "Tensor difference, Tensor commonality_index, Tensor difference_index, Tensor? log_prior, float scale, "
      "Tensor weight_commonality, Tensor weight_difference, bool need_query, bool need_tables, bool need_prior) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "prompt_attention_shared(Tensor commonality_query, Tensor difference_query, Tensor keys, Tensor values, "
      "int n_heads, float scale) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "prompt_attention_shared_backward(Tensor grad_com, Tensor grad_diff, Tensor grad_lse_com, Tensor grad_lse_diff, "
      "Tensor commonality_query, Tensor difference_query, Tensor keys, Tensor values, Tensor out_com, Tensor out_diff, "
      "Tensor lse_com, Tensor lse_diff, int n_heads, float scale, bool need_query, bool need_keys, bool need_values) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(capt, CPU, library) {
  library.impl("prompt_attention", TORCH_BOX(&capt::attention_cpu));
  library.impl("prompt_attention_backward", TORCH_BOX(&capt::attention_backward_cpu));
}
