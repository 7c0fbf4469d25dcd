#include "bind/search_args.h"

namespace pycm::bind {

void check_compressed(const char* function, const char* name, const ArrayArg& values, const ArrayArg& offsets,
                      int64_t rows, int64_t lowest, int64_t limit) {
  const Array &v = values.array(), &starts = offsets.array();
  check(v.ndim == 1 && (v.shape[0] < 2 || v.strides[0] == 1), function, ": ", name,
        " must be a contiguous vector, got shape ", values.shape());
  check(starts.ndim == 1 && starts.shape[0] == rows + 1 && (starts.shape[0] < 2 || starts.strides[0] == 1), function,
        ": ", name, " must have offsets of shape [", rows + 1, "], got ", offsets.shape());
  const int64_t* value = static_cast<const int64_t*>(v.data);
  const int64_t* start = static_cast<const int64_t*>(starts.data);
  check(start[0] == 0 && start[rows] == v.shape[0], function, ": ", name, " offsets must run from 0 to ", v.shape[0]);
  for (int64_t i = 0; i < rows; ++i)
    check(start[i] <= start[i + 1], function, ": ", name, " offsets must not decrease, row ", i);
  for (int64_t i = 0; i < v.shape[0]; ++i)
    check(value[i] >= lowest && value[i] < limit, function, ": ", name, " must be in [0, ", limit,
          lowest < 0 ? ") or -1 for none, got " : "), got ", value[i]);
}

FilterArgs::FilterArgs(const char* function, nb::handle mask_object, nb::handle exclude_object,
                       nb::handle offsets_object, int64_t queries, int64_t gallery) {
  if (!mask_object.is_none()) {
    mask_arg_.emplace(function, "mask", mask_object, Content::kBool);
    const Array& m = mask_arg_->array();
    check((m.ndim == 1 && m.shape[0] == gallery) || (m.ndim == 2 && m.shape[0] == queries && m.shape[1] == gallery),
          function, ": mask must have shape [", gallery, "] or [", queries, ", ", gallery, "], got ",
          mask_arg_->shape());
    mask.data = static_cast<const uint8_t*>(m.data);
    mask.row_stride = m.ndim == 2 ? m.strides[0] : 0;
    mask.column_stride = m.strides[m.ndim - 1];
  }
  if (!exclude_object.is_none()) {
    exclude_arg_.emplace(function, "exclude", exclude_object, Content::kInt64);
    offsets_arg_.emplace(function, "exclude offsets", offsets_object, Content::kInt64);
    check_compressed(function, "exclude", *exclude_arg_, *offsets_arg_, queries, -1, gallery);
    exclude = static_cast<const int64_t*>(exclude_arg_->array().data);
    exclude_offsets = static_cast<const int64_t*>(offsets_arg_->array().data);
    // An empty list still has to be told from no list.
    static const int64_t none = 0;
    if (exclude_arg_->array().shape[0] == 0) exclude = &none;
  }
}

void check_pair(const char* function, const ArrayArg& queries, const ArrayArg& gallery) {
  const Array &q = queries.array(), &g = gallery.array();
  check(q.ndim == 2, function, ": queries must have shape [N, D], got ", queries.shape());
  check(g.ndim == 2, function, ": gallery must have shape [M, D], got ", gallery.shape());
  if (queries.framework() != gallery.framework())
    throw TypeError(text(function, ": queries and gallery must both be torch or both NumPy arrays"));
  if (q.dtype != g.dtype)
    throw TypeError(
        text(function, ": gallery must have the queries' dtype ", name_of(q.dtype), ", got ", name_of(g.dtype)));
  check(q.shape[1] == g.shape[1], function, ": gallery must have the queries' ", q.shape[1], " features, got shape ",
        gallery.shape());
  check(q.shape[1] > 0, function, ": queries must have at least one feature, got shape ", queries.shape());
  check(g.shape[0] > 0, function, ": gallery must have at least one row, got shape ", gallery.shape());
}

}  // namespace pycm::bind
