// topk on CUDA: screen and verify without the N x M matrix, in launches fixed by the shapes alone.
//
//   batch of queries            gallery, in a shuffled order, in phases that grow
//   encode            for each: |0 .. C|....|..............|................................|
//                       encode (unless kept) -> screen -> prune: the k-th best lower bound becomes the threshold
//                     verify: candidates scored in fp64, a warp each -> sort -> k best
//
// The first phase has as many positions as a query has room for (`capacity`), so all are appended; by its k-th best bound
// a later phase of g times as many lets about k g past (growth_of), and g is chosen for them to fit. A query that nothing is
// known of, or whose candidates did not fit, is left to direct_kernel: every pair in fp64; where such queries are few, the
// gallery is divided among the blocks, and gather_kernel takes the best of their lists.
// Bytes: workspace = codes of a batch and of a run of the gallery, 16 capacity a query; see lay_out in search.cu; at most kListBytes of the
// direct path's lists. Operations: 2 N M D' on the tensor cores, D fp64 multiply-adds a candidate.
#include "ops/topk.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "cuda/select.cuh"

namespace pycm::cuda {
namespace {

constexpr int64_t kMinCapacity = 512, kRoom = 8;  // candidates a query has room for: at least, and per match
constexpr int kVerifyWarps = kSelectThreads / kWarp, kDirectBlocks = 4;  // direct blocks per multiprocessor
constexpr int64_t kListBytes = int64_t{64} << 20,
                  kPartRows = 512;  // of the direct path's lists; the least part of a gallery
constexpr SearchNames kNames = {"topk: centre", "topk: clear", "topk: encode queries", "topk: encode gallery",
                                "topk: screen"};

// A phase may have so many times the positions before it. The number that passes the k-th best of n rows among g n more is g
// times a variable of the gamma distribution of shape k; this one is above it but for one query in ten millions.
int64_t growth_of(int64_t capacity, int64_t k) {
  const double most = static_cast<double>(k) + 6 * std::sqrt(static_cast<double>(k)) + 10;
  return std::max<int64_t>(2, static_cast<int64_t>(static_cast<double>(capacity - k) / most));
}

// For few queries, three phases at most: each costs a launch or two, which the room for candidates does not.
int64_t capacity_of(const TopKArgs& args) {
  const int64_t rows = args.gallery.rows;
  int64_t capacity = power_of_two(std::max(kMinCapacity, std::min(kRoom * args.k, rows)));
  if (args.queries.rows > kFewQueries) return capacity;
  while (capacity < rows && rows / capacity / growth_of(capacity, args.k) >= growth_of(capacity, args.k)) capacity *= 2;
  return capacity;
}

// Lists of the direct path, where a query's gallery is divided: as many parts as there are lists for the queries that take it.
struct DirectLists {
  Candidate* lists;  // [count][room]
  uint32_t* sizes;   // [count]
  int64_t count, room;

  __device__ int64_t parts(int64_t queries) const { return queries == 0 || count < queries ? 1 : count / queries; }
};

struct Buffers {
  SearchBuffers search;
  DirectLists direct;
};
Buffers lay_out(const TopKArgs& args, Workspace& workspace) {
  check_search_sizes("topk", args.queries, args.gallery);
  Buffers buffers{lay_out(args.queries, args.gallery, args.encoded, args.precision == Precision::kExact,
                          capacity_of(args), workspace),
                  {}};
  DirectLists& direct = buffers.direct;
  direct.room = power_of_two(std::max<int64_t>(64, 2 * args.k));
  const int64_t useful = buffers.search.batch * ((args.gallery.rows + kPartRows - 1) / kPartRows);
  direct.count = std::min({int64_t{kDirectBlocks} * device_limits().multiprocessors, useful,
                           kListBytes / (direct.room * static_cast<int64_t>(sizeof(Candidate)))});
  direct.lists = workspace.take<Candidate>(direct.count * direct.room);
  direct.sizes = workspace.take<uint32_t>(direct.count);
  return buffers;
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

// The k best, or all if fewer, of items [0, count), in `list`, which has room for `size`, a power of two above k. scan(begin, end, keep)
// gives those of a run to `keep`; of items with equal keys a later run's have higher indices.
template <typename Scan>
__device__ __forceinline__ int64_t keep_best(Candidate* list, int64_t size, int64_t k, int64_t count, Scan&& scan) {
  PYCM_SHARED(sorted, Candidate[kSortShared]);
  PYCM_SHARED(appended, uint32_t);
  int64_t have = 0;
  uint64_t worst = 0;  // the key of the k-th best: one that is no better, and later, is no match
  for (int64_t begin = 0; begin < count;) {
    const int64_t end = min(count, begin + size - have);
    if (threadIdx.x == 0) appended = static_cast<uint32_t>(have);
    __syncthreads();
    scan(begin, end, [&](const Candidate& candidate) {
      if (candidate.key > worst) list[atomicAdd(&appended, 1u)] = candidate;
    });
    __syncthreads();
    have = appended;
    begin = end;
    // The last time always: who gathers lists run by run counts on their order, as `worst` counts on that of the runs.
    if (have > 0 && (begin == count || (have > k && have > size / 2))) {
      sort_candidates(list, have, sorted);
      have = min(have, k);
      if (have == k) worst = list[k - 1].key;
    }
    __syncthreads();
  }
  return have;
}

// All pairs of the queries in `direct`, by index; a block takes a part of the gallery for one query at a time.
__global__ void __launch_bounds__(kSelectThreads, 2)
    direct_kernel(Rows queries, int64_t begin, Rows gallery, MetricTraits metric, PairFilter filter, int64_t k,
                  QueryState* states, Candidate* candidates, int64_t capacity, const uint32_t* direct,
                  DirectLists lists) {
  const int64_t parts = lists.parts(direct[0]), tasks = parts * direct[0];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t row = direct[1 + task / parts], part = task % parts;
    const int64_t first = gallery.rows * part / parts, last = gallery.rows * (part + 1) / parts;
    const RowStats stats{states[row].mean, states[row].norm};
    Candidate* const list = parts == 1 ? candidates + row * capacity : lists.lists + task * lists.room;
    const int64_t have = keep_best(
        list, parts == 1 ? capacity : lists.room, k, last - first, [&](int64_t from, int64_t to, auto&& keep) {
          visit_elements(gallery.dtype, [&](auto element) {
            for (int64_t j = first + from + warp; j < first + to; j += kSelectThreads / kWarp) {
              if (!filter.allows(begin + row, j)) continue;
              const double score = exact_score<decltype(element)>(queries, begin + row, stats, gallery, j, metric);
              if (lane_index() == 0) keep(verified(score, j, metric.distance));
            }
          });
        });
    if (threadIdx.x != 0) continue;
    (parts == 1 ? states[row].count : lists.sizes[task]) = static_cast<uint32_t>(have);
  }
}

// A block a query: the best of its parts' lists.
__global__ void __launch_bounds__(kSelectThreads, 2)
    gather_kernel(int64_t k, QueryState* states, Candidate* candidates, int64_t capacity, const uint32_t* direct,
                  DirectLists lists) {
  const int64_t parts = lists.parts(direct[0]);
  if (parts == 1) return;
  for (int64_t next = blockIdx.x; next < direct[0]; next += gridDim.x) {
    const int64_t row = direct[1 + next];
    const int64_t have =
        keep_best(candidates + row * capacity, capacity, k, parts * k, [&](int64_t from, int64_t to, auto&& keep) {
          for (int64_t i = from + threadIdx.x; i < to; i += kSelectThreads) {
            const int64_t list = next * parts + i / k, place = i % k;
            if (place < lists.sizes[list]) keep(lists.lists[list * lists.room + place]);
          }
        });
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
  const Buffers buffers = lay_out(args, workspace);
  const SearchBuffers& b = buffers.search;
  check(workspace.used() <= context.workspace_bytes, "topk: workspace must have ", workspace.used(), " bytes, got ",
        context.workspace_bytes);
  const Rows &queries = args.queries, &gallery = args.gallery;
  const MetricTraits metric = traits_of(args.metric);
  const bool exact = args.precision == Precision::kExact;
  const int64_t k = args.k, growth = growth_of(b.capacity, k);
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
    const int64_t most = kDirectBlocks * device_limits().multiprocessors;
    launch(direct_kernel, blocks(std::min(most, std::max(rows, buffers.direct.count))), "topk: direct", queries, begin,
           gallery, metric, filter, k, b.states, b.candidates, b.capacity, b.direct, buffers.direct);
    launch(gather_kernel, blocks(std::min(rows, most)), "topk: gather", k, b.states, b.candidates, b.capacity, b.direct,
           buffers.direct);
    const auto write = [&](auto* scores) {
      launch(write_kernel<std::decay_t<decltype(*scores)>>, blocks(rows), "topk: write", b.states, b.candidates,
             b.capacity, k, metric.distance, scores + begin * k, args.indices + begin * k);
    };
    if (gallery.dtype == DType::kFloat64) write(static_cast<double*>(args.scores));
    else write(static_cast<float*>(args.scores));
  }
}

}  // namespace pycm::cuda
