#include "ops/rank.h"

#include "bind/ops.h"
#include "bind/search_args.h"

namespace pycm::bind {
namespace {

constexpr const char* kName = "rank";

}  // namespace

nb::tuple rank(const ArrayArg& queries, const GalleryArg& gallery, nb::handle positives_object,
               nb::handle positive_offsets_object, Metric metric, ScreenChoice screen, nb::handle mask,
               nb::handle exclude, nb::handle offsets, int num_threads) {
  const Rows rows = rows_of(queries.array());
  const ArrayArg positives(kName, "positives", positives_object, Content::kInt64);
  const ArrayArg positive_offsets(kName, "positives' offsets", positive_offsets_object, Content::kInt64);
  check_compressed(kName, "positives", positives, positive_offsets, rows.rows, 0, gallery.rows.rows);
  const FilterArgs filter(kName, mask, exclude, offsets, rows.rows, gallery.rows.rows);
  RankArgs args = rank_args(rows, gallery.rows, positives, positive_offsets, metric, screen, filter);
  args.num_threads = threads(num_threads);
  const int64_t shape[] = {positives.size(0)};
  NewArray greater = new_array(queries.framework(), Element::kInt64, 1, shape);
  NewArray equal = new_array(queries.framework(), Element::kInt64, 1, shape);
  NewArray scores = new_array(queries.framework(),
                              args.queries.dtype == DType::kFloat64 ? Element::kFloat64 : Element::kFloat32, 1, shape);
  args.greater = static_cast<int64_t*>(greater.data);
  args.equal = static_cast<int64_t*>(equal.data);
  args.scores = scores.data;
  {
    nb::gil_scoped_release release;
    cpu::rank(args, gallery.encoded);
  }
  return nb::make_tuple(std::move(greater.object), std::move(equal.object), std::move(scores.object));
}

void bind_rank(nb::module_& module) {
  module.def(
      "rank",
      [](nb::handle queries_object, nb::handle gallery_object, nb::handle positives, nb::handle positive_offsets,
         nb::handle metric, nb::handle mask, nb::handle exclude, nb::handle offsets, nb::handle screen,
         int num_threads) {
        const ArrayArg queries(kName, "queries", queries_object), gallery(kName, "gallery", gallery_object);
        check_pair(kName, queries, gallery);
        return rank(queries, {rows_of(gallery.array())}, positives, positive_offsets,
                    parse_metric(kName, string_arg(kName, "metric", metric)),
                    parse_screen(kName, string_arg(kName, "screen", screen)), mask, exclude, offsets, num_threads);
      },
      nb::sig("def rank(queries: typing.Any, gallery: typing.Any, positives: typing.Any, offsets: typing.Any, "
              "metric: str, mask: typing.Any, exclude: typing.Any, exclude_offsets: typing.Any, "
              "screen: str = 'auto', num_threads: int = 0) -> tuple[typing.Any, typing.Any, typing.Any]"),
      nb::arg("queries"), nb::arg("gallery"), nb::arg("positives"), nb::arg("offsets"), nb::arg("metric").none(),
      nb::arg("mask").none(), nb::arg("exclude").none(), nb::arg("exclude_offsets").none(),
      nb::arg("screen").none() = "auto", nb::arg("num_threads") = 0);
}

}  // namespace pycm::bind
