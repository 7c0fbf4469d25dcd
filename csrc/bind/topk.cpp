#include "ops/topk.h"

#include <optional>

#include "bind/array_arg.h"
#include "bind/ops.h"

namespace pycm::bind {
namespace {

constexpr const char* kName = "topk";

// exclude as compressed rows: exclude[offsets[i] ... offsets[i + 1]).
void set_exclude(TopKArgs& args, const ArrayArg& exclude, const ArrayArg& offsets) {
  const Array &values = exclude.array(), &starts = offsets.array();
  check(values.ndim == 1 && (values.shape[0] < 2 || values.strides[0] == 1), kName,
        ": exclude must be a contiguous vector, got shape ", exclude.shape());
  check(starts.ndim == 1 && starts.shape[0] == args.queries.rows + 1 && (starts.shape[0] < 2 || starts.strides[0] == 1),
        kName, ": exclude must have offsets of shape [", args.queries.rows + 1, "], got ", offsets.shape());
  args.exclude = static_cast<const int64_t*>(values.data);
  args.exclude_offsets = static_cast<const int64_t*>(starts.data);
  check(args.exclude_offsets[0] == 0 && args.exclude_offsets[args.queries.rows] == values.shape[0], kName,
        ": exclude offsets must run from 0 to ", values.shape[0]);
  for (int64_t i = 0; i < args.queries.rows; ++i)
    check(args.exclude_offsets[i] <= args.exclude_offsets[i + 1], kName, ": exclude offsets must not decrease, row ",
          i);
  for (int64_t i = 0; i < values.shape[0]; ++i)
    check(args.exclude[i] >= -1 && args.exclude[i] < args.gallery.rows, kName, ": exclude must be in [0, ",
          args.gallery.rows, ") or -1 for none, got ", args.exclude[i]);
  // An empty list still has to be told from no list.
  static const int64_t none = 0;
  if (values.shape[0] == 0) args.exclude = &none;
}

// k as any Python integer; what no int64 holds is out of range whatever the gallery.
int64_t integer_k(nb::handle object, int64_t limit) {
  nb::object index = PyLong_Check(object.ptr()) ? nb::borrow(object) : nb::steal(PyNumber_Index(object.ptr()));
  if (!index.is_valid()) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw nb::python_error();
    PyErr_Clear();
    throw TypeError(text(kName, ": k must be an integer, got ", class_name(object)));
  }
  int overflow = 0;
  const int64_t k = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  check(overflow == 0 && k >= 1 && k <= limit, kName, ": k must be in [1, ", limit, "], got ", nb::str(index).c_str());
  return k;
}

nb::tuple topk(nb::handle queries_object, nb::handle gallery_object, nb::handle k_object, nb::handle metric,
               nb::handle precision, nb::handle mask_object, nb::handle exclude_object, nb::handle offsets_object,
               int num_threads) {
  const ArrayArg queries(kName, "queries", queries_object), gallery(kName, "gallery", gallery_object);
  const Array &q = queries.array(), &g = gallery.array();
  check(q.ndim == 2, kName, ": queries must have shape [N, D], got ", queries.shape());
  check(g.ndim == 2, kName, ": gallery must have shape [M, D], got ", gallery.shape());
  if (queries.framework() != gallery.framework())
    throw TypeError(text(kName, ": queries and gallery must both be torch or both NumPy arrays"));
  if (q.dtype != g.dtype)
    throw TypeError(
        text(kName, ": gallery must have the queries' dtype ", name_of(q.dtype), ", got ", name_of(g.dtype)));
  TopKArgs args;
  args.queries = rows_of(q);
  args.gallery = rows_of(g);
  args.metric = parse_metric(kName, string_arg(kName, "metric", metric));
  args.num_threads = threads(num_threads);
  check(args.queries.dim == args.gallery.dim, kName, ": gallery must have the queries' ", args.queries.dim,
        " features, got shape ", gallery.shape());
  check(args.queries.dim > 0, kName, ": queries must have at least one feature, got shape ", queries.shape());
  check(args.gallery.rows > 0, kName, ": gallery must have at least one row, got shape ", gallery.shape());
  const int64_t k = args.k = integer_k(k_object, args.gallery.rows);
  const std::string mode = string_arg(kName, "precision", precision);
  check(mode == "exact" || mode == "fast", kName, ": precision must be exact or fast, got '", mode, "'");
  args.precision = mode == "exact" ? Precision::kExact : Precision::kFast;

  std::optional<ArrayArg> mask, exclude, offsets;
  if (!mask_object.is_none()) {
    mask.emplace(kName, "mask", mask_object, Content::kBool);
    const Array& m = mask->array();
    const int64_t n = args.queries.rows, rows = args.gallery.rows;
    check((m.ndim == 1 && m.shape[0] == rows) || (m.ndim == 2 && m.shape[0] == n && m.shape[1] == rows), kName,
          ": mask must have shape [", rows, "] or [", n, ", ", rows, "], got ", mask->shape());
    args.mask.data = static_cast<const uint8_t*>(m.data);
    args.mask.row_stride = m.ndim == 2 ? m.strides[0] : 0;
    args.mask.column_stride = m.strides[m.ndim - 1];
  }
  if (!exclude_object.is_none()) {
    exclude.emplace(kName, "exclude", exclude_object, Content::kInt64);
    offsets.emplace(kName, "exclude offsets", offsets_object, Content::kInt64);
    set_exclude(args, *exclude, *offsets);
  }
  const int64_t shape[] = {args.queries.rows, k};
  NewArray scores =
      new_array(queries.framework(), q.dtype == DType::kFloat64 ? Element::kFloat64 : Element::kFloat32, 2, shape);
  NewArray indices = new_array(queries.framework(), Element::kInt64, 2, shape);
  args.scores = scores.data;
  args.indices = static_cast<int64_t*>(indices.data);
  {
    nb::gil_scoped_release release;
    cpu::topk(args);
  }
  return nb::make_tuple(std::move(scores.object), std::move(indices.object));
}

}  // namespace

void bind_topk(nb::module_& module) {
  module.def("topk", &topk,
             nb::sig("def topk(queries: typing.Any, gallery: typing.Any, k: typing.SupportsIndex, metric: str, "
                     "precision: str, mask: typing.Any, exclude: typing.Any, exclude_offsets: typing.Any, "
                     "num_threads: int = 0) -> tuple[typing.Any, typing.Any]"),
             nb::arg("queries"), nb::arg("gallery"), nb::arg("k").none(), nb::arg("metric").none(),
             nb::arg("precision").none(), nb::arg("mask").none(), nb::arg("exclude").none(),
             nb::arg("exclude_offsets").none(), nb::arg("num_threads") = 0);
  module.def(
      "topk_workspace_bytes",
      [](int64_t queries, int64_t gallery, int64_t dim, int64_t k, int num_threads) {
        return cpu::topk_workspace_bytes(queries, gallery, dim, k, threads(num_threads));
      },
      nb::arg("queries"), nb::arg("gallery"), nb::arg("dim"), nb::arg("k"), nb::arg("num_threads") = 0);
}

}  // namespace pycm::bind
