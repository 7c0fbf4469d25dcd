// The numbers of the recurrence, and the product of 16 units of its matrix with 8 rows of states, for each type of weights.
//
// Both operands lie in the order of mma's registers, 32 bytes of K a step: 16 bytes a lane of the matrix, 8 of the states.
#pragma once

#include "core/cell.h"
#include "core/dtype.h"
#include "core/pool.h"
#include "cuda/arch.cuh"

namespace pycm::cuda {

constexpr int kUnitTile = 16, kRowTile = 8;

// ---- numbers ----

// A number of the working type, as core/cell.h and core/pool.h want it.
template <class V>
struct Scalar {
  using T = V;
  V v;
  __host__ __device__ static Scalar set(V value) { return {value}; }
  __host__ __device__ static Scalar zero() { return {V(0)}; }
  friend __device__ Scalar operator+(Scalar a, Scalar b) { return {a.v + b.v}; }
  friend __device__ Scalar operator-(Scalar a, Scalar b) { return {a.v - b.v}; }
  friend __device__ Scalar operator*(Scalar a, Scalar b) { return {a.v * b.v}; }
  friend __device__ Scalar max(Scalar a, Scalar b) { return {a.v < b.v ? b.v : a.v}; }  // a where either is NaN
  friend __device__ Scalar least(Scalar a, Scalar b) { return {b.v < a.v ? b.v : a.v}; }
};
// Absolute error below 2^-22; relative to the result 3 + 1.2 |x| ulp where x < 0, by the errors of __expf.
__device__ __forceinline__ Scalar<float> sigmoid(Scalar<float> x) { return {__fdividef(1.0f, 1.0f + __expf(-x.v))}; }
__device__ __forceinline__ Scalar<float> tanh(Scalar<float> x) { return {::tanhf(x.v)}; }
__device__ __forceinline__ Scalar<double> sigmoid(Scalar<double> x) { return {1.0 / (1.0 + ::exp(-x.v))}; }
__device__ __forceinline__ Scalar<double> tanh(Scalar<double> x) { return {::tanh(x.v)}; }

// Four numbers that a lane keeps together: units g, g, g + 8, g + 8 with rows 2q, 2q + 1, 2q, 2q + 1.
template <class V>
struct alignas(16) Four {
  V v[4];
};

// ---- products of 16 units and 8 rows at a time ----

// E: an element of both operands. V: the working type. kDepth: elements of 32 bytes, one step along K. multiply() adds to the
// sums of kRows tiles of rows; `stride` is the operand's steps from one of these to the next.
template <Mma kKind>
struct HalfProduct {
  using E = uint16_t;
  using V = float;
  static constexpr int kDepth = 16, kMaxWarps = 16;
  __device__ static E element(float value) {
    return kKind == Mma::kF16 ? float_to_half(value) : float_to_bfloat16(value);
  }
  __device__ static float value(E element) {
    return kKind == Mma::kF16 ? half_to_float(element) : bfloat16_to_float(element);
  }
  // Where unit u and row r of a chunk of 16 units lie.
  __device__ static int place(int u, int r) { return (r * 4 + u % 8 / 2) * 4 + u / 8 * 2 + u % 2; }

  template <int kRows>
  __device__ static void multiply(Four<V> (&sum)[kRows], const uint4* a, const uint2* b, int steps, int stride) {
#pragma unroll(kRows > 2 ? 2 : 4)
    for (int k = 0; k < steps; ++k) {
      const uint4 four = a[k * kWarp];
      const uint32_t units[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        const uint2 pair = b[(n * stride + k) * kWarp];
        const uint32_t rows[2] = {pair.x, pair.y};
        mma<kKind>(sum[n].v, units, rows);
      }
    }
  }
};

// fp32: each number as the sum of two of TF32's 11 bits, and three products; what is left is 2^-22 of a product. The tensor
// cores cut what they add, so their chains are short: kChain steps, then one rounded addition.
struct SingleProduct {
  using E = float;
  using V = float;
  static constexpr int kDepth = 8, kMaxWarps = 12, kChain = 4;
  __device__ static E element(float value) { return value; }
  __device__ static float value(E element) { return element; }
  __device__ static int place(int u, int r) { return u / 8 * 64 + (r * 4 + u % 4) * 2 + u % 8 / 4; }

  template <int kCount>
  __device__ static void split(const uint32_t (&value)[kCount], uint32_t (&high)[kCount], uint32_t (&low)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      high[i] = float_to_tf32(__uint_as_float(value[i]));
      low[i] = float_to_tf32(__uint_as_float(value[i]) - __uint_as_float(high[i]));
    }
  }

  template <int kRows>
  __device__ static void multiply(Four<V> (&sum)[kRows], const uint4* a, const uint2* b, int steps, int stride) {
#pragma unroll 1
    for (int begin = 0; begin < steps; begin += kChain) {
      V chain[kRows][4] = {};
      const int end = min(begin + kChain, steps);
#pragma unroll 2
      for (int k = begin; k < end; ++k) {
        const uint4 four = a[k * kWarp];
        const uint32_t units[4] = {four.x, four.y, four.z, four.w};
        uint32_t units_high[4], units_low[4], high[2], low[2];
        split(units, units_high, units_low);
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
          const uint2 pair = b[(n * stride + k) * kWarp];
          const uint32_t rows[2] = {pair.x, pair.y};
          split(rows, high, low);
          mma<Mma::kTF32>(chain[n], units_low, high);
          mma<Mma::kTF32>(chain[n], units_high, low);
          mma<Mma::kTF32>(chain[n], units_high, high);
        }
      }
#pragma unroll
      for (int n = 0; n < kRows; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[n].v[e] += chain[n][e];
    }
  }
};

struct DoubleProduct {
  using E = double;
  using V = double;
  static constexpr int kDepth = 4, kMaxWarps = 8;
  __device__ static E element(double value) { return value; }
  __device__ static double value(E element) { return element; }
  __device__ static int place(int u, int r) { return u / 4 * 32 + r * 4 + u % 4; }

  template <int kRows>
  __device__ static void multiply(Four<V> (&sum)[kRows], const uint4* a, const uint2* b, int steps, int stride) {
    const auto* matrix = reinterpret_cast<const double2*>(a);
    const auto* states = reinterpret_cast<const double*>(b);
#pragma unroll 1
    for (int k = 0; k < steps; ++k) {
      const double2 units = matrix[k * kWarp];
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        const double row = states[(n * stride + k) * kWarp];
        double low[2] = {sum[n].v[0], sum[n].v[1]}, high[2] = {sum[n].v[2], sum[n].v[3]};
        mma_f64(low, units.x, row);
        mma_f64(high, units.y, row);
        sum[n] = {{low[0], low[1], high[0], high[1]}};
      }
    }
  }
};

// sums[n] = the product of 16 units with tile n of the rows, of `active` tiles.
template <class M, int kRows>
__device__ __forceinline__ void multiply_rows(Four<typename M::V>* sums, const uint4* a, const uint2* b, int steps,
                                              int stride) {
  Four<typename M::V> sum[kRows] = {};
  M::multiply(sum, a, b, steps, stride);
#pragma unroll
  for (int n = 0; n < kRows; ++n) sums[n * kWarp] = sum[n];
}
template <class M>
__device__ __forceinline__ void multiply(Four<typename M::V>* sums, const uint4* a, const uint2* b, int steps,
                                         int stride, int active) {
  switch (active) {
    case 1: return multiply_rows<M, 1>(sums, a, b, steps, stride);
    case 2: return multiply_rows<M, 2>(sums, a, b, steps, stride);
    case 3: return multiply_rows<M, 3>(sums, a, b, steps, stride);
    case 4: return multiply_rows<M, 4>(sums, a, b, steps, stride);
  }
}
// The same for operands that lie anywhere: where the address space is known, loads are cheaper.
template <class M>
__device__ __noinline__ void multiply_anywhere(Four<typename M::V>* sums, const uint4* a, const uint2* b, int steps,
                                               int stride, int active) {
  multiply<M>(sums, a, b, steps, stride, active);
}

// Calls f(product) for the product of the weights' type.
template <class F>
decltype(auto) visit_product(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16: return f(HalfProduct<Mma::kF16>{});
    case DType::kBFloat16: return f(HalfProduct<Mma::kBF16>{});
    case DType::kFloat64: return f(DoubleProduct{});
    case DType::kFloat32: break;
  }
  return f(SingleProduct{});
}

}  // namespace pycm::cuda
