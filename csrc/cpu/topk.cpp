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
// Work: 2 N M D flops. Memory: the gallery once per chunk of queries. Few queries, or a k near M, skip the screen: there
// the fp64 scan is bound by memory, or everything survives anyway.
#include "ops/topk.h"

#include <atomic>
#include <memory>
#include <numeric>

#include "cpu/matches.h"
#include "cpu/rows.h"
#include "cpu/screen.h"

namespace pycm::cpu {
namespace {

constexpr int64_t kCandidateBytes = 32 << 20;  // per thread
constexpr int64_t kMaxChunk = 2048;
constexpr int64_t kScanQueries = 2;

int64_t candidate_capacity(int64_t k) { return 2 * k + 64; }

int64_t chunk_rows(int64_t queries, int64_t k) {
  const int64_t fit = kCandidateBytes / (candidate_capacity(k) * static_cast<int64_t>(sizeof(Candidate)));
  return std::min(queries, std::clamp<int64_t>(round_up(fit, kMaxTileRows), kMaxTileRows, kMaxChunk));
}

// What one thread keeps for the chunk it works on.
template <class S>
struct Slot {
  Buffer<Candidate> candidates;  // [chunk][capacity]
  Buffer<int64_t> counts;        // [chunk]
  std::vector<BestMatches> verified;
  GalleryBlock<float> block;
  ScreenColumns columns;
  PanelScratch<S, float> panel;
  Buffer<double> query;  // the query being verified
  int64_t query_row = -1;
  Buffer<S> query_scratch, gallery_scratch;
};

// The queries of one chunk, encoded, with the thresholds every thread reads and raises.
struct Chunk {
  int64_t begin = 0, rows = 0;
  PackedQueries<float> queries;
  ScreenRows screen;
  std::unique_ptr<std::atomic<float>[]> thresholds;

  void raise(int64_t row, float value) {
    float current = thresholds[row].load(std::memory_order_relaxed);
    while (value > current && !thresholds[row].compare_exchange_weak(current, value, std::memory_order_relaxed)) {
    }
  }
  float threshold(int64_t row) const { return thresholds[row].load(std::memory_order_relaxed); }
};

template <class M, class S>
class TopK {
 public:
  explicit TopK(const TopKArgs& args)
      : args_(args),
        queries_(args.queries),
        gallery_(args.gallery),
        dim_(args.queries.dim),
        rows_(args.gallery.rows),
        filter_(args.mask, args.exclude, args.exclude_offsets, args.queries.rows),
        bound_(Fp32Screen::bound<M, S>(dim_)) {
    const double pairs = static_cast<double>(args.queries.rows) * static_cast<double>(rows_);
    threads_ = pairs * static_cast<double>(dim_) > 5e5 ? args.num_threads : 1;
    slots_ = std::vector<Slot<S>>(threads_);
    stats_.reserve(rows_);
    scan_ = args.queries.rows <= kScanQueries || 4 * args.k > rows_;
    if constexpr (M::kDistance)
      if (!scan_) centre_ = distance_centre(gallery_);
    per_block_ = std::min(block_rows<float>(dim_), round_up(rows_, kMaxTileColumns));
    if (rows_ / per_block_ < 4 * threads_)
      per_block_ = std::clamp<int64_t>(rows_ / (4 * threads_) / kMaxTileColumns * kMaxTileColumns, kMaxTileColumns,
                                       per_block_);
    blocks_ = (rows_ + per_block_ - 1) / per_block_;
    // A step coprime to the number of blocks, near the golden section of it, visits each once and scatters them.
    step_ = std::max<int64_t>(1, static_cast<int64_t>(0.618 * static_cast<double>(blocks_)));
    while (std::gcd(step_, blocks_) != 1) ++step_;
  }

  void run() {
    const int64_t total = args_.queries.rows;
    int64_t per_chunk = chunk_rows(total, args_.k);
    if (scan_) per_chunk = std::min<int64_t>(per_chunk, 64);
    const bool split_gallery = blocks_ >= 4 * threads_ || total <= threads_ * kMaxTileRows;
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
      Slot<S>& mine = slots_[slot];
      open(chunk, c * per_chunk, std::min(per_chunk, total - c * per_chunk), 1, &mine);
      for (int64_t b = 0; b < blocks_; ++b) visit_block(chunk, b, mine);
      for (int64_t row = 0; row < chunk.rows; ++row) close(chunk, row, Span{&mine, 1}, mine);
    });
  }

 private:
  struct Span {
    Slot<S>* first;
    size_t count;
    Slot<S>* begin() const { return first; }
    Slot<S>* end() const { return first + count; }
  };

  // ---- a chunk begins ----

  void open(Chunk& chunk, int64_t begin, int64_t rows, int threads, Slot<S>* only = nullptr) {
    chunk.begin = begin;
    chunk.rows = rows;
    chunk.thresholds = std::make_unique<std::atomic<float>[]>(rows);
    for (int64_t i = 0; i < rows; ++i) chunk.thresholds[i] = -kInfinity;
    for (Slot<S>& slot : only != nullptr ? Span{only, 1} : Span{slots_.data(), slots_.size()}) {
      slot.query.reserve(dim_);
      slot.query_row = -1;
      slot.query_scratch.reserve(dim_);
      slot.gallery_scratch.reserve(dim_);
      slot.panel.reserve(kMaxTileColumns, dim_);
      slot.verified.resize(rows);
      for (BestMatches& best : slot.verified) best.reset(args_.k);
      slot.counts.reserve(rows);
      std::fill_n(slot.counts.get(), rows, 0);
      if (!scan_) slot.candidates.reserve(rows * candidate_capacity(args_.k));
    }
    chunk.queries.reserve(rows, dim_);
    if (scan_) {
      Slot<S>& slot = only != nullptr ? *only : slots_[0];
      for (int64_t i = 0; i < rows; ++i)
        chunk.queries.stats[i] = row_stats<M>(queries_.read(begin + i, slot.query_scratch.get()), dim_);
      return;
    }
    parallel_for(chunk.queries.tiles(), rows * dim_ > (1 << 16) ? threads : 1, [&](int64_t t, int index) {
      Slot<S>& slot = only != nullptr ? *only : slots_[index];
      encode_queries<M, S, float>(queries_, begin, centre_.get(), t, chunk.queries, slot.query_scratch.get(),
                                  slot.panel.encoded.get());
    });
    chunk.screen.template set<M>(bound_, chunk.queries, args_.precision == Precision::kExact);
  }

  void prepare_stats(int64_t b, Slot<S>& slot) {
    slot.gallery_scratch.reserve(dim_);
    for (int64_t i = b * per_block_; i < std::min((b + 1) * per_block_, rows_); ++i)
      stats_[i] = row_stats<M>(gallery_.read(i, slot.gallery_scratch.get()), dim_);
  }

  // ---- screening ----

  void visit_block(Chunk& chunk, int64_t order, Slot<S>& slot) {
    const int64_t begin = order * step_ % blocks_ * per_block_;
    const int64_t count = std::min(per_block_, rows_ - begin);
    if (scan_) return scan_block(chunk, begin, count, slot);
    GalleryBlock<float>& block = slot.block;
    block.reserve(per_block_, dim_);
    block.begin = begin;
    block.count = count;
    encode_gallery<M, S, float>(gallery_, centre_.get(), stats_.get() + begin, !stats_ready_, block, slot.panel);
    slot.columns.template set<M>(bound_, block, args_.precision == Precision::kExact);
    for (int64_t t = 0; t < chunk.queries.tiles(); ++t) {
      const int64_t first = chunk.queries.first(t);
      const int count_rows = chunk.queries.count(t);
      Tile<float> tile;
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
        if (!kernels().screen(tile, screen)) continue;
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

  void append(Chunk& chunk, int64_t row, int64_t column, uint32_t hits, const float* values, Slot<S>& slot) {
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

  void shrink(Chunk& chunk, int64_t row, Candidate* list, int64_t& count, Slot<S>& slot) {
    chunk.raise(row, prune(list, count, args_.k, chunk.threshold(row)));
    if (4 * count <= 3 * candidate_capacity(args_.k)) return;
    BestMatches& best = slot.verified[row];
    verify(chunk, row, list, count, best, slot);
    count = 0;
    best.keep_best();
    if (best.full()) chunk.raise(row, chunk.screen.template threshold_of<M>(row, best.worst_key()));
  }

  // ---- verifying ----

  // The key of a pair: its exact score, rounded to fp32 unless the inputs are fp64; negated for distances.
  double key_of(const RowStats& query_stats, const double* query, const S* row, const RowStats& row_stats) const {
    constexpr ExactSum kSum = M::kTerm == Term::kDifference ? kSumSquaredDifference
                              : M::kCentre                  ? kSumShiftedProduct
                                                            : kSumProduct;
    const double sum = exact_sum<S>(kSum, query, row, row_stats.mean, dim_);
    double score = M::finish(sum, query_stats.norm, row_stats.norm);
    if constexpr (std::is_same_v<S, float>) score = static_cast<float>(score);
    return M::kDistance ? -score : score;
  }

  const double* load_query(const Chunk& chunk, int64_t row, Slot<S>& slot) const {
    if (slot.query_row == chunk.begin + row) return slot.query.get();
    const S* query = queries_.read(chunk.begin + row, slot.query_scratch.get());
    const double mean = chunk.queries.stats[row].mean;
    for (int64_t d = 0; d < dim_; ++d)
      slot.query[d] = M::kCentre ? static_cast<double>(query[d]) - mean : static_cast<double>(query[d]);
    slot.query_row = chunk.begin + row;
    return slot.query.get();
  }

  void verify(const Chunk& chunk, int64_t row, const Candidate* candidates, int64_t count, BestMatches& best,
              Slot<S>& slot) const {
    if (args_.precision == Precision::kFast) {
      for (int64_t c = 0; c < count; ++c)
        best.offer(chunk.screen.template key_of<M>(row, candidates[c].value), candidates[c].index);
      return;
    }
    const double* query = load_query(chunk, row, slot);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t index = candidates[c].index;
      if (c + 2 < count) prefetch(candidates[c + 2].index);
      const S* row_data = gallery_.read(index, slot.gallery_scratch.get());
      best.offer(key_of(chunk.queries.stats[row], query, row_data, stats_[index]), index);
    }
  }

  void prefetch(int64_t index) const {
    const char* row = static_cast<const char*>(gallery_.rows().row(index));
    const int64_t bytes = std::min<int64_t>(dim_ * item_size(gallery_.rows().dtype), 2048);
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
  }

  // The fp64 scan: every pair verified.
  void scan_block(Chunk& chunk, int64_t begin, int64_t count, Slot<S>& slot) {
    for (int64_t i = begin; i < begin + count; ++i) {
      const S* row_data = gallery_.read(i, slot.gallery_scratch.get());
      if (!stats_ready_) stats_[i] = M::kNormalise ? row_stats<M>(row_data, dim_) : RowStats();
      if (chunk.rows == 1) {
        if (filter_.allows(chunk.begin, i))
          slot.verified[0].offer(key_of(chunk.queries.stats[0], load_query(chunk, 0, slot), row_data, stats_[i]), i);
      }
    }
    if (chunk.rows == 1) return;
    for (int64_t row = 0; row < chunk.rows; ++row) {
      const double* query = load_query(chunk, row, slot);
      for (int64_t i = begin; i < begin + count; ++i)
        if (filter_.allows(chunk.begin + row, i))
          slot.verified[row].offer(
              key_of(chunk.queries.stats[row], query, gallery_.read(i, slot.gallery_scratch.get()), stats_[i]), i);
    }
  }

  // ---- a chunk ends ----

  template <class Slots>
  void close(Chunk& chunk, int64_t row, Slots&& slots, Slot<S>& mine) {
    const int64_t capacity = candidate_capacity(args_.k);
    std::vector<Candidate> survivors;
    BestMatches best;
    best.reset(args_.k);
    for (Slot<S>& slot : slots) {
      best.merge(slot.verified[row]);
      if (scan_) continue;
      const Candidate* list = slot.candidates.get() + row * capacity;
      survivors.insert(survivors.end(), list, list + slot.counts[row]);
    }
    int64_t count = static_cast<int64_t>(survivors.size());
    prune(survivors.data(), count, args_.k, chunk.threshold(row));
    verify(chunk, row, survivors.data(), count, best, mine);
    write(chunk.begin + row, best.sorted());
  }

  void write(int64_t row, const std::vector<Match>& matches) const {
    const double filler = M::kDistance ? kInfinity : -kInfinity;
    for (int64_t i = 0; i < args_.k; ++i) {
      const bool found = i < static_cast<int64_t>(matches.size());
      const double score = !found ? filler : M::kDistance ? -matches[i].key : matches[i].key;
      static_cast<S*>(args_.scores)[row * args_.k + i] = static_cast<S>(score);
      args_.indices[row * args_.k + i] = found ? matches[i].index : -1;
    }
  }

  const TopKArgs& args_;
  RowReader<S> queries_, gallery_;
  int64_t dim_, rows_;
  Filter filter_;
  ScreenBound bound_;
  int threads_ = 1;
  bool scan_ = false, stats_ready_ = false;
  int64_t per_block_ = 0, blocks_ = 0, step_ = 1;
  Buffer<double> centre_;
  Buffer<RowStats> stats_;
  std::vector<Slot<S>> slots_;
};

}  // namespace

void topk(const TopKArgs& args) {
  if (args.queries.rows == 0) return;
  const DefaultFloatMode float_mode;
  visit(args.metric, [&](auto metric) {
    visit_source(args.queries.dtype, [&](auto source) { TopK<decltype(metric), decltype(source)>(args).run(); });
  });
}

int64_t topk_workspace_bytes(int64_t queries, int64_t gallery, int64_t dim, int64_t k, int num_threads) {
  const int64_t chunk = chunk_rows(queries, k);
  const int64_t lists = chunk * (candidate_capacity(k) * static_cast<int64_t>(sizeof(Candidate)) + 8 +
                                 static_cast<int64_t>(sizeof(BestMatches)));
  const int64_t panels = (block_rows<float>(dim) + 3 * kMaxTileColumns) * dim * 4;
  return num_threads * (lists + panels) + chunk * dim * 4 + gallery * static_cast<int64_t>(sizeof(RowStats));
}

}  // namespace pycm::cpu
