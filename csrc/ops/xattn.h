// xattn_score: stacked cross attention of image regions and words (SCAN; Lee et al. 2018, arXiv:1803.08024).
//
// t2i: the words x_1 ... x_n of a caption attend to the regions y_1 ... y_m of an image; i2t: regions attend to words.
//   s[b, a]  = y_b . x_a                                       every context vector y_b against every x_a
//   f[b, :]  = feature norm of s[b, :], over the a            (softmax; or s / (norm + eps), first clipped or not)
//   w[a, :]  = softmax over b of lambda_softmax * f[:, a]
//   c_a      = sum over b of w[a, b] y_b
//   r_a      = x_a . c_a / max(|x_a| |c_a|, eps)
//   score    = LogSumExp: log(sum over a of exp(lambda_lse * r_a)) / lambda_lse; Max, Sum or Mean of the r_a
// clipped: s where s > 0, else 0.1 s (a leaky ReLU). l2norm divides by sqrt(sum of squares) + eps, l1norm by the sum of
// magnitudes + eps. A pair in which either side has no vectors scores 0.
//
// c_a is not needed: x_a . c_a = sum over b of w[a, b] s[b, a] and |c_a|^2 = w_a' (Y Y') w_a, with one Gram matrix per
// context item.
#pragma once

#include "core/sets.h"
#include "ops/maxsim.h"

namespace pycm {

enum class FeatureNorm : uint8_t { kSoftmax, kL2, kClippedL2, kL1, kClippedL1, kNone, kClipped };
enum class Aggregation : uint8_t { kLogSumExp, kMax, kSum, kMean };

struct XAttnArgs {
  VectorSets images, captions;            // N and M items of the same dtype and dim >= 1
  Direction direction = Direction::kT2I;  // kT2I or kI2T
  FeatureNorm feature_norm = FeatureNorm::kClippedL2;
  Aggregation aggregation = Aggregation::kLogSumExp;
  double lambda_softmax = 9;
  double lambda_lse = 6;
  double eps = 1e-8;
  void* scores = nullptr;  // [N, M] contiguous; float64 for float64 inputs, else float32
  int num_threads = 1;     // CPU only
};

namespace cpu {
void xattn_score(const XAttnArgs& args);
}

namespace cuda {
void xattn_score(const XAttnArgs& args, const CudaContext& context);
// Bytes of scratch in the device's memory that the call takes.
int64_t xattn_score_workspace_bytes(const XAttnArgs& args);
}  // namespace cuda

}  // namespace pycm
