// The gradient of temporal_pool on the CPU, from the states and the reserve of the forward pass.
//
//   1. dstates    what reaches the states from outside: grad_states, pooling                         [S][P]
//   2. parts      along each row from its last step, the gradients of the pre-activations            [S][kParts][units]
//                 one product with W_hh a step, rows and threads as in the forward pass
//   3. weights    sums over all steps, one product each (temporal_pool_grad_weights.h)
//   4. grad_x     parts x W_ih, over all steps
//
// Work: 8 S G H I flops for I = P, twice the forward pass's, which keeps S (P + kReserve H) elements for it. Scratch:
// S (kParts + 3) H elements of as many whole rows as kScratch allows at a time. Deterministic: the order of every sum is
// given by the shapes. Where the weights are bf16 and the level multiplies that, the operands of the products are rounded to
// it, as in the forward pass, and nothing else is. Other half precision is widened.
#include <algorithm>
#include <vector>

#include "cpu/temporal_pool_grad_problem.h"
#include "cpu/temporal_pool_grad_weights.h"
#include "cpu/temporal_pool_team.h"
#include "ops/temporal_pool.h"

namespace pycm::cpu {
namespace {

constexpr int64_t kScratch = 1 << 26;  // elements of parts at a time
constexpr int64_t kRowsPerThread = 8;
constexpr double kShareWork = 1 << 16;

// Step 2 for some rows, longest first, as Group in temporal_pool.cpp.
template <class T, class C>
class BackwardGroup {
 public:
  BackwardGroup(Problem<T, C>& problem, std::vector<int64_t> rows, int members)
      : p_(problem), rows_(std::move(rows)), team_(members), scratch_(static_cast<size_t>(members)) {
    const int64_t n = static_cast<int64_t>(rows_.size());
    dh_.reserve(n * p_.states);
    dc_.reserve(C::kHasMemory ? n * p_.units : 0);
    dm_.reserve(p_.projects() ? n * p_.units : 0);
    std::fill_n(dh_.get(), n * p_.states, T(0));
    if (C::kHasMemory) std::fill_n(dc_.get(), n * p_.units, T(0));
    for (int64_t j = 0; j < n; ++j) {
      start(p_.args.grad_hn, j, p_.shape.state_size, dh_.get() + j * p_.states);
      if (C::kHasMemory) start(p_.args.grad_cn, j, p_.shape.hidden_size, dc_.get() + j * p_.units);
    }
    for (Scratch& s : scratch_) {
      s.packed.reserve(n * p_.operand.words(C::kGates * p_.units));
      s.packed_states.reserve(p_.projects() ? n * p_.operand.words(p_.shape.state_size) : 0);
      s.row.reserve(p_.row_scratch());
    }
  }

  void run(int rank) {
    Member member(team_, rank);
    Scratch& scratch = scratch_[static_cast<size_t>(rank)];
    int64_t alive = 0;
    for (int64_t t = length(0) - 1; t >= 0; --t) {
      while (alive < static_cast<int64_t>(rows_.size()) && length(alive) > t) ++alive;
      step(member, scratch, t, Tiles(alive, p_.kernels.full_height));
    }
    if (rank != 0) return;
    for (int64_t j = 0; j < static_cast<int64_t>(rows_.size()); ++j) {
      finish(p_.args.grad_h0, j, p_.shape.state_size, dh_.get() + j * p_.states);
      if (C::kHasMemory) finish(p_.args.grad_c0, j, p_.shape.hidden_size, dc_.get() + j * p_.units);
    }
  }

 private:
  struct Scratch {
    Buffer<T> packed, packed_states, row;
    int64_t packed_step = -1, packed_states_step = -1;
  };

  int64_t length(int64_t j) const { return p_.args.x.length(rows_[static_cast<size_t>(j)]); }
  int64_t at(int64_t j, int64_t t) const { return p_.step(rows_[static_cast<size_t>(j)], t); }
  void start(const void* from, int64_t j, int64_t dim, T* to) const {
    if (from != nullptr) std::copy_n(p_.template row<const T>(from, rows_[static_cast<size_t>(j)], dim), dim, to);
  }
  void finish(void* to, int64_t j, int64_t dim, const T* from) const {
    if (to != nullptr) std::copy_n(from, dim, p_.template row<T>(to, rows_[static_cast<size_t>(j)], dim));
  }

  void step(Member& member, Scratch& scratch, int64_t t, const Tiles& tiles) {
    if (p_.projects())
      member.phase(p_.states / p_.columns, [&](int64_t panel) {
        for (int64_t j = 0; j < tiles.rows; ++j)
          p_.kernels.axpy(1, dh_.get() + j * p_.states + panel * p_.columns,
                          p_.dstates.get() + at(j, t) * p_.states + panel * p_.columns, p_.columns);
      });
    member.phase(p_.units / p_.columns, [&](int64_t g) {
      if (p_.projects()) project(scratch, t, tiles, g);
      for (int64_t j = 0; j < tiles.rows; ++j) back(j, t, g);
    });
    if (t == 0 && p_.args.grad_h0 == nullptr) return;
    const int64_t depth = C::kGates * p_.units, words = p_.operand.words(depth);
    member.phase(p_.states / p_.columns, [&](int64_t panel) {
      if (scratch.packed_step != t)
        p_.pack(tiles, depth, scratch.row.get(), scratch.packed.get(),
                [&](int64_t j) { return p_.hidden_part(at(j, t)); });
      scratch.packed_step = t;
      ProductTile<T> tile;
      tile.panels = 1;
      tile.words = words;
      tile.b = p_.hidden_back.get() + panel * words * p_.columns;
      tile.add = !C::kHasMemory;  // GRU: to what bypasses the product
      tile.c_row = p_.states;
      for (int64_t i = 0; i < tiles.count; ++i) {
        tile.height = tiles.height(i);
        tile.a = scratch.packed.get() + tiles.first(i) * words;
        tile.c = dh_.get() + tiles.first(i) * p_.states + panel * p_.columns;
        p_.operand.product(p_.kernels, tile);
      }
    });
  }

  // The gradient of o tanh(c) for one group of units.
  void project(Scratch& scratch, int64_t t, const Tiles& tiles, int64_t g) {
    const int64_t depth = p_.shape.state_size, words = p_.operand.words(depth);
    if (scratch.packed_states_step != t)
      p_.pack(tiles, depth, scratch.row.get(), scratch.packed_states.get(),
              [&](int64_t j) { return p_.dstates.get() + at(j, t) * p_.states; });
    scratch.packed_states_step = t;
    ProductTile<T> tile;
    tile.panels = 1;
    tile.words = words;
    tile.b = p_.projection_back.get() + g * words * p_.columns;
    tile.c_row = p_.units;
    for (int64_t i = 0; i < tiles.count; ++i) {
      tile.height = tiles.height(i);
      tile.a = scratch.packed_states.get() + tiles.first(i) * words;
      tile.c = dm_.get() + tiles.first(i) * p_.units + g * p_.columns;
      p_.operand.product(p_.kernels, tile);
    }
  }

  // One row's cell, for one group of units.
  void back(int64_t j, int64_t t, int64_t g) {
    const int64_t s = at(j, t), from = g * p_.columns;
    CellGradRow<T> row;
    row.units = p_.shape.hidden_size - from;
    row.reserve = p_.reserve(s) + from;
    row.reserve_part = p_.shape.hidden_size;
    row.parts = p_.part(s) + from;
    row.part = p_.units;
    if (C::kHasMemory) {
      const T* c_before = p_.c_before(s);
      row.c_before = c_before == nullptr ? nullptr : c_before + from;
      row.grad_c = dc_.get() + j * p_.units + from;
    } else {
      row.h_before = p_.h_before(s) + from;
    }
    if (p_.projects()) {
      row.grad_h = dm_.get() + j * p_.units + from;
      row.output = p_.m.get() + s * p_.units + from;
    } else {
      row.grad_h = dh_.get() + j * p_.states + from;
      row.grad_outside = p_.dstates.get() + s * p_.states + from;
    }
    p_.kernels.step_back[static_cast<int>(p_.shape.cell)](row);
  }

  Problem<T, C>& p_;
  const std::vector<int64_t> rows_;
  Team team_;
  Buffer<T> dh_, dc_, dm_;
  std::vector<Scratch> scratch_;
};

template <class T, class C>
void run_backward(Problem<T, C>& p, int64_t first, int64_t last, int num_threads) {
  std::vector<int64_t> order;
  for (int64_t b = first; b < last; ++b)
    if (p.args.x.length(b) > 0) order.push_back(b);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return p.args.x.length(a) > p.args.x.length(b); });
  const int64_t rows = static_cast<int64_t>(order.size());
  const double work = static_cast<double>(rows) * C::kGates * static_cast<double>(p.units * p.states);
  const int threads = threads_for(work, kShareWork, num_threads);
  if (rows < kRowsPerThread * threads) {
    const int members = static_cast<int>(std::min<int64_t>(threads, p.units / p.columns));
    BackwardGroup<T, C> group(p, std::move(order), members);
    parallel_for(members, members, [&](int64_t rank, int) { group.run(static_cast<int>(rank)); });
    return;
  }
  parallel_for(threads, threads, [&](int64_t task, int) {
    std::vector<int64_t> mine;
    for (int64_t i = task; i < rows; i += threads) mine.push_back(order[static_cast<size_t>(i)]);
    if (!mine.empty()) BackwardGroup<T, C>(p, std::move(mine), 1).run(0);
  });
}

template <class T, class C>
void weight_gradients(Problem<T, C>& p, bool accumulate, int num_threads) {
  const TemporalPoolGradArgs& args = p.args;
  const CellWeights& shape = p.shape;
  const int64_t h = shape.hidden_size, i = shape.input_size, n = shape.state_size;
  const Operand<T> widened;
  const int64_t words = p.operand.words(p.steps), elements = p.operand.elements(), wide = widened.scratch_size(i);
  StepPanels<T> xs, hs, ms;
  xs.reserve(args.grad_weight_ih != nullptr ? words : 0, i, p.columns);
  hs.reserve(args.grad_weight_hh != nullptr ? words : 0, n, p.columns);
  ms.reserve(args.grad_weight_hr != nullptr ? words : 0, h, p.columns);
  std::vector<Buffer<T>> rows(static_cast<size_t>(num_threads));
  for_blocks(words, 1, num_threads, [&](int64_t first, int64_t count, int slot) {
    Buffer<T>& scratch = rows[static_cast<size_t>(slot)];
    scratch.reserve(elements * wide);
    for (int64_t w = first; w < first + count; ++w) {
      const int64_t s = w * elements;
      const auto set = [&](StepPanels<T>& panels, auto row) {
        if (panels.words > 0)
          panels.set(w, p.operand, row(s), elements == 2 && s + 1 < p.steps ? row(s + 1) : p.zeros.get());
      };
      set(xs,
          [&](int64_t step) { return widened.read(p.x(step), args.x.dtype, i, scratch.get() + (step - s) * wide); });
      set(hs, [&](int64_t step) { return p.h_before(step); });
      set(ms, [&](int64_t step) { return static_cast<const T*>(p.m.get() + step * p.units); });
    }
  });
  OuterProducts<T> products(p.kernels, p.operand, p.steps);
  const auto at = [&](void* base, int64_t row, int64_t dim) {
    return base == nullptr ? nullptr : static_cast<T*>(base) + row * dim;
  };
  for (int gate = 0; gate < C::kGates; ++gate) {
    const int64_t in = C::input_gate(gate) * h, hidden = C::hidden_gate(gate) * h;
    products.add(p.part(0) + gate * p.units, p.stride(), h, xs, at(args.grad_weight_ih, in, i),
                 at(args.grad_bias_ih, in, 1));
    products.add(p.hidden_part(0) + gate * p.units, p.stride(), h, hs, at(args.grad_weight_hh, hidden, n),
                 at(args.grad_bias_hh, hidden, 1));
  }
  products.add(p.dstates.get(), p.states, n, ms, at(args.grad_weight_hr, 0, 0), nullptr);
  products.run(accumulate, num_threads);
}

template <class T, class C>
void input_gradient(Problem<T, C>& p, int num_threads) {
  const TemporalPoolGradArgs& args = p.args;
  const int64_t depth = C::kGates * p.units, dim = p.shape.input_size;
  const int height = p.kernels.full_height;
  const int64_t words = p.operand.words(depth);
  struct Scratch {
    Buffer<T> packed, row, result;
  };
  std::vector<Scratch> slots(static_cast<size_t>(num_threads));
  for_blocks(p.steps, height, num_threads, [&](int64_t first, int64_t count, int slot) {
    auto& [packed, row, result] = slots[static_cast<size_t>(slot)];
    packed.reserve(count * words);
    row.reserve(p.row_scratch());
    result.reserve(count * p.inputs);
    const Tiles tiles(count, height);
    p.pack(tiles, depth, row.get(), packed.get(), [&](int64_t s) { return p.part(first + s); });
    ProductTile<T> tile;
    tile.panels = 1;
    tile.words = words;
    tile.c_row = p.inputs;
    for (int64_t panel = 0; panel < p.inputs / p.columns; ++panel)
      for (int64_t i = 0; i < tiles.count; ++i) {
        tile.height = tiles.height(i);
        tile.a = packed.get() + tiles.first(i) * words;
        tile.b = p.input_back.get() + panel * words * p.columns;
        tile.c = result.get() + tiles.first(i) * p.inputs + panel * p.columns;
        p.operand.product(p.kernels, tile);
      }
    for (int64_t s = first; s < first + count; ++s) {
      const int64_t b = p.row_of[static_cast<size_t>(s)], t = p.begin + s - args.x.cu_seqlens[b];
      const int64_t to = args.x.padded ? b * args.grad_x_batch_stride + t * args.grad_x_step_stride
                                       : (p.begin + s) * args.grad_x_step_stride;
      std::copy_n(result.get() + (s - first) * p.inputs, dim, static_cast<T*>(args.grad_x) + to);
    }
  });
}

template <class T, class C>
void run(const TemporalPoolGradArgs& args) {
  const CellWeights& shape = args.weights;
  const int64_t batch = args.x.batch, rows = C::kGates * shape.hidden_size;
  Problem<T, C> p(args);
  const auto clear = [](void* out, int64_t count) {
    if (out != nullptr) std::fill_n(static_cast<T*>(out), count, T(0));
  };
  if (args.x.cu_seqlens[batch] == 0) {
    clear(args.grad_weight_ih, rows * shape.input_size);
    clear(args.grad_weight_hh, rows * shape.state_size);
    clear(args.grad_bias_ih, rows);
    clear(args.grad_bias_hh, rows);
    clear(args.grad_weight_hr, shape.state_size * shape.hidden_size);
  }
  const bool attention = args.pool.pool == Pool::kAttention && args.grad_pool_weights != nullptr;
  if (args.pool.pool == Pool::kAttention) clear(args.grad_pool_weights, shape.state_size);
  else clear(args.grad_pool_weights, args.x.cu_seqlens[batch]);
  for (int64_t b = 0; b < batch; ++b) {
    if (args.x.length(b) > 0) continue;
    const auto pass = [&](const void* from, void* to, int64_t dim) {
      if (to == nullptr) return;
      if (from == nullptr) std::fill_n(p.template row<T>(to, b, dim), dim, T(0));
      else std::copy_n(p.template row<const T>(from, b, dim), dim, p.template row<T>(to, b, dim));
    };
    pass(args.grad_hn, args.grad_h0, shape.state_size);
    pass(args.grad_cn, args.grad_c0, shape.hidden_size);
  }
  bool accumulate = false;
  for (int64_t first = 0, last; first < batch; first = last) {
    for (last = first + 1; last < batch; ++last)
      if ((args.x.cu_seqlens[last + 1] - args.x.cu_seqlens[first]) * p.stride() > kScratch) break;
    p.take(first, last);
    if (p.steps == 0) continue;
    const double work =
        static_cast<double>(p.steps) * static_cast<double>(rows * (shape.input_size + shape.state_size));
    const int threads = threads_for(work, kShareWork, args.num_threads);
    Buffer<T> shares(attention ? (last - first) * shape.state_size : 0);
    parallel_for(last - first, threads, [&](int64_t i, int) {
      T* share = attention ? shares.get() + i * shape.state_size : nullptr;
      if (args.pool.pool == Pool::kGpo && args.grad_pool_weights != nullptr)
        share = static_cast<T*>(args.grad_pool_weights) + args.x.cu_seqlens[first + i];
      compute_dstates(p, first + i, share);
    });
    if (attention && args.grad_out != nullptr)
      for (int64_t i = 0; i < last - first; ++i)
        if (args.x.length(first + i) > 0)
          p.kernels.axpy(1, shares.get() + i * shape.state_size, static_cast<T*>(args.grad_pool_weights),
                         shape.state_size);
    run_backward(p, first, last, args.num_threads);
    weight_gradients(p, accumulate, threads);
    if (args.grad_x != nullptr) input_gradient(p, threads);
    accumulate = true;
  }
}

}  // namespace

void temporal_pool_backward(const TemporalPoolGradArgs& args) {
  const DefaultFloatMode float_mode;
  visit(args.weights.cell, [&](auto cell) {
    using C = decltype(cell);
    if (args.weights.dtype == DType::kFloat64) run<double, C>(args);
    else run<float, C>(args);
  });
}

}  // namespace pycm::cpu
