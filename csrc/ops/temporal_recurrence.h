// temporal_recurrence: the part of temporal_pool (ops/temporal_pool.h) that goes step by step, on CUDA: one layer and one
// direction, from products of the inputs that are there already. What does not depend on the step before, the products over
// all steps before and after, is the caller's: it is one matrix product each.
//
// B rows of S steps together, H units, states of P elements, G gates. Pointers are of the device. The working type is float64 for
// float64 weights and float32 for all others. Step t of a row is the t-th that is run: of the reverse direction, counted from
// the row's own end. Layouts of steps:
//
//   ragged     row b at cu_seqlens[b] ... cu_seqlens[b + 1]
//   padded     [B, T]
//   by step    step t of the r-th longest row at step_starts[t] + r, less step_starts of the call's first step: what is run
//              together lies together, so that a call may take the steps of all rows from bounds[0] to bounds[1] alone
#pragma once

#include "core/array.h"
#include "core/cell.h"
#include "core/pool.h"
#include "ops/device.h"

namespace pycm {

struct RecurrenceShape {
  Cell cell = Cell::kLstm;
  DType dtype = DType::kFloat32;             // of the weights
  int64_t batch = 0, hidden = 0, state = 0;  // B, H, P
  int64_t padded_steps = 0;                  // T, and 0 for ragged inputs
  const int64_t* step_starts = nullptr;      // of inputs by step: for each t how many steps of all rows come before
  const int64_t* bounds = nullptr;           // [2], with step_starts
  bool reverse = false;                      // each row from its own last step to its first
  const int64_t* cu_seqlens = nullptr;       // [B + 1]
  const int64_t* order = nullptr;            // [B], the rows from the longest to the shortest
  const void* weight_hh = nullptr;           // [G * H, P]
  const void* weight_hr = nullptr;           // [P, H], LSTM only; null without a projection
  const void* h0 = nullptr;                  // [B, P] in the working type, as all that follows; null for zeros
  const void* c0 = nullptr;                  // [B, H], LSTM only
};

// Of several calls for the steps of one sequence, each goes on where the one before it has left off: its h0 and c0 are that one's
// hn and cn, at the same place, and hn, cn and out hold what goes on.
struct RecurrenceArgs {
  RecurrenceShape shape;
  // x W_ih and the biases, but for GRU's b_hn: [rows, G * H] in any layout; or a table [V, G * H], of which each step takes the row
  // that input_rows, ragged or padded, says.
  const void* inputs = nullptr;
  const int64_t* input_rows = nullptr;
  const void* hidden_bias = nullptr;  // GRU: b_hn [H] or null
  Pool pool = Pool::kNone;            // one that streams, else kNone
  void* out = nullptr;                // [B, W * P]; zeros for a row of length 0
  void* states = nullptr;             // ragged [S, P] or null
  bool narrow_states = false;         // they are in the weights' type
  void* hn = nullptr;                 // [B, P]; h0 for a row of length 0
  void* cn = nullptr;                 // [B, H], LSTM only
};

// LSTM: the memory c of every step from its pre-activations, and m = o tanh(c) where there is a projection. All by step.
struct RecurrenceScanArgs {
  RecurrenceShape shape;
  const void* inputs = nullptr;  // [rows, 4 * H]: the pre-activations
  void* c = nullptr;             // [rows, H]
  void* m = nullptr;             // [rows, H] or null
  void* cn = nullptr;            // [B, H], the last one, or null
};

// Of several calls for the steps of one sequence the last steps come first: grad_hn and grad_cn of a call are the grad_h0 and
// grad_c0 of the one before it, and may lie at the same place; shape.c0 is the memory before bounds[0].
struct RecurrenceBackwardArgs {
  RecurrenceShape shape;
  // By step [rows, G * H], overwritten with their gradients: the pre-activations (LSTM), or the input's and the state's share of
  // them, each with its biases (GRU).
  void* inputs = nullptr;
  void* hidden = nullptr;        // GRU only
  const void* states = nullptr;  // ragged [S, P], GRU only
  bool narrow_states = false;    // they are in the weights' type
  const void* c = nullptr;       // by step [rows, H], LSTM only
  // What reaches the states from outside: by step [rows, P]; and [B, P] each, what reaches every state of a row, its first, its
  // last. Null for zeros; but with a projection grad_states is given, and overwritten with all that reaches them.
  void* grad_states = nullptr;
  const void *grad_every = nullptr, *grad_first = nullptr, *grad_last = nullptr;
  const void* grad_hn = nullptr;  // [B, P], null for zeros
  const void* grad_cn = nullptr;  // [B, H]
  void* grad_h0 = nullptr;        // [B, P], null where not wanted
  void* grad_c0 = nullptr;        // [B, H]
};

namespace cuda {
int64_t recurrence_workspace_bytes(const RecurrenceArgs& args);
void recurrence(const RecurrenceArgs& args, const CudaContext& context);
int64_t recurrence_scan_workspace_bytes(const RecurrenceScanArgs& args);  // 0
void recurrence_scan(const RecurrenceScanArgs& args, const CudaContext& context);
int64_t recurrence_backward_workspace_bytes(const RecurrenceBackwardArgs& args);
void recurrence_backward(const RecurrenceBackwardArgs& args, const CudaContext& context);
}  // namespace cuda

}  // namespace pycm
