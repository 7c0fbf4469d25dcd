// rank on CUDA: how many gallery rows score above, and exactly as high as, known positives; no N x M matrix.
//
//   positives' exact scores -> [below, above], ends of each one's value in its query's units
//   screen, by phases:   upper < lowest below      never leaves the registers
//                        lower > highest above     counted where it stands (`sure`)
//                        the others                appended; judge_kernel compares each with every positive of its query, in
//                                                  fp64 where the interval does not decide
// A query nothing is known of, or with more doubtful pairs in one phase than it has room for, is counted by direct_kernel: every
// pair in fp64. Counts are sums of integers, so no order of blocks changes them.
// Bytes: workspace = codes, 16 kCapacity a query and 16 a positive. Operations: 2 N M D' on the tensor cores, D fp64
// multiply-adds a doubtful pair. Launches are fixed by the shapes alone.
#include "ops/rank.h"

#include <algorithm>

#include "core/check.h"
#include "cuda/screen.cuh"

namespace pycm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kDirectBlocks = 8;  // direct blocks per multiprocessor
constexpr int64_t kCapacity = 2048, kPhaseColumns = 65536, kDirectRows = 4096;
constexpr SearchNames kNames = {"rank: centre", "rank: clear", "rank: encode queries", "rank: encode gallery",
                                "rank: screen"};

// A positive: its score or negated distance (NaN: it counts nothing), and the ends of its value.
struct Positive {
  double key;
  float below, above;
};
struct Counts {
  unsigned long long *greater, *equal;
};

// Of the positives' lists: those of query `row`.
struct Positives {
  const int64_t *index, *offsets;
  Positive* data;
  Counts counts;
  __device__ int64_t begin(int64_t row) const { return offsets[row]; }
  __device__ int64_t end(int64_t row) const { return offsets[row + 1]; }
};

__device__ double key_of(double score, MetricTraits metric) { return metric.distance ? -score : score; }

// The ends of x for a verified key, in the query's units; see value_of and value_above in cpu/screen.h.
__device__ Positive ends_of(double key, const QueryState& state, MetricTraits metric) {
  double value = key, margin = 0;
  if (metric.distance) {
    const double square = metric.root ? key * key : -key;
    value = 0.5 * (state.square - square);
    margin = 0x1p-22 * (state.square + square);
  }
  const double below = (value - margin) / state.unit, above = (value + margin) / state.unit;
  return {key, fminf(__double2float_rd(below - 0x1p-50 * fabs(below)), FLT_MAX),
          __double2float_ru(above + 0x1p-50 * fabs(above))};
}

// A block a query: exact scores of its positives; the lowest decides what the screen lets past, the highest what is sure.
__global__ void __launch_bounds__(kThreads, 2)
    score_kernel(Rows queries, int64_t begin, Rows gallery, MetricTraits metric, Positives positives, void* scores,
                 QueryState* states) {
  PYCM_SHARED(lowest, uint32_t);
  PYCM_SHARED(highest, uint32_t);
  QueryState& state = states[blockIdx.x];
  const int64_t row = begin + blockIdx.x, last = positives.end(row);
  if (threadIdx.x == 0) {
    lowest = 0xffffffffu;
    highest = 0;
  }
  __syncthreads();
  visit_elements(gallery.dtype, [&](auto element) {
    for (int64_t p = positives.begin(row) + threadIdx.x / kWarp; p < last; p += kWarps) {
      const double score =
          exact_score<decltype(element)>(queries, row, {state.mean, state.norm}, gallery, positives.index[p], metric);
      if (lane_index() != 0) continue;
      if (gallery.dtype == DType::kFloat64) static_cast<double*>(scores)[p] = score;
      else static_cast<float*>(scores)[p] = static_cast<float>(score);
      positives.counts.greater[p] = positives.counts.equal[p] = 0;
      const Positive positive = ends_of(key_of(score, metric), state, metric);
      positives.data[p] = positive;
      if (std::isnan(positive.key)) continue;
      // A NaN end says nothing.
      atomicMin(&lowest, ordered(std::isnan(positive.below) ? -INFINITY : positive.below));
      atomicMax(&highest, ordered(std::isnan(positive.above) ? INFINITY : positive.above));
    }
  });
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (lowest == 0xffffffffu) {  // no positives to count for
    state.cut = NAN;
    return;
  }
  state.ceiling = from_ordered(highest);
  if (!std::isnan(state.cut)) state.cut = fmaxf(__fadd_rd(from_ordered(lowest), -state.row_error), -FLT_MAX);
}

// The doubtful pairs of a phase; blockIdx.y and its warps share those of a query.
__global__ void __launch_bounds__(kThreads, 2)
    judge_kernel(Rows queries, int64_t begin, Rows gallery, MetricTraits metric, Positives positives,
                 const QueryState* states, const Candidate* candidates) {
  const QueryState& state = states[blockIdx.x];
  candidates += int64_t{blockIdx.x} * kCapacity;
  const int64_t count = state.count, row = begin + blockIdx.x;
  if (count > kCapacity) return;  // left to the direct path
  visit_elements(gallery.dtype, [&](auto element) {
    const int64_t first = positives.begin(row), last = positives.end(row);
    for (int64_t c = int64_t{blockIdx.y} * kWarps + threadIdx.x / kWarp; c < count; c += int64_t{gridDim.y} * kWarps) {
      const Candidate candidate = candidates[c];
      const float lower = from_ordered(static_cast<uint32_t>(candidate.key));
      bool scored = false;
      double key = 0;
      for (int64_t p = first; p < last; ++p) {
        const Positive positive = positives.data[p];
        if (std::isnan(positive.key) || positives.index[p] == candidate.index || candidate.upper < positive.below)
          continue;
        if (!(lower > positive.above) && !scored) {
          key = key_of(
              exact_score<decltype(element)>(queries, row, {state.mean, state.norm}, gallery, candidate.index, metric),
              metric);
          scored = true;
        }
        if (lane_index() != 0) continue;
        if (lower > positive.above || key > positive.key) atomicAdd(&positives.counts.greater[p], 1ull);
        else if (key == positive.key) atomicAdd(&positives.counts.equal[p], 1ull);
      }
    }
  });
}

// Between phases, a thread a query: empties its candidates, or leaves it to the direct path.
__global__ void __launch_bounds__(kThreads, 2)
    advance_kernel(int64_t begin, int64_t rows, Positives positives, QueryState* states, uint32_t* direct, bool last) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= rows) return;
  QueryState& state = states[i];
  const int64_t first = positives.begin(begin + i), end = positives.end(begin + i);
  if (state.count > kCapacity) {
    for (int64_t p = first; p < end; ++p) positives.counts.greater[p] = positives.counts.equal[p] = 0;
    take_direct(state, i, direct);
    return;
  }
  state.count = 0;
  if (!last || state.sure == 0) return;
  for (int64_t p = first; p < end; ++p)
    if (!std::isnan(positives.data[p].key)) positives.counts.greater[p] += state.sure;
}

// All pairs of the queries in `direct`: a block takes one query and kDirectRows rows of the gallery at a time; lane l of each
// warp counts for every 32nd positive.
__global__ void __launch_bounds__(kThreads, 2)
    direct_kernel(Rows queries, int64_t begin, Rows gallery, MetricTraits metric, PairFilter filter,
                  Positives positives, const QueryState* states, const uint32_t* direct) {
  const int64_t parts = (gallery.rows + kDirectRows - 1) / kDirectRows, tasks = parts * direct[0];
  visit_elements(gallery.dtype, [&](auto element) {
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
      const int64_t i = direct[1 + task / parts], row = begin + i;
      const int64_t first = task % parts * kDirectRows, last = min(gallery.rows, first + kDirectRows);
      const RowStats stats{states[i].mean, states[i].norm};
      for (int64_t group = positives.begin(row); group < positives.end(row); group += kWarp) {
        const int64_t p = group + lane_index();
        const bool used = p < positives.end(row);
        const double own = used ? positives.data[p].key : NAN;
        const int64_t index = used ? positives.index[p] : -1;
        unsigned long long greater = 0, equal = 0;
        for (int64_t j = first + threadIdx.x / kWarp; j < last; j += kWarps) {
          if (!filter.allows(row, j)) continue;
          const double key = key_of(exact_score<decltype(element)>(queries, row, stats, gallery, j, metric), metric);
          if (j == index) continue;
          greater += key > own;
          equal += key == own;
        }
        if (greater != 0) atomicAdd(&positives.counts.greater[p], greater);
        if (equal != 0) atomicAdd(&positives.counts.equal[p], equal);
      }
    }
  });
}

struct Buffers {
  SearchBuffers search;
  Positive* positives;
};
Buffers lay_out(const RankArgs& args, Workspace& workspace) {
  check_search_sizes("rank", args.queries, args.gallery);
  return {lay_out(args.queries, args.gallery, args.encoded, true, kCapacity, workspace),
          workspace.take<Positive>(args.num_positives)};
}

}  // namespace

int64_t rank_workspace_bytes(const RankArgs& args) {
  Workspace workspace(nullptr);
  lay_out(args, workspace);
  return workspace.used();
}

void rank(const RankArgs& args, const CudaContext& context) {
  if (args.queries.rows == 0 || args.num_positives == 0) return;
  Workspace workspace(context.workspace);
  const Buffers buffers = lay_out(args, workspace);
  const SearchBuffers& b = buffers.search;
  check(workspace.used() <= context.workspace_bytes, "rank: workspace must have ", workspace.used(), " bytes, got ",
        context.workspace_bytes);
  const Rows &queries = args.queries, &gallery = args.gallery;
  const MetricTraits metric = traits_of(args.metric);
  const PairFilter filter = pair_filter(args.mask, args.exclude, args.exclude_offsets);
  const Positives positives{
      args.positives,
      args.offsets,
      buffers.positives,
      {reinterpret_cast<unsigned long long*>(args.greater), reinterpret_cast<unsigned long long*>(args.equal)}};
  const auto blocks = [&](int64_t count, int64_t along_y = 1) {
    return Grid{dim3(static_cast<unsigned>(count), static_cast<unsigned>(along_y)), dim3(kThreads), 1, 0,
                context.stream};
  };

  Search search(queries, gallery, args.metric, true, filter, true, b, kNames, context.stream);
  for (int64_t begin = 0; begin < queries.rows; begin += b.batch) {
    const int64_t rows = std::min(b.batch, queries.rows - begin);
    const int64_t spread = std::clamp<int64_t>(4096 / rows, 1, kCapacity / kWarps);
    search.start(begin, rows);
    launch(score_kernel, blocks(rows), "rank: score", queries, begin, gallery, metric, positives, args.scores,
           b.states);
    for (int64_t first = 0, last; first < gallery.rows; first = last) {
      last = std::min({gallery.rows, first + kPhaseColumns, first + b.code_rows});
      search.screen(first, last);
      launch(judge_kernel, blocks(rows, spread), "rank: judge", queries, begin, gallery, metric, positives, b.states,
             b.candidates);
      launch(advance_kernel, blocks((rows + kThreads - 1) / kThreads), "rank: advance", begin, rows, positives,
             b.states, b.direct, last == gallery.rows);
    }
    launch(direct_kernel, blocks(kDirectBlocks * device_limits().multiprocessors), "rank: direct", queries, begin,
           gallery, metric, filter, positives, b.states, b.direct);
  }
}

}  // namespace pycm::cuda
