// The screens of kernels.h in bf16 and int8, and what prepares rows for them. A level's file defines PYCM_LEVEL_<NAME> and
// includes this, alone or through kernels_impl.h.
//
// A word of four bytes takes the place of an fp32 element, so the tile is that of the fp32 product: height x 32 columns
// in registers, two vectors of the panel and `height` broadcast words a step, and no split over D. One word is
//   int8  4 dimensions: u8 of the panel (the element + 128) times s8 of the query, summed exactly in 32 bits; sums
//         start from -128 * (sum of the query's elements). vpdpbusd takes one instruction for 16 words; without it
//         vpmaddwd multiplies even and odd bytes apart, widened to 16 bits, where no product can saturate.
//   bf16  2 dimensions: vdpbf16ps, or two fp32 multiply-adds.
// On AVX-512 at 12 x 32 that is 24 products for 14 loads; at D = 512 the epilogue adds 5 %.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtype.h"
#include "cpu/kernels.h"

namespace pycm::cpu {
namespace {

#include "cpu/vec.h"

#define PYCM_INLINE inline __attribute__((always_inline))
#define PYCM_INLINE_LAMBDA __attribute__((always_inline))

constexpr int kVectors = 2;
template <class V>
constexpr int kColumns = kVectors * V::N;

// Tile heights: as many accumulators as the registers hold, and shorter ones for the last rows.
#if defined(PYCM_LEVEL_AVX512)
constexpr int kFullHeight = 12, kHeightStep = 4;
#elif defined(PYCM_LEVEL_AVX2)
constexpr int kFullHeight = 6, kHeightStep = 3;
#else
constexpr int kFullHeight = 4, kHeightStep = 4;
#endif

// The epilogue of every screen: two vectors of sums of query i, of the panel's columns from `first` on, are compared.
struct Compare {
  Screen& screen;
  uint32_t any = 0;
  explicit Compare(Screen& target) : screen(target) {}

  PYCM_INLINE void row(int i, int first, const VecF (&sums)[kVectors]) {
    const VecF cut = VecF::set(screen.cut[i]), factor = VecF::set(screen.factor[i]);
    const VecF share = VecF::set(screen.loss_share[i]), query_norm = VecF::set(screen.query_norm[i]);
    VecF value[kVectors], upper[kVectors];
    uint32_t hits = 0;
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const int at = first + j * VecF::N;
      value[j] = fma(factor, VecF::load(screen.bias + at), sums[j] * VecF::load(screen.scale + at));
      upper[j] = fma(query_norm, VecF::load(screen.loss + at), fma(share, VecF::load(screen.norm + at), value[j]));
      hits |= not_less(upper[j], cut) << (first + j * VecF::N);
    }
    if (first == 0) screen.hits[i] = screen.sure_hits[i] = 0;
    screen.hits[i] |= hits;
    any |= hits;
    if (hits == 0) return;
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) value[j].store(screen.values[i] + first + j * VecF::N);
    if (screen.sure != nullptr) mark_sure(i, first, value, upper);
  }

  // value - error = 2 value - upper
  PYCM_INLINE void mark_sure(int i, int first, const VecF (&value)[kVectors], const VecF (&upper)[kVectors]) {
    const VecF sure = VecF::set(screen.sure[i]), bias_error = VecF::set(screen.bias_error[i]);
    uint32_t hits = 0;
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const VecF lower = (value[j] + value[j]) - upper[j];
      hits |= less(sure, fma(bias_error, VecF::load(screen.bias + first + j * VecF::N), lower))
              << (first + j * VecF::N);
    }
    screen.sure_hits[i] |= hits;
  }
};

// Sums for all pairs of a tile; an Op is the arithmetic of one word: its Row (a broadcast query word), Column (a vector of
// panel words) and Sum.
template <class Op, int kHeight>
PYCM_INLINE bool screen_words(const ScreenTile& tile, Screen& screen) {
  Compare compare(screen);
  for (int first = 0; first < kPanelColumns; first += kColumns<VecF>) {
    typename Op::Sum sums[kHeight][kVectors];
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[i][j] = Op::start(tile.start, i);
    const uint32_t* queries = tile.queries;
    const uint32_t* panel = tile.panel + first;
    const uint32_t* next = tile.next + first;
    for (int64_t w = 0; w < tile.words; ++w) {
      // Panels lie apart, where no processor expects the next one.
      for (int64_t at = 0; at < kColumns<VecF>; at += 16) __builtin_prefetch(next + at, 0, 2);
      next += kPanelColumns;
      typename Op::Column column[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) column[j] = Op::column(panel + j * VecF::N);
#pragma GCC unroll 12
      for (int i = 0; i < kHeight; ++i) {
        const typename Op::Row row = Op::row(queries + i, kHeight);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) sums[i][j] = Op::add(sums[i][j], row, column[j]);
      }
      queries += Op::kQueryWords * kHeight;
      panel += kPanelColumns;
    }
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i) {
      VecF values[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) values[j] = Op::value(sums[i][j]);
      compare.row(i, first, values);
    }
  }
  return compare.any != 0;
}

template <class Op>
PYCM_INLINE bool screen_heights(const ScreenTile& tile, Screen& screen) {
  switch (tile.height / kHeightStep) {
    case 1: return screen_words<Op, kHeightStep>(tile, screen);
#if defined(PYCM_LEVEL_AVX512)
    case 2: return screen_words<Op, 2 * kHeightStep>(tile, screen);
#endif
    default: return screen_words<Op, kFullHeight>(tile, screen);
  }
}

// ---- the arithmetic of one word ----

#if defined(PYCM_LEVEL_AVX512)

// Even and odd bytes of a panel's word against pairs of 16 bits.
struct Int8Word {
  static constexpr int kQueryWords = 2;
  using Sum = __m512i;
  struct Row {
    __m512i even, odd;
  };
  struct Column {
    __m512i even, odd;
  };
  static PYCM_INLINE Sum start(const int32_t* start, int i) { return _mm512_set1_epi32(start[i]); }
  static PYCM_INLINE Row row(const uint32_t* q, int height) {
    return {_mm512_set1_epi32(static_cast<int>(q[0])), _mm512_set1_epi32(static_cast<int>(q[height]))};
  }
  static PYCM_INLINE Column column(const uint32_t* p) {
    const __m512i bytes = _mm512_loadu_si512(p);
    return {_mm512_and_si512(bytes, _mm512_set1_epi32(0x00ff00ff)), _mm512_srli_epi16(bytes, 8)};
  }
  static PYCM_INLINE Sum add(Sum sum, const Row& q, const Column& g) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(q.even, g.even));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(q.odd, g.odd));
  }
  static PYCM_INLINE VecF value(Sum sum) { return {_mm512_cvtepi32_ps(sum)}; }
};

#if defined(__AVX512VNNI__)
struct VnniWord {
  static constexpr int kQueryWords = 1;
  using Sum = __m512i;
  using Row = __m512i;
  using Column = __m512i;
  static PYCM_INLINE Sum start(const int32_t* start, int i) { return _mm512_set1_epi32(start[i]); }
  static PYCM_INLINE Row row(const uint32_t* q, int) { return _mm512_set1_epi32(static_cast<int>(q[0])); }
  static PYCM_INLINE Column column(const uint32_t* p) { return _mm512_loadu_si512(p); }
  // GCC 12 copies every sum around the intrinsic, which halves the rate.
  static PYCM_INLINE Sum add(Sum sum, Row q, Column g) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(g), "v"(q));
    return sum;
  }
  static PYCM_INLINE VecF value(Sum sum) { return {_mm512_cvtepi32_ps(sum)}; }
};
#endif

#if defined(__AVX512BF16__)
struct NativeBf16Word {
  static constexpr int kQueryWords = 1;
  using Sum = __m512;
  using Row = __m512i;
  using Column = __m512i;
  static PYCM_INLINE Sum start(const int32_t*, int) { return _mm512_setzero_ps(); }
  static PYCM_INLINE Row row(const uint32_t* q, int) { return _mm512_set1_epi32(static_cast<int>(q[0])); }
  static PYCM_INLINE Column column(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static PYCM_INLINE Sum add(Sum sum, Row q, Column g) { return _mm512_dpbf16_ps(sum, (__m512bh)g, (__m512bh)q); }
  static PYCM_INLINE VecF value(Sum sum) { return {sum}; }
};
#endif

#elif defined(PYCM_LEVEL_AVX2)

struct Int8Word {
  static constexpr int kQueryWords = 2;
  using Sum = __m256i;
  struct Row {
    __m256i even, odd;
  };
  struct Column {
    __m256i even, odd;
  };
  static PYCM_INLINE Sum start(const int32_t* start, int i) { return _mm256_set1_epi32(start[i]); }
  static PYCM_INLINE Row row(const uint32_t* q, int height) {
    return {_mm256_set1_epi32(static_cast<int>(q[0])), _mm256_set1_epi32(static_cast<int>(q[height]))};
  }
  static PYCM_INLINE Column column(const uint32_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_and_si256(bytes, _mm256_set1_epi32(0x00ff00ff)), _mm256_srli_epi16(bytes, 8)};
  }
  static PYCM_INLINE Sum add(Sum sum, const Row& q, const Column& g) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(q.even, g.even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(q.odd, g.odd));
  }
  static PYCM_INLINE VecF value(Sum sum) { return {_mm256_cvtepi32_ps(sum)}; }
};

// AVX-VNNI: the VEX form, for processors without AVX-512. (kernels_avx2_vnni.cpp names the encoding.)
#if defined(PYCM_VPDPBUSD)
struct VnniWord {
  static constexpr int kQueryWords = 1;
  using Sum = __m256i;
  using Row = __m256i;
  using Column = __m256i;
  static PYCM_INLINE Sum start(const int32_t* start, int i) { return _mm256_set1_epi32(start[i]); }
  static PYCM_INLINE Row row(const uint32_t* q, int) { return _mm256_set1_epi32(static_cast<int>(q[0])); }
  static PYCM_INLINE Column column(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static PYCM_INLINE Sum add(Sum sum, Row q, Column g) {
    asm(PYCM_VPDPBUSD " %2, %1, %0" : "+x"(sum) : "x"(g), "x"(q));
    return sum;
  }
  static PYCM_INLINE VecF value(Sum sum) { return {_mm256_cvtepi32_ps(sum)}; }
};
#endif

#else

struct Int8Word {
  static constexpr int kQueryWords = 2;
  struct Sum {
    int32_t lane[VecF::N];
  };
  struct Row {
    int32_t q[4];
  };
  struct Column {
    uint32_t words[VecF::N];
  };
  static PYCM_INLINE Sum start(const int32_t* start, int i) {
    Sum sum;
    for (int32_t& lane : sum.lane) lane = start[i];
    return sum;
  }
  static PYCM_INLINE Row row(const uint32_t* q, int height) {
    const uint32_t even = q[0], odd = q[height];
    return {{static_cast<int16_t>(even), static_cast<int16_t>(odd), static_cast<int16_t>(even >> 16),
             static_cast<int16_t>(odd >> 16)}};
  }
  static PYCM_INLINE Column column(const uint32_t* p) {
    Column column;
    for (int l = 0; l < VecF::N; ++l) column.words[l] = p[l];
    return column;
  }
  static PYCM_INLINE Sum add(Sum sum, const Row& row, const Column& column) {
    for (int l = 0; l < VecF::N; ++l)
      for (int d = 0; d < 4; ++d) sum.lane[l] += row.q[d] * static_cast<int32_t>(column.words[l] >> (8 * d) & 0xff);
    return sum;
  }
  static PYCM_INLINE VecF value(const Sum& sum) { return VecF::load(sum.lane); }
};

#endif

// bf16 as two fp32 multiply-adds; the query's words are its two elements in fp32.
struct Bf16Word {
  static constexpr int kQueryWords = 2;
  using Sum = VecF;
  struct Row {
    VecF even, odd;
  };
  struct Column {
    VecF even, odd;
  };
  static PYCM_INLINE Sum start(const int32_t*, int) { return VecF::zero(); }
  static PYCM_INLINE Row row(const uint32_t* q, int height) {
    return {VecF::set(float_from_bits(q[0])), VecF::set(float_from_bits(q[height]))};
  }
  static PYCM_INLINE Column column(const uint32_t* p) { return {low_bf16(p), high_bf16(p)}; }
  static PYCM_INLINE Sum add(Sum sum, const Row& q, const Column& g) {
    return fma(q.odd, g.odd, fma(q.even, g.even, sum));
  }
  static PYCM_INLINE VecF value(Sum sum) { return sum; }
};

// ---- queries in the layout of the arithmetic ----

// [word][part][height]
template <int kParts, class Split>
PYCM_INLINE void pack_split(const uint32_t* rows, int64_t row_stride, int count, int64_t words, int height,
                            uint32_t* out, Split split) {
  for (int64_t w = 0; w < words; ++w)
    for (int r = 0; r < height; ++r) {
      const uint32_t word = r < count ? rows[r * row_stride + w] : 0;
      for (int part = 0; part < kParts; ++part) out[(w * kParts + part) * height + r] = split(word, part);
    }
}

[[maybe_unused]] void pack_whole(const uint32_t* rows, int64_t row_stride, int count, int64_t words, int height,
                                 uint32_t* out) {
  pack_split<1>(rows, row_stride, count, words, height, out, [](uint32_t word, int) { return word; });
}

// Even and odd bytes, each sign-extended to 16 bits.
[[maybe_unused]] void pack_queries_i8(const uint32_t* rows, int64_t row_stride, int count, int64_t words, int height,
                                      uint32_t* out) {
  pack_split<2>(rows, row_stride, count, words, height, out, [](uint32_t word, int part) {
    const uint16_t low = static_cast<uint16_t>(static_cast<int8_t>(word >> (8 * part)));
    const uint16_t high = static_cast<uint16_t>(static_cast<int8_t>(word >> (8 * part + 16)));
    return uint32_t{high} << 16 | low;
  });
}

[[maybe_unused]] void pack_queries_bf16(const uint32_t* rows, int64_t row_stride, int count, int64_t words, int height,
                                        uint32_t* out) {
  pack_split<2>(rows, row_stride, count, words, height, out,
                [](uint32_t word, int part) { return part == 0 ? word << 16 : word & 0xffff0000u; });
}

}  // namespace
}  // namespace pycm::cpu
