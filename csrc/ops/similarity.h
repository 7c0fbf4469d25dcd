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

namespace cpu {
void similarity(const SimilarityArgs& args);
}

namespace cuda {
void similarity(const SimilarityArgs& args, const CudaContext& context);
// Bytes of scratch in the device's memory that the call takes.
int64_t similarity_workspace_bytes(const SimilarityArgs& args);
}  // namespace cuda

}  // namespace pycm
