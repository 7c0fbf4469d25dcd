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

// The precisions a screen may compute in (cpu/screen.h). Rows are read in words of four bytes: one fp32, two bf16 or four
// int8 elements.
enum class ScreenKind : uint8_t { kFloat32, kBFloat16, kInt8 };
constexpr int kScreenKinds = 3;
constexpr int of_word(ScreenKind kind) { return kind == ScreenKind::kInt8 ? 4 : kind == ScreenKind::kBFloat16 ? 2 : 1; }

// A panel of encoded gallery rows, [word][columns], has this many columns at every level (fp32: a tile's columns), so that
// what one processor has encoded another can read.
constexpr int kPanelColumns = 32;

// One operand of a screen: queries as pack_queries lays them out, and a panel.
struct ScreenTile {
  int height = 0;
  int64_t words = 0;
  const uint32_t* queries = nullptr;
  const uint32_t* panel = nullptr;
  const uint32_t* next = nullptr;  // the panel after this one, to be fetched meanwhile; may be this one
  const int32_t* start = nullptr;  // int8 only: what each query's sums start from
};

// Which pairs may reach their query's cut. In the units of the query,
//   value[i][j] = (q_i . g_j) * scale[j] + factor[i] * bias[j]
//   error[i][j] = loss_share[i] * norm[j] + query_norm[i] * loss[j]
// hits[i] has bit j set unless value + error < cut[i], a NaN sets it. Where `sure` is given, sure_hits[i] has bit j set if
// value - error + bias_error[i] * bias[j] > sure[i].
struct Screen {
  const float *cut = nullptr, *factor = nullptr, *loss_share = nullptr, *query_norm = nullptr;  // of a query
  const float *scale = nullptr, *bias = nullptr, *norm = nullptr, *loss = nullptr;              // of a gallery row
  const float *sure = nullptr, *bias_error = nullptr;
  uint32_t hits[kMaxTileRows] = {}, sure_hits[kMaxTileRows] = {};
  alignas(64) float values[kMaxTileRows][kMaxTileColumns];  // of the queries with hits
};

// What encoding a row in low precision made of it: row = scale * encoded + a rest of length `loss` at most.
struct Encoding {
  float scale = 0, largest = 0;  // largest: of the row's magnitudes, NaN if one is
  float norm_square = 0;         // of the row
  float loss_square = 0;         // computed in fp32, not rounded up
  int32_t sum = 0;               // of the encoded elements, int8 only
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

// Rows of an item, read where they lie, against one panel of vectors [dim][columns of the level].
//   value[i][j] = (sum over d of rows[i][d] * panel[d][j]) * scale[i]
// Either values[i][j] are written, or the largest of each column to best[j] (NaN where one is no finite number) and,
// where wanted, the first row that has it to arg[j].
template <class T>
struct RowTile {
  const T* rows = nullptr;
  int64_t row_stride = 0, count = 0, dim = 0;
  const T* scale = nullptr;  // null for 1
  const T* panel = nullptr;
  int columns = 0;  // in use, from the first; the others may be written or not
  T* best = nullptr;
  int32_t* arg = nullptr;
  T* values = nullptr;  // [count][columns of the level]
};

// The same maxima by way of bf16: `words` are `rows` rounded, two elements each, `panel` the vectors rounded.
struct MaximaTile {
  const uint32_t* words = nullptr;
  int64_t word_stride = 0, word_count = 0;
  const float* rows = nullptr;  // null where the words are the rows
  int64_t row_stride = 0, count = 0, dim = 0;
  const float* scale = nullptr;     // null for 1
  const uint32_t* panel = nullptr;  // [word][kPanelColumns]
  const float* vectors = nullptr;   // [columns][dim]
  // [kPanelColumns]: rows whose value is below the largest by more than this cannot have it. NaN: any may.
  const float* margin = nullptr;
  int columns = 0;
  float* best = nullptr;           // [columns]
  float* values = nullptr;         // scratch, [count][kPanelColumns]
  uint32_t* candidates = nullptr;  // scratch, [count * kPanelColumns + 16]
  const char* ahead = nullptr;     // what to fetch meanwhile
  int64_t ahead_bytes = 0;
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

  // One entry per ScreenKind. Returns whether any hit was set.
  bool (*screen[kScreenKinds])(const ScreenTile& tile, Screen& screen);
  // Whether that screen is quicker than fp32 here.
  bool quick[kScreenKinds];
  // Queries in the layout of `screen`, `height` of them, count given; query_words words for one word of each.
  void (*pack_queries[kScreenKinds])(const uint32_t* rows, int64_t row_stride, int count, int64_t words, int height,
                                     uint32_t* out);
  int query_words[kScreenKinds];
  // out[w * kPanelColumns + r] = rows[r][w] for r < count, 0 for the rest.
  void (*pack_panel)(const uint32_t* rows, int64_t row_stride, int count, int64_t words, uint32_t* out);
  // Writes round_up(dim, elements of a word) elements. `shift` is added to every int8, modulo 256.
  Encoding (*encode_i8)(const float* row, int64_t dim, int shift, uint32_t* out);
  Encoding (*encode_bf16)(const float* row, int64_t dim, int shift, uint32_t* out);
  // row[d] *= signs[d], then an unnormalised Walsh-Hadamard transform of every run of `block` elements, a power of two.
  void (*rotate)(float* row, const float* signs, int64_t dim, int64_t block);

  // Returns whether any doubt was set.
  bool (*store_f32)(const Tile<float>& tile, Store<float>& store);
  bool (*store_f64)(const Tile<double>& tile, Store<double>& store);

  void (*rows_f32)(const RowTile<float>& tile);
  void (*rows_f64)(const RowTile<double>& tile);
  // Null where the level has no quick products of bf16.
  void (*maxima_bf16)(const MaximaTile& tile);
  // Rounds a row to bf16, two elements a word, and fills up with zeros to a multiple of 16 words. Returns the sum of its
  // squares in fp32.
  float (*round_bf16)(const float* row, int64_t dim, uint32_t* out);
  // That sum, of a row in bf16.
  float (*square_bf16)(const uint32_t* row, int64_t words);

  // out[d * width + r] = rows[r][d] for r < count, 0 for the rest up to width.
  void (*pack_f32)(const float* rows, int64_t row_stride, int count, int64_t dim, int width, float* out);
  void (*pack_f64)(const double* rows, int64_t row_stride, int count, int64_t dim, int width, double* out);

  // out[d] = (in[d] - shift) * factor - centre[d], evaluated in fp64 and rounded to fp32 once; centre may be null.
  void (*affine_f32)(const float* in, double shift, double factor, const double* centre, int64_t dim, float* out);
  void (*widen_f16)(const uint16_t* in, int64_t count, float* out);
  void (*widen_bf16)(const uint16_t* in, int64_t count, float* out);

  ExactSumFn<float> exact_f32[kExactSums];
  ExactSumFn<double> exact_f64[kExactSums];
};

extern const Kernels kernels_scalar;
extern const Kernels kernels_avx2;    // x86-64 only
extern const Kernels kernels_avx512;  // x86-64 only
// The same with the entries that newer processors have better instructions for; x86-64 only.
void use_avx_vnni(Kernels& kernels);
void use_vnni(Kernels& kernels);
void use_bf16(Kernels& kernels);

// From the least to the best.
constexpr const char* kSimdLevels[] = {"scalar", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16"};

// The table in use: the best the processor has, or what PYCM_SIMD_LEVEL or set_simd_level names.
const Kernels& kernels();
// Throws ValueError for a name that is unknown or that this processor lacks.
void set_simd_level(const char* level);
bool simd_level_available(const char* level);

}  // namespace pycm::cpu
