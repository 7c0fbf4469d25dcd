// The inner loops of temporal_pool, one table per element type T and instruction set. Every entry means the same at every
// level; sums may round differently from level to level, but never with the height of a tile.
//
//   temporal_pool_impl.h      the loops, written once over vec.h
//   temporal_pool_int8.h      words of 8-bit elements for them
//   temporal_pool_<level>.cpp the same loops compiled for one level
#pragma once

#include <cstdint>

#include "core/cell.h"
#include "core/pool.h"

namespace pycm::cpu {

constexpr int kMaxProductHeight = 12;
constexpr int kMaxPanels = 4;  // that a tile of few rows meets at once

// c[i][p][j] = start[p][j] + sum over w of a[w][i] * b[p][w][j], or the same added to c, for i < height, p < panels, j < columns.
// One operand is packed "depth first", a word holds one element of T, two of bf16, or four of 8 bits (Int8Kernels).
template <class T>
struct ProductTile {
  int height = 0, panels = 0;
  int64_t words = 0;
  const void* a = nullptr;   // [words][height]
  const void* b = nullptr;   // panels of [words][columns]
  int64_t b_panel = 0;       // words from one panel to the next
  const T* start = nullptr;  // [panels][columns], null for zeros
  bool add = false;          // to c; `start` is then not used
  T* c = nullptr;
  int64_t c_row = 0, c_panel = 0;
};

// Rows of one group of `columns` units. Strides count elements: from row to row, and from part to part.
template <class T>
struct CellTile {
  int rows = 0;
  const T* input = nullptr;  // [kGates][columns], the input's part of the pre-activations, biases included
  int64_t input_row = 0, input_part = 0;
  const T* hidden = nullptr;  // [kGates][columns], the recurrent part; null where `input` has it already (LSTM only)
  int64_t hidden_row = 0;
  const T* h = nullptr;  // [columns], before the step; GRU only
  int64_t h_row = 0;
  T* h_next = nullptr;
  int64_t h_next_row = 0;
  T* c = nullptr;  // [columns], before and after the step; LSTM only
  int64_t c_row = 0;
  T* const* reserve = nullptr;  // each row's [kReserve][units <= columns]; null in inference
  int64_t reserve_part = 0, units = 0;
};

// The same backward, for one row. Of what is marked *, `units` elements exist; the others count as zeros.
template <class T>
struct CellGradRow {
  int64_t units = 0;
  const T* reserve = nullptr;  // * [kReserve]
  int64_t reserve_part = 0;
  const T* h_before = nullptr;  // *, GRU only
  const T* c_before = nullptr;  // *, LSTM only; null for zeros
  T* parts = nullptr;           // [kParts][columns], the gradients of the pre-activations
  int64_t part = 0;
  T* grad_h = nullptr;              // of h; for GRU then what of it goes past the products to the step before
  const T* grad_outside = nullptr;  // added to it; may be null
  T* grad_c = nullptr;              // of the step, then of the one before; LSTM only
  T* output = nullptr;              // o tanh(c), where a projection follows; LSTM only, may be null
};

// Running values of attention over one row's states: value [n] and sum are to be scaled by exp(-largest).
template <class T>
struct AttentionRow {
  T* value = nullptr;
  T largest = 0, sum = 0;
};

template <class T>
struct RecurrentKernels {
  int columns;      // of a panel, and units of a group
  int full_height;  // rows of a tile at its best, at most kMaxProductHeight
  void (*product)(const ProductTile<T>& tile);
  // [count][words] rows to [words][count], count <= full_height.
  void (*pack)(const T* const* rows, int count, int64_t words, T* out);
  // One entry per Cell.
  void (*step[2])(const CellTile<T>& tile);
  void (*step_back[2])(const CellGradRow<T>& row);
  // One entry per Pool: value [kWidth][stride] takes in h [n]; null for those that do not stream.
  void (*pool[9])(T* value, int64_t stride, const T* h, int64_t n, bool first);
  void (*scale)(T* value, T factor, int64_t n);
  T (*dot)(const T* x, const T* y, int64_t n);
  void (*axpy)(T factor, const T* x, T* y, int64_t n);  // y += factor * x
  void (*attend)(AttentionRow<T>& row, const T* w, const T* h, int64_t n);
  // out[d] = sum over k of weights[k] * (the k-th greatest of states[t][d] over t < length); scratch holds length * columns.
  void (*sorted_sum)(const T* states, int64_t stride, int64_t length, int64_t n, const T* weights, T* scratch, T* out);
};

// bf16 operands with fp32 sums: words of two elements.
struct Bf16Kernels {
  void (*product)(const ProductTile<float>& tile);
  void (*round)(const float* in, int64_t count, uint16_t* out);  // to nearest, ties to even
  // Words of one element of each row, rounded.
  void (*pair)(const float* even, const float* odd, int64_t count, float* out);
};

// Operands of 8 bits, each row with a scale of its own: words of four elements, then kInt8Tail more. Sums are exact
// integers, so every level finds the same products.
constexpr int kInt8Tail = 2;  // the scale, a float; of weights 128 times the sum of the row's codes
struct Int8Kernels {
  void (*product)(const ProductTile<float>& tile);
  // To codes * max|row| / 127: of weights as they are, of what they are multiplied with 128 greater, so that they have no
  // sign. A row that is not finite has a scale of NaN.
  void (*round)(const float* row, int64_t dim, bool weights, uint32_t* words);
};

#define PYCM_DECLARE_LEVEL(level)                              \
  extern const RecurrentKernels<float> recurrent_f32_##level;  \
  extern const RecurrentKernels<double> recurrent_f64_##level; \
  extern const Int8Kernels recurrent_int8_##level;
PYCM_DECLARE_LEVEL(scalar)
PYCM_DECLARE_LEVEL(avx2)    // x86-64 only
PYCM_DECLARE_LEVEL(avx512)  // x86-64 only
#undef PYCM_DECLARE_LEVEL
extern const Bf16Kernels recurrent_bf16_avx512;       // x86-64 only
extern const Int8Kernels recurrent_int8_avx512_vnni;  // x86-64 only

// Of the level in use (cpu/kernels.h).
template <class T>
const RecurrentKernels<T>& recurrent_kernels();
const Bf16Kernels* bf16_kernels();  // null where bf16 is widened to fp32
const Int8Kernels& int8_kernels();

}  // namespace pycm::cpu
