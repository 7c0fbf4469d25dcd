#include "ops/similarity.h"

#include "bind/array_arg.h"
#include "bind/ops.h"

namespace pycm::bind {
namespace {

nb::object similarity(nb::handle x_object, nb::handle y_object, nb::handle metric, int num_threads,
                      nb::handle out_object) {
  constexpr const char* kName = "similarity";
  const ArrayArg x(kName, "x", x_object), y(kName, "y", y_object);
  const Array &a = x.array(), &b = y.array();
  check(a.ndim >= 2, kName, ": x must have shape [..., N, D], got ", x.shape());
  check(b.ndim >= 2, kName, ": y must have shape [..., M, D], got ", y.shape());
  if (x.framework() != y.framework()) throw TypeError(text(kName, ": x and y must both be torch or both NumPy arrays"));
  if (a.dtype != b.dtype)
    throw TypeError(text(kName, ": y must have x's dtype ", name_of(a.dtype), ", got ", name_of(b.dtype)));
  SimilarityArgs args;
  args.x = rows_of(a);
  args.y = rows_of(b);
  args.metric = parse_metric(kName, string_arg(kName, "metric", metric));
  args.num_threads = threads(num_threads);
  check(args.x.dim == args.y.dim, kName, ": y must have x's ", args.x.dim, " features, got shape ", y.shape());
  check(args.x.dim > 0, kName, ": x must have at least one feature, got shape ", x.shape());

  // Batch axes broadcast from the right.
  const int batch = std::max(a.ndim, b.ndim) - 2;
  check(batch <= kMaxDims - 2, kName, ": at most ", kMaxDims - 2, " batch axes, got ", batch);
  int64_t shape[kMaxDims] = {};
  args.batch_ndim = batch;
  for (int d = 0; d < batch; ++d) {
    const int i = d - (batch - (a.ndim - 2)), j = d - (batch - (b.ndim - 2));
    const int64_t x_size = i < 0 ? 1 : a.shape[i], y_size = j < 0 ? 1 : b.shape[j];
    check(x_size == y_size || x_size == 1 || y_size == 1, kName, ": batch axes of x ", x.shape(), " and y ", y.shape(),
          " do not broadcast");
    shape[d] = args.batch_shape[d] = x_size == 1 ? y_size : x_size;
    args.x_batch_strides[d] = x_size == 1 ? 0 : a.strides[i];
    args.y_batch_strides[d] = y_size == 1 ? 0 : b.strides[j];
  }
  shape[batch] = args.x.rows;
  shape[batch + 1] = args.y.rows;
  const DType dtype = a.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  nb::object result;
  if (out_object.is_none()) {
    const Element element = dtype == DType::kFloat64 ? Element::kFloat64 : Element::kFloat32;
    NewArray fresh = new_array(x.framework(), element, batch + 2, shape);
    args.out = fresh.data;
    result = std::move(fresh.object);
  } else {
    const ArrayArg out(kName, "out", out_object);
    out.check_output(x, dtype, batch + 2, shape, {&x, &y});
    args.out = out.array().data;
    result = nb::borrow(out_object);
  }
  {
    nb::gil_scoped_release release;
    cpu::similarity(args);
  }
  return result;
}

}  // namespace

void bind_similarity(nb::module_& module) {
  module.def("similarity", &similarity,
             nb::sig("def similarity(x: typing.Any, y: typing.Any, metric: str, num_threads: int = 0, "
                     "out: typing.Any = None) -> typing.Any"),
             nb::arg("x"), nb::arg("y"), nb::arg("metric").none(), nb::arg("num_threads") = 0,
             nb::arg("out").none() = nb::none());
}

}  // namespace pycm::bind
