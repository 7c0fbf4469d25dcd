#include "ops/similarity.h"

#include "no_cuda/missing.h"

namespace pycm::cuda {

void similarity(const SimilarityArgs&, const CudaContext&) { missing("similarity"); }
int64_t similarity_workspace_bytes(const SimilarityArgs&) { missing("similarity"); }

}  // namespace pycm::cuda
