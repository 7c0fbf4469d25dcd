#include "ops/xattn.h"

#include "bind/ops.h"
#include "bind/sets_arg.h"

namespace pycm::bind {
namespace {

constexpr const char* kName = "xattn_score";
constexpr const char* kFeatureNorms[] = {"softmax",        "l2norm",  "clipped_l2norm", "l1norm",
                                         "clipped_l1norm", "no_norm", "clipped"};
constexpr const char* kAggregations[] = {"LogSumExp", "Max", "Sum", "Mean"};

// The place of a name among those of an enumeration.
template <size_t kCount>
int parse(const char* argument, const char* const (&names)[kCount], nb::handle object) {
  const std::string name = string_arg(kName, argument, object);
  std::string list;
  for (size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) return static_cast<int>(i);
    list += (i == 0 ? "" : ", ") + std::string(names[i]);
  }
  throw ValueError(text(kName, ": ", argument, " must be one of ", list, ", got '", name, "'"));
}

nb::object xattn_score(nb::handle i, nb::handle i_lengths, nb::handle i_offsets, nb::handle c, nb::handle c_lengths,
                       nb::handle c_offsets, nb::handle direction, nb::handle feature_norm, nb::handle aggregation,
                       double lambda_softmax, double lambda_lse, double eps, int num_threads) {
  const SetsArg images(kName, "images", "image", i, i_lengths, i_offsets);
  const SetsArg captions(kName, "captions", "caption", c, c_lengths, c_offsets);
  check_sets(kName, "images", images, "captions", captions);
  XAttnArgs args;
  args.images = images.sets;
  args.captions = captions.sets;
  args.direction = parse_direction(kName, string_arg(kName, "direction", direction));
  check(args.direction != Direction::kBoth, kName, ": direction must be t2i or i2t, got 'both'");
  args.feature_norm = static_cast<FeatureNorm>(parse("feature_norm", kFeatureNorms, feature_norm));
  args.aggregation = static_cast<Aggregation>(parse("aggregation", kAggregations, aggregation));
  args.lambda_softmax = lambda_softmax;
  args.lambda_lse = lambda_lse;
  args.eps = eps;
  check(eps >= 0, kName, ": eps must be at least 0, got ", eps);
  check(lambda_lse != 0, kName, ": lambda_lse must not be 0");
  args.num_threads = threads(num_threads);
  const int64_t shape[] = {args.images.items, args.captions.items};
  NewArray scores = new_array(images.framework(),
                              args.images.dtype == DType::kFloat64 ? Element::kFloat64 : Element::kFloat32, 2, shape);
  args.scores = scores.data;
  {
    nb::gil_scoped_release release;
    cpu::xattn_score(args);
  }
  return scores.object;
}

}  // namespace

void bind_xattn(nb::module_& module) {
  module.def("xattn_score", &xattn_score,
             nb::sig("def xattn_score(images: typing.Any, image_lengths: typing.Any, image_offsets: typing.Any, "
                     "captions: typing.Any, caption_lengths: typing.Any, caption_offsets: typing.Any, direction: str, "
                     "feature_norm: str, aggregation: str, lambda_softmax: float, lambda_lse: float, eps: float, "
                     "num_threads: int = 0) -> typing.Any"),
             nb::arg("images"), nb::arg("image_lengths").none(), nb::arg("image_offsets").none(), nb::arg("captions"),
             nb::arg("caption_lengths").none(), nb::arg("caption_offsets").none(), nb::arg("direction").none(),
             nb::arg("feature_norm").none(), nb::arg("aggregation").none(), nb::arg("lambda_softmax"),
             nb::arg("lambda_lse"), nb::arg("eps"), nb::arg("num_threads") = 0);
}

}  // namespace pycm::bind
