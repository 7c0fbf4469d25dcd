// One direction of maxsim: the vectors of x items, packed once, against the vectors of y items where they lie.
//
//   chunk of x   its vectors side by side in panels [D][columns], a few hundred kilobytes, the cache's
//   block of y   items in turn; every panel meets an item's rows and leaves a maximum per vector      kernels_rows.h
//   sums         of an x item's maxima, in fp64 in the fixed order                                     -> one score
//
// Work: 2 D flops for every pair of vectors. Memory: x once, y once per chunk of x, and the scores. Threads take blocks of y.
// Every product is the same sum wherever it falls, so that neither chunks, nor blocks, nor threads, nor an item's
// neighbours change a bit of its scores.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/rows.h"
#include "ops/maxsim.h"

namespace pycm::cpu {

// Items [begin, begin + count).
inline VectorSets slice(const VectorSets& sets, int64_t begin, int64_t count) {
  VectorSets part = sets;
  part.items = count;
  if (sets.ragged()) part.offsets += begin;
  else part.data = static_cast<const char*>(sets.data) + begin * sets.item_stride * item_size(sets.dtype);
  if (sets.lengths != nullptr) part.lengths += begin;
  return part;
}

// The factor by which a row is read: 1, or what normalises it. NaN, hence a NaN score, where fp64 squares leave their range.
inline double row_factor(Metric metric, double norm) {
  if (metric == Metric::kDot) return 1;
  if (!std::isfinite(normalised_norm(norm))) return std::numeric_limits<double>::quiet_NaN();
  return norm == 0 ? 0 : 1 / norm;
}
template <class T>
double row_norm(const T* row, int64_t dim) {
  return std::sqrt(exact_sum<T>(kSumShiftedSquare, nullptr, row, 0, dim));
}

template <class T>
void row_products(const RowTile<T>& tile) {
  if constexpr (std::is_same_v<T, float>) kernels().rows_f32(tile);
  else kernels().rows_f64(tile);
}

// The vectors of some items, packed side by side.
template <class T>
struct PackedItems {
  int64_t items = 0, vectors = 0, dim = 0;
  int columns = 0;
  std::vector<int64_t> first;  // [items + 1]
  Buffer<T> panels;
  Buffer<double> norm;  // of each vector, where wanted

  int64_t panel_count() const { return (vectors + columns - 1) / columns; }
  const T* panel(int64_t p) const { return panels.get() + p * columns * dim; }
  int used(int64_t p) const { return static_cast<int>(std::min<int64_t>(columns, vectors - p * columns)); }

  void pack_items(const VectorSets& x, Metric metric, bool norms, int threads) {
    items = x.items;
    dim = x.dim;
    columns = tile_columns<T>();
    first.assign(1, 0);
    for (int64_t i = 0; i < items; ++i) first.push_back(first.back() + x.length(i));
    vectors = first.back();
    panels.reserve(round_up(vectors, columns) * dim);
    norm.reserve(vectors);
    parallel_for(panel_count(), vectors * dim > (1 << 16) ? threads : 1, [&](int64_t p, int) {
      Buffer<T> rows(columns * dim), source(dim);
      int64_t item = std::upper_bound(first.begin(), first.end(), p * columns) - first.begin() - 1;
      for (int r = 0; r < used(p); ++r) {
        const int64_t at = p * columns + r;
        while (at >= first[item + 1]) ++item;
        const T* row = RowReader<T>(x.item(item)).read(at - first[item], source.get());
        T* out = rows.get() + r * dim;
        if (norms || metric != Metric::kDot) norm[at] = row_norm(row, dim);
        if (metric == Metric::kDot) std::copy_n(row, dim, out);
        else affine<T, T>(row, 0, row_factor(metric, norm[at]), nullptr, dim, out);
      }
      pack<T>(rows.get(), dim, used(p), dim, columns, panels.get() + p * columns * dim);
    });
  }
};

// The vectors of one item as contiguous rows, in place where they lie so, and their scales (null for 1).
template <class T>
struct ItemRows {
  const T* rows = nullptr;
  int64_t stride = 0, count = 0;
  const T* scale = nullptr;
  double largest = 0;  // of the norms

  // `norms`: whether `largest` is wanted of rows that are not normalised.
  void read(const Rows& item, Metric metric, bool norms, Buffer<T>& source, Buffer<T>& scales) {
    count = item.rows;
    source.reserve(count * item.dim);
    std::tie(rows, stride) = RowReader<T>(item).read(0, count, source.get());
    scale = nullptr;
    largest = 0;
    if (metric == Metric::kDot && !norms) return;
    scales.reserve(count);
    bool copy = false;
    for (int64_t r = 0; r < count; ++r) {
      const double norm = row_norm(rows + r * stride, item.dim);
      scales[r] = static_cast<T>(row_factor(metric, norm));
      largest = std::max(largest, norm);
      copy |= metric != Metric::kDot && !representable<T>(norm);
    }
    if (metric == Metric::kDot) return;
    scale = scales.get();
    if (copy) normalise(item.dim, source);
  }

 private:
  // Where a row's scale would lose its precision all are scaled themselves.
  void normalise(int64_t dim, Buffer<T>& source) {
    Buffer<T> scaled(count * dim);
    for (int64_t r = 0; r < count; ++r) {
      const T* row = rows + r * stride;
      affine<T, T>(row, 0, row_factor(Metric::kCosine, row_norm(row, dim)), nullptr, dim, scaled.get() + r * dim);
    }
    source = std::move(scaled);
    rows = source.get();
    stride = dim;
    scale = nullptr;
  }
};

// An item against panel p; what is kept of the products is left to say.
template <class T>
RowTile<T> row_tile(const PackedItems<T>& packed, int64_t p, const ItemRows<T>& item) {
  RowTile<T> tile;
  tile.rows = item.rows;
  tile.row_stride = item.stride;
  tile.count = item.count;
  tile.dim = packed.dim;
  tile.scale = item.scale;
  tile.panel = packed.panel(p);
  tile.columns = packed.used(p);
  return tile;
}

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
    const std::vector<int64_t> chunks = cut(x_, kChunkBytes, 1, kMaxVectors, x_.items);
    const std::vector<int64_t> blocks = cut(y_, kBlockBytes, 4 * threads_, kMaxVectors, kBlockItems);
    const int64_t chunk_count = static_cast<int64_t>(chunks.size()) - 1;
    const int64_t block_count = static_cast<int64_t>(blocks.size()) - 1;
    std::vector<Scratch> slots(threads_);
    // Few blocks: whole chunks to a thread.
    const bool by_chunk = block_count < 2 * threads_ && chunk_count > 1;
    const auto work = [&](int64_t c, PackedItems<T>& packed, int threads, auto&& scratch) {
      packed.pack_items(slice(x_, chunks[c], chunks[c + 1] - chunks[c]), metric_, output_.x_norms != nullptr, threads);
      collect_norms(packed, chunks[c]);
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

  struct Scratch {
    PackedItems<T> packed;
    std::vector<ItemRows<T>> items;
    std::vector<Buffer<T>> sources, scales;
    Buffer<T> best;
  };

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

  void collect_norms(const PackedItems<T>& packed, int64_t begin) const {
    if (output_.x_norms == nullptr) return;
    for (int64_t i = 0; i < packed.items; ++i) {
      double sum = 0;
      for (int64_t t = packed.first[i]; t < packed.first[i + 1]; ++t)
        sum += metric_ == Metric::kDot ? packed.norm[t] : 1;
      output_.x_norms[begin + i] = sum;
    }
  }

  // y items [first, last) with all of a chunk.
  void meet(const PackedItems<T>& packed, int64_t begin, int64_t first, int64_t last, Scratch& scratch) const {
    const int64_t count = last - first, width = packed.panel_count() * packed.columns;
    scratch.items.resize(count);
    scratch.sources.resize(std::max<size_t>(scratch.sources.size(), count));
    scratch.scales.resize(scratch.sources.size());
    scratch.best.reserve(count * width);
    const bool norms = output_.y_norms != nullptr && begin == 0;
    for (int64_t b = 0; b < count; ++b) {
      ItemRows<T>& item = scratch.items[b];
      item.read(y_.item(first + b), metric_, norms, scratch.sources[b], scratch.scales[b]);
      if (norms) output_.y_norms[first + b] = metric_ == Metric::kDot ? item.largest : 1;
    }
    for (int64_t p = 0; p < packed.panel_count(); ++p)
      for (int64_t b = 0; b < count; ++b) {
        if (scratch.items[b].count == 0) continue;
        RowTile<T> tile = row_tile(packed, p, scratch.items[b]);
        tile.best = scratch.best.get() + b * width + p * packed.columns;
        row_products(tile);
      }
    for (int64_t b = 0; b < count; ++b)
      for (int64_t i = 0; i < packed.items; ++i) {
        const int64_t vectors = packed.first[i + 1] - packed.first[i];
        double score = 0;
        if (vectors > 0 && scratch.items[b].count > 0) {
          score = exact_sum<T>(kSumElements, nullptr, scratch.best.get() + b * width + packed.first[i], 0, vectors);
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
