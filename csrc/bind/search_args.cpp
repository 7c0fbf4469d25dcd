#include "bind/search_args.h"

#include <algorithm>

namespace pycm::bind {

void check_compressed(const char* function, const char* name, const ArrayArg& values, const ArrayArg& offsets,
                      int64_t rows, int64_t lowest, int64_t limit, Memory memory) {
  const Array &v = values.array(), &starts = offsets.array();
  check(v.ndim == 1 && (v.shape[0] < 2 || v.strides[0] == 1), function, ": ", name,
        " must be a contiguous vector, got shape ", values.shape());
  check(starts.ndim == 1 && starts.shape[0] == rows + 1 && (starts.shape[0] < 2 || starts.strides[0] == 1), function,
        ": ", name, " must have offsets of shape [", rows + 1, "], got ", offsets.shape());
  if (memory == Memory::kDevice) return;
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
                       nb::handle offsets_object, int64_t queries, int64_t gallery, Memory memory) {
  if (!mask_object.is_none()) {
    mask_arg_.emplace(function, "mask", mask_object, Content::kBool, memory);
    const Array& m = mask_arg_->array();
    check((m.ndim == 1 && m.shape[0] == gallery) || (m.ndim == 2 && m.shape[0] == queries && m.shape[1] == gallery),
          function, ": mask must have shape [", gallery, "] or [", queries, ", ", gallery, "], got ",
          mask_arg_->shape());
    mask.data = static_cast<const uint8_t*>(m.data);
    mask.row_stride = m.ndim == 2 ? m.strides[0] : 0;
    mask.column_stride = m.strides[m.ndim - 1];
  }
  if (!exclude_object.is_none()) {
    exclude_arg_.emplace(function, "exclude", exclude_object, Content::kInt64, memory);
    offsets_arg_.emplace(function, "exclude offsets", offsets_object, Content::kInt64, memory);
    check_compressed(function, "exclude", *exclude_arg_, *offsets_arg_, queries, -1, gallery, memory);
    exclude = static_cast<const int64_t*>(exclude_arg_->array().data);
    exclude_offsets = static_cast<const int64_t*>(offsets_arg_->array().data);
    // An empty list still has to be told from no list.
    static const int64_t none = 0;
    if (exclude_arg_->array().shape[0] == 0) exclude = &none;
  }
}

std::vector<const ArrayArg*> FilterArgs::arrays() const {
  std::vector<const ArrayArg*> result;
  for (const std::optional<ArrayArg>* arg : {&mask_arg_, &exclude_arg_, &offsets_arg_})
    if (*arg) result.push_back(&**arg);
  return result;
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

namespace {

// k as any Python integer; what no int64 holds is out of range whatever the gallery.
int64_t integer_k(nb::handle object, int64_t limit) {
  nb::object index = PyLong_Check(object.ptr()) ? nb::borrow(object) : nb::steal(PyNumber_Index(object.ptr()));
  if (!index.is_valid()) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw nb::python_error();
    PyErr_Clear();
    throw TypeError(text("topk: k must be an integer, got ", class_name(object)));
  }
  int overflow = 0;
  const int64_t k = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  check(overflow == 0 && k >= 1 && k <= limit, "topk: k must be in [1, ", limit, "], got ", nb::str(index).c_str());
  return k;
}

}  // namespace

TopKArgs topk_args(const Rows& queries, const Rows& gallery, nb::handle k, Metric metric, nb::handle precision,
                   ScreenChoice screen, const FilterArgs& filter) {
  TopKArgs args;
  args.queries = queries;
  args.gallery = gallery;
  args.k = integer_k(k, gallery.rows);
  args.metric = metric;
  args.screen = screen;
  const std::string mode = string_arg("topk", "precision", precision);
  check(mode == "exact" || mode == "fast", "topk: precision must be exact or fast, got '", mode, "'");
  args.precision = mode == "exact" ? Precision::kExact : Precision::kFast;
  args.mask = filter.mask;
  args.exclude = filter.exclude;
  args.exclude_offsets = filter.exclude_offsets;
  return args;
}

RankArgs rank_args(const Rows& queries, const Rows& gallery, const ArrayArg& positives, const ArrayArg& offsets,
                   Metric metric, ScreenChoice screen, const FilterArgs& filter) {
  RankArgs args;
  args.queries = queries;
  args.gallery = gallery;
  args.metric = metric;
  args.screen = screen;
  args.positives = static_cast<const int64_t*>(positives.array().data);
  args.offsets = static_cast<const int64_t*>(offsets.array().data);
  args.num_positives = positives.size(0);
  args.mask = filter.mask;
  args.exclude = filter.exclude;
  args.exclude_offsets = filter.exclude_offsets;
  return args;
}

SimilarityArgs similarity_args(const ArrayArg& x, const ArrayArg& y, Metric metric, int64_t* shape) {
  constexpr const char* kName = "similarity";
  const Array &a = x.array(), &b = y.array();
  check(a.ndim >= 2, kName, ": x must have shape [..., N, D], got ", x.shape());
  check(b.ndim >= 2, kName, ": y must have shape [..., M, D], got ", y.shape());
  if (x.framework() != y.framework()) throw TypeError(text(kName, ": x and y must both be torch or both NumPy arrays"));
  if (a.dtype != b.dtype)
    throw TypeError(text(kName, ": y must have x's dtype ", name_of(a.dtype), ", got ", name_of(b.dtype)));
  SimilarityArgs args;
  args.x = rows_of(a);
  args.y = rows_of(b);
  args.metric = metric;
  check(args.x.dim == args.y.dim, kName, ": y must have x's ", args.x.dim, " features, got shape ", y.shape());
  check(args.x.dim > 0, kName, ": x must have at least one feature, got shape ", x.shape());

  // Batch axes broadcast from the right.
  const int batch = std::max(a.ndim, b.ndim) - 2;
  check(batch <= kMaxDims - 2, kName, ": at most ", kMaxDims - 2, " batch axes, got ", batch);
  args.batch_ndim = batch;
  for (int d = 0; d < batch; ++d) {
    const int i = d - (batch - (a.ndim - 2)), j = d - (batch - (b.ndim - 2));
    const int64_t x_size = i < 0 ? 1 : a.shape[i], y_size = j < 0 ? 1 : b.shape[j];
    check(x_size == y_size || x_size == 1 || y_size == 1, kName, ": batch axes of x ", x.shape(), " and y ", y.shape(),
          " do not broadcast");
    shape[d] = args.batch_shape[d] = x_size == 1 ? y_size : x_size;
    args.x_batch_strides[d] = x_size == 1 ? 0 : a.strides[i];
    args.y_batch_strides[d] = y_size == 1 ? 0 : b.strides[j];
  }
  shape[batch] = args.x.rows;
  shape[batch + 1] = args.y.rows;
  return args;
}

}  // namespace pycm::bind
