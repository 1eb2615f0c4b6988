// CUDA registration of capt::prompt_attention and capt::prompt_attention_shared with their backward ops; the schemas
// are in csrc/torch/prompt_attention.cpp. No arithmetic here.
#ifdef CAPT_WITH_CUDA

#include "prompt_attention_cuda.h"

#include <array>
#include <optional>
#include <tuple>

#include "glue.h"

namespace capt {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using torch::stable::contiguous;
using torch::stable::new_empty;

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

const int64_t* longs(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.data_ptr()); }

// Entries of a tensor in ascending order, and where each of them stood, ascending among equals.
std::tuple<Tensor, Tensor> stable_sort(const Tensor& tensor) {
  using torch::stable::detail::from;
  const std::optional<bool> stable = true;
  std::array<StableIValue, 4> stack{from(torch::stable::reshape(tensor, {tensor.numel()})), from(stable),
                                    from(int64_t{0}), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

bool together(const Tensor& tensor, const Tensor& leader) {
  return tensor.is_cuda() && tensor.get_device_index() == leader.get_device_index();
}

// Contiguous inputs of the gathered ops, held for the length of a call.
struct Gathered {
  Tensor query, table[2], index[2];
  OptionalTensor log_prior;
  CaptPromptAttentionCuda args{};

  Gathered(const Tensor& query_, const Tensor& commonality, const Tensor& difference, const Tensor& commonality_index,
           const Tensor& difference_index, const OptionalTensor& log_prior_, double scale)
      : query(contiguous(query_)),
        table{contiguous(commonality), contiguous(difference)},
        index{contiguous(commonality_index), contiguous(difference_index)} {
    STD_TORCH_CHECK(query.dim() == 2 && index[0].dim() == 2,
                    "capt::prompt_attention: query must be [B, d], commonality_index [B, k]");
    args.query = query.data_ptr();
    args.batch = query.size(0);
    args.dim = query.size(1);
    args.pairs = index[0].size(1);
    args.scale = static_cast<float>(scale);
    args.dtype = dtype_code(query, "capt::prompt_attention: query");
    for (int i = 0; i < 2; ++i) {
      STD_TORCH_CHECK(table[i].dim() == 3 && table[i].size(2) == args.dim &&
                          table[i].scalar_type() == query.scalar_type() && together(table[i], query),
                      "capt::prompt_attention: tables must be [n, s, d] of the query's dtype, on its device");
      STD_TORCH_CHECK(index[i].dim() == 2 && index[i].size(0) == args.batch && index[i].size(1) == args.pairs &&
                          index[i].scalar_type() == ScalarType::Long && together(index[i], query),
                      "capt::prompt_attention: indices must be int64 [B, k] on the device of query");
      STD_TORCH_CHECK(args.pairs * table[i].size(1) < int64_t{1} << 31,
                      "capt::prompt_attention: an image must attend to fewer than 2^31 rows");
      args.stream[i].table = table[i].data_ptr();
      args.stream[i].index = longs(index[i]);
      args.stream[i].rows = table[i].size(0);
      args.stream[i].prompts = table[i].size(1);
    }
    if (log_prior_.has_value()) {
      log_prior = contiguous(*log_prior_);
      STD_TORCH_CHECK(log_prior->numel() == args.batch * args.pairs && log_prior->scalar_type() == ScalarType::Float &&
                          together(*log_prior, query),
                      "capt::prompt_attention: log_prior must be float32 [B, k] on the device of query");
      args.log_prior = floats(*log_prior);
    }
  }
};

Four gathered_cuda(const Tensor& query, const Tensor& commonality, const Tensor& difference,
                   const Tensor& commonality_index, const Tensor& difference_index, const OptionalTensor& log_prior,
                   double scale) {
  torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Gathered given(query, commonality, difference, commonality_index, difference_index, log_prior, scale);
  CaptPromptAttentionCuda& args = given.args;
  Tensor out[2], weight[2];
  for (int i = 0; i < 2; ++i) {
    out[i] = new_empty(query, {args.batch, args.dim});
    weight[i] = new_empty(query, {args.batch, args.pairs, args.stream[i].prompts}, ScalarType::Float);
    args.stream[i].out = out[i].data_ptr();
    args.stream[i].weight = floats(weight[i]);
  }
  check_cuda(capt_prompt_attention_cuda(&args, current_stream(query.get_device_index())), "capt::prompt_attention");
  return {out[0], out[1], weight[0], weight[1]};
}

Four gathered_backward_cuda(const Tensor& grad_commonality, const Tensor& grad_difference, const Tensor& query,
                            const Tensor& commonality, const Tensor& difference, const Tensor& commonality_index,
                            const Tensor& difference_index, const OptionalTensor& log_prior, double scale,
                            const Tensor& weight_commonality, const Tensor& weight_difference, bool need_query,
                            bool need_tables, bool need_prior) {
  torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Gathered given(query, commonality, difference, commonality_index, difference_index, log_prior, scale);
  CaptPromptAttentionCuda& args = given.args;
  const Tensor grad[2] = {contiguous(grad_commonality), contiguous(grad_difference)};
  const Tensor weight[2] = {contiguous(weight_commonality), contiguous(weight_difference)};
  Tensor table[2], ascending[2], order[2];
  for (int i = 0; i < 2; ++i) {
    CaptPromptStream& kind = args.stream[i];
    STD_TORCH_CHECK(
        grad[i].numel() == args.batch * args.dim && grad[i].scalar_type() == query.scalar_type() &&
            weight[i].numel() == args.batch * args.pairs * kind.prompts &&
            weight[i].scalar_type() == ScalarType::Float && together(grad[i], query) && together(weight[i], query),
        "capt::prompt_attention_backward: gradients and weights must be those of the forward call, on its device");
    kind.grad = grad[i].data_ptr();
    kind.weight = floats(weight[i]);
    table[i] = need_tables ? new_empty(query, {kind.rows, kind.prompts, args.dim}) : new_empty(query, {0});
    if (!need_tables) continue;
    std::tie(ascending[i], order[i]) = stable_sort(given.index[i]);
    kind.sorted = longs(ascending[i]);
    kind.order = longs(order[i]);
    kind.grad_table = table[i].data_ptr();
  }
  Tensor out_query = need_query ? new_empty(query, {args.batch, args.dim}) : new_empty(query, {0});
  Tensor out_prior = need_prior ? new_empty(query, {args.batch, args.pairs}, ScalarType::Float)
                                : new_empty(query, {0}, ScalarType::Float);
  if (need_query) args.grad_query = out_query.data_ptr();
  if (need_prior) args.grad_prior = floats(out_prior);
  const Tensor workspace = new_empty(query, {capt_prompt_attention_cuda_workspace(&args)}, ScalarType::Float);
  args.workspace = floats(workspace);
  check_cuda(capt_prompt_attention_backward_cuda(&args, current_stream(query.get_device_index())),
             "capt::prompt_attention_backward");
  return {out_query, table[0], table[1], out_prior};
}

// Inputs of the shared ops, held for the length of a call.
struct Shared {
  Tensor query[2], keys, values;
  CaptPromptAttentionSharedCuda args{};

  Shared(const Tensor& commonality_query, const Tensor& difference_query, const Tensor& keys_, const Tensor& values_,
         int64_t n_heads, double scale)
      : query{contiguous(commonality_query), contiguous(difference_query)},
        keys(channels_contiguous(keys_)),
        values(channels_contiguous(values_)) {
    STD_TORCH_CHECK(
        keys.dim() == 3 && values.dim() == 3 && keys.size(0) == values.size(0) && keys.size(1) == values.size(1) &&
            keys.size(2) == values.size(2) && keys.size(1) > 0 && keys.scalar_type() == values.scalar_type() &&
            together(values, keys),
        "capt::prompt_attention_shared: keys and values must have one shape [B, L, D], L >= 1, one dtype, one device");
    STD_TORCH_CHECK(n_heads > 0 && keys.size(2) % n_heads == 0, "capt::prompt_attention_shared: width ", keys.size(2),
                    " is not divisible by n_heads=", n_heads);
    args.keys = keys.data_ptr();
    args.values = values.data_ptr();
    args.batch = keys.size(0);
    args.length = keys.size(1);
    args.heads = n_heads;
    args.head_dim = keys.size(2) / n_heads;
    args.key_batch_stride = keys.stride(0);
    args.key_token_stride = keys.stride(1);
    args.value_batch_stride = values.stride(0);
    args.value_token_stride = values.stride(1);
    args.scale = static_cast<float>(scale);
    args.dtype = dtype_code(keys, "capt::prompt_attention_shared: keys");
    for (int i = 0; i < 2; ++i) {
      const int64_t axes = query[i].dim();
      STD_TORCH_CHECK(
          (axes == 2 || (axes == 3 && query[i].size(0) == args.batch)) && query[i].size(axes - 1) == keys.size(2) &&
              query[i].scalar_type() == keys.scalar_type() && together(query[i], keys),
          "capt::prompt_attention_shared: queries must be [R, D] or [B, R, D] of the dtype of keys, on its device");
      args.query[i].query = query[i].data_ptr();
      args.query[i].rows = query[i].size(axes - 2);
      args.query[i].per_image = axes == 3;
    }
  }
};

Four shared_cuda(const Tensor& commonality_query, const Tensor& difference_query, const Tensor& keys,
                 const Tensor& values, int64_t n_heads, double scale) {
  torch::stable::accelerator::DeviceGuard guard(keys.get_device_index());
  Shared given(commonality_query, difference_query, keys, values, n_heads, scale);
  CaptPromptAttentionSharedCuda& args = given.args;
  Tensor out[2], lse[2];
  for (int i = 0; i < 2; ++i) {
    out[i] = new_empty(keys, {args.batch, args.query[i].rows, keys.size(2)});
    lse[i] = new_empty(keys, {args.batch, args.heads, args.query[i].rows}, ScalarType::Float);
    args.query[i].out = out[i].data_ptr();
    args.query[i].lse = floats(lse[i]);
  }
  check_cuda(capt_prompt_attention_shared_cuda(&args, current_stream(keys.get_device_index())),
             "capt::prompt_attention_shared");
  return {out[0], out[1], lse[0], lse[1]};
}

Four shared_backward_cuda(const Tensor& grad_com, const Tensor& grad_diff, const Tensor& grad_lse_com,
                          const Tensor& grad_lse_diff, const Tensor& commonality_query, const Tensor& difference_query,
                          const Tensor& keys, const Tensor& values, const Tensor& out_com, const Tensor& out_diff,
                          const Tensor& lse_com, const Tensor& lse_diff, int64_t n_heads, double scale, bool need_query,
                          bool need_keys, bool need_values) {
  torch::stable::accelerator::DeviceGuard guard(keys.get_device_index());
  Shared given(commonality_query, difference_query, keys, values, n_heads, scale);
  CaptPromptAttentionSharedCuda& args = given.args;
  const Tensor grad[2] = {contiguous(grad_com), contiguous(grad_diff)};
  const Tensor grad_lse[2] = {contiguous(grad_lse_com), contiguous(grad_lse_diff)};
  const Tensor out[2] = {contiguous(out_com), contiguous(out_diff)};
  const Tensor lse[2] = {contiguous(lse_com), contiguous(lse_diff)};
  Tensor found[2];
  for (int i = 0; i < 2; ++i) {
    CaptSharedQuery& kind = args.query[i];
    const int64_t elements = args.batch * kind.rows * keys.size(2), numbers = args.batch * args.heads * kind.rows;
    STD_TORCH_CHECK(grad[i].numel() == elements && grad[i].scalar_type() == keys.scalar_type() &&
                        out[i].numel() == elements && out[i].scalar_type() == keys.scalar_type() &&
                        grad_lse[i].numel() == numbers && grad_lse[i].scalar_type() == ScalarType::Float &&
                        lse[i].numel() == numbers && lse[i].scalar_type() == ScalarType::Float &&
                        together(grad[i], keys) && together(out[i], keys) && together(grad_lse[i], keys) &&
                        together(lse[i], keys),
                    "capt::prompt_attention_shared_backward: gradients, outputs and log-sum-exps must be those of the "
                    "forward call, on its device");
    kind.grad = grad[i].data_ptr();
    kind.grad_lse = floats(grad_lse[i]);
    kind.out = out[i].data_ptr();
    kind.lse = floats(lse[i]);
    found[i] = need_query ? torch::stable::empty_like(given.query[i]) : new_empty(keys, {0});
    if (need_query) kind.grad_query = found[i].data_ptr();
  }
  const auto like_keys = [&](bool needed) {
    return needed ? new_empty(keys, {args.batch, args.length, keys.size(2)}) : new_empty(keys, {0});
  };
  Tensor out_keys = like_keys(need_keys), out_values = like_keys(need_values);
  if (need_keys) args.grad_keys = out_keys.data_ptr();
  if (need_values) args.grad_values = out_values.data_ptr();
  const Tensor workspace = new_empty(keys, {capt_prompt_attention_shared_cuda_workspace(&args)}, ScalarType::Float);
  args.workspace = floats(workspace);
  check_cuda(capt_prompt_attention_shared_backward_cuda(&args, current_stream(keys.get_device_index())),
             "capt::prompt_attention_shared_backward");
  return {found[0], found[1], out_keys, out_values};
}

}  // namespace
}  // namespace capt

STABLE_TORCH_LIBRARY_IMPL(capt, CUDA, library) {
  library.impl("prompt_attention", TORCH_BOX(&capt::gathered_cuda));
  library.impl("prompt_attention_backward", TORCH_BOX(&capt::gathered_backward_cuda));
  library.impl("prompt_attention_shared", TORCH_BOX(&capt::shared_cuda));
  library.impl("prompt_attention_shared_backward", TORCH_BOX(&capt::shared_backward_cuda));
}

#endif
