// Rows made ready for a screen: queries in tiles, gallery rows in panels, each with what the bound needs (screen.h).
#pragma once

#include <type_traits>

#include "cpu/screen.h"
#include "cpu/transform.h"

namespace pycm::cpu {

// Rows longer than this may overflow a partial sum in fp32, after which a value says nothing. Rows of norm 1 and their
// scales never do. Low precision keeps further from the edge.
constexpr double kMaxNorm = 0x1p62, kMaxWordNorm = 0x1p30;
// Below this the largest element of a query is 0 for a screen of low precision.
constexpr double kTinyElement = 0x1p-40;
// Sums of products of int8 (255 * 127 at most) stay in 32 bits up to this dimension; roundings of bf16 sums stay few.
constexpr int64_t kMaxInt8Dim = 66000, kMaxBf16Dim = int64_t{1} << 18;

inline bool can_screen(ScreenKind kind, int64_t dim) {
  const int64_t padded = round_up(dim, 32);
  return kind == ScreenKind::kFloat32 || padded <= (kind == ScreenKind::kInt8 ? kMaxInt8Dim : kMaxBf16Dim);
}

// What one thread needs to encode rows.
template <class S>
struct EncodeScratch {
  Buffer<S> source;
  Buffer<float> row;
  Buffer<uint32_t> staging;
  Buffer<double> centred;
  PanelScratch<S, float> panel;
  GalleryBlock<float> fp32;
  // A block of low precision.
  Buffer<uint32_t> panels;
  Buffer<float> columns;
  std::vector<int64_t> tiles[2];  // of queries: those of each screen
};

template <class M, class S>
class Screening {
 public:
  // `transform` outlives this. Without `exact` the values stand for themselves: all errors are 0.
  Screening(ScreenKind kind, const RowReader<S>& queries, const RowReader<S>& gallery, const Transform& transform,
            bool exact)
      : kind_(kind),
        queries_(queries),
        gallery_(gallery),
        transform_(transform),
        exact_(exact),
        dim_(gallery.rows().dim),
        padded_(kind == ScreenKind::kFloat32 ? dim_ : std::max(dim_, transform.dim)),
        words_((padded_ + of_word(kind) - 1) / of_word(kind)),
        columns_(kind == ScreenKind::kFloat32 ? kernels().columns_f32 : kPanelColumns) {}

  ScreenKind kind() const { return kind_; }
  int64_t words() const { return words_; }

  // Rows whose panels stay in a core's second-level cache, a multiple of kPanelColumns.
  int64_t block_rows() const { return cpu::block_rows<float>(words_); }

  bool compare(const ScreenTile& tile, Screen& screen) const {
    return kernels().screen[static_cast<int>(kind_)](tile, screen);
  }

  // ---- queries ----

  // Encodes tile t of rows [begin, begin + out.rows); out has been reserved.
  template <class QueryOf>
  void encode_queries(QueryOf query_of, int64_t t, ScreenQueries& out, EncodeScratch<S>& scratch) const {
    reserve(scratch);
    for (int i = 0; i < out.count(t); ++i) {
      const int64_t r = out.first(t) + i;
      const S* row = queries_.read(query_of(r), scratch.source.get());
      uint32_t* encoded = scratch.staging.get() + i * words_;
      if (kind_ == ScreenKind::kFloat32) encode_query_fp32(row, r, out, reinterpret_cast<float*>(encoded));
      else encode_query(row, r, out, encoded, scratch);
    }
    kernels().pack_queries[static_cast<int>(kind_)](scratch.staging.get(), words_, out.count(t), words_, out.height(t),
                                                    out.tile(t));
  }

  // ---- gallery ----

  // Encodes rows of the gallery into the scratch. stats[i] of row rows.begin + i is written first when `fresh`.
  ScreenBlock encode_block(const BlockRows& rows, RowStats* stats, bool fresh, EncodeScratch<S>& scratch) const {
    reserve(scratch);
    const int64_t padded = round_up(rows.count, columns_);
    scratch.columns.reserve(kColumnArrays * padded);
    ScreenBlock block;
    static_cast<BlockRows&>(block) = rows;
    block.words = words_;
    block.columns = columns_;
    if (kind_ == ScreenKind::kFloat32) {
      scratch.panel.reserve(kMaxTileColumns, dim_);
      GalleryBlock<float>& fp32 = scratch.fp32;
      fp32.reserve(padded, dim_);
      static_cast<BlockRows&>(fp32) = rows;
      encode_gallery<M, true, S, float>(gallery_, transform_.centre.get(), stats, fresh, fp32, scratch.panel);
      block.panels = reinterpret_cast<const uint32_t*>(fp32.panels.get());
      block.kept = {fp32.scale.get(), fp32.bias.get(), scratch.columns.get(), scratch.columns.get() + padded};
      bound_fp32(fp32, padded, scratch.columns.get(), scratch.columns.get() + padded);
      return block;
    }
    scratch.panels.reserve(padded * words_);
    const ColumnWriter columns(scratch.columns.get(), padded);
    encode_panels(rows, stats, fresh, scratch.panels.get(), columns, scratch);
    block.panels = scratch.panels.get();
    block.kept = columns.columns();
    return block;
  }

  // The same in low precision into memory of the caller's: whole panels side by side, the last one filled up.
  void encode_panels(const BlockRows& rows, RowStats* stats, bool fresh, uint32_t* panels, const ColumnWriter& columns,
                     EncodeScratch<S>& scratch) const {
    reserve(scratch);
    for (int64_t first = 0; first < rows.count; first += kPanelColumns) {
      const int used = static_cast<int>(std::min<int64_t>(kPanelColumns, rows.count - first));
      const int64_t begin = rows.row(first);
      RowStats* known = stats + (begin - rows.begin);
      for (int j = 0; j < used; ++j) {
        const S* row = gallery_.read(begin + j, scratch.source.get());
        if (fresh) known[j] = bound_stats<M>(row, dim_);
        encode_gallery_row(row, known[j], scratch.staging.get() + j * words_, columns, first + j, scratch);
      }
      for (int j = used; j < kPanelColumns; ++j) columns.set_padding(first + j);
      kernels().pack_panel(scratch.staging.get(), words_, used, words_, panels + first * words_);
    }
  }

  // How much of a row's length encoding it loses, over rows spread over the gallery.
  double mean_loss(EncodeScratch<S>& scratch) const {
    reserve(scratch);
    constexpr int64_t kRows = 64;
    const int64_t rows = gallery_.rows().rows, sample = std::min(rows, kRows);
    float column[kColumnArrays];
    const ColumnWriter writer(column, 1);
    double total = 0;
    int64_t used = 0;
    for (int64_t i = 0; i < sample; ++i) {
      const S* row = gallery_.read(i * (rows / sample), scratch.source.get());
      encode_gallery_row(row, row_stats<M>(row, dim_), scratch.staging.get(), writer, 0, scratch);
      if (!(column[2] > 0) || !std::isfinite(column[3])) continue;
      total += static_cast<double>(column[3]) / static_cast<double>(column[2]);
      ++used;
    }
    return used == 0 ? 0 : total / static_cast<double>(used);
  }

 private:
  void reserve(EncodeScratch<S>& scratch) const {
    scratch.source.reserve(dim_);
    scratch.row.reserve(padded_);
    scratch.staging.reserve(kPanelColumns * words_);
    scratch.centred.reserve(dim_);
  }

  // Of fp64 sums over a row, relative to lengths; four times what one of them may be off.
  double fp64_error() const { return 4 * (static_cast<double>(dim_) / 32 + 16) * 0x1p-53; }

  // ---- fp32 ----

  void encode_query_fp32(const S* row, int64_t r, ScreenQueries& out, float* encoded) const {
    const RowStats stats = bound_stats<M>(row, dim_);
    const double factor = !M::kNormalise ? 1 : stats.norm == 0 ? 0 : 1 / stats.norm;
    affine<S, float>(row, stats.mean, factor, M::kDistance ? transform_.centre.get() : nullptr, dim_, encoded);
    const double norm = M::kDistance    ? std::sqrt(exact_sum<float>(kSumShiftedSquare, nullptr, encoded, 0, dim_))
                        : M::kNormalise ? normalised_norm(stats.norm)
                                        : stats.norm;
    const double square_error = M::kDistance ? PYCM_BOUND_SCALE * 8 * kUnit : 0;
    const double root = std::sqrt(static_cast<double>(dim_));
    out.start[r] = 0;
    out.unit[r] = 1;
    out.offset[r] = 0;
    out.factor[r] = 1;
    out.bias_error[r] = 0;
    out.square[r] = norm * norm;
    out.loss_share[r] = 1;
    out.query_norm[r] = exact_ ? bound_up(slack_norm(norm)) : 0;
    out.row_error[r] = exact_ ? square_error * norm * norm + 0x1p-148 * root * norm : 0;
  }

  void bound_fp32(const GalleryBlock<float>& block, int64_t padded, float* norm_out, float* loss_out) const {
    const double roundings = static_cast<double>(std::min(dim_, kDepth) + (dim_ + kDepth - 1) / kDepth);
    // gamma_n for the sum; 16 more roundings cover encoding, scale, bias, the score's own rounding, and the arithmetic
    // of thresholds and comparisons.
    double relative = PYCM_BOUND_SCALE * (roundings * kUnit / (1 - roundings * kUnit) + 16 * kUnit);
    if (roundings * kUnit >= 0.5) relative = std::numeric_limits<double>::infinity();
    const double square = PYCM_BOUND_SCALE * (M::kDistance ? 8 * kUnit : 0);
    const double absolute = PYCM_BOUND_SCALE * 4 * static_cast<double>(dim_ + 4) * 0x1p-149;
    const double root = std::sqrt(static_cast<double>(dim_));
    for (int64_t j = 0; j < padded; ++j) {
      const bool used = exact_ && j < block.count;
      const double norm = used ? slack_norm(block.norm[j]) : 0;
      // A normalised row has norm 1 after its scale, which magnifies what underflowed before it.
      const double scale = std::max(1.0, std::fabs(static_cast<double>(block.scale[j])));
      loss_out[j] = used ? bound_up(relative * norm) : 0;
      norm_out[j] =
          used ? bound_up(square * norm * norm + (absolute + 0x1p-148 * root) * scale + 0x1p-148 * root * norm) : 0;
    }
  }

  static double slack_norm(double norm) { return norm > kMaxNorm ? std::numeric_limits<double>::infinity() : norm; }
  // A little more, which covers that the norms in it are those of rows before their encoding.
  static float bound_up(double value) { return upward(value * (1 + 0x1p-22)); }

  // ---- low precision ----

  Encoding encode(const float* row, int shift, uint32_t* out) const {
    return (kind_ == ScreenKind::kInt8 ? kernels().encode_i8 : kernels().encode_bf16)(row, padded_, shift, out);
  }

  // The lengths of what encode() was given and of what it lost, rounded up.
  struct Lengths {
    double norm, loss;
  };
  Lengths lengths(const Encoding& encoding) const {
    const double up = 1 + static_cast<double>(padded_ + 16) * 0x1p-23;
    // Squares below the smallest fp32 subnormal vanish, as do elements on their way to fp32.
    const double tiny = std::sqrt(static_cast<double>(padded_)) * (0x1p-70 * encoding.largest + 0x1p-74);
    return {std::sqrt(encoding.norm_square * up) + tiny, std::sqrt(encoding.loss_square * up) + tiny};
  }
  // Roundings, relative to the lengths of both encoded rows: of the element, of the rotation, in measuring the loss, of
  // scale and value and the comparison; and of the sum, which is exact for int8.
  double relative() const {
    const double sum = kind_ == ScreenKind::kBFloat16 ? 2 * static_cast<double>(padded_ + 2) : 0;
    return (16 + transform_.stages() + sum) * kUnit;
  }

  // A row as the screen sees it, in fp32, turned and filled up.
  const float* turn(float* row) const {
    std::fill(row + dim_, row + padded_, 0.0f);
    if (transform_.block != 0) kernels().rotate(row, transform_.signs.get(), padded_, transform_.block);
    return row;
  }

  void encode_gallery_row(const S* row, const RowStats& stats, uint32_t* encoded, const ColumnWriter& out, int64_t j,
                          EncodeScratch<S>& scratch) const {
    constexpr bool kScaled = !M::kCentre && !M::kDistance && std::is_same_v<S, float>;
    const double* centre = transform_.centre.get();
    const double factor = !M::kNormalise ? 1 : stats.norm == 0 ? 0 : 1 / stats.norm;
    // Without a centre the scale alone normalises a row.
    const bool scaled = kScaled && centre == nullptr;
    float* y = scratch.row.get();
    const float* seen = y;
    double bias = 0;
    if (scaled && transform_.block == 0 && padded_ == dim_) {
      if constexpr (kScaled) seen = row;
    } else {
      affine<S, float>(row, scaled ? 0 : stats.mean, scaled ? 1 : factor, centre, dim_, y);
      if (M::kDistance) bias = -0.5 * exact_sum<float>(kSumShiftedSquare, nullptr, y, 0, dim_);
      else if (centre != nullptr) bias = exact_sum<float>(kSumProduct, centre, y, 0, dim_);
      turn(y);
    }
    const Encoding encoding = encode(seen, kind_ == ScreenKind::kInt8 ? 128 : 0, encoded);
    const double after = scaled ? factor : 1;
    const Lengths length = lengths(encoding);
    const bool known = !(M::kNormalise && !std::isfinite(normalised_norm(stats.norm))) &&
                       (M::kNormalise || length.norm <= kMaxWordNorm * std::sqrt(transform_.gain())) &&
                       (encoding.scale != 0 || encoding.largest == 0);
    if (!known) {
      out.set_unknown(j);
      return;
    }
    out.scale[j] = static_cast<float>(encoding.scale * after);
    // Raised by its own error: see bias_error.
    out.bias[j] = static_cast<float>(M::kDistance ? bias * (1 - 16 * kUnit * PYCM_BOUND_SCALE) : bias);
    out.norm[j] = upward(length.norm * after);
    out.loss[j] = upward(PYCM_BOUND_SCALE * (length.loss + relative() * (length.norm + length.loss)) * after);
  }

  void encode_query(const S* row, int64_t r, ScreenQueries& out, uint32_t* encoded, EncodeScratch<S>& scratch) const {
    const RowStats stats = bound_stats<M>(row, dim_);
    const double* centre = transform_.centre.get();
    const double factor = !M::kNormalise ? 1 : stats.norm == 0 ? 0 : 1 / stats.norm;
    double alpha = 0, offset = 0;
    float* y = scratch.row.get();
    if (!M::kDistance && centre != nullptr) {
      // q = alpha c + q', and q.c goes to the offset.
      double* q = scratch.centred.get();
      for (int64_t d = 0; d < dim_; ++d) q[d] = (static_cast<double>(row[d]) - stats.mean) * factor;
      offset = exact_sum<double>(kSumProduct, q, centre, 0, dim_);
      alpha = offset / (transform_.centre_norm * transform_.centre_norm);
      for (int64_t d = 0; d < dim_; ++d) y[d] = static_cast<float>(q[d] - alpha * centre[d]);
    } else {
      affine<S, float>(row, stats.mean, factor, M::kDistance ? centre : nullptr, dim_, y);
    }
    const double square = M::kDistance ? exact_sum<float>(kSumShiftedSquare, nullptr, y, 0, dim_) : 0;
    const Encoding encoding = encode(turn(y), 0, encoded);
    const double norm = M::kNormalise ? normalised_norm(stats.norm) : M::kDistance ? std::sqrt(square) : stats.norm;
    if (!(norm <= kMaxWordNorm) || !std::isfinite(encoding.norm_square) || encoding.largest != encoding.largest) {
      out.set_unknown(r);
      out.square[r] = square;
      std::fill_n(encoded, words_, 0u);
      out.start[r] = 0;
      return;
    }
    const Lengths length = lengths(encoding);
    const bool tiny = encoding.largest < kTinyElement;
    if (tiny) std::fill_n(encoded, words_, 0u);
    const double scale = tiny ? kTinyElement : static_cast<double>(encoding.scale);
    const double root_gain = std::sqrt(transform_.gain());
    const double encoded_norm = tiny ? 0 : length.norm + length.loss;
    const double lost =
        (tiny ? length.norm : length.loss + relative() * encoded_norm) + fp64_error() * norm * root_gain;
    const double unit = scale / transform_.gain();
    const double along = std::fabs(alpha) * transform_.centre_norm;
    out.start[r] = tiny ? 0 : -128 * encoding.sum;
    out.unit[r] = unit;
    out.offset[r] = offset;
    out.square[r] = square;
    out.factor[r] = static_cast<float>((M::kDistance ? 1 : alpha) / unit);
    if (!exact_) {
      out.loss_share[r] = out.query_norm[r] = out.bias_error[r] = 0;
      out.row_error[r] = 0;
      return;
    }
    out.bias_error[r] = M::kDistance ? upward(32 * kUnit / unit) : 0;
    out.loss_share[r] = upward(PYCM_BOUND_SCALE * (lost / scale + 8 * kUnit * along / (root_gain * unit)));
    out.query_norm[r] = upward(encoded_norm / scale);
    out.row_error[r] = M::kDistance ? 8 * kUnit * square
                                    : 2 * kUnit * std::fabs(offset) +
                                          fp64_error() * 2 * norm * (transform_.centre_norm + (M::kNormalise ? 1 : 0));
  }

  ScreenKind kind_;
  RowReader<S> queries_, gallery_;
  const Transform& transform_;
  bool exact_;
  int64_t dim_, padded_, words_;
  int columns_;
};

// Centre and rotation for a gallery whose screens may be of low precision.
template <class M, class S>
void choose_transform(const RowReader<S>& gallery, ScreenKind kind, Transform& transform) {
  transform.set_rotation(gallery.rows().dim, false);
  if (M::kDistance || kind != ScreenKind::kFloat32) choose_centre<M>(gallery, transform);
  if (kind != ScreenKind::kInt8) return;
  EncodeScratch<S> scratch;
  const double plain = Screening<M, S>(kind, gallery, gallery, transform, true).mean_loss(scratch);
  transform.set_rotation(gallery.rows().dim, true);
  const double turned = Screening<M, S>(kind, gallery, gallery, transform, true).mean_loss(scratch);
  if (!(turned < 0.8 * plain)) transform.set_rotation(gallery.rows().dim, false);
}

}  // namespace pycm::cpu
