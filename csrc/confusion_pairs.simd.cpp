// Pseudo labels and confusion scores on the CPU, one row of logits after the other:
//
//   1. maximum and arg-max of the row                                          read logits
//   2. e = exp(x - maximum), its sum, and the maximum of e in each lane        read logits (from cache), write e
//   3. S = e / sum for every class without statistics; only the few above a    read e (from cache)
//      threshold leave the vector loop
//   4. S = (e / sum) * (1 + n_i / sum n) for the classes of row p of the statistics, one by one
//
// The k + 1 largest lane maxima of step 2 belong to k + 1 classes, so that at least k classes other than p score no
// less than the smallest of them: the threshold starts there, and rises once k classes are known. It compares scores,
// not logits: different logits may have equal scores, and then the lower class must win. A score is >= 0, so (bits of
// the score, inverted class) as one integer orders by score, then class. Compiled once per instruction-set level;
// CAPT_LEVEL_NAME is the suffix of the exported function.

#include "confusion_pairs.h"

#include "common/simd.h"

namespace {

constexpr int kUnroll = 4;
constexpr int kStep = kUnroll * kWidth;
constexpr int64_t kBlock = 1024;  // classes between two looks at where the maximum is; a multiple of every kStep
constexpr float kInfinity = __builtin_huge_valf();

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// exp(x) for x <= 0, subnormal results included: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial in r (Cephes expf).
// At most 2 units in the last place from exact where the result is normal. NaN stays NaN.
inline Vector exp_nonpositive(Vector x) {
  const Vector lowest = splat(-104.0f);  // exp(-104) rounds to 0
  x = x < lowest ? lowest : x;
  const Vector shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vector shifted = x * 1.44269504088896341f + shift;
  const Vector n = shifted - shift;
  const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
#if defined(__AVX512F__)
  return (Vector)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Mask exponent = (Mask)shifted - (Mask)shift;
  const Mask half = exponent >> 1;  // in two steps: 2^-150 is no float
  const Vector first = (Vector)((half + 127) << 23);
  const Vector second = (Vector)((exponent - half + 127) << 23);
  return p * first * second;
#endif
}

inline void minus_infinity(float& value) { value = -kInfinity; }
inline void minus_infinity(Half& value) { value.bits = 0xFC00; }
inline void minus_infinity(Bfloat& value) { value.bits = 0xFF80; }

// A row of logits in whole steps: the last, incomplete one is copied and filled up with -infinity.
template <typename T>
struct Row {
  const T* values;
  int64_t n, whole;
  T rest[kStep];

  Row(const T* from, int64_t count) : values(from), n(count), whole(count / kStep * kStep) {
    if (whole == n) return;
    for (int i = 0; i < kStep; ++i) minus_infinity(rest[i]);
    memcpy(rest, values + whole, (size_t)(n - whole) * sizeof(T));
  }
  int64_t padded() const { return whole == n ? n : whole + kStep; }
  const T* step(int64_t at) const { return at < whole ? values + at : rest; }
};

inline Vector swapped(Vector value, int distance) {
  Mask lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i ^ distance;
  return __builtin_shuffle(value, lanes);
}

inline float lane_maximum(Vector value) {
  for (int distance = kWidth / 2; distance > 0; distance /= 2) value = larger(value, swapped(value, distance));
  return value[0];
}

inline float lane_sum(Vector value) {
  for (int distance = kWidth / 2; distance > 0; distance /= 2) value += swapped(value, distance);
  return value[0];
}

inline Vector largest(const Vector v[kUnroll]) { return larger(larger(v[0], v[1]), larger(v[2], v[3])); }

struct Top {
  float value;
  int64_t index;
};

// The first place of the largest value, NaN left out; {-infinity, 0} if there is none above -infinity.
template <typename T>
Top maximum(const Row<T>& row) {
  Top top = {-kInfinity, 0};
  int64_t block = -1;
  for (int64_t start = 0; start < row.n; start += kBlock) {
    const int64_t stop = start + kBlock < row.n ? start + kBlock : row.n;
    Vector best[kUnroll];
    for (int i = 0; i < kUnroll; ++i) best[i] = splat(-kInfinity);
    for (int64_t at = start; at < stop; at += kStep) {
      const T* source = row.step(at);
      for (int i = 0; i < kUnroll; ++i) best[i] = larger(load(source + i * kWidth), best[i]);
    }
    const float value = lane_maximum(largest(best));
    if (value > top.value) {
      top.value = value;
      block = start;
    }
  }
  if (block < 0) return top;
  for (int64_t at = block;; at += kStep) {
    const T* source = row.step(at);
    for (int i = 0; i < kUnroll; ++i) {
      const uint32_t bits = bits_of(load(source + i * kWidth) == splat(top.value));
      if (bits != 0) {
        top.index = at + i * kWidth + __builtin_ctz(bits);
        return top;
      }
    }
  }
}

struct Sums {
  float total;
  Vector peak[kUnroll];  // largest exponential of each lane
};

template <typename T>
Sums exponentiate(const Row<T>& row, Vector top, float* e) {
  Vector sum[kUnroll] = {};
  Sums sums = {};
  for (int64_t at = 0; at < row.n; at += kStep) {
    const T* source = row.step(at);
    for (int i = 0; i < kUnroll; ++i) {
      const Vector value = exp_nonpositive(load(source + i * kWidth) - top);
      store(e + at + i * kWidth, value);
      sum[i] += value;
      sums.peak[i] = larger(value, sums.peak[i]);
    }
  }
  sums.total = lane_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  return sums;
}

// The value of place `rank` (0: the largest) among the lanes, equal lanes counted separately; 0 if there are fewer.
float ranked(Vector peak[kUnroll], int64_t rank) {
  if (rank >= kStep) return 0.0f;
  for (;;) {
    const float best = lane_maximum(largest(peak));
    if (best <= 0.0f) return 0.0f;
    for (int i = 0; i < kUnroll; ++i) {
      const Mask hit = peak[i] == splat(best);
      rank -= __builtin_popcount(bits_of(hit));
      if (rank < 0) return best;
      peak[i] = hit ? splat(-1.0f) : peak[i];
    }
  }
}

inline uint64_t key_of(float score, int64_t index) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  return (uint64_t)bits << 32 | (0xFFFFFFFFu - (uint32_t)index);
}

inline float score_of(uint64_t key) {
  const uint32_t bits = (uint32_t)(key >> 32);
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

// The k largest keys seen so far, smallest on top of a binary heap.
struct Heap {
  uint64_t* keys;
  int64_t size, k;
  float start;  // scores of at least this much are looked at until the heap is full

  bool full() const { return size == k; }
  float threshold() const { return full() ? score_of(keys[0]) : start; }

  void sink(int64_t at, int64_t end) {
    const uint64_t key = keys[at];
    for (int64_t child = 2 * at + 1; child < end; child = 2 * at + 1) {
      if (child + 1 < end && keys[child + 1] < keys[child]) ++child;
      if (key <= keys[child]) break;
      keys[at] = keys[child];
      at = child;
    }
    keys[at] = key;
  }

  void push(uint64_t key) {
    if (full()) {
      if (key > keys[0]) {
        keys[0] = key;
        sink(0, k);
      }
      return;
    }
    int64_t at = size++;
    for (; at > 0 && keys[(at - 1) / 2] > key; at = (at - 1) / 2) keys[at] = keys[(at - 1) / 2];
    keys[at] = key;
  }

  void sort_descending() {
    for (int64_t end = size - 1; end > 0; --end) {
      const uint64_t key = keys[end];
      keys[end] = keys[0];
      keys[0] = key;
      sink(0, end);
    }
  }
};

// Scores above the threshold, in ascending order of class: an equal score of a later class never displaces.
void collect(Heap& heap, const float* e, int64_t padded, float inverse) {
  Vector threshold = splat(heap.threshold());
  for (int64_t at = 0; at < padded; at += kStep) {
    Vector score[kUnroll];
    for (int i = 0; i < kUnroll; ++i) score[i] = load(e + at + i * kWidth) * inverse;
    if (!bits_of(largest(score) > threshold)) continue;
    for (int i = 0; i < kUnroll; ++i) {
      for (uint32_t bits = bits_of(score[i] > threshold); bits != 0; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        if (score[i][lane] > heap.threshold()) heap.push(key_of(score[i][lane], at + i * kWidth + lane));
      }
    }
    threshold = splat(heap.threshold());
  }
}

// A row with NaN, +infinity or nothing but -infinity has no softmax: scores NaN, the other classes in ascending order.
template <typename T>
void row_without_softmax(const CaptConfusionPairs& args, const Row<T>& row, Top top, int64_t b) {
  for (int64_t at = 0; at < row.n; at += kStep) {
    for (int i = 0; i < kUnroll; ++i) {
      const Vector value = load(row.step(at) + i * kWidth);
      if (bits_of(value != value) != 0) top.index = row.n - 1;
    }
  }
  args.pseudo[b] = top.index;
  for (int64_t j = 0; j < args.k; ++j) {
    args.index[b * args.k + j] = j + (j >= top.index);
    args.score[b * args.k + j] = __builtin_nanf("");
  }
}

template <typename T>
int pairs_row(const CaptConfusionPairs& args, uint64_t* keys, float* e, int64_t b) {
  const int64_t n = args.n_classes;
  const T* logits = static_cast<const T*>(args.logits) + b * args.row_stride;
  const Row<T> row(logits, n);
  const Top top = maximum(row);
  const Vector shift = splat(top.value);
  Sums sums = exponentiate(row, shift, e);
  if (sums.total != sums.total) {
    row_without_softmax(args, row, top, b);
    return 0;
  }
  const int64_t p = top.index;
  int64_t begin = 0, end = 0;
  if (args.offsets != nullptr) {
    begin = args.offsets[p];
    end = args.offsets[p + 1];
    if (begin < end && (begin < 0 || end > args.n_counts)) return 2;
  }
  // These classes are left out of the vector loop.
  for (int64_t i = n; i < row.padded(); ++i) e[i] = -kInfinity;
  e[p] = -kInfinity;
  float total = 0.0f;
  for (int64_t entry = begin; entry < end; ++entry) {
    const int64_t c = args.classes[entry];
    if (c < 0 || c >= n) return 2;
    e[c] = -kInfinity;
    total += args.counts[entry];
  }
  const float inverse = 1.0f / sums.total;
  const float least = ranked(sums.peak, args.k) * inverse;
  uint32_t bits;
  memcpy(&bits, &least, sizeof bits);
  --bits;  // the next number below
  float below = -1.0f;
  if (least > 0.0f) memcpy(&below, &bits, sizeof below);
  Heap heap = {keys, 0, args.k, below};
  collect(heap, e, row.padded(), inverse);
  total = total > __FLT_MIN__ ? total : __FLT_MIN__;
  for (int64_t entry = begin; entry < end; ++entry) {
    const int64_t c = args.classes[entry];
    if (c == p) continue;
    const Vector logit = splat(load_some(logits + c, 1)[0]);
    const float count = args.counts[entry], boost = 1.0f + (count > 0.0f ? count / total : 0.0f);
    heap.push(key_of(exp_nonpositive(logit - shift)[0] * inverse * boost, c));
  }
  heap.sort_descending();
  args.pseudo[b] = p;
  for (int64_t j = 0; j < args.k; ++j) {
    args.index[b * args.k + j] = 0xFFFFFFFFu - (uint32_t)keys[j];
    args.score[b * args.k + j] = score_of(keys[j]);
  }
  return 0;
}

}  // namespace

#define CAPT_PASTE(name, level) name##_##level
#define CAPT_NAME(name, level) CAPT_PASTE(name, level)

extern "C" int CAPT_NAME(capt_confusion_pairs, CAPT_LEVEL_NAME)(const CaptConfusionPairs* args, void* workspace,
                                                                int64_t begin, int64_t end) {
  uint64_t* keys = static_cast<uint64_t*>(workspace);
  float* e = reinterpret_cast<float*>(keys + args->k);
  int status = 0;
  for (int64_t b = begin; b < end && status == 0; ++b) {
    switch (args->dtype) {
      case CAPT_FLOAT32:
        status = pairs_row<float>(*args, keys, e, b);
        break;
      case CAPT_FLOAT16:
        status = pairs_row<Half>(*args, keys, e, b);
        break;
      default:
        status = pairs_row<Bfloat>(*args, keys, e, b);
    }
  }
  return status;
}
