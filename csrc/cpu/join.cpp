// join on the CPU: the screen of topk with one threshold for all; what may reach it is scored in fp64 and kept if it does.
// Work: 2 N M D operations of the screen, and D for every pair kept or doubtful. Memory: O((N + M) D) and the pairs.
#include "ops/join.h"

#include <algorithm>

#include "cpu/search.h"

namespace pycm::cpu {
namespace {

constexpr int64_t kJoinChunk = 2048;

template <class M, class S>
class Join {
 public:
  Join(const JoinArgs& args, const EncodedGallery* encoded, int num_threads)
      : args_(args),
        threshold_(M::kDistance ? -args.threshold : args.threshold),
        search_(args.queries, args.gallery, encoded, args.screen, true, num_threads) {
    slots_.reserve(num_threads);
    for (int slot = 0; slot < num_threads; ++slot) slots_.emplace_back(search_);
  }

  std::vector<JoinedPair> run() {
    for (int64_t begin = 0; begin < args_.queries.rows; begin += kJoinChunk)
      run_chunk(begin, std::min(kJoinChunk, args_.queries.rows - begin));
    std::vector<JoinedPair> pairs;
    for (Slot& slot : slots_) {
      pairs.insert(pairs.end(), slot.pairs.begin(), slot.pairs.end());
      std::vector<JoinedPair>().swap(slot.pairs);
    }
    std::sort(pairs.begin(), pairs.end(), [](const JoinedPair& a, const JoinedPair& b) {
      return a.query < b.query || (a.query == b.query && a.index < b.index);
    });
    return pairs;
  }

 private:
  struct Slot {
    explicit Slot(const Search<M, S>& search) : tile(search) {}
    EncodeScratch<S> encode;
    TileVerifier<M, S> tile;
    std::vector<JoinedPair> pairs;
  };

  void run_chunk(int64_t begin, int64_t rows) {
    QueryChunk chunk;
    search_.open(chunk, begin, rows, search_.threads(),
                 [&](int slot) -> EncodeScratch<S>& { return slots_[slot].encode; });
    std::vector<float> thresholds(rows);
    for (int64_t row = 0; row < rows; ++row)
      thresholds[row] = search_.first(chunk).template value_of<M>(row, threshold_);
    parallel_for(search_.blocks(), search_.threads(), [&](int64_t b, int slot) {
      search_.visit(
          chunk, search_.block_rows(b), slots_[slot].encode, [&](int64_t row) { return thresholds[row]; }, nullptr,
          [&](const ScreenQueries& queries, int64_t row, int64_t index, const ScreenColumns& columns, uint32_t hits,
              uint32_t, const float* values) {
            for (; hits != 0; hits &= hits - 1) {
              const int lane = __builtin_ctz(hits);
              if (queries.interval(row, columns, lane, values[lane]).upper >= thresholds[row])
                verify(row, begin + row, index + lane, slots_[slot]);
            }
          },
          args_.after < 0 ? 0 : args_.after + begin + 1);
    });
    search_.all_stats_ready();
  }

  void verify(int64_t row, int64_t query_row, int64_t index, Slot& slot) {
    if (args_.after >= 0 && index <= args_.after + query_row) return;
    const double key = slot.tile.key(row, query_row, index);
    if (!(key >= threshold_)) return;
    check(found_.fetch_add(1, std::memory_order_relaxed) < args_.limit, "join: more than ", args_.limit,
          " pairs reach the threshold");
    slot.pairs.push_back({query_row, index, M::kDistance ? -key : key});
  }

  const JoinArgs& args_;
  double threshold_;
  Search<M, S> search_;
  std::vector<Slot> slots_;
  std::atomic<int64_t> found_{0};
};

}  // namespace

std::vector<JoinedPair> join(const JoinArgs& args, const EncodedGallery* encoded) {
  if (args.queries.rows == 0) return {};
  const DefaultFloatMode float_mode;
  const int threads = search_threads(args.queries, args.gallery, args.num_threads);
  return visit(args.metric, [&](auto metric) {
    return visit_source(args.queries.dtype, [&](auto source) {
      return Join<decltype(metric), decltype(source)>(args, encoded, threads).run();
    });
  });
}

}  // namespace pycm::cpu
