// maxsim, the row maxima by mma.sync: best[m][r] = max over the vectors g of item m of q_r . g for query vectors q_r.
//
//              run of items: groups of 8 vectors, each item from a group of its own
//                 | item 0        | item 1 | item 2              |
//      128 query  +---------------+--------+---------------------+
//      vectors    |  128 x 128 tile   ->   |   128 x 128 tile    |    a warp owns 32 rows and all columns: the running
//      of a block |  (16 groups)           |   (16 groups)       |    maximum of a row stays in its quad's registers
//                 +------------------------+---------------------+    and is written where an item ends
//
// Operations: 2 R G D for R query and G gallery vectors (6 R G D for fp32: three TF32 products of values split in two).
// Bytes: the inputs once from memory, (R / 128) G D elements through L2, 4 R M written. Token scores are never written.
// Limits: dim of any size; an item of at most 2^31 - 1 vectors; fp16, bf16, fp32.
#include "cuda/launch.h"
#include "cuda/maxsim_product.cuh"
#include "cuda/maxsim_tile.h"

namespace pycm::cuda {
namespace {

constexpr int kRing = 3;  // tiles described at once: in use, being loaded, to be loaded

struct Shared {
  ProductStages stages;
  int64_t query_offset[kRows];
  int64_t offset[kRing][kColumns];  // of the tile's vectors, in elements; -1 for none
  float scale[kRing][kColumns];
  Group groups[kRing][kGroups];
  GroupIndex index;
};

template <Mma M, bool kArg>
__global__ void __launch_bounds__(kThreads, 2) maxsim_tile(const MaxSimTile args) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  constexpr int kBytes = kMmaBytes<M>;
  const int lane = threadIdx.x % kWarp;
  const int64_t row_tiles = (args.queries.total + kRows - 1) / kRows;
  const int64_t first_row = blockIdx.x % row_tiles * kRows;
  const int64_t run = blockIdx.x / row_tiles * args.items_per_block;  // neighbours share it through L2
  const int items = static_cast<int>(args.items - run < args.items_per_block ? args.items - run : args.items_per_block);
  if (!has_rows(args.queries, first_row, first_row + kRows)) return;
  shared.query_offset[threadIdx.x] = vector_offset(args.queries, first_row + threadIdx.x);
  index_run(shared.index, args.gallery, args.first_item + run, items);
  const int tiles = (shared.index.start[items] + kGroups - 1) / kGroups;
  const int lines = static_cast<int>((args.queries.dim * kBytes + kLine - 1) / kLine);
  const int64_t chunks = static_cast<int64_t>(tiles) * lines;

  auto describe = [&](int tile) {  // thread t: column t
    const int column = threadIdx.x, at = tile % kRing;
    const Group group = find_group(shared.index, items, tile * kGroups + column / kGroup);
    const bool valid = column % kGroup < group.valid;
    const int token = group.token + column % kGroup;
    if (column % kGroup == 0) shared.groups[at][column / kGroup] = group;
    shared.offset[at][column] = valid ? shared.index.first[group.item] + token * args.gallery.row_stride : -1;
    shared.scale[at][column] =
        valid && args.gallery_scale != nullptr ? args.gallery_scale[shared.index.position[group.item] + token] : 1.f;
  };
  auto load = [&](int64_t chunk) {
    const int tile = static_cast<int>(chunk / lines), line = static_cast<int>(chunk % lines), stage = chunk % kStages;
    if (line == 0) describe(tile + 1);  // read after the next barrier
    load_line<M>(shared.stages.rows[stage], args.queries, args.queries_aligned, shared.query_offset, line);
    load_line<M>(shared.stages.columns[stage], args.gallery, args.gallery_aligned, shared.offset[tile % kRing], line);
  };

  float sum[2][kGroups][4];
  RowMax<4, kArg> best;
  best.reset();
  describe(0);
  __syncthreads();
  load(0);
  cp_async_commit();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<0>();
    __syncthreads();  // this chunk has come, and everyone is done with the one before
    if (chunk + 1 < chunks) load(chunk + 1);
    cp_async_commit();
    const int line = static_cast<int>(chunk % lines), stage = chunk % kStages;
    multiply_line<M>(sum, shared.stages, stage, line, args.queries.dim);
    if (line + 1 < lines) continue;

    const int at = static_cast<int>(chunk / lines) % kRing;
    const int64_t row = first_row + threadIdx.x / kWarp * 32 + lane / 4;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const Group group = shared.groups[at][j];
      const int column = lane % 4 * 2;
      if (group.valid == kGroup && args.gallery_scale == nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) best.add(i / 2, sum[i / 4][j][i % 4], group.token + column + i % 2);
      } else {
        const float scale[2] = {shared.scale[at][j * kGroup + column], shared.scale[at][j * kGroup + column + 1]};
#pragma unroll
        for (int i = 0; i < 8; ++i)
          best.add(i / 2, column + i % 2 < group.valid ? sum[i / 4][j][i % 4] * scale[i % 2] : -INFINITY,
                   group.token + column + i % 2);
      }
      if (group.last) best.flush(args.out, run + group.item, row);
    }
  }
}

}  // namespace

template <class Select>
static void launch_tile(const MaxSimTile& args, void* stream, Select kernel) {
  const int64_t blocks =
      (args.queries.total + kRows - 1) / kRows * ((args.items + args.items_per_block - 1) / args.items_per_block);
  launch(kernel,
         Grid{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 1, static_cast<int64_t>(sizeof(Shared)), stream},
         "maxsim: tile", args);
}

void maxsim_tile_sm80(const MaxSimTile& args, void* stream) {
  const bool arg = args.out.arg != nullptr;
  switch (args.queries.dtype) {
    case DType::kFloat16:
      return launch_tile(args, stream, arg ? maxsim_tile<Mma::kF16, true> : maxsim_tile<Mma::kF16, false>);
    case DType::kBFloat16:
      return launch_tile(args, stream, arg ? maxsim_tile<Mma::kBF16, true> : maxsim_tile<Mma::kBF16, false>);
    default: return launch_tile(args, stream, arg ? maxsim_tile<Mma::kTF32, true> : maxsim_tile<Mma::kTF32, false>);
  }
}

}  // namespace pycm::cuda
