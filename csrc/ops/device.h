// The CUDA side of a build: what was compiled and what the machine has.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pycm {

// Where a CUDA operation runs: on this stream of the current device, with this scratch in the device's memory. Every pointer
// in its Args is one of the device too. It allocates nothing and never waits: launches are queued and the call returns.
struct CudaContext {
  void* stream = nullptr;  // cudaStream_t
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

namespace cuda {

struct Device {
  std::string name, capability;
  int64_t memory_bytes;
};

bool compiled();
std::string toolkit();
std::vector<std::string> architectures();
// `problem` says why the list is empty.
std::vector<Device> devices(std::string& problem);

}  // namespace cuda
}  // namespace pycm
