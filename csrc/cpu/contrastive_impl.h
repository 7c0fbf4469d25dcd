// The loops of contrastive_kernels.h over the vectors of vec.h. A level's file defines PYCM_LEVEL_<NAME> and includes this.
//
// Loops over columns keep one value a column in memory, in a strip that stays in the first cache, and read the scores row by
// row: a walk down one column would touch a page a row. Each score is read once or twice; exp takes some 14 instructions for
// a vector of fp32, log(1 + u) 12 and a division.
// Only plain loops may stand here: an inline function shared with another file would carry this level's instructions.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtype.h"
#include "cpu/contrastive_kernels.h"

namespace pycm::cpu {
namespace {

#include "cpu/vec.h"

#include "cpu/vec_math.h"

#define PYCM_INLINE inline __attribute__((always_inline))

// ---- functions ----

// 1 where x > 0, else 0.
#if defined(PYCM_LEVEL_AVX512)
inline VecF positive(VecF x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ), _mm512_set1_ps(1))};
}
inline VecD positive(VecD x) {
  return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x.v, _mm512_setzero_pd(), _CMP_GT_OQ), _mm512_set1_pd(1))};
}
#elif defined(PYCM_LEVEL_AVX2)
inline VecF positive(VecF x) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_GT_OQ), _mm256_set1_ps(1))};
}
inline VecD positive(VecD x) {
  return {_mm256_and_pd(_mm256_cmp_pd(x.v, _mm256_setzero_pd(), _CMP_GT_OQ), _mm256_set1_pd(1))};
}
#else
template <class Element, int kCount>
Portable<Element, kCount> positive(Portable<Element, kCount> x) {
  for (int i = 0; i < kCount; ++i) x.v[i] = x.v[i] > 0 ? Element(1) : Element(0);
  return x;
}
#endif

// exp(x); exactly 0 below -87.7, where fp32 leaves its normal range.
inline VecF exp(VecF x) {
  const Exponential e(least(max(x, VecF::set(-88)), VecF::set(87)));
  return fma(e.scale, e.rest, e.scale);
}
inline VecD exp(VecD x) {
  return each_lane(x, [](double value) { return __builtin_exp(value); });
}

// log(1 + u), 0 <= u <= 1: 2 artanh(t), t = u / (2 + u) <= 1/3, by its series; what is left out is below 2^-29 of it.
inline VecF log1p(VecF u) {
  const VecF t = divide(u, u + VecF::set(2)), square = t * t;
  VecF sum = VecF::set(2.0f / 15);
  sum = fma(sum, square, VecF::set(2.0f / 13));
  sum = fma(sum, square, VecF::set(2.0f / 11));
  sum = fma(sum, square, VecF::set(2.0f / 9));
  sum = fma(sum, square, VecF::set(2.0f / 7));
  sum = fma(sum, square, VecF::set(2.0f / 5));
  sum = fma(sum, square, VecF::set(2.0f / 3));
  return fma(sum * square, t, t + t);
}
inline VecD log1p(VecD u) {
  return each_lane(u, [](double value) { return __builtin_log1p(value); });
}

// ---- whole vectors, and a last one whose missing elements are given ----

template <class V>
PYCM_INLINE V load(const typename V::T* p, int64_t left, typename V::T missing) {
  if (left >= V::N) return V::load(p);
  alignas(64) typename V::T lane[V::N];
  for (int l = 0; l < V::N; ++l) lane[l] = l < left ? p[l] : missing;
  return V::load(lane);
}

template <class V>
PYCM_INLINE void store(V value, typename V::T* p, int64_t left) {
  if (left >= V::N) return value.store(p);
  alignas(64) typename V::T lane[V::N];
  value.store(lane);
  for (int l = 0; l < left; ++l) p[l] = lane[l];
}

template <class V>
typename V::T total(V value) {
  alignas(64) typename V::T lane[V::N];
  value.store(lane);
  for (int half = V::N / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// ---- the best and where it is: a vector is looked at closely only where it may hold a better score ----

template <class T>
PYCM_INLINE void consider(T score, const T* ceiling, int64_t index, T& best, int64_t& at) {
  if (best != best) return;
  const bool better = score > best && (ceiling == nullptr || score < *ceiling);
  if (!better && score == score) return;
  best = score;
  at = index;
}

template <class V>
void column_best(const ScoreTile<typename V::T>& tile, const typename V::T* ceiling, int64_t first, typename V::T* best,
                 int64_t* at) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const auto* row = tile.row(i);
    for (int64_t j = 0; j < tile.columns; j += V::N) {
      const int lanes = tile.columns - j < V::N ? static_cast<int>(tile.columns - j) : V::N;
      if (lanes == V::N && not_less(V::load(row + j), V::load(best + j)) == 0) continue;
      for (int64_t l = j; l < j + lanes; ++l)
        consider(row[l], ceiling == nullptr ? nullptr : ceiling + l, first + i, best[l], at[l]);
    }
  }
}

template <class V>
void row_best(const typename V::T* scores, int64_t columns, const typename V::T* ceiling, int64_t first,
              typename V::T* best, int64_t* at) {
  for (int64_t j = 0; j < columns; j += V::N) {
    const int lanes = columns - j < V::N ? static_cast<int>(columns - j) : V::N;
    if (lanes == V::N && not_less(V::load(scores + j), V::set(*best)) == 0) continue;
    for (int64_t l = j; l < j + lanes; ++l) consider(scores[l], ceiling, first + l, *best, *at);
  }
}

// ---- sums over columns ----

// value[j] = step(value[j], score) down each column, from `start`.
template <class V, class Step>
PYCM_INLINE void down(const ScoreTile<typename V::T>& tile, typename V::T start, typename V::T* value, Step step) {
  for (int64_t j = 0; j < tile.columns; ++j) value[j] = start;
  for (int64_t i = 0; i < tile.rows; ++i)
    for (int64_t j = 0; j < tile.columns; j += V::N) {
      const int64_t left = tile.columns - j;
      const V score = load<V>(tile.row(i) + j, left, kAbsent<typename V::T>);
      store(step(j, left, load<V>(value + j, left, 0), score), value + j, left);
    }
}

template <class V>
void column_max(const ScoreTile<typename V::T>& tile, typename V::T* out) {
  down<V>(tile, kAbsent<typename V::T>, out, [](int64_t, int64_t, V value, V score) { return max(value, score); });
}

template <class V>
void column_exp_sum(const ScoreTile<typename V::T>& tile, typename V::T scale, const typename V::T* shift,
                    typename V::T* out) {
  const V factor = V::set(scale);
  down<V>(tile, 0, out, [&](int64_t j, int64_t left, V value, V score) {
    return value + exp(fma(factor, score, load<V>(shift + j, left, 0)));
  });
}

template <class V>
void column_hinge(const ScoreTile<typename V::T>& tile, const typename V::T* offset, typename V::T* cost,
                  typename V::T* count) {
  down<V>(tile, 0, cost, [&](int64_t j, int64_t left, V value, V score) {
    return value + max(score + load<V>(offset + j, left, 0), V::zero());
  });
  down<V>(tile, 0, count, [&](int64_t j, int64_t left, V value, V score) {
    return value + positive(score + load<V>(offset + j, left, 0));
  });
}

// ---- sums over a row ----

template <class V>
typename V::T row_max(const typename V::T* scores, int64_t columns) {
  V largest = V::set(kAbsent<typename V::T>);
  for (int64_t j = 0; j < columns; j += V::N)
    largest = max(largest, load<V>(scores + j, columns - j, kAbsent<typename V::T>));
  alignas(64) typename V::T lane[V::N];
  largest.store(lane);
  for (int l = 1; l < V::N; ++l) lane[0] = lane[l] > lane[0] ? lane[l] : lane[0];
  return lane[0];
}

template <class V>
typename V::T row_exp_sum(const typename V::T* scores, int64_t columns, typename V::T scale, typename V::T shift) {
  const V factor = V::set(scale), shifts = V::set(shift);
  V sum = V::zero();
  for (int64_t j = 0; j < columns; j += V::N)
    sum = sum + exp(fma(factor, load<V>(scores + j, columns - j, kAbsent<typename V::T>), shifts));
  return total(sum);
}

// step(j, left, score, cost, weight) -> {d cost / d x of the sums, what takes the score's place}
template <class V>
struct Gradient {
  V weight, write;
};

template <class V, class Step>
PYCM_INLINE RowSums<typename V::T> along(typename V::T* scores, int64_t columns, bool write, Step step) {
  V cost = V::zero(), weight = V::zero(), weighted = V::zero();
  for (int64_t j = 0; j < columns; j += V::N) {
    const int64_t left = columns - j;
    const V score = load<V>(scores + j, left, kAbsent<typename V::T>);
    const Gradient<V> gradient = step(j, left, score, cost);
    weight = weight + gradient.weight;
    weighted = fma(gradient.weight, score, weighted);
    if (write) store(gradient.write, scores + j, left);
  }
  return {total(cost), total(weight), total(weighted)};
}

template <class V>
RowSums<typename V::T> softmax_row(typename V::T* scores, int64_t columns, typename V::T scale, typename V::T shift,
                                   const typename V::T* column_shift, bool write) {
  const V factor = V::set(scale), row = V::set(shift);
  return along<V>(scores, columns, write, [&](int64_t j, int64_t left, V score, V&) {
    const V by_column = exp(fma(factor, score, load<V>(column_shift + j, left, 0)));
    const V weight = exp(fma(factor, score, row)) + by_column;
    return Gradient<V>{weight, weight * factor};
  });
}

template <class V>
RowSums<typename V::T> hinge_row(typename V::T* scores, int64_t columns, typename V::T offset,
                                 const typename V::T* column_offset, bool write) {
  const V row = V::set(offset);
  return along<V>(scores, columns, write, [&](int64_t j, int64_t left, V score, V& cost) {
    const V bent = score + row, weight = positive(bent);
    cost = cost + max(bent, V::zero());
    return Gradient<V>{weight, weight + positive(score + load<V>(column_offset + j, left, 0))};
  });
}

template <class V>
RowSums<typename V::T> sigmoid_row(typename V::T* scores, int64_t columns, typename V::T scale, typename V::T bias,
                                   bool write) {
  const V factor = V::set(scale), biases = V::set(bias), one = V::set(1);
  return along<V>(scores, columns, write, [&](int64_t, int64_t, V score, V& cost) {
    const V x = fma(factor, score, biases), above = max(x, V::zero());
    const V e = exp(x - (above + above));  // exp(-|x|), NaN for NaN
    cost = cost + (above + log1p(e));
    const V large = divide(one, one + e), small = e * large;
    const V weight = fma(positive(x), large - small, small);
    return Gradient<V>{weight, weight * factor};
  });
}

template <class V>
constexpr ContrastiveKernels<typename V::T> contrastive_table() {
  return {column_best<V>, row_best<V>,     column_max<V>,  row_max<V>,   column_exp_sum<V>,
          row_exp_sum<V>, column_hinge<V>, softmax_row<V>, hinge_row<V>, sigmoid_row<V>};
}

}  // namespace
}  // namespace pycm::cpu
