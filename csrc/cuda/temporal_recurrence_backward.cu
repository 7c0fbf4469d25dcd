// The reverse of the recurrence: from what reaches the states from outside to the gradients of all pre-activations.
//
//   for t = last ... 0:  dh        = grad_states(t) + W_hh' dparts(t + 1) + what bypasses the product (GRU)
//                        dparts(t) = cell's derivative, in the registers that hold the sums; overwrites the pre-activations
//
// The teams, their operands and their turns are those of temporal_recurrence.cuh; here K runs over the gates' units, and the
// sums over the states. A row joins when t falls below its length. Products are in fp32 (fp64 for fp64 weights) whatever the
// weights' type: gradients have a range that 16 bits do not, and the tensor cores' TF32 holds 16-bit weights exactly.
//
//   bytes       of a step and row: G H of pre-activations read and written, 2 H of c or of states, P of grad_states
//   operations  6 G H P of a step and row
//   limits      resident: G H P numbers of 4 bytes in 16 blocks' shared memory, LSTM up to H = 256
#include "cuda/temporal_recurrence.cuh"

namespace pycm::cuda {
namespace {

struct Backward {
  Team team;
  const uint4 *matrix, *projection;  // W_hh' and W_hr' in mma's order; projection may be null
  const void *states, *c, *h0, *c0, *grad_hn, *grad_cn;
  void *inputs, *hidden, *grad_states, *grad_h0, *grad_c0;
  Slot operand, projected, kept;  // two buffers of dparts; dh; the resident matrix
  Slot carry, memory, fresh;      // dh and dc between steps; a warp's newest sums where there is a projection
};

template <class C, class M, int kRows>
struct Step : Lanes<M, kRows> {
  using Base = Lanes<M, kRows>;
  using V = typename M::V;
  using E = typename M::E;
  using F = Scalar<V>;
  using Base::each, Base::slot, Base::team, Base::rows, Base::first, Base::last, Base::warp, Base::warps;

  const Backward& p;
  V *carry, *memory, *fresh;
  const int first_state, last_state;  // the block's tiles of states

  __device__ explicit Step(const Backward& backward)
      : Base(backward.team),
        p(backward),
        carry(reinterpret_cast<V*>(team.at(p.carry))),
        memory(reinterpret_cast<V*>(team.at(p.memory))),
        fresh(reinterpret_cast<V*>(team.at(p.fresh)) + int64_t{warp} * team.row_tiles * 128),
        first_state(p.projection != nullptr ? 0 : first),
        last_state(p.projection != nullptr ? team.state_tiles : last) {}

  // f(number kept, element of [B, dim]) for all that this thread keeps of an array.
  template <class Function>
  __device__ void each_kept(V* kept, int begin, int end, int dim, Function f) const {
    for (int tile = begin + warp; tile < end; tile += warps)
      each(tile, team.row_tiles, [&](int n, int e, int row, int unit) {
        const int64_t b = rows[row].row;
        f(kept[slot(tile - begin, n, e)], b >= 0 && unit < dim ? b * dim + unit : int64_t{-1});
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

  // f(tile of rows, element, row, unit) as each(), four at a time: what it uses lies in memory.
  template <class Function>
  __device__ __forceinline__ void each_rolled(int tile, int active, Function f) const {
#pragma unroll 1
    for (int n = 0; n < active; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(n, e, n * kRowTile + 2 * this->q + e % 2, tile * kUnitTile + this->g + e / 2 * 8);
  }

  // The derivative of the cell at step t of one row and unit; returns what bypasses the product.
  __device__ V cell(E* next, int tile, int n, int e, const RowPlace& place, int unit, int64_t t, V grad_h) const {
    const int64_t h = team.hidden, time = place.time(t, team.reverse);
    V* in = static_cast<V*>(p.inputs) + (place.inputs + time) * C::kGates * h + unit;
    V* of_state = static_cast<V*>(p.hidden) + (place.inputs + time) * C::kGates * h + unit;
    // The step before, in an array [S, dim], or the row's own initial value.
    const auto earlier = [&](const void* data, const void* initial, int64_t dim) {
      if (t > 0) return F{static_cast<const V*>(data)[(place.ragged + place.time(t - 1, team.reverse)) * dim + unit]};
      return F{initial == nullptr ? V(0) : static_cast<const V*>(initial)[place.row * dim + unit]};
    };
    F part[4], before_h = F::zero(), before_c = F::zero(), c = F::zero(), grad_before = F::zero(), grad_c = F::zero();
    if constexpr (C::kHasMemory) {
#pragma unroll
      for (int i = 0; i < 4; ++i) part[i] = F{in[i * h]};
      c = F{static_cast<const V*>(p.c)[(place.ragged + time) * h + unit]};
      before_c = earlier(p.c, p.c0, h);
      grad_c = F{memory[slot(tile - first, n, e)]};
    } else {
      part[0] = F{in[C::input_gate(0) * h]};
#pragma unroll
      for (int i = 1; i < 3; ++i) part[i] = F{in[C::input_gate(i) * h] + of_state[(i - 1) * h]};
      part[3] = F{of_state[2 * h]};
      before_h = earlier(p.states, p.h0, team.state);
    }
    C::backward(part, before_h, before_c, c, F{grad_h}, grad_c, grad_before);
#pragma unroll
    for (int i = 0; i < C::kGates; ++i) in[C::input_gate(i) * h] = part[i].v;
#pragma unroll
    for (int gate = 0; gate < C::kGates; ++gate) {
      const V grad = part[C::kFirstHidden + gate].v;
      if constexpr (!C::kHasMemory) of_state[gate * h] = grad;
      this->place(next, C::kGates * team.unit_tiles, n, gate * team.unit_tiles + tile, e) = M::element(grad);
    }
    if constexpr (C::kHasMemory) memory[slot(tile - first, n, e)] = grad_c.v;
    return grad_before.v;
  }
};

template <class C, class M, int kRows>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1) recurrence_backward_kernel(const __grid_constant__ Backward p) {
  using V = typename M::V;
  using E = typename M::E;
  const Team& team = p.team;
  const Step<C, M, kRows> step(p);
  const Turns turns(team);
  const int tiles_of_k = C::kGates * team.unit_tiles;
  const int64_t size = int64_t{team.row_tiles} * tiles_of_k * 128;
  E *const operand = reinterpret_cast<E*>(team.at(p.operand)), *const projected =
                                                                   reinterpret_cast<E*>(team.at(p.projected));

  turns.init();
  team.find_rows();
  clear(team.at(p.operand), 2 * size * static_cast<int64_t>(sizeof(E)));
  if (p.projection != nullptr)
    clear(team.at(p.projected), int64_t{team.row_tiles} * team.state_tiles * 128 * static_cast<int64_t>(sizeof(E)));
  if (team.resident) {
    const int64_t fragments = int64_t{tiles_of_k} * (kUnitTile / M::kDepth) * kWarp;
    load_matrix(team.at(p.kept), p.matrix + step.first_state * fragments,
                (step.last_state - step.first_state) * fragments);
  }
  __syncthreads();
  step.start();
  cp_async_wait<0>();
  turns.all();

  // Turn i has the gradients of step steps - i; the last one is wanted for grad_h0 alone.
  const int64_t steps = step.rows[0].length, turns_read = p.grad_h0 != nullptr ? steps : steps - 1;
  for (int64_t turn = 0; turn <= turns_read && steps > 0; ++turn) {
    const int64_t t = steps - 1 - turn;
    const int before = turn > 0 ? team.active(t + 1) : 0, now = t >= 0 ? team.active(t) : 0;
    E* next = operand + ((turn + 1) & 1) * size;
    if (turn > 0) turns.wait(turn);
    for (int tile = step.first_state + step.warp; tile < step.last_state; tile += step.warps) {
      V sum[1][kRows][4] = {};
      if (turn > 0)
        step.template team_product<1>(sum, 0, p.matrix, p.kept, p.operand, (turn & 1) * size, tile, tiles_of_k, before);
      step.each(tile, before, [&](int n, int e, int row, int) {
        if (t + 1 < step.rows[row].length) step.carry[step.slot(tile - step.first_state, n, e)] += sum[0][n][e];
      });
      step.each_rolled(tile, now, [&](int n, int e, int row, int unit) {
        const RowPlace& place = step.rows[row];
        if (t >= place.length || unit >= team.state) return;
        V& carry = step.carry[step.slot(tile - step.first_state, n, e)];
        V& outside = static_cast<V*>(p.grad_states)[(place.ragged + place.time(t, team.reverse)) * team.state + unit];
        const V grad = carry + outside;
        if (p.projection == nullptr) {
          carry = step.cell(next, tile, n, e, place, unit, t, grad);
        } else {
          outside = grad;
          carry = 0;
          step.place(projected, team.state_tiles, n, tile, e) = M::element(grad);
        }
      });
      if (team.blocks > 1 && turn < turns_read) {
        __syncwarp();
        for (int n = 0; n < now; ++n)
          for (int gate = 0; gate < C::kGates; ++gate)
            turns.send(next + (int64_t{n} * tiles_of_k + gate * team.unit_tiles + tile) * 128, turn + 1);
      }
    }
    if (p.projection != nullptr && t >= 0) {
      __syncthreads();
      for (int tile = step.warp; tile < team.unit_tiles; tile += step.warps) {
        V sum[1][kRows][4] = {};
        step.template product<1>(sum, 0, p.projection, projected, tile, team.state_tiles, now);
        step.each(tile, now, [&](int n, int e, int, int) { step.fresh[step.slot(0, n, e)] = sum[0][n][e]; });
        step.each_rolled(tile, now, [&](int n, int e, int row, int unit) {
          const RowPlace& place = step.rows[row];
          if (t < place.length && unit < team.hidden)
            step.cell(next, tile, n, e, place, unit, t, step.fresh[step.slot(0, n, e)]);
        });
      }
    }
    if (turn < turns_read)
      turns.done(turn + 1, static_cast<uint32_t>(now * C::kGates * (team.unit_tiles - (step.last - step.first)) * 128 *
                                                 sizeof(E)));
  }
  step.finish();
  turns.all();
}

// ---- the host's side ----

struct Plan {
  Backward backward{};
  MatrixOrder matrix{}, projection{};
  int64_t shared_bytes = 0;
};

template <class C, class M>
Plan plan_for(const RecurrenceBackwardArgs& args, TeamChoice choice) {
  constexpr int64_t kE = sizeof(typename M::E), kV = sizeof(typename M::V);
  const RecurrenceShape& shape = args.shape;
  const int64_t hidden = shape.hidden, state = shape.state;
  Plan plan;
  Backward& p = plan.backward;
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
  p.operand = slots.take(2 * tile * C::kGates * team.unit_tiles * kE);
  p.projected = slots.take(projects ? tile * team.state_tiles * kE : 0);
  p.carry = slots.take(tile * own_states * kV);
  p.memory = slots.take(C::kHasMemory ? tile * own * kV : 0);
  p.fresh = slots.take(projects ? tile * warps_of(team) * kV : 0);
  const int64_t kept = own_states * plan.matrix.fragments(M::kDepth) / plan.matrix.tiles() * 16;
  team.resident = slots.global == 0 && slots.shared + kept <= slots.limit;
  if (team.resident) p.kept = slots.take(kept);
  team.workspace_bytes = slots.global;
  plan.shared_bytes = slots.shared;
  p.states = args.states;
  p.c = args.c;
  p.h0 = shape.h0;
  p.c0 = shape.c0;
  p.grad_hn = args.grad_hn;
  p.grad_cn = args.grad_cn;
  p.inputs = args.inputs;
  p.hidden = args.hidden;
  p.grad_states = args.grad_states;
  p.grad_h0 = args.grad_h0;
  p.grad_c0 = args.grad_c0;
  return plan;
}

// f(kernel); float64 is the reference path, and has one.
template <class C, class M, class F>
void with_rows(const Plan& plan, F&& f) {
  if constexpr (!std::is_same_v<M, DoubleProduct>)
    if (plan.backward.team.row_tiles > 1) return f(&recurrence_backward_kernel<C, M, kMaxRowTiles>);
  f(&recurrence_backward_kernel<C, M, 1>);
}

template <class C, class M>
Plan choose(const RecurrenceBackwardArgs& args) {
  constexpr int kMost = std::is_same_v<M, DoubleProduct> ? 1 : kMaxRowTiles;
  const auto fits = [&](int blocks, int row_tiles) {
    const Plan plan = plan_for<C, M>(args, {blocks, row_tiles});
    bool good = plan.backward.team.resident;
    if (good && blocks > kPortableCluster)
      with_rows<C, M>(plan, [&](auto kernel) {
        good = cluster_fits(kernel, grid_of(plan.backward.team, plan.shared_bytes, nullptr));
      });
    return good;
  };
  return plan_for<C, M>(args, choose_team(args.shape, kMost, fits));
}

// Lays out the workspace, and with one runs.
template <class C, class M>
int64_t run(const RecurrenceBackwardArgs& args, const CudaContext* context) {
  Plan plan = choose<C, M>(args);
  Backward& p = plan.backward;
  Workspace workspace(context == nullptr ? nullptr : context->workspace);
  plan.matrix.to = workspace.take<uint4>(plan.matrix.fragments(M::kDepth));
  if (args.shape.weight_hr != nullptr) plan.projection.to = workspace.take<uint4>(plan.projection.fragments(M::kDepth));
  p.team.workspace = workspace.take<char>(blocks_of(p.team) * p.team.workspace_bytes);
  if (context == nullptr) return workspace.used();
  p.matrix = static_cast<const uint4*>(plan.matrix.to);
  p.projection = static_cast<const uint4*>(plan.projection.to);
  const DType element = std::is_same_v<M, DoubleProduct> ? DType::kFloat64 : DType::kFloat32;
  order_matrix(plan.matrix, element, context->stream);
  if (p.projection != nullptr) order_matrix(plan.projection, element, context->stream);
  with_rows<C, M>(plan, [&](auto kernel) {
    launch(kernel, grid_of(p.team, plan.shared_bytes, context->stream), "temporal_pool: reverse recurrence", p);
  });
  return 0;
}

int64_t run(const RecurrenceBackwardArgs& args, const CudaContext* context) {
  if (args.shape.batch == 0) return 0;
  return visit(args.shape.cell, [&](auto cell) {
    using C = decltype(cell);
    return args.shape.dtype == DType::kFloat64 ? run<C, DoubleProduct>(args, context)
                                               : run<C, SingleProduct>(args, context);
  });
}

}  // namespace

int64_t recurrence_backward_workspace_bytes(const RecurrenceBackwardArgs& args) { return run(args, nullptr); }
void recurrence_backward(const RecurrenceBackwardArgs& args, const CudaContext& context) { run(args, &context); }

}  // namespace pycm::cuda
