// Errors that say which function, which argument, what was expected and what came.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pycm {

struct ValueError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct TypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct NotImplemented : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// The caller asked the running operation to stop (Ctrl-C).
struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) throw ValueError(text(parts...));
}

}  // namespace pycm
