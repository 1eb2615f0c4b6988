// Registration of capt::prompt_attention_shared and its backward on the CPU. No arithmetic here.

#include "prompt_attention_shared.h"

#include <tuple>

#include "glue.h"

namespace capt {
namespace {

using torch::stable::new_empty;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// Channels must be a contiguous run; anything else is copied once.
Tensor runs(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) > 1 && tensor.stride(last) != 1 ? torch::stable::contiguous(tensor) : tensor;
}

// Inputs with contiguous channels, held for the length of a call.
struct Inputs {
  Tensor query[2], keys, values;

  Inputs(const Tensor& commonality, const Tensor& difference, const Tensor& keys, const Tensor& values)
      : query{runs(commonality), runs(difference)}, keys(runs(keys)), values(runs(values)) {}

  CaptSharedAttention arguments(int64_t n_heads, double scale) const {
    STD_TORCH_CHECK(keys.dim() == 3 && values.dim() == 3 && values.size(0) == keys.size(0) &&
                        values.size(1) == keys.size(1) && values.size(2) == keys.size(2) && keys.size(1) > 0 &&
                        values.scalar_type() == keys.scalar_type(),
                    "capt::prompt_attention_shared: keys and values must be [B, L, D] of one dtype with L >= 1");
    CaptSharedAttention args{};
    args.keys = keys.data_ptr();
    args.values = values.data_ptr();
    args.batch = keys.size(0);
    args.n_keys = keys.size(1);
    args.dim = keys.size(2);
    args.n_heads = n_heads;
    STD_TORCH_CHECK(n_heads > 0 && args.dim % n_heads == 0,
                    "capt::prompt_attention_shared: the width must be divisible by n_heads");
    args.key_batch_stride = keys.stride(0);
    args.key_row_stride = keys.stride(1);
    args.value_batch_stride = values.stride(0);
    args.value_row_stride = values.stride(1);
    args.scale = static_cast<float>(scale);
    args.dtype = dtype_code(keys, "capt::prompt_attention_shared: keys");
    for (int i = 0; i < 2; ++i) {
      const int64_t dims = query[i].dim();
      STD_TORCH_CHECK((dims == 2 || (dims == 3 && query[i].size(0) == args.batch)) &&
                          query[i].size(dims - 1) == args.dim && query[i].scalar_type() == keys.scalar_type(),
                      "capt::prompt_attention_shared: queries must be [R, D] or [B, R, D] of the dtype of keys");
      args.query[i] = query[i].data_ptr();
      args.rows[i] = query[i].size(dims - 2);
      args.query_batch_stride[i] = dims == 2 ? 0 : query[i].stride(0);
      args.query_row_stride[i] = query[i].stride(dims - 2);
    }
    return args;
  }
};

// Runs tasks on torch's threads and reports the first failure.
template <typename Kernel>
void run_tasks(int64_t tasks, const Kernel& kernel) {
  int failure = 0;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const int status = kernel(begin, end);
    if (status != 0) __atomic_store_n(&failure, status, __ATOMIC_RELAXED);
  });
  STD_TORCH_CHECK(failure == 0, "capt::prompt_attention_shared: no memory for the packed keys of a head");
}

Four attention_cpu(const Tensor& commonality, const Tensor& difference, const Tensor& keys, const Tensor& values,
                   int64_t n_heads, double scale) {
  const Inputs inputs(commonality, difference, keys, values);
  CaptSharedAttention args = inputs.arguments(n_heads, scale);
  Tensor out[2], lse[2];
  for (int i = 0; i < 2; ++i) {
    out[i] = new_empty(keys, {args.batch, args.rows[i], args.dim});
    lse[i] = new_empty(keys, {args.batch, n_heads, args.rows[i]}, ScalarType::Float);
    args.out[i] = out[i].data_ptr();
    args.lse[i] = static_cast<float*>(lse[i].data_ptr());
  }
  run_tasks(capt_prompt_attention_shared_tasks(&args), [&](int64_t begin, int64_t end) {
    return capt_prompt_attention_shared_cpu(&args, capt_cpu_level(), begin, end);
  });
  return {out[0], out[1], lse[0], lse[1]};
}

Four attention_backward_cpu(const Tensor& grad_com, const Tensor& grad_diff, const Tensor& grad_lse_com,
                            const Tensor& grad_lse_diff, const Tensor& commonality, const Tensor& difference,
                            const Tensor& keys, const Tensor& values, const Tensor& out_com, const Tensor& out_diff,
                            const Tensor& lse_com, const Tensor& lse_diff, int64_t n_heads, double scale,
                            bool need_query, bool need_keys, bool need_values) {
  const Inputs inputs(commonality, difference, keys, values);
  const Tensor grad[2] = {dense(grad_com), dense(grad_diff)};
  const Tensor grad_lse[2] = {dense(grad_lse_com), dense(grad_lse_diff)};
  const Tensor out[2] = {dense(out_com), dense(out_diff)};
  const Tensor lse[2] = {dense(lse_com), dense(lse_diff)};
  CaptSharedAttentionBackward args{};
  args.forward = inputs.arguments(n_heads, scale);
  CaptSharedAttention& given = args.forward;
  Tensor out_query[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t entries = given.batch * given.rows[i] * given.dim;
    const int64_t statistics = given.batch * n_heads * given.rows[i];
    STD_TORCH_CHECK(grad[i].numel() == entries && out[i].numel() == entries && lse[i].numel() == statistics &&
                        grad_lse[i].numel() == statistics && grad[i].scalar_type() == keys.scalar_type() &&
                        out[i].scalar_type() == keys.scalar_type() && lse[i].scalar_type() == ScalarType::Float &&
                        grad_lse[i].scalar_type() == ScalarType::Float,
                    "capt::prompt_attention_shared_backward: results and gradients must be those of the forward call");
    args.grad[i] = grad[i].data_ptr();
    args.grad_lse[i] = static_cast<const float*>(grad_lse[i].data_ptr());
    given.out[i] = out[i].data_ptr();
    given.lse[i] = static_cast<float*>(lse[i].data_ptr());
    const Tensor& query = inputs.query[i];
    args.sums_images[i] = query.dim() == 2;
    if (!need_query) {
      out_query[i] = new_empty(keys, {0});
    } else if (query.dim() == 2) {
      out_query[i] = new_empty(keys, {given.rows[i], given.dim});
    } else {
      out_query[i] = new_empty(keys, {given.batch, given.rows[i], given.dim});
    }
    args.grad_query[i] = need_query ? out_query[i].data_ptr() : nullptr;
  }
  Tensor out_keys = need_keys ? new_empty(keys, {given.batch, given.n_keys, given.dim}) : new_empty(keys, {0});
  Tensor out_values = need_values ? new_empty(keys, {given.batch, given.n_keys, given.dim}) : new_empty(keys, {0});
  args.grad_keys = need_keys ? out_keys.data_ptr() : nullptr;
  args.grad_values = need_values ? out_values.data_ptr() : nullptr;
  const int64_t groups = capt_prompt_attention_shared_groups(&args);
  Tensor partial[2];
  for (int i = 0; i < 2; ++i) {
    if (!need_query || !args.sums_images[i]) continue;
    partial[i] = new_empty(keys, {groups, given.rows[i], given.dim}, ScalarType::Float);
    args.partial[i] = static_cast<float*>(partial[i].data_ptr());
  }
  run_tasks(capt_prompt_attention_shared_backward_tasks(&args), [&](int64_t begin, int64_t end) {
    return capt_prompt_attention_shared_backward_cpu(&args, capt_cpu_level(), begin, end);
  });
  run_tasks(capt_prompt_attention_shared_reduce_tasks(&args), [&](int64_t begin, int64_t end) {
    return capt_prompt_attention_shared_reduce_cpu(&args, capt_cpu_level(), begin, end);
  });
  return {out_query[0], out_query[1], out_keys, out_values};
}

}  // namespace
}  // namespace capt

STABLE_TORCH_LIBRARY_IMPL(capt, CPU, library) {
  library.impl("prompt_attention_shared", TORCH_BOX(&capt::attention_cpu));
  library.impl("prompt_attention_shared_backward", TORCH_BOX(&capt::attention_backward_cpu));
}
