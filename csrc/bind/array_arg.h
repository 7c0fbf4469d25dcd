// Arrays in and out of Python: NumPy by the buffer protocol, torch by its DLPack table (or, in versions without one, by
// its attributes). Neither costs a call into the interpreter for the common case.
#pragma once

#include <nanobind/nanobind.h>

#include <initializer_list>
#include <ostream>
#include <string>
#include <utility>

#include "core/array.h"
#include "core/check.h"

namespace pycm::bind {

namespace nb = nanobind;

enum class Framework { kNumPy, kTorch };
enum class Content { kFloat, kBool, kInt64, kBytes };
// Where an argument must be: in this process's memory, or in that of a device (of the host executor, which is the same).
enum class Memory { kHost, kDevice };

// Printed in errors as "[2, 3]"; nothing is formatted until then.
struct Shape {
  const Array& array;
};
std::ostream& operator<<(std::ostream& stream, const Shape& shape);

// A borrowed view of a Python array, valid while this lives.
class ArrayArg {
 public:
  // Raises TypeError, naming function and argument, for what is no array or has another content.
  ArrayArg(const char* function, const char* name, nb::handle object, Content content = Content::kFloat,
           Memory memory = Memory::kHost);
  ~ArrayArg();
  ArrayArg(const ArrayArg&) = delete;
  ArrayArg& operator=(const ArrayArg&) = delete;

  const Array& array() const { return array_; }
  Framework framework() const { return framework_; }
  int device() const { return device_; }  // its number among those of its kind
  int64_t size(int axis) const { return array_.shape[axis]; }
  Shape shape() const { return {array_}; }
  int64_t item_bytes() const;
  // Its first byte and the one after its last.
  std::pair<const char*, const char*> extent() const;
  // Raises unless a result of this kind, dtype (of floats) and shape can be written here, over none of its inputs.
  void check_output(const ArrayArg& like, DType dtype, int ndim, const int64_t* dims,
                    std::initializer_list<const ArrayArg*> inputs) const;

 private:
  void from_buffer();
  void take_buffer_of(nb::object converted);
  const char* expected() const;
  void from_dlpack(const void* api);
  void from_attributes();
  void check_memory(int32_t device_type, int32_t device);
  void set_element(char kind, int bits);
  void fail(const std::string& expected) const;

  const char* function_;
  const char* name_;
  nb::handle object_;
  Content content_;
  Memory memory_;
  int device_ = 0;
  Framework framework_ = Framework::kNumPy;
  Array array_;
  Py_buffer buffer_{};
  nb::object converted_;  // a native copy of a byte-swapped or misaligned array
};

// A new contiguous array of the framework on the CPU.
struct NewArray {
  nb::object object;
  void* data;
};
enum class Element { kFloat32, kFloat64, kInt64 };
NewArray new_array(Framework framework, Element element, int ndim, const int64_t* shape);

std::string class_name(nb::handle object);

// Raises TypeError for what is no string; valid while the object lives.
const char* string_arg(const char* function, const char* name, nb::handle object);

// Rows [rows, dim] out of the last two axes.
Rows rows_of(const Array& array);

// Whether torch tensors come by the exchange table where torch has one (the default); off, as in torch before 2.13.
void use_exchange_table(bool use);

// The threads a call may use: what it asked for, else the library's default.
int threads(int requested);

}  // namespace pycm::bind
