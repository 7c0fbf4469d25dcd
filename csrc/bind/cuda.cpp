// The CUDA operations. Results and scratch come from Python, where torch allocates them; nothing here waits for the device.
// A second module, built for the host executor of tests/simt, binds the same functions over memory of the host.
#include "bind/device_call.h"
#include "bind/ops.h"
#include "bind/search_args.h"
#include "ops/encode.h"

namespace pycm::bind {
namespace {

// ---- similarity ----

struct SimilarityCall {
  static constexpr const char* kName = "similarity";
  SimilarityCall(nb::handle x_object, nb::handle y_object, nb::handle metric)
      : x(kName, "x", x_object),
        y(kName, "y", y_object),
        args(similarity_args(x, y, parse_metric(kName, string_arg(kName, "metric", metric)), shape)) {}

  DeviceArg x, y;
  int64_t shape[kMaxDims] = {};
  SimilarityArgs args;
};

void cuda_similarity(nb::handle x, nb::handle y, nb::handle metric, nb::handle out_object, nb::handle workspace,
                     uintptr_t stream, bool allow_tf32) {
  SimilarityCall call(x, y, metric);
  const DeviceArg out(call.kName, "out", out_object);
  out.check_output(call.x, score_dtype(call.args.x.dtype), call.args.batch_ndim + 2, call.shape, {&call.x, &call.y});
  call.args.out = out.array().data;
  if (allow_tf32) call.args.float32_product = Float32Product::kTF32;
  run(call.kName, &cuda::similarity, call.args, cuda::similarity_workspace_bytes(call.args), workspace, stream,
      {&call.x, &call.y}, {&out});
}

// ---- encode ----

void cuda_encode(nb::handle gallery_object, nb::handle metric, nb::handle encoded, uintptr_t stream) {
  constexpr const char* kName = "encode";
  const DeviceArg gallery(kName, "gallery", gallery_object);
  check(gallery.array().ndim == 2 && gallery.size(0) > 0 && gallery.size(1) > 0, kName,
        ": gallery must have shape [M, D], M and D at least 1, got ", gallery.shape());
  const EncodeArgs args{rows_of(gallery.array()), parse_metric(kName, string_arg(kName, "metric", metric))};
  run(kName, &cuda::encode, args, cuda::encoded_bytes(args.gallery.rows, args.gallery.dim), encoded, stream, {&gallery},
      {}, "encoded");
}

// What cuda_encode wrote for this gallery, or None.
class EncodedArg {
 public:
  EncodedArg(const char* function, nb::handle object, const Rows& gallery) {
    if (object.is_none()) return;
    arg_.emplace(function, "encoded", object, Content::kBytes);
    const int64_t bytes = cuda::encoded_bytes(gallery.rows, gallery.dim);
    check(arg_->array().ndim == 1 && arg_->size(0) == bytes, function, ": encoded must have shape [", bytes, "], got ",
          arg_->shape());
  }
  void* data() const { return arg_ ? arg_->array().data : nullptr; }
  void add_to(Arrays& arrays) const {
    if (arg_) arrays.push_back(&*arg_);
  }

 private:
  std::optional<DeviceArg> arg_;
};

// ---- topk ----

struct TopKCall {
  static constexpr const char* kName = "topk";
  TopKCall(nb::handle queries_object, nb::handle gallery_object, nb::handle k, nb::handle metric, nb::handle precision,
           nb::handle mask, nb::handle exclude, nb::handle offsets, nb::handle screen, nb::handle encoded_object)
      : queries(kName, "queries", queries_object), gallery(kName, "gallery", gallery_object) {
    check_pair(kName, queries, gallery);
    encoded.emplace(kName, encoded_object, rows_of(gallery.array()));
    filter.emplace(kName, mask, exclude, offsets, queries.size(0), gallery.size(0), Memory::kDevice);
    args = topk_args(rows_of(queries.array()), rows_of(gallery.array()), k,
                     parse_metric(kName, string_arg(kName, "metric", metric)), precision,
                     parse_screen(kName, string_arg(kName, "screen", screen)), *filter);
    args.encoded = encoded->data();
  }

  Arrays inputs() const {
    Arrays all = filter->arrays();
    all.insert(all.end(), {&queries, &gallery});
    encoded->add_to(all);
    return all;
  }

  DeviceArg queries, gallery;
  std::optional<EncodedArg> encoded;
  std::optional<FilterArgs> filter;
  TopKArgs args;
};

void cuda_topk(nb::handle queries, nb::handle gallery, nb::handle k, nb::handle metric, nb::handle precision,
               nb::handle mask, nb::handle exclude, nb::handle offsets, nb::handle screen, nb::handle encoded,
               nb::handle scores_object, nb::handle indices_object, nb::handle workspace, uintptr_t stream) {
  TopKCall call(queries, gallery, k, metric, precision, mask, exclude, offsets, screen, encoded);
  const int64_t shape[] = {call.args.queries.rows, call.args.k};
  const DeviceArg scores(call.kName, "scores", scores_object);
  const DeviceArg indices(call.kName, "indices", indices_object, Content::kInt64);
  scores.check_output(call.queries, score_dtype(call.args.queries.dtype), 2, shape, {&call.queries, &call.gallery});
  indices.check_output(call.queries, DType::kFloat32, 2, shape, {&call.queries, &call.gallery, &scores});
  call.args.scores = scores.array().data;
  call.args.indices = static_cast<int64_t*>(indices.array().data);
  run(call.kName, &cuda::topk, call.args, cuda::topk_workspace_bytes(call.args), workspace, stream, call.inputs(),
      {&scores, &indices});
}

// ---- rank ----

struct RankCall {
  static constexpr const char* kName = "rank";
  RankCall(nb::handle queries_object, nb::handle gallery_object, nb::handle positives_object,
           nb::handle positive_offsets, nb::handle metric, nb::handle mask, nb::handle exclude, nb::handle offsets,
           nb::handle screen, nb::handle encoded_object)
      : queries(kName, "queries", queries_object),
        gallery(kName, "gallery", gallery_object),
        positives(kName, "positives", positives_object, Content::kInt64),
        starts(kName, "positives' offsets", positive_offsets, Content::kInt64) {
    check_pair(kName, queries, gallery);
    encoded.emplace(kName, encoded_object, rows_of(gallery.array()));
    check_compressed(kName, "positives", positives, starts, queries.size(0), 0, gallery.size(0), Memory::kDevice);
    filter.emplace(kName, mask, exclude, offsets, queries.size(0), gallery.size(0), Memory::kDevice);
    args = rank_args(rows_of(queries.array()), rows_of(gallery.array()), positives, starts,
                     parse_metric(kName, string_arg(kName, "metric", metric)),
                     parse_screen(kName, string_arg(kName, "screen", screen)), *filter);
    args.encoded = encoded->data();
  }

  Arrays inputs() const {
    Arrays all = filter->arrays();
    all.insert(all.end(), {&queries, &gallery, &positives, &starts});
    encoded->add_to(all);
    return all;
  }

  DeviceArg queries, gallery, positives, starts;
  std::optional<EncodedArg> encoded;
  std::optional<FilterArgs> filter;
  RankArgs args;
};

void cuda_rank(nb::handle queries, nb::handle gallery, nb::handle positives, nb::handle positive_offsets,
               nb::handle metric, nb::handle mask, nb::handle exclude, nb::handle offsets, nb::handle screen,
               nb::handle encoded, nb::handle greater_object, nb::handle equal_object, nb::handle scores_object,
               nb::handle workspace, uintptr_t stream) {
  RankCall call(queries, gallery, positives, positive_offsets, metric, mask, exclude, offsets, screen, encoded);
  const int64_t shape[] = {call.args.num_positives};
  const DeviceArg greater(call.kName, "greater", greater_object, Content::kInt64);
  const DeviceArg equal(call.kName, "equal", equal_object, Content::kInt64);
  const DeviceArg scores(call.kName, "scores", scores_object);
  greater.check_output(call.queries, DType::kFloat32, 1, shape, {&call.queries, &call.gallery, &call.positives});
  equal.check_output(call.queries, DType::kFloat32, 1, shape,
                     {&call.queries, &call.gallery, &call.positives, &greater});
  scores.check_output(call.queries, score_dtype(call.args.queries.dtype), 1, shape,
                      {&call.queries, &call.gallery, &call.positives, &greater, &equal});
  call.args.greater = static_cast<int64_t*>(greater.array().data);
  call.args.equal = static_cast<int64_t*>(equal.array().data);
  call.args.scores = scores.array().data;
  run(call.kName, &cuda::rank, call.args, cuda::rank_workspace_bytes(call.args), workspace, stream, call.inputs(),
      {&greater, &equal, &scores});
}

// Rows of these sizes that lie densely, wherever that may be.
Rows dense_rows(int64_t rows, int64_t dim, DType dtype) {
  Rows result;
  result.dtype = dtype;
  result.rows = rows;
  result.dim = result.row_stride = dim;
  return result;
}

}  // namespace

void bind_cuda(nb::module_& module) {
  module.def("cuda_similarity", &cuda_similarity,
             nb::sig("def cuda_similarity(x: typing.Any, y: typing.Any, metric: str, out: typing.Any, "
                     "workspace: typing.Any, stream: int, allow_tf32: bool) -> None"));
  module.def(
      "cuda_similarity_workspace_bytes",
      [](nb::handle x, nb::handle y, nb::handle metric) {
        return cuda::similarity_workspace_bytes(SimilarityCall(x, y, metric).args);
      },
      nb::sig("def cuda_similarity_workspace_bytes(x: typing.Any, y: typing.Any, metric: str) -> int"));

  module.def("cuda_encode", &cuda_encode,
             nb::sig("def cuda_encode(gallery: typing.Any, metric: str, encoded: typing.Any, stream: int) -> None"));
  module.def("cuda_encoded_bytes", &cuda::encoded_bytes, nb::arg("rows"), nb::arg("dim"));

  module.def("cuda_topk", &cuda_topk,
             nb::sig("def cuda_topk(queries: typing.Any, gallery: typing.Any, k: int, metric: str, precision: str, "
                     "mask: typing.Any, exclude: typing.Any, exclude_offsets: typing.Any, screen: str, "
                     "encoded: typing.Any, scores: typing.Any, indices: typing.Any, workspace: typing.Any, "
                     "stream: int) -> None"),
             nb::arg("queries"), nb::arg("gallery"), nb::arg("k"), nb::arg("metric"), nb::arg("precision"),
             nb::arg("mask").none(), nb::arg("exclude").none(), nb::arg("exclude_offsets").none(), nb::arg("screen"),
             nb::arg("encoded").none(), nb::arg("scores"), nb::arg("indices"), nb::arg("workspace"), nb::arg("stream"));
  module.def(
      "cuda_topk_workspace_bytes",
      [](nb::handle queries, nb::handle gallery, nb::handle k, nb::handle metric, nb::handle precision, nb::handle mask,
         nb::handle exclude, nb::handle offsets, nb::handle screen, nb::handle encoded) {
        return cuda::topk_workspace_bytes(
            TopKCall(queries, gallery, k, metric, precision, mask, exclude, offsets, screen, encoded).args);
      },
      nb::sig("def cuda_topk_workspace_bytes(queries: typing.Any, gallery: typing.Any, k: int, metric: str, "
              "precision: str, mask: typing.Any, exclude: typing.Any, exclude_offsets: typing.Any, screen: str, "
              "encoded: typing.Any) -> int"),
      nb::arg("queries"), nb::arg("gallery"), nb::arg("k"), nb::arg("metric"), nb::arg("precision"),
      nb::arg("mask").none(), nb::arg("exclude").none(), nb::arg("exclude_offsets").none(), nb::arg("screen"),
      nb::arg("encoded").none());
  // The most of any metric and dtype, before there are tensors.
  module.def(
      "cuda_topk_bytes_of_sizes",
      [](int64_t queries, int64_t gallery, int64_t dim, int64_t k, bool encoded) {
        int64_t most = 0;
        char some = 0;  // that there is an encoding is all that counts
        for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64})
          for (Metric metric : kMetrics) {
            TopKArgs args;
            args.queries = dense_rows(queries, dim, dtype);
            args.gallery = dense_rows(gallery, dim, dtype);
            args.k = k;
            args.metric = metric;
            args.precision = Precision::kFast;  // which takes no less
            args.encoded = encoded ? &some : nullptr;
            most = std::max(most, cuda::topk_workspace_bytes(args));
          }
        return most;
      },
      nb::arg("queries"), nb::arg("gallery"), nb::arg("dim"), nb::arg("k"), nb::arg("encoded"));

  module.def("cuda_rank", &cuda_rank,
             nb::sig("def cuda_rank(queries: typing.Any, gallery: typing.Any, positives: typing.Any, "
                     "offsets: typing.Any, metric: str, mask: typing.Any, exclude: typing.Any, "
                     "exclude_offsets: typing.Any, screen: str, encoded: typing.Any, greater: typing.Any, "
                     "equal: typing.Any, scores: typing.Any, workspace: typing.Any, stream: int) -> None"),
             nb::arg("queries"), nb::arg("gallery"), nb::arg("positives"), nb::arg("offsets"), nb::arg("metric"),
             nb::arg("mask").none(), nb::arg("exclude").none(), nb::arg("exclude_offsets").none(), nb::arg("screen"),
             nb::arg("encoded").none(), nb::arg("greater"), nb::arg("equal"), nb::arg("scores"), nb::arg("workspace"),
             nb::arg("stream"));
  module.def(
      "cuda_rank_workspace_bytes",
      [](nb::handle queries, nb::handle gallery, nb::handle positives, nb::handle positive_offsets, nb::handle metric,
         nb::handle mask, nb::handle exclude, nb::handle offsets, nb::handle screen, nb::handle encoded) {
        return cuda::rank_workspace_bytes(
            RankCall(queries, gallery, positives, positive_offsets, metric, mask, exclude, offsets, screen, encoded)
                .args);
      },
      nb::sig("def cuda_rank_workspace_bytes(queries: typing.Any, gallery: typing.Any, positives: typing.Any, "
              "offsets: typing.Any, metric: str, mask: typing.Any, exclude: typing.Any, exclude_offsets: typing.Any, "
              "screen: str, encoded: typing.Any) -> int"),
      nb::arg("queries"), nb::arg("gallery"), nb::arg("positives"), nb::arg("offsets"), nb::arg("metric"),
      nb::arg("mask").none(), nb::arg("exclude").none(), nb::arg("exclude_offsets").none(), nb::arg("screen"),
      nb::arg("encoded").none());
}

}  // namespace pycm::bind
