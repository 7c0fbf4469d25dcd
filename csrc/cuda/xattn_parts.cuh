// xattn_score's parts of a side, and the products of two parts (xattn_products.cu); xattn.cu has the whole of it.
#pragma once

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/maxsim_exact.cuh"

namespace pycm::cuda {

inline constexpr int64_t kPart = 4096;     // vectors of one side in a part, at most
inline constexpr int64_t kLongest = 2048;  // of a ragged item

struct Side {
  VectorSets sets;
  int64_t step;      // a part's items start within so many positions
  int64_t capacity;  // and reach no further than so many
};

inline Side side_of(const VectorSets& sets) {
  if (sets.ragged()) return {sets, kPart - kLongest, std::min(sets.total, kPart)};
  const int64_t step = std::max<int64_t>(1, kPart / sets.max_length) * sets.max_length;
  return {sets, step, std::min(sets.total, step)};
}

// Positions [begin, end) and items [first, stop) of part `number`.
struct Part {
  int64_t first, stop, begin, end;
};

__device__ inline int64_t first_item_from(const VectorSets& sets, int64_t position) {
  if (sets.offsets == nullptr) return clamp_to((position + sets.max_length - 1) / sets.max_length, 0, sets.items);
  int64_t low = 0, high = sets.items;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sets.offsets[middle] < position) low = middle + 1;
    else high = middle;
  }
  return low;
}

__device__ inline Part find_part(const Side& side, int64_t number) {
  const VectorSets& sets = side.sets;
  const int64_t first = first_item_from(sets, number * side.step),
                stop = first_item_from(sets, (number + 1) * side.step);
  const auto start = [&](int64_t item) { return item < sets.items ? item_span(sets, item).position : sets.total; };
  const int64_t begin = start(first);
  return {first, stop, begin, clamp_to(start(stop), begin, begin + side.capacity)};
}

struct Product {
  Side rows, columns;
  bool rows_aligned, columns_aligned;
  int64_t row_part, column_part;
  bool gram;  // rows and columns are one set: products of one item with itself are enough
  int64_t pitch;
};

inline unsigned blocks(int64_t work, int64_t each) { return static_cast<unsigned>((work + each - 1) / each); }

// Products x . y of one part of each side, into `out` with rows `pitch` apart.
void launch_xattn_products(const Product& product, float* out, void* stream, const char* name);
void launch_xattn_products(const Product& product, double* out, void* stream, const char* name);

}  // namespace pycm::cuda
