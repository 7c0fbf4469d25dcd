// Matrix products on the tensor cores: mma.sync (from sm_80, one warp) and wgmma (sm_90a, one warpgroup). Included by
// arch.cuh.
#pragma once

namespace pycm::cuda {

// What is multiplied; sums are float (int32_t for kS8).
enum class Mma { kF16, kBF16, kTF32, kS8 };

template <Mma M>
inline constexpr int kMmaBytes = M == Mma::kS8     ? 1
                                 : M == Mma::kTF32 ? 4
                                                   : 2;  // of an element; a step along K is 32 bytes
template <Mma M>
using MmaSum = std::conditional_t<M == Mma::kS8, int32_t, float>;

// wgmma's shared-memory descriptor of a K-major operand in the 128-byte swizzle, as TMA writes it: rows of 128 bytes,
// groups of 8 rows (1024 bytes) one after another. PTX ISA, "Matrix descriptor format":
//   bits 0-13 address >> 4 | 16-29 leading offset >> 4 (unused, 1) | 32-45 stride of groups >> 4 | 62-63 swizzle (1)
// `shared` is 1024-byte aligned, plus 32 bytes for each step along K (16 halves, 8 tf32, 32 int8) within the 128; the
// next 128 bytes of K are another tile. N (or the 64 rows of A) needs N / 8 groups.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* shared, uint32_t group_stride_bytes = 1024) {
  return uint64_t{(shared_address(shared) & 0x3ffffu) >> 4} | uint64_t{1} << 16 |
         uint64_t{group_stride_bytes >> 4} << 32 | uint64_t{1} << 62;
}

#if !defined(PYCM_SIMT)

// ---- mma.sync: d += a * b', a 16 x K row-major, b 8 x K (the "col" operand), K = 16, 8 (tf32) or 32 (int8) ----
// Lane l, g = l / 4, t = l % 4, e = elements per 32-bit register (2, 1, 4):
//   a[0..3]  rows g, g+8, g, g+8; elements e*t.. of the first half of K (a[0], a[1]) and of the second (a[2], a[3])
//   b[0..1]  row g of b; elements e*t.. of the first and of the second half of K
//   d[0..3]  (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)
template <Mma M>
__device__ __forceinline__ void mma(MmaSum<M> (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (M == Mma::kF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (M == Mma::kBF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (M == Mma::kTF32) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// fp64: a 8 x 4, b 8 x 4 (the "col" operand). Lane l holds a(l / 4, l % 4), b(l / 4, l % 4), d(l / 4, 2 * (l % 4)) and
// the next.
__device__ __forceinline__ void mma_f64(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}

// ---- wgmma [sm_90]: d (64 x N) = a (64 x K) * b' (N x K) + (accumulate ? d : 0) ----
// d of thread t in the warpgroup, w = t / 32, g = t % 32 / 4, q = t % 4: d[4j + 0..3] are (16w + g, 8j + 2q), (.., +1),
// (16w + g + 8, 8j + 2q), (.., +1). Asynchronous: between issue and wgmma_wait neither d nor register a may be touched,
// nor shared operands overwritten. Order: wgmma_fence, wgmma..., wgmma_commit, wgmma_wait<0>.

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>  // until at most the N newest groups are unfinished
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving uses of d across the waits; costs nothing.
template <typename T, int Count>
__device__ __forceinline__ void wgmma_pin(T (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    if constexpr (std::is_same_v<T, float>) asm volatile("" : "+f"(d[i])::"memory");
    else asm volatile("" : "+r"(d[i])::"memory");
  }
}

// Operand lists for inline assembly, which wants every register by name.
#define PYCM_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PYCM_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define PYCM_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define PYCM_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define PYCM_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define PYCM_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define PYCM_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define PYCM_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define PYCM_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define PYCM_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define PYCM_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define PYCM_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define PYCM_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define PYCM_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define PYCM_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define PYCM_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define PYCM_D4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define PYCM_D8(c, i) PYCM_D4(c, i), PYCM_D4(c, i + 4)
#define PYCM_D16(c, i) PYCM_D8(c, i), PYCM_D8(c, i + 8)
#define PYCM_D32(c, i) PYCM_D16(c, i), PYCM_D16(c, i + 16)
#define PYCM_D64(c, i) PYCM_D32(c, i), PYCM_D32(c, i + 32)
#define PYCM_REGISTERS_8 "%0, %1, %2, %3"
#define PYCM_OPERANDS_8(c) PYCM_D4(c, 0)
#define PYCM_REGISTERS_16 PYCM_R0
#define PYCM_OPERANDS_16(c) PYCM_D8(c, 0)
#define PYCM_REGISTERS_24 PYCM_R0 ", %8, %9, %10, %11"
#define PYCM_OPERANDS_24(c) PYCM_D8(c, 0), PYCM_D4(c, 8)
#define PYCM_REGISTERS_32 PYCM_R0 ", " PYCM_R1
#define PYCM_OPERANDS_32(c) PYCM_D16(c, 0)
#define PYCM_REGISTERS_48 PYCM_R0 ", " PYCM_R1 ", " PYCM_R2
#define PYCM_OPERANDS_48(c) PYCM_D16(c, 0), PYCM_D8(c, 16)
#define PYCM_REGISTERS_64 PYCM_R0 ", " PYCM_R1 ", " PYCM_R2 ", " PYCM_R3
#define PYCM_OPERANDS_64(c) PYCM_D32(c, 0)
#define PYCM_REGISTERS_80 PYCM_R0 ", " PYCM_R1 ", " PYCM_R2 ", " PYCM_R3 ", " PYCM_R4
#define PYCM_OPERANDS_80(c) PYCM_D32(c, 0), PYCM_D8(c, 32)
#define PYCM_REGISTERS_96 PYCM_R0 ", " PYCM_R1 ", " PYCM_R2 ", " PYCM_R3 ", " PYCM_R4 ", " PYCM_R5
#define PYCM_OPERANDS_96(c) PYCM_D32(c, 0), PYCM_D16(c, 32)
#define PYCM_REGISTERS_112 PYCM_R0 ", " PYCM_R1 ", " PYCM_R2 ", " PYCM_R3 ", " PYCM_R4 ", " PYCM_R5 ", " PYCM_R6
#define PYCM_OPERANDS_112(c) PYCM_D32(c, 0), PYCM_D16(c, 32), PYCM_D8(c, 48)
#define PYCM_REGISTERS_128 \
  PYCM_R0 ", " PYCM_R1 ", " PYCM_R2 ", " PYCM_R3 ", " PYCM_R4 ", " PYCM_R5 ", " PYCM_R6 ", " PYCM_R7
#define PYCM_OPERANDS_128(c) PYCM_D64(c, 0)
#define PYCM_REGISTERS_160                                                                                        \
  PYCM_R0 ", " PYCM_R1 ", " PYCM_R2 ", " PYCM_R3 ", " PYCM_R4 ", " PYCM_R5 ", " PYCM_R6 ", " PYCM_R7 ", " PYCM_R8 \
          ", " PYCM_R9
#define PYCM_OPERANDS_160(c) PYCM_D64(c, 0), PYCM_D16(c, 64)
#define PYCM_REGISTERS_192                                                                                        \
  PYCM_R0 ", " PYCM_R1 ", " PYCM_R2 ", " PYCM_R3 ", " PYCM_R4 ", " PYCM_R5 ", " PYCM_R6 ", " PYCM_R7 ", " PYCM_R8 \
          ", " PYCM_R9 ", " PYCM_R10 ", " PYCM_R11
#define PYCM_OPERANDS_192(c) PYCM_D64(c, 0), PYCM_D32(c, 64)
#define PYCM_REGISTERS_224                                                                                        \
  PYCM_R0 ", " PYCM_R1 ", " PYCM_R2 ", " PYCM_R3 ", " PYCM_R4 ", " PYCM_R5 ", " PYCM_R6 ", " PYCM_R7 ", " PYCM_R8 \
          ", " PYCM_R9 ", " PYCM_R10 ", " PYCM_R11 ", " PYCM_R12 ", " PYCM_R13
#define PYCM_OPERANDS_224(c) PYCM_D64(c, 0), PYCM_D32(c, 64), PYCM_D16(c, 96)
#define PYCM_REGISTERS_256                                                                                        \
  PYCM_R0 ", " PYCM_R1 ", " PYCM_R2 ", " PYCM_R3 ", " PYCM_R4 ", " PYCM_R5 ", " PYCM_R6 ", " PYCM_R7 ", " PYCM_R8 \
          ", " PYCM_R9 ", " PYCM_R10 ", " PYCM_R11 ", " PYCM_R12 ", " PYCM_R13 ", " PYCM_R14 ", " PYCM_R15
#define PYCM_OPERANDS_256(c) PYCM_D64(c, 0), PYCM_D64(c, 64)

// One instruction: `i`, `j`, `k` are the numbers of the operands after d: descriptors (or four registers) and the
// predicate.
#define PYCM_WGMMA_SS(n, shape, tail, c, i, j, k)                                                           \
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" k ", 0;\n wgmma.mma_async.sync.aligned.m64n" #n shape \
               " {" PYCM_REGISTERS_##n "}, %" i ", %" j ", p" tail ";\n}\n"                                 \
               : PYCM_OPERANDS_##n(c)                                                                       \
               : "l"(a), "l"(b), "r"(static_cast<uint32_t>(accumulate))                                     \
               : "memory")
#define PYCM_WGMMA_RS(n, shape, tail, c, i, j, k, l, m, o)                                                  \
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" o ", 0;\n wgmma.mma_async.sync.aligned.m64n" #n shape \
               " {" PYCM_REGISTERS_##n "}, {%" i ", %" j ", %" k ", %" l "}, %" m ", p" tail ";\n}\n"       \
               : PYCM_OPERANDS_##n(c)                                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(accumulate)) \
               : "memory")
#define PYCM_WGMMA_TYPES(form, n, ss_or_rs_tail, ...)                                                 \
  if constexpr (M == Mma::kF16) form(n, "k16.f32.f16.f16", ss_or_rs_tail, "+f", __VA_ARGS__);         \
  else if constexpr (M == Mma::kBF16) form(n, "k16.f32.bf16.bf16", ss_or_rs_tail, "+f", __VA_ARGS__); \
  else if constexpr (M == Mma::kTF32) form(n, "k8.f32.tf32.tf32", ", 1, 1", "+f", __VA_ARGS__);       \
  else form(n, "k32.s32.s8.s8", "", "+r", __VA_ARGS__)

// N is one of 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256. a and b are descriptors.
template <Mma M, int N>
__device__ __forceinline__ void wgmma(MmaSum<M> (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (N == 8) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 8, ", 1, 1, 0, 0", "4", "5", "6");
  } else if constexpr (N == 16) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 16, ", 1, 1, 0, 0", "8", "9", "10");
  } else if constexpr (N == 24) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 24, ", 1, 1, 0, 0", "12", "13", "14");
  } else if constexpr (N == 32) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 32, ", 1, 1, 0, 0", "16", "17", "18");
  } else if constexpr (N == 48) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 48, ", 1, 1, 0, 0", "24", "25", "26");
  } else if constexpr (N == 64) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 64, ", 1, 1, 0, 0", "32", "33", "34");
  } else if constexpr (N == 80) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 80, ", 1, 1, 0, 0", "40", "41", "42");
  } else if constexpr (N == 96) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 96, ", 1, 1, 0, 0", "48", "49", "50");
  } else if constexpr (N == 112) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 112, ", 1, 1, 0, 0", "56", "57", "58");
  } else if constexpr (N == 128) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 128, ", 1, 1, 0, 0", "64", "65", "66");
  } else if constexpr (N == 160) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 160, ", 1, 1, 0, 0", "80", "81", "82");
  } else if constexpr (N == 192) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 192, ", 1, 1, 0, 0", "96", "97", "98");
  } else if constexpr (N == 224) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 224, ", 1, 1, 0, 0", "112", "113", "114");
  } else if constexpr (N == 256) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_SS, 256, ", 1, 1, 0, 0", "128", "129", "130");
  } else static_assert(N == 0, "no wgmma of this N");
}

// The same with a in registers: a[0..3] as of mma.sync, rows 16w.. of the 64 by warp w.
template <Mma M, int N>
__device__ __forceinline__ void wgmma(MmaSum<M> (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (N == 8) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 8, ", 1, 1, 0", "4", "5", "6", "7", "8", "9");
  } else if constexpr (N == 16) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 16, ", 1, 1, 0", "8", "9", "10", "11", "12", "13");
  } else if constexpr (N == 24) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 24, ", 1, 1, 0", "12", "13", "14", "15", "16", "17");
  } else if constexpr (N == 32) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 32, ", 1, 1, 0", "16", "17", "18", "19", "20", "21");
  } else if constexpr (N == 48) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 48, ", 1, 1, 0", "24", "25", "26", "27", "28", "29");
  } else if constexpr (N == 64) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 64, ", 1, 1, 0", "32", "33", "34", "35", "36", "37");
  } else if constexpr (N == 80) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 80, ", 1, 1, 0", "40", "41", "42", "43", "44", "45");
  } else if constexpr (N == 96) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 96, ", 1, 1, 0", "48", "49", "50", "51", "52", "53");
  } else if constexpr (N == 112) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 112, ", 1, 1, 0", "56", "57", "58", "59", "60", "61");
  } else if constexpr (N == 128) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 128, ", 1, 1, 0", "64", "65", "66", "67", "68", "69");
  } else if constexpr (N == 160) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 160, ", 1, 1, 0", "80", "81", "82", "83", "84", "85");
  } else if constexpr (N == 192) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 192, ", 1, 1, 0", "96", "97", "98", "99", "100", "101");
  } else if constexpr (N == 224) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 224, ", 1, 1, 0", "112", "113", "114", "115", "116", "117");
  } else if constexpr (N == 256) {
    PYCM_WGMMA_TYPES(PYCM_WGMMA_RS, 256, ", 1, 1, 0", "128", "129", "130", "131", "132", "133");
  } else static_assert(N == 0, "no wgmma of this N");
}

#else
#include "simt_mma.h"
#endif

}  // namespace pycm::cuda
