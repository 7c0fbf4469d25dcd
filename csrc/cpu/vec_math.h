// exp, sigmoid and tanh of vectors. Included after vec.h, inside the anonymous namespace of a level's loops.
//
// Both come from 2^n (1 + p), n = round(x / ln 2), p = expm1(rest) by a polynomial of degree 7 with an error of 2^-26 of
// itself, and one division. Largest error measured on 2^22 numbers over all of fp32's range, fused: sigmoid 2.2 ulp of the
// result (below -87: 2^-125), tanh 2.5 ulp. NaN gives NaN.
// Doubles take the C library's, lane by lane: they are the reference path.

#if defined(PYCM_LEVEL_AVX512)
inline VecF divide(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
inline VecD divide(VecD a, VecD b) { return {_mm512_div_pd(a.v, b.v)}; }
inline VecF least(VecF a, VecF b) { return {_mm512_min_ps(b.v, a.v)}; }
inline VecD least(VecD a, VecD b) { return {_mm512_min_pd(b.v, a.v)}; }
// 2^n for the n in the low bits of kShift + n.
inline VecF power_of_two(VecF shifted) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)))};
}
#elif defined(PYCM_LEVEL_AVX2)
inline VecF divide(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
inline VecD divide(VecD a, VecD b) { return {_mm256_div_pd(a.v, b.v)}; }
inline VecF least(VecF a, VecF b) { return {_mm256_min_ps(b.v, a.v)}; }
inline VecD least(VecD a, VecD b) { return {_mm256_min_pd(b.v, a.v)}; }
inline VecF power_of_two(VecF shifted) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)))};
}
#else
template <class Element, int kCount>
Portable<Element, kCount> divide(Portable<Element, kCount> a, Portable<Element, kCount> b) {
  return {a.v / b.v};
}
template <class Element, int kCount>
Portable<Element, kCount> least(Portable<Element, kCount> a, Portable<Element, kCount> b) {
  for (int i = 0; i < kCount; ++i) a.v[i] = b.v[i] < a.v[i] ? b.v[i] : a.v[i];
  return a;
}
inline VecF power_of_two(VecF shifted) {
  VecF result;
  for (int i = 0; i < VecF::N; ++i) {
    const float value = shifted.v[i];
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    result.v[i] = float_from_bits((bits << 23) + 0x3f800000u);
  }
  return result;
}
#endif

// e^x = scale * (1 + rest), for |x| <= 87.
struct Exponential {
  VecF scale, rest;

  explicit Exponential(VecF x) {
    const VecF shift = VecF::set(12582912.0f);  // 1.5 * 2^23: a sum with it is rounded to an integer
    const VecF shifted = fma(x, VecF::set(1.44269504f), shift);
    const VecF n = shift - shifted;
    VecF r = fma(n, VecF::set(0.693359375f), x);
    r = fma(n, VecF::set(-2.12194440e-4f), r);
    VecF p = fma(r, VecF::set(1.0f / 5040), VecF::set(1.0f / 720));
    p = fma(p, r, VecF::set(1.0f / 120));
    p = fma(p, r, VecF::set(1.0f / 24));
    p = fma(p, r, VecF::set(1.0f / 6));
    p = fma(p, r, VecF::set(0.5f));
    rest = fma(p, r * r, r);
    scale = power_of_two(shifted);
  }
};

// 1 / (1 + e^-x)
inline VecF sigmoid(VecF x) {
  const Exponential e(least(max(VecF::zero() - x, VecF::set(-87)), VecF::set(87)));
  const VecF one = VecF::set(1);
  return divide(one, fma(e.scale, e.rest, e.scale + one));
}

// m / (m + 2), m = e^2x - 1
inline VecF tanh(VecF x) {
  const Exponential e(least(max(x + x, VecF::set(-30)), VecF::set(30)));
  const VecF m = fma(e.scale, e.rest, e.scale - VecF::set(1));
  return divide(m, m + VecF::set(2));
}

template <class F>
inline VecD each_lane(VecD x, F f) {
  alignas(64) double lane[VecD::N];
  x.store(lane);
  for (double& value : lane) value = f(value);
  return VecD::load(lane);
}
inline VecD sigmoid(VecD x) {
  return each_lane(x, [](double value) { return 1 / (1 + __builtin_exp(-value)); });
}
inline VecD tanh(VecD x) {
  return each_lane(x, [](double value) { return __builtin_tanh(value); });
}
