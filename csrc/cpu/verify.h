// The exact score of a pair: what topk returns and orders by.
#pragma once

#include "cpu/matches.h"
#include "cpu/rows.h"

namespace pycm::cpu {

// A query held in fp64, centred where the metric centres.
struct LoadedQuery {
  int64_t row = -1;
  RowStats stats;
  double* values = nullptr;  // dim elements, the caller's
};

template <class M, class S>
class Verifier {
 public:
  Verifier(const Rows& queries, const Rows& gallery) : queries_(queries), gallery_(gallery) {}

  const RowReader<S>& queries() const { return queries_; }
  const RowReader<S>& gallery() const { return gallery_; }
  int64_t dim() const { return gallery_.rows().dim; }

  // `scratch`: dim elements, as everywhere below.
  void load(int64_t row, LoadedQuery& query, S* scratch) const {
    if (query.row == row) return;
    const S* values = queries_.read(row, scratch);
    query.stats = row_stats<M>(values, dim());
    for (int64_t d = 0; d < dim(); ++d)
      query.values[d] = M::kCentre ? static_cast<double>(values[d]) - query.stats.mean : static_cast<double>(values[d]);
    query.row = row;
  }

  RowStats gallery_stats(int64_t index, S* scratch) const {
    return M::kNormalise ? row_stats<M>(gallery_.read(index, scratch), dim()) : RowStats();
  }

  // The exact score, rounded to fp32 unless the inputs are fp64.
  S score(const LoadedQuery& query, int64_t index, const RowStats& stats, S* scratch) const {
    constexpr ExactSum kSum = M::kTerm == Term::kDifference ? kSumSquaredDifference
                              : M::kCentre                  ? kSumShiftedProduct
                                                            : kSumProduct;
    const double sum = exact_sum<S>(kSum, query.values, gallery_.read(index, scratch), stats.mean, dim());
    return static_cast<S>(M::finish(sum, query.stats.norm, stats.norm));
  }

  // The score, or the negated distance: larger is better.
  double key(const LoadedQuery& query, int64_t index, const RowStats& stats, S* scratch) const {
    const double score = this->score(query, index, stats, scratch);
    return M::kDistance ? -score : score;
  }

  void prefetch(int64_t index) const {
    const char* row = static_cast<const char*>(gallery_.rows().row(index));
    const int64_t bytes = std::min<int64_t>(dim() * item_size(gallery_.rows().dtype), 2048);
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
  }

  // One row of the result: matches best first, then fillers.
  static void write(const std::vector<Match>& matches, int64_t k, S* scores, int64_t* indices) {
    const int64_t found = static_cast<int64_t>(matches.size());
    for (int64_t i = 0; i < found; ++i) {
      scores[i] = static_cast<S>(M::kDistance ? -matches[i].key : matches[i].key);
      indices[i] = matches[i].index;
    }
    std::fill(scores + found, scores + k, static_cast<S>(M::kDistance ? kInfinity : -kInfinity));
    std::fill(indices + found, indices + k, int64_t{-1});
  }

 private:
  RowReader<S> queries_, gallery_;
};

}  // namespace pycm::cpu
