#include "ops/contrastive.h"

#include <optional>

#include "bind/ops.h"
#include "bind/search_args.h"

namespace pycm::bind {
namespace {

ContrastiveLoss parse_loss(const char* function, const char* name) {
  constexpr std::pair<const char*, ContrastiveLoss> kLosses[] = {
      {"max_hinge", ContrastiveLoss::kMaxHinge}, {"sum_hinge", ContrastiveLoss::kSumHinge},
      {"semi_hard", ContrastiveLoss::kSemiHard}, {"info_nce", ContrastiveLoss::kInfoNCE},
      {"sigmoid", ContrastiveLoss::kSigmoid},    {"listed", ContrastiveLoss::kListed}};
  for (const auto& [known, loss] : kLosses)
    if (std::string(known) == name) return loss;
  throw ValueError(
      text(function, ": loss must be max_hinge, sum_hinge, semi_hard, info_nce, sigmoid or listed, got '", name, "'"));
}

// The data of contiguous int64 of a shape, -1 for any size; null for None.
const int64_t* integers(const char* function, const char* name, const std::optional<ArrayArg>& arg,
                        const std::vector<int64_t>& shape, const std::string& shape_text) {
  if (!arg) return nullptr;
  const Array& array = arg->array();
  bool fits = array.ndim == static_cast<int>(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = shape[d] < 0 || array.shape[d] == shape[d];
  check(fits, function, ": ", name, " must have shape ", shape_text, ", got ", arg->shape());
  bool dense = true;
  int64_t stride = 1;
  for (int d = array.ndim - 1; d >= 0; stride *= array.shape[d--])
    dense &= array.shape[d] <= 1 || array.strides[d] == stride;
  dense |= stride == 0;  // of nothing, strides may be any
  check(dense, function, ": ", name, " must be contiguous");
  return static_cast<const int64_t*>(array.data);
}

nb::tuple contrastive(nb::handle function_object, nb::handle queries_object, nb::handle gallery_object, nb::handle loss,
                      nb::handle metric, double margin, double scale, double bias, nb::handle groups_object,
                      nb::handle ignored_object, nb::handle negatives_object, bool needs_queries, bool needs_gallery,
                      bool needs_scale, int num_threads) {
  const char* function = string_arg("contrastive", "function", function_object);
  const ArrayArg queries(function, "queries", queries_object), gallery(function, "gallery", gallery_object);
  check_pair(function, queries, gallery);
  ContrastiveArgs args;
  args.queries = rows_of(queries.array());
  args.gallery = rows_of(gallery.array());
  args.loss = parse_loss(function, string_arg(function, "loss", loss));
  args.metric = parse_metric(function, string_arg(function, "metric", metric));
  args.margin = margin;
  args.scale = scale;
  args.bias = bias;
  args.needs_scale = needs_scale;
  args.num_threads = threads(num_threads);
  const int64_t n = args.queries.rows, m = args.gallery.rows;
  const bool listed = args.loss == ContrastiveLoss::kListed;
  check(args.metric == Metric::kDot || args.metric == Metric::kCosine || args.metric == Metric::kPearson, function,
        ": metric must be dot, cosine or pearson, got '", name_of(args.metric), "'");
  check(n >= 1, function, ": queries must have at least one row, got shape ", queries.shape());
  check(listed ? m >= n : m == n, function, ": gallery must have ", listed ? "at least " : "", "the queries' ", n,
        " rows, got shape ", gallery.shape());
  check(!(scale <= 0) && !(scale > 1e30) && !(scale < 1e-30), function,
        ": temperature must be positive, in [1e-30, 1e30], got ", 1 / scale);
  std::optional<ArrayArg> groups, ignored, negatives;
  if (!groups_object.is_none()) groups.emplace(function, "groups", groups_object, Content::kInt64);
  if (!ignored_object.is_none()) ignored.emplace(function, "ignored", ignored_object, Content::kInt64);
  if (!negatives_object.is_none()) negatives.emplace(function, "negatives", negatives_object, Content::kInt64);
  check(listed == negatives.has_value(), function, ": negatives must be given for listed ones alone");
  check(!groups || !ignored, function, ": groups and ignored do not go together");
  args.groups = integers(function, "groups", groups, {n}, text("[", n, "]"));
  args.ignored = integers(function, "ignored", ignored, {-1, 2}, "[E, 2]");
  args.negatives = integers(function, "negatives", negatives, {n, -1}, text("[", n, ", K]"));
  if (ignored) {
    check(!listed, function, ": ignored must be None where negatives are given");
    args.ignored_count = ignored->size(0);
    for (int64_t p = 0; p < args.ignored_count; ++p) {
      const int64_t i = args.ignored[2 * p], j = args.ignored[2 * p + 1];
      check(i >= 0 && i < n && j >= 0 && j < n && i != j, function,
            ": ignored must hold pairs of different rows in [0, ", n, "), got (", i, ", ", j, ")");
    }
  }
  if (listed) {
    args.negative_count = negatives->size(1);
    for (int64_t p = 0; p < n * args.negative_count; ++p)
      check(args.negatives[p] >= -1 && args.negatives[p] < m, function, ": negatives must be in [0, ", m,
            ") or -1 for none, got ", args.negatives[p]);
  }
  const Element element = args.queries.dtype == DType::kFloat64 ? Element::kFloat64 : Element::kFloat32;
  const auto gradient = [&](const ArrayArg& of, bool needed) {
    return needed ? new_array(of.framework(), element, 2, of.array().shape) : NewArray{nb::none(), nullptr};
  };
  NewArray grad_queries = gradient(queries, needs_queries), grad_gallery = gradient(gallery, needs_gallery);
  args.grad_queries = grad_queries.data;
  args.grad_gallery = grad_gallery.data;
  ContrastiveResult result;
  {
    nb::gil_scoped_release release;
    result = cpu::contrastive(args);
  }
  return nb::make_tuple(result.loss, std::move(grad_queries.object), std::move(grad_gallery.object), result.grad_scale,
                        result.grad_bias);
}

}  // namespace

void bind_contrastive(nb::module_& module) {
  module.def(
      "contrastive", &contrastive,
      nb::sig(
          "def contrastive(function: str, queries: typing.Any, gallery: typing.Any, loss: str, metric: str, "
          "margin: float, scale: float, bias: float, groups: typing.Any, ignored: typing.Any, "
          "negatives: typing.Any, needs_queries: bool, needs_gallery: bool, needs_scale: bool, num_threads: int = 0) "
          "-> tuple[float, typing.Any, typing.Any, float, float]"),
      nb::arg("function"), nb::arg("queries"), nb::arg("gallery"), nb::arg("loss"), nb::arg("metric"),
      nb::arg("margin"), nb::arg("scale"), nb::arg("bias"), nb::arg("groups").none(), nb::arg("ignored").none(),
      nb::arg("negatives").none(), nb::arg("needs_queries"), nb::arg("needs_gallery"), nb::arg("needs_scale"),
      nb::arg("num_threads") = 0);
}

}  // namespace pycm::bind
