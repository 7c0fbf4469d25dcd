// maxsim, gradients: every maximum passes its share w of the pair's gradient to the two vectors it comes from.
//
//   1. row maxima  and the vectors they came from (arg), for a part of the items at a time
//   2. shares      w[item][query]: grad, divided by the length for a mean; 0 for a pair that is empty
//   3. rows        grad q_r += sum over items of w g_arg: one warp per (query vector, 256 dims), items in order
//   4. items       grad g_j += sum over rows with arg = j of w q_r: one warp per (gallery vector, 256 dims) looks through
//                  its item's args 32 at a time and takes the rows that chose it, in order
//
// No atomics: every element has one writer and a fixed order of additions. With norms,
// d cos(q, g) / dq = (g/|g| - cos q/|q|) / |q|: the sum of w cos is carried along, and the part along the vector itself is
// taken off at the end; a zero vector gets 0.
// Operations: the forward's, 4 R M D for the sums and R M G / 32 compares of args for R query and G gallery vectors.
// Bytes: R M D elements gathered on either side, mostly from L2. Limits: those of maxsim.
#include <algorithm>
#include <cmath>

#include "cuda/maxsim_exact.cuh"
#include "cuda/maxsim_pass.h"

namespace pycm::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kDims = 8;  // of one lane
constexpr int kTileDims = kDims * kWarp;

// A part of the items with its maxima. `row_item`: the item of each row vector, -1 for padding.
template <class V>
struct Part {
  MaxSimPass pass;
  V* best;
  int32_t* arg;
  int64_t pitch, first_item, items;
  const int32_t* row_item;
  V* share;  // [items, rows.items]

  __device__ V share_of(int64_t item, int64_t row) const { return share[item * pass.rows.items + row]; }
};

__device__ __forceinline__ int64_t warp_index() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}

__global__ void __launch_bounds__(kWarps* kWarp) find_row_items(const VectorSets rows, int32_t* row_item) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < rows.total) row_item[row] = static_cast<int32_t>(item_of(rows, row));
}

// 1 / |x| whichever way norms are kept; 1 without norms.
template <class V>
__device__ __forceinline__ V inverse_norm(const void* norms, int64_t position) {
  if (norms == nullptr) return 1;
  const V value = static_cast<const V*>(norms)[position];
  if constexpr (std::is_same_v<V, float>) return value;
  else return value == 0 ? V{0} : 1 / value;
}

// The similarity: `best` of fp32 lacks the row's norm.
template <class V>
__device__ __forceinline__ V similarity_of(V best, V row_inverse) {
  return std::is_same_v<V, float> ? best * row_inverse : best;
}

// One warp per pair. A maximum that the tensor cores left infinite or NaN is found again in fp64, with the first vector
// it is at.
template <class V>
__global__ void __launch_bounds__(kWarps* kWarp, 2) find_shares(const Part<V> part, const V* grad) {
  const MaxSimPass& pass = part.pass;
  const int64_t index = warp_index(), n = index % pass.rows.items, m = index / pass.rows.items;
  if (m >= part.items) return;
  const int lane = threadIdx.x % kWarp;
  const ItemSpan rows = item_span(pass.rows, n), item = item_span(pass.items, part.first_item + m);
  V share = grad[n * pass.row_stride + (part.first_item + m) * pass.item_stride];
  if (pass.mean) share /= static_cast<V>(rows.length);
  if (rows.length == 0 || item.length == 0) share = 0;
  if (lane == 0) part.share[m * pass.rows.items + n] = share;
  if (share == 0) return;
  for (int64_t i = 0; i < rows.length; i += kWarp) {
    const int64_t at = m * part.pitch + rows.position + i;
    const bool finite = i + lane >= rows.length || std::isfinite(part.best[at + lane]);
    for (unsigned odd = __ballot_sync(kAllLanes, !finite); odd != 0; odd &= odd - 1) {
      const int which = __ffs(static_cast<int>(odd)) - 1;
      const ExactMax found = exact_row_max(pass.rows, rows.first + (i + which) * pass.rows.row_stride, pass.items, item,
                                           pass.row_norms != nullptr);
      if (lane != which) continue;
      part.arg[at + lane] = found.arg;
      if constexpr (std::is_same_v<V, float>) {
        const float inverse = inverse_norm<float>(pass.row_norms, rows.position + i + lane);
        part.best[at + lane] = static_cast<float>(inverse == 0 ? found.value : found.value / inverse);
      }
    }
  }
}

// What one warp adds up for one vector x: the sum of w y / |y| over its partners y, and of w cos.
template <class V>
struct VectorGradient {
  V sum[kDims] = {};
  V along = 0;

  __device__ __forceinline__ void add(const VectorSets& partners, int64_t offset, int64_t first_dim, V weight) {
#pragma unroll
    for (int e = 0; e < kDims; ++e) {
      const int64_t d = first_dim + e * kWarp;
      if (d < partners.dim) sum[e] += weight * load_as<V>(partners, offset + d * partners.dim_stride);
    }
  }
  __device__ __forceinline__ void store(const VectorSets& own, int64_t offset, int64_t position, int64_t first_dim,
                                        V inverse, bool normalised, V* out) const {
#pragma unroll
    for (int e = 0; e < kDims; ++e) {
      const int64_t d = first_dim + e * kWarp;
      if (d >= own.dim) continue;
      V value = sum[e];
      if (normalised) value = inverse * (value - along * (inverse * load_as<V>(own, offset + d * own.dim_stride)));
      out[position * own.dim + d] += value;
    }
  }
};

template <class V>
__global__ void __launch_bounds__(kWarps* kWarp, 2) row_gradients(const Part<V> part, int64_t tiles, V* out) {
  const MaxSimPass& pass = part.pass;
  const int64_t index = warp_index(), row = index / tiles, first_dim = index % tiles * kTileDims + threadIdx.x % kWarp;
  if (row >= pass.rows.total || part.row_item[row] < 0) return;
  const bool normalised = pass.row_norms != nullptr;
  const V inverse = inverse_norm<V>(pass.row_norms, row);
  VectorGradient<V> gradient;
  for (int64_t m = 0; m < part.items; ++m) {
    const V share = part.share_of(m, part.row_item[row]);
    if (share == 0) continue;
    const ItemSpan item = item_span(pass.items, part.first_item + m);
    const int64_t j = part.arg[m * part.pitch + row];
    gradient.add(pass.items, item.first + j * pass.items.row_stride, first_dim,
                 share * inverse_norm<V>(pass.item_norms, item.position + j));
    if (normalised) gradient.along += share * similarity_of(part.best[m * part.pitch + row], inverse);
  }
  gradient.store(pass.rows, vector_offset(pass.rows, row), row, first_dim, inverse, normalised, out);
}

template <class V>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    item_gradients(const Part<V> part, int64_t first_position, int64_t positions, int64_t tiles, V* out) {
  const MaxSimPass& pass = part.pass;
  const int lane = threadIdx.x % kWarp;
  const int64_t index = warp_index(), position = first_position + index / tiles,
                first_dim = index % tiles * kTileDims + lane;
  if (index / tiles >= positions) return;
  const int64_t item = item_of(pass.items, position), m = item - part.first_item;
  if (item < 0 || m < 0 || m >= part.items) return;
  const int64_t own = position - item_span(pass.items, item).position;
  const bool normalised = pass.row_norms != nullptr;
  VectorGradient<V> gradient;
  for (int64_t base = 0; base < pass.rows.total; base += kWarp) {
    const bool mine = base + lane < pass.rows.total && part.row_item[base + lane] >= 0 &&
                      part.arg[m * part.pitch + base + lane] == own;
    for (unsigned hits = __ballot_sync(kAllLanes, mine); hits != 0; hits &= hits - 1) {
      const int64_t row = base + __ffs(static_cast<int>(hits)) - 1;
      const V share = part.share_of(m, part.row_item[row]);
      if (share == 0) continue;
      const V row_inverse = inverse_norm<V>(pass.row_norms, row);
      gradient.add(pass.rows, vector_offset(pass.rows, row), first_dim, share * row_inverse);
      if (normalised) gradient.along += share * similarity_of(part.best[m * part.pitch + row], row_inverse);
    }
  }
  gradient.store(pass.items, vector_offset(pass.items, position), position, first_dim,
                 inverse_norm<V>(pass.item_norms, position), normalised, out);
}

struct Scratch {
  RowMaxima maxima;
  int32_t* row_item;
  void* share;
};

Scratch take_scratch(Workspace& workspace, const MaxSimPass& pass) {
  Scratch scratch;
  scratch.maxima = take_row_maxima(workspace, pass, true);
  scratch.row_item = workspace.take<int32_t>(pass.rows.total);
  scratch.share =
      workspace.take<char>(scratch.maxima.part * pass.rows.items * (item_size(pass.rows.dtype) == 8 ? 8 : 4));
  return scratch;
}

template <class V>
void run_pass(const MaxSimPass& pass, const Scratch& scratch, const void* grad, void* grad_rows, void* grad_items,
              void* stream) {
  if (pass.rows.total == 0 || pass.items.total == 0) return;
  const auto warps = [&](int64_t count) {
    return Grid{dim3(blocks_for(count, kWarps)), dim3(kWarps * kWarp), 1, 0, stream};
  };
  const int64_t tiles = (pass.rows.dim + kTileDims - 1) / kTileDims;
  launch(find_row_items, Grid{dim3(blocks_for(pass.rows.total, kWarps * kWarp)), dim3(kWarps * kWarp), 1, 0, stream},
         "maxsim_backward: items", pass.rows, scratch.row_item);
  for (int64_t first = 0; first < pass.items.items; first += scratch.maxima.part) {
    const int64_t items = std::min(scratch.maxima.part, pass.items.items - first);
    const Part<V> part{pass,
                       static_cast<V*>(scratch.maxima.best),
                       scratch.maxima.arg,
                       scratch.maxima.pitch,
                       first,
                       items,
                       scratch.row_item,
                       static_cast<V*>(scratch.share)};
    compute_row_maxima(pass, scratch.maxima, first, items, stream);
    launch(find_shares<V>, warps(pass.rows.items * items), "maxsim_backward: shares", part,
           static_cast<const V*>(grad));
    if (grad_rows != nullptr)
      launch(row_gradients<V>, warps(pass.rows.total * tiles), "maxsim_backward: rows", part, tiles,
             static_cast<V*>(grad_rows));
    if (grad_items == nullptr) continue;
    // Where a part of a ragged set begins is known on the device alone: all positions are visited, those of the part
    // work.
    const int64_t begin = pass.items.ragged() ? 0 : first * pass.items.max_length;
    const int64_t positions = pass.items.ragged() ? pass.items.total : items * pass.items.max_length;
    launch(item_gradients<V>, warps(positions * tiles), "maxsim_backward: items", part, begin, positions, tiles,
           static_cast<V*>(grad_items));
  }
}

}  // namespace

int64_t maxsim_backward_workspace_bytes(const MaxSimBackwardArgs& args) {
  Workspace workspace(nullptr);
  const Norms norms = take_norms(workspace, args.forward);
  int64_t bytes = 0;
  for (const MaxSimPass& pass : maxsim_passes(args.forward, norms)) {
    Workspace mine = workspace;
    take_scratch(mine, pass);
    bytes = std::max(bytes, mine.used());
  }
  return bytes;
}

void maxsim_backward(const MaxSimBackwardArgs& args, const CudaContext& context) {
  const MaxSimArgs& forward = args.forward;
  const int64_t bytes = item_size(forward.queries.dtype) == 8 ? 8 : 4;
  const auto clear = [&](void* gradient, const VectorSets& sets) {
    if (gradient != nullptr && sets.total > 0)
      memset_async(gradient, 0, sets.total * sets.dim * bytes, context.stream, "maxsim_backward: clear");
  };
  clear(args.grad_queries, forward.queries);
  clear(args.grad_gallery, forward.gallery);
  Workspace workspace(context.workspace);
  const Norms norms = take_norms(workspace, forward);
  compute_norms(forward, norms, context.stream);
  bool exchanged = forward.direction == Direction::kI2T;
  for (const MaxSimPass& pass : maxsim_passes(forward, norms)) {
    Workspace mine = workspace;
    const Scratch scratch = take_scratch(mine, pass);
    void* const grad_rows = exchanged ? args.grad_gallery : args.grad_queries;
    void* const grad_items = exchanged ? args.grad_queries : args.grad_gallery;
    if (bytes == 8) run_pass<double>(pass, scratch, args.grad, grad_rows, grad_items, context.stream);
    else run_pass<float>(pass, scratch, args.grad, grad_rows, grad_items, context.stream);
    exchanged = true;
  }
}

}  // namespace pycm::cuda
