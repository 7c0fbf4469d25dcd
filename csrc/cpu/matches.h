// The state of one query while its matches are found: unverified candidates with bounds, and the best verified pairs.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/array.h"

namespace pycm::cpu {

// A screened pair. Its exact value x lies in [lower, upper] (cpu/screen.h).
struct Candidate {
  float lower, upper;
  int64_t index;
};

// A verified pair. Larger keys are better: the score, or the negated distance.
struct Match {
  double key;
  int64_t index;
};
struct Better {
  bool operator()(const Match& a, const Match& b) const {
    return a.key > b.key || (a.key == b.key && a.index < b.index);
  }
};

// The k best of the matches offered, in O(1) amortised each.
class BestMatches {
 public:
  // Matches held at most.
  static int64_t capacity(int64_t k) { return 2 * k + 64; }

  // At most `offers` matches will be offered.
  void reset(int64_t k, int64_t offers) {
    k_ = k;
    capacity_ = std::min(offers, capacity(k));
    matches_.clear();
    worst_key_ = -std::numeric_limits<double>::infinity();
  }
  // A NaN is never a match.
  void offer(double key, int64_t index) {
    if (!(key >= worst_key_)) return;
    if (matches_.size() == matches_.capacity())
      matches_.reserve(std::min<int64_t>(matches_.empty() ? 128 : capacity_, capacity_));
    Match& match = matches_.emplace_back();  // in place: a copy of a fresh pair waits for its two stores
    match.key = key;
    match.index = index;
    if (static_cast<int64_t>(matches_.size()) >= capacity(k_)) keep_best();
  }
  void keep_best() {
    if (static_cast<int64_t>(matches_.size()) < k_) return;
    std::nth_element(matches_.begin(), matches_.begin() + (k_ - 1), matches_.end(), Better());
    matches_.resize(k_);
    worst_key_ = matches_[k_ - 1].key;
  }
  void merge(const BestMatches& other) {
    for (const Match& match : other.matches_) offer(match.key, match.index);
  }
  const std::vector<Match>& matches() const { return matches_; }
  const std::vector<Match>& sorted() {
    constexpr size_t kFew = 32;  // sorting them all is quicker than to select first
    if (matches_.size() > kFew) keep_best();
    std::sort(matches_.begin(), matches_.end(), Better());
    if (static_cast<int64_t>(matches_.size()) > k_) matches_.resize(k_);
    return matches_;
  }
  bool full() const { return static_cast<int64_t>(matches_.size()) >= k_; }
  // Of the k-th best at the last keep_best; -inf before.
  double worst_key() const { return worst_key_; }

 private:
  int64_t k_ = 1, capacity_ = 0;
  double worst_key_ = -std::numeric_limits<double>::infinity();
  std::vector<Match> matches_;
};

// Drops the candidates that k others surely beat and returns the k-th best lower bound, `threshold` when there are fewer.
// Those of the k best lower bounds come first in what is left.
inline float prune(Candidate* candidates, int64_t& count, int64_t k, float threshold) {
  if (count >= k) {
    std::nth_element(candidates, candidates + (k - 1), candidates + count,
                     [](const Candidate& a, const Candidate& b) { return a.lower > b.lower; });
    threshold = std::max(threshold, candidates[k - 1].lower);
  }
  count = std::remove_if(candidates, candidates + count, [&](const Candidate& c) { return c.upper < threshold; }) -
          candidates;
  return threshold;
}

// Which pairs a caller rules out.
class Filter {
 public:
  Filter(const Mask& mask, const int64_t* exclude, const int64_t* offsets, int64_t queries) : mask_(mask) {
    if (exclude == nullptr) return;
    offsets_.assign(offsets, offsets + queries + 1);
    exclude_.assign(exclude, exclude + offsets[queries]);
    for (int64_t q = 0; q < queries; ++q) std::sort(exclude_.begin() + offsets[q], exclude_.begin() + offsets[q + 1]);
  }
  bool allows(int64_t query, int64_t index) const {
    if (mask_ && !mask_(query, index)) return false;
    return offsets_.empty() ||
           !std::binary_search(exclude_.begin() + offsets_[query], exclude_.begin() + offsets_[query + 1], index);
  }

 private:
  Mask mask_;
  std::vector<int64_t> exclude_, offsets_;
};

}  // namespace pycm::cpu
