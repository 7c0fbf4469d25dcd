// Host side of a kernel: error checks, launches, workspace, what the device can do, tensor maps. Included by .cu files
// only. Nothing here allocates device memory or waits for the device, so every launch can be captured into a CUDA
// graph.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <tuple>
#include <type_traits>

#include "cuda/arch.cuh"

namespace pycm::cuda {

struct DeviceLimits {
  int multiprocessors;
  int64_t shared_bytes;                                   // the most dynamic shared memory one block may ask for
  int major, minor;                                       // compute capability
  bool sm90() const { return major == 9 && minor == 0; }  // wgmma and TMA kernels; otherwise the sm_80 ones
};
const DeviceLimits& device_limits();  // of the current device

// Blocks, threads, and optionally blocks per cluster (along x), dynamic shared memory, stream (a cudaStream_t), and whether all
// blocks must run at once, since they wait for each other.
struct Grid {
  dim3 grid, block;
  int cluster = 1;
  int64_t shared_bytes = 0;
  void* stream = nullptr;
  bool cooperative = false;
};

// Carves arrays out of one buffer, each aligned to 256 bytes. With a null base it only counts: the function that lays
// out a workspace also says how large it must be.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    const int64_t begin = (used_ + 255) / 256 * 256;
    used_ = begin + count * static_cast<int64_t>(sizeof(T));
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + begin);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// A row-major matrix for TMA: `columns` x `rows` elements, rows `row_bytes` apart (a multiple of 16), in boxes of
// `box_columns` x `box_rows` (each at most 256; a box row is exactly 128 bytes with the 128-byte swizzle). The address
// must be 16-byte aligned. For 3 dimensions, `planes` matrices `plane_bytes` apart.
TensorMap make_tensor_map_2d(const void* data, TensorElement element, int64_t columns, int64_t rows, int64_t row_bytes,
                             int box_columns, int box_rows, Swizzle swizzle = Swizzle::k128);
TensorMap make_tensor_map_3d(const void* data, TensorElement element, int64_t columns, int64_t rows, int64_t planes,
                             int64_t row_bytes, int64_t plane_bytes, int box_columns, int box_rows, int box_planes,
                             Swizzle swizzle = Swizzle::k128);

// Sets `bytes` bytes to `value`, or copies device to device, in stream order.
void memset_async(void* data, int value, int64_t bytes, void* stream, const char* name);
void copy_async(void* to, const void* from, int64_t bytes, void* stream, const char* name);

#if !defined(PYCM_SIMT)

// std::runtime_error "topk: screen: <CUDA's message>" unless the call succeeded.
void cuda_check(cudaError_t status, const char* name);

void launch_arguments(const void* kernel, const Grid& grid, const char* name, void** arguments);
bool cluster_fits_device(const void* kernel, const Grid& grid);

// Whether the device can run one cluster of the grid. More than 8 blocks need more of it than every device has.
template <typename... Parameters>
bool cluster_fits(void (*kernel)(Parameters...), const Grid& grid) {
  return cluster_fits_device(reinterpret_cast<const void*>(kernel), grid);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, const char* name, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each parameter of the kernel");
  auto call = [&](std::decay_t<Parameters>... values) {  // converted to the parameters' types
    void* pointers[] = {static_cast<void*>(&values)..., nullptr};
    launch_arguments(reinterpret_cast<const void*>(kernel), grid, name, pointers);
  };
  call(static_cast<Arguments&&>(arguments)...);
}

#else  // the host executor: one fiber per thread calls the kernel with its own copy of the arguments

template <typename Kernel>
bool cluster_fits(Kernel, const Grid&) {
  return true;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, const char* name, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each parameter of the kernel");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> values;
  } call{kernel, std::tuple<std::decay_t<Parameters>...>(static_cast<Arguments&&>(arguments)...)};
  auto body = [](void* context) {
    std::apply(static_cast<Call*>(context)->kernel, static_cast<Call*>(context)->values);
  };
  simt::run({grid.grid, grid.block, grid.cluster, grid.cooperative, grid.shared_bytes, name}, body, &call, sizeof call);
}

#endif

}  // namespace pycm::cuda
