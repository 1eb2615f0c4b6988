// Schemas of capt::bank_topk and capt::bank_topk_ranges and their CPU side: threads, workspace, merging. No arithmetic.

#include "bank_topk.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "glue.h"

namespace capt {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kChunkBytes = 1 << 20;  // of rows, taken by a thread at a time
constexpr int64_t kTaskBytes = 1 << 17;   // of rows and up to 16 queries: less is not worth a second thread
constexpr int64_t kTaskKeys = 2048;       // of results, for the same reason
constexpr int64_t kListBytes = 64 << 20;  // of running lists in one pass; fewer queries a pass when they are long
constexpr int64_t kPieceRows = 4096;      // rows of one segment taken by a thread at a time
constexpr int64_t kPanel = 32;            // rows and queries of one panel

// Memory aligned for vector loads.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})) {}
  void* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<void, Free> data_;
};

// Running lists of `count` queries from `first` on, and their memory.
class Lists {
 public:
  Lists(int64_t first, int64_t count, int64_t k, int64_t n_rows)
      : capacity_(capt_topk_capacity(k, n_rows)),
        keys_(std::make_unique_for_overwrite<uint64_t[]>(static_cast<size_t>(count * capacity_))),
        lengths_(static_cast<size_t>(count)),
        thresholds_(static_cast<size_t>((count + kPanel - 1) / kPanel * kPanel)),
        view{keys_.get(), lengths_.data(), thresholds_.data(), first, count, k, capacity_} {
    capt_topk_clear(&view);
  }
  Lists(const Lists&) = delete;

 private:
  int64_t capacity_;
  std::unique_ptr<uint64_t[]> keys_;
  std::vector<int64_t> lengths_;
  std::vector<float> thresholds_;

 public:
  CaptTopkLists view;
};

// A parallel loop whose body allocates; an exception that left a worker would lose its message.
template <typename Body>
void parallel_lists(int64_t count, int64_t grain, int64_t k, const Body& body) {
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  STD_TORCH_CHECK(!failed, "capt::bank_topk: no memory for lists of k=", k);
}

Tensor channels_side_by_side(const Tensor& matrix) {
  STD_TORCH_CHECK(matrix.dim() == 2, "capt::bank_topk: queries must be [Q, d] and rows [N, d]");
  return matrix.size(1) > 1 && matrix.stride(1) != 1 ? torch::stable::contiguous(matrix) : matrix;
}

const int64_t* numbers(const OptionalTensor& values, int64_t count, const char* name) {
  if (!values.has_value()) return nullptr;
  STD_TORCH_CHECK(values->scalar_type() == ScalarType::Long && values->numel() == count && values->is_contiguous(),
                  "capt::bank_topk: ", name, " must be contiguous int64 with ", count, " entries");
  return static_cast<const int64_t*>(values->data_ptr());
}

CaptBankTopk bank_args(const Tensor& queries, const Tensor& rows, int64_t k, const OptionalTensor& row_ids,
                       const OptionalTensor& exclude, bool by_query) {
  STD_TORCH_CHECK(queries.size(1) == rows.size(1), "capt::bank_topk: queries must be [Q, d] and rows [N, d]");
  STD_TORCH_CHECK(queries.scalar_type() == rows.scalar_type(), "capt::bank_topk: queries and rows differ in dtype");
  STD_TORCH_CHECK(k >= 1 && rows.size(0) < (int64_t{1} << 32), "capt::bank_topk: k >= 1 and N < 2**32 are needed");
  STD_TORCH_CHECK(row_ids.has_value() == exclude.has_value(), "capt::bank_topk: row_ids and exclude belong together");
  return CaptBankTopk{queries.data_ptr(),
                      rows.data_ptr(),
                      numbers(row_ids, rows.size(0), "row_ids"),
                      numbers(exclude, queries.size(0), "exclude"),
                      queries.size(0),
                      rows.size(0),
                      queries.size(1),
                      k,
                      queries.stride(0),
                      rows.stride(0),
                      by_query ? 1 : queries.size(0),
                      dtype_code(queries, "capt::bank_topk: queries")};
}

struct Result {
  Tensor scores, index;
  float* score_data() { return static_cast<float*>(scores.data_ptr()); }
  int64_t* index_data() { return static_cast<int64_t*>(index.data_ptr()); }
};

Result results(const Tensor& like, const std::vector<int64_t>& shape) {
  return {torch::stable::new_empty(like, shape, ScalarType::Float),
          torch::stable::new_empty(like, shape, ScalarType::Long)};
}

// One pass over the bank: every thread takes chunks of rows in ascending order and keeps lists of its own. Keys are
// totally ordered, so the merged result depends neither on the number of threads nor on who took which chunk.
void search_block(const CaptBankTopk& args, int level, int64_t first, int64_t count, Result& out) {
  const Buffer packed(capt_bank_packed_bytes(&args, count));
  capt_bank_pack(&args, level, first, count, packed.get());
  const int64_t row_bytes = std::max<int64_t>(1, args.dim * (args.dtype == CAPT_FLOAT32 ? 4 : 2));
  // Small banks are shared by the threads, too, unless a chunk would be done sooner than a thread wakes up.
  const int64_t least = kTaskBytes / (row_bytes * std::max<int64_t>(1, count / 16));
  const int64_t fair = std::clamp(args.n_rows / 16, least, std::max(least, kChunkBytes / row_bytes));
  const int64_t chunk = std::max<int64_t>(1, fair / kPanel) * kPanel;
  const int64_t chunks = (args.n_rows + chunk - 1) / chunk;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::vector<std::unique_ptr<Lists>> parts;
  parallel_lists(chunks, 1, args.k, [&](int64_t, int64_t) {
    auto lists = std::make_unique<Lists>(first, count, args.k, args.n_rows);
    const Buffer scratch(capt_bank_scratch_bytes(&args));
    for (int64_t taken = next++; taken < chunks; taken = next++) {
      capt_bank_scan(&args, level, packed.get(), taken * chunk, std::min((taken + 1) * chunk, args.n_rows),
                     &lists->view, scratch.get());
    }
    const std::lock_guard<std::mutex> lock(mutex);
    parts.push_back(std::move(lists));
  });
  parallel_lists(count, 1 + kTaskKeys / args.k, args.k, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys;
    for (int64_t q = begin; q < end; ++q) {
      keys.clear();
      for (const auto& part : parts) {
        const uint64_t* list = part->view.keys + q * part->view.capacity;
        keys.insert(keys.end(), list, list + part->view.lengths[q]);
      }
      capt_topk_write(keys.data(), static_cast<int64_t>(keys.size()), args.k, out.score_data() + (first + q) * args.k,
                      out.index_data() + (first + q) * args.k);
    }
  });
}

std::tuple<Tensor, Tensor> bank_topk_cpu(const Tensor& given_queries, const Tensor& given_rows, int64_t k,
                                         const OptionalTensor& row_ids, const OptionalTensor& exclude) {
  const Tensor queries = channels_side_by_side(given_queries), rows = channels_side_by_side(given_rows);
  const auto args = bank_args(queries, rows, k, row_ids, exclude, /*by_query=*/false);
  Result out = results(queries, {args.n_queries, k});
  const int level = capt_cpu_level();
  const int64_t list_bytes = 8 * capt_topk_capacity(k, args.n_rows) * torch::stable::get_num_threads();
  const int64_t step = std::clamp<int64_t>(kListBytes / list_bytes / kPanel * kPanel, kPanel, CAPT_BANK_QUERIES);
  for (int64_t first = 0; first < args.n_queries; first += step) {
    search_block(args, level, first, std::min(step, args.n_queries - first), out);
  }
  return {out.scores, out.index};
}

struct Interval {
  int64_t start, stop;
};

// Intervals [first, last) of one segment; a long segment is cut into several pieces.
struct Piece {
  int64_t segment, first, last;
};

// The union of every segment's ranges as disjoint ascending intervals, grouped into pieces.
void plan_pieces(const int64_t* ranges, int64_t n_segments, int64_t n_ranges, int64_t n_rows,
                 std::vector<Interval>& intervals, std::vector<Piece>& pieces) {
  std::vector<Interval> own;
  for (int64_t segment = 0; segment < n_segments; ++segment) {
    own.clear();
    for (int64_t s = 0; s < n_ranges; ++s) {
      const int64_t* bounds = ranges + 2 * (segment * n_ranges + s);
      if (bounds[0] >= bounds[1]) continue;
      STD_TORCH_CHECK(bounds[0] >= 0 && bounds[1] <= n_rows,
                      "capt::bank_topk_ranges: the bounds of ranges must lie in [0, ", n_rows, "], found ", bounds[0],
                      " and ", bounds[1]);
      own.push_back({bounds[0], bounds[1]});
    }
    std::sort(own.begin(), own.end(), [](const Interval& a, const Interval& b) { return a.start < b.start; });
    Piece piece{segment, static_cast<int64_t>(intervals.size()), 0};
    int64_t taken = 0, done = 0;  // rows of this piece; rows below `done` belong to earlier intervals
    const auto close = [&] {
      piece.last = static_cast<int64_t>(intervals.size());
      if (piece.last > piece.first) pieces.push_back(piece);
      piece.first = piece.last;
      taken = 0;
    };
    for (const Interval& interval : own) {
      int64_t start = std::max(interval.start, done);
      done = std::max(done, interval.stop);
      while (start < interval.stop) {
        const int64_t stop = std::min(interval.stop, start + kPieceRows - taken);
        intervals.push_back({start, stop});
        taken += stop - start;
        start = stop;
        if (taken == kPieceRows) close();
      }
    }
    close();
  }
}

std::tuple<Tensor, Tensor> bank_topk_ranges_cpu(const Tensor& given_queries, const Tensor& given_rows,
                                                const Tensor& ranges, int64_t k, const OptionalTensor& row_ids,
                                                const OptionalTensor& exclude) {
  const Tensor queries = channels_side_by_side(given_queries), rows = channels_side_by_side(given_rows);
  const auto args = bank_args(queries, rows, k, row_ids, exclude, /*by_query=*/true);
  STD_TORCH_CHECK(ranges.dim() == 4 && ranges.size(0) == args.n_queries && ranges.size(3) == 2 &&
                      ranges.scalar_type() == ScalarType::Long && ranges.is_contiguous(),
                  "capt::bank_topk_ranges: ranges must be contiguous int64 [Q, P, S, 2]");
  const int64_t n_pairs = ranges.size(1), n_segments = args.n_queries * n_pairs;
  Result out = results(queries, {args.n_queries, n_pairs, k});
  std::vector<Interval> intervals;
  std::vector<Piece> pieces;
  plan_pieces(static_cast<const int64_t*>(ranges.data_ptr()), n_segments, ranges.size(2), args.n_rows, intervals,
              pieces);
  const int level = capt_cpu_level();
  const int64_t n_pieces = static_cast<int64_t>(pieces.size());
  int64_t n_candidates = 0;
  for (const Interval& interval : intervals) n_candidates += interval.stop - interval.start;
  const int64_t bytes = n_candidates * args.dim * (args.dtype == CAPT_FLOAT32 ? 4 : 2);
  std::vector<std::vector<uint64_t>> best(pieces.size());
  std::atomic<int64_t> next{0};
  parallel_lists(n_pieces, 1 + n_pieces * kTaskBytes / (bytes + 1), k, [&](int64_t, int64_t) {
    const Buffer packed(capt_bank_packed_bytes(&args, 1)), scratch(capt_bank_scratch_bytes(&args));
    Lists lists(0, 1, k, std::min(kPieceRows, args.n_rows));
    int64_t query = -1;
    for (int64_t taken = next++; taken < n_pieces; taken = next++) {
      const Piece& piece = pieces[static_cast<size_t>(taken)];
      if (query != piece.segment / n_pairs) {
        query = piece.segment / n_pairs;
        capt_bank_pack(&args, level, query, 1, packed.get());
      }
      lists.view.first = query;
      capt_topk_clear(&lists.view);
      for (int64_t i = piece.first; i < piece.last; ++i) {
        const Interval& rows_of = intervals[static_cast<size_t>(i)];
        capt_bank_scan(&args, level, packed.get(), rows_of.start, rows_of.stop, &lists.view, scratch.get());
      }
      capt_topk_cut(&lists.view, 0);
      best[static_cast<size_t>(taken)].assign(lists.view.keys, lists.view.keys + lists.view.lengths[0]);
    }
  });
  std::vector<int64_t> bounds(static_cast<size_t>(n_segments) + 1);  // pieces of each segment
  for (const Piece& piece : pieces) ++bounds[static_cast<size_t>(piece.segment) + 1];
  for (size_t s = 1; s < bounds.size(); ++s) bounds[s] += bounds[s - 1];
  parallel_lists(n_segments, 1 + kTaskKeys / k, k, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys;
    for (int64_t s = begin; s < end; ++s) {
      keys.clear();
      for (int64_t p = bounds[static_cast<size_t>(s)]; p < bounds[static_cast<size_t>(s) + 1]; ++p) {
        const auto& list = best[static_cast<size_t>(p)];
        keys.insert(keys.end(), list.begin(), list.end());
      }
      capt_topk_write(keys.data(), static_cast<int64_t>(keys.size()), k, out.score_data() + s * k,
                      out.index_data() + s * k);
    }
  });
  return {out.scores, out.index};
}

}  // namespace
}  // namespace capt

STABLE_TORCH_LIBRARY_FRAGMENT(capt, library) {
  library.def(
      "bank_topk(Tensor queries, Tensor rows, int k, Tensor? row_ids, Tensor? exclude) -> (Tensor scores, "
      "Tensor index)");
  library.def(
      "bank_topk_ranges(Tensor queries, Tensor rows, Tensor ranges, int k, Tensor? row_ids, Tensor? exclude) -> "
      "(Tensor scores, Tensor index)");
}

STABLE_TORCH_LIBRARY_IMPL(capt, CPU, library) {
  library.impl("bank_topk", TORCH_BOX(&capt::bank_topk_cpu));
  library.impl("bank_topk_ranges", TORCH_BOX(&capt::bank_topk_ranges_cpu));
}
