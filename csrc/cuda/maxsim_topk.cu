// maxsim_topk: the k items with the largest maxsim score of every query, exact unless asked otherwise.
//
//   1. scores    of a batch of queries with all items, by maxsim's own passes
//   2. select    one block per query: |score - exact score| <= doubt, so the k-th largest lower end is a threshold, and
//                only pairs whose upper end reaches it can be matches
//   3. verify    these in fp64 in the library's fixed order, a block per pair
//   4. sort      one block per query: by score, then by index
//
// A maximum of bounded values is within the largest of their bounds, a sum within the sum: that gives `Doubt`. What is not
// finite is verified. fp64 scores are exact as they are.
// Operations: maxsim's, and 2 Tq Tg D in fp64 for each survivor. Bytes: 4 N M of scores and 16 N M of candidates, held for
// batches of kBatchBytes. Limits: M < 2^31.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cuda/maxsim_exact.cuh"
#include "cuda/maxsim_pass.h"
#include "cuda/select.cuh"

namespace pycm::cuda {
namespace {

#if defined(PYCM_SIMT)
constexpr int64_t kBatchBytes = 1 << 10;  // so that tests see several batches
#else
constexpr int64_t kBatchBytes = int64_t{256} << 20;
#endif
constexpr int kWarps = kSelectThreads / kWarp;
constexpr double kSmallNorm = 0x1p-40, kLargeNorm = 0x1p60;  // between them products neither vanish nor overflow

// Sums and maxima of the norms of each item's vectors; 1 each for normalised vectors.
struct ItemNorms {
  double *sum, *largest;
};

// Constants of the bound. Sums of tensor cores err by `relative` |x||y| (docs/exactness.md, section 8; three times as
// many terms in TF32, whose split loses 2^-20), and lose what underflows.
struct Doubt {
  double relative, absolute, absolute_norm;

  __device__ double of(int64_t count, double summed, double largest, double mean_norm) const {
    const double n = static_cast<double>(count);
    // maxima are summed in fp32, in 32 chains; 16 roundings more: norms, quotient, tree
    return (relative + (n / 32 + 16) * 0x1p-23) * summed * largest + n * (absolute + absolute_norm * mean_norm);
  }
};

Doubt doubt_of(const MaxSimArgs& args) {
  const double dim = static_cast<double>(args.queries.dim), flushed = 4 * dim * 0x1p-126;
  const bool split = args.queries.dtype == DType::kFloat32, cosine = args.metric == Metric::kCosine;
  return {(3.2 * ((split ? 3 : 1) * dim + 64) + (split ? 16 : 0)) * 0x1p-24,
          cosine ? 2 * flushed / kSmallNorm : 8 * (dim + 4) * 0x1p-149, cosine ? 0 : flushed};
}

// One warp per item.
__global__ void __launch_bounds__(kSelectThreads) item_norms(const VectorSets sets, ItemNorms norms, bool cosine) {
  const int64_t item = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
  if (item >= sets.items) return;
  const ItemSpan span = item_span(sets, item);
  double sum = 0, largest = 0;
  for (int64_t i = 0; i < span.length; ++i) {
    double norm = exact_norm(sets, span.first + i * sets.row_stride);
    if (cosine && norm != 0) norm = norm > kSmallNorm && norm < kLargeNorm ? 1 : INFINITY;
    sum += norm;
    largest = norm > largest || std::isnan(norm) ? norm : largest;
  }
  if (threadIdx.x % kWarp != 0) return;
  norms.sum[item] = sum;
  norms.largest[item] = largest;
}

struct Batch {
  MaxSimArgs part;  // of these queries; scores are the approximate ones
  bool sure;        // they stand for themselves
  Doubt doubt;
  ItemNorms queries, gallery;  // the queries' from the first of the batch on
  Candidate* candidates;       // [queries, room]
  int64_t room;                // a power of two
  int32_t* counts;
  int64_t k;
};

template <class V>
__device__ double doubt_of_pair(const Batch& batch, int64_t i, int64_t j) {
  if (batch.sure) return 0;
  const int64_t x = item_span(batch.part.queries, i).length, y = item_span(batch.part.gallery, j).length;
  const double x_sum = batch.queries.sum[i], x_largest = batch.queries.largest[i];
  const double y_sum = batch.gallery.sum[j], y_largest = batch.gallery.largest[j];
  const bool mean = batch.part.reduce == Reduce::kMean;
  double total = 0;
  if (x == 0 || y == 0) return 0;
  if (batch.part.direction != Direction::kI2T)
    total += batch.doubt.of(x, x_sum, y_largest, x_largest + y_largest) / (mean ? static_cast<double>(x) : 1);
  if (batch.part.direction != Direction::kT2I)
    total += batch.doubt.of(y, y_sum, x_largest, x_largest + y_largest) / (mean ? static_cast<double>(y) : 1);
  return total;
}

template <class V>
__global__ void __launch_bounds__(kSelectThreads) select(const Batch batch) {
  PYCM_SHARED(count, int);
  const int64_t query = blockIdx.x, items = batch.part.gallery.items;
  const V* scores = static_cast<const V*>(batch.part.scores) + query * items;
  Candidate* candidates = batch.candidates + query * batch.room;
  for (int64_t j = threadIdx.x; j < items; j += kSelectThreads) {
    const double score = scores[j];
    double lower = score, upper = score;
    if (std::isnan(score)) {  // maxsim has looked at it in fp64
      lower = upper = -INFINITY;
    } else if (!batch.sure) {
      const double doubt =
          std::isfinite(score) ? doubt_of_pair<V>(batch, query, j) + 0x1p-22 * std::fabs(score) : INFINITY;
      const bool bounded = doubt < DBL_MAX;
      lower = bounded ? score - doubt : -INFINITY;
      upper = bounded ? score + doubt : INFINITY;
    }
    candidates[j] = {ordered(__double2float_rd(lower)), static_cast<uint32_t>(j), __double2float_ru(upper)};
  }
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  const uint32_t threshold = kth_largest(candidates, items, batch.k);
  // Survivors to the front, where everyone has read.
  for (int64_t base = 0; base < items; base += kSelectThreads) {
    const int64_t j = base + threadIdx.x;
    Candidate candidate{};
    bool kept = false;
    if (j < items) {
      candidate = candidates[j];
      const double score = scores[candidate.index];
      kept = ordered(candidate.upper) >= threshold && !std::isnan(score);
      candidate.key = ordered(score);
    }
    __syncthreads();
    if (kept) candidates[atomicAdd(&count, 1)] = candidate;  // in any order: they are sorted in the end
    __syncthreads();
  }
  if (threadIdx.x == 0) batch.counts[query] = count;
}

// One direction of a pair in fp64, in the fixed order; the first warp gets it.
__device__ double exact_direction(const VectorSets& x, const ItemSpan& rows, const VectorSets& y, const ItemSpan& item,
                                  bool cosine, bool mean) {
  PYCM_SHARED(best, double[kWarp]);
  double sum = 0;
  for (int64_t base = 0; base < rows.length; base += kWarp) {
    for (int r = threadIdx.x / kWarp; r < kWarp && base + r < rows.length; r += kWarps) {
      const ExactMax found = exact_row_max(x, rows.first + (base + r) * x.row_stride, y, item, cosine);
      if (threadIdx.x % kWarp == 0) best[r] = found.value;
    }
    __syncthreads();
    if (threadIdx.x < kWarp && base + threadIdx.x < rows.length) sum = __dadd_rn(sum, best[threadIdx.x]);
    __syncthreads();
  }
  sum = warp_sum(sum);
  return mean ? sum / static_cast<double>(rows.length) : sum;
}

// Blocks (y, query) take the query's survivors in turn.
__global__ void __launch_bounds__(kSelectThreads) verify(const Batch batch) {
  const MaxSimArgs& part = batch.part;
  const bool cosine = part.metric == Metric::kCosine, mean = part.reduce == Reduce::kMean;
  const int64_t query = blockIdx.x;
  const ItemSpan x = item_span(part.queries, query);
  for (int64_t s = blockIdx.y; s < batch.counts[query]; s += gridDim.y) {
    Candidate& candidate = batch.candidates[query * batch.room + s];
    const ItemSpan y = item_span(part.gallery, candidate.index);
    double score = 0;
    if (x.length > 0 && y.length > 0) {
      if (part.direction != Direction::kI2T) score = exact_direction(part.queries, x, part.gallery, y, cosine, mean);
      if (part.direction != Direction::kT2I)
        score = __dadd_rn(score, exact_direction(part.gallery, y, part.queries, x, cosine, mean));
    }
    if (threadIdx.x == 0) candidate.key = ordered(static_cast<double>(static_cast<float>(score)));
  }
}

template <class V>
__global__ void __launch_bounds__(kSelectThreads) sort(const Batch batch, V* scores, int64_t* indices) {
  PYCM_SHARED(shared, Candidate[kSortShared]);
  const int64_t query = blockIdx.x, count = batch.counts[query];
  Candidate* candidates = batch.candidates + query * batch.room;
  sort_candidates(candidates, count, shared);
  for (int64_t i = threadIdx.x; i < batch.k; i += kSelectThreads) {
    scores[query * batch.k + i] =
        i < count ? static_cast<V>(from_ordered(candidates[i].key)) : static_cast<V>(-INFINITY);
    indices[query * batch.k + i] = i < count ? int64_t{candidates[i].index} : -1;
  }
}

VectorSets slice(VectorSets sets, int64_t begin, int64_t items) {
  if (sets.ragged()) {
    sets.offsets += begin;
  } else {
    sets.data = static_cast<const char*>(sets.data) + begin * sets.item_stride * item_size(sets.dtype);
    if (sets.lengths != nullptr) sets.lengths += begin;
    sets.total = items * sets.max_length;
  }
  sets.items = items;
  return sets;
}

int64_t value_bytes(const MaxSimTopKArgs& args) { return args.forward.queries.dtype == DType::kFloat64 ? 8 : 4; }

struct Scratch {
  int64_t rows, room;
  char* scores;
  Candidate* candidates;
  int32_t* counts;
  ItemNorms queries, gallery;
  char* maxsim;  // the rest is its workspace
};

Scratch take_scratch(Workspace& workspace, const MaxSimTopKArgs& args) {
  const MaxSimArgs& forward = args.forward;
  Scratch scratch;
  scratch.room = 2;
  while (scratch.room < forward.gallery.items) scratch.room *= 2;
  scratch.rows = std::clamp<int64_t>(kBatchBytes / (scratch.room * static_cast<int64_t>(sizeof(Candidate))), 1,
                                     std::max<int64_t>(1, forward.queries.items));
  scratch.scores = workspace.take<char>(scratch.rows * forward.gallery.items * value_bytes(args));
  scratch.candidates = workspace.take<Candidate>(scratch.rows * scratch.room);
  scratch.counts = workspace.take<int32_t>(scratch.rows);
  scratch.queries = {workspace.take<double>(forward.queries.items), workspace.take<double>(forward.queries.items)};
  scratch.gallery = {workspace.take<double>(forward.gallery.items), workspace.take<double>(forward.gallery.items)};
  scratch.maxsim = workspace.take<char>(0);
  return scratch;
}

template <class V>
void run(const MaxSimTopKArgs& args, const CudaContext& context) {
  const MaxSimArgs& forward = args.forward;
  void* const stream = context.stream;
  Workspace workspace(context.workspace);
  const Scratch scratch = take_scratch(workspace, args);
  const CudaContext inner{stream, scratch.maxsim, context.workspace_bytes - workspace.used()};
  Batch batch{};
  batch.sure = !args.exact || std::is_same_v<V, double>;
  batch.doubt = doubt_of(forward);
  batch.gallery = scratch.gallery;
  batch.candidates = scratch.candidates;
  batch.room = scratch.room;
  batch.counts = scratch.counts;
  batch.k = args.k;
  if (!batch.sure) {
    const bool cosine = forward.metric == Metric::kCosine;
    for (const auto& [sets, norms] :
         {std::pair{forward.queries, scratch.queries}, std::pair{forward.gallery, scratch.gallery}})
      launch(item_norms, Grid{dim3(blocks_for(sets.items, kWarps)), dim3(kSelectThreads), 1, 0, stream},
             "maxsim_topk: norms", sets, norms, cosine);
  }
  for (int64_t begin = 0; begin < forward.queries.items; begin += scratch.rows) {
    const int64_t rows = std::min(scratch.rows, forward.queries.items - begin);
    batch.part = forward;
    batch.part.queries = slice(forward.queries, begin, rows);
    batch.part.scores = scratch.scores;
    batch.queries = {scratch.queries.sum + begin, scratch.queries.largest + begin};
    maxsim(batch.part, inner);
    const dim3 grid(static_cast<unsigned>(rows));
    launch(select<V>, Grid{grid, dim3(kSelectThreads), 1, 0, stream}, "maxsim_topk: select", batch);
    if (!batch.sure) {
      const int64_t share = std::clamp<int64_t>(16 * int64_t{device_limits().multiprocessors} / rows, 1, 256);
      launch(verify, Grid{dim3(grid.x, static_cast<unsigned>(share)), dim3(kSelectThreads), 1, 0, stream},
             "maxsim_topk: verify", batch);
    }
    launch(sort<V>, Grid{grid, dim3(kSelectThreads), 1, 0, stream}, "maxsim_topk: sort", batch,
           static_cast<V*>(args.scores) + begin * args.k, args.indices + begin * args.k);
  }
}

}  // namespace

int64_t maxsim_topk_workspace_bytes(const MaxSimTopKArgs& args) {
  Workspace workspace(nullptr);
  const Scratch scratch = take_scratch(workspace, args);
  MaxSimArgs part = args.forward;
  part.queries = slice(part.queries, 0, std::min(scratch.rows, part.queries.items));
  return workspace.used() + maxsim_workspace_bytes(part);
}

void maxsim_topk(const MaxSimTopKArgs& args, const CudaContext& context) {
  if (args.forward.queries.items == 0) return;
  if (args.forward.queries.dtype == DType::kFloat64) run<double>(args, context);
  else run<float>(args, context);
}

}  // namespace pycm::cuda
