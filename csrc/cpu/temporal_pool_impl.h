// The inner loops of temporal_pool_kernels.h over the vectors of vec.h. A level's file defines PYCM_LEVEL_<NAME> and
// includes this.
//
// Product: a tile of `height` rows x (panels x 2 vectors) stays in registers while the depth runs; a step loads the vectors
// of the panels and broadcasts `height` elements. 12 rows x 1 panel fill 24 of AVX-512's registers (24 multiply-adds for 14
// loads); of fewer rows several panels are taken at once, so that 1 row still has 8 independent sums and reads the weights
// at the memory's speed. A sum runs over the depth in one chain per Word::kChain words, whatever the tile: a row's bits do not
// depend on its neighbours.
// Only plain loops may stand here: an inline function shared with another file would carry this level's instructions.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <utility>

#include "core/dtype.h"
#include "cpu/temporal_pool_kernels.h"

namespace pycm::cpu {
namespace {

#include "cpu/vec.h"

#include "cpu/vec_math.h"

#define PYCM_INLINE inline __attribute__((always_inline))

constexpr int kVectors = 2;
template <class V>
constexpr int kColumns = kVectors * V::N;

#if defined(PYCM_LEVEL_AVX512)
constexpr int kFullHeight = 12;
#elif defined(PYCM_LEVEL_AVX2)
constexpr int kFullHeight = 6;
#else
constexpr int kFullHeight = 4;
#endif
constexpr int at_most(int value, int limit) { return value < limit ? value : limit; }
// Panels that a tile of this height meets at once.
constexpr int panels_at_once(int height) { return at_most(kMaxPanels, kFullHeight / height); }

// ---- products ----

// Words whose sums are what is wanted.
template <class V>
struct SumWord {
  using Vec = V;
  using Sum = V;
  static constexpr int64_t kChain = 512, kTail = 0;
  static PYCM_INLINE V zero() { return V::zero(); }
  template <class Word>
  static PYCM_INLINE V value(V sum, const Word*, const Word*) {
    return sum;
  }
};

// One word is one element.
template <class V>
struct PlainWord : SumWord<V> {
  using Word = typename V::T;
  static PYCM_INLINE V column(const Word* b) { return V::load(b); }
  static PYCM_INLINE V row(const Word* a) { return V::set(*a); }
  static PYCM_INLINE V add(V sum, V row, V column) { return fma(row, column, sum); }
};

template <class Op, int kHeight, int kPanels>
PYCM_INLINE void product_tile(const ProductTile<typename Op::Vec::T>& tile, int panel) {
  using V = typename Op::Vec;
  using T = typename V::T;
  using Word = typename Op::Word;
  constexpr int kAll = kPanels * kVectors;
  const Word* a = static_cast<const Word*>(tile.a);
  const Word* b = static_cast<const Word*>(tile.b) + panel * tile.b_panel;
  const T* start = tile.start == nullptr ? nullptr : tile.start + panel * kColumns<V>;
  T* c = tile.c + panel * tile.c_panel;
  const int64_t b_panel = tile.b_panel, depth = tile.words == 0 ? 0 : tile.words - Op::kTail;
  for (int64_t begin = 0;; begin += Op::kChain) {
    const int64_t steps = depth - begin < Op::kChain ? depth - begin : Op::kChain;
    typename Op::Sum sum[kHeight][kAll];
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kAll; ++j) sum[i][j] = Op::zero();
    for (int64_t w = 0; w < steps; ++w) {
      decltype(Op::column(b)) column[kAll];
#pragma GCC unroll 8
      for (int j = 0; j < kAll; ++j) column[j] = Op::column(b + j / kVectors * b_panel + j % kVectors * V::N);
#pragma GCC unroll 12
      for (int i = 0; i < kHeight; ++i) {
        const auto row = Op::row(a + i);
#pragma GCC unroll 8
        for (int j = 0; j < kAll; ++j) sum[i][j] = Op::add(sum[i][j], row, column[j]);
      }
      a += kHeight;
      b += kColumns<V>;
    }
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kAll; ++j) {
        T* out = c + i * tile.c_row + j / kVectors * tile.c_panel + j % kVectors * V::N;
        V value = V::zero();
        if (Op::kTail == 0 || depth > 0)
          value = Op::value(sum[i][j], a + i, b + j / kVectors * b_panel + j % kVectors * V::N);
        if (tile.add || begin != 0) value = V::load(out) + value;
        else if (start != nullptr) value = V::load(start + j * V::N) + value;
        value.store(out);
      }
    if (begin + Op::kChain >= depth) return;
  }
}

template <class Op, int kHeight>
void product_height(const ProductTile<typename Op::Vec::T>& tile) {
  constexpr int kAtOnce = panels_at_once(kHeight);
  int panel = 0;
  for (; panel + kAtOnce <= tile.panels; panel += kAtOnce) product_tile<Op, kHeight, kAtOnce>(tile, panel);
  const int left = tile.panels - panel;
  if constexpr (kAtOnce > 3) {
    if (left == 3) return product_tile<Op, kHeight, 3>(tile, panel);
  }
  if constexpr (kAtOnce > 2) {
    if (left == 2) return product_tile<Op, kHeight, 2>(tile, panel);
  }
  if constexpr (kAtOnce > 1) {
    if (left == 1) return product_tile<Op, kHeight, 1>(tile, panel);
  }
}

// Calls the entry for `height` in [1, kFullHeight]: f(integral_constant<height>).
template <class F, int... kHeights>
PYCM_INLINE void with_height(int height, F f, std::integer_sequence<int, kHeights...>) {
  (void)((height == kHeights + 1 && (f(std::integral_constant<int, kHeights + 1>()), true)) || ...);
}
using Heights = std::make_integer_sequence<int, kFullHeight>;

template <class Op>
void product(const ProductTile<typename Op::Vec::T>& tile) {
  with_height(tile.height, [&](auto height) { product_height<Op, decltype(height)::value>(tile); }, Heights());
}

template <class T>
void pack(const T* const* rows, int count, int64_t words, T* out) {
  const auto packed = [&](auto height) {
    constexpr int kCount = decltype(height)::value;
    for (int64_t w = 0; w < words; ++w)
#pragma GCC unroll 12
      for (int r = 0; r < kCount; ++r) out[w * kCount + r] = rows[r][w];
  };
  with_height(count, packed, Heights());
}

// ---- vectors of which n elements exist ----

template <class V>
PYCM_INLINE V load_some(const typename V::T* p, int64_t n) {
  if (n >= V::N) return V::load(p);
  alignas(64) typename V::T line[V::N] = {};
  for (int64_t i = 0; i < n; ++i) line[i] = p[i];
  return V::load(line);
}

template <class V>
PYCM_INLINE void store_some(V v, typename V::T* p, int64_t n) {
  if (n >= V::N) return v.store(p);
  alignas(64) typename V::T line[V::N];
  v.store(line);
  for (int64_t i = 0; i < n; ++i) p[i] = line[i];
}

// ---- the cell ----

template <class C, class V>
void cell_step(const CellTile<typename V::T>& tile) {
  for (int i = 0; i < tile.rows; ++i)
    for (int j = 0; j < kColumns<V>; j += V::N) {
      V part[C::kParts];
      for (int p = 0; p < C::kParts; ++p) {
        if (p < C::kGates) part[p] = V::load(tile.input + i * tile.input_row + p * tile.input_part + j);
        if (p < C::kFirstHidden || tile.hidden == nullptr) continue;
        const V recurrent = V::load(tile.hidden + i * tile.hidden_row + (p - C::kFirstHidden) * kColumns<V> + j);
        part[p] = p < C::kGates ? part[p] + recurrent : recurrent;
      }
      V h = V::zero(), c = V::zero();
      if constexpr (C::kHasMemory) c = V::load(tile.c + i * tile.c_row + j);
      else h = V::load(tile.h + i * tile.h_row + j);
      C::step(part, h, c).store(tile.h_next + i * tile.h_next_row + j);
      if constexpr (C::kHasMemory) c.store(tile.c + i * tile.c_row + j);
      if (tile.reserve == nullptr) continue;
      typename V::T* reserve = tile.reserve[i] + j;
      for (int p = 0; p < C::kParts; ++p) store_some<V>(part[p], reserve + p * tile.reserve_part, tile.units - j);
      if constexpr (C::kHasMemory) store_some<V>(c, reserve + C::kParts * tile.reserve_part, tile.units - j);
    }
}

template <class C, class V>
void cell_step_back(const CellGradRow<typename V::T>& row) {
  for (int j = 0; j < kColumns<V>; j += V::N) {
    const int64_t n = row.units - j;
    const auto reserve = [&](int p) { return load_some<V>(row.reserve + p * row.reserve_part + j, n); };
    V part[C::kParts], grad_h = V::load(row.grad_h + j);
    for (int p = 0; p < C::kParts; ++p) part[p] = reserve(p);
    if (row.grad_outside != nullptr) grad_h = grad_h + V::load(row.grad_outside + j);
    V h_before = V::zero(), c_before = V::zero(), c = V::zero(), grad_c = V::zero(), grad_h_before;
    if constexpr (C::kHasMemory) {
      c = reserve(C::kParts);
      if (row.c_before != nullptr) c_before = load_some<V>(row.c_before + j, n);
      grad_c = V::load(row.grad_c + j);
      if (row.output != nullptr) (part[3] * tanh(c)).store(row.output + j);
    } else {
      h_before = load_some<V>(row.h_before + j, n);
    }
    C::backward(part, h_before, c_before, c, grad_h, grad_c, grad_h_before);
    for (int p = 0; p < C::kParts; ++p) part[p].store(row.parts + p * row.part + j);
    if constexpr (C::kHasMemory) grad_c.store(row.grad_c + j);
    else grad_h_before.store(row.grad_h + j);
  }
}

// ---- pools, element by element ----

template <class P, class V>
void pool_step(typename V::T* value, int64_t stride, const typename V::T* h, int64_t n, bool first) {
  if constexpr (P::kStreams) {
    for (int64_t d = 0; d < n; d += V::N) {
      const V state = load_some<V>(h + d, n - d);
      for (int p = 0; p < P::kWidth; ++p) {
        auto* out = value + p * stride + d;
        store_some<V>(first ? state : P::template add<V>(p, load_some<V>(out, n - d), state), out, n - d);
      }
    }
  }
}

template <class V>
void scale(typename V::T* value, typename V::T factor, int64_t n) {
  for (int64_t d = 0; d < n; d += V::N)
    store_some<V>(load_some<V>(value + d, n - d) * V::set(factor), value + d, n - d);
}

template <class V>
typename V::T dot(const typename V::T* x, const typename V::T* y, int64_t n) {
  V sum = V::zero();
  for (int64_t d = 0; d < n; d += V::N) sum = fma(load_some<V>(x + d, n - d), load_some<V>(y + d, n - d), sum);
  alignas(64) typename V::T lane[V::N];
  sum.store(lane);
  for (int half = V::N / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

template <class V>
void axpy(typename V::T factor, const typename V::T* x, typename V::T* y, int64_t n) {
  for (int64_t d = 0; d < n; d += V::N)
    store_some<V>(fma(V::set(factor), load_some<V>(x + d, n - d), load_some<V>(y + d, n - d)), y + d, n - d);
}

// Online softmax: what was added so far is scaled down when a greater score comes.
template <class V>
void attend(AttentionRow<typename V::T>& row, const typename V::T* w, const typename V::T* h, int64_t n) {
  using T = typename V::T;
  const T score = dot<V>(w, h, n);
  T weight = 1;
  if (score > row.largest) {
    const T shrink = static_cast<T>(__builtin_exp(static_cast<double>(row.largest - score)));
    row.largest = score;
    row.sum = row.sum * shrink;
    scale<V>(row.value, shrink, n);
  } else {
    weight = static_cast<T>(__builtin_exp(static_cast<double>(score - row.largest)));
  }
  row.sum += weight;
  axpy<V>(weight, h, row.value, n);
}

// Batcher's odd-even merge network, each lane an element of the state.
template <class V>
void sorted_sum(const typename V::T* states, int64_t stride, int64_t length, int64_t n, const typename V::T* weights,
                typename V::T* scratch, typename V::T* out) {
  const auto at = [&](int64_t t) { return scratch + t * V::N; };
  for (int64_t d = 0; d < n; d += V::N) {
    const V limit = V::set(std::numeric_limits<typename V::T>::max());
    V nan = V::zero();  // stays 0 unless a state is NaN
    for (int64_t t = 0; t < length; ++t) {
      const V state = load_some<V>(states + t * stride + d, n - d);
      state.store(at(t));
      const V finite = least(max(state, V::zero() - limit), limit);
      nan = nan + (finite - finite);
    }
    for (int64_t p = 1; p < length; p *= 2)
      for (int64_t k = p; k > 0; k /= 2)
        for (int64_t j = k % p; j + k < length; j += 2 * k)
          for (int64_t i = j; i < j + k && i + k < length; ++i) {
            if (i / (2 * p) != (i + k) / (2 * p)) continue;
            const V x = V::load(at(i)), y = V::load(at(i + k));
            max(x, y).store(at(i));
            least(x, y).store(at(i + k));
          }
    V sum = nan;
    for (int64_t t = 0; t < length; ++t) sum = fma(V::set(weights[t]), V::load(at(t)), sum);
    store_some<V>(sum, out + d, n - d);
  }
}

template <class V>
constexpr RecurrentKernels<typename V::T> recurrent_table() {
  return {kColumns<V>,
          kFullHeight,
          product<PlainWord<V>>,
          pack<typename V::T>,
          {cell_step<Lstm, V>, cell_step<Gru, V>},
          {cell_step_back<Lstm, V>, cell_step_back<Gru, V>},
          {nullptr, pool_step<LastPool, V>, pool_step<FirstPool, V>, pool_step<MeanPool, V>, pool_step<MaxPool, V>,
           pool_step<MeanMaxPool, V>, pool_step<LastMeanPool, V>, nullptr, nullptr},
          scale<V>,
          dot<V>,
          axpy<V>,
          attend<V>,
          sorted_sum<V>};
}

}  // namespace
}  // namespace pycm::cpu
