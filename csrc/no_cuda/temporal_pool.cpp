#include "no_cuda/missing.h"
#include "ops/pool_states.h"
#include "ops/temporal_recurrence.h"

namespace pycm::cuda {

void recurrence(const RecurrenceArgs&, const CudaContext&) { missing("temporal_pool"); }
void recurrence_scan(const RecurrenceScanArgs&, const CudaContext&) { missing("temporal_pool_backward"); }
void recurrence_backward(const RecurrenceBackwardArgs&, const CudaContext&) { missing("temporal_pool_backward"); }
void pool_states(const PoolStatesDeviceArgs&, const CudaContext&) { missing("pool_states"); }
void pool_states_summary(const PoolStatesDeviceArgs&, const CudaContext&) { missing("pool_states_backward"); }
void pool_states_gradient(const PoolStatesDeviceArgs&, const CudaContext&) { missing("pool_states_backward"); }
int64_t recurrence_workspace_bytes(const RecurrenceArgs&) { missing("temporal_pool"); }
int64_t recurrence_scan_workspace_bytes(const RecurrenceScanArgs&) { missing("temporal_pool_backward"); }
int64_t recurrence_backward_workspace_bytes(const RecurrenceBackwardArgs&) { missing("temporal_pool_backward"); }
int64_t pool_states_workspace_bytes(const PoolStatesDeviceArgs&) { missing("pool_states"); }
int64_t pool_states_summary_workspace_bytes(const PoolStatesDeviceArgs&) { missing("pool_states_backward"); }
int64_t pool_states_gradient_workspace_bytes(const PoolStatesDeviceArgs&) { missing("pool_states_backward"); }

}  // namespace pycm::cuda
