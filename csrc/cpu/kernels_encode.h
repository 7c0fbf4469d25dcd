// Rows of fp32 made into rows of low precision, and turned before: what kernels.h says of encode_i8, encode_bf16, rotate.
// Included by kernels_impl.h, after kernels_words.h.

namespace pycm::cpu {
namespace {

struct RowSums {
  float largest, square;
};

// The largest magnitude (NaN if there is one) and the sum of squares.
PYCM_INLINE RowSums row_sums(const float* row, int64_t dim) {
  VecF largest = VecF::zero(), square = VecF::zero();
  int64_t d = 0;
  for (; d + VecF::N <= dim; d += VecF::N) {
    const VecF x = VecF::load(row + d);
    largest = max(largest, abs(x));
    square = fma(x, x, square);
  }
  alignas(64) float a[VecF::N], b[VecF::N];
  largest.store(a);
  square.store(b);
  RowSums sums{0, 0};
  for (int l = 0; l < VecF::N; ++l) {
    sums.largest = a[l] > sums.largest ? a[l] : sums.largest;
    sums.square += b[l];
  }
  for (; d < dim; ++d) {
    const float x = __builtin_fabsf(row[d]);
    sums.largest = x > sums.largest ? x : sums.largest;
    sums.square += x * x;
  }
  if (sums.square != sums.square) sums.largest = sums.square;
  return sums;
}

// To nearest, by the addition of a number whose last bit is worth 1; the low bytes of the sum are the integer.
constexpr float kRound = 0x1.8p23f;

Encoding encode_i8(const float* row, int64_t dim, int shift, uint32_t* out) {
  const RowSums sums = row_sums(row, dim);
  Encoding result;
  result.largest = sums.largest;
  result.norm_square = sums.square;
  int8_t* bytes = reinterpret_cast<int8_t*>(out);
  const int64_t padded = (dim + 3) / 4 * 4;
  if (!(sums.largest > 0x1p-60f && sums.largest < 0x1p60f)) {
    for (int64_t d = 0; d < padded; ++d) bytes[d] = static_cast<int8_t>(shift);
    return result;
  }
  result.scale = sums.largest / 127;
  const VecF scale = VecF::set(result.scale), inverse = VecF::set(127 / sums.largest), round = VecF::set(kRound);
  VecF loss = VecF::zero(), total = VecF::zero();
  int64_t d = 0;
  for (; d + VecF::N <= dim; d += VecF::N) {
    const VecF x = VecF::load(row + d);
    const VecF shifted = fma(x, inverse, round);
    const VecF rounded = shifted - round;
    store_low_bytes(shifted, shift, bytes + d);
    const VecF rest = x - rounded * scale;
    loss = fma(rest, rest, loss);
    total = total + rounded;
  }
  alignas(64) float a[VecF::N], b[VecF::N];
  loss.store(a);
  total.store(b);
  for (int l = 0; l < VecF::N; ++l) {
    result.loss_square += a[l];
    result.sum += static_cast<int32_t>(b[l]);
  }
  for (; d < dim; ++d) {
    const float rounded = (row[d] * (127 / sums.largest) + kRound) - kRound;
    bytes[d] = static_cast<int8_t>(static_cast<int>(rounded) + shift);
    const float rest = row[d] - rounded * result.scale;
    result.loss_square += rest * rest;
    result.sum += static_cast<int32_t>(rounded);
  }
  for (; d < padded; ++d) bytes[d] = static_cast<int8_t>(shift);
  return result;
}

// Scaled by a power of two to magnitudes below 2, then rounded to 8 bits: c - (c - x) with c = (2^16 + 1) x (Veltkamp).
Encoding encode_bf16(const float* row, int64_t dim, int, uint32_t* out) {
  const RowSums sums = row_sums(row, dim);
  Encoding result;
  result.largest = sums.largest;
  result.norm_square = sums.square;
  uint16_t* halves = reinterpret_cast<uint16_t*>(out);
  const int64_t padded = (dim + 1) / 2 * 2;
  if (!(sums.largest > 0x1p-60f && sums.largest < 0x1p60f)) {
    for (int64_t d = 0; d < padded; ++d) halves[d] = 0;
    return result;
  }
  uint32_t bits;
  __builtin_memcpy(&bits, &sums.largest, sizeof bits);
  result.scale = float_from_bits(bits & 0x7f800000u);
  const VecF inverse = VecF::set(1 / result.scale), scale = VecF::set(result.scale), split = VecF::set(0x1p16f + 1);
  VecF loss = VecF::zero();
  alignas(64) float last[VecF::N] = {};
  alignas(64) uint16_t last_halves[VecF::N];
  for (int64_t d = 0; d < dim; d += VecF::N) {
    const bool whole = d + VecF::N <= dim;
    for (int64_t l = 0; !whole && d + l < dim; ++l) last[l] = row[d + l];
    const VecF value = whole ? VecF::load(row + d) : VecF::load(last);
    const VecF x = value * inverse, c = x * split;
    const VecF rounded = c - (c - x);
    store_high_halves(rounded, whole ? halves + d : last_halves);
    for (int64_t l = 0; !whole && d + l < padded; ++l) halves[d + l] = last_halves[l];
    const VecF rest = value - rounded * scale;
    loss = fma(rest, rest, loss);
  }
  alignas(64) float lanes[VecF::N];
  loss.store(lanes);
  for (float lane : lanes) result.loss_square += lane;
  return result;
}

void rotate(float* row, const float* signs, int64_t dim, int64_t block) {
  for (int64_t d = 0; d < dim; ++d) row[d] *= signs[d];
  for (int64_t first = 0; first < dim; first += block) {
    float* run = row + first;
    int64_t half = 1;
#if defined(PYCM_LEVEL_AVX512) || defined(PYCM_LEVEL_AVX2)
    // Pairs inside a vector.
    if (block >= VecF::N) {
      for (int64_t d = 0; d < block; d += VecF::N) butterflies(VecF::load(run + d)).store(run + d);
      half = VecF::N;
    }
#endif
    for (; half < block; half *= 2)
      for (int64_t base = 0; base < block; base += 2 * half)
        for (int64_t d = base; d < base + half; ++d) {
          const float a = run[d], b = run[d + half];
          run[d] = a + b;
          run[d + half] = a - b;
        }
  }
}

}  // namespace
}  // namespace pycm::cpu
