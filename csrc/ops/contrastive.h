// Contrastive losses of queries [N, D] and gallery [N, D], queries[i] belonging to gallery[i], and their gradients.
//
//   s_ij = metric(q_i, g_j), x_ij = scale * s_ij + bias, p_i = s_ii; j != i is a negative of i, and query i one of row j, unless
//   both are of one group or the pair (i, j) is ignored. Sums over i, the same with rows and columns exchanged (i and j), where
//   the loss is not symmetric by itself:
//
//   kMaxHinge   max(0, margin + max_j s_ij - p_i)                            Faghri et al. 2018 (VSE++)
//   kSumHinge   sum_j max(0, margin + s_ij - p_i)
//   kSemiHard   max(0, margin + max_j {s_ij : s_ij < p_i} - p_i)             Schroff et al. 2015 (FaceNet); none: 0
//   kInfoNCE    log(exp(x_ii) + sum_j exp(x_ij)) - x_ii                      van den Oord et al. 2018, Radford et al. 2021
//   kSigmoid    log(1 + exp(-x_ii)) + sum_j log(1 + exp(x_ij))               Zhai et al. 2023 (SigLIP); no exchange
//   kListed     sum_k max(0, margin + s_{i, negatives[i, k]} - p_i)          no exchange; gallery [M, D], M >= N
//
// A NaN score that counts makes the loss NaN. The gradient of a maximum goes to the lowest index that has it, that of a
// hinge is 0 where it bends, and a row whose score is defined as 0 (a zero row, for cosine) gets none.
#pragma once

#include "core/array.h"
#include "core/metric.h"

namespace pycm {

enum class ContrastiveLoss { kMaxHinge, kSumHinge, kSemiHard, kInfoNCE, kSigmoid, kListed };

struct ContrastiveArgs {
  Rows queries, gallery;            // of one dtype, N >= 1, D >= 1
  Metric metric = Metric::kCosine;  // no distance
  ContrastiveLoss loss = ContrastiveLoss::kMaxHinge;
  double margin = 0;                // the hinges
  double scale = 1, bias = 0;       // kInfoNCE (bias 0) and kSigmoid; scale > 0
  const int64_t* groups = nullptr;  // [N], or null where every row is a group of its own; not kListed
  const int64_t* ignored =
      nullptr;  // [ignored_count, 2] rows i != j whose s_ij is no negative; not with groups or kListed
  int64_t ignored_count = 0;
  const int64_t* negatives = nullptr;  // [N, negative_count] rows of the gallery, or -1 for none; kListed
  int64_t negative_count = 0;
  // Gradients of the loss, contiguous, float64 for float64 rows, else float32. Null where not wanted.
  void* grad_queries = nullptr;
  void* grad_gallery = nullptr;
  bool needs_scale = false;  // the gradient of scale and bias
  int num_threads = 1;
};

struct ContrastiveResult {
  double loss = 0;
  double grad_scale = 0, grad_bias = 0;  // left unfinished unless wanted
};

namespace cpu {
ContrastiveResult contrastive(const ContrastiveArgs& args);
}

}  // namespace pycm
