#include "ops/join.h"

#include <cmath>

#include "bind/ops.h"
#include "bind/search_args.h"

namespace pycm::bind {
namespace {

constexpr const char* kName = "join";

}  // namespace

nb::tuple join(const ArrayArg& queries, const GalleryArg& gallery, double threshold, Metric metric, ScreenChoice screen,
               int64_t after, int64_t limit, int num_threads) {
  JoinArgs args;
  args.queries = rows_of(queries.array());
  args.gallery = gallery.rows;
  args.metric = metric;
  args.screen = screen;
  args.threshold = threshold;
  args.after = after;
  args.limit = limit;
  args.num_threads = threads(num_threads);
  check(!std::isnan(threshold), kName, ": threshold must be a number, got nan");
  const bool distance = visit(metric, [](auto m) { return decltype(m)::kDistance; });
  check(!distance || threshold >= 0, kName, ": threshold must be a distance of at least 0, got ", threshold);
  check(after >= -1, kName, ": after must be at least -1, got ", after);
  check(limit >= 0, kName, ": limit must be at least 0, got ", limit);
  std::vector<JoinedPair> pairs;
  {
    nb::gil_scoped_release release;
    pairs = cpu::join(args, gallery.encoded);
  }
  const bool wide = args.queries.dtype == DType::kFloat64;
  const int64_t shape[] = {static_cast<int64_t>(pairs.size())};
  NewArray rows = new_array(queries.framework(), Element::kInt64, 1, shape);
  NewArray indices = new_array(queries.framework(), Element::kInt64, 1, shape);
  NewArray scores = new_array(queries.framework(), wide ? Element::kFloat64 : Element::kFloat32, 1, shape);
  for (int64_t p = 0; p < shape[0]; ++p) {
    static_cast<int64_t*>(rows.data)[p] = pairs[p].query;
    static_cast<int64_t*>(indices.data)[p] = pairs[p].index;
    if (wide) static_cast<double*>(scores.data)[p] = pairs[p].score;
    else static_cast<float*>(scores.data)[p] = static_cast<float>(pairs[p].score);
  }
  return nb::make_tuple(std::move(rows.object), std::move(indices.object), std::move(scores.object));
}

void bind_join(nb::module_& module) {
  module.def(
      "join",
      [](nb::handle queries_object, nb::handle gallery_object, double threshold, nb::handle metric, int64_t after,
         int64_t limit, nb::handle screen, int num_threads) {
        const ArrayArg queries(kName, "queries", queries_object), gallery(kName, "gallery", gallery_object);
        check_pair(kName, queries, gallery);
        return join(queries, {rows_of(gallery.array())}, threshold,
                    parse_metric(kName, string_arg(kName, "metric", metric)),
                    parse_screen(kName, string_arg(kName, "screen", screen)), after, limit, num_threads);
      },
      nb::sig("def join(queries: typing.Any, gallery: typing.Any, threshold: float, metric: str, after: int, "
              "limit: int, screen: str = 'auto', num_threads: int = 0) -> "
              "tuple[typing.Any, typing.Any, typing.Any]"),
      nb::arg("queries"), nb::arg("gallery"), nb::arg("threshold"), nb::arg("metric").none(), nb::arg("after"),
      nb::arg("limit"), nb::arg("screen").none() = "auto", nb::arg("num_threads") = 0);
}

}  // namespace pycm::bind
