// A matrix in the order of mma's operand A, and the scan of an LSTM's memory: what is done once, before the recurrence.
//
//   order   one thread writes the 16 bytes that one lane loads for a tile of 16 rows and 32 bytes of K; zeros beyond both
//   scan    one thread follows one unit of one row: 4 H numbers read and H or 2 H written a step
#include "cuda/temporal_plan.cuh"

namespace pycm::cuda {
namespace {

__device__ double read(const void* data, int64_t at, DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return half_to_float(static_cast<const uint16_t*>(data)[at]);
    case DType::kBFloat16: return bfloat16_to_float(static_cast<const uint16_t*>(data)[at]);
    case DType::kFloat64: return static_cast<const double*>(data)[at];
    default: return static_cast<const float*>(data)[at];
  }
}

template <class M>
__global__ void order_kernel(const MatrixOrder order) {
  using E = typename M::E;
  constexpr int kElements = 16 / static_cast<int>(sizeof(E));
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= order.fragments(M::kDepth)) return;
  const int64_t steps = order.steps(M::kDepth), padded = (order.depth + 15) / 16 * 16;
  const int lane = static_cast<int>(at % kWarp), g = lane / 4, q = lane % 4;
  const int64_t k0 = at / kWarp % steps * M::kDepth, gate = at / kWarp / steps % order.gates;
  const int64_t row0 = at / kWarp / steps / order.gates * kUnitTile;
  E values[kElements];
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    // Register i * 4 / kElements: rows g, g + 8, g, g + 8, the first and the second half of K; fp64 has two.
    const int reg = sizeof(E) == 2 ? i / 2 : i;
    const int64_t row = row0 + g + reg % 2 * 8;
    const int64_t k = k0 + (sizeof(E) == 2 ? 2 * q + i % 2 : q) + (sizeof(E) == 8 ? 0 : reg / 2 * (M::kDepth / 2));
    const int64_t block = k / padded, inside = k % padded;
    const bool valid = row < order.rows && inside < order.depth;
    const int64_t from =
        row * order.row_stride + gate * order.gate_stride + block * order.block_stride + inside * order.depth_stride;
    values[i] = M::element(valid ? static_cast<typename M::V>(read(order.from, from, order.dtype)) : 0);
  }
  E* to = static_cast<E*>(order.to) + at * kElements;
#pragma unroll
  for (int i = 0; i < kElements; ++i) to[i] = values[i];
}

struct Scan {
  const int64_t *cu_seqlens, *order, *step_starts, *bounds;
  int64_t hidden;
  const void *inputs, *c0;
  void *c, *m, *cn;
};

template <class V>
__global__ void scan_kernel(const Scan p) {
  const int64_t unit = int64_t{blockIdx.y} * blockDim.x + threadIdx.x, row = p.order[blockIdx.x];
  if (unit >= p.hidden) return;
  const int64_t begin = p.bounds[0], end = min(p.bounds[1], p.cu_seqlens[row + 1] - p.cu_seqlens[row]);
  Scalar<V> c{p.c0 == nullptr ? V(0) : static_cast<const V*>(p.c0)[row * p.hidden + unit]};
  for (int64_t t = begin; t < end; ++t) {
    const int64_t at = p.step_starts[t] - p.step_starts[begin] + blockIdx.x;
    const V* parts = static_cast<const V*>(p.inputs) + at * 4 * p.hidden + unit;
    Scalar<V> part[4] = {{parts[0]}, {parts[p.hidden]}, {parts[2 * p.hidden]}, {parts[3 * p.hidden]}};
    const Scalar<V> m = Lstm::step(part, Scalar<V>::zero(), c);
    static_cast<V*>(p.c)[at * p.hidden + unit] = c.v;
    if (p.m != nullptr) static_cast<V*>(p.m)[at * p.hidden + unit] = m.v;
  }
  if (p.cn != nullptr) static_cast<V*>(p.cn)[row * p.hidden + unit] = c.v;
}

}  // namespace

void order_matrix(const MatrixOrder& order, DType element, void* stream) {
  constexpr int kThreads = 256;
  visit_product(element, [&](auto product) {
    using M = decltype(product);
    Grid grid;
    grid.grid = dim3(static_cast<unsigned>((order.fragments(M::kDepth) + kThreads - 1) / kThreads));
    grid.block = dim3(kThreads);
    grid.stream = stream;
    launch(&order_kernel<M>, grid, "temporal_pool: order of the weights", order);
  });
}

int64_t recurrence_scan_workspace_bytes(const RecurrenceScanArgs&) { return 0; }

void recurrence_scan(const RecurrenceScanArgs& args, const CudaContext& context) {
  constexpr int kThreads = 128;
  const RecurrenceShape& shape = args.shape;
  if (shape.batch == 0) return;
  const Scan scan{shape.cu_seqlens, shape.order, shape.step_starts, shape.bounds,
                  shape.hidden,     args.inputs, shape.c0,          args.c,
                  args.m,           args.cn};
  Grid grid;
  grid.grid = dim3(static_cast<unsigned>(shape.batch), static_cast<unsigned>((shape.hidden + kThreads - 1) / kThreads));
  grid.block = dim3(kThreads);
  grid.stream = context.stream;
  if (shape.dtype == DType::kFloat64) launch(&scan_kernel<double>, grid, "temporal_pool: memory", scan);
  else launch(&scan_kernel<float>, grid, "temporal_pool: memory", scan);
}

}  // namespace pycm::cuda
