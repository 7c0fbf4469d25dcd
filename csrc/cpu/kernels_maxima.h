// The maxima of late interaction by screen and verify: products in bf16 say which rows of an item may be the nearest of a
// vector, and those alone are multiplied in fp32. Included by a level's file that has vdpbf16ps.
//
//              panel [word][32] in bf16
//             +---------+---------+     A tile of 12 rows x 32 vectors in 24 accumulators, as in kernels_words.h; rows are
//   row i     |  sums   |  sums   |     read where they lie. The sums of an item go to `values`, 32 a row, in the first cache.
//             +---------+---------+     A row is a candidate of a vector unless its value is below the vector's largest by more
//   largest   |   max   |   max   |     than `margin`, twice what bf16 may err (maxsim_screen.h): then so is the fp32 product.
//
// A row costs 2 * words products for 32 vectors, half of fp32's; a candidate D / 16 multiply-adds, and one vector of normal
// data has 1.3 candidates of 180. If every row is a candidate the maxima take twice the time of the fp32 tile.
#pragma once

#include "cpu/kernels_words.h"

namespace pycm::cpu {
namespace {

// The fp32 product that decides: 64 lanes, then a tree. At most D / 64 + 7 roundings follow one another.
PYCM_INLINE float product_f32(const float* a, const float* b, int64_t dim) {
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64)
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l)
      sum[l] = _mm512_fmadd_ps(_mm512_loadu_ps(a + d + 16 * l), _mm512_loadu_ps(b + d + 16 * l), sum[l]);
  for (int l = 0; d < dim; d += 16, ++l) {
    const __mmask16 in = dim - d >= 16 ? __mmask16(~0u) : static_cast<__mmask16>((1u << (dim - d)) - 1);
    sum[l] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(in, a + d), _mm512_maskz_loadu_ps(in, b + d), sum[l]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[2]), _mm512_add_ps(sum[1], sum[3])));
}

struct MaximaPass {
  const MaximaTile& tile;
  __m512 largest[kVectors];
  const char* ahead;
  int lines;  // of `ahead` for each word

  template <int kHeight>
  PYCM_INLINE void step(int64_t first) {
    // Three rows to a pointer: base, base + stride and base + 2 stride are addresses, and twelve pointers do not fit.
    constexpr int kBases = (kHeight + 2) / 3;
    const int64_t stride = tile.word_stride * 4;
    const char* base[kBases];
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) base[i] = reinterpret_cast<const char*>(tile.words) + (first + 3 * i) * stride;
    const uint32_t* panel = tile.panel;
    __m512 sum[kHeight][kVectors];
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_setzero_ps();
    for (int64_t w = 0; w < tile.word_count; ++w) {
      for (int line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
      __m512bh column[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) column[j] = (__m512bh)_mm512_loadu_si512(panel + 16 * j);
#pragma GCC unroll 12
      for (int i = 0; i < kHeight; ++i) {
        const __m512bh element =
            (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int*>(base[i / 3] + (i % 3) * stride));
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], column[j], element);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kBases; ++i) base[i] += 4;
      panel += kPanelColumns;
    }
    float* out = tile.values + first * kPanelColumns;
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i) {
      const __m512 scale = _mm512_set1_ps(tile.scale == nullptr ? 1.0f : tile.scale[first + i]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        const __m512 value = _mm512_mul_ps(sum[i][j], scale);
        largest[j] = _mm512_max_ps(value, largest[j]);  // a NaN leaves it, and is a candidate all the same
        _mm512_storeu_ps(out + i * kPanelColumns + 16 * j, value);
      }
    }
  }

  PYCM_INLINE void products() {
    const int64_t words = (tile.count + 11) / 12 * tile.word_count;
    ahead = tile.ahead;
    lines = static_cast<int>((tile.ahead_bytes / 64 + words - 1) / words);
    for (__m512& l : largest) l = _mm512_set1_ps(-__builtin_inff());
    int64_t at = 0;
    for (; at + 12 <= tile.count; at += 12) step<12>(at);
    for (; at + 4 <= tile.count; at += 4) step<4>(at);
    for (; at < tile.count; ++at) step<1>(at);
  }

  // Candidates as row * 32 + column. Returns how many.
  PYCM_INLINE int64_t list() {
    __m512 cut[kVectors];
    __mmask16 used[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      cut[j] = _mm512_sub_ps(largest[j], _mm512_loadu_ps(tile.margin + 16 * j));
      const int columns = tile.columns - 16 * j;
      used[j] = columns >= 16 ? __mmask16(~0u) : static_cast<__mmask16>(columns <= 0 ? 0 : (1u << columns) - 1);
    }
    __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    uint32_t* out = tile.candidates;
    for (int64_t r = 0; r < tile.count; ++r)
      for (int j = 0; j < kVectors; ++j) {
        const __m512 value = _mm512_loadu_ps(tile.values + r * kPanelColumns + 16 * j);
        const __mmask16 hits = _mm512_mask_cmp_ps_mask(used[j], value, cut[j], _CMP_NLT_UQ);
        _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(hits, place));
        out += __builtin_popcount(hits);
        place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
      }
    return out - tile.candidates;
  }

  PYCM_INLINE void run() {
    products();
    const int64_t count = list();
    float* best = tile.best;
    for (int c = 0; c < tile.columns; ++c) best[c] = -__builtin_inff();
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t row = tile.candidates[i] / kPanelColumns, column = tile.candidates[i] % kPanelColumns;
      const float scale = tile.scale == nullptr ? 1.0f : tile.scale[row];
      const float value =
          product_f32(tile.vectors + column * tile.dim, tile.rows + row * tile.row_stride, tile.dim) * scale;
      // What is not finite leaves NaN, which stays.
      const float poison = value * 0.0f;
      best[column] = (value > best[column] ? value : best[column]) + poison;
    }
  }
};

void maxima_bf16(const MaximaTile& tile) { MaximaPass{tile, {}, nullptr, 0}.run(); }

// Writes round_up(dim, 32) elements; the sum of squares is that of the row.
float round_bf16(const float* row, int64_t dim, uint32_t* out) {
  __m512 square[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t d = 0; d < dim; d += 32) {
    const auto part = [&](int64_t at) PYCM_INLINE_LAMBDA {
      const int64_t left = dim - at;
      if (left >= 16) return _mm512_loadu_ps(row + at);
      return _mm512_maskz_loadu_ps(left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1), row + at);
    };
    const __m512 low = part(d), high = part(d + 16);
    _mm512_storeu_si512(out + d / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    square[0] = _mm512_fmadd_ps(low, low, square[0]);
    square[1] = _mm512_fmadd_ps(high, high, square[1]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(square[0], square[1]));
}

}  // namespace
}  // namespace pycm::cpu
