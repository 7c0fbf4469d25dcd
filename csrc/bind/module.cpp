#include <nanobind/nanobind.h>

#include "bind/errors.h"
#include "bind/ops.h"

NB_MODULE(_C, module) {
  pycm::bind::register_errors();
  module.doc() = "The compiled part of pycm. Use the functions of the package `pycm` instead.";
  pycm::bind::bind_contrastive(module);
  pycm::bind::bind_limits(module);
  pycm::bind::bind_similarity(module);
  pycm::bind::bind_topk(module);
  pycm::bind::bind_rank(module);
  pycm::bind::bind_join(module);
  pycm::bind::bind_maxsim(module);
  pycm::bind::bind_xattn(module);
  pycm::bind::bind_gallery(module);
  pycm::bind::bind_cuda(module);
  pycm::bind::bind_cuda_sets(module);
  pycm::bind::bind_cuda_temporal(module);
  pycm::bind::bind_system(module);
  pycm::bind::bind_pool_states(module);
  pycm::bind::bind_temporal_pool(module);
}
