// What topk, rank and join share: a gallery visited block by block by a screen, for chunks of queries.
//
// The first screen is the one asked for, or the quickest this processor has that suits the problem. Where its bound
// turns out to leave too many pairs of a tile of queries undecided, its remaining blocks go to the next finer screen: every
// block may be screened by another precision, since all speak of the same exact value x.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/encoded_gallery.h"
#include "cpu/screening.h"
#include "cpu/verify.h"
#include "ops/screen.h"

namespace pycm::cpu {

// One-shot searches: below this many queries the gallery is read in fp32 anyway, and encoding it would not pay.
constexpr int64_t kWordQueries = 24;
constexpr int64_t kWordWork = int64_t{1} << 26;  // multiply-adds

// The screens to use, best first, no more than two.
inline std::vector<ScreenKind> choose_screens(ScreenChoice choice, const EncodedGallery* encoded, int64_t queries,
                                              int64_t gallery, int64_t dim, bool exact) {
  const auto quick = [&](ScreenKind kind) { return kernels().quick[static_cast<int>(kind)] && can_screen(kind, dim); };
  const ScreenKind finer = quick(ScreenKind::kBFloat16) ? ScreenKind::kBFloat16 : ScreenKind::kFloat32;
  if (encoded != nullptr && encoded->kind() != ScreenKind::kFloat32) {
    // What is not verified must not depend on which of two screens came to it first.
    if (!exact || encoded->kind() == ScreenKind::kBFloat16) return {encoded->kind()};
    return {encoded->kind(), finer};
  }
  switch (choice) {
    case ScreenChoice::kFloat32: return {ScreenKind::kFloat32};
    case ScreenChoice::kBFloat16: return {can_screen(ScreenKind::kBFloat16, dim) ? ScreenKind::kBFloat16 : finer};
    case ScreenChoice::kInt8: return {can_screen(ScreenKind::kInt8, dim) ? ScreenKind::kInt8 : finer};
    case ScreenChoice::kAuto: break;
  }
  // The encoding of M rows is spread over N queries.
  const bool pays = queries >= kWordQueries && gallery >= 4 * kSampleRows && queries * gallery >= kWordWork / dim;
  if (!exact || !pays || !quick(ScreenKind::kInt8)) return {ScreenKind::kFloat32};
  return {ScreenKind::kInt8, finer};
}

// One-shot searches of so few queries are bound by reading the gallery: every pair is scored at once.
constexpr int64_t kScanQueries = 4;

// The threads worth waking for all pairs.
inline int search_threads(const Rows& queries, const Rows& gallery, int num_threads) {
  constexpr double kShare = 2.5e5;  // multiply-adds
  const double work =
      static_cast<double>(queries.rows) * static_cast<double>(gallery.rows) * static_cast<double>(gallery.dim);
  return threads_for(work, kShare, num_threads);
}

// Queries that are worked on at once, encoded for one screen or two.
struct QueryChunk {
  int64_t begin = 0, rows = 0;
  const int64_t* order = nullptr;  // [rows], or null: begin, begin + 1, ...
  ScreenQueries queries[2];
  std::once_flag second;
  // Pairs of a tile of queries that were screened, and those among them that were left undecided.
  struct Tile {
    std::atomic<int64_t> screened{0}, undecided{0};
  };
  std::unique_ptr<Tile[]> tiles;

  // Where row `row` of the chunk stands among all queries.
  int64_t query(int64_t row) const { return order != nullptr ? order[row] : begin + row; }
};

template <class M, class S>
class Search {
 public:
  Search(const Rows& queries, const Rows& gallery, const EncodedGallery* encoded, ScreenChoice choice, bool exact,
         int threads)
      : verifier_(queries, gallery),
        encoded_(encoded),
        rows_(gallery.rows),
        dim_(gallery.dim),
        threads_(threads),
        direct_(encoded == nullptr && exact && choice == ScreenChoice::kAuto && queries.rows <= kScanQueries),
        stats_ready_(encoded != nullptr) {
    const std::vector<ScreenKind> kinds = choose_screens(choice, encoded, queries.rows, rows_, dim_, exact);
    if (encoded == nullptr) {
      own_stats_.reserve(rows_);
      if (!direct_) choose_transform<M, S>(verifier_.gallery(), kinds[0], own_transform_);
    }
    for (ScreenKind kind : kinds)
      screens_.emplace_back(kind, verifier_.queries(), verifier_.gallery(), transform(), exact);
    // Blocks that fit a core's cache, and enough of them for all threads.
    const int64_t panels = (rows_ + kPanelColumns - 1) / kPanelColumns;
    int64_t per_block = std::max<int64_t>(1, screens_[0].block_rows() / kPanelColumns);
    per_block = std::clamp<int64_t>(panels / (4 * threads_), 1, per_block);
    blocks_ = (panels + per_block - 1) / per_block;
    most_rows_ = per_block * kPanelColumns;
  }

  const Verifier<M, S>& verifier() const { return verifier_; }
  int64_t rows() const { return rows_; }
  int64_t dim() const { return dim_; }
  int64_t blocks() const { return blocks_; }
  int threads() const { return threads_; }

  // ---- statistics of gallery rows: written block by block on the first visit of all blocks ----

  const RowStats& stats(int64_t index) const {
    return encoded_ != nullptr ? encoded_->stats()[index] : own_stats_[index];
  }
  void all_stats_ready() { stats_ready_ = true; }
  void prepare_stats(int64_t b, EncodeScratch<S>& scratch) {
    if (encoded_ == nullptr) prepare_stats_of(block_rows(b), scratch);
  }

  // ---- queries ----

  // `scratch(slot)` for each thread; `order` as in QueryChunk.
  template <class Scratch>
  void open(QueryChunk& chunk, int64_t begin, int64_t rows, int threads, Scratch scratch,
            const int64_t* order = nullptr) const {
    chunk.begin = begin;
    chunk.rows = rows;
    chunk.order = order;
    ScreenQueries& queries = chunk.queries[0];
    queries.reserve(screens_[0].kind(), rows, screens_[0].words());
    if (direct_) {
      for (int64_t i = 0; i < rows; ++i) queries.set_unknown(i);
      return;
    }
    chunk.tiles = std::make_unique<QueryChunk::Tile[]>(queries.tiles());
    parallel_for(queries.tiles(), rows * dim_ > (1 << 16) ? threads : 1,
                 [&](int64_t t, int slot) { encode_queries(0, chunk, t, scratch(slot)); });
  }
  // What does not depend on the screen: the squares of distances.
  const ScreenQueries& first(const QueryChunk& chunk) const { return chunk.queries[0]; }

  // ---- the gallery ----

  // Block b holds every blocks()-th panel: a sample of the gallery, whatever its order, so that after a few blocks a
  // threshold is as good as one from random rows.
  BlockRows block_rows(int64_t b) const {
    const int64_t panels = (rows_ + kPanelColumns - 1) / kPanelColumns;
    const int64_t own = (panels - b + blocks_ - 1) / blocks_;
    const bool last = b + (own - 1) * blocks_ == panels - 1;
    return {b * kPanelColumns, own * kPanelColumns - (last ? panels * kPanelColumns - rows_ : 0),
            blocks_ * kPanelColumns};
  }

  // Screens a block or a part of one. threshold(row) is the x that a query of the chunk looks for; on_hits(queries, row, index, columns,
  // hits, certain, values) is told which of the gallery rows from `index` on may reach it (bits), and which of those surely
  // exceed ceiling(row), where that is not null. Panels whose last row is below `from` are left out.
  template <class Threshold, class Ceiling, class OnHits>
  void visit(QueryChunk& chunk, const BlockRows& rows, EncodeScratch<S>& scratch, Threshold threshold, Ceiling ceiling,
             OnHits on_hits, int64_t from = 0) {
    if (rows.count == 0) return;
    if (direct_) return visit_all(chunk, rows, scratch, on_hits);
    for (std::vector<int64_t>& tiles : scratch.tiles) tiles.clear();
    for (int64_t t = 0; t < chunk.queries[0].tiles(); ++t) scratch.tiles[screen_of(chunk, t)].push_back(t);
    for (int which : {0, 1}) {
      if (scratch.tiles[which].empty()) continue;
      if (which == 1) prepare_second(chunk, scratch);
      screen_tiles(which, chunk, scratch.tiles[which], block_of(which, rows, scratch), from, threshold, ceiling,
                   on_hits);
    }
  }

  // Pairs of a query that may be left undecided before the screen counts as too coarse, besides a share of all: until
  // there is a threshold, all are.
  void allow(int64_t per_query) { allowed_ = per_query + 2 * threads_ * most_rows_; }

 private:
  static constexpr int64_t kUselessShare = 48;

  void prepare_stats_of(const BlockRows& rows, EncodeScratch<S>& scratch) {
    scratch.source.reserve(dim_);
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t i = rows.row(r);
      own_stats_[i] = bound_stats<M>(verifier_.gallery().read(i, scratch.source.get()), dim_);
    }
  }
  const Transform& transform() const { return encoded_ != nullptr ? encoded_->transform() : own_transform_; }
  RowStats* stats_of(int64_t begin) {
    return encoded_ != nullptr ? const_cast<RowStats*>(encoded_->stats()) + begin : own_stats_.get() + begin;
  }

  void encode_queries(int which, QueryChunk& chunk, int64_t t, EncodeScratch<S>& scratch) const {
    screens_[which].encode_queries([&](int64_t row) { return chunk.query(row); }, t, chunk.queries[which], scratch);
  }

  // The screen for a tile's next block.
  int screen_of(const QueryChunk& chunk, int64_t t) const {
    if (screens_.size() < 2) return 0;
    const int64_t undecided = chunk.tiles[t].undecided.load(std::memory_order_relaxed);
    const int64_t screened = chunk.tiles[t].screened.load(std::memory_order_relaxed);
    return undecided > allowed_ * chunk.queries[0].count(t) + screened / kUselessShare ? 1 : 0;
  }

  void prepare_second(QueryChunk& chunk, EncodeScratch<S>& scratch) const {
    std::call_once(chunk.second, [&] {
      ScreenQueries& queries = chunk.queries[1];
      queries.reserve(screens_[1].kind(), chunk.rows, screens_[1].words());
      for (int64_t t = 0; t < queries.tiles(); ++t) encode_queries(1, chunk, t, scratch);
    });
  }

  // Without a screen: nothing is known of any pair.
  template <class OnHits>
  void visit_all(QueryChunk& chunk, const BlockRows& rows, EncodeScratch<S>& scratch, OnHits& on_hits) {
    if (!stats_ready_) prepare_stats_of(rows, scratch);
    static constexpr float kNothing[kPanelColumns] = {};
    const ScreenColumns columns{kNothing, kNothing, kNothing, kNothing};
    for (int64_t row = 0; row < chunk.rows; ++row)
      for (int64_t j = 0; j < rows.count; j += kPanelColumns) {
        const int64_t width = std::min<int64_t>(kPanelColumns, rows.count - j);
        const uint32_t hits = width < 32 ? (1u << width) - 1 : ~0u;
        on_hits(chunk.queries[0], row, rows.row(j), columns, hits, 0u, kNothing);
      }
  }

  ScreenBlock block_of(int which, const BlockRows& rows, EncodeScratch<S>& scratch) {
    const Screening<M, S>& screening = screens_[which];
    const bool prepared = which == 0 && encoded_ != nullptr && encoded_->kind() == screening.kind() &&
                          screening.kind() != ScreenKind::kFloat32;
    return prepared ? encoded_->block(rows)
                    : screening.encode_block(rows, stats_of(rows.begin), !stats_ready_, scratch);
  }

  template <class Threshold, class Ceiling, class OnHits>
  void screen_tiles(int which, QueryChunk& chunk, const std::vector<int64_t>& tiles, const ScreenBlock& block,
                    int64_t from, Threshold& threshold, Ceiling& ceiling, OnHits& on_hits) const {
    constexpr bool classify = !std::is_same_v<Ceiling, std::nullptr_t>;
    const Screening<M, S>& screening = screens_[which];
    const ScreenQueries& queries = chunk.queries[which];
    for (int64_t t : tiles) {
      int64_t undecided = 0;
      const int64_t first = queries.first(t);
      const int rows = queries.count(t);
      ScreenTile tile;
      tile.height = queries.height(t);
      tile.words = queries.words;
      tile.queries = queries.tile(t);
      tile.start = queries.start.get() + first;
      float cut[kMaxTileRows], sure[kMaxTileRows], known[kMaxTileRows];
      for (int i = 0; i < kMaxTileRows; ++i) {
        known[i] = i < rows ? threshold(first + i) : kInfinity;
        cut[i] = i < rows ? queries.cut(first + i, known[i]) : kInfinity;
        if constexpr (classify) sure[i] = i < rows ? queries.sure(first + i, ceiling(first + i)) : kInfinity;
      }
      Screen screen;
      screen.cut = cut;
      screen.factor = queries.factor.get() + first;
      screen.loss_share = queries.loss_share.get() + first;
      screen.query_norm = queries.query_norm.get() + first;
      if (classify) {
        screen.sure = sure;
        screen.bias_error = queries.bias_error.get() + first;
      }
      for (int64_t p = 0; p < block.panel_count(); ++p) {
        const int64_t j = p * block.columns, at = block.at(p), index = block.row(j);
        if (index + block.columns <= from) continue;
        const ScreenColumns columns = block.kept.from(at);
        tile.panel = block.panels + at * block.words;
        tile.next = p + 1 < block.panel_count() ? block.panels + block.at(p + 1) * block.words : tile.panel;
        screen.scale = columns.scale;
        screen.bias = columns.bias;
        screen.norm = columns.norm;
        screen.loss = columns.loss;
        if (!screening.compare(tile, screen)) continue;
        const int width = static_cast<int>(std::min<int64_t>(block.columns, block.count - j));
        const uint32_t valid = width < 32 ? (1u << width) - 1 : ~0u;
        for (int i = 0; i < rows; ++i) {
          const uint32_t hits = screen.hits[i] & valid;
          if (hits == 0) continue;
          const uint32_t certain = classify ? screen.sure_hits[i] & hits : 0;
          undecided += count_bits(hits & ~certain);
          on_hits(queries, first + i, index, columns, hits, certain, screen.values[i]);
          const float raised = threshold(first + i);
          if (raised != known[i]) cut[i] = queries.cut(first + i, known[i] = raised);
        }
      }
      chunk.tiles[t].screened.fetch_add(rows * block.count, std::memory_order_relaxed);
      chunk.tiles[t].undecided.fetch_add(undecided, std::memory_order_relaxed);
    }
  }

  Verifier<M, S> verifier_;
  const EncodedGallery* encoded_;
  int64_t rows_, dim_;
  int threads_;
  bool direct_, stats_ready_;
  Transform own_transform_;
  Buffer<RowStats> own_stats_;
  std::vector<Screening<M, S>> screens_;
  int64_t most_rows_ = 0, blocks_ = 0, allowed_ = 0;
};

// One thread's way to verify the pairs of a tile of queries, which come in the order of the gallery.
template <class M, class S>
class TileVerifier {
 public:
  explicit TileVerifier(const Search<M, S>& search)
      : search_(search), scratch_(search.dim()), values_(kMaxTileRows * search.dim()) {
    for (int i = 0; i < kMaxTileRows; ++i) queries_[i].values = values_.get() + i * search.dim();
  }

  S* scratch() { return scratch_.get(); }
  // `row` in the chunk is query `query`.
  const LoadedQuery& load(int64_t row, int64_t query) {
    LoadedQuery& loaded = queries_[row % kMaxTileRows];
    search_.verifier().load(query, loaded, scratch_.get());
    return loaded;
  }
  double key(int64_t row, int64_t query, int64_t index) {
    return search_.verifier().key(load(row, query), index, search_.stats(index), scratch_.get());
  }

 private:
  const Search<M, S>& search_;
  Buffer<S> scratch_;
  Buffer<double> values_;
  LoadedQuery queries_[kMaxTileRows];
};

}  // namespace pycm::cpu
