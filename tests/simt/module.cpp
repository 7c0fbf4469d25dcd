// `_simt`: the CUDA operations run by the host executor.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind/errors.h"
#include "bind/ops.h"
#include "cuda/launch.h"

NB_MODULE(_simt, module) {
  pycm::bind::register_errors();
  module.doc() = "The CUDA operations of pycm over memory of the host, run by the executor of tests/simt.";
  pycm::bind::bind_cuda(module);
  pycm::bind::bind_cuda_sets(module);
  pycm::bind::bind_cuda_temporal(module);
  module.def("take_launches", &simt::take_launches, "The names of the kernels launched since the last call.");
}
