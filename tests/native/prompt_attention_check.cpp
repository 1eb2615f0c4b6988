// Runs the CUDA kernels of prompt attention under the emulation with buffers of exact size, for the sanitizers, and
// compares them with nested loops in float64.

#include <cmath>
#include <cstdio>
#include <vector>

#include "common/device.cuh"
#include "prompt_attention_cuda.h"

namespace {

using Doubles = std::vector<double>;

float value(int64_t i, int64_t salt) { return static_cast<float>((i * 37 + salt * 11) % 23 - 11) / 8.0f; }

template <typename T>
std::vector<T> fill(int64_t count, int64_t salt) {
  std::vector<T> data(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) narrow(value(i, salt), data[static_cast<size_t>(i)]);
  return data;
}

// Largest difference between results and what is expected of them.
template <typename T>
double off(const std::vector<T>& found, const Doubles& expected) {
  double worst = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(widen(found[i])) - expected[i]);
    worst = difference <= worst ? worst : difference;
    if (difference != difference) return 1e9;
  }
  return worst;
}

double larger(double a, double b) { return a > b ? a : b; }

// One softmax attention: rows [count, width] weighted for a query; gradients of query, rows and scores.
struct Attention {
  Doubles weight, out, grad_query, grad_keys, grad_values, grad_score;
  double lse;

  template <typename Key, typename Value>
  Attention(int64_t count, int64_t width, double scale, const Doubles& query, const Doubles& prior, const Doubles& grad,
            double grad_lse, Key key, Value val)
      : weight(static_cast<size_t>(count)),
        out(static_cast<size_t>(width)),
        grad_query(static_cast<size_t>(width)),
        grad_keys(static_cast<size_t>(count * width)),
        grad_values(static_cast<size_t>(count * width)),
        grad_score(static_cast<size_t>(count)) {
    double total = 0.0, mean = 0.0;
    for (int64_t r = 0; r < count; ++r) {
      double score = 0.0;
      for (int64_t c = 0; c < width; ++c) score += query[static_cast<size_t>(c)] * key(r, c);
      weight[static_cast<size_t>(r)] = std::exp(scale * score + prior[static_cast<size_t>(r)]);
      total += weight[static_cast<size_t>(r)];
    }
    lse = std::log(total);
    Doubles along(static_cast<size_t>(count));
    for (int64_t r = 0; r < count; ++r) {
      const auto i = static_cast<size_t>(r);
      weight[i] = total > 0.0 ? weight[i] / total : 0.0;
      for (int64_t c = 0; c < width; ++c) {
        out[static_cast<size_t>(c)] += weight[i] * val(r, c);
        along[i] += grad[static_cast<size_t>(c)] * val(r, c);
      }
      mean += weight[i] * along[i];
    }
    for (int64_t r = 0; r < count; ++r) {
      const auto i = static_cast<size_t>(r);
      grad_score[i] = weight[i] * (along[i] - mean + grad_lse);
      for (int64_t c = 0; c < width; ++c) {
        const auto j = static_cast<size_t>(c), both = static_cast<size_t>(r * width + c);
        grad_query[j] += scale * grad_score[i] * key(r, c);
        grad_keys[both] = scale * grad_score[i] * query[j];
        grad_values[both] = weight[i] * grad[j];
      }
    }
  }
};

template <typename T>
Doubles part(const std::vector<T>& data, int64_t first, int64_t count) {
  Doubles found;
  for (int64_t i = first; i < first + count; ++i) found.push_back(widen(data[static_cast<size_t>(i)]));
  return found;
}

void add(Doubles& into, int64_t first, const Doubles& value, int64_t from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) into[static_cast<size_t>(first + i)] += value[static_cast<size_t>(from + i)];
}

struct GatheredShape {
  int64_t batch, pairs, dim, rows, prompts[2];
};

template <typename T>
double check_gathered(const GatheredShape& s, int dtype) {
  const float scale = 0.25f;
  const auto query = fill<T>(s.batch * s.dim, 1);
  const auto prior = fill<float>(s.batch * s.pairs, 2);
  std::vector<T> grad_query(query.size());
  std::vector<float> grad_prior(prior.size()), workspace;
  Doubles want_query(query.size()), want_prior(prior.size());
  CaptPromptAttentionCuda args{};
  args.query = query.data();
  args.log_prior = prior.data();
  args.batch = s.batch;
  args.pairs = s.pairs;
  args.dim = s.dim;
  args.scale = scale;
  args.dtype = dtype;
  args.grad_query = grad_query.data();
  args.grad_prior = grad_prior.data();
  std::vector<T> table[2], out[2], grad[2], grad_table[2];
  std::vector<int64_t> index[2], sorted[2], order[2];
  std::vector<float> weight[2];
  Doubles want_out[2], want_weight[2], want_table[2];
  for (int k = 0; k < 2; ++k) {
    const int64_t n = s.pairs * s.prompts[k], size = s.prompts[k] * s.dim;
    table[k] = fill<T>(s.rows * size, 3 + k);
    out[k].resize(query.size());
    grad[k] = fill<T>(s.batch * s.dim, 5 + k);
    grad_table[k].resize(table[k].size());
    weight[k].resize(static_cast<size_t>(s.batch * n));
    want_out[k].resize(query.size());
    want_weight[k].resize(weight[k].size());
    want_table[k].resize(table[k].size());
    for (int64_t e = 0; e < s.batch * s.pairs; ++e) index[k].push_back((e * 5 + k) % (s.rows + 1) - 1);
    for (int64_t t = -1; t < s.rows; ++t) {
      for (int64_t e = 0; e < s.batch * s.pairs; ++e) {
        if (index[k][static_cast<size_t>(e)] != t) continue;
        sorted[k].push_back(t);
        order[k].push_back(e);
      }
    }
    args.stream[k] = {table[k].data(),  index[k].data(), weight[k].data(),     out[k].data(), grad[k].data(),
                      sorted[k].data(), order[k].data(), grad_table[k].data(), s.rows,        s.prompts[k]};
    for (int64_t b = 0; b < s.batch; ++b) {
      const auto table_row = [&](int64_t r) { return index[k][static_cast<size_t>(b * s.pairs + r / s.prompts[k])]; };
      const auto row = [&](int64_t r, int64_t c) {
        const int64_t t = table_row(r);
        const auto at = static_cast<size_t>((t * s.prompts[k] + r % s.prompts[k]) * s.dim + c);
        return t < 0 ? 0.0 : static_cast<double>(widen(table[k][at]));
      };
      Doubles bias;
      for (int64_t r = 0; r < n; ++r) {
        bias.push_back(table_row(r) < 0 ? -INFINITY : prior[static_cast<size_t>(b * s.pairs + r / s.prompts[k])]);
      }
      const auto q = part(query, b * s.dim, s.dim), g = part(grad[k], b * s.dim, s.dim);
      const Attention found(n, s.dim, scale, q, bias, g, 0.0, row, row);
      add(want_out[k], b * s.dim, found.out, 0, s.dim);
      add(want_weight[k], b * n, found.weight, 0, n);
      add(want_query, b * s.dim, found.grad_query, 0, s.dim);
      for (int64_t r = 0; r < n; ++r) {
        const int64_t t = table_row(r), at = (t * s.prompts[k] + r % s.prompts[k]) * s.dim;
        if (t < 0) continue;
        add(want_prior, b * s.pairs + r / s.prompts[k], found.grad_score, r, 1);
        add(want_table[k], at, found.grad_keys, r * s.dim, s.dim);
        add(want_table[k], at, found.grad_values, r * s.dim, s.dim);
      }
    }
  }
  workspace.resize(static_cast<size_t>(capt_prompt_attention_cuda_workspace(&args)));
  args.workspace = workspace.data();
  if (capt_prompt_attention_cuda(&args, nullptr) != 0) return 1e9;
  if (capt_prompt_attention_backward_cuda(&args, nullptr) != 0) return 1e9;
  double worst = larger(off(grad_query, want_query), off(grad_prior, want_prior));
  for (int k = 0; k < 2; ++k) {
    worst = larger(worst, larger(off(out[k], want_out[k]), off(weight[k], want_weight[k])));
    worst = larger(worst, off(grad_table[k], want_table[k]));
  }
  return worst;
}

struct SharedShape {
  int64_t batch, length, heads, head_dim, rows[2], per_image[2];
};

template <typename T>
double check_shared(const SharedShape& s, int dtype) {
  const float scale = 0.125f;
  const int64_t width = s.heads * s.head_dim, all = s.batch * s.length * width;
  const auto keys = fill<T>(all, 1), values = fill<T>(all, 2);
  std::vector<T> grad_keys(keys.size()), grad_values(keys.size());
  Doubles want_keys(keys.size()), want_values(keys.size());
  CaptPromptAttentionSharedCuda args{};
  args.keys = keys.data();
  args.values = values.data();
  args.grad_keys = grad_keys.data();
  args.grad_values = grad_values.data();
  args.batch = s.batch;
  args.length = s.length;
  args.heads = s.heads;
  args.head_dim = s.head_dim;
  args.key_batch_stride = args.value_batch_stride = s.length * width;
  args.key_token_stride = args.value_token_stride = width;
  args.scale = scale;
  args.dtype = dtype;
  std::vector<T> query[2], out[2], grad[2], grad_query[2];
  std::vector<float> lse[2], grad_lse[2];
  Doubles want_out[2], want_lse[2], want_query[2];
  for (int k = 0; k < 2; ++k) {
    const int64_t own = s.per_image[k] != 0 ? s.batch : 1, numbers = s.batch * s.heads * s.rows[k];
    query[k] = fill<T>(own * s.rows[k] * width, 3 + k);
    grad_query[k].resize(query[k].size());
    out[k].resize(static_cast<size_t>(s.batch * s.rows[k] * width));
    grad[k] = fill<T>(s.batch * s.rows[k] * width, 5 + k);
    lse[k].resize(static_cast<size_t>(numbers));
    grad_lse[k] = fill<float>(numbers, 7 + k);
    want_out[k].resize(out[k].size());
    want_lse[k].resize(lse[k].size());
    want_query[k].resize(query[k].size());
    args.query[k] = {query[k].data(),    out[k].data(),        lse[k].data(), grad[k].data(),
                     grad_lse[k].data(), grad_query[k].data(), s.rows[k],     static_cast<int32_t>(s.per_image[k])};
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t h = 0; h < s.heads; ++h) {
        const int64_t base = b * s.length * width + h * s.head_dim;
        const auto key = [&](int64_t l, int64_t c) { return widen(keys[static_cast<size_t>(base + l * width + c)]); };
        const auto val = [&](int64_t l, int64_t c) { return widen(values[static_cast<size_t>(base + l * width + c)]); };
        for (int64_t r = 0; r < s.rows[k]; ++r) {
          const int64_t dense = (b * s.rows[k] + r) * width + h * s.head_dim;
          const int64_t number = (b * s.heads + h) * s.rows[k] + r;
          const int64_t place = ((s.per_image[k] != 0 ? b : 0) * s.rows[k] + r) * width + h * s.head_dim;
          const Doubles none(static_cast<size_t>(s.length));
          const auto q = part(query[k], place, s.head_dim), g = part(grad[k], dense, s.head_dim);
          const Attention found(s.length, s.head_dim, scale, q, none, g, grad_lse[k][static_cast<size_t>(number)], key,
                                val);
          add(want_out[k], dense, found.out, 0, s.head_dim);
          want_lse[k][static_cast<size_t>(number)] = found.lse;
          add(want_query[k], place, found.grad_query, 0, s.head_dim);
          for (int64_t l = 0; l < s.length; ++l) {
            add(want_keys, base + l * width, found.grad_keys, l * s.head_dim, s.head_dim);
            add(want_values, base + l * width, found.grad_values, l * s.head_dim, s.head_dim);
          }
        }
      }
    }
  }
  std::vector<float> workspace(static_cast<size_t>(capt_prompt_attention_shared_cuda_workspace(&args)));
  args.workspace = workspace.data();
  if (capt_prompt_attention_shared_cuda(&args, nullptr) != 0) return 1e9;
  if (capt_prompt_attention_shared_backward_cuda(&args, nullptr) != 0) return 1e9;
  double worst = larger(off(grad_keys, want_keys), off(grad_values, want_values));
  for (int k = 0; k < 2; ++k) {
    worst = larger(worst, larger(off(out[k], want_out[k]), off(lse[k], want_lse[k])));
    worst = larger(worst, off(grad_query[k], want_query[k]));
  }
  return worst;
}

}  // namespace

int main() {
  const GatheredShape gathered[] = {{1, 1, 1, 1, {1, 1}}, {2, 3, 24, 2, {5, 1}},  {3, 2, 7, 4, {2, 3}},
                                    {1, 0, 8, 2, {1, 2}}, {2, 4, 16, 1, {0, 40}}, {1, 30, 136, 9, {5, 3}}};
  const SharedShape shared[] = {{1, 1, 1, 1, {1, 1}, {0, 0}},     {2, 5, 2, 20, {3, 0}, {0, 1}},
                                {2, 17, 2, 16, {6, 20}, {0, 1}},  {1, 70, 1, 80, {20, 50}, {1, 0}},
                                {1, 270, 1, 64, {5, 13}, {0, 0}}, {1, 3, 1, 136, {66, 1}, {0, 0}}};
  int cases = 0;
  const auto judge = [&](double worst, double limit, const char* op, size_t shape) {
    ++cases;
    if (worst <= limit) return true;
    std::fprintf(stderr, "%s, shape %zu: off by %g, allowed %g\n", op, shape, worst, limit);
    return false;
  };
  // Values are below 1.4, sums of them below 60: limits are a few rounding steps of the storage at such sizes.
  const double limits[] = {2e-4, 0.06, 0.5};
  bool good = true;
  for (size_t i = 0; i < sizeof gathered / sizeof *gathered; ++i) {
    good = judge(check_gathered<float>(gathered[i], CAPT_FLOAT32), limits[0], "gathered float32", i) && good;
    good = judge(check_gathered<HalfBits>(gathered[i], CAPT_FLOAT16), limits[1], "gathered float16", i) && good;
    good = judge(check_gathered<BfloatBits>(gathered[i], CAPT_BFLOAT16), limits[2], "gathered bfloat16", i) && good;
  }
  for (size_t i = 0; i < sizeof shared / sizeof *shared; ++i) {
    good = judge(check_shared<float>(shared[i], CAPT_FLOAT32), limits[0], "shared float32", i) && good;
    good = judge(check_shared<HalfBits>(shared[i], CAPT_FLOAT16), limits[1], "shared float16", i) && good;
    good = judge(check_shared<BfloatBits>(shared[i], CAPT_BFLOAT16), limits[2], "shared bfloat16", i) && good;
  }
  std::printf("prompt_attention: %d cases\n", cases);
  return good ? 0 : 1;
}
