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

PYCM_INLINE __m512 load16(const float* row) { return _mm512_loadu_ps(row); }
PYCM_INLINE __m512 load16(const float* row, __mmask16 in) { return _mm512_maskz_loadu_ps(in, row); }
PYCM_INLINE __m512 widened(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
PYCM_INLINE __m512 load16(const uint16_t* row) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
}
PYCM_INLINE __m512 load16(const uint16_t* row, __mmask16 in) { return widened(_mm256_maskz_loadu_epi16(in, row)); }

// The fp32 product that decides: 64 lanes, then a tree. At most D / 64 + 7 roundings follow one another.
template <class Row>
PYCM_INLINE float product_f32(const float* a, const Row* b, int64_t dim) {
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64)
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) sum[l] = _mm512_fmadd_ps(load16(a + d + 16 * l), load16(b + d + 16 * l), sum[l]);
  for (int l = 0; d < dim; d += 16, ++l) {
    const __mmask16 in = dim - d >= 16 ? __mmask16(~0u) : static_cast<__mmask16>((1u << (dim - d)) - 1);
    sum[l] = _mm512_fmadd_ps(load16(a + d, in), load16(b + d, in), sum[l]);
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
        int element;
        __builtin_memcpy(&element, base[i / 3] + (i % 3) * stride, 4);  // rows of bf16 may lie at odd halves
        const __m512bh row = (__m512bh)_mm512_set1_epi32(element);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], column[j], row);
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
      const float* vector = tile.vectors + column * tile.dim;
      const float value =
          scale * (tile.rows != nullptr
                       ? product_f32(vector, tile.rows + row * tile.row_stride, tile.dim)
                       : product_f32(vector, reinterpret_cast<const uint16_t*>(tile.words) + 2 * row * tile.word_stride,
                                     tile.dim));
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

float square_bf16(const uint32_t* row, int64_t words) {
  __m512 square = _mm512_setzero_ps();
  for (int64_t w = 0; w < words; w += 16) {
    const __mmask16 in = words - w >= 16 ? __mmask16(~0u) : static_cast<__mmask16>((1u << (words - w)) - 1);
    const __m512bh part = (__m512bh)_mm512_maskz_loadu_epi32(in, row + w);
    square = _mm512_dpbf16_ps(square, part, part);
  }
  return _mm512_reduce_add_ps(square);
}

}  // namespace
}  // namespace pycm::cpu
