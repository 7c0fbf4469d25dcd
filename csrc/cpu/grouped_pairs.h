// Scores many pairs exactly in the order of the gallery's rows: a row is read from memory once for all queries, where the
// order of queries would read it once for each pair. What remains is the fp64 sums, D multiply-adds a pair.
#pragma once

#include <utility>
#include <vector>

#include "cpu/matches.h"
#include "cpu/search.h"

namespace pycm::cpu {

template <class M, class S>
class GroupedPairs {
 public:
  // For queries [begin, begin + rows) of the search.
  GroupedPairs(const Search<M, S>& search, int64_t begin, int64_t rows, int threads)
      : search_(search),
        rows_(rows),
        groups_((search.rows() + kGroupRows - 1) / kGroupRows),
        tasks_(std::min<int64_t>(rows, 8 * threads)),
        threads_(threads),
        queries_(rows),
        values_(rows * search.dim()),
        scratch_(threads) {
    for (Buffer<S>& buffer : scratch_) buffer.reserve(search.dim());
    parallel_for(rows, threads, [&](int64_t row, int slot) {
      queries_[row].values = values_.get() + row * search_.dim();
      search_.verifier().load(begin + row, queries_[row], scratch_[slot].get());
    });
  }

  // range(row) -> (first, count): a query's candidates. offer(row, matches) takes them with their keys.
  template <class Range, class Offer>
  void score(Range range, Offer offer) {
    // A counting sort by group of gallery rows, then by query. starts[task][group]: where the pairs of a run of queries go.
    std::vector<std::pair<const Candidate*, int64_t>> ranges(rows_);
    std::vector<int64_t> starts(tasks_ * groups_, 0), begins(groups_ + 1);
    parallel_for(tasks_, threads_, [&](int64_t task, int) {
      for (int64_t row = first_row(task); row < first_row(task + 1); ++row) {
        ranges[row] = range(row);
        for (int64_t c = 0; c < ranges[row].second; ++c) ++starts[task * groups_ + group_of(ranges[row].first[c])];
      }
    });
    int64_t pairs = 0;
    for (int64_t group = 0; group < groups_; ++group) {
      begins[group] = pairs;
      for (int64_t task = 0; task < tasks_; ++task) {
        const int64_t count = std::exchange(starts[task * groups_ + group], pairs);
        pairs += count;
      }
    }
    begins[groups_] = pairs;
    // Every walk over the candidates of a task finds them the same places.
    const auto walk = [&](auto visit) {
      parallel_for(tasks_, threads_, [&](int64_t task, int) {
        std::vector<int64_t> next(starts.begin() + task * groups_, starts.begin() + (task + 1) * groups_);
        for (int64_t row = first_row(task); row < first_row(task + 1); ++row)
          visit(row, ranges[row], [&](const Candidate& candidate) { return next[group_of(candidate)]++; });
      });
    };
    pairs_.reserve(pairs);
    walk([&](int64_t row, const auto& candidates, auto place) {
      for (int64_t c = 0; c < candidates.second; ++c) {
        Pair& pair = pairs_[place(candidates.first[c])];
        pair.row = row;
        pair.index = candidates.first[c].index;
      }
    });
    parallel_for(groups_, threads_, [&](int64_t group, int slot) {
      for (int64_t p = begins[group]; p < begins[group + 1]; ++p) {
        if (p + kAhead < begins[group + 1]) search_.verifier().prefetch(pairs_[p + kAhead].index);
        Pair& pair = pairs_[p];
        pair.key =
            search_.verifier().key(queries_[pair.row], pair.index, search_.stats(pair.index), scratch_[slot].get());
      }
    });
    walk([&](int64_t row, const auto& candidates, auto place) {
      std::vector<Match> scored;
      for (int64_t c = 0; c < candidates.second; ++c)
        scored.push_back({pairs_[place(candidates.first[c])].key, candidates.first[c].index});
      if (!scored.empty()) offer(row, scored);
    });
  }

 private:
  static constexpr int64_t kGroupRows = 256, kAhead = 3;
  struct Pair {
    int64_t row, index;
    double key;
  };

  int64_t first_row(int64_t task) const { return task * rows_ / tasks_; }
  static int64_t group_of(const Candidate& candidate) { return candidate.index / kGroupRows; }

  const Search<M, S>& search_;
  int64_t rows_, groups_, tasks_;
  int threads_;
  std::vector<LoadedQuery> queries_;
  Buffer<double> values_;
  std::vector<Buffer<S>> scratch_;
  Buffer<Pair> pairs_;
};

}  // namespace pycm::cpu
