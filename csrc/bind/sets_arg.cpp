#include "bind/sets_arg.h"

namespace pycm::bind {

namespace {

// A contiguous vector of so many int64.
const int64_t* integers(const char* function, const std::string& name, const ArrayArg& vector, int64_t count) {
  const Array& a = vector.array();
  check(a.ndim == 1 && a.shape[0] == count, function, ": ", name, " must have shape [", count, "], got ",
        vector.shape());
  check(count < 2 || a.strides[0] == 1, function, ": ", name, " must be contiguous");
  return static_cast<const int64_t*>(a.data);
}

}  // namespace

SetsArg::SetsArg(const char* function, const char* name, const char* item, nb::handle values, nb::handle lengths,
                 nb::handle offsets)
    : values_(function, name, values) {
  const Array& a = values_.array();
  const bool ragged = !offsets.is_none();
  check(a.ndim == (ragged ? 2 : 3), function, ": ", name, " must have shape ",
        ragged ? "[total, D] where offsets are given" : "[items, T, D]", ", got ", values_.shape());
  check(a.shape[a.ndim - 1] > 0, function, ": ", name, " must have at least one feature, got shape ", values_.shape());
  check(!ragged || lengths.is_none(), function, ": ", name, " must have lengths or offsets, not both");
  sets.data = a.data;
  sets.dtype = a.dtype;
  sets.dim = a.shape[a.ndim - 1];
  sets.row_stride = a.strides[a.ndim - 2];
  sets.dim_stride = a.strides[a.ndim - 1];
  if (ragged) {
    sets.total = a.shape[0];
    label_ = text(item, "_offsets");
    borders_.emplace(function, label_.c_str(), offsets, Content::kInt64);
    check(borders_->array().ndim == 1 && borders_->size(0) > 0, function, ": ", label_,
          " must have shape [items + 1], got ", borders_->shape());
    sets.items = borders_->size(0) - 1;
    sets.offsets = integers(function, label_, *borders_, sets.items + 1);
    check(sets.offsets[0] == 0 && sets.offsets[sets.items] == sets.total, function, ": ", label_,
          " must run from 0 to ", sets.total, ", got ", sets.offsets[0], " to ", sets.offsets[sets.items]);
    for (int64_t i = 0; i < sets.items; ++i)
      check(sets.offsets[i] <= sets.offsets[i + 1], function, ": ", label_, " must not decrease, got ", sets.offsets[i],
            " before ", sets.offsets[i + 1]);
    return;
  }
  sets.items = a.shape[0];
  sets.max_length = a.shape[1];
  sets.item_stride = a.strides[0];
  sets.total = sets.items * sets.max_length;
  if (lengths.is_none()) return;
  label_ = text(item, "_lengths");
  borders_.emplace(function, label_.c_str(), lengths, Content::kInt64);
  sets.lengths = integers(function, label_, *borders_, sets.items);
  for (int64_t i = 0; i < sets.items; ++i)
    check(sets.lengths[i] >= 0 && sets.lengths[i] <= sets.max_length, function, ": ", label_, " must be in [0, ",
          sets.max_length, "], got ", sets.lengths[i]);
}

void check_sets(const char* function, const char* a_name, const SetsArg& a, const char* b_name, const SetsArg& b) {
  if (a.framework() != b.framework())
    throw TypeError(text(function, ": ", a_name, " and ", b_name, " must both be torch or both NumPy arrays"));
  if (a.sets.dtype != b.sets.dtype)
    throw TypeError(text(function, ": ", b_name, " must have the ", a_name, "' dtype ", name_of(a.sets.dtype), ", got ",
                         name_of(b.sets.dtype)));
  check(a.sets.dim == b.sets.dim, function, ": ", b_name, " must have the ", a_name, "' ", a.sets.dim,
        " features, got shape ", b.shape());
}

}  // namespace pycm::bind
