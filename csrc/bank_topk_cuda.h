// C interface of bank_topk on a GPU.
#pragma once

#include "capt.h"

#ifdef __cplusplus
extern "C" {
#endif

// Which kernel scans the whole bank. AUTO takes HOPPER where it can run (compute capability 9.0, 16-bit values, dim a
// multiple of 8, 16-byte aligned tensors, fewer than 2^31 rows), otherwise PORTABLE; HOPPER is an error where it
// cannot.
enum CaptBankTopkPath { CAPT_BANK_TOPK_AUTO = 0, CAPT_BANK_TOPK_PORTABLE = 1, CAPT_BANK_TOPK_HOPPER = 2 };

// The k rows with the largest inner product for each query, over the whole bank or, with ranges, over the union of the
// ranges of each pair. Descending; equal scores: lower row first; NaN and -inf never; shorter lists end in -inf, -1.
struct CaptBankTopkCuda {
  const void* queries;     // [n_query, dim] of dtype, contiguous
  const void* rows;        // [n_rows, dim] of dtype, contiguous; n_rows < 2^32
  const int64_t* ranges;   // [n_query, n_pairs, n_ranges, 2] (start, stop), contiguous, or null: the whole bank
  const int64_t* row_ids;  // [n_rows], or null
  const int64_t* exclude;  // [n_query], or null: rows with this id are left out, a negative id leaves out none
  float* scores;           // [n_query, n_pairs, k]
  int64_t* index;          // [n_query, n_pairs, k]
  void* workspace;         // capt_bank_topk_cuda_workspace(args) bytes, 16-byte aligned, any contents
  int64_t n_query, n_rows, dim, n_pairs, n_ranges, k;  // n_pairs is 1 without ranges; k < 2^31 - 64
  int32_t dtype;
  int32_t path;  // enum CaptBankTopkPath; PORTABLE or AUTO with ranges
  // 0: chosen for the device and the sizes; tests set them.
  int32_t parts;  // lists a query's rows are split over; capt_bank_topk_cuda_workspace fills it in
  int32_t tile;   // queries of a block: 16, 64 or, on the Hopper path, 256
};

// Bytes of workspace, at most 64 MiB when parts is 0, which is replaced by the number chosen. To be called first.
int64_t capt_bank_topk_cuda_workspace(struct CaptBankTopkCuda* args);

// Asynchronous on `stream`, no allocation, no synchronisation; the return value is a cudaError_t (0: launched).
int capt_bank_topk_cuda(const struct CaptBankTopkCuda* args, void* stream);

#ifdef __cplusplus
}
#endif
