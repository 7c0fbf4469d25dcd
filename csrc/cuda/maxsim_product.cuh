// A 128 x 128 tile of products by mma.sync, for four warps: a warp owns 32 rows and all columns, so that whatever is taken
// over a row stays in a quad.
//
//        128 columns: 16 groups of 8
//      +--------------------------+
//      | warp 0: 32 rows          |    both operands K-major, in stages of 128 bytes (a line) of every row, in the 128-byte
//      | warp 1                   |    swizzle: by cp.async where rows are 16-byte aligned, else element by element
//      | warp 2                   |
//      | warp 3                   |
//      +--------------------------+
//
// fp32 is split in two TF32 values, three products of which are summed, the small ones first: what is lost is below
// 2^-20 |x||y|, besides the sum's own rounding. An infinity splits into NaN.
// Operations: 2 * 128 * 128 * dim (three times that in fp32). Bytes: 256 * dim elements through L2.
#pragma once

#include "cuda/maxsim.cuh"

namespace pycm::cuda {

inline constexpr int kRows = 128, kColumns = 128, kThreads = 128, kStages = 2;
inline constexpr int kLine = 128;                  // bytes: 4 steps of the tensor cores
inline constexpr int kGroups = kColumns / kGroup;  // 8 columns wide

struct ProductStages {
  char rows[kStages][kRows * kLine];
  char columns[kStages][kColumns * kLine];
};

// Rows that cp.async can take.
inline bool aligned(const VectorSets& sets) {
  const int64_t bytes = item_size(sets.dtype);
  return sets.dim_stride == 1 && reinterpret_cast<uintptr_t>(sets.data) % 16 == 0 &&
         sets.row_stride * bytes % 16 == 0 && (sets.ragged() || sets.item_stride * bytes % 16 == 0);
}

// 16 bytes of the vector at `offset`, from element d on, to shared memory; zeros behind its end.
template <int kBytes>
__device__ __forceinline__ void load_piece(char* to, const VectorSets& sets, bool aligned, int64_t offset, int64_t d) {
  constexpr int kElements = 16 / kBytes;
  const int64_t count = offset < 0 ? 0 : clamp_to(sets.dim - d, 0, kElements);
  const char* data = static_cast<const char*>(sets.data);
  if (aligned) {
    cp_async16_bytes(to, data + (count > 0 ? (offset + d) * kBytes : 0), static_cast<int>(count) * kBytes);
    return;
  }
  using Bits = std::conditional_t<kBytes == 2, uint16_t, uint32_t>;
#pragma unroll
  for (int e = 0; e < kElements; ++e)
    reinterpret_cast<Bits*>(to)[e] =
        e < count ? reinterpret_cast<const Bits*>(data)[offset + (d + e) * sets.dim_stride] : Bits{0};
}

// x = high + low, both representable in TF32: |low| <= 2^-11 |x|, what is lost is at most 2^-22 |x|.
__device__ __forceinline__ void split(uint32_t bits, uint32_t& high, uint32_t& low) {
  const float value = __uint_as_float(bits);
  high = float_to_tf32(value);
  low = float_to_tf32(value - __uint_as_float(high));
}

template <Mma M>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&a_low)[4],
                                         const uint32_t (&b)[2]) {
  if constexpr (M == Mma::kTF32) {
    uint32_t high[2], low[2];
    split(b[0], high[0], low[0]);
    split(b[1], high[1], low[1]);
    mma<M>(sum, a_low, high);
    mma<M>(sum, a, low);
    mma<M>(sum, a, high);
  } else {
    mma<M>(sum, a, b);
  }
}

// `line` of 128 vectors to a stage; offsets in elements, -1 for none. By the whole block.
template <Mma M>
__device__ __forceinline__ void load_line(char* stage, const VectorSets& sets, bool aligned, const int64_t* offsets,
                                          int line) {
  const int piece = threadIdx.x % 8;
  const int64_t d = (line * kLine + piece * 16) / kMmaBytes<M>;
#pragma unroll 4
  for (int row = threadIdx.x / 8; row < kRows; row += blockDim.x / 8)
    load_piece<kMmaBytes<M>>(stage + swizzle128(row * kLine + piece * 16), sets, aligned, offsets[row], d);
}

// One 32-byte step of a stage: 32 rows of this warp by 128 columns. sum[i][j] is 16 rows by 8 columns, as in mma.
template <Mma M>
__device__ __forceinline__ void multiply_step(float (&sum)[2][kGroups][4], const char* rows, const char* columns,
                                              int step) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint32_t a[2][4], a_low[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp * 32 + i * 16 + lane % 16;
    ldmatrix_x4(a[i], rows + swizzle128(row * kLine + step * 32 + lane / 16 * 16));
    if constexpr (M == Mma::kTF32) {
#pragma unroll
      for (int e = 0; e < 4; ++e) split(a[i][e], a[i][e], a_low[i][e]);
    }
  }
#pragma unroll
  for (int pair = 0; pair < kGroups / 2; ++pair) {
    const int row = pair * 16 + lane / 16 * 8 + lane % 8;
    uint32_t b[4];
    ldmatrix_x4(b, columns + swizzle128(row * kLine + step * 32 + lane / 8 % 2 * 16));
    const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      multiply<M>(sum[i][2 * pair], a[i], a_low[i], first);
      multiply<M>(sum[i][2 * pair + 1], a[i], a_low[i], second);
    }
  }
}

// sum (+)= line `line` of both; the first clears it.
template <Mma M>
__device__ __forceinline__ void multiply_line(float (&sum)[2][kGroups][4], const ProductStages& stages, int stage,
                                              int line, int64_t dim) {
  if (line == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kGroups; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] = 0;
  }
#pragma unroll 1  // more does not fit the registers
  for (int step = 0; step < 4 && line * kLine + step * 32 < dim * kMmaBytes<M>; ++step)
    multiply_step<M>(sum, stages.rows[stage], stages.columns[stage], step);
}

}  // namespace pycm::cuda
