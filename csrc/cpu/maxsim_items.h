// Sets of vectors as late interaction multiplies them: those of x items packed side by side, those of a y item as rows.
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

// The vectors of some items, counted through.
struct ItemBorders {
  int64_t items = 0, vectors = 0, dim = 0;
  std::vector<int64_t> first;  // [items + 1]
  Buffer<double> norm;         // of each vector, where wanted

  void set_borders(const VectorSets& x) {
    items = x.items;
    dim = x.dim;
    first.assign(1, 0);
    for (int64_t i = 0; i < items; ++i) first.push_back(first.back() + x.length(i));
    vectors = first.back();
    norm.reserve(vectors);
  }

  // Vectors [begin, begin + count) to out, one after another: in T, normalised for cosine.
  template <class T>
  void read(const VectorSets& x, Metric metric, bool norms, int64_t begin, int64_t count, T* out) const {
    Buffer<T> source(dim);
    int64_t item = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t at = begin; at < begin + count; ++at, out += dim) {
      while (at >= first[item + 1]) ++item;
      const T* row = RowReader<T>(x.item(item)).read(at - first[item], source.get());
      if (norms || metric != Metric::kDot) norm[at] = row_norm(row, dim);
      if (metric == Metric::kDot) std::copy_n(row, dim, out);
      else affine<T, T>(row, 0, row_factor(metric, norm[at]), nullptr, dim, out);
    }
  }
};

template <class T>
void row_products(const RowTile<T>& tile) {
  if constexpr (std::is_same_v<T, float>) kernels().rows_f32(tile);
  else kernels().rows_f64(tile);
}

// The vectors of some items, packed side by side.
template <class T>
struct PackedItems : ItemBorders {
  int columns = 0;
  Buffer<T> panels;

  int64_t panel_count() const { return (vectors + columns - 1) / columns; }
  const T* panel(int64_t p) const { return panels.get() + p * columns * dim; }
  int used(int64_t p) const { return static_cast<int>(std::min<int64_t>(columns, vectors - p * columns)); }

  void pack_items(const VectorSets& x, Metric metric, bool norms, int threads) {
    set_borders(x);
    columns = tile_columns<T>();
    panels.reserve(round_up(vectors, columns) * dim);
    parallel_for(panel_count(), vectors * dim > (1 << 16) ? threads : 1, [&](int64_t p, int) {
      Buffer<T> rows(columns * dim);
      read(x, metric, norms, p * columns, used(p), rows.get());
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

}  // namespace pycm::cpu
