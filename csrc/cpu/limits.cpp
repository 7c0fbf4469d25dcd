// The machine's own limits.
//
// Arithmetic: kChains independent accumulators, enough to hide the latency of any such instruction, take the same two
// operands again and again; nothing is loaded, so only the multiply-add units are in the way. Matrix units (AMX) are not
// used, here or elsewhere in the library. Memory: each thread sums its own part of an array far larger than the caches.
//
// A kernel is one function of one instruction set, named by its target attribute: no flags of the file, and nothing
// inline that another file could share.
#include "ops/limits.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/parallel.h"

namespace pycm::cpu {
namespace {

constexpr int kChains = 10;
constexpr int64_t kSteps = 1 << 18;  // of each chain in a round: 10 ms at 0.3 TFLOP/s

struct Operands {
  alignas(64) unsigned char a[64], b[64];
};
// Executes kSteps * kChains instructions.
using Kernel = void (*)(const Operands& operands);

// Keeps `x` in a register, and the compiler from knowing its value: it can hoist nothing out of a loop, nor drop it.
#if defined(__aarch64__)
#define PYCM_OPAQUE(x) asm volatile("" : "+w"(x))
#elif defined(__x86_64__)
#define PYCM_OPAQUE(x) asm volatile("" : "+x"(x))
#else
#define PYCM_OPAQUE(x) asm volatile("" : "+m"(x))
#endif

// Named variables: GCC keeps an array of them in memory.
#define PYCM_STEP(accumulator, next) \
  do {                               \
    Sum sum = accumulator;           \
    sum = next;                      \
    PYCM_OPAQUE(sum);                \
    PYCM_OPAQUE(a);                  \
    accumulator = sum;               \
  } while (false)
#define PYCM_KERNEL(name, target, Operand, SumType, zero, next)          \
  target __attribute__((noinline)) void name(const Operands& operands) { \
    using Sum = SumType;                                                 \
    Operand a, b;                                                        \
    std::memcpy(&a, operands.a, sizeof a);                               \
    std::memcpy(&b, operands.b, sizeof b);                               \
    Sum s0 = zero, s1 = zero, s2 = zero, s3 = zero, s4 = zero;           \
    Sum s5 = zero, s6 = zero, s7 = zero, s8 = zero, s9 = zero;           \
    for (int64_t step = 0; step < kSteps; ++step) {                      \
      PYCM_STEP(s0, next);                                               \
      PYCM_STEP(s1, next);                                               \
      PYCM_STEP(s2, next);                                               \
      PYCM_STEP(s3, next);                                               \
      PYCM_STEP(s4, next);                                               \
      PYCM_STEP(s5, next);                                               \
      PYCM_STEP(s6, next);                                               \
      PYCM_STEP(s7, next);                                               \
      PYCM_STEP(s8, next);                                               \
      PYCM_STEP(s9, next);                                               \
    }                                                                    \
  }
#define PYCM_TARGET(isa) __attribute__((target(isa)))

#if defined(__x86_64__)
PYCM_KERNEL(fma_avx512, PYCM_TARGET("avx512f"), __m512, __m512, _mm512_setzero_ps(), _mm512_fmadd_ps(a, b, sum))
PYCM_KERNEL(fma_avx2, PYCM_TARGET("avx2,fma"), __m256, __m256, _mm256_setzero_ps(), _mm256_fmadd_ps(a, b, sum))
PYCM_KERNEL(bf16_avx512, PYCM_TARGET("avx512f,avx512bf16"), __m512bh, __m512, _mm512_setzero_ps(),
            _mm512_dpbf16_ps(sum, a, b))
PYCM_KERNEL(int8_avx512, PYCM_TARGET("avx512f,avx512vnni"), __m512i, __m512i, _mm512_setzero_si512(),
            _mm512_dpbusd_epi32(sum, a, b))
PYCM_KERNEL(int8_avxvnni, PYCM_TARGET("avx2,avxvnni"), __m256i, __m256i, _mm256_setzero_si256(),
            _mm256_dpbusd_avx_epi32(sum, a, b))
PYCM_KERNEL(int8_avx2, PYCM_TARGET("avx2"), __m256i, __m256i, _mm256_setzero_si256(),
            _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1))))
#endif
#if defined(__aarch64__)
PYCM_KERNEL(fma_portable, , float32x4_t, float32x4_t, vdupq_n_f32(0), vfmaq_f32(sum, a, b))
#else
typedef float Float4 __attribute__((vector_size(16)));
PYCM_KERNEL(fma_portable, , Float4, Float4, Float4{}, sum + a * b)
#endif

// The best kernel that the processor has, and the operations of one of its instructions.
struct Rate {
  Kernel kernel = nullptr;
  int operations = 0;
};

Rate float32_rate() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {fma_avx512, 2 * 16};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {fma_avx2, 2 * 8};
#endif
  return {fma_portable, 2 * 4};
}

Rate bfloat16_rate() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) return {bf16_avx512, 2 * 32};
#endif
  return {};
}

Rate int8_rate() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vnni")) return {int8_avx512, 2 * 64};
  if (__builtin_cpu_supports("avxvnni")) return {int8_avxvnni, 2 * 32};
  if (__builtin_cpu_supports("avx2")) return {int8_avx2, 2 * 32};
#endif
  return {};
}

// The most of `amount` per second over the rounds that fit into `seconds`.
template <class Round>
double best_rate(double amount, double seconds, Round round) {
  using Clock = std::chrono::steady_clock;
  const std::chrono::duration<double> budget(seconds);
  double best = 0;
  for (const auto begin = Clock::now();;) {
    const auto round_begin = Clock::now();
    round();
    const auto end = Clock::now();
    best = std::max(best, amount / std::chrono::duration<double>(end - round_begin).count());
    if (end - begin >= budget) return best;
  }
}

// Ordinary values of the type, differing from lane to lane: zeros would cost less power, and so run faster.
template <class T, class Value>
void fill(unsigned char* bytes, Value value) {
  for (int i = 0; i < static_cast<int>(64 / sizeof(T)); ++i) {
    const T element = value(i);
    std::memcpy(bytes + i * sizeof(T), &element, sizeof element);
  }
}

double arithmetic(const LimitsArgs& args, const Rate& rate, const Operands& operands) {
  if (rate.kernel == nullptr) return 0;
  const double amount = 1.0 * args.num_threads * kSteps * kChains * rate.operations;
  return best_rate(amount, args.seconds, [&] {
    parallel_for(args.num_threads, args.num_threads, [&](int64_t, int) { rate.kernel(operands); });
  });
}

typedef uint64_t Words __attribute__((vector_size(16)));

void sum_words(const Words* words, int64_t count) {
  constexpr int kSums = 8;
  Words sums[kSums] = {};
  for (int64_t i = 0; i + kSums <= count; i += kSums) {
#pragma GCC unroll 8
    for (int j = 0; j < kSums; ++j) sums[j] += words[i + j];
  }
  for (Words& sum : sums) PYCM_OPAQUE(sum);
}

double read_bandwidth(const LimitsArgs& args) {
  const int64_t count = args.bytes / static_cast<int64_t>(sizeof(Words)) / args.num_threads;
  const Buffer<Words> words(count * args.num_threads);
  const auto each = [&](auto work) {
    parallel_for(args.num_threads, args.num_threads, [&](int64_t task, int) { work(words.get() + task * count); });
  };
  // Written first: pages that never were are all one page of zeros.
  each([&](Words* part) { std::memset(static_cast<void*>(part), 1, count * sizeof(Words)); });
  return best_rate(1.0 * count * args.num_threads * sizeof(Words), args.seconds,
                   [&] { each([&](const Words* part) { sum_words(part, count); }); });
}

}  // namespace

Limits measure_limits(const LimitsArgs& args) {
  const DefaultFloatMode mode;
  Operands float32, bfloat16, int8;
  for (unsigned char* bytes : {float32.a, float32.b})
    fill<float>(bytes, [](int i) { return (i % 2 == 0 ? 1.f : -1.f) + static_cast<float>(i) / 64; });
  for (unsigned char* bytes : {bfloat16.a, bfloat16.b})
    fill<uint16_t>(bytes, [](int i) { return static_cast<uint16_t>(0x3F80 | (i % 2 << 15) | (i * 13 & 0x7F)); });
  for (unsigned char* bytes : {int8.a, int8.b})
    fill<uint8_t>(bytes, [](int i) { return static_cast<uint8_t>(i * 37 & 0x7F); });
  Limits limits;
  limits.float32 = arithmetic(args, float32_rate(), float32);
  limits.bfloat16 = arithmetic(args, bfloat16_rate(), bfloat16);
  limits.int8 = arithmetic(args, int8_rate(), int8);
  limits.read = read_bandwidth(args);
  return limits;
}

}  // namespace pycm::cpu
