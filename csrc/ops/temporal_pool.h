// temporal_pool: one layer and one direction of an LSTM or GRU over sequences of different lengths, and the pooling of its
// states. B sequences of S steps together, inputs of I elements, H units, states of P elements (the projection's size, or
// H where there is none), G gates (core/cell.h), pooled rows of W * P elements (core/pool.h).
//
// The working type is float64 for float64 weights and float32 for all others; it is that of every state and result.
#pragma once

#include <memory>

#include "core/array.h"
#include "core/cell.h"
#include "core/pool.h"

namespace pycm {

namespace cpu {
// A layer's parameters laid out for the kernels. Independent of the arrays it was made from.
class PackedCell;
}  // namespace cpu

constexpr int64_t kMaxInt8Depth = 1 << 17;  // elements of a row of 8 bits whose products' sum still fits 32

// A layer's parameters as torch has them, all of one dtype, contiguous. Borrowed.
struct CellWeights {
  Cell cell = Cell::kLstm;
  DType dtype = DType::kFloat32;
  int64_t input_size = 0, hidden_size = 0, state_size = 0;  // I, H, P
  const void* weight_ih = nullptr;                          // [G * H, I]
  const void* weight_hh = nullptr;                          // [G * H, P]
  const void* bias_ih = nullptr;                            // [G * H] or null, both or none
  const void* bias_hh = nullptr;
  const void* weight_hr = nullptr;  // [P, H], null without a projection (LSTM only)
  // weight_hh, weight_hr and what they multiply are rounded to 8 bits, with a scale for each row: what comes from memory at
  // every step. No backward pass; not for float64.
  bool int8 = false;
};

// Sequences: row b is steps cu_seqlens[b] ... cu_seqlens[b + 1] of ragged [S, I] values, or the first that many steps of
// x[b] in padded [B, T, I] values. What lies beyond is never read. Strides count elements; the last one is 1.
struct Sequences {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  const int64_t* cu_seqlens = nullptr;  // [B + 1], from 0, not falling
  int64_t step_stride = 0;
  bool padded = false;
  int64_t batch_stride = 0;  // of padded values

  int64_t length(int64_t b) const { return cu_seqlens[b + 1] - cu_seqlens[b]; }
  const void* step(int64_t b, int64_t t) const {
    const int64_t at = padded ? b * batch_stride + t * step_stride : (cu_seqlens[b] + t) * step_stride;
    return static_cast<const char*>(data) + at * item_size(dtype);
  }
};

struct PoolChoice {
  Pool pool = Pool::kNone;
  const void* weights = nullptr;  // working type. attention: w [P]; gpo: [S], of the k-th greatest value at step k
};

// All outputs in the working type, contiguous, each null where it is not wanted.
struct TemporalPoolArgs {
  Sequences x;
  bool reverse = false;  // each row from its own last step to its first
  PoolChoice pool;
  const void* h0 = nullptr;  // [B, P], null for zeros
  const void* c0 = nullptr;  // [B, H], LSTM only
  void* out = nullptr;       // [B, W * P]; a row of length 0 gives zeros
  void* states = nullptr;    // [S, P], ragged, at the step that each belongs to
  void* hn = nullptr;        // [B, P], after the last step; h0 for a row of length 0
  void* cn = nullptr;        // [B, H], LSTM only
  void* reserve = nullptr;   // [S, R, H], ragged: what the backward pass needs of each step, R = kReserve of the cell
  int num_threads = 1;
};

struct TemporalPoolGradArgs {
  CellWeights weights;
  Sequences x;
  bool reverse = false;
  PoolChoice pool;
  const void* h0 = nullptr;
  const void* c0 = nullptr;
  const void* states = nullptr;   // [S, P], of the forward pass
  const void* reserve = nullptr;  // [S, R, H], of the forward pass
  // Gradients that come in, null for zeros.
  const void* grad_out = nullptr;     // [B, W * P]
  const void* grad_states = nullptr;  // [S, P]
  const void* grad_hn = nullptr;      // [B, P]
  const void* grad_cn = nullptr;      // [B, H]
  // Gradients that go out, overwritten; null where not wanted. grad_x is laid out as x is, and steps outside the
  // sequences are not written.
  void* grad_x = nullptr;
  int64_t grad_x_step_stride = 0, grad_x_batch_stride = 0;
  void* grad_weight_ih = nullptr;
  void* grad_weight_hh = nullptr;
  void* grad_bias_ih = nullptr;
  void* grad_bias_hh = nullptr;
  void* grad_weight_hr = nullptr;
  void* grad_h0 = nullptr;
  void* grad_c0 = nullptr;
  void* grad_pool_weights = nullptr;
  int num_threads = 1;
};

namespace cpu {

std::shared_ptr<const PackedCell> pack_cell(const CellWeights& weights, int num_threads);
const CellWeights& shape_of(const PackedCell& packed);  // with null pointers
int64_t bytes_of(const PackedCell& packed);

void temporal_pool(const PackedCell& packed, const TemporalPoolArgs& args);
void temporal_pool_backward(const TemporalPoolGradArgs& args);

}  // namespace cpu

}  // namespace pycm
