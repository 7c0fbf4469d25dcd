// The library's errors as Python's.
#pragma once

#include <nanobind/nanobind.h>

#include "core/check.h"

namespace pycm::bind {

inline void register_errors() {
  nanobind::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const TypeError& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    } catch (const ValueError& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const NotImplemented& error) {
      PyErr_SetString(PyExc_NotImplementedError, error.what());
    } catch (const Interrupted&) {
      // The signal's handler has already set the exception, KeyboardInterrupt as a rule.
      if (!PyErr_Occurred()) PyErr_SetNone(PyExc_KeyboardInterrupt);
    }
  });
}

}  // namespace pycm::bind
