// Tensor cores: ldmatrix and mma.sync, with the fragment layouts of the PTX ISA (stated in csrc/cuda/mma.cuh); what they and
// wgmma.cpp compute.
#pragma GCC optimize("O3")

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "tensor.h"

namespace simt {

void decode(int kind, uint32_t bits, float* to) {
  if (kind == kTF32) to[0] = from_bits<float>(bits & 0xffffe000u);  // the hardware ignores the low 13 bits
  for (int i = 0; kind != kTF32 && i < elements_per_register(kind); ++i)
    to[i] = kind == kS8     ? static_cast<float>(static_cast<int8_t>(bits >> (8 * i)))
            : kind == kBF16 ? from_bits<float>(bits >> (16 * i) << 16)
                            : half_to_float(static_cast<uint16_t>(bits >> (16 * i)));
}

namespace {

// Products are exact in float; how the sum is rounded the PTX ISA leaves open.
void product_nearest(int m, int n, int k, const float* a, const float* b, float* d) {
  for (int i = 0; i < m; ++i)
    for (int p = 0; p < k; ++p) {
      const float factor = a[i * k + p];
      for (int j = 0; j < n; ++j) d[i * n + j] += factor * b[p * n + j];
    }
}

// The pessimistic reading: every addend of a group, the accumulator included, is cut to 2^-23 of the largest one's
// binade, and the sum is cut to float.
void product_truncated(int m, int n, int k, const float* a, const float* b, float* d) {
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      double addends[33], largest = std::fabs(d[i * n + j]), sum = 0;
      addends[k] = d[i * n + j];
      for (int p = 0; p < k; ++p) {
        addends[p] = static_cast<double>(a[i * k + p]) * b[p * n + j];
        largest = std::max(largest, std::fabs(addends[p]));
      }
      if (!(largest > 0) || !std::isfinite(largest)) {
        for (int p = 0; p <= k; ++p) sum += addends[p];
        d[i * n + j] = static_cast<float>(sum);
        continue;
      }
      const double quantum = std::ldexp(1.0, std::ilogb(largest) - 23);
      for (int p = 0; p <= k; ++p) sum += std::trunc(addends[p] / quantum) * quantum;
      float result = static_cast<float>(sum);
      if (std::fabs(static_cast<double>(result)) > std::fabs(sum)) result = std::nextafter(result, 0.0f);
      d[i * n + j] = result;
    }
}

}  // namespace

void product(int kind, int m, int n, const float* a, const float* b, uint32_t* d) {
  const int k = depth(kind);
  if (kind == kS8) {
    for (int i = 0; i < m; ++i)
      for (int p = 0; p < k; ++p) {
        const int32_t factor = static_cast<int32_t>(a[i * k + p]);
        for (int j = 0; j < n; ++j) d[i * n + j] += static_cast<uint32_t>(factor * static_cast<int32_t>(b[p * n + j]));
      }
    return;
  }
  static const bool truncates = [] {
    const char* mode = std::getenv("PYCM_SIMT_MMA");
    return mode != nullptr && std::string(mode) == "truncate";
  }();
  (truncates ? product_truncated : product_nearest)(m, n, k, a, b, reinterpret_cast<float*>(d));
}

void place_a(int kind, int lane, const uint32_t* registers, float* to) {
  const int e = elements_per_register(kind);
  for (int r = 0; r < 4; ++r)
    decode(kind, registers[r], to + (lane / 4 + 8 * (r & 1)) * depth(kind) + 4 * e * (r >> 1) + e * (lane % 4));
}

void mma(int kind, void* d, const uint32_t* a, const uint32_t* b) {
  struct Lane {
    int kind;
    uint32_t* d;
    const uint32_t *a, *b;
  } mine{kind, static_cast<uint32_t*>(d), a, b};
  static const char* const kNames[] = {"mma<kF16>", "mma<kBF16>", "mma<kTF32>", "mma<kS8>"};
  warp_collective(
      0xffffffffu, kNames[kind], &mine,
      [](uint32_t, void** lanes) {
        auto lane = [&](int i) -> Lane& { return *static_cast<Lane*>(lanes[i]); };
        const int kind = lane(0).kind, k = depth(kind), e = elements_per_register(kind);
        float a[16 * 32], b[32 * 8], elements[4];
        uint32_t d[16 * 8];
        for (int i = 0; i < 32; ++i) {
          place_a(kind, i, lane(i).a, a);
          for (int r = 0; r < 2; ++r) {
            decode(kind, lane(i).b[r], elements);
            for (int j = 0; j < e; ++j) b[(4 * e * r + e * (i % 4) + j) * 8 + i / 4] = elements[j];
          }
          for (int j = 0; j < 4; ++j) d[(i / 4 + 8 * (j >> 1)) * 8 + 2 * (i % 4) + (j & 1)] = lane(i).d[j];
        }
        (void)k;
        product(kind, 16, 8, a, b, d);
        for (int i = 0; i < 32; ++i)
          for (int j = 0; j < 4; ++j) lane(i).d[j] = d[(i / 4 + 8 * (j >> 1)) * 8 + 2 * (i % 4) + (j & 1)];
      },
      SIMT_CALLER);
}

void mma_f64(double* d, double a, double b) {
  struct Lane {
    double* d;
    double a, b;
  } mine{d, a, b};
  warp_collective(
      0xffffffffu, "mma_f64", &mine,
      [](uint32_t, void** lanes) {
        auto lane = [&](int i) -> Lane& { return *static_cast<Lane*>(lanes[i]); };
        for (int i = 0; i < 32; ++i)
          for (int j = 0; j < 2; ++j)
            for (int p = 0; p < 4; ++p)
              lane(i).d[j] = std::fma(lane(i / 4 * 4 + p).a, lane((2 * (i % 4) + j) * 4 + p).b, lane(i).d[j]);
      },
      SIMT_CALLER);
}

// ---- ldmatrix, stmatrix ----

namespace {

struct Rows {
  char* row;
  uint32_t* registers;
  int matrices;
  bool transposed, stores;
  const void* at;
};

void move_matrices(uint32_t, void** lanes) {
  auto lane = [&](int i) -> Rows& { return *static_cast<Rows*>(lanes[i]); };
  const Rows& all = lane(0);
  Thread* const self = current;
  Thread* const first = self - self->lane;
  for (int i = 0; i < 8 * all.matrices; ++i) {
    current = first + i;
    const uintptr_t address = reinterpret_cast<uintptr_t>(lane(i).row);
    const Region* region = region_of(address);
    if (region == nullptr || region->block != current->block)
      fail("ldmatrix or stmatrix: not an address in this block's shared memory", lane(i).at);
    if (address % 16 != 0) fail("misaligned: a matrix row must be 16-byte aligned", lane(i).at);
    check(address, 16, all.stores ? kWrite : kRead, lane(i).at);
  }
  current = self;
  for (int m = 0; m < all.matrices; ++m)
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 2; ++j) {
        const int row = all.transposed ? 2 * (i % 4) + j : i / 4, column = all.transposed ? i / 4 : 2 * (i % 4) + j;
        char* in_shared = lane(8 * m + row).row + 2 * column;
        char* in_register = reinterpret_cast<char*>(lane(i).registers + m) + 2 * j;
        std::memcpy(all.stores ? in_shared : in_register, all.stores ? in_register : in_shared, 2);
      }
}

}  // namespace

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed) {
  Rows mine{static_cast<char*>(const_cast<void*>(row)), registers, matrices, transposed, false, SIMT_CALLER};
  warp_collective(0xffffffffu, matrices == 4 ? "ldmatrix_x4" : "ldmatrix_x2", &mine, move_matrices, SIMT_CALLER);
}
void stmatrix(void* row, const uint32_t* registers, int matrices) {
  Rows mine{static_cast<char*>(row), const_cast<uint32_t*>(registers), matrices, false, true, SIMT_CALLER};
  warp_collective(0xffffffffu, "stmatrix", &mine, move_matrices, SIMT_CALLER);
}

// ---- halves ----

float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits} >> 15 << 31, exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
  if (exponent == 31) return from_bits<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return from_bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

uint16_t float_to_half(float value) {
  const uint32_t bits = from_bits<uint32_t>(to_bits(value));
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (value != value) return 0x7fff;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  // Adding 1.5 * 2^23 quanta rounds to a multiple of the quantum, to nearest even.
  const int exponent = std::max(magnitude == 0 ? -14 : std::ilogb(magnitude), -14);
  const float quantum = std::ldexp(1.0f, exponent - 10);
  const uint32_t steps =
      static_cast<uint32_t>(std::nearbyint(magnitude / quantum));  // 1024..2048, or fewer if subnormal
  return static_cast<uint16_t>(sign | (steps + (static_cast<uint32_t>(exponent + 14) << 10)));
}

}  // namespace simt
