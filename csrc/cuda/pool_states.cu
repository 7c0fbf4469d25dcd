// The pools of a row's vectors, and their gradients.
//
//               features ->  128 a block, one a thread           attention's scores: a warp a vector
//   row b   [ x(0)  ............ ]                                s(t) = w . x(t), over all features
//           [ x(1)  ............ ]  each thread follows its
//           [ ...                ]  feature through the row
//
//   bytes       x is read once; once more for attention's scores, and L times from the caches for gpo
//   operations  S F; gpo S L F: the rank of a value is the number of greater ones, which needs no memory and no sort. It is
//               meant for L up to a few hundred, and right for any
//   order       every sum goes through a row in time, or through the rows in turn: no atomics
#include "ops/pool_states.h"

#include <limits>

#include "cuda/temporal_plan.cuh"

namespace pycm::cuda {
namespace {

constexpr int kThreads = 128;
template <class V>
constexpr V kInfinity = std::numeric_limits<V>::infinity();

struct Problem {
  const int64_t* cu_seqlens;
  int64_t batch, dim, rows;
  Pool pool;
  bool reverse;
  const void *x, *weights, *grad_out;
  void *out, *grad_x, *grad_weights;
  // Scratch. Of attention: scores, and products of x and grad_out [rows], shares of grad_weights [batch, dim]. Of gpo's
  // grad_weights: sorted x [rows, dim].
  void *scores, *products, *shares, *sorted;
};

template <class V>
struct Row {
  int64_t begin, length;
  const V* x;  // of this thread's feature

  __device__ Row(const Problem& p, int64_t b, int64_t d)
      : begin(p.cu_seqlens[b]),
        length(p.cu_seqlens[b + 1] - begin),
        x(static_cast<const V*>(p.x) + begin * p.dim + d),
        dim_(p.dim) {}
  __device__ V operator[](int64_t t) const { return x[t * dim_]; }

  // How many of the row's values stand before that of t: greater ones, and equal ones that are earlier; NaN is greatest.
  __device__ int64_t rank(int64_t t) const {
    const V value = (*this)[t];
    int64_t before = 0;
    for (int64_t s = 0; s < length; ++s) {
      const V other = (*this)[s];
      const bool same = other == value || (other != other && value != value);
      before += same ? s < t : other > value || (other != other && value == value);
    }
    return before;
  }
  // The first time of the greatest value.
  __device__ int64_t greatest() const {
    int64_t best = 0;
    V most = length > 0 ? (*this)[0] : V(0);
    for (int64_t t = 1; t < length && most == most; ++t) {
      const V value = (*this)[t];
      if (value > most || value != value) best = t, most = value;
    }
    return best;
  }

 private:
  int64_t dim_;
};

template <class V>
__device__ V exponential(V x) {
  if constexpr (sizeof(V) == 8) return ::exp(x);
  else return ::expf(x);
}

// result[t] = x[t] . with, or . with[the row of t]
template <class V>
__global__ void dot_kernel(const Problem p, const void* x, const void* with, bool by_row, void* result) {
  const int lane = threadIdx.x % kWarp;
  const int64_t t = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (t >= p.cu_seqlens[p.batch]) return;
  int64_t row = 0;
  if (by_row)  // the last one that begins at or before t
    for (int64_t end = p.batch; end - row > 1;) {
      const int64_t middle = (row + end) / 2;
      (p.cu_seqlens[middle] <= t ? row : end) = middle;
    }
  V sum = 0;
  for (int64_t d = lane; d < p.dim; d += kWarp)
    sum += static_cast<const V*>(x)[t * p.dim + d] * static_cast<const V*>(with)[row * p.dim + d];
  for (int bits = kWarp / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
  if (lane == 0) static_cast<V*>(result)[t] = sum;
}

// The sum or the greatest of f(t) over a row, by all threads of the block, the same in each.
template <class V, class F, class Join>
__device__ V over_row(int64_t length, V none, F f, Join join) {
  PYCM_SHARED(part, V[kThreads]);
  V value = none;
  for (int64_t t = threadIdx.x; t < length; t += kThreads) value = join(value, f(t));
  __syncthreads();  // the one before has been read
  part[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) part[threadIdx.x] = join(part[threadIdx.x], part[threadIdx.x + half]);
    __syncthreads();
  }
  return part[0];
}

template <class V>
struct Softmax {
  const V* scores;
  V greatest, sum;

  __device__ Softmax(const Problem& p, int64_t begin, int64_t length)
      : scores(static_cast<const V*>(p.scores) + begin) {
    greatest = over_row(
        length, -kInfinity<V>, [&](int64_t t) { return scores[t]; }, [](V a, V b) { return a > b || a != a ? a : b; });
    sum = over_row(
        length, V(0), [&](int64_t t) { return exponential(scores[t] - greatest); }, [](V a, V b) { return a + b; });
  }
  __device__ V operator()(int64_t t) const { return exponential(scores[t] - greatest) / sum; }
};

template <class V>
__global__ void pool_kernel(const Problem p) {
  using F = Scalar<V>;
  const int64_t b = blockIdx.x, d = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const bool mine = d < p.dim;
  const Row<V> row(p, b, mine ? d : 0);
  V* out = static_cast<V*>(p.out) + b * (p.pool == Pool::kMeanMax ? 2 : 1) * p.dim + d;
  if (p.pool == Pool::kAttention) {
    const Softmax<V> share(p, row.begin, row.length);
    V sum = 0;
    for (int64_t t = 0; mine && t < row.length; ++t) sum += exponential(share.scores[t] - share.greatest) * row[t];
    if (mine) *out = row.length > 0 ? sum / share.sum : V(0);
    return;
  }
  if (!mine) return;
  if (p.pool == Pool::kGpo) {
    const V* weights = static_cast<const V*>(p.weights) + row.begin;
    V sum = 0;
    for (int64_t t = 0; t < row.length; ++t) sum += weights[row.rank(t)] * row[t];
    *out = sum;
    return;
  }
  F sum = F::zero(), most = F::zero();
  for (int64_t t = 0; t < row.length; ++t) {
    const F value{row[t]};
    sum = sum + value;
    most = t == 0 ? value : greatest(value, most);
  }
  const V mean = row.length > 0 ? sum.v * (V(1) / static_cast<V>(row.length)) : V(0);
  *out = p.pool == Pool::kMax ? most.v : mean;
  if (p.pool == Pool::kMeanMax) out[p.dim] = most.v;
}

// Adds to grad_x what the pool hands on.
template <class V>
__global__ void pool_backward_kernel(const Problem p) {
  const int64_t b = blockIdx.x, d = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const bool mine = d < p.dim;
  const Row<V> row(p, b, mine ? d : 0);
  const bool two = p.pool == Pool::kMeanMax || p.pool == Pool::kLastMean;
  const V* grads = static_cast<const V*>(p.grad_out) + b * (two ? 2 : 1) * p.dim;
  const V grad = mine ? grads[d] : V(0), second = mine && two ? grads[p.dim + d] : V(0);
  V* grad_x = static_cast<V*>(p.grad_x) + row.begin * p.dim + d;
  const auto add_mean = [&](V from) {
    for (int64_t t = 0; t < row.length; ++t) grad_x[t * p.dim] += from * (V(1) / static_cast<V>(row.length));
  };
  const auto add_at = [&](int64_t t, V from) { grad_x[t * p.dim] += from; };
  if (p.pool == Pool::kAttention) {
    const Softmax<V> share(p, row.begin, row.length);
    const V* products = static_cast<const V*>(p.products) + row.begin;
    const V mean =
        over_row(row.length, V(0), [&](int64_t t) { return share(t) * products[t]; }, [](V a, V b) { return a + b; });
    if (!mine) return;
    V sum = 0;
    for (int64_t t = 0; t < row.length; ++t) {
      const V a = share(t), score = a * (products[t] - mean);
      sum += score * row[t];
      if (p.grad_x != nullptr) grad_x[t * p.dim] += a * grad + score * static_cast<const V*>(p.weights)[d];
    }
    if (p.shares != nullptr) static_cast<V*>(p.shares)[b * p.dim + d] = sum;
    return;
  }
  if (!mine || row.length == 0) return;
  const int64_t last = p.reverse ? 0 : row.length - 1, first = row.length - 1 - last;
  switch (p.pool) {
    case Pool::kLast: return add_at(last, grad);
    case Pool::kFirst: return add_at(first, grad);
    case Pool::kMean: return add_mean(grad);
    case Pool::kMax: return add_at(row.greatest(), grad);
    case Pool::kMeanMax: return add_mean(grad), add_at(row.greatest(), second);
    case Pool::kLastMean: return add_at(last, grad), add_mean(second);
    case Pool::kGpo:
      for (int64_t t = 0; t < row.length; ++t) {
        const int64_t rank = row.rank(t);
        if (p.grad_x != nullptr) grad_x[t * p.dim] += static_cast<const V*>(p.weights)[row.begin + rank] * grad;
        if (p.sorted != nullptr) static_cast<V*>(p.sorted)[(row.begin + rank) * p.dim + d] = row[t];
      }
      return;
    default: return;
  }
}

// The shares of all rows, in turn.
template <class V>
__global__ void sum_rows_kernel(const Problem p) {
  const int64_t d = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (d >= p.dim) return;
  V sum = 0;
  for (int64_t b = 0; b < p.batch; ++b) sum += static_cast<const V*>(p.shares)[b * p.dim + d];
  static_cast<V*>(p.grad_weights)[d] = sum;
}

Problem problem_of(const PoolStatesDeviceArgs& args, bool backward, Workspace& workspace) {
  const PoolStatesArgs& pool = args.pool;
  Problem p{};
  p.cu_seqlens = pool.cu_seqlens;
  p.batch = pool.batch;
  p.dim = pool.dim;
  p.rows = args.rows;
  p.pool = pool.pool.pool;
  p.reverse = args.reverse;
  p.x = pool.x;
  p.weights = pool.pool.weights;
  p.out = args.out;
  p.grad_out = args.grad_out;
  p.grad_x = args.grad_x;
  p.grad_weights = args.grad_pool_weights;
  const auto take = [&](bool wanted, int64_t count) -> void* {
    return wanted ? workspace.take<char>(count * item_size(pool.dtype)) : nullptr;
  };
  const bool attention = p.pool == Pool::kAttention, wanted = backward && p.grad_weights != nullptr;
  p.scores = take(attention, p.rows);
  p.products = take(attention && backward, p.rows);
  p.shares = take(attention && wanted, p.batch * p.dim);
  p.sorted = take(p.pool == Pool::kGpo && wanted, p.rows * p.dim);
  return p;
}

Grid grid_of(int64_t x, int64_t y, void* stream) {
  Grid grid;
  grid.grid = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
  grid.block = dim3(kThreads);
  grid.stream = stream;
  return grid;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class V>
void run(const Problem& p, bool backward, void* stream) {
  const Grid dots = grid_of(ceil_div(p.rows, kThreads / kWarp), 1, stream);
  const Grid rows = grid_of(p.batch, ceil_div(p.dim, kThreads), stream);
  if (p.pool == Pool::kAttention && p.rows > 0) {
    launch(&dot_kernel<V>, dots, "pool_states: scores", p, p.x, p.weights, false, p.scores);
    if (backward) launch(&dot_kernel<V>, dots, "pool_states: products", p, p.x, p.grad_out, true, p.products);
  }
  if (!backward) return launch(&pool_kernel<V>, rows, "pool_states", p);
  launch(&pool_backward_kernel<V>, rows, "pool_states: gradient", p);
  if (p.shares != nullptr)
    launch(&sum_rows_kernel<V>, grid_of(ceil_div(p.dim, kThreads), 1, stream), "pool_states: gradient of the weights",
           p);
  if (p.sorted != nullptr && p.rows > 0)
    launch(&dot_kernel<V>, dots, "pool_states: gradient of the weights", p, static_cast<const void*>(p.sorted),
           p.grad_out, true, p.grad_weights);
}

int64_t run(const PoolStatesDeviceArgs& args, bool backward, const CudaContext* context) {
  Workspace workspace(context == nullptr ? nullptr : context->workspace);
  const Problem p = problem_of(args, backward, workspace);
  if (context == nullptr || p.batch == 0 || p.dim == 0) return workspace.used();
  if (args.pool.dtype == DType::kFloat64) run<double>(p, backward, context->stream);
  else run<float>(p, backward, context->stream);
  return 0;
}

}  // namespace

int64_t pool_states_workspace_bytes(const PoolStatesDeviceArgs& args) { return run(args, false, nullptr); }
void pool_states(const PoolStatesDeviceArgs& args, const CudaContext& context) { run(args, false, &context); }
int64_t pool_states_backward_workspace_bytes(const PoolStatesDeviceArgs& args) { return run(args, true, nullptr); }
void pool_states_backward(const PoolStatesDeviceArgs& args, const CudaContext& context) { run(args, true, &context); }

}  // namespace pycm::cuda
