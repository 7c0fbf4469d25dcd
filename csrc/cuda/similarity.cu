// similarity on the device: out[b, i, j] = metric(x[b, i], y[b, j]), in fp32 (in fp64: similarity_f64.cu).
//
//   rows of x   [kM x 128 bytes]     rows of y [kN x 128 bytes]      a stage in shared memory, 128-byte swizzle, 2 or 3 stages
//        |  ldmatrix                      |  ldmatrix
//        +------- mma.m16n8k16 -----------+     kM x kN sums in registers: 128 x 128 by 8 warps, 64 x 64 by 4
//                     |
//        * x.scale * y.scale, distances from squared norms  ->  scores, written once; doubtful ones scored exactly in fp64
//
// Operands:
//   raw        fp16 and bf16 rows as they are, by cp.async, for dot and cosine: 64 elements a stage
//   converted  fp32 rows, and all from which a mean or an origin is subtracted: (element - shift) * factor = high + low, with
//              factor the power of two that makes the row's norm about 2^14, and two fp16 of 11 bits each: 22 bits and a sign
//              of fp32's 24. Four products; 32 elements a stage. With TF32 allowed high alone: TF32's bits at twice its rate.
// The tensor cores round towards zero when they add, which would pile up in long sums of one sign: every two products of
// 16 (four when split) start from zero and are added in fp32, to nearest; and runs of 512 are added for themselves.
//
// Statistics: one read of both sides before (a warp a row), which writes 16 bytes a row; in small matrices the block does it.
// Distances also take a row of dim elements for each matrix of y, the point they are measured from.
// Bytes: x and y twice (the second time from the cache, in tiles of 128: N M D (1/128 + 1/128) elements through L2), scores
// once. Operations: 2 N M D on the tensor cores, 8 N M D when split. 16k x 16k x 512 from bf16: 32 MiB in, 1 GiB out, 275
// GFLOP: bound by the write. 10,000 x (36 x 32 x 1024) in fp32: 2.8 GB in, bound by the read. Speed: not yet measured.
// Limits: a sum is not split over blocks, so few rows of many elements leave the device idle; matrices in which every pair is
// doubtful (equal rows, norms beyond fp32) cost 2 N M D fp64 operations. Hopper multiplies large matrices in similarity_sm90.cu.
#include "cuda/similarity_tile.cuh"

namespace pycm::cuda {
namespace {

template <Mma kMma, bool kConvert, bool kSplit, bool kLarge>
__global__ void __launch_bounds__(TileShape<kLarge, kConvert>::kThreads, TileShape<kLarge, kConvert>::kBlocks)
    similarity_tiles(const __grid_constant__ SimilarityProblem p) {
  using Shape = TileShape<kLarge, kConvert>;
  constexpr int kM = Shape::kM, kN = Shape::kN, kStages = Shape::kStages;
  char* stages = dynamic_shared();
  RowInfo<float>* info = reinterpret_cast<RowInfo<float>*>(stages + kStages * Shape::kStageBytes);
  TilePlace& at = *reinterpret_cast<TilePlace*>(stages + kStages * Shape::kStageBytes + Shape::kInfoBytes);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warp_row = warp / Shape::kWarpsN * Shape::kTilesM * 16;
  const int warp_column = warp % Shape::kWarpsN * Shape::kTilesN * 8;
  const int steps = static_cast<int>((p.dim + Shape::kDepth - 1) / Shape::kDepth);

  for (int64_t tile = blockIdx.x; tile < tile_count<kM, kN>(p); tile = at.number + gridDim.x) {
    begin_tile<float, kM, kN, !kLarge>(p, tile, at, info);
    // Whole warps may lie outside a small tile: they copy, and multiply nothing.
    const int used = kLarge ? Shape::kTilesN : warp_row < at.rows ? (at.columns - warp_column + 7) / 8 : 0;

    float sums[Shape::kTilesM][Shape::kTilesN][4] = {};
    const auto multiply_stage = [&](int slot) {
      if (used <= 0) return;
      const int stage = slot * Shape::kStageBytes;
      multiply<kMma, Shape, kConvert, kSplit>(stage + warp_row * kRowBytes, stage + (kM + warp_column) * kRowBytes,
                                              used, sums);
    };
    // multiply_step(step) for every step, run by run.
    const auto multiply_runs = [&](auto multiply_step) {
      constexpr int kRunSteps = kRun / Shape::kDepth;
      for (int step = 0; step < steps;) {
        const int end = min(step + kRunSteps, steps);
        for (; step < end; ++step) multiply_step(step);
        if (p.dim > kRun) carry_sums<16>(p, at, warp_row, warp_column, step <= kRunSteps, step == steps, sums);
      }
    };
    if constexpr (kConvert) {
      const TileRows x(p, p.x, at.x, at.row, at.rows), y(p, p.y, at.y, at.column, at.columns);
      const bool x_aligned = x.aligned(kEach * element_bytes(p.dtype)),
                 y_aligned = y.aligned(kEach * element_bytes(p.dtype));
      const float* origin = p.metric.distance ? static_cast<const float*>(p.origins) + at.origin : nullptr;
      Converter<Shape, kSplit> next;
      next.read(p, x, x_aligned, y, y_aligned, origin, 0);
      next.store(x, y, info, stages);
      __syncthreads();
      multiply_runs([&](int step) {
        const bool more = step + 1 < steps;
        if (more) next.read(p, x, x_aligned, y, y_aligned, origin, int64_t{step + 1} * Shape::kDepth);
        multiply_stage(step % 2);
        if (more) next.store(x, y, info, stages + (step + 1) % 2 * Shape::kStageBytes);
        __syncthreads();
      });
    } else {
      const auto copy = [&](int step) {
        if (step < steps) {
          char* stage = stages + step % kStages * Shape::kStageBytes;
          const TileRows x(p, p.x, at.x, at.row, at.rows), y(p, p.y, at.y, at.column, at.columns);
          copy_rows<kM, Shape::kThreads>(x, int64_t{step} * Shape::kDepth, stage);
          copy_rows<kN, Shape::kThreads>(y, int64_t{step} * Shape::kDepth, stage + kM * kRowBytes);
        }
        cp_async_commit();
      };
      for (int step = 0; step < kStages - 1; ++step) copy(step);
      multiply_runs([&](int step) {
        cp_async_wait<kStages - 2>();
        __syncthreads();
        copy(step + kStages - 1);
        multiply_stage(step % kStages);
      });
    }
    store_scores<16, kLarge, float>(p, at, info, info + kM, warp_row, warp_column, sums);
  }
}

// The mean of a few of y's rows, a thread an element; 0 where that is not finite.
template <class T>
__global__ void __launch_bounds__(256) similarity_origins(const __grid_constant__ SimilarityProblem p) {
  const int64_t sample = min(int64_t{8}, p.y.rows), apart = p.y.rows / sample;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.y.matrices * p.dim;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t first = place(p, i / p.dim, p.y.info_strides).y + i % p.dim * p.y.dim_stride;
    double sum = 0;
    for (int64_t r = 0; r < sample; ++r) sum += load_double(p.dtype, p.y.data, first + r * apart * p.y.row_stride);
    const T mean = static_cast<T>(sum / static_cast<double>(sample));
    static_cast<T*>(p.origins)[i] = mean - mean == 0 ? mean : T(0);
  }
}

// A warp a row: 8 rows a block.
template <class T>
__global__ void __launch_bounds__(256, 2) similarity_rows(const __grid_constant__ SimilarityProblem p) {
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarp);
  const int64_t x_rows = p.x.info == nullptr ? 0 : p.x.matrices * p.x.rows;
  const int64_t all = x_rows + p.y.matrices * p.y.rows;
  for (int64_t i = int64_t{blockIdx.x} * (blockDim.x / kWarp) + threadIdx.x / kWarp; i < all; i += warps) {
    const bool first = i < x_rows;
    const Operand& side = first ? p.x : p.y;
    const int64_t line = first ? i : i - x_rows;
    const Place at = place(p, line / side.rows, side.info_strides);
    const int bytes = element_bytes(p.dtype);
    const char* row = side.data + ((first ? at.x : at.y) + line % side.rows * side.row_stride) * bytes;
    const RowInfo<T> info = row_info<T>(p, side, row, static_cast<const T*>(p.origins) + at.y_info * p.dim);
    if (lane_index() == 0) static_cast<RowInfo<T>*>(side.info)[line] = info;
  }
}

// ---- host ----

template <Mma kMma, bool kConvert, bool kSplit, bool kLarge>
void launch_tiles(const SimilarityProblem& p, void* stream) {
  using Shape = TileShape<kLarge, kConvert>;
  launch(similarity_tiles<kMma, kConvert, kSplit, kLarge>,
         {similarity_blocks(tile_count<Shape::kM, Shape::kN>(p)), Shape::kThreads, 1, Shape::kSharedBytes, stream},
         "similarity: tiles", p);
}

bool small(const SimilarityProblem& p) { return p.x.rows <= 64 || p.y.rows <= 64; }

template <Mma kMma, bool kConvert, bool kSplit>
void launch_tiles(const SimilarityProblem& p, void* stream) {
  if (small(p)) launch_tiles<kMma, kConvert, kSplit, false>(p, stream);
  else launch_tiles<kMma, kConvert, kSplit, true>(p, stream);
}

Operand operand(const Rows& rows, const SimilarityArgs& args, const int64_t* strides, bool tell_all) {
  Operand side = {};
  side.data = static_cast<const char*>(rows.data);
  side.rows = rows.rows;
  side.row_stride = rows.row_stride;
  side.dim_stride = rows.dim_stride;
  side.matrices = 1;
  for (int d = args.batch_ndim - 1; d >= 0; --d) {
    side.batch_strides[d] = strides[d];
    if (strides[d] == 0 && !tell_all) continue;
    if (args.batch_shape[d] == 1) continue;
    side.info_strides[d] = side.matrices;
    side.matrices *= args.batch_shape[d];
  }
  return side;
}

// In longer rows the bits that two fp16 parts lack are lost among the sum's own roundings.
constexpr int64_t kShortRows = 16;

// `workspace` takes what the rows need; with a null base it only counts.
SimilarityProblem problem_of(const SimilarityArgs& unfolded, Workspace& workspace) {
  const SimilarityArgs args = fold_batch(unfolded);
  SimilarityProblem p = {};
  p.dtype = args.x.dtype;
  p.dim = args.x.dim;
  p.metric = traits_of(args.metric);
  // Of half-precision rows too: fp32 sums of uncentred products have not the bits that cancel.
  const bool converted = p.dtype == DType::kFloat32 || p.metric.centre || p.metric.distance;
  p.wide = p.dtype == DType::kFloat64 || (converted && p.dim <= kShortRows);
  p.scaled = converted && !p.wide;
  // Moved rows of x depend on the y they meet.
  p.x = operand(args.x, args, args.x_batch_strides, p.metric.distance);
  p.y = operand(args.y, args, args.y_batch_strides, false);
  p.batch_ndim = args.batch_ndim;
  p.batch = 1;
  for (int d = 0; d < args.batch_ndim; ++d) p.batch *= p.batch_shape[d] = args.batch_shape[d];
  p.out = args.out;
  p.width = args.y.rows;
  if (args.metric == Metric::kDot && !p.scaled) return p;
  if (p.metric.distance) {
    const int64_t count = p.y.matrices * p.dim;
    p.origins = p.wide ? static_cast<void*>(workspace.take<double>(count)) : workspace.take<float>(count);
  }
  p.fused = p.x.rows <= 64 && p.y.rows <= 64;
  if (p.fused) return p;
  for (Operand* side : {&p.x, &p.y}) {
    const int64_t count = side->matrices * side->rows;
    if (p.wide) side->info = workspace.take<RowInfo<double>>(count);
    else side->info = workspace.take<RowInfo<float>>(count);
  }
  if (p.scaled && similarity_sm90_fits(p)) p.codes = workspace.take<char>(similarity_sm90_code_bytes(p));
  return p;
}

}  // namespace

int64_t similarity_workspace_bytes(const SimilarityArgs& args) {
  Workspace workspace(nullptr);
  problem_of(args, workspace);
  return workspace.used();
}

void similarity(const SimilarityArgs& args, const CudaContext& context) {
  Workspace workspace(context.workspace);
  const SimilarityProblem p = problem_of(args, workspace);
  check(workspace.used() <= context.workspace_bytes, "similarity: workspace must have ", workspace.used(),
        " bytes, got ", context.workspace_bytes);
  if (p.batch == 0 || p.x.rows == 0 || p.y.rows == 0) return;
  if (p.origins != nullptr)
    launch(p.wide ? similarity_origins<double> : similarity_origins<float>,
           {similarity_blocks((p.y.matrices * p.dim + 255) / 256), 256, 1, 0, context.stream}, "similarity: origins",
           p);
  if (p.x.info != nullptr) {
    const int64_t blocks = (p.x.matrices * p.x.rows + p.y.matrices * p.y.rows + 7) / 8;
    launch(p.wide ? similarity_rows<double> : similarity_rows<float>,
           {similarity_blocks(blocks), 256, 1, 0, context.stream}, "similarity: rows", p);
  }
  if (p.wide) return similarity_f64(p, context.stream);
  const bool split = args.float32_product != Float32Product::kTF32 || p.dtype != DType::kFloat32;
  if (similarity_sm90_fits(p)) return similarity_sm90(p, split, context.stream);
  if (p.scaled) {
    if (split) return launch_tiles<Mma::kF16, true, true>(p, context.stream);
    return launch_tiles<Mma::kF16, true, false>(p, context.stream);
  }
  if (p.dtype == DType::kFloat16) launch_tiles<Mma::kF16, false, false>(p, context.stream);
  else launch_tiles<Mma::kBF16, false, false>(p, context.stream);
}

}  // namespace pycm::cuda
