// maxsim, the row maxima on Hopper: best[m][r] = max over the vectors g of item m of q_r . g (sm_80: maxsim_tile.cu).
//
//   producer warp: lane l loads group l of a tile, 8 gallery vectors, 128 bytes of each by TMA (1 KB, one swizzle atom)
//        |         a stage is 256 vectors x 128 bytes; a tile is dim / 64 stages
//        v
//   2 consumer warpgroups, 64 query vectors each, resident in shared memory for the whole run of items:
//                  64 x 256 sums in 128 registers by wgmma, then the running maximum of a thread's two rows, which is
//                  written where an item ends
//
// While one warpgroup takes its maxima (64 x 256 at 64 a clock: 256 clocks) the other multiplies (dim / 16 * 128 clocks).
// An item starts at a group, so its last group may hold vectors of the next one, or padding: columns not looked at.
// Queries of more than 1024 bytes do not stay in shared memory: a stage then holds 128 bytes of theirs too, by TMA.
// Operations: 2 R G D. Bytes: the inputs once from memory, (R / 128) G D elements through L2, 4 R M written.
// Limits: fp16 and bf16, rows of 16-byte multiples; for such long queries no gaps between padded items.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/maxsim_product.cuh"
#include "cuda/maxsim_tile.h"

namespace pycm::cuda {
namespace {

constexpr int kTile = 256;                   // gallery vectors
constexpr int kTileGroups = kTile / kGroup;  // one per lane of the producer
constexpr int kStageBytes = kTile * kLine;
constexpr int kQueryBytes = kRows * kLine;  // of one line
constexpr int kMaxStages = 6, kMinStages = 2;
constexpr int kRing = kMaxStages + 1;  // tiles described at once: those in flight and the one being looked at
constexpr int kConsumers = 2, kBlock = 128 * (1 + kConsumers);
constexpr int64_t kMaxLines = 8;

struct Shared {  // behind the stages and the queries
  uint64_t full[kMaxStages], empty[kMaxStages];
  int64_t query_offset[kRows];
  Group groups[kRing][kTileGroups];
  float scale[kRing][kTile];
  GroupIndex index;
};

struct Sm90 {
  MaxSimTile tile;
  int stages, lines;
  bool resident;  // the queries stay; otherwise a stage holds their line too
  int stage_bytes;
};

#if PYCM_SM90
struct Position {  // in the ring of stages
  int stage = 0, phase = 0;

  __device__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Lane l looks up group l of each tile and loads it, line by line.
__device__ __forceinline__ void produce(const Sm90& args, const TensorMap& gallery_map, const TensorMap& query_map,
                                        char* stages, Shared& shared, int items, int tiles, int64_t first_row,
                                        int64_t first_item) {
  const int lane = threadIdx.x % kWarp;
  const VectorSets& gallery = args.tile.gallery;
  Position at;
  for (int tile = 0; tile < tiles; ++tile) {
    const Group group = find_group(shared.index, items, tile * kTileGroups + lane);
    const bool ragged = gallery.offsets != nullptr;
    const int64_t position = group.item < 0 ? 0 : shared.index.position[group.item];
    // A group behind the end lies out of bounds: it reads as zeros.
    const int y = static_cast<int>(group.item < 0 ? gallery.total : ragged ? position + group.token : group.token);
    const int z = ragged || group.item < 0 ? 0 : static_cast<int>(first_item + group.item);
    for (int line = 0; line < args.lines; ++line, at.next(args.stages)) {
      mbarrier_wait(&shared.empty[at.stage], at.phase ^ 1);
      if (line == 0) {
        shared.groups[tile % kRing][lane] = group;
        for (int i = 0; i < kGroup && args.tile.gallery_scale != nullptr; ++i)
          shared.scale[tile % kRing][lane * kGroup + i] =
              i < group.valid ? args.tile.gallery_scale[position + group.token + i] : 0.f;
      }
      __syncwarp();
      char* const stage = stages + at.stage * args.stage_bytes;
      if (lane == 0) mbarrier_arrive_expect_tx(&shared.full[at.stage], args.stage_bytes);
      __syncwarp();
      const int x = line * kLine / 2;
      tma_load_3d(stage + lane * kGroup * kLine, &gallery_map, &shared.full[at.stage], x, y, z);
      if (!args.resident && lane < kRows / kGroup)
        tma_load_2d(stage + kStageBytes + lane * kGroup * kLine, &query_map, &shared.full[at.stage], x,
                    static_cast<int>(first_row + lane * kGroup));
    }
  }
}

template <Mma M, bool kArg>
__device__ __forceinline__ void consume(const Sm90& args, const char* stages, const char* queries, Shared& shared,
                                        int tiles, int64_t first_row, int64_t run) {
  const int group_of_warps = threadIdx.x / 128 - 1, lane = threadIdx.x % kWarp;
  const int64_t row = first_row + group_of_warps * 64 + threadIdx.x % 128 / kWarp * 16 + lane / 4;
  const bool scaled = args.tile.gallery_scale != nullptr;
  RowMax<2, kArg> best;
  best.reset();
  float sum[kTile / 2];
  Position at;
  for (int tile = 0; tile < tiles; ++tile) {
    int before = 0;
    for (int line = 0; line < args.lines; ++line) {
      mbarrier_wait(&shared.full[at.stage], at.phase);
      const char* b = stages + at.stage * args.stage_bytes;
      const char* a = (args.resident ? queries + line * kQueryBytes : b + kStageBytes) + group_of_warps * 64 * kLine;
      wgmma_pin(sum);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step)
        wgmma<M, kTile>(sum, wgmma_descriptor(a + step * 32), wgmma_descriptor(b + step * 32), line + step > 0);
      wgmma_commit();
      wgmma_pin(sum);
      if (line > 0) {
        wgmma_wait<1>();
        if (lane == 0) mbarrier_arrive(&shared.empty[before]);
      }
      before = at.stage;
      at.next(args.stages);
    }
    wgmma_wait<0>();
    wgmma_pin(sum);
    if (lane == 0) mbarrier_arrive(&shared.empty[before]);

    const Group* groups = shared.groups[tile % kRing];
    const float* scales = shared.scale[tile % kRing];
#pragma unroll
    for (int j = 0; j < kTileGroups; ++j) {
      const Group group = groups[j];
      const int column = lane % 4 * 2;
      if (group.valid == kGroup && !scaled) {
#pragma unroll
        for (int i = 0; i < 4; ++i) best.add(i / 2, sum[4 * j + i], group.token + column + i % 2);
      } else {
        const float scale[2] = {scaled ? scales[j * kGroup + column] : 1.f,
                                scaled ? scales[j * kGroup + column + 1] : 1.f};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          best.add(i / 2, column + i % 2 < group.valid ? sum[4 * j + i] * scale[i % 2] : -INFINITY,
                   group.token + column + i % 2);
      }
      if (group.last) best.flush(args.tile.out, run + group.item, row);
    }
  }
}
#endif

template <Mma M, bool kArg>
__global__ void __launch_bounds__(kBlock, 1) maxsim_sm90(const Sm90 args, const __grid_constant__ TensorMap gallery_map,
                                                         const __grid_constant__ TensorMap query_map) {
#if PYCM_SM90
  const MaxSimTile& tile = args.tile;
  char* const stages = dynamic_shared();
  char* const queries = stages + args.stages * args.stage_bytes;
  Shared& shared = *reinterpret_cast<Shared*>(queries + (args.resident ? args.lines * kQueryBytes : 0));
  const int64_t row_tiles = (tile.queries.total + kRows - 1) / kRows;
  const int64_t first_row = blockIdx.x % row_tiles * kRows;
  const int64_t run = blockIdx.x / row_tiles * tile.items_per_block;
  const int items = static_cast<int>(tile.items - run < tile.items_per_block ? tile.items - run : tile.items_per_block);
  if (!has_rows(tile.queries, first_row, first_row + kRows)) return;
  if (threadIdx.x == 0) {
    for (int i = 0; i < args.stages; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kConsumers * 4);  // a warp waits for its own part of a wgmma
    }
    fence_mbarrier_init();
  }
  if (threadIdx.x < kRows) shared.query_offset[threadIdx.x] = vector_offset(tile.queries, first_row + threadIdx.x);
  index_run(shared.index, tile.gallery, tile.first_item + run, items);
  if (args.resident) {
    for (int line = 0; line < args.lines; ++line)
      load_line<M>(queries + line * kQueryBytes, tile.queries, tile.queries_aligned, shared.query_offset, line);
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();  // wgmma reads them
  }
  __syncthreads();
  const int tiles = (shared.index.start[items] + kTileGroups - 1) / kTileGroups;
  if (threadIdx.x < 128) {
    setmaxnreg_dec<40>();
    if (threadIdx.x < kWarp)
      produce(args, gallery_map, query_map, stages, shared, items, tiles, first_row, tile.first_item + run);
  } else {
    setmaxnreg_inc<232>();
    consume<M, kArg>(args, stages, queries, shared, tiles, first_row, run);
  }
#endif
}

int64_t shared_bytes(const Sm90& args) {
  return int64_t{args.stages} * args.stage_bytes + (args.resident ? int64_t{args.lines} * kQueryBytes : 0) +
         static_cast<int64_t>(sizeof(Shared));
}

// Rows at one distance, so that a position is a coordinate.
bool flat(const VectorSets& sets) { return sets.ragged() || sets.item_stride == sets.max_length * sets.row_stride; }

bool fits(const VectorSets& sets, bool aligned) {
  constexpr int64_t kLimit = int64_t{1} << 31;  // coordinates of TMA
  return aligned && sets.total > 0 && sets.total < kLimit && sets.items < kLimit && sets.row_stride > 0 &&
         (sets.ragged() || sets.item_stride > 0);
}

template <Mma M>
void launch_sm90(const Sm90& args, const TensorMap& gallery, const TensorMap& queries, const Grid& grid) {
  if (args.tile.out.arg != nullptr) launch(maxsim_sm90<M, true>, grid, "maxsim: sm90", args, gallery, queries);
  else launch(maxsim_sm90<M, false>, grid, "maxsim: sm90", args, gallery, queries);
}

}  // namespace

bool maxsim_tile_sm90_fits(const MaxSimTile& args) {
  if (!device_limits().sm90()) return false;
  if (args.queries.dtype != DType::kFloat16 && args.queries.dtype != DType::kBFloat16) return false;
  const bool resident = args.queries.dim * 2 <= kMaxLines * kLine;
  return fits(args.gallery, args.gallery_aligned) &&
         (resident || (fits(args.queries, args.queries_aligned) && flat(args.queries)));
}

void maxsim_tile_sm90(const MaxSimTile& tile, void* stream) {
  const VectorSets &gallery = tile.gallery, &queries = tile.queries;
  const int lines = static_cast<int>((gallery.dim * 2 + kLine - 1) / kLine);
  const bool resident = lines <= kMaxLines;
  Sm90 args{tile, kMaxStages, lines, resident, kStageBytes + (resident ? 0 : kQueryBytes)};
  while (args.stages > kMinStages && shared_bytes(args) > device_limits().shared_bytes) --args.stages;
  const bool bf16 = gallery.dtype == DType::kBFloat16;
  const TensorElement element = bf16 ? TensorElement::kBFloat16 : TensorElement::kFloat16;
  const int64_t rows = gallery.ragged() ? gallery.total : gallery.max_length;
  const int64_t planes = gallery.ragged() ? 1 : gallery.items;
  const int64_t plane_bytes = (gallery.ragged() ? rows * gallery.row_stride : gallery.item_stride) * 2;
  const TensorMap gallery_map = make_tensor_map_3d(gallery.data, element, gallery.dim, rows, planes,
                                                   gallery.row_stride * 2, plane_bytes, kLine / 2, kGroup, 1);
  const TensorMap query_map = resident ? gallery_map  // not used
                                       : make_tensor_map_2d(queries.data, element, queries.dim, queries.total,
                                                            queries.row_stride * 2, kLine / 2, kGroup);
  // Six blocks to a multiprocessor, one after another, but none of less than 8 tiles or more than 64.
  const int64_t row_tiles = (queries.total + kRows - 1) / kRows;
  const int64_t length = std::max<int64_t>(kGroup, gallery.total / gallery.items);
  const int64_t tiles = (tile.items * length + kTile - 1) / kTile * row_tiles;
  const int64_t each = std::clamp<int64_t>(tiles / (6 * int64_t{device_limits().multiprocessors}), 8, 64);
  args.tile.items_per_block = static_cast<int>(std::clamp<int64_t>(each * kTile / length, 1, kRunItems));
  const int64_t blocks = row_tiles * ((tile.items + args.tile.items_per_block - 1) / args.tile.items_per_block);
  const Grid grid{dim3(static_cast<unsigned>(blocks)), dim3(kBlock), 1, shared_bytes(args), stream};
  if (bf16) launch_sm90<Mma::kBF16>(args, gallery_map, query_map, grid);
  else launch_sm90<Mma::kF16>(args, gallery_map, query_map, grid);
}

}  // namespace pycm::cuda
