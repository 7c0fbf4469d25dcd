// Kernels with a bug to choose, and none by default: what the executor has to find. `simt_bugs NAME SEED...` runs one
// by each seed and prints "ok" or the error, and an empty line; test_executor.py has the list. The line that ends in
// `// NAME` is where the error has to be reported.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "memory.h"

using namespace pycm::cuda;

namespace {

enum Bug {
  kNone,
  kBarrier,
  kLoopBarrier,
  kBounds,
  kSharedBounds,
  kUninitialised,
  kDeadlock,
  kMisaligned,
  kVector,
  kIndex,  // sum
  kAppend,
  kVisible,
  kWorkspace,  // append
  kSyncwarp,
  kLane,
  kDivergent,  // transpose
  kNoWait,
  kNoBarrier,
  kOverwrite,  // copy
  kPhase,
  kNoFull,
  kNoEmpty,
  kBytes,
  kDescriptor,
  kSwizzle,
  kRegisters,
  kNoProxyFence,
  kStage,  // product
  kExit,
  kNoClusterSync,
  kArrivals,  // exchange
  kGridFence,
  kStaleFence,
  kGridAcquire  // turns
};

// ---- sum of blocks of 256: shared memory and barriers ----

template <Bug B>
__global__ void sum(const float* in, int count, float* out) {
  PYCM_SHARED(tile, float[256]);
  PYCM_SHARED(scale, float);
  const int thread = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x) * 256 + thread;
  if (B != kUninitialised && thread == 0) scale = 1.0f;
  if (B == kMisaligned && i == 0) out[0] = load_streaming(reinterpret_cast<const float4*>(in + 1)).x;  // misaligned
  if (B == kVector && i == 0) out[0] = reinterpret_cast<const float4*>(in + 1)->x;                     // vector
  float values[2] = {}, value = 0;
  if (i < count + (B == kBounds)) value = in[i];  // bounds
  float* const to = tile;
  to[thread + (B == kSharedBounds)] = value;      // shared_bounds
  if (B == kIndex) values[thread / 100] = value;  // index
  if (B != kBarrier) __syncthreads();
  for (int half = 128; half > 0; half /= 2) {
    if (thread < half) tile[thread] += tile[thread + half];  // barrier, loop_barrier
    if (B == kLoopBarrier && half == 64) continue;
    if (B != kDeadlock || half != 32 || thread % 64 != 63) __syncthreads();
    else named_barrier_sync(1, 64);  // deadlock
  }
  if (thread == 0) out[blockIdx.x] = tile[0] * scale + values[1] * 0;  // uninitialised
}

template <Bug B>
void run_sum() {
  std::vector<float> in(1000, 1.0f), out(4);
  simt::Memory memory;
  memory.add(in.data(), 4000);
  memory.add(out.data(), 16, false);
  launch(sum<B>, {4, 256}, "sum", in.data(), 1000, out.data());
  if (out != std::vector<float>{256, 256, 256, 232}) throw std::runtime_error("wrong result");
}

// ---- an append by atomics, warp-aggregated; the last block counts what all appended ----

template <Bug B>
__global__ void append(const int* in, int* list, int* counters, int* total) {
  PYCM_SHARED(last, bool);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, value = in[blockIdx.x * 128 + threadIdx.x];
  const unsigned takers = __ballot_sync(kAllLanes, value > 0);
  int base = 0;
  if (lane == 0) {
    if (B != kAppend) base = atomicAdd(&counters[0], __popc(takers));
    else {
      base = counters[0];                   // append_raced
      counters[0] = base + __popc(takers);  // append_raced
    }
  }
  base = __shfl_sync(kAllLanes, base, 0);
  if (value > 0) list[base + __popc(takers & ((1u << lane) - 1))] = value;
  __syncthreads();
  if (thread == 0) {
    if (B != kVisible) __threadfence();
    last = atomicAdd(&counters[1], 1) == 3;  // workspace
    if (B != kVisible) __threadfence();
  }
  __syncthreads();
  if (last && thread == 0) {
    int sum = 0;
    for (int i = 0; i < atomicAdd(&counters[0], 0); ++i) sum += list[i];  // visible
    *total = sum;
  }
}

template <Bug B>
void run_append() {
  std::vector<int> in(512), list(512), counters(2);
  int total = 0, expected = 0;
  for (int i = 0; i < 512; ++i) {
    in[i] = i % 7 - 3;
    expected += in[i] > 0 ? in[i] : 0;
  }
  simt::Memory memory;
  memory.add(in.data(), 2048);
  memory.add(list.data(), 2048, false);
  memory.add(counters.data(), 8, false);
  memory.add(&total, 4, false);
  memset_async(counters.data(), 0, B == kWorkspace ? 4 : 8, nullptr, "append: counters");
  launch(append<B>, {4, 128}, "append", in.data(), list.data(), counters.data(), &total);
  if (total != expected) throw std::runtime_error("wrong result");
}

// ---- a transposition within each warp ----

template <Bug B>
__global__ void transpose(const int* in, int* out) {
  PYCM_SHARED(tile, int[2][32]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  tile[warp][lane] = in[threadIdx.x];
  if (B != kSyncwarp) __syncwarp();
  int value = tile[warp][31 - lane];                                                          // syncwarp
  if (B == kLane) value += __shfl_xor_sync(0xffffu, value, 1);                                // lane
  if (B == kDivergent && lane < 16) value += __shfl_xor_sync(kAllLanes, value, 1);            // divergent
  if (B == kDivergent && lane >= 16) value += static_cast<int>(__ballot_sync(kAllLanes, 1));  // divergent
  out[threadIdx.x] = value;
}

template <Bug B>
void run_transpose() {
  std::vector<int> in(64), out(64);
  for (int i = 0; i < 64; ++i) in[i] = i;
  simt::Memory memory;
  memory.add(in.data(), 256);
  memory.add(out.data(), 256, false);
  launch(transpose<B>, {1, 64}, "transpose", in.data(), out.data());
  for (int i = 0; i < 64; ++i)
    if (out[i] != i / 32 * 32 + 31 - i % 32) throw std::runtime_error("wrong result");
}

// ---- cp.async in two stages ----

template <Bug B>
__global__ void copy(const float4* in, float4* out) {
  PYCM_SHARED(tile, float4[2][64]);
  const int thread = static_cast<int>(threadIdx.x);
  for (int step = 0; step < 5; ++step) {
    if (step < 4) cp_async16(&tile[step % 2][thread], in + step * 64 + thread);  // overwrite
    cp_async_commit();
    if (step == 0) continue;
    if (B != kNoWait) cp_async_wait<1>();
    if (B != kNoBarrier) __syncthreads();
    out[(step - 1) * 64 + thread] = tile[(step - 1) % 2][63 - thread];  // no_wait, no_barrier, overwrite
    if (B != kOverwrite && B != kNoBarrier) __syncthreads();
  }
}

template <Bug B>
void run_copy() {
  std::vector<float4> in(256), out(256);
  for (int i = 0; i < 256; ++i) in[i] = make_float4(static_cast<float>(i), 0, 0, 0);
  simt::Memory memory;
  memory.add(in.data(), 4096);
  memory.add(out.data(), 4096, false);
  launch(copy<B>, {1, 64}, "copy", in.data(), out.data());
  for (int i = 0; i < 256; ++i)
    if (static_cast<int>(out[i].x) != i / 64 * 64 + 63 - i % 64) throw std::runtime_error("wrong result");
}

// ---- 128 x 256 products of 512: one TMA producer, two consumer warpgroups, three stages ----

constexpr int kM = 128, kN = 256, kStages = 3, kStageBytes = (kM + kN) * 128, kDepth = 512;

template <Bug B>
__global__ void __launch_bounds__(384)
    product(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, float* out) {
  char* stages = dynamic_shared();
  PYCM_SHARED(full, uint64_t[kStages]);
  PYCM_SHARED(empty, uint64_t[kStages]);
  const int thread = static_cast<int>(threadIdx.x), warpgroup = thread / 128;
  if (thread == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], 2);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  constexpr int kSteps = kDepth / 64;
  if (warpgroup == 2) {
    setmaxnreg_dec<24>();
    if (thread != 256) return;
    const int row = static_cast<int>(blockIdx.x) * kM;
    for (int step = 0; step < kSteps; ++step) {
      const int s = step % kStages, round = step / kStages;
      if (B != kNoEmpty) mbarrier_wait(&empty[s], (round + 1 + (B == kPhase)) & 1);  // phase
      mbarrier_arrive_expect_tx(&full[s], kStageBytes - (B == kBytes ? 128 : 0));    // no_empty
      tma_load_2d(stages + s * kStageBytes, &map_a, &full[s], step * 64, row);       // no_empty
      tma_load_2d(stages + s * kStageBytes + kM * 128, &map_b, &full[s], step * 64, 0);
    }
  } else {
    setmaxnreg_inc<240>();
    float sums[kN / 2];
    for (int step = 0; step < kSteps; ++step) {
      const int s = step % kStages;
      if (B != kNoFull) mbarrier_wait(&full[s], step / kStages & 1);  // bytes
      const char* a = stages + (B == kStage ? step + 1 : step) % kStages * kStageBytes + warpgroup * 64 * 128 +
                      (B == kDescriptor ? 128 : 0);
      const char* b = stages + s * kStageBytes + kM * 128;
      wgmma_fence();
      for (int k = 0; k < 4; ++k) {
        const uint64_t a_step = wgmma_descriptor(a + 32 * k),
                       b_step = wgmma_descriptor(b + 32 * (B == kSwizzle ? k ^ 1 : k));
        wgmma<Mma::kF16, kN>(sums, a_step, b_step, step + k > 0);  // no_full, descriptor, stage, registers
      }
      wgmma_commit();
      if (B != kRegisters || step + 1 < kSteps) wgmma_wait<0>();
      wgmma_pin(sums);
      if (thread % 128 == 0) mbarrier_arrive(&empty[s]);
    }
    const int lane = thread % 32,
              row = static_cast<int>(blockIdx.x) * kM + warpgroup * 64 + thread % 128 / 32 * 16 + lane / 4;
    for (int i = 0; i < kN / 2; ++i) out[(row + i / 2 % 2 * 8) * kN + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
}

// The operand is written by the threads themselves, so that a proxy fence is needed.
template <Bug B>
__global__ void __launch_bounds__(128) filled(float* out) {
  uint16_t* tile = reinterpret_cast<uint16_t*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < 64 * 64; i += 128)
    tile[swizzle128(i * 2) / 2] = i / 64 == i % 64 ? 0x3c00 : 0;  // the identity
  if (B != kNoProxyFence) fence_proxy_async();
  __syncthreads();
  float sums[32];
  wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const uint64_t step = wgmma_descriptor(tile + 16 * k);
    wgmma<Mma::kF16, 64>(sums, step, step, k > 0);  // no_proxy_fence
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) out[i * 128 + thread] = sums[i];
}

template <Bug B>
void run_product() {
  std::vector<uint16_t> a(2 * kM * kDepth), b(kN * kDepth);
  std::vector<float> out(2 * kM * kN), trace(4096);
  for (size_t i = 0; i < a.size(); ++i)
    a[i] = static_cast<uint16_t>(i * 2654435761u >> 8 & 1 ? 0x3c00 : 0xbc00);  // 1 or -1
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<uint16_t>(i * 2246822519u >> 9 & 1 ? 0x3c00 : 0xbc00);
  simt::Memory memory;
  memory.add(a.data(), static_cast<int64_t>(a.size() * 2));
  memory.add(b.data(), static_cast<int64_t>(b.size() * 2));
  memory.add(out.data(), static_cast<int64_t>(out.size() * 4), false);
  memory.add(trace.data(), 4096 * 4, false);
  if (B == kNone || B == kNoProxyFence) {
    launch(filled<B>, {1, 128, 1, 64 * 128}, "filled", trace.data());
    float sum = 0;
    for (float v : trace) sum += v;
    if (sum != 64) throw std::runtime_error("wrong result");
  }
  const TensorMap map_a = make_tensor_map_2d(a.data(), TensorElement::kFloat16, kDepth, 2 * kM, kDepth * 2, 64, kM);
  const TensorMap map_b = make_tensor_map_2d(b.data(), TensorElement::kFloat16, kDepth, kN, kDepth * 2, 64, kN);
  launch(product<B>, {2, 384, 1, kStages * kStageBytes}, "product", map_a, map_b, out.data());
  auto sign = [](uint16_t half) { return half & 0x8000 ? -1 : 1; };
  for (int i = 0; i < 2 * kM; i += 5)
    for (int j = 0; j < kN; ++j) {
      int sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += sign(a[i * kDepth + k]) * sign(b[j * kDepth + k]);
      if (out[i * kN + j] != static_cast<float>(sum)) throw std::runtime_error("wrong result");
    }
}

// ---- two blocks of a cluster exchange a value each ----

template <Bug B>
__global__ void exchange(int* out) {
  PYCM_SHARED(mine, int);
  PYCM_SHARED(arrivals, uint64_t);
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    mine = static_cast<int>(10 + rank);
    mbarrier_init(&arrivals, B == kArrivals ? 32 : 64);
    fence_mbarrier_init();
  }
  if (B != kNoClusterSync) cluster_sync();
  else __syncthreads();
  for (uint32_t to = 0; to < 2; ++to) mbarrier_arrive_cluster(&arrivals, to);  // no_cluster_sync
  mbarrier_wait_cluster(&arrivals, 0);                                         // arrivals
  if (threadIdx.x == 0) out[rank] = *map_shared(&mine, rank ^ 1);              // exit, no_cluster_sync
  if (B != kExit) cluster_sync();
}

template <Bug B>
void run_exchange() {
  std::vector<int> out(2);
  simt::Memory memory;
  memory.add(out.data(), 8, false);
  launch(exchange<B>, {2, 32, 2}, "exchange", out.data());
  if (out != std::vector<int>{11, 10}) throw std::runtime_error("wrong result");
}

// ---- blocks that run at once wait for each other ----

template <Bug B>
__global__ void turns(int* values, unsigned long long* arrivals, int* out) {
  const unsigned blocks = gridDim.x, own = blockIdx.x;
  int sum = 0;
  for (unsigned turn = 0; turn < 2; ++turn) {
    int* const of_turn = values + turn * blocks;
    of_turn[own] = static_cast<int>(own) + 1;
    if (B != kGridFence && !(B == kStaleFence && turn == 1)) __threadfence();
    atomicAdd(arrivals, 1ull);
    while ((B == kGridAcquire ? atomicAdd(arrivals, 0ull) : load_acquire(arrivals)) < (turn + 1) * blocks)
      __nanosleep(20);
    for (unsigned i = 0; i < blocks; ++i) sum += of_turn[i];  // grid_fence, stale_fence, grid_acquire
  }
  out[own] = sum;
}

template <Bug B>
void run_turns() {
  std::vector<int> values(8), out(4);
  unsigned long long arrivals = 0;
  simt::Memory memory;
  memory.add(values.data(), 32, false);
  memory.add(out.data(), 16, false);
  memory.add(&arrivals, 8);
  Grid grid{{4}, {1}};
  grid.cooperative = true;
  launch(turns<B>, grid, "turns", values.data(), &arrivals, out.data());
  if (out != std::vector<int>(4, 20)) throw std::runtime_error("wrong result");
}

struct Case {
  const char* name;
  void (*run)();
};
const Case kCases[] = {{"sum", run_sum<kNone>},
                       {"append", run_append<kNone>},
                       {"transpose", run_transpose<kNone>},
                       {"copy", run_copy<kNone>},
                       {"product", run_product<kNone>},
                       {"exchange", run_exchange<kNone>},
                       {"turns", run_turns<kNone>},
                       {"barrier", run_sum<kBarrier>},
                       {"loop_barrier", run_sum<kLoopBarrier>},
                       {"bounds", run_sum<kBounds>},
                       {"shared_bounds", run_sum<kSharedBounds>},
                       {"uninitialised", run_sum<kUninitialised>},
                       {"deadlock", run_sum<kDeadlock>},
                       {"misaligned", run_sum<kMisaligned>},
                       {"vector", run_sum<kVector>},
                       {"index", run_sum<kIndex>},
                       {"append_raced", run_append<kAppend>},
                       {"visible", run_append<kVisible>},
                       {"workspace", run_append<kWorkspace>},
                       {"syncwarp", run_transpose<kSyncwarp>},
                       {"lane", run_transpose<kLane>},
                       {"divergent", run_transpose<kDivergent>},
                       {"no_wait", run_copy<kNoWait>},
                       {"no_barrier", run_copy<kNoBarrier>},
                       {"overwrite", run_copy<kOverwrite>},
                       {"phase", run_product<kPhase>},
                       {"no_full", run_product<kNoFull>},
                       {"no_empty", run_product<kNoEmpty>},
                       {"bytes", run_product<kBytes>},
                       {"descriptor", run_product<kDescriptor>},
                       {"swizzle", run_product<kSwizzle>},
                       {"registers", run_product<kRegisters>},
                       {"no_proxy_fence", run_product<kNoProxyFence>},
                       {"stage", run_product<kStage>},
                       {"exit", run_exchange<kExit>},
                       {"no_cluster_sync", run_exchange<kNoClusterSync>},
                       {"arrivals", run_exchange<kArrivals>},
                       {"grid_fence", run_turns<kGridFence>},
                       {"stale_fence", run_turns<kStaleFence>},
                       {"grid_acquire", run_turns<kGridAcquire>}};

}  // namespace

int main(int count, char** arguments) {
  for (const Case& one : kCases) {
    if (count < 2 || std::strcmp(one.name, arguments[1]) != 0) continue;
    for (int i = 2; i < count; ++i) {
      setenv("PYCM_SIMT_SEED", arguments[i], 1);
      try {
        one.run();
        std::printf("ok\n\n");
      } catch (const std::exception& error) {
        std::printf("%s\n\n", error.what());
      }
    }
    return 0;
  }
  std::fprintf(stderr, "no such case\n");
  return 2;
}
