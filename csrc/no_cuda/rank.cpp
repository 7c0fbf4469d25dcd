#include "ops/rank.h"

#include "no_cuda/missing.h"

namespace pycm::cuda {

void rank(const RankArgs&, const CudaContext&) { missing("rank"); }
int64_t rank_workspace_bytes(const RankArgs&) { missing("rank"); }

}  // namespace pycm::cuda
