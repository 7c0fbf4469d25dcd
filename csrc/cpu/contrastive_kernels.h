// The inner loops of the contrastive losses over a block of scores, one table per element type and instruction set.
//
//   contrastive_impl.h      the loops, written once over vec.h
//   contrastive_<level>.cpp the same loops compiled for one level
//
// A score that must not count is kAbsent: it is no maximum and bends no hinge, and exp, softplus and their gradients of it
// are exactly 0. Sums of one row or column are of type T; a NaN score makes them NaN.
#pragma once

#include <cstdint>
#include <limits>

namespace pycm::cpu {

template <class T>
constexpr T kAbsent = std::numeric_limits<T>::lowest() / 4;

// Scores, `stride` elements from row to row.
template <class T>
struct ScoreTile {
  T* scores = nullptr;
  int64_t stride = 0, rows = 0, columns = 0;

  T* row(int64_t i) const { return scores + i * stride; }
};

template <class T>
struct RowSums {
  T cost = 0;
  T weight = 0;    // of d cost / d x
  T weighted = 0;  // of score * d cost / d x
};

template <class T>
struct ContrastiveKernels {
  // best[j] and at[j] take in the scores of a column: the largest, below ceiling[j] where a ceiling is given, and the first
  // row that has it, row 0 being number `first`; NaN once one is. The same along one row, with one best for all.
  void (*column_best)(const ScoreTile<T>& tile, const T* ceiling, int64_t first, T* best, int64_t* at);
  void (*row_best)(const T* scores, int64_t columns, const T* ceiling, int64_t first, T* best, int64_t* at);

  // out[j] = the largest of column j (of those that are numbers).
  void (*column_max)(const ScoreTile<T>& tile, T* out);
  T (*row_max)(const T* scores, int64_t columns);
  // out[j] = sum of exp(scale * score + shift[j]).
  void (*column_exp_sum)(const ScoreTile<T>& tile, T scale, const T* shift, T* out);
  T (*row_exp_sum)(const T* scores, int64_t columns, T scale, T shift);
  // cost[j] and count[j]: sums of max(0, score + offset[j]), and how many of them are positive.
  void (*column_hinge)(const ScoreTile<T>& tile, const T* offset, T* cost, T* count);

  // One row's sums; where `write`, the gradient takes the place of each score.
  // Of exp(x + shift) + exp(x + column_shift[j]), x = scale * score: weights alone, no cost.
  RowSums<T> (*softmax_row)(T* scores, int64_t columns, T scale, T shift, const T* column_shift, bool write);
  // Cost max(0, score + offset), weight of it; the gradient adds that of max(0, score + column_offset[j]).
  RowSums<T> (*hinge_row)(T* scores, int64_t columns, T offset, const T* column_offset, bool write);
  // Cost log(1 + exp(x)), x = scale * score + bias.
  RowSums<T> (*sigmoid_row)(T* scores, int64_t columns, T scale, T bias, bool write);
};

#define PYCM_DECLARE_LEVEL(level)                                 \
  extern const ContrastiveKernels<float> contrastive_f32_##level; \
  extern const ContrastiveKernels<double> contrastive_f64_##level;
PYCM_DECLARE_LEVEL(scalar)
PYCM_DECLARE_LEVEL(avx2)    // x86-64 only
PYCM_DECLARE_LEVEL(avx512)  // x86-64 only
#undef PYCM_DECLARE_LEVEL

}  // namespace pycm::cpu
