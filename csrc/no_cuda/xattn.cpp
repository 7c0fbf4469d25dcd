#include "ops/xattn.h"

#include "no_cuda/missing.h"

namespace pycm::cuda {

void xattn_score(const XAttnArgs&, const CudaContext&) { missing("xattn_score"); }
int64_t xattn_score_workspace_bytes(const XAttnArgs&) { missing("xattn_score"); }

}  // namespace pycm::cuda
