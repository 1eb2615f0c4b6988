// csrc/torch/expert_gating_cuda.cpp for tensors of the CPU, on top of the emulated kernels: the registration that a GPU
// uses, as capt_emulated::expert_router and so on.

#define CAPT_WITH_CUDA
#define capt capt_emulated
#include "torch/glue.h"

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

namespace capt {
void* current_stream(int32_t) { return nullptr; }
void check_cuda(int error, const char* op) { STD_TORCH_CHECK(error == 0, op, " failed"); }
}  // namespace capt

#define DeviceGuard NoGuard
#define CUDA CPU
#include "torch/expert_gating_cuda.cpp"

STABLE_TORCH_LIBRARY_FRAGMENT(capt, library) {
  library.def("expert_router(Tensor x, Tensor gate, int top_k) -> (Tensor weights, Tensor probs, Tensor load)");
  library.def(
      "expert_router_backward(Tensor grad_weights, Tensor grad_probs, Tensor weights, Tensor probs, Tensor x, "
      "Tensor gate, bool need_x, bool need_gate) -> (Tensor, Tensor)");
  library.def(
      "expert_mix(Tensor x, Tensor weights, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, float dropout, "
      "int seed) -> Tensor");
  library.def(
      "expert_mix_backward(Tensor x, Tensor weights, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, "
      "float dropout, int seed, Tensor grad_y, bool need_x, bool need_weights, bool need_w_in, bool need_b_in, "
      "bool need_w_out, bool need_b_out) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
