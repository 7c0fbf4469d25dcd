// Rows where they lie against a packed panel of vectors, and what remains of their products: maxima, or the values
// themselves. Included by kernels_impl.h alone, inside its anonymous namespace.
//
//             panel [D][columns]                  One operand is never packed: of a late interaction each row meets few
//            +---------+---------+                panels, and to copy it would cost as much as reading it. A tile is
//            | vector  | vector  |                height x columns accumulators; a step broadcasts `height` elements,
//   row i    |  sums   |  sums   |  x height      one of each row, and loads one line of the panel. The rows of an item
//            +---------+---------+                pass one tile after another, and a column's maximum stays in a
//   best     |   max   |   max   |                register: no product is written.
//
// 2 D flops a product, 24 multiply-adds for 14 loads on AVX-512. The sum of a product is that of `product`
// (chains of kDepth terms), whatever the tile, so that a last tile may go back over rows it has seen.

#if defined(PYCM_LEVEL_AVX512)
constexpr int kRowHeights[] = {12, 8, 4, 2, 1};
#elif defined(PYCM_LEVEL_AVX2)
constexpr int kRowHeights[] = {6, 4, 2, 1};
#else
constexpr int kRowHeights[] = {4, 2, 1};
#endif
constexpr int kRowHeightCount = sizeof kRowHeights / sizeof *kRowHeights;

enum class Keep { kMax, kArg, kValues };

template <class V, int kVecs, Keep kKeep>
struct RowPass {
  using T = typename V::T;
  static constexpr int kWidth = kVecs * V::N;
  const RowTile<T>& tile;
  V best[kVecs], poison[kVecs];

  // Rows [first, first + kHeight).
  template <int kHeight>
  PYCM_INLINE void step(int64_t first) {
    const T* row[kHeight];
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i) row[i] = tile.rows + (first + i) * tile.row_stride;
    // The next tile's rows, while this one's are worked on: no hardware follows twelve short streams.
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t ahead = kHeight * tile.row_stride;
    const T* b = tile.panel;
    alignas(64) T partial[kHeight * kWidth];
    V acc[kHeight][kVecs];
    for (int64_t begin = 0;; begin += kDepth) {
      const int64_t end = tile.dim - begin < kDepth ? tile.dim : begin + kDepth;
#pragma GCC unroll 12
      for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) acc[i][j] = V::zero();
      for (int64_t d = begin; d < end; ++d) {
        if (d % kLine == 0)
#pragma GCC unroll 12
          for (int i = 0; i < kHeight; ++i) __builtin_prefetch(row[i] + ahead + d);
        V column[kVecs];
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) column[j] = V::load(b + j * V::N);
#pragma GCC unroll 12
        for (int i = 0; i < kHeight; ++i) {
          const V element = V::set(row[i][d]);
#pragma GCC unroll 2
          for (int j = 0; j < kVecs; ++j) acc[i][j] = fma(element, column[j], acc[i][j]);
        }
        b += kColumns<V>;
      }
      if (begin == 0 && end == tile.dim) break;
#pragma GCC unroll 12
      for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) {
          T* saved = partial + i * kWidth + j * V::N;
          if (begin != 0) acc[i][j] = acc[i][j] + V::load(saved);
          acc[i][j].store(saved);
        }
      if (end == tile.dim) break;
    }
    keep<kHeight>(first, acc);
  }

  template <int kHeight>
  PYCM_INLINE void keep(int64_t first, V (&acc)[kHeight][kVecs]) {
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i) {
      const V scale = V::set(tile.scale == nullptr ? T(1) : tile.scale[first + i]);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) {
        const V value = acc[i][j] * scale;
        if constexpr (kKeep == Keep::kValues) {
          value.store(tile.values + (first + i) * kColumns<V> + j * V::N);
        } else {
          // A NaN or an infinity times 0 is NaN, and stays.
          poison[j] = fma(value, V::zero(), poison[j]);
          if constexpr (kKeep == Keep::kMax) best[j] = max(best[j], value);
          else keep_first(static_cast<int32_t>(first + i), j, value);
        }
      }
    }
  }

  // The lowest row of those with the largest value.
  PYCM_INLINE void keep_first(int32_t row, int j, V value) {
    alignas(64) T values[V::N];
    value.store(values);
    T* maxima = tile.best + j * V::N;
    int32_t* rows = tile.arg + j * V::N;
    for (int l = 0; l < V::N; ++l) {
      const bool better = values[l] > maxima[l];
      rows[l] = better ? row : rows[l];
      maxima[l] = better ? values[l] : maxima[l];
    }
  }

  // Whole tiles, then one that holds the rest, if need be over rows seen before, or ever lower ones.
  template <int kAt = 0>
  PYCM_INLINE void rest(int64_t at) {
    if constexpr (kAt < kRowHeightCount) {
      constexpr int kHeight = kRowHeights[kAt], kNext = kAt + 1 < kRowHeightCount ? kRowHeights[kAt + 1] : 0;
      for (; at + kHeight <= tile.count; at += kHeight) step<kHeight>(at);
      const int64_t left = tile.count - at;
      if (left == 0) return;
      if (left > kNext && tile.count >= kHeight) return step<kHeight>(tile.count - kHeight);
      rest<kAt + 1>(at);
    }
  }

  void run() {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      best[j] = V::set(-T(__builtin_inf()));
      poison[j] = V::zero();
    }
    if constexpr (kKeep == Keep::kArg) {
      for (int j = 0; j < kWidth; ++j) {
        tile.best[j] = -T(__builtin_inf());
        tile.arg[j] = 0;
      }
    }
    rest(0);
    if constexpr (kKeep != Keep::kValues) {
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) {
        const V found = kKeep == Keep::kMax ? best[j] : V::load(tile.best + j * V::N);
        (found + poison[j]).store(tile.best + j * V::N);
      }
    }
  }
};

template <class V, Keep kKeep>
void row_pass(const RowTile<typename V::T>& tile) {
  if (tile.columns > V::N) RowPass<V, 2, kKeep>{tile, {}, {}}.run();
  else RowPass<V, 1, kKeep>{tile, {}, {}}.run();
}

template <class V>
void row_products(const RowTile<typename V::T>& tile) {
  if (tile.values != nullptr) row_pass<V, Keep::kValues>(tile);
  else if (tile.arg != nullptr) row_pass<V, Keep::kArg>(tile);
  else row_pass<V, Keep::kMax>(tile);
}
