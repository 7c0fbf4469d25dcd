// Each primitive of arch.cuh against a formula written here, from the PTX ISA's figures: on the host executor this
// holds the twins to the specification, on a GPU the wrappers to the chip. Inputs are small integers, so sums are
// exact; the rounding cases take others, and ask that the error is within what the error bounds of the screens assume.
//
// One program, built twice: by g++ with the executor (`conformance_simt`), by nvcc (`conformance_gpu`). It prints a
// line per case (each fails with `--wrong`), and ends with 0 (all agree), 1 (some do not) or 77 (no device).
#include "conformance.h"
#include "conformance_sm90.cuh"

namespace {

// ---- warps ----

constexpr int kWarpOutputs = 12;
__global__ void warp_kernel(const int* in, uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const int v = in[lane];
  int all = 0;
  const uint32_t results[kWarpOutputs] = {static_cast<uint32_t>(__shfl_sync(kAllLanes, v, lane * 7)),
                                          static_cast<uint32_t>(__shfl_up_sync(kAllLanes, v, 3, 16)),
                                          static_cast<uint32_t>(__shfl_down_sync(kAllLanes, v, 5, 8)),
                                          static_cast<uint32_t>(__shfl_xor_sync(kAllLanes, v, 9)),
                                          __ballot_sync(kAllLanes, v > 0),
                                          __match_any_sync(kAllLanes, v),
                                          __match_all_sync(kAllLanes, v, &all),
                                          static_cast<uint32_t>(__reduce_add_sync(kAllLanes, v)),
                                          static_cast<uint32_t>(__reduce_min_sync(kAllLanes, v)),
                                          static_cast<uint32_t>(__reduce_max_sync(kAllLanes, v)),
                                          static_cast<uint32_t>(__any_sync(kAllLanes, v == 7)),
                                          static_cast<uint32_t>(__all_sync(kAllLanes, v > -9))};
  for (int i = 0; i < kWarpOutputs; ++i) out[i * 32 + lane] = results[i];
}

void warps() {
  Array<int> in(32);
  Array<uint32_t> out(32 * kWarpOutputs);
  for (size_t i = 0; i < 32; ++i) in.values[i] = small_integer(i, 1);
  launch(warp_kernel, {1, 32}, "warp", in.upload(), out.data());
  out.download();
  report(
      "warp operations", 32 * kWarpOutputs, [&](size_t i) { return static_cast<double>(out.values[i]); },
      [&](size_t i) {
        const std::vector<int>& v = in.values;
        const int lane = static_cast<int>(i % 32);
        uint32_t positive = 0, same = 0;
        int sum = 0, low = 8, high = -9, any = 0;
        for (int j = 0; j < 32; ++j) {
          positive |= static_cast<uint32_t>(v[j] > 0) << j;
          same |= static_cast<uint32_t>(v[j] == v[lane]) << j;
          sum += v[j];
          low = v[j] < low ? v[j] : low;
          high = v[j] > high ? v[j] : high;
          any |= v[j] == 7;
        }
        const int value[kWarpOutputs] = {v[lane * 7 % 32],
                                         lane % 16 < 3 ? v[lane] : v[lane - 3],
                                         lane % 8 + 5 < 8 ? v[lane + 5] : v[lane],
                                         v[lane ^ 9],
                                         static_cast<int>(positive),
                                         static_cast<int>(same),
                                         0,
                                         sum,
                                         low,
                                         high,
                                         any,
                                         1};
        return static_cast<double>(static_cast<uint32_t>(value[i / 32]));
      });
}

// ---- ldmatrix, stmatrix: out[variant][lane][register]; element (r, c) of matrix m is 64m + 8r + c ----

__global__ void matrices_kernel(uint32_t* out) {
  PYCM_SHARED(tile, uint16_t[2][256]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) tile[0][i] = static_cast<uint16_t>(i);
  __syncwarp();
  uint32_t four[4], two[2];
  ldmatrix_x4(four, tile[0] + lane * 8);
  for (int r = 0; r < 4; ++r) out[lane * 4 + r] = four[r];
#if PYCM_SM90
  stmatrix_x4(tile[1] + lane * 8, four);
  __syncwarp();
  for (int r = 0; r < 4; ++r) out[512 + lane * 4 + r] = reinterpret_cast<const uint32_t*>(tile[1])[lane * 4 + r];
#endif
  ldmatrix_x4_trans(four, tile[0] + lane * 8);
  for (int r = 0; r < 4; ++r) out[128 + lane * 4 + r] = four[r];
  ldmatrix_x2(two, tile[0] + lane % 16 * 8);
  for (int r = 0; r < 2; ++r) out[256 + lane * 4 + r] = two[r];
  ldmatrix_x2_trans(two, tile[0] + lane % 16 * 8);
  for (int r = 0; r < 2; ++r) out[384 + lane * 4 + r] = two[r];
}

void matrices() {
  Array<uint32_t> out(640);
  launch(matrices_kernel, {1, 32}, "matrices", out.upload());
  out.download();
  const size_t count = device_limits().sm90() ? 640 : 512;
  report(
      "ldmatrix, stmatrix", count, [&](size_t i) { return static_cast<double>(out.values[i]); },
      [&](size_t i) {
        const size_t variant = i / 128, lane = i / 4 % 32, m = i % 4, r = lane / 4, c = 2 * (lane % 4);
        if ((variant == 2 || variant == 3) && m > 1) return 0.0;
        if (variant == 4) return 2 * (i % 128) + 65536.0 * (2 * (i % 128) + 1);  // the tile itself
        const size_t first = variant % 2 ? 64 * m + 8 * c + r : 64 * m + 8 * r + c;
        return static_cast<double>(first) + 65536.0 * static_cast<double>(first + (variant % 2 ? 8 : 1));
      });
}

// ---- mma.sync: fragments are gathered from row-major matrices by the figures of the PTX ISA ----

template <Mma M>
__global__ void mma_kernel(const char* a, const char* b, MmaSum<M>* d) {
  constexpr int kElements = 4 / kMmaBytes<M>, kRow = 32;  // bytes of a row of K elements
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  uint32_t fa[4], fb[2];
  for (int r = 0; r < 4; ++r)
    fa[r] = *reinterpret_cast<const uint32_t*>(a + (g + r % 2 * 8) * kRow +
                                               (r / 2 * 4 * kElements + t * kElements) * kMmaBytes<M>);
  for (int r = 0; r < 2; ++r)
    fb[r] = *reinterpret_cast<const uint32_t*>(b + g * kRow + (r * 4 * kElements + t * kElements) * kMmaBytes<M>);
  MmaSum<M> sums[4] = {1, 2, 3, 4};
  mma<M>(sums, fa, fb);
  d[g * 8 + 2 * t] = sums[0];
  d[g * 8 + 2 * t + 1] = sums[1];
  d[(g + 8) * 8 + 2 * t] = sums[2];
  d[(g + 8) * 8 + 2 * t + 1] = sums[3];
}

template <Mma M>
void mma_case() {
  constexpr int kDepth = 32 / kMmaBytes<M>;
  Array<char> a(16 * 32), b(8 * 32);
  Array<MmaSum<M>> d(128);
  for (size_t i = 0; i < 16 * kDepth; ++i) encode(M, small_integer(i, 2), a.values.data() + i * kMmaBytes<M>);
  for (size_t i = 0; i < 8 * kDepth; ++i) encode(M, small_integer(i, 3), b.values.data() + i * kMmaBytes<M>);
  launch(mma_kernel<M>, {1, 32}, "mma", a.upload(), b.upload(), d.data());
  d.download();
  report(
      std::string("mma ") + name_of(M), 128, [&](size_t i) { return static_cast<double>(d.values[i]); },
      [&](size_t i) {
        const size_t row = i / 8, column = i % 8;
        int sum = 1 + static_cast<int>(row / 8 * 2 + column % 2);
        for (size_t k = 0; k < kDepth; ++k)
          sum += small_integer(row * kDepth + k, 2) * small_integer(column * kDepth + k, 3);
        return static_cast<double>(sum);
      });
}

template <Mma M>
void mma_rounding_case() {
  constexpr int kDepth = 32 / kMmaBytes<M>;
  Array<char> a(16 * 32), b(8 * 32);
  Array<float> d(128);
  for (size_t i = 0; i < 16 * kDepth; ++i) encode_wide(M, wide_number(i, 2), a.values.data() + i * kMmaBytes<M>);
  for (size_t i = 0; i < 8 * kDepth; ++i) encode_wide(M, wide_number(i, 3), b.values.data() + i * kMmaBytes<M>);
  launch(mma_kernel<M>, {1, 32}, "mma", a.upload(), b.upload(), d.data());
  d.download();
  report_rounding(
      std::string("mma ") + name_of(M) + " rounding", 128, [&](size_t i) { return static_cast<double>(d.values[i]); },
      [&](size_t i) {
        RoundedSum sum(1 + static_cast<double>(i / 64 * 2 + i % 2));
        double products[kDepth];
        for (size_t k = 0; k < kDepth; ++k)
          products[k] = wide_number(i / 8 * kDepth + k, 2) * wide_number(i % 8 * kDepth + k, 3);
        sum.add(products, kDepth);
        return sum;
      });
}

__global__ void mma_f64_kernel(const double* a, const double* b, double* d) {
  const int lane = static_cast<int>(threadIdx.x);
  double sums[2] = {1, 2};
  mma_f64(sums, a[lane], b[lane]);
  d[lane * 2] = sums[0];
  d[lane * 2 + 1] = sums[1];
}

void mma_f64_case() {
  Array<double> a(32), b(32), d(64);
  for (size_t i = 0; i < 32; ++i) a.values[i] = small_integer(i, 4) / 8.0;
  for (size_t i = 0; i < 32; ++i) b.values[i] = small_integer(i, 5) / 8.0;
  launch(mma_f64_kernel, {1, 32}, "mma_f64", a.upload(), b.upload(), d.data());
  d.download();
  report(
      "mma f64", 64, [&](size_t i) { return d.values[i]; },
      [&](size_t i) {
        const size_t row = i / 8, column = i % 8;
        double sum = 1 + static_cast<double>(column % 2);
        for (size_t k = 0; k < 4; ++k) sum += a.values[row * 4 + k] * b.values[column * 4 + k];
        return sum;
      });
}

// ---- cp.async ----

__global__ void cp_async_kernel(const float* in, float* out) {
  PYCM_SHARED(tile, float4[96]);
  const int thread = static_cast<int>(threadIdx.x);
  cp_async16(&tile[thread], in + thread * 4, thread % 3 != 0);
  cp_async_commit();
  cp_async16_bytes(&tile[32 + thread], in + thread * 4, thread % 5 * 4);
  cp_async<4>(&tile[64 + thread].x, in + thread);
  cp_async<8>(&tile[64 + thread].z, in + thread * 2, thread % 2 == 0);
  cp_async_commit();
  cp_async_wait<1>();
  reinterpret_cast<float4*>(out)[thread] = tile[thread];
  cp_async_wait<0>();
  __syncthreads();
  reinterpret_cast<float4*>(out)[32 + thread] = tile[32 + (thread ^ 1)];
  out[256 + thread * 3] = tile[64 + thread].x;
  out[257 + thread * 3] = tile[64 + thread].z;
  out[258 + thread * 3] = tile[64 + thread].w;
}

void cp_async_case() {
  Array<float> in(128), out(352);
  for (size_t i = 0; i < 128; ++i) in.values[i] = static_cast<float>(i + 1);
  launch(cp_async_kernel, {1, 32}, "cp_async", in.upload(), out.data());
  out.download();
  report(
      "cp.async", 352, [&](size_t i) { return static_cast<double>(out.values[i]); },
      [&](size_t i) {
        if (i < 128) return i / 4 % 3 ? static_cast<double>(i + 1) : 0.0;
        if (i < 256) {
          const size_t thread = (i - 128) / 4 ^ 1;
          return i % 4 < thread % 5 ? static_cast<double>(thread * 4 + i % 4 + 1) : 0.0;
        }
        const size_t thread = (i - 256) / 3, part = (i - 256) % 3;
        return part == 0         ? static_cast<double>(thread + 1)
               : thread % 2 == 0 ? static_cast<double>(2 * thread + part)
                                 : 0.0;
      });
}

// ---- turns: each block adds to what the one before it has written ----

__global__ void turns_kernel(unsigned long long* arrivals, float* out) {
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  if (thread == 0)
    while (load_acquire(arrivals) < static_cast<unsigned long long>(block)) __nanosleep(20);
  __syncthreads();
  out[block * 64 + thread] =
      block == 0 ? static_cast<float>(thread) : load_l2(&out[(block - 1) * 64 + (thread ^ 33)]) + 1;
  __syncthreads();
  if (thread != 0) return;
  __threadfence();
  atomicAdd(arrivals, 1ull);
}

void turns_case() {
  Array<unsigned long long> arrivals(1);
  Array<float> out(4 * 64);
  Grid grid{{4}, {64}};
  grid.cooperative = true;
  launch(turns_kernel, grid, "turns", arrivals.upload(), out.data());
  out.download();
  report(
      "load_acquire", out.values.size(), [&](size_t i) { return static_cast<double>(out.values[i]); },
      [](size_t i) { return static_cast<double>((i / 64 % 2 == 0 ? i % 64 : (i % 64) ^ 33) + i / 64); });
}

// ---- conversions and directed rounding ----

__global__ void arithmetic_kernel(const float* in, int count, float* out) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 128) {
    const float v = in[i], w = in[(i + 1) % count];
    out[i * 8] = half_to_float(float_to_half(v));
    out[i * 8 + 1] = bfloat16_to_float(float_to_bfloat16(v));
    out[i * 8 + 2] = __uint_as_float(float_to_tf32(v));
    out[i * 8 + 3] = __fadd_ru(v, w);
    out[i * 8 + 4] = __fadd_rd(v, w);
    out[i * 8 + 5] = __double2float_ru(static_cast<double>(v) * 1.1);
    out[i * 8 + 6] = max_nan(v, w);
    out[i * 8 + 7] = half_to_float(static_cast<uint16_t>(pack_half2(v, w) >> 16));
  }
}

// `v` rounded to a float of `bits` mantissa bits (the leading one included) and smallest exponent `low`: exact
// arithmetic in double.
double rounded(double v, int bits, int low, double largest, bool ties_away) {
  if (v != v || std::isinf(v) || v == 0) return v;
  const int exponent = std::max(std::ilogb(v), low);
  const double quantum = std::ldexp(1.0, exponent - bits + 1), steps = v / quantum;
  const double result = quantum * (ties_away ? std::round(steps) : std::nearbyint(steps));
  return std::fabs(result) > largest ? std::copysign(INFINITY, v) : result;
}

void arithmetic_case() {
  std::vector<float> edges = {0.0f,      1.0f,      65504.0f,      65519.9f, 65520.0f,   1e30f,         6.1e-5f,
                              6e-8f,     2.98e-8f,  2.9802322e-8f, 1e-10f,   0x1.001p0f, 0x1.003p0f,    0x1.004p-14f,
                              0x1.01p0f, 0x1.03p0f, 0x1.0ffp5f,    3.4e38f,  -3.4e38f,   0x1.0001p-20f, INFINITY,
                              NAN};
  for (int i = 0; i < 1000; ++i)
    edges.push_back(static_cast<float>(std::ldexp(1.0 + (i * 7919 % 65536) / 65536.0 + i * 1e-7, i % 40 - 24)));
  const size_t plain = edges.size();
  for (size_t i = 0; i < plain; ++i) edges.push_back(-edges[i]);
  Array<float> in(edges.size()), out(edges.size() * 8);
  in.values = edges;
#if defined(PYCM_SIMT)
  simt::Memory memory;
  memory.add(in.values.data(), static_cast<int64_t>(edges.size() * 4));
  const float* data = in.values.data();
#else
  const float* data = in.upload();
#endif
  launch(arithmetic_kernel, {1, 128}, "arithmetic", data, static_cast<int>(edges.size()), out.data());
  out.download();
  report(
      "conversions, rounding", out.values.size(), [&](size_t i) { return static_cast<double>(out.values[i]); },
      [&](size_t i) {
        const float v = edges[i / 8], w = edges[(i / 8 + 1) % edges.size()];
        const double sum = static_cast<double>(v) + w;
        auto directed = [](double exact, double rest,
                           float to) {  // the first float on the side of `to` that is not beyond exact + rest
          float f = static_cast<float>(exact);
          if (!std::isfinite(exact)) return static_cast<double>(f);
          const bool up = to > 0;
          while (up ? f < exact || (f == exact && rest > 0) : f > exact || (f == exact && rest < 0))
            f = std::nextafter(f, to);
          return static_cast<double>(f);
        };
        const double swapped = std::fabs(v) > std::fabs(w) ? w - (sum - v) : v - (sum - w);
        switch (i % 8) {
          case 0: return rounded(v, 11, -14, 65504.0, false);
          case 1: return rounded(v, 8, -126, 0x1.fep127, false);
          case 2: return rounded(v, 11, -126, 0x1.ffcp127, true);
          case 3: return directed(sum, swapped, INFINITY);
          case 4: return directed(sum, swapped, -INFINITY);
          case 5: return directed(static_cast<double>(v) * 1.1, 0, INFINITY);
          case 6: return v != v || w != w ? static_cast<double>(NAN) : static_cast<double>(v < w ? w : v);
          default: return rounded(w, 11, -14, 65504.0, false);
        }
      });
}

}  // namespace

int main(int count, char** arguments) {
  wrong = count > 1 && std::strcmp(arguments[1], "--wrong") == 0;
  try {
#if !defined(PYCM_SIMT)
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      std::printf("skipped: no CUDA device\n");
      return 77;
    }
#endif
    warps();
    matrices();
    mma_case<Mma::kF16>();
    mma_case<Mma::kBF16>();
    mma_case<Mma::kTF32>();
    mma_case<Mma::kS8>();
    mma_rounding_case<Mma::kF16>();
    mma_rounding_case<Mma::kBF16>();
    mma_rounding_case<Mma::kTF32>();
    mma_f64_case();
    cp_async_case();
    turns_case();
    arithmetic_case();
    if (device_limits().sm90()) {
      for (const Swizzle swizzle : {Swizzle::kNone, Swizzle::k128}) {
        tma_case(swizzle, 0, 0);
        tma_case(swizzle, 16, 10);
        tma_case(swizzle, -4, -3);
      }
      tma_3d_case();
      cluster_case();
      wgmma_cases<Mma::kF16>();
      wgmma_cases<Mma::kBF16>();
      wgmma_cases<Mma::kTF32>();
      wgmma_cases<Mma::kS8>();
      wgmma_rounding_case<Mma::kF16>();
      wgmma_rounding_case<Mma::kBF16>();
      wgmma_rounding_case<Mma::kTF32>();
    }
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
  return failures == 0 ? 0 : 1;
}
