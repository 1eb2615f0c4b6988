// bank_topk on Hopper (sm_90a): the whole bank, 16-bit values. See bank_topk.cu for the plan of the search.
//
//   warpgroup 2, one thread   TMA: 128 rows and 16, 64 or 256 queries, 64 columns each -> ring of stages
//                               |  full: bytes have arrived          ^  empty: both products are done
//                               v                                    |
//   warpgroups 0 and 1        WGMMA: 64 rows (M) x queries (N) each, operands from shared memory, one slice in flight;
//                             then the filter, while the ring fills with the next tile
//
// Operands are never in registers; only 256 queries need more than 128 registers (128 sums a thread), which the
// producer's warpgroup gives up. Limits: compute capability 9.0, dim a multiple of 8, N < 2^31, aligned tensors.

#include "bank_topk.cuh"
#include "common/hopper.cuh"

namespace {

using bank::Block;
using bank::kSliceBytes;
using bank::kTileRows;
using bank::Share;
using bank::Task;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
#define CAPT_HOPPER_CODE 1
constexpr int kBlockThreads = bank::kThreads + 128;
#else
// Other targets get an empty kernel for one warp: by that the host sees which of them the library holds.
#define CAPT_HOPPER_CODE 0
constexpr int kBlockThreads = 32;
#endif
constexpr int kConsumers = bank::kThreads, kProducer = kConsumers;
constexpr int kLaunched = kConsumers + 128;
constexpr int kConsumerBarrier = 1;

template <int kQueries>
struct Ring {
  static constexpr int kStages = kQueries == 256 ? 3 : 6;
  static constexpr int kStageBytes = (kTileRows + kQueries) * kSliceBytes;
  static constexpr int kBytes = kStages * kStageBytes + Block<kQueries>::kBytes + 2 * kStages * 8;
  unsigned char* stages;
  uint64_t *full, *empty;
  int stage = 0, parity = 0;

  __device__ explicit Ring(unsigned char* memory)
      : stages(memory),
        full(reinterpret_cast<uint64_t*>(memory + kStages * kStageBytes + Block<kQueries>::kBytes)),
        empty(full + kStages) {}
  __device__ __forceinline__ unsigned char* rows() const { return stages + stage * kStageBytes; }
  __device__ __forceinline__ unsigned char* queries() const { return rows() + kTileRows * kSliceBytes; }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <typename T, int kQueries>
__global__ void __launch_bounds__(kBlockThreads, kQueries == 16 ? 2 : 1)
    bank_topk_hopper_kernel(const __grid_constant__ Task task, const __grid_constant__ TensorMap rows,
                            const __grid_constant__ TensorMap queries) {
#if CAPT_HOPPER_CODE
  CAPT_DYNAMIC_SHARED(unsigned char, memory);
  using Stages = Ring<kQueries>;
  Stages ring(memory);
  Block<kQueries> block(memory + Stages::kStages * Stages::kStageBytes);
  const Share share = bank::share_of<kQueries>(task);
  const int slices = static_cast<int>((task.args.dim + 63) / 64);
  block.clear(share.queries);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Stages::kStages; ++i) {
      barrier_start(ring.full + i, 1);
      barrier_start(ring.empty + i, bank::kWarps);
    }
    barriers_started();
  }
  __syncthreads();
  if (threadIdx.x >= kProducer) {
    if constexpr (kQueries == 256) fewer_registers<40>();
    if (threadIdx.x == kProducer) {
      for (int64_t tile = share.first_tile; tile < share.end_tile; ++tile) {
        for (int slice = 0; slice < slices; ++slice) {
          uint64_t* full = ring.full + ring.stage;
          barrier_wait(ring.empty + ring.stage, ring.parity ^ 1);
          barrier_arrive_expecting(full, Stages::kStageBytes);
          load_box(&rows, ring.rows(), full, static_cast<int>(tile * kTileRows), slice * 64);
          load_box(&queries, ring.queries(), full, static_cast<int>(share.first_query), slice * 64);
          ring.advance();
        }
      }
    }
  } else {
    if constexpr (kQueries == 256) more_registers<232>();
    const int half = threadIdx.x / 128 * 64 * kSliceBytes;  // the rows of my warpgroup
    const auto barrier = [] { named_barrier(kConsumerBarrier, kConsumers); };
    float sum[kQueries / 2];
    int round = 0;
    for (int64_t tile = share.first_tile; tile < share.end_tile; ++tile) {
      uint64_t* left = nullptr;  // the stage that the product before this one reads
      for (int slice = 0; slice < slices; ++slice) {
        barrier_wait(ring.full + ring.stage, ring.parity);
        const uint64_t a = tile_descriptor(ring.rows() + half), b = tile_descriptor(ring.queries());
        warpgroup_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          warpgroup_multiply_add(sum, along(a, step * 32), along(b, step * 32), slice > 0 || step > 0, T{});
        }
        warpgroup_commit();
        warpgroup_wait<1>();
        if (left != nullptr && threadIdx.x % bank::kLanes == 0) barrier_arrive(left);
        left = ring.empty + ring.stage;
        ring.advance();
      }
      warpgroup_wait<0>();
      warpgroup_use(sum);
      if (threadIdx.x % bank::kLanes == 0) barrier_arrive(left);
      bank::select<kQueries>(task, block, share, sum, tile, round, barrier);
    }
    bank::finish(task, block, share, barrier);
  }
#endif
}

template <typename T, int kQueries>
int launch(const Task& task, void* stream) {
  const CaptBankTopkCuda& args = task.args;
  TensorMap rows, queries;
  const bool bfloat = args.dtype == CAPT_BFLOAT16;
  if (const int error = make_tensor_map(&rows, args.rows, bfloat, args.n_rows, args.dim, kTileRows)) return error;
  if (const int error = make_tensor_map(&queries, args.queries, bfloat, args.n_query, args.dim, kQueries)) return error;
  static_assert(Ring<kQueries>::kBytes <= 232448, "more shared memory than a block has on sm_90");
  auto* kernel = bank_topk_hopper_kernel<T, kQueries>;
  if (const int error = CAPT_ALLOW_SHARED(kernel, Ring<kQueries>::kBytes)) return error;
  const dim3 grid(static_cast<unsigned>((args.n_query + kQueries - 1) / kQueries), static_cast<unsigned>(task.parts));
  CAPT_LAUNCH_SHARED(kernel, grid, dim3(kLaunched), Ring<kQueries>::kBytes, stream, task, rows, queries);
  return CAPT_LAST_ERROR();
}

template <typename T>
int launch_queries(const Task& task, int queries, void* stream) {
  switch (queries) {
    case 16:
      return launch<T, 16>(task, stream);
    case 64:
      return launch<T, 64>(task, stream);
    default:
      return launch<T, 256>(task, stream);
  }
}

// Is this a device of compute capability 9.0, and does the library hold code for it?
bool device_can() {
#ifdef __CUDACC__
  constexpr int kDevices = 64;
  static signed char known[kDevices];  // 0: not asked yet, 1: yes, -1: no; every thread would write the same
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  if (known[device] == 0) {
    int major = 0, minor = 0;
    cudaFuncAttributes code{};
    const bool can = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
                     major == 9 && minor == 0 &&
                     cudaFuncGetAttributes(&code, bank_topk_hopper_kernel<HalfBits, 16>) == cudaSuccess &&
                     code.maxThreadsPerBlock >= kLaunched;
    cudaGetLastError();
    known[device] = can ? 1 : -1;
  }
  return known[device] == 1;
#else
  return true;
#endif
}

}  // namespace

namespace bank {

bool hopper_can(const CaptBankTopkCuda& args) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(args.rows) | reinterpret_cast<uintptr_t>(args.queries);
  return args.dtype != CAPT_FLOAT32 && args.ranges == nullptr && args.dim >= 8 && args.dim % 8 == 0 &&
         addresses % 16 == 0 && args.n_rows > 0 && args.n_rows < INT32_MAX - kTileRows &&
         args.n_query < INT32_MAX / 2 && device_can();
}

int launch_hopper(const Task& task, int queries, void* stream) {
  return task.args.dtype == CAPT_FLOAT16 ? launch_queries<HalfBits>(task, queries, stream)
                                         : launch_queries<BfloatBits>(task, queries, stream);
}

}  // namespace bank
