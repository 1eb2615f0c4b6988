// How a call of prompt_attention_shared is cut into tasks: by sizes alone, so results do not depend on threads or
// level.
#pragma once

#include "prompt_attention_shared.h"

namespace {

constexpr int64_t kTaskRows = 1056;     // packing the keys costs a few rows' worth of work
constexpr int64_t kBackwardTasks = 32;  // enough of them to keep threads busy; each group of images costs a partial sum

inline int64_t row_blocks(const CaptSharedAttention& args) {
  const int64_t rows = args.rows[0] > args.rows[1] ? args.rows[0] : args.rows[1];
  return rows > kTaskRows ? (rows + kTaskRows - 1) / kTaskRows : 1;
}

struct ForwardTask {
  int64_t image, head, first, last;
};

inline ForwardTask forward_split(const CaptSharedAttention& args, int64_t task) {
  const int64_t blocks = row_blocks(args), pair = task / blocks, first = task % blocks * kTaskRows;
  return ForwardTask{pair / args.n_heads, pair % args.n_heads, first, first + kTaskRows};
}

// Keys and values sum over all rows, so their gradients keep the rows of an image and head together.
inline int64_t backward_row_blocks(const CaptSharedAttentionBackward& args) {
  return args.grad_keys != nullptr || args.grad_values != nullptr ? 1 : row_blocks(args.forward);
}

// The gradient of stream i's query is wanted and sums over images.
inline bool sums_images(const CaptSharedAttentionBackward& args, int i) {
  return args.grad_query[i] != nullptr && args.sums_images[i];
}

// Groups of images: one per image unless a query shared by images sums over them.
inline int64_t backward_groups(const CaptSharedAttentionBackward& args) {
  const int64_t batch = args.forward.batch;
  if (!sums_images(args, 0) && !sums_images(args, 1)) return batch;
  const int64_t others = args.forward.n_heads * backward_row_blocks(args);
  const int64_t wanted = (kBackwardTasks + others - 1) / others;
  return wanted < batch ? wanted : batch;
}

struct BackwardTask {
  int64_t group, from, to, head, first, last;
};

inline BackwardTask backward_split(const CaptSharedAttentionBackward& args, int64_t task) {
  const int64_t blocks = backward_row_blocks(args), groups = backward_groups(args), batch = args.forward.batch;
  const int64_t pair = task / blocks, group = pair / args.forward.n_heads, block = task % blocks;
  const int64_t last = blocks == 1 ? INT64_MAX : (block + 1) * kTaskRows;
  return BackwardTask{
      group, group * batch / groups, (group + 1) * batch / groups, pair % args.forward.n_heads, block * kTaskRows,
      last};
}

}  // namespace
