// Runs the CUDA kernels under the emulation with buffers of exact size, for the sanitizers, and compares them with
// nested loops. "overrun" and "divergence" break the rules on purpose: the checks themselves are checked.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "grid_adapter.cu"

namespace {

float value(int64_t i) { return static_cast<float>((i * 37) % 19 - 9) / 8.0f; }

template <typename T>
std::vector<T> fill(int64_t count) {
  std::vector<T> data(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) narrow(value(i), data[static_cast<size_t>(i)]);
  return data;
}

struct Shape {
  int64_t batch, height, width, dim, prefix, suffix;
};

// Neighbour of cell (y, x) through tap t, or zero outside the grid.
template <typename T>
float neighbour(const std::vector<T>& tokens, const Shape& s, int64_t length, int64_t b, int64_t y, int64_t x, int t,
                int64_t c) {
  const int64_t row = y + t / 3 - 1, column = x + t % 3 - 1;
  if (row < 0 || row >= s.height || column < 0 || column >= s.width) return 0.0f;
  return widen(tokens[static_cast<size_t>((b * length + s.prefix + row * s.width + column) * s.dim + c)]);
}

template <typename T>
double check(const Shape& s, int dtype) {
  const int64_t length = s.prefix + s.height * s.width + s.suffix;
  const int64_t count = s.batch * length * s.dim;
  const auto tokens = fill<T>(count), grad = fill<T>(count);
  const auto weight = fill<float>(s.dim * 9);
  std::vector<T> out(static_cast<size_t>(count));
  std::vector<float> partial(static_cast<size_t>(s.batch * 9 * s.dim));
  const CaptGridAdapter forward{
      tokens.data(), weight.data(), nullptr,        out.data(), s.batch, length, s.dim, s.height,
      s.width,       s.prefix,      length * s.dim, s.dim,      0,       0.5f,   0,     dtype};
  const CaptGridCorrelate backward{tokens.data(), grad.data(), partial.data(), s.batch, length,         s.dim, s.height,
                                   s.width,       s.prefix,    length * s.dim, s.dim,   length * s.dim, s.dim, dtype};
  if (capt_grid_adapter_cuda(&forward, nullptr) != 0 || capt_grid_correlate_cuda(&backward, nullptr) != 0) return 1e9;
  double worst = 0.0;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t c = 0; c < s.dim; ++c) {
      double sums[9] = {};
      for (int64_t y = 0; y < s.height; ++y) {
        for (int64_t x = 0; x < s.width; ++x) {
          const auto at = static_cast<size_t>((b * length + s.prefix + y * s.width + x) * s.dim + c);
          double mixed = 0.0;
          for (int t = 0; t < 9; ++t) {
            const double v = neighbour(tokens, s, length, b, y, x, t, c);
            mixed += v * weight[static_cast<size_t>(c * 9 + t)];
            sums[t] += v * widen(grad[at]);
          }
          T rounded;
          narrow(static_cast<float>(widen(tokens[at]) + 0.5 * mixed), rounded);
          worst = std::fmax(worst, std::fabs(widen(out[at]) - widen(rounded)));
        }
      }
      for (int t = 0; t < 9; ++t) {
        worst = std::fmax(worst, std::fabs(partial[static_cast<size_t>((b * 9 + t) * s.dim + c)] - sums[t]));
      }
    }
  }
  return worst;
}

__global__ void divergent_kernel() {
  if (threadIdx.x < 3) __syncthreads();
}

int overrun() {
  const auto tokens = fill<float>(4 * 8 - 1);  // one element short
  const auto weight = fill<float>(8 * 9);
  std::vector<float> out(4 * 8);
  const CaptGridAdapter args{tokens.data(), weight.data(), nullptr, out.data(), 1, 4, 8, 2, 2, 0, 32, 8, 0, 1, 0, 0};
  return capt_grid_adapter_cuda(&args, nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "overrun") == 0) return overrun();
  if (argc > 1 && std::strcmp(argv[1], "divergence") == 0) {
    CAPT_LAUNCH(divergent_kernel, dim3(1), dim3(8), nullptr);
    return 0;
  }
  const Shape shapes[] = {{1, 1, 1, 1, 0, 0},  {2, 1, 5, 4, 1, 0},    {1, 5, 1, 7, 0, 2},
                          {2, 3, 4, 36, 2, 1}, {1, 9, 10, 131, 1, 0}, {2, 17, 2, 128, 1, 3}};
  int cases = 0;
  for (const Shape& shape : shapes) {
    // Values are multiples of 1/8 and sums are short: float32 is exact, 16-bit storage rounds as computed above.
    for (const double worst : {check<float>(shape, CAPT_FLOAT32), check<HalfBits>(shape, CAPT_FLOAT16),
                               check<BfloatBits>(shape, CAPT_BFLOAT16)}) {
      if (!(worst == 0.0)) {
        std::fprintf(stderr, "grid %ldx%ld dim %ld: off by %g\n", static_cast<long>(shape.height),
                     static_cast<long>(shape.width), static_cast<long>(shape.dim), worst);
        return 1;
      }
      ++cases;
    }
  }
  std::printf("grid_adapter: %d cases\n", cases);
  return 0;
}
