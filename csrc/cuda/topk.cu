// topk on CUDA: screen and verify without the N x M matrix, in launches fixed by the shapes alone.
//
//   batch of queries            gallery, in a shuffled order, in phases that grow
//   encode            for each: |0 .. C|....|..............|................................|
//                       encode (unless kept) -> screen -> prune: the k-th best lower bound becomes the threshold
//                     verify: candidates scored in fp64, a warp each -> sort -> k best
//
// The first phase has as many positions as a query has room for (`capacity`), so all are appended; by its k-th best bound
// a later phase of g times as many lets about k (g - 1) past, and g is chosen for them to fit. A query that nothing is
// known of, or whose candidates did not fit, is left to direct_kernel: every pair in fp64, kept in the same room.
// Bytes: workspace = codes of a batch and of a run of the gallery, 16 capacity a query; see lay_out in encode.cu. Operations: 2 N M D' on the
// tensor cores, D fp64 multiply-adds a candidate.
#include "ops/topk.h"

#include <algorithm>

#include "core/check.h"
#include "cuda/select.cuh"

namespace pycm::cuda {
namespace {

constexpr int64_t kMinCapacity = 512, kRoom = 8;  // candidates a query has room for: at least, and per match
constexpr int kVerifyWarps = kSelectThreads / kWarp, kDirectBlocks = 4;  // direct blocks per multiprocessor
constexpr SearchNames kNames = {"topk: centre", "topk: clear", "topk: encode queries", "topk: encode gallery",
                                "topk: screen"};

SearchBuffers lay_out(const TopKArgs& args, Workspace& workspace) {
  check_search_sizes("topk", args.queries, args.gallery);
  const int64_t capacity = power_of_two(std::max(kMinCapacity, std::min(kRoom * args.k, args.gallery.rows)));
  return lay_out(args.queries, args.gallery, capacity, workspace);
}

// ---- kernels: one block a query ----

// The k-th best lower bound becomes the threshold; candidates below it go.
__global__ void __launch_bounds__(kSelectThreads, 2)
    prune_kernel(QueryState* states, Candidate* candidates, int64_t capacity, int64_t k, uint32_t* direct) {
  PYCM_SHARED(warp_counts, uint32_t[kSelectThreads / kWarp]);
  QueryState& state = states[blockIdx.x];
  candidates += int64_t{blockIdx.x} * capacity;
  const int64_t count = state.count;
  const float row_error = state.row_error;
  float threshold = state.threshold;
  const bool sought = !std::isnan(state.cut);
  __syncthreads();  // all have read before one writes
  if (!sought || count < k) return;
  if (count > capacity) {
    if (threadIdx.x == 0) take_direct(state, blockIdx.x, direct);
    return;
  }
  threshold = fmaxf(threshold, from_ordered(kth_largest(candidates, count, k)));
  uint32_t kept = 0;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t begin = 0; begin < count; begin += kSelectThreads) {
    const int64_t i = begin + threadIdx.x;
    Candidate candidate{};
    bool keep = false;
    if (i < count) {
      candidate = candidates[i];
      keep = candidate.upper >= threshold;
    }
    const uint32_t ballot = __ballot_sync(kAllLanes, keep);
    if (lane_index() == 0) warp_counts[warp] = static_cast<uint32_t>(__popc(ballot));
    __syncthreads();  // and all candidates of this step have been read
    uint32_t total = 0, before = 0;
    for (int w = 0; w < kSelectThreads / kWarp; ++w) {
      if (w == warp) before = total;
      total += warp_counts[w];
    }
    before += static_cast<uint32_t>(__popc(ballot & ((1u << lane_index()) - 1)));
    if (keep) candidates[kept + before] = candidate;
    kept += total;
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  state.count = kept;
  state.threshold = threshold;
  state.cut = fmaxf(__fadd_rd(threshold, -row_error), -FLT_MAX);
}

// The score that a screened value stands for.
__device__ double score_of(const QueryState& state, float value, MetricTraits metric, DType dtype) {
  double score = state.unit * static_cast<double>(value);
  if (metric.distance) {
    score = fmax(0.0, state.square - 2 * score);
    if (metric.root) score = sqrt(score);
  }
  return dtype == DType::kFloat64 ? score : static_cast<double>(static_cast<float>(score));
}

// A verified pair: its key, and the score's sign where it is 0. A NaN is never a match.
__device__ Candidate verified(double score, int64_t index, bool distance) {
  const double key = distance ? -score : score;
  return {std::isnan(key) ? 0 : ordered(key), static_cast<uint32_t>(index), static_cast<float>(key)};
}

__global__ void __launch_bounds__(kVerifyWarps* kWarp)
    verify_kernel(Rows queries, int64_t begin, Rows gallery, MetricTraits metric, bool exact, const QueryState* states,
                  Candidate* candidates, int64_t capacity) {
  const QueryState& state = states[blockIdx.x];
  candidates += int64_t{blockIdx.x} * capacity;
  const int64_t count = state.count;
  visit_elements(gallery.dtype, [&](auto element) {
    const int64_t warps = int64_t{gridDim.y} * kVerifyWarps;
    for (int64_t c = int64_t{blockIdx.y} * kVerifyWarps + threadIdx.x / kWarp; c < count; c += warps) {
      const Candidate candidate = candidates[c];
      __syncwarp();  // all lanes have read it
      const double score = exact || !std::isfinite(candidate.upper)
                               ? exact_score<decltype(element)>(queries, begin + blockIdx.x, {state.mean, state.norm},
                                                                gallery, candidate.index, metric)
                               : score_of(state, candidate.upper, metric, gallery.dtype);
      if (lane_index() == 0) candidates[c] = verified(score, candidate.index, metric.distance);
    }
  });
}

// All pairs of the queries in `direct`, by index; a block a query.
__global__ void __launch_bounds__(kSelectThreads, 2)
    direct_kernel(Rows queries, int64_t begin, Rows gallery, MetricTraits metric, PairFilter filter, int64_t k,
                  QueryState* states, Candidate* all_candidates, int64_t capacity, const uint32_t* direct) {
  PYCM_SHARED(sorted, Candidate[kSortShared]);
  PYCM_SHARED(appended, uint32_t);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t next = blockIdx.x; next < direct[0]; next += gridDim.x) {
    const int64_t row = direct[1 + next];
    Candidate* candidates = all_candidates + row * capacity;
    const RowStats stats{states[row].mean, states[row].norm};
    int64_t have = 0;
    uint64_t worst = 0;  // the key of the k-th best: one that is no better, and later, is no match
    for (int64_t first = 0; first < gallery.rows;) {
      const int64_t last = min(gallery.rows, first + capacity - have);
      if (threadIdx.x == 0) appended = static_cast<uint32_t>(have);
      __syncthreads();
      visit_elements(gallery.dtype, [&](auto element) {
        for (int64_t j = first + warp; j < last; j += kSelectThreads / kWarp) {
          if (!filter.allows(begin + row, j)) continue;
          const double score = exact_score<decltype(element)>(queries, begin + row, stats, gallery, j, metric);
          const Candidate candidate = verified(score, j, metric.distance);
          if (lane_index() == 0 && candidate.key > worst) candidates[atomicAdd(&appended, 1u)] = candidate;
        }
      });
      __syncthreads();
      have = appended;
      first = last;
      if (have > k && (first == gallery.rows || have > capacity / 2)) {
        sort_candidates(candidates, have, sorted);
        have = k;
        worst = candidates[k - 1].key;
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) states[row].count = static_cast<uint32_t>(have);
  }
}

template <typename S>
__global__ void __launch_bounds__(kSelectThreads, 2)
    write_kernel(const QueryState* states, Candidate* candidates, int64_t capacity, int64_t k, bool distance, S* scores,
                 int64_t* indices) {
  PYCM_SHARED(sorted, Candidate[kSortShared]);
  candidates += int64_t{blockIdx.x} * capacity;
  const int64_t count = states[blockIdx.x].count;
  sort_candidates(candidates, count, sorted);
  for (int64_t i = threadIdx.x; i < k; i += kSelectThreads) {
    double key = -INFINITY;
    int64_t index = -1;
    if (i < count && candidates[i].key != 0) {
      key = from_ordered(candidates[i].key);
      if (key == 0) key = candidates[i].upper;
      index = candidates[i].index;
    }
    scores[int64_t{blockIdx.x} * k + i] = static_cast<S>(distance ? -key : key);
    indices[int64_t{blockIdx.x} * k + i] = index;
  }
}

}  // namespace

int64_t topk_workspace_bytes(const TopKArgs& args) {
  Workspace workspace(nullptr);
  lay_out(args, workspace);
  return workspace.used();
}

void topk(const TopKArgs& args, const CudaContext& context) {
  if (args.queries.rows == 0) return;
  Workspace workspace(context.workspace);
  const SearchBuffers b = lay_out(args, workspace);
  check(workspace.used() <= context.workspace_bytes, "topk: workspace must have ", workspace.used(), " bytes, got ",
        context.workspace_bytes);
  const Rows &queries = args.queries, &gallery = args.gallery;
  const MetricTraits metric = traits_of(args.metric);
  const bool exact = args.precision == Precision::kExact;
  const int64_t k = args.k, growth = std::clamp<int64_t>(b.capacity / (2 * k), 2, 32);
  const PairFilter filter = pair_filter(args.mask, args.exclude, args.exclude_offsets);
  const auto blocks = [&](int64_t count, int64_t along_y = 1) {
    return Grid{dim3(static_cast<unsigned>(count), static_cast<unsigned>(along_y)), dim3(kSelectThreads), 1, 0,
                context.stream};
  };

  Search search(queries, gallery, args.metric, exact, filter, false, b, kNames, context.stream);
  for (int64_t begin = 0; begin < queries.rows; begin += b.batch) {
    const int64_t rows = std::min(b.batch, queries.rows - begin);
    search.start(begin, rows);
    for (int64_t first = 0, last, pruned = 0; first < gallery.rows; first = last) {
      last = std::min({gallery.rows, first == 0 ? b.capacity : first * growth, first + b.code_rows});
      search.screen(first, last);
      if (last < 2 * pruned && last < gallery.rows) continue;  // the threshold would hardly rise
      launch(prune_kernel, blocks(rows), "topk: prune", b.states, b.candidates, b.capacity, k, b.direct);
      pruned = last;
    }
    const int64_t spread = std::clamp<int64_t>(4096 / rows, 1, b.capacity / kVerifyWarps);
    launch(verify_kernel, blocks(rows, spread), "topk: verify", queries, begin, gallery, metric, exact, b.states,
           b.candidates, b.capacity);
    launch(direct_kernel, blocks(std::min<int64_t>(rows, kDirectBlocks * device_limits().multiprocessors)),
           "topk: direct", queries, begin, gallery, metric, filter, k, b.states, b.candidates, b.capacity, b.direct);
    const auto write = [&](auto* scores) {
      launch(write_kernel<std::decay_t<decltype(*scores)>>, blocks(rows), "topk: write", b.states, b.candidates,
             b.capacity, k, metric.distance, scores + begin * k, args.indices + begin * k);
    };
    if (gallery.dtype == DType::kFloat64) write(static_cast<double*>(args.scores));
    else write(static_cast<float*>(args.scores));
  }
}

}  // namespace pycm::cuda
