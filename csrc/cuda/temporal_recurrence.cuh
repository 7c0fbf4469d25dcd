// What the forward and the reverse recurrence share: the product of a slice of the matrix with the states of a few rows, the
// order of its operands in memory, teams of blocks, and where each row's steps lie.
//
// A team of blocks owns up to 32 rows for all their steps, and each of its blocks a slice of the units. Of every step:
//
//   1. a warp multiplies one gate of 16 units with        K -> 32 bytes a step             8 rows
//      the rows' states of the step before, for each   16 units [ matrix, mma's A ]   K [ states, B ] -> sums[unit][row]
//      gate and tile of its block                                                       [ ...       ]
//   2. a block barrier; then a warp computes the cell of 16 units and 8 rows, each lane the units g, g + 8 and the rows
//      2q, 2q + 1 (lane 4g + q), from the sums of all gates, and writes their operand of the next step
//   3. the team's barrier: the operand of the next step is whole
//
// Both operands lie in memory in the order of mma's registers ("fragments"): 16 bytes a lane of the matrix, 8 of the states, so
// every load is one conflict-free instruction. The matrix stays in the team's shared memory for all steps. Where it does not
// fit it is read again each step from the second cache, and what else does not fit lies in the block's part of the workspace:
// slower, and right for any size. The sum over K is one chain for each gate, however the work is divided: same bits.
#pragma once

#include "cuda/temporal_product.cuh"

namespace pycm::cuda {

constexpr int kMaxRowTiles = 4, kMaxTeam = 16;
// Clusters that every device which has them can run.
constexpr bool portable_cluster(int blocks) { return blocks == 1 || blocks == 2 || blocks == 4 || blocks == 8; }

// ---- memory ----

// A run of bytes, of the block's shared memory or of its part of the workspace.
struct Slot {
  int64_t offset = 0;
  bool shared = true;
};

// Hands out slots, in shared memory while that lasts.
struct Slots {
  int64_t limit, shared = 0, global = 0;

  Slot take(int64_t bytes) {
    bytes = (bytes + 127) / 128 * 128;
    int64_t& used = shared + bytes <= limit ? shared : global;
    used += bytes;
    return {used - bytes, &used == &shared};
  }
};

struct RowPlace {
  int64_t row, length;  // -1 and 0 for what is beyond the batch
  int64_t inputs;       // see Team::input_row
  int64_t ragged;
  __device__ int64_t time(int64_t t, bool reverse) const { return reverse ? length - 1 - t : t; }
};

// What a team's kernels have in common.
struct Team {
  const int64_t *cu_seqlens, *order, *step_starts, *bounds;
  int64_t batch, padded_steps;
  int hidden, state, unit_tiles, state_tiles;  // H and P, and 16s of them
  int row_tiles;                               // of 8 rows
  int blocks;                                  // of the team
  bool reverse, resident;                      // resident: the matrix and both operands are in shared memory
  bool grid;                                   // the team is no cluster: its turns go through global memory
  char* workspace;
  int64_t workspace_bytes;  // of a block
  // Of teams that are no clusters: arrivals and two buffers for each.
  unsigned long long* arrivals;
  char* exchange;
  int64_t exchange_bytes;  // of one buffer
  Slot places, barriers;

  __device__ char* at(Slot slot) const {
    return slot.shared ? dynamic_shared() + slot.offset : workspace + blockIdx.x * workspace_bytes + slot.offset;
  }
  // Others of a cluster write the operand of the next step while this block may still read that of this one. Else there is a
  // barrier between.
  __host__ __device__ int buffers() const { return blocks > 1 && !grid ? 2 : 1; }
  __device__ int rank() const { return static_cast<int>(blockIdx.x) % blocks; }
  // Tiles of units that belong to this block.
  __device__ int first_tile() const { return min(rank() * ((unit_tiles + blocks - 1) / blocks), unit_tiles); }
  __device__ int last_tile() const { return min(first_tile() + (unit_tiles + blocks - 1) / blocks, unit_tiles); }
  __device__ RowPlace* rows() const { return reinterpret_cast<RowPlace*>(at(places)); }

  // Groups of rows, longest first: each team's own, and where teams are fewer, every so-many-th.
  __device__ int64_t groups() const { return (batch + row_tiles * kRowTile - 1) / (row_tiles * kRowTile); }
  __device__ int64_t first_group() const { return blockIdx.x / blocks; }
  __device__ int64_t teams() const { return gridDim.x / blocks; }

  // The steps that this launch runs.
  __device__ int64_t begin() const { return bounds == nullptr ? 0 : bounds[0]; }
  __device__ int64_t end() const { return bounds == nullptr ? INT64_MAX : bounds[1]; }
  // Where the row's step t lies in the inputs' layout.
  __device__ int64_t row_by_step(const RowPlace& place, int64_t t) const { return place.inputs + step_starts[t]; }
  __device__ int64_t input_row(const RowPlace& place, int64_t t) const {
    return step_starts == nullptr ? place.inputs + place.time(t, reverse) : row_by_step(place, t);
  }

  __device__ void find_rows(int64_t group) const {
    const int64_t first = group * row_tiles * kRowTile;
    for (int i = static_cast<int>(threadIdx.x); i < row_tiles * kRowTile; i += static_cast<int>(blockDim.x)) {
      RowPlace place{-1, 0, 0, 0};
      if (first + i < batch) {
        place.row = order[first + i];
        place.ragged = cu_seqlens[place.row];
        place.length = cu_seqlens[place.row + 1] - place.ragged;
        place.inputs = step_starts != nullptr ? first + i - step_starts[begin()]
                       : padded_steps > 0     ? place.row * padded_steps
                                              : place.ragged;
      }
      rows()[i] = place;
    }
  }
  // Tiles of rows, longest first, that have a step t.
  __device__ int active(int64_t t) const {
    int count = row_tiles;
    while (count > 0 && rows()[(count - 1) * kRowTile].length <= t) --count;
    return count;
  }
};

// Turns of an operand: what is written in turn i is read in turn i + 1, by all blocks of the team.
//
// One block has __syncthreads(). In a cluster there are two buffers: the writers send each chunk to the other blocks, which
// count its bytes, and every warp tells every block that it has written, and read the buffer that will be written next. A team that is no cluster has its
// buffers in global memory and counts its blocks' arrivals; all its blocks run at once (a cooperative launch), or they would
// wait for ever.
struct Turns {
  const Team& team;
  uint64_t* const barriers;  // of the two buffers
  const int blocks, rank;
  char* const exchange;
  unsigned long long* const arrivals;
  unsigned long long arrived = 0;  // of one block

  __device__ explicit Turns(const Team& t)
      : team(t),
        barriers(reinterpret_cast<uint64_t*>(team.at(team.barriers))),
        blocks(team.blocks),
        rank(team.rank()),
        exchange(team.exchange + team.first_group() * 2 * team.exchange_bytes),
        arrivals(team.arrivals + team.first_group()) {}
  __device__ void init() const {
#if PYCM_SM90
    if (blocks > 1 && !team.grid && threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) mbarrier_init(&barriers[i], static_cast<uint32_t>(blocks * (blockDim.x / kWarp)));
      fence_mbarrier_init();
    }
#endif
  }
  // Until the first `bytes` of turn `turn` >= 1, which lies in `buffer`, can be read.
  __device__ void wait(int64_t turn, void* buffer, int64_t bytes) const {
    if (team.grid) {
      await();
      const uint4* from = reinterpret_cast<const uint4*>(exchange + (turn & 1) * team.exchange_bytes);
      for (int64_t i = threadIdx.x; i < bytes / 16; i += blockDim.x) static_cast<uint4*>(buffer)[i] = load_l2(from + i);
      __syncthreads();
      return;
    }
#if PYCM_SM90
    if (blocks > 1) mbarrier_wait_cluster(&barriers[turn & 1], static_cast<uint32_t>((turn - 1) >> 1 & 1));
#endif
  }
  // A warp's own 128 elements, which it has written to element `at` of the buffer of turn `turn`, to the others.
  template <class E>
  __device__ void send(E* buffer, int64_t at, int64_t turn) const {
    constexpr int kWords = static_cast<int>(sizeof(E)) / 2;  // of a lane
    auto* words = reinterpret_cast<uint64_t*>(buffer + at) + threadIdx.x % kWarp;
    if (team.grid) {
      auto* to = reinterpret_cast<uint64_t*>(reinterpret_cast<E*>(exchange + (turn & 1) * team.exchange_bytes) + at) +
                 threadIdx.x % kWarp;
#pragma unroll
      for (int i = 0; i < kWords; ++i) to[i * kWarp] = words[i * kWarp];
      return;
    }
#if PYCM_SM90
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      for (int to = 1; to < blocks; ++to) {
        const int other = rank + to < blocks ? rank + to : rank + to - blocks;
        store_async(&words[i * kWarp], words[i * kWarp], &barriers[turn & 1], static_cast<uint32_t>(other));
      }
#endif
  }
  // This warp has written its part of turn `turn`; `bytes` come from the other blocks.
  __device__ void done(int64_t turn, uint32_t bytes) {
    if (team.grid) return arrive();
#if PYCM_SM90
    if (blocks > 1) {
      if (threadIdx.x == 0) mbarrier_expect_tx(&barriers[turn & 1], bytes);
      __syncwarp();
      if (static_cast<int>(threadIdx.x) % kWarp < blocks)
        mbarrier_arrive_cluster(&barriers[turn & 1], threadIdx.x % kWarp);
      return;
    }
#endif
    __syncthreads();
  }
  // Before the first turn and after the last.
  __device__ void all() {
    if (team.grid) {
      arrive();
      return await();
    }
#if PYCM_SM90
    if (blocks > 1) return cluster_sync();
#endif
    __syncthreads();
  }

 private:
  __device__ void arrive() {
    ++arrived;
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    atomicAdd(arrivals, 1ull);
  }
  __device__ void await() const {
    if (threadIdx.x == 0)
      while (load_acquire(arrivals) < arrived * blocks) __nanosleep(20);
    __syncthreads();
  }
};

// A matrix in mma's order: tiles of 16 rows, of each `gates` runs of `tiles` tiles along K.
struct Matrix {
  const uint4* fragments;
  int gates, tiles;
};

// One thread's part of both stages.
template <class M>
struct Lane {
  using V = typename M::V;
  using E = typename M::E;

  const Team& team;
  const int lane, warp, warps, g, q, first, last;  // the block's tiles of units: first ... last - 1
  const RowPlace* rows;
  Four<V>* sums;

  __device__ Lane(const Team& t, Slot sums_slot)
      : team(t),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        warps(blockDim.x / kWarp),
        g(lane / 4),
        q(lane % 4),
        first(team.first_tile()),
        last(team.last_tile()),
        rows(team.rows()),
        sums(reinterpret_cast<Four<V>*>(team.at(sums_slot))) {}

  // Stage 1: the sums of every gate of tiles [begin, end), from the operand's element `from` on. `kept`: where the matrix is in
  // shared memory, with the operand; else null. Gates have K in common, or, `run_of_gate`, each its own run of it.
  __device__ void multiply_tiles(const Matrix& matrix, const Slot* kept, Slot operand, int64_t from, int begin, int end,
                                 bool run_of_gate, int active) const {
    const int steps = matrix.tiles * (kUnitTile / M::kDepth), stride = run_of_gate ? matrix.gates * steps : steps;
    for (int i = warp; i < (end - begin) * matrix.gates; i += warps) {
      Four<V>* to = sums + int64_t{i} * team.row_tiles * kWarp + lane;
      const int64_t a = int64_t{i} * steps * kWarp + lane;
      const int64_t b = int64_t{run_of_gate ? i % matrix.gates : 0} * steps * kWarp + lane;
      if (kept != nullptr)
        multiply<M>(
            to, reinterpret_cast<const uint4*>(dynamic_shared() + kept->offset) + a,
            reinterpret_cast<const uint2*>(reinterpret_cast<const E*>(dynamic_shared() + operand.offset) + from) + b,
            steps, stride, active);
      else
        multiply_anywhere<M>(to, matrix.fragments + int64_t{begin} * matrix.gates * steps * kWarp + a,
                             reinterpret_cast<const uint2*>(reinterpret_cast<const E*>(team.at(operand)) + from) + b,
                             steps, stride, active);
    }
  }

  // Stage 2: f(local tile, tile of rows) for the warp's own. Those of a tile of rows are always the same warp's.
  template <class F>
  __device__ __forceinline__ void each(int tiles, int active, F f) const {
    for (int i = warp; i < tiles * team.row_tiles; i += warps)
      if (i % team.row_tiles < active) f(i / team.row_tiles, i % team.row_tiles);
  }
  __device__ int row(int n, int e) const { return n * kRowTile + 2 * q + e % 2; }
  __device__ int unit(int tile, int e) const { return tile * kUnitTile + g + e / 2 * 8; }
  // Where the lane's numbers are kept between steps.
  __device__ int64_t slot(int local_tile, int n) const {
    return (int64_t{local_tile} * team.row_tiles + n) * kWarp + lane;
  }
  __device__ V sum(int item, int n, int e) const { return sums[(item * team.row_tiles + n) * kWarp + lane].v[e]; }
  // The element's place in an operand of `tiles` tiles along K.
  __device__ E& place(E* operand, int tiles, int n, int tile, int e) const {
    return operand[(int64_t{n} * tiles + tile) * 128 + M::place(g + e / 2 * 8, 2 * q + e % 2)];
  }
};

// The matrix of a block, from the packed one to shared memory: the caller waits with cp_async_wait<0>.
__device__ __forceinline__ void load_matrix(char* to, const uint4* from, int64_t fragments) {
  for (int64_t i = threadIdx.x; i < fragments; i += blockDim.x) cp_async16(to + i * 16, from + i);
  cp_async_commit();
}

__device__ __forceinline__ void clear(char* to, int64_t bytes) {
  for (int64_t i = threadIdx.x; i < bytes / 16; i += blockDim.x)
    reinterpret_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
}

}  // namespace pycm::cuda
