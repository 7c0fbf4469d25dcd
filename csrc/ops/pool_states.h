// pool_states: the pooling of temporal_pool alone, over vectors that no cell made or that were changed after it: those of two
// directions together, with a residual, of the regions of an image. Pools mean, max, meanmax, attention and gpo.
#pragma once

#include "ops/device.h"
#include "ops/temporal_pool.h"

namespace pycm {

// Row b is vectors cu_seqlens[b] ... cu_seqlens[b + 1] of x [S, F]. All arrays are contiguous, of `dtype`, float32 or float64.
struct PoolStatesArgs {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, dim = 0;           // B, F
  const int64_t* cu_seqlens = nullptr;  // [B + 1], from 0, not falling
  const void* x = nullptr;              // [S, F]
  PoolChoice pool;
  int num_threads = 1;
};

namespace cpu {

// out [B, W * F]; a row of length 0 gives zeros.
void pool_states(const PoolStatesArgs& args, void* out);

// From grad_out [B, W * F] to grad_x [S, F] and grad_pool_weights (attention [F], gpo [S]), which are overwritten; either may
// be null. Of equal greatest values the first has the gradient.
void pool_states_backward(const PoolStatesArgs& args, const void* grad_out, void* grad_x, void* grad_pool_weights);

}  // namespace cpu

// On CUDA every pointer is of the device, and x has `rows` >= S rows, which may be of 16 bits where all else is float32. The
// backward pass has two parts, so that the gradient need not be held for all vectors at once: what is found by going through
// the rows, and from that the gradient of any vectors.
struct PoolStatesDeviceArgs {
  PoolStatesArgs pool;
  DType x_dtype = DType::kFloat32;  // of x alone
  int64_t rows = 0;
  void* out = nullptr;                // forward
  const void* grad_out = nullptr;     // backward: [B, W * F]
  void* grad_pool_weights = nullptr;  // attention [F], gpo [rows]; null where not wanted
  // Of max and meanmax int64 [B, F], the vector that each greatest value is from; of attention [2, rows], how much of grad_out
  // and of the weights the gradient of a vector is; else null.
  void* summary = nullptr;
  // Vector c is x[vectors[c]], of row rows_of[c]; one outside its row has no gradient.
  const int64_t *vectors = nullptr, *rows_of = nullptr;
  int64_t count = 0;
  void* grad_x = nullptr;  // [count, F], added to
};

namespace cuda {
int64_t pool_states_workspace_bytes(const PoolStatesDeviceArgs& args);
void pool_states(const PoolStatesDeviceArgs& args, const CudaContext& context);
// Writes the summary and the gradient of the weights.
int64_t pool_states_summary_workspace_bytes(const PoolStatesDeviceArgs& args);
void pool_states_summary(const PoolStatesDeviceArgs& args, const CudaContext& context);
// Adds to grad_x, by the summary.
int64_t pool_states_gradient_workspace_bytes(const PoolStatesDeviceArgs& args);
void pool_states_gradient(const PoolStatesDeviceArgs& args, const CudaContext& context);
}  // namespace cuda

}  // namespace pycm
