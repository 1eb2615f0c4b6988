// Matrix products of bfloat16 on AMX tiles. Included only by *.simd.cpp files, used where __AMX_BF16__ is defined.
//
// A tile is 16 rows of 64 bytes. Left operands are row-major bfloat16 (16 rows x 32 columns a tile); right operands are
// packed tile by tile, a row holding two neighbouring rows of the matrix interleaved (32 rows x 16 columns a tile);
// products are 16 x 16 float.
#pragma once

#ifdef __AMX_BF16__

#include "common/simd.h"

namespace {

constexpr int64_t kTile = 16, kTileDepth = 32, kTileSize = kTile * kTileDepth;

// Every tile register: 16 rows of 64 bytes. Per thread, and undone with _tile_release().
inline void configure_tiles() {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
}

// kRows x kColumns tiles of C = A B, or C += A B. lda in elements, ldc in floats; tiles of B lie `next_depth` apart
// along the depth and `next_column` along the columns, in elements.
template <int kRows, int kColumns>
inline void tile_block(int64_t depth, const Bfloat* a, int64_t lda, const Bfloat* b, int64_t next_depth,
                       int64_t next_column, float* c, int64_t ldc, bool add) {
  const int64_t a_bytes = lda * 2, c_bytes = ldc * 4;
  __asm__ volatile("" ::: "memory");  // gcc does not know that tile loads read memory
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if (kColumns == 2) _tile_loadd(1, c + kTile, c_bytes);
    if (kRows == 2) _tile_loadd(2, c + kTile * ldc, c_bytes);
    if (kRows == 2 && kColumns == 2) _tile_loadd(3, c + kTile * ldc + kTile, c_bytes);
  } else {
    _tile_zero(0);
    if (kColumns == 2) _tile_zero(1);
    if (kRows == 2) _tile_zero(2);
    if (kRows == 2 && kColumns == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTileDepth, a += kTileDepth, b += next_depth) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kColumns == 2) {
      _tile_loadd(7, b + next_column, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kRows == 2) {
      _tile_loadd(5, a + kTile * lda, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (kColumns == 2) _tile_stored(1, c + kTile, c_bytes);
  if (kRows == 2) _tile_stored(2, c + kTile * ldc, c_bytes);
  if (kRows == 2 && kColumns == 2) _tile_stored(3, c + kTile * ldc + kTile, c_bytes);
  __asm__ volatile("" ::: "memory");
}

// 16 or 32 rows (`rows` of them meant, the rest padding) times `columns`, a multiple of 16; depth a multiple of 32.
inline void tile_gemm(int64_t rows, int64_t columns, int64_t depth, const Bfloat* a, int64_t lda, const Bfloat* b,
                      int64_t next_depth, int64_t next_column, float* c, int64_t ldc, bool add) {
  for (; columns > kTile; columns -= 2 * kTile, b += 2 * next_column, c += 2 * kTile) {
    if (rows > kTile) {
      tile_block<2, 2>(depth, a, lda, b, next_depth, next_column, c, ldc, add);
    } else {
      tile_block<1, 2>(depth, a, lda, b, next_depth, next_column, c, ldc, add);
    }
  }
  if (columns == 0) return;
  if (rows > kTile) {
    tile_block<2, 1>(depth, a, lda, b, next_depth, next_column, c, ldc, add);
  } else {
    tile_block<1, 1>(depth, a, lda, b, next_depth, next_column, c, ldc, add);
  }
}

// Right operand out of row-major rows: tile (d, j) at out + (d * columns / 16 + j) * 512 holds rows 32 d.. and columns
// 16 j..; zeros outside. columns: of the operand, a multiple of 16, of which `width` are there.
inline void pack_rows(const Bfloat* source, int64_t stride, int64_t rows, int64_t width, int64_t columns, Bfloat* out) {
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t c = 0; c < columns; c += kTile) {
      const int64_t left = width > c ? width - c : 0, count = left < kTile ? left : kTile;
      const Bfloat* place = source + r * stride + c;
      Bfloat buffer[2][kTile] = {};
      memcpy(buffer[0], place, (size_t)count * 2);
      if (r + 1 < rows) memcpy(buffer[1], place + stride, (size_t)count * 2);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer[0])));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer[1])));
      Bfloat* tile = out + (r / kTileDepth * (columns / kTile) + c / kTile) * kTileSize;
      _mm512_storeu_si512(tile + r % kTileDepth * kTile, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
  const int64_t padded = (rows + kTileDepth - 1) / kTileDepth * kTileDepth;
  for (int64_t r = rows + rows % 2; r < padded; r += 2) {
    for (int64_t c = 0; c < columns; c += kTile) {
      Bfloat* tile = out + (r / kTileDepth * (columns / kTile) + c / kTile) * kTileSize;
      memset(tile + r % kTileDepth * kTile, 0, 64);
    }
  }
}

// Right operand that is the transpose of row-major rows: tile (j, d) at out + (j * depth / 32 + d) * 512 holds source
// rows 16 j.. as columns and source columns 32 d.. as rows; zeros outside. depth: a multiple of 32, of which `width`
// are there.
inline void pack_transposed(const Bfloat* source, int64_t stride, int64_t rows, int64_t width, int64_t depth,
                            Bfloat* out) {
  for (int64_t r = 0; r < rows; r += kTile) {
    for (int64_t c = 0; c < depth; c += kTileDepth, out += kTileSize) {
      const int64_t count = width - c < kTileDepth ? width - c : kTileDepth;
      uint32_t pairs[kTile][kTile] = {};
      for (int64_t i = 0; i < kTile && r + i < rows; ++i) {
        memcpy(pairs[i], source + (r + i) * stride + c, (size_t)count * 2);
      }
      const __m512i step = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(16));
      for (int64_t p = 0; p < kTile; ++p) {
        _mm512_storeu_si512(out + p * kTileDepth, _mm512_i32gather_epi32(step, &pairs[0][p], 4));
      }
    }
  }
}

}  // namespace

#endif
