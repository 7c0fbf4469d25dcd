#include "ops/topk.h"

#include "bind/ops.h"
#include "bind/search_args.h"

namespace pycm::bind {
namespace {

constexpr const char* kName = "topk";

}  // namespace

nb::tuple topk(const ArrayArg& queries, const GalleryArg& gallery, nb::handle k, Metric metric, nb::handle precision,
               ScreenChoice screen, nb::handle mask, nb::handle exclude, nb::handle offsets, int num_threads) {
  const Rows rows = rows_of(queries.array());
  const FilterArgs filter(kName, mask, exclude, offsets, rows.rows, gallery.rows.rows);
  TopKArgs args = topk_args(rows, gallery.rows, k, metric, precision, screen, filter);
  args.num_threads = threads(num_threads);
  const int64_t shape[] = {rows.rows, args.k};
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
