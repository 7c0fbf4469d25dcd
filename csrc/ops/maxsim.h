// maxsim: late interaction of sets of vectors (ColBERT, ColPali, FILIP; Khattab & Zaharia 2020, Yao et al. 2021).
//
//   forward(Q, G)  = sum over the vectors q of Q of max over the vectors g of G of metric(q, g)       direction t2i
//   backward(Q, G) = the same with Q and G exchanged                                                  direction i2t
//   both           = forward + backward
// With Reduce::kMean each of the two is divided by the number of vectors it sums over. A pair in which either item has no
// vectors scores 0. Any NaN among the pair's similarities makes its score NaN.
//
// The exact score, in which maxsim_topk orders and which it returns: metric(q, g) is the fp64 value in the library's
// fixed order (core/metric.h), not rounded; a maximum is that of these; they are summed in the same fixed order (32
// lanes, lane l adding the vectors l, l + 32, ...; then a tree); the quotient, the sum of both directions and the
// rounding to fp32 (none for fp64 inputs) come last, in this order. maxsim itself is fp32-accurate: its similarities are
// fp32 sums (fp64 for fp64 inputs), of the same maxima and sums.
#pragma once

#include "core/metric.h"
#include "core/sets.h"
#include "ops/device.h"

namespace pycm {

enum class Reduce : uint8_t { kSum, kMean };
enum class Direction : uint8_t { kT2I, kI2T, kBoth };

struct MaxSimArgs {
  VectorSets queries, gallery;   // N and M items of the same dtype and dim >= 1
  Metric metric = Metric::kDot;  // kDot or kCosine
  Reduce reduce = Reduce::kSum;
  Direction direction = Direction::kT2I;
  void* scores = nullptr;  // [N, M] contiguous; float64 for float64 inputs, else float32
  int num_threads = 1;     // CPU only
};

// Gradients of sum(grad * scores): every maximum passes its share to the pair of vectors it comes from, the first in the
// item where several are equal in the forward's precision, or the first that is NaN. Nothing passes through an empty pair, nor
// through one whose grad is 0.
struct MaxSimBackwardArgs {
  MaxSimArgs forward;          // scores is not read
  const void* grad = nullptr;  // [N, M] contiguous, of the scores' dtype
  // Contiguous, of the shape of queries ([N, max_length, D] or [total, D]) and gallery, of the scores' dtype; written
  // whole, 0 in the padding. Either may be null.
  void* grad_queries = nullptr;
  void* grad_gallery = nullptr;
};

struct MaxSimTopKArgs {
  MaxSimArgs forward;          // scores is not written; gallery has at least one item
  int64_t k = 1;               // in [1, M]
  bool exact = true;           // else the scores are maxsim's own
  void* scores = nullptr;      // [N, k] contiguous, best first, ties by lowest index; -inf where nothing matches
  int64_t* indices = nullptr;  // [N, k] contiguous; -1 there: a NaN score is no match
};

namespace cpu {
void maxsim(const MaxSimArgs& args);
void maxsim_backward(const MaxSimBackwardArgs& args);
void maxsim_topk(const MaxSimTopKArgs& args);
}  // namespace cpu

namespace cuda {
void maxsim(const MaxSimArgs& args, const CudaContext& context);
void maxsim_backward(const MaxSimBackwardArgs& args, const CudaContext& context);
void maxsim_topk(const MaxSimTopKArgs& args, const CudaContext& context);
// Bytes of scratch in the device's memory that the call takes.
int64_t maxsim_workspace_bytes(const MaxSimArgs& args);
int64_t maxsim_backward_workspace_bytes(const MaxSimBackwardArgs& args);
int64_t maxsim_topk_workspace_bytes(const MaxSimTopKArgs& args);
}  // namespace cuda

}  // namespace pycm
