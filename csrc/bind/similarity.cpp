#include "ops/similarity.h"

#include "bind/ops.h"
#include "bind/search_args.h"

namespace pycm::bind {
namespace {

nb::object similarity(nb::handle x_object, nb::handle y_object, nb::handle metric, int num_threads,
                      nb::handle out_object) {
  constexpr const char* kName = "similarity";
  const ArrayArg x(kName, "x", x_object), y(kName, "y", y_object);
  int64_t shape[kMaxDims] = {};
  SimilarityArgs args = similarity_args(x, y, parse_metric(kName, string_arg(kName, "metric", metric)), shape);
  args.num_threads = threads(num_threads);
  const int ndim = args.batch_ndim + 2;
  const DType dtype = args.x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  nb::object result;
  if (out_object.is_none()) {
    const Element element = dtype == DType::kFloat64 ? Element::kFloat64 : Element::kFloat32;
    NewArray fresh = new_array(x.framework(), element, ndim, shape);
    args.out = fresh.data;
    result = std::move(fresh.object);
  } else {
    const ArrayArg out(kName, "out", out_object);
    out.check_output(x, dtype, ndim, shape, {&x, &y});
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
