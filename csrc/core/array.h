// Strided views: what the bindings hand to an operation. Strides count elements and may be zero or negative.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace pycm {

constexpr int kMaxDims = 16;

struct Array {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};
};

// Rows of `dim` elements: [rows, dim].
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t dim = 0;
  int64_t row_stride = 0;
  int64_t dim_stride = 1;

  const void* row(int64_t i) const { return static_cast<const char*>(data) + i * row_stride * item_size(dtype); }
};

// A boolean of one byte, [rows, columns]; row_stride 0 when every row shares one line.
struct Mask {
  const uint8_t* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;

  explicit operator bool() const { return data != nullptr; }
  bool operator()(int64_t row, int64_t column) const { return data[row * row_stride + column * column_stride] != 0; }
};

}  // namespace pycm
