// Best pair of every group on the CPU, one row of scores after the other. A pair's code is its group + 1; code 0 (no
// candidate) has the threshold +infinity. A vector of scores is compared with the thresholds of its codes, the best
// scores so far; the few vectors with a score above leave the loop. The number of groups does not matter to the loop,
// and a chunk that comes after others starts with their best scores as thresholds.
//
// The primitive term costs an addition: rounding is monotone, so no score exceeds
//
//   scores + (max |state| * max |object|)            both roundings to float, as in the score itself
//
// and state and object of a pair are read only where this bound is above the threshold. NaN never is, and a NaN among
// state or object makes only NaN scores. Compiled once per instruction-set level, without contraction of products and
// sums; CAPT_LEVEL_NAME is the suffix of the exported function.

#include "pair_frontier.h"

#include "common/simd.h"

namespace {

constexpr int kUnroll = 4;
constexpr int kStep = kUnroll * kWidth;
constexpr float kInfinity = __builtin_huge_valf();

inline Mask load_columns(const int32_t* source) {
  Mask value;
  memcpy(&value, source, sizeof value);
  return value;
}

inline Vector gather(const float* table, Mask index) {
#if defined(__AVX512F__)
  return (Vector)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
  return (Vector)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
  Vector value;
  for (int i = 0; i < kWidth; ++i) value[i] = table[index[i]];
  return value;
#endif
}

// How the threshold of a code is found: in one or four registers, or in memory.
enum Table { kOne, kFour, kMemory };

#if defined(__AVX512F__)
constexpr int kFourCodes = 4 * kWidth;
#else
constexpr int kFourCodes = 0;  // shuffles of two registers would be several instructions
#endif

template <Table kTable>
inline Vector look_up(const float* table, Mask index) {
  if (kTable == kOne) return __builtin_shuffle(load(table), index);
  if (kTable == kMemory) return gather(table, index);
  const Vector low = __builtin_shuffle(load(table), load(table + kWidth), index);
  const Vector high = __builtin_shuffle(load(table + 2 * kWidth), load(table + 3 * kWidth), index);
  return (index & (2 * kWidth)) != 0 ? high : low;
}

// One bit for each lane of a that is above b.
inline uint32_t above(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
  return bits_of(a > b);
#endif
}

// The next float below a value above -infinity.
inline float below(float value) {
  if (value == 0.0f) return -__FLT_DENORM_MIN__;
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits += value > 0.0f ? -1 : 1;
  memcpy(&value, &bits, sizeof bits);
  return value;
}

// Largest magnitude; NaN left out.
float magnitude(const float* values, int64_t count) {
  Vector largest = {};
  for (int64_t at = 0; at < count; at += kWidth) {
    const int rest = count - at < kWidth ? (int)(count - at) : kWidth;
    Vector value = rest == kWidth ? load(values + at) : load_some(values + at, rest);
    value = value < 0.0f ? -value : value;
    largest = value > largest ? value : largest;
  }
  float best = 0.0f;
  for (int i = 0; i < kWidth; ++i) best = largest[i] > best ? largest[i] : best;
  return best;
}

// By code: score and pair so far, and the score that a later pair must exceed.
struct Best {
  int64_t* pair;
  float* score;
  float* threshold;

  Best(void* workspace, int64_t n_codes) {
    const int64_t size = capt_pair_frontier_padded(n_codes);
    pair = static_cast<int64_t*>(workspace);
    score = reinterpret_cast<float*>(pair + size);
    threshold = score + size;
    for (int64_t code = 0; code < size; ++code) threshold[code] = kInfinity;
  }

  template <typename R>
  void start(const CaptPairFrontier& args, int64_t b) {
    const int64_t n = args.n_groups, first = b * n;
    if (args.previous_score == nullptr) {
      for (int64_t code = 1; code <= n; ++code) {
        score[code] = threshold[code] = -kInfinity;
        pair[code] = -1;
      }
      return;
    }
    const R* previous = static_cast<const R*>(args.previous_score) + first;
    for (int64_t g = 0; g < n; g += kWidth) {
      const int count = n - g < kWidth ? (int)(n - g) : kWidth;
      store_some(score + g + 1, load_some(previous + g, count), count);
    }
    for (int64_t g = 0; g < n; ++g) {
      float& value = score[g + 1];
      const bool some = value == value;  // not NaN
      value = some ? value : -kInfinity;
      pair[g + 1] = some ? args.previous_pair[first + g] : -1;
      // A lower pair of this chunk may still win with the same score.
      const bool later = (uint64_t)pair[g + 1] > (uint64_t)args.start;
      threshold[g + 1] = later && value > -kInfinity ? below(value) : value;
    }
  }

  // Pairs come in ascending order: after the first of a score, the score has to be exceeded.
  void offer(int32_t code, float value, int64_t id) {
    if (value > score[code] || (value == score[code] && (uint64_t)id < (uint64_t)pair[code])) {
      score[code] = value;
      pair[code] = id;
    }
    threshold[code] = score[code];
  }

  template <typename R>
  void finish(const CaptPairFrontier& args, int64_t b) const {
    const int64_t n = args.n_groups, first = b * n;
    R* scores = static_cast<R*>(args.score) + first;
    for (int64_t g = 0; g < n; g += kWidth) {
      const int count = n - g < kWidth ? (int)(n - g) : kWidth;
      store_some(scores + g, load_some(score + g + 1, count) + 0.0f, count);
    }
    memcpy(args.pair + first, pair + 1, (size_t)n * sizeof *pair);
  }
};

template <bool kFirst, typename A, typename B>
struct Either {
  using Type = A;
};
template <typename A, typename B>
struct Either<false, A, B> {
  using Type = B;
};

template <typename T, bool kTerm, Table kTable>
struct Row {
  const T* scores;
  const int32_t* code;
  const int32_t* states;
  const int32_t* objects;
  const float* state;
  const float* object;
  float bound;  // of the term
  int64_t start;
  Best& best;

  // Pairs [at, at + count) of the chunk.
  template <bool kFull>
  void fold(int64_t at, int count) {
    Vector score = fetch<kFull>(scores + at, count);
    const Vector threshold = look_up<kTable>(best.threshold, load_columns(code + at));
    if (kTerm) {
      if (!above(score + bound, threshold)) return;
      score = score + gather(state, load_columns(states + at)) * gather(object, load_columns(objects + at));
    }
    for (uint32_t bits = above(score, threshold); bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      best.offer(code[at + lane], score[lane], start + at + lane);
    }
  }

  void run(int64_t n) {
    int64_t at = 0;
    for (; at + kStep <= n; at += kStep) {
      uint32_t hits = 0;
      for (int i = 0; i < kUnroll; ++i) {
        Vector score = load(scores + at + i * kWidth);
        if (kTerm) score = score + bound;
        hits |= above(score, look_up<kTable>(best.threshold, load_columns(code + at + i * kWidth)));
      }
      if (hits == 0) continue;
      for (int i = 0; i < kUnroll; ++i) fold<true>(at + i * kWidth, kWidth);
    }
    for (; at < n; at += kWidth) fold<false>(at, n - at < kWidth ? (int)(n - at) : kWidth);
  }
};

// No primitive term is larger.
float largest_term(const float* state, int64_t n_states, const float* object, int64_t n_objects) {
  const float bound = magnitude(state, n_states) * magnitude(object, n_objects);
  return bound == bound ? bound : kInfinity;
}

template <typename T, bool kTerm, Table kTable>
void rows(const CaptPairFrontier& args, const int32_t* columns, void* workspace, int64_t begin, int64_t end) {
  using Result = typename Either<kTerm, float, T>::Type;
  const int64_t padded = capt_pair_frontier_padded(args.n_pairs);
  Best best(workspace, args.n_groups + 1);
  for (int64_t b = begin; b < end; ++b) {
    const float *state = args.state + b * args.n_states, *object = args.object + b * args.n_objects;
    Row<T, kTerm, kTable> row = {static_cast<const T*>(args.scores) + b * args.row_stride,
                                 columns,
                                 columns + padded,
                                 columns + 2 * padded,
                                 state,
                                 object,
                                 kTerm ? largest_term(state, args.n_states, object, args.n_objects) : 0.0f,
                                 args.start,
                                 best};
    best.start<Result>(args, b);
    row.run(args.n_pairs);
    best.finish<Result>(args, b);
  }
}

template <typename T, bool kTerm>
void rows_of(const CaptPairFrontier& args, const int32_t* columns, void* workspace, int64_t begin, int64_t end) {
  const int64_t n_codes = args.n_groups + 1;
  const auto run = n_codes <= kWidth       ? rows<T, kTerm, kOne>
                   : n_codes <= kFourCodes ? rows<T, kTerm, kFour>
                                           : rows<T, kTerm, kMemory>;
  run(args, columns, workspace, begin, end);
}

}  // namespace

#define CAPT_PASTE(name, level) name##_##level
#define CAPT_NAME(name, level) CAPT_PASTE(name, level)

extern "C" void CAPT_NAME(capt_pair_frontier, CAPT_LEVEL_NAME)(const CaptPairFrontier* args, const int32_t* columns,
                                                               void* workspace, int64_t begin, int64_t end) {
  switch (args->dtype * 2 + args->term) {
    case CAPT_FLOAT32 * 2:
      return rows_of<float, false>(*args, columns, workspace, begin, end);
    case CAPT_FLOAT32 * 2 + 1:
      return rows_of<float, true>(*args, columns, workspace, begin, end);
    case CAPT_FLOAT16 * 2:
      return rows_of<Half, false>(*args, columns, workspace, begin, end);
    case CAPT_FLOAT16 * 2 + 1:
      return rows_of<Half, true>(*args, columns, workspace, begin, end);
    case CAPT_BFLOAT16 * 2:
      return rows_of<Bfloat, false>(*args, columns, workspace, begin, end);
    default:
      return rows_of<Bfloat, true>(*args, columns, workspace, begin, end);
  }
}
