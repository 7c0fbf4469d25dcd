// What the cases of conformance.cu share: arrays on both sides, small integers as elements of any kind, the comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"
#if defined(PYCM_SIMT)
#include "memory.h"
#endif

using namespace pycm::cuda;

namespace {

// ---- arrays the kernel and this program share ----

template <typename T>
class Array {
 public:
  explicit Array(size_t count) : values(count) {
#if defined(PYCM_SIMT)
    memory_.add(values.data(), static_cast<int64_t>(count * sizeof(T)));
    device_ = values.data();
#else
    cuda_check(cudaMalloc(&device_, count * sizeof(T)), "cudaMalloc");
#endif
  }
#if !defined(PYCM_SIMT)
  ~Array() { cudaFree(device_); }
#endif
  Array(const Array&) = delete;
  T* upload() {
#if !defined(PYCM_SIMT)
    cuda_check(cudaMemcpy(device_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
#endif
    return device_;
  }
  void download() {
#if !defined(PYCM_SIMT)
    cuda_check(cudaMemcpy(values.data(), device_, values.size() * sizeof(T), cudaMemcpyDeviceToHost), "download");
#endif
  }
  T* data() const { return device_; }
  std::vector<T> values;

 private:
  T* device_ = nullptr;
#if defined(PYCM_SIMT)
  simt::Memory memory_;
#endif
};

int failures = 0;
bool wrong = false;  // `--wrong` expects something else: the comparison itself must be able to fail

void report(const std::string& name, size_t count, const std::function<double(size_t)>& got,
            const std::function<double(size_t)>& expected) {
  for (size_t i = 0; i < count; ++i) {
    const double a = got(i), b = expected(i) + wrong;
    if (a == b || (a != a && b != b)) continue;
    std::printf("%-28s FAILED: element %zu: expected %.9g, got %.9g\n", name.c_str(), i, b, a);
    ++failures;
    return;
  }
  std::printf("%-28s ok (%zu values)\n", name.c_str(), count);
}

// How tensor cores round a sum is not specified. The screens' error bounds assume at worst this: of the products of one
// instruction and the accumulator, each is cut to 2^-23 of the largest one's binade, and so is their sum.
class RoundedSum {
 public:
  explicit RoundedSum(double start) : sum_(start) {}
  void add(const double* products, int count) {  // of one instruction
    double largest = std::fabs(sum_);
    for (int i = 0; i < count; ++i) largest = std::max(largest, std::fabs(products[i]));
    for (int i = 0; i < count; ++i) sum_ += products[i];  // in double, 29 bits more than float: as good as exact
    if (largest > 0) bound_ += (count + 2) * std::ldexp(1.0, std::ilogb(largest) - 23);
  }
  double sum() const { return sum_; }
  double bound() const { return bound_; }

 private:
  double sum_, bound_ = 0;
};

void report_rounding(const std::string& name, size_t count, const std::function<double(size_t)>& got,
                     const std::function<RoundedSum(size_t)>& expected) {
  double worst = 0;
  for (size_t i = 0; i < count; ++i) {
    const RoundedSum sum = expected(i);
    const double error = std::fabs(got(i) - sum.sum() - (wrong ? 1e3 : 0)) / sum.bound();
    worst = error <= worst ? worst : error;  // NaN is the worst
  }
  const bool good = worst <= 1;
  std::printf("%-28s %s (%zu values, the worst error is %.3f of the bound)\n", name.c_str(), good ? "ok" : "FAILED",
              count, worst);
  failures += !good;
}

int small_integer(size_t i, int seed) {
  return static_cast<int>((i * 2654435761u + static_cast<size_t>(seed) * 40503u) >> 7 & 15) - 8;
}

uint16_t half_of(int v) {  // of an integer below 2048: sign, exponent, mantissa
  if (v == 0) return 0;
  int magnitude = v < 0 ? -v : v, exponent = 0;
  while (magnitude >> (exponent + 1)) ++exponent;
  return static_cast<uint16_t>((v < 0 ? 0x8000 : 0) | (exponent + 15) << 10 | ((magnitude << (10 - exponent)) & 0x3ff));
}
uint32_t float_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

// `v` as an element of the kind, written at `to`.
void encode(Mma kind, int v, char* to) {
  const uint16_t half = half_of(v), bfloat = static_cast<uint16_t>(float_bits(static_cast<float>(v)) >> 16);
  const float single = static_cast<float>(v);
  const int8_t byte = static_cast<int8_t>(v);
  switch (kind) {
    case Mma::kF16: std::memcpy(to, &half, 2); break;
    case Mma::kBF16: std::memcpy(to, &bfloat, 2); break;
    case Mma::kTF32: std::memcpy(to, &single, 4); break;
    case Mma::kS8: std::memcpy(to, &byte, 1); break;
  }
}
// A number of either sign between 2^-6 and 2^6, exact in every kind but int8.
double wide_number(size_t i, int seed) {
  const uint64_t bits = (i + 1) * 0x9E3779B97F4A7C15ull + static_cast<uint64_t>(seed) * 0xD1B54A32D192ED03ull;
  const int exponent = static_cast<int>(bits >> 40 & 0xff) % 12 - 6, mantissa = static_cast<int>(bits >> 50 & 0x7f);
  return std::ldexp(1.0 + mantissa / 128.0, exponent) * (bits >> 63 ? -1 : 1);
}
void encode_wide(Mma kind, double v, char* to) {
  const uint32_t bits = float_bits(static_cast<float>(v));
  const uint16_t bfloat = static_cast<uint16_t>(bits >> 16);
  const uint16_t half = static_cast<uint16_t>((bits >> 16 & 0x8000) | (((bits >> 13) - (112u << 10)) & 0x7fff));
  if (kind == Mma::kTF32) std::memcpy(to, &bits, 4);
  else std::memcpy(to, kind == Mma::kF16 ? &half : &bfloat, 2);
}

const char* name_of(Mma kind) {
  return kind == Mma::kF16 ? "f16" : kind == Mma::kBF16 ? "bf16" : kind == Mma::kTF32 ? "tf32" : "s8";
}

}  // namespace
