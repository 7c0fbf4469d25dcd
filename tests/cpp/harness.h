// What the tests of the CPU core share: counting, the specification in plain fp64, and matrices of any dtype and stride.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/array.h"
#include "core/metric.h"

namespace pycm::test {

inline int passed = 0, failed = 0;
inline std::mt19937_64 generator(20240229);

inline void report(bool good, const std::string& what) {
  good ? ++passed : ++failed;
  if (!good && failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

// ---- plain fp64, written from the specification and not from the kernels ----

inline double fixed_order_sum(const std::vector<double>& terms) {
  double lane[32] = {};
  for (size_t d = 0; d < terms.size(); ++d) lane[d % 32] += terms[d];
  for (int half = 16; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

inline std::vector<double> centred(const std::vector<double>& x) {
  const double mean = fixed_order_sum(x) / static_cast<double>(x.size());
  const bool constant = std::all_of(x.begin(), x.end(), [&](double value) { return value == x[0]; });
  std::vector<double> result(x.size());
  for (size_t d = 0; d < x.size(); ++d) result[d] = constant ? 0 : x[d] - mean;
  return result;
}

inline double product_sum(const std::vector<double>& x, const std::vector<double>& y) {
  std::vector<double> terms(x.size());
  for (size_t d = 0; d < x.size(); ++d) terms[d] = x[d] * y[d];
  return fixed_order_sum(terms);
}

inline double score(Metric metric, const std::vector<double>& x, const std::vector<double>& y) {
  switch (metric) {
    case Metric::kDot: return product_sum(x, y);
    case Metric::kCosine: {
      const double norms = std::sqrt(product_sum(x, x)) * std::sqrt(product_sum(y, y));
      return norms == 0 ? 0 : product_sum(x, y) / norms;
    }
    case Metric::kPearson: return score(Metric::kCosine, centred(x), centred(y));
    default: break;
  }
  std::vector<double> difference(x.size());
  for (size_t d = 0; d < x.size(); ++d) difference[d] = x[d] - y[d];
  const double square = product_sum(difference, difference);
  return metric == Metric::kEuclidean ? std::sqrt(square) : square;
}

inline bool is_distance(Metric metric) { return metric == Metric::kEuclidean || metric == Metric::kSqEuclidean; }

// ---- a matrix of any dtype and stride, in a block of exactly its size, so that a stray read is seen ----

enum class Layout { kDense, kTransposed, kReversed, kEverySecond, kOneRow };

struct Matrix {
  std::vector<char> memory;
  Rows rows;
  std::vector<std::vector<double>> values;

  Matrix(DType dtype, int64_t count, int64_t dim, Layout layout, const std::vector<std::vector<double>>& wanted) {
    const int64_t size = item_size(dtype);
    rows.dtype = dtype;
    rows.rows = count;
    rows.dim = dim;
    rows.row_stride = layout == Layout::kTransposed ? 1 : layout == Layout::kEverySecond ? 2 * dim : dim;
    rows.dim_stride = layout == Layout::kTransposed ? count : layout == Layout::kEverySecond ? 2 : 1;
    int64_t begin = 0;
    if (layout == Layout::kReversed) {
      begin = count * dim - 1;
      rows.row_stride = -dim;
      rows.dim_stride = -1;
    }
    if (layout == Layout::kOneRow) rows.row_stride = 0;
    const int64_t last =
        (count - 1) * std::max<int64_t>(rows.row_stride, 0) + (dim - 1) * std::max<int64_t>(rows.dim_stride, 0);
    memory.resize(static_cast<size_t>((std::max(last, begin) + 1) * size));
    rows.data = memory.data() + begin * size;
    values.assign(count, std::vector<double>(dim));
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < dim; ++d) put(i, d, wanted[i][d]);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < dim; ++d) values[i][d] = get(i, d);
  }

 private:
  char* at(int64_t i, int64_t d) const {
    return static_cast<char*>(const_cast<void*>(rows.data)) +
           (i * rows.row_stride + d * rows.dim_stride) * item_size(rows.dtype);
  }
  void put(int64_t i, int64_t d, double value) {
    const float single = static_cast<float>(value);
    if (rows.dtype == DType::kFloat64) std::memcpy(at(i, d), &value, 8);
    if (rows.dtype == DType::kFloat32) std::memcpy(at(i, d), &single, 4);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    uint16_t half = static_cast<uint16_t>(bits >> 16);  // bfloat16 by truncation
    if (rows.dtype == DType::kFloat16) {                // a normal half, truncated, or zero
      const int exponent = static_cast<int>(bits >> 23 & 0xff) - 112;
      half = static_cast<uint16_t>(bits >> 31 << 15);
      if (exponent >= 31) half |= 0x7bff;
      else if (exponent > 0) half |= static_cast<uint16_t>(exponent << 10 | (bits >> 13 & 0x3ff));
    }
    if (item_size(rows.dtype) == 2) std::memcpy(at(i, d), &half, 2);
  }
  double get(int64_t i, int64_t d) const {
    double value;
    float single;
    uint16_t half;
    switch (rows.dtype) {
      case DType::kFloat64: std::memcpy(&value, at(i, d), 8); return value;
      case DType::kFloat32: std::memcpy(&single, at(i, d), 4); return single;
      default: break;
    }
    std::memcpy(&half, at(i, d), 2);
    if (rows.dtype == DType::kBFloat16) return bfloat16_to_float(half);
    const double magnitude = (half >> 10 & 31) == 0 ? std::ldexp(half & 1023, -24)
                                                    : std::ldexp((half & 1023) + 1024, (half >> 10 & 31) - 25);
    return half >> 15 ? -magnitude : magnitude;
  }
};

inline std::vector<std::vector<double>> random_rows(int64_t count, int64_t dim, bool integers, bool same) {
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<int> small(-2, 2);
  std::vector<std::vector<double>> rows(count, std::vector<double>(dim));
  for (auto& row : rows)
    for (double& value : row) value = integers ? small(generator) : normal(generator);
  if (same) std::fill(rows.begin(), rows.end(), rows[0]);
  return rows;
}

// Scores as matches are ordered: rounded to fp32 unless the inputs are fp64.
inline std::vector<std::vector<double>> score_table(Metric metric, const Matrix& q, const Matrix& g) {
  std::vector<std::vector<double>> table(q.values.size(), std::vector<double>(g.values.size()));
  for (size_t i = 0; i < q.values.size(); ++i)
    for (size_t j = 0; j < g.values.size(); ++j) {
      const double value = score(metric, q.values[i], g.values[j]);
      table[i][j] = q.rows.dtype == DType::kFloat64 ? value : static_cast<double>(static_cast<float>(value));
    }
  return table;
}

// Element i of an array of results.
inline double result(const std::vector<char>& results, bool wide, int64_t i) {
  double value;
  float narrow;
  if (wide) std::memcpy(&value, results.data() + i * 8, 8);
  else std::memcpy(&narrow, results.data() + i * 4, 4), value = static_cast<double>(narrow);
  return value;
}

}  // namespace pycm::test
