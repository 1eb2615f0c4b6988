// Runs the CUDA kernels of bank_topk under the emulation with buffers of exact size, for the sanitizers, and compares
// them with a sort. "overrun" gives a bank that is one element short: the check itself is checked.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "bank_topk_cuda.h"
#include "common/device.cuh"

namespace {

struct Shape {
  int64_t queries, rows, dim, k, pairs;  // pairs 0: the whole bank
  int path, parts, tile;
};

// Small integers, many ties; some rows are NaN or infinite.
float value(int64_t i, int64_t row) {
  if (row % 17 == 5) return row % 2 == 0 ? INFINITY : NAN;
  return static_cast<float>((i * 37 + i / 11) % 5 - 2);
}

template <typename T>
std::vector<T> fill(int64_t lines, int64_t dim, int64_t odd_from) {
  std::vector<T> data(static_cast<size_t>(lines * dim));
  for (int64_t i = 0; i < lines * dim; ++i) narrow(value(i, i / dim + odd_from), data[static_cast<size_t>(i)]);
  return data;
}

// Wrong entries, or -1 for an error code.
template <typename T>
int64_t check(const Shape& s, int dtype, int64_t missing = 0) {
  auto queries = fill<T>(s.queries, s.dim, -1000000), rows = fill<T>(s.rows, s.dim, 0);
  rows.resize(rows.size() - static_cast<size_t>(missing));
  rows.shrink_to_fit();
  const int64_t pairs = std::max<int64_t>(s.pairs, 1), lists = s.queries * pairs;
  std::vector<int64_t> ids, exclude, ranges, index(static_cast<size_t>(lists * s.k));
  std::vector<float> scores(static_cast<size_t>(lists * s.k));
  for (int64_t r = 0; r < s.rows; ++r) ids.push_back(r % 7);
  for (int64_t q = 0; q < s.queries; ++q) exclude.push_back(q % 3 - 1);
  for (int64_t list = 0; s.pairs > 0 && list < lists;
       ++list) {  // the second range overlaps the first, the third is empty
    for (const int64_t bound : {s.rows / 4, s.rows - list % 3, s.rows / 2, s.rows, s.rows + 9, int64_t{-4}}) {
      ranges.push_back(bound);
    }
  }
  CaptBankTopkCuda args{queries.data(),
                        rows.data(),
                        s.pairs > 0 ? ranges.data() : nullptr,
                        ids.data(),
                        exclude.data(),
                        scores.data(),
                        index.data(),
                        nullptr,
                        s.queries,
                        s.rows,
                        s.dim,
                        pairs,
                        s.pairs > 0 ? 3 : 0,
                        s.k,
                        dtype,
                        s.path,
                        s.parts,
                        s.tile};
  std::vector<unsigned char> workspace(static_cast<size_t>(capt_bank_topk_cuda_workspace(&args)));
  args.workspace = workspace.data();
  if (capt_bank_topk_cuda(&args, nullptr) != 0) return -1;
  int64_t wrong = 0;
  for (int64_t list = 0; list < lists; ++list) {
    const int64_t q = list / pairs;
    std::vector<std::pair<float, int64_t>> all;
    for (int64_t r = s.pairs > 0 ? s.rows / 4 : 0; r < s.rows; ++r) {
      if (exclude[static_cast<size_t>(q)] >= 0 && exclude[static_cast<size_t>(q)] == ids[static_cast<size_t>(r)])
        continue;
      if (s.pairs > 0 && r < s.rows / 2 && r >= s.rows - list % 3) continue;
      float sum = 0.0f;
      for (int64_t c = 0; c < s.dim; ++c) {
        sum += widen(queries[static_cast<size_t>(q * s.dim + c)]) * widen(rows[static_cast<size_t>(r * s.dim + c)]);
      }
      if (sum > -INFINITY) all.emplace_back(-sum, r);
    }
    std::sort(all.begin(), all.end());
    for (int64_t i = 0; i < s.k; ++i) {
      const auto at = static_cast<size_t>(list * s.k + i);
      const bool filled = static_cast<size_t>(i) < all.size();
      wrong += index[at] != (filled ? all[static_cast<size_t>(i)].second : -1);
      wrong += scores[at] != (filled ? -all[static_cast<size_t>(i)].first : -INFINITY);
    }
  }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  constexpr int kPortable = CAPT_BANK_TOPK_PORTABLE, kHopper = CAPT_BANK_TOPK_HOPPER;
  if (argc > 1 && std::strcmp(argv[1], "overrun") == 0)
    return check<float>({1, 9, 5, 2, 0, kPortable, 1, 16}, 0, 1) != 0;
  const Shape shapes[] = {{1, 1, 1, 1, 0, kPortable, 1, 16},     {3, 200, 33, 40, 0, kPortable, 3, 16},
                          {70, 140, 72, 3, 0, kPortable, 2, 64}, {2, 0, 8, 2, 0, kPortable, 1, 16},
                          {2, 90, 24, 7, 2, kPortable, 1, 0},    {1, 150, 13, 60, 3, kPortable, 8, 0},
                          {3, 200, 136, 40, 0, kHopper, 3, 16},  {70, 140, 72, 3, 0, kHopper, 2, 64},
                          {20, 130, 8, 5, 0, kHopper, 2, 256}};
  int cases = 0;
  for (const Shape& shape : shapes) {
    for (const int dtype : {CAPT_FLOAT32, CAPT_FLOAT16, CAPT_BFLOAT16}) {
      if (shape.path == kHopper && dtype == CAPT_FLOAT32) continue;
      const int64_t wrong = dtype == CAPT_FLOAT32   ? check<float>(shape, dtype)
                            : dtype == CAPT_FLOAT16 ? check<HalfBits>(shape, dtype)
                                                    : check<BfloatBits>(shape, dtype);
      if (wrong != 0) {
        std::fprintf(stderr, "Q %ld N %ld D %ld k %ld pairs %ld path %d dtype %d: %ld wrong\n",
                     static_cast<long>(shape.queries), static_cast<long>(shape.rows), static_cast<long>(shape.dim),
                     static_cast<long>(shape.k), static_cast<long>(shape.pairs), shape.path, dtype,
                     static_cast<long>(wrong));
        return 1;
      }
      ++cases;
    }
  }
  std::printf("bank_topk: %d cases\n", cases);
  return 0;
}
