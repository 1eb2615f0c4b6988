// What both paths of the shared prompt attention have in common: where the stacked rows of the two kinds lie.
#pragma once

#include <math.h>

#include "common/device.cuh"
#include "prompt_attention_cuda.h"

namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Row x of the stack: commonality rows first, then difference rows. x must be less than stacked_rows.
struct StackedRow {
  int64_t row, rows;
  bool second;
};

__host__ __device__ __forceinline__ int64_t stacked_rows(const CaptPromptAttentionSharedCuda& args) {
  return args.query[0].rows + args.query[1].rows;
}

__device__ __forceinline__ StackedRow stacked_row(const CaptPromptAttentionSharedCuda& args, int64_t x) {
  const bool second = x >= args.query[0].rows;
  return {second ? x - args.query[0].rows : x, second ? args.query[1].rows : args.query[0].rows, second};
}

// Offset of a row of head h in a tensor [batch, rows, heads * head_dim].
__device__ __forceinline__ int64_t dense_offset(const CaptPromptAttentionSharedCuda& args, const StackedRow& at,
                                                int64_t b, int64_t h) {
  return ((b * at.rows + at.row) * args.heads + h) * args.head_dim;
}

// Offset of a row's number in a tensor [batch, heads, rows].
__device__ __forceinline__ int64_t number_offset(const CaptPromptAttentionSharedCuda& args, const StackedRow& at,
                                                 int64_t b, int64_t h) {
  return (b * args.heads + h) * at.rows + at.row;
}

template <typename T>
__device__ __forceinline__ const T* query_row(const CaptPromptAttentionSharedCuda& args, int64_t x, int64_t b,
                                              int64_t h) {
  const StackedRow at = stacked_row(args, x);
  const int32_t per_image = at.second ? args.query[1].per_image : args.query[0].per_image;
  const void* query = at.second ? args.query[1].query : args.query[0].query;
  return static_cast<const T*>(query) + dense_offset(args, at, per_image != 0 ? b : 0, h);
}

template <typename T>
__device__ __forceinline__ const T* grad_row(const CaptPromptAttentionSharedCuda& args, int64_t x, int64_t b,
                                             int64_t h) {
  const StackedRow at = stacked_row(args, x);
  return static_cast<const T*>(at.second ? args.query[1].grad : args.query[0].grad) + dense_offset(args, at, b, h);
}

__device__ __forceinline__ float row_lse(const CaptPromptAttentionSharedCuda& args, int64_t x, int64_t b, int64_t h) {
  const StackedRow at = stacked_row(args, x);
  return (at.second ? args.query[1].lse : args.query[0].lse)[number_offset(args, at, b, h)];
}

// The backward's row sums of grad * out, less the gradient of the log-sum-exp: workspace [batch, heads, stacked rows].
__device__ __forceinline__ float& row_delta(const CaptPromptAttentionSharedCuda& args, int64_t x, int64_t b,
                                            int64_t h) {
  return args.workspace[(b * args.heads + h) * stacked_rows(args) + x];
}

template <typename T>
__device__ __forceinline__ const T* key_row(const CaptPromptAttentionSharedCuda& args, int64_t l, int64_t b,
                                            int64_t h) {
  return static_cast<const T*>(args.keys) + b * args.key_batch_stride + l * args.key_token_stride + h * args.head_dim;
}

template <typename T>
__device__ __forceinline__ const T* value_row(const CaptPromptAttentionSharedCuda& args, int64_t l, int64_t b,
                                              int64_t h) {
  return static_cast<const T*>(args.values) + b * args.value_batch_stride + l * args.value_token_stride +
         h * args.head_dim;
}

// Which rows a block of the query gradient owns: tiles of the two kinds follow each other and do not mix, because one
// kind may be shared by all images and the other not.
struct QueryTile {
  int64_t first, stop;  // stacked rows
  bool per_image;
};

// Limits of a launch: blocks along x (more: cudaErrorInvalidConfiguration); bytes of shared memory that every device
// from sm_80 on gives a block (sm_86, sm_89 and sm_12x: 99 KiB).
constexpr int64_t kMostBlocks = 0x7FFFFFFF;
constexpr int kTooManyBlocks = 9;
constexpr size_t kMostShared = 101376;

__host__ __device__ __forceinline__ int64_t query_tiles(const CaptPromptAttentionSharedCuda& args, int64_t tile) {
  return (args.query[0].rows + tile - 1) / tile + (args.query[1].rows + tile - 1) / tile;
}

__device__ __forceinline__ QueryTile query_tile(const CaptPromptAttentionSharedCuda& args, int64_t which,
                                                int64_t tile) {
  const int64_t upper = (args.query[0].rows + tile - 1) / tile;
  const bool second = which >= upper;
  const int64_t first = second ? args.query[0].rows + (which - upper) * tile : which * tile;
  const int64_t end = second ? stacked_rows(args) : args.query[0].rows;
  return {first, first + tile < end ? first + tile : end,
          (second ? args.query[1].per_image : args.query[0].per_image) != 0};
}

// Sets of blocks that the query gradient needs: one for all images if no kind has queries of its own. Without images
// that one set writes zeros.
inline int64_t query_images(const CaptPromptAttentionSharedCuda& args) {
  return args.batch > 1 && (args.query[0].per_image != 0 || args.query[1].per_image != 0) ? args.batch : 1;
}

}  // namespace

// The tensor-core path: 16-bit storage, heads of a multiple of 16 up to 128, rows and addresses of 16 bytes.
bool capt_shared_tensor_fits(const CaptPromptAttentionSharedCuda& args);
int capt_shared_tensor_forward(const CaptPromptAttentionSharedCuda& args, void* stream);
int capt_shared_tensor_keys(const CaptPromptAttentionSharedCuda& args, void* stream);
int capt_shared_tensor_query(const CaptPromptAttentionSharedCuda& args, void* stream);
