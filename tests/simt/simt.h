// CUDA C++ for g++: what a .cu file may use when it is compiled for the host executor (-DPYCM_SIMT). Included by
// csrc/cuda/arch.cuh in place of the CUDA headers; the twins of arch.cuh's own primitives are in simt_arch.h.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#define SIMT_API __attribute__((visibility("default")))
#define SIMT_RAW __attribute__((no_sanitize("thread"), noinline))  // the executor checks these accesses itself

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __constant__ const
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
#define SIMT_VECTOR2(name, T)                                \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  static_assert(true)
#define SIMT_VECTOR4(name, T)                                                        \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }         \
  static_assert(true)
SIMT_VECTOR2(int, int);
SIMT_VECTOR2(uint, unsigned);
SIMT_VECTOR2(float, float);
SIMT_VECTOR2(double, double);
SIMT_VECTOR2(longlong, long long);
SIMT_VECTOR2(ulonglong, unsigned long long);
SIMT_VECTOR2(short, short);
SIMT_VECTOR2(ushort, unsigned short);
SIMT_VECTOR4(int, int);
SIMT_VECTOR4(uint, unsigned);
SIMT_VECTOR4(float, float);
SIMT_VECTOR4(short, short);
SIMT_VECTOR4(ushort, unsigned short);
SIMT_VECTOR4(char, signed char);
SIMT_VECTOR4(uchar, unsigned char);
#undef SIMT_VECTOR2
#undef SIMT_VECTOR4

namespace simt {

// ---- the executor ----

struct Launch {
  dim3 grid, block;
  int cluster;
  bool cooperative;  // all blocks at once
  int64_t shared_bytes;
  const char* name;
};
// Runs body(context) once per thread; throws std::runtime_error with the kernel, block, thread and line of an error.
SIMT_API void run(const Launch& launch, void (*body)(void*), void* context, size_t context_bytes);
// The name of every launch since the last call.
SIMT_API std::vector<std::string> take_launches();
// A memset or copy in stream order: bounds, and what it initialises.
SIMT_API void device_memset(void* data, int value, size_t bytes, const char* name);
SIMT_API void device_copy(void* to, const void* from, size_t bytes, const char* name);

SIMT_API uint3 thread_index() __attribute__((const));
SIMT_API uint3 block_index() __attribute__((const));
SIMT_API dim3 block_dim() __attribute__((const));
SIMT_API dim3 grid_dim() __attribute__((const));
SIMT_API int lane() __attribute__((const));
SIMT_API char* dynamic_shared() __attribute__((const));
SIMT_API void* static_shared(const void* key, size_t bytes, size_t alignment);
SIMT_API void sync_threads();
SIMT_API int sync_threads_count(bool predicate);
SIMT_API void sync_warp(uint32_t mask);
SIMT_API void thread_fence();
SIMT_API void yield();
[[noreturn]] SIMT_API void trap();

// `value` of the lane that `source` names, for each lane of the mask; every lane of the mask has to come.
enum class Shuffle { kIndex, kUp, kDown, kXor };
SIMT_API uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle kind, int operand, int width);
enum class Vote {
  kBallot,
  kMatchAny,
  kMatchAll,
  kAdd,
  kAddUnsigned,
  kMin,
  kMinUnsigned,
  kMax,
  kMaxUnsigned,
  kAnd,
  kOr,
  kXor
};
SIMT_API uint32_t vote(uint32_t mask, uint64_t value, Vote kind);

// Bounds, initialisation, races: as an ordinary access would be checked. `size` bytes, aligned to them.
SIMT_API void check_read(const void* pointer, size_t size, const void* at);
SIMT_API void check_write(void* pointer, size_t size, const void* at);
SIMT_API void check_atomic(void* pointer, size_t size, const void* at);
SIMT_API void check_acquire(const void* pointer, size_t size, const void* at);
#define SIMT_CALLER __builtin_return_address(0)

template <typename T>
using Same = std::common_type_t<T>;  // no deduction from this one: the operand is converted to the pointer's type

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
SIMT_RAW T load(const T* pointer) {
  check_read(pointer, sizeof(T), SIMT_CALLER);
  return *pointer;
}
template <typename T>
SIMT_RAW void store(T* pointer, T value) {
  check_write(pointer, sizeof(T), SIMT_CALLER);
  *pointer = value;
}
template <typename T>
SIMT_RAW T load_acquire(const T* pointer) {
  check_acquire(pointer, sizeof(T), SIMT_CALLER);
  return *pointer;
}
template <typename T, typename F>
SIMT_RAW T atomic(T* pointer, T operand, F next) {
  check_atomic(pointer, sizeof(T), SIMT_CALLER);
  const T old = *pointer;
  *pointer = next(old, operand);
  return old;
}

}  // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_dim())
#define gridDim (::simt::grid_dim())
inline constexpr int warpSize = 32;

// ---- barriers and warps ----

__forceinline__ void __syncthreads() { simt::sync_threads(); }
__forceinline__ int __syncthreads_count(int predicate) { return simt::sync_threads_count(predicate != 0); }
__forceinline__ int __syncthreads_or(int predicate) { return simt::sync_threads_count(predicate != 0) > 0; }
__forceinline__ int __syncthreads_and(int predicate) { return simt::sync_threads_count(predicate == 0) == 0; }
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) { simt::sync_warp(mask); }
__forceinline__ void __threadfence() { simt::thread_fence(); }
__forceinline__ void __threadfence_block() { simt::thread_fence(); }
__forceinline__ void __nanosleep(unsigned) { simt::yield(); }
[[noreturn]] __forceinline__ void __trap() { simt::trap(); }

template <typename T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return simt::from_bits<T>(simt::shuffle(mask, simt::to_bits(value), simt::Shuffle::kIndex, lane, width));
}
template <typename T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::from_bits<T>(
      simt::shuffle(mask, simt::to_bits(value), simt::Shuffle::kUp, static_cast<int>(delta), width));
}
template <typename T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::from_bits<T>(
      simt::shuffle(mask, simt::to_bits(value), simt::Shuffle::kDown, static_cast<int>(delta), width));
}
template <typename T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return simt::from_bits<T>(simt::shuffle(mask, simt::to_bits(value), simt::Shuffle::kXor, bits, width));
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  return simt::vote(mask, predicate != 0, simt::Vote::kBallot);
}
__forceinline__ int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
__forceinline__ int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <typename T>
__forceinline__ unsigned __match_any_sync(unsigned mask, T value) {
  return simt::vote(mask, simt::to_bits(value), simt::Vote::kMatchAny);
}
template <typename T>
__forceinline__ unsigned __match_all_sync(unsigned mask, T value, int* all) {
  const unsigned result = simt::vote(mask, simt::to_bits(value), simt::Vote::kMatchAll);
  *all = result != 0;
  return result;
}
__forceinline__ unsigned __reduce_add_sync(unsigned mask, unsigned v) {
  return simt::vote(mask, v, simt::Vote::kAddUnsigned);
}
__forceinline__ int __reduce_add_sync(unsigned mask, int v) {
  return static_cast<int>(simt::vote(mask, static_cast<unsigned>(v), simt::Vote::kAdd));
}
__forceinline__ unsigned __reduce_min_sync(unsigned mask, unsigned v) {
  return simt::vote(mask, v, simt::Vote::kMinUnsigned);
}
__forceinline__ int __reduce_min_sync(unsigned mask, int v) {
  return static_cast<int>(simt::vote(mask, static_cast<unsigned>(v), simt::Vote::kMin));
}
__forceinline__ unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  return simt::vote(mask, v, simt::Vote::kMaxUnsigned);
}
__forceinline__ int __reduce_max_sync(unsigned mask, int v) {
  return static_cast<int>(simt::vote(mask, static_cast<unsigned>(v), simt::Vote::kMax));
}
__forceinline__ unsigned __reduce_and_sync(unsigned mask, unsigned v) { return simt::vote(mask, v, simt::Vote::kAnd); }
__forceinline__ unsigned __reduce_or_sync(unsigned mask, unsigned v) { return simt::vote(mask, v, simt::Vote::kOr); }
__forceinline__ unsigned __reduce_xor_sync(unsigned mask, unsigned v) { return simt::vote(mask, v, simt::Vote::kXor); }

// ---- atomics ----

template <typename T>
__forceinline__ T atomicAdd(T* p, simt::Same<T> v) {
  return simt::atomic(p, v, [](T a, T b) -> T { return a + b; });
}
template <typename T>
__forceinline__ T atomicSub(T* p, simt::Same<T> v) {
  return simt::atomic(p, v, [](T a, T b) -> T { return a - b; });
}
template <typename T>
__forceinline__ T atomicMax(T* p, simt::Same<T> v) {
  return simt::atomic(p, v, [](T a, T b) -> T { return a > b ? a : b; });
}
template <typename T>
__forceinline__ T atomicMin(T* p, simt::Same<T> v) {
  return simt::atomic(p, v, [](T a, T b) -> T { return a < b ? a : b; });
}
template <typename T>
__forceinline__ T atomicExch(T* p, simt::Same<T> v) {
  return simt::atomic(p, v, [](T, T b) -> T { return b; });
}
template <typename T>
__forceinline__ T atomicAnd(T* p, simt::Same<T> v) {
  return simt::atomic(p, v, [](T a, T b) -> T { return a & b; });
}
template <typename T>
__forceinline__ T atomicOr(T* p, simt::Same<T> v) {
  return simt::atomic(p, v, [](T a, T b) -> T { return a | b; });
}
template <typename T>
__forceinline__ T atomicXor(T* p, simt::Same<T> v) {
  return simt::atomic(p, v, [](T a, T b) -> T { return a ^ b; });
}
template <typename T>
__forceinline__ T atomicCAS(T* p, simt::Same<T> compare, simt::Same<T> v) {
  return simt::atomic(p, v, [compare](T a, T b) -> T { return a == compare ? b : a; });
}
__forceinline__ unsigned atomicInc(unsigned* p, unsigned limit) {
  return simt::atomic(p, limit, [](unsigned a, unsigned b) -> unsigned { return a >= b ? 0 : a + 1; });
}

// ---- loads with hints, arithmetic ----

template <typename T>
__forceinline__ T __ldg(const T* p) {
  return simt::load(p);
}
template <typename T>
__forceinline__ T __ldcs(const T* p) {
  return simt::load(p);
}
template <typename T>
__forceinline__ T __ldcg(const T* p) {
  return simt::load(p);
}
template <typename T>
__forceinline__ void __stcs(T* p, T v) {
  simt::store(p, v);
}
template <typename T>
__forceinline__ void __stcg(T* p, T v) {
  simt::store(p, v);
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// Built with -ffp-contract=off, a product and a sum are two roundings here as with these names on the device.
__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fsub_rn(float a, float b) { return a - b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
__forceinline__ float __fsqrt_rn(float a) { return std::sqrt(a); }
__forceinline__ float __frcp_rn(float a) { return 1.0f / a; }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float __expf(float a) { return std::exp(a); }
__forceinline__ float __logf(float a) { return std::log(a); }
__forceinline__ float __exp2f(float a) { return std::exp2(a); }
__forceinline__ float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
__forceinline__ double rsqrt(double a) { return 1.0 / std::sqrt(a); }
__forceinline__ double __dadd_rn(double a, double b) { return a + b; }
__forceinline__ double __dsub_rn(double a, double b) { return a - b; }
__forceinline__ double __dmul_rn(double a, double b) { return a * b; }
__forceinline__ double __ddiv_rn(double a, double b) { return a / b; }
__forceinline__ double __dsqrt_rn(double a) { return std::sqrt(a); }
__forceinline__ double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
__forceinline__ float __double2float_rn(double a) { return static_cast<float>(a); }
__forceinline__ float __int2float_rn(int a) { return static_cast<float>(a); }
__forceinline__ int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
__forceinline__ int __float2int_rz(float a) { return static_cast<int>(a); }
__forceinline__ int __float2int_rd(float a) { return static_cast<int>(std::floor(a)); }
__forceinline__ int __float2int_ru(float a) { return static_cast<int>(std::ceil(a)); }
__forceinline__ unsigned __float_as_uint(float a) { return simt::from_bits<unsigned>(simt::to_bits(a)); }
__forceinline__ int __float_as_int(float a) { return simt::from_bits<int>(simt::to_bits(a)); }
__forceinline__ float __uint_as_float(unsigned a) { return simt::from_bits<float>(a); }
__forceinline__ float __int_as_float(int a) { return simt::from_bits<float>(simt::to_bits(a)); }
__forceinline__ long long __double_as_longlong(double a) { return simt::from_bits<long long>(simt::to_bits(a)); }
__forceinline__ double __longlong_as_double(long long a) { return simt::from_bits<double>(simt::to_bits(a)); }
// Directed rounding: the nearest float, moved by one where it is on the wrong side of the exact value (s + e).
__forceinline__ float simt_directed(double s, double e, bool up) {
  const float nearest = static_cast<float>(s);
  if (!std::isfinite(s)) return nearest;
  const double off = nearest;
  const bool above = off > s || (off == s && e < 0), below = off < s || (off == s && e > 0);
  if (up) return below ? std::nextafter(nearest, INFINITY) : nearest;
  return above ? std::nextafter(nearest, -INFINITY) : nearest;
}
__forceinline__ float simt_add_directed(float a, float b, bool up) {
  const double s = static_cast<double>(a) + b, t = s - a;  // e is the exact remainder
  return simt_directed(s, (a - (s - t)) + (b - t), up);
}
__forceinline__ float __double2float_ru(double a) { return simt_directed(a, 0, true); }
__forceinline__ float __double2float_rd(double a) { return simt_directed(a, 0, false); }
__forceinline__ float __fadd_ru(float a, float b) { return simt_add_directed(a, b, true); }
__forceinline__ float __fadd_rd(float a, float b) { return simt_add_directed(a, b, false); }
__forceinline__ float __fmul_ru(float a, float b) { return simt_directed(static_cast<double>(a) * b, 0, true); }
__forceinline__ float __fmul_rd(float a, float b) { return simt_directed(static_cast<double>(a) * b, 0, false); }
__forceinline__ int __popc(unsigned a) { return __builtin_popcount(a); }
__forceinline__ int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
__forceinline__ int __ffs(int a) { return __builtin_ffs(a); }
__forceinline__ int __ffsll(long long a) { return __builtin_ffsll(a); }
__forceinline__ int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
__forceinline__ int __clzll(long long a) { return a == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(a)); }
__forceinline__ unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i) & 0xf;
    unsigned byte = bytes >> (8 * (nibble & 7)) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
__forceinline__ int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return sum;
}
