#include "bind/array_arg.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <utility>

#include "bind/dlpack.h"

namespace pycm::bind {

std::string class_name(nb::handle object) { return nb::str(nb::object(object.type().attr("__name__"))).c_str(); }

namespace {

// torch.Tensor, once torch is imported, and its exchange table where it has one.
struct TorchType {
  PyTypeObject* type = nullptr;
  const dlpack::ExchangeApi* api = nullptr;
};

bool exchange_table = true;

TorchType find_torch() {
  TorchType found;
  PyObject* modules = PyImport_GetModuleDict();
  PyObject* torch = PyDict_GetItemString(modules, "torch");
  if (torch == nullptr || !PyObject_HasAttrString(torch, "Tensor")) return found;
  nb::object tensor = nb::handle(torch).attr("Tensor");
  found.type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  if (nb::hasattr(tensor, "__dlpack_c_exchange_api__")) {
    nb::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    const auto* api =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw nb::python_error();
    if (api->version.major == 1) found.api = api;
  }
  tensor.release();  // kept for the process: the table and the type outlive every call
  return found;
}

const TorchType& torch_type() {
  static TorchType cached;
  if (cached.type == nullptr) cached = find_torch();
  return cached;
}

struct NumPy {
  nb::object ndarray, empty, float32, float64, int64;
};

const NumPy& numpy() {
  static const NumPy* cached = [] {
    nb::module_ module = nb::module_::import_("numpy");
    return new NumPy{module.attr("ndarray"), module.attr("empty"), module.attr("dtype")("float32"),
                     module.attr("dtype")("float64"), module.attr("dtype")("int64")};
  }();
  return *cached;
}

// Fresh pages cost as much as writing them; NumPy asks for huge ones by itself, torch does not.
void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kWorthwhile = 4 << 20;
  if (bytes < kWorthwhile) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: refused, it changes nothing
#endif
}

std::string dtype_name(nb::handle object) {
  if (!nb::hasattr(object, "dtype")) return class_name(object);
  std::string name = nb::str(nb::object(object.attr("dtype"))).c_str();
  return name.rfind("torch.", 0) == 0 ? name.substr(6) : name;
}

}  // namespace

void use_exchange_table(bool use) { exchange_table = use; }

ArrayArg::ArrayArg(const char* function, const char* name, nb::handle object, Content content, Memory memory)
    : function_(function), name_(name), object_(object), content_(content), memory_(memory) {
  if (memory == Memory::kHost &&
      PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(numpy().ndarray.ptr()))) {
    from_buffer();
    return;
  }
  const TorchType& torch = torch_type();
  // Lists and bytes are refused: guessing a dtype for them would hide a copy and a mistake.
  if (torch.type == nullptr || !PyObject_TypeCheck(object.ptr(), torch.type))
    throw TypeError(text(function, ": ", name, " must be a torch tensor, a NumPy array or have __dlpack__, got ",
                         class_name(object)));
  framework_ = Framework::kTorch;
  if (exchange_table && torch.api != nullptr && torch.api->from_object != nullptr) {
    from_dlpack(torch.api);
  } else {
    from_attributes();
  }
}

ArrayArg::~ArrayArg() {
  if (buffer_.obj != nullptr) PyBuffer_Release(&buffer_);
}

void ArrayArg::fail(const std::string& expected) const {
  throw TypeError(text(function_, ": ", name_, " must be ", expected, ", got ", dtype_name(object_)));
}

const char* ArrayArg::expected() const {
  return content_ == Content::kBool    ? "a boolean array"
         : content_ == Content::kInt64 ? "an int64 array"
         : content_ == Content::kBytes ? "a uint8 array"
                                       : "float32, float16, bfloat16 or float64";
}

void ArrayArg::take_buffer_of(nb::object converted) {
  if (buffer_.obj != nullptr) PyBuffer_Release(&buffer_);
  converted_ = std::move(converted);
  if (PyObject_GetBuffer(converted_.ptr(), &buffer_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) throw nb::python_error();
}

void ArrayArg::set_element(char kind, int bits) {
  if (content_ == Content::kBool) {
    if (kind != '?') fail(expected());
  } else if (content_ == Content::kInt64) {
    if (kind != 'i' || bits != 64) fail(expected());
  } else if (content_ == Content::kBytes) {
    if (kind != 'B' || bits != 8) fail(expected());
  } else if (kind == 'f' && bits == 32) {
    array_.dtype = DType::kFloat32;
  } else if (kind == 'f' && bits == 16) {
    array_.dtype = DType::kFloat16;
  } else if (kind == 'b' && bits == 16) {
    array_.dtype = DType::kBFloat16;
  } else if (kind == 'f' && bits == 64) {
    array_.dtype = DType::kFloat64;
  } else {
    fail(expected());
  }
}

void ArrayArg::from_buffer() {
  bool bfloat16 = false;
  if (PyObject_GetBuffer(object_.ptr(), &buffer_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    PyErr_Clear();
    // An extension dtype has no buffer format; its bits have.
    bfloat16 = dtype_name(object_) == "bfloat16";
    if (!bfloat16) fail(expected());
    take_buffer_of(object_.attr("view")("uint16"));
  }
  if (buffer_.itemsize <= 0) fail(expected());
  const bool swapped = buffer_.format != nullptr && *buffer_.format == '>';
  if (swapped || reinterpret_cast<uintptr_t>(buffer_.buf) % static_cast<uintptr_t>(buffer_.itemsize) != 0)
    take_buffer_of(object_.attr("astype")(object_.attr("dtype").attr("newbyteorder")("=")));
  const char* format = buffer_.format == nullptr ? "B" : buffer_.format;
  if (*format == '=' || *format == '@' || *format == '<') ++format;
  const char code = format[0] != '\0' && format[1] == '\0' ? format[0] : '\0';
  const char kind = bfloat16                                    ? 'b'
                    : code == 'f' || code == 'd' || code == 'e' ? 'f'
                    : code == 'l' || code == 'q'                ? 'i'
                    : code == '?'                               ? '?'
                                                                : 'x';
  set_element(kind, static_cast<int>(buffer_.itemsize * 8));
  array_.data = buffer_.buf;
  array_.ndim = buffer_.ndim;
  check(array_.ndim <= kMaxDims, function_, ": ", name_, " must have at most ", kMaxDims, " dimensions, got ",
        array_.ndim);
  for (int d = 0; d < array_.ndim; ++d) {
    array_.shape[d] = buffer_.shape[d];
    if (buffer_.strides[d] % buffer_.itemsize != 0) fail("an array whose strides are whole elements");
    array_.strides[d] = buffer_.strides[d] / buffer_.itemsize;
  }
}

void ArrayArg::from_dlpack(const void* table) {
  const auto* api = static_cast<const dlpack::ExchangeApi*>(table);
  dlpack::Tensor tensor{};
  if (api->from_object(object_.ptr(), &tensor) != 0) {
    PyErr_Clear();  // torch's message is a page of its own stack
    throw TypeError(text(function_, ": ", name_, " must be a dense tensor, got one on ",
                         nb::str(nb::object(object_.attr("device"))).c_str(), " with layout ",
                         nb::str(nb::object(object_.attr("layout"))).c_str()));
  }
  check_memory(tensor.device.type, tensor.device.id);
  const char kind = tensor.dtype.code == dlpack::kFloat    ? 'f'
                    : tensor.dtype.code == dlpack::kBFloat ? 'b'
                    : tensor.dtype.code == dlpack::kBool   ? '?'
                    : tensor.dtype.code == dlpack::kInt    ? 'i'
                    : tensor.dtype.code == dlpack::kUInt   ? 'B'
                                                           : 'x';
  set_element(tensor.dtype.lanes == 1 ? kind : 'x', tensor.dtype.bits);
  array_.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  array_.ndim = tensor.ndim;
  check(array_.ndim <= kMaxDims, function_, ": ", name_, " must have at most ", kMaxDims, " dimensions, got ",
        array_.ndim);
  int64_t dense = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    array_.shape[d] = tensor.shape[d];
    array_.strides[d] = tensor.strides != nullptr ? tensor.strides[d] : dense;
    dense *= tensor.shape[d];
  }
}

void ArrayArg::check_memory(int32_t device_type, int32_t device) {
  const bool host = device_type == dlpack::kCpu || device_type == dlpack::kCudaHost;
#if defined(PYCM_SIMT)
  const bool device_memory = host;
#else
  const bool device_memory = device_type == dlpack::kCuda;
#endif
  device_ = host ? 0 : device;
  if (memory_ == Memory::kHost ? host : device_memory) return;
  throw NotImplemented(text(function_, ": ", name_, " is on ", nb::str(nb::object(object_.attr("device"))).c_str(),
                            ", and this function is ",
                            memory_ == Memory::kHost ? "for the CPU only" : "for CUDA only"));
}

void ArrayArg::from_attributes() {
  nb::object device = object_.attr("device"), index = device.attr("index");
  const std::string type = nb::str(nb::object(device.attr("type"))).c_str();
  check_memory(type == "cpu"    ? dlpack::kCpu
               : type == "cuda" ? dlpack::kCuda
                                : 0,
               index.is_none() ? 0 : nb::cast<int32_t>(index));
  const std::string dtype = dtype_name(object_);
  const int bits = static_cast<int>(nb::cast<int64_t>(object_.attr("element_size")()) * 8);
  set_element(dtype == "bfloat16"                                              ? 'b'
              : dtype == "bool"                                                ? '?'
              : dtype == "int64"                                               ? 'i'
              : dtype == "uint8"                                               ? 'B'
              : dtype == "float32" || dtype == "float16" || dtype == "float64" ? 'f'
                                                                               : 'x',
              bits);
  array_.data = reinterpret_cast<void*>(nb::cast<uintptr_t>(object_.attr("data_ptr")()));
  nb::tuple shape(object_.attr("shape")), strides(object_.attr("stride")());
  array_.ndim = static_cast<int>(shape.size());
  check(array_.ndim <= kMaxDims, function_, ": ", name_, " must have at most ", kMaxDims, " dimensions, got ",
        array_.ndim);
  for (int d = 0; d < array_.ndim; ++d) {
    array_.shape[d] = nb::cast<int64_t>(shape[d]);
    array_.strides[d] = nb::cast<int64_t>(strides[d]);
  }
}

int64_t ArrayArg::item_bytes() const {
  return content_ == Content::kFloat ? item_size(array_.dtype) : content_ == Content::kInt64 ? 8 : 1;
}

std::pair<const char*, const char*> ArrayArg::extent() const {
  const char* first = static_cast<const char*>(array_.data);
  const char* last = first;
  for (int d = 0; d < array_.ndim; ++d) {
    if (array_.shape[d] == 0) return {first, first};
    const int64_t reach = (array_.shape[d] - 1) * array_.strides[d] * item_bytes();
    (reach < 0 ? first : last) += reach;
  }
  return {first, last + item_bytes()};
}

void ArrayArg::check_output(const ArrayArg& like, DType dtype, int ndim, const int64_t* dims,
                            std::initializer_list<const ArrayArg*> inputs) const {
  if (framework_ != like.framework_)
    throw TypeError(text(function_, ": ", name_, " must be of the inputs' kind, got ", class_name(object_)));
  check(device_ == like.device_, function_, ": ", name_, " must be on ", like.name_, "'s device ", like.device_,
        ", got ", device_);
  if (content_ == Content::kFloat && array_.dtype != dtype)
    throw TypeError(text(function_, ": ", name_, " must be ", pycm::name_of(dtype), ", got ", dtype_name(object_)));
  Array wanted;
  wanted.ndim = ndim;
  std::copy_n(dims, ndim, wanted.shape);
  check(array_.ndim == ndim && std::equal(dims, dims + ndim, array_.shape), function_, ": ", name_, " must have shape ",
        Shape{wanted}, ", got ", shape());
  bool dense = true;
  int64_t stride = 1;
  for (int d = ndim - 1; d >= 0; stride *= dims[d--]) dense &= dims[d] <= 1 || array_.strides[d] == stride;
  check(dense || stride == 0, function_, ": ", name_, " must be contiguous");
  check(converted_.ptr() == nullptr && !buffer_.readonly, function_, ": ", name_,
        " must be writable, aligned and of native byte order");
  const auto [begin, end] = extent();
  for (const ArrayArg* input : inputs) {
    const auto [first, last] = input->extent();
    check(end <= first || last <= begin, function_, ": ", name_, " must not overlap ", input->name_);
  }
}

std::ostream& operator<<(std::ostream& stream, const Shape& shape) {
  stream << "[";
  for (int d = 0; d < shape.array.ndim; ++d) stream << (d == 0 ? "" : ", ") << shape.array.shape[d];
  return stream << "]";
}

NewArray new_array(Framework framework, Element element, int ndim, const int64_t* shape) {
  if (framework == Framework::kTorch && exchange_table && torch_type().api != nullptr) {
    const dlpack::ExchangeApi* api = torch_type().api;
    int64_t dims[kMaxDims + 2];
    for (int d = 0; d < ndim; ++d) dims[d] = shape[d];
    dlpack::Tensor prototype{};
    prototype.device = {dlpack::kCpu, 0};
    prototype.ndim = ndim;
    prototype.dtype = {element == Element::kInt64 ? dlpack::kInt : dlpack::kFloat,
                       static_cast<uint8_t>(element == Element::kFloat32 ? 32 : 64), 1};
    prototype.shape = dims;
    dlpack::ManagedTensorVersioned* managed = nullptr;
    std::string error = "the framework could not allocate the result";
    const auto set_error = [](void* context, const char*, const char* message) {
      *static_cast<std::string*>(context) = message;
    };
    if (api->allocate(&prototype, &managed, &error, set_error) != 0) {
      PyErr_SetString(PyExc_MemoryError, error.c_str());
      throw nb::python_error();
    }
    void* data = static_cast<char*>(managed->dl_tensor.data) + managed->dl_tensor.byte_offset;
    int64_t bytes = element == Element::kFloat32 ? 4 : 8;
    for (int d = 0; d < ndim; ++d) bytes *= shape[d];
    prefer_huge_pages(data, bytes);
    void* object = nullptr;
    if (api->managed_to_object(managed, &object) != 0) throw nb::python_error();
    return {nb::steal(static_cast<PyObject*>(object)), data};
  }
  nb::object dims = nb::steal(PyTuple_New(ndim));
  for (int d = 0; d < ndim; ++d) PyTuple_SetItem(dims.ptr(), d, PyLong_FromLongLong(shape[d]));
  if (framework == Framework::kTorch) {
    nb::module_ torch = nb::module_::import_("torch");
    const char* dtype = element == Element::kFloat32 ? "float32" : element == Element::kFloat64 ? "float64" : "int64";
    nb::object object = torch.attr("empty")(dims, nb::arg("dtype") = torch.attr(dtype), nb::arg("device") = "cpu");
    return {object, reinterpret_cast<void*>(nb::cast<uintptr_t>(object.attr("data_ptr")()))};
  }
  const NumPy& np = numpy();
  const nb::object& dtype = element == Element::kFloat32   ? np.float32
                            : element == Element::kFloat64 ? np.float64
                                                           : np.int64;
  nb::object object = np.empty(dims, dtype);
  Py_buffer buffer;
  if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_WRITABLE | PyBUF_STRIDES) != 0) throw nb::python_error();
  void* data = buffer.buf;
  PyBuffer_Release(&buffer);
  return {object, data};
}

const char* string_arg(const char* function, const char* name, nb::handle object) {
  const char* value = PyUnicode_Check(object.ptr()) ? PyUnicode_AsUTF8AndSize(object.ptr(), nullptr) : nullptr;
  if (value == nullptr) throw TypeError(text(function, ": ", name, " must be a string, got ", class_name(object)));
  return value;
}

Rows rows_of(const Array& array) {
  Rows rows;
  rows.data = array.data;
  rows.dtype = array.dtype;
  rows.rows = array.shape[array.ndim - 2];
  rows.dim = array.shape[array.ndim - 1];
  rows.row_stride = array.strides[array.ndim - 2];
  rows.dim_stride = array.strides[array.ndim - 1];
  return rows;
}

}  // namespace pycm::bind
