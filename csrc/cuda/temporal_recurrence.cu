// The recurrence of an LSTM or a GRU over rows of different lengths, pooled as it goes.
//
//   for t:  parts(t) = inputs(t) + W_hh h(t - 1)     on the tensor cores, by teams of blocks (temporal_recurrence.cuh)
//           c, h     = cell(parts)                   in the registers that hold the sums
//           pool += h, states(t) = h                 there too; h goes to the next step's operand
//
// A team works as long as its longest row, so rows come sorted; row tiles whose rows have all ended are skipped. Of a
// projection (h = W_hr o tanh c) the second product follows in the same step, in teams of one block.
//
//   bytes       of a step and row: G H of inputs read, P of states written if they are wanted; nothing else leaves the SM
//               while the matrix is resident, else it is read from the second cache once per team and step
//   operations  2 G H P of a step and row, three times that in fp32
//   limits      resident: G H P elements in 16 blocks' shared memory, 16-bit LSTM up to H = 512. Rows beyond 32 a team
//               wait for the next team
#include "cuda/temporal_recurrence.cuh"

namespace pycm::cuda {
namespace {

struct Forward {
  Team team;
  const uint4 *matrix, *projection;  // in mma's order; projection may be null
  const void *inputs, *hidden_bias, *h0, *c0;
  void *out, *states, *hn, *cn;
  Pool pool;
  Slot operand, projected, kept;  // two buffers of h; o tanh(c); the resident matrix
  Slot memory, pooled, fresh;     // c or h; what is pooled; a warp's newest states
};

// Calls f with the struct of a pooling that streams.
template <class F>
__device__ __forceinline__ void with_pool(Pool pool, F&& f) {
  switch (pool) {
    case Pool::kLast: return f(LastPool{});
    case Pool::kFirst: return f(FirstPool{});
    case Pool::kMean: return f(MeanPool{});
    case Pool::kMax: return f(MaxPool{});
    case Pool::kMeanMax: return f(MeanMaxPool{});
    case Pool::kLastMean: return f(LastMeanPool{});
    default: return;
  }
}

template <class V>
struct Stepped {
  V h, memory;
};

// Not inlined: a lane has up to 16 units.
template <class C, class V>
__device__ __noinline__ Stepped<V> step_cell(V part0, V part1, V part2, V part3, V memory) {
  using F = Scalar<V>;
  const F part[4] = {{part0}, {part1}, {part2}, {part3}};
  F c{memory};
  const F h = C::step(part, F{memory}, c);
  return {h.v, C::kHasMemory ? c.v : h.v};
}

template <class C, class M, int kRows>
struct Step : Lanes<M, kRows> {
  using Base = Lanes<M, kRows>;
  using V = typename M::V;
  using E = typename M::E;
  using F = Scalar<V>;
  using Base::each, Base::slot, Base::team, Base::rows, Base::first, Base::last, Base::warp, Base::warps;

  const Forward& p;
  V *memory, *pooled, *fresh;
  int64_t pooled_stride;

  __device__ explicit Step(const Forward& forward)
      : Base(forward.team),
        p(forward),
        memory(reinterpret_cast<V*>(team.at(p.memory))),
        pooled(reinterpret_cast<V*>(team.at(p.pooled))),
        fresh(reinterpret_cast<V*>(team.at(p.fresh)) + int64_t{warp} * team.row_tiles * 128),
        pooled_stride(int64_t{p.projection != nullptr ? team.state_tiles : last - first} * team.row_tiles * 128) {}

  __device__ void load(V (&part)[C::kParts][kRows][4], int tile, int64_t t, int active) const {
    const V* inputs = static_cast<const V*>(p.inputs);
    const V* bias = static_cast<const V*>(p.hidden_bias);
    each(tile, active, [&](int n, int e, int row, int unit) {
      const RowPlace& place = rows[row];
      const bool valid = t < place.length && unit < team.hidden;
      const int64_t at = (place.inputs + place.time(t, team.reverse)) * C::kGates * team.hidden + unit;
#pragma unroll
      for (int i = 0; i < C::kGates; ++i)
        part[i][n][e] = valid ? load_streaming(inputs + at + int64_t{C::input_gate(i)} * team.hidden) : V(0);
      if constexpr (C::kGates < C::kParts) part[3][n][e] = bias != nullptr && valid ? bias[unit] : V(0);
    });
  }

  // What the warp's new states of a tile go to. Rolled up: the states come through memory.
  __device__ void emit(E* next, int local_tile, int tile, int64_t t, int active) const {
    const int64_t state = team.state;
#pragma unroll 1
    for (int i = 0; i < active * 4; ++i) {
      const int n = i / 4, e = i % 4, unit = tile * kUnitTile + this->g + e / 2 * 8;
      const RowPlace& place = rows[n * kRowTile + 2 * this->q + e % 2];
      if (t >= place.length || unit >= state) continue;
      const V h = fresh[slot(0, n, e)];
      this->place(next, team.state_tiles, n, tile, e) = M::element(h);
      if (p.states != nullptr)
        store_streaming(static_cast<V*>(p.states) + (place.ragged + place.time(t, team.reverse)) * state + unit, h);
      const bool ends = t + 1 == place.length;
      if (ends) static_cast<V*>(p.hn)[place.row * state + unit] = h;
      V* running = pooled + slot(local_tile, n, e);
      with_pool(p.pool, [&](auto pool) {
        using P = decltype(pool);
        constexpr bool kFirstMean = P::kMean[0], kLastMean = P::kMean[P::kWidth - 1];
#pragma unroll
        for (int part = 0; part < P::kWidth; ++part) {
          V& value = running[part * pooled_stride];
          value = t == 0 ? h : P::add(part, F{value}, F{h}).v;
          if (ends)
            static_cast<V*>(p.out)[(place.row * P::kWidth + part) * state + unit] =
                (part == 0 ? kFirstMean : kLastMean) ? value * (V(1) / static_cast<V>(place.length)) : value;
        }
      });
    }
  }

  // Memory before the first step, and the results of rows without one.
  __device__ void start() const {
    const V *h0 = static_cast<const V*>(p.h0), *c0 = static_cast<const V*>(p.c0);
    const auto initial = [&](const V* from, int64_t row, int unit, int dim) {
      return from != nullptr && row >= 0 && unit < dim ? from[row * dim + unit] : V(0);
    };
    for (int tile = first + warp; tile < last; tile += warps)
      each(tile, team.row_tiles, [&](int n, int e, int row, int unit) {
        const RowPlace& place = rows[row];
        const V value =
            C::kHasMemory ? initial(c0, place.row, unit, team.hidden) : initial(h0, place.row, unit, team.state);
        memory[slot(tile - first, n, e)] = value;
        if (C::kHasMemory && place.row >= 0 && place.length == 0 && unit < team.hidden)
          static_cast<V*>(p.cn)[place.row * team.hidden + unit] = value;
      });
    const int begin = p.projection != nullptr ? 0 : first, end = p.projection != nullptr ? team.state_tiles : last;
    for (int tile = begin + warp; tile < end; tile += warps)
      each(tile, team.row_tiles, [&](int, int, int row, int unit) {
        const RowPlace& place = rows[row];
        if (place.row < 0 || place.length > 0 || unit >= team.state) return;
        static_cast<V*>(p.hn)[place.row * team.state + unit] = initial(h0, place.row, unit, team.state);
        with_pool(p.pool, [&](auto pool) {
          for (int i = 0; i < decltype(pool)::kWidth; ++i)
            static_cast<V*>(p.out)[(place.row * decltype(pool)::kWidth + i) * team.state + unit] = V(0);
        });
      });
  }
};

template <class C, class M, int kRows>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1) recurrence_kernel(const __grid_constant__ Forward p) {
  using V = typename M::V;
  using E = typename M::E;
  const Team& team = p.team;
  const Step<C, M, kRows> step(p);
  const Turns turns(team);
  const int64_t size = int64_t{team.row_tiles} * team.state_tiles * 128;
  E *const operand = reinterpret_cast<E*>(team.at(p.operand)), *const projected =
                                                                   reinterpret_cast<E*>(team.at(p.projected));
  const int steps_of_k = team.state_tiles * kUnitTile / M::kDepth;

  turns.init();
  team.find_rows();
  clear(team.at(p.operand), 2 * size * static_cast<int64_t>(sizeof(E)));
  if (p.projection != nullptr)
    clear(team.at(p.projected), int64_t{team.row_tiles} * team.unit_tiles * 128 * static_cast<int64_t>(sizeof(E)));
  if (team.resident)
    load_matrix(team.at(p.kept), p.matrix + int64_t{step.first} * C::kGates * steps_of_k * kWarp,
                int64_t{step.last - step.first} * C::kGates * steps_of_k * kWarp);
  __syncthreads();
  if (p.h0 != nullptr)
    for (int i = threadIdx.x; i < team.row_tiles * kRowTile * team.state; i += blockDim.x) {
      const int row = i / team.state, unit = i % team.state;
      if (step.rows[row].row >= 0)
        operand[(int64_t{row / kRowTile} * team.state_tiles + unit / kUnitTile) * 128 +
                M::place(unit % kUnitTile, row % kRowTile)] =
            M::element(static_cast<const V*>(p.h0)[step.rows[row].row * team.state + unit]);
    }
  step.start();
  cp_async_wait<0>();
  turns.all();

  const int64_t steps = step.rows[0].length;
  for (int64_t t = 0; t < steps; ++t) {
    const int active = team.active(t), then = t + 1 < steps ? team.active(t + 1) : 0;
    E* next = operand + ((t + 1) & 1) * size;
    V part[C::kParts][kRows][4] = {};
    // The inputs are on their way while the states are awaited.
    int tile = step.first + step.warp;
    if (tile < step.last) step.load(part, tile, t, active);
    if (t > 0) turns.wait(t);
    while (tile < step.last) {
      step.template team_product<C::kGates>(part, C::kFirstHidden, p.matrix, p.kept, p.operand, (t & 1) * size, tile,
                                            team.state_tiles, active);
      step.each(tile, active, [&](int n, int e, int row, int unit) {
        const RowPlace& place = step.rows[row];
        if (t >= place.length || unit >= team.hidden) return;
        V& memory = step.memory[step.slot(tile - step.first, n, e)];
        const Stepped<V> found = step_cell<C, V>(part[0][n][e], part[1][n][e], part[2][n][e], part[3][n][e], memory);
        memory = found.memory;
        if (C::kHasMemory && t + 1 == place.length)
          static_cast<V*>(p.cn)[place.row * team.hidden + unit] = found.memory;
        if (p.projection != nullptr) step.place(projected, team.unit_tiles, n, tile, e) = M::element(found.h);
        else step.fresh[step.slot(0, n, e)] = found.h;
      });
      if (p.projection == nullptr) step.emit(next, tile - step.first, tile, t, active);
      if (team.blocks > 1) {
        __syncwarp();
        for (int n = 0; n < then; ++n) turns.send(next + (int64_t{n} * team.state_tiles + tile) * 128, t + 1);
      }
      tile += step.warps;
      if (tile < step.last) step.load(part, tile, t, active);
    }
    if (p.projection != nullptr) {
      __syncthreads();
      for (int tile = step.warp; tile < team.state_tiles; tile += step.warps) {
        V sum[1][kRows][4] = {};
        step.template product<1>(sum, 0, p.projection, projected, tile, team.unit_tiles, active);
        step.each(tile, active, [&](int n, int e, int, int) { step.fresh[step.slot(0, n, e)] = sum[0][n][e]; });
        step.emit(next, tile, tile, t, active);
      }
    }
    if (then > 0)
      turns.done(t + 1, static_cast<uint32_t>(then * (team.state_tiles - (step.last - step.first)) * 128 * sizeof(E)));
  }
  turns.all();
}

// ---- the host's side ----

struct Plan {
  Forward forward{};
  MatrixOrder matrix{}, projection{};
  int64_t shared_bytes = 0;
};

template <class C, class M>
Plan plan_for(const RecurrenceArgs& args, TeamChoice choice) {
  constexpr int64_t kE = sizeof(typename M::E), kV = sizeof(typename M::V);
  const RecurrenceShape& shape = args.shape;
  const int64_t hidden = shape.hidden, state = shape.state;
  Plan plan;
  Forward& p = plan.forward;
  Team& team = p.team = team_of(shape, choice);
  plan.matrix = {shape.weight_hh, nullptr, shape.dtype,    team.hidden, C::kGates, 1,
                 team.state,      state,   hidden * state, 0,           1};
  plan.projection = {shape.weight_hr, nullptr, shape.dtype, team.state, 1, 1, team.hidden, hidden, 0, 0, 1};
  const bool projects = shape.weight_hr != nullptr;
  const int64_t own = (team.unit_tiles + team.blocks - 1) / team.blocks, tile = int64_t{team.row_tiles} * 128;
  Slots slots{device_limits().shared_bytes};
  team.places = slots.take(team.row_tiles * kRowTile * static_cast<int64_t>(sizeof(RowPlace)));
  team.barriers = slots.take(2 * sizeof(uint64_t));
  p.operand = slots.take(2 * tile * team.state_tiles * kE);
  p.projected = slots.take(projects ? tile * team.unit_tiles * kE : 0);
  p.memory = slots.take(tile * own * kV);
  p.pooled = slots.take(width_of(args.pool) * tile * (projects ? team.state_tiles : own) * kV);
  p.fresh = slots.take(tile * warps_of(team) * kV);
  const int64_t kept = own * plan.matrix.fragments(M::kDepth) / plan.matrix.tiles() * 16;
  team.resident = slots.global == 0 && slots.shared + kept <= slots.limit;
  if (team.resident) p.kept = slots.take(kept);
  team.workspace_bytes = slots.global;
  plan.shared_bytes = slots.shared;
  p.inputs = args.inputs;
  p.hidden_bias = args.hidden_bias;
  p.h0 = shape.h0;
  p.c0 = shape.c0;
  p.out = args.out;
  p.states = args.states;
  p.hn = args.hn;
  p.cn = args.cn;
  p.pool = args.pool;
  return plan;
}

// f(kernel); float64 is the reference path, and has one.
template <class C, class M, class F>
void with_rows(const Plan& plan, F&& f) {
  if constexpr (!std::is_same_v<M, DoubleProduct>)
    if (plan.forward.team.row_tiles > 1) return f(&recurrence_kernel<C, M, kMaxRowTiles>);
  f(&recurrence_kernel<C, M, 1>);
}

template <class C, class M>
Plan choose(const RecurrenceArgs& args) {
  constexpr int kMost = std::is_same_v<M, DoubleProduct> ? 1 : kMaxRowTiles;
  const auto fits = [&](int blocks, int row_tiles) {
    const Plan plan = plan_for<C, M>(args, {blocks, row_tiles});
    bool good = plan.forward.team.resident;
    if (good && blocks > kPortableCluster)
      with_rows<C, M>(plan, [&](auto kernel) {
        good = cluster_fits(kernel, grid_of(plan.forward.team, plan.shared_bytes, nullptr));
      });
    return good;
  };
  return plan_for<C, M>(args, choose_team(args.shape, kMost, fits));
}

// Lays out the workspace, and with one runs.
template <class C, class M>
int64_t run(const RecurrenceArgs& args, const CudaContext* context) {
  Plan plan = choose<C, M>(args);
  Forward& p = plan.forward;
  Workspace workspace(context == nullptr ? nullptr : context->workspace);
  plan.matrix.to = workspace.take<uint4>(plan.matrix.fragments(M::kDepth));
  if (args.shape.weight_hr != nullptr) plan.projection.to = workspace.take<uint4>(plan.projection.fragments(M::kDepth));
  p.team.workspace = workspace.take<char>(blocks_of(p.team) * p.team.workspace_bytes);
  if (context == nullptr) return workspace.used();
  p.matrix = static_cast<const uint4*>(plan.matrix.to);
  p.projection = static_cast<const uint4*>(plan.projection.to);
  order_matrix(plan.matrix, args.shape.dtype, context->stream);
  if (p.projection != nullptr) order_matrix(plan.projection, args.shape.dtype, context->stream);
  with_rows<C, M>(plan, [&](auto kernel) {
    launch(kernel, grid_of(p.team, plan.shared_bytes, context->stream), "temporal_pool: recurrence", p);
  });
  return 0;
}

int64_t run(const RecurrenceArgs& args, const CudaContext* context) {
  if (args.shape.batch == 0) return 0;
  return visit(args.shape.cell, [&](auto cell) {
    return visit_product(args.shape.dtype,
                         [&](auto product) { return run<decltype(cell), decltype(product)>(args, context); });
  });
}

}  // namespace

int64_t recurrence_workspace_bytes(const RecurrenceArgs& args) { return run(args, nullptr); }
void recurrence(const RecurrenceArgs& args, const CudaContext& context) { run(args, &context); }

}  // namespace pycm::cuda
