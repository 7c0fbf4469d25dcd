// The epilogue of similarity's kernels: long sums, from products to scores, what is doubtful, how scores are written.
#pragma once

#include "cuda/similarity.cuh"

namespace pycm::cuda {

// The score of a product; `doubt` where too few of its bits are right, or it is not finite: then the pair is scored exactly.
template <bool kDistance, class T>
__device__ __forceinline__ T finish(T product, const RowInfo<T>& x, const RowInfo<T>& y, bool root, bool& doubt) {
  constexpr bool kDouble = sizeof(T) == 8;
  constexpr T kMax = kDouble ? static_cast<T>(1.7976931348623157e308) : static_cast<T>(3.4028234663852886e38f);
  const T value = product * x.scale * y.scale;
  if constexpr (!kDistance) {
    doubt = !(fabs(value) <= kMax);
    return value;
  } else {
    // Below an eighth of |x|^2 + |y|^2 too much has cancelled; near the smallest squares the bits have underflowed.
    const T both = x.square + y.square, square = both - 2 * value;
    doubt = !(square > both / 8 + static_cast<T>(kDouble ? 0x1p-960 : 0x1p-100)) || !(square <= kMax);
    return root ? sqrt(square) : square;
  }
}

// A sum of more than this many products is the sum of such runs, so that fp32's rounding does not pile up.
constexpr int kRun = 512;

// A warp's accumulators are m x n tiles of kTileRows x 8 in mma.sync's layout, the first at (row, column) of the block's
// tile. What the runs before came to waits in the output, where each thread has its own places, in the cache: adds the
// `sums` to it and starts them anew, or in the end adds it to the sums.
template <int kTileRows, class T, int kTilesM, int kTilesN, int kEach>
__device__ __forceinline__ void carry_sums(const SimilarityProblem& p, const TilePlace& at, int row, int column,
                                           bool first, bool last, T (&sums)[kTilesM][kTilesN][kEach]) {
  row += lane_index() / 4, column += lane_index() % 4 * 2;
  const int rows = at.rows - row, columns = at.columns - column;
  T* const out = static_cast<T*>(p.out) + at.out + (at.row + row) * p.width + at.column + column;
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int r = i * kTileRows + e / 2 * 8;
      if (r >= rows) continue;
      T* to = out + r * p.width + e % 2;
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        if (j * 8 + e % 2 >= columns) continue;
        T& sum = sums[i][j][e];
        if (!first) sum += to[j * 8];
        if (last) continue;
        to[j * 8] = sum;
        sum = 0;
      }
    }
  }
}

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// Writes the scores of such accumulators: a bit for each that is doubtful. Two at a time where `in_pairs`: then a warp fills
// whole sectors of 32 bytes. kWhole: in pairs, and all exist.
template <bool kDistance, bool kWhole, int kTileRows, class Out, class T, int kTilesM, int kTilesN, int kEach>
__device__ __forceinline__ uint64_t write_scores(const SimilarityProblem& p, const TilePlace& at,
                                                 const RowInfo<T>* x_info, const RowInfo<T>* y_info, int row,
                                                 int column, bool in_pairs, const T (&sums)[kTilesM][kTilesN][kEach]) {
  static_assert(kTilesM * kTilesN * kEach <= 64, "one bit each");
  constexpr int kRows = kEach / 2;  // of a tile, in one thread
  row += lane_index() / 4, column += lane_index() % 4 * 2;
  x_info += row, y_info += column;
  // Differences, so that nothing is the same for all tiles, which would keep it in registers during the product.
  const int rows = kWhole ? kTilesM * kTileRows : at.rows - row, columns = kWhole ? kTilesN * 8 : at.columns - column;
  Out* const out = static_cast<Out*>(p.out) + at.out + (at.row + row) * p.width + at.column + column;
  uint64_t doubts = 0;
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
    RowInfo<T> x[kRows];
    Out* to[kRows];
#pragma unroll
    for (int h = 0; h < kRows; ++h) {
      const int r = i * kTileRows + h * 8;
      if (r < rows) x[h] = x_info[r];
      to[h] = out + r * p.width;
    }
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      if (j % 4 == 0) __syncwarp();  // or the numbers of all columns would be read into registers at once
      const int c = j * 8;
      const bool second = c + 1 < columns;
      RowInfo<T> y[2];
      if (c < columns) y[0] = y_info[c];
      if (second) y[1] = y_info[c + 1];
#pragma unroll
      for (int h = 0; h < kRows; ++h) {
        if (i * kTileRows + h * 8 >= rows || c >= columns) continue;
        const int bit = (i * kTilesN + j) * kEach + 2 * h;
        bool doubt[2];
        const T* const sum = &sums[i][j][2 * h];
        Pair<Out> scores = {static_cast<Out>(finish<kDistance>(sum[0], x[h], y[0], p.metric.root, doubt[0])), 0};
        if (doubt[0]) doubts |= uint64_t{1} << bit;
        if (second) {
          scores.second = static_cast<Out>(finish<kDistance>(sum[1], x[h], y[1], p.metric.root, doubt[1]));
          if (doubt[1]) doubts |= uint64_t{2} << bit;
        }
        if ((kWhole || in_pairs) && second) {
          *reinterpret_cast<Pair<Out>*>(to[h] + c) = scores;
        } else {
          to[h][c] = scores.first;
          if (second) to[h][c + 1] = scores.second;
        }
      }
    }
  }
  return doubts;
}

// Writes the scores, then scores the doubtful pairs exactly, one after another. kMayBeWhole: worth code of its own for tiles of
// which all exists.
template <int kTileRows, bool kMayBeWhole, class Out, class T, int kTilesM, int kTilesN, int kEach>
__device__ __forceinline__ void store_scores(const SimilarityProblem& p, const TilePlace& at, const RowInfo<T>* x_info,
                                             const RowInfo<T>* y_info, int row, int column,
                                             const T (&sums)[kTilesM][kTilesN][kEach]) {
  const Out* const out = static_cast<const Out*>(p.out) + at.out + at.row * p.width + at.column + column;
  const bool in_pairs = p.width % 2 == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(Pair<Out>) == 0;
  const bool whole =
      kMayBeWhole && in_pairs && row + kTilesM * kTileRows <= at.rows && column + kTilesN * 8 <= at.columns;
  const auto write = [&](auto is_whole) {
    constexpr bool kWhole = decltype(is_whole)::value;
    if (p.metric.distance)
      return write_scores<true, kWhole, kTileRows, Out>(p, at, x_info, y_info, row, column, in_pairs, sums);
    return write_scores<false, kWhole, kTileRows, Out>(p, at, x_info, y_info, row, column, in_pairs, sums);
  };
  const uint64_t doubts = whole ? write(std::bool_constant<kMayBeWhole>()) : write(std::false_type());
  for (unsigned lanes = __ballot_sync(kAllLanes, doubts != 0); lanes != 0; lanes &= lanes - 1) {
    const int owner = __ffs(static_cast<int>(lanes)) - 1;
    for (uint64_t bits = __shfl_sync(kAllLanes, doubts, owner); bits != 0; bits &= bits - 1) {
      const int bit = __ffsll(static_cast<long long>(bits)) - 1;
      const int e = bit % kEach, tile = bit / kEach;
      const int64_t r = at.row + row + tile / kTilesN * kTileRows + e / 2 * 8 + owner / 4;
      const int64_t c = at.column + column + tile % kTilesN * 8 + owner % 4 * 2 + e % 2;
      const double score = exact_pair(p, at.x, r, at.y, c);
      if (lane_index() == owner) static_cast<Out*>(p.out)[at.out + r * p.width + c] = static_cast<Out>(score);
    }
  }
}

}  // namespace pycm::cuda
