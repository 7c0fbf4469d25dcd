// The tiles of similarity.cu: how rows come into a stage of shared memory, and how a stage is multiplied.
#pragma once

#include "cuda/similarity_store.cuh"

namespace pycm::cuda {

constexpr int kRowBytes = 128;  // of a stage

template <bool kLarge, bool kConvert>
struct TileShape {
  static constexpr int kM = kLarge ? 128 : 64, kN = kM;
  static constexpr int kWarpsM = kLarge ? 2 : 4, kWarpsN = kLarge ? 4 : 1;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kTilesM = kM / kWarpsM / 16, kTilesN = kN / kWarpsN / 8;  // of a warp
  static constexpr int kStages = kLarge || kConvert ? 2 : 3;
  static constexpr int kDepth = kConvert ? 32 : 64;  // elements a stage
  static constexpr int kStageBytes = (kM + kN) * kRowBytes;
  static constexpr int kInfoBytes = (kM + kN) * static_cast<int>(sizeof(RowInfo<float>));
  static constexpr int kSharedBytes = kStages * kStageBytes + kInfoBytes + static_cast<int>(sizeof(TilePlace));
  // Two large blocks leave a thread 128 registers: enough but for the converted rows on their way, and for the code that
  // is made for sm_90a, which would spill.
  static constexpr int kBlocks = kLarge ? kConvert || PYCM_SM90 ? 1 : 2 : kConvert ? 3 : 4;
};

// Rows [0, count) of one side of a tile.
struct TileRows {
  const char* data;
  int64_t row_stride, dim_stride, dim;
  int count;
  DType dtype;

  __device__ TileRows(const SimilarityProblem& p, const Operand& side, const char* matrix, int64_t first, int rows)
      : data(matrix + first * side.row_stride * element_bytes(p.dtype)),
        row_stride(side.row_stride),
        dim_stride(side.dim_stride),
        dim(p.dim),
        count(rows),
        dtype(p.dtype) {}

  // Whether every run of `bytes` from a multiple of it can be read at once.
  __device__ bool aligned(int bytes) const {
    return dim_stride == 1 && reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
           row_stride * element_bytes(dtype) % bytes == 0;
  }
};

// ---- raw rows ----

// Elements [begin, begin + 64) of kRows rows; zeros where there are none. Eight threads a row, 16 bytes each.
template <int kRows, int kThreads>
__device__ __forceinline__ void copy_rows(const TileRows& rows, int64_t begin, char* stage) {
  const bool aligned = rows.aligned(16);
  const int first = static_cast<int>(threadIdx.x) / 8;
  const int64_t d = begin + threadIdx.x % 8 * 8;
  const int present = static_cast<int>(max(int64_t{0}, min(int64_t{8}, rows.dim - d)));
  const uint16_t* from = reinterpret_cast<const uint16_t*>(rows.data) + first * rows.row_stride + d * rows.dim_stride;
  char* to = stage + swizzle128(threadIdx.x * 16);
#pragma unroll 1
  for (int r = first; r < kRows; r += kThreads / 8) {
    const int count = r < rows.count ? present : 0;
    if (aligned) {
      cp_async16_bytes(to, count > 0 ? from : reinterpret_cast<const uint16_t*>(rows.data), 2 * count);
    } else {
      uint32_t words[4] = {};
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < count) words[e / 2] |= uint32_t{from[e * rows.dim_stride]} << e % 2 * 16;
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
    from += kThreads / 8 * rows.row_stride;
    to += kThreads * 16;
  }
}

// ---- converted rows: read into registers while the stage before is multiplied, then split and stored ----

// Eight threads read 32 elements of a row, four each; a warp's rows are such that its stores meet no bank twice.
constexpr int kEach = 4;
__device__ __forceinline__ int convert_row(int pass, int threads) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, quarter = static_cast<int>(threadIdx.x) % kWarp / 8;
  return pass * (threads / 8) + (warp & 3) + quarter * 4 + (warp >> 2) * 16;
}

__device__ __forceinline__ void read_elements(const TileRows& rows, bool aligned, int r, int64_t d,
                                              float (&value)[kEach]) {
#pragma unroll
  for (int e = 0; e < kEach; ++e) value[e] = 0;
  if (r >= rows.count || d >= rows.dim) return;
  const int64_t first = r * rows.row_stride + d * rows.dim_stride;
  if (!aligned || d + kEach > rows.dim) {
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      if (d + e < rows.dim) value[e] = load_float(rows.dtype, rows.data, first + e * rows.dim_stride);
  } else if (rows.dtype == DType::kFloat32) {
    const float4 four = load_readonly(reinterpret_cast<const float4*>(rows.data + first * 4));
    value[0] = four.x, value[1] = four.y, value[2] = four.z, value[3] = four.w;
  } else {
    const uint2 four = load_readonly(reinterpret_cast<const uint2*>(rows.data + first * 2));
    value[0] = widen(rows.dtype, static_cast<uint16_t>(four.x)), value[1] = widen(rows.dtype, four.x >> 16);
    value[2] = widen(rows.dtype, static_cast<uint16_t>(four.y)), value[3] = widen(rows.dtype, four.y >> 16);
  }
}

// Four elements as fp16 numbers: the nearest to (element - shift - moved) * factor, and what that leaves.
struct Parts {
  uint2 high, low;
};
template <bool kSplit>
__device__ __forceinline__ Parts split_elements(const float (&value)[kEach], const float (&moved)[kEach],
                                                int64_t present, const RowInfo<float>& info) {
  float scaled[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) scaled[e] = e < present ? (value[e] - info.shift - moved[e]) * info.factor : 0;
  const uint32_t high[2] = {pack_half2(scaled[0], scaled[1]), pack_half2(scaled[2], scaled[3])};
  Parts parts = {make_uint2(high[0], high[1]), make_uint2(0, 0)};
  if constexpr (kSplit) {
    // Where a low part lies halfway between two fp16 numbers, neighbours are rounded to different sides: in rows of equal
    // elements such errors would add up.
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      scaled[e] = (scaled[e] - half_to_float(static_cast<uint16_t>(high[e / 2] >> e % 2 * 16))) *
                  (e % 2 == 0 ? 1 - 0x1p-14f : 1 + 0x1p-14f);
    parts.low = make_uint2(pack_half2(scaled[0], scaled[1]), pack_half2(scaled[2], scaled[3]));
  }
  return parts;
}

// Bytes 0-63 of a row of the stage are the high parts of 32 elements, 64-127 the low ones.
template <bool kSplit>
__device__ __forceinline__ void store_elements(const float (&value)[kEach], const float (&moved)[kEach],
                                               int64_t present, const RowInfo<float>& info, int r, char* stage) {
  const Parts parts = split_elements<kSplit>(value, moved, present, info);
  const uint32_t offset = r * kRowBytes + threadIdx.x % 8 * 8;
  *reinterpret_cast<uint2*>(stage + swizzle128(offset)) = parts.high;
  if constexpr (kSplit) *reinterpret_cast<uint2*>(stage + swizzle128(offset + 64)) = parts.low;
}

// The part of a stage on its way through this thread's registers.
template <class Shape, bool kSplit>
struct Converter {
  static constexpr int kPasses = Shape::kM * 8 / Shape::kThreads;
  float x[kPasses][kEach], y[kPasses][kEach], moved[kEach];
  int64_t present;

  __device__ __forceinline__ void read(const SimilarityProblem& p, const TileRows& x_rows, bool x_aligned,
                                       const TileRows& y_rows, bool y_aligned, const float* origin, int64_t begin) {
    const int64_t d = begin + threadIdx.x % 8 * kEach;
    present = p.dim - d;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      read_elements(x_rows, x_aligned, convert_row(i, Shape::kThreads), d, x[i]);
      read_elements(y_rows, y_aligned, convert_row(i, Shape::kThreads), d, y[i]);
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) moved[e] = origin != nullptr && e < present ? origin[d + e] : 0;
  }

  __device__ __forceinline__ void store(const TileRows& x_rows, const TileRows& y_rows, const RowInfo<float>* info,
                                        char* stage) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int r = convert_row(i, Shape::kThreads);
      store_elements<kSplit>(x[i], moved, r < x_rows.count ? present : 0, info[r], r, stage);
      store_elements<kSplit>(y[i], moved, r < y_rows.count ? present : 0, info[Shape::kM + r], r,
                             stage + Shape::kM * kRowBytes);
    }
  }
};

// ---- the product of one stage ----

// 16 elements along K, number `step`, of 16 rows of x, and of 8 * kTilesN rows of y.
__device__ __forceinline__ void load_x(uint32_t (&a)[4], int rows, int step) {
  const int lane = lane_index();
  ldmatrix_x4(a, dynamic_shared() + rows +
                     (swizzle128(lane % 16 * kRowBytes + lane / 16 * 16) ^ step * 32));  // bits the rest leaves at 0
}
template <int kTilesN>
__device__ __forceinline__ void load_y(uint32_t (&b)[kTilesN][2], int rows, int step) {
  const int lane = lane_index();
#pragma unroll
  for (int j = 0; j < kTilesN; j += 2) {
    uint32_t four[4];
    ldmatrix_x4(four, dynamic_shared() + rows + j * 8 * kRowBytes +
                          (swizzle128((lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16) ^ step * 32));
    b[j][0] = four[0], b[j][1] = four[1], b[j + 1][0] = four[2], b[j + 1][1] = four[3];
  }
}

// `x`, `y`: where the warp's first rows of the stage lie in shared memory. In a small tile only the first `used` columns of
// tiles exist.
template <Mma kMma, class Shape, bool kConvert, bool kSplit>
__device__ __forceinline__ void multiply(int x, int y, int used, float (&sums)[Shape::kTilesM][Shape::kTilesN][4]) {
  constexpr int kTilesN = Shape::kTilesN;
  constexpr int kPairs = kConvert && !kSplit ? 1 : 2;  // of steps along K that are added before they join the sum
#pragma unroll 1
  for (int pair = 0; pair < kPairs; ++pair) {
    const int first = kSplit ? pair : 2 * pair, second = kSplit ? 2 + pair : 2 * pair + 1;
    uint32_t b[kTilesN][2], b2[kTilesN][2];
    load_y<kTilesN>(b, y, first);
    load_y<kTilesN>(b2, y, second);
#pragma unroll
    for (int i = 0; i < Shape::kTilesM; ++i) {
      uint32_t a[4], a2[4];
      load_x(a, x + i * 16 * kRowBytes, first);
      load_x(a2, x + i * 16 * kRowBytes, second);
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        if (j >= used) continue;
        float part[4] = {};
        mma<kMma>(part, a2, b2[j]);  // of low parts when split: the smallest first
        if constexpr (kSplit) {
          mma<kMma>(part, a2, b[j]);
          mma<kMma>(part, a, b2[j]);
        }
        mma<kMma>(part, a, b[j]);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] += part[e];
      }
    }
  }
}

}  // namespace pycm::cuda
