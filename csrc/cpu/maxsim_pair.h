// The exact score of a pair of items: what maxsim_topk orders by (ops/maxsim.h), with few of its products in fp64.
//
//   values[y][x]  every product of the pair in T, within `error` of the exact one       one tile pass
//   candidates    those within 2 error of the largest of their x (and of their y)       evaluated in fp64
// Any other product is below the one that has the maximum, so leaving it out changes nothing.
#pragma once

#include "core/metric.h"
#include "cpu/maxsim_pass.h"

namespace pycm::cpu {

// |product in T - exact product| <= relative |x| |y| + absolute, with |x| = |y| = 1 for cosine (docs/exactness.md, section
// 4, the rows "the sum", "relative terms" and "underflow"); the exact one's own fp64 rounding is inside.
template <class T>
struct ProductError {
  double relative, absolute;

  ProductError(Metric metric, int64_t dim) {
    constexpr bool kSingle = std::is_same_v<T, float>;
    constexpr double kHalfUlp = kSingle ? 0x1p-24 : 0x1p-53;
    const double d = static_cast<double>(dim);
    const double chain = static_cast<double>(std::min(dim, kDepth) + (dim + kDepth - 1) / kDepth) * kHalfUlp;
    relative = chain >= 0.5 ? std::numeric_limits<double>::infinity()
                            : chain / (1 - chain) + 16 * kHalfUlp + (d / 32 + 16) * 0x1p-52;
    // Scales magnify what underflowed before them; `representable` limits them.
    const double scale = metric == Metric::kDot ? 1 : kSingle ? 1e28 : 1e140;
    absolute = 8 * (d + 4) * (kSingle ? 0x1p-149 : 0x1p-1074) * scale;
  }
  double operator()(double x_norm, double y_norm) const { return relative * x_norm * y_norm + absolute; }
};

template <class T>
class PairScorer {
 public:
  explicit PairScorer(const MaxSimArgs& args) : args_(args), error_(args.metric, args.queries.dim) {}

  // Not rounded. NaN if any similarity is.
  double score(int64_t i, int64_t j) {
    const Rows x = args_.queries.item(i), y = args_.gallery.item(j);
    if (x.rows == 0 || y.rows == 0) return 0;
    load(i, x);
    item_.read(y, args_.metric, true, source_, scales_);
    const RowReader<T> reader(y);
    const bool all = !multiply(x.rows);
    const double apart = 2 * (args_.metric == Metric::kDot ? error_(x_largest_, item_.largest) : error_(1, 1));
    const auto exact = [&](int64_t t, int64_t s) { return product(t, reader.read(s, row_.get())); };
    double total = 0;
    if (args_.direction != Direction::kI2T) total += one_way(x.rows, 1, y.rows, x.rows, apart, all, exact);
    if (args_.direction != Direction::kT2I)
      total += one_way(y.rows, x.rows, x.rows, 1, apart, all, [&](int64_t s, int64_t t) { return exact(t, s); });
    return total;
  }

 private:
  void load(int64_t i, const Rows& x) {
    if (i == query_) return;
    query_ = i;
    packed_.pack_items(slice(args_.queries, i, 1), args_.metric, true, 1);
    row_.reserve(x.dim);
    wide_.reserve(x.rows * x.dim);
    x_largest_ = 0;
    for (int64_t t = 0; t < x.rows; ++t) {
      std::copy_n(RowReader<T>(x).read(t, row_.get()), x.dim, wide_.get() + t * x.dim);
      x_largest_ = std::max(x_largest_, packed_.norm[t]);
    }
  }

  // values[s * x + t], and whether all are finite.
  bool multiply(int64_t x) {
    const int columns = packed_.columns;
    tile_.reserve(item_.count * columns);
    values_.reserve(item_.count * x);
    bool finite = true;
    for (int64_t p = 0; p < packed_.panel_count(); ++p) {
      RowTile<T> tile = row_tile(packed_, p, item_);
      tile.values = tile_.get();
      row_products(tile);
      for (int64_t s = 0; s < item_.count; ++s)
        for (int t = 0; t < tile.columns; ++t) {
          const T value = tile_[s * columns + t];
          values_[s * x + p * columns + t] = value;
          finite &= std::isfinite(value);
        }
    }
    return finite;
  }

  // Sum or mean over a of the maximum over b; the values lie at a * a_step + b * b_step.
  template <class Evaluate>
  double one_way(int64_t a_count, int64_t a_step, int64_t b_count, int64_t b_step, double apart, bool all,
                 Evaluate evaluate) {
    best_.reserve(a_count);
    for (int64_t a = 0; a < a_count; ++a) {
      const T* values = values_.get() + a * a_step;
      T largest = values[0];
      for (int64_t b = 1; b < b_count; ++b) largest = std::max(largest, values[b * b_step]);
      double best = -std::numeric_limits<double>::infinity();
      for (int64_t b = 0; b < b_count; ++b) {
        if (!all && static_cast<double>(values[b * b_step]) < static_cast<double>(largest) - apart) continue;
        const double value = evaluate(a, b);
        if (std::isnan(value)) return value;
        best = std::max(best, value);
      }
      best_[a] = best;
    }
    const double sum = exact_sum<double>(kSumElements, nullptr, best_.get(), 0, a_count);
    return args_.reduce == Reduce::kMean ? sum / static_cast<double>(a_count) : sum;
  }

  // The exact product of vector t of the loaded query with a row of the gallery.
  double product(int64_t t, const T* y) const {
    const int64_t dim = packed_.dim;
    const double sum = exact_sum<T>(kSumProduct, wide_.get() + t * dim, y, 0, dim);
    return args_.metric == Metric::kDot ? sum : Cosine::finish(sum, packed_.norm[t], row_norm(y, dim));
  }

  const MaxSimArgs args_;
  ProductError<T> error_;
  int64_t query_ = -1;
  PackedItems<T> packed_;
  Buffer<double> wide_, best_;
  double x_largest_ = 0;
  ItemRows<T> item_;
  Buffer<T> source_, scales_, row_, tile_, values_;
};

}  // namespace pycm::cpu
