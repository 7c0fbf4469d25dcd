// Which low-precision pass proposes candidates. It never changes an exact result.
#pragma once

#include <cstring>

#include "core/check.h"

namespace pycm {

enum class ScreenChoice { kAuto, kFloat32, kBFloat16, kInt8 };

inline ScreenChoice parse_screen(const char* function, const char* name) {
  if (std::strcmp(name, "auto") == 0) return ScreenChoice::kAuto;
  if (std::strcmp(name, "float32") == 0) return ScreenChoice::kFloat32;
  if (std::strcmp(name, "bfloat16") == 0) return ScreenChoice::kBFloat16;
  if (std::strcmp(name, "int8") == 0) return ScreenChoice::kInt8;
  throw ValueError(text(function, ": screen must be auto, float32, bfloat16 or int8, got '", name, "'"));
}

}  // namespace pycm
