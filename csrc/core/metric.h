// The five metrics. A metric is one struct here and one line in pycm/reference.py.
//
// The exact score of a pair is a sum of fp64 terms in the library's fixed order (kLanes partial sums, then a tree;
// see cpu/kernels.h), which `finish` turns into the score:
//   kTerm       kProduct: sum of q_d * g_d;  kDifference: sum of (q_d - g_d)^2
//   kCentre     each row's mean is subtracted first
//   kNormalise  the sum is divided by the product of both rows' norms; a zero norm gives 0
//   kDistance   smaller is better
//   kRoot       the score is the square root of the sum
// No product is fused with the addition that follows it, so that NumPy, every CPU and every GPU agree to the bit.
#pragma once

#include <cmath>
#include <cstring>
#include <string>

#include "core/check.h"

namespace pycm {

constexpr int kLanes = 32;

enum class Term { kProduct, kDifference };

struct Dot {
  static constexpr const char* kName = "dot";
  static constexpr Term kTerm = Term::kProduct;
  static constexpr bool kCentre = false, kNormalise = false, kDistance = false, kRoot = false;
  static double finish(double sum, double, double) { return sum; }
};

struct Cosine {
  static constexpr const char* kName = "cosine";
  static constexpr Term kTerm = Term::kProduct;
  static constexpr bool kCentre = false, kNormalise = true, kDistance = false, kRoot = false;
  static double finish(double sum, double query_norm, double gallery_norm) {
    const double norms = query_norm * gallery_norm;
    return norms == 0 ? 0.0 : sum / norms;
  }
};

struct Pearson {
  static constexpr const char* kName = "pearson";
  static constexpr Term kTerm = Term::kProduct;
  static constexpr bool kCentre = true, kNormalise = true, kDistance = false, kRoot = false;
  static double finish(double sum, double query_norm, double gallery_norm) {
    return Cosine::finish(sum, query_norm, gallery_norm);
  }
};

struct Euclidean {
  static constexpr const char* kName = "euclidean";
  static constexpr Term kTerm = Term::kDifference;
  static constexpr bool kCentre = false, kNormalise = false, kDistance = true, kRoot = true;
  static double finish(double sum, double, double) { return std::sqrt(sum); }
};

struct SqEuclidean {
  static constexpr const char* kName = "sqeuclidean";
  static constexpr Term kTerm = Term::kDifference;
  static constexpr bool kCentre = false, kNormalise = false, kDistance = true, kRoot = false;
  static double finish(double sum, double, double) { return sum; }
};

enum class Metric { kDot, kCosine, kPearson, kEuclidean, kSqEuclidean };
constexpr Metric kMetrics[] = {Metric::kDot, Metric::kCosine, Metric::kPearson, Metric::kEuclidean,
                               Metric::kSqEuclidean};

// Calls `f` with the metric's struct.
template <class F>
decltype(auto) visit(Metric metric, F&& f) {
  switch (metric) {
    case Metric::kDot: return f(Dot{});
    case Metric::kCosine: return f(Cosine{});
    case Metric::kPearson: return f(Pearson{});
    case Metric::kEuclidean: return f(Euclidean{});
    case Metric::kSqEuclidean: break;
  }
  return f(SqEuclidean{});
}

inline const char* name_of(Metric metric) {
  return visit(metric, [](auto m) { return decltype(m)::kName; });
}

inline Metric parse_metric(const char* function, const char* name) {
  std::string names;
  for (Metric metric : kMetrics)
    if (std::strcmp(name, name_of(metric)) == 0) return metric;
  for (Metric metric : kMetrics) names += (names.empty() ? "" : ", ") + std::string(name_of(metric));
  throw ValueError(text(function, ": metric must be one of ", names, ", got '", name, "'"));
}

}  // namespace pycm
