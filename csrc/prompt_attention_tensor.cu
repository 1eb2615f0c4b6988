// Shared prompt attention on tensor cores: float16 and bfloat16, heads of a multiple of 16 up to 128.
// Definition and work split: prompt_attention_shared.cu.
//
// A block is 4 warps; a warp owns 16 rows (or keys) and all channels of a head. Tiles come by cp.async into shared
// memory, 16-byte chunks of row r at place chunk ^ (r % 8), so that eight rows of a matrix lie in different banks.
// Probabilities and slopes go from the accumulators of one product straight into the operands of the next.
//
//   resident  up to 256 keys and heads up to 64: keys and values of (image, head) stay in shared memory while the block
//             walks over row tiles; all scores of a row are in registers: no rescaling
//   streamed  longer keys or wider heads: keys in tiles of 64, the next one loading meanwhile; online softmax
//   keys      64 keys a block: dk, dv in registers over all rows      query  64 rows a block: dq over all keys (and
//   images)
//
// The backward recomputes p from lse. Exponentials are exp2, the scale and log2(e) in one factor.
#include "common/tensor_core.cuh"
#include "prompt_attention_shared.cuh"

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;
constexpr int kStreamed = 64;   // keys of a tile
constexpr int kResident = 256;  // keys that stay

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

// Chunk of 8 values of a row in a tile of kHead channels.
template <int kHead, typename T>
__device__ __forceinline__ T* chunk_at(T* tile, int row, int chunk) {
  return tile + row * kHead + ((chunk ^ (row & 7)) * 8);
}

// Starts loading rows [0, rows) of `count` rows of a tile; zeros for the others and for channels past `head`.
template <int kHead, typename T, typename Row>
__device__ __forceinline__ void load_async(T* tile, int count, int64_t rows, int head, const T* harmless, Row row) {
  constexpr int kChunks = kHead / 8;
  for (int i = threadIdx.x; i < count * kChunks; i += kThreads) {
    const int r = i / kChunks, chunk = i % kChunks;
    const bool valid = r < rows && chunk * 8 < head;
    copy_async_16(chunk_at<kHead>(tile, r, chunk), valid ? row(r) + chunk * 8 : harmless, valid);
  }
}

// Left operand: rows row...row + 15, channels 16 k...
template <int kHead, typename T>
__device__ __forceinline__ FragmentA left_operand(T* tile, int row, int k) {
  FragmentA a;
  load_matrices(a.word, chunk_at<kHead>(tile, row + lane() % 16, 2 * k + lane() / 16));
  return a;
}

// Right operands of two products, tile rows row..., row + 8... as columns, channels 16 k... as the summed index.
template <int kHead, typename T>
__device__ __forceinline__ void right_rows(T* tile, int row, int k, FragmentB (&b)[2]) {
  uint32_t word[4];
  load_matrices(word, chunk_at<kHead>(tile, row + lane() / 16 * 8 + lane() % 8, 2 * k + lane() / 8 % 2));
  b[0] = {{word[0], word[1]}};
  b[1] = {{word[2], word[3]}};
}

// Right operands of two products, channels 16 n..., 16 n + 8... as columns, tile rows row...row + 15 summed over.
template <int kHead, typename T>
__device__ __forceinline__ void right_channels(T* tile, int row, int n, FragmentB (&b)[2]) {
  uint32_t word[4];
  load_matrices_transposed(word, chunk_at<kHead>(tile, row + lane() % 16, 2 * n + lane() / 16));
  b[0] = {{word[0], word[1]}};
  b[1] = {{word[2], word[3]}};
}

template <typename T>
__device__ __forceinline__ uint32_t two(float low, float high) {
  Pack<T, 2> pack;
  narrow(low, pack.value[0]);
  narrow(high, pack.value[1]);
  uint32_t word;
  memcpy(&word, &pack, sizeof word);
  return word;
}

// Two neighbouring 16x8 accumulators as a 16x16 left operand.
template <typename T>
__device__ __forceinline__ FragmentA as_operand(const FragmentC& left, const FragmentC& right) {
  return {{two<T>(left.value[0], left.value[1]), two<T>(left.value[2], left.value[3]),
           two<T>(right.value[0], right.value[1]), two<T>(right.value[2], right.value[3])}};
}

// sum[] += left (16 x head) . tile rows [0, count)^T, 16 tile rows at a time.
template <typename T, int kHead, int kCount>
__device__ __forceinline__ void add_products(T* left, int left_row, T* right, int count, int head,
                                             FragmentC (&sum)[kCount / 8]) {
#pragma unroll
  for (int k = 0; k < kHead / 16; ++k) {
    if (16 * k >= head) break;
    const FragmentA a = left_operand<kHead>(left, left_row, k);
#pragma unroll
    for (int n = 0; n < kCount / 16; ++n) {
      if (16 * n >= count) break;
      FragmentB b[2];
      right_rows<kHead>(right, 16 * n, k, b);
      multiply_add(sum[2 * n], a, b[0], T{});
      multiply_add(sum[2 * n + 1], a, b[1], T{});
    }
  }
}

// sum[] += factor (16 x count) . tile rows [0, count), all channels.
template <typename T, int kHead, int kCount>
__device__ __forceinline__ void add_weighted(const FragmentC (&factor)[kCount / 8], T* tile, int count, int head,
                                             FragmentC (&sum)[kHead / 8]) {
#pragma unroll
  for (int k = 0; k < kCount / 16; ++k) {
    if (16 * k >= count) break;
    const FragmentA a = as_operand<T>(factor[2 * k], factor[2 * k + 1]);
#pragma unroll
    for (int n = 0; n < kHead / 16; ++n) {
      if (16 * n >= head) break;
      FragmentB b[2];
      right_channels<kHead>(tile, 16 * k, n, b);
      multiply_add(sum[2 * n], a, b[0], T{});
      multiply_add(sum[2 * n + 1], a, b[1], T{});
    }
  }
}

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);
  return value + __shfl_xor_sync(0xFFFFFFFFu, value, 2);
}
__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, 2));
}

// Running softmax of the two rows a lane shares with its quad: g and g + 8 of the warp's 16.
template <int kHead>
struct Running {
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {};
  FragmentC out[kHead / 8] = {};
};

// Adds `count` keys, at most kKeys, to a warp's rows.
template <typename T, int kHead, int kKeys, bool kFirst>
__device__ __forceinline__ void attend(T* queries, T* keys, T* values, int64_t left, int head, float factor,
                                       Running<kHead>& state) {
  const int count = static_cast<int>(left < kKeys ? left : kKeys);
  FragmentC p[kKeys / 8] = {};
  add_products<T, kHead, kKeys>(queries, 16 * warp(), keys, count, head, p);
  float found[2] = {state.most[0], state.most[1]};
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[n].value[i] = 8 * n + 2 * (lane() % 4) + i % 2 < count ? p[n].value[i] * factor : -INFINITY;
      found[i / 2] = fmaxf(found[i / 2], p[n].value[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    found[i] = quad_max(found[i]);
    if (!kFirst) {
      const float fade = exp2f(state.most[i] - (found[i] == -INFINITY ? 0.0f : found[i]));
      state.total[i] *= fade;
#pragma unroll
      for (int n = 0; n < kHead / 8; ++n) {
        state.out[n].value[2 * i] *= fade;
        state.out[n].value[2 * i + 1] *= fade;
      }
    }
    state.most[i] = found[i];
    if (found[i] == -INFINITY) found[i] = 0.0f;
  }
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[n].value[i] = exp2f(p[n].value[i] - found[i / 2]);
      state.total[i / 2] += p[n].value[i];
    }
  }
  add_weighted<T, kHead, kKeys>(p, values, count, head, state.out);
}

template <typename T, int kHead>
__device__ __forceinline__ void store_attended(const CaptPromptAttentionSharedCuda& args, int64_t first, int64_t b,
                                               int64_t h, int head, const Running<kHead>& state) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = quad_sum(state.total[i]);
    const int64_t x = first + 16 * warp() + lane() / 4 + 8 * i;
    if (x >= stacked_rows(args)) continue;
    const StackedRow row = stacked_row(args, x);
    T* out = static_cast<T*>(row.second ? args.query[1].out : args.query[0].out) + dense_offset(args, row, b, h);
    const float share = 1.0f / total;
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) {
      if (8 * n >= head) break;
      const uint32_t word = two<T>(state.out[n].value[2 * i] * share, state.out[n].value[2 * i + 1] * share);
      *reinterpret_cast<uint32_t*>(out + 8 * n + 2 * (lane() % 4)) = word;
    }
    if (lane() % 4 == 0) {
      float* lse = row.second ? args.query[1].lse : args.query[0].lse;
      lse[number_offset(args, row, b, h)] =
          state.most[i] == INFINITY ? INFINITY : (state.most[i] + log2f(total)) * kLn2;
    }
  }
}

// Image b, head h and the rest out of blockIdx.x.
struct Place {
  int64_t b, h;
  unsigned rest;
};
__device__ __forceinline__ Place place(const CaptPromptAttentionSharedCuda& args, unsigned parts) {
  const unsigned heads = static_cast<unsigned>(args.heads), both = blockIdx.x / parts;
  return {both / heads, both % heads, blockIdx.x % parts};
}

template <typename T, int kHead>
__device__ __forceinline__ void load_queries(const CaptPromptAttentionSharedCuda& args, T* tile, int count,
                                             int64_t first, int64_t stop, int64_t b, int64_t h) {
  load_async<kHead>(tile, count, stop - first, static_cast<int>(args.head_dim), static_cast<const T*>(args.keys),
                    [&](int r) { return query_row<T>(args, first + r, b, h); });
}

template <typename T, int kHead>
__device__ __forceinline__ void load_grads(const CaptPromptAttentionSharedCuda& args, T* tile, int count, int64_t first,
                                           int64_t stop, int64_t b, int64_t h) {
  load_async<kHead>(tile, count, stop - first, static_cast<int>(args.head_dim), static_cast<const T*>(args.keys),
                    [&](int r) { return grad_row<T>(args, first + r, b, h); });
}

template <typename T, int kHead>
__device__ __forceinline__ void load_keys_and_values(const CaptPromptAttentionSharedCuda& args, T* keys, T* values,
                                                     int count, int64_t first, int64_t b, int64_t h) {
  const int head = static_cast<int>(args.head_dim);
  const T* harmless = static_cast<const T*>(args.keys);
  load_async<kHead>(keys, count, args.length - first, head, harmless,
                    [&](int l) { return key_row<T>(args, first + l, b, h); });
  load_async<kHead>(values, count, args.length - first, head, harmless,
                    [&](int l) { return value_row<T>(args, first + l, b, h); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    resident_forward_kernel(CaptPromptAttentionSharedCuda args, unsigned parts) {
  constexpr int kHead = 64;
  CAPT_DYNAMIC_SHARED(T, queries);
  T* const keys = queries + kRows * kHead;
  T* const values = keys + kResident * kHead;
  const Place at = place(args, parts);
  const int64_t all = stacked_rows(args);
  const int head = static_cast<int>(args.head_dim);
  load_keys_and_values<T, kHead>(args, keys, values, static_cast<int>((args.length + 15) / 16 * 16), 0, at.b, at.h);
  for (int64_t first = int64_t{at.rest} * kRows; first < all; first += int64_t{parts} * kRows) {
    load_queries<T, kHead>(args, queries, kRows, first, all, at.b, at.h);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if (first + 16 * warp() < all) {
      Running<kHead> state;
      attend<T, kHead, kResident, true>(queries, keys, values, args.length, head, args.scale * kLog2e, state);
      store_attended<T, kHead>(args, first, at.b, at.h, head, state);
    }
    __syncthreads();
  }
}

template <typename T, int kHead>
__global__ void __launch_bounds__(kThreads)
    streamed_forward_kernel(CaptPromptAttentionSharedCuda args, unsigned tiles) {
  CAPT_DYNAMIC_SHARED(T, queries);
  T* const buffer = queries + kRows * kHead;  // two stages of keys and values
  const Place at = place(args, tiles);
  const int64_t all = stacked_rows(args), first = int64_t{at.rest} * kRows;
  const int head = static_cast<int>(args.head_dim);
  const auto keys = [&](int64_t start) { return buffer + start / kStreamed % 2 * (2 * kStreamed * kHead); };
  const auto load = [&](int64_t start) {
    load_keys_and_values<T, kHead>(args, keys(start), keys(start) + kStreamed * kHead, kStreamed, start, at.b, at.h);
    copy_async_commit();
  };
  load_queries<T, kHead>(args, queries, kRows, first, all, at.b, at.h);
  load(0);
  Running<kHead> state;
  for (int64_t start = 0; start < args.length; start += kStreamed) {
    if (start + kStreamed < args.length) {
      load(start + kStreamed);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    if (first + 16 * warp() < all) {
      T* const tile = keys(start);
      attend<T, kHead, kStreamed, false>(queries, tile, tile + kStreamed * kHead, args.length - start, head,
                                         args.scale * kLog2e, state);
    }
    __syncthreads();  // the stage just read is filled again by the next round
  }
  if (first + 16 * warp() < all) store_attended<T, kHead>(args, first, at.b, at.h, head, state);
}

// Rows (or keys) that pass by in one step of the backward: narrower for wide heads, whose sums fill the registers.
template <int kHead>
constexpr int kStep = kHead == 64 ? 64 : 32;

template <typename T, int kHead>
__device__ __forceinline__ void store_tile(T* target, int64_t pitch, int64_t rows, int head, float factor,
                                           const FragmentC (&sum)[kHead / 8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = 16 * warp() + lane() / 4 + 8 * i;
    if (r >= rows) continue;
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) {
      if (8 * n >= head) break;
      *reinterpret_cast<uint32_t*>(target + r * pitch + 8 * n + 2 * (lane() % 4)) =
          two<T>(factor * sum[n].value[2 * i], factor * sum[n].value[2 * i + 1]);
    }
  }
}

template <typename T, int kHead>
__global__ void __launch_bounds__(kThreads) tensor_keys_kernel(CaptPromptAttentionSharedCuda args, unsigned tiles) {
  constexpr int kPass = kStep<kHead>;
  CAPT_DYNAMIC_SHARED(T, keys);
  T* const values = keys + kRows * kHead;
  T* const queries = values + kRows * kHead;
  T* const grads = queries + kPass * kHead;
  float* const lse = reinterpret_cast<float*>(grads + kPass * kHead);
  float* const delta = lse + kPass;
  const Place at = place(args, tiles);
  const int64_t all = stacked_rows(args), first = int64_t{at.rest} * kRows;
  const int head = static_cast<int>(args.head_dim);
  const bool mine = first + 16 * warp() < args.length;
  const float factor = args.scale * kLog2e;
  FragmentC grad_keys[kHead / 8] = {}, grad_values[kHead / 8] = {};
  load_keys_and_values<T, kHead>(args, keys, values, kRows, first, at.b, at.h);
  for (int64_t start = 0; start < all; start += kPass) {
    load_queries<T, kHead>(args, queries, kPass, start, all, at.b, at.h);
    load_grads<T, kHead>(args, grads, kPass, start, all, at.b, at.h);
    copy_async_commit();
    for (int r = threadIdx.x; r < kPass; r += kThreads) {
      lse[r] = start + r < all ? row_lse(args, start + r, at.b, at.h) * kLog2e : 0.0f;
      delta[r] = start + r < all ? row_delta(args, start + r, at.b, at.h) : 0.0f;
    }
    copy_async_wait<0>();
    __syncthreads();
    if (mine) {
      const int count = static_cast<int>(all - start < kPass ? all - start : kPass);
      FragmentC p[kPass / 8] = {};  // keys x rows; 0 past the last row, where 0 * infinity may stand
      add_products<T, kHead, kPass>(keys, 16 * warp(), queries, count, head, p);
#pragma unroll
      for (int n = 0; n < kPass / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = 8 * n + 2 * (lane() % 4) + i % 2;
          p[n].value[i] = r < count ? exp2f(p[n].value[i] * factor - lse[r]) : 0.0f;
        }
      }
      if (args.grad_values != nullptr) add_weighted<T, kHead, kPass>(p, grads, count, head, grad_values);
      if (args.grad_keys != nullptr) {
        FragmentC slope[kPass / 8] = {};
        add_products<T, kHead, kPass>(values, 16 * warp(), grads, count, head, slope);
#pragma unroll
        for (int n = 0; n < kPass / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = 8 * n + 2 * (lane() % 4) + i % 2;
            p[n].value[i] = r < count ? p[n].value[i] * (slope[n].value[i] - delta[r]) : 0.0f;
          }
        }
        add_weighted<T, kHead, kPass>(p, queries, count, head, grad_keys);
      }
    }
    __syncthreads();
  }
  const int64_t pitch = args.heads * args.head_dim;
  const int64_t offset = (at.b * args.length + first) * pitch + at.h * args.head_dim;
  if (args.grad_keys != nullptr) {
    store_tile<T, kHead>(static_cast<T*>(args.grad_keys) + offset, pitch, args.length - first, head, args.scale,
                         grad_keys);
  }
  if (args.grad_values != nullptr) {
    store_tile<T, kHead>(static_cast<T*>(args.grad_values) + offset, pitch, args.length - first, head, 1.0f,
                         grad_values);
  }
}

template <typename T, int kHead>
__global__ void __launch_bounds__(kThreads) tensor_query_kernel(CaptPromptAttentionSharedCuda args, unsigned tiles) {
  constexpr int kPass = kStep<kHead>;
  CAPT_DYNAMIC_SHARED(T, queries);
  T* const grads = queries + kRows * kHead;
  T* const keys = grads + kRows * kHead;
  T* const values = keys + kPass * kHead;
  const Place at = place(args, tiles);
  const QueryTile tile = query_tile(args, at.rest, kRows);
  if (at.b >= (tile.per_image ? args.batch : 1)) return;
  const int head = static_cast<int>(args.head_dim);
  const int64_t row = tile.first + 16 * warp() + lane() / 4;
  const bool mine = tile.first + 16 * warp() < tile.stop;
  const float factor = args.scale * kLog2e;
  FragmentC sum[kHead / 8] = {};
  load_queries<T, kHead>(args, queries, kRows, tile.first, tile.stop, at.b, at.h);
  for (int64_t b = at.b; b < (tile.per_image ? at.b + 1 : args.batch); ++b) {
    float lse[2], delta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lse[i] = row + 8 * i < tile.stop ? row_lse(args, row + 8 * i, b, at.h) * kLog2e : 0.0f;
      delta[i] = row + 8 * i < tile.stop ? row_delta(args, row + 8 * i, b, at.h) : 0.0f;
    }
    load_grads<T, kHead>(args, grads, kRows, tile.first, tile.stop, b, at.h);
    for (int64_t start = 0; start < args.length; start += kPass) {
      load_keys_and_values<T, kHead>(args, keys, values, kPass, start, b, at.h);
      copy_async_commit();
      copy_async_wait<0>();
      __syncthreads();
      if (mine) {
        const int count = static_cast<int>(args.length - start < kPass ? args.length - start : kPass);
        FragmentC p[kPass / 8] = {}, slope[kPass / 8] = {};  // rows x keys; past the last key, keys are zeros
        add_products<T, kHead, kPass>(queries, 16 * warp(), keys, count, head, p);
        add_products<T, kHead, kPass>(grads, 16 * warp(), values, count, head, slope);
#pragma unroll
        for (int n = 0; n < kPass / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool inside = 8 * n + 2 * (lane() % 4) + i % 2 < count;
            const float weight = exp2f(p[n].value[i] * factor - lse[i / 2]);
            slope[n].value[i] = inside ? weight * (slope[n].value[i] - delta[i / 2]) : 0.0f;
          }
        }
        add_weighted<T, kHead, kPass>(slope, keys, count, head, sum);
      }
      __syncthreads();
    }
  }
  const StackedRow at_row = stacked_row(args, tile.first);
  T* target = static_cast<T*>(at_row.second ? args.query[1].grad_query : args.query[0].grad_query) +
              dense_offset(args, at_row, tile.per_image ? at.b : 0, at.h);
  store_tile<T, kHead>(target, args.heads * args.head_dim, tile.stop - tile.first, head, args.scale, sum);
}

unsigned tiles_of(int64_t count) { return static_cast<unsigned>((count + kRows - 1) / kRows); }

// Row tiles of (image, head) are shared out among this many blocks: enough for a few blocks on each of some hundred
// processors, no more, because each of them loads the keys and values.
unsigned resident_parts(const CaptPromptAttentionSharedCuda& args) {
  constexpr int64_t kWanted = 1024;
  const int64_t owners = args.batch * args.heads, tiles = tiles_of(stacked_rows(args));
  const int64_t parts = (kWanted + owners - 1) / owners;
  return static_cast<unsigned>(parts < tiles ? parts : tiles);
}

#define CAPT_TENSOR(kernel, images, parts, elements, more)                                                          \
  do {                                                                                                              \
    constexpr size_t bytes = static_cast<size_t>(elements) * sizeof(T) + (more);                                    \
    static_assert(bytes <= kMostShared, "more shared memory than every device from sm_80 on has");                  \
    const int refused = CAPT_ALLOW_SHARED((kernel), bytes);                                                         \
    if (refused != 0) return refused;                                                                               \
    const unsigned number = parts;                                                                                  \
    const int64_t blocks = (images) * args.heads * number;                                                          \
    if (blocks > kMostBlocks) return kTooManyBlocks;                                                                \
    CAPT_LAUNCH_SHARED((kernel), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), bytes, stream, args, number); \
    return CAPT_LAST_ERROR();                                                                                       \
  } while (0)

template <typename T, int kHead>
int streamed(const CaptPromptAttentionSharedCuda& args, void* stream) {
  CAPT_TENSOR((streamed_forward_kernel<T, kHead>), args.batch, tiles_of(stacked_rows(args)),
              (kRows + 4 * kStreamed) * kHead, 0);
}

template <typename T>
int forward(const CaptPromptAttentionSharedCuda& args, void* stream) {
  if (args.head_dim > 64) return streamed<T, 128>(args, stream);
  if (args.length > kResident) return streamed<T, 64>(args, stream);
  CAPT_TENSOR(resident_forward_kernel<T>, args.batch, resident_parts(args), (kRows + 2 * kResident) * 64, 0);
}

template <typename T, int kHead>
int keys(const CaptPromptAttentionSharedCuda& args, void* stream) {
  constexpr int kPass = kStep<kHead>;
  CAPT_TENSOR((tensor_keys_kernel<T, kHead>), args.batch, tiles_of(args.length), 2 * (kRows + kPass) * kHead,
              2 * kPass * sizeof(float));
}

template <typename T, int kHead>
int query(const CaptPromptAttentionSharedCuda& args, void* stream) {
  CAPT_TENSOR((tensor_query_kernel<T, kHead>), query_images(args), static_cast<unsigned>(query_tiles(args, kRows)),
              2 * (kRows + kStep<kHead>)*kHead, 0);
}

}  // namespace

bool capt_shared_tensor_fits(const CaptPromptAttentionSharedCuda& args) {
  const auto even = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  bool fits = args.dtype != CAPT_FLOAT32 && args.head_dim % 16 == 0 && args.head_dim <= 128 && even(args.keys) &&
              even(args.values) && even(args.grad_keys) && even(args.grad_values);
  for (const int64_t stride :
       {args.key_batch_stride, args.key_token_stride, args.value_batch_stride, args.value_token_stride}) {
    fits = fits && stride % 8 == 0;
  }
  for (const CaptSharedQuery& kind : args.query) {
    fits = fits && even(kind.query) && even(kind.out) && even(kind.grad) && even(kind.grad_query);
  }
  return fits;
}

int capt_shared_tensor_forward(const CaptPromptAttentionSharedCuda& args, void* stream) {
  return args.dtype == CAPT_FLOAT16 ? forward<HalfBits>(args, stream) : forward<BfloatBits>(args, stream);
}

int capt_shared_tensor_keys(const CaptPromptAttentionSharedCuda& args, void* stream) {
  if (args.dtype == CAPT_FLOAT16) {
    return args.head_dim > 64 ? keys<HalfBits, 128>(args, stream) : keys<HalfBits, 64>(args, stream);
  }
  return args.head_dim > 64 ? keys<BfloatBits, 128>(args, stream) : keys<BfloatBits, 64>(args, stream);
}

int capt_shared_tensor_query(const CaptPromptAttentionSharedCuda& args, void* stream) {
  if (args.dtype == CAPT_FLOAT16) {
    return args.head_dim > 64 ? query<HalfBits, 128>(args, stream) : query<HalfBits, 64>(args, stream);
  }
  return args.head_dim > 64 ? query<BfloatBits, 128>(args, stream) : query<BfloatBits, 64>(args, stream);
}
