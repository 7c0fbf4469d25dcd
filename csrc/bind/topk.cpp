#include "ops/topk.h"

#include "bind/ops.h"
#include "bind/search_args.h"

namespace pycm::bind {
namespace {

constexpr const char* kName = "topk";

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

}  // namespace

nb::tuple topk(const ArrayArg& queries, const GalleryArg& gallery, nb::handle k_object, Metric metric,
               nb::handle precision, ScreenChoice screen, nb::handle mask, nb::handle exclude, nb::handle offsets,
               int num_threads) {
  TopKArgs args;
  args.queries = rows_of(queries.array());
  args.gallery = gallery.rows;
  args.metric = metric;
  args.screen = screen;
  args.num_threads = threads(num_threads);
  const int64_t k = args.k = integer_k(k_object, args.gallery.rows);
  const std::string mode = string_arg(kName, "precision", precision);
  check(mode == "exact" || mode == "fast", kName, ": precision must be exact or fast, got '", mode, "'");
  args.precision = mode == "exact" ? Precision::kExact : Precision::kFast;
  const FilterArgs filter(kName, mask, exclude, offsets, args.queries.rows, args.gallery.rows);
  args.mask = filter.mask;
  args.exclude = filter.exclude;
  args.exclude_offsets = filter.exclude_offsets;
  const int64_t shape[] = {args.queries.rows, k};
  NewArray scores = new_array(queries.framework(),
                              args.queries.dtype == DType::kFloat64 ? Element::kFloat64 : Element::kFloat32, 2, shape);
  NewArray indices = new_array(queries.framework(), Element::kInt64, 2, shape);
  args.scores = scores.data;
  args.indices = static_cast<int64_t*>(indices.data);
  {
    nb::gil_scoped_release release;
    cpu::topk(args, gallery.encoded);
  }
  return nb::make_tuple(std::move(scores.object), std::move(indices.object));
}

void bind_topk(nb::module_& module) {
  module.def(
      "topk",
      [](nb::handle queries_object, nb::handle gallery_object, nb::handle k, nb::handle metric, nb::handle precision,
         nb::handle mask, nb::handle exclude, nb::handle offsets, nb::handle screen, int num_threads) {
        const ArrayArg queries(kName, "queries", queries_object), gallery(kName, "gallery", gallery_object);
        check_pair(kName, queries, gallery);
        return topk(queries, {rows_of(gallery.array())}, k, parse_metric(kName, string_arg(kName, "metric", metric)),
                    precision, parse_screen(kName, string_arg(kName, "screen", screen)), mask, exclude, offsets,
                    num_threads);
      },
      nb::sig("def topk(queries: typing.Any, gallery: typing.Any, k: typing.SupportsIndex, metric: str, "
              "precision: str, mask: typing.Any, exclude: typing.Any, exclude_offsets: typing.Any, "
              "screen: str = 'auto', num_threads: int = 0) -> tuple[typing.Any, typing.Any]"),
      nb::arg("queries"), nb::arg("gallery"), nb::arg("k").none(), nb::arg("metric").none(),
      nb::arg("precision").none(), nb::arg("mask").none(), nb::arg("exclude").none(), nb::arg("exclude_offsets").none(),
      nb::arg("screen").none() = "auto", nb::arg("num_threads") = 0);
  module.def(
      "topk_workspace_bytes",
      [](int64_t queries, int64_t gallery, int64_t dim, int64_t k, int num_threads) {
        return cpu::topk_workspace_bytes(queries, gallery, dim, k, threads(num_threads));
      },
      nb::arg("queries"), nb::arg("gallery"), nb::arg("dim"), nb::arg("k"), nb::arg("num_threads") = 0);
}

}  // namespace pycm::bind
