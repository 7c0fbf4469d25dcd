// What the kernels of similarity share: the batch, the numbers of a row, the exact score of a pair, tiles. What they do with a
// tile's sums: similarity_store.cuh.
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
  int64_t width;  // of a row of `out`
  char* codes;    // scratch of similarity_sm90.cu, null where that does not apply, or takes the rows as they are
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

// ---- tiles ----

// One block's tile of one pair of matrices. In shared memory: it is needed before and after the product, not in between.
struct TilePlace {
  const char *x, *y;            // the first rows of the matrices
  int64_t number, row, column;  // of the tile
  int64_t x_matrix, y_matrix;   // which of each side's
  int rows, columns;            // of the tile that exist
  int64_t origin, out;          // of the matrices, in elements
};

// Pairs of matrices are cut into tiles, kM x kN.
template <int kM, int kN>
__host__ __device__ __forceinline__ int64_t tile_count(const SimilarityProblem& p) {
  return (p.x.rows + kM - 1) / kM * ((p.y.rows + kN - 1) / kN) * p.batch;
}

// Consecutive tiles share rows of y, and within 16 of them rows of x, in the cache.
template <int kM, int kN>
__device__ __forceinline__ TilePlace place_tile(const SimilarityProblem& p, int64_t tile) {
  constexpr uint32_t kGroup = 16;
  // A matrix has fewer than 2^32 tiles, a batch may have more.
  const uint32_t down = static_cast<uint32_t>((p.x.rows + kM - 1) / kM),
                 across = static_cast<uint32_t>((p.y.rows + kN - 1) / kN);
  const int64_t per_pair = int64_t{down} * across, pair = p.batch == 1 ? 0 : tile / per_pair;
  const uint32_t in_pair = static_cast<uint32_t>(tile - pair * per_pair);
  const uint32_t group = in_pair / (kGroup * across), in_group = in_pair % (kGroup * across);
  const uint32_t height = min(kGroup, down - group * kGroup);
  const Place matrices = place(p, pair);
  TilePlace at;
  at.number = tile;
  at.x = p.x.data + matrices.x * element_bytes(p.dtype);
  at.y = p.y.data + matrices.y * element_bytes(p.dtype);
  at.row = int64_t{group * kGroup + in_group % height} * kM;
  at.column = int64_t{in_group / height} * kN;
  at.x_matrix = matrices.x_info;
  at.y_matrix = matrices.y_info;
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
        info[i] = known == nullptr
                      ? RowInfo<T>()
                      : known[(first ? at.x_matrix * p.x.rows + at.row : at.y_matrix * p.y.rows + at.column) + r];
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

// similarity_sm90.cu: whether it takes the problem, the bytes of `codes` it wants then, and the product. `split`: rows that
// are converted become two fp16 numbers an element, not one.
bool similarity_sm90_fits(const SimilarityProblem& problem);
int64_t similarity_sm90_code_bytes(const SimilarityProblem& problem);
void similarity_sm90(const SimilarityProblem& problem, bool split, void* stream);

}  // namespace pycm::cuda
