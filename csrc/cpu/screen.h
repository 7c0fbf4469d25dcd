// The error bound of a screen, and the thresholds that follow from it. The proof is in docs/exactness.md; each line here
// is one line there.
//
// For every pair, with a^ and b^ the encoded rows and value their screened value,
//   |value - exact| <= error(i, j) = row_error_i + row_slack_i * column_slack_j + slack_j
// where exact is the metric's value in the screen's units (score, or t = (|q^|^2 - d^2) / 2), the final rounding of the
// score to fp32 included. A screen's precision is one policy, such as Fp32Screen: the type rows are encoded in, the kernel
// that compares a tile, and the bound of its values.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/rows.h"

namespace pycm::cpu {

// Below 1 only in the mutation check of the tests: a smaller bound must be caught losing matches.
#ifndef PYCM_BOUND_SCALE
#define PYCM_BOUND_SCALE 1.0
#endif

struct ScreenBound {
  double relative = 0;  // of |a^| |b^|
  double square = 0;    // of |a^|^2 and |b^|^2: distances only
  double absolute = 0;  // underflow
};

struct Fp32Screen {
  using Element = float;

  static bool compare(const Tile<Element>& tile, Screen& screen) { return kernels().screen(tile, screen); }

  template <class M, class S>
  static ScreenBound bound(int64_t dim) {
    constexpr double u = 0x1p-24;
    const double roundings = static_cast<double>(std::min(dim, kDepth) + (dim + kDepth - 1) / kDepth);
    ScreenBound bound;
    // gamma_n for the sum; 16 more roundings cover encoding, scale, bias, the score's own rounding, and the arithmetic
    // of thresholds and comparisons.
    bound.relative = PYCM_BOUND_SCALE * (roundings * u / (1 - roundings * u) + 16 * u);
    bound.square = PYCM_BOUND_SCALE * (M::kDistance ? 8 * u : 0);
    bound.absolute = PYCM_BOUND_SCALE * 4 * static_cast<double>(dim + 4) * 0x1p-149;
    if (roundings * u >= 0.5) bound.relative = std::numeric_limits<double>::infinity();
    return bound;
  }
};

// Rows longer than this may overflow a partial sum, after which a value says nothing: their slack is infinite. Rows of
// norm 1 and their scales never do.
constexpr double kMaxNorm = 0x1p62;
inline double slack_norm(double norm) { return norm > kMaxNorm ? std::numeric_limits<double>::infinity() : norm; }

// Towards +inf, so that a float never understates a bound computed in double; and a little more, which covers that the
// norms in it are those of rows before their encoding.
inline float upward(double value) {
  const double enough = value * (1 + 0x1p-22);
  const float rounded = static_cast<float>(enough);
  return rounded < enough ? std::nextafterf(rounded, std::numeric_limits<float>::infinity()) : rounded;
}

struct ScreenColumns {
  Buffer<float> column_slack, slack;

  template <class M, class T>
  void set(const ScreenBound& bound, const GalleryBlock<T>& block, bool exact) {
    const int64_t padded = block.panel_count() * block.columns;
    column_slack.reserve(round_up(padded, kMaxTileColumns));
    slack.reserve(round_up(padded, kMaxTileColumns));
    const double root = std::sqrt(static_cast<double>(block.dim));
    for (int64_t j = 0; j < padded; ++j) {
      const double norm = slack_norm(block.norm[j]);
      // A normalised row has norm 1 after its scale, which magnifies what underflowed before it.
      const double scale = std::max(1.0, std::fabs(static_cast<double>(block.scale[j])));
      const bool used = exact && j < block.count;
      column_slack[j] = used ? upward(bound.relative * norm) : 0;
      slack[j] =
          used
              ? upward(bound.square * norm * norm + (bound.absolute + 0x1p-148 * root) * scale + 0x1p-148 * root * norm)
              : 0;
    }
  }
};

struct ScreenRows {
  std::vector<float> row_slack;
  std::vector<double> row_error, square;

  template <class M, class T>
  void set(const ScreenBound& bound, const PackedQueries<T>& queries, bool exact) {
    row_slack.resize(queries.rows);
    row_error.resize(queries.rows);
    square.resize(queries.rows);
    const double root = std::sqrt(static_cast<double>(queries.dim));
    for (int64_t i = 0; i < queries.rows; ++i) {
      const double norm = queries.norm[i];
      square[i] = norm * norm;
      row_slack[i] = exact ? upward(slack_norm(norm)) : 0;
      row_error[i] = exact ? bound.square * square[i] + 0x1p-148 * root * norm : 0;
    }
  }

  // threshold - row_error, rounded down.
  float cut(int64_t row, float threshold) const {
    const double value = static_cast<double>(threshold) - row_error[row];
    const float rounded = static_cast<float>(value);
    return rounded > value ? std::nextafterf(rounded, -std::numeric_limits<float>::infinity()) : rounded;
  }

  float error(int64_t row, const ScreenColumns& columns, int64_t j) const {
    return upward(row_error[row] + static_cast<double>(row_slack[row]) * static_cast<double>(columns.column_slack[j]) +
                  static_cast<double>(columns.slack[j]));
  }

  // The screen's value that a verified pair surely reaches: candidates below it are worse.
  template <class M>
  float threshold_of(int64_t row, double key) const {
    double value = key;
    if (M::kDistance) {
      const double distance_square = M::kRoot ? key * key : -key;
      value = 0.5 * (square[row] - distance_square) - 0x1p-22 * (square[row] + distance_square);
    }
    if (std::isnan(value)) return -std::numeric_limits<float>::infinity();
    const float limit = std::numeric_limits<float>::max();
    const float rounded = static_cast<float>(std::min(value, static_cast<double>(limit)));
    return rounded > value ? std::nextafterf(rounded, -std::numeric_limits<float>::infinity()) : rounded;
  }

  // The score or distance that a screened value stands for.
  template <class M>
  double score_of(int64_t row, double value) const {
    if (!M::kDistance) return value;
    const double difference = square[row] - 2 * value;
    const double distance_square = difference < 0 ? 0 : difference;
    return M::kRoot ? std::sqrt(distance_square) : distance_square;
  }
};

}  // namespace pycm::cpu
