// Sets of vectors that come from Python: padded with lengths, or ragged with offsets.
#pragma once

#include <optional>

#include "bind/array_arg.h"
#include "core/sets.h"
#include "ops/maxsim.h"

namespace pycm::bind {

class SetsArg {
 public:
  // [N, T, D] and, or None, lengths [N]; or [total, D] and offsets [N + 1]. All values are checked. Errors speak of `name`
  // and of `item`_lengths or `item`_offsets.
  SetsArg(const char* function, const char* name, const char* item, nb::handle values, nb::handle lengths,
          nb::handle offsets);

  VectorSets sets;
  Framework framework() const { return values_.framework(); }
  const ArrayArg& values() const { return values_; }
  const Array& array() const { return values_.array(); }
  Shape shape() const { return values_.shape(); }

 private:
  ArrayArg values_;
  std::string label_;
  std::optional<ArrayArg> borders_;
};

Direction parse_direction(const char* function, const char* name);

// Both of one kind, dtype and dimension.
void check_sets(const char* function, const char* a_name, const SetsArg& a, const char* b_name, const SetsArg& b);

}  // namespace pycm::bind
