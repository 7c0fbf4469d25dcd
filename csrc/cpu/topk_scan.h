// topk without a screen: every pair in fp64. For few queries, where reading the gallery is what takes time, and for a k
// near M, where everything would survive the screen.
#pragma once

#include "cpu/search.h"
#include "cpu/verify.h"
#include "ops/topk.h"

namespace pycm::cpu {

// Whether to score every pair in fp64 at once: few queries are bound by reading the gallery, a k near M lets everything
// through a screen, and a small problem is over before a screen is set up.
inline bool use_scan(int64_t queries, int64_t gallery, int64_t k, double work, bool encoded) {
  constexpr double kScanWork = 4096;  // multiply-adds
  return (queries <= kScanQueries && !encoded) || 4 * k > gallery || work < kScanWork;
}

template <class M, class S>
class ScanTopK {
 public:
  ScanTopK(const TopKArgs& args, int num_threads)
      : args_(args),
        verifier_(args.queries, args.gallery),
        filter_(args.mask, args.exclude, args.exclude_offsets, args.queries.rows),
        threads_(num_threads),
        slots_(num_threads),
        stats_(M::kNormalise ? args.gallery.rows : 0) {}

  void run() {
    const int64_t total = args_.queries.rows, rows = args_.gallery.rows;
    for (Slot& slot : slots_) slot.reserve(std::min(total, kGroup), verifier_.dim());
    per_block_ = std::clamp<int64_t>(rows / (8 * threads_), 16, block_rows<S>(verifier_.dim()));
    const int64_t blocks = (rows + per_block_ - 1) / per_block_;
    if (total <= kGroup || total < 2 * threads_) {
      // Threads share the gallery, whose rows are read once.
      for (int64_t begin = 0; begin < total; begin += kGroup) {
        const int64_t count = std::min(kGroup, total - begin);
        for (Slot& slot : slots_) load(begin, count, slot);
        parallel_for(blocks, threads_, [&](int64_t b, int slot) {
          if (begin == 0) prepare(b, slots_[slot]);
          scan(begin, count, b, slots_[slot]);
        });
        for (size_t s = 1; s < slots_.size(); ++s)
          for (int64_t i = 0; i < count; ++i) slots_[0].best[i].merge(slots_[s].best[i]);
        write(begin, count, slots_[0]);
      }
      return;
    }
    parallel_for(blocks, threads_, [&](int64_t b, int slot) { prepare(b, slots_[slot]); });
    // Threads share the queries.
    const int64_t group = std::clamp<int64_t>(total / (2 * threads_), 1, kGroup);
    parallel_for((total + group - 1) / group, threads_, [&](int64_t g, int index) {
      Slot& slot = slots_[index];
      const int64_t begin = g * group, count = std::min(group, total - begin);
      load(begin, count, slot);
      for (int64_t b = 0; b < blocks; ++b) scan(begin, count, b, slot);
      write(begin, count, slot);
    });
  }

  static int64_t workspace_bytes(int64_t queries, int64_t gallery, int64_t dim, int64_t k, int num_threads) {
    const int64_t matches = BestMatches::capacity(k) * static_cast<int64_t>(sizeof(Match));
    return num_threads * std::min(queries, kGroup) * (matches + matches / 2 + dim * 8 + 256) +
           gallery * static_cast<int64_t>(sizeof(RowStats));
  }

 private:
  // Queries that share the rows a block has brought into the cache.
  static constexpr int64_t kGroup = 8;

  struct Slot {
    std::vector<LoadedQuery> queries;
    std::vector<BestMatches> best;
    Buffer<double> values;
    Buffer<S> scratch;

    void reserve(int64_t count, int64_t dim) {
      scratch.reserve(dim);
      values.reserve(count * dim);
      queries.resize(count);
      best.resize(count);
      for (int64_t i = 0; i < count; ++i) queries[i].values = values.get() + i * dim;
    }
  };

  void load(int64_t begin, int64_t count, Slot& slot) const {
    for (int64_t i = 0; i < count; ++i) {
      verifier_.load(begin + i, slot.queries[i], slot.scratch.get());
      slot.best[i].reset(args_.k, args_.gallery.rows);
    }
  }

  // The statistics of a block's rows.
  void prepare(int64_t block, Slot& slot) {
    if constexpr (M::kNormalise)
      for (int64_t j = block * per_block_; j < std::min(args_.gallery.rows, (block + 1) * per_block_); ++j)
        stats_[j] = verifier_.gallery_stats(j, slot.scratch.get());
  }

  void scan(int64_t begin, int64_t count, int64_t block, Slot& slot) const {
    const int64_t first = block * per_block_, last = std::min(args_.gallery.rows, first + per_block_);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = first; j < last; ++j)
        if (filter_.allows(begin + i, j))
          slot.best[i].offer(
              verifier_.key(slot.queries[i], j, M::kNormalise ? stats_[j] : RowStats(), slot.scratch.get()), j);
  }

  void write(int64_t begin, int64_t count, Slot& slot) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (begin + i) * args_.k;
      Verifier<M, S>::write(slot.best[i].sorted(), args_.k, static_cast<S*>(args_.scores) + at, args_.indices + at);
    }
  }

  const TopKArgs& args_;
  Verifier<M, S> verifier_;
  Filter filter_;
  int threads_;
  int64_t per_block_ = 0;
  std::vector<Slot> slots_;
  Buffer<RowStats> stats_;
};

}  // namespace pycm::cpu
