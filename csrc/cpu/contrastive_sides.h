// What a contrastive loss reads and writes: both sides as normalised rows, their gradients, and the pairs of sparse ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/rows.h"
#include "cpu/temporal_pool_kernels.h"

namespace pycm::cpu {

// Rows [count, dim] whose dot products are the metric's scores: in place where they lie so.
template <class T>
class Side {
 public:
  Side(const Rows& source, Metric metric, void* gradient, int threads)
      : rows_(source), grad_(static_cast<T*>(gradient)), threads_(threads) {
    if (grad_ != nullptr) std::fill_n(grad_, source.rows * source.dim, T(0));
    constexpr DType kDType = std::is_same_v<T, float> ? DType::kFloat32 : DType::kFloat64;
    centred_ = metric == Metric::kPearson;
    normalised_ = centred_ || metric == Metric::kCosine;
    if (!normalised_ && source.dtype == kDType && source.dim_stride == 1) return;
    values_.reserve(source.rows * source.dim);
    factor_.reserve(source.rows);
    const RowReader<T> reader(source);
    parallel_for((source.rows + kRun - 1) / kRun, threads, [&](int64_t run, int) {
      Buffer<T> scratch(source.dim);
      for (int64_t i = run * kRun; i < std::min(source.rows, (run + 1) * kRun); ++i) {
        const T* row = reader.read(i, scratch.get());
        const RowStats stats = centred_      ? row_stats<Pearson>(row, source.dim)
                               : normalised_ ? row_stats<Cosine>(row, source.dim)
                                             : RowStats{0, 1};
        factor_[i] = stats.norm == 0 ? 0 : 1 / stats.norm;
        affine<T, T>(row, stats.mean, factor_[i], nullptr, source.dim, values_.get() + i * source.dim);
      }
    });
    rows_ = {values_.get(), kDType, source.rows, source.dim, source.dim, 1};
  }

  const Rows& rows() const { return rows_; }
  const T* row(int64_t i) const { return static_cast<const T*>(rows_.row(i)); }
  bool wanted() const { return grad_ != nullptr; }
  T* grad(int64_t i) const { return grad_ + i * rows_.dim; }

  // From the gradient of the rows as they are here to that of the source:
  // d = factor * (d^ - (d^ . r) r), less its mean where rows are centred.
  void finish() const {
    if (grad_ == nullptr || !normalised_) return;
    const RecurrentKernels<T>& kernels = recurrent_kernels<T>();
    parallel_for((rows_.rows + kRun - 1) / kRun, threads_, [&](int64_t run, int) {
      for (int64_t i = run * kRun; i < std::min(rows_.rows, (run + 1) * kRun); ++i) {
        T* d = grad(i);
        kernels.axpy(-kernels.dot(d, row(i), rows_.dim), row(i), d, rows_.dim);
        const double mean =
            centred_ ? exact_sum<T>(kSumElements, nullptr, d, 0, rows_.dim) / static_cast<double>(rows_.dim) : 0;
        affine<T, T>(d, mean, factor_[i], nullptr, rows_.dim, d);
      }
    });
  }

 private:
  static constexpr int64_t kRun = 64;

  Rows rows_;
  T* grad_;
  int threads_;
  bool centred_, normalised_;
  Buffer<T> values_;
  Buffer<double> factor_;
};

// Pairs (query, gallery row) whose scores have the gradient 1, in a fixed order.
struct ChosenPairs {
  std::vector<int64_t> queries, gallery;

  void add(int64_t query, int64_t row) {
    queries.push_back(query);
    gallery.push_back(row);
  }
};

// to.grad(i) += the rows of `from` that i is paired with, in the pairs' order.
template <class T>
void add_rows(const Side<T>& to, const std::vector<int64_t>& i, const Side<T>& from, const std::vector<int64_t>& j,
              int threads) {
  if (!to.wanted()) return;
  const int64_t count = to.rows().rows, dim = to.rows().dim;
  std::vector<int64_t> first(count + 1), order(i.size());
  for (const int64_t row : i) ++first[row + 1];
  for (int64_t row = 0; row < count; ++row) first[row + 1] += first[row];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (size_t pair = 0; pair < i.size(); ++pair) order[next[i[pair]]++] = j[pair];
  const RecurrentKernels<T>& kernels = recurrent_kernels<T>();
  parallel_for(count, threads, [&](int64_t row, int) {
    for (int64_t at = first[row]; at < first[row + 1]; ++at) kernels.axpy(1, from.row(order[at]), to.grad(row), dim);
  });
}

}  // namespace pycm::cpu
