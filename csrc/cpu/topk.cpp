// topk on the CPU: screen in low precision, verify in fp64 (docs/exactness.md proves that no match is lost).
//
//   queries in chunks, packed once            tiles  [D][height]
//   gallery in blocks of the L2 cache         panels [D][columns]      encoded, packed, used by every tile, forgotten
//   tile x panel -> value; a pair survives if value + error bound >= its query's threshold, a lower bound of the k-th
//   best score so far; survivors go to a list per query and thread; a full list is pruned, which raises the threshold;
//   a list that stays full (ties by the thousand, useless bounds) is verified on the spot. At the end of a chunk the
//   survivors, about k a query, are scored in fp64 and ordered by (score, index).
//
// Blocks are visited in a scattered order, so that a threshold is soon as good as one from a random sample.
// Work: 2 N M D flops. Memory: the gallery once per chunk of queries.
#include "ops/topk.h"

#include <atomic>
#include <memory>
#include <numeric>

#include "cpu/screen.h"
#include "cpu/topk_scan.h"
#include "cpu/verify.h"

namespace pycm::cpu {
namespace {

constexpr int64_t kListBytes = 64 << 20;
constexpr int64_t kMaxChunk = 2048;
constexpr int64_t kScanQueries = 2;
constexpr double kScanWork = 4096, kParallelWork = 2.5e5;  // multiply-adds

int64_t candidate_capacity(int64_t k) { return 2 * k + 64; }

// What one thread may keep for one query: candidates, and verified matches.
int64_t list_bytes(int64_t k) {
  return candidate_capacity(k) * static_cast<int64_t>(sizeof(Candidate)) + 8 +
         BestMatches::capacity(k) * static_cast<int64_t>(sizeof(Match)) + static_cast<int64_t>(sizeof(BestMatches));
}

// Queries that are worked on at once.
int64_t chunk_rows(int64_t queries, int64_t k, int threads) {
  const int64_t fit = kListBytes / (list_bytes(k) * threads) / kMaxTileRows * kMaxTileRows;
  return std::min(queries, std::clamp<int64_t>(fit, kMaxTileRows, kMaxChunk));
}

// Whether to score every pair in fp64 at once: few queries are bound by reading the gallery, a k near M lets everything
// through a screen, and a small problem is over before a screen is set up.
bool use_scan(int64_t queries, int64_t gallery, int64_t k, double work) {
  return queries <= kScanQueries || 4 * k > gallery || work < kScanWork;
}

// What one thread keeps for the chunk it works on.
template <class S, class T>
struct Slot {
  Buffer<Candidate> candidates;  // [chunk][capacity]
  Buffer<int64_t> counts;        // [chunk]
  std::vector<BestMatches> verified;
  GalleryBlock<T> block;
  ScreenColumns columns;
  PanelScratch<S, T> panel;
  LoadedQuery query;  // the one being verified
  Buffer<double> query_values;
  std::vector<Candidate> survivors;  // of the query being finished
  Buffer<S> scratch;
};

// The queries of one chunk, encoded, with the thresholds every thread reads and raises.
template <class T>
struct Chunk {
  int64_t begin = 0, rows = 0;
  PackedQueries<T> queries;
  ScreenRows screen;
  std::unique_ptr<std::atomic<float>[]> thresholds;

  void raise(int64_t row, float value) {
    float current = thresholds[row].load(std::memory_order_relaxed);
    while (value > current && !thresholds[row].compare_exchange_weak(current, value, std::memory_order_relaxed)) {
    }
  }
  float threshold(int64_t row) const { return thresholds[row].load(std::memory_order_relaxed); }
};

template <class Screening, class M, class S>
class TopK {
  using T = typename Screening::Element;
  using Slot = cpu::Slot<S, T>;
  using Chunk = cpu::Chunk<T>;

 public:
  TopK(const TopKArgs& args, int num_threads)
      : args_(args),
        verifier_(args.queries, args.gallery),
        dim_(args.queries.dim),
        rows_(args.gallery.rows),
        filter_(args.mask, args.exclude, args.exclude_offsets, args.queries.rows),
        bound_(Screening::template bound<M, S>(dim_)),
        threads_(num_threads),
        stats_(rows_),
        slots_(num_threads) {
    if constexpr (M::kDistance) centre_ = distance_centre(verifier_.gallery());
    per_block_ = std::min(block_rows<T>(dim_), round_up(rows_, kMaxTileColumns));
    if (rows_ / per_block_ < 4 * threads_)
      per_block_ =
          std::clamp<int64_t>(rows_ / (4 * threads_) / kMaxTileColumns * kMaxTileColumns, kMaxTileColumns, per_block_);
    blocks_ = (rows_ + per_block_ - 1) / per_block_;
    // A step coprime to the number of blocks, near the golden section of it, visits each once and scatters them.
    step_ = std::max<int64_t>(1, static_cast<int64_t>(0.618 * static_cast<double>(blocks_)));
    while (std::gcd(step_, blocks_) != 1) ++step_;
  }

  void run() {
    const int64_t total = args_.queries.rows;
    int64_t per_chunk = chunk_rows(total, args_.k, threads_);
    // Sharing the gallery reads it once for all threads, but each fills lists of k of its own.
    const bool long_lists = 16 * args_.k * threads_ > rows_;
    const bool split_gallery = total <= threads_ * kMaxTileRows || (blocks_ >= 4 * threads_ && !long_lists);
    if (split_gallery) {
      for (int64_t begin = 0; begin < total; begin += per_chunk) {
        Chunk chunk;
        open(chunk, begin, std::min(per_chunk, total - begin), threads_);
        parallel_for(blocks_, threads_, [&](int64_t b, int slot) { visit_block(chunk, b, slots_[slot]); });
        stats_ready_ = true;
        parallel_for(chunk.rows, threads_, [&](int64_t row, int slot) { close(chunk, row, slots_, slots_[slot]); });
      }
      return;
    }
    // Few blocks, many queries: each thread takes chunks of its own.
    parallel_for(blocks_, threads_, [&](int64_t b, int slot) { prepare_stats(b, slots_[slot]); });
    stats_ready_ = true;
    per_chunk = std::min(per_chunk, std::max<int64_t>(kMaxTileRows, round_up(total / (4 * threads_), kMaxTileRows)));
    parallel_for((total + per_chunk - 1) / per_chunk, threads_, [&](int64_t c, int slot) {
      Chunk chunk;
      Slot& mine = slots_[slot];
      open(chunk, c * per_chunk, std::min(per_chunk, total - c * per_chunk), 1, &mine);
      for (int64_t b = 0; b < blocks_; ++b) visit_block(chunk, b, mine);
      for (int64_t row = 0; row < chunk.rows; ++row) close(chunk, row, Span{&mine, 1}, mine);
    });
  }

 private:
  struct Span {
    Slot* first;
    size_t count;
    Slot* begin() const { return first; }
    Slot* end() const { return first + count; }
  };

  // ---- a chunk begins ----

  void open(Chunk& chunk, int64_t begin, int64_t rows, int threads, Slot* only = nullptr) {
    chunk.begin = begin;
    chunk.rows = rows;
    chunk.thresholds = std::make_unique<std::atomic<float>[]>(rows);
    for (int64_t i = 0; i < rows; ++i) chunk.thresholds[i] = -kInfinity;
    for (Slot& slot : only != nullptr ? Span{only, 1} : Span{slots_.data(), slots_.size()}) {
      slot.scratch.reserve(dim_);
      slot.query_values.reserve(dim_);
      slot.query.values = slot.query_values.get();
      slot.panel.reserve(kMaxTileColumns, dim_);
      slot.verified.resize(rows);
      for (BestMatches& best : slot.verified) best.reset(args_.k, rows_);
      slot.counts.reserve(rows);
      std::fill_n(slot.counts.get(), rows, 0);
      slot.candidates.reserve(rows * candidate_capacity(args_.k));
    }
    chunk.queries.reserve(rows, dim_);
    parallel_for(chunk.queries.tiles(), rows * dim_ > (1 << 16) ? threads : 1, [&](int64_t t, int index) {
      Slot& slot = only != nullptr ? *only : slots_[index];
      encode_queries<M, true, S, T>(verifier_.queries(), begin, centre_.get(), t, chunk.queries, slot.scratch.get(),
                                    slot.panel.encoded.get());
    });
    chunk.screen.template set<M, T>(bound_, chunk.queries, exact());
  }

  void prepare_stats(int64_t b, Slot& slot) {
    slot.scratch.reserve(dim_);
    const RowReader<S>& gallery = verifier_.gallery();
    for (int64_t i = b * per_block_; i < std::min((b + 1) * per_block_, rows_); ++i)
      stats_[i] = bound_stats<M>(gallery.read(i, slot.scratch.get()), dim_);
  }

  // ---- screening ----

  void visit_block(Chunk& chunk, int64_t order, Slot& slot) {
    const int64_t begin = order * step_ % blocks_ * per_block_;
    const int64_t count = std::min(per_block_, rows_ - begin);
    GalleryBlock<T>& block = slot.block;
    block.reserve(per_block_, dim_);
    block.begin = begin;
    block.count = count;
    encode_gallery<M, true, S, T>(verifier_.gallery(), centre_.get(), stats_.get() + begin, !stats_ready_, block,
                                  slot.panel);
    slot.columns.template set<M, T>(bound_, block, exact());
    for (int64_t t = 0; t < chunk.queries.tiles(); ++t) {
      const int64_t first = chunk.queries.first(t);
      const int count_rows = chunk.queries.count(t);
      Tile<T> tile;
      tile.height = chunk.queries.height(t);
      tile.dim = dim_;
      tile.a = chunk.queries.tile(t);
      Screen screen;
      float cut[kMaxTileRows], row_slack[kMaxTileRows];
      for (int i = 0; i < kMaxTileRows; ++i) {
        cut[i] = i < count_rows ? chunk.screen.cut(first + i, chunk.threshold(first + i)) : kInfinity;
        row_slack[i] = i < count_rows ? chunk.screen.row_slack[first + i] : 0;
      }
      screen.cut = cut;
      screen.row_slack = row_slack;
      for (int64_t p = 0; p < block.panel_count(); ++p) {
        const int64_t j = p * block.columns;
        tile.b = block.panel(p);
        tile.scale = block.scale.get() + j;
        tile.bias = block.bias.get() + j;
        screen.slack = slot.columns.slack.get() + j;
        screen.column_slack = slot.columns.column_slack.get() + j;
        if (!Screening::compare(tile, screen)) continue;
        const int columns = static_cast<int>(std::min<int64_t>(block.columns, count - j));
        for (int i = 0; i < count_rows; ++i) {
          uint32_t hits = screen.hits[i];
          if (columns < 32) hits &= (1u << columns) - 1;
          if (hits == 0) continue;
          append(chunk, first + i, j, hits, screen.values[i], slot);
          cut[i] = chunk.screen.cut(first + i, chunk.threshold(first + i));
        }
      }
    }
  }

  void append(Chunk& chunk, int64_t row, int64_t column, uint32_t hits, const float* values, Slot& slot) {
    const int64_t capacity = candidate_capacity(args_.k);
    Candidate* list = slot.candidates.get() + row * capacity;
    int64_t& count = slot.counts[row];
    for (; hits != 0; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      const int64_t j = column + lane, index = slot.block.begin + j;
      if (!filter_.allows(chunk.begin + row, index)) continue;
      const float value = values[lane];
      const float error = chunk.screen.error(row, slot.columns, j);
      Candidate candidate{value - error, value + error, value, index};
      // An overflow says nothing about the exact value.
      if (!std::isfinite(value) || !std::isfinite(error)) candidate.lower = -kInfinity, candidate.upper = kInfinity;
      if (candidate.upper < chunk.threshold(row)) continue;
      list[count++] = candidate;
      if (count == capacity) shrink(chunk, row, list, count, slot);
    }
  }

  void shrink(Chunk& chunk, int64_t row, Candidate* list, int64_t& count, Slot& slot) {
    chunk.raise(row, prune(list, count, args_.k, chunk.threshold(row)));
    if (4 * count <= 3 * candidate_capacity(args_.k)) return;
    BestMatches& best = slot.verified[row];
    verify(chunk, row, list, count, best, slot);
    count = 0;
    best.keep_best();
    if (best.full()) chunk.raise(row, threshold_of(chunk, row, best.worst_key()));
  }

  // ---- verifying ----

  bool exact() const { return args_.precision == Precision::kExact; }

  // Without verification a match's key is its screened value; only what is written becomes a score.
  float threshold_of(const Chunk& chunk, int64_t row, double key) const {
    return exact() ? chunk.screen.template threshold_of<M>(row, key) : static_cast<float>(key);
  }

  void verify(const Chunk& chunk, int64_t row, const Candidate* candidates, int64_t count, BestMatches& best,
              Slot& slot) const {
    if (!exact()) {
      for (int64_t c = 0; c < count; ++c) best.offer(candidates[c].value, candidates[c].index);
      return;
    }
    verifier_.load(chunk.begin + row, slot.query, slot.scratch.get());
    for (int64_t c = 0; c < count; ++c) {
      const int64_t index = candidates[c].index;
      if (c + 2 < count) verifier_.prefetch(candidates[c + 2].index);
      best.offer(verifier_.key(slot.query, index, stats_[index], slot.scratch.get()), index);
    }
  }

  // ---- a chunk ends ----

  template <class Slots>
  void close(Chunk& chunk, int64_t row, Slots&& slots, Slot& mine) {
    const int64_t capacity = candidate_capacity(args_.k);
    std::vector<Candidate>& survivors = mine.survivors;
    survivors.clear();
    BestMatches best;
    best.reset(args_.k, rows_);
    for (Slot& slot : slots) {
      best.merge(slot.verified[row]);
      const Candidate* list = slot.candidates.get() + row * capacity;
      survivors.insert(survivors.end(), list, list + slot.counts[row]);
    }
    int64_t count = static_cast<int64_t>(survivors.size());
    prune(survivors.data(), count, args_.k, chunk.threshold(row));
    verify(chunk, row, survivors.data(), count, best, mine);
    const int64_t at = (chunk.begin + row) * args_.k;
    S* scores = static_cast<S*>(args_.scores) + at;
    Verifier<M, S>::write(best.sorted(), args_.k, scores, args_.indices + at);
    if (exact()) return;
    for (int64_t i = 0; i < args_.k && args_.indices[at + i] >= 0; ++i) {
      const double value = M::kDistance ? -static_cast<double>(scores[i]) : static_cast<double>(scores[i]);
      scores[i] = static_cast<S>(chunk.screen.template score_of<M>(row, value));
    }
  }

  const TopKArgs& args_;
  Verifier<M, S> verifier_;
  int64_t dim_, rows_;
  Filter filter_;
  ScreenBound bound_;
  int threads_;
  bool stats_ready_ = false;
  int64_t per_block_ = 0, blocks_ = 0, step_ = 1;
  Buffer<double> centre_;
  Buffer<RowStats> stats_;
  std::vector<Slot> slots_;
};

}  // namespace

void topk(const TopKArgs& args) {
  if (args.queries.rows == 0) return;
  const DefaultFloatMode float_mode;
  const double work = static_cast<double>(args.queries.rows) * static_cast<double>(args.gallery.rows) *
                      static_cast<double>(args.gallery.dim);
  const int threads = threads_for(work, kParallelWork, args.num_threads);
  const bool scan = args.precision == Precision::kExact && use_scan(args.queries.rows, args.gallery.rows, args.k, work);
  visit(args.metric, [&](auto metric) {
    visit_source(args.queries.dtype, [&](auto source) {
      using M = decltype(metric);
      using S = decltype(source);
      if (scan) {
        ScanTopK<M, S>(args, threads).run();
      } else {
        TopK<Fp32Screen, M, S>(args, threads).run();
      }
    });
  });
}

int64_t topk_workspace_bytes(int64_t queries, int64_t gallery, int64_t dim, int64_t k, int num_threads) {
  const int64_t scan = ScanTopK<Cosine, float>::workspace_bytes(queries, gallery, dim, k, num_threads);
  if (4 * k > gallery) return scan;
  // The chunk's lists and packed rows; per thread the panels, and the survivors of the query it finishes.
  const int64_t chunk = chunk_rows(queries, k, num_threads), threads = num_threads;
  const int64_t rows = threads * chunk * list_bytes(k) + (chunk + kMaxTileRows) * (dim + 8) * 4;
  const int64_t panels = (block_rows<float>(dim) + 3 * kMaxTileColumns) * (dim + 16) * 8;
  const int64_t survivors = threads * candidate_capacity(k) * static_cast<int64_t>(sizeof(Candidate)) + list_bytes(k);
  return std::max(scan, rows + threads * (panels + survivors) + gallery * static_cast<int64_t>(sizeof(RowStats)));
}

}  // namespace pycm::cpu
