// What the maxsim and cross-attention kernels share: where the vectors of an item lie, a run of items cut into groups
// of eight vectors, and the running maximum of accumulator rows.
#pragma once

#include "core/sets.h"
#include "cuda/arch.cuh"

namespace pycm::cuda {

inline constexpr int kGroup = 8;       // vectors per group: the columns of one tensor-core tile
inline constexpr int kRunItems = 128;  // items one block may walk over

struct ItemSpan {
  int64_t first;     // offset of the item's first vector, in elements
  int64_t position;  // that vector's number in a contiguous array of the same shape
  int64_t length;    // vectors
};

__device__ inline int64_t clamp_to(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Lengths and offsets cannot be checked without waiting for the device: what is out of range is clamped.
__device__ inline ItemSpan item_span(const VectorSets& sets, int64_t item) {
  if (sets.offsets != nullptr) {
    const int64_t start = clamp_to(sets.offsets[item], 0, sets.total);
    const int64_t stop = clamp_to(sets.offsets[item + 1], start, sets.total);
    return {start * sets.row_stride, start, stop - start};
  }
  const int64_t length = sets.lengths != nullptr ? clamp_to(sets.lengths[item], 0, sets.max_length) : sets.max_length;
  return {item * sets.item_stride, item * sets.max_length, length};
}

// The item at vector `position` of a contiguous array, its padding included.
__device__ inline int64_t item_at(const VectorSets& sets, int64_t position) {
  if (sets.offsets == nullptr) return position / sets.max_length;
  int64_t low = 0, high = sets.items;  // the last item that starts at or before it
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (sets.offsets[middle] <= position) low = middle;
    else high = middle;
  }
  return low;
}

// The item that vector `position` belongs to; -1 for padding.
__device__ inline int64_t item_of(const VectorSets& sets, int64_t position) {
  const int64_t item = item_at(sets, position);
  const ItemSpan span = item_span(sets, item);
  return position >= span.position && position < span.position + span.length ? item : -1;
}

// Offset in elements of vector `position`; -1 for padding, which is never read.
__device__ inline int64_t vector_offset(const VectorSets& sets, int64_t position) {
  if (sets.offsets != nullptr) return position < sets.total ? position * sets.row_stride : -1;
  if (position >= sets.total) return -1;
  const int64_t item = position / sets.max_length, index = position - item * sets.max_length;
  return index < item_span(sets, item).length ? item * sets.item_stride + index * sets.row_stride : -1;
}

// Whether positions [begin, end) hold any of the set's vectors: a slice of a ragged set shares the positions of the
// whole.
__device__ inline bool has_rows(const VectorSets& sets, int64_t begin, int64_t end) {
  return sets.offsets == nullptr || (sets.offsets[0] < end && sets.offsets[sets.items] > begin);
}

// One element of any dtype but fp64 as fp32.
__device__ inline float load_float(const VectorSets& sets, int64_t offset) {
  switch (sets.dtype) {
    case DType::kFloat16: return half_to_float(static_cast<const uint16_t*>(sets.data)[offset]);
    case DType::kBFloat16: return bfloat16_to_float(static_cast<const uint16_t*>(sets.data)[offset]);
    default: return static_cast<const float*>(sets.data)[offset];
  }
}
__device__ inline double load_double(const VectorSets& sets, int64_t offset) {
  return sets.dtype == DType::kFloat64 ? static_cast<const double*>(sets.data)[offset]
                                       : static_cast<double>(load_float(sets, offset));
}
template <class V>
__device__ __forceinline__ V load_as(const VectorSets& sets, int64_t offset) {
  if constexpr (std::is_same_v<V, double>) return load_double(sets, offset);
  else return load_float(sets, offset);
}

// The sum over the lanes in the library's order: lane l adds lane l + 16, l + 8, l + 4, l + 2, l + 1. Every lane gets
// it (addition commutes, so both partners of an exchange round alike).
template <class V>
__device__ __forceinline__ V warp_sum(V value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// A run of items laid side by side, each from the start of a group: 180 vectors are 23 groups, the last of 4. An empty
// item is one group of no vectors, so that every item has an end.
struct GroupIndex {
  int64_t first[kRunItems], position[kRunItems];
  int length[kRunItems];
  int start[kRunItems + 1];  // groups before item i
};

struct Group {
  int item;   // in the run; -1 behind its end
  int token;  // the group's first vector, in its item
  int valid;  // vectors, at most kGroup
  int last;   // of its item
};

__device__ inline int group_count(int64_t length) {
  return length == 0 ? 1 : static_cast<int>((length + kGroup - 1) / kGroup);
}

// By the whole block; ends with a barrier.
__device__ inline void index_run(GroupIndex& index, const VectorSets& sets, int64_t first_item, int items) {
  for (int i = threadIdx.x; i < items; i += blockDim.x) {
    const ItemSpan span = item_span(sets, first_item + i);
    index.first[i] = span.first;
    index.position[i] = span.position;
    index.length[i] = static_cast<int>(span.length);
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    constexpr int kEach = kRunItems / kWarp;
    const int lane = threadIdx.x;
    int sum = 0;
    for (int i = lane * kEach; i < (lane + 1) * kEach && i < items; ++i) sum += group_count(index.length[i]);
    int before = sum;
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, before, step);
      if (lane >= step) before += other;
    }
    before -= sum;
    if (lane == 0) index.start[0] = 0;
    for (int i = lane * kEach; i < (lane + 1) * kEach && i < items; ++i) {
      before += group_count(index.length[i]);
      index.start[i + 1] = before;
    }
  }
  __syncthreads();
}

__device__ inline Group find_group(const GroupIndex& index, int items, int number) {
  if (number >= index.start[items]) return {-1, 0, 0, 0};
  int low = 0, high = items;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (index.start[middle] <= number) low = middle;
    else high = middle;
  }
  const int token = (number - index.start[low]) * kGroup;
  const int left = index.length[low] - token;
  return {low, token, left < kGroup ? left : kGroup, left <= kGroup};
}

// Where row maxima go: best[item * pitch + row], and with them the vector that gave it.
struct RowMaxOut {
  float* best;
  int32_t* arg;  // null unless the kernel keeps it
  int64_t pitch;
  int64_t rows;
};

// The running maximum of the accumulator rows of one thread: row slot s is row + 8 s of the block (lane's own row
// included). A NaN stays; of equal values the first vector counts.
template <int kSlots, bool kArg>
struct RowMax {
  float best[kSlots];
  int arg[kSlots];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      best[s] = -INFINITY;
      arg[s] = 0;
    }
  }

  __device__ __forceinline__ void add(int slot, float value, int token) {
    if (kArg && value > best[slot]) arg[slot] = token;
    best[slot] = max_nan(best[slot], value);
  }

  // The four lanes of a quad hold a row's columns between them. `row`: of slot 0.
  __device__ __forceinline__ void flush(const RowMaxOut& out, int64_t item, int64_t row) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float value = __shfl_xor_sync(kAllLanes, best[s], step);
        if (kArg) {
          const int other = __shfl_xor_sync(kAllLanes, arg[s], step);
          if (value > best[s] || (value == best[s] && other < arg[s])) arg[s] = other;
        }
        best[s] = max_nan(best[s], value);
      }
      if (threadIdx.x % 4 == 0 && row + 8 * s < out.rows) {
        out.best[item * out.pitch + row + 8 * s] = best[s];
        if (kArg) out.arg[item * out.pitch + row + 8 * s] = arg[s];
      }
    }
    reset();
  }
};

}  // namespace pycm::cuda
