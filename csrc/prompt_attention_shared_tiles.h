// Shared-key prompt attention in bfloat16 on AMX tiles: forward, and the gradient of the queries with keys frozen.
//
// Same walk as prompt_attention_shared.simd.cpp with blocks of two tiles of rows. Products of bfloat16 are exact and
// summed in float32; probabilities, and gradients of scores, are rounded to bfloat16 for the second product. Softmax,
// log-sum-exp and all sums over keys use the unrounded float32 values.
#pragma once

#ifdef __AMX_BF16__

#include "common/tile.h"

namespace {

constexpr int64_t kTileBlockRows = 2 * kTile;

// Sizes of one head, in elements.
struct TileShape {
  int64_t n_keys, width;
  int64_t depth;          // width rounded up to whole tiles of depth
  int64_t packed;         // elements of the packed keys or values of a head
  int64_t scores, pitch;  // row lengths of a block of scores, in float and in bfloat16
};

inline TileShape tile_shape_of(const CaptSharedAttention& args) {
  TileShape shape;
  shape.n_keys = args.n_keys;
  shape.width = args.dim / args.n_heads;
  shape.depth = round_up(shape.width, kTileDepth);
  shape.packed = round_up(args.n_keys, kTileDepth) * shape.depth;
  shape.scores = (args.n_keys < kBlockKeys ? round_up(args.n_keys, kTileDepth) : kBlockKeys) + kTile;
  shape.pitch = shape.scores + kTile;
  return shape;
}

inline int64_t tile_scratch(const CaptSharedAttention& args) {
  const TileShape shape = tile_shape_of(args);
  return 2 * shape.packed + kTileBlockRows * (2 * shape.depth + 2 * shape.scores + shape.pitch) + 512;
}

inline Bfloat* take_half(Scratch* scratch, int64_t count) {
  return reinterpret_cast<Bfloat*>(scratch->take((count + 1) / 2));
}

// Rows as a left operand: copied, channels padded with zeros; `negate` flips signs.
inline void copy_rows(const Bfloat* source, int64_t stride, int64_t rows, const TileShape& shape, bool negate,
                      Bfloat* out) {
  for (int64_t r = 0; r < rows; ++r, source += stride, out += shape.depth) {
    memcpy(out, source, (size_t)shape.width * 2);
    if (shape.depth > shape.width) memset(out + shape.width, 0, (size_t)(shape.depth - shape.width) * 2);
    if (!negate) continue;
    for (int64_t c = 0; c < shape.width; ++c) out[c].bits ^= 0x8000u;
  }
}

inline void put_pair(Bfloat* target, Vector low, Vector high) {
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  memcpy(target, &both, sizeof both);
}

// Like soften(): n scores times `unit` become exponentials, rounded into `rounded` and zero up to a multiple of 32.
inline float soften_tile(float* score, Bfloat* rounded, int64_t n, float unit, float* top, float* sum) {
  const int64_t padded = round_up(n, kTileDepth);
  if (unit == 0.0f) {  // before the padding: -inf * 0 is NaN
    for (int64_t l = 0; l < n; ++l) score[l] *= unit;
    unit = 1.0f;
  }
  for (int64_t pad = n; pad < padded; ++pad) score[pad] = -INFINITY;
  Vector high = load(score);
  for (int64_t l = kWidth; l < padded; l += kWidth) {
    const Vector value = load(score + l);
    high = value > high ? value : high;
  }
  const float best = largest(high) * unit, old = *top;
  const float now = best > old ? best : old;
  const float base = now > -INFINITY ? now : 0.0f;
  Vector first = {}, second = {};
  for (int64_t l = 0; l < padded; l += 2 * kWidth) {
    const Vector one = exp2_vector(load(score + l) * unit - base);
    const Vector two = exp2_vector(load(score + l + kWidth) * unit - base);
    first += one;
    second += two;
    put_pair(rounded + l, one, two);
  }
  const float shrink = old > -INFINITY ? exp2f(old - base) : 0.0f;
  *top = now;
  *sum = *sum * shrink + total(first + second);
  return shrink;
}

inline void forward_tiles(const CaptSharedAttention& args, int64_t image, int64_t head, int64_t first, int64_t last,
                          Scratch scratch) {
  const TileShape shape = tile_shape_of(args);
  Bfloat* keys = take_half(&scratch, shape.packed);
  Bfloat* values = take_half(&scratch, shape.packed);
  Bfloat* query = take_half(&scratch, kTileBlockRows * shape.depth);
  Bfloat* rounded = take_half(&scratch, kTileBlockRows * shape.pitch);
  float* score = scratch.take(kTileBlockRows * shape.scores);
  float* mixed = scratch.take(kTileBlockRows * shape.depth);
  const int64_t channel = head * shape.width;
  pack_transposed(static_cast<const Bfloat*>(args.keys) + image * args.key_batch_stride + channel, args.key_row_stride,
                  args.n_keys, shape.width, shape.depth, keys);
  pack_rows(static_cast<const Bfloat*>(args.values) + image * args.value_batch_stride + channel, args.value_row_stride,
            args.n_keys, shape.width, shape.depth, values);
  const float unit = fabsf(args.scale) * kLog2E;
  const int64_t key_step = shape.depth / kTileDepth * kTileSize, value_step = shape.depth / kTile * kTileSize;
  for (int i = 0; i < 2; ++i) {
    const Bfloat* source = static_cast<const Bfloat*>(args.query[i]) + image * args.query_batch_stride[i] + channel;
    Bfloat* out = static_cast<Bfloat*>(args.out[i]) + image * args.rows[i] * args.dim + channel;
    float* lse = args.lse[i] + (image * args.n_heads + head) * args.rows[i];
    const int64_t end = last < args.rows[i] ? last : args.rows[i];
    for (int64_t r = first; r < end; r += kTileBlockRows) {
      const int64_t rows = end - r < kTileBlockRows ? end - r : kTileBlockRows;
      copy_rows(source + r * args.query_row_stride[i], args.query_row_stride[i], rows, shape, args.scale < 0.0f, query);
      float top[kTileBlockRows], sum[kTileBlockRows];
      for (int64_t j = 0; j < rows; ++j) top[j] = -INFINITY, sum[j] = 0.0f;
      for (int64_t l = 0; l < args.n_keys; l += kBlockKeys) {
        const int64_t n = args.n_keys - l < kBlockKeys ? args.n_keys - l : kBlockKeys;
        tile_gemm(rows, round_up(n, kTile), shape.depth, query, shape.depth, keys + l / kTile * key_step, kTileSize,
                  key_step, score, shape.scores, false);
        for (int64_t j = 0; j < rows; ++j) {
          const float shrink =
              soften_tile(score + j * shape.scores, rounded + j * shape.pitch, n, unit, top + j, sum + j);
          if (l > 0 && shrink != 1.0f) scale_row(mixed + j * shape.depth, shrink, shape.depth);
        }
        tile_gemm(rows, shape.depth, round_up(n, kTileDepth), rounded, shape.pitch,
                  values + l / kTileDepth * value_step, value_step, kTileSize, mixed, shape.depth, l > 0);
      }
      for (int64_t j = 0; j < rows; ++j) {
        narrow_row(mixed + j * shape.depth, 1.0f / sum[j], shape.width, out + (r + j) * args.dim);
        lse[r + j] = log_sum(top[j], sum[j]);
      }
    }
  }
}

// Gradients of n scores of a row, rounded, zero up to a multiple of 32.
inline void score_gradients_tile(const float* score, const float* back, Bfloat* rounded, int64_t n, float unit,
                                 float lse, float mean) {
  int64_t l = 0;
  for (; l < n; l += 2 * kWidth) {
    const Vector one = exp2_vector(load(score + l) * unit - lse) * (load(back + l) - mean);
    const Vector two = exp2_vector(load(score + l + kWidth) * unit - lse) * (load(back + l + kWidth) - mean);
    put_pair(rounded + l, one, two);
  }
  if (n < l) memset(rounded + n, 0, (size_t)(l - n) * 2);
}

// Gradient of the queries alone, for one head of the images of a group and rows [first, last) of both streams.
inline void backward_tiles(const CaptSharedAttentionBackward& args, int64_t group, int64_t from, int64_t to,
                           int64_t head, int64_t first, int64_t last, Scratch scratch) {
  const CaptSharedAttention& given = args.forward;
  const TileShape shape = tile_shape_of(given);
  Bfloat* keys = take_half(&scratch, shape.packed);
  Bfloat* values = take_half(&scratch, shape.packed);
  Bfloat* key_rows = take_half(&scratch, shape.packed);
  Bfloat* query = take_half(&scratch, kTileBlockRows * shape.depth);
  Bfloat* grad = take_half(&scratch, kTileBlockRows * shape.depth);
  Bfloat* rounded = take_half(&scratch, kTileBlockRows * shape.pitch);
  float* score = scratch.take(kTileBlockRows * shape.scores);
  float* back = scratch.take(kTileBlockRows * shape.scores);
  float* gradient = scratch.take(kTileBlockRows * shape.depth);
  const int64_t channel = head * shape.width;
  const float unit = fabsf(given.scale) * kLog2E;
  const int64_t key_step = shape.depth / kTileDepth * kTileSize, row_step = shape.depth / kTile * kTileSize;
  for (int64_t image = from; image < to; ++image) {
    const Bfloat* k = static_cast<const Bfloat*>(given.keys) + image * given.key_batch_stride + channel;
    const Bfloat* v = static_cast<const Bfloat*>(given.values) + image * given.value_batch_stride + channel;
    pack_transposed(k, given.key_row_stride, given.n_keys, shape.width, shape.depth, keys);
    pack_transposed(v, given.value_row_stride, given.n_keys, shape.width, shape.depth, values);
    pack_rows(k, given.key_row_stride, given.n_keys, shape.width, shape.depth, key_rows);
    for (int i = 0; i < 2; ++i) {
      const int64_t base = image * given.rows[i] * given.dim + channel;
      const Bfloat* source = static_cast<const Bfloat*>(given.query[i]) + image * given.query_batch_stride[i] + channel;
      const Bfloat* upstream = static_cast<const Bfloat*>(args.grad[i]) + base;
      const Bfloat* out = static_cast<const Bfloat*>(given.out[i]) + base;
      const int64_t statistics = (image * given.n_heads + head) * given.rows[i];
      const int64_t end = last < given.rows[i] ? last : given.rows[i];
      for (int64_t r = first; r < end; r += kTileBlockRows) {
        const int64_t rows = end - r < kTileBlockRows ? end - r : kTileBlockRows;
        copy_rows(source + r * given.query_row_stride[i], given.query_row_stride[i], rows, shape, given.scale < 0.0f,
                  query);
        copy_rows(upstream + r * given.dim, given.dim, rows, shape, false, grad);
        for (int64_t l = 0; l < given.n_keys; l += kBlockKeys) {
          const int64_t n = given.n_keys - l < kBlockKeys ? given.n_keys - l : kBlockKeys;
          const int64_t columns = round_up(n, kTile);
          tile_gemm(rows, columns, shape.depth, query, shape.depth, keys + l / kTile * key_step, kTileSize, key_step,
                    score, shape.scores, false);
          tile_gemm(rows, columns, shape.depth, grad, shape.depth, values + l / kTile * key_step, kTileSize, key_step,
                    back, shape.scores, false);
          for (int64_t j = 0; j < rows; ++j) {
            const float mean = dot(upstream + (r + j) * given.dim, out + (r + j) * given.dim, shape.width) -
                               args.grad_lse[i][statistics + r + j];
            score_gradients_tile(score + j * shape.scores, back + j * shape.scores, rounded + j * shape.pitch, n, unit,
                                 given.lse[i][statistics + r + j] * kLog2E, mean);
          }
          tile_gemm(rows, shape.depth, round_up(n, kTileDepth), rounded, shape.pitch,
                    key_rows + l / kTileDepth * row_step, row_step, kTileSize, gradient, shape.depth, l > 0);
        }
        put_query_gradient<Bfloat>(args, i, image, image == from, group, r, rows, channel, shape.width, shape.depth,
                                   gradient);
      }
    }
  }
}

}  // namespace

#endif
