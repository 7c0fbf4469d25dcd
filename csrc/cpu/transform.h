// What a screen of low precision does to rows before it rounds them, chosen once per gallery from a sample of it. Any choice
// is right (docs/exactness.md, section 5); a good one makes rows short and even, so that little is lost.
//
//   centre     rows are measured from a point: the mean of the sample. For distances always; for scores when the mean
//              is a good part of the rows, as with anisotropic embeddings: q.g = q.c + alpha c.g' + q'.g' with g = c + g',
//              q = alpha c + q'.
//   rotation   signs and a Walsh-Hadamard transform over runs of `block` dimensions, which spreads a few heavy dimensions
//              over all of a run. Only where the sample says that int8 loses less that way.
#pragma once

#include <cmath>

#include "cpu/rows.h"

namespace pycm::cpu {

constexpr int64_t kSampleRows = 256;
constexpr int64_t kMaxRotation = 1024;

struct Transform {
  Buffer<double> centre;  // dim elements; null for none
  double centre_norm = 0;
  int64_t block = 0;  // of the rotation; 0 for none
  int64_t dim = 0;    // after padding for the rotation
  Buffer<float> signs;

  int stages() const {
    int stages = 0;
    while ((int64_t{1} << stages) < block) ++stages;
    return stages;
  }
  // One scale for pairs: the rotation is not normalised, so a product of two rotated rows is `gain` times too large.
  double gain() const { return block == 0 ? 1 : static_cast<double>(block); }

  void set_rotation(int64_t dimension, bool rotated) {
    block = 0;
    dim = dimension;
    if (!rotated) return;
    dim = round_up(dimension, 32);
    block = dim & -dim;
    while (block > kMaxRotation) block /= 2;
    signs.reserve(dim);
    uint64_t state = 0x9e3779b97f4a7c15u;
    for (int64_t d = 0; d < dim; ++d) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      signs[d] = state >> 63 ? 1.0f : -1.0f;
    }
  }
};

// Finite rows spread over the gallery: their mean after the metric's own normalisation.
template <class M, class S>
void choose_centre(const RowReader<S>& gallery, Transform& transform) {
  const Rows& rows = gallery.rows();
  Buffer<S> scratch(rows.dim);
  Buffer<double> mean(rows.dim);
  std::fill_n(mean.get(), rows.dim, 0.0);
  const int64_t sample = std::min<int64_t>(rows.rows, kSampleRows);
  double squares = 0;
  int64_t used = 0;
  for (int64_t i = 0; i < sample; ++i) {
    const S* row = gallery.read(i * (rows.rows / sample), scratch.get());
    const RowStats stats = row_stats<M>(row, rows.dim);
    const double factor = !M::kNormalise ? 1 : stats.norm == 0 ? 0 : 1 / stats.norm;
    const double square = exact_sum<S>(kSumShiftedSquare, nullptr, row, stats.mean, rows.dim) * factor * factor;
    if (!(square < 0x1p60)) continue;
    squares += square;
    ++used;
    for (int64_t d = 0; d < rows.dim; ++d) mean[d] += (static_cast<double>(row[d]) - stats.mean) * factor;
  }
  double norm = 0;
  for (int64_t d = 0; d < rows.dim; ++d) {
    mean[d] = used == 0 ? 0 : mean[d] / static_cast<double>(used);
    norm += mean[d] * mean[d];
  }
  // The mean of random rows is short but not 0; a mean worth subtracting holds a tenth of the squares.
  const bool useful = norm > 0x1p-60 && norm * static_cast<double>(used) > 0.1 * squares;
  if (!M::kDistance && !useful) return;
  transform.centre = std::move(mean);
  transform.centre_norm = std::sqrt(norm);
}

}  // namespace pycm::cpu
