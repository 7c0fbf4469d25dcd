// Twins of arch.cuh's primitives, inside namespace pycm::cuda, by which it includes this file and documents them.
#pragma once

}  // namespace pycm::cuda

namespace simt {

// A tensor map as the host made it; the copies check and interpret it.
struct TensorMapFields {
  const char* data;
  int element_bytes, rank;
  int64_t size[3], stride[3];  // in elements and bytes; stride[0] is the element's
  int box[3];
  bool swizzled;
};

SIMT_API uint32_t shared_address(const void* pointer);
SIMT_API void named_barrier_sync(int id, int threads);
SIMT_API void named_barrier_arrive(int id, int threads);
SIMT_API bool elect_one();
SIMT_API void set_registers(int count);
SIMT_API void cp_async(void* shared, const void* global, int bytes, int source_bytes);
SIMT_API void cp_async_commit();
SIMT_API void cp_async_wait(int groups);
SIMT_API void cp_async_arrive(uint64_t* barrier);
SIMT_API void mbarrier_init(uint64_t* barrier, uint32_t count);
SIMT_API void mbarrier_arrive(uint64_t* barrier, uint32_t transaction_bytes, int rank);  // rank -1: this block
SIMT_API void mbarrier_expect(uint64_t* barrier, uint32_t bytes);
SIMT_API bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity);
SIMT_API void mbarrier_wait(uint64_t* barrier, uint32_t parity);
SIMT_API void fence_proxy_async();
SIMT_API void tma_load(void* shared, const TensorMapFields* map, uint64_t* barrier, const int (&at)[3], int rank,
                       uint32_t blocks);
SIMT_API void tma_store(const TensorMapFields* map, const void* shared, const int (&at)[3], int rank);
SIMT_API void tma_store_commit();
SIMT_API void tma_store_wait(int groups);
SIMT_API void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
SIMT_API uint32_t cluster_rank();
SIMT_API uint32_t cluster_size();
SIMT_API void cluster_arrive();
SIMT_API void cluster_wait();
SIMT_API void* map_shared(const void* pointer, uint32_t rank);
SIMT_API void store_async(void* pointer, uint64_t bits, int bytes, uint64_t* barrier, uint32_t rank);
SIMT_API void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed);
SIMT_API void stmatrix(void* row, const uint32_t* registers, int matrices);
SIMT_API float half_to_float(uint16_t bits);
SIMT_API uint16_t float_to_half(float value);

}  // namespace simt

namespace pycm::cuda {

struct TensorMap {
  simt::TensorMapFields fields;
};

template <typename T>
using SharedType = T;
#define PYCM_SHARED(name, ...)                                                             \
  static char name##_key;                                                                  \
  auto& name = *static_cast<::pycm::cuda::SharedType<__VA_ARGS__>*>(::simt::static_shared( \
      &name##_key, sizeof(::pycm::cuda::SharedType<__VA_ARGS__>), alignof(::pycm::cuda::SharedType<__VA_ARGS__>)))

__forceinline__ char* dynamic_shared() { return simt::dynamic_shared(); }
__forceinline__ uint32_t shared_address(const void* pointer) { return simt::shared_address(pointer); }

__forceinline__ float half_to_float(uint16_t bits) { return simt::half_to_float(bits); }
__forceinline__ uint16_t float_to_half(float value) { return simt::float_to_half(value); }
__forceinline__ float bfloat16_to_float(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
__forceinline__ uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
__forceinline__ uint32_t pack_half2(float low, float high) {
  return float_to_half(low) | uint32_t{float_to_half(high)} << 16;
}
__forceinline__ uint32_t pack_bfloat162(float low, float high) {
  return float_to_bfloat16(low) | uint32_t{float_to_bfloat16(high)} << 16;
}
__forceinline__ uint32_t float_to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fffffff;
  return std::isinf(value) ? bits : (bits + 0x1000) & 0xffffe000u;
}
__forceinline__ float max_nan(float a, float b) {
  return a != a || b != b ? __uint_as_float(0x7fffffff) : a < b ? b : a;
}

template <typename T>
__forceinline__ T load_readonly(const T* pointer) {
  return simt::load(pointer);
}
template <typename T>
__forceinline__ T load_streaming(const T* pointer) {
  return simt::load(pointer);
}
template <typename T>
__forceinline__ T load_l2(const T* pointer) {
  return simt::load(pointer);
}
__forceinline__ unsigned long long load_acquire(const unsigned long long* pointer) {
  return simt::load_acquire(pointer);
}
template <typename T>
__forceinline__ void store_streaming(T* pointer, simt::Same<T> value) {
  simt::store(pointer, value);
}

inline constexpr uint64_t kCacheNormal = 0, kCacheEvictFirst = 1, kCacheEvictLast = 2;

__forceinline__ bool elect_one() { return simt::elect_one(); }
__forceinline__ void named_barrier_sync(int id, int threads) { simt::named_barrier_sync(id, threads); }
__forceinline__ void named_barrier_arrive(int id, int threads) { simt::named_barrier_arrive(id, threads); }
template <int N>
__forceinline__ void setmaxnreg_inc() {
  simt::set_registers(N);
}
template <int N>
__forceinline__ void setmaxnreg_dec() {
  simt::set_registers(N);
}

template <int Bytes>
__forceinline__ void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  simt::cp_async(shared, global, Bytes, valid ? Bytes : 0);
}
__forceinline__ void cp_async16_bytes(void* shared, const void* global, int bytes) {
  simt::cp_async(shared, global, 16, bytes);
}
__forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
  simt::cp_async(shared, global, 16, valid ? 16 : 0);
}
__forceinline__ void cp_async_commit() { simt::cp_async_commit(); }
template <int N>
__forceinline__ void cp_async_wait() {
  simt::cp_async_wait(N);
}
__forceinline__ void cp_async_arrive(uint64_t* barrier) { simt::cp_async_arrive(barrier); }

__forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) { simt::mbarrier_init(barrier, count); }
__forceinline__ void fence_mbarrier_init() {}
__forceinline__ void mbarrier_arrive(uint64_t* barrier) { simt::mbarrier_arrive(barrier, 0, -1); }
__forceinline__ void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
  simt::mbarrier_arrive(barrier, 0, static_cast<int>(rank));
}
__forceinline__ void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) { simt::mbarrier_expect(barrier, bytes); }
__forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  simt::mbarrier_arrive(barrier, bytes, -1);
}
__forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  return simt::mbarrier_try_wait(barrier, parity);
}
__forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) { simt::mbarrier_wait(barrier, parity); }
__forceinline__ void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) { simt::mbarrier_wait(barrier, parity); }

__forceinline__ void fence_proxy_async() { simt::fence_proxy_async(); }
__forceinline__ void prefetch_tensor_map(const TensorMap*) {}
__forceinline__ void tma_load_2d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y,
                                 uint64_t = kCacheNormal) {
  simt::tma_load(shared, &map->fields, barrier, {x, y, 0}, 2, 0);
}
__forceinline__ void tma_load_2d_multicast(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y,
                                           uint16_t blocks, uint64_t = kCacheNormal) {
  simt::tma_load(shared, &map->fields, barrier, {x, y, 0}, 2, blocks);
}
__forceinline__ void tma_load_3d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z,
                                 uint64_t = kCacheNormal) {
  simt::tma_load(shared, &map->fields, barrier, {x, y, z}, 3, 0);
}
__forceinline__ void tma_store_2d(const TensorMap* map, const void* shared, int x, int y) {
  simt::tma_store(&map->fields, shared, {x, y, 0}, 2);
}
__forceinline__ void tma_store_commit() { simt::tma_store_commit(); }
template <int N>
__forceinline__ void tma_store_wait_read() {
  simt::tma_store_wait(N);
}
__forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  simt::bulk_load(shared, global, bytes, barrier);
}

__forceinline__ uint32_t cluster_rank() { return simt::cluster_rank(); }
__forceinline__ uint32_t cluster_size() { return simt::cluster_size(); }
__forceinline__ void cluster_arrive() { simt::cluster_arrive(); }
__forceinline__ void cluster_wait() { simt::cluster_wait(); }
__forceinline__ void cluster_sync() {
  simt::cluster_arrive();
  simt::cluster_wait();
}
template <typename T>
__forceinline__ T* map_shared(T* pointer, uint32_t rank) {
  return static_cast<T*>(simt::map_shared(pointer, rank));
}
template <typename T>
__forceinline__ void store_async(T* pointer, simt::Same<T> value, uint64_t* barrier, uint32_t rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  simt::store_async(pointer, simt::to_bits(value), sizeof(T), barrier, rank);
}

__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) { simt::ldmatrix(r, row, 4, false); }
__forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) { simt::ldmatrix(r, row, 2, false); }
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { simt::ldmatrix(r, row, 4, true); }
__forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { simt::ldmatrix(r, row, 2, true); }
__forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4]) { simt::stmatrix(row, r, 4); }
