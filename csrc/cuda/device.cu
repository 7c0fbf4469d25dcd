// The devices of this machine. The runtime is linked statically, so a machine without a driver still imports pycm.
#include <cuda_runtime.h>

#include "ops/device.h"

namespace pycm::cuda {

bool compiled() { return true; }

std::string toolkit() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::vector<std::string> architectures() {
  std::vector<std::string> result;
  std::string list = PYCM_CUDA_ARCHITECTURES, word;
  for (char c : list + ",") {
    if (c != ',') {
      word += c;
    } else if (!word.empty()) {
      result.push_back(word);
      word.clear();
    }
  }
  return result;
}

std::vector<Device> devices(std::string& problem) {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  std::vector<Device> result;
  for (int i = 0; i < count && status == cudaSuccess; ++i) {
    cudaDeviceProp properties;
    status = cudaGetDeviceProperties(&properties, i);
    if (status == cudaSuccess)
      result.push_back({properties.name, std::to_string(properties.major) + "." + std::to_string(properties.minor),
                        static_cast<int64_t>(properties.totalGlobalMem)});
  }
  if (status != cudaSuccess) problem = cudaGetErrorString(status);
  return result;
}

}  // namespace pycm::cuda
