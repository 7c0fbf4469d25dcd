// The CUDA operations on sets of vectors: maxsim, its backward and top-k, xattn_score.
#include "bind/device_call.h"
#include "bind/ops.h"
#include "bind/sets_arg.h"

namespace pycm::bind {
namespace {

Arrays arrays_of(const SetsArg& a, const SetsArg& b) {
  Arrays all = a.arrays(), more = b.arrays();
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

struct DeviceMaxSim : MaxSimCall {
  template <class... Rest>
  explicit DeviceMaxSim(const char* name, Rest... rest) : MaxSimCall(name, rest..., Memory::kDevice) {}
  DType score() const { return score_dtype(args.queries.dtype); }
  Arrays inputs() const { return arrays_of(queries, gallery); }
};

void check_scores(const char* function, const DeviceMaxSim& call, const ArrayArg& scores, int64_t columns) {
  const int64_t shape[] = {call.args.queries.items, columns};
  scores.check_output(call.queries.values(), call.score(), 2, shape, {&call.queries.values(), &call.gallery.values()});
}

void cuda_maxsim(nb::handle q, nb::handle q_lengths, nb::handle q_offsets, nb::handle g, nb::handle g_lengths,
                 nb::handle g_offsets, nb::handle metric, nb::handle reduce, nb::handle direction,
                 nb::handle scores_object, nb::handle workspace, uintptr_t stream) {
  constexpr const char* kName = "maxsim";
  DeviceMaxSim call(kName, q, q_lengths, q_offsets, g, g_lengths, g_offsets, metric, reduce, direction);
  const DeviceArg scores(kName, "scores", scores_object);
  check_scores(kName, call, scores, call.args.gallery.items);
  call.args.scores = scores.array().data;
  run(kName, &cuda::maxsim, call.args, cuda::maxsim_workspace_bytes(call.args), workspace, stream, call.inputs(),
      {&scores});
}

// Either gradient may be None.
void cuda_maxsim_backward(nb::handle grad_object, nb::handle q, nb::handle q_lengths, nb::handle q_offsets,
                          nb::handle g, nb::handle g_lengths, nb::handle g_offsets, nb::handle metric,
                          nb::handle reduce, nb::handle direction, nb::handle grad_queries_object,
                          nb::handle grad_gallery_object, nb::handle workspace, uintptr_t stream) {
  constexpr const char* kName = "maxsim_backward";
  DeviceMaxSim call(kName, q, q_lengths, q_offsets, g, g_lengths, g_offsets, metric, reduce, direction);
  const DeviceArg grad(kName, "grad", grad_object);
  check_scores(kName, call, grad, call.args.gallery.items);
  Arrays inputs = call.inputs(), results;
  inputs.push_back(&grad);
  std::optional<DeviceArg> grads[2];
  const auto result = [&](int side, const char* name, nb::handle object, const SetsArg& like) -> void* {
    if (object.is_none()) return nullptr;
    const DeviceArg& array = grads[side].emplace(kName, name, object);
    array.check_output(like.values(), call.score(), like.array().ndim, like.array().shape,
                       {&call.queries.values(), &call.gallery.values(), &grad});
    results.push_back(&array);
    return array.array().data;
  };
  MaxSimBackwardArgs args;
  args.forward = call.args;
  args.grad = grad.array().data;
  args.grad_queries = result(0, "grad_queries", grad_queries_object, call.queries);
  args.grad_gallery = result(1, "grad_gallery", grad_gallery_object, call.gallery);
  run(kName, &cuda::maxsim_backward, args, cuda::maxsim_backward_workspace_bytes(args), workspace, stream, inputs,
      results);
}

void cuda_maxsim_topk(nb::handle q, nb::handle q_lengths, nb::handle q_offsets, nb::handle g, nb::handle g_lengths,
                      nb::handle g_offsets, int64_t k, nb::handle metric, nb::handle reduce, nb::handle direction,
                      nb::handle precision, nb::handle scores_object, nb::handle indices_object, nb::handle workspace,
                      uintptr_t stream) {
  constexpr const char* kName = "maxsim_topk";
  const DeviceMaxSim call(kName, q, q_lengths, q_offsets, g, g_lengths, g_offsets, metric, reduce, direction);
  MaxSimTopKArgs args = maxsim_topk_args(call, k, precision);
  const DeviceArg scores(kName, "scores", scores_object);
  const DeviceArg indices(kName, "indices", indices_object, Content::kInt64);
  check_scores(kName, call, scores, k);
  const int64_t shape[] = {call.args.queries.items, k};
  indices.check_output(call.queries.values(), DType::kFloat32, 2, shape,
                       {&call.queries.values(), &call.gallery.values(), &scores});
  args.scores = scores.array().data;
  args.indices = static_cast<int64_t*>(indices.array().data);
  run(kName, &cuda::maxsim_topk, args, cuda::maxsim_topk_workspace_bytes(args), workspace, stream, call.inputs(),
      {&scores, &indices});
}

void cuda_xattn_score(nb::handle i, nb::handle i_lengths, nb::handle i_offsets, nb::handle c, nb::handle c_lengths,
                      nb::handle c_offsets, nb::handle direction, nb::handle feature_norm, nb::handle aggregation,
                      double lambda_softmax, double lambda_lse, double eps, nb::handle scores_object,
                      nb::handle workspace, uintptr_t stream) {
  XAttnCall call(i, i_lengths, i_offsets, c, c_lengths, c_offsets, direction, feature_norm, aggregation, lambda_softmax,
                 lambda_lse, eps, Memory::kDevice);
  const DeviceArg scores(call.kName, "scores", scores_object);
  const int64_t shape[] = {call.args.images.items, call.args.captions.items};
  scores.check_output(call.images.values(), score_dtype(call.args.images.dtype), 2, shape,
                      {&call.images.values(), &call.captions.values()});
  call.args.scores = scores.array().data;
  run(call.kName, &cuda::xattn_score, call.args, cuda::xattn_score_workspace_bytes(call.args), workspace, stream,
      arrays_of(call.images, call.captions), {&scores});
}

}  // namespace

#define PYCM_SETS                                                                                    \
  "queries: typing.Any, query_lengths: typing.Any, query_offsets: typing.Any, gallery: typing.Any, " \
  "gallery_lengths: typing.Any, gallery_offsets: typing.Any, "
#define PYCM_SETS_ARGS                                                                                      \
  nb::arg("queries"), nb::arg("query_lengths").none(), nb::arg("query_offsets").none(), nb::arg("gallery"), \
      nb::arg("gallery_lengths").none(), nb::arg("gallery_offsets").none()
#define PYCM_WAY "metric: str, reduce: str, direction: str"
#define PYCM_WAY_ARGS nb::arg("metric"), nb::arg("reduce"), nb::arg("direction")
#define PYCM_XATTN                                                                                   \
  "images: typing.Any, image_lengths: typing.Any, image_offsets: typing.Any, captions: typing.Any, " \
  "caption_lengths: typing.Any, caption_offsets: typing.Any, direction: str, feature_norm: str, "    \
  "aggregation: str, lambda_softmax: float, lambda_lse: float, eps: float"
#define PYCM_XATTN_ARGS                                                                                     \
  nb::arg("images"), nb::arg("image_lengths").none(), nb::arg("image_offsets").none(), nb::arg("captions"), \
      nb::arg("caption_lengths").none(), nb::arg("caption_offsets").none(), nb::arg("direction"),           \
      nb::arg("feature_norm"), nb::arg("aggregation"), nb::arg("lambda_softmax"), nb::arg("lambda_lse"),    \
      nb::arg("eps")

void bind_cuda_sets(nb::module_& module) {
  module.def("cuda_maxsim", &cuda_maxsim,
             nb::sig("def cuda_maxsim(" PYCM_SETS PYCM_WAY
                     ", scores: typing.Any, workspace: typing.Any, stream: int) -> None"),
             PYCM_SETS_ARGS, PYCM_WAY_ARGS, nb::arg("scores"), nb::arg("workspace"), nb::arg("stream"));
  module.def(
      "cuda_maxsim_workspace_bytes",
      [](nb::handle q, nb::handle q_lengths, nb::handle q_offsets, nb::handle g, nb::handle g_lengths,
         nb::handle g_offsets, nb::handle metric, nb::handle reduce, nb::handle direction) {
        return cuda::maxsim_workspace_bytes(
            DeviceMaxSim("maxsim", q, q_lengths, q_offsets, g, g_lengths, g_offsets, metric, reduce, direction).args);
      },
      nb::sig("def cuda_maxsim_workspace_bytes(" PYCM_SETS PYCM_WAY ") -> int"), PYCM_SETS_ARGS, PYCM_WAY_ARGS);

  module.def("cuda_maxsim_backward", &cuda_maxsim_backward,
             nb::sig("def cuda_maxsim_backward(grad: typing.Any, " PYCM_SETS PYCM_WAY
                     ", grad_queries: typing.Any, grad_gallery: typing.Any, workspace: typing.Any, stream: int) -> "
                     "None"),
             nb::arg("grad"), PYCM_SETS_ARGS, PYCM_WAY_ARGS, nb::arg("grad_queries").none(),
             nb::arg("grad_gallery").none(), nb::arg("workspace"), nb::arg("stream"));
  module.def(
      "cuda_maxsim_backward_workspace_bytes",
      [](nb::handle q, nb::handle q_lengths, nb::handle q_offsets, nb::handle g, nb::handle g_lengths,
         nb::handle g_offsets, nb::handle metric, nb::handle reduce, nb::handle direction) {
        MaxSimBackwardArgs args;
        args.forward =
            DeviceMaxSim("maxsim_backward", q, q_lengths, q_offsets, g, g_lengths, g_offsets, metric, reduce, direction)
                .args;
        return cuda::maxsim_backward_workspace_bytes(args);
      },
      nb::sig("def cuda_maxsim_backward_workspace_bytes(" PYCM_SETS PYCM_WAY ") -> int"), PYCM_SETS_ARGS,
      PYCM_WAY_ARGS);

  module.def("cuda_maxsim_topk", &cuda_maxsim_topk,
             nb::sig("def cuda_maxsim_topk(" PYCM_SETS "k: int, " PYCM_WAY
                     ", precision: str, scores: typing.Any, indices: typing.Any, workspace: typing.Any, stream: int) "
                     "-> None"),
             PYCM_SETS_ARGS, nb::arg("k"), PYCM_WAY_ARGS, nb::arg("precision"), nb::arg("scores"), nb::arg("indices"),
             nb::arg("workspace"), nb::arg("stream"));
  module.def(
      "cuda_maxsim_topk_workspace_bytes",
      [](nb::handle q, nb::handle q_lengths, nb::handle q_offsets, nb::handle g, nb::handle g_lengths,
         nb::handle g_offsets, int64_t k, nb::handle metric, nb::handle reduce, nb::handle direction,
         nb::handle precision) {
        return cuda::maxsim_topk_workspace_bytes(maxsim_topk_args(
            DeviceMaxSim("maxsim_topk", q, q_lengths, q_offsets, g, g_lengths, g_offsets, metric, reduce, direction), k,
            precision));
      },
      nb::sig("def cuda_maxsim_topk_workspace_bytes(" PYCM_SETS "k: int, " PYCM_WAY ", precision: str) -> int"),
      PYCM_SETS_ARGS, nb::arg("k"), PYCM_WAY_ARGS, nb::arg("precision"));

  module.def(
      "cuda_xattn_score", &cuda_xattn_score,
      nb::sig("def cuda_xattn_score(" PYCM_XATTN ", scores: typing.Any, workspace: typing.Any, stream: int) -> None"),
      PYCM_XATTN_ARGS, nb::arg("scores"), nb::arg("workspace"), nb::arg("stream"));
  module.def(
      "cuda_xattn_score_workspace_bytes",
      [](nb::handle i, nb::handle i_lengths, nb::handle i_offsets, nb::handle c, nb::handle c_lengths,
         nb::handle c_offsets, nb::handle direction, nb::handle feature_norm, nb::handle aggregation,
         double lambda_softmax, double lambda_lse, double eps) {
        return cuda::xattn_score_workspace_bytes(XAttnCall(i, i_lengths, i_offsets, c, c_lengths, c_offsets, direction,
                                                           feature_norm, aggregation, lambda_softmax, lambda_lse, eps,
                                                           Memory::kDevice)
                                                     .args);
      },
      nb::sig("def cuda_xattn_score_workspace_bytes(" PYCM_XATTN ") -> int"), PYCM_XATTN_ARGS);
}

}  // namespace pycm::bind
