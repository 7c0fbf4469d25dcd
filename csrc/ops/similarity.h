// similarity: every score of queries [N, D] against gallery [M, D], for a batch of such pairs of matrices.
#pragma once

#include "core/array.h"
#include "core/metric.h"
#include "ops/device.h"

namespace pycm {

// How a GPU may multiply fp32 rows: with fp32's accuracy, or with TF32's 11 bits an element.
enum class Float32Product { kFloat32, kTF32 };

struct SimilarityArgs {
  // One matrix of the batch: x [N, D], y [M, D]. `x` and `y` describe the first; the rest follow by batch strides.
  Rows x, y;
  Metric metric = Metric::kCosine;
  // Batch: shape and per-operand strides in elements (0 where an operand is broadcast).
  int batch_ndim = 0;
  int64_t batch_shape[kMaxDims] = {};
  int64_t x_batch_strides[kMaxDims] = {};
  int64_t y_batch_strides[kMaxDims] = {};
  // Output [batch..., N, M], contiguous; float64 for float64 inputs, else float32.
  void* out = nullptr;
  int num_threads = 1;                                        // CPU
  Float32Product float32_product = Float32Product::kFloat32;  // CUDA
};

// When every matrix of the batch meets the same y, and the rows of x lie in one run over the batch, the batch is one tall
// matrix.
inline SimilarityArgs fold_batch(const SimilarityArgs& args) {
  SimilarityArgs folded = args;
  folded.batch_ndim = 0;
  for (int d = args.batch_ndim - 1; d >= 0; --d) {
    if (args.batch_shape[d] == 1) continue;
    if (folded.x.rows == 1) folded.x.row_stride = args.x_batch_strides[d];
    if (args.y_batch_strides[d] != 0 || args.x_batch_strides[d] != folded.x.rows * folded.x.row_stride) return args;
    folded.x.rows *= args.batch_shape[d];
  }
  return folded;
}

namespace cpu {
void similarity(const SimilarityArgs& args);
}

namespace cuda {
void similarity(const SimilarityArgs& args, const CudaContext& context);
// Bytes of scratch in the device's memory that the call takes.
int64_t similarity_workspace_bytes(const SimilarityArgs& args);
}  // namespace cuda

}  // namespace pycm
