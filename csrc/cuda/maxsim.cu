// maxsim: for every query and item the sum, over the query's vectors, of the largest product with a vector of the item.
//
//   1. norms        cosine only: 1 / |x| of every vector
//   2. row maxima   best[item][query vector], by the tensor cores (maxsim_tile.cu, maxsim_sm90.cu); of fp64 inputs by
//                   plain arithmetic here, in the library's fixed order, hence exact
//   3. sums         one warp per (query, item) in the fixed order of 32 lanes
//
// i2t is the same with the sides exchanged; both adds the two.
// Operations: 2 R G D for R query and G gallery vectors. Bytes: the inputs, and 8 for every query vector and item, written
// and read back. The maxima of kPartBytes are held at a time; the launches depend on shapes alone.
// Limits: cosine of fp32 and bf16 vectors whose product underflows fp32 (norms about 1e-20) loses it.
#include <algorithm>
#include <cmath>

#include "cuda/maxsim_exact.cuh"
#include "cuda/maxsim_pass.h"
#include "cuda/maxsim_product.cuh"

namespace pycm::cuda {
namespace {

#if defined(PYCM_SIMT)
constexpr int64_t kPartBytes = 1 << 14;  // so that tests see several parts
#else
constexpr int64_t kPartBytes = int64_t{256} << 20;
#endif
constexpr int kWarps = 8;  // per block of the kernels below

__device__ __forceinline__ int64_t warp_index() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}

template <class V>
__global__ void __launch_bounds__(kWarps* kWarp) vector_norms(const VectorSets sets, V* out) {
  const int64_t position = warp_index();
  if (position >= sets.total) return;
  const int64_t offset = vector_offset(sets, position);
  const double norm = offset < 0 ? 0 : exact_norm(sets, offset);
  if (threadIdx.x % kWarp != 0) return;
  if constexpr (std::is_same_v<V, double>) out[position] = norm;
  else out[position] = norm == 0 ? 0.f : static_cast<float>(1 / norm);
}

// One warp per (row, item).
__global__ void __launch_bounds__(kWarps* kWarp) row_maxima_fp64(const MaxSimPass pass, double* best, int32_t* arg,
                                                                 int64_t pitch, int64_t first_item, int64_t items) {
  const int64_t index = warp_index(), row = index % pass.rows.total, item = index / pass.rows.total;
  if (item >= items) return;
  const int64_t offset = vector_offset(pass.rows, row);
  if (offset < 0) return;  // padding is not summed
  const ExactMax found =
      exact_row_max(pass.rows, offset, pass.items, item_span(pass.items, first_item + item), pass.row_norms != nullptr);
  if (threadIdx.x % kWarp != 0) return;
  best[item * pitch + row] = found.value;
  if (arg != nullptr) arg[item * pitch + row] = found.arg;
}

// One warp per pair. Where a sum of the tensor cores is not finite (an infinity split in two, or an overflow that the
// norms would undo) the row is done again in fp64; the first true NaN decides the pair.
template <class V>
__global__ void __launch_bounds__(kWarps* kWarp) row_sums(const MaxSimPass pass, const V* best, int64_t pitch,
                                                          int64_t first_item, int64_t items, V* scores, bool add) {
  const int64_t index = warp_index(), n = index % pass.rows.items, m = index / pass.rows.items;
  if (m >= items) return;
  const int lane = threadIdx.x % kWarp;
  const ItemSpan rows = item_span(pass.rows, n), item = item_span(pass.items, first_item + m);
  V sum = 0;
  if (item.length > 0) {
    for (int64_t i = 0; i < rows.length; i += kWarp) {
      const bool mine = i + lane < rows.length;
      V value = mine ? best[m * pitch + rows.position + i + lane] : V{0};
      if constexpr (std::is_same_v<V, float>) {
        if (pass.row_norms != nullptr && mine)
          value *= static_cast<const float*>(pass.row_norms)[rows.position + i + lane];
        for (unsigned odd = __ballot_sync(kAllLanes, !std::isfinite(value)); odd != 0; odd &= odd - 1) {
          const int which = __ffs(static_cast<int>(odd)) - 1;
          const ExactMax found = exact_row_max(pass.rows, rows.first + (i + which) * pass.rows.row_stride, pass.items,
                                               item, pass.row_norms != nullptr);
          if (lane == which) value = static_cast<float>(found.value);
          if (std::isnan(found.value)) {
            i = rows.length;
            break;
          }
        }
      }
      if (mine) sum += value;
    }
  }
  sum = warp_sum(sum);
  if (pass.mean && rows.length > 0) sum /= static_cast<V>(rows.length);
  if (item.length == 0) sum = 0;
  V& score = scores[n * pass.row_stride + (first_item + m) * pass.item_stride];
  if (lane == 0) score = add ? score + sum : sum;
}

Grid warps(int64_t count, void* stream) {
  return {dim3(blocks_for(count, kWarps)), dim3(kWarps * kWarp), 1, 0, stream};
}

void norms_of(const VectorSets& sets, void* out, void* stream) {
  if (sets.total == 0) return;
  if (sets.dtype == DType::kFloat64)
    launch(vector_norms<double>, warps(sets.total, stream), "maxsim: norms", sets, static_cast<double*>(out));
  else launch(vector_norms<float>, warps(sets.total, stream), "maxsim: norms", sets, static_cast<float*>(out));
}

}  // namespace

Norms take_norms(Workspace& workspace, const MaxSimArgs& args) {
  if (args.metric == Metric::kDot) return {};
  const int64_t bytes = args.queries.dtype == DType::kFloat64 ? 8 : 4;
  Norms norms;
  norms.queries = workspace.take<char>(args.queries.total * bytes);
  norms.gallery = workspace.take<char>(args.gallery.total * bytes);
  return norms;
}

void compute_norms(const MaxSimArgs& args, const Norms& norms, void* stream) {
  if (args.metric == Metric::kDot) return;
  norms_of(args.queries, norms.queries, stream);
  norms_of(args.gallery, norms.gallery, stream);
}

std::vector<MaxSimPass> maxsim_passes(const MaxSimArgs& args, const Norms& norms) {
  const bool mean = args.reduce == Reduce::kMean;
  const int64_t row = args.gallery.items;
  const MaxSimPass t2i{args.queries, args.gallery, norms.queries, norms.gallery, row, 1, mean};
  const MaxSimPass i2t{args.gallery, args.queries, norms.gallery, norms.queries, 1, row, mean};
  if (args.direction == Direction::kT2I) return {t2i};
  if (args.direction == Direction::kI2T) return {i2t};
  return {t2i, i2t};
}

RowMaxima take_row_maxima(Workspace& workspace, const MaxSimPass& pass, bool with_arg) {
  const int64_t bytes = item_size(pass.rows.dtype) == 8 ? 8 : 4;
  RowMaxima maxima;
  maxima.pitch = std::max<int64_t>(1, pass.rows.total);
  maxima.part = std::clamp<int64_t>(kPartBytes / (maxima.pitch * (bytes + (with_arg ? 4 : 0))), 1,
                                    std::max<int64_t>(1, pass.items.items));
  maxima.best = workspace.take<char>(maxima.part * maxima.pitch * bytes);
  if (with_arg) maxima.arg = workspace.take<int32_t>(maxima.part * maxima.pitch);
  return maxima;
}

void compute_row_maxima(const MaxSimPass& pass, const RowMaxima& maxima, int64_t first_item, int64_t items,
                        void* stream) {
  if (pass.rows.total == 0 || items == 0) return;
  if (pass.rows.dtype == DType::kFloat64) {
    launch(row_maxima_fp64, warps(pass.rows.total * items, stream), "maxsim: fp64", pass,
           static_cast<double*>(maxima.best), maxima.arg, maxima.pitch, first_item, items);
    return;
  }
  MaxSimTile tile{pass.rows,
                  pass.items,
                  aligned(pass.rows),
                  aligned(pass.items),
                  first_item,
                  items,
                  1,
                  static_cast<const float*>(pass.item_norms),
                  {static_cast<float*>(maxima.best), maxima.arg, maxima.pitch, pass.rows.total}};
  // About a thousand vectors to a block: long enough to hide its start, short enough that ragged lengths even out.
  const int64_t mean_length = std::max<int64_t>(kGroup, pass.items.total / pass.items.items);
  tile.items_per_block = static_cast<int>(std::clamp<int64_t>(1024 / mean_length, 1, kRunItems));
  if (maxsim_tile_sm90_fits(tile)) maxsim_tile_sm90(tile, stream);
  else maxsim_tile_sm80(tile, stream);
}

void sum_row_maxima(const MaxSimPass& pass, const RowMaxima& maxima, int64_t first_item, int64_t items, void* scores,
                    bool add, void* stream) {
  if (pass.rows.items == 0 || items == 0) return;
  const Grid grid = warps(pass.rows.items * items, stream);
  if (pass.rows.dtype == DType::kFloat64)
    launch(row_sums<double>, grid, "maxsim: sums", pass, static_cast<const double*>(maxima.best), maxima.pitch,
           first_item, items, static_cast<double*>(scores), add);
  else
    launch(row_sums<float>, grid, "maxsim: sums", pass, static_cast<const float*>(maxima.best), maxima.pitch,
           first_item, items, static_cast<float*>(scores), add);
}

int64_t maxsim_workspace_bytes(const MaxSimArgs& args) {
  Workspace workspace(nullptr);
  const Norms norms = take_norms(workspace, args);
  int64_t bytes = 0;
  for (const MaxSimPass& pass : maxsim_passes(args, norms)) {
    Workspace mine = workspace;  // one pass after another in the same scratch
    take_row_maxima(mine, pass, false);
    bytes = std::max(bytes, mine.used());
  }
  return bytes;
}

void maxsim(const MaxSimArgs& args, const CudaContext& context) {
  Workspace workspace(context.workspace);
  const Norms norms = take_norms(workspace, args);
  compute_norms(args, norms, context.stream);
  bool add = false;
  for (const MaxSimPass& pass : maxsim_passes(args, norms)) {
    Workspace mine = workspace;
    const RowMaxima maxima = take_row_maxima(mine, pass, false);
    for (int64_t first = 0; first < pass.items.items; first += maxima.part) {
      const int64_t items = std::min(maxima.part, pass.items.items - first);
      compute_row_maxima(pass, maxima, first, items, context.stream);
      sum_row_maxima(pass, maxima, first, items, args.scores, add, context.stream);
    }
    add = true;
  }
}

}  // namespace pycm::cuda
