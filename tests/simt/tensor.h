// What mma.sync and wgmma share.
#pragma once

#include "executor.h"

namespace simt {

inline constexpr int kF16 = 0, kBF16 = 1, kTF32 = 2, kS8 = 3;  // of pycm::cuda::Mma

inline int elements_per_register(int kind) { return kind == kS8 ? 4 : kind == kTF32 ? 1 : 2; }
inline int depth(int kind) { return 8 * elements_per_register(kind); }  // K of one instruction

// The elements of one register.
void decode(int kind, uint32_t bits, float* to);
// The 16 x K fragment of one warp: a[r] of lane 4g + t is row g + 8 (r % 2), columns from 4e (r / 2) + e t.
void place_a(int kind, int lane, const uint32_t* registers, float* to);
// d += a b, a m x K, b K x n.
void product(int kind, int m, int n, const float* a, const float* b, uint32_t* d);

}  // namespace simt
