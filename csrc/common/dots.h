// Inner products of a few vectors ("queries") with many row-major rows, for every instruction-set level.
//
// The queries are packed once, 16 to a block, so that they lie side by side in the lanes; rows are read where they are.
//
//   words  = packed_words<T>(dim)                            4-byte words of one packed block of 16 queries
//   pack_queries(queries, stride, count, dim, packed, scratch)   ceil(count / 16) blocks; missing queries are zero
//   start_tiles()                                            once per thread and task, before panel_dots
//   staged = stage_rows(rows, stride, n_rows, dim, scratch)  n_rows <= 32; scratch: scratch_words(dim) words
//   panel_dots(staged, dim, packed, words, blocks, scores, next, bytes)    scores[row][32] of 1 or 2 blocks of queries;
//                                                            meanwhile asks for the `bytes` from `next` on
//   stop_tiles()                                             at the end of the task
//
//   channel_dots<T, Q>(rows, stride, n_rows, dim, queries, scores, pitch)  Q = 1, 2, 4 or 8 queries left by copy_query:
//                                                            lanes are channels
//
// All pointers to packed queries and scratch are aligned to 64 bytes; rows are not. Nothing outside the rows is read.
// float32 sums; products of bfloat16 go through AVX512-BF16 or AMX where the level has them (these take subnormal
// numbers as zero), all other storage is widened first. The sum of one row and one query is formed in the same order
// wherever the row stands in its panel.
#pragma once

#include "common/simd.h"

namespace {

constexpr int kQueryBlock = 16;
constexpr int kPanelRows = 32;
constexpr int kPanelQueries = 2 * kQueryBlock;

constexpr int64_t padded_dim(int64_t dim) { return (dim + 31) / 32 * 32; }
constexpr int64_t scratch_words(int64_t dim) { return kPanelRows * padded_dim(dim); }

// What rows are multiplied as: bfloat16 pairs or float32.
template <typename T>
struct Product {
  typedef float Row;
  static constexpr bool kPairs = false;
};
#ifdef __AVX512BF16__
template <>
struct Product<Bfloat> {
  typedef Bfloat Row;
  static constexpr bool kPairs = true;
};
#endif

template <typename T>
constexpr int64_t packed_words(int64_t dim) {
  return kQueryBlock * padded_dim(dim) / (Product<T>::kPairs ? 2 : 1);
}

// `count` values as float32.
template <typename T>
inline void widen_row(const T* source, int64_t count, float* target) {
  int64_t c = 0;
  for (; c + kWidth <= count; c += kWidth) store(target + c, load(source + c));
  if (c < count) store_some(target + c, load_some(source + c, (int)(count - c)), (int)(count - c));
}

// One query as channel_dots wants it, zero beyond dim: bfloat16 or float32, padded_dim(dim) of them.
template <typename T>
void copy_query(const T* query, int64_t dim, typename Product<T>::Row* target) {
  const int64_t padded = padded_dim(dim);
  if constexpr (Product<T>::kPairs) {
    memcpy(target, query, (size_t)dim * sizeof(T));
  } else {
    widen_row(query, dim, target);
  }
  memset(target + dim, 0, (size_t)(padded - dim) * sizeof *target);
}

// Pairs: word (d / 2, query) holds channels d and d + 1. Otherwise: word (d, query) is a float. scratch:
// padded_dim(dim).
template <typename T>
void pack_queries(const T* queries, int64_t stride, int64_t count, int64_t dim, uint32_t* packed, float* scratch) {
  const int64_t words = packed_words<T>(dim), blocks = (count + kQueryBlock - 1) / kQueryBlock;
  memset(packed, 0, (size_t)(blocks * words) * 4);
  for (int64_t q = 0; q < count; ++q) {
    uint32_t* target = packed + q / kQueryBlock * words + q % kQueryBlock;
    typename Product<T>::Row* row = reinterpret_cast<typename Product<T>::Row*>(scratch);
    copy_query(queries + q * stride, dim, row);
    const int64_t steps = words / kQueryBlock;
    for (int64_t d = 0; d < steps; ++d) memcpy(target + d * kQueryBlock, scratch + d, 4);
  }
}

template <typename Row>
struct Staged {
  const Row* rows;
  int64_t stride;
  int count;
};

// The rows in the form panel_dots reads: in place where possible, otherwise a copy, widened or padded with zeros.
template <typename T>
inline Staged<typename Product<T>::Row> stage_rows(const T* rows, int64_t stride, int n_rows, int64_t dim,
                                                   uint32_t* scratch) {
  typedef typename Product<T>::Row Row;
  const int64_t padded = padded_dim(dim);
  Row* copy = reinterpret_cast<Row*>(scratch);
  if constexpr (Product<T>::kPairs) {
#ifdef __AMX_BF16__
    const bool in_place = n_rows == kPanelRows && dim % 32 == 0;
#else
    const bool in_place = dim % 2 == 0;
#endif
    if (in_place) return {rows, stride, n_rows};
    for (int r = 0; r < n_rows; ++r) copy_query(rows + r * stride, dim, copy + r * padded);
    memset(copy + n_rows * padded, 0, (size_t)((kPanelRows - n_rows) * padded) * sizeof(Row));
  } else {
    if constexpr (sizeof(T) == 4) return {rows, stride, n_rows};
    for (int r = 0; r < n_rows; ++r) widen_row(rows + r * stride, dim, copy + r * padded);
  }
  return {copy, padded, n_rows};
}

// Memory that will be needed next, asked for little by little while a panel is computed: a single core waits for memory
// rather than for the bus. `lines` cache lines from `at` on in every step; prefetching past the end is harmless.
struct Ahead {
  const char* at;
  int64_t lines;

  Ahead(const void* start, int64_t bytes, int64_t steps)  // no steps: rows without channels
      : at(static_cast<const char*>(start)), lines(steps > 0 ? (bytes / 64 + steps - 1) / steps : 0) {}
  void step() {
    for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(at + 64 * line);
    at += 64 * lines;
  }
};

// ---- panels: lanes are queries ---------------------------------------------------------------------------------

#if CAPT_VECTOR_WIDTH == 16
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = CAPT_VECTOR_WIDTH / 2;  // 8 accumulators of 16 registers
#endif

// Channels (or pairs of them) between two requests for memory, and the number of requests of a full panel.
constexpr int64_t kStepChannels = 16;
inline int64_t panel_steps(int64_t channels) {
  return kPanelRows / kTileRows * ((channels + kStepChannels - 1) / kStepChannels);
}

// kRows rows times kBlocks blocks of 16 queries.
template <int kRows, int kBlocks>
inline void float_tile(const float* rows, int64_t stride, int64_t dim, const float* packed, int64_t words,
                       float* scores, Ahead& ahead) {
  constexpr int kVectors = kQueryBlock / kWidth;
  Vector sum[kRows][kBlocks * kVectors] = {};
  for (int64_t first = 0; first < dim; first += kStepChannels) {
    ahead.step();
    const int64_t last = first + kStepChannels < dim ? first + kStepChannels : dim;
    for (int64_t d = first; d < last; ++d) {
      Vector query[kBlocks * kVectors];
      for (int v = 0; v < kBlocks * kVectors; ++v) {
        query[v] = load(packed + v / kVectors * words + d * kQueryBlock + v % kVectors * kWidth);
      }
      for (int r = 0; r < kRows; ++r) {
        const Vector value = splat(rows[r * stride + d]);
        for (int v = 0; v < kBlocks * kVectors; ++v) sum[r][v] += query[v] * value;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kBlocks * kVectors; ++v) store(scores + r * kPanelQueries + v * kWidth, sum[r][v]);
  }
}

template <int kBlocks>
void float_panel(const Staged<float>& staged, int64_t dim, const uint32_t* packed, int64_t words, float* scores,
                 Ahead ahead) {
  const float* queries = reinterpret_cast<const float*>(packed);
  int r = 0;
  for (; r + kTileRows <= staged.count; r += kTileRows) {
    float_tile<kTileRows, kBlocks>(staged.rows + r * staged.stride, staged.stride, dim, queries, words,
                                   scores + r * kPanelQueries, ahead);
  }
  for (; r < staged.count; ++r) {
    float_tile<1, kBlocks>(staged.rows + r * staged.stride, staged.stride, dim, queries, words,
                           scores + r * kPanelQueries, ahead);
  }
}

inline void panel_dots(const Staged<float>& staged, int64_t dim, const uint32_t* packed, int64_t words, int blocks,
                       float* scores, const void* next, int64_t next_bytes) {
  const Ahead ahead(next, next_bytes, panel_steps(dim));
#if CAPT_VECTOR_WIDTH == 16
  if (blocks == 2) return float_panel<2>(staged, dim, packed, words, scores, ahead);
  float_panel<1>(staged, dim, packed, words, scores, ahead);
#else
  for (int b = 0; b < blocks; ++b) {
    float_panel<1>(staged, dim, packed + b * words, words, scores + b * kQueryBlock, ahead);
  }
#endif
}

#if defined(__AMX_BF16__)

inline void start_tiles() {
  struct __attribute__((packed, aligned(64))) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  _tile_loadconfig(&config);
}

inline void stop_tiles() { _tile_release(); }

inline void panel_dots(const Staged<Bfloat>& staged, int64_t dim, const uint32_t* packed, int64_t words, int blocks,
                       float* scores, const void* next, int64_t next_bytes) {
  const int64_t steps = padded_dim(dim) / 32, pitch = staged.stride * 2;
  Ahead ahead(next, next_bytes, steps);
  const Bfloat *low = staged.rows, *high = staged.rows + 16 * staged.stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (blocks == 2) {
    for (int64_t step = 0; step < steps; ++step) {
      ahead.step();
      _tile_loadd(6, packed + step * 256, 64);
      _tile_loadd(4, low + step * 32, pitch);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, high + step * 32, pitch);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, packed + words + step * 256, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(1, scores + kQueryBlock, kPanelQueries * 4);
    _tile_stored(3, scores + 16 * kPanelQueries + kQueryBlock, kPanelQueries * 4);
  } else {
    for (int64_t step = 0; step < steps; ++step) {
      ahead.step();
      _tile_loadd(6, packed + step * 256, 64);
      _tile_loadd(4, low + step * 32, pitch);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, high + step * 32, pitch);
      _tile_dpbf16ps(2, 5, 6);
    }
  }
  _tile_stored(0, scores, kPanelQueries * 4);
  _tile_stored(2, scores + 16 * kPanelQueries, kPanelQueries * 4);
}

#else

inline void start_tiles() {}
inline void stop_tiles() {}

#if defined(__AVX512BF16__)

template <int kRows, int kBlocks>
inline void pair_tile(const Bfloat* rows, int64_t stride, int64_t pairs, const uint32_t* packed, int64_t words,
                      float* scores, Ahead& ahead) {
  __m512 sum[kRows][kBlocks];
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBlocks; ++b) sum[r][b] = _mm512_setzero_ps();
  }
  for (int64_t first = 0; first < pairs; first += kStepChannels) {
    ahead.step();
    const int64_t last = first + kStepChannels < pairs ? first + kStepChannels : pairs;
    for (int64_t p = first; p < last; ++p) {
      __m512i query[kBlocks];
      for (int b = 0; b < kBlocks; ++b) query[b] = _mm512_load_si512(packed + b * words + p * kQueryBlock);
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        memcpy(&pair, rows + r * stride + 2 * p, 4);
        const __m512i value = _mm512_set1_epi32(pair);
        for (int b = 0; b < kBlocks; ++b) {
          sum[r][b] = _mm512_dpbf16_ps(sum[r][b], (__m512bh)query[b], (__m512bh)value);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBlocks; ++b) _mm512_storeu_ps(scores + r * kPanelQueries + b * kQueryBlock, sum[r][b]);
  }
}

template <int kBlocks>
void pair_panel(const Staged<Bfloat>& staged, int64_t pairs, const uint32_t* packed, int64_t words, float* scores,
                Ahead ahead) {
  int r = 0;
  for (; r + kTileRows <= staged.count; r += kTileRows) {
    pair_tile<kTileRows, kBlocks>(staged.rows + r * staged.stride, staged.stride, pairs, packed, words,
                                  scores + r * kPanelQueries, ahead);
  }
  for (; r < staged.count; ++r) {
    pair_tile<1, kBlocks>(staged.rows + r * staged.stride, staged.stride, pairs, packed, words,
                          scores + r * kPanelQueries, ahead);
  }
}

inline void panel_dots(const Staged<Bfloat>& staged, int64_t dim, const uint32_t* packed, int64_t words, int blocks,
                       float* scores, const void* next, int64_t next_bytes) {
  const int64_t pairs = (dim + 1) / 2;
  const Ahead ahead(next, next_bytes, panel_steps(pairs));
  if (blocks == 2) return pair_panel<2>(staged, pairs, packed, words, scores, ahead);
  pair_panel<1>(staged, pairs, packed, words, scores, ahead);
}

#endif
#endif

// ---- few queries: lanes are channels ----------------------------------------------------------------------------

// Lanes with bit kHalf clear: the sum of a over the lane pair; set: that of b.
template <int kHalf>
inline Vector fold_pair(Vector a, Vector b) {
  Mask low, high;
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i & kHalf ? i + kWidth : i;
    high[i] = i & kHalf ? (i ^ kHalf) + kWidth : i ^ kHalf;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Lane i of the result: the sum over all lanes of values[i].
inline Vector fold(Vector values[kWidth]) {
  for (int i = 0; i < kWidth / 2; ++i) values[i] = fold_pair<1>(values[2 * i], values[2 * i + 1]);
  for (int i = 0; i < kWidth / 4; ++i) values[i] = fold_pair<2>(values[2 * i], values[2 * i + 1]);
  if constexpr (kWidth >= 8) {
    for (int i = 0; i < kWidth / 8; ++i) values[i] = fold_pair<4>(values[2 * i], values[2 * i + 1]);
  }
  if constexpr (kWidth >= 16) values[0] = fold_pair<8>(values[0], values[1]);
  return values[0];
}

// How far ahead of their use rows are asked for: about the latency of memory times the bandwidth of a core.
constexpr int kAheadBytes = 16384;

// kQueries queries as copy_query left them, padded_dim(dim) apart; scores[row * pitch + query]. kQueries divides
// kWidth; rows are taken kWidth / kQueries at a time.
template <typename T, int kQueries>
void channel_dots(const T* rows, int64_t stride, int n_rows, int64_t dim, const typename Product<T>::Row* queries,
                  float* scores, int64_t pitch) {
  constexpr int kRows = kWidth / kQueries;
  constexpr int kStep = Product<T>::kPairs ? 2 * kWidth : kWidth;
  const int64_t padded = padded_dim(dim), whole = dim / kStep * kStep;
  for (int first = 0; first < n_rows; first += kRows) {
    const T* row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = rows + (first + r < n_rows ? first + r : n_rows - 1) * stride;
    Vector sum[kWidth] = {};
    auto step = [&](int64_t d, auto fetch_row) __attribute__((always_inline)) {
      for (int r = 0; r < kRows; ++r) {
        const auto value = fetch_row(row[r] + d);
        __builtin_prefetch(reinterpret_cast<const char*>(row[r] + d) + kAheadBytes);
        for (int q = 0; q < kQueries; ++q) {
          if constexpr (Product<T>::kPairs) {
#ifdef __AVX512BF16__
            const __m512i query = _mm512_load_si512(queries + q * padded + d);
            sum[r * kQueries + q] =
                (Vector)_mm512_dpbf16_ps((__m512)sum[r * kQueries + q], (__m512bh)value, (__m512bh)query);
#endif
          } else {
            sum[r * kQueries + q] += value * load(queries + q * padded + d);
          }
        }
      }
    };
    if constexpr (Product<T>::kPairs) {
#ifdef __AVX512BF16__
      for (int64_t d = 0; d < whole; d += kStep) step(d, [](const T* at) { return _mm512_loadu_si512(at); });
      if (whole < dim) {
        const __mmask32 some = ((__mmask32)1 << (dim - whole)) - 1;
        step(whole, [some](const T* at) { return _mm512_maskz_loadu_epi16(some, at); });
      }
#endif
    } else {
      for (int64_t d = 0; d < whole; d += kStep) step(d, [](const T* at) { return load(at); });
      if (whole < dim) {
        const int some = (int)(dim - whole);
        step(whole, [some](const T* at) { return load_some(at, some); });
      }
    }
    float total[kWidth];
    store(total, fold(sum));
    for (int r = 0; r < kRows && first + r < n_rows; ++r) {
      for (int q = 0; q < kQueries; ++q) scores[(first + r) * pitch + q] = total[r * kQueries + q];
    }
  }
}

}  // namespace
