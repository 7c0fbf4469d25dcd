// similarity in fp64, out[b, i, j] = metric(x[b, i], y[b, j]): of fp64 rows, and of others so short that two fp16 parts an
// element would not do (similarity.cu): then the output is what bounds it.
//
//   64 rows of x [64 x 16]   64 rows of y [64 x 16]    a stage in shared memory, element - shift, two stages
//        |                        |
//        +---- mma.m8n8k4 --------+    64 x 64 sums in registers: 4 warps of 32 x 32; every 16 products start from zero
//
// Operations: 2 N M D on the fp64 tensor cores (sm_80: 19.5, H100: 67 TFLOP/s at best). Bytes: 8 N M D / 64 per side through
// L2, scores once. Bound by the operations from D = 64 on. Speed: not yet measured. Limits: as similarity.cu.
#include "cuda/similarity_store.cuh"

namespace pycm::cuda {
namespace {

constexpr int kTile = 64, kDepth = 16, kThreads = 128;
constexpr int kPitch = kDepth + 4;  // of a row of the stage: a half-warp's 4 x 4 elements meet no bank twice
constexpr int kTiles = 4;           // 8 x 8 tiles of a warp in each direction
constexpr int kPasses = kTile * kDepth / kThreads;
constexpr int kStage = 2 * kTile * kPitch;  // elements
constexpr int kInfoBytes = 2 * kTile * static_cast<int>(sizeof(RowInfo<double>));
constexpr int kSharedBytes = 2 * kStage * 8 + kInfoBytes + static_cast<int>(sizeof(TilePlace));

// One side's part of a stage on its way through this thread's registers: element d of rows r, r + 8, ...
struct Elements {
  double value[kPasses];

  __device__ __forceinline__ void read(const SimilarityProblem& p, const Operand& side, const char* matrix,
                                       int64_t first, int count, int64_t begin) {
    const int64_t d = begin + threadIdx.x % kDepth;
    const int64_t offset = first * side.row_stride + d * side.dim_stride;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int r = i * (kThreads / kDepth) + static_cast<int>(threadIdx.x) / kDepth;
      value[i] = r < count && d < p.dim ? load_double(p.dtype, matrix, offset + r * side.row_stride) : 0;
    }
  }

  __device__ __forceinline__ void store(int count, double moved, bool present, const RowInfo<double>* info,
                                        double* stage) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int r = i * (kThreads / kDepth) + static_cast<int>(threadIdx.x) / kDepth;
      stage[r * kPitch + threadIdx.x % kDepth] = r < count && present ? value[i] - info[r].shift - moved : 0;
    }
  }
};

__device__ __forceinline__ void multiply(const double* x, const double* y, double (&sums)[kTiles][kTiles][2]) {
  const int row = lane_index() / 4, column = lane_index() % 4;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    double a[kDepth / 4];
#pragma unroll
    for (int k = 0; k < kDepth / 4; ++k) a[k] = x[(i * 8 + row) * kPitch + k * 4 + column];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      double part[2] = {};
#pragma unroll
      for (int k = 0; k < kDepth / 4; ++k) mma_f64(part, a[k], y[(j * 8 + row) * kPitch + k * 4 + column]);
      sums[i][j][0] += part[0];
      sums[i][j][1] += part[1];
    }
  }
}

template <class Out>
__global__ void __launch_bounds__(kThreads, 2) similarity_f64_tiles(const __grid_constant__ SimilarityProblem p) {
  double* stages = reinterpret_cast<double*>(dynamic_shared());
  RowInfo<double>* info = reinterpret_cast<RowInfo<double>*>(stages + 2 * kStage);
  TilePlace& at = *reinterpret_cast<TilePlace*>(info + 2 * kTile);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, row = warp / 2 * 32, column = warp % 2 * 32;
  const int64_t steps = (p.dim + kDepth - 1) / kDepth;
  for (int64_t tile = blockIdx.x; tile < tile_count<kTile, kTile>(p); tile = at.number + gridDim.x) {
    begin_tile<double, kTile, kTile, true>(p, tile, at, info);

    Elements x, y;
    double moved = 0;
    bool present = false;
    const auto read = [&](int64_t step) {
      const int64_t d = step * kDepth + threadIdx.x % kDepth;
      present = d < p.dim;
      moved = p.metric.distance && present ? static_cast<const double*>(p.origins)[at.origin + d] : 0;
      x.read(p, p.x, at.x, at.row, at.rows, step * kDepth);
      y.read(p, p.y, at.y, at.column, at.columns, step * kDepth);
    };
    const auto store = [&](int64_t step) {
      double* stage = stages + step % 2 * kStage;
      x.store(at.rows, moved, present, info, stage);
      y.store(at.columns, moved, present, info + kTile, stage + kTile * kPitch);
    };
    double sums[kTiles][kTiles][2] = {};
    read(0);
    store(0);
    __syncthreads();
    for (int64_t step = 0; step < steps; ++step) {
      const bool more = step + 1 < steps;
      if (more) read(step + 1);
      const double* stage = stages + step % 2 * kStage;
      multiply(stage + row * kPitch, stage + (kTile + column) * kPitch, sums);
      if (more) store(step + 1);
      __syncthreads();
      if constexpr (sizeof(Out) == sizeof(double)) {  // rows that become fp32 scores are short
        if (p.dim > kRun && (!more || (step + 1) % (kRun / kDepth) == 0))
          carry_sums<8>(p, at, row, column, step < kRun / kDepth, !more, sums);
      }
    }
    store_scores<8, false, Out>(p, at, info, info + kTile, row, column, sums);
  }
}

}  // namespace

void similarity_f64(const SimilarityProblem& problem, void* stream) {
  const Grid grid{similarity_blocks(tile_count<kTile, kTile>(problem)), kThreads, 1, kSharedBytes, stream};
  const auto kernel = problem.dtype == DType::kFloat64 ? similarity_f64_tiles<double> : similarity_f64_tiles<float>;
  launch(kernel, grid, "similarity: fp64 tiles", problem);
}

}  // namespace pycm::cuda
