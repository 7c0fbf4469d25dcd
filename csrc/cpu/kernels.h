// The inner loops, one table per instruction set. Every entry means the same at every level; the fp64 sums give the
// same bits at every level, the tile products agree up to the order-independent bound of docs/exactness.md.
//
//   kernels_impl.h      the loops, written once over vec.h
//   kernels_<level>.cpp the same loops compiled for one level, each in an anonymous namespace with its own flags
#pragma once

#include <cstdint>

#include "core/metric.h"

namespace pycm::cpu {

// A tile is up to kMaxTileRows queries x (columns of the level) gallery rows: 12 x 32 fp32 fills 24 of AVX-512's registers.
constexpr int kMaxTileRows = 12;
constexpr int kMaxTileColumns = 32;
// Sums longer than this are split, so that rounding grows with kDepth + D / kDepth rather than with D.
constexpr int64_t kDepth = 128;

// One operand of a tile is packed "dimension first": a[d * height + row], b[d * columns + column].
template <class T>
struct Tile {
  int height = 0;  // of `a`: a multiple of Kernels::height_step, at most Kernels::height
  int64_t dim = 0;
  const T* a = nullptr;
  const T* b = nullptr;
  // value[i][j] = (sum over d of a[d][i] * b[d][j]) * scale[j] + bias[j]
  const T* scale = nullptr;
  const T* bias = nullptr;
};

// Which values may reach their row's threshold: hits[i] has bit j set unless
// value[i][j] < cut[i] - slack[j] - row_slack[i] * column_slack[j]; a NaN on either side sets it.
struct Screen {
  const float* cut = nullptr;
  const float* row_slack = nullptr;
  const float* slack = nullptr;
  const float* column_slack = nullptr;
  uint32_t hits[kMaxTileRows] = {};
  alignas(64) float values[kMaxTileRows][kMaxTileColumns];  // of the rows with hits
};

// Writes a tile of scores. For distances value = q.g - |g|^2 / 2, the squared distance is row_square - 2 value, and
// doubt[i] has bit j set where cancellation left too few correct bits.
template <class T>
struct Store {
  T* out = nullptr;
  int64_t row_stride = 0;
  int rows = 0, columns = 0;  // of the output; the rest of the tile is padding
  bool distance = false, root = false;
  const T* row_square = nullptr;     // |q|^2, only for distances
  const T* column_square = nullptr;  // |g|^2
  uint32_t doubt[kMaxTileRows] = {};
};

// fp64 sums over a row in the fixed order: lane l adds the terms of d = l, l + 32, l + 64, ... from zero; then lane l
// adds lane l + 16, l + 8, ... l + 1. `q` is null for the sums over one row.
enum ExactSum { kSumProduct, kSumShiftedProduct, kSumSquaredDifference, kSumElements, kSumShiftedSquare, kExactSums };
template <class T>
using ExactSumFn = double (*)(const double* q, const T* g, double shift, int64_t dim);

struct Kernels {
  const char* level;
  int height, height_step;
  int columns_f32, columns_f64;  // of a tile

  // Returns whether any hit was set.
  bool (*screen)(const Tile<float>& tile, Screen& screen);
  // Returns whether any doubt was set.
  bool (*store_f32)(const Tile<float>& tile, Store<float>& store);
  bool (*store_f64)(const Tile<double>& tile, Store<double>& store);

  // out[d * width + r] = rows[r][d] for r < count, 0 for the rest up to width.
  void (*pack_f32)(const float* rows, int64_t row_stride, int count, int64_t dim, int width, float* out);
  void (*pack_f64)(const double* rows, int64_t row_stride, int count, int64_t dim, int width, double* out);

  // out[d] = (in[d] - shift - centre[d]) * factor, evaluated in fp64 and rounded once; centre may be null.
  void (*affine_f32)(const float* in, double shift, const double* centre, double factor, int64_t dim, float* out);
  void (*widen_f16)(const uint16_t* in, int64_t count, float* out);
  void (*widen_bf16)(const uint16_t* in, int64_t count, float* out);

  ExactSumFn<float> exact_f32[kExactSums];
  ExactSumFn<double> exact_f64[kExactSums];
};

extern const Kernels kernels_scalar;
extern const Kernels kernels_avx2;    // x86-64 only
extern const Kernels kernels_avx512;  // x86-64 only

// The table in use: the best the processor has, or what PYCM_SIMD_LEVEL or set_simd_level names.
const Kernels& kernels();
// Throws ValueError for a name that is unknown or that this processor lacks.
void set_simd_level(const char* level);
bool simd_level_available(const char* level);

}  // namespace pycm::cpu
