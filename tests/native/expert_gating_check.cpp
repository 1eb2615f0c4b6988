// Runs the kernels of expert_gating under the emulation with buffers of exact size, for the sanitizers, and compares
// the forward pass with nested loops. Built together with csrc/expert_gating.cu and csrc/expert_mix.cu.

#include <cmath>
#include <cstdio>
#include <vector>

#include "common/device.cuh"
#include "expert_gating_cuda.h"

namespace {

template <typename T>
std::vector<T> fill(int64_t count, int64_t salt) {
  std::vector<T> data(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    narrow(static_cast<float>((i * 37 + salt * 11 + i / 7) % 19 - 9) / 16.0f, data[static_cast<size_t>(i)]);
  }
  return data;
}

struct Shape {
  int64_t tokens, dim, hidden, experts, top_k;
};

template <typename T>
struct Layer {
  Shape s;
  int32_t dtype;
  std::vector<T> x, gate, w_in, b_in, w_out, b_out;
  std::vector<float> weights, probs, load;

  Layer(const Shape& shape, int32_t dtype_)
      : s(shape),
        dtype(dtype_),
        x(fill<T>(s.tokens * s.dim, 1)),
        gate(fill<T>(s.experts * s.dim, 2)),
        w_in(fill<T>(s.experts * s.hidden * s.dim, 3)),
        b_in(fill<T>(s.experts * s.hidden, 4)),
        w_out(fill<T>(s.experts * s.dim * s.hidden, 5)),
        b_out(fill<T>(s.experts * s.dim, 6)),
        weights(static_cast<size_t>(s.tokens * s.experts)),
        probs(weights.size()),
        load(static_cast<size_t>(s.experts)) {}

  bool route() {
    std::vector<int32_t> counter(static_cast<size_t>(s.experts + 1));
    CaptExpertRouterCuda args{};
    args.x = x.data();
    args.gate = gate.data();
    args.weights = weights.data();
    args.probs = probs.data();
    args.load = load.data();
    args.counter = counter.data();
    args.tokens = s.tokens;
    args.dim = s.dim;
    args.experts = s.experts;
    args.top_k = s.top_k;
    args.dtype = dtype;
    bool good = capt_expert_router_cuda(&args, nullptr) == 0;
    double used = 0.0;
    for (int64_t e = 0; e < s.experts; ++e) used += load[static_cast<size_t>(e)];
    return good && std::fabs(used - static_cast<double>(s.top_k)) < 1e-4;
  }

  // y against nested loops: the largest error.
  double mix(int32_t path, int32_t tile) {
    std::vector<T> y(x.size());
    CaptExpertMixCuda args{};
    args.x = x.data();
    args.weights = weights.data();
    args.w_in = w_in.data();
    args.b_in = b_in.data();
    args.w_out = w_out.data();
    args.b_out = b_out.data();
    args.y = y.data();
    args.tokens = s.tokens;
    args.dim = s.dim;
    args.hidden = s.hidden;
    args.experts = s.experts;
    args.path = path;
    args.tile = tile;
    args.dtype = dtype;
    std::vector<int64_t> workspace(static_cast<size_t>(capt_expert_mix_cuda_workspace(&args) / 8));
    args.workspace = workspace.data();
    if (capt_expert_mix_cuda(&args, nullptr) != 0) return 1e9;
    double worst = 0.0;
    for (int64_t n = 0; n < s.tokens; ++n) {
      std::vector<double> want(static_cast<size_t>(s.dim));
      for (int64_t e = 0; e < s.experts; ++e) {
        std::vector<double> hidden(static_cast<size_t>(s.hidden));
        for (int64_t h = 0; h < s.hidden; ++h) {
          double z = at(b_in, e * s.hidden + h);
          for (int64_t d = 0; d < s.dim; ++d) z += at(w_in, (e * s.hidden + h) * s.dim + d) * at(x, n * s.dim + d);
          hidden[static_cast<size_t>(h)] = z / (1.0 + std::exp(-1.702 * z));
        }
        for (int64_t d = 0; d < s.dim; ++d) {
          double out = at(b_out, e * s.dim + d);
          for (int64_t h = 0; h < s.hidden; ++h) {
            out += at(w_out, (e * s.dim + d) * s.hidden + h) * hidden[static_cast<size_t>(h)];
          }
          want[static_cast<size_t>(d)] += weights[static_cast<size_t>(n * s.experts + e)] * out;
        }
      }
      for (int64_t d = 0; d < s.dim; ++d) {
        const double wanted = want[static_cast<size_t>(d)];
        worst = std::fmax(worst, std::fabs(at(y, n * s.dim + d) - wanted) / (4.0 + std::fabs(wanted)));
      }
    }
    return worst;
  }

  // All kernels of the backward pass; their numbers are compared elsewhere.
  bool backward() {
    std::vector<T> z = fill<T>(s.tokens * s.experts * s.hidden, 7), g = fill<T>(s.tokens * s.experts * s.hidden, 8);
    std::vector<T> grad_x(x.size()), grad_gate(gate.size());
    std::vector<float> grad_weights(weights.size()), logits(weights.size());
    const int64_t bytes = capt_column_sums_cuda_workspace(s.tokens, s.experts, s.dim);
    std::vector<float> partial(static_cast<size_t>(bytes / 4));
    CaptExpertHiddenBackwardCuda middle{};
    middle.z = z.data();
    middle.g = g.data();
    middle.weights = weights.data();
    middle.b_in = b_in.data();
    middle.b_out = b_out.data();
    middle.grad_y = x.data();
    middle.grad_weights = grad_weights.data();
    middle.tokens = s.tokens;
    middle.dim = s.dim;
    middle.hidden = s.hidden;
    middle.experts = s.experts;
    middle.dropout = 0.5;
    middle.dtype = dtype;
    if (capt_expert_hidden_backward_cuda(&middle, nullptr) != 0) return false;
    CaptExpertRouterBackwardCuda args{};
    args.grad_weights = grad_weights.data();
    args.grad_probs = probs.data();
    args.weights = weights.data();
    args.probs = probs.data();
    args.x = x.data();
    args.gate = gate.data();
    args.grad_logits = logits.data();
    args.grad_x = grad_x.data();
    args.grad_gate = grad_gate.data();
    args.partial = partial.data();
    args.tokens = s.tokens;
    args.dim = s.dim;
    args.experts = s.experts;
    args.dtype = dtype;
    return capt_expert_router_backward_cuda(&args, nullptr) == 0;
  }

  static double at(const std::vector<T>& values, int64_t i) { return widen(values[static_cast<size_t>(i)]); }
};

template <typename T>
int check(const Shape& shape, int32_t dtype, double allowed) {
  Layer<T> layer(shape, dtype);
  if (!layer.route() || !layer.backward()) return -1;
  int cases = 0;
  for (const int32_t path : {CAPT_EXPERT_DENSE, CAPT_EXPERT_GATHER}) {
    const double worst = layer.mix(path, cases % 2 == 0 ? CAPT_EXPERT_SMALL : CAPT_EXPERT_LARGE);
    if (!(worst <= allowed)) {
      std::fprintf(stderr, "%ld tokens, dtype %d, path %d: off by %g\n", static_cast<long>(shape.tokens), dtype, path,
                   worst);
      return -1;
    }
    ++cases;
  }
  return cases;
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 1, 1, 1, 1}, {9, 7, 5, 3, 2}, {12, 16, 40, 5, 1}, {34, 24, 66, 2, 2}};
  int total = 0;
  for (const Shape& shape : shapes) {
    for (const int cases : {check<float>(shape, CAPT_FLOAT32, 1e-5), check<HalfBits>(shape, CAPT_FLOAT16, 2e-3),
                            check<BfloatBits>(shape, CAPT_BFLOAT16, 1.5e-2)}) {
      if (cases < 0) return 1;
      total += cases;
    }
  }
  std::printf("expert_gating: %d cases\n", total);
  return 0;
}
