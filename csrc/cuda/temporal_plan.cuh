// The host's side of the recurrence and its reverse: how a batch is divided among teams, what each has in memory, the launch.
#pragma once

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/temporal_recurrence.cuh"
#include "ops/temporal_recurrence.h"

namespace pycm::cuda {

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
  bool grid = false;  // no cluster
};

// The smallest team whose shared memory holds what `fits(choice)` asks for: a cluster, else a part of the grid; one block where
// none does. Rather a larger team than more groups of rows than can run at once. A projection wants both products' operands in
// one block.
template <class Fits>
TeamChoice choose_team(const RecurrenceShape& shape, Fits fits) {
  const DeviceLimits& limits = device_limits();
  const int unit_tiles = static_cast<int>((shape.hidden + kUnitTile - 1) / kUnitTile);
  const auto wanted = [&](int blocks) {
    const int64_t teams = std::max(1, limits.multiprocessors / blocks), rows = (shape.batch + teams - 1) / teams;
    return static_cast<int>(std::min<int64_t>(kMaxRowTiles, (rows + kRowTile - 1) / kRowTile));
  };
  for (const bool grid : {false, true})
    for (const bool all_rows : {true, false}) {
      const int most = shape.weight_hr != nullptr ? 1 : grid ? limits.multiprocessors : limits.sm90() ? kMaxTeam : 1;
      // By the tiles of a block: every block has some.
      for (int tiles = unit_tiles, blocks = 0; tiles >= 1; --tiles) {
        if ((unit_tiles + tiles - 1) / tiles == blocks) continue;
        blocks = (unit_tiles + tiles - 1) / tiles;
        if (blocks > most) break;
        if (grid && blocks == 1) continue;
        for (int row_tiles = wanted(blocks); row_tiles >= (all_rows ? wanted(blocks) : 1); --row_tiles)
          if (fits(TeamChoice{blocks, row_tiles, grid})) return {blocks, row_tiles, grid};
      }
    }
  return {1, wanted(1), false};
}

inline Team team_of(const RecurrenceShape& shape, TeamChoice choice) {
  Team team{};
  team.cu_seqlens = shape.cu_seqlens;
  team.order = shape.order;
  team.step_starts = shape.step_starts;
  team.bounds = shape.bounds;
  team.batch = shape.batch;
  team.padded_steps = shape.padded_steps;
  team.hidden = static_cast<int>(shape.hidden);
  team.state = static_cast<int>(shape.state);
  team.unit_tiles = (team.hidden + kUnitTile - 1) / kUnitTile;
  team.state_tiles = (team.state + kUnitTile - 1) / kUnitTile;
  team.row_tiles = choice.row_tiles;
  team.blocks = choice.blocks;
  team.grid = choice.grid;
  team.reverse = shape.reverse;
  return team;
}

inline int64_t teams_of(const Team& team) {
  const int64_t rows = int64_t{team.row_tiles} * kRowTile, groups = (team.batch + rows - 1) / rows;
  return team.grid ? std::min<int64_t>(groups, device_limits().multiprocessors / team.blocks) : groups;
}
inline int64_t blocks_of(const Team& team) { return teams_of(team) * team.blocks; }

// What the team has in global memory; with a stream, made ready for a launch.
inline void take_workspace(Team& team, Workspace& workspace, const CudaContext* context) {
  team.workspace = workspace.take<char>(blocks_of(team) * team.workspace_bytes);
  if (!team.grid) return;
  team.exchange = workspace.take<char>(teams_of(team) * 2 * team.exchange_bytes);
  team.arrivals = workspace.take<unsigned long long>(teams_of(team));
  if (context != nullptr)
    memset_async(team.arrivals, 0, teams_of(team) * static_cast<int64_t>(sizeof *team.arrivals), context->stream,
                 "temporal_pool: arrivals");
}

// A warp for each gate and tile of a block, up to `most_warps`.
inline Grid grid_of(const Team& team, int gates, int most_warps, int64_t shared_bytes) {
  const int tiles = (std::max(team.unit_tiles, team.state_tiles) + team.blocks - 1) / team.blocks;
  Grid grid;
  grid.grid = dim3(static_cast<unsigned>(blocks_of(team)));
  grid.block = dim3(static_cast<unsigned>(std::min(most_warps, tiles * gates) * kWarp));
  grid.cluster = team.grid ? 1 : team.blocks;
  grid.cooperative = team.grid;
  grid.shared_bytes = shared_bytes;
  return grid;
}

// A kernel's parameters, the matrices it wants in order, and its launch.
template <class Parameters>
struct Plan {
  Parameters parameters{};
  MatrixOrder matrix{}, projection{};
  Grid grid;
};

// Of the plans `plan_for(choice)` the one whose team is best: lays out its workspace, and with a context runs.
template <class M, class Parameters, class PlanFor>
int64_t run_recurrence(const RecurrenceShape& shape, const CudaContext* context, void (*kernel)(Parameters),
                       const char* name, PlanFor plan_for) {
  const auto fits = [&](TeamChoice choice) {
    const Plan<Parameters> plan = plan_for(choice);
    return plan.parameters.team.resident &&
           (choice.grid || portable_cluster(choice.blocks) || cluster_fits(kernel, plan.grid));
  };
  Plan<Parameters> plan = plan_for(choose_team(shape, fits));
  Parameters& p = plan.parameters;
  Workspace workspace(context == nullptr ? nullptr : context->workspace);
  plan.matrix.to = workspace.take<uint4>(plan.matrix.fragments(M::kDepth));
  if (shape.weight_hr != nullptr) plan.projection.to = workspace.take<uint4>(plan.projection.fragments(M::kDepth));
  take_workspace(p.team, workspace, context);
  if (context == nullptr) return workspace.used();
  p.matrix.fragments = static_cast<const uint4*>(plan.matrix.to);
  p.projection.fragments = static_cast<const uint4*>(plan.projection.to);
  order_matrix(plan.matrix, shape.dtype, context->stream);
  if (plan.projection.to != nullptr) order_matrix(plan.projection, shape.dtype, context->stream);
  plan.grid.stream = context->stream;
  launch(kernel, plan.grid, name, p);
  return 0;
}

// f(cell, product) of the shape's cell and of its weights' type; 0 for an empty batch.
template <class F>
int64_t visit_recurrence(const RecurrenceShape& shape, F f) {
  if (shape.batch == 0) return 0;
  return visit(shape.cell,
               [&](auto cell) { return visit_product(shape.dtype, [&](auto product) { return f(cell, product); }); });
}

}  // namespace pycm::cuda
