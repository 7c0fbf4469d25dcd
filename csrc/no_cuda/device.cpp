#include "ops/device.h"

namespace pycm::cuda {

bool compiled() { return false; }
std::string toolkit() { return ""; }
std::vector<std::string> architectures() { return {}; }
std::vector<Device> devices(std::string& problem) {
  problem = "built without CUDA: nvcc was not found when pycm was compiled";
  return {};
}

}  // namespace pycm::cuda
