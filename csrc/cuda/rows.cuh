// Rows of any dtype and stride in fp64, and the exact score of a pair: one warp, in the library's fixed order.
//
//   lane l of 32 adds the terms d = l, l + 32, l + 64, ... from zero; then lane l adds lane l + 16, l + 8, l + 4, l + 2, l + 1
//
// which is what pycm/reference.py and cpu/verify.h do. The intrinsics __dmul_rn & co. are never fused, so every bit agrees.
// Bytes of a pair: its gallery row, once from memory (a normalised metric goes over it two or three times, out of the cache).
#pragma once

#include <cmath>

#include "core/array.h"
#include "core/metric.h"
#include "cuda/arch.cuh"

namespace pycm::cuda {

// The metric's struct of core/metric.h as values: one kernel serves all of them.
struct MetricTraits {
  bool centre, normalise, distance, root;
};
inline MetricTraits traits_of(Metric metric) {
  return visit(metric, [](auto m) {
    using M = decltype(m);
    return MetricTraits{M::kCentre, M::kNormalise, M::kDistance, M::kRoot};
  });
}

struct Float32Element {
  static __device__ __forceinline__ double at(const void* data, int64_t i) {
    return static_cast<const float*>(data)[i];
  }
};
struct Float16Element {
  static __device__ __forceinline__ double at(const void* data, int64_t i) {
    return half_to_float(static_cast<const uint16_t*>(data)[i]);
  }
};
struct BFloat16Element {
  static __device__ __forceinline__ double at(const void* data, int64_t i) {
    return bfloat16_to_float(static_cast<const uint16_t*>(data)[i]);
  }
};
struct Float64Element {
  static __device__ __forceinline__ double at(const void* data, int64_t i) {
    return static_cast<const double*>(data)[i];
  }
};

// Calls `f` with the reader of a dtype's elements.
template <typename F>
__device__ __forceinline__ void visit_elements(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(Float32Element{});
    case DType::kFloat16: return f(Float16Element{});
    case DType::kBFloat16: return f(BFloat16Element{});
    case DType::kFloat64: return f(Float64Element{});
  }
}

template <typename Element>
struct Row {
  const void* data;
  int64_t begin, stride;

  __device__ Row(const Rows& rows, int64_t i) : data(rows.data), begin(i * rows.row_stride), stride(rows.dim_stride) {}
  __device__ double operator[](int64_t d) const { return Element::at(data, begin + d * stride); }
};

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % kWarp); }

// `combine` over the warp, in every lane; a sum of doubles rounds in the fixed order.
template <typename T, typename F>
__device__ __forceinline__ T warp_reduce(T value, F&& combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// The sum of term(d), d < dim, in the fixed order.
template <typename F>
__device__ __forceinline__ double fixed_order_sum(int64_t dim, F&& term) {
  double sum = 0;
  for (int64_t d = lane_index(); d < dim; d += kWarp) sum = __dadd_rn(sum, term(d));
  return warp_reduce(sum, [](double a, double b) { return __dadd_rn(a, b); });
}

// What a metric needs of a row besides its elements.
struct RowStats {
  double mean, norm;  // 0 unless the metric centres; of the centred row, exactly 0 for a constant one
};

template <typename R>
__device__ double row_norm(const R& row, double mean, int64_t dim) {
  return sqrt(fixed_order_sum(dim, [&](int64_t d) {
    const double value = __dsub_rn(row[d], mean);
    return __dmul_rn(value, value);
  }));
}

template <typename R>
__device__ RowStats row_stats(const R& row, int64_t dim, MetricTraits metric) {
  RowStats stats{0, 0};
  if (metric.centre) {
    // The rounded mean of a constant row may miss it by an ulp; its norm must be 0 all the same.
    const double first = row[0];
    bool constant = std::isfinite(first);
    for (int64_t d = lane_index(); d < dim; d += kWarp) constant &= row[d] == first;
    if (__all_sync(kAllLanes, constant)) return stats;
    stats.mean = fixed_order_sum(dim, [&](int64_t d) { return row[d]; }) / static_cast<double>(dim);
  }
  if (metric.normalise) stats.norm = row_norm(row, stats.mean, dim);
  return stats;
}

// The exact score of a pair, rounded to fp32 unless the rows are fp64. All lanes of the warp call it and get it.
template <typename Element>
__device__ double exact_score(const Rows& queries, int64_t i, RowStats query_stats, const Rows& gallery, int64_t j,
                              MetricTraits metric) {
  const Row<Element> q(queries, i), g(gallery, j);
  const int64_t dim = gallery.dim;
  double score;
  if (metric.distance) {
    score = fixed_order_sum(dim, [&](int64_t d) {
      const double difference = __dsub_rn(q[d], g[d]);
      return __dmul_rn(difference, difference);
    });
    if (metric.root) score = sqrt(score);
  } else if (metric.normalise) {
    const RowStats stats = row_stats(g, dim, metric);
    const double sum =
        metric.centre
            ? fixed_order_sum(
                  dim,
                  [&](int64_t d) { return __dmul_rn(__dsub_rn(q[d], query_stats.mean), __dsub_rn(g[d], stats.mean)); })
            : fixed_order_sum(dim, [&](int64_t d) { return __dmul_rn(q[d], g[d]); });
    const double norms = __dmul_rn(query_stats.norm, stats.norm);
    score = norms == 0 ? 0.0 : sum / norms;
  } else {
    score = fixed_order_sum(dim, [&](int64_t d) { return __dmul_rn(q[d], g[d]); });
  }
  return gallery.dtype == DType::kFloat64 ? score : static_cast<double>(static_cast<float>(score));
}

}  // namespace pycm::cuda
