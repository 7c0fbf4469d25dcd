// The screen of topk and rank: fp16 codes of all rows, a bound for each, and the tensor-core product whose epilogue writes no
// scores but the pairs that may matter. What makes it lose none is in docs/exactness.md, section 8.
//
//   encode   row -> fp16 code, scaled by a power of two (a query: to length kQueryLength)
//   screen   upper = (code_i . code_j) scale_j + (factor_i bias_j + error_j)     the pair's exact value, in the query's units,
//            lies in [lower, upper]; a pair with upper >= cut_i is appended to query i's candidates
//
// Gallery rows are taken in a shuffled order (Shuffle), so that whatever order the gallery is in, the first of them are
// a fair sample, and thresholds found early hold.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/array.h"
#include "core/metric.h"
#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace pycm::cuda {

// ---- limits and constants of the bound ----

constexpr double kUnit = 0x1p-24;           // u: half an ulp of 1 in fp32
constexpr double kQueryLength = 0x1p13;     // of a query's code, before rounding
constexpr int64_t kMaxScreenDim = 1 << 18;  // so that sums of tensor cores err by less than 5 %
constexpr int64_t kMaxRows = int64_t{1} << 31;

// Below 1 only in the mutation check of the tests: a smaller bound must be caught losing matches.
#ifndef PYCM_BOUND_SCALE
#define PYCM_BOUND_SCALE 1.0
#endif

// ---- data ----

// Position p of the screen is gallery row p * multiplier mod rows, a bijection.
struct Shuffle {
  uint64_t rows, multiplier;
  __host__ __device__ int64_t operator()(int64_t p) const {
    return static_cast<int64_t>(static_cast<uint64_t>(p) * multiplier % rows);
  }
};
// A screened pair: [lower, upper] holds its exact value in its query's units; `key` is ordered(lower) until the pair has
// been verified, then ordered(score or negated distance).
struct alignas(16) Candidate {
  uint64_t key;
  uint32_t index;
  float upper;
};

// A query of the current batch.
struct alignas(16) QueryState {
  double mean, norm;    // of the exact score
  double unit, square;  // exact value = unit * (value in the query's units); the square of its length from the centre
  float threshold;      // k pairs have a value at least this
  float cut;            // pairs with upper >= cut are candidates; NaN where none is sought
  float factor, row_error;
  float ceiling;            // rank: pairs with lower > ceiling score better than every positive
  uint32_t count;           // candidates appended, those for which there was no room included
  unsigned long long sure;  // rank: pairs above the ceiling
};

// What the bound needs of a gallery row.
struct ScreenColumns {
  float2* scale_error;
  float* bias;

  __host__ __device__ ScreenColumns from(int64_t j) const { return {scale_error + j, bias + j}; }
};

// A gallery, or a run of it, in the order of the screen: codes, what the bound needs of each row, and the point that distances are
// encoded about. Whole tiles of rows; those beyond the last are never a hit.
struct Encoding {
  uint16_t*
      codes;  // [D' / kCodeStep][rows][kCodeStep]: what a kernel copies of neighbouring rows at a time lies together
  int64_t stride;  // of the first axis
  ScreenColumns columns;
  double* centre;
};
Encoding lay_out_encoding(int64_t rows, int64_t dim, Workspace& workspace);
Shuffle shuffle_of(int64_t rows);

// Pairs that a caller rules out.
struct PairFilter {
  const uint8_t* mask;
  int64_t mask_row, mask_column;
  const int64_t *exclude, *exclude_offsets;

  __device__ __forceinline__ bool allows(int64_t query, int64_t index) const {
    if (mask != nullptr && mask[query * mask_row + index * mask_column] == 0) return false;
    if (exclude != nullptr)
      for (int64_t e = exclude_offsets[query]; e < exclude_offsets[query + 1]; ++e)
        if (exclude[e] == index) return false;
    return true;
  }
};
inline PairFilter pair_filter(const Mask& mask, const int64_t* exclude, const int64_t* exclude_offsets) {
  return {mask.data, mask.row_stride, mask.column_stride, exclude, exclude_offsets};
}

// What a screen is of. `dim` is that of the codes: whole steps of kCodeStep, filled up with zeros.
constexpr int kCodeStep = 64, kTileQueries = 128, kTileColumns = 256;
__host__ __device__ constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Screen {
  const uint16_t* queries;  // [query_rows rounded up to kTileQueries, dim]
  const uint16_t* gallery;  // [dim / kCodeStep, columns rounded up to kTileColumns, kCodeStep], steps `stride` apart
  int64_t stride;
  ScreenColumns column;
  QueryState* state;
  Candidate* candidates;                                 // [query_rows, capacity]
  int64_t query_begin, query_rows, begin, columns, dim;  // positions [begin, begin + columns)
  int64_t capacity;
  Shuffle shuffle;
  PairFilter filter;
  bool ranks;     // count what is above the ceiling
  bool distance;  // biases and factors are not 0
};
void launch_screen(const Screen& screen, const char* name, void* stream);
void launch_screen_sm80(const Screen& screen, const char* name, void* stream);
void launch_screen_sm90(const Screen& screen, const char* name, void* stream);
// For at most kFewQueries, where their codes fit into shared memory; false where they do not, and nothing was launched.
constexpr int kFewQueries = 64;
bool launch_screen_few(const Screen& screen, const char* name, void* stream);

// ---- encoding (encode.cu) ----

void launch_centre(const Rows& gallery, double* centre, const char* name, void* stream);
void launch_encode_queries(const Rows& queries, int64_t begin, int64_t count, MetricTraits metric, bool exact,
                           const double* centre, uint16_t* codes, QueryState* states, uint32_t* direct,
                           const char* name, void* stream);
// Positions [begin, begin + count). Without `exact` values stand for themselves: all errors are 0.
void launch_encode_gallery(const Rows& gallery, int64_t begin, int64_t count, MetricTraits metric, bool exact,
                           const Encoding& to, const char* name, void* stream);

// ---- a search: what topk and rank have in common (search.cu) ----

// Carved out of the workspace. Queries are taken in batches of `batch`, the gallery's codes in runs of at most `code_rows`.
struct SearchBuffers {
  int64_t capacity, batch, code_rows;
  bool kept;     // all of the gallery's codes fit: they are made once
  bool encoded;  // they were made before the call, by encode()
  uint16_t* query_codes;
  QueryState* states;
  Candidate* candidates;
  uint32_t* direct;  // [1 + batch]: how many queries are left to the direct path, and which
  Encoding gallery;
  float2* without_errors;  // of an encoded gallery's columns, for values that stand for themselves
};
// `capacity` is a power of two: candidates a query has room for. `encoded`: what encode() wrote, or null.
SearchBuffers lay_out(const Rows& queries, const Rows& gallery, void* encoded, bool exact, int64_t capacity,
                      Workspace& workspace);
int64_t power_of_two(int64_t value);  // the next one, value included
void check_search_sizes(const char* function, const Rows& queries, const Rows& gallery);

// The names of the launches, for errors.
struct SearchNames {
  const char *centre, *clear, *queries, *gallery, *screen;
};

class Search {
 public:
  // Without `exact` values stand for themselves: all errors are 0.
  Search(const Rows& queries, const Rows& gallery, Metric metric, bool exact, PairFilter filter, bool ranks,
         const SearchBuffers& buffers, const SearchNames& names, void* stream);

  // The next batch of queries: encoded, none with candidates.
  void start(int64_t begin, int64_t rows);
  // Appends the candidates among positions [first, last); `first` is a multiple of kTileColumns.
  void screen(int64_t first, int64_t last);

 private:
  Rows queries_, gallery_;
  MetricTraits metric_;
  bool exact_;
  const SearchBuffers& buffers_;
  const SearchNames& names_;
  void* stream_;
  Encoding codes_;
  Screen screen_;
};

// ---- on the device ----

// Unsigned numbers in the order of the floating-point numbers, -0 as +0.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float from_ordered(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits ^ 0x80000000u : ~bits);
}
__device__ __forceinline__ uint64_t ordered(double value) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(value + 0.0));
  return bits ^ (static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | 0x8000000000000000ull);
}
__device__ __forceinline__ double from_ordered(uint64_t bits) {
  return __longlong_as_double(
      static_cast<int64_t>(bits & 0x8000000000000000ull ? bits ^ 0x8000000000000000ull : ~bits));
}

// The upper end of a pair's value, from its product of codes.
__device__ __forceinline__ float upper_end(float product, float2 scale_error, float factor, float bias) {
  return __fmaf_rn(product, scale_error.x, __fmaf_rn(factor, bias, scale_error.y));
}
// The lower end; -inf for a row nothing is known of.
__device__ __forceinline__ float lower_end(float upper, float2 scale_error, float factor, float bias, float row_error) {
  if (!std::isfinite(scale_error.y)) return -INFINITY;
  const float down = __fmaf_rn(2.0f, scale_error.y, static_cast<float>(32 * kUnit) * fabsf(factor * bias));
  return __fadd_rd(__fadd_rd(upper, -down), -row_error);
}

// Adds query i of the batch to those that the direct path takes: direct[0] is their number.
__device__ __forceinline__ void take_direct(QueryState& state, int64_t i, uint32_t* direct) {
  state.cut = NAN;
  state.count = 0;
  state.sure = 0;
  direct[1 + atomicAdd(direct, 1u)] = static_cast<uint32_t>(i);
}

// ---- the epilogue of a product ----
// A thread holds kRows queries, four lanes (a quad) the same ones; its columns are 8 (b / 2) + 2 (lane % 4) + b % 2, b < kBits, of
// those at `columns`, which lie in shared memory and are the screen's from `begin` on. product_of(r, b) is in a register,
// so r and b must be known to the compiler. All lanes of the warp call.

__device__ __forceinline__ int column_of(int b) { return b / 2 * 8 + lane_index() % 4 * 2 + b % 2; }

// Appends the pairs of one query that reach its cut, among this thread's columns from `first_bit` on.
template <int kBits, typename ProductOf>
__device__ __forceinline__ void append_row(const Screen& screen, int64_t row, float cut, float factor, int first_bit,
                                           ScreenColumns columns, int64_t begin, ProductOf&& product_of) {
  uint32_t hits = 0;
#pragma unroll
  for (int b = 0; b < kBits; ++b) {
    const int column = column_of(first_bit + b);
    if (upper_end(product_of(b), columns.scale_error[column], factor, columns.bias[column]) >= cut) hits |= 1u << b;
  }
  if (!__any_sync(kAllLanes, hits != 0)) return;

  QueryState* const state = screen.state + row;
  const float row_error = hits != 0 ? state->row_error : 0;
  uint32_t sure = 0;
  if (screen.ranks && hits != 0) {
    const float ceiling = state->ceiling;
#pragma unroll
    for (int b = 0; b < kBits; ++b) {
      const int column = column_of(first_bit + b);
      const float2 scale_error = columns.scale_error[column];
      const float upper = upper_end(product_of(b), scale_error, factor, columns.bias[column]);
      if (lower_end(upper, scale_error, factor, columns.bias[column], row_error) > ceiling) sure |= 1u << b;
    }
  }
  if (screen.filter.mask != nullptr || screen.filter.exclude != nullptr) {
    for (uint32_t rest = hits; rest != 0; rest &= rest - 1) {
      const int column = column_of(first_bit + __ffs(static_cast<int>(rest)) - 1);
      if (!screen.filter.allows(screen.query_begin + row, screen.shuffle(screen.begin + begin + column)))
        hits &= ~(rest & -rest);
    }
  }
  sure &= hits;
  hits &= ~sure;
  if (sure != 0) atomicAdd(&state->sure, static_cast<unsigned long long>(__popc(sure)));

  // One addition for the quad, and a run of places for each of its lanes.
  const int quad_lane = lane_index() % 4;
  const uint32_t mine = static_cast<uint32_t>(__popc(hits));
  uint32_t end = mine;
#pragma unroll
  for (int offset = 1; offset < 4; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, end, offset, 4);
    if (quad_lane >= offset) end += other;
  }
  const uint32_t total = __shfl_sync(kAllLanes, end, 3, 4);
  uint32_t place = 0;
  if (quad_lane == 0 && total != 0) place = atomicAdd(&state->count, total);
  place = __shfl_sync(kAllLanes, place, 0, 4) + end - mine;

  Candidate* const candidates = screen.candidates + row * screen.capacity;
#pragma unroll
  for (int b = 0; b < kBits; ++b) {
    if ((hits >> b & 1) == 0) continue;
    if (place < screen.capacity) candidates[place].upper = product_of(b);  // out of its register
    ++place;
  }
  place -= mine;
  for (; hits != 0 && place < screen.capacity; hits &= hits - 1, ++place) {
    const int column = column_of(first_bit + __ffs(static_cast<int>(hits)) - 1);
    const float2 scale_error = columns.scale_error[column];
    const float bias = columns.bias[column], upper = upper_end(candidates[place].upper, scale_error, factor, bias);
    candidates[place] = {ordered(lower_end(upper, scale_error, factor, bias, row_error)),
                         static_cast<uint32_t>(screen.shuffle(screen.begin + begin + column)),
                         __fadd_ru(upper, row_error)};
  }
}

// Those of all queries, rows[r] of the screen. Two or three operations a score; what follows is rare.
template <int kRows, int kBits, typename RowOf, typename ProductOf>
__device__ __forceinline__ void append_hits(const Screen& screen, RowOf&& row_of, const float (&cut)[kRows],
                                            const float (&factor)[kRows], ScreenColumns columns, int64_t begin,
                                            ProductOf&& product_of) {
  float best[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) best[r] = -INFINITY;
#pragma unroll
  for (int b = 0; b < kBits; b += 2) {
    const float4 pair = *reinterpret_cast<const float4*>(columns.scale_error + column_of(b));
    const float2 bias = screen.distance ? *reinterpret_cast<const float2*>(columns.bias + column_of(b)) : float2{0, 0};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float first = screen.distance ? __fmaf_rn(factor[r], bias.x, pair.y) : pair.y;
      const float second = screen.distance ? __fmaf_rn(factor[r], bias.y, pair.w) : pair.w;
      best[r] = fmaxf(best[r], __fmaf_rn(product_of(r, b), pair.x, first));
      best[r] = fmaxf(best[r], __fmaf_rn(product_of(r, b + 1), pair.z, second));
    }
  }
  bool found[kRows], any = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) any |= found[r] = best[r] >= cut[r];  // never for a NaN
  if (!__any_sync(kAllLanes, any)) return;
  constexpr int kRun = kBits < 16 ? kBits : 16;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (!__any_sync(kAllLanes, found[r])) continue;
#pragma unroll
    for (int run = 0; run < kBits; run += kRun)
      append_row<kRun>(screen, row_of(r), cut[r], factor[r], run, columns, begin,
                       [&](int b) { return product_of(r, run + b); });
  }
}

}  // namespace pycm::cuda
