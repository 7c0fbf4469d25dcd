// Sets of vectors, one per item: the words of a sentence, the regions of an image, the tokens of a page.
//
//   padded   data [items, max_length, dim]; item i is its first lengths[i] vectors (all of them where lengths is null)
//   ragged   data [total, dim];             item i is the vectors offsets[i] ... offsets[i + 1]
//
// What lies beyond an item's vectors is never read. On a device, data, lengths and offsets are device pointers.
#pragma once

#include "core/array.h"

namespace pycm {

struct VectorSets {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t items = 0;
  int64_t dim = 0;
  int64_t item_stride = 0;  // padded only
  int64_t row_stride = 0;
  int64_t dim_stride = 1;
  int64_t max_length = 0;            // padded only: vectors an item may have
  int64_t total = 0;                 // vectors in memory: items * max_length, or offsets[items]
  const int64_t* lengths = nullptr;  // [items], each in [0, max_length]
  const int64_t* offsets = nullptr;  // [items + 1], rising from 0 to total; not null where ragged

  bool ragged() const { return offsets != nullptr; }

  // ---- on the host ----

  int64_t length(int64_t i) const {
    return offsets != nullptr ? offsets[i + 1] - offsets[i] : lengths != nullptr ? lengths[i] : max_length;
  }
  // The vectors of item i.
  Rows item(int64_t i) const {
    const int64_t start = offsets != nullptr ? offsets[i] * row_stride : i * item_stride;
    return {static_cast<const char*>(data) + start * item_size(dtype), dtype, length(i), dim, row_stride, dim_stride};
  }
  // Where item i starts in a contiguous array of the same shape, in vectors.
  int64_t position(int64_t i) const { return offsets != nullptr ? offsets[i] : i * max_length; }
};

}  // namespace pycm
