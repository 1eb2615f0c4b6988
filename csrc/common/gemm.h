// Small matrix products in float32 for data that sits in cache. Included only by *.simd.cpp files.
#pragma once

#include "common/simd.h"

namespace {

// A register tile of kTileRows x kTileVectors accumulators leaves room for one row of B and a broadcast.
constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

// Element (i, k) of A is at a[i * row + k * column]; B [depth, ldb] and C [rows, ldc] are row-major.
struct Left {
  const float* a;
  int64_t row, column;
};

template <int kRows, int kVectors>
inline void gemm_tile(int64_t depth, Left left, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  Vector sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sum[i][j] = add ? load(c + i * ldc + j * kWidth) : Vector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + k * ldb + j * kWidth);
    for (int i = 0; i < kRows; ++i) {
      const Vector factor = splat(left.a[i * left.row + k * left.column]);
      for (int j = 0; j < kVectors; ++j) sum[i][j] += factor * row[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kWidth, sum[i][j]);
  }
}

template <int kVectors>
inline void gemm_columns(int64_t rows, int64_t depth, Left left, const float* b, int64_t ldb, float* c, int64_t ldc,
                         bool add) {
  for (; rows >= kTileRows; rows -= kTileRows) {
    gemm_tile<kTileRows, kVectors>(depth, left, b, ldb, c, ldc, add);
    left.a += kTileRows * left.row;
    c += kTileRows * ldc;
  }
  switch (rows) {
    case 5:
      return gemm_tile<5, kVectors>(depth, left, b, ldb, c, ldc, add);
    case 4:
      return gemm_tile<4, kVectors>(depth, left, b, ldb, c, ldc, add);
    case 3:
      return gemm_tile<3, kVectors>(depth, left, b, ldb, c, ldc, add);
    case 2:
      return gemm_tile<2, kVectors>(depth, left, b, ldb, c, ldc, add);
    case 1:
      return gemm_tile<1, kVectors>(depth, left, b, ldb, c, ldc, add);
  }
}

// C = A B, or C += A B. `columns` is a multiple of kWidth; rows of B and C are padded to it.
inline void gemm(int64_t rows, int64_t columns, int64_t depth, Left left, const float* b, int64_t ldb, float* c,
                 int64_t ldc, bool add) {
  constexpr int64_t kStep = kTileVectors * kWidth;
  for (; columns >= kStep; columns -= kStep, b += kStep, c += kStep) {
    gemm_columns<kTileVectors>(rows, depth, left, b, ldb, c, ldc, add);
  }
  switch (columns / kWidth) {
    case 3:
      return gemm_columns<3>(rows, depth, left, b, ldb, c, ldc, add);
    case 2:
      return gemm_columns<2>(rows, depth, left, b, ldb, c, ldc, add);
    case 1:
      return gemm_columns<1>(rows, depth, left, b, ldb, c, ldc, add);
  }
}

}  // namespace
