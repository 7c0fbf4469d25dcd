// Launches, limits and tensor maps on the device. The host executor has its own (tests/simt).
#include <mutex>
#include <stdexcept>

#include "cuda/launch.h"

namespace pycm::cuda {

void cuda_check(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch failure is reported once
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
}

const DeviceLimits& device_limits() {
  constexpr int kDevices = 64;
  static DeviceLimits limits[kDevices];
  static std::once_flag known[kDevices];
  int device = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= kDevices)
    throw std::runtime_error("at most 64 devices are supported, got device " + std::to_string(device));
  std::call_once(known[device], [device] {
    auto get = [&](cudaDeviceAttr attribute) {
      int value = 0;
      cuda_check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
      return value;
    };
    limits[device] = {get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                      get(cudaDevAttrComputeCapabilityMajor), get(cudaDevAttrComputeCapabilityMinor)};
  });
  return limits[device];
}

namespace {

// What a kernel must be allowed before it is launched so.
void allow(const void* kernel, const Grid& grid, const char* name) {
  constexpr int64_t kDefaultShared = 48 * 1024;
  constexpr int kPortableCluster = 8;
  if (grid.shared_bytes > kDefaultShared) {
    // All there is, and not what this launch takes: the attribute is the kernel's, and other threads launch it too.
    cudaFuncAttributes known;
    cuda_check(cudaFuncGetAttributes(&known, kernel), name);
    const int most = static_cast<int>(device_limits().shared_bytes - static_cast<int64_t>(known.sharedSizeBytes));
    if (known.maxDynamicSharedSizeBytes < most)
      cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
  }
  if (grid.cluster > kPortableCluster)
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
}

cudaLaunchConfig_t config_of(const Grid& grid, cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.grid;
  config.blockDim = grid.block;
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(grid.stream);
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  }
  if (grid.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  return config;
}

}  // namespace

void launch_arguments(const void* kernel, const Grid& grid, const char* name, void** arguments) {
  allow(kernel, grid, name);
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = config_of(grid, attributes);
  const cudaError_t status = cudaLaunchKernelExC(&config, kernel, arguments);
  if (status == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();
    const int64_t blocks = int64_t{grid.grid.x} * grid.grid.y * grid.grid.z;
    throw std::runtime_error(
        std::string(name) + ": its " + std::to_string(blocks) +
        " blocks must run at once, one on each multiprocessor, and this process may use fewer of the " +
        std::to_string(device_limits().multiprocessors) + " that the device reports");
  }
  cuda_check(status, name);
}

bool cluster_fits_device(const void* kernel, const Grid& grid) {
  allow(kernel, grid, "cluster_fits");
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = config_of(grid, attributes);
  int clusters = 0;
  const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (status != cudaSuccess) cudaGetLastError();  // a cluster that cannot be is no error here
  return status == cudaSuccess && clusters > 0;
}

void memset_async(void* data, int value, int64_t bytes, void* stream, const char* name) {
  if (bytes > 0)
    cuda_check(cudaMemsetAsync(data, value, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), name);
}

void copy_async(void* to, const void* from, int64_t bytes, void* stream, const char* name) {
  if (bytes > 0)
    cuda_check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                               static_cast<cudaStream_t>(stream)),
               name);
}

namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// From the driver at run time: the module is not linked with libcuda, so that it loads on machines without one.
Encode encode_function() {
  static const Encode function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult query = {};
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &query),
               "cuTensorMapEncodeTiled");
    if (query != cudaDriverEntryPointSuccess) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(found);
  }();
  return function;
}

CUtensorMapDataType data_type(TensorElement element) {
  switch (element) {
    case TensorElement::kInt8: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    case TensorElement::kFloat16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case TensorElement::kBFloat16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case TensorElement::kFloat32: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case TensorElement::kTf32: return CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  }
  throw std::logic_error("unknown tensor element");
}

TensorMap encode(const void* data, TensorElement element, int rank, const cuuint64_t* sizes, const cuuint64_t* strides,
                 const cuuint32_t* box, Swizzle swizzle) {
  const cuuint32_t steps[3] = {1, 1, 1};
  const cuuint32_t element_bytes = element == TensorElement::kInt8 ? 1 : element < TensorElement::kFloat32 ? 2 : 4;
  if (swizzle == Swizzle::k128 && box[0] * element_bytes != 128)
    throw std::logic_error("make_tensor_map: a box row must have 128 bytes with the 128-byte swizzle");
  int device = 0;  // the driver asks for a context, which a fresh thread has only once it has set its device
  cuda_check(cudaGetDevice(&device), "make_tensor_map");
  cuda_check(cudaSetDevice(device), "make_tensor_map");
  TensorMap result;
  const CUresult status =
      encode_function()(&result.map, data_type(element), static_cast<cuuint32_t>(rank), const_cast<void*>(data), sizes,
                        strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        swizzle == Swizzle::k128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled failed with CUDA driver error " + std::to_string(status));
  return result;
}

}  // namespace

TensorMap make_tensor_map_2d(const void* data, TensorElement element, int64_t columns, int64_t rows, int64_t row_bytes,
                             int box_columns, int box_rows, Swizzle swizzle) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  return encode(data, element, 2, sizes, strides, box, swizzle);
}

TensorMap make_tensor_map_3d(const void* data, TensorElement element, int64_t columns, int64_t rows, int64_t planes,
                             int64_t row_bytes, int64_t plane_bytes, int box_columns, int box_rows, int box_planes,
                             Swizzle swizzle) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(planes)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(plane_bytes)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows),
                             static_cast<cuuint32_t>(box_planes)};
  return encode(data, element, 3, sizes, strides, box, swizzle);
}

}  // namespace pycm::cuda
