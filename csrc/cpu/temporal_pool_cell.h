// A layer's parameters as the kernels of temporal_pool read them.
//
// Units are taken in groups of `columns`; of each group its gates lie side by side, one panel each, so that one tile of a
// product has all that a unit needs:
//   panels    [group][gate][word][columns]     of weight_ih and of weight_hh
//   biases    [group][gate][columns]           the input's panels start from b_ih (+ b_hh where both are simply added)
//   projection [panel][word][columns]          panels of `columns` state elements
// Units beyond H have weights and biases of zero; their states stay 0.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/temporal_pool_kernels.h"
#include "ops/temporal_pool.h"

namespace pycm::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Asks for huge pages where whole ones fit: fresh small pages cost more than what is written to them.
void use_huge_pages(void* data, int64_t bytes);
// Room for `count` elements on such pages.
template <class T>
void reserve_large(Buffer<T>& buffer, int64_t count);

// Rows [0, rows) as tiles of about equal height.
struct Tiles {
  int64_t rows, count;
  Tiles(int64_t number, int height) : rows(number), count(ceil_div(number, height)) {}
  int64_t first(int64_t tile) const { return tile * rows / count; }
  int height(int64_t tile) const { return static_cast<int>(first(tile + 1) - first(tile)); }
};

// How rows become operands of a product: as elements of T, or rounded to bf16, two in a word, or to 8 bits, four in one.
template <class T>
class Operand {
 public:
  Operand() = default;
  explicit Operand(const Bf16Kernels* bf16) : bf16_(bf16) {}  // null: as elements
  explicit Operand(const Int8Kernels& int8) : int8_(&int8) {}

  int64_t elements() const { return int8_ != nullptr ? 4 : bf16_ != nullptr ? 2 : 1; }  // of a word
  int64_t words(int64_t dim) const { return ceil_div(dim, elements()) + (int8_ != nullptr ? kInt8Tail : 0); }
  // One word of each of `count` columns: of this row, and of the next one where a word holds two. Not for 8 bits.
  void join(const T* row, const T* next, int64_t count, T* out) const {
    if constexpr (sizeof(T) == 4) {
      if (bf16_ != nullptr) return bf16_->pair(row, next, count, out);
    }
    std::copy_n(row, count, out);
  }
  void product(const RecurrentKernels<T>& kernels, const ProductTile<T>& tile) const {
    if constexpr (sizeof(T) == 4) {
      if (bf16_ != nullptr) return bf16_->product(tile);
      if (int8_ != nullptr) return int8_->product(tile);
    }
    kernels.product(tile);
  }
  // The words of a row, one of the weights or of what they are multiplied with: the row itself or what is written to
  // scratch [scratch_size(dim)].
  const T* read(const void* row, DType dtype, int64_t dim, T* scratch, bool weights = false) const {
    if constexpr (sizeof(T) == 8) {
      return static_cast<const double*>(row);
    } else {
      if (dtype == DType::kBFloat16 && bf16_ != nullptr) {
        scratch[dim / 2] = 0;
        std::memcpy(scratch, row, static_cast<size_t>(dim) * 2);
        return scratch;
      }
      const float* values = static_cast<const float*>(row);
      if (dtype != DType::kFloat32) {
        float* wide = scratch + words(dim);
        const auto* halves = static_cast<const uint16_t*>(row);
        if (dtype == DType::kFloat16) cpu::kernels().widen_f16(halves, dim, wide);
        else cpu::kernels().widen_bf16(halves, dim, wide);
        values = wide;
      }
      if (int8_ != nullptr) {
        int8_->round(values, dim, weights, reinterpret_cast<uint32_t*>(scratch));
        return scratch;
      }
      if (bf16_ == nullptr) return values;
      scratch[dim / 2] = 0;
      bf16_->round(values, dim, reinterpret_cast<uint16_t*>(scratch));
      return scratch;
    }
  }
  static int64_t scratch_size(int64_t dim) { return 2 * dim + 2; }

 private:
  const Bf16Kernels* bf16_ = nullptr;
  const Int8Kernels* int8_ = nullptr;
};

// `count` rows as a tile's first operand; row(i), called in order, is where row i lies. scratch: count * scratch_size(dim).
template <class T, class Row>
void pack_tile(const RecurrentKernels<T>& kernels, const Operand<T>& operand, int count, int64_t dim, DType dtype,
               T* scratch, T* to, Row row) {
  const T* rows[kMaxProductHeight];
  for (int i = 0; i < count; ++i)
    rows[i] = operand.read(row(i), dtype, dim, scratch + i * Operand<T>::scratch_size(dim));
  kernels.pack(rows, count, operand.words(dim), to);
}

template <class T>
void pack_panel(const T* rows, int64_t row_stride, int count, int64_t words, int columns, T* out) {
  if constexpr (sizeof(T) == 8) cpu::kernels().pack_f64(rows, row_stride, count, words, columns, out);
  else cpu::kernels().pack_f32(rows, row_stride, count, words, columns, out);
}

// The parameters for the working type T.
template <class T>
struct PackedWeights {
  const RecurrentKernels<T>& kernels;
  Operand<T> input_operand, operand;  // of x and weight_ih; of states, weight_hh and weight_hr
  int64_t groups, projection_panels;
  Buffer<T> input, hidden, projection;
  Buffer<T> input_bias, hidden_bias;  // empty without biases; hidden_bias also where b_ih + b_hh serves
  bool has_bias = false, has_hidden_bias = false;

  PackedWeights(const CellWeights& weights, const Operand<T>& of_input, const Operand<T>& of_states, int num_threads);
};

class PackedCell {
 public:
  CellWeights shape;
  std::unique_ptr<PackedWeights<float>> f32;
  std::unique_ptr<PackedWeights<double>> f64;
  int64_t bytes = 0;

  template <class T>
  const PackedWeights<T>& weights() const {
    if constexpr (sizeof(T) == 8) return *f64;
    else return *f32;
  }
};

}  // namespace pycm::cpu
