#include "ops/temporal_pool.h"

#include <algorithm>
#include <deque>
#include <optional>

#include "bind/array_arg.h"
#include "bind/ops.h"

namespace pycm::bind {
namespace {

// An argument that may be None.
class OptionalArray {
 public:
  OptionalArray(const char* function, const char* name, nb::handle object) : function_(function), name_(name) {
    if (!object.is_none()) array_.emplace(function, name, object);
  }
  explicit operator bool() const { return array_.has_value(); }

  // The data, or null for None; raises unless it is contiguous and has this dtype and shape.
  void* data(DType dtype, std::initializer_list<int64_t> shape) const {
    if (!array_) return nullptr;
    const Array& array = array_->array();
    if (array.dtype != dtype)
      throw TypeError(text(function_, ": ", name_, " must be ", name_of(dtype), ", got ", name_of(array.dtype)));
    Array wanted;
    for (int64_t size : shape) wanted.shape[wanted.ndim++] = size;
    bool same = array.ndim == wanted.ndim, dense = true;
    int64_t stride = 1;
    for (int d = wanted.ndim - 1; same && d >= 0; --d) {
      same = array.shape[d] == wanted.shape[d];
      dense &= array.shape[d] <= 1 || array.strides[d] == stride;
      stride *= array.shape[d];
    }
    check(same, function_, ": ", name_, " must have shape ", Shape{wanted}, ", got ", array_->shape());
    check(dense || stride == 0, function_, ": ", name_, " must be contiguous");
    return array.data;
  }

 private:
  const char* function_;
  const char* name_;
  std::optional<ArrayArg> array_;
};

DType working_type(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// A layer's parameters, alive as long as this.
struct Parameters {
  ArrayArg weight_ih, weight_hh;
  OptionalArray bias_ih, bias_hh, weight_hr;
  CellWeights weights;

  Parameters(const char* function, nb::handle cell, nb::handle ih, nb::handle hh, nb::handle b_ih, nb::handle b_hh,
             nb::handle hr)
      : weight_ih(function, "weight_ih", ih),
        weight_hh(function, "weight_hh", hh),
        bias_ih(function, "bias_ih", b_ih),
        bias_hh(function, "bias_hh", b_hh),
        weight_hr(function, "weight_hr", hr) {
    weights.cell = parse_cell(function, string_arg(function, "cell", cell));
    weights.dtype = weight_ih.array().dtype;
    const int64_t gates = gates_of(weights.cell);
    for (const ArrayArg* weight : {&weight_ih, &weight_hh})
      check(weight->array().ndim == 2 && weight->size(0) > 0 && weight->size(0) % gates == 0 && weight->size(1) > 0,
            function, ": weight_ih and weight_hh must have shapes [", gates, " * H, I] and [", gates, " * H, P], got ",
            weight->shape());
    weights.hidden_size = weight_ih.size(0) / gates;
    weights.input_size = weight_ih.size(1);
    weights.state_size = weight_hh.size(1);
    const int64_t rows = gates * weights.hidden_size;
    weights.weight_ih = OptionalArray(function, "weight_ih", ih).data(weights.dtype, {rows, weights.input_size});
    weights.weight_hh = OptionalArray(function, "weight_hh", hh).data(weights.dtype, {rows, weights.state_size});
    check(static_cast<bool>(bias_ih) == static_cast<bool>(bias_hh), function,
          ": bias_ih and bias_hh must both be given or both be None");
    weights.bias_ih = bias_ih.data(weights.dtype, {rows});
    weights.bias_hh = bias_hh.data(weights.dtype, {rows});
    check(!weight_hr || weights.cell == Cell::kLstm, function, ": weight_hr is for lstm only");
    check(weight_hr || weights.state_size == weights.hidden_size, function, ": weight_hh must have ",
          weights.hidden_size, " columns without weight_hr, got shape ", weight_hh.shape());
    weights.weight_hr = weight_hr.data(weights.dtype, {weights.state_size, weights.hidden_size});
  }
};

class TemporalCell {
 public:
  TemporalCell(nb::handle cell, nb::handle weight_ih, nb::handle weight_hh, nb::handle bias_ih, nb::handle bias_hh,
               nb::handle weight_hr, int num_threads, bool int8) {
    Parameters parameters("TemporalCell", cell, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr);
    CellWeights& w = parameters.weights;
    check(!int8 || w.dtype != DType::kFloat64, "TemporalCell: int8 needs float32, float16 or bfloat16, got float64");
    check(!int8 || std::max(w.hidden_size, w.state_size) <= kMaxInt8Depth, "TemporalCell: int8 needs at most ",
          kMaxInt8Depth, " units and states, got ", w.hidden_size, " and ", w.state_size);
    w.int8 = int8;
    const int thread_count = threads(num_threads);
    nb::gil_scoped_release release;
    packed_ = cpu::pack_cell(parameters.weights, thread_count);
  }
  const std::shared_ptr<const cpu::PackedCell>& packed() const { return packed_; }
  const CellWeights& shape() const { return cpu::shape_of(*packed_); }

 private:
  std::shared_ptr<const cpu::PackedCell> packed_;
};

// x [S, I] or [B, T, I] and cu_seqlens [B + 1], checked against each other.
class SequencesArg {
 public:
  SequencesArg(const char* function, nb::handle x, nb::handle cu_seqlens, const CellWeights& weights)
      : x_(function, "x", x), cu_seqlens_(function, "cu_seqlens", cu_seqlens, Content::kInt64) {
    const Array &values = x_.array(), &offsets = cu_seqlens_.array();
    const bool wide = weights.dtype == DType::kFloat64;
    if ((values.dtype == DType::kFloat64) != wide)
      throw TypeError(text(function, ": x must be ", wide ? "float64" : "float32, float16 or bfloat16",
                           " for weights of ", name_of(weights.dtype), ", got ", name_of(values.dtype)));
    check(values.ndim == 2 || values.ndim == 3, function, ": x must have shape [S, I] or [B, T, I], got ", x_.shape());
    const int last = values.ndim - 1;
    check(values.shape[last] == weights.input_size, function, ": x must have ", weights.input_size,
          " features, got shape ", x_.shape());
    // An array without elements may have any strides.
    const bool empty = std::find(values.shape, values.shape + values.ndim, 0) != values.shape + values.ndim;
    check(empty || values.shape[last] == 1 || values.strides[last] == 1, function,
          ": x's last axis must have stride 1, got ", values.strides[last]);
    check(offsets.ndim == 1 && offsets.shape[0] >= 1, function, ": cu_seqlens must have shape [B + 1], got ",
          cu_seqlens_.shape());
    check(offsets.shape[0] == 1 || offsets.strides[0] == 1, function, ": cu_seqlens must be contiguous");
    sequences_.data = values.data;
    sequences_.dtype = values.dtype;
    sequences_.padded = values.ndim == 3;
    sequences_.batch = offsets.shape[0] - 1;
    sequences_.cu_seqlens = static_cast<const int64_t*>(offsets.data);
    sequences_.step_stride = values.strides[last - 1];
    sequences_.batch_stride = sequences_.padded ? values.strides[0] : 0;
    check(sequences_.cu_seqlens[0] == 0, function, ": cu_seqlens must start with 0, got ", sequences_.cu_seqlens[0]);
    check(!sequences_.padded || sequences_.batch == values.shape[0], function, ": cu_seqlens must have ",
          values.shape[0] + 1, " elements for x of shape ", x_.shape(), ", got ", offsets.shape[0]);
    for (int64_t b = 0; b < sequences_.batch; ++b) {
      const int64_t length = sequences_.length(b);
      check(length >= 0, function, ": cu_seqlens must not fall, got length ", length, " in row ", b);
      check(!sequences_.padded || length <= values.shape[1], function, ": lengths must be in [0, ", values.shape[1],
            "], got ", length, " in row ", b);
    }
    check(sequences_.padded || steps() == values.shape[0], function, ": cu_seqlens must end with ", values.shape[0],
          ", got ", steps());
  }
  const ArrayArg& x() const { return x_; }
  const Sequences& sequences() const { return sequences_; }
  int64_t steps() const { return sequences_.cu_seqlens[sequences_.batch]; }

 private:
  ArrayArg x_, cu_seqlens_;
  Sequences sequences_;
};

PoolChoice pool_choice(const char* function, nb::handle pool, const OptionalArray& weights, DType dtype, int64_t steps,
                       int64_t state_size) {
  PoolChoice choice;
  choice.pool = parse_pool(function, string_arg(function, "pool", pool));
  const bool wanted = choice.pool == Pool::kAttention || choice.pool == Pool::kGpo;
  check(static_cast<bool>(weights) == wanted, function, ": pool_weights must be ", wanted ? "given" : "None",
        " for pool ", name_of(choice.pool));
  choice.weights = weights.data(dtype, {choice.pool == Pool::kGpo ? steps : state_size});
  return choice;
}

void temporal_pool(const TemporalCell& cell, nb::handle x, nb::handle cu_seqlens, bool reverse, nb::handle pool,
                   nb::handle pool_weights, nb::handle h0, nb::handle c0, nb::handle out, nb::handle states,
                   nb::handle hn, nb::handle cn, nb::handle reserve, int num_threads) {
  constexpr const char* kName = "temporal_pool";
  const CellWeights& shape = cell.shape();
  const SequencesArg sequences(kName, x, cu_seqlens, shape);
  const OptionalArray weights(kName, "pool_weights", pool_weights), h0_(kName, "h0", h0), c0_(kName, "c0", c0);
  const OptionalArray out_(kName, "out", out), states_(kName, "states", states), hn_(kName, "hn", hn),
      cn_(kName, "cn", cn), reserve_(kName, "reserve", reserve);
  const DType dtype = working_type(shape.dtype);
  const int64_t batch = sequences.sequences().batch, steps = sequences.steps();
  TemporalPoolArgs args;
  args.x = sequences.sequences();
  args.reverse = reverse;
  args.pool = pool_choice(kName, pool, weights, dtype, steps, shape.state_size);
  check(static_cast<bool>(out_) == (args.pool.pool != Pool::kNone), kName, ": out must be ",
        out_ ? "None for pool none" : "given");
  check((!c0_ && !cn_) || shape.cell == Cell::kLstm, kName, ": c0 and cn are for lstm only");
  args.h0 = h0_.data(dtype, {batch, shape.state_size});
  args.c0 = c0_.data(dtype, {batch, shape.hidden_size});
  args.out = out_.data(dtype, {batch, width_of(args.pool.pool) * shape.state_size});
  args.states = states_.data(dtype, {steps, shape.state_size});
  args.hn = hn_.data(dtype, {batch, shape.state_size});
  args.cn = cn_.data(dtype, {batch, shape.hidden_size});
  args.reserve = reserve_.data(dtype, {steps, reserve_of(shape.cell), shape.hidden_size});
  args.num_threads = threads(num_threads);
  nb::gil_scoped_release release;
  cpu::temporal_pool(*cell.packed(), args);
}

void temporal_pool_backward(nb::handle cell, nb::handle x, nb::handle cu_seqlens, nb::handle weight_ih,
                            nb::handle weight_hh, nb::handle bias_ih, nb::handle bias_hh, nb::handle weight_hr,
                            bool reverse, nb::handle pool, nb::handle pool_weights, nb::handle h0, nb::handle c0,
                            nb::handle states, nb::handle reserve, nb::handle grad_out, nb::handle grad_states,
                            nb::handle grad_hn, nb::handle grad_cn, nb::handle grad_x, nb::handle grad_weight_ih,
                            nb::handle grad_weight_hh, nb::handle grad_bias_ih, nb::handle grad_bias_hh,
                            nb::handle grad_weight_hr, nb::handle grad_h0, nb::handle grad_c0,
                            nb::handle grad_pool_weights, int num_threads) {
  constexpr const char* kName = "temporal_pool_backward";
  const Parameters parameters(kName, cell, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr);
  const CellWeights& weights = parameters.weights;
  const SequencesArg sequences(kName, x, cu_seqlens, weights);
  const DType dtype = working_type(weights.dtype);
  const int64_t batch = sequences.sequences().batch, steps = sequences.steps();
  const int64_t rows = gates_of(weights.cell) * weights.hidden_size, state = weights.state_size;
  TemporalPoolGradArgs args;
  // Every array stays borrowed until the end of the call.
  std::deque<OptionalArray> arrays;
  const auto data = [&](const char* name, nb::handle object, std::initializer_list<int64_t> shape) {
    return arrays.emplace_back(kName, name, object).data(dtype, shape);
  };
  args.weights = weights;
  args.x = sequences.sequences();
  args.reverse = reverse;
  const OptionalArray pool_array(kName, "pool_weights", pool_weights);
  args.pool = pool_choice(kName, pool, pool_array, dtype, steps, state);
  check(weights.cell == Cell::kLstm || (c0.is_none() && grad_cn.is_none() && grad_c0.is_none()), kName,
        ": c0, grad_cn and grad_c0 are for lstm only");
  check(!states.is_none() && !reserve.is_none(), kName, ": states and reserve must be given");
  check(grad_out.is_none() || args.pool.pool != Pool::kNone, kName, ": grad_out must be None for pool none");
  args.h0 = data("h0", h0, {batch, state});
  args.c0 = data("c0", c0, {batch, weights.hidden_size});
  args.states = data("states", states, {steps, state});
  args.reserve = data("reserve", reserve, {steps, reserve_of(weights.cell), weights.hidden_size});
  args.grad_out = data("grad_out", grad_out, {batch, width_of(args.pool.pool) * state});
  args.grad_states = data("grad_states", grad_states, {steps, state});
  args.grad_hn = data("grad_hn", grad_hn, {batch, state});
  args.grad_cn = data("grad_cn", grad_cn, {batch, weights.hidden_size});
  args.grad_weight_ih = data("grad_weight_ih", grad_weight_ih, {rows, weights.input_size});
  args.grad_weight_hh = data("grad_weight_hh", grad_weight_hh, {rows, state});
  args.grad_bias_ih = data("grad_bias_ih", grad_bias_ih, {rows});
  args.grad_bias_hh = data("grad_bias_hh", grad_bias_hh, {rows});
  args.grad_weight_hr = data("grad_weight_hr", grad_weight_hr, {state, weights.hidden_size});
  args.grad_h0 = data("grad_h0", grad_h0, {batch, state});
  args.grad_c0 = data("grad_c0", grad_c0, {batch, weights.hidden_size});
  args.grad_pool_weights = data("grad_pool_weights", grad_pool_weights, {args.pool.pool == Pool::kGpo ? steps : state});
  check(grad_pool_weights.is_none() || !pool_weights.is_none(), kName, ": grad_pool_weights must be None for pool ",
        name_of(args.pool.pool));
  check(grad_weight_hr.is_none() || !weight_hr.is_none(), kName, ": grad_weight_hr must be None without weight_hr");
  std::optional<ArrayArg> grad_x_array;
  if (!grad_x.is_none()) {
    const Array& out = grad_x_array.emplace(kName, "grad_x", grad_x).array();
    const Array& in = sequences.x().array();
    if (out.dtype != dtype)
      throw TypeError(text(kName, ": grad_x must be ", name_of(dtype), ", got ", name_of(out.dtype)));
    const int last = in.ndim - 1;
    check(out.ndim == in.ndim && std::equal(in.shape, in.shape + in.ndim, out.shape), kName,
          ": grad_x must have x's shape ", sequences.x().shape(), ", got ", grad_x_array->shape());
    const bool empty = std::find(out.shape, out.shape + out.ndim, 0) != out.shape + out.ndim;
    check(empty || out.shape[last] == 1 || out.strides[last] == 1, kName,
          ": grad_x's last axis must have stride 1, got ", out.strides[last]);
    args.grad_x = out.data;
    args.grad_x_step_stride = out.strides[last - 1];
    args.grad_x_batch_stride = out.ndim == 3 ? out.strides[0] : 0;
  }
  args.num_threads = threads(num_threads);
  nb::gil_scoped_release release;
  cpu::temporal_pool_backward(args);
}

}  // namespace

void bind_temporal_pool(nb::module_& module) {
  nb::class_<TemporalCell>(module, "TemporalCell")
      .def(nb::init<nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, int, bool>(),
           nb::sig("def __init__(self, cell: str, weight_ih: typing.Any, weight_hh: typing.Any, bias_ih: typing.Any = "
                   "None, bias_hh: typing.Any = None, weight_hr: typing.Any = None, num_threads: int = 0, int8: bool = "
                   "False) -> None"),
           nb::arg("cell").none(), nb::arg("weight_ih").none(), nb::arg("weight_hh").none(),
           nb::arg("bias_ih").none() = nb::none(), nb::arg("bias_hh").none() = nb::none(),
           nb::arg("weight_hr").none() = nb::none(), nb::arg("num_threads") = 0, nb::arg("int8") = false)
      .def_prop_ro("cell", [](const TemporalCell& self) { return name_of(self.shape().cell); })
      .def_prop_ro("dtype", [](const TemporalCell& self) { return name_of(self.shape().dtype); })
      .def_prop_ro("input_size", [](const TemporalCell& self) { return self.shape().input_size; })
      .def_prop_ro("hidden_size", [](const TemporalCell& self) { return self.shape().hidden_size; })
      .def_prop_ro("state_size", [](const TemporalCell& self) { return self.shape().state_size; })
      .def_prop_ro("nbytes", [](const TemporalCell& self) { return cpu::bytes_of(*self.packed()); });
  module.def(
      "temporal_pool", &temporal_pool,
      nb::sig("def temporal_pool(cell: TemporalCell, x: typing.Any, cu_seqlens: typing.Any, reverse: bool, "
              "pool: str, pool_weights: typing.Any, h0: typing.Any, c0: typing.Any, out: typing.Any, "
              "states: typing.Any, hn: typing.Any, cn: typing.Any, reserve: typing.Any, num_threads: int = 0) -> None"),
      nb::arg("cell"), nb::arg("x").none(), nb::arg("cu_seqlens").none(), nb::arg("reverse"), nb::arg("pool").none(),
      nb::arg("pool_weights").none(), nb::arg("h0").none(), nb::arg("c0").none(), nb::arg("out").none(),
      nb::arg("states").none(), nb::arg("hn").none(), nb::arg("cn").none(), nb::arg("reserve").none(),
      nb::arg("num_threads") = 0);
  module.def(
      "temporal_pool_backward", &temporal_pool_backward,
      nb::sig("def temporal_pool_backward(cell: str, x: typing.Any, cu_seqlens: typing.Any, weight_ih: typing.Any, "
              "weight_hh: typing.Any, bias_ih: typing.Any, bias_hh: typing.Any, weight_hr: typing.Any, reverse: bool, "
              "pool: str, pool_weights: typing.Any, h0: typing.Any, c0: typing.Any, states: typing.Any, "
              "reserve: typing.Any, grad_out: typing.Any, grad_states: typing.Any, grad_hn: typing.Any, "
              "grad_cn: typing.Any, grad_x: typing.Any, grad_weight_ih: typing.Any, grad_weight_hh: typing.Any, "
              "grad_bias_ih: typing.Any, grad_bias_hh: typing.Any, grad_weight_hr: typing.Any, grad_h0: typing.Any, "
              "grad_c0: typing.Any, grad_pool_weights: typing.Any, num_threads: int = 0) -> None"),
      nb::arg("cell").none(), nb::arg("x").none(), nb::arg("cu_seqlens").none(), nb::arg("weight_ih").none(),
      nb::arg("weight_hh").none(), nb::arg("bias_ih").none(), nb::arg("bias_hh").none(), nb::arg("weight_hr").none(),
      nb::arg("reverse"), nb::arg("pool").none(), nb::arg("pool_weights").none(), nb::arg("h0").none(),
      nb::arg("c0").none(), nb::arg("states").none(), nb::arg("reserve").none(), nb::arg("grad_out").none(),
      nb::arg("grad_states").none(), nb::arg("grad_hn").none(), nb::arg("grad_cn").none(), nb::arg("grad_x").none(),
      nb::arg("grad_weight_ih").none(), nb::arg("grad_weight_hh").none(), nb::arg("grad_bias_ih").none(),
      nb::arg("grad_bias_hh").none(), nb::arg("grad_weight_hr").none(), nb::arg("grad_h0").none(),
      nb::arg("grad_c0").none(), nb::arg("grad_pool_weights").none(), nb::arg("num_threads") = 0);
}

}  // namespace pycm::bind
