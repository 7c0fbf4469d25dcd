// pool_states on the CPU: each row is pooled by one thread, in the order of its vectors, with the inner loops of temporal_pool.
//
//   bytes       x is read once (twice for the gradient), gpo copies a panel of a row to sort it
//   operations  S * F; gpo S * F * log^2(longest) compares
//   threads     divide the rows; sums over rows (the gradient of attention's weights) are added in the order of rows
#include "ops/pool_states.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/temporal_pool_grad_states.h"
#include "cpu/temporal_pool_kernels.h"

namespace pycm::cpu {
namespace {

constexpr double kShareWork = 1 << 16;  // elements for which a thread is worth waking

int threads_of(const PoolStatesArgs& args) {
  return threads_for(static_cast<double>(args.cu_seqlens[args.batch]) * static_cast<double>(args.dim), kShareWork,
                     args.num_threads);
}

template <class T>
const T* weights_of(const PoolStatesArgs& args, int64_t b) {
  return static_cast<const T*>(args.pool.weights) + (args.pool.pool == Pool::kGpo ? args.cu_seqlens[b] : 0);
}

template <class T>
void pool_row(const PoolStatesArgs& args, int64_t b, T* out, Buffer<T>& scratch) {
  const RecurrentKernels<T>& kernels = recurrent_kernels<T>();
  const int64_t begin = args.cu_seqlens[b], length = args.cu_seqlens[b + 1] - begin, dim = args.dim;
  const T* x = static_cast<const T*>(args.x) + begin * dim;
  std::fill_n(out, width_of(args.pool.pool) * dim, T(0));
  if (length == 0) return;
  if (args.pool.pool == Pool::kAttention) {
    AttentionRow<T> row{out, -std::numeric_limits<T>::infinity(), 0};
    for (int64_t t = 0; t < length; ++t) kernels.attend(row, weights_of<T>(args, b), x + t * dim, dim);
    return kernels.scale(out, 1 / row.sum, dim);
  }
  if (args.pool.pool == Pool::kGpo) {
    scratch.reserve(length * kernels.columns);
    return kernels.sorted_sum(x, dim, length, dim, weights_of<T>(args, b), scratch.get(), out);
  }
  const auto add = kernels.pool[static_cast<int>(args.pool.pool)];
  for (int64_t t = 0; t < length; ++t) add(out, dim, x + t * dim, dim, t == 0);
  visit(args.pool.pool, [&](auto p) {
    using P = decltype(p);
    if constexpr (P::kStreams)
      for (int part = 0; part < P::kWidth; ++part)
        if (P::kMean[part]) kernels.scale(out + part * dim, T(1) / static_cast<T>(length), dim);
  });
}

template <class T>
void run(const PoolStatesArgs& args, T* out) {
  const int threads = threads_of(args);
  std::vector<Buffer<T>> scratch(static_cast<size_t>(threads));
  parallel_for(args.batch, threads, [&](int64_t b, int slot) {
    pool_row(args, b, out + b * width_of(args.pool.pool) * args.dim, scratch[static_cast<size_t>(slot)]);
  });
}

template <class T>
void run_backward(const PoolStatesArgs& args, const T* grad_out, T* grad_x, T* grad_weights) {
  const int threads = threads_of(args);
  const int64_t dim = args.dim, width = width_of(args.pool.pool) * dim;
  const bool shared = grad_weights != nullptr && args.pool.pool == Pool::kAttention;
  Buffer<T> shares(shared ? args.batch * dim : 0);
  Buffer<T> unwanted(grad_x == nullptr ? args.cu_seqlens[args.batch] * dim : 0);
  parallel_for(args.batch, threads, [&](int64_t b, int) {
    const int64_t begin = args.cu_seqlens[b], length = args.cu_seqlens[b + 1] - begin;
    PooledRow<T> row{};
    row.states = static_cast<const T*>(args.x) + begin * dim;
    row.length = length;
    row.dim = dim;
    row.last = length - 1;
    row.grad_out = grad_out + b * width;
    row.grad_states = (grad_x == nullptr ? unwanted.get() : grad_x) + begin * dim;
    row.grad_stride = dim;
    row.weights = weights_of<T>(args, b);
    if (grad_weights != nullptr) row.grad_weights = shared ? shares.get() + b * dim : grad_weights + begin;
    if (shared) std::fill_n(row.grad_weights, dim, T(0));
    std::fill_n(row.grad_states, length * dim, T(0));
    if (length > 0) pool_back(args.pool.pool, row, recurrent_kernels<T>());
  });
  if (!shared) return;
  std::fill_n(grad_weights, dim, T(0));
  for (int64_t b = 0; b < args.batch; ++b)
    for (int64_t d = 0; d < dim; ++d) grad_weights[d] += shares[b * dim + d];
}

}  // namespace

void pool_states(const PoolStatesArgs& args, void* out) {
  const DefaultFloatMode float_mode;
  if (args.dtype == DType::kFloat64) run(args, static_cast<double*>(out));
  else run(args, static_cast<float*>(out));
}

void pool_states_backward(const PoolStatesArgs& args, const void* grad_out, void* grad_x, void* grad_pool_weights) {
  const DefaultFloatMode float_mode;
  if (args.dtype == DType::kFloat64)
    run_backward(args, static_cast<const double*>(grad_out), static_cast<double*>(grad_x),
                 static_cast<double*>(grad_pool_weights));
  else
    run_backward(args, static_cast<const float*>(grad_out), static_cast<float*>(grad_x),
                 static_cast<float*>(grad_pool_weights));
}

}  // namespace pycm::cpu
