// xattn_score: stacked cross attention of every image with every caption (ops/xattn.h has the formulas). Vectors x attend
// to the context y: for each pair a block s[a, b] = x_a . y_b of one large matrix of products.
//
//   1. |x_a|      once
//   2. G          y_b . y_b' of the same item: tiles near the diagonal of Y Y', once per part of the context
//   3. S          128 x 128 tiles of X Y' by the tensor cores, for a part of each side (4096 x 4096 at most)
//   4. attention  one warp per pair, S from L2: feature norm down the columns, softmax along the rows, x . c = w s and
//                 |c|^2 = w' G w, cosine, aggregation
//
// The attended vectors c, n_x D numbers a pair, are never formed.
// Operations: 2 A B D for A and B vectors (three times that in fp32, see maxsim_product.cuh) and A B n_y for the
// attention; forming c would take another 2 A B D. Bytes: the inputs, and about 20 A B through L2.
// A part is made of whole items, those that start in its range of positions, found on the device.
// Limits: an item of at most 2048 vectors, 4096 where padded. A longer padded one is refused; a longer ragged one scores
// NaN, since only the device knows. Where c nearly vanishes (|c| < 1e-3 |y_b|), |c|^2 keeps few digits in fp32.
#include <algorithm>
#include <cmath>

#include "cuda/launch.h"
#include "cuda/maxsim_exact.cuh"
#include "cuda/maxsim_product.cuh"
#include "cuda/xattn_parts.cuh"
#include "ops/xattn.h"

namespace pycm::cuda {
namespace {

constexpr int kWarps = 8;     // of an attention block
constexpr int kTogether = 4;  // rows that share a pass over G

template <class V>
__global__ void __launch_bounds__(kWarps* kWarp) vector_lengths(const VectorSets sets, V* out) {
  const int64_t position = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const int64_t offset = position < sets.total ? vector_offset(sets, position) : -1;
  if (offset < 0) return;
  const double length = exact_norm(sets, offset);
  if (threadIdx.x % kWarp == 0) out[position] = static_cast<V>(length);
}

template <class V>
struct Attention {
  Side x, y;
  int64_t x_part, y_part;
  const V *lengths, *products, *gram;
  V* weights;  // [x, y], as the products
  int64_t pitch, gram_pitch;
  FeatureNorm feature_norm;
  Aggregation aggregation;
  V lambda_softmax, lambda_lse, eps;
  V* scores;
  int64_t x_stride, y_stride;  // in the scores
};

template <class V>
__device__ __forceinline__ V warp_max(V value) {
  for (int step = 16; step > 0; step /= 2) {
    const V other = __shfl_xor_sync(kAllLanes, value, step);
    if (other > value) value = other;
  }
  return value;
}

__device__ inline bool clips(FeatureNorm norm) {
  return norm == FeatureNorm::kClippedL2 || norm == FeatureNorm::kClippedL1 || norm == FeatureNorm::kClipped;
}

// weights[a, b] = lambda f[a, b] for the columns of this lane: the norm runs down a column.
template <class V>
__device__ void normalise_columns(const Attention<V>& args, const V* s, V* w, int64_t rows, int64_t columns) {
  const bool clip = clips(args.feature_norm), softmax = args.feature_norm == FeatureNorm::kSoftmax;
  const bool l1 = args.feature_norm == FeatureNorm::kL1 || args.feature_norm == FeatureNorm::kClippedL1;
  const bool plain = args.feature_norm == FeatureNorm::kNone || args.feature_norm == FeatureNorm::kClipped;
  for (int64_t b = threadIdx.x % kWarp; b < columns; b += kWarp) {
    V largest = -INFINITY, total = 0;
    if (softmax)
      for (int64_t a = 0; a < rows; ++a) largest = s[a * args.pitch + b] > largest ? s[a * args.pitch + b] : largest;
    const auto value_of = [&](int64_t a) {
      const V value = s[a * args.pitch + b];
      return softmax ? std::exp(value - largest) : clip && !(value > 0) ? V(0.1) * value : value;
    };
    for (int64_t a = 0; a < rows && !plain; ++a) {
      const V value = value_of(a);
      total += softmax ? value : l1 ? std::fabs(value) : value * value;
    }
    const V divisor = plain ? V{1} : softmax ? total : l1 ? total + args.eps : std::sqrt(total) + args.eps;
    for (int64_t a = 0; a < rows; ++a) w[a * args.pitch + b] = args.lambda_softmax * (value_of(a) / divisor);
  }
}

// The softmax along one row, in place; its weighted sum of products.
template <class V>
__device__ V attend(const V* s, V* w, int64_t columns) {
  V largest = -INFINITY, total = 0, product = 0;
  for (int64_t b = threadIdx.x % kWarp; b < columns; b += kWarp) largest = w[b] > largest ? w[b] : largest;
  largest = warp_max(largest);
  for (int64_t b = threadIdx.x % kWarp; b < columns; b += kWarp) total += w[b] = std::exp(w[b] - largest);
  total = warp_sum(total);
  for (int64_t b = threadIdx.x % kWarp; b < columns; b += kWarp) product += (w[b] /= total) * s[b];
  return warp_sum(product);
}

template <class V>
struct Aggregate {
  Aggregation how;
  V lambda;
  V largest = -INFINITY, total = 0;

  __device__ void add(V value) {
    if (how == Aggregation::kMax) {
      largest = value > largest || std::isnan(value) ? value : largest;
    } else if (how == Aggregation::kLogSumExp) {  // relative to the largest so far, so that it cannot overflow
      const V term = lambda * value, before = largest;
      largest = term > largest ? term : largest;
      total = total * std::exp(before - largest) + std::exp(term - largest);
    } else {
      total += value;
    }
  }
  __device__ V value(int64_t count) const {
    switch (how) {
      case Aggregation::kLogSumExp: return (largest + std::log(total)) / lambda;
      case Aggregation::kMax: return largest;
      case Aggregation::kMean: return total / static_cast<V>(count);
      default: return total;
    }
  }
};

template <class V>
__device__ V pair_score(const Attention<V>& args, const ItemSpan& x, const ItemSpan& y, int64_t x_begin,
                        int64_t y_begin) {
  const int64_t at = (x.position - x_begin) * args.pitch + y.position - y_begin;
  const V* s = args.products + at;
  V* w = args.weights + at;
  const V* gram = args.gram + (y.position - y_begin) * (args.gram_pitch + 1);
  normalise_columns(args, s, w, x.length, y.length);
  Aggregate<V> aggregate{args.aggregation, args.lambda_lse};
  for (int64_t first = 0; first < x.length; first += kTogether) {
    V product[kTogether], square[kTogether] = {};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int64_t a = first + i < x.length ? first + i : -1;
      product[i] = a < 0 ? V{0} : attend(s + a * args.pitch, w + a * args.pitch, y.length);
    }
    __syncwarp();  // the weights of every lane
    for (int64_t other = threadIdx.x % kWarp; other < y.length; other += kWarp) {
      V sum[kTogether] = {};
      for (int64_t b = 0; b < y.length; ++b) {
        const V value = gram[b * args.gram_pitch + other];
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
          if (first + i < x.length) sum[i] += w[(first + i) * args.pitch + b] * value;
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (first + i < x.length) square[i] += sum[i] * w[(first + i) * args.pitch + other];
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const V length = warp_sum(square[i]);
      if (first + i >= x.length) continue;
      const V norms = args.lengths[x.position + first + i] * std::sqrt(length < 0 ? V{0} : length);
      aggregate.add(product[i] / (norms < args.eps ? args.eps : norms));
    }
  }
  return aggregate.value(x.length);
}

template <class V>
__global__ void __launch_bounds__(kWarps* kWarp) attention(const Attention<V> args) {
  const Part x_part = find_part(args.x, args.x_part), y_part = find_part(args.y, args.y_part);
  const int64_t x_items = x_part.stop - x_part.first, pairs = x_items * (y_part.stop - y_part.first);
  for (int64_t pair = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; pair < pairs;
       pair += int64_t{gridDim.x} * kWarps) {
    const int64_t i = x_part.first + pair % x_items, j = y_part.first + pair / x_items;
    const ItemSpan x = item_span(args.x.sets, i), y = item_span(args.y.sets, j);
    V score = 0;
    if (x.position + x.length > x_part.end || y.position + y.length > y_part.end) score = NAN;
    else if (x.length > 0 && y.length > 0) score = pair_score(args, x, y, x_part.begin, y_part.begin);
    if (threadIdx.x % kWarp == 0) args.scores[i * args.x_stride + j * args.y_stride] = score;
  }
}

template <class V>
struct Scratch {
  V *lengths, *gram, *products, *weights;
};

template <class V>
Scratch<V> take_scratch(Workspace& workspace, const Side& x, const Side& y) {
  Scratch<V> scratch;
  scratch.lengths = workspace.take<V>(x.sets.total);
  scratch.gram = workspace.take<V>(y.capacity * y.capacity);
  scratch.products = workspace.take<V>(x.capacity * y.capacity);
  scratch.weights = workspace.take<V>(x.capacity * y.capacity);
  return scratch;
}

// Items that can start in one part: all of a ragged set, which may have many empty ones.
int64_t items_in_part(const Side& side) {
  return side.sets.ragged() ? side.sets.items : std::min(side.sets.items, side.step / side.sets.max_length);
}

template <class V>
void run(const XAttnArgs& args, const Side& x, const Side& y, int64_t x_stride, int64_t y_stride,
         const CudaContext& context) {
  Workspace workspace(context.workspace);
  const Scratch<V> scratch = take_scratch<V>(workspace, x, y);
  launch(vector_lengths<V>, Grid{dim3(blocks(x.sets.total, kWarps)), dim3(kWarps * kWarp), 1, 0, context.stream},
         "xattn_score: lengths", x.sets, scratch.lengths);
  Product gram{y, y, aligned(y.sets), aligned(y.sets), 0, 0, true, y.capacity};
  Product product{x, y, aligned(x.sets), aligned(y.sets), 0, 0, false, y.capacity};
  Attention<V> attend{x,
                      y,
                      0,
                      0,
                      scratch.lengths,
                      scratch.products,
                      scratch.gram,
                      scratch.weights,
                      y.capacity,
                      y.capacity,
                      args.feature_norm,
                      args.aggregation,
                      static_cast<V>(args.lambda_softmax),
                      static_cast<V>(args.lambda_lse),
                      static_cast<V>(args.eps),
                      static_cast<V*>(args.scores),
                      x_stride,
                      y_stride};
  const int64_t resident = int64_t{device_limits().multiprocessors} * 8;
  const int64_t wanted = (items_in_part(x) * items_in_part(y) + kWarps - 1) / kWarps;
  const Grid grid{dim3(static_cast<unsigned>(std::min(resident, wanted))), dim3(kWarps * kWarp), 1, 0, context.stream};
  // A ragged item may be empty and start at the very end: hence one part more.
  const auto parts = [](const Side& side) {
    return (side.sets.total + (side.sets.ragged() ? side.step : side.step - 1)) / side.step;
  };
  for (int64_t q = 0; q < parts(y); ++q) {
    gram.row_part = gram.column_part = product.column_part = attend.y_part = q;
    launch_xattn_products(gram, scratch.gram, context.stream, "xattn_score: gram");
    for (int64_t p = 0; p < parts(x); ++p) {
      product.row_part = attend.x_part = p;
      launch_xattn_products(product, scratch.products, context.stream, "xattn_score: products");
      launch(attention<V>, grid, "xattn_score: attention", attend);
    }
  }
}

}  // namespace

int64_t xattn_score_workspace_bytes(const XAttnArgs& args) {
  if (args.images.total == 0 || args.captions.total == 0) return 0;
  const bool t2i = args.direction == Direction::kT2I;
  const Side x = side_of(t2i ? args.captions : args.images), y = side_of(t2i ? args.images : args.captions);
  Workspace workspace(nullptr);
  if (args.images.dtype == DType::kFloat64) take_scratch<double>(workspace, x, y);
  else take_scratch<float>(workspace, x, y);
  return workspace.used();
}

void xattn_score(const XAttnArgs& args, const CudaContext& context) {
  const auto check_length = [](const VectorSets& sets, const char* name) {
    check(sets.ragged() || sets.max_length <= kPart, "xattn_score: ", name, " must have at most ", kPart,
          " vectors an item on a CUDA device, got ", sets.max_length);
  };
  check_length(args.images, "images");
  check_length(args.captions, "captions");
  const bool fp64 = args.images.dtype == DType::kFloat64;
  if (args.images.total == 0 || args.captions.total == 0) {
    const int64_t pairs = args.images.items * args.captions.items;
    if (pairs > 0) memset_async(args.scores, 0, pairs * (fp64 ? 8 : 4), context.stream, "xattn_score: clear");
    return;
  }
  const bool t2i = args.direction == Direction::kT2I;
  const Side x = side_of(t2i ? args.captions : args.images), y = side_of(t2i ? args.images : args.captions);
  const int64_t row = args.captions.items, x_stride = t2i ? 1 : row, y_stride = t2i ? row : 1;
  if (fp64) run<double>(args, x, y, x_stride, y_stride, context);
  else run<float>(args, x, y, x_stride, y_stride, context);
}

}  // namespace pycm::cuda
