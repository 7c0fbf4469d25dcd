// maxsim, its top-k and its gradient, and xattn_score, on ragged and padded sets in memory of exactly their size: a stray read
// is seen, and so is a read of padding, which is NaN.
#pragma once

#include <limits>

#include "harness.h"
#include "ops/maxsim.h"
#include "ops/xattn.h"

namespace pycm::test {

// Items of so many vectors; `capacity` 0 makes them ragged.
struct Items {
  Matrix matrix;
  std::vector<int64_t> lengths, offsets{0};
  VectorSets sets;
  std::vector<std::vector<std::vector<double>>> values;  // [item][vector][dim]

  Items(DType dtype, const std::vector<int64_t>& counts, int64_t capacity, int64_t dim, Layout layout)
      : matrix(dtype, rows_of(counts, capacity), dim, layout, wanted(counts, capacity, dim)), lengths(counts) {
    for (int64_t count : counts) offsets.push_back(offsets.back() + count);
    const Rows& rows = matrix.rows;
    sets.data = rows.data;
    sets.dtype = dtype;
    sets.items = static_cast<int64_t>(counts.size());
    sets.dim = dim;
    sets.row_stride = rows.row_stride;
    sets.dim_stride = rows.dim_stride;
    sets.item_stride = capacity * rows.row_stride;
    sets.max_length = capacity;
    sets.total = capacity > 0 ? sets.items * capacity : offsets.back();
    if (capacity > 0) sets.lengths = lengths.data();
    else sets.offsets = offsets.data();
    for (int64_t i = 0; i < sets.items; ++i) {
      const int64_t first = capacity > 0 ? i * capacity : offsets[i];
      values.emplace_back(matrix.values.begin() + first, matrix.values.begin() + first + counts[i]);
    }
  }

 private:
  static int64_t rows_of(const std::vector<int64_t>& counts, int64_t capacity) {
    int64_t total = 0;
    for (int64_t count : counts) total += capacity > 0 ? capacity : count;
    return total;
  }
  static std::vector<std::vector<double>> wanted(const std::vector<int64_t>& counts, int64_t capacity, int64_t dim) {
    auto rows = random_rows(rows_of(counts, capacity), dim, false, false);
    for (size_t i = 0; capacity > 0 && i < counts.size(); ++i)
      for (int64_t t = counts[i]; t < capacity; ++t)
        rows[i * capacity + t].assign(dim, std::numeric_limits<double>::quiet_NaN());
    return rows;
  }
};

inline double one_way(Metric metric, const Items& x, size_t i, const Items& y, size_t j, Reduce reduce) {
  if (x.values[i].empty() || y.values[j].empty()) return 0;
  std::vector<double> best;
  for (const auto& a : x.values[i]) {
    double most = -std::numeric_limits<double>::infinity();
    for (const auto& b : y.values[j]) most = std::max(most, score(metric, a, b));
    best.push_back(most);
  }
  const double sum = fixed_order_sum(best);
  return reduce == Reduce::kMean ? sum / static_cast<double>(best.size()) : sum;
}

inline void test_maxsim(const Items& q, const Items& g, const MaxSimArgs& way, const std::string& what) {
  const int64_t n = q.sets.items, m = g.sets.items;
  const bool wide = q.sets.dtype == DType::kFloat64;
  const size_t size = wide ? 8 : 4;
  std::vector<double> table;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      double exact = 0;
      if (way.direction != Direction::kI2T) exact += one_way(way.metric, q, i, g, j, way.reduce);
      if (way.direction != Direction::kT2I) exact += one_way(way.metric, g, j, q, i, way.reduce);
      table.push_back(wide ? exact : static_cast<double>(static_cast<float>(exact)));
    }
  MaxSimArgs args = way;
  args.queries = q.sets;
  args.gallery = g.sets;
  std::vector<char> scores(n * m * size), best(n * m * size);
  args.scores = scores.data();
  cpu::maxsim(args);
  bool good = true;
  const double eps = wide ? 0x1p-52 : 0x1p-23;
  for (int64_t e = 0; e < n * m; ++e)
    good &= std::fabs(result(scores, wide, e) - table[e]) <= 500 * static_cast<double>(q.sets.dim + 40) * eps;
  report(good, what + " maxsim");

  std::vector<int64_t> indices(n * m);
  cpu::maxsim_topk({args, m, true, best.data(), indices.data()});
  good = true;
  for (int64_t i = 0; i < n; ++i) {
    std::vector<int64_t> order(m);
    for (int64_t j = 0; j < m; ++j) order[j] = j;
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return table[i * m + a] > table[i * m + b]; });
    for (int64_t j = 0; j < m; ++j)
      good &= indices[i * m + j] == order[j] && result(best, wide, i * m + j) == table[i * m + order[j]];
  }
  report(good, what + " maxsim_topk");

  // The score is linear along a vector's own scale where nothing is normalised, and constant for cosine.
  std::vector<char> grad(n * m * size), by_query(q.sets.total * q.sets.dim * size),
      by_item(g.sets.total * g.sets.dim * size);
  for (int64_t e = 0; e < n * m; ++e) {
    const float one = 1;
    const double one_wide = 1;
    std::memcpy(grad.data() + e * size, wide ? static_cast<const void*>(&one_wide) : &one, size);
  }
  cpu::maxsim_backward({args, grad.data(), by_query.data(), by_item.data()});
  double along = 0, total = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t t = 0; t < q.lengths[i]; ++t)
      for (int64_t d = 0; d < q.sets.dim; ++d)
        along += q.values[i][t][d] * result(by_query, wide, (q.sets.position(i) + t) * q.sets.dim + d);
  for (double value : table) total += way.metric == Metric::kDot ? value : 0;
  report(std::fabs(along - total) <= 1e-3 * (1 + std::fabs(total)), what + " maxsim_backward");
}

inline void test_xattn(const Items& images, const Items& captions, const XAttnArgs& options, const std::string& what) {
  XAttnArgs args = options;
  args.images = images.sets;
  args.captions = captions.sets;
  const bool wide = images.sets.dtype == DType::kFloat64;
  const int64_t count = images.sets.items * captions.sets.items;
  std::vector<char> scores(count * 8);
  args.scores = scores.data();
  cpu::xattn_score(args);
  bool good = true;
  for (int64_t e = 0; e < count; ++e) good &= std::fabs(result(scores, wide, e)) <= 100;  // finite: no padding was read
  report(good, what + " xattn_score");
}

inline void sweep_late_interaction(const std::string& level) {
  int turn = 0;
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64})
    for (int64_t dim : {1, 5, 33, 130})
      for (Direction direction : {Direction::kT2I, Direction::kI2T, Direction::kBoth}) {
        ++turn;
        const Layout layouts[] = {Layout::kDense, Layout::kTransposed, Layout::kReversed, Layout::kEverySecond};
        const Items q(dtype, {3, 0, 13, 1, 33}, turn % 2 == 0 ? 0 : 34, dim, layouts[turn % 4]);
        const Items g(dtype, {7, 1, 12, 0, 25, 2}, turn % 3 == 0 ? 0 : 25, dim, layouts[turn / 4 % 4]);
        MaxSimArgs way;
        way.metric = turn % 5 < 2 ? Metric::kCosine : Metric::kDot;
        way.reduce = turn % 2 == 0 ? Reduce::kMean : Reduce::kSum;
        way.direction = direction;
        way.num_threads = 1 + turn % 3;
        const std::string what = level + " " + name_of(dtype) + " dim " + std::to_string(dim);
        test_maxsim(q, g, way, what);
        XAttnArgs options;
        options.direction = direction == Direction::kBoth ? Direction::kT2I : direction;
        options.feature_norm = static_cast<FeatureNorm>(turn % 7);
        options.aggregation = static_cast<Aggregation>(turn % 4);
        options.num_threads = way.num_threads;
        test_xattn(g, q, options, what);
      }
}

}  // namespace pycm::test
