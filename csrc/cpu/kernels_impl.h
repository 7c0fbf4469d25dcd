// The inner loops of kernels.h over the vectors of vec.h. A level's file defines PYCM_LEVEL_<NAME> and includes this.
//
// Tile product: height x (kVectors vectors) accumulators stay in registers for kDepth steps; each step loads kVectors
// vectors of the gallery panel and broadcasts `height` query values. At 12 x 32 fp32 that is 24 fused multiply-adds for
// 14 loads, so the product is bound by the multiply-add units: 2 * 16 flops a cycle on one AVX-512 port.
// Only plain loops may stand here: an inline function shared with another file would carry this level's instructions.

#include "cpu/kernels_words.h"

#include "cpu/kernels_encode.h"

namespace pycm::cpu {
namespace {

// values[i] = the finished row i of the tile, handed to `epilogue(i, vectors)`.
template <class V, int kHeight, class Epilogue>
PYCM_INLINE void product(const Tile<typename V::T>& tile, Epilogue epilogue) {
  using T = typename V::T;
  const T* a = tile.a;
  const T* b = tile.b;
  alignas(64) T partial[kHeight * kColumns<V>];
  for (int64_t begin = 0;; begin += kDepth) {
    const int64_t steps = tile.dim - begin < kDepth ? tile.dim - begin : kDepth;
    V acc[kHeight][kVectors];
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) acc[i][j] = V::zero();
    for (int64_t d = 0; d < steps; ++d) {
      V column[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) column[j] = V::load(b + j * V::N);
#pragma GCC unroll 12
      for (int i = 0; i < kHeight; ++i) {
        const V row = V::set(a[i]);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) acc[i][j] = fma(row, column[j], acc[i][j]);
      }
      a += kHeight;
      b += kColumns<V>;
    }
    const bool last = begin + kDepth >= tile.dim;
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        T* saved = partial + i * kColumns<V> + j * V::N;
        if (begin != 0) acc[i][j] = acc[i][j] + V::load(saved);
        if (!last) acc[i][j].store(saved);
      }
      if (last) epilogue(i, acc[i]);
    }
    if (last) return;
  }
}

// ---- screen in fp32 ----

template <int kHeight>
bool screen_f32(const ScreenTile& tile, Screen& screen) {
  static_assert(kColumns<VecF> <= kMaxTileColumns);
  const float* a = reinterpret_cast<const float*>(tile.queries);
  const float* b = reinterpret_cast<const float*>(tile.panel);
  Compare compare(screen);
  product<VecF, kHeight>(Tile<float>{kHeight, tile.words, a, b, nullptr, nullptr},
                         [&](int i, const VecF(&acc)[kVectors]) PYCM_INLINE_LAMBDA { compare.row(i, 0, acc); });
  return compare.any != 0;
}

bool screen_f32(const ScreenTile& tile, Screen& screen) {
  switch (tile.height / kHeightStep) {
    case 1: return screen_f32<kHeightStep>(tile, screen);
#if defined(PYCM_LEVEL_AVX512)
    case 2: return screen_f32<2 * kHeightStep>(tile, screen);
#endif
    default: return screen_f32<kFullHeight>(tile, screen);
  }
}

bool screen_bf16(const ScreenTile& tile, Screen& screen) { return screen_heights<Bf16Word>(tile, screen); }
bool screen_i8(const ScreenTile& tile, Screen& screen) { return screen_heights<Int8Word>(tile, screen); }

void pack_queries_f32(const uint32_t* rows, int64_t row_stride, int count, int64_t words, int height, uint32_t* out) {
  for (int64_t w = 0; w < words; ++w)
    for (int r = 0; r < height; ++r) out[w * height + r] = r < count ? rows[r * row_stride + w] : 0;
}

// ---- store: the full matrix ----

template <class V, int kHeight>
bool store_tile(const Tile<typename V::T>& tile, Store<typename V::T>& store) {
  using T = typename V::T;
  constexpr T kTinySquare = sizeof(T) == 4 ? T(0x1p-100) : T(0x1p-960);
  uint32_t any = 0;
  const uint32_t valid = store.columns >= 32 ? ~0u : (1u << store.columns) - 1;
  product<V, kHeight>(tile, [&](int i, const V(&acc)[kVectors]) PYCM_INLINE_LAMBDA {
    if (i >= store.rows) return;
    V value[kVectors];
    for (int j = 0; j < kVectors; ++j)
      value[j] = fma(acc[j], V::load(tile.scale + j * V::N), V::load(tile.bias + j * V::N));
    if (store.distance) {
      // Below 2^-6 of |q|^2 + |g|^2 more than six bits have cancelled; near the smallest squares they have underflowed.
      const V row_square = V::set(store.row_square[i]);
      uint32_t doubt = 0;
      for (int j = 0; j < kVectors; ++j) {
        const V both = row_square + V::load(store.column_square + j * V::N);
        value[j] = row_square - (value[j] + value[j]);
        doubt |= not_less(fma(both, V::set(T(1) / 64), V::set(kTinySquare)), value[j]) << (j * V::N);
        value[j] = max(value[j], V::zero());
        if (store.root) value[j] = sqrt(value[j]);
      }
      store.doubt[i] = doubt & valid;
      any |= store.doubt[i];
    }
    T* out = store.out + i * store.row_stride;
    if (store.columns == kColumns<V>) {
      for (int j = 0; j < kVectors; ++j) value[j].store(out + j * V::N);
    } else {
      alignas(64) T line[kColumns<V>];
      for (int j = 0; j < kVectors; ++j) value[j].store(line + j * V::N);
      for (int j = 0; j < store.columns; ++j) out[j] = line[j];
    }
  });
  return any != 0;
}

template <class V>
bool store(const Tile<typename V::T>& tile, Store<typename V::T>& args) {
  switch (tile.height / kHeightStep) {
    case 1: return store_tile<V, kHeightStep>(tile, args);
#if defined(PYCM_LEVEL_AVX512)
    case 2: return store_tile<V, 2 * kHeightStep>(tile, args);
#endif
    default: return store_tile<V, kFullHeight>(tile, args);
  }
}

// ---- rows where they lie ----

#include "cpu/kernels_rows.h"

// ---- packing ----

template <class T>
void pack_plain(const T* rows, int64_t row_stride, int count, int64_t begin, int64_t dim, int width, T* out) {
  for (int64_t d = begin; d < dim; ++d) {
    T* line = out + d * width;
    for (int r = 0; r < count; ++r) line[r] = rows[r * row_stride + d];
    for (int r = count; r < width; ++r) line[r] = 0;
  }
}

#if defined(PYCM_LEVEL_AVX512)
// Sixteen rows x sixteen dimensions at a time, in registers.
PYCM_INLINE void transpose16(const float* rows, int64_t row_stride, float* out, int width) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(rows + i * row_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
  // r[4 * g + c] holds, in 128-bit lane l, dimension 4 * l + c of rows 4 * g ... 4 * g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 low01 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x44);
    const __m512 high01 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xee);
    const __m512 low23 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x44);
    const __m512 high23 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xee);
    _mm512_storeu_ps(out + (0 + c) * width, _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_storeu_ps(out + (4 + c) * width, _mm512_shuffle_f32x4(low01, low23, 0xdd));
    _mm512_storeu_ps(out + (8 + c) * width, _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_storeu_ps(out + (12 + c) * width, _mm512_shuffle_f32x4(high01, high23, 0xdd));
  }
}
constexpr int kTranspose = 16;
PYCM_INLINE void transpose(const float* rows, int64_t row_stride, float* out, int width) {
  transpose16(rows, row_stride, out, width);
}
#elif defined(PYCM_LEVEL_AVX2)
// Eight rows x eight dimensions at a time, in registers.
PYCM_INLINE void transpose8(const float* rows, int64_t row_stride, float* out, int width) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(rows + i * row_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(out + c * width, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
    _mm256_storeu_ps(out + (4 + c) * width, _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
  }
}
constexpr int kTranspose = 8;
PYCM_INLINE void transpose(const float* rows, int64_t row_stride, float* out, int width) {
  transpose8(rows, row_stride, out, width);
}
#endif

void pack_f32(const float* rows, int64_t row_stride, int count, int64_t dim, int width, float* out) {
  int64_t done = 0;
#if defined(PYCM_LEVEL_AVX512) || defined(PYCM_LEVEL_AVX2)
  if (count == width && width % kTranspose == 0) {
    for (; done + kTranspose <= dim; done += kTranspose)
      for (int r = 0; r < width; r += kTranspose)
        transpose(rows + r * row_stride + done, row_stride, out + done * width + r, width);
  }
#endif
  pack_plain(rows, row_stride, count, done, dim, width, out);
}

void pack_f64(const double* rows, int64_t row_stride, int count, int64_t dim, int width, double* out) {
  pack_plain(rows, row_stride, count, 0, dim, width, out);
}

void pack_panel(const uint32_t* rows, int64_t row_stride, int count, int64_t words, uint32_t* out) {
  int64_t done = 0;
#if defined(PYCM_LEVEL_AVX512) || defined(PYCM_LEVEL_AVX2)
  if (count == kPanelColumns) {
    for (; done + kTranspose <= words; done += kTranspose)
      for (int r = 0; r < kPanelColumns; r += kTranspose)
        transpose(reinterpret_cast<const float*>(rows + r * row_stride + done), row_stride,
                  reinterpret_cast<float*>(out + done * kPanelColumns + r), kPanelColumns);
  }
#endif
  pack_plain(rows, row_stride, count, done, words, kPanelColumns, out);
}

// ---- conversions ----

void affine_f32(const float* in, double shift, double factor, const double* centre, int64_t dim, float* out) {
  const VecD shifts = VecD::set(shift), factors = VecD::set(factor);
  int64_t d = 0;
  for (; d + VecD::N <= dim; d += VecD::N) {
    VecD value = (VecD::load(in + d) - shifts) * factors;
    if (centre != nullptr) value = value - VecD::load(centre + d);
    value.store(out + d);
  }
  for (; d < dim; ++d) {
    double value = (double{in[d]} - shift) * factor;
    if (centre != nullptr) value -= centre[d];
    out[d] = static_cast<float>(value);
  }
}

void widen_f16(const uint16_t* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + VecF::N <= count; i += VecF::N) VecF::load_f16(in + i).store(out + i);
  for (; i < count; ++i) out[i] = float16_to_float(in[i]);
}

void widen_bf16(const uint16_t* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + VecF::N <= count; i += VecF::N) VecF::load_bf16(in + i).store(out + i);
  for (; i < count; ++i) out[i] = bfloat16_to_float(in[i]);
}

// ---- fp64 sums in the fixed order ----

constexpr int kAccumulators = kLanes / VecD::N;

// acc + term. The product of two fp32 numbers is exact in fp64, so there, and only there, fusing changes no bit.
template <int kSum, class T>
PYCM_INLINE VecD add_term(VecD acc, const double* q, const T* g, VecD shift) {
  if constexpr (kSum == kSumProduct) {
    const VecD a = VecD::load(q), b = VecD::load(g);
    return sizeof(T) == 4 ? fma(a, b, acc) : acc + a * b;
  } else if constexpr (kSum == kSumShiftedProduct) {
    return acc + VecD::load(q) * (VecD::load(g) - shift);
  } else if constexpr (kSum == kSumSquaredDifference) {
    const VecD difference = VecD::load(q) - VecD::load(g);
    return acc + difference * difference;
  } else if constexpr (kSum == kSumElements) {
    return acc + VecD::load(g);
  } else {
    const VecD centred = VecD::load(g) - shift;
    return acc + centred * centred;
  }
}

template <int kSum, class T>
double exact_sum(const double* q, const T* g, double shift, int64_t dim) {
  const VecD shifts = VecD::set(shift);
  VecD acc[kAccumulators];
#pragma GCC unroll 16
  for (int l = 0; l < kAccumulators; ++l) acc[l] = VecD::zero();
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
#pragma GCC unroll 16
    for (int l = 0; l < kAccumulators; ++l)
      acc[l] = add_term<kSum>(acc[l], q == nullptr ? nullptr : q + d + l * VecD::N, g + d + l * VecD::N, shifts);
  }
  // The rest: whole vectors, then one whose missing terms are zeros (0 * 0, or shift - shift). Lanes without a term stay.
#pragma GCC unroll 16
  for (int l = 0; l < kAccumulators; ++l) {
    const int64_t begin = d + l * VecD::N;
    if (begin + VecD::N <= dim) {
      acc[l] = add_term<kSum>(acc[l], q == nullptr ? nullptr : q + begin, g + begin, shifts);
    } else if (begin < dim) {
      double q_tail[VecD::N] = {}, g_tail[VecD::N];
      for (int i = 0; i < VecD::N; ++i) {
        const bool inside = begin + i < dim;
        if (q != nullptr && inside) q_tail[i] = q[begin + i];
        g_tail[i] = inside                                                    ? double(g[begin + i])
                    : kSum == kSumShiftedProduct || kSum == kSumShiftedSquare ? shift
                                                                              : 0.0;
      }
      acc[l] = add_term<kSum>(acc[l], q_tail, g_tail, shifts);
    }
  }
#pragma GCC unroll 8
  for (int half = kAccumulators / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) acc[l] = acc[l] + acc[l + half];
  alignas(64) double lane[VecD::N];
  acc[0].store(lane);
  for (int half = VecD::N / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] = lane[l] + lane[l + half];
  return lane[0];
}

#if defined(PYCM_LEVEL_AVX512) || defined(PYCM_LEVEL_AVX2)
constexpr bool kQuickInt8 = true;
#else
constexpr bool kQuickInt8 = false;
#endif

constexpr Kernels table(const char* level) {
  return {
      level,
      kFullHeight,
      kHeightStep,
      kColumns<VecF>,
      kColumns<VecD>,
      {screen_f32, screen_bf16, screen_i8},
      {true, false, kQuickInt8},
      {pack_queries_f32, pack_queries_bf16, pack_queries_i8},
      {1, Bf16Word::kQueryWords, Int8Word::kQueryWords},
      pack_panel,
      encode_i8,
      encode_bf16,
      rotate,
      store<VecF>,
      store<VecD>,
      row_products<VecF>,
      row_products<VecD>,
      nullptr,
      nullptr,
      nullptr,
      pack_f32,
      pack_f64,
      affine_f32,
      widen_f16,
      widen_bf16,
      {exact_sum<0, float>, exact_sum<1, float>, exact_sum<2, float>, exact_sum<3, float>, exact_sum<4, float>},
      {exact_sum<0, double>, exact_sum<1, double>, exact_sum<2, double>, exact_sum<3, double>, exact_sum<4, double>}};
}

}  // namespace
}  // namespace pycm::cpu
