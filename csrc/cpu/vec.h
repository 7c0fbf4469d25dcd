// Vectors of floats and doubles for the level being compiled. Included by kernels_impl.h alone, inside its anonymous
// namespace: no symbol compiled with one level's flags may be seen by another's.
//
// not_less(a, b): bit j is set unless a[j] < b[j]; NaN sets it.

#if defined(PYCM_LEVEL_AVX512)

struct VecF {
  using T = float;
  static constexpr int N = 16;
  __m512 v;
  static VecF zero() { return {_mm512_setzero_ps()}; }
  static VecF set(float x) { return {_mm512_set1_ps(x)}; }
  static VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static VecF load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static VecF load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
};
inline VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
// a where NaN, else the larger.
inline VecF max(VecF a, VecF b) { return {_mm512_max_ps(b.v, a.v)}; }
inline VecF sqrt(VecF a) { return {_mm512_sqrt_ps(a.v)}; }
inline uint32_t not_less(VecF a, VecF b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ); }
inline uint32_t less(VecF a, VecF b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline VecF abs(VecF a) { return {_mm512_abs_ps(a.v)}; }
inline VecF low_bf16(const uint32_t* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
inline VecF high_bf16(const uint32_t* p) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(~0xffff)))};
}
inline void store_low_bytes(VecF a, int shift, int8_t* p) {
  const __m512i shifted = _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(shift));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(shifted));
}
inline void store_high_halves(VecF a, uint16_t* p) {
  const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(a.v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}
// a[l] + a[l ^ h] in lanes without bit h, a[l ^ h] - a[l] in lanes with it, for h = 1, 2, 4, 8.
inline VecF butterflies(VecF a) {
  const __m512 one = _mm512_set1_ps(1), minus = _mm512_set1_ps(-1);
  a.v = _mm512_fmadd_ps(a.v, _mm512_mask_mov_ps(one, 0xaaaa, minus), _mm512_permute_ps(a.v, 0xb1));
  a.v = _mm512_fmadd_ps(a.v, _mm512_mask_mov_ps(one, 0xcccc, minus), _mm512_permute_ps(a.v, 0x4e));
  a.v = _mm512_fmadd_ps(a.v, _mm512_mask_mov_ps(one, 0xf0f0, minus), _mm512_shuffle_f32x4(a.v, a.v, 0xb1));
  return {_mm512_fmadd_ps(a.v, _mm512_mask_mov_ps(one, 0xff00, minus), _mm512_shuffle_f32x4(a.v, a.v, 0x4e))};
}

struct VecD {
  using T = double;
  static constexpr int N = 8;
  __m512d v;
  static VecD zero() { return {_mm512_setzero_pd()}; }
  static VecD set(double x) { return {_mm512_set1_pd(x)}; }
  static VecD load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static VecD load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store(float* p) const { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
};
inline VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline VecD operator+(VecD a, VecD b) { return {_mm512_add_pd(a.v, b.v)}; }
inline VecD operator-(VecD a, VecD b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline VecD operator*(VecD a, VecD b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline VecD max(VecD a, VecD b) { return {_mm512_max_pd(b.v, a.v)}; }
inline VecD sqrt(VecD a) { return {_mm512_sqrt_pd(a.v)}; }
inline uint32_t not_less(VecD a, VecD b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_NLT_UQ); }

#elif defined(PYCM_LEVEL_AVX2)

struct VecF {
  using T = float;
  static constexpr int N = 8;
  __m256 v;
  static VecF zero() { return {_mm256_setzero_ps()}; }
  static VecF set(float x) { return {_mm256_set1_ps(x)}; }
  static VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static VecF load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static VecF load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
};
inline VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline VecF max(VecF a, VecF b) { return {_mm256_max_ps(b.v, a.v)}; }
inline VecF sqrt(VecF a) { return {_mm256_sqrt_ps(a.v)}; }
inline uint32_t not_less(VecF a, VecF b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)));
}
inline uint32_t less(VecF a, VecF b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)));
}
inline VecF abs(VecF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline VecF low_bf16(const uint32_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16))};
}
inline VecF high_bf16(const uint32_t* p) {
  return {_mm256_castsi256_ps(
      _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi32(~0xffff)))};
}
inline void store_low_bytes(VecF a, int shift, int8_t* p) {
  const __m256i shifted = _mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_set1_epi32(shift));
  const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                                         -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(shifted, first);
  const uint32_t low = static_cast<uint32_t>(_mm256_extract_epi32(bytes, 0));
  const uint32_t high = static_cast<uint32_t>(_mm256_extract_epi32(bytes, 4));
  __builtin_memcpy(p, &low, 4);
  __builtin_memcpy(p + 4, &high, 4);
}
inline void store_high_halves(VecF a, uint16_t* p) {
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(a.v), 16);
  const __m128i both = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), both);
}
// a[l] + a[l ^ h] in lanes without bit h, a[l ^ h] - a[l] in lanes with it, for h = 1, 2, 4.
inline VecF butterflies(VecF a) {
  a.v = _mm256_fmadd_ps(a.v, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(a.v, 0xb1));
  a.v = _mm256_fmadd_ps(a.v, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_permute_ps(a.v, 0x4e));
  return {_mm256_fmadd_ps(a.v, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(a.v, a.v, 1))};
}

struct VecD {
  using T = double;
  static constexpr int N = 4;
  __m256d v;
  static VecD zero() { return {_mm256_setzero_pd()}; }
  static VecD set(double x) { return {_mm256_set1_pd(x)}; }
  static VecD load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static VecD load(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store(float* p) const { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
};
inline VecD fma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline VecD operator+(VecD a, VecD b) { return {_mm256_add_pd(a.v, b.v)}; }
inline VecD operator-(VecD a, VecD b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline VecD operator*(VecD a, VecD b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline VecD max(VecD a, VecD b) { return {_mm256_max_pd(b.v, a.v)}; }
inline VecD sqrt(VecD a) { return {_mm256_sqrt_pd(a.v)}; }
inline uint32_t not_less(VecD a, VecD b) {
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_NLT_UQ)));
}

#else  // Portable: 16-byte vectors by the compiler's own extension (SSE2, NEON); no fused multiply-add assumed.

template <class Element, int Count>
struct Portable {
  using T = Element;
  static constexpr int N = Count;
  typedef Element Native __attribute__((vector_size(sizeof(Element) * Count)));
  Native v;
  static Portable zero() { return {Native{}}; }
  static Portable set(Element x) { return {Native{} + x}; }
  template <class From>
  static Portable load(const From* p) {
    Portable result;
    for (int i = 0; i < N; ++i) result.v[i] = p[i];
    return result;
  }
  static Portable load_f16(const uint16_t* p) {
    Portable result;
    for (int i = 0; i < N; ++i) result.v[i] = float16_to_float(p[i]);
    return result;
  }
  static Portable load_bf16(const uint16_t* p) {
    Portable result;
    for (int i = 0; i < N; ++i) result.v[i] = bfloat16_to_float(p[i]);
    return result;
  }
  template <class To>
  void store(To* p) const {
    for (int i = 0; i < N; ++i) p[i] = static_cast<To>(v[i]);
  }
  friend Portable fma(Portable a, Portable b, Portable c) { return {a.v * b.v + c.v}; }
  friend Portable operator+(Portable a, Portable b) { return {a.v + b.v}; }
  friend Portable operator-(Portable a, Portable b) { return {a.v - b.v}; }
  friend Portable operator*(Portable a, Portable b) { return {a.v * b.v}; }
  friend Portable max(Portable a, Portable b) {
    for (int i = 0; i < N; ++i) a.v[i] = b.v[i] > a.v[i] ? b.v[i] : a.v[i];
    return a;
  }
  friend Portable sqrt(Portable a) {
    for (int i = 0; i < N; ++i) a.v[i] = sizeof(Element) == 4 ? __builtin_sqrtf(a.v[i]) : __builtin_sqrt(a.v[i]);
    return a;
  }
  friend uint32_t not_less(Portable a, Portable b) {
    uint32_t bits = 0;
    for (int i = 0; i < N; ++i) bits |= static_cast<uint32_t>(!(a.v[i] < b.v[i])) << i;
    return bits;
  }
  friend uint32_t less(Portable a, Portable b) {
    uint32_t bits = 0;
    for (int i = 0; i < N; ++i) bits |= static_cast<uint32_t>(a.v[i] < b.v[i]) << i;
    return bits;
  }
  friend Portable abs(Portable a) {
    for (int i = 0; i < N; ++i) a.v[i] = a.v[i] < 0 ? -a.v[i] : a.v[i];
    return a;
  }
};
using VecF = Portable<float, 4>;
using VecD = Portable<double, 2>;
inline VecF low_bf16(const uint32_t* p) {
  VecF result;
  for (int i = 0; i < VecF::N; ++i) result.v[i] = float_from_bits(p[i] << 16);
  return result;
}
inline VecF high_bf16(const uint32_t* p) {
  VecF result;
  for (int i = 0; i < VecF::N; ++i) result.v[i] = float_from_bits(p[i] & 0xffff0000u);
  return result;
}
inline void store_high_halves(VecF a, uint16_t* p) {
  for (int i = 0; i < VecF::N; ++i) {
    const float value = a.v[i];
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    p[i] = static_cast<uint16_t>(bits >> 16);
  }
}
inline void store_low_bytes(VecF a, int shift, int8_t* p) {
  for (int i = 0; i < VecF::N; ++i) {
    const float value = a.v[i];
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    p[i] = static_cast<int8_t>(bits + static_cast<uint32_t>(shift));
  }
}

#endif
