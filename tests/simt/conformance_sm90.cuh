// The cases of conformance.cu that need Hopper: wgmma, TMA, mbarriers, clusters.
#pragma once

#include "conformance.h"

namespace {

// ---- wgmma over tiles that TMA wrote swizzled: d = a b' + a b', a 64 x K and b N x K, K two tiles wide ----

template <Mma M, int N, bool RegisterA>
__global__ void __launch_bounds__(128)
    wgmma_kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const char* a,
                 MmaSum<M>* d) {
#if PYCM_SM90
  constexpr int kTileElements = 128 / kMmaBytes<M>, kTileA = 64 * 128, kTileB = (N + 7) / 8 * 1024;
  char* tile_a = dynamic_shared();
  char* tile_b = tile_a + 2 * kTileA;
  PYCM_SHARED(full, uint64_t);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    mbarrier_init(&full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (thread == 0) {
    mbarrier_arrive_expect_tx(&full, 2 * (kTileA + N * 128));
    for (int k = 0; k < 2; ++k) {
      tma_load_2d(tile_a + k * kTileA, &map_a, &full, k * kTileElements, 0);
      tma_load_2d(tile_b + k * kTileB, &map_b, &full, k * kTileElements, 0);
    }
  }
  mbarrier_wait(&full, 0);
  MmaSum<M> sums[N / 2];
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  for (int pass = 0; pass < 2; ++pass) {
    wgmma_fence();
    for (int step = 0; step < 8; ++step) {
      const uint64_t descriptor_b = wgmma_descriptor(tile_b + step / 4 * kTileB + step % 4 * 32);
      if constexpr (RegisterA) {
        constexpr int kElements = 4 / kMmaBytes<M>;
        uint32_t fragment[4];
        for (int r = 0; r < 4; ++r)
          fragment[r] = *reinterpret_cast<const uint32_t*>(a + (16 * warp + g + r % 2 * 8) * 256 + step * 32 +
                                                           (r / 2 * 4 * kElements + t * kElements) * kMmaBytes<M>);
        wgmma_fence();
        wgmma<M, N>(sums, fragment, descriptor_b, pass + step > 0);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(sums);
        wgmma_fence();
      } else {
        wgmma<M, N>(sums, wgmma_descriptor(tile_a + step / 4 * kTileA + step % 4 * 32), descriptor_b, pass + step > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(sums);
  }
  for (int j = 0; j < N / 8; ++j)
    for (int r = 0; r < 4; ++r) d[(16 * warp + g + r / 2 * 8) * N + 8 * j + 2 * t + r % 2] = sums[4 * j + r];
#endif
}

template <Mma M>
constexpr TensorElement kElementOf = M == Mma::kS8     ? TensorElement::kInt8
                                     : M == Mma::kTF32 ? TensorElement::kFloat32
                                     : M == Mma::kF16  ? TensorElement::kFloat16
                                                       : TensorElement::kBFloat16;

// The sums for matrices of two tiles' depth that are in a and b.
template <Mma M, int N, bool RegisterA>
void run_wgmma(Array<char>& a, Array<char>& b, Array<MmaSum<M>>& d) {
  constexpr int kDepth = 256 / kMmaBytes<M>;
  const char* device_a = a.upload();
  const TensorMap map_a = make_tensor_map_2d(device_a, kElementOf<M>, kDepth, 64, 256, kDepth / 2, 64);
  const TensorMap map_b = make_tensor_map_2d(b.upload(), kElementOf<M>, kDepth, N, 256, kDepth / 2, N);
  launch(wgmma_kernel<M, N, RegisterA>, {1, 128, 1, 2 * (64 * 128 + (N + 7) / 8 * 1024)}, "wgmma", map_a, map_b,
         device_a, d.data());
  d.download();
}

template <Mma M, int N, bool RegisterA>
void wgmma_case() {
  constexpr int kDepth = 256 / kMmaBytes<M>;
  Array<char> a(64 * 256), b(N * 256);
  Array<MmaSum<M>> d(64 * N);
  for (size_t i = 0; i < 64 * kDepth; ++i) encode(M, small_integer(i, 6), a.values.data() + i * kMmaBytes<M>);
  for (size_t i = 0; i < N * kDepth; ++i) encode(M, small_integer(i, 7), b.values.data() + i * kMmaBytes<M>);
  run_wgmma<M, N, RegisterA>(a, b, d);
  report(
      std::string("wgmma ") + name_of(M) + " n" + std::to_string(N) + (RegisterA ? " rs" : " ss"), 64 * N,
      [&](size_t i) { return static_cast<double>(d.values[i]); },
      [&](size_t i) {
        int sum = 0;
        for (size_t k = 0; k < kDepth; ++k)
          sum += small_integer(i / N * kDepth + k, 6) * small_integer(i % N * kDepth + k, 7);
        return 2.0 * sum;
      });
}

template <Mma M>
void wgmma_rounding_case() {
  constexpr int kDepth = 256 / kMmaBytes<M>, kStep = kDepth / 8, kN = 64;
  Array<char> a(64 * 256), b(kN * 256);
  Array<float> d(64 * kN);
  for (size_t i = 0; i < 64 * kDepth; ++i) encode_wide(M, wide_number(i, 6), a.values.data() + i * kMmaBytes<M>);
  for (size_t i = 0; i < kN * kDepth; ++i) encode_wide(M, wide_number(i, 7), b.values.data() + i * kMmaBytes<M>);
  run_wgmma<M, kN, false>(a, b, d);
  report_rounding(
      std::string("wgmma ") + name_of(M) + " rounding", d.values.size(),
      [&](size_t i) { return static_cast<double>(d.values[i]); },
      [&](size_t i) {
        RoundedSum sum(0);
        double products[kStep];
        for (size_t k = 0; k < 2 * kDepth; ++k) {  // all of K twice, a step at a time
          products[k % kStep] =
              wide_number(i / kN * kDepth + k % kDepth, 6) * wide_number(i % kN * kDepth + k % kDepth, 7);
          if (k % kStep == kStep - 1) sum.add(products, kStep);
        }
        return sum;
      });
}

template <Mma M>
void wgmma_cases() {
  wgmma_case<M, 8, false>();
  wgmma_case<M, 24, false>();
  wgmma_case<M, 64, false>();
  wgmma_case<M, 96, false>();
  wgmma_case<M, 128, true>();
  wgmma_case<M, 256, false>();
}

// ---- TMA: boxes that stick out, swizzled and not, three dimensions, stores ----

constexpr int kColumns = 40, kRows = 20;  // of floats; rows 192 bytes apart, 48 floats

__global__ void tma_kernel(const __grid_constant__ TensorMap in, const __grid_constant__ TensorMap out, float* box,
                           int x, int y) {
#if PYCM_SM90
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  PYCM_SHARED(full, uint64_t);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    prefetch_tensor_map(&in);
    mbarrier_init(&full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (thread == 0) {
    mbarrier_arrive_expect_tx(&full, 16 * 128);
    tma_load_2d(tile, &in, &full, x, y);
  }
  mbarrier_wait(&full, 0);
  for (int i = thread; i < 16 * 32; i += 128) box[i] = tile[i];
  __syncthreads();
  for (int i = thread; i < 16 * 32; i += 128) tile[i] += 1000.0f;
  fence_proxy_async();
  __syncthreads();
  if (thread == 0) {
    tma_store_2d(&out, tile, x, y);
    tma_store_commit();
    tma_store_wait_read<0>();
  }
#endif
}

void tma_case(Swizzle swizzle, int x, int y) {
  Array<float> in(kRows * 48), out(kRows * 48), box(16 * 32);
  for (size_t i = 0; i < in.values.size(); ++i) in.values[i] = static_cast<float>(i + 1);
  const TensorMap map_in =
      make_tensor_map_2d(in.upload(), TensorElement::kFloat32, kColumns, kRows, 192, 32, 16, swizzle);
  const TensorMap map_out =
      make_tensor_map_2d(out.upload(), TensorElement::kFloat32, kColumns, kRows, 192, 32, 16, swizzle);
  launch(tma_kernel, {1, 128, 1, 2048}, "tma", map_in, map_out, box.data(), x, y);
  box.download();
  out.download();
  auto inside = [](int column, int row) { return column >= 0 && column < kColumns && row >= 0 && row < kRows; };
  const std::string name = std::string("tma ") + (swizzle == Swizzle::k128 ? "swizzled " : "plain ") +
                           std::to_string(x) + "," + std::to_string(y);
  report(
      name, 512, [&](size_t i) { return static_cast<double>(box.values[i]); },
      [&](size_t i) {
        const size_t row = i / 32,
                     chunk =
                         i % 32 / 4 ^ (swizzle == Swizzle::k128 ? row % 8 : 0);  // row r keeps column chunk c at c ^ r
        const int column = x + static_cast<int>(chunk * 4 + i % 4), r = y + static_cast<int>(row);
        return inside(column, r) ? r * 48.0 + column + 1 : 0.0;
      });
  report(
      name + " store", out.values.size(), [&](size_t i) { return static_cast<double>(out.values[i]); },
      [&](size_t i) {
        const int column = static_cast<int>(i % 48), row = static_cast<int>(i / 48);
        const bool written = column >= x && column < x + 32 && row >= y && row < y + 16 && inside(column, row);
        return written ? static_cast<double>(i) + 1001 : 0.0;
      });
}

__global__ void tma_3d_kernel(const __grid_constant__ TensorMap in, const float* run, float* box) {
#if PYCM_SM90
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  PYCM_SHARED(full, uint64_t[2]);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    mbarrier_init(&full[0], 1);
    mbarrier_init(&full[1], 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (thread == 0) {
    mbarrier_arrive_expect_tx(&full[0], 2 * 4 * 128);
    tma_load_3d(tile, &in, &full[0], 0, 2, 1);
    mbarrier_arrive_expect_tx(&full[1], 64);
    bulk_load(tile + 256, run, 64, &full[1]);
  }
  mbarrier_wait(&full[0], 0);
  mbarrier_wait(&full[1], 0);
  for (int i = thread; i < 272; i += 128) box[i] = tile[i];
#endif
}

void tma_3d_case() {  // 2 planes of 4 x 32 from (0, 2, 1) of 3 planes of 5 x 32
  Array<float> in(3 * 5 * 32), box(272);
  for (size_t i = 0; i < in.values.size(); ++i) in.values[i] = static_cast<float>(i + 1);
  const float* data = in.upload();
  const TensorMap map = make_tensor_map_3d(data, TensorElement::kFloat32, 32, 5, 3, 128, 640, 32, 4, 2, Swizzle::kNone);
  launch(tma_3d_kernel, {1, 128, 1, 2048}, "tma_3d", map, data + 8, box.data());
  box.download();
  report(
      "tma 3d, bulk copy", 272, [&](size_t i) { return static_cast<double>(box.values[i]); },
      [&](size_t i) {
        if (i >= 256) return static_cast<double>(i - 256 + 9);
        const size_t plane = 1 + i / 128, row = 2 + i % 128 / 32;
        return plane < 3 && row < 5 ? static_cast<double>(plane * 160 + row * 32 + i % 32 + 1) : 0.0;
      });
}

// ---- clusters: multicast, remote arrivals, st.async, distributed shared memory ----

__global__ void cluster_kernel(const __grid_constant__ TensorMap in, float* out) {
#if PYCM_SM90
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  PYCM_SHARED(full, uint64_t);
  PYCM_SHARED(remote, uint64_t);
  PYCM_SHARED(arrivals, uint64_t);
  PYCM_SHARED(received, float[2]);
  PYCM_SHARED(mine, float);
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t rank = cluster_rank(), other = rank ^ 1;
  if (thread == 0) {
    mbarrier_init(&full, 1);
    mbarrier_init(&remote, 1);
    mbarrier_init(&arrivals, 2 * 64);
    fence_mbarrier_init();
    mine = 100.0f + static_cast<float>(rank);
  }
  cluster_sync();
  if (thread == 0) {
    mbarrier_arrive_expect_tx(&full, 2 * 8 * 128);  // both blocks send their half of the box to both
    tma_load_2d_multicast(tile + rank * 256, &in, &full, 0, static_cast<int>(8 * rank), 3);
    mbarrier_arrive_expect_tx(&remote, 8);
    store_async(&received[0], static_cast<float>(rank), &remote, other);
    store_async(&received[1], static_cast<float>(rank) + 0.5f, &remote, other);
  }
  for (uint32_t to = 0; to < cluster_size(); ++to) mbarrier_arrive_cluster(&arrivals, to);
  mbarrier_wait_cluster(&arrivals, 0);
  mbarrier_wait(&full, 0);
  mbarrier_wait_cluster(&remote, 0);
  float* to = out + rank * 515;
  for (int i = thread; i < 512; i += 64) to[i] = tile[i];
  if (thread < 2) to[512 + thread] = received[thread];
  if (thread == 2) to[514] = *map_shared(&mine, other);
  cluster_sync();
#endif
}

void cluster_case() {
  Array<float> in(16 * 32), out(2 * 515);
  for (size_t i = 0; i < in.values.size(); ++i) in.values[i] = static_cast<float>(i + 1);
  const TensorMap map = make_tensor_map_2d(in.upload(), TensorElement::kFloat32, 32, 16, 128, 32, 8, Swizzle::kNone);
  launch(cluster_kernel, {2, 64, 2, 2048}, "cluster", map, out.data());
  out.download();
  report(
      "cluster", out.values.size(), [&](size_t i) { return static_cast<double>(out.values[i]); },
      [&](size_t i) {
        const size_t rank = i / 515, other = rank ^ 1, at = i % 515;
        return at < 512    ? static_cast<double>(at + 1)
               : at == 514 ? 100.0 + static_cast<double>(other)
                           : static_cast<double>(other) + (at == 513 ? 0.5 : 0.0);
      });
}

}  // namespace
