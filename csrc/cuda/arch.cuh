// Every primitive of the hardware the kernels use, one thin wrapper each, by the names and rules of the PTX ISA.
//
// With PYCM_SIMT defined the same names come from the host executor (tests/simt), which runs the same kernels on the
// CPU. Kernels touch the hardware by this file alone; ordinary CUDA C++ (threadIdx, __syncthreads, __shfl_xor_sync,
// atomicAdd,
// __dmul_rn ...) is spelled as usual. Matrix products are in mma.cuh, launches and tensor maps in launch.h.
//
// PYCM_SM90 is 1 where Hopper's own instructions may be compiled: the body of a kernel that uses them stands between
// `#if PYCM_SM90` and `#endif`. Everything marked [sm_90] needs it; the rest runs from sm_80 on.
//
// Shared memory: `PYCM_SHARED(name, type)` declares a static variable (`PYCM_SHARED(tile, float[32][33]);`),
// `dynamic_shared()` is the block's dynamic memory, aligned to 1024 bytes as the 128-byte swizzle wants it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(PYCM_SIMT)
#include "simt.h"
#define PYCM_SM90 1
#else
#include <cuda.h>
#include <cuda_runtime.h>
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYCM_SM90 1
#else
#define PYCM_SM90 0
#endif
#endif

namespace pycm::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// The 128-byte swizzle of TMA and wgmma: in each 1024 bytes (8 rows of 128), the 16-byte column (address bits 4-6) is
// xored with the row (bits 7-9). `offset` counts from a 1024-byte boundary.
__host__ __device__ __forceinline__ constexpr uint32_t swizzle128(uint32_t offset) {
  return offset ^ ((offset >> 3) & 0x70u);
}

// What a TMA tile holds; see make_tensor_map_2d in launch.h.
enum class TensorElement { kInt8, kFloat16, kBFloat16, kFloat32, kTf32 };
enum class Swizzle { kNone, k128 };

#if !defined(PYCM_SIMT)

// As a kernel parameter: `const __grid_constant__ TensorMap map`; its address goes to tma_load_*.
struct TensorMap {
  CUtensorMap map;
};

template <typename T>
using SharedType = T;
#define PYCM_SHARED(name, ...) __shared__::pycm::cuda::SharedType<__VA_ARGS__> name

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(1024) char pycm_dynamic_shared[];
  return pycm_dynamic_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- conversions: storage is uint16_t, pairs are uint32_t with the first value in the low half ----

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ uint16_t float_to_half(float value) {  // to nearest even; too large becomes infinity
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float bfloat16_to_float(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

__device__ __forceinline__ uint16_t float_to_bfloat16(float value) {  // to nearest even
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ uint32_t pack_bfloat162(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ uint32_t float_to_tf32(float value) {  // to nearest, ties away; the low 13 bits are zero
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float max_nan(float a, float b) {  // NaN if either is
  float value;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
  return value;
}

// ---- global memory with cache hints: T of 2, 4, 8 or 16 bytes, naturally aligned ----

template <typename T>
__device__ __forceinline__ T load_readonly(const T* pointer) {
  return __ldg(pointer);
}  // never written in this launch
template <typename T>
__device__ __forceinline__ T load_streaming(const T* pointer) {
  return __ldcs(pointer);
}  // read once
template <typename T>
__device__ __forceinline__ T load_l2(const T* pointer) {
  return __ldcg(pointer);
}  // written by other blocks
// What was written before the fence and the atomic that made this value is known to this thread from now on.
__device__ __forceinline__ unsigned long long load_acquire(const unsigned long long* pointer) {
  unsigned long long value;
  asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(value) : "l"(pointer) : "memory");
  return value;
}
template <typename T>
__device__ __forceinline__ void store_streaming(T* pointer, std::common_type_t<T> value) {
  __stcs(pointer, value);
}  // not read back

// L2 policies for TMA's `cache` argument (constants of createpolicy.fractional with fraction 1).
inline constexpr uint64_t kCacheNormal = 0x1000000000000000ull;
inline constexpr uint64_t kCacheEvictFirst = 0x12F0000000000000ull;
inline constexpr uint64_t kCacheEvictLast = 0x14F0000000000000ull;

// ---- warps and blocks ----

// One lane of the converged warp, the same one each time. [sm_90]
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
  return elected != 0;
}

// Barrier `id` (1-15; 0 is __syncthreads) among `threads` threads, a multiple of 32, counting those that only arrive.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Moves registers between warpgroups: all threads of the warpgroup call it; N in 24..256, a multiple of 8. [sm_90]
template <int N>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- cp.async: per thread, global to shared ----

// Bytes is 4, 8 or 16, both sides aligned to it; where !valid the destination is zeroed and `global` is not read.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid = true) {
  const int source_bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes),
                 "r"(source_bytes)
                 : "memory");
  }
}
// 16 bytes of which the first `bytes` (0-16) are read and the rest are zero: the end of a row.
__device__ __forceinline__ void cp_async16_bytes(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
  cp_async<16>(shared, global, valid);
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's newest groups are unfinished; other threads see the bytes after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Arrives on the barrier when this thread's earlier cp.async are done; the arrival counts towards init's `count`.
__device__ __forceinline__ void cp_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// ---- mbarrier [sm_90] ----
// A phase ends when `count` arrivals and all announced bytes are in. wait(parity) returns once the phase of that parity
// has ended: the first wait of a fresh barrier is on parity 0; waiting for parity 1 on a fresh barrier returns at once.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// After all inits, by the thread that made them, before the block's or cluster's barrier.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// On the barrier at the same place in block `rank` of the cluster, own rank included.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}
// As mbarrier_wait, and it also orders what other blocks of the cluster did before they arrived.
__device__ __forceinline__ void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- TMA and bulk copies [sm_90]: one thread issues; bytes belong to the copy until the barrier's phase ends ----

// Orders this thread's ordinary shared-memory accesses before later asynchronous ones (TMA stores, wgmma operands).
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The box whose first element is (row y, column x), packed, with the map's swizzle; `shared` 128-byte aligned (1024
// with the 128-byte swizzle). Out of bounds reads as zero, and counts towards the barrier's bytes all the same.
__device__ __forceinline__ void tma_load_2d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y,
                                            uint64_t cache = kCacheNormal) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "l"(cache)
      : "memory");
}
// The same box to the same place in every block of the cluster whose bit is set; each one's own barrier gets the bytes.
__device__ __forceinline__ void tma_load_2d_multicast(void* shared, const TensorMap* map, uint64_t* barrier, int x,
                                                      int y, uint16_t blocks, uint64_t cache = kCacheNormal) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks), "l"(cache)
      : "memory");
}
__device__ __forceinline__ void tma_load_3d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z,
                                            uint64_t cache = kCacheNormal) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "l"(cache)
      : "memory");
}
// Shared to global; what lies out of bounds is not written. fence_proxy_async by the writers, and a barrier, come
// first.
__device__ __forceinline__ void tma_store_2d(const TensorMap* map, const void* shared, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most N of this thread's newest store groups still read shared memory.
template <int N>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// A run of bytes, a multiple of 16, both sides 16-byte aligned.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// ---- clusters [sm_90] ----

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// The same shared variable in block `rank` of the cluster, for ordinary loads and stores. No block may exit while
// another can still touch it: end with cluster_sync().
template <typename T>
__device__ __forceinline__ T* map_shared(T* pointer, uint32_t rank) {
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(pointer)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}
// Writes 4 or 8 bytes to block `rank`, asynchronously; that block's `barrier` gets the bytes.
template <typename T>
__device__ __forceinline__ void store_async(T* pointer, T value, uint64_t* barrier, uint32_t rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 4) {
    asm volatile(
        "{\n .reg .b32 to, bar;\n mapa.shared::cluster.u32 to, %0, %3;\n mapa.shared::cluster.u32 bar, %2, %3;\n"
        " st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %1, [bar];\n}\n" ::"r"(
            shared_address(pointer)),
        "r"(*reinterpret_cast<const uint32_t*>(&value)), "r"(shared_address(barrier)), "r"(rank)
        : "memory");
  } else {
    asm volatile(
        "{\n .reg .b32 to, bar;\n mapa.shared::cluster.u32 to, %0, %3;\n mapa.shared::cluster.u32 bar, %2, %3;\n"
        " st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [to], %1, [bar];\n}\n" ::"r"(
            shared_address(pointer)),
        "l"(*reinterpret_cast<const uint64_t*>(&value)), "r"(shared_address(barrier)), "r"(rank)
        : "memory");
  }
}

// ---- 8x8 matrices of 16-bit elements between shared memory and registers ----
// Lanes 8i..8i+7 give the addresses of the eight 16-byte rows of matrix i. Lane l gets, of each matrix, elements
// (l / 4, 2 * (l % 4)) and the next one in its row; with trans, elements (2 * (l % 4), l / 4) and the one below it.

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {  // rows by lanes 0-15
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4]) {  // [sm_90]
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

#else
#include "simt_arch.h"
#endif

}  // namespace pycm::cuda

#include "mma.cuh"
