// similarity's product by wgmma (sm_90a): the arithmetic, the statistics and the epilogue of similarity.cu, fed by TMA.
//
//              y, 128 rows a block
//            +---------------------+    warpgroups 1-3: 64 rows of x each, m64n128k16
//   x,       |    warpgroup 1      |    warpgroup 0: one thread issues the copies
//   192 rows |    warpgroup 2      |
//   for both |    warpgroup 3      |    the other block of the cluster: the same rows of x, the next 128 of y
//            +---------------------+
//
// Ring of 5 stages of 128 bytes a row in the 128-byte swizzle: x 24 KiB, of which each block loads half for both, y 16 KiB.
//   raw      fp16 and bf16 rows where they lie, for dot and cosine: 64 elements a stage, 4 products of 16
//   codes    all others, in scratch: the converted elements of similarity.cu, 32 a stage as high and low parts, 8 products (or,
//            where TF32 is allowed, 64 high parts). Made for at most kRunRows rows of each side at a time, so that their
//            memory does not grow with the gallery, from the rows' numbers, which similarity_rows has written.
// Every stage's products start from zero and are added to the sums in fp32, to nearest, as the tensor cores' own sums are cut:
// 64 + 64 accumulators a thread. While one warpgroup adds (64 of 256 clocks; 512 for codes) or stores, the other two multiply.
//
// Limits, 16k x 16k x 512 on an H100 (132 multiprocessors, 1.7 GHz, 3.3 TB/s, 0.9 PFLOP/s): the scores, 1 GiB, take 0.33 ms to
// write. From bf16: 275 GFLOP, 0.31 ms; 2.5 GB of operands through L2, N M D (1/192 + 1/256) elements, 0.45 ms at 5.5 TB/s.
// Shared memory: products read 96 bytes a clock and copies write 53, together more than the 128 there are: 86 % of the product's
// rate at best. From fp32: four times the products, 1.2 ms; 8 bytes an element to make codes. Speed: not yet measured.
// 152 registers a consumer's thread (56 the producer's), 210 KiB of shared memory: 1 block a multiprocessor.
// Not here: matrices with 64 rows or fewer on a side (255 of those that need codes), batches whose codes are more than a run, rows
// TMA cannot map (not contiguous, or not 16-byte aligned). similarity.cu takes them: as accurate, not with the same bits.
#include "cuda/similarity_tile.cuh"

namespace pycm::cuda {
namespace {

constexpr int kCluster = 2, kStages = 5, kSlots = 2;
constexpr int kConsumers = 3, kThreads = 128 * (1 + kConsumers);
constexpr int kM = 64 * kConsumers, kN = 128;
constexpr int kXBytes = kM * kRowBytes, kStageBytes = kXBytes + kN * kRowBytes;
[[maybe_unused]] constexpr int kRunStages = 16;  // a sum of more is the sum of such runs
// Codes are worth their memory where a row meets as many of the other side as here.
constexpr int64_t kMinRows = 65, kMinCodedRows = 256;
// Rows that are coded at a time: so many, or so many bytes. Few on the host executor, so that small tests take several runs.
#if defined(PYCM_SIMT)
constexpr int64_t kRunRows = 520, kRunBytes = 0;
#else
constexpr int64_t kRunRows = 8192, kRunBytes = int64_t{32} << 20;
#endif

// What a tile's epilogue needs, written by the producer: of as many tiles as may be under way.
struct Slot {
  RowInfo<float> x[kM], y[kN];
  TilePlace at;
};

struct Shared {  // behind the stages
  Slot slots[kSlots];
  uint64_t full[kStages], empty[kStages], stored[kSlots];
};
constexpr int kSharedBytes = kStages * kStageBytes + static_cast<int>(sizeof(Shared));

struct Sm90 {
  SimilarityProblem problem;
  int tiles, steps;          // a cluster's; and their stages
  int64_t x_apart, y_apart;  // rows of the tensor maps from one matrix to the next
};

#if PYCM_SM90
// A place in a ring, and the parity of its barriers.
template <int kSize>
struct Ring {
  int at = 0, phase = 0;

  __device__ void next() {
    if (++at == kSize) {
      at = 0;
      phase ^= 1;
    }
  }
};

__device__ __forceinline__ void produce(const Sm90& args, const TensorMap& x_map, const TensorMap& y_map, char* stages,
                                        Shared& shared, int rank) {
  const SimilarityProblem& p = args.problem;
  Ring<kStages> ring;
  Ring<kSlots> turn;
  for (int tile = blockIdx.x / kCluster; tile < args.tiles; tile += gridDim.x / kCluster, turn.next()) {
    TilePlace at = place_tile<kM, kCluster * kN>(p, tile);
    at.column += rank * kN;
    at.columns = max(0, min(at.columns - rank * kN, kN));
    const int x_row = static_cast<int>(at.x_matrix * args.x_apart + at.row) + rank * (kM / kCluster);
    const int y_row = static_cast<int>(at.y_matrix * args.y_apart + at.column);
    Slot& slot = shared.slots[turn.at];
    mbarrier_wait(&shared.stored[turn.at], turn.phase ^ 1);
    slot.at = at;
    for (int step = 0; step < args.steps; ++step, ring.next()) {
      char* const stage = stages + ring.at * kStageBytes;
      uint64_t* const full = &shared.full[ring.at];
      mbarrier_wait_cluster(&shared.empty[ring.at], ring.phase ^ 1);
      const bool informs = step == 0 && p.x.info != nullptr;
      const int x_bytes = at.rows * static_cast<int>(sizeof(RowInfo<float>)),
                y_bytes = at.columns * static_cast<int>(sizeof(RowInfo<float>));
      mbarrier_arrive_expect_tx(full, kStageBytes + (informs ? x_bytes + y_bytes : 0));
      const int d = step * (kRowBytes / 2);
      tma_load_2d_multicast(stage + rank * (kXBytes / kCluster), &x_map, full, d, x_row, (1 << kCluster) - 1);
      tma_load_2d(stage + kXBytes, &y_map, full, d, y_row);
      if (informs)
        bulk_load(slot.x, static_cast<const RowInfo<float>*>(p.x.info) + at.x_matrix * p.x.rows + at.row, x_bytes,
                  full);
      if (informs && y_bytes > 0)
        bulk_load(slot.y, static_cast<const RowInfo<float>*>(p.y.info) + at.y_matrix * p.y.rows + at.column, y_bytes,
                  full);
    }
  }
}

// The sum of a stage's products.
template <Mma kMma, bool kSplit>
__device__ __forceinline__ void multiply_stage(float (&part)[kN / 2], const char* x, const char* y) {
  const uint64_t a = wgmma_descriptor(x), b = wgmma_descriptor(y);  // they count in 16 bytes
  wgmma_pin(part);
  wgmma_fence();
  if constexpr (kSplit) {  // the smallest first
    constexpr int kOrder[8][2] = {{4, 4}, {6, 6}, {4, 0}, {6, 2}, {0, 4}, {2, 6}, {0, 0}, {2, 2}};
#pragma unroll
    for (int i = 0; i < 8; ++i) wgmma<kMma, kN>(part, a + kOrder[i][0], b + kOrder[i][1], i != 0);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma<kMma, kN>(part, a + 2 * i, b + 2 * i, i != 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(part);
}

template <Mma kMma, bool kSplit>
__device__ __forceinline__ void consume(const Sm90& args, const char* stages, Shared& shared) {
  const SimilarityProblem& p = args.problem;
  const int warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
  const int row = warpgroup * 64 + static_cast<int>(threadIdx.x) % 128 / kWarp * 16;
  Ring<kStages> ring;
  Ring<kSlots> turn;
  for (int tile = blockIdx.x / kCluster; tile < args.tiles; tile += gridDim.x / kCluster, turn.next()) {
    const Slot& slot = shared.slots[turn.at];
    float sums[1][kN / 8][4] = {};
    for (int step = 0; step < args.steps;) {
      const bool first = step == 0;
      const int end = min(step + kRunStages, args.steps);
      for (; step < end; ++step, ring.next()) {
        mbarrier_wait(&shared.full[ring.at], ring.phase);
        if (slot.at.rows > warpgroup * 64 && slot.at.columns > 0) {
          const char* const stage = stages + ring.at * kStageBytes;
          float part[kN / 2];
          multiply_stage<kMma, kSplit>(part, stage + warpgroup * 64 * kRowBytes, stage + kXBytes);
#pragma unroll
          for (int i = 0; i < kN / 2; ++i) sums[0][i / 4][i % 4] += part[i];
        }
        if (lane_index() < kCluster)
          mbarrier_arrive_cluster(&shared.empty[ring.at], static_cast<uint32_t>(lane_index()));
      }
      if (args.steps > kRunStages) carry_sums<16>(p, slot.at, row, 0, first, step == args.steps, sums);
    }
    store_scores<16, true, float>(p, slot.at, slot.x, slot.y, row, 0, sums);
    __syncwarp();
    if (lane_index() == 0) mbarrier_arrive(&shared.stored[turn.at]);
  }
}
#endif

template <Mma kMma, bool kSplit>
__global__ void __launch_bounds__(kThreads, 1)
    similarity_tiles_sm90(const __grid_constant__ Sm90 args, const __grid_constant__ TensorMap x_map,
                          const __grid_constant__ TensorMap y_map) {
#if PYCM_SM90
  char* const stages = dynamic_shared();
  Shared& shared = *reinterpret_cast<Shared*>(stages + kStages * kStageBytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&shared.full[s], 1);
      mbarrier_init(&shared.empty[s], kCluster * kConsumers * 4);
    }
    for (int s = 0; s < kSlots; ++s) mbarrier_init(&shared.stored[s], kConsumers * 4);
    fence_mbarrier_init();
  }
  if (args.problem.x.info == nullptr)  // then these stay
    for (int i = threadIdx.x; i < kSlots * (kM + kN); i += kThreads) {
      Slot& slot = shared.slots[i / (kM + kN)];
      const int r = i % (kM + kN);
      (r < kM ? slot.x[r] : slot.y[r - kM]) = RowInfo<float>();
    }
  cluster_sync();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<56>();
    if (threadIdx.x < kWarp && elect_one())
      produce(args, x_map, y_map, stages, shared, static_cast<int>(cluster_rank()));
    __syncwarp();
  } else {
    setmaxnreg_inc<152>();
    consume<kMma, kSplit>(args, stages, shared);
  }
  cluster_sync();  // the other block may still write here, and arrive
#endif
}

// A warp a row: its elements, converted, in lines of kRowBytes.
template <bool kSplit>
__global__ void __launch_bounds__(256)
    similarity_codes(const __grid_constant__ SimilarityProblem p, bool of_x, char* codes, int64_t code_bytes) {
#if PYCM_SM90
  const Operand& side = of_x ? p.x : p.y;
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarp), count = side.matrices * side.rows;
  for (int64_t i = int64_t{blockIdx.x} * (blockDim.x / kWarp) + threadIdx.x / kWarp; i < count; i += warps) {
    const Place at = place(p, i / side.rows, side.info_strides);
    const char* matrix = side.data + (of_x ? at.x : at.y) * element_bytes(p.dtype);
    const TileRows row(p, side, matrix, i % side.rows, 1);
    const bool aligned = row.aligned(kEach * element_bytes(p.dtype));
    const float* origin = p.metric.distance ? static_cast<const float*>(p.origins) + at.y_info * p.dim : nullptr;
    const RowInfo<float> info = static_cast<const RowInfo<float>*>(side.info)[i];
    char* const to = codes + i * code_bytes;
    for (int64_t d = lane_index() * kEach; d < code_bytes / (kSplit ? 4 : 2); d += kWarp * kEach) {
      float value[kEach], moved[kEach];
      read_elements(row, aligned, 0, d, value);
#pragma unroll
      for (int e = 0; e < kEach; ++e) moved[e] = origin != nullptr && d + e < p.dim ? origin[d + e] : 0;
      const Parts parts = split_elements<kSplit>(value, moved, p.dim - d, info);
      const int64_t offset = kSplit ? d / 32 * kRowBytes + d % 32 * 2 : d * 2;
      *reinterpret_cast<uint2*>(to + offset) = parts.high;
      if constexpr (kSplit) *reinterpret_cast<uint2*>(to + offset + kRowBytes / 2) = parts.low;
    }
  }
#endif
}

// ---- host ----

int64_t code_row_bytes(int64_t dim, bool split) { return (dim + (split ? 31 : 63)) / (split ? 32 : 64) * kRowBytes; }

// Rows of one side that are coded at a time.
int64_t run_rows(const Operand& side, int64_t dim) {
  return std::min(side.matrices * side.rows, std::max(kRunRows, kRunBytes / code_row_bytes(dim, true)));
}

// Rows from one matrix of the batch to the next, where the rows lie as TMA wants them; else 0.
int64_t rows_apart(const SimilarityProblem& p, const Operand& side) {
  const int64_t row_bytes = side.row_stride * element_bytes(p.dtype);
  if (side.dim_stride != 1 || row_bytes <= 0 || row_bytes % 16 != 0 || reinterpret_cast<uintptr_t>(side.data) % 16 != 0)
    return 0;
  int64_t apart = 0;
  for (int d = 0; d < p.batch_ndim; ++d) {
    if (side.info_strides[d] == 0) continue;
    const int64_t unit = side.info_strides[d] * side.row_stride, found = side.batch_strides[d] / unit;
    if (side.batch_strides[d] % unit != 0 || found <= 0 || (apart != 0 && apart != found)) return 0;
    apart = found;
  }
  return apart == 0 ? side.rows : apart;
}

// Tiles are a cluster's: kM rows of x and kCluster * kN of y.
int cluster_tiles(const SimilarityProblem& p) { return static_cast<int>(tile_count<kM, kCluster * kN>(p)); }

template <Mma kMma, bool kSplit>
void launch_tiles(const Sm90& args, const TensorMap& x, const TensorMap& y, void* stream) {
  const int clusters = std::min(args.tiles, std::max(1, device_limits().multiprocessors / kCluster));
  launch(similarity_tiles_sm90<kMma, kSplit>,
         {dim3(static_cast<unsigned>(clusters * kCluster)), dim3(kThreads), kCluster, kSharedBytes, stream},
         "similarity: sm90 tiles", args, x, y);
}

TensorMap map_of(const void* rows, TensorElement element, int64_t columns, int64_t count, int64_t row_bytes, int box) {
  return make_tensor_map_2d(rows, element, columns, count, row_bytes, kRowBytes / 2, box);
}

void multiply_raw(const SimilarityProblem& p, void* stream) {
  const bool bf16 = p.dtype == DType::kBFloat16;
  const TensorElement element = bf16 ? TensorElement::kBFloat16 : TensorElement::kFloat16;
  const int steps = static_cast<int>(code_row_bytes(p.dim, false) / kRowBytes);
  const Sm90 args{p, cluster_tiles(p), steps, rows_apart(p, p.x), rows_apart(p, p.y)};
  const auto map = [&](const Operand& side, int64_t apart, int box) {
    return map_of(side.data, element, p.dim, (side.matrices - 1) * apart + side.rows, side.row_stride * 2, box);
  };
  const TensorMap x = map(p.x, args.x_apart, kM / kCluster), y = map(p.y, args.y_apart, kN);
  if (bf16) launch_tiles<Mma::kBF16, false>(args, x, y, stream);
  else launch_tiles<Mma::kF16, false>(args, x, y, stream);
}

// Rows [begin, begin + run) of one side of an unbatched problem, or all of a batch.
Operand run_of(const SimilarityProblem& p, Operand side, int64_t begin, int64_t run) {
  if (p.batch != 1) return side;
  side.data += begin * side.row_stride * element_bytes(p.dtype);
  side.info = static_cast<RowInfo<float>*>(side.info) + begin;
  side.rows = std::min(run, side.rows - begin);
  return side;
}

TensorMap encode(const SimilarityProblem& p, bool of_x, char* codes, bool split, void* stream) {
  const Operand& side = of_x ? p.x : p.y;
  const int64_t bytes = code_row_bytes(p.dim, split), count = side.matrices * side.rows;
  launch(split ? similarity_codes<true> : similarity_codes<false>,
         {similarity_blocks((count + 7) / 8), 256, 1, 0, stream}, "similarity: codes", p, of_x, codes, bytes);
  return map_of(codes, TensorElement::kFloat16, bytes / 2, count, bytes, of_x ? kM / kCluster : kN);
}

}  // namespace

bool similarity_sm90_fits(const SimilarityProblem& p) {
  constexpr int64_t kLimit = int64_t{1} << 31;  // coordinates of TMA
  if (!device_limits().sm90() || p.wide || p.batch == 0 || p.dim >= kLimit / 4) return false;
  if (p.scaled) {
    if (std::min(p.x.rows, p.y.rows) < kMinCodedRows) return false;
    return p.batch == 1 ||
           (run_rows(p.x, p.dim) == p.x.matrices * p.x.rows && run_rows(p.y, p.dim) == p.y.matrices * p.y.rows);
  }
  if (std::min(p.x.rows, p.y.rows) < kMinRows) return false;
  for (const Operand* side : {&p.x, &p.y}) {
    const int64_t apart = rows_apart(p, *side);
    if (apart == 0 || side->matrices * std::max(apart, side->rows) >= kLimit) return false;
  }
  return true;
}

int64_t similarity_sm90_code_bytes(const SimilarityProblem& p) {
  return (run_rows(p.x, p.dim) + run_rows(p.y, p.dim)) * code_row_bytes(p.dim, true);
}

void similarity_sm90(const SimilarityProblem& p, bool split, void* stream) {
  if (!p.scaled) return multiply_raw(p, stream);
  const int64_t x_run = run_rows(p.x, p.dim), y_run = run_rows(p.y, p.dim);
  const int64_t x_end = p.batch == 1 ? p.x.rows : 1, y_end = p.batch == 1 ? p.y.rows : 1;
  const int steps = static_cast<int>(code_row_bytes(p.dim, split) / kRowBytes);
  char* const y_codes = p.codes + x_run * code_row_bytes(p.dim, true);
  for (int64_t row = 0; row < x_end; row += x_run) {
    SimilarityProblem part = p;
    part.x = run_of(p, p.x, row, x_run);
    const TensorMap x = encode(part, true, p.codes, split, stream);
    for (int64_t column = 0; column < y_end; column += y_run) {
      part.y = run_of(p, p.y, column, y_run);
      part.out = static_cast<float*>(p.out) + row * p.width + column;
      const TensorMap y = encode(part, false, y_codes, split, stream);
      const Sm90 args{part, cluster_tiles(part), steps, part.x.rows, part.y.rows};
      if (split) launch_tiles<Mma::kF16, true>(args, x, y, stream);
      else launch_tiles<Mma::kF16, false>(args, x, y, stream);
    }
  }
}

}  // namespace pycm::cuda
