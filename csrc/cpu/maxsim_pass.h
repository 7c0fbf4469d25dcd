// One direction of maxsim: the vectors of x items, packed once, against the vectors of y items where they lie.
//
//   chunk of x   its vectors side by side in panels [D][columns], a few hundred kilobytes, the cache's
//   block of y   items in turn; every panel meets an item's rows and leaves a maximum per vector      kernels_rows.h,
//                                                                                         or by screen: maxsim_screen.h
//   sums         of an x item's maxima, in fp64 in the fixed order                                     -> one score
//
// Work: 2 D flops for every pair of vectors. Memory: x once, y once per chunk of x, and the scores. Threads take blocks of y.
// Every product is the same sum wherever it falls, so that neither chunks, nor blocks, nor threads, nor an item's
// neighbours change a bit of its scores.
#pragma once

#include "cpu/maxsim_screen.h"

namespace pycm::cpu {

// Where a pass leaves its scores: that of x item i with y item j at out[i * x_stride + j * y_stride].
template <class O>
struct PassOutput {
  O* out = nullptr;
  int64_t x_stride = 0, y_stride = 0;
  bool add = false;  // to what is there
  // What a bound needs, where wanted: of each x item the sum of its norms, of each y item the largest.
  double* x_norms = nullptr;
  double* y_norms = nullptr;

  void write(int64_t i, int64_t j, double score) const {
    O& at = out[i * x_stride + j * y_stride];
    at = static_cast<O>(add ? static_cast<double>(at) + score : score);
  }
};

// out = sum or mean over the vectors of x of the maximum over the vectors of y. NaN where a similarity is no finite number
// in T: the caller's to evaluate otherwise.
template <class T, class O>
class Pass {
 public:
  Pass(const VectorSets& x, const VectorSets& y, Metric metric, Reduce reduce, int threads, const PassOutput<O>& output)
      : x_(x), y_(y), metric_(metric), reduce_(reduce), threads_(threads), output_(output) {}

  void run() {
    for (int64_t j = 0; j < y_.items; ++j) (is_screened(y_.length(j)) ? screened_ : tiled_) = true;
    const std::vector<int64_t> chunks = cut(x_, kChunkBytes, 1, kMaxVectors, x_.items);
    const std::vector<int64_t> blocks =
        cut(y_, screened_ ? kScreenBytes : kBlockBytes, 4 * threads_, screened_ ? y_.total : kMaxVectors, kBlockItems);
    const int64_t chunk_count = static_cast<int64_t>(chunks.size()) - 1;
    const int64_t block_count = static_cast<int64_t>(blocks.size()) - 1;
    std::vector<Scratch> slots(threads_);
    // Few blocks: whole chunks to a thread.
    const bool by_chunk = block_count < 2 * threads_ && chunk_count > 1;
    const auto work = [&](int64_t c, Packed& packed, int threads, auto&& scratch) {
      pack(packed, chunks[c], chunks[c + 1] - chunks[c], threads);
      parallel_for(block_count, threads,
                   [&](int64_t b, int slot) { meet(packed, chunks[c], blocks[b], blocks[b + 1], scratch(slot)); });
    };
    if (by_chunk) {
      parallel_for(chunk_count, threads_, [&](int64_t c, int slot) {
        work(c, slots[slot].packed, 1, [&](int) -> Scratch& { return slots[slot]; });
      });
    } else {
      for (int64_t c = 0; c < chunk_count; ++c)
        work(c, slots[0].packed, threads_, [&](int slot) -> Scratch& { return slots[slot]; });
    }
  }

 private:
  static constexpr int64_t kChunkBytes = 512 << 10, kBlockBytes = 96 << 10, kMaxVectors = 1024, kBlockItems = 32;
  // Items are screened one after another, each fetching the next.
  static constexpr int64_t kScreenBytes = 1 << 20;

  // A chunk of x.
  struct Packed {
    PackedItems<T> tiled;
    ScreenedItems screened;
    const ItemBorders* borders = nullptr;
  };
  struct Scratch {
    Packed packed;
    ItemMaxima maxima;
    std::vector<ItemRows<T>> items;
    std::vector<Buffer<T>> sources, scales;
    Buffer<T> best;
  };

  bool is_screened(int64_t length) const {
    return std::is_same_v<T, float> && length >= kScreenRows && can_screen_maxima(x_.dim);
  }

  void pack(Packed& packed, int64_t begin, int64_t count, int threads) const {
    const VectorSets part = slice(x_, begin, count);
    const bool norms = output_.x_norms != nullptr;
    if (screened_) {
      const bool exact = metric_ == Metric::kDot && x_.dtype == DType::kBFloat16 && y_.dtype == DType::kBFloat16;
      packed.screened.pack_items(part, metric_, norms, exact, threads);
      packed.borders = &packed.screened;
    }
    if (tiled_ || !screened_) {
      packed.tiled.pack_items(part, metric_, norms, threads);
      packed.borders = &packed.tiled;
    }
    if (norms) collect_norms(*packed.borders, begin);
  }

  // Borders of runs of items whose vectors take up to so much, `least` runs at least, of at least one item each.
  static std::vector<int64_t> cut(const VectorSets& sets, int64_t bytes, int64_t least, int64_t vectors,
                                  int64_t items) {
    const int64_t limit = std::min(vectors, bytes / (sets.dim * static_cast<int64_t>(sizeof(T))));
    items = std::max<int64_t>(1, std::min(items, sets.items / least));
    std::vector<int64_t> borders{0};
    int64_t used = 0;
    for (int64_t i = 0; i < sets.items; ++i) {
      const int64_t length = sets.length(i);
      if (i > borders.back() && (used + length > limit || i - borders.back() == items)) {
        borders.push_back(i);
        used = 0;
      }
      used += length;
    }
    if (sets.items > 0) borders.push_back(sets.items);
    return borders;
  }

  void collect_norms(const ItemBorders& packed, int64_t begin) const {
    for (int64_t i = 0; i < packed.items; ++i) {
      double sum = 0;
      for (int64_t t = packed.first[i]; t < packed.first[i + 1]; ++t)
        sum += metric_ == Metric::kDot ? packed.norm[t] : 1;
      output_.x_norms[begin + i] = sum;
    }
  }

  // y items [first, last) with all of a chunk.
  void meet(const Packed& packed, int64_t begin, int64_t first, int64_t last, Scratch& scratch) const {
    const ItemBorders& x = *packed.borders;
    const int64_t count = last - first, width = round_up(x.vectors, kMaxTileColumns);
    scratch.items.resize(count);
    scratch.sources.resize(std::max<size_t>(scratch.sources.size(), count + 1));
    scratch.scales.resize(scratch.sources.size());
    scratch.best.reserve(count * width);
    const bool norms = output_.y_norms != nullptr && begin == 0;
    for (int64_t b = 0; b < count; ++b) {
      const bool screened = is_screened(y_.length(first + b));
      const int64_t at = screened ? count : b;  // those of the tiles are needed together
      ItemRows<T>& item = scratch.items[b];
      const Rows rows = y_.item(first + b);
      if (screened && !norms && ItemMaxima::in_place(packed.screened, rows)) item = {nullptr, 0, rows.rows};
      else item.read(rows, metric_, norms, scratch.sources[at], scratch.scales[at]);
      if (norms) output_.y_norms[first + b] = metric_ == Metric::kDot ? item.largest : 1;
      if constexpr (std::is_same_v<T, float>) {
        const Rows next = b + 1 < count ? y_.item(first + b + 1) : Rows{};
        if (screened) scratch.maxima.run(packed.screened, rows, item, next, scratch.best.get() + b * width);
      }
    }
    for (int64_t p = 0; tiled_ && p < packed.tiled.panel_count(); ++p)
      for (int64_t b = 0; b < count; ++b) {
        if (scratch.items[b].count == 0 || is_screened(scratch.items[b].count)) continue;
        RowTile<T> tile = row_tile(packed.tiled, p, scratch.items[b]);
        tile.best = scratch.best.get() + b * width + p * packed.tiled.columns;
        row_products(tile);
      }
    for (int64_t b = 0; b < count; ++b)
      for (int64_t i = 0; i < x.items; ++i) {
        const int64_t vectors = x.first[i + 1] - x.first[i];
        double score = 0;
        if (vectors > 0 && scratch.items[b].count > 0) {
          score = exact_sum<T>(kSumElements, nullptr, scratch.best.get() + b * width + x.first[i], 0, vectors);
          if (reduce_ == Reduce::kMean) score /= static_cast<double>(vectors);
        }
        output_.write(begin + i, first + b, score);
      }
  }

  const VectorSets x_, y_;
  Metric metric_;
  Reduce reduce_;
  int threads_;
  PassOutput<O> output_;
  bool screened_ = false, tiled_ = false;  // whether any item is
};

// All of maxsim but the pairs that need another evaluation, which are NaN: scores of N items with M at out[i * M + j].
template <class T, class O>
void run_passes(const MaxSimArgs& args, int threads, O* out, double* const (&norms)[4]) {
  const int64_t gallery = args.gallery.items;
  if (args.direction != Direction::kI2T)
    Pass<T, O>(args.queries, args.gallery, args.metric, args.reduce, threads,
               {out, gallery, 1, false, norms[0], norms[1]})
        .run();
  if (args.direction != Direction::kT2I)
    Pass<T, O>(args.gallery, args.queries, args.metric, args.reduce, threads,
               {out, 1, gallery, args.direction == Direction::kBoth, norms[2], norms[3]})
        .run();
}

inline int maxsim_threads(const MaxSimArgs& args) {
  double queries = 0, gallery = 0;
  for (int64_t i = 0; i < args.queries.items; ++i) queries += static_cast<double>(args.queries.length(i));
  for (int64_t j = 0; j < args.gallery.items; ++j) gallery += static_cast<double>(args.gallery.length(j));
  return threads_for(queries * gallery * static_cast<double>(args.queries.dim), 2.5e5, args.num_threads);
}

}  // namespace pycm::cpu
