// Threads, levels and devices: what the library runs on.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <thread>

#include "bind/array_arg.h"
#include "bind/ops.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "ops/device.h"

namespace pycm::bind {
namespace {

constexpr int kMaxThreads = 1024;

std::atomic<int> chosen_threads{0};

int parse_threads(const char* value) {
  char* end = nullptr;
  const long count = std::strtol(value, &end, 10);
  check(end != value && *end == '\0' && count >= 1 && count <= kMaxThreads, "PYCM_NUM_THREADS: expected 1 to ",
        kMaxThreads, ", got '", value, "'");
  return static_cast<int>(count);
}

// PYCM_NUM_THREADS, or 0.
int environment_threads() {
  static const int count = [] {
    const char* value = std::getenv("PYCM_NUM_THREADS");
    return value == nullptr || *value == '\0' ? 0 : parse_threads(value);
  }();
  return count;
}

// The processors this process may run on.
int available_threads() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count == 0 ? 1 : static_cast<int>(count);
}

bool interrupted() {
  nb::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

nb::dict build_info() {
  nb::dict info;
  nb::list levels;
  for (const char* level : cpu::kSimdLevels)
    if (cpu::simd_level_available(level)) levels.append(level);
  info["cpu_level"] = cpu::kernels().level;
  info["cpu_levels"] = levels;
#if defined(__x86_64__)
  info["compiled_levels"] = nb::make_tuple("scalar", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16");
#else
  info["compiled_levels"] = nb::make_tuple("scalar");
#endif
  info["threads"] = threads(0);
  info["compiler"] = PYCM_COMPILER;
  info["cuda_compiled"] = cuda::compiled();
  info["cuda_toolkit"] = cuda::toolkit();
  info["cuda_architectures"] = cuda::architectures();
  nb::list devices;
  std::string problem;
  for (const cuda::Device& device : cuda::devices(problem)) {
    nb::dict entry;
    entry["name"] = device.name;
    entry["capability"] = device.capability;
    entry["memory_bytes"] = device.memory_bytes;
    devices.append(entry);
  }
  info["cuda_devices"] = devices;
  info["cuda_problem"] = problem;
  return info;
}

}  // namespace

int threads(int requested) {
  if (environment_threads() > 0) return environment_threads();
  if (chosen_threads.load() > 0) return chosen_threads.load();
  if (requested > 0) return std::min(requested, kMaxThreads);
  static const int available = available_threads();
  return available;
}

void bind_system(nb::module_& module) {
  module.def("build_info", &build_info, nb::sig("def build_info() -> dict[str, typing.Any]"));
  module.def("cuda_compiled", &cuda::compiled);
  module.def("use_exchange_table", &use_exchange_table, nb::arg("use"));
  module.def("set_simd_level", &cpu::set_simd_level, nb::arg("level"));
  module.def(
      "set_num_threads",
      [](int count) {
        check(count >= 0 && count <= kMaxThreads, "set_num_threads: count must be in [1, ", kMaxThreads,
              "], or 0 for the default, got ", count);
        chosen_threads = count;
      },
      nb::arg("count"));
  cpu::set_interrupt_check(&interrupted);
}

}  // namespace pycm::bind
