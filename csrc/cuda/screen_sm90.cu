// The screen's product by wgmma (sm_90a): the same tiles and the same epilogue as screen.cu, fed by TMA.
//
//                 gallery, 256 positions a tile
//               +------------------------------+     warpgroup 1: queries 0-63    m64n256k16, 128 accumulators a thread
//   queries,    |        warpgroup 1           |     warpgroup 2: queries 64-127
//   128 a block |        warpgroup 2           |     warpgroup 0: one thread issues the copies
//               +------------------------------+
//
// Ring of 4 stages, each 64 of D: queries 16 KiB + gallery 32 KiB in the 128-byte swizzle, full/empty barriers; blocks stay and take
// tile after tile, so copies of the next tile run under the epilogue of this one, and one warpgroup's epilogue under the
// other's product. Two blocks of a cluster hold neighbouring query tiles and share the gallery's: each loads half of it for both.
// Operations: 2 N M D' on the tensor cores; the epilogue takes 2 to 3 of the D' / 16 issue slots a score that the product leaves.
// Bytes from the second-level cache: 32 KiB a block, tile and step of D (48 alone). Limits: 1 block an SM, 213 KiB of shared memory.
#include <algorithm>

#include "cuda/screen.cuh"

namespace pycm::cuda {
namespace {

constexpr int kStages = 4, kThreads = 384, kGroup = 8;
[[maybe_unused]] constexpr int kConsumerWarps = 8;
constexpr int kQueryBytes = kTileQueries * kCodeStep * 2, kGalleryBytes = kTileColumns * kCodeStep * 2;
constexpr int kStageBytes = kQueryBytes + kGalleryBytes;
// Constants of a tile's columns: in use until its epilogue ends, by when the producer may be kStages tiles ahead.
constexpr int kScaleBytes = kTileColumns * 8, kBiasBytes = kTileColumns * 4, kColumnBytes = kScaleBytes + kBiasBytes;
constexpr int kColumnTiles = kStages + 1;
constexpr int kSharedBytes = kStages * kStageBytes + kColumnTiles * kColumnBytes + 2 * kStages * 8;

// Tiles in groups of kGroup rows of blocks: clusters that run together share both operands in the cache.
struct Tile {
  int64_t row, column;
};
[[maybe_unused]] __device__ __forceinline__ Tile tile_of(int64_t t, int64_t rows, int64_t columns) {
  const int64_t group = t / (kGroup * columns), rest = t % (kGroup * columns);
  const int64_t height = rows - group * kGroup < kGroup ? rows - group * kGroup : kGroup;
  return {group * kGroup + rest % height, rest / height};
}

// rows: of clusters.
template <int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    screen_kernel_sm90(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap gallery,
                       Screen screen, int64_t rows, int64_t columns) {
#if PYCM_SM90
  char* const stages = dynamic_shared();
  char* const column_tiles = stages + kStages * kStageBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(column_tiles + kColumnTiles * kColumnBytes);
  uint64_t* const empty = full + kStages;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = lane_index();
  const uint32_t rank = kCluster == 1 ? 0 : cluster_rank();
  const int64_t first = blockIdx.x / kCluster, stride = gridDim.x / kCluster, tiles = rows * columns;
  const int64_t steps = screen.dim / kCodeStep;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], kCluster * kConsumerWarps);
    }
    fence_mbarrier_init();
  }
  if constexpr (kCluster == 1) __syncthreads();
  else cluster_sync();

  if (warp < 4) {
    setmaxnreg_dec<40>();
    if (warp == 0 && elect_one()) {
      int64_t step = 0, turn = 0;
      for (int64_t t = first; t < tiles; t += stride, ++turn) {
        const Tile tile = tile_of(t, rows, columns);
        const int query = static_cast<int>((tile.row * kCluster + rank) * kTileQueries);
        const int column = static_cast<int>(tile.column * kTileColumns);
        for (int64_t d = 0; d < steps; ++d, ++step) {
          const int s = static_cast<int>(step % kStages);
          char* const stage = stages + s * kStageBytes;
          if (step >= kStages) {
            if constexpr (kCluster == 1) mbarrier_wait(&empty[s], (step / kStages - 1) & 1);
            else mbarrier_wait_cluster(&empty[s], (step / kStages - 1) & 1);
          }
          mbarrier_arrive_expect_tx(&full[s], kStageBytes + (d == 0 ? kColumnBytes : 0));
          const int x = static_cast<int>(d) * kCodeStep;
          tma_load_2d(stage, &queries, &full[s], x, query);
          const int y = static_cast<int>(d * (screen.stride / kCodeStep)) + column;
          if constexpr (kCluster == 1) {
            tma_load_2d(stage + kQueryBytes, &gallery, &full[s], 0, y);
          } else {
            const int part = static_cast<int>(rank) * (kTileColumns / kCluster);
            tma_load_2d_multicast(stage + kQueryBytes + part * kCodeStep * 2, &gallery, &full[s], 0, y + part,
                                  (1 << kCluster) - 1);
          }
          if (d == 0) {
            char* const to = column_tiles + turn % kColumnTiles * kColumnBytes;
            bulk_load(to, screen.column.scale_error + column, kScaleBytes, &full[s]);
            bulk_load(to + kScaleBytes, screen.column.bias + column, kBiasBytes, &full[s]);
          }
        }
      }
    }
    __syncwarp();
  } else {
    setmaxnreg_inc<232>();
    const int warpgroup = warp / 4 - 1;
    // Lane r says to block r of the cluster that this warp has done with stage s.
    const auto release = [&](int64_t step) {
      uint64_t* const barrier = &empty[step % kStages];
      if (lane >= kCluster) return;
      if constexpr (kCluster == 1) mbarrier_arrive(barrier);
      else mbarrier_arrive_cluster(barrier, static_cast<uint32_t>(lane));
    };
    int64_t step = 0, turn = 0;
    for (int64_t t = first; t < tiles; t += stride, ++turn) {
      const Tile tile = tile_of(t, rows, columns);
      const int64_t row = (tile.row * kCluster + rank) * kTileQueries + warpgroup * 64 + warp % 4 * 16 + lane / 4;
      float cut[2] = {NAN, NAN}, factor[2] = {0, 0};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + r * 8 >= screen.query_rows) continue;
        cut[r] = screen.state[row + r * 8].cut;
        factor[r] = screen.state[row + r * 8].factor;
      }
      float sums[128];
      for (int64_t d = 0; d < steps; ++d, ++step) {
        const int s = static_cast<int>(step % kStages);
        const char* const stage = stages + s * kStageBytes;
        mbarrier_wait(&full[s], step / kStages & 1);
        const uint64_t a = wgmma_descriptor(stage + warpgroup * (kQueryBytes / 2));
        const uint64_t b = wgmma_descriptor(stage + kQueryBytes);
        wgmma_pin(sums);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kCodeStep / 16; ++k)  // descriptors count in 16 bytes
          wgmma<Mma::kF16, kTileColumns>(sums, a + k * 2, b + k * 2, d != 0 || k != 0);
        wgmma_commit();
        if (d != 0) {
          wgmma_wait<1>();
          release(step - 1);
        }
      }
      wgmma_wait<0>();
      wgmma_pin(sums);
      release(step - 1);
      char* const constants = column_tiles + turn % kColumnTiles * kColumnBytes;
      append_hits<2, 64>(
          screen, [&](int r) { return row + r * 8; }, cut, factor,
          {reinterpret_cast<float2*>(constants), reinterpret_cast<float*>(constants + kScaleBytes)},
          tile.column * kTileColumns, [&](int r, int b) { return sums[b / 2 * 4 + r * 2 + b % 2]; });
    }
  }
  if constexpr (kCluster != 1) cluster_sync();  // others may still write here, and arrive
#endif
}

template <int kCluster>
void launch_clusters(const Screen& screen, const char* name, void* stream) {
  const int64_t query_rows = round_up(screen.query_rows, kTileQueries),
                columns = round_up(screen.columns, kTileColumns);
  const int64_t row_tiles = query_rows / kTileQueries, rows = (row_tiles + kCluster - 1) / kCluster;
  const int64_t tiles = rows * (columns / kTileColumns), row_bytes = screen.dim * 2;
  const int64_t clusters = std::min<int64_t>(tiles, std::max(1, device_limits().multiprocessors / kCluster));
  const TensorMap queries = make_tensor_map_2d(screen.queries, TensorElement::kFloat16, screen.dim, query_rows,
                                               row_bytes, kCodeStep, kTileQueries);
  // Below 2^31 lines, which are 256 GiB.
  const int64_t lines = (screen.dim / kCodeStep - 1) * (screen.stride / kCodeStep) + columns;
  const TensorMap gallery = make_tensor_map_2d(screen.gallery, TensorElement::kFloat16, kCodeStep, lines, kCodeStep * 2,
                                               kCodeStep, kTileColumns / kCluster);
  launch(screen_kernel_sm90<kCluster>,
         {dim3(static_cast<unsigned>(clusters * kCluster)), dim3(kThreads), kCluster, kSharedBytes, stream}, name,
         queries, gallery, screen, rows, columns / kTileColumns);
}

}  // namespace

void launch_screen_sm90(const Screen& screen, const char* name, void* stream) {
  if (screen.query_rows <= kTileQueries) launch_clusters<1>(screen, name, stream);
  else launch_clusters<2>(screen, name, stream);
}

}  // namespace pycm::cuda
