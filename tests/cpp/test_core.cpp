// The CPU core without Python: similarity and topk at every level over many shapes, against plain loops in fp64. Meant for a
// build with -fsanitize=address,undefined. Prints "N passed, N failed"; exits with 1 when anything failed.
//
// Built with PYCM_BOUND_SCALE below 1 it is a mutation test: the screen's error bound is shrunk, and `one_sided` must fail.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "ops/similarity.h"
#include "ops/topk.h"

namespace {

using namespace pycm;

int passed = 0, failed = 0;
std::mt19937_64 generator(20240229);

void report(bool good, const std::string& what) {
  good ? ++passed : ++failed;
  if (!good && failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

// ---- plain fp64, written from the specification and not from the kernels ----

double fixed_order_sum(const std::vector<double>& terms) {
  double lane[32] = {};
  for (size_t d = 0; d < terms.size(); ++d) lane[d % 32] += terms[d];
  for (int half = 16; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

std::vector<double> centred(const std::vector<double>& x) {
  const double mean = fixed_order_sum(x) / static_cast<double>(x.size());
  const bool constant = std::all_of(x.begin(), x.end(), [&](double value) { return value == x[0]; });
  std::vector<double> result(x.size());
  for (size_t d = 0; d < x.size(); ++d) result[d] = constant ? 0 : x[d] - mean;
  return result;
}

double product_sum(const std::vector<double>& x, const std::vector<double>& y) {
  std::vector<double> terms(x.size());
  for (size_t d = 0; d < x.size(); ++d) terms[d] = x[d] * y[d];
  return fixed_order_sum(terms);
}

double score(Metric metric, const std::vector<double>& x, const std::vector<double>& y) {
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

bool is_distance(Metric metric) { return metric == Metric::kEuclidean || metric == Metric::kSqEuclidean; }

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

std::vector<std::vector<double>> random_rows(int64_t count, int64_t dim, bool integers, bool same) {
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<int> small(-2, 2);
  std::vector<std::vector<double>> rows(count, std::vector<double>(dim));
  for (auto& row : rows)
    for (double& value : row) value = integers ? small(generator) : normal(generator);
  if (same) std::fill(rows.begin(), rows.end(), rows[0]);
  return rows;
}

// ---- topk: every bit ----

struct TopKCase {
  Metric metric;
  int64_t k;
  int threads;
  bool mask, exclude;
};

void test_topk(const Matrix& q, const Matrix& g, const TopKCase& test, const std::string& what) {
  const int64_t n = q.rows.rows, m = g.rows.rows;
  const bool wide = q.rows.dtype == DType::kFloat64;
  std::vector<uint8_t> mask;
  std::vector<int64_t> exclude, offsets{0}, indices(n * test.k);
  std::vector<char> scores(n * test.k * (wide ? 8 : 4));
  TopKArgs args;
  args.queries = q.rows;
  args.gallery = g.rows;
  args.k = test.k;
  args.metric = test.metric;
  args.scores = scores.data();
  args.indices = indices.data();
  args.num_threads = test.threads;
  if (test.mask) {
    for (int64_t i = 0; i < n * m; ++i) mask.push_back(generator() % 3 != 0);
    args.mask = {mask.data(), m, 1};
  }
  if (test.exclude) {
    for (int64_t i = 0; i < n; ++i) {
      for (uint64_t e = generator() % 4; e > 0; --e) exclude.push_back(static_cast<int64_t>(generator() % (m + 1)) - 1);
      offsets.push_back(static_cast<int64_t>(exclude.size()));
    }
    exclude.reserve(1);
    args.exclude = exclude.data();
    args.exclude_offsets = offsets.data();
  }
  cpu::topk(args);
  for (int64_t i = 0; i < n; ++i) {
    std::vector<std::pair<double, int64_t>> keys;
    for (int64_t j = 0; j < m; ++j) {
      if (test.mask && !mask[i * m + j]) continue;
      if (test.exclude && std::count(exclude.begin() + offsets[i], exclude.begin() + offsets[i + 1], j) > 0) continue;
      double value = score(test.metric, q.values[i], g.values[j]);
      if (!wide) value = static_cast<float>(value);
      if (!std::isnan(value)) keys.push_back({is_distance(test.metric) ? value : -value, j});
    }
    std::stable_sort(keys.begin(), keys.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (int64_t r = 0; r < test.k; ++r) {
      const bool found = r < static_cast<int64_t>(keys.size());
      const double filler = is_distance(test.metric) ? INFINITY : -INFINITY;
      const double want = !found ? filler : is_distance(test.metric) ? keys[r].first : -keys[r].first;
      double got;
      float narrow;
      if (wide) std::memcpy(&got, scores.data() + (i * test.k + r) * 8, 8);
      else std::memcpy(&narrow, scores.data() + (i * test.k + r) * 4, 4), got = narrow;
      if (got == want && indices[i * test.k + r] == (found ? keys[r].second : -1)) continue;
      char text[160];
      std::snprintf(text, sizeof text, "%s: query %ld place %ld: got %.9g of %ld, expected %.9g of %ld", what.c_str(),
                    long(i), long(r), got, long(indices[i * test.k + r]), want, found ? long(keys[r].second) : -1L);
      return report(false, text);
    }
  }
  report(true, what);
}

// ---- similarity: within the error of fp32 (or fp64) sums ----

void test_similarity(const Matrix& x, const Matrix& y, Metric metric, int threads, const std::string& what) {
  const int64_t n = x.rows.rows, m = y.rows.rows, dim = x.rows.dim;
  const bool wide = x.rows.dtype == DType::kFloat64;
  std::vector<char> out(2 * n * m * (wide ? 8 : 4));
  SimilarityArgs args;
  args.x = x.rows;
  args.y = y.rows;
  args.metric = metric;
  args.batch_ndim = 1;  // twice the same matrix, by a stride of 0
  args.batch_shape[0] = 2;
  args.out = out.data();
  args.num_threads = threads;
  cpu::similarity(args);
  const double eps = wide ? 0x1p-52 : 0x1p-23;
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        const int64_t at = (b * n + i) * m + j;
        double got;
        float narrow;
        if (wide) std::memcpy(&got, out.data() + at * 8, 8);
        else std::memcpy(&narrow, out.data() + at * 4, 4), got = narrow;
        const double want = score(metric, x.values[i], y.values[j]);
        const double norms = std::sqrt(product_sum(x.values[i], x.values[i]) * product_sum(y.values[j], y.values[j]));
        double tolerance = static_cast<double>(dim + 8) * eps *
                           (metric == Metric::kDot ? norms
                            : is_distance(metric)  ? want
                                                   : 1);
        if (is_distance(metric)) tolerance *= 64;  // where cancellation is let pass
        if (std::fabs(got - want) <= tolerance) continue;
        char text[160];
        std::snprintf(text, sizeof text, "%s: [%ld, %ld]: got %.9g, expected %.9g", what.c_str(), long(i), long(j), got,
                      want);
        return report(false, text);
      }
  report(true, what);
}

// ---- the bound itself ----

// Rows of 1, s, s, ... against 1, t, t, ...: with s t just below half an ulp of 1 each product is lost, just above it counts
// double. The winner is the row the screen rates lowest: its error and its rivals' reach 0.86 of the bound.
void one_sided(const std::string& level) {
  const int64_t dim = std::min<int64_t>(cpu::kDepth, 512), m = 600;
  const double s = 0x1p-12, below = s * (1 - 0x1p-24), above = s * (1 + 0x1p-23);
  std::vector<std::vector<double>> q(4, std::vector<double>(dim, s)), g(m, std::vector<double>(dim, 0));
  for (auto& row : q) row[0] = 1;
  for (int64_t j = 0; j < m; ++j) {
    const bool best = j % 100 == 57;
    std::fill_n(g[j].begin(), best ? dim : dim - 4, best ? below : above);
    g[j][0] = 1;
  }
  const Matrix queries(DType::kFloat32, 4, dim, Layout::kDense, q), gallery(DType::kFloat32, m, dim, Layout::kDense, g);
  for (int64_t k : {1, 5, 50})
    test_topk(queries, gallery, {Metric::kDot, k, 1, false, false}, level + " one-sided rounding");
}

void sweep(const std::string& level) {
  const int64_t sizes[][3] = {{1, 1, 1},     {1, 40, 5},    {2, 33, 31},   {3, 12, 1},    {4, 31, 2},
                              {5, 32, 3},    {11, 33, 4},   {12, 64, 8},   {13, 65, 15},  {16, 63, 16},
                              {17, 129, 17}, {24, 100, 33}, {25, 257, 12}, {33, 200, 65}, {3, 40, 511},
                              {5, 33, 512},  {4, 35, 513},  {3, 70, 1025}, {40, 900, 20}};
  const Layout layouts[] = {Layout::kDense, Layout::kTransposed, Layout::kReversed, Layout::kEverySecond,
                            Layout::kOneRow};
  int turn = 0;
  // Sanitised loops are slow: of the large sizes every third combination will do.
  for (const auto& size : sizes)
    for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64})
      for (Metric metric :
           {Metric::kDot, Metric::kCosine, Metric::kPearson, Metric::kEuclidean, Metric::kSqEuclidean}) {
        ++turn;
        const auto [n, m, dim] = size;
        if (n * m * dim > 50000 && turn % 3 != 1) continue;
        const Layout a = layouts[turn % 5], b = layouts[turn / 5 % 5];
        const bool integers = turn % 3 == 0;
        const Matrix q(dtype, n, dim, a, random_rows(n, dim, integers, a == Layout::kOneRow));
        const Matrix g(dtype, m, dim, b, random_rows(m, dim, integers, b == Layout::kOneRow));
        const int64_t k = turn % 4 == 0 ? m : turn % 4 == 1 ? 1 : std::max<int64_t>(1, m / 5);
        const int threads = 1 + turn % 3;
        char what[120];
        std::snprintf(what, sizeof what, "%s metric %d %s [%ld, %ld] x [%ld, %ld] k=%ld threads=%d layouts %d %d",
                      level.c_str(), static_cast<int>(metric), name_of(dtype), long(n), long(dim), long(m), long(dim),
                      long(k), threads, static_cast<int>(a), static_cast<int>(b));
        test_topk(q, g, {metric, k, threads, turn % 2 == 0, turn % 7 < 2}, std::string("topk ") + what);
        test_similarity(q, g, metric, threads, std::string("similarity ") + what);
      }
}

}  // namespace

int main() {
  for (const char* level : {"scalar", "avx2", "avx512"}) {
    if (!cpu::simd_level_available(level)) {
      std::printf("%s: not on this processor\n", level);
      continue;
    }
    cpu::set_simd_level(level);
    report(std::strcmp(cpu::kernels().level, level) == 0, std::string("the level is ") + level);
    sweep(level);
    one_sided(level);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
