// topk without a screen: every pair in fp64. For few queries, where reading the gallery is what takes time, and for a k
// near M, where everything would survive the screen.
#pragma once

#include "cpu/verify.h"
#include "ops/topk.h"

namespace pycm::cpu {

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
    // Queries share the rows that a block has brought into the cache.
    const int64_t total = args_.queries.rows, rows = args_.gallery.rows;
    const int64_t fit = kMatchBytes / (2 * args_.k * static_cast<int64_t>(sizeof(Match)) + 1);
    const int64_t per_chunk = std::min(total, std::clamp<int64_t>(fit, 1, kMaxChunk));
    const int64_t per_block = std::clamp<int64_t>(rows / (8 * threads_), 16, block_rows<S>(verifier_.dim()));
    const int64_t blocks = (rows + per_block - 1) / per_block;
    for (Slot& slot : slots_) {
      slot.scratch.reserve(verifier_.dim());
      slot.best.resize(per_chunk);
    }
    queries_.resize(per_chunk);
    values_.reserve(per_chunk * verifier_.dim());
    for (int64_t i = 0; i < per_chunk; ++i) queries_[i].values = values_.get() + i * verifier_.dim();
    for (int64_t begin = 0; begin < total; begin += per_chunk) {
      const int64_t count = std::min(per_chunk, total - begin);
      for (Slot& slot : slots_)
        for (BestMatches& best : slot.best) best.reset(args_.k, rows);
      for (int64_t i = 0; i < count; ++i) verifier_.load(begin + i, queries_[i], slots_[0].scratch.get());
      parallel_for(blocks, threads_, [&](int64_t b, int slot) {
        scan(begin, count, b * per_block, std::min(rows, (b + 1) * per_block), slots_[slot]);
      });
      for (int64_t i = 0; i < count; ++i) close(begin + i, i);
    }
  }

 private:
  static constexpr int64_t kMaxChunk = 64;
  static constexpr int64_t kMatchBytes = 64 << 20;

  struct Slot {
    std::vector<BestMatches> best;
    Buffer<S> scratch;
  };

  void scan(int64_t begin, int64_t count, int64_t first, int64_t last, Slot& slot) {
    S* scratch = slot.scratch.get();
    if (M::kNormalise && begin == 0)
      for (int64_t j = first; j < last; ++j) stats_[j] = verifier_.gallery_stats(j, scratch);
    for (int64_t i = 0; i < count; ++i) {
      BestMatches& best = slot.best[i];
      for (int64_t j = first; j < last; ++j)
        if (filter_.allows(begin + i, j))
          best.offer(verifier_.key(queries_[i], j, M::kNormalise ? stats_[j] : RowStats(), scratch), j);
    }
  }

  void close(int64_t row, int64_t i) {
    BestMatches& best = slots_[0].best[i];
    for (size_t s = 1; s < slots_.size(); ++s) best.merge(slots_[s].best[i]);
    Verifier<M, S>::write(best.sorted(), args_.k, static_cast<S*>(args_.scores) + row * args_.k,
                          args_.indices + row * args_.k);
  }

  const TopKArgs& args_;
  Verifier<M, S> verifier_;
  Filter filter_;
  int threads_;
  std::vector<Slot> slots_;
  std::vector<LoadedQuery> queries_;
  Buffer<double> values_;
  Buffer<RowStats> stats_;
};

}  // namespace pycm::cpu
