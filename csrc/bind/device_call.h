// How a binding queues an operation on a device. With PYCM_SIMT the device is the host executor of tests/simt.
#pragma once

#include <vector>

#include "bind/array_arg.h"
#include "ops/device.h"
#if defined(PYCM_SIMT)
#include "memory.h"
#endif

namespace pycm::bind {

struct DeviceArg : ArrayArg {
  DeviceArg(const char* function, const char* name, nb::handle object, Content content = Content::kFloat)
      : ArrayArg(function, name, object, content, Memory::kDevice) {}
};

inline DType score_dtype(DType input) { return input == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

using Arrays = std::vector<const ArrayArg*>;

// Queues the operation on `stream`, a cudaStream_t as torch gives it. `scratch`: what the caller calls the workspace.
template <class Args>
void run(const char* function, void (*operation)(const Args&, const CudaContext&), const Args& args, int64_t bytes,
         nb::handle workspace_object, uintptr_t stream, [[maybe_unused]] const Arrays& inputs,
         [[maybe_unused]] const Arrays& results, const char* scratch = "workspace") {
  const DeviceArg workspace(function, scratch, workspace_object, Content::kBytes);
  check(workspace.array().ndim == 1 && workspace.size(0) >= bytes, function, ": ", scratch, " must have shape [", bytes,
        "], got ", workspace.shape());
  const CudaContext context{reinterpret_cast<void*>(stream), workspace.array().data, workspace.size(0)};
#if defined(PYCM_SIMT)
  simt::Memory memory;  // what the kernels may touch
  const auto add = [&memory](const ArrayArg& array, bool initialised) {
    const auto [first, last] = array.extent();
    memory.add(first, last - first, initialised);
  };
  for (const ArrayArg* array : inputs) add(*array, true);
  for (const ArrayArg* array : results) add(*array, false);
  add(workspace, false);
#endif
  nb::gil_scoped_release release;
  operation(args, context);
}

}  // namespace pycm::bind
