// Runs the CPU kernel of pair_frontier at one instruction-set level with buffers of exact size, for the sanitizers, and
// compares it with nested loops. "overrun" gives scores that are one short: the check itself is checked.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "pair_frontier.h"
#include "pair_frontier.simd.cpp"

namespace {

struct Shape {
  int64_t batch, pairs, groups, states, objects;  // states 0: no term
};

// Small integers, many ties; some are NaN or infinite.
float value(int64_t i) {
  if (i % 19 == 7) return NAN;
  if (i % 23 == 5) return i % 2 == 0 ? INFINITY : -INFINITY;
  return static_cast<float>((i * 37 + i / 11) % 5 - 2);
}

float wide(float number) { return number; }
float wide(Half number) {
  Half lanes[kWidth] = {number};
  return load(lanes)[0];
}
float wide(Bfloat number) {
  Bfloat lanes[kWidth] = {number};
  return load(lanes)[0];
}

template <typename T>
std::vector<T> fill(int64_t count, int64_t from) {
  std::vector<T> data(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) store_some(&data[static_cast<size_t>(i)], splat(value(i + from)), 1);
  return data;
}

// Wrong entries, or -1 for an error code. The second half of the pairs is folded before the first.
template <typename T, typename R>
int64_t check(const Shape& s, int dtype, int64_t missing = 0) {
  const bool term = s.states > 0;
  auto scores = fill<T>(s.batch * s.pairs, 3);
  scores.resize(scores.size() - static_cast<size_t>(missing));
  scores.shrink_to_fit();
  const auto state = fill<float>(s.batch * s.states, 1), object = fill<float>(s.batch * s.objects, 2);
  std::vector<int64_t> group, pairs;
  for (int64_t k = 0; k < s.pairs; ++k) {
    group.push_back(k * 7 % (s.groups + 1) - 1);
    if (term) pairs.insert(pairs.end(), {k % s.states, k * 3 % s.objects});
  }
  const auto results = static_cast<size_t>(s.batch * s.groups);
  std::vector<R> score[2] = {std::vector<R>(results), std::vector<R>(results)};
  std::vector<int64_t> pair[2] = {std::vector<int64_t>(results), std::vector<int64_t>(results)};
  const int64_t half = s.pairs / 2;
  for (int turn = 0; turn < 2; ++turn) {
    const int64_t first = turn == 0 ? half : 0, count = turn == 0 ? s.pairs - half : half;
    const CaptPairFrontier args{scores.data() + first,
                                group.data() + first,
                                pairs.data() + (term ? 2 * first : 0),
                                state.data(),
                                object.data(),
                                turn == 0 ? nullptr : score[0].data(),
                                turn == 0 ? nullptr : pair[0].data(),
                                score[turn].data(),
                                pair[turn].data(),
                                s.batch,
                                count,
                                s.groups,
                                s.states,
                                s.objects,
                                first,
                                s.pairs,
                                dtype,
                                term};
    const std::unique_ptr<uint64_t[]> columns(new uint64_t[capt_pair_frontier_columns_bytes(&args) / 8]);
    const std::unique_ptr<uint64_t[]> workspace(new uint64_t[capt_pair_frontier_workspace(&args) / 8]);
    if (capt_pair_frontier_columns(&args, columns.get()) != 0) return -1;
    if (capt_pair_frontier_cpu(&args, columns.get(), workspace.get(), CAPT_BASELINE, 0, s.batch) != 0) return -1;
  }
  int64_t wrong = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t g = 0; g < s.groups; ++g) {
      float best = -INFINITY;
      int64_t winner = -1;
      for (int64_t k = 0; k < s.pairs; ++k) {
        if (group[static_cast<size_t>(k)] != g) continue;
        float own = wide(scores[static_cast<size_t>(b * s.pairs + k)]);
        if (term) {
          own += state[static_cast<size_t>(b * s.states + k % s.states)] *
                 object[static_cast<size_t>(b * s.objects + k * 3 % s.objects)];
        }
        if (own > best) best = own, winner = k;
      }
      const auto at = static_cast<size_t>(b * s.groups + g);
      wrong += pair[1][at] != winner || wide(score[1][at]) != best;
    }
  }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "overrun") == 0) return check<float, float>({1, 33, 2, 0, 0}, 0, 1) != 0;
  const Shape shapes[] = {{1, 1, 1, 0, 0},    {2, 0, 3, 0, 0},   {3, 131, 2, 0, 0},  {2, 200, 51, 0, 0},
                          {2, 77, 300, 0, 0}, {3, 131, 2, 5, 7}, {2, 200, 51, 1, 1}, {1, 333, 64, 17, 16}};
  int cases = 0;
  for (const Shape& s : shapes) {
    const int64_t wrong[] = {
        check<float, float>(s, CAPT_FLOAT32),
        s.states > 0 ? check<Half, float>(s, CAPT_FLOAT16) : check<Half, Half>(s, CAPT_FLOAT16),
        s.states > 0 ? check<Bfloat, float>(s, CAPT_BFLOAT16) : check<Bfloat, Bfloat>(s, CAPT_BFLOAT16)};
    for (const int64_t number : wrong) {
      if (number != 0) {
        std::fprintf(stderr, "B %ld K %ld G %ld: %ld wrong\n", static_cast<long>(s.batch), static_cast<long>(s.pairs),
                     static_cast<long>(s.groups), static_cast<long>(number));
        return 1;
      }
      ++cases;
    }
  }
  std::printf("pair_frontier: %d cases\n", cases);
  return 0;
}
