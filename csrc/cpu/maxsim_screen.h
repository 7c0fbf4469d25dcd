// Late interaction by products in bf16 that say which of an item's rows may be the nearest of a vector, and fp32 products
// of those: the fp32 maxima at twice the rate of an fp32 product (kernels_maxima.h).
//
//   x vectors   rows in fp32, and panels [word][32] of the same rounded to bf16
//   y item      runs of up to kRunRows rows: rounded, multiplied, shortlisted, verified; the next run is fetched meanwhile
//
// |screened - fp32 product| <= share * |y| + tail, so a row that is 2 (share * largest + tail) below the best of its run
// has not the largest fp32 product; docs/late-interaction.md derives it. What bf16 cannot hold has margin NaN or infinity:
// then every row is verified.
#pragma once

#include "cpu/maxsim_items.h"

namespace pycm::cpu {

// An item is screened by its own length, and the products of a pair are the same in any batch. Fewer rows are not worth
// it; the sums of longer vectors would err by more than those of the fp32 tile (ProductError).
constexpr int64_t kScreenRows = 8, kScreenMinDim = 32, kScreenMaxDim = 8192;

inline bool can_screen_maxima(int64_t dim) {
  return kernels().maxima_bf16 != nullptr && dim >= kScreenMinDim && dim <= kScreenMaxDim;
}

struct ScreenedItems : ItemBorders {
  Buffer<float> rows, share, tail;
  Buffer<uint32_t> panels;
  int64_t words = 0;
  bool exact = false;

  int64_t panel_count() const { return (vectors + kPanelColumns - 1) / kPanelColumns; }
  int used(int64_t p) const { return static_cast<int>(std::min<int64_t>(kPanelColumns, vectors - p * kPanelColumns)); }

  // `as_they_are`: both sides are bf16 and not normalised, so that nothing is rounded.
  void pack_items(const VectorSets& x, Metric metric, bool norms, bool as_they_are, int threads) {
    set_borders(x);
    exact = as_they_are;
    words = word_stride(dim);
    const int64_t padded = round_up(vectors, kPanelColumns);
    rows.reserve(vectors * dim);
    share.reserve(padded);
    tail.reserve(padded);
    panels.reserve(padded * words);
    parallel_for(panel_count(), vectors * dim > (1 << 16) ? threads : 1, [&](int64_t p, int) {
      Buffer<uint32_t> rounded(kPanelColumns * words);
      const int64_t begin = p * kPanelColumns;
      read(x, metric, norms, begin, used(p), rows.get() + begin * dim);
      for (int r = 0; r < used(p); ++r) {
        const float square = kernels().round_bf16(rows.get() + (begin + r) * dim, dim, rounded.get() + r * words);
        set_error(begin + r, length(square));
      }
      kernels().pack_panel(rounded.get(), words, used(p), words, panels.get() + begin * words);
    });
  }

  // Words a rounded row takes: whole vectors.
  static int64_t word_stride(int64_t dim) { return round_up(dim, 32) / 2; }

  // No less than the length of a row whose squares, scaled, have this sum: its rounding, and what vanished in squaring.
  double length(double square, double scale = 1) const {
    const double d = static_cast<double>(dim);
    return std::sqrt(square) * (1 + (d / 16 + 8) * 0x1p-24) + std::sqrt(d) * 0x1p-74 * scale;
  }

  // Margins of panel p against rows no longer than `largest` after scales up to `scale`.
  void margins(int64_t p, double largest, double scale, float* out) const {
    const float norm = largest < kLargest ? static_cast<float>(largest * (1 + 0x1p-20)) : kInfinity;
    const float factor = static_cast<float>(scale);
    for (int64_t c = p * kPanelColumns; c < p * kPanelColumns + used(p); ++c)
      *out++ = share[c] * norm + tail[c] * factor;
  }

 private:
  static constexpr double kLargest = 0x1p60;

  void set_error(int64_t at, double norm) {
    const double d = static_cast<double>(dim);
    // Rounding of both sides, of the sums in bf16 and in fp32, and of this.
    const double relative = (exact ? 0 : 0x1.01p-7) + 2 * (d + 2) * 0x1p-24 + (d / 64 + 16) * 0x1p-24;
    // Twice, for the best and for the other.
    share[at] =
        norm < kLargest ? static_cast<float>(2 * (relative * norm * 1.01 + std::sqrt(d) * 0x1p-125)) : kInfinity;
    tail[at] = static_cast<float>(2 * (std::sqrt(d) * norm + 4 * d) * 0x1p-125);
  }
};

// The largest fp32 products of one y item with all vectors of `x`, NaN where one is no finite number.
class ItemMaxima {
 public:
  // Whether the rows need no rounding and are words where they lie.
  static bool in_place(const ScreenedItems& x, const Rows& y) {
    return x.exact && y.dim_stride == 1 && y.dim % 2 == 0 && y.row_stride % 2 == 0;
  }

  // `item` is y as fp32 rows, or none where y is used in place; `next` is read after it.
  void run(const ScreenedItems& x, const Rows& y, const ItemRows<float>& item, const Rows& next, float* best) {
    if (x.vectors == 0) return;
    const int64_t runs = (y.rows + kRunRows - 1) / kRunRows, most = (y.rows + runs - 1) / runs;
    words_.reserve(most * x.words);
    values_.reserve(most * kPanelColumns);
    candidates_.reserve(most * kPanelColumns + 16);
    for (int64_t begin = 0; begin < y.rows; begin += most) {
      const int64_t left = std::max<int64_t>(0, y.rows - begin - most);
      MaximaTile tile;
      tile.count = std::min(most, y.rows - begin);
      tile.dim = x.dim;
      tile.word_count = (x.dim + 1) / 2;
      if (item.rows == nullptr) {
        tile.words = static_cast<const uint32_t*>(y.row(begin));
        tile.word_stride = y.row_stride / 2;
        measure(x, tile,
                [&](int64_t r) { return kernels().square_bf16(tile.words + r * tile.word_stride, tile.word_count); });
      } else {
        tile.rows = item.rows + begin * item.stride;
        tile.row_stride = item.stride;
        tile.scale = item.scale == nullptr ? nullptr : item.scale + begin;
        tile.words = words_.get();
        tile.word_stride = x.words;
        measure(x, tile, [&](int64_t r) {
          return kernels().round_bf16(tile.rows + r * tile.row_stride, tile.dim, words_.get() + r * x.words);
        });
      }
      if (left == 0) fetch(next, next.rows, tile);
      else fetch({y.row(begin + most), y.dtype, left, y.dim, y.row_stride, y.dim_stride}, most, tile);
      run_panels(x, tile, begin == 0, best);
    }
  }

 private:
  static constexpr int64_t kRunRows = 384;

  // The first rows, where they lie in one piece.
  static void fetch(const Rows& rows, int64_t count, MaximaTile& tile) {
    if (rows.row_stride != rows.dim || rows.dim_stride != 1) return;
    tile.ahead = static_cast<const char*>(rows.data);
    tile.ahead_bytes = std::min({count, rows.rows, kRunRows}) * rows.dim * item_size(rows.dtype);
  }

  // square_of(row): the sum of its squares.
  template <class Square>
  void measure(const ScreenedItems& x, const MaximaTile& tile, Square square_of) {
    double square = 0;
    scale_ = tile.scale == nullptr ? 1 : 0;
    bool known = true;
    for (int64_t r = 0; r < tile.count; ++r) {
      double found = square_of(r);
      if (tile.scale != nullptr) {
        const double scale = tile.scale[r];
        scale_ = std::max(scale_, scale);
        found *= scale * scale;
      }
      known &= found < kInfinity;
      square = std::max(square, found);
    }
    largest_ = known ? x.length(square, scale_) : kInfinity;
  }

  void run_panels(const ScreenedItems& x, MaximaTile& tile, bool first, float* best) {
    alignas(64) float margin[kPanelColumns], found[kPanelColumns];
    const int64_t panels = x.panel_count(), ahead = round_up((tile.ahead_bytes + panels - 1) / panels, 64);
    tile.ahead_bytes = ahead;
    tile.margin = margin;
    tile.best = found;
    tile.values = values_.get();
    tile.candidates = candidates_.get();
    for (int64_t p = 0; p < panels; ++p, best += kPanelColumns, tile.ahead += ahead) {
      tile.panel = x.panels.get() + p * kPanelColumns * x.words;
      tile.vectors = x.rows.get() + p * kPanelColumns * x.dim;
      tile.columns = x.used(p);
      x.margins(p, largest_, scale_, margin);
      kernels().maxima_bf16(tile);
      // Not std::max: a NaN stays.
      for (int c = 0; c < tile.columns; ++c)
        best[c] = first || !(found[c] <= best[c] || best[c] != best[c]) ? found[c] : best[c];
    }
  }

  Buffer<uint32_t> words_, candidates_;
  Buffer<float> values_;
  double largest_ = 0, scale_ = 1;
};

}  // namespace pycm::cpu
