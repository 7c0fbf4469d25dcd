// What every operation of a build without CUDA does.
#pragma once

#include "core/check.h"

namespace pycm::cuda {

[[noreturn]] inline void missing(const char* operation) {
  throw NotImplemented(text(operation, ": built without CUDA: nvcc was not found when pycm was compiled"));
}

}  // namespace pycm::cuda
