#include "ops/xattn.h"

#include "bind/ops.h"
#include "bind/sets_arg.h"

namespace pycm::bind {
namespace {

nb::object xattn_score(nb::handle i, nb::handle i_lengths, nb::handle i_offsets, nb::handle c, nb::handle c_lengths,
                       nb::handle c_offsets, nb::handle direction, nb::handle feature_norm, nb::handle aggregation,
                       double lambda_softmax, double lambda_lse, double eps, int num_threads) {
  XAttnCall call(i, i_lengths, i_offsets, c, c_lengths, c_offsets, direction, feature_norm, aggregation, lambda_softmax,
                 lambda_lse, eps);
  XAttnArgs& args = call.args;
  args.num_threads = threads(num_threads);
  const int64_t shape[] = {args.images.items, args.captions.items};
  NewArray scores = new_array(call.images.framework(),
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
