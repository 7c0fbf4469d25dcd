// The screen's product by mma.sync (sm_80 and newer): queries x gallery positions, no score leaves the registers but a candidate.
//
//                 gallery, 128 positions a block
//               +----------------+      8 warps, 2 x 4 of 64 x 32; fp32 accumulators, 64 a thread
//   queries     |  w0 w1 w2 w3   |      operands in steps of 32 halves (64 bytes a row), 4 stages of cp.async,
//   128 a block |  w4 w5 w6 w7   |      16-byte columns xored with the row pair: ldmatrix meets no bank twice
//               +----------------+
//
// Operations: 2 N M D' on the tensor cores; per score in the epilogue two multiply-adds and a maximum, against D' / 16 issue slots
// that the product leaves. Bytes: D' (N ceil(M / 128) + M ceil(N / 128)) 2, nearly all from the second-level cache (blocks are
// numbered in groups of 16 query tiles), candidates 16 each. Limits: 64 KiB of shared memory, 128 registers, 2 blocks an SM.
#include "cuda/screen.cuh"

namespace pycm::cuda {
namespace {

constexpr int kBlock = 128, kStep = 32, kStages = 4, kThreads = 256, kGroup = 16;
constexpr int kOperandBytes = kBlock * kStep * 2;

// Where the 16-byte column `chunk` (of 4) of a tile's row lies.
__device__ __forceinline__ int place(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4); }

// Blocks in groups of kGroup query tiles: those that run together share both operands.
struct TilePlace {
  int64_t row, column;
};
__device__ __forceinline__ TilePlace tile_place(int64_t block, int64_t row_tiles, int64_t column_tiles) {
  const int64_t group = block / (kGroup * column_tiles), rest = block % (kGroup * column_tiles);
  const int64_t height = row_tiles - group * kGroup < kGroup ? row_tiles - group * kGroup : kGroup;
  return {group * kGroup + rest % height, rest / height};
}

__global__ void __launch_bounds__(kThreads, 2) screen_kernel(Screen screen, int64_t row_tiles, int64_t column_tiles) {
  PYCM_SHARED(scale_errors, float2[kBlock]);
  PYCM_SHARED(biases, float[kBlock]);
  PYCM_SHARED(cuts, float[kBlock]);
  PYCM_SHARED(factors, float[kBlock]);
  char* const tiles = dynamic_shared();
  const TilePlace place_of = tile_place(blockIdx.x, row_tiles, column_tiles);
  const int64_t first_row = place_of.row * kBlock, first_column = place_of.column * kBlock;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = lane_index();

  bool sought = false;
  if (thread < kBlock) {
    const QueryState& state = screen.state[first_row + thread];
    cuts[thread] = state.cut;
    factors[thread] = state.factor;
    sought = !std::isnan(state.cut);
    scale_errors[thread] = screen.column.scale_error[first_column + thread];
    biases[thread] = screen.column.bias[first_column + thread];
  }
  if (__syncthreads_or(sought) == 0) return;

  // A thread copies two 16-byte columns of each operand.
  const auto load = [&](int stage, int64_t depth) {
    char* const to = tiles + stage * 2 * kOperandBytes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = thread / 4 + i * 64, chunk = thread % 4;
      cp_async16(to + place(row, chunk), screen.queries + (first_row + row) * screen.dim + depth + chunk * 8);
      cp_async16(to + kOperandBytes + place(row, chunk), screen.gallery + depth / kCodeStep * screen.stride +
                                                             (first_column + row) * kCodeStep + depth % kCodeStep +
                                                             chunk * 8);
    }
  };
  const int64_t steps = screen.dim / kStep;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) load(s, int64_t{s} * kStep);
    cp_async_commit();
  }

  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
  float sums[4][4][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps)
      load(static_cast<int>((step + kStages - 1) % kStages), (step + kStages - 1) * kStep);
    cp_async_commit();
    const char* const a_tile = tiles + step % kStages * 2 * kOperandBytes;
    const char* const b_tile = a_tile + kOperandBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of 16 along D
      uint32_t a[4][4], b[2][4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
        ldmatrix_x4(a[m], a_tile + place(warp_row + m * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < 2; ++n)
        ldmatrix_x4(b[n], b_tile + place(warp_column + n * 16 + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          mma<Mma::kF16>(sums[m][n], a[m], pair);
        }
    }
  }

  const auto row_of = [&](int r) { return warp_row + r / 2 * 16 + r % 2 * 8 + lane / 4; };
  float cut[8], factor[8];
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    cut[r] = cuts[row_of(r)];
    factor[r] = factors[row_of(r)];
  }
  append_hits<8, 8>(
      screen, [&](int r) { return first_row + row_of(r); }, cut, factor,
      {scale_errors + warp_column, biases + warp_column}, first_column + warp_column,
      [&](int r, int b) { return sums[r / 2][b / 2][r % 2 * 2 + b % 2]; });
}

}  // namespace

void launch_screen_sm80(const Screen& screen, const char* name, void* stream) {
  const int64_t row_tiles = round_up(screen.query_rows, kBlock) / kBlock;
  const int64_t column_tiles = round_up(screen.columns, kBlock) / kBlock;
  launch(
      screen_kernel,
      {dim3(static_cast<unsigned>(row_tiles * column_tiles)), dim3(kThreads), 1, kStages * 2 * kOperandBytes, stream},
      name, screen, row_tiles, column_tiles);
}

void launch_screen(const Screen& screen, const char* name, void* stream) {
  if (launch_screen_few(screen, name, stream)) return;
  if (device_limits().sm90()) launch_screen_sm90(screen, name, stream);
  else launch_screen_sm80(screen, name, stream);
}

}  // namespace pycm::cuda
