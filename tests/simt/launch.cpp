// launch.h on the host executor: limits, memory, tensor maps.
#include "cuda/launch.h"

#include <cstdlib>
#include <stdexcept>

namespace pycm::cuda {

const DeviceLimits& device_limits() {
  static const DeviceLimits kSm80{4, 163 * 1024, 8, 0}, kSm90{4, 227 * 1024, 9, 0};
  const char* arch = std::getenv("PYCM_SIMT_ARCH");
  const std::string value = arch == nullptr ? "90" : arch;
  if (value != "80" && value != "90") throw std::runtime_error("PYCM_SIMT_ARCH must be 80 or 90, got " + value);
  const DeviceLimits& limits = value == "80" ? kSm80 : kSm90;
  // Another device: less shared memory, or as many multiprocessors as a chip, for what is planned and not run.
  const char *shared = std::getenv("PYCM_SIMT_SHARED"), *processors = std::getenv("PYCM_SIMT_MULTIPROCESSORS");
  if (shared == nullptr && processors == nullptr) return limits;
  static DeviceLimits other;
  other = limits;
  if (shared != nullptr) other.shared_bytes = std::strtoll(shared, nullptr, 10);
  if (processors != nullptr) other.multiprocessors = std::atoi(processors);
  return other;
}

void memset_async(void* data, int value, int64_t bytes, void*, const char* name) {
  if (bytes > 0) simt::device_memset(data, value, static_cast<size_t>(bytes), name);
}

void copy_async(void* to, const void* from, int64_t bytes, void*, const char* name) {
  if (bytes > 0) simt::device_copy(to, from, static_cast<size_t>(bytes), name);
}

namespace {

// The conditions of cuTensorMapEncodeTiled.
TensorMap encode(const void* data, TensorElement element, int rank, const int64_t* sizes, const int64_t* strides,
                 const int* box, Swizzle swizzle) {
  TensorMap map = {};
  simt::TensorMapFields& fields = map.fields;
  auto want = [](bool good, const char* what) {
    if (!good) throw std::runtime_error(std::string("make_tensor_map: ") + what);
  };
  fields.data = static_cast<const char*>(data);
  fields.element_bytes = element == TensorElement::kInt8                                         ? 1
                         : element == TensorElement::kFloat32 || element == TensorElement::kTf32 ? 4
                                                                                                 : 2;
  fields.rank = rank;
  fields.swizzled = swizzle == Swizzle::k128;
  want(reinterpret_cast<uintptr_t>(data) % 16 == 0, "the address must be 16-byte aligned");
  for (int i = 0; i < rank; ++i) {
    fields.size[i] = sizes[i];
    fields.stride[i] = i == 0 ? fields.element_bytes : strides[i - 1];
    fields.box[i] = box[i];
    want(sizes[i] >= 1 && sizes[i] <= int64_t{1} << 32, "sizes must be in [1, 2^32]");
    want(box[i] >= 1 && box[i] <= 256, "box sizes must be in [1, 256]");
    want(i == 0 || (fields.stride[i] % 16 == 0 && fields.stride[i] < int64_t{1} << 40),
         "strides must be multiples of 16 below 2^40");
  }
  const int row_bytes = box[0] * fields.element_bytes;
  want(row_bytes % 16 == 0, "a box row must be a multiple of 16 bytes");
  want(!fields.swizzled || row_bytes == 128, "a box row must have 128 bytes with the 128-byte swizzle");
  return map;
}

}  // namespace

TensorMap make_tensor_map_2d(const void* data, TensorElement element, int64_t columns, int64_t rows, int64_t row_bytes,
                             int box_columns, int box_rows, Swizzle swizzle) {
  const int64_t sizes[2] = {columns, rows};
  const int box[2] = {box_columns, box_rows};
  return encode(data, element, 2, sizes, &row_bytes, box, swizzle);
}

TensorMap make_tensor_map_3d(const void* data, TensorElement element, int64_t columns, int64_t rows, int64_t planes,
                             int64_t row_bytes, int64_t plane_bytes, int box_columns, int box_rows, int box_planes,
                             Swizzle swizzle) {
  const int64_t sizes[3] = {columns, rows, planes}, strides[2] = {row_bytes, plane_bytes};
  const int box[3] = {box_columns, box_rows, box_planes};
  return encode(data, element, 3, sizes, strides, box, swizzle);
}

}  // namespace pycm::cuda
