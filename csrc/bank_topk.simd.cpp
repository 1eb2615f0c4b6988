// Exact top-k inner products on the CPU: a block of 32 rows against every query, scores dropped as soon as they are
// known to stay below the k best so far. The score matrix never exists: at most 32 x 32 scores are alive at a time.
//
// Compiled once per instruction-set level; CAPT_LEVEL_NAME is the suffix of the exported functions.

#include "bank_topk.h"

#include "common/dots.h"

namespace {

// Up to this many queries in a call are taken by channel_dots, more by panels. Tiles keep up with memory from two
// queries on.
template <typename T>
constexpr int64_t kFew = 8;
#ifdef __AMX_BF16__
template <>
constexpr int64_t kFew<Bfloat> = 1;
#endif

inline int few_group(int64_t count) {
  int group = 1;
  while (group < count) group *= 2;
  return group < kWidth ? group : kWidth;
}

template <typename T>
void pack(const CaptBankTopk& args, int64_t first, int64_t count, void* packed) {
  typedef typename Product<T>::Row Row;
  const T* queries = static_cast<const T*>(args.queries) + first * args.query_stride;
  const int64_t padded = padded_dim(args.dim);
  if (args.loop_queries > kFew<T>) {
    // The last of the packed bytes hold one row.
    float* scratch = static_cast<float*>(packed) + (count + kPanelQueries - 1) / kPanelQueries * kPanelQueries * padded;
    return pack_queries(queries, args.query_stride, count, args.dim, static_cast<uint32_t*>(packed), scratch);
  }
  Row* target = static_cast<Row*>(packed);
  memset(packed, 0, (size_t)(kFew<T> * padded) * sizeof(Row));
  for (int64_t q = 0; q < count; ++q) copy_query(queries + q * args.query_stride, args.dim, target + q * padded);
}

// Bit i: scores[i] > thresholds[i * step], 16 lanes.
template <int kStep>
inline uint32_t above(const float* scores, const float* thresholds) {
  uint32_t bits = 0;
  for (int v = 0; v < kQueryBlock / kWidth; ++v) {
    const Vector score = load(scores + v * kWidth);
    const Vector threshold = kStep ? load(thresholds + v * kWidth) : splat(*thresholds);
#if defined(__AVX512F__)
    bits |= _mm512_cmp_ps_mask((__m512)score, (__m512)threshold, _CMP_GT_OQ);
#elif defined(__AVX2__)
    bits |= (uint32_t)_mm256_movemask_ps((__m256)(score > threshold)) << v * kWidth;
#else
    const Mask mask = score > threshold;
    for (int i = 0; i < kWidth; ++i) bits |= (uint32_t)(mask[i] & 1) << (v * kWidth + i);
#endif
  }
  return bits;
}

inline void offer(const CaptBankTopk& args, CaptTopkLists& lists, int64_t list, float score, int64_t row) {
  if (args.exclude != nullptr) {
    const int64_t excluded = args.exclude[lists.first + list];
    if (excluded >= 0 && args.row_ids[row] == excluded) return;
  }
  score += 0.0f;  // -0 and +0 tie
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  lists.keys[list * lists.capacity + lists.lengths[list]] = (uint64_t)ordered << 32 | (uint32_t)~(uint32_t)row;
  if (++lists.lengths[list] == lists.capacity) capt_topk_cut(&lists, list);
}

// scores[row][kPanelQueries]: lanes are queries.
inline void offer_panel(const CaptBankTopk& args, CaptTopkLists& lists, int64_t first, int blocks, const float* scores,
                        int64_t begin, int n_rows) {
  for (int b = 0; b < blocks; ++b) {
    const int64_t list = first + b * kQueryBlock;
    for (int r = 0; r < n_rows; ++r) {
      const float* found = scores + r * kPanelQueries + b * kQueryBlock;
      for (uint32_t bits = above<1>(found, lists.thresholds + list); bits != 0; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        offer(args, lists, list + lane, found[lane], begin + r);
      }
    }
  }
}

// scores[row] of a single query: lanes are rows. Lanes beyond n_rows hold -inf.
inline void offer_rows(const CaptBankTopk& args, CaptTopkLists& lists, const float* scores, int64_t begin) {
  for (int first = 0; first < kPanelRows; first += kQueryBlock) {
    for (uint32_t bits = above<0>(scores + first, lists.thresholds); bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      // The threshold may have risen since the comparison.
      if (scores[first + lane] > *lists.thresholds) offer(args, lists, 0, scores[first + lane], begin + first + lane);
    }
  }
}

template <typename T>
void scan_few(const CaptBankTopk& args, const void* packed, int64_t begin, int64_t end, CaptTopkLists& lists,
              float* scores) {
  typedef typename Product<T>::Row Row;
  const Row* queries = static_cast<const Row*>(packed);
  const T* rows = static_cast<const T*>(args.rows);
  const int64_t padded = padded_dim(args.dim);
  const int group = few_group(lists.count);
  memset(scores, 0, kPanelRows * kPanelQueries * 4);
  for (int64_t row = begin; row < end; row += kPanelRows) {
    const int n_rows = end - row < kPanelRows ? (int)(end - row) : kPanelRows;
    const T* block = rows + row * args.row_stride;
    if (lists.count == 1) {
      channel_dots<T, 1>(block, args.row_stride, n_rows, args.dim, queries, scores, 1);
      for (int r = n_rows; r < kPanelRows; ++r) scores[r] = -__builtin_inff();
      offer_rows(args, lists, scores, row);
      continue;
    }
    for (int64_t q = 0; q < lists.count; q += group) {
      const Row* some = queries + q * padded;
      if (group == 2) {
        channel_dots<T, 2>(block, args.row_stride, n_rows, args.dim, some, scores + q, kPanelQueries);
      } else if (group == 4) {
        channel_dots<T, 4>(block, args.row_stride, n_rows, args.dim, some, scores + q, kPanelQueries);
      } else if constexpr (kWidth >= 8) {
        channel_dots<T, 8>(block, args.row_stride, n_rows, args.dim, some, scores + q, kPanelQueries);
      }
    }
    offer_panel(args, lists, 0, 1, scores, row, n_rows);
  }
}

template <typename T>
void scan_many(const CaptBankTopk& args, const void* packed, int64_t begin, int64_t end, CaptTopkLists& lists,
               float* scores, uint32_t* scratch) {
  const T* rows = static_cast<const T*>(args.rows);
  const uint32_t* words = static_cast<const uint32_t*>(packed);
  const int64_t block_words = packed_words<T>(args.dim), blocks = (lists.count + kQueryBlock - 1) / kQueryBlock;
  // Every panel of queries asks for its share of the next block of rows.
  const int64_t panels = (blocks + 1) / 2;
  const int64_t block_bytes = args.row_stride == args.dim ? kPanelRows * args.dim * (int64_t)sizeof(T) : 0;
  const int64_t share = (block_bytes / panels + 63) / 64 * 64;
  start_tiles();
  for (int64_t row = begin; row < end; row += kPanelRows) {
    const int n_rows = end - row < kPanelRows ? (int)(end - row) : kPanelRows;
    const auto staged = stage_rows(rows + row * args.row_stride, args.row_stride, n_rows, args.dim, scratch);
    for (int64_t b = 0; b < blocks; b += 2) {
      const int some = blocks - b < 2 ? 1 : 2;
      const char* next = reinterpret_cast<const char*>(rows + (row + kPanelRows) * args.row_stride) + b / 2 * share;
      panel_dots(staged, args.dim, words + b * block_words, block_words, some, scores, next, share);
      offer_panel(args, lists, b * kQueryBlock, some, scores, row, n_rows);
    }
  }
  stop_tiles();
}

template <typename T>
void scan(const CaptBankTopk& args, const void* packed, int64_t begin, int64_t end, CaptTopkLists& lists,
          void* scratch) {
  float* scores = static_cast<float*>(scratch);
  if (args.loop_queries <= kFew<T>) {
    scan_few<T>(args, packed, begin, end, lists, scores);
  } else {
    scan_many<T>(args, packed, begin, end, lists, scores, static_cast<uint32_t*>(scratch) + kPanelRows * kPanelQueries);
  }
}

}  // namespace

#define CAPT_PASTE(name, level) name##_##level
#define CAPT_NAME(name, level) CAPT_PASTE(name, level)

extern "C" void CAPT_NAME(capt_bank_pack, CAPT_LEVEL_NAME)(const CaptBankTopk* args, int64_t first, int64_t count,
                                                           void* packed) {
  switch (args->dtype) {
    case CAPT_FLOAT32:
      return pack<float>(*args, first, count, packed);
    case CAPT_FLOAT16:
      return pack<Half>(*args, first, count, packed);
    default:
      return pack<Bfloat>(*args, first, count, packed);
  }
}

extern "C" void CAPT_NAME(capt_bank_scan, CAPT_LEVEL_NAME)(const CaptBankTopk* args, const void* packed, int64_t begin,
                                                           int64_t end, CaptTopkLists* lists, void* scratch) {
  switch (args->dtype) {
    case CAPT_FLOAT32:
      return scan<float>(*args, packed, begin, end, *lists, scratch);
    case CAPT_FLOAT16:
      return scan<Half>(*args, packed, begin, end, *lists, scratch);
    default:
      return scan<Bfloat>(*args, packed, begin, end, *lists, scratch);
  }
}
