#include "ops/limits.h"

#include <nanobind/nanobind.h>

#include "bind/array_arg.h"
#include "bind/ops.h"
#include "core/check.h"

namespace nb = nanobind;

namespace pycm::bind {
namespace {

constexpr const char* kName = "measure_limits";
constexpr int64_t kLeastBytes = 1 << 20;

nb::dict measure_limits(int num_threads, double seconds, int64_t bytes) {
  check(num_threads >= 0 && num_threads <= 1024, kName, ": num_threads must be in [0, 1024], got ", num_threads);
  check(seconds >= 0 && seconds <= 60, kName, ": seconds must be in [0, 60], got ", seconds);
  check(bytes >= kLeastBytes, kName, ": bytes must be at least ", kLeastBytes, ", got ", bytes);
  LimitsArgs args;
  // Unlike elsewhere an explicit count wins over set_num_threads: one thread is measured beside several.
  args.num_threads = num_threads > 0 ? num_threads : threads(0);
  args.seconds = seconds;
  args.bytes = bytes;
  Limits limits;
  {
    nb::gil_scoped_release release;
    limits = cpu::measure_limits(args);
  }
  nb::dict result;
  result["float32"] = limits.float32;
  result["bfloat16"] = limits.bfloat16;
  result["int8"] = limits.int8;
  result["read"] = limits.read;
  return result;
}

}  // namespace

void bind_limits(nb::module_& module) {
  module.def("measure_limits", &measure_limits,
             nb::sig("def measure_limits(num_threads: int = 0, seconds: float = 0.25, bytes: int = 536870912) "
                     "-> dict[str, float]"),
             nb::arg("num_threads") = 0, nb::arg("seconds") = 0.25, nb::arg("bytes") = int64_t{1} << 29);
}

}  // namespace pycm::bind
