// C interface of bank_topk on the CPU.
#pragma once

#include "capt.h"

#ifdef __cplusplus
extern "C" {
#endif

struct CaptBankTopk {
  const void* queries;     // [n_queries, dim] of dtype; strides below, channels contiguous
  const void* rows;        // [n_rows, dim] of dtype
  const int64_t* row_ids;  // [n_rows], or null: nothing is excluded
  const int64_t* exclude;  // [n_queries], or null; negative: nothing
  int64_t n_queries, n_rows, dim, k;
  int64_t query_stride, row_stride;  // in elements
  // The loop over the rows is chosen for this many queries, however few one pass packs: otherwise scores would depend
  // on the size of a pass. n_queries, or 1 where every pass packs a single query.
  int64_t loop_queries;
  int32_t dtype;
};

// The best rows so far, one list for each of `count` queries from `first` on. A key orders like (score, -row): the
// upper half is the score as an ordered integer, the lower one ~row. Lists are unordered; a full one is cut to its k
// best.
struct CaptTopkLists {
  uint64_t* keys;     // [count, capacity]
  int64_t* lengths;   // [count]
  float* thresholds;  // [count rounded up to 32]: a score must exceed it to enter a list
  int64_t first, count, k, capacity;
};

enum {
  CAPT_BANK_QUERIES = 256,  // queries of one pass over the bank
};

// Bytes of the packed form of `count` queries, and packing of queries [first, first + count). Aligned to 64 bytes.
int64_t capt_bank_packed_bytes(const struct CaptBankTopk* args, int64_t count);
int capt_bank_pack(const struct CaptBankTopk* args, int level, int64_t first, int64_t count, void* packed);

// Capacity of a list that sees at most `n_rows` rows; empty lists; a list cut to its k best, in no order.
int64_t capt_topk_capacity(int64_t k, int64_t n_rows);
void capt_topk_clear(struct CaptTopkLists* lists);
void capt_topk_cut(struct CaptTopkLists* lists, int64_t list);
// The k best of `count` keys (reordered) as scores and row numbers, descending, then -inf and -1.
void capt_topk_write(uint64_t* keys, int64_t count, int64_t k, float* scores, int64_t* index);

// Offers the rows [begin, end) to the lists of queries that are packed at `packed`. Rows must come in ascending order.
// scratch: capt_bank_scratch_bytes, aligned to 64 bytes. The lists found do not depend on how rows are split into
// calls.
int64_t capt_bank_scratch_bytes(const struct CaptBankTopk* args);
int capt_bank_scan(const struct CaptBankTopk* args, int level, const void* packed, int64_t begin, int64_t end,
                   struct CaptTopkLists* lists, void* scratch);

#ifdef __cplusplus
}
#endif
