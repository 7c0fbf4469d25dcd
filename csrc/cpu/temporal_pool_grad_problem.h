// What the gradient of temporal_pool is computed from: the parameters as panels, and of the rows in hand what the forward
// pass kept and what reaches the states from outside (step 1 of temporal_pool_grad.cpp).
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/temporal_pool_cell.h"
#include "cpu/temporal_pool_grad_states.h"

namespace pycm::cpu {

template <class T>
constexpr DType kWorkingType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// Panels [panel][word][columns] of a matrix [.., dim] whose row for k < depth is row(k), negative for zeros.
template <class T, class Row>
void pack_columns(const void* matrix, DType dtype, int64_t dim, int64_t depth, int64_t columns,
                  const Operand<T>& operand, Buffer<T>& out, int num_threads, Row row) {
  const int64_t panels = ceil_div(dim, columns), words = operand.words(depth), elements = operand.elements();
  reserve_large(out, panels * words * columns);
  parallel_for(panels, threads_for(static_cast<double>(dim * depth), 1 << 16, num_threads), [&](int64_t p, int) {
    const int64_t n = std::min(columns, dim - p * columns);
    Buffer<T> rows(elements * columns);
    const auto read = [&](int64_t k, T* to) {
      const int64_t from = k < depth ? row(k) : -1;
      std::fill(to + (from < 0 ? 0 : n), to + columns, T(0));
      if (from < 0) return;
      const char* source = static_cast<const char*>(matrix) + (from * dim + p * columns) * item_size(dtype);
      if (dtype == kWorkingType<T>) {
        std::memcpy(to, source, static_cast<size_t>(n) * sizeof(T));
      } else if constexpr (sizeof(T) == 4) {
        const auto* halves = reinterpret_cast<const uint16_t*>(source);
        if (dtype == DType::kFloat16) kernels().widen_f16(halves, n, to);
        else kernels().widen_bf16(halves, n, to);
      }
    };
    for (int64_t w = 0; w < words; ++w) {
      for (int64_t e = 0; e < elements; ++e) read(w * elements + e, rows.get() + e * columns);
      operand.join(rows.get(), rows.get() + columns, columns, out.get() + (p * words + w) * columns);
    }
  });
}

// What all rows share. Steps are numbered as in ragged values, from the first of the rows in hand.
template <class T, class C>
struct Problem {
  const TemporalPoolGradArgs& args;
  const CellWeights& shape;
  const RecurrentKernels<T>& kernels;
  const Operand<T> operand;
  const int64_t columns, units, inputs, states;  // the last three rounded up to whole panels
  Buffer<T> input_back, hidden_back, projection_back, zeros;
  Buffer<T> parts, m, dstates;          // parts: the gradients of the pre-activations, [S][kParts][units]; m: o tanh(c)
  std::vector<int64_t> row_of, before;  // of each step: its row, and the step before it or -1
  int64_t begin = 0, steps = 0;

  explicit Problem(const TemporalPoolGradArgs& a)
      : args(a),
        shape(a.weights),
        kernels(recurrent_kernels<T>()),
        operand(shape.dtype == DType::kBFloat16 ? bf16_kernels() : nullptr),
        columns(kernels.columns),
        units(ceil_div(shape.hidden_size, columns) * columns),
        inputs(ceil_div(shape.input_size, columns) * columns),
        states(ceil_div(shape.state_size, columns) * columns),
        zeros(std::max({units, states, inputs})) {
    std::fill_n(zeros.get(), std::max({units, states, inputs}), T(0));
    const int64_t depth = C::kGates * units, h = shape.hidden_size;
    const auto row = [=](int64_t k, int gate) { return k % units < h ? gate * h + k % units : -1; };
    pack_columns(shape.weight_ih, shape.dtype, shape.input_size, depth, columns, operand, input_back, a.num_threads,
                 [&](int64_t k) { return row(k, C::input_gate(static_cast<int>(k / units))); });
    pack_columns(shape.weight_hh, shape.dtype, shape.state_size, depth, columns, operand, hidden_back, a.num_threads,
                 [&](int64_t k) { return row(k, C::hidden_gate(static_cast<int>(k / units))); });
    if (projects())
      pack_columns(shape.weight_hr, shape.dtype, h, shape.state_size, columns, operand, projection_back, a.num_threads,
                   [](int64_t k) { return k; });
  }

  bool projects() const { return shape.weight_hr != nullptr; }
  int64_t stride() const { return C::kParts * units; }
  T* part(int64_t s) const { return parts.get() + s * stride(); }
  const T* hidden_part(int64_t s) const { return part(s) + C::kFirstHidden * units; }
  int64_t step(int64_t b, int64_t t) const {  // t in the order of processing
    const int64_t time = args.reverse ? args.x.length(b) - 1 - t : t;
    return args.x.cu_seqlens[b] - begin + time;
  }
  const void* x(int64_t s) const {
    const int64_t b = row_of[static_cast<size_t>(s)];
    return args.x.step(b, begin + s - args.x.cu_seqlens[b]);
  }
  const T* state(int64_t s) const { return static_cast<const T*>(args.states) + (begin + s) * shape.state_size; }
  const T* reserve(int64_t s) const {
    return static_cast<const T*>(args.reserve) + (begin + s) * C::kReserve * shape.hidden_size;
  }
  // Before the step; null for zeros.
  const T* c_before(int64_t s) const {
    const int64_t earlier = before[static_cast<size_t>(s)];
    if (earlier >= 0) return reserve(earlier) + C::kParts * shape.hidden_size;
    return args.c0 == nullptr ? nullptr : row<T>(args.c0, row_of[static_cast<size_t>(s)], shape.hidden_size);
  }
  const T* h_before(int64_t s) const {
    const int64_t earlier = before[static_cast<size_t>(s)];
    if (earlier >= 0) return state(earlier);
    return args.h0 == nullptr ? zeros.get() : row<T>(args.h0, row_of[static_cast<size_t>(s)], shape.state_size);
  }
  // Rows of `dim` elements, row(j) each, as the tiles of a product; scratch [row_scratch()].
  template <class Row>
  void pack(const Tiles& tiles, int64_t dim, T* scratch, T* to, Row row) const {
    for (int64_t i = 0; i < tiles.count; ++i)
      pack_tile(kernels, operand, tiles.height(i), dim, kWorkingType<T>, scratch,
                to + tiles.first(i) * operand.words(dim), [&](int r) { return row(tiles.first(i) + r); });
  }
  int64_t row_scratch() const {
    return kernels.full_height * Operand<T>::scratch_size(std::max(C::kGates * units, shape.state_size));
  }
  template <class Element>
  static Element* row(const void* data, int64_t b, int64_t dim) {
    return const_cast<Element*>(static_cast<const Element*>(data)) + b * dim;
  }

  // Rows [first, last) of the batch.
  void take(int64_t first, int64_t last) {
    begin = args.x.cu_seqlens[first];
    steps = args.x.cu_seqlens[last] - begin;
    row_of.assign(static_cast<size_t>(steps), 0);
    before.assign(static_cast<size_t>(steps), -1);
    for (int64_t b = first; b < last; ++b)
      for (int64_t t = 0; t < args.x.length(b); ++t) {
        row_of[static_cast<size_t>(step(b, t))] = b;
        if (t > 0) before[static_cast<size_t>(step(b, t))] = step(b, t - 1);
      }
    reserve_large(parts, steps * stride());
    reserve_large(m, projects() ? steps * units : 0);
    reserve_large(dstates, steps * states);
  }
};

// f(first, count, slot) for blocks of steps; a block's last tile may be short, that is all that depends on the threads.
template <class F>
void for_blocks(int64_t steps, int64_t height, int num_threads, F f) {
  constexpr int64_t kBlockRows = 192;
  const int64_t rows = std::min(kBlockRows, ceil_div(ceil_div(steps, num_threads), height) * height);
  parallel_for(ceil_div(steps, rows), num_threads,
               [&](int64_t i, int slot) { f(i * rows, std::min(rows, steps - i * rows), slot); });
}

// What reaches the states of row b from outside.
template <class T, class C>
void compute_dstates(Problem<T, C>& p, int64_t b, T* grad_weights) {
  const TemporalPoolGradArgs& args = p.args;
  const int64_t length = args.x.length(b), dim = p.shape.state_size, s = args.x.cu_seqlens[b] - p.begin;
  T* grad = p.dstates.get() + s * p.states;
  std::fill_n(grad, length * p.states, T(0));
  if (args.grad_states != nullptr)
    for (int64_t t = 0; t < length; ++t)
      std::copy_n(p.template row<const T>(args.grad_states, p.begin + s + t, dim), dim, grad + t * p.states);
  if (args.grad_out == nullptr || length == 0) return;
  PooledRow<T> row;
  row.states = p.state(s);
  row.length = length;
  row.dim = dim;
  row.first = args.reverse ? length - 1 : 0;
  row.last = args.reverse ? 0 : length - 1;
  row.grad_out = p.template row<const T>(args.grad_out, b, width_of(args.pool.pool) * dim);
  row.grad_states = grad;
  row.grad_stride = p.states;
  row.weights = static_cast<const T*>(args.pool.weights);
  row.grad_weights = grad_weights;
  if (args.pool.pool == Pool::kGpo) row.weights += p.begin + s;
  pool_back(args.pool.pool, row, p.kernels);
}

}  // namespace pycm::cpu
