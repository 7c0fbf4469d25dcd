// `_simt`: the CUDA operations run by the host executor.
#include <nanobind/nanobind.h>

#include "bind/errors.h"
#include "bind/ops.h"

NB_MODULE(_simt, module) {
  pycm::bind::register_errors();
  module.doc() = "The CUDA operations of pycm over memory of the host, run by the executor of tests/simt.";
  pycm::bind::bind_cuda(module);
  pycm::bind::bind_cuda_sets(module);
  pycm::bind::bind_cuda_temporal(module);
}
