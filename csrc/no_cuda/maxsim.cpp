#include "ops/maxsim.h"

#include "no_cuda/missing.h"

namespace pycm::cuda {

void maxsim(const MaxSimArgs&, const CudaContext&) { missing("maxsim"); }
void maxsim_backward(const MaxSimBackwardArgs&, const CudaContext&) { missing("maxsim_backward"); }
void maxsim_topk(const MaxSimTopKArgs&, const CudaContext&) { missing("maxsim_topk"); }
int64_t maxsim_workspace_bytes(const MaxSimArgs&) { missing("maxsim"); }
int64_t maxsim_backward_workspace_bytes(const MaxSimBackwardArgs&) { missing("maxsim_backward"); }
int64_t maxsim_topk_workspace_bytes(const MaxSimTopKArgs&) { missing("maxsim_topk"); }

}  // namespace pycm::cuda
