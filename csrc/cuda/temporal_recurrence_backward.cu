// The reverse of the recurrence: from what reaches the states from outside to the gradients of all pre-activations.
//
//   for t = last ... 0:  dh        = grad_states(t) + W_hh' dparts(t + 1) + what bypasses the product (GRU)
//                        dparts(t) = the cell's derivative; overwrites the pre-activations
//
// The teams, their operands and their turns are those of temporal_recurrence.cuh; here K runs over the gates' units, and the
// sums over the states. A row joins when t falls below its length. What is rounded to 16 bits, for weights that are, is dparts
// for the product with W_hh' alone: what it carries, and what leaves, is in fp32.
//
//   bytes       of a step and row: G H of pre-activations read and written, 2 H of c or of states, P of grad_states if there are
//               any: what a pool hands on to every step lies in the caches
//   operations  2 G H P of a step and row, three times that in fp32
//   limits      resident: as the forward pass, less the operand, which is G times as large: 16-bit LSTM up to H = 512 in a
//               cluster, H = 1024 in 132 blocks
#include "cuda/temporal_plan.cuh"

namespace pycm::cuda {
namespace {

struct Backward {
  Team team;
  Matrix matrix, projection;  // W_hh' and W_hr'; projection.fragments may be null
  const void *states, *c, *h0, *c0, *grad_hn, *grad_cn, *grad_every, *grad_first, *grad_last;
  void *inputs, *hidden, *grad_states, *grad_h0, *grad_c0;
  bool narrow_states;             // as in ops/temporal_recurrence.h
  Slot operand, projected, kept;  // dparts of one turn or two; dh; the resident matrix
  Slot sums, carry, memory;       // of stage 1; dh and dc between steps
};

// Fewer than in the forward pass: what a cell's derivative needs leaves a thread more to hold.
template <class M>
constexpr int kMaxWarps = M::kMaxWarps > 12 ? 12 : 8;

template <class C, class M>
struct Step : Lane<M> {
  using Base = Lane<M>;
  using V = typename M::V;
  using E = typename M::E;
  using F = Scalar<V>;
  using Base::first, Base::last, Base::rows, Base::team, Base::slot, Base::each, Base::row, Base::unit, Base::sum;

  const Backward& p;
  const bool projects;
  Four<V>*carry, *memory;
  const int first_state, last_state;  // the block's tiles of states

  __device__ explicit Step(const Backward& backward)
      : Base(backward.team, backward.sums),
        p(backward),
        projects(p.projection.fragments != nullptr),
        carry(reinterpret_cast<Four<V>*>(team.at(p.carry))),
        memory(reinterpret_cast<Four<V>*>(team.at(p.memory))),
        first_state(projects ? 0 : first),
        last_state(projects ? team.state_tiles : last) {}

  // f(number kept, element of [B, dim] or -1) for all that this lane keeps of an array.
  template <class Function>
  __device__ void each_kept(Four<V>* kept, int begin, int end, int dim, Function f) const {
    each(end - begin, team.row_tiles, [&](int local_tile, int n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t b = rows[row(n, e)].row;
        const int at = unit(begin + local_tile, e);
        f(kept[slot(local_tile, n)].v[e], b >= 0 && at < dim ? b * dim + at : int64_t{-1});
      }
    });
  }
  __device__ void start() const {
    const auto from = [](const void* data) {
      return
          [data](V& kept, int64_t at) { kept = data != nullptr && at >= 0 ? static_cast<const V*>(data)[at] : V(0); };
    };
    each_kept(carry, first_state, last_state, team.state, from(p.grad_hn));
    if (C::kHasMemory) each_kept(memory, first, last, team.hidden, from(p.grad_cn));
  }
  __device__ void finish() const {
    const auto to = [](void* data) {
      return [data](V& kept, int64_t at) {
        if (at >= 0) static_cast<V*>(data)[at] = kept;
      };
    };
    if (p.grad_h0 != nullptr) each_kept(carry, first_state, last_state, team.state, to(p.grad_h0));
    if (p.grad_c0 != nullptr) each_kept(memory, first, last, team.hidden, to(p.grad_c0));
  }

  // What reaches a state from outside.
  __device__ V outside(const RowPlace& place, int64_t t, int at) const {
    const auto of_row = [&](const void* grad) { return static_cast<const V*>(grad)[place.row * team.state + at]; };
    V sum = 0;
    if (p.grad_states != nullptr)
      sum = static_cast<const V*>(p.grad_states)[team.row_by_step(place, t) * team.state + at];
    if (p.grad_every != nullptr) sum += of_row(p.grad_every);
    if (p.grad_first != nullptr && t == 0) sum += of_row(p.grad_first);
    if (p.grad_last != nullptr && t + 1 == place.length) sum += of_row(p.grad_last);
    return sum;
  }

  // What the forward pass left of 16 units and 8 rows at step t.
  struct Loaded {
    V part[4][4], c[4], before[4], outside[4];  // before: c, or h for a GRU
  };
  __device__ Loaded load(int local_tile, int n, int64_t t) const {
    const int64_t h = team.hidden;
    Loaded found = {};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const RowPlace& place = rows[row(n, e)];
      const int at = unit(first + local_tile, e);
      if (t >= place.length || at >= h) continue;
      const int64_t from = team.row_by_step(place, t);
      const V* in = static_cast<const V*>(p.inputs) + from * C::kGates * h + at;
      const V* of_state = static_cast<const V*>(p.hidden) + from * C::kGates * h + at;
      const auto initial = [&](const void* data) {
        return data == nullptr ? V(0) : static_cast<const V*>(data)[place.row * h + at];
      };
      if constexpr (C::kHasMemory) {
#pragma unroll
        for (int i = 0; i < 4; ++i) found.part[i][e] = in[i * h];
        const V* c = static_cast<const V*>(p.c) + at;
        found.c[e] = c[from * h];
        found.before[e] = t > team.begin() ? c[team.row_by_step(place, t - 1) * h] : initial(p.c0);
      } else {
        found.part[0][e] = in[C::input_gate(0) * h];
#pragma unroll
        for (int i = 1; i < 3; ++i) found.part[i][e] = in[C::input_gate(i) * h] + of_state[(i - 1) * h];
        found.part[3][e] = of_state[2 * h];
        const int64_t earlier = (place.ragged + place.time(t - 1, team.reverse)) * h + at;
        found.before[e] = t == 0            ? initial(p.h0)
                          : p.narrow_states ? M::value(static_cast<const E*>(p.states)[earlier])
                                            : static_cast<const V*>(p.states)[earlier];
      }
      if (!projects) found.outside[e] = outside(place, t, at);
    }
    return found;
  }

  // Stage 2: the derivative of the cell at step t, from the gradients of its states, which become those that bypass the
  // product.
  __device__ void cell(const Loaded& from, E* next, int local_tile, int n, int64_t t, Four<V>& grad) const {
    const int64_t h = team.hidden;
    Four<V> kept = {};
    if (C::kHasMemory) kept = memory[slot(local_tile, n)];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const RowPlace& place = rows[row(n, e)];
      const int tile = first + local_tile, at = unit(tile, e);
      if (t >= place.length || at >= h) continue;
      F part[4] = {{from.part[0][e]}, {from.part[1][e]}, {from.part[2][e]}, {from.part[3][e]}};
      C::activate(part);
      F grad_c{kept.v[e]}, grad_before = F::zero();
      C::backward(part, F{from.before[e]}, F{from.before[e]}, F{from.c[e]}, F{grad.v[e] + from.outside[e]}, grad_c,
                  grad_before);
      kept.v[e] = grad_c.v;
      grad.v[e] = grad_before.v;
      const int64_t to = team.row_by_step(place, t) * C::kGates * h + at;
#pragma unroll
      for (int i = 0; i < C::kGates; ++i) static_cast<V*>(p.inputs)[to + C::input_gate(i) * h] = part[i].v;
#pragma unroll
      for (int gate = 0; gate < C::kGates; ++gate) {
        const V of_gate = part[C::kFirstHidden + gate].v;
        if constexpr (!C::kHasMemory) static_cast<V*>(p.hidden)[to + gate * h] = of_gate;
        this->place(next, C::kGates * team.unit_tiles, n, gate * team.unit_tiles + tile, e) = M::element(of_gate);
      }
    }
    if (C::kHasMemory) memory[slot(local_tile, n)] = kept;
  }

  // dh before a projection: all that reaches the states, kept for the gradient of W_hr.
  __device__ void reach(E* projected, int tile, int n, int64_t t, Four<V>& grad) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const RowPlace& place = rows[row(n, e)];
      const int at = unit(tile, e);
      if (t >= place.length || at >= team.state) continue;
      const V all = outside(place, t, at) + grad.v[e];
      static_cast<V*>(p.grad_states)[team.row_by_step(place, t) * team.state + at] = all;
      this->place(projected, team.state_tiles, n, tile, e) = M::element(all);
      grad.v[e] = 0;
    }
  }
};

template <class C, class M>
__global__ void __launch_bounds__(kMaxWarps<M>* kWarp, 1)
    recurrence_backward_kernel(const __grid_constant__ Backward p) {
  using V = typename M::V;
  using E = typename M::E;
  const Team& team = p.team;
  const Step<C, M> step(p);
  Turns turns(team);
  const int tiles_of_k = C::kGates * team.unit_tiles, own = step.last_state - step.first_state;
  const int64_t size = int64_t{team.row_tiles} * tiles_of_k * 128;
  const int64_t buffer = team.buffers() > 1 ? size : 0;  // from one to the other
  E *const operand = reinterpret_cast<E*>(team.at(p.operand)), *const projected =
                                                                   reinterpret_cast<E*>(team.at(p.projected));

  turns.init();
  if (team.resident) {
    const int64_t fragments = int64_t{tiles_of_k} * (kUnitTile / M::kDepth) * kWarp;
    load_matrix(team.at(p.kept), p.matrix.fragments + step.first_state * fragments, own * fragments);
  }
  for (int64_t group = team.first_group(); group < team.groups(); group += team.teams()) {
    team.find_rows(group);
    clear(team.at(p.operand), team.buffers() * size * static_cast<int64_t>(sizeof(E)));
    if (step.projects)
      clear(team.at(p.projected), int64_t{team.row_tiles} * team.state_tiles * 128 * static_cast<int64_t>(sizeof(E)));
    __syncthreads();
    step.start();
    cp_async_wait<0>();
    turns.all();

    // Turn i has the gradients of step steps - i; the last one is wanted for grad_h0 alone.
    const int64_t steps = min(step.rows[0].length, team.end());
    const int count = static_cast<int>(max(steps - team.begin(), int64_t{0}));
    const int turns_read = p.grad_h0 != nullptr ? count : count - 1;
    // The first of the warp's pairs of tiles in stage 2: what it needs is on its way while the states are awaited, unless it is
    // in fp64, for which there are too few registers.
    const bool has_early = !step.projects && sizeof(V) == 4;
    const int early_tile = step.warp / team.row_tiles, early_n = step.warp % team.row_tiles;
    for (int turn = 0; turn <= turns_read; ++turn) {
      const int64_t t = steps - 1 - turn;
      const int before = turn > 0 ? team.active(t + 1) : 0, now = turn < count ? team.active(t) : 0;
      E* next = operand + ((turn + 1) & 1) * buffer;
      typename Step<C, M>::Loaded early = {};
      if (has_early && early_tile < own && early_n < now) early = step.load(early_tile, early_n, t);
      if (turn > 0) {
        turns.wait(turn, operand + (turn & 1) * buffer,
                   int64_t{before} * tiles_of_k * 128 * static_cast<int64_t>(sizeof(E)));
        step.multiply_tiles(p.matrix, team.resident ? &p.kept : nullptr, p.operand, (turn & 1) * buffer,
                            step.first_state, step.last_state, true, before);
        __syncthreads();
      }
      step.each(own, now > 0 ? now : before, [&](int local_tile, int n) {
        Four<V> grad = step.carry[step.slot(local_tile, n)];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (n < before && t + 1 < step.rows[step.row(n, e)].length) {
            V sum = step.sum(local_tile * C::kGates, n, e);
#pragma unroll
            for (int gate = 1; gate < C::kGates; ++gate) sum += step.sum(local_tile * C::kGates + gate, n, e);
            grad.v[e] += sum;
          }
        if (now > 0 && step.projects) {
          step.reach(projected, local_tile, n, t, grad);
        } else if (now > 0) {
          const bool is_early = has_early && local_tile == early_tile && n == early_n;
          step.cell(is_early ? early : step.load(local_tile, n, t), next, local_tile, n, t, grad);
          if (team.blocks > 1 && turn < turns_read) {
            __syncwarp();
            for (int gate = 0; gate < C::kGates; ++gate)
              turns.send(next, (int64_t{n} * tiles_of_k + gate * team.unit_tiles + step.first + local_tile) * 128,
                         turn + 1);
          }
        }
        step.carry[step.slot(local_tile, n)] = grad;
      });
      if (step.projects && now > 0) {
        __syncthreads();
        step.multiply_tiles(p.projection, nullptr, p.projected, 0, 0, team.unit_tiles, false, now);
        __syncthreads();
        step.each(team.unit_tiles, now, [&](int tile, int n) {
          Four<V> grad;
#pragma unroll
          for (int e = 0; e < 4; ++e) grad.v[e] = step.sum(tile, n, e);
          step.cell(step.load(tile, n, t), next, tile, n, t, grad);
        });
      }
      if (turn < turns_read)
        turns.done(turn + 1, static_cast<uint32_t>(now * C::kGates * (team.unit_tiles - (step.last - step.first)) *
                                                   128 * static_cast<int>(sizeof(E))));
    }
    step.finish();
    turns.all();
  }
}

// ---- the host's side ----

template <class C, class M>
Plan<Backward> plan_for(const RecurrenceBackwardArgs& args, TeamChoice choice) {
  constexpr int64_t kE = sizeof(typename M::E), kV = sizeof(typename M::V);
  const RecurrenceShape& shape = args.shape;
  const int64_t hidden = shape.hidden, state = shape.state;
  Plan<Backward> plan;
  Backward& p = plan.parameters;
  Team& team = p.team = team_of(shape, choice);
  plan.matrix = {shape.weight_hh, nullptr, shape.dtype, team.state,     1,    C::kGates,
                 team.hidden,     1,       0,           hidden * state, state};
  plan.projection = {shape.weight_hr, nullptr, shape.dtype, team.hidden, 1, 1, team.state, 1, 0, 0, hidden};
  const bool projects = shape.weight_hr != nullptr;
  const int64_t own = (team.unit_tiles + team.blocks - 1) / team.blocks, tile = int64_t{team.row_tiles} * 128;
  const int64_t own_states = projects ? team.state_tiles : own;
  Slots slots{device_limits().shared_bytes};
  team.places = slots.take(team.row_tiles * kRowTile * static_cast<int64_t>(sizeof(RowPlace)));
  team.barriers = slots.take(2 * sizeof(uint64_t));
  p.operand = slots.take(team.buffers() * tile * C::kGates * team.unit_tiles * kE);
  p.projected = slots.take(projects ? tile * team.state_tiles * kE : 0);
  p.sums = slots.take(std::max(own_states * C::kGates, projects ? int64_t{team.unit_tiles} : 0) * tile * kV);
  p.carry = slots.take(tile * own_states * kV);
  p.memory = slots.take(C::kHasMemory ? tile * own * kV : 0);
  const int64_t kept = own_states * plan.matrix.fragments(M::kDepth) / plan.matrix.tiles() * 16;
  team.resident = slots.global == 0 && slots.shared + kept <= slots.limit;
  if (team.resident) p.kept = slots.take(kept);
  team.workspace_bytes = slots.global;
  team.exchange_bytes = tile * C::kGates * team.unit_tiles * kE;
  plan.grid = grid_of(team, C::kGates, kMaxWarps<M>, slots.shared);
  p.matrix = {nullptr, C::kGates, team.unit_tiles};
  p.projection = {nullptr, 1, team.state_tiles};
  p.states = args.states;
  p.narrow_states = args.narrow_states;
  p.c = args.c;
  p.h0 = shape.h0;
  p.c0 = shape.c0;
  p.grad_hn = args.grad_hn;
  p.grad_cn = args.grad_cn;
  p.grad_every = args.grad_every;
  p.grad_first = args.grad_first;
  p.grad_last = args.grad_last;
  p.inputs = args.inputs;
  p.hidden = args.hidden;
  p.grad_states = args.grad_states;
  p.grad_h0 = args.grad_h0;
  p.grad_c0 = args.grad_c0;
  return plan;
}

int64_t run(const RecurrenceBackwardArgs& args, const CudaContext* context) {
  return visit_recurrence(args.shape, [&](auto cell, auto product) {
    using C = decltype(cell);
    using M = decltype(product);
    return run_recurrence<M>(args.shape, context, &recurrence_backward_kernel<C, M>,
                             "temporal_pool: reverse recurrence",
                             [&](TeamChoice choice) { return plan_for<C, M>(args, choice); });
  });
}

}  // namespace

int64_t recurrence_backward_workspace_bytes(const RecurrenceBackwardArgs& args) { return run(args, nullptr); }
void recurrence_backward(const RecurrenceBackwardArgs& args, const CudaContext& context) { run(args, &context); }

}  // namespace pycm::cuda
