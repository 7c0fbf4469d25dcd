// Rows of any dtype and stride as contiguous fp32 or fp64, their statistics, and their encoding for a tile product.
//
// Encoding turns every metric into a dot product (docs/exactness.md, section 2):
//   dot          q^ = q                   g^ = g                 score = q^.g^
//   cosine       q^ = q / |q|             g^ = g                 score = q^.g^ * (1 / |g|)
//   pearson      q^ = (q - m) / |q - m|   g^ = g - m             score = q^.g^ * (1 / |g - m|), m the row's own mean
//   distances    q^ = q - c               g^ = g - c             t = q^.g^ - |g^|^2 / 2, d^2 = |q^|^2 - 2 t
// with c a point near the gallery's mean: differences do not change, and far less cancels.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "core/array.h"
#include "core/metric.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace pycm::cpu {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The type in which the rows of a dtype are held exactly: fp32, or fp64 for fp64.
template <class F>
decltype(auto) visit_source(DType dtype, F&& f) {
  return dtype == DType::kFloat64 ? f(double{}) : f(float{});
}

template <class S>
double exact_sum(ExactSum sum, const double* q, const S* g, double shift, int64_t dim) {
  if constexpr (std::is_same_v<S, float>) return kernels().exact_f32[sum](q, g, shift, dim);
  else return kernels().exact_f64[sum](q, g, shift, dim);
}

template <class S>
class RowReader {
 public:
  RowReader() = default;
  explicit RowReader(const Rows& rows)
      : rows_(rows),
        direct_(rows.dim_stride == 1 && (rows.dtype == DType::kFloat32 || rows.dtype == DType::kFloat64)) {}

  const Rows& rows() const { return rows_; }

  // Row i, contiguous: in place where it lies so, else copied into `scratch` of `dim` elements.
  const S* read(int64_t i, S* scratch) const { return read(i, 1, scratch).first; }

  // The first of rows [i, i + count) and the stride to the next.
  std::pair<const S*, int64_t> read(int64_t i, int64_t count, S* scratch) const {
    if (direct_) return {static_cast<const S*>(rows_.row(i)), rows_.row_stride};
    for (int64_t r = 0; r < count; ++r) copy(rows_.row(i + r), scratch + r * rows_.dim);
    return {scratch, rows_.dim};
  }

 private:
  void copy(const void* row, S* out) const {
    const int64_t dim = rows_.dim, stride = rows_.dim_stride;
    if (rows_.dtype == DType::kFloat32 || rows_.dtype == DType::kFloat64) {
      for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<const S*>(row)[d * stride];
      return;
    }
    if constexpr (std::is_same_v<S, float>) {
      const bool half = rows_.dtype == DType::kFloat16;
      const uint16_t* bits = static_cast<const uint16_t*>(row);
      if (stride == 1) return (half ? kernels().widen_f16 : kernels().widen_bf16)(bits, dim, out);
      for (int64_t d = 0; d < dim; ++d)
        out[d] = half ? float16_to_float(bits[d * stride]) : bfloat16_to_float(bits[d * stride]);
    }
  }

  Rows rows_;
  bool direct_ = true;
};

// What a metric needs of a row besides its elements, in fp64 in the fixed order.
struct RowStats {
  double mean = 0;  // 0 unless the metric centres
  double norm = 0;  // of the centred row, exactly 0 for a constant one; unset where the score needs none
};

template <class M, class S>
RowStats row_stats(const S* row, int64_t dim) {
  RowStats stats;
  if constexpr (M::kCentre) {
    // The rounded mean of a constant row may miss it by an ulp; its norm must be 0 all the same.
    const S* end = row + dim;
    const bool constant = std::all_of(row, end, [first = row[0]](S value) { return value == first; });
    if (constant && std::isfinite(row[0])) return stats;
    stats.mean = exact_sum<S>(kSumElements, nullptr, row, 0, dim) / static_cast<double>(dim);
  }
  if constexpr (M::kNormalise) stats.norm = std::sqrt(exact_sum<S>(kSumShiftedSquare, nullptr, row, stats.mean, dim));
  return stats;
}

// The same, with the norm that a screen's bound needs for `dot`.
template <class M, class S>
RowStats bound_stats(const S* row, int64_t dim) {
  RowStats stats = row_stats<M>(row, dim);
  if constexpr (!M::kNormalise && !M::kDistance)
    stats.norm = std::sqrt(exact_sum<S>(kSumShiftedSquare, nullptr, row, 0, dim));
  return stats;
}

// out[d] = (in[d] - shift) * factor - centre[d] in fp64, rounded to T.
template <class S, class T>
void affine(const S* in, double shift, double factor, const double* centre, int64_t dim, T* out) {
  if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>) {
    kernels().affine_f32(in, shift, factor, centre, dim, out);
  } else {
    for (int64_t d = 0; d < dim; ++d) {
      double value = (static_cast<double>(in[d]) - shift) * factor;
      if (centre != nullptr) value -= centre[d];
      out[d] = static_cast<T>(value);
    }
  }
}

// The norm of a normalised row: 1, or 0 for a zero row. Where fp64 squares leave their range nothing is known, not even
// that the exact score is near: infinite, so that every pair of that row is verified.
inline double normalised_norm(double norm) {
  if (norm == 0) return 0;
  return norm > 1e-140 && norm < 1e140 ? 1 : std::numeric_limits<double>::infinity();
}

// Whether 1 / norm, and a product with a row of that norm, keep their precision in T. If not, and for NaN, the row itself
// is scaled; a zero row needs nothing.
template <class T>
bool representable(double norm) {
  constexpr double kTiny = std::is_same_v<T, float> ? 1e-28 : 1e-140, kHuge = std::is_same_v<T, float> ? 1e37 : 1e300;
  return norm == 0 || (norm > kTiny && norm < kHuge);
}

template <class T>
void pack(const T* rows, int64_t row_stride, int count, int64_t dim, int width, T* out) {
  if constexpr (std::is_same_v<T, float>) kernels().pack_f32(rows, row_stride, count, dim, width, out);
  else kernels().pack_f64(rows, row_stride, count, dim, width, out);
}

template <class T>
int tile_columns() {
  return std::is_same_v<T, float> ? kernels().columns_f32 : kernels().columns_f64;
}

// Rows that lie side by side, one column after another (a transposed matrix), are packed already but for their number.
template <class M, class S, class T>
bool side_by_side(const Rows& rows) {
  constexpr DType kDType = std::is_same_v<T, float> ? DType::kFloat32 : DType::kFloat64;
  return std::is_same_v<S, T> && !M::kCentre && !M::kNormalise && !M::kDistance && rows.dtype == kDType &&
         rows.row_stride == 1 && rows.dim_stride != 1;
}

template <class T>
void pack_side_by_side(const Rows& rows, int64_t begin, int count, int width, T* out) {
  const T* line = static_cast<const T*>(rows.data) + begin;
  for (int64_t d = 0; d < rows.dim; ++d, line += rows.dim_stride, out += width) {
    std::copy_n(line, count, out);
    std::fill(out + count, out + width, T(0));
  }
}

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// The point that distances are measured from: the mean of up to 256 rows spread over the gallery. Any point is right.
template <class S>
Buffer<double> distance_centre(const RowReader<S>& gallery) {
  const Rows& rows = gallery.rows();
  Buffer<double> centre(rows.dim);
  std::fill_n(centre.get(), rows.dim, 0.0);
  Buffer<S> scratch(rows.dim);
  const int64_t sample = std::min<int64_t>(rows.rows, 256);
  for (int64_t i = 0; i < sample; ++i) {
    const S* row = gallery.read(i * (rows.rows / sample), scratch.get());
    for (int64_t d = 0; d < rows.dim; ++d) centre[d] += static_cast<double>(row[d]) / static_cast<double>(sample);
  }
  for (int64_t d = 0; d < rows.dim; ++d)
    if (!std::isfinite(centre[d])) centre[d] = 0;
  return centre;
}

// Queries, encoded and packed in tiles [dim][height]; the last tile is as low as the remaining rows allow.
template <class T>
struct PackedQueries {
  int64_t rows = 0, dim = 0;
  Buffer<T> packed;
  Buffer<double> norm;  // of the encoded row, for distances

  void reserve(int64_t row_count, int64_t dimension) {
    rows = row_count;
    dim = dimension;
    packed.reserve(round_up(rows, kernels().height) * dim);
    norm.reserve(rows);
  }
  int64_t tiles() const { return (rows + kernels().height - 1) / kernels().height; }
  int64_t first(int64_t tile) const { return tile * kernels().height; }
  int count(int64_t tile) const { return static_cast<int>(std::min<int64_t>(kernels().height, rows - first(tile))); }
  int height(int64_t tile) const { return static_cast<int>(round_up(count(tile), kernels().height_step)); }
  const T* tile(int64_t t) const { return packed.get() + first(t) * dim; }
};

// Encodes rows [begin, begin + out.rows) of `queries`, tile t of them. `staging`: height x dim; `scratch`: dim.
template <class M, class S, class T>
void encode_queries(const RowReader<S>& queries, int64_t begin, const double* centre, int64_t t, PackedQueries<T>& out,
                    S* scratch, T* staging) {
  const int64_t dim = out.dim;
  if (side_by_side<M, S, T>(queries.rows()))
    return pack_side_by_side(queries.rows(), begin + out.first(t), out.count(t), out.height(t),
                             const_cast<T*>(out.tile(t)));
  for (int i = 0; i < out.count(t); ++i) {
    const int64_t r = out.first(t) + i;
    const S* row = queries.read(begin + r, scratch);
    const RowStats stats = row_stats<M>(row, dim);
    const double factor = !M::kNormalise ? 1 : stats.norm == 0 ? 0 : 1 / stats.norm;
    T* encoded = staging + i * dim;
    affine<S, T>(row, stats.mean, factor, M::kDistance ? centre : nullptr, dim, encoded);
    if (M::kDistance) out.norm[r] = std::sqrt(exact_sum<T>(kSumShiftedSquare, nullptr, encoded, 0, dim));
  }
  pack<T>(staging, dim, out.count(t), dim, out.height(t), const_cast<T*>(out.tile(t)));
}

// Gallery rows of a block: runs of kPanelColumns rows, `stride` rows from one to the next. Only the last may be short.
struct BlockRows {
  int64_t begin = 0, count = 0, stride = kPanelColumns;

  int64_t row(int64_t r) const { return begin + r / kPanelColumns * stride + r % kPanelColumns; }
  // The first so many runs, and the others.
  BlockRows head(int64_t runs) const { return {begin, std::min(count, runs * kPanelColumns), stride}; }
  BlockRows tail(int64_t runs) const {
    return {begin + runs * stride, std::max<int64_t>(0, count - runs * kPanelColumns), stride};
  }
};

// Rows of the gallery, encoded and packed in panels [dim][columns].
template <class T>
struct GalleryBlock : BlockRows {
  int64_t dim = 0;
  int columns = 0;
  Buffer<T> panels, scale, bias, square;
  Buffer<double> norm;  // of the encoded row after its scale

  void reserve(int64_t rows, int64_t dimension) {
    dim = dimension;
    columns = tile_columns<T>();
    const int64_t padded = round_up(rows, columns);
    panels.reserve(padded * dim);
    scale.reserve(padded);
    bias.reserve(padded);
    square.reserve(padded);
    norm.reserve(padded);
  }
  int64_t panel_count() const { return (count + columns - 1) / columns; }
  const T* panel(int64_t p) const { return panels.get() + p * columns * dim; }
};

// Rows a block should hold so that its panels stay in a core's second-level cache.
template <class T>
int64_t block_rows(int64_t dim) {
  constexpr int64_t kBytes = 384 << 10;
  const int64_t rows = kBytes / (dim * static_cast<int64_t>(sizeof(T)));
  return std::clamp<int64_t>(rows / kMaxTileColumns * kMaxTileColumns, kMaxTileColumns, 1024);
}

// Scratch one thread needs to encode panels.
template <class S, class T>
struct PanelScratch {
  Buffer<S> source;   // rows that could not be read in place
  Buffer<T> encoded;  // rows the metric changes
  void reserve(int64_t columns, int64_t dim) {
    source.reserve(columns * dim);
    encoded.reserve(columns * dim);
  }
};

// Encodes the rows of the block. stats[i] of gallery row block.begin + i is written first when `fresh`.
template <class M, bool kBound, class S, class T>
void encode_gallery(const RowReader<S>& gallery, const double* centre, RowStats* stats, bool fresh,
                    GalleryBlock<T>& block, PanelScratch<S, T>& scratch) {
  constexpr bool kChanged = M::kCentre || M::kDistance || !std::is_same_v<S, T>;
  const int64_t dim = block.dim;
  for (int64_t p = 0; p < block.panel_count(); ++p) {
    const int64_t first = p * block.columns;
    const int count = static_cast<int>(std::min<int64_t>(block.columns, block.count - first));
    RowStats* known = stats + (block.row(first) - block.begin);
    const bool packed = !kBound && side_by_side<M, S, T>(gallery.rows());
    const auto [rows, stride] =
        packed ? std::pair<const S*, int64_t>() : gallery.read(block.row(first), count, scratch.source.get());
    bool changed = kChanged;
    for (int j = 0; j < count; ++j) {
      const int64_t r = first + j;
      if (packed) known[j] = {};
      else if (fresh) known[j] = kBound ? bound_stats<M>(rows + j * stride, dim) : row_stats<M>(rows + j * stride, dim);
      block.norm[r] = M::kNormalise ? normalised_norm(known[j].norm) : known[j].norm;
      block.scale[r] = 1;
      block.bias[r] = 0;
      if constexpr (M::kNormalise) {
        block.scale[r] = known[j].norm == 0 ? T(0) : static_cast<T>(1 / known[j].norm);
        changed |= !representable<T>(known[j].norm);
      }
    }
    for (int64_t r = first + count; r < first + block.columns; ++r) {
      block.scale[r] = block.square[r] = 0;
      block.norm[r] = 0;
      block.bias[r] = -std::numeric_limits<T>::infinity();
    }
    T* panel = block.panels.get() + first * dim;
    if (packed) {
      pack_side_by_side(gallery.rows(), block.row(first), count, block.columns, panel);
      continue;
    }
    if constexpr (std::is_same_v<S, T>) {
      if (!changed) {
        pack<T>(rows, stride, count, dim, block.columns, panel);
        continue;
      }
    }
    for (int j = 0; j < count; ++j) {
      const int64_t r = first + j;
      T* encoded = scratch.encoded.get() + j * dim;
      double factor = 1;
      if (M::kNormalise && !representable<T>(known[j].norm)) {
        factor = 1 / known[j].norm;
        block.scale[r] = 1;
      }
      affine<S, T>(rows + j * stride, known[j].mean, factor, M::kDistance ? centre : nullptr, dim, encoded);
      if constexpr (M::kDistance) {
        const double square = exact_sum<T>(kSumShiftedSquare, nullptr, encoded, 0, dim);
        block.norm[r] = std::sqrt(square);
        block.square[r] = static_cast<T>(square);
        block.bias[r] = static_cast<T>(-0.5 * square);
      }
    }
    pack<T>(scratch.encoded.get(), dim, count, dim, block.columns, panel);
  }
}

}  // namespace pycm::cpu
