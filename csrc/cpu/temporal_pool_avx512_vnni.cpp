#define PYCM_LEVEL_AVX512
#include "cpu/temporal_pool_impl.h"
// After it, whose vectors it has.
#include "cpu/temporal_pool_int8.h"

namespace pycm::cpu {
namespace {

struct VnniWord : ByteWord {
  using Sum = Integers;
  static PYCM_INLINE Sum zero() { return {_mm512_setzero_si512()}; }
  static PYCM_INLINE Integers column(const Word* b) { return {_mm512_loadu_si512(b)}; }
  static PYCM_INLINE Integers row(const Word* a) { return {_mm512_set1_epi32(static_cast<int>(*a))}; }
  static PYCM_INLINE Sum add(Sum sum, Integers row, Integers column) {
    return {_mm512_dpbusd_epi32(sum.v, row.v, column.v)};
  }
  static PYCM_INLINE VecF value(Sum sum, const Word* a, const Word* b) {
    return VecF{_mm512_cvtepi32_ps(_mm512_sub_epi32(sum.v, _mm512_loadu_si512(correction(b))))} * scale(a, b);
  }
};

}  // namespace

const Int8Kernels recurrent_int8_avx512_vnni = {product<VnniWord>, round_int8};

}  // namespace pycm::cpu
