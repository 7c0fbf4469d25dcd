// The screen's product for few queries: bound by reading the gallery's codes once, so operands are swapped and nobody waits for another.
//
//              queries, 8 .. 64                a warp: 32 positions, all queries, mma.sync m16n8k16, 64 sums a thread
//            +-----------------+               its own ring of 3 stages of cp.async, 32 rows x 64 halves (4 KiB) each, filled
//   gallery, |     warp 0      |               through the epilogue into the next tile: no barrier but __syncwarp
//   32 rows  +-----------------+               queries: all of D in shared memory, copied once a block
//   a warp   |      ...        |               tile t is warp t / blocks of block t % blocks: a short phase fills all processors
//            +-----------------+
//
// Bytes: (2 D' + 12) a position from memory, once, 64 KiB of them in flight a block of 8 warps; queries 2 N D' a block. Operations:
// 2 N' M D' on the tensor cores, N' = N rounded up to 16. Per stage and warp 4 KiB are written to and read from shared memory, and 128 N'
// bytes of the queries: at N' = 64 and 3.35 TB/s on 132 processors that is 58 of the 128 bytes a cycle and 35 % of mma.sync, by arithmetic.
// Limits: N <= 64, and N' D' 2 bytes beside 96 KiB in shared memory (N D <= 33,000 on sm_80, 65,000 on sm_90); 128 registers, 2
// blocks an SM where shared memory allows. The same kernel serves sm_80 and sm_90: no tensor core instruction is what limits it.
#include <algorithm>

#include "cuda/screen.cuh"

namespace pycm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kStages = 3;
constexpr int kTileRows = 32, kStepBytes = kCodeStep * 2, kStageBytes = kTileRows * kStepBytes;
constexpr int kPairs = kFewQueries / 16;  // of 8 queries: what one ldmatrix fetches
constexpr int64_t kRingBytes = int64_t{kWarps} * kStages * kStageBytes;

// Where the 16-byte column `chunk` (of 8) of a row of 128 bytes lies: ldmatrix meets no bank twice.
__device__ __forceinline__ int place(int row, int chunk) { return row * kStepBytes + ((chunk ^ (row & 7)) << 4); }

// Appends the pairs of one query with two positions, `first` and the one 8 further. The eight lanes of one lane % 4 hold the same
// query; all lanes of the warp call.
__device__ __forceinline__ void append_column(const Screen& screen, int64_t row, float2 cut_factor, int64_t first,
                                              float2 products) {
  QueryState* const state = screen.state + row;
  const float row_error = state->row_error, ceiling = screen.ranks ? state->ceiling : INFINITY;
  Candidate found[2];
  uint32_t hits = 0, sure = 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t column = first + r * 8;
    const float2 scale_error = screen.column.scale_error[column];
    const float bias = screen.distance ? screen.column.bias[column] : 0, factor = cut_factor.y;
    const float upper = upper_end(r == 0 ? products.x : products.y, scale_error, factor, bias);
    const float lower = lower_end(upper, scale_error, factor, bias, row_error);
    const int64_t index = screen.shuffle(screen.begin + column);
    found[r] = {ordered(lower), static_cast<uint32_t>(index), __fadd_ru(upper, row_error)};
    if (!(upper >= cut_factor.x) || !screen.filter.allows(screen.query_begin + row, index)) continue;
    if (lower > ceiling) sure |= 1u << r;
    else hits |= 1u << r;
  }

  // One addition for the eight lanes, and a run of places for each. Sure pairs are counted in the upper half.
  const int lane = lane_index();
  const uint32_t mine = static_cast<uint32_t>(__popc(hits)) | static_cast<uint32_t>(__popc(sure)) << 16;
  uint32_t end = mine;
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, end, offset);
    if (lane >= offset) end += other;
  }
  const uint32_t total = __shfl_sync(kAllLanes, end, kWarp - 4 + lane % 4);
  uint32_t start = 0;
  if (lane < 4) {
    if ((total & 0xffff) != 0) start = atomicAdd(&state->count, total & 0xffff);
    if (total >> 16 != 0) atomicAdd(&state->sure, static_cast<unsigned long long>(total >> 16));
  }
  int64_t to = int64_t{__shfl_sync(kAllLanes, start, lane % 4)} + ((end - mine) & 0xffff);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if ((hits >> r & 1) == 0) continue;
    if (to < screen.capacity) screen.candidates[row * screen.capacity + to] = found[r];
    ++to;
  }
}

// queries: rows of the query tile that are taken, a multiple of 16.
__global__ void __launch_bounds__(kThreads, 2) screen_few_kernel(Screen screen, int queries, int64_t tiles) {
  PYCM_SHARED(cuts, float2[kFewQueries]);  // and factors
  char* const query_tile = dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = lane_index();
  const int64_t steps = screen.dim / kCodeStep;
  char* const ring = query_tile + steps * queries * kStepBytes + warp * (kStages * kStageBytes);

  bool sought = false;
  if (thread < kFewQueries) {
    const QueryState& state = screen.state[thread];
    cuts[thread] = {state.cut, state.factor};
    sought = !std::isnan(state.cut);
  }
  if (__syncthreads_or(sought) == 0) return;

  for (int64_t i = thread; i < steps * queries * 8; i += kThreads) {
    const int chunk = static_cast<int>(i % 8), row = static_cast<int>(i / 8 % queries);
    const int64_t step = i / 8 / queries;
    cp_async16(query_tile + step * queries * kStepBytes + place(row, chunk),
               screen.queries + row * screen.dim + step * kCodeStep + chunk * 8);
  }
  cp_async_commit();

  // What is copied next: a warp takes tiles blockIdx.x + gridDim.x * (warp + kWarps * n), step by step.
  const int64_t stride = int64_t{gridDim.x} * kWarps, first = blockIdx.x + int64_t{gridDim.x} * warp;
  int64_t next_tile = first, next_step = 0;
  int slot = 0;
  const auto load = [&] {
    if (next_tile < tiles) {
      const uint16_t* const from = screen.gallery + next_step * screen.stride + next_tile * kTileRows * kCodeStep;
#pragma unroll
      for (int i = 0; i < kTileRows / 4; ++i) {
        const int row = lane / 8 + i * 4, chunk = lane % 8;
        cp_async16(ring + slot * kStageBytes + place(row, chunk), from + row * kCodeStep + chunk * 8);
      }
      if (++next_step == steps) {
        next_step = 0;
        next_tile += stride;
      }
    }
    cp_async_commit();
    slot = slot + 1 == kStages ? 0 : slot + 1;
  };
  for (int s = 0; s < kStages - 1; ++s) load();
  cp_async_wait<kStages - 1>();  // the queries
  __syncthreads();

  int stage = 0;
  for (int64_t tile = first; tile < tiles; tile += stride) {
    const int64_t first_position = tile * kTileRows + lane / 4;  // of this thread's four, 8 apart
    float2 scale_error[4];
    float bias[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      scale_error[r] = screen.column.scale_error[first_position + r * 8];
      bias[r] = screen.distance ? screen.column.bias[first_position + r * 8] : 0;
    }
    float sums[2][2 * kPairs][4] = {};
    for (int64_t step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncwarp();  // all lanes' copies are there, and all have read what is overwritten now
      load();
      const char* const a_tile = ring + stage * kStageBytes;
      const char* const b_tile = query_tile + step * queries * kStepBytes;
#pragma unroll
      for (int part = 0; part < kCodeStep / 16; ++part) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) ldmatrix_x4(a[m], a_tile + place(m * 16 + lane % 16, part * 2 + lane / 16));
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          if (p * 16 >= queries) continue;  // no break: the loop must unroll for the sums to stay in registers
          uint32_t b[4];
          ldmatrix_x4(b, b_tile + place(p * 16 + lane / 16 * 8 + lane % 8, part * 2 + lane / 8 % 2));
          const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma<Mma::kF16>(sums[m][2 * p], a[m], left);
            mma<Mma::kF16>(sums[m][2 * p + 1], a[m], right);
          }
        }
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    // Two or three operations a score; what follows is rare.
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint32_t found = 0;  // a bit for 8 queries
#pragma unroll
      for (int n = 0; n < 2 * kPairs; ++n) {
        if (n * 8 >= queries) continue;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float2 cut_factor = cuts[n * 8 + lane % 4 * 2 + c];
          float best = -INFINITY;
#pragma unroll
          for (int r = 0; r < 2; ++r)
            best = fmaxf(best, upper_end(sums[m][n][r * 2 + c], scale_error[m * 2 + r], cut_factor.y, bias[m * 2 + r]));
          if (best >= cut_factor.x) found |= 1u << n;  // never for a NaN
        }
      }
      if (!__any_sync(kAllLanes, found != 0)) continue;
      // Out of their registers, whose names the compiler must know, into the stage that is to be filled next.
      __syncwarp();
      float* const products = reinterpret_cast<float*>(ring + slot * kStageBytes) + lane;
#pragma unroll
      for (int i = 0; i < 8 * kPairs; ++i) products[i * kWarp] = sums[m][i / 4][i % 4];
#pragma unroll 1
      for (int n = 0; n * 8 < queries; ++n) {
        if (!__any_sync(kAllLanes, (found >> n & 1) != 0)) continue;
#pragma unroll 1
        for (int c = 0; c < 2; ++c) {
          const int64_t row = n * 8 + lane % 4 * 2 + c;
          append_column(screen, row, cuts[row], first_position + m * 16,
                        {products[(n * 4 + c) * kWarp], products[(n * 4 + 2 + c) * kWarp]});
        }
      }
    }
  }
  cp_async_wait<0>();
}

}  // namespace

bool launch_screen_few(const Screen& screen, const char* name, void* stream) {
  const int64_t queries = round_up(screen.query_rows, 16), bytes = queries * screen.dim * 2 + kRingBytes;
  const DeviceLimits& limits = device_limits();
  constexpr int64_t kReserved = 2048;  // the block's other shared memory
  if (screen.query_rows > kFewQueries || bytes + kReserved > limits.shared_bytes) return false;
  const int64_t tiles = round_up(screen.columns, kTileRows) / kTileRows;
  const int64_t resident = limits.multiprocessors * std::min<int64_t>(2, limits.shared_bytes / (bytes + kReserved));
  launch(screen_few_kernel, {dim3(static_cast<unsigned>(std::min(tiles, resident))), dim3(kThreads), 1, bytes, stream},
         name, screen, static_cast<int>(queries), tiles);
  return true;
}

}  // namespace pycm::cuda
