#include "ops/pool_states.h"

#include <algorithm>
#include <optional>

#include "bind/array_arg.h"
#include "bind/ops.h"

namespace pycm::bind {
namespace {

// The data of a contiguous array of this dtype and shape.
void* data_of(const char* function, const char* name, const ArrayArg& arg, DType dtype,
              std::initializer_list<int64_t> shape) {
  const Array& array = arg.array();
  if (array.dtype != dtype)
    throw TypeError(text(function, ": ", name, " must be ", name_of(dtype), ", got ", name_of(array.dtype)));
  Array wanted;
  for (int64_t size : shape) wanted.shape[wanted.ndim++] = size;
  bool same = array.ndim == wanted.ndim;
  for (int d = 0; same && d < wanted.ndim; ++d) same = array.shape[d] == wanted.shape[d];
  check(same, function, ": ", name, " must have shape ", Shape{wanted}, ", got ", arg.shape());
  bool dense = true;
  int64_t stride = 1;
  for (int d = wanted.ndim - 1; d >= 0; stride *= array.shape[d--])
    dense &= array.shape[d] <= 1 || array.strides[d] == stride;
  check(dense || stride == 0, function, ": ", name, " must be contiguous");
  return array.data;
}

// What forward and backward share, checked; borrows the Python arrays.
struct Problem {
  const char* function;
  ArrayArg x, cu_seqlens;
  std::optional<ArrayArg> weights;
  PoolStatesArgs args;

  Problem(const char* name, nb::handle x_, nb::handle cu_seqlens_, nb::handle pool, nb::handle pool_weights,
          int threads_)
      : function(name), x(name, "x", x_), cu_seqlens(name, "cu_seqlens", cu_seqlens_, Content::kInt64) {
    args.dtype = x.array().dtype;
    if (args.dtype != DType::kFloat32 && args.dtype != DType::kFloat64)
      throw TypeError(text(function, ": x must be float32 or float64, got ", name_of(args.dtype)));
    check(x.array().ndim == 2, function, ": x must have shape [S, F], got ", x.shape());
    args.dim = x.size(1);
    args.x = data_of(function, "x", x, args.dtype, {x.size(0), args.dim});
    const Array& starts = cu_seqlens.array();
    check(starts.ndim == 1 && starts.shape[0] >= 1, function, ": cu_seqlens must have shape [B + 1], got ",
          cu_seqlens.shape());
    args.batch = starts.shape[0] - 1;
    args.cu_seqlens =
        static_cast<const int64_t*>(data_of(function, "cu_seqlens", cu_seqlens, starts.dtype, {args.batch + 1}));
    check(args.cu_seqlens[0] == 0, function, ": cu_seqlens must start with 0, got ", args.cu_seqlens[0]);
    for (int64_t b = 0; b < args.batch; ++b)
      check(args.cu_seqlens[b] <= args.cu_seqlens[b + 1], function, ": cu_seqlens must not fall, got ",
            args.cu_seqlens[b + 1], " after ", args.cu_seqlens[b]);
    check(args.cu_seqlens[args.batch] == x.size(0), function, ": cu_seqlens must end with ", x.size(0), ", got ",
          args.cu_seqlens[args.batch]);
    args.pool.pool = parse_pool(function, string_arg(function, "pool", pool));
    const Pool known[] = {Pool::kMean, Pool::kMax, Pool::kMeanMax, Pool::kAttention, Pool::kGpo};
    check(std::find(std::begin(known), std::end(known), args.pool.pool) != std::end(known), function,
          ": pool must be mean, max, meanmax, attention or gpo, got '", name_of(args.pool.pool), "'");
    const bool wanted = args.pool.pool == Pool::kAttention || args.pool.pool == Pool::kGpo;
    check(pool_weights.is_none() != wanted, function, ": pool_weights must be ", wanted ? "given" : "None",
          " for pool ", name_of(args.pool.pool));
    if (wanted) {
      weights.emplace(function, "pool_weights", pool_weights);
      args.pool.weights = data_of(function, "pool_weights", *weights, args.dtype, {weights_size()});
    }
    args.num_threads = threads(threads_);
  }
  int64_t weights_size() const { return args.pool.pool == Pool::kGpo ? x.size(0) : args.dim; }
  int64_t width() const { return width_of(args.pool.pool) * args.dim; }
};

void pool_states(nb::handle x, nb::handle cu_seqlens, nb::handle pool, nb::handle pool_weights, nb::handle out,
                 int num_threads) {
  const Problem problem("pool_states", x, cu_seqlens, pool, pool_weights, num_threads);
  const PoolStatesArgs& args = problem.args;
  const ArrayArg out_(problem.function, "out", out);
  void* data = data_of(problem.function, "out", out_, args.dtype, {args.batch, problem.width()});
  nb::gil_scoped_release release;
  cpu::pool_states(args, data);
}

void pool_states_backward(nb::handle x, nb::handle cu_seqlens, nb::handle pool, nb::handle pool_weights,
                          nb::handle grad_out, nb::handle grad_x, nb::handle grad_pool_weights, int num_threads) {
  const Problem problem("pool_states_backward", x, cu_seqlens, pool, pool_weights, num_threads);
  const PoolStatesArgs& args = problem.args;
  const ArrayArg out(problem.function, "grad_out", grad_out);
  const void* from = data_of(problem.function, "grad_out", out, args.dtype, {args.batch, problem.width()});
  std::optional<ArrayArg> arrays[2];
  void* to[2] = {};
  if (!grad_x.is_none())
    to[0] = data_of(problem.function, "grad_x", arrays[0].emplace(problem.function, "grad_x", grad_x), args.dtype,
                    {problem.x.size(0), args.dim});
  check(grad_pool_weights.is_none() || problem.weights.has_value(), problem.function,
        ": grad_pool_weights must be None for pool ", name_of(args.pool.pool));
  if (!grad_pool_weights.is_none())
    to[1] = data_of(problem.function, "grad_pool_weights",
                    arrays[1].emplace(problem.function, "grad_pool_weights", grad_pool_weights), args.dtype,
                    {problem.weights_size()});
  nb::gil_scoped_release release;
  cpu::pool_states_backward(args, from, to[0], to[1]);
}

}  // namespace

void bind_pool_states(nb::module_& module) {
  module.def("pool_states", &pool_states,
             nb::sig("def pool_states(x: typing.Any, cu_seqlens: typing.Any, pool: str, pool_weights: typing.Any, "
                     "out: typing.Any, num_threads: int = 0) -> None"),
             nb::arg("x").none(), nb::arg("cu_seqlens").none(), nb::arg("pool").none(), nb::arg("pool_weights").none(),
             nb::arg("out").none(), nb::arg("num_threads") = 0);
  module.def("pool_states_backward", &pool_states_backward,
             nb::sig("def pool_states_backward(x: typing.Any, cu_seqlens: typing.Any, pool: str, "
                     "pool_weights: typing.Any, grad_out: typing.Any, grad_x: typing.Any, "
                     "grad_pool_weights: typing.Any, num_threads: int = 0) -> None"),
             nb::arg("x").none(), nb::arg("cu_seqlens").none(), nb::arg("pool").none(), nb::arg("pool_weights").none(),
             nb::arg("grad_out").none(), nb::arg("grad_x").none(), nb::arg("grad_pool_weights").none(),
             nb::arg("num_threads") = 0);
}

}  // namespace pycm::bind
