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
};
using VecF = Portable<float, 4>;
using VecD = Portable<double, 2>;

#endif
