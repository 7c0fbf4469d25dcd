// Rows to fp16 codes, and what the bound needs of each row (docs/exactness.md, section 8).
//
//   one warp a row: mean and norm | largest element | code 2 bytes an element, its loss in fp64
//
// Each metric becomes a dot product: y = row (dot), (row - mean) / norm (cosine, pearson), row - centre (distances). A gallery row's
// code is fp16(y 2^-e) with its largest element in [2^13, 2^14): a row of fp16 or bf16 loses nothing. A query's is fp16(y B / |y|),
// so that one bound holds for all queries.
// Bytes: rows of D elements are read once from memory (again from the cache), 2 D' written, D' = D rounded up to 64.
// Operations: about 10 D in fp64.
#include "ops/encode.h"

#include "core/check.h"
#include "cuda/screen.cuh"

namespace pycm::cuda {
namespace {

constexpr int kWarps = 8, kCentreThreads = 128;
constexpr int64_t kCentreRows = 64;
constexpr double kMaxNorm = 0x1p62, kMaxDistanceNorm = 0x1p30, kTinyElement = 0x1p-60, kTinyDistance = 0x1p-52;

// Of the products of codes: all sums of tensor cores together, relative to |q||g|, with their own square in it.
__host__ __device__ double sum_error(int64_t dim) { return 3.2 * static_cast<double>(dim + 64) * kUnit; }
// What rounding a query of length kQueryLength loses at most, by fp16's 11 bits and its smallest subnormal.
__host__ __device__ double query_loss(int64_t dim) {
  return (kQueryLength * 0x1p-11 + sqrt(static_cast<double>(dim)) * 0x1p-25) * (1 + 0x1p-10);
}
__device__ float upward(double value) { return __double2float_ru(value); }

__global__ void centre_kernel(Rows gallery, double* centre) {
  const int64_t d = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (d >= gallery.dim) return;
  visit_elements(gallery.dtype, [&](auto element) {
    const int64_t sample = gallery.rows < kCentreRows ? gallery.rows : kCentreRows;
    double sum = 0;
#pragma unroll 8
    for (int64_t i = 0; i < sample; ++i) sum += Row<decltype(element)>(gallery, i * (gallery.rows / sample))[d];
    sum /= static_cast<double>(sample);
    centre[d] = std::isfinite(sum) ? sum : 0;
  });
}

// y[d] before its factor, and the facts about it.
template <typename Element>
struct Centred {
  Row<Element> row;
  double mean;
  const double* centre;
  __device__ double operator[](int64_t d) const {
    const double value = __dsub_rn(row[d], mean);
    return centre == nullptr ? value : __dsub_rn(value, centre[d]);
  }
};
struct Extent {
  double largest, norm;
  bool nan;  // an element is NaN: every score is
};
template <typename Element>
__device__ Extent extent_of(const Centred<Element>& y, int64_t dim) {
  double largest = 0;
  bool nan = false;
  for (int64_t d = lane_index(); d < dim; d += kWarp) {
    largest = fmax(largest, fabs(y[d]));
    nan |= std::isnan(y.row[d]);
  }
  return {warp_reduce(largest, [](double a, double b) { return fmax(a, b); }), row_norm(y, 0, dim),
          __any_sync(kAllLanes, nan) != 0};
}

// The code of one row: steps of kCodeStep halves, `stride` apart.
struct Code {
  uint16_t* data;
  int64_t stride;
  __device__ void write(int64_t d, uint32_t pair) const {
    *reinterpret_cast<uint32_t*>(data + d / kCodeStep * stride + d % kCodeStep) = pair;
  }
};

// Writes fp16(y * factor) and zeros up to `padded`; returns the squared length of what that lost.
template <typename Element>
__device__ double write_code(const Centred<Element>& y, double factor, int64_t dim, int64_t padded, Code code) {
  double loss = 0;
  for (int64_t d = 2 * lane_index(); d < padded; d += 2 * kWarp) {
    uint32_t pair = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (d + i >= dim) continue;
      const double value = y[d + i] * factor;
      const uint16_t half = float_to_half(static_cast<float>(value));
      const double rest = value - static_cast<double>(half_to_float(half));
      loss += rest * rest;
      pair |= uint32_t{half} << 16 * i;
    }
    code.write(d, pair);
  }
  return warp_reduce(loss, [](double a, double b) { return a + b; });
}
__device__ void clear_code(int64_t padded, Code code) {
  for (int64_t d = 2 * lane_index(); d < padded; d += 2 * kWarp) code.write(d, 0);
}

// Norms of normalised rows whose squares stay in the range of fp64.
__device__ bool representable(double norm) { return norm > 1e-140 && norm < 1e140; }

template <typename Element>
__device__ void encode_query(const Rows& queries, int64_t i, int64_t local, MetricTraits metric, bool exact,
                             const double* centre, int64_t padded, Code code, QueryState& out, uint32_t* direct) {
  const int64_t dim = queries.dim;
  const Row<Element> row(queries, i);
  const RowStats stats = row_stats(row, dim, metric);
  const Centred<Element> y{row, stats.mean, metric.distance ? centre : nullptr};
  const Extent extent = extent_of(y, dim);
  // A row of norm 0 scores 0 with every row; a constant one is not 0 only for the rounding of its mean.
  const bool zero = metric.normalise ? stats.norm == 0 : extent.norm == 0 && extent.largest == 0;
  const double length = metric.normalise ? stats.norm : extent.norm;
  const bool known = dim <= kMaxScreenDim &&
                     (zero ? std::isfinite(extent.largest)
                           : representable(length) &&
                                 (metric.normalise || (length <= (metric.distance ? kMaxDistanceNorm : kMaxNorm) &&
                                                       (!metric.distance || length >= kTinyDistance))));
  QueryState state{};
  state.mean = stats.mean;
  state.norm = stats.norm;
  state.unit = zero ? 1 : (metric.normalise ? 1 : length) / kQueryLength;
  state.square = extent.norm * extent.norm;
  state.threshold = -INFINITY;
  state.cut = -FLT_MAX;
  state.ceiling = INFINITY;
  state.factor = metric.distance ? static_cast<float>(1 / state.unit) : 0;
  if (exact) {
    const double error = ((metric.distance ? 8 * kUnit * state.square : 0) + 0x1p-148) / state.unit;
    state.row_error = upward(error * (1 + 0x1p-20));
  }
  if (known && !zero && !extent.nan) write_code(y, kQueryLength / length, dim, padded, code);
  else clear_code(padded, code);
  if (lane_index() != 0) return;
  if (extent.nan) state.cut = NAN;
  else if (!known) take_direct(state, local, direct);
  out = state;
}

__global__ void __launch_bounds__(kWarps* kWarp)
    encode_queries_kernel(Rows queries, int64_t begin, int64_t count, int64_t padded, MetricTraits metric, bool exact,
                          const double* centre, uint16_t* codes, QueryState* states, uint32_t* direct) {
  const int64_t local = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (local >= round_up(count, kTileQueries)) return;
  const Code code{codes + local * padded, kCodeStep};
  if (local >= count) {  // fills the last tile up
    clear_code(padded, code);
    if (lane_index() == 0) {
      QueryState state{};
      state.cut = NAN;
      states[local] = state;
    }
    return;
  }
  visit_elements(queries.dtype, [&](auto element) {
    encode_query<decltype(element)>(queries, begin + local, local, metric, exact, centre, padded, code, states[local],
                                    direct);
  });
}

// What encoding a gallery row found: |y|, the code's scale, what the code lost of y, all up to a relative `rounding`.
struct Column {
  bool known, nan;
  double length, scale, loss, rounding;
};

__device__ void write_column(const Column& column, int64_t dim, int64_t padded, bool distance, bool exact,
                             float2& scale_error, float& bias) {
  scale_error = {0, column.nan ? -INFINITY : column.known ? 0 : INFINITY};
  bias = 0;
  if (column.nan || !column.known) return;
  scale_error.x = static_cast<float>(column.scale);
  const double query = kQueryLength + query_loss(dim), sum = sum_error(padded) + 16 * kUnit + column.rounding;
  const double error = (query_loss(dim) + query * sum) * column.length + query * (1 + sum) * column.loss;
  if (exact) scale_error.y = upward(PYCM_BOUND_SCALE * error * (1 + 0x1p-20 + column.rounding));
  // Raised by its own error: lower_end takes twice that off.
  const double half = -0.5 * column.length * column.length;
  if (distance) bias = static_cast<float>(exact ? half * (1 - 16 * kUnit * PYCM_BOUND_SCALE) : half);
}

template <typename Element>
__device__ Column encode_column(const Row<Element>& row, int64_t dim, MetricTraits metric, const double* centre,
                                int64_t padded, Code code) {
  const RowStats stats = row_stats(row, dim, metric);
  const Centred<Element> y{row, stats.mean, metric.distance ? centre : nullptr};
  const Extent extent = extent_of(y, dim);
  const bool zero = metric.normalise ? stats.norm == 0 : extent.largest == 0;
  const bool known = zero               ? std::isfinite(extent.largest)
                     : metric.normalise ? representable(stats.norm) && std::isfinite(extent.largest)
                                        : extent.norm <= (metric.distance ? kMaxDistanceNorm : kMaxNorm) &&
                                              extent.largest > kTinyElement;
  if (extent.nan || !known || zero) {
    clear_code(padded, code);
    return {known, extent.nan, 0, 0, 0, 0};
  }
  int exponent;
  frexp(extent.largest, &exponent);
  const double loss = sqrt(write_code(y, ldexp(1.0, 14 - exponent), dim, padded, code));
  const double scale = ldexp(1.0, exponent - 14) / (metric.normalise ? stats.norm : 1);
  return {true, false, metric.normalise ? 1 : extent.norm, scale, loss * scale, 0};
}

// The same for dot and cosine where rows are no wider than fp32, without fp64: twice over the row.
template <typename Element>
__device__ Column encode_column_fp32(const Row<Element>& row, int64_t dim, bool normalise, int64_t padded, Code code) {
  float largest = 0;
  bool nan = false;
#pragma unroll 4
  for (int64_t d = lane_index(); d < dim; d += kWarp) {
    const float value = static_cast<float>(row[d]);
    largest = fmaxf(largest, fabsf(value));
    nan |= std::isnan(value);
  }
  largest = warp_reduce(largest, [](float a, float b) { return fmaxf(a, b); });
  nan = __any_sync(kAllLanes, nan) != 0;
  const bool known =
      largest == 0 || (std::isfinite(largest) && (normalise || largest > static_cast<float>(kTinyElement)));
  if (nan || !known || largest == 0) {
    clear_code(padded, code);
    return {known, nan, 0, 0, 0, 0};
  }
  int exponent;
  frexpf(largest, &exponent);
  // 2^(14 - exponent) in two factors, for it may be outside fp32.
  const float first = ldexpf(1.0f, (14 - exponent) / 2), second = ldexpf(1.0f, 14 - exponent - (14 - exponent) / 2);
  float square = 0, loss = 0;
#pragma unroll 4
  for (int64_t d = 2 * lane_index(); d < padded; d += 2 * kWarp) {
    float value[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (d + i < dim) value[i] = static_cast<float>(row[d + i]) * first * second;
    const uint32_t pair = pack_half2(value[0], value[1]);
    code.write(d, pair);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float rest = value[i] - half_to_float(static_cast<uint16_t>(pair >> 16 * i));  // exact
      square += value[i] * value[i];
      loss += rest * rest;
    }
  }
  const auto add = [](float a, float b) { return a + b; };
  const double norm = sqrt(static_cast<double>(warp_reduce(square, add)));
  const double lost = sqrt(static_cast<double>(warp_reduce(loss, add)));
  const double scale = normalise ? 1 / norm : ldexp(1.0, exponent - 14), length = normalise ? 1 : norm * scale;
  const double rounding = (static_cast<double>(dim) / 32 + 16) * kUnit;
  return {length <= kMaxNorm, false, length, scale, lost * scale, rounding};
}

__global__ void __launch_bounds__(kWarps* kWarp)
    encode_gallery_kernel(Rows gallery, Shuffle shuffle, int64_t begin, int64_t count, int64_t padded,
                          MetricTraits metric, bool exact, Encoding to) {
  const int64_t local = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (local >= round_up(count, kTileColumns)) return;
  const Code code{to.codes + local * kCodeStep, to.stride};
  if (local >= count) {  // fills the last tile up; never a hit
    clear_code(padded, code);
    if (lane_index() != 0) return;
    to.columns.scale_error[local] = {0, -INFINITY};
    to.columns.bias[local] = 0;
    return;
  }
  visit_elements(gallery.dtype, [&](auto element) {
    using Element = decltype(element);
    const Row<Element> row(gallery, shuffle(begin + local));
    const bool narrow = !std::is_same_v<Element, Float64Element> && !metric.centre && !metric.distance;
    const Column column = narrow ? encode_column_fp32(row, gallery.dim, metric.normalise, padded, code)
                                 : encode_column(row, gallery.dim, metric, to.centre, padded, code);
    if (lane_index() == 0)
      write_column(column, gallery.dim, padded, metric.distance, exact, to.columns.scale_error[local],
                   to.columns.bias[local]);
  });
}

Grid warps_grid(int64_t warps, void* stream) {
  return {dim3(static_cast<unsigned>((warps + kWarps - 1) / kWarps)), dim3(kWarps * kWarp), 1, 0, stream};
}

}  // namespace

Shuffle shuffle_of(int64_t rows) {
  const auto gcd = [](uint64_t a, uint64_t b) {
    while (b != 0) {
      const uint64_t rest = a % b;
      a = b;
      b = rest;
    }
    return a;
  };
  // Near the golden ratio, multiples are spread evenly.
  const uint64_t count = static_cast<uint64_t>(rows);
  uint64_t multiplier = static_cast<uint64_t>(0.6180339887498949 * static_cast<double>(rows));
  while (gcd(multiplier, count) != 1) ++multiplier;
  return {count, multiplier};
}

Encoding lay_out_encoding(int64_t rows, int64_t dim, Workspace& workspace) {
  const int64_t padded = round_up(rows, kTileColumns);
  return {workspace.take<uint16_t>(padded * round_up(dim, kCodeStep)),
          padded * kCodeStep,
          {workspace.take<float2>(padded), workspace.take<float>(padded)},
          workspace.take<double>(dim)};
}

void launch_centre(const Rows& gallery, double* centre, const char* name, void* stream) {
  const int64_t blocks = (gallery.dim + kCentreThreads - 1) / kCentreThreads;
  launch(centre_kernel, {dim3(static_cast<unsigned>(blocks)), dim3(kCentreThreads), 1, 0, stream}, name, gallery,
         centre);
}

void launch_encode_queries(const Rows& queries, int64_t begin, int64_t count, MetricTraits metric, bool exact,
                           const double* centre, uint16_t* codes, QueryState* states, uint32_t* direct,
                           const char* name, void* stream) {
  launch(encode_queries_kernel, warps_grid(round_up(count, kTileQueries), stream), name, queries, begin, count,
         round_up(queries.dim, kCodeStep), metric, exact, centre, codes, states, direct);
}

void launch_encode_gallery(const Rows& gallery, int64_t begin, int64_t count, MetricTraits metric, bool exact,
                           const Encoding& to, const char* name, void* stream) {
  launch(encode_gallery_kernel, warps_grid(round_up(count, kTileColumns), stream), name, gallery,
         shuffle_of(gallery.rows), begin, count, round_up(gallery.dim, kCodeStep), metric, exact, to);
}

int64_t encoded_bytes(int64_t rows, int64_t dim) {
  Workspace workspace(nullptr);
  lay_out_encoding(rows, dim, workspace);
  return workspace.used();
}

void encode(const EncodeArgs& args, const CudaContext& context) {
  check_search_sizes("encode", args.gallery, args.gallery);
  Workspace workspace(context.workspace);
  const Encoding encoding = lay_out_encoding(args.gallery.rows, args.gallery.dim, workspace);
  check(workspace.used() <= context.workspace_bytes, "encode: encoded must have ", workspace.used(), " bytes, got ",
        context.workspace_bytes);
  const MetricTraits metric = traits_of(args.metric);
  if (metric.distance) launch_centre(args.gallery, encoding.centre, "encode: centre", context.stream);
  launch_encode_gallery(args.gallery, 0, args.gallery.rows, metric, true, encoding, "encode: gallery", context.stream);
}

}  // namespace pycm::cuda
