// What the kernels of similarity share: the batch, the numbers of a row, the exact score of a pair, the epilogue.
#pragma once

#include <algorithm>

#include "core/check.h"
#include "cuda/launch.h"
#include "cuda/rows.cuh"
#include "ops/similarity.h"

namespace pycm::cuda {

// One row as the tiles see it: they multiply (element - shift) * factor, and a product counts `scale` times. `square` is
// the squared norm of element - shift. A scale of NaN: the row's pairs are to be scored exactly.
template <class T>
struct alignas(16) RowInfo {
  T shift = 0, factor = 1, scale = 1, square = 0;
};

// Matrices of one side. info_strides count matrices: their number is the same for every index of a broadcast axis.
struct Operand {
  const char* data;
  int64_t rows, row_stride, dim_stride;
  int64_t batch_strides[kMaxDims], info_strides[kMaxDims];
  int64_t matrices;
  void* info;  // RowInfo<T> [matrices, rows]; null where the blocks compute it, or none is needed
};

struct SimilarityProblem {
  Operand x, y;
  DType dtype;
  int64_t dim;
  MetricTraits metric;
  bool wide;    // multiplied in fp64: fp64 rows, and the shortest others (similarity_f64.cu)
  bool scaled;  // rows get a power of two as factor, for fp16
  bool fused;   // a block holds a whole pair of matrices, and computes their RowInfo itself
  int batch_ndim;
  int64_t batch_shape[kMaxDims];
  int64_t batch;
  // Distances are measured from a point among y's rows, T [y.matrices, dim]: differences do not change, and far less
  // cancels. Any point is right.
  void* origins;
  void* out;
};

// Where one pair of matrices lies: offsets in elements, and the numbers of the matrices.
struct Place {
  int64_t x = 0, y = 0, x_info = 0, y_info = 0;
};

// `index` counts the pairs, or with `counted` only those that these info_strides tell apart.
__device__ inline Place place(const SimilarityProblem& p, int64_t index, const int64_t* counted = nullptr) {
  Place result;
  for (int d = p.batch_ndim - 1; d >= 0; --d) {
    if (counted != nullptr && counted[d] == 0) continue;
    const int64_t i = index % p.batch_shape[d];
    index /= p.batch_shape[d];
    result.x += i * p.x.batch_strides[d];
    result.y += i * p.y.batch_strides[d];
    result.x_info += i * p.x.info_strides[d];
    result.y_info += i * p.y.info_strides[d];
  }
  return result;
}

__host__ __device__ constexpr int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

__device__ __forceinline__ float widen(DType dtype, uint16_t bits) {
  return dtype == DType::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

// fp32 and below, as fp32.
__device__ __forceinline__ float load_float(DType dtype, const char* row, int64_t i) {
  if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(row)[i];
  return widen(dtype, reinterpret_cast<const uint16_t*>(row)[i]);
}

__device__ __forceinline__ double load_double(DType dtype, const char* row, int64_t i) {
  if (dtype == DType::kFloat64) return reinterpret_cast<const double*>(row)[i];
  return load_float(dtype, row, i);
}

// The exact score of row i of x and row j of y, by one warp. Rare, hence a call.
__device__ __noinline__ static double exact_pair(const SimilarityProblem& p, const char* x, int64_t i, const char* y,
                                                 int64_t j) {
  const Rows x_rows{x, p.dtype, p.x.rows, p.dim, p.x.row_stride, p.x.dim_stride};
  const Rows y_rows{y, p.dtype, p.y.rows, p.dim, p.y.row_stride, p.y.dim_stride};
  double score = 0;
  visit_elements(p.dtype, [&](auto element) {
    using Element = decltype(element);
    const RowStats stats = row_stats(Row<Element>(x_rows, i), p.dim, p.metric);
    score = exact_score<Element>(x_rows, i, stats, y_rows, j, p.metric);
  });
  return score;
}

// ---- the numbers of a row, by one warp ----

// f(element, d) for this lane's share: 16 bytes at a time, read at once where the row is laid out for that; in the same order
// in any case, so that a view gives the bits of its copy.
template <class F>
__device__ __forceinline__ void for_elements(DType dtype, const char* row, int64_t stride, int64_t dim, F f) {
  const int bytes = element_bytes(dtype), each = 16 / bytes;
  const bool aligned = stride == 1 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
  const int64_t whole = aligned ? dim / each * each : 0;
  for (int64_t d = lane_index() * each; d < dim; d += kWarp * each) {
    if (d >= whole) {
      for (int64_t i = d; i < min(d + each, dim); ++i) f(load_double(dtype, row, i * stride), i);
      continue;
    }
    const uint4 bits = load_readonly(reinterpret_cast<const uint4*>(row + d * bytes));
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (dtype == DType::kFloat64) {
        if (w % 2 == 0)
          f(__longlong_as_double(static_cast<long long>(uint64_t{words[w + 1]} << 32 | words[w])), d + w / 2);
      } else if (dtype == DType::kFloat32) {
        f(static_cast<double>(__uint_as_float(words[w])), d + w);
      } else {
        f(static_cast<double>(widen(dtype, static_cast<uint16_t>(words[w]))), d + 2 * w);
        f(static_cast<double>(widen(dtype, static_cast<uint16_t>(words[w] >> 16))), d + 2 * w + 1);
      }
    }
  }
}

__device__ __forceinline__ double warp_sum(double value) {
  return warp_reduce(value, [](double a, double b) { return a + b; });
}

// Read once from memory, for pearson a second time from the cache.
template <class T>
__device__ __noinline__ RowInfo<T> row_info(const SimilarityProblem& p, const Operand& side, const char* row,
                                            const T* origin) {
  constexpr bool kDouble = sizeof(T) == 8;
  double shift = 0;
  if (p.metric.centre) {
    const double first = load_double(p.dtype, row, 0);
    bool varies = !(first - first == 0);
    double sum = 0;
    for_elements(p.dtype, row, side.dim_stride, p.dim, [&](double value, int64_t) {
      varies |= value != first;
      sum += value;
    });
    sum = warp_sum(sum) / static_cast<double>(p.dim);
    shift = __any_sync(kAllLanes, varies) ? static_cast<T>(sum) : first;
  }
  double sum = 0;
  for_elements(p.dtype, row, side.dim_stride, p.dim, [&](double value, int64_t d) {
    const double moved = value - (p.metric.distance ? origin[d] : shift);
    sum += moved * moved;
  });
  const double norm = sqrt(warp_sum(sum));

  RowInfo<T> info;
  info.shift = static_cast<T>(shift);
  info.square = static_cast<T>(norm * norm);
  // A norm out of range would lose bits in the product or its scale; so would deviations far below the row's mean.
  const double tiny = kDouble ? 1e-140 : p.scaled ? 0x1p-110 : 0x1p-60;
  const double huge = kDouble ? 1e140 : p.scaled ? 0x1p136 : 0x1p60;
  const bool lost =
      p.metric.centre && fabs(shift) * sqrt(static_cast<double>(p.dim)) > (kDouble ? 0x1p25 : 0x1p11) * norm;
  double scale = p.metric.normalise ? 0 : 1;
  if (norm != 0) {
    double factor = 1;
    if (p.scaled) {
      // norm * factor in [2^14, 2^15): no element overflows fp16, and its rounding is 2^-25 at most.
      const long long exponent = (__double_as_longlong(norm) >> 52) - 1023;
      factor = __longlong_as_double((14 - exponent + 1023) << 52);
    }
    info.factor = static_cast<T>(factor);
    scale = 1 / (p.metric.normalise ? norm * factor : factor);
    if (!(norm >= tiny && norm <= huge) || lost) {
      info.factor = 0;
      scale = __longlong_as_double(0x7ff8000000000000ll);
    }
  }
  info.scale = static_cast<T>(scale);
  return info;
}

// ---- epilogue ----

// The score of a product; `doubt` where too few of its bits are right, or it is not finite: then the pair is scored exactly.
template <class T>
__device__ __forceinline__ T finish(const SimilarityProblem& p, T product, const RowInfo<T>& x, const RowInfo<T>& y,
                                    bool& doubt) {
  constexpr bool kDouble = sizeof(T) == 8;
  constexpr T kMax = kDouble ? static_cast<T>(1.7976931348623157e308) : static_cast<T>(3.4028234663852886e38f);
  const T value = product * x.scale * y.scale;
  if (!p.metric.distance) {
    doubt = !(fabs(value) <= kMax);
    return value;
  }
  // Below an eighth of |x|^2 + |y|^2 too much has cancelled; near the smallest squares the bits have underflowed.
  const T both = x.square + y.square, square = both - 2 * value;
  doubt = !(square > both / 8 + static_cast<T>(kDouble ? 0x1p-960 : 0x1p-100)) || !(square <= kMax);
  return p.metric.root ? sqrt(square) : square;
}

// One block's tile of one pair of matrices. In shared memory: it is needed before and after the product, not in between.
struct TilePlace {
  const char *x, *y;            // the first rows of the matrices
  int64_t number, row, column;  // of the tile
  int64_t x_info, y_info;       // of the tile's first rows
  int rows, columns;            // of the tile that exist
  int64_t origin, out;          // of the matrices, in elements
};

// A sum of more than this many products is the sum of such runs, so that fp32's rounding does not pile up.
constexpr int kRun = 512;

// A warp's accumulators are m x n tiles of kTileRows x 8 in mma.sync's layout, the first at (row, column) of the block's
// tile. What the runs before came to waits in the output, where each thread has its own places, in the cache: adds the
// `sums` to it and starts them anew, or in the end adds it to the sums.
template <int kTileRows, class T, int kTilesM, int kTilesN, int kEach>
__device__ __forceinline__ void carry_sums(const SimilarityProblem& p, const TilePlace& at, int row, int column,
                                           bool first, bool last, T (&sums)[kTilesM][kTilesN][kEach]) {
  T* out = static_cast<T*>(p.out) + at.out + at.row * p.y.rows + at.column;
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int r = row + i * kTileRows + e / 2 * 8 + lane_index() / 4;
      if (r >= at.rows) continue;
      T* to = out + r * p.y.rows + column + lane_index() % 4 * 2 + e % 2;
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        if (column + j * 8 + lane_index() % 4 * 2 + e % 2 >= at.columns) continue;
        T& sum = sums[i][j][e];
        if (!first) sum += to[j * 8];
        if (last) continue;
        to[j * 8] = sum;
        sum = 0;
      }
    }
  }
}

// Writes the scores of such accumulators; then scores the doubtful pairs exactly, one after another.
template <int kTileRows, class Out, class T, int kTilesM, int kTilesN, int kEach>
__device__ __forceinline__ void store_scores(const SimilarityProblem& p, const TilePlace& at, const RowInfo<T>* x_info,
                                             const RowInfo<T>* y_info, int row, int column,
                                             const T (&sums)[kTilesM][kTilesN][kEach]) {
  static_assert(kTilesM * kTilesN * kEach <= 64, "one bit each");
  const int lane = lane_index();
  const int64_t width = p.y.rows;
  Out* out = static_cast<Out*>(p.out) + at.out + at.row * width + at.column;
  const auto row_of = [&](int i, int e, int of_lane) { return row + i * kTileRows + e / 2 * 8 + of_lane / 4; };
  const auto column_of = [&](int j, int e, int of_lane) { return column + j * 8 + of_lane % 4 * 2 + e % 2; };
  // Pairs of scores where every row starts on one.
  const bool in_pairs = width % 2 == 0 && reinterpret_cast<uintptr_t>(out) % (2 * sizeof(Out)) == 0;
  uint64_t doubts = 0;
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int e = 0; e < kEach; e += 2) {
      __syncwarp();  // or the numbers of all rows and columns would be read into registers at once
      const int r = row_of(i, e, lane);
      if (r >= at.rows) continue;
      const RowInfo<T> x = x_info[r];
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        const int c = column_of(j, e, lane);
        if (c >= at.columns) continue;
        const bool second = c + 1 < at.columns;
        bool doubt[2] = {};
        Out value[2] = {};
        value[0] = static_cast<Out>(finish(p, sums[i][j][e], x, y_info[c], doubt[0]));
        if (second) value[1] = static_cast<Out>(finish(p, sums[i][j][e + 1], x, y_info[c + 1], doubt[1]));
        const int bit = (i * kTilesN + j) * kEach + e;
        doubts |= (uint64_t{doubt[0]} | uint64_t{doubt[1]} << 1) << bit;
        Out* to = out + r * width + c;
        if (in_pairs && second) {
          struct alignas(2 * sizeof(Out)) Pair {
            Out first, second;
          };
          *reinterpret_cast<Pair*>(to) = {value[0], value[1]};
        } else {
          to[0] = value[0];
          if (second) to[1] = value[1];
        }
      }
    }
  }
  for (unsigned lanes = __ballot_sync(kAllLanes, doubts != 0); lanes != 0; lanes &= lanes - 1) {
    const int owner = __ffs(static_cast<int>(lanes)) - 1;
    for (uint64_t bits = __shfl_sync(kAllLanes, doubts, owner); bits != 0; bits &= bits - 1) {
      const int bit = __ffsll(static_cast<long long>(bits)) - 1;
      const int e = bit % kEach, tile = bit / kEach;
      const int r = row_of(tile / kTilesN, e, owner), c = column_of(tile % kTilesN, e, owner);
      const double score = exact_pair(p, at.x, at.row + r, at.y, at.column + c);
      if (lane == owner) out[r * width + c] = static_cast<Out>(score);
    }
  }
}

// Pairs of matrices are cut into tiles, kM x kN.
template <int kM, int kN>
__host__ __device__ __forceinline__ int64_t tile_count(const SimilarityProblem& p) {
  return (p.x.rows + kM - 1) / kM * ((p.y.rows + kN - 1) / kN) * p.batch;
}

// Consecutive tiles share rows of y, and within 16 of them rows of x, in the cache.
template <int kM, int kN>
__device__ __forceinline__ TilePlace place_tile(const SimilarityProblem& p, int64_t tile) {
  constexpr int64_t kGroup = 16;
  const int64_t down = (p.x.rows + kM - 1) / kM, across = (p.y.rows + kN - 1) / kN;
  const int64_t pair = tile / (down * across), in_pair = tile % (down * across);
  const int64_t group = in_pair / (kGroup * across), in_group = in_pair % (kGroup * across);
  const int64_t height = min(kGroup, down - group * kGroup);
  const Place matrices = place(p, pair);
  TilePlace at;
  at.number = tile;
  at.x = p.x.data + matrices.x * element_bytes(p.dtype);
  at.y = p.y.data + matrices.y * element_bytes(p.dtype);
  at.row = (group * kGroup + in_group % height) * kM;
  at.column = in_group / height * kN;
  at.x_info = matrices.x_info * p.x.rows + at.row;
  at.y_info = matrices.y_info * p.y.rows + at.column;
  at.rows = static_cast<int>(min(int64_t{kM}, p.x.rows - at.row));
  at.columns = static_cast<int>(min(int64_t{kN}, p.y.rows - at.column));
  at.origin = matrices.y_info * p.dim;
  at.out = pair * p.x.rows * p.y.rows;
  return at;
}

// Places the tile, and stages the numbers of its rows, x's and then y's. Begins and ends with a barrier. kMayFuse: whether
// a tile may hold whole matrices.
template <class T, int kM, int kN, bool kMayFuse>
__device__ __forceinline__ void begin_tile(const SimilarityProblem& p, int64_t tile, TilePlace& at, RowInfo<T>* info) {
  __syncthreads();  // the tile before has read what is overwritten now
  if (threadIdx.x == 0) at = place_tile<kM, kN>(p, tile);
  __syncthreads();
  if (kMayFuse && p.fused) {
    for (int i = threadIdx.x / kWarp; i < at.rows + at.columns; i += blockDim.x / kWarp) {
      const bool first = i < at.rows;
      const Operand& side = first ? p.x : p.y;
      const int64_t r = first ? at.row + i : at.column + i - at.rows;
      const char* row = (first ? at.x : at.y) + r * side.row_stride * element_bytes(p.dtype);
      const RowInfo<T> found = row_info<T>(p, side, row, static_cast<const T*>(p.origins) + at.origin);
      if (lane_index() == 0) info[first ? i : kM + i - at.rows] = found;
    }
  } else {
    for (int i = threadIdx.x; i < kM + kN; i += blockDim.x) {
      const bool first = i < kM;
      const int r = first ? i : i - kM;
      const RowInfo<T>* known = static_cast<const RowInfo<T>*>(first ? p.x.info : p.y.info);
      if (r < (first ? at.rows : at.columns))
        info[i] = known == nullptr ? RowInfo<T>() : known[(first ? at.x_info : at.y_info) + r];
    }
  }
  __syncthreads();
}

// The blocks of a kernel that takes tiles, or rows, in turn.
inline unsigned similarity_blocks(int64_t work) {
  return static_cast<unsigned>(std::min<int64_t>(work, int64_t{16} * device_limits().multiprocessors));
}

// similarity_f64.cu.
void similarity_f64(const SimilarityProblem& problem, void* stream);

}  // namespace pycm::cuda
