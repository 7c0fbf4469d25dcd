// The exact similarity of two vectors by one warp: fp64 terms in the library's fixed order, as on the CPU.
#pragma once

#include <cmath>

#include "cuda/maxsim.cuh"

namespace pycm::cuda {

// Sum of x_d y_d: lane l adds d = l, l + 32, ..., then the lanes. Offsets in elements; every lane gets the sum.
__device__ __forceinline__ double exact_product(const VectorSets& x, int64_t x_offset, const VectorSets& y,
                                                int64_t y_offset) {
  double sum = 0;
  for (int64_t d = threadIdx.x % kWarp; d < x.dim; d += kWarp)
    sum = __dadd_rn(
        sum, __dmul_rn(load_double(x, x_offset + d * x.dim_stride), load_double(y, y_offset + d * y.dim_stride)));
  return warp_sum(sum);
}

__device__ __forceinline__ double exact_norm(const VectorSets& x, int64_t offset) {
  return std::sqrt(exact_product(x, offset, x, offset));
}

__device__ __forceinline__ double exact_cosine(double product, double x_norm, double y_norm) {
  const double norms = __dmul_rn(x_norm, y_norm);
  return norms == 0 ? 0.0 : product / norms;
}

struct ExactMax {
  double value;
  int arg;
};

// Of the vector at `offset` of x against every vector of an item of y. NaN stays; the first of equals counts.
__device__ __forceinline__ ExactMax exact_row_max(const VectorSets& x, int64_t offset, const VectorSets& y,
                                                  const ItemSpan& item, bool cosine) {
  ExactMax best{-INFINITY, 0};
  const double norm = cosine ? exact_norm(x, offset) : 1;
  for (int64_t j = 0; j < item.length; ++j) {
    const int64_t other = item.first + j * y.row_stride;
    double value = exact_product(x, offset, y, other);
    if (cosine) value = exact_cosine(value, norm, exact_norm(y, other));
    if (std::isnan(value)) return {value, static_cast<int>(j)};
    if (value > best.value) best = {value, static_cast<int>(j)};
  }
  return best;
}

}  // namespace pycm::cuda
