// The recurrence of an LSTM or a GRU over rows of different lengths, pooled as it goes.
//
//   for t:  parts(t)      = inputs(t) + W_hh h(t - 1)    on the tensor cores, by teams of blocks (temporal_recurrence.cuh)
//           c(t), h(t)    = cell(parts(t))
//           pool, states  += h(t)                        where h is computed; it goes to the next step's operand, too
//
// A team works as long as its longest row, so rows come sorted; tiles of rows that have all ended are skipped. Of a
// projection (h = W_hr o tanh c) the second product follows in the same step, in teams of one block.
//
//   bytes       of a step and row: G H of inputs read, P of states written if they are wanted; nothing else leaves the SM
//               while the matrix is resident, else it is read from the second cache once per team and step
//   operations  2 G H P of a step and row, three times that in fp32
//   limits      resident: G H P elements in a team's shared memory: 16-bit LSTM up to H = 512 in a cluster, H = 1536 in 132
//               blocks. Rows beyond 32 a team wait for the next team
//   budget      of a block with u tiles of 16 units and n of 8 rows, 16-bit, K = P: G u K 32 bytes of matrix, 2 n K 16 of
//               operand (two buffers in a cluster), G u n 512 of sums, u n 512 of memory and as many of each pooled value. LSTM,
//               H = 512: cluster of 16, u = 2, n = 2: 128 + 32 + 8 + 2 + 2 KiB; of 11, u = 3, n = 1: 192 + 16 + 6 + 1.5 + 1.5.
//               128 registers a thread at 16 warps (16 bits), 168 at 12 (fp32), 255 at 8 (fp64)
#include "cuda/temporal_plan.cuh"

namespace pycm::cuda {
namespace {

struct Forward {
  Team team;
  Matrix matrix, projection;  // projection.fragments may be null
  const void *inputs, *hidden_bias, *h0, *c0;
  const int64_t* input_rows;
  void *out, *states, *hn, *cn;
  Pool pool;
  int width;                      // of the pool
  bool narrow_states;             // as in ops/temporal_recurrence.h
  Slot operand, projected, kept;  // h of one turn or two; o tanh(c); the resident matrix
  Slot sums, memory, pooled;      // of stage 1; c or h; what is pooled
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

template <class C, class M>
struct Step : Lane<M> {
  using Base = Lane<M>;
  using V = typename M::V;
  using E = typename M::E;
  using F = Scalar<V>;
  using Base::first, Base::last, Base::rows, Base::team, Base::slot, Base::each, Base::row, Base::unit, Base::sum;

  const Forward& p;
  const bool projects;
  Four<V>*memory, *pooled;
  int64_t pooled_stride;

  __device__ explicit Step(const Forward& forward)
      : Base(forward.team, forward.sums),
        p(forward),
        projects(p.projection.fragments != nullptr),
        memory(reinterpret_cast<Four<V>*>(team.at(p.memory))),
        pooled(reinterpret_cast<Four<V>*>(team.at(p.pooled))),
        pooled_stride(int64_t{projects ? team.state_tiles : last - first} * team.row_tiles * kWarp) {}

  // The inputs of 16 units and 8 rows at step t.
  struct Inputs {
    V gate[C::kGates][4];
  };
  __device__ Inputs load(int local_tile, int n, int64_t t) const {
    Inputs found;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const RowPlace& place = rows[row(n, e)];
      const int at = unit(first + local_tile, e);
      const bool valid = t < place.length && at < team.hidden;
      const V* from = static_cast<const V*>(p.inputs);
      if (valid) {
        const int64_t own = team.input_row(place, t);
        from += (p.input_rows == nullptr ? own : p.input_rows[own]) * C::kGates * team.hidden + at;
      }
#pragma unroll
      for (int i = 0; i < C::kGates; ++i)
        found.gate[i][e] = valid ? load_streaming(from + int64_t{i} * team.hidden) : V(0);
    }
    return found;
  }

  // Stage 2: the cell, whose states go to `next` and the results, or, before a projection, to `projected`.
  __device__ void cell(const Inputs& inputs, E* next, E* projected, int local_tile, int n, int64_t t) const {
    const int tile = first + local_tile;
    Four<V> kept = memory[slot(local_tile, n)];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const RowPlace& place = rows[row(n, e)];
      const int at = unit(tile, e);
      if (t >= place.length || at >= team.hidden) continue;
      F part[4];
#pragma unroll
      for (int i = 0; i < C::kGates; ++i) part[C::kFirstHidden + i] = {sum(local_tile * C::kGates + i, n, e)};
      if constexpr (C::kFirstHidden > 0 && C::kGates < C::kParts)
        if (p.hidden_bias != nullptr) part[3] = part[3] + F{static_cast<const V*>(p.hidden_bias)[at]};
#pragma unroll
      for (int i = 0; i < C::kGates; ++i) {
        const F input{inputs.gate[C::input_gate(i)][e]};
        part[i] = i < C::kFirstHidden ? input : part[i] + input;
      }
      F c{kept.v[e]};
      const F h = C::step(part, F{kept.v[e]}, c);
      kept.v[e] = C::kHasMemory ? c.v : h.v;
      if (C::kHasMemory && leaves(place, t)) static_cast<V*>(p.cn)[place.row * team.hidden + at] = c.v;
      if (projects) this->place(projected, team.unit_tiles, n, tile, e) = M::element(h.v);
      else emit(next, local_tile, tile, n, e, place, at, t, h.v);
    }
    memory[slot(local_tile, n)] = kept;
  }

  // Whether t is the row's last step, or the last one of this launch: then what goes on is kept in the results.
  __device__ bool leaves(const RowPlace& place, int64_t t) const {
    return t + 1 == place.length || t + 1 == team.end();
  }

  // What a new state goes to.
  __device__ __forceinline__ void emit(E* next, int local_tile, int tile, int n, int e, const RowPlace& place, int at,
                                       int64_t t, V h) const {
    const int64_t state = team.state;
    this->place(next, team.state_tiles, n, tile, e) = M::element(h);
    if (p.states != nullptr) {
      const int64_t to = (place.ragged + place.time(t, team.reverse)) * state + at;
      if (p.narrow_states) store_streaming(static_cast<E*>(p.states) + to, M::element(h));
      else store_streaming(static_cast<V*>(p.states) + to, h);
    }
    const bool ends = t + 1 == place.length, leaves = this->leaves(place, t);
    if (leaves) static_cast<V*>(p.hn)[place.row * state + at] = h;
    with_pool(p.pool, [&](auto pool) {
      using P = decltype(pool);
      constexpr bool kFirstMean = P::kMean[0], kLastMean = P::kMean[P::kWidth - 1];
#pragma unroll
      for (int part = 0; part < P::kWidth; ++part) {
        V& value = pooled[part * pooled_stride + slot(local_tile, n)].v[e];
        value = t == 0 ? h : P::add(part, F{value}, F{h}).v;
        if (leaves)
          static_cast<V*>(p.out)[(place.row * P::kWidth + part) * state + at] =
              ends && (part == 0 ? kFirstMean : kLastMean) ? value * (V(1) / static_cast<V>(place.length)) : value;
      }
    });
  }

  // What is kept before the launch's first step, and the results of rows without one.
  __device__ void start(int64_t begin) const {
    const V *h0 = static_cast<const V*>(p.h0), *c0 = static_cast<const V*>(p.c0);
    const auto initial = [](const V* from, int64_t row, int at, int dim) {
      return from != nullptr && row >= 0 && at < dim ? from[row * dim + at] : V(0);
    };
    each(last - first, team.row_tiles, [&](int local_tile, int n) {
      Four<V> kept;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const RowPlace& place = rows[row(n, e)];
        const int at = unit(first + local_tile, e);
        kept.v[e] = C::kHasMemory ? initial(c0, place.row, at, team.hidden) : initial(h0, place.row, at, team.state);
        if (C::kHasMemory && begin == 0 && place.row >= 0 && place.length == 0 && at < team.hidden)
          static_cast<V*>(p.cn)[place.row * team.hidden + at] = kept.v[e];
      }
      memory[slot(local_tile, n)] = kept;
    });
    const int first_state = projects ? 0 : first, last_state = projects ? team.state_tiles : last;
    each(last_state - first_state, team.row_tiles, [&](int local_tile, int n) {
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        const RowPlace& place = rows[row(n, e)];
        const int at = unit(first_state + local_tile, e);
        if (place.row < 0 || at >= team.state || (begin == 0 && place.length > 0)) continue;
        if (begin == 0) static_cast<V*>(p.hn)[place.row * team.state + at] = initial(h0, place.row, at, team.state);
        for (int part = 0; part < p.width; ++part) {
          V& out = static_cast<V*>(p.out)[(place.row * p.width + part) * team.state + at];
          if (begin == 0) out = V(0);
          else pooled[part * pooled_stride + slot(local_tile, n)].v[e] = out;
        }
      }
    });
  }
};

template <class C, class M>
__global__ void __launch_bounds__(M::kMaxWarps* kWarp, 1) recurrence_kernel(const __grid_constant__ Forward p) {
  using V = typename M::V;
  using E = typename M::E;
  const Team& team = p.team;
  const Step<C, M> step(p);
  Turns turns(team);
  const int own = step.last - step.first;
  const int64_t size = int64_t{team.row_tiles} * team.state_tiles * 128;
  const int64_t buffer = team.buffers() > 1 ? size : 0;  // from one to the other
  E *const operand = reinterpret_cast<E*>(team.at(p.operand)), *const projected =
                                                                   reinterpret_cast<E*>(team.at(p.projected));

  const int64_t begin = team.begin(), end = team.end();
  turns.init();
  if (team.resident) {
    const int64_t fragments = int64_t{C::kGates} * team.state_tiles * (kUnitTile / M::kDepth) * kWarp;
    load_matrix(team.at(p.kept), p.matrix.fragments + step.first * fragments, own * fragments);
  }
  for (int64_t group = team.first_group(); group < team.groups(); group += team.teams()) {
    team.find_rows(group);
    clear(team.at(p.operand), team.buffers() * size * static_cast<int64_t>(sizeof(E)));
    if (step.projects)
      clear(team.at(p.projected), int64_t{team.row_tiles} * team.unit_tiles * 128 * static_cast<int64_t>(sizeof(E)));
    __syncthreads();
    if (p.h0 != nullptr)
      for (int i = threadIdx.x; i < team.row_tiles * kRowTile * team.state; i += blockDim.x) {
        const int row = i / team.state, unit = i % team.state;
        if (step.rows[row].row >= 0)
          operand[(int64_t{row / kRowTile} * team.state_tiles + unit / kUnitTile) * 128 +
                  M::place(unit % kUnitTile, row % kRowTile)] =
              M::element(static_cast<const V*>(p.h0)[step.rows[row].row * team.state + unit]);
      }
    step.start(begin);
    cp_async_wait<0>();
    turns.all();

    const int64_t steps = min(step.rows[0].length, end);
    // The first of the warp's pairs of tiles in stage 2: its inputs are on their way while the states are awaited.
    const int early_tile = step.warp / team.row_tiles, early_n = step.warp % team.row_tiles;
    for (int64_t t = begin; t < steps; ++t) {
      const int64_t turn = t - begin;
      const int active = team.active(t), then = t + 1 < steps ? team.active(t + 1) : 0;
      E* next = operand + ((turn + 1) & 1) * buffer;
      typename Step<C, M>::Inputs early = {};
      if (early_tile < own && early_n < active) early = step.load(early_tile, early_n, t);
      if (turn > 0)
        turns.wait(turn, operand + (turn & 1) * buffer,
                   int64_t{active} * team.state_tiles * 128 * static_cast<int64_t>(sizeof(E)));
      step.multiply_tiles(p.matrix, team.resident ? &p.kept : nullptr, p.operand, (turn & 1) * buffer, step.first,
                          step.last, false, active);
      __syncthreads();
      step.each(own, active, [&](int local_tile, int n) {
        const bool is_early = local_tile == early_tile && n == early_n;
        step.cell(is_early ? early : step.load(local_tile, n, t), next, projected, local_tile, n, t);
        if (team.blocks > 1 && n < then) {
          __syncwarp();
          turns.send(next, (int64_t{n} * team.state_tiles + step.first + local_tile) * 128, turn + 1);
        }
      });
      if (step.projects) {
        __syncthreads();
        step.multiply_tiles(p.projection, nullptr, p.projected, 0, 0, team.state_tiles, false, active);
        __syncthreads();
        step.each(team.state_tiles, active, [&](int tile, int n) {
#pragma unroll 1
          for (int e = 0; e < 4; ++e) {
            const RowPlace& place = step.rows[step.row(n, e)];
            const int unit = step.unit(tile, e);
            if (t < place.length && unit < team.state)
              step.emit(next, tile, tile, n, e, place, unit, t, step.sum(tile, n, e));
          }
        });
      }
      if (then > 0)
        turns.done(turn + 1,
                   static_cast<uint32_t>(then * (team.state_tiles - own) * 128 * static_cast<int>(sizeof(E))));
    }
    turns.all();
  }
}

// ---- the host's side ----

template <class C, class M>
Plan<Forward> plan_for(const RecurrenceArgs& args, TeamChoice choice) {
  constexpr int64_t kE = sizeof(typename M::E), kV = sizeof(typename M::V);
  const RecurrenceShape& shape = args.shape;
  const int64_t hidden = shape.hidden, state = shape.state;
  Plan<Forward> plan;
  Forward& p = plan.parameters;
  Team& team = p.team = team_of(shape, choice);
  plan.matrix = {shape.weight_hh, nullptr, shape.dtype,    team.hidden, C::kGates, 1,
                 team.state,      state,   hidden * state, 0,           1};
  plan.projection = {shape.weight_hr, nullptr, shape.dtype, team.state, 1, 1, team.hidden, hidden, 0, 0, 1};
  const bool projects = shape.weight_hr != nullptr;
  const int64_t own = (team.unit_tiles + team.blocks - 1) / team.blocks, tile = int64_t{team.row_tiles} * 128;
  Slots slots{device_limits().shared_bytes};
  team.places = slots.take(team.row_tiles * kRowTile * static_cast<int64_t>(sizeof(RowPlace)));
  team.barriers = slots.take(2 * sizeof(uint64_t));
  p.operand = slots.take(team.buffers() * tile * team.state_tiles * kE);
  p.projected = slots.take(projects ? tile * team.unit_tiles * kE : 0);
  p.sums = slots.take(std::max(own * C::kGates, projects ? int64_t{team.state_tiles} : 0) * tile * kV);
  p.memory = slots.take(tile * own * kV);
  p.pooled = slots.take(width_of(args.pool) * tile * (projects ? team.state_tiles : own) * kV);
  const int64_t kept = own * plan.matrix.fragments(M::kDepth) / plan.matrix.tiles() * 16;
  team.resident = slots.global == 0 && slots.shared + kept <= slots.limit;
  if (team.resident) p.kept = slots.take(kept);
  team.workspace_bytes = slots.global;
  team.exchange_bytes = tile * team.state_tiles * kE;
  plan.grid = grid_of(team, C::kGates, M::kMaxWarps, slots.shared);
  p.matrix = {nullptr, C::kGates, team.state_tiles};
  p.projection = {nullptr, 1, team.unit_tiles};
  p.inputs = args.inputs;
  p.input_rows = args.input_rows;
  p.hidden_bias = args.hidden_bias;
  p.h0 = shape.h0;
  p.c0 = shape.c0;
  p.out = args.out;
  p.states = args.states;
  p.narrow_states = args.narrow_states;
  p.hn = args.hn;
  p.cn = args.cn;
  p.pool = args.pool;
  p.width = width_of(args.pool);
  return plan;
}

int64_t run(const RecurrenceArgs& args, const CudaContext* context) {
  return visit_recurrence(args.shape, [&](auto cell, auto product) {
    using C = decltype(cell);
    using M = decltype(product);
    return run_recurrence<M>(args.shape, context, &recurrence_kernel<C, M>, "temporal_pool: recurrence",
                             [&](TeamChoice choice) { return plan_for<C, M>(args, choice); });
  });
}

}  // namespace

int64_t recurrence_workspace_bytes(const RecurrenceArgs& args) { return run(args, nullptr); }
void recurrence(const RecurrenceArgs& args, const CudaContext& context) { run(args, &context); }

}  // namespace pycm::cuda
