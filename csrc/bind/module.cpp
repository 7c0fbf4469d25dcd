#include <nanobind/nanobind.h>

#include "bind/ops.h"
#include "core/check.h"

namespace nb = nanobind;

NB_MODULE(_C, module) {
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const pycm::TypeError& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    } catch (const pycm::ValueError& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const pycm::NotImplemented& error) {
      PyErr_SetString(PyExc_NotImplementedError, error.what());
    } catch (const pycm::Interrupted&) {
      // The signal's handler has already set the exception, KeyboardInterrupt as a rule.
      if (!PyErr_Occurred()) PyErr_SetNone(PyExc_KeyboardInterrupt);
    }
  });
  module.doc() = "The compiled part of pycm. Use the functions of the package `pycm` instead.";
  pycm::bind::bind_limits(module);
  pycm::bind::bind_similarity(module);
  pycm::bind::bind_topk(module);
  pycm::bind::bind_rank(module);
  pycm::bind::bind_join(module);
  pycm::bind::bind_maxsim(module);
  pycm::bind::bind_xattn(module);
  pycm::bind::bind_gallery(module);
  pycm::bind::bind_system(module);
  pycm::bind::bind_pool_states(module);
  pycm::bind::bind_temporal_pool(module);
}
