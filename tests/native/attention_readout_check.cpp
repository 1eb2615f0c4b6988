// Runs the CPU kernel of attention_readout at one instruction-set level with buffers of exact size, for the sanitizers,
// and compares it with the definition in double. "overrun" gives values that are one short: the check itself is
// checked.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "attention_readout.h"
#include "attention_readout.simd.cpp"

namespace {

struct Sizes {
  int64_t batch, length, heads, dim, groups, variants, bias_heads;
};

float number(int64_t i) { return static_cast<float>((i * 37 + i / 11) % 61 - 30) / 16.0f; }

// Some equal, some -inf, and one variant with everything forbidden.
float bias_of(int64_t i, int64_t variant) {
  return variant == 4 || i % 13 == 5 ? -INFINITY : std::floor(3.0f * number(i));
}

template <typename T>
std::vector<T> filled(int64_t size, int64_t first) {
  std::vector<T> values(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) store_some(&values[static_cast<size_t>(i)], splat(number(i + first)), 1);
  return values;
}

template <typename T>
double wide(const std::vector<T>& values, int64_t at) {
  T lanes[kWidth] = {values[static_cast<size_t>(at)]};
  return load(lanes)[0];
}

bool close(double found, double want) {
  return found == want || std::fabs(found - want) <= 2e-5 * std::fabs(want) + 2e-5;
}

template <typename T>
int64_t check(const Sizes& s, int dtype, bool per_image, int64_t missing = 0) {
  const int64_t size = s.batch * s.length * s.heads * s.dim;
  std::vector<T> query = filled<T>(s.heads * s.dim, 3), keys = filled<T>(size, 11), values = filled<T>(size, 29);
  std::vector<int64_t> groups(static_cast<size_t>(per_image ? s.batch * s.length : s.length));
  for (size_t i = 0; i < groups.size(); ++i) groups[i] = static_cast<int64_t>(i * i / 3) % s.groups;
  std::vector<float> bias(static_cast<size_t>(s.variants * s.bias_heads * s.length));
  for (size_t i = 0; i < bias.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    bias[i] = bias_of(at, at / (s.bias_heads * s.length));
  }
  values.resize(static_cast<size_t>(size - missing));
  values.shrink_to_fit();
  const int64_t rows = s.variants * s.batch * s.heads * s.groups;
  std::vector<float> mean(static_cast<size_t>(rows * s.dim)), log_mass(static_cast<size_t>(rows));
  const int64_t token = s.heads * s.dim, image = s.length * token;
  const CaptAttentionReadout args{query.data(),
                                  keys.data(),
                                  values.data(),
                                  groups.data(),
                                  bias.data(),
                                  mean.data(),
                                  log_mass.data(),
                                  s.batch,
                                  s.length,
                                  s.heads,
                                  s.dim,
                                  s.groups,
                                  s.variants,
                                  s.bias_heads,
                                  0,
                                  s.dim,
                                  image,
                                  token,
                                  s.dim,
                                  image,
                                  token,
                                  s.dim,
                                  per_image ? s.length : 0,
                                  0.5f,
                                  dtype};
  std::vector<uint64_t> memory(static_cast<size_t>(capt_attention_readout_columns_bytes(&args) / 8));
  CaptReadoutColumns columns;
  if (capt_attention_readout_columns(&args, CAPT_BASELINE, memory.data(), &columns) != 0) return -1;
  std::vector<uint64_t> workspace(static_cast<size_t>(capt_attention_readout_workspace(&args) / 8));
  const int64_t tasks = s.batch * s.heads;
  if (capt_attention_readout_cpu(&args, &columns, workspace.data(), CAPT_BASELINE, 0, tasks) != 0) return -1;
  int64_t wrong = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t g = row % s.groups, h = row / s.groups % s.heads, b = row / s.groups / s.heads % s.batch;
    const int64_t m = row / s.groups / s.heads / s.batch;
    double mass = 0.0;
    std::vector<double> sums(static_cast<size_t>(s.dim));
    for (int64_t j = 0; j < s.length; ++j) {
      if (groups[static_cast<size_t>(per_image ? b * s.length + j : j)] != g) continue;
      const int64_t place = b * image + j * token + h * s.dim;
      double score = 0.0;
      for (int64_t c = 0; c < s.dim; ++c) score += wide(query, h * s.dim + c) * wide(keys, place + c);
      const int64_t bias_head = s.bias_heads > 1 ? h : 0;
      const double weight =
          std::exp(0.5 * score + bias[static_cast<size_t>((m * s.bias_heads + bias_head) * s.length + j)]);
      mass += weight;
      for (int64_t c = 0; c < s.dim; ++c) sums[static_cast<size_t>(c)] += weight * wide(values, place + c);
    }
    wrong += !close(log_mass[static_cast<size_t>(row)], std::log(mass));
    for (int64_t c = 0; c < s.dim; ++c) {
      const double want = mass > 0 ? sums[static_cast<size_t>(c)] / mass : 0.0;
      wrong += !close(mean[static_cast<size_t>(row * s.dim + c)], want);
    }
  }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "overrun") == 0) {
    return check<float>({1, 9, 1, 17, 2, 3, 1}, CAPT_FLOAT32, false, 1) != 0;
  }
  const Sizes sizes[] = {{1, 1, 1, 1, 1, 1, 1},    {2, 5, 2, 3, 3, 1, 2},    {1, 33, 2, 17, 4, 7, 1},
                         {2, 16, 3, 40, 2, 13, 3}, {1, 50, 1, 72, 16, 6, 1}, {1, 21, 2, 136, 2, 5, 2}};
  int cases = 0;
  for (const Sizes& s : sizes) {
    for (const bool per_image : {false, true}) {
      const int64_t wrong[] = {check<float>(s, CAPT_FLOAT32, per_image), check<Half>(s, CAPT_FLOAT16, per_image),
                               check<Bfloat>(s, CAPT_BFLOAT16, per_image)};
      for (const int64_t count : wrong) {
        if (count != 0) {
          std::fprintf(stderr, "length %ld dim %ld variants %ld: %ld wrong\n", static_cast<long>(s.length),
                       static_cast<long>(s.dim), static_cast<long>(s.variants), static_cast<long>(count));
          return 1;
        }
        ++cases;
      }
    }
  }
  std::printf("attention_readout: %d cases\n", cases);
  return 0;
}
