// rank on the CPU: the screen of topk with thresholds known from the start.
//
//   a positive's exact score p     -> pairs with value - error > p are counted where they stand, those with value + error < p
//                                     never leave the registers, and only the doubtful ones are scored in fp64
// With one positive a query the first are counted by bits. Counts are sums, so no order of blocks or threads changes them.
// Work: 2 N M D operations of the screen. Memory: O((N + M) D) and the counts.
#include "ops/rank.h"

#include <numeric>

#include "cpu/matches.h"
#include "cpu/search.h"

namespace pycm::cpu {
namespace {

constexpr int64_t kRankChunk = 2048;

template <class M, class S>
class Rank {
 public:
  Rank(const RankArgs& args, const EncodedGallery* encoded, int num_threads)
      : args_(args),
        search_(args.queries, args.gallery, encoded, args.screen, true, num_threads),
        filter_(args.mask, args.exclude, args.exclude_offsets, args.queries.rows),
        filtered_(args.mask || args.exclude != nullptr) {
    slots_.reserve(num_threads);
    for (int slot = 0; slot < num_threads; ++slot) slots_.emplace_back(search_);
  }

  void run() {
    for (int64_t begin = 0; begin < args_.queries.rows; begin += kRankChunk) {
      const int64_t rows = std::min(kRankChunk, args_.queries.rows - begin);
      const int64_t first = args_.offsets[begin], count = args_.offsets[begin + rows] - first;
      if (count == 0) continue;
      run_chunk(begin, rows, first, count);
    }
  }

 private:
  struct Counts {
    int64_t greater = 0, equal = 0;
  };
  // A positive's key and the ends of its x.
  struct Positive {
    double key;
    float below, above;
    int64_t index;
  };
  struct Slot {
    explicit Slot(const Search<M, S>& search) : tile(search) {}
    EncodeScratch<S> encode;
    TileVerifier<M, S> tile;
    std::vector<Counts> counts;  // of the chunk's positives
  };

  void run_chunk(int64_t begin, int64_t rows, int64_t first, int64_t count) {
    positives_.resize(count);
    std::vector<double> lowest(rows);
    parallel_for(rows, search_.threads(),
                 [&](int64_t row, int slot) { lowest[row] = score(begin + row, first, slots_[slot]); });
    // Queries whose positives lie among many others need the finer screen: they share tiles.
    std::vector<int64_t> order(rows);
    std::iota(order.begin(), order.end(), begin);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lowest[a - begin] > lowest[b - begin]; });
    QueryChunk chunk;
    search_.open(
        chunk, begin, rows, search_.threads(), [&](int slot) -> EncodeScratch<S>& { return slots_[slot].encode; },
        order.data());
    for (Slot& slot : slots_) slot.counts.assign(count, Counts());
    thresholds_.assign(rows, std::numeric_limits<float>::max());  // a query without positives looks for nothing
    ceilings_.assign(rows, -kInfinity);
    for (int64_t row = 0; row < rows; ++row) bracket(chunk, row, first);
    parallel_for(search_.blocks(), search_.threads(), [&](int64_t b, int slot) {
      search_.visit(
          chunk, search_.block_rows(b), slots_[slot].encode, [&](int64_t row) { return thresholds_[row]; },
          [&](int64_t row) { return ceilings_[row]; },
          [&](const ScreenQueries& queries, int64_t row, int64_t index, const ScreenColumns& columns, uint32_t hits,
              uint32_t certain, const float* values) {
            this->count(queries, chunk.query(row), row, first, index, columns, hits, certain, values, slots_[slot]);
          });
    });
    search_.all_stats_ready();
    for (int64_t p = 0; p < count; ++p) {
      Counts total;
      for (const Slot& slot : slots_) {
        total.greater += slot.counts[p].greater;
        total.equal += slot.counts[p].equal;
      }
      args_.greater[first + p] = total.greater;
      args_.equal[first + p] = total.equal;
    }
  }

  // The exact scores of a query's positives. Returns the lowest, for its length: what tells easy queries from hard ones.
  double score(int64_t query_row, int64_t first, Slot& slot) {
    const Verifier<M, S>& verifier = search_.verifier();
    double lowest = kInfinity;
    for (int64_t p = args_.offsets[query_row]; p < args_.offsets[query_row + 1]; ++p) {
      Positive& positive = positives_[p - first];
      positive.index = args_.positives[p];
      const RowStats stats = verifier.gallery_stats(positive.index, slot.tile.scratch());
      const S score = verifier.score(slot.tile.load(0, query_row), positive.index, stats, slot.tile.scratch());
      static_cast<S*>(args_.scores)[p] = score;
      positive.key = M::kDistance ? -static_cast<double>(score) : static_cast<double>(score);
      if (!std::isnan(positive.key)) lowest = std::min(lowest, positive.key);
    }
    if (M::kNormalise || M::kDistance || lowest == kInfinity) return lowest;
    const double norm = bound_stats<M>(verifier.queries().read(query_row, slot.tile.scratch()), search_.dim()).norm;
    return norm > 0 && std::isfinite(norm) ? lowest / norm : 0;
  }

  // The lowest of a query's positives decides what the screen lets through, the highest what is sure.
  void bracket(const QueryChunk& chunk, int64_t row, int64_t first) {
    const ScreenQueries& queries = search_.first(chunk);
    for (int64_t p = args_.offsets[chunk.query(row)]; p < args_.offsets[chunk.query(row) + 1]; ++p) {
      Positive& positive = positives_[p - first];
      if (std::isnan(positive.key)) continue;
      positive.below = queries.template value_of<M>(row, positive.key);
      positive.above = queries.template value_above<M>(row, positive.key);
      thresholds_[row] = std::min(thresholds_[row], positive.below);
      ceilings_[row] = std::max(ceilings_[row], positive.above);
    }
  }

  void count(const ScreenQueries& queries, int64_t query_row, int64_t row, int64_t first, int64_t index,
             const ScreenColumns& columns, uint32_t hits, uint32_t certain, const float* values, Slot& slot) {
    const int64_t from = args_.offsets[query_row] - first, to = args_.offsets[query_row + 1] - first;
    if (!filtered_) {
      const int64_t sure = count_bits(certain);
      for (int64_t p = from; p < to; ++p)
        if (!std::isnan(positives_[p].key)) slot.counts[p].greater += sure;
      hits &= ~certain;
    }
    for (; hits != 0; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      if (filtered_ && !filter_.allows(query_row, index + lane)) continue;
      const Interval interval = queries.interval(row, columns, lane, values[lane]);
      bool scored = false;
      double key = 0;
      for (int64_t p = from; p < to; ++p) {
        const Positive& positive = positives_[p];
        if (std::isnan(positive.key) || positive.index == index + lane || interval.upper < positive.below) continue;
        if (interval.lower > positive.above) {
          ++slot.counts[p].greater;
          continue;
        }
        if (!scored) key = slot.tile.key(row, query_row, index + lane);
        scored = true;
        slot.counts[p].greater += key > positive.key;
        slot.counts[p].equal += key == positive.key;
      }
    }
  }

  const RankArgs& args_;
  Search<M, S> search_;
  Filter filter_;
  bool filtered_;
  std::vector<Slot> slots_;
  std::vector<Positive> positives_;           // of the chunk
  std::vector<float> thresholds_, ceilings_;  // of its queries, in x
};

}  // namespace

void rank(const RankArgs& args, const EncodedGallery* encoded) {
  if (args.queries.rows == 0 || args.offsets[args.queries.rows] == 0) return;
  const DefaultFloatMode float_mode;
  const int threads = search_threads(args.queries, args.gallery, args.num_threads);
  visit(args.metric, [&](auto metric) {
    visit_source(args.queries.dtype,
                 [&](auto source) { Rank<decltype(metric), decltype(source)>(args, encoded, threads).run(); });
  });
}

}  // namespace pycm::cpu
