// The CUDA side of a build: what was compiled and what the machine has.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pycm::cuda {

struct Device {
  std::string name, capability;
  int64_t memory_bytes;
};

bool compiled();
std::string toolkit();
std::vector<std::string> architectures();
// `problem` says why the list is empty.
std::vector<Device> devices(std::string& problem);

}  // namespace pycm::cuda
