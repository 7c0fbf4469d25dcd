// The pools of a row's vectors, and their gradients.
//
//               features ->  128 a block, one a thread           attention's scores: a warp a vector
//   row b   [ x(0)  ............ ]                                s(t) = w . x(t), over all features
//           [ x(1)  ............ ]  each thread follows its
//           [ ...                ]  feature through the row
//
//   bytes       x is read once; once more for attention's scores, and L / 8 times from the caches for gpo
//   operations  S F; gpo 2 S L F: the rank of a value is the number of greater ones, which needs no memory and no sort. Eight
//               ranks are counted by one reading of the row. It is meant for L up to a few hundred, and right for any
//   order       every sum goes through a row in time, or through the rows in turn: no atomics
#include "ops/pool_states.h"

#include <limits>

#include "cuda/temporal_plan.cuh"

namespace pycm::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRanks = 8;  // counted at a time
template <class V>
constexpr V kInfinity = std::numeric_limits<V>::infinity();

// V: the type of sums. X: how x is stored.
struct Single {
  using V = float;
  using X = float;
  __device__ static V value(X x) { return x; }
};
struct Double {
  using V = double;
  using X = double;
  __device__ static V value(X x) { return x; }
};
struct Half {
  using V = float;
  using X = uint16_t;
  __device__ static V value(X x) { return half_to_float(x); }
};
struct BFloat {
  using V = float;
  using X = uint16_t;
  __device__ static V value(X x) { return bfloat16_to_float(x); }
};

struct Problem {
  const int64_t* cu_seqlens;
  int64_t batch, dim, rows;
  Pool pool;
  const void *x, *weights, *grad_out;
  void *out, *grad_weights, *summary, *grad_x;
  const int64_t *vectors, *rows_of;
  // Scratch. Of attention: scores, and products of x and grad_out [rows], shares of grad_weights [batch, dim]. Of gpo's
  // grad_weights: sorted x [rows, dim].
  void *scores, *products, *shares, *sorted;
};

template <class N>
struct Row {
  using V = typename N::V;
  using X = typename N::X;
  int64_t begin, length;
  const X* x;  // of this thread's feature

  __device__ Row(const Problem& p, int64_t b, int64_t d)
      : begin(p.cu_seqlens[b]),
        length(p.cu_seqlens[b + 1] - begin),
        x(static_cast<const X*>(p.x) + begin * p.dim + d),
        dim_(p.dim) {}
  __device__ V operator[](int64_t t) const { return N::value(x[t * dim_]); }

  // Calls each(t, value, rank) for `Count` times from `begin` on, as far as the row goes. A rank is how many of the row's values
  // stand before that one: greater ones, and equal ones that are earlier; NaN is greatest.
  template <int Count, class F>
  __device__ void ranks(int64_t begin, F each) const {
    V value[Count];
    int before[Count] = {};
#pragma unroll
    for (int i = 0; i < Count; ++i) value[i] = begin + i < length ? (*this)[begin + i] : V(0);
    const int64_t end = begin + Count < length ? begin + Count : length;
    // Negated, since no comparison with a NaN is true.
    for (int64_t s = 0; s < begin; ++s) {
      const V other = (*this)[s];
#pragma unroll
      for (int i = 0; i < Count; ++i) before[i] += !(other < value[i]);
    }
    for (int64_t s = begin; s < end; ++s) {
      const V other = (*this)[s];
#pragma unroll
      for (int i = 0; i < Count; ++i) before[i] += s < begin + i ? !(other < value[i]) : !(other <= value[i]);
    }
    for (int64_t s = end; s < length; ++s) {
      const V other = (*this)[s];
#pragma unroll
      for (int i = 0; i < Count; ++i) before[i] += !(other <= value[i]);
    }
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      if (begin + i >= length) return;
      if (value[i] != value[i]) {  // stands behind the earlier ones alone
        before[i] = 0;
        for (int64_t s = 0; s < begin + i; ++s) before[i] += (*this)[s] != (*this)[s];
      }
      each(begin + i, value[i], before[i]);
    }
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
template <class N>
__global__ void dot_kernel(const Problem p, const void* x, const void* with, bool by_row, void* result) {
  using V = typename N::V;
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
    sum += N::value(static_cast<const typename N::X*>(x)[t * p.dim + d]) * static_cast<const V*>(with)[row * p.dim + d];
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

template <class N>
__global__ void pool_kernel(const Problem p) {
  using V = typename N::V;
  using F = Scalar<V>;
  const int64_t b = blockIdx.x, d = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const bool mine = d < p.dim;
  const Row<N> row(p, b, mine ? d : 0);
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
    for (int64_t begin = 0; begin < row.length; begin += kRanks)
      row.template ranks<kRanks>(begin, [&](int64_t, V value, int rank) { sum += weights[rank] * value; });
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

// What the gradients of all vectors have in common, and the rows' shares of the weights' gradient.
template <class N>
__global__ void summary_kernel(const Problem p) {
  using V = typename N::V;
  const int64_t b = blockIdx.x, d = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const bool mine = d < p.dim;
  const Row<N> row(p, b, mine ? d : 0);
  if (p.pool == Pool::kAttention) {
    const Softmax<V> share(p, row.begin, row.length);
    const V* products = static_cast<const V*>(p.products) + row.begin;
    const V mean =
        over_row(row.length, V(0), [&](int64_t t) { return share(t) * products[t]; }, [](V a, V b) { return a + b; });
    const auto of_score = [&](int64_t t) { return share(t) * (products[t] - mean); };
    V* of_grad = static_cast<V*>(p.summary) + row.begin;
    for (int64_t t = threadIdx.x; blockIdx.y == 0 && t < row.length; t += kThreads) {
      of_grad[t] = share(t);
      of_grad[p.rows + t] = of_score(t);
    }
    if (!mine || p.shares == nullptr) return;
    V sum = 0;
    for (int64_t t = 0; t < row.length; ++t) sum += of_score(t) * row[t];
    static_cast<V*>(p.shares)[b * p.dim + d] = sum;
    return;
  }
  if (!mine) return;
  if (p.sorted != nullptr) {
    auto* sorted = static_cast<typename N::X*>(p.sorted) + row.begin * p.dim + d;
    for (int64_t begin = 0; begin < row.length; begin += kRanks)
      row.template ranks<kRanks>(begin,
                                 [&](int64_t t, V, int rank) { sorted[int64_t{rank} * p.dim] = row.x[t * p.dim]; });
  } else {
    static_cast<int64_t*>(p.summary)[b * p.dim + d] = row.begin + row.greatest();
  }
}

// Adds to grad_x what the pool hands on: a block has 128 features of one vector.
template <class N>
__global__ void gradient_kernel(const Problem p) {
  using V = typename N::V;
  const int64_t d = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const int64_t b = p.rows_of[blockIdx.x], vector = p.vectors[blockIdx.x];
  if (d >= p.dim || b < 0 || b >= p.batch) return;
  const Row<N> row(p, b, d);
  const int64_t t = vector - row.begin;
  if (t < 0 || t >= row.length) return;
  const V* grads = static_cast<const V*>(p.grad_out) + b * (p.pool == Pool::kMeanMax ? 2 : 1) * p.dim + d;
  const V mean = V(1) / static_cast<V>(row.length);
  const auto is_greatest = [&] { return static_cast<const int64_t*>(p.summary)[b * p.dim + d] == vector; };
  V grad = 0;
  switch (p.pool) {
    case Pool::kMean: grad = grads[0] * mean; break;
    case Pool::kMax: grad = is_greatest() ? grads[0] : V(0); break;
    case Pool::kMeanMax: grad = grads[0] * mean + (is_greatest() ? grads[p.dim] : V(0)); break;
    case Pool::kAttention: {
      const V* of_grad = static_cast<const V*>(p.summary);
      grad = of_grad[vector] * grads[0] + of_grad[p.rows + vector] * static_cast<const V*>(p.weights)[d];
      break;
    }
    case Pool::kGpo:
      row.template ranks<1>(
          t, [&](int64_t, V, int rank) { grad = static_cast<const V*>(p.weights)[row.begin + rank] * grads[0]; });
      break;
    default: return;
  }
  static_cast<V*>(p.grad_x)[blockIdx.x * p.dim + d] += grad;
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

enum class Part { kForward, kSummary, kGradient };

Problem problem_of(const PoolStatesDeviceArgs& args, Part part, Workspace& workspace) {
  const PoolStatesArgs& pool = args.pool;
  Problem p{};
  p.cu_seqlens = pool.cu_seqlens;
  p.batch = pool.batch;
  p.dim = pool.dim;
  p.rows = args.rows;
  p.pool = pool.pool.pool;
  p.x = pool.x;
  p.weights = pool.pool.weights;
  p.out = args.out;
  p.grad_out = args.grad_out;
  p.grad_weights = args.grad_pool_weights;
  p.summary = args.summary;
  p.vectors = args.vectors;
  p.rows_of = args.rows_of;
  p.grad_x = args.grad_x;
  const auto take = [&](bool wanted, int64_t count, DType dtype) -> void* {
    return wanted ? workspace.take<char>(count * item_size(dtype)) : nullptr;
  };
  const bool attention = p.pool == Pool::kAttention && part != Part::kGradient;
  const bool wanted = part == Part::kSummary && p.grad_weights != nullptr;
  p.scores = take(attention, p.rows, pool.dtype);
  p.products = take(attention && part == Part::kSummary, p.rows, pool.dtype);
  p.shares = take(attention && wanted, p.batch * p.dim, pool.dtype);
  p.sorted = take(p.pool == Pool::kGpo && wanted, p.rows * p.dim, args.x_dtype);
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

template <class N>
void run(const Problem& p, Part part, int64_t count, void* stream) {
  using V = typename N::V;
  const int64_t parts = ceil_div(p.dim, kThreads);
  if (part == Part::kGradient) {
    if (count > 0) launch(&gradient_kernel<N>, grid_of(count, parts, stream), "pool_states: gradient", p);
    return;
  }
  const Grid dots = grid_of(ceil_div(p.rows, kThreads / kWarp), 1, stream), rows = grid_of(p.batch, parts, stream);
  if (p.scores != nullptr && p.rows > 0)
    launch(&dot_kernel<N>, dots, "pool_states: scores", p, p.x, p.weights, false, p.scores);
  if (p.products != nullptr && p.rows > 0)
    launch(&dot_kernel<N>, dots, "pool_states: products", p, p.x, p.grad_out, true, p.products);
  if (part == Part::kForward) return launch(&pool_kernel<N>, rows, "pool_states", p);
  if (p.summary == nullptr && p.sorted == nullptr) return;
  launch(&summary_kernel<N>, rows, "pool_states: summary", p);
  if (p.shares != nullptr)
    launch(&sum_rows_kernel<V>, grid_of(parts, 1, stream), "pool_states: gradient of the weights", p);
  if (p.sorted != nullptr && p.rows > 0)
    launch(&dot_kernel<N>, dots, "pool_states: gradient of the weights", p, static_cast<const void*>(p.sorted),
           p.grad_out, true, p.grad_weights);
}

int64_t run(const PoolStatesDeviceArgs& args, Part part, const CudaContext* context) {
  Workspace workspace(context == nullptr ? nullptr : context->workspace);
  const Problem p = problem_of(args, part, workspace);
  if (context == nullptr || p.batch == 0 || p.dim == 0) return workspace.used();
  switch (args.x_dtype) {
    case DType::kFloat64: run<Double>(p, part, args.count, context->stream); break;
    case DType::kFloat32: run<Single>(p, part, args.count, context->stream); break;
    case DType::kFloat16: run<Half>(p, part, args.count, context->stream); break;
    case DType::kBFloat16: run<BFloat>(p, part, args.count, context->stream); break;
  }
  return 0;
}

}  // namespace

int64_t pool_states_workspace_bytes(const PoolStatesDeviceArgs& args) { return run(args, Part::kForward, nullptr); }
void pool_states(const PoolStatesDeviceArgs& args, const CudaContext& context) { run(args, Part::kForward, &context); }
int64_t pool_states_summary_workspace_bytes(const PoolStatesDeviceArgs& args) {
  return run(args, Part::kSummary, nullptr);
}
void pool_states_summary(const PoolStatesDeviceArgs& args, const CudaContext& context) {
  run(args, Part::kSummary, &context);
}
int64_t pool_states_gradient_workspace_bytes(const PoolStatesDeviceArgs& args) {
  return run(args, Part::kGradient, nullptr);
}
void pool_states_gradient(const PoolStatesDeviceArgs& args, const CudaContext& context) {
  run(args, Part::kGradient, &context);
}

}  // namespace pycm::cuda
