// A screen: cheap values for all pairs of some queries with a block of the gallery, and for each an interval that holds the
// exact value. The proof is in docs/exactness.md; each line here is one line there.
//
// The exact value x of a pair is its score, or t = (Q - d^2) / 2 for distances, Q the square of the query's length from the
// centre. A screen computes, in the units of the query,
//   value[i][j] = (q^_i . g^_j) scale_j + factor_i bias_j          x ~ offset_i + unit_i value
//   |x - offset_i - unit_i value| <= row_error_i + unit_i (loss_share_i norm_j + query_norm_i loss_j)
// with the final rounding of the score to fp32 inside. For distances `value` is already an upper end: the bias is
// raised by its own error, and bias_error_i bias_j (negative) leads down to the lower end.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/rows.h"

namespace pycm::cpu {

// Below 1 only in the mutation check of the tests: a smaller bound must be caught losing matches.
#ifndef PYCM_BOUND_SCALE
#define PYCM_BOUND_SCALE 1.0
#endif

constexpr double kUnit = 0x1p-24;  // u: half an ulp of 1 in fp32

// The next fp32 number above; of a finite one.
inline float next_above(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value == 0) bits = 1;
  else bits += bits < 0 ? -1 : 1;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}
// The nearest fp32 number at or above, at or below; NaN stays.
inline float upward(double value) {
  const float rounded = static_cast<float>(value);
  return rounded < value ? next_above(rounded) : rounded;
}
inline float downward(double value) { return -upward(-value); }

inline int count_bits(uint32_t bits) {
  bits -= bits >> 1 & 0x55555555u;
  bits = (bits & 0x33333333u) + (bits >> 2 & 0x33333333u);
  bits = (bits + (bits >> 4)) & 0x0f0f0f0fu;
  return static_cast<int>((bits * 0x01010101u) >> 24);
}

// An interval that holds the exact value of a pair. A NaN anywhere gives the whole line.
struct Interval {
  float lower, upper;
};

// What the panels of a block say of each gallery row. Views of the block's own memory, or of a prepared gallery's.
struct ScreenColumns {
  const float *scale = nullptr, *bias = nullptr, *norm = nullptr, *loss = nullptr;

  ScreenColumns from(int64_t j) const { return {scale + j, bias + j, norm + j, loss + j}; }
};
constexpr int kColumnArrays = 4;

// The same, to be written: [kColumnArrays][capacity].
struct ColumnWriter {
  float *scale, *bias, *norm, *loss;
  ColumnWriter(float* arrays, int64_t capacity, int64_t j = 0)
      : scale(arrays + j), bias(scale + capacity), norm(bias + capacity), loss(norm + capacity) {}
  ScreenColumns columns() const { return {scale, bias, norm, loss}; }
  // Never a hit: what fills a panel up.
  void set_padding(int64_t j) const {
    scale[j] = bias[j] = norm[j] = 0;
    loss[j] = -kInfinity;
  }
  // A row nothing is known of: always a hit.
  void set_unknown(int64_t j) const {
    scale[j] = bias[j] = norm[j] = 0;
    loss[j] = kInfinity;
  }
};

// Rows of the gallery as panels [word][columns]. What is kept of a run of rows lies `kept_stride` rows behind that of the
// run before: side by side in a thread's own memory, further apart in a prepared gallery.
struct ScreenBlock : BlockRows {
  int64_t words = 0, kept_stride = kPanelColumns;
  int columns = 0;
  const uint32_t* panels = nullptr;
  ScreenColumns kept;

  int64_t panel_count() const { return (count + columns - 1) / columns; }
  // Where panel p begins in what is kept.
  int64_t at(int64_t p) const {
    const int64_t r = p * columns;
    return r / kPanelColumns * kept_stride + r % kPanelColumns;
  }
};

// Queries of one chunk, packed in tiles, and what the bound needs of each. Arrays are padded to whole tiles.
struct ScreenQueries {
  ScreenKind kind = ScreenKind::kFloat32;
  int64_t rows = 0, words = 0;
  Buffer<uint32_t> packed;
  Buffer<int32_t> start;
  Buffer<float> factor, loss_share, query_norm, bias_error;
  Buffer<double> unit, offset, row_error, square;

  void reserve(ScreenKind screen_kind, int64_t row_count, int64_t word_count) {
    kind = screen_kind;
    rows = row_count;
    words = word_count;
    const int64_t padded = round_up(rows, kernels().height);
    packed.reserve(padded * words * query_words());
    start.reserve(padded);
    for (Buffer<float>* buffer : {&factor, &loss_share, &query_norm, &bias_error}) buffer->reserve(padded);
    for (Buffer<double>* buffer : {&unit, &offset, &row_error, &square}) buffer->reserve(padded);
    for (int64_t i = rows; i < padded; ++i) {
      factor[i] = loss_share[i] = query_norm[i] = bias_error[i] = 0;
      start[i] = 0;
    }
  }
  int query_words() const { return kernels().query_words[static_cast<int>(kind)]; }
  int64_t tiles() const { return (rows + kernels().height - 1) / kernels().height; }
  int64_t first(int64_t tile) const { return tile * kernels().height; }
  int count(int64_t tile) const { return static_cast<int>(std::min<int64_t>(kernels().height, rows - first(tile))); }
  int height(int64_t tile) const { return static_cast<int>(round_up(count(tile), kernels().height_step)); }
  uint32_t* tile(int64_t t) const { return packed.get() + first(t) * words * query_words(); }

  // A query nothing is known of: every pair is a hit.
  void set_unknown(int64_t i) {
    factor[i] = bias_error[i] = 0;
    loss_share[i] = query_norm[i] = kInfinity;
    unit[i] = 1;
    offset[i] = row_error[i] = square[i] = 0;
  }

  // What value + error reaches, in the units of the query, for every pair with x >= threshold.
  float cut(int64_t i, float threshold) const {
    return downward((threshold - offset[i] - error_beside(i, threshold)) / unit[i]);
  }
  // Above this, value - error says that x > threshold.
  float sure(int64_t i, float threshold) const {
    return upward((threshold - offset[i] + error_beside(i, threshold)) / unit[i]);
  }

  Interval interval(int64_t i, const ScreenColumns& columns, int64_t j, float value) const {
    const double error = row_error[i] + 0x1p-50 * std::fabs(offset[i]) +
                         unit[i] * (1 + 0x1p-40) *
                             (static_cast<double>(loss_share[i]) * columns.norm[j] +
                              static_cast<double>(query_norm[i]) * columns.loss[j]);
    const double x = offset[i] + unit[i] * static_cast<double>(value);
    const double down = unit[i] * static_cast<double>(bias_error[i]) * columns.bias[j];
    const Interval interval{downward(x - error + down), upward(x + error)};
    // An overflow says nothing about the exact value.
    return std::isfinite(interval.lower) && std::isfinite(interval.upper) ? interval : Interval{-kInfinity, kInfinity};
  }

  // At most x of a pair whose verified key (the score, or the negated distance) is `key`.
  template <class M>
  float value_of(int64_t i, double key) const {
    const double x = near<M>(i, key, -0x1p-22);
    if (std::isnan(x)) return -kInfinity;
    return downward(std::min(x, static_cast<double>(std::numeric_limits<float>::max())));
  }
  // At least x of such a pair.
  template <class M>
  float value_above(int64_t i, double key) const {
    const double x = near<M>(i, key, 0x1p-22);
    return std::isnan(x) ? kInfinity : upward(x);
  }

  // The score or distance that a value x stands for.
  template <class M>
  double score_of(int64_t i, double x) const {
    if (!M::kDistance) return x;
    const double difference = square[i] - 2 * x;
    const double distance_square = difference < 0 ? 0 : difference;
    return M::kRoot ? std::sqrt(distance_square) : distance_square;
  }

 private:
  // The error that no pair's value has a part in, and the rounding of threshold - offset - error.
  double error_beside(int64_t i, float threshold) const {
    return row_error[i] + 0x1p-50 * (std::fabs(static_cast<double>(threshold)) + std::fabs(offset[i]) + row_error[i]);
  }
  // x of a verified key; for distances give or take so much of both squares.
  template <class M>
  double near(int64_t i, double key, double share) const {
    if (!M::kDistance) return key;
    const double distance_square = M::kRoot ? key * key : -key;
    return 0.5 * (square[i] - distance_square) + share * (square[i] + distance_square);
  }
};

}  // namespace pycm::cpu
