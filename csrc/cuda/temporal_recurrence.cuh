// What the forward and the reverse recurrence share: the product of a slice of the matrix with the states of a few rows, the
// order of its operands in memory, teams of blocks, and where each row's steps lie.
//
// A team of blocks owns up to 32 rows for all their steps, and each of its blocks a slice of the units. A warp multiplies one
// tile of 16 units at a time, all their gates, with the rows' states of the step before:
//
//              K -> 32 bytes a step                8 rows
//   16 units  [ gate 0 ][..]                    K [      ]      sums of all gates of units g, g + 8 and rows 2q, 2q + 1 in
//             [ gate 1 ][..]   matrix, mma's A    [ h    ]      lane 4g + q: the cell's equations need no other lane.
//             [ ...    ][..]                      [ B    ]
//
// Both operands lie in memory in the order of mma's registers ("fragments"): 16 bytes a lane of the matrix, 8 of the states, so
// every load is one conflict-free instruction. The matrix stays in the team's shared memory for all steps. Where it does not
// fit it is read again each step from the second cache, and what else does not fit lies in the block's part of the workspace:
// slower, and right for any size.
#pragma once

#include <algorithm>

#include "core/cell.h"
#include "core/pool.h"
#include "cuda/launch.h"
#include "ops/temporal_recurrence.h"

namespace pycm::cuda {

constexpr int kUnitTile = 16, kRowTile = 8, kMaxWarps = 8, kMaxRowTiles = 4, kMaxTeam = 16;
constexpr int kPortableCluster = 8;  // what every device that has clusters can run

// ---- numbers ----

// A number of the working type, as core/cell.h and core/pool.h want it.
template <class V>
struct Scalar {
  using T = V;
  V v;
  __host__ __device__ static Scalar set(V value) { return {value}; }
  __host__ __device__ static Scalar zero() { return {V(0)}; }
  friend __device__ Scalar operator+(Scalar a, Scalar b) { return {a.v + b.v}; }
  friend __device__ Scalar operator-(Scalar a, Scalar b) { return {a.v - b.v}; }
  friend __device__ Scalar operator*(Scalar a, Scalar b) { return {a.v * b.v}; }
  friend __device__ Scalar max(Scalar a, Scalar b) { return {a.v < b.v ? b.v : a.v}; }  // a where either is NaN
  friend __device__ Scalar least(Scalar a, Scalar b) { return {b.v < a.v ? b.v : a.v}; }
};
// Within 3 ulp of the result.
__device__ __forceinline__ Scalar<float> sigmoid(Scalar<float> x) { return {__fdividef(1.0f, 1.0f + __expf(-x.v))}; }
__device__ __forceinline__ Scalar<float> tanh(Scalar<float> x) { return {::tanhf(x.v)}; }
__device__ __forceinline__ Scalar<double> sigmoid(Scalar<double> x) { return {1.0 / (1.0 + ::exp(-x.v))}; }
__device__ __forceinline__ Scalar<double> tanh(Scalar<double> x) { return {::tanh(x.v)}; }

// ---- products of 16 units and 8 rows ----

// E: an element of both operands. V: the working type. kDepth: elements of 32 bytes, one step along K.
template <Mma kKind>
struct HalfProduct {
  using E = uint16_t;
  using V = float;
  static constexpr int kDepth = 16;
  __device__ static E element(float value) {
    return kKind == Mma::kF16 ? float_to_half(value) : float_to_bfloat16(value);
  }
  // Where unit u and row r of a chunk of 16 units lie.
  __device__ static int place(int u, int r) { return (r * 4 + u % 8 / 2) * 4 + u / 8 * 2 + u % 2; }

  template <int kGates, int kRows, int kParts>
  __device__ static void multiply(V (&sum)[kParts][kRows][4], int first, const uint4* a, const uint2* b, int steps,
                                  int active) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll 2
    for (int k = 0; k < steps; ++k) {
      uint32_t rows[kRows][2];
#pragma unroll
      for (int n = 0; n < kRows; ++n)
        if (n < active) {
          const uint2 pair = b[(n * steps + k) * kWarp + lane];
          rows[n][0] = pair.x, rows[n][1] = pair.y;
        }
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const uint4 four = a[(gate * steps + k) * kWarp + lane];
        const uint32_t units[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int n = 0; n < kRows; ++n)
          if (n < active) mma<kKind>(sum[first + gate][n], units, rows[n]);
      }
    }
  }
};

// fp32: each number as the sum of two of TF32's 11 bits, and three products; what is left is 2^-22 of a product. The tensor
// cores cut what they add, so their chains are short: kChain steps, then one rounded addition.
struct SingleProduct {
  using E = float;
  using V = float;
  static constexpr int kDepth = 8, kChain = 4;
  __device__ static E element(float value) { return value; }
  __device__ static int place(int u, int r) { return u / 8 * 64 + (r * 4 + u % 4) * 2 + u % 8 / 4; }

  template <int kCount>
  __device__ static void split(const uint32_t (&value)[kCount], uint32_t (&high)[kCount], uint32_t (&low)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      high[i] = float_to_tf32(__uint_as_float(value[i]));
      low[i] = float_to_tf32(__uint_as_float(value[i]) - __uint_as_float(high[i]));
    }
  }

  template <int kGates, int kRows, int kParts>
  __device__ static void multiply(V (&sum)[kParts][kRows][4], int first, const uint4* a, const uint2* b, int steps,
                                  int active) {
    const int lane = threadIdx.x % kWarp;
    for (int begin = 0; begin < steps; begin += kChain) {
      V chain[kGates][kRows][4] = {};
      const int end = min(begin + kChain, steps);
#pragma unroll 1
      for (int k = begin; k < end; ++k) {
        uint32_t high[kRows][2], low[kRows][2];
#pragma unroll
        for (int n = 0; n < kRows; ++n)
          if (n < active) {
            const uint2 pair = b[(n * steps + k) * kWarp + lane];
            const uint32_t rows[2] = {pair.x, pair.y};
            split(rows, high[n], low[n]);
          }
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          const uint4 four = a[(gate * steps + k) * kWarp + lane];
          const uint32_t units[4] = {four.x, four.y, four.z, four.w};
          uint32_t units_high[4], units_low[4];
          split(units, units_high, units_low);
#pragma unroll
          for (int n = 0; n < kRows; ++n)
            if (n < active) {
              mma<Mma::kTF32>(chain[gate][n], units_low, high[n]);
              mma<Mma::kTF32>(chain[gate][n], units_high, low[n]);
              mma<Mma::kTF32>(chain[gate][n], units_high, high[n]);
            }
        }
      }
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
#pragma unroll
        for (int n = 0; n < kRows; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[first + gate][n][e] += chain[gate][n][e];
    }
  }
};

struct DoubleProduct {
  using E = double;
  using V = double;
  static constexpr int kDepth = 4;
  __device__ static E element(double value) { return value; }
  __device__ static int place(int u, int r) { return u / 4 * 32 + r * 4 + u % 4; }

  template <int kGates, int kRows, int kParts>
  __device__ static void multiply(V (&sum)[kParts][kRows][4], int first, const uint4* a, const uint2* b, int steps,
                                  int active) {
    const int lane = threadIdx.x % kWarp;
    const auto* matrix = reinterpret_cast<const double2*>(a);
    const auto* states = reinterpret_cast<const double*>(b);
#pragma unroll 1
    for (int k = 0; k < steps; ++k)
#pragma unroll
      for (int n = 0; n < kRows; ++n)
        if (n < active) {
          const double row = states[(n * steps + k) * kWarp + lane];
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) {
            const double2 units = matrix[(gate * steps + k) * kWarp + lane];
            V(&d)[4] = sum[first + gate][n];
            double low[2] = {d[0], d[1]}, high[2] = {d[2], d[3]};
            mma_f64(low, units.x, row);
            mma_f64(high, units.y, row);
            d[0] = low[0], d[1] = low[1], d[2] = high[0], d[3] = high[1];
          }
        }
  }
};

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
  int64_t inputs;       // its first step in the inputs' layout
  int64_t ragged;
  __device__ int64_t time(int64_t t, bool reverse) const { return reverse ? length - 1 - t : t; }
};

// What a team's kernels have in common.
struct Team {
  const int64_t *cu_seqlens, *order;
  int64_t batch, padded_steps;
  int hidden, state, unit_tiles, state_tiles;  // H and P, and 16s of them
  int row_tiles;                               // of 8 rows
  int blocks;                                  // of the team: a cluster
  bool reverse, resident;                      // resident: the matrix and both operands are in shared memory
  char* workspace;
  int64_t workspace_bytes;  // of a block
  Slot places, barriers;

  __device__ char* at(Slot slot) const {
    return slot.shared ? dynamic_shared() + slot.offset : workspace + blockIdx.x * workspace_bytes + slot.offset;
  }
  __device__ int rank() const { return static_cast<int>(blockIdx.x) % blocks; }
  // Tiles of units that belong to this block.
  __device__ int first_tile() const { return min(rank() * ((unit_tiles + blocks - 1) / blocks), unit_tiles); }
  __device__ int last_tile() const { return min(first_tile() + (unit_tiles + blocks - 1) / blocks, unit_tiles); }
  __device__ RowPlace* rows() const { return reinterpret_cast<RowPlace*>(at(places)); }

  __device__ void find_rows() const {
    const int64_t first = static_cast<int64_t>(blockIdx.x) / blocks * row_tiles * kRowTile;
    for (int i = static_cast<int>(threadIdx.x); i < row_tiles * kRowTile; i += static_cast<int>(blockDim.x)) {
      RowPlace place{-1, 0, 0, 0};
      if (first + i < batch) {
        place.row = order[first + i];
        place.ragged = cu_seqlens[place.row];
        place.length = cu_seqlens[place.row + 1] - place.ragged;
        place.inputs = padded_steps > 0 ? place.row * padded_steps : place.ragged;
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

// Turns of an operand in two buffers: what is written in turn i is read in turn i + 1, by all blocks of the team.
//
// One block has __syncthreads(). In a cluster the writers send each chunk to the other blocks, which count its bytes, and every
// warp tells every block that it has written, and read the buffer that will be written next.
struct Turns {
  uint64_t* barriers;  // of the two buffers
  int blocks, rank;

  __device__ Turns(const Team& team)
      : barriers(reinterpret_cast<uint64_t*>(team.at(team.barriers))), blocks(team.blocks), rank(team.rank()) {}
  __device__ void init() const {
#if PYCM_SM90
    if (blocks > 1 && threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) mbarrier_init(&barriers[i], static_cast<uint32_t>(blocks * (blockDim.x / kWarp)));
      fence_mbarrier_init();
    }
#endif
  }
  // Until turn `turn` >= 1 can be read.
  __device__ void wait(int64_t turn) const {
#if PYCM_SM90
    if (blocks > 1) mbarrier_wait_cluster(&barriers[turn & 1], static_cast<uint32_t>((turn - 1) >> 1 & 1));
#endif
  }
  // A warp's own 128 elements, which it has written, to the buffer of turn `turn` of the others.
  template <class E>
  __device__ void send(E* chunk, int64_t turn) const {
#if PYCM_SM90
    auto* words = reinterpret_cast<uint64_t*>(chunk) + threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(E)) / 2; ++i)
      for (int to = 1; to < blocks; ++to) {
        const int other = rank + to < blocks ? rank + to : rank + to - blocks;
        store_async(&words[i * kWarp], words[i * kWarp], &barriers[turn & 1], static_cast<uint32_t>(other));
      }
#endif
  }
  // This warp has written its part of turn `turn`; `bytes` come from the other blocks.
  __device__ void done(int64_t turn, uint32_t bytes) const {
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
  __device__ void all() const {
#if PYCM_SM90
    if (blocks > 1) return cluster_sync();
#endif
    __syncthreads();
  }
};

// What a lane has of the tiles of 16 units and 8 rows that its warp multiplies.
template <class M, int kRows>
struct Lanes {
  const Team& team;
  const int lane, warp, warps, g, q, first, last;  // the block's tiles of units: first ... last - 1
  const RowPlace* rows;

  __device__ explicit Lanes(const Team& t)
      : team(t),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        warps(blockDim.x / kWarp),
        g(lane / 4),
        q(lane % 4),
        first(team.first_tile()),
        last(team.last_tile()),
        rows(team.rows()) {}

  // f(tile of rows, element of its sums, row, unit)
  template <class Function>
  __device__ __forceinline__ void each(int tile, int active, Function f) const {
#pragma unroll
    for (int n = 0; n < kRows; ++n)
      if (n < active)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(n, e, n * kRowTile + 2 * q + e % 2, tile * kUnitTile + g + e / 2 * 8);
  }
  // Where a number of this lane's own is kept between steps.
  __device__ int64_t slot(int local_tile, int n, int e) const {
    return ((int64_t{local_tile} * team.row_tiles + n) * kWarp + lane) * 4 + e;
  }
  // The element's place in an operand of `tiles` tiles along K.
  __device__ typename M::E& place(typename M::E* operand, int tiles, int n, int tile, int e) const {
    return operand[(int64_t{n} * tiles + tile) * 128 + M::place(g + e / 2 * 8, 2 * q + e % 2)];
  }
  template <int kGates, int kParts>
  __device__ __forceinline__ void product(typename M::V (&sum)[kParts][kRows][4], int from, const uint4* matrix,
                                          const typename M::E* operand, int tile, int tiles_of_k, int active) const {
    const int steps = tiles_of_k * kUnitTile / M::kDepth;
    M::template multiply<kGates>(sum, from, matrix + int64_t{tile} * kGates * steps * kWarp,
                                 reinterpret_cast<const uint2*>(operand), steps, active);
  }
  // The same where both operands are in shared memory if the team's are resident; `local` is the tile in the block.
  template <int kGates, int kParts>
  __device__ __forceinline__ void team_product(typename M::V (&sum)[kParts][kRows][4], int from, const uint4* matrix,
                                               Slot kept, Slot operand, int64_t operand_from, int tile, int tiles_of_k,
                                               int active) const {
    using E = typename M::E;
    if (team.resident)
      product<kGates>(sum, from, reinterpret_cast<const uint4*>(dynamic_shared() + kept.offset),
                      reinterpret_cast<const E*>(dynamic_shared() + operand.offset) + operand_from, tile - first,
                      tiles_of_k, active);
    else
      product<kGates>(sum, from, matrix, reinterpret_cast<const E*>(team.at(operand)) + operand_from, tile, tiles_of_k,
                      active);
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

// ---- the host's side ----

// A matrix in the order of mma's operand A: [tile of 16 rows][gate][block of K, padded to 16s][32 bytes of K][lane].
// Element (row, gate, block, k) is at row * row + gate * gate + block * block + k * k of the strides.
struct MatrixOrder {
  const void* from;
  void* to;
  DType dtype;
  int rows, gates, blocks, depth;  // depth: of a block
  int64_t row_stride, gate_stride, block_stride, depth_stride;

  __host__ __device__ int64_t steps(int elements) const {
    return int64_t{blocks} * ((depth + 15) / 16 * 16) / elements;
  }
  __host__ __device__ int64_t tiles() const { return (rows + kUnitTile - 1) / kUnitTile; }
  // 16 bytes each, `elements` of K in 32 bytes.
  __host__ __device__ int64_t fragments(int elements) const { return tiles() * gates * steps(elements) * kWarp; }
};

// `element` is what the kernels multiply: kFloat16, kBFloat16, kFloat32 or kFloat64.
void order_matrix(const MatrixOrder& order, DType element, void* stream);

// How a batch is divided.
struct TeamChoice {
  int blocks = 1, row_tiles = 1;
};

// The smallest team whose shared memory holds what `fits(blocks, row_tiles)` asks for; one block where none does. A projection
// wants both products' operands in one block.
template <class Fits>
TeamChoice choose_team(const RecurrenceShape& shape, int most_row_tiles, Fits fits) {
  const DeviceLimits& limits = device_limits();
  const int unit_tiles = static_cast<int>((shape.hidden + kUnitTile - 1) / kUnitTile);
  TeamChoice last;
  for (int blocks = 1; blocks <= (limits.sm90() && shape.weight_hr == nullptr ? kMaxTeam : 1); blocks *= 2) {
    const int tiles = (unit_tiles + blocks - 1) / blocks;
    if ((blocks - 1) * tiles >= unit_tiles) break;  // one would have none
    const int64_t teams = std::max(1, limits.multiprocessors / blocks), rows = (shape.batch + teams - 1) / teams;
    const int wanted = static_cast<int>(std::min<int64_t>(most_row_tiles, (rows + kRowTile - 1) / kRowTile));
    if (blocks == 1) last.row_tiles = wanted;
    for (int row_tiles = wanted; row_tiles >= 1; row_tiles = row_tiles > 1 ? 1 : 0)
      if (fits(blocks, row_tiles)) return {blocks, row_tiles};
  }
  return last;
}

inline Team team_of(const RecurrenceShape& shape, TeamChoice choice) {
  Team team{};
  team.cu_seqlens = shape.cu_seqlens;
  team.order = shape.order;
  team.batch = shape.batch;
  team.padded_steps = shape.padded_steps;
  team.hidden = static_cast<int>(shape.hidden);
  team.state = static_cast<int>(shape.state);
  team.unit_tiles = (team.hidden + kUnitTile - 1) / kUnitTile;
  team.state_tiles = (team.state + kUnitTile - 1) / kUnitTile;
  team.row_tiles = choice.row_tiles;
  team.blocks = choice.blocks;
  team.reverse = shape.reverse;
  return team;
}

inline int64_t blocks_of(const Team& team) {
  const int64_t rows = int64_t{team.row_tiles} * kRowTile;
  return (team.batch + rows - 1) / rows * team.blocks;
}

// One for each tile of a block, up to kMaxWarps.
inline int warps_of(const Team& team) {
  return std::min(kMaxWarps, (std::max(team.unit_tiles, team.state_tiles) + team.blocks - 1) / team.blocks);
}

inline Grid grid_of(const Team& team, int64_t shared_bytes, void* stream) {
  Grid grid;
  grid.grid = dim3(static_cast<unsigned>(blocks_of(team)));
  grid.block = dim3(static_cast<unsigned>(warps_of(team) * kWarp));
  grid.cluster = team.blocks;
  grid.shared_bytes = shared_bytes;
  grid.stream = stream;
  return grid;
}

// Calls f(product) for the product of the weights' type.
template <class F>
decltype(auto) visit_product(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16: return f(HalfProduct<Mma::kF16>{});
    case DType::kBFloat16: return f(HalfProduct<Mma::kBF16>{});
    case DType::kFloat64: return f(DoubleProduct{});
    case DType::kFloat32: break;
  }
  return f(SingleProduct{});
}

}  // namespace pycm::cuda
