// Registration of capt::attention_readout (CPU). No arithmetic here.

#include "attention_readout.h"

#include <memory>
#include <optional>
#include <tuple>

#include "glue.h"

namespace capt {
namespace {

constexpr int64_t kNumbersPerTask = 1 << 16;  // values read; smaller pieces cost more to hand out than they take

// Channels must be a contiguous run; anything else is copied once.
Tensor runs(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) > 1 && tensor.stride(last) != 1 ? torch::stable::contiguous(tensor) : tensor;
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

bool is_shape(const Tensor& tensor, int64_t batch, int64_t length, int64_t heads, int64_t dim) {
  return tensor.dim() == 4 && tensor.size(0) == batch && tensor.size(1) == length && tensor.size(2) == heads &&
         tensor.size(3) == dim;
}

// Memory for `bytes`, aligned to whole cache lines.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : memory_(new char[static_cast<size_t>(bytes) + kLine]) {}
  void* data() const {
    void* place = memory_.get();
    size_t space = kLine + 1;
    return std::align(kLine, 1, place, space);
  }

 private:
  static constexpr size_t kLine = 64;
  std::unique_ptr<char[]> memory_;
};

std::tuple<Tensor, Tensor> readout_cpu(const Tensor& given_query, const Tensor& given_keys, const Tensor& given_values,
                                       const Tensor& given_groups, int64_t n_groups,
                                       const std::optional<Tensor>& given_bias, double scale) {
  STD_TORCH_CHECK(given_keys.dim() == 4 && n_groups >= 1,
                  "capt::attention_readout: keys must be [B, L, H, dh], n_groups at least 1");
  const int64_t batch = given_keys.size(0), length = given_keys.size(1), heads = given_keys.size(2);
  const int64_t dim = given_keys.size(3), last = given_query.dim() - 1;
  STD_TORCH_CHECK(is_shape(given_values, batch, length, heads, dim) && (last == 1 || last == 2) &&
                      given_query.size(last) == dim && given_query.size(last - 1) == heads &&
                      (last == 1 || given_query.size(0) == batch),
                  "capt::attention_readout: values must be [B, L, H, dh] and query [B, H, dh] or [H, dh]");
  STD_TORCH_CHECK(
      given_query.scalar_type() == given_keys.scalar_type() && given_values.scalar_type() == given_keys.scalar_type(),
      "capt::attention_readout: query, keys and values must have one dtype");
  const int64_t of_images = given_groups.dim() == 2 ? batch : 1;
  STD_TORCH_CHECK(given_groups.scalar_type() == ScalarType::Long &&
                      (given_groups.dim() == 1 || given_groups.dim() == 2) &&
                      given_groups.numel() == of_images * length && given_groups.size(given_groups.dim() - 1) == length,
                  "capt::attention_readout: groups must be int64 [L] or [B, L]");
  STD_TORCH_CHECK(!given_bias.has_value() ||
                      (given_bias->scalar_type() == ScalarType::Float && given_bias->dim() == 3 &&
                       (given_bias->size(1) == 1 || given_bias->size(1) == heads) && given_bias->size(2) == length),
                  "capt::attention_readout: bias must be float32 [M, H or 1, L]");
  const Tensor query = runs(given_query), keys = runs(given_keys), values = runs(given_values);
  const Tensor groups = dense(given_groups);
  std::optional<Tensor> bias;
  if (given_bias.has_value()) bias = dense(*given_bias);
  const int64_t variants = bias.has_value() ? bias->size(0) : 1;
  Tensor mean = torch::stable::new_empty(keys, {variants, batch, heads, n_groups, dim}, ScalarType::Float);
  Tensor log_mass = torch::stable::new_empty(keys, {variants, batch, heads, n_groups}, ScalarType::Float);
  const CaptAttentionReadout args{query.data_ptr(),
                                  keys.data_ptr(),
                                  values.data_ptr(),
                                  static_cast<const int64_t*>(groups.data_ptr()),
                                  bias.has_value() ? static_cast<const float*>(bias->data_ptr()) : nullptr,
                                  static_cast<float*>(mean.data_ptr()),
                                  static_cast<float*>(log_mass.data_ptr()),
                                  batch,
                                  length,
                                  heads,
                                  dim,
                                  n_groups,
                                  variants,
                                  bias.has_value() ? bias->size(1) : 1,
                                  last == 1 ? 0 : query.stride(0),
                                  query.stride(last - 1),
                                  keys.stride(0),
                                  keys.stride(1),
                                  keys.stride(2),
                                  values.stride(0),
                                  values.stride(1),
                                  values.stride(2),
                                  given_groups.dim() == 2 ? length : 0,
                                  static_cast<float>(scale),
                                  dtype_code(keys, "capt::attention_readout: keys")};
  if (log_mass.numel() == 0) return {mean, log_mass};
  const Buffer memory(capt_attention_readout_columns_bytes(&args));
  CaptReadoutColumns columns;
  STD_TORCH_CHECK(capt_attention_readout_columns(&args, capt_cpu_level(), memory.data(), &columns) == 0,
                  "capt::attention_readout: groups must lie in [0, n_groups)");
  const int64_t grain = kNumbersPerTask / (2 * length * dim + 1) + 1;
  torch::stable::parallel_for(0, batch * heads, grain, [&](int64_t begin, int64_t end) {
    const Buffer workspace(capt_attention_readout_workspace(&args));
    capt_attention_readout_cpu(&args, &columns, workspace.data(), capt_cpu_level(), begin, end);
  });
  return {mean, log_mass};
}

}  // namespace
}  // namespace capt

STABLE_TORCH_LIBRARY_FRAGMENT(capt, library) {
  library.def(
      "attention_readout(Tensor query, Tensor keys, Tensor values, Tensor groups, int n_groups, Tensor? bias, "
      "float scale) -> (Tensor mean, Tensor log_mass)");
}

STABLE_TORCH_LIBRARY_IMPL(capt, CPU, library) { library.impl("attention_readout", TORCH_BOX(&capt::readout_cpu)); }
