// Words of four 8-bit elements for the product of temporal_pool_impl.h, and how rows become such words.
//
// With s and t the scales, u = q + 128 the codes that have no sign and w those of the weights:
//   sum over d of x[d] y[d] ~ s t sum q w = s t (sum u w - 128 sum w), the last sum being packed beside the weights.
// One word of both costs vpdpbusd one instruction a vector, and the levels without it four: bytes are widened to 16 bits,
// and vpmaddwd adds the products of two.

namespace pycm::cpu {
namespace {

// What is common to all: the tail of a row's words, a[kHeight] or b[columns] apart.
struct ByteWord {
  using Vec = VecF;
  using Word = uint32_t;
  static constexpr int64_t kChain = std::numeric_limits<int64_t>::max(), kTail = kInt8Tail;
  static PYCM_INLINE VecF scale(const Word* a, const Word* b) {
    return VecF::set(float_from_bits(*a)) * VecF::load(reinterpret_cast<const float*>(b));
  }
  static const Word* correction(const Word* b) { return b + kColumns<VecF>; }
};

#if defined(PYCM_LEVEL_AVX512)

struct Integers {
  __m512i v;
};

struct MaddWord : ByteWord {
  struct Sum {
    __m512i low, high;  // of columns 0 to 7, and 8 to 15; two sums each
  };
  using Column = Sum;
  static PYCM_INLINE Sum zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  static PYCM_INLINE Column column(const Word* b) {
    const auto half = [](const Word* p) {
      return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    };
    return {half(b), half(b + 8)};
  }
  static PYCM_INLINE Integers row(const Word* a) {
    return {_mm512_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(static_cast<int>(*a))))};
  }
  static PYCM_INLINE Sum add(Sum sum, Integers row, Column column) {
    return {_mm512_add_epi32(sum.low, _mm512_madd_epi16(row.v, column.low)),
            _mm512_add_epi32(sum.high, _mm512_madd_epi16(row.v, column.high))};
  }
  static PYCM_INLINE VecF value(Sum sum, const Word* a, const Word* b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512i all = _mm512_add_epi32(_mm512_permutex2var_epi32(sum.low, even, sum.high),
                                         _mm512_permutex2var_epi32(sum.low, odd, sum.high));
    return VecF{_mm512_cvtepi32_ps(_mm512_sub_epi32(all, _mm512_loadu_si512(correction(b))))} * scale(a, b);
  }
};

#elif defined(PYCM_LEVEL_AVX2)

struct Integers {
  __m256i v;
};

struct MaddWord : ByteWord {
  struct Sum {
    __m256i low, high;  // of columns 0 to 3, and 4 to 7; two sums each
  };
  using Column = Sum;
  static PYCM_INLINE Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static PYCM_INLINE Column column(const Word* b) {
    const auto half = [](const Word* p) {
      return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    };
    return {half(b), half(b + 4)};
  }
  static PYCM_INLINE Integers row(const Word* a) {
    return {_mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(static_cast<int>(*a))))};
  }
  static PYCM_INLINE Sum add(Sum sum, Integers row, Column column) {
    return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(row.v, column.low)),
            _mm256_add_epi32(sum.high, _mm256_madd_epi16(row.v, column.high))};
  }
  static PYCM_INLINE VecF value(Sum sum, const Word* a, const Word* b) {
    const __m256i mixed = _mm256_hadd_epi32(sum.low, sum.high);  // columns 0 1 4 5, 2 3 6 7
    const __m256i all = _mm256_permute4x64_epi64(mixed, 0xd8);
    const __m256i less = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(correction(b)));
    return VecF{_mm256_cvtepi32_ps(_mm256_sub_epi32(all, less))} * scale(a, b);
  }
};

#else  // The compiler's vectors: the product of two codes fits 16 bits.

typedef int16_t Int16s __attribute__((vector_size(16)));
typedef uint16_t Uint16s __attribute__((vector_size(16)));
typedef int32_t Int32s __attribute__((vector_size(16)));
typedef uint32_t Uint32s __attribute__((vector_size(16)));

struct MaddWord : ByteWord {
  struct Sum {
    Uint32s v;
  };
  struct Column {
    Int16s even, odd;  // bytes 0 and 2, 1 and 3
  };
  static PYCM_INLINE Sum zero() { return {Uint32s{}}; }
  static PYCM_INLINE Column column(const Word* b) {
    Uint16s pairs;
    __builtin_memcpy(&pairs, b, sizeof pairs);
    return {(Int16s)(pairs << 8) >> 8, (Int16s)pairs >> 8};
  }
  static PYCM_INLINE Column row(const Word* a) {
    const Uint16s pairs = (Uint16s)(Uint32s{} + *a);
    return {(Int16s)(pairs & 0xff), (Int16s)(pairs >> 8)};
  }
  static PYCM_INLINE Sum add(Sum sum, Column row, Column column) {
    const auto both = [](Int16s product) {
      return (Uint32s)((Int32s)((Uint32s)product << 16) >> 16) + (Uint32s)((Int32s)product >> 16);
    };
    return {sum.v + both(row.even * column.even) + both(row.odd * column.odd)};
  }
  static PYCM_INLINE VecF value(Sum sum, const Word* a, const Word* b) {
    VecF result;
    for (int l = 0; l < VecF::N; ++l)
      result.v[l] = static_cast<float>(static_cast<int32_t>(sum.v[l] - correction(b)[l]));
    return result * scale(a, b);
  }
};

#endif

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

void round_int8(const float* row, int64_t dim, bool weights, uint32_t* words) {
  constexpr uint32_t kInfinity = 0x7f800000;
  constexpr float kLeast = 0x1p-100f;      // whose reciprocal is finite
  constexpr float kToInteger = 0x1.8p23f;  // what is added to it is rounded to an integer, ties to even
  uint32_t most = 0;                       // of the values' bits, which order them as the values do
  for (int64_t d = 0; d < dim; ++d) {
    const uint32_t size = bits_of(row[d]) & 0x7fffffff;
    most = size > most ? size : most;
  }
  const float largest = float_from_bits(most);
  const bool zero = most >= kInfinity || largest < kLeast;
  const float factor = zero ? 0 : 127 / largest;
  const int64_t depth = (dim + 3) / 4;
  auto* code = reinterpret_cast<unsigned char*>(words);
  const uint32_t shift = weights ? 0 : 128;
  words[depth - 1] = 0;
  uint32_t sum = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const uint32_t q = zero ? 0 : bits_of(row[d] * factor + kToInteger) - bits_of(kToInteger);
    code[d] = static_cast<unsigned char>(q + shift);
    sum += q;
  }
  words[depth] = most >= kInfinity ? kInfinity + 1 : bits_of(zero ? 0 : largest / 127);
  words[depth + 1] = weights ? 128 * sum : 0;
}

}  // namespace
}  // namespace pycm::cpu
