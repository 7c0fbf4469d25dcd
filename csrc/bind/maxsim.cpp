#include "ops/maxsim.h"

#include "bind/ops.h"
#include "bind/sets_arg.h"

namespace pycm::bind {
namespace {

struct HostMaxSim : MaxSimCall {
  template <class... Rest>
  explicit HostMaxSim(int num_threads, Rest... rest) : MaxSimCall(rest...) {
    args.num_threads = threads(num_threads);
  }
  Element element() const { return args.queries.dtype == DType::kFloat64 ? Element::kFloat64 : Element::kFloat32; }
};

nb::object maxsim(nb::handle q, nb::handle q_lengths, nb::handle q_offsets, nb::handle g, nb::handle g_lengths,
                  nb::handle g_offsets, nb::handle metric, nb::handle reduce, nb::handle direction, int num_threads) {
  HostMaxSim call(num_threads, "maxsim", q, q_lengths, q_offsets, g, g_lengths, g_offsets, metric, reduce, direction);
  const int64_t shape[] = {call.args.queries.items, call.args.gallery.items};
  NewArray scores = new_array(call.queries.framework(), call.element(), 2, shape);
  call.args.scores = scores.data;
  {
    nb::gil_scoped_release release;
    cpu::maxsim(call.args);
  }
  return scores.object;
}

nb::tuple maxsim_backward(nb::handle grad_object, nb::handle q, nb::handle q_lengths, nb::handle q_offsets,
                          nb::handle g, nb::handle g_lengths, nb::handle g_offsets, nb::handle metric,
                          nb::handle reduce, nb::handle direction, bool needs_queries, bool needs_gallery,
                          int num_threads) {
  constexpr const char* kName = "maxsim_backward";
  const HostMaxSim call(num_threads, kName, q, q_lengths, q_offsets, g, g_lengths, g_offsets, metric, reduce,
                        direction);
  const ArrayArg grad(kName, "grad", grad_object);
  const MaxSimArgs& forward = call.args;
  const int64_t shape[] = {forward.queries.items, forward.gallery.items};
  grad.check_output(call.queries.values(), forward.queries.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32,
                    2, shape, {});
  const auto like = [&](const SetsArg& sets, bool needed) {
    if (!needed) return NewArray{nb::none(), nullptr};
    return new_array(sets.framework(), call.element(), sets.array().ndim, sets.array().shape);
  };
  NewArray grad_queries = like(call.queries, needs_queries);
  NewArray grad_gallery = like(call.gallery, needs_gallery);
  {
    nb::gil_scoped_release release;
    cpu::maxsim_backward({forward, grad.array().data, grad_queries.data, grad_gallery.data});
  }
  return nb::make_tuple(std::move(grad_queries.object), std::move(grad_gallery.object));
}

nb::tuple maxsim_topk(nb::handle q, nb::handle q_lengths, nb::handle q_offsets, nb::handle g, nb::handle g_lengths,
                      nb::handle g_offsets, int64_t k, nb::handle metric, nb::handle reduce, nb::handle direction,
                      nb::handle precision, int num_threads) {
  constexpr const char* kName = "maxsim_topk";
  const HostMaxSim call(num_threads, kName, q, q_lengths, q_offsets, g, g_lengths, g_offsets, metric, reduce,
                        direction);
  MaxSimTopKArgs args = maxsim_topk_args(call, k, precision);
  const int64_t shape[] = {args.forward.queries.items, k};
  NewArray scores = new_array(call.queries.framework(), call.element(), 2, shape);
  NewArray indices = new_array(call.queries.framework(), Element::kInt64, 2, shape);
  args.scores = scores.data;
  args.indices = static_cast<int64_t*>(indices.data);
  {
    nb::gil_scoped_release release;
    cpu::maxsim_topk(args);
  }
  return nb::make_tuple(std::move(scores.object), std::move(indices.object));
}

}  // namespace

#define PYCM_SETS                                                                                    \
  "queries: typing.Any, query_lengths: typing.Any, query_offsets: typing.Any, gallery: typing.Any, " \
  "gallery_lengths: typing.Any, gallery_offsets: typing.Any, "
#define PYCM_SETS_ARGS                                                                                      \
  nb::arg("queries"), nb::arg("query_lengths").none(), nb::arg("query_offsets").none(), nb::arg("gallery"), \
      nb::arg("gallery_lengths").none(), nb::arg("gallery_offsets").none()
#define PYCM_WAY "metric: str, reduce: str, direction: str, "
#define PYCM_WAY_ARGS nb::arg("metric").none(), nb::arg("reduce").none(), nb::arg("direction").none()

void bind_maxsim(nb::module_& module) {
  module.def("maxsim", &maxsim, nb::sig("def maxsim(" PYCM_SETS PYCM_WAY "num_threads: int = 0) -> typing.Any"),
             PYCM_SETS_ARGS, PYCM_WAY_ARGS, nb::arg("num_threads") = 0);
  module.def(
      "maxsim_backward", &maxsim_backward,
      nb::sig("def maxsim_backward(grad: typing.Any, " PYCM_SETS PYCM_WAY
              "needs_queries: bool, needs_gallery: bool, num_threads: int = 0) -> tuple[typing.Any, typing.Any]"),
      nb::arg("grad"), PYCM_SETS_ARGS, PYCM_WAY_ARGS, nb::arg("needs_queries"), nb::arg("needs_gallery"),
      nb::arg("num_threads") = 0);
  module.def("maxsim_topk", &maxsim_topk,
             nb::sig("def maxsim_topk(" PYCM_SETS "k: int, " PYCM_WAY
                     "precision: str, num_threads: int = 0) -> tuple[typing.Any, typing.Any]"),
             PYCM_SETS_ARGS, nb::arg("k"), PYCM_WAY_ARGS, nb::arg("precision").none(), nb::arg("num_threads") = 0);
}

}  // namespace pycm::bind
