#define PYCM_LEVEL_AVX512
#include "cpu/temporal_pool_impl.h"

namespace pycm::cpu {
namespace {

// A word is two elements; their products are added to the sum in fp32.
struct Bf16Word : SumWord<VecF> {
  using Word = uint32_t;
  static PYCM_INLINE __m512i column(const Word* b) { return _mm512_loadu_si512(b); }
  static PYCM_INLINE __m512i row(const Word* a) { return _mm512_set1_epi32(static_cast<int>(*a)); }
  static PYCM_INLINE VecF add(VecF sum, __m512i row, __m512i column) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)column, (__m512bh)row)};
  }
};

void round_bf16(const float* in, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(in + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)rounded);
  }
  if (i == count) return;
  const __mmask16 rest = static_cast<__mmask16>((1u << (count - i)) - 1);
  const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(rest, in + i));
  _mm256_mask_storeu_epi16(out + i, rest, (__m256i)rounded);
}

void pair_bf16(const float* even, const float* odd, int64_t count, float* out) {
  const auto round = [](__mmask16 mask, const float* row) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, row)));
  };
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1 : 0xffff);
    const __m512i high = _mm512_slli_epi32(round(mask, odd + i), 16);
    _mm512_mask_storeu_epi32(out + i, mask, _mm512_or_si512(round(mask, even + i), high));
  }
}

}  // namespace

const Bf16Kernels recurrent_bf16_avx512 = {product<Bf16Word>, round_bf16, pair_bf16};

}  // namespace pycm::cpu
