// The CUDA operations of temporal pooling: the recurrence, its scan and its reverse, and the pools.
#include <deque>
#include <initializer_list>

#include "bind/device_call.h"
#include "bind/ops.h"
#include "ops/pool_states.h"
#include "ops/temporal_recurrence.h"

namespace pycm::bind {
namespace {

// The arrays of one call, each contiguous, of a known dtype and shape, on one device.
class Arguments {
 public:
  explicit Arguments(const char* function) : function_(function) {}

  // The data, or null for None.
  void* input(const char* name, nb::handle object, DType dtype, std::initializer_list<int64_t> shape,
              Content content = Content::kFloat) {
    return data(name, object, dtype, shape, content, inputs);
  }
  void* result(const char* name, nb::handle object, DType dtype, std::initializer_list<int64_t> shape) {
    return data(name, object, dtype, shape, Content::kFloat, results);
  }
  const DeviceArg& add(const char* name, nb::handle object, Content content = Content::kFloat) {
    const DeviceArg& arg = arrays_.emplace_back(function_, name, object, content);
    check(arg.device() == arrays_.front().device(), function_, ": ", name, " must be on device ",
          arrays_.front().device(), ", got ", arg.device());
    return arg;
  }
  const char* function() const { return function_; }

  Arrays inputs, results;

  void* data(const char* name, nb::handle object, DType dtype, std::initializer_list<int64_t> shape, Content content,
             Arrays& list) {
    if (object.is_none()) return nullptr;
    const DeviceArg& arg = add(name, object, content);
    const Array& array = arg.array();
    if (content == Content::kFloat && array.dtype != dtype)
      throw TypeError(text(function_, ": ", name, " must be ", name_of(dtype), ", got ", name_of(array.dtype)));
    Array wanted;
    for (int64_t size : shape) wanted.shape[wanted.ndim++] = size;
    bool same = array.ndim == wanted.ndim, dense = true;
    int64_t count = 1;
    for (int d = wanted.ndim - 1; d >= 0; count *= wanted.shape[d--]) {
      same = same && array.shape[d] == wanted.shape[d];
      dense = dense && (array.shape[d] <= 1 || array.strides[d] == count);
    }
    check(same, function_, ": ", name, " must have shape ", Shape{wanted}, ", got ", arg.shape());
    check(dense || count == 0, function_, ": ", name, " must be contiguous");
    if (count > 0) list.push_back(&arg);
    return array.data;
  }

 private:
  const char* function_;
  std::deque<DeviceArg> arrays_;
};

DType work_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// What the recurrences share. `rows` are those of the inputs.
struct RecurrenceCall {
  Arguments arguments;
  RecurrenceShape shape;
  DType work = DType::kFloat32;
  int64_t gates = 0, rows = 0;

  RecurrenceCall(const char* function, nb::handle cell, nb::handle weight_hh, nb::handle weight_hr,
                 nb::handle cu_seqlens, nb::handle order, int64_t padded_steps, nb::handle step_starts,
                 nb::handle bounds, bool reverse, nb::handle h0, nb::handle c0, nb::handle inputs)
      : arguments(function) {
    shape.cell = parse_cell(function, string_arg(function, "cell", cell));
    const DeviceArg& matrix = arguments.add("weight_hh", weight_hh);
    gates = gates_of(shape.cell);
    check(matrix.array().ndim == 2 && matrix.size(0) > 0 && matrix.size(0) % gates == 0 && matrix.size(1) > 0, function,
          ": weight_hh must have shape [", gates, " * H, P], got ", matrix.shape());
    shape.dtype = matrix.array().dtype;
    shape.hidden = matrix.size(0) / gates;
    shape.state = matrix.size(1);
    work = work_of(shape.dtype);
    shape.weight_hh = arguments.input("weight_hh", weight_hh, shape.dtype, {gates * shape.hidden, shape.state});
    shape.weight_hr = arguments.input("weight_hr", weight_hr, shape.dtype, {shape.state, shape.hidden});
    check(weight_hr.is_none() ? shape.state == shape.hidden : shape.cell == Cell::kLstm, function,
          ": weight_hr must be given where weight_hh is not [G * H, H], and for lstm only");
    const DeviceArg& starts = arguments.add("cu_seqlens", cu_seqlens, Content::kInt64);
    check(starts.array().ndim == 1 && starts.size(0) >= 1, function, ": cu_seqlens must have shape [B + 1], got ",
          starts.shape());
    shape.batch = starts.size(0) - 1;
    shape.cu_seqlens = integers("cu_seqlens", cu_seqlens, shape.batch + 1);
    shape.order = integers("order", order, shape.batch);
    check(step_starts.is_none() == bounds.is_none() && (bounds.is_none() || padded_steps == 0), function,
          ": step_starts must be given with bounds and without padded_steps");
    if (!step_starts.is_none())
      shape.step_starts =
          integers("step_starts", step_starts, arguments.add("step_starts", step_starts, Content::kInt64).size(0));
    shape.bounds = integers("bounds", bounds, 2);
    check(padded_steps >= 0, function, ": padded_steps must not be negative, got ", padded_steps);
    shape.padded_steps = padded_steps;
    shape.reverse = reverse;
    shape.h0 = arguments.input("h0", h0, work, {shape.batch, shape.state});
    shape.c0 = arguments.input("c0", c0, work, {shape.batch, shape.hidden});
    const DeviceArg& products = arguments.add("inputs", inputs);
    check(products.array().ndim == 2, function, ": inputs must have shape [S, G * H], got ", products.shape());
    rows = products.size(0);
  }
  const int64_t* integers(const char* name, nb::handle object, int64_t count) {
    return static_cast<int64_t*>(arguments.input(name, object, DType::kFloat32, {count}, Content::kInt64));
  }
  // How many steps a ragged array has: by step the inputs may be those of a part of them.
  int64_t steps_of(const char* name, nb::handle object) {
    return shape.step_starts == nullptr || object.is_none() ? rows : arguments.add(name, object).size(0);
  }
  // States are in the working type or in the weights'.
  bool narrow(nb::handle states) {
    return work != shape.dtype && !states.is_none() && arguments.add("states", states).array().dtype == shape.dtype;
  }
  void* of_inputs(const char* name, nb::handle object) {
    return arguments.input(name, object, work, {rows, gates * shape.hidden});
  }
};

struct ForwardCall : RecurrenceCall {
  RecurrenceArgs args;

  ForwardCall(nb::handle cell, nb::handle weight_hh, nb::handle weight_hr, nb::handle cu_seqlens, nb::handle order,
              int64_t padded_steps, nb::handle step_starts, nb::handle bounds, bool reverse, nb::handle h0,
              nb::handle c0, nb::handle inputs, nb::handle input_rows, nb::handle hidden_bias, nb::handle pool,
              nb::handle out, nb::handle states, nb::handle hn, nb::handle cn)
      : RecurrenceCall("temporal_pool", cell, weight_hh, weight_hr, cu_seqlens, order, padded_steps, step_starts,
                       bounds, reverse, h0, c0, inputs) {
    args.shape = shape;
    args.inputs = of_inputs("inputs", inputs);
    if (!input_rows.is_none()) {  // a step for each
      rows = arguments.add("input_rows", input_rows, Content::kInt64).size(0);
      args.input_rows = integers("input_rows", input_rows, rows);
    }
    check(shape.padded_steps == 0 || rows == shape.batch * shape.padded_steps, arguments.function(), ": ",
          input_rows.is_none() ? "inputs" : "input_rows", " must have ", shape.batch * shape.padded_steps,
          " rows, got ", rows);
    args.hidden_bias = arguments.input("hidden_bias", hidden_bias, work, {shape.hidden});
    args.pool = parse_pool(arguments.function(), string_arg(arguments.function(), "pool", pool));
    check(args.pool != Pool::kAttention && args.pool != Pool::kGpo, arguments.function(),
          ": pool must be one that streams, got ", name_of(args.pool));
    check(out.is_none() == (args.pool == Pool::kNone), arguments.function(), ": out must be ",
          args.pool == Pool::kNone ? "None" : "given", " for pool ", name_of(args.pool));
    args.out = arguments.result("out", out, work, {shape.batch, width_of(args.pool) * shape.state});
    args.narrow_states = narrow(states);
    args.states = arguments.result("states", states, args.narrow_states ? shape.dtype : work,
                                   {steps_of("states", states), shape.state});
    args.hn = arguments.result("hn", hn, work, {shape.batch, shape.state});
    args.cn = arguments.result("cn", cn, work, {shape.batch, shape.hidden});
    check(!hn.is_none() && cn.is_none() == (shape.cell != Cell::kLstm), arguments.function(),
          ": hn must be given, and cn for lstm");
    // What an earlier call has left there is read.
    if (shape.h0 == args.hn) arguments.input("out", out, work, {shape.batch, width_of(args.pool) * shape.state});
  }
};

struct ScanCall : RecurrenceCall {
  RecurrenceScanArgs args;

  ScanCall(nb::handle weight_hh, nb::handle weight_hr, nb::handle cu_seqlens, nb::handle order, nb::handle step_starts,
           nb::handle bounds, nb::handle c0, nb::handle inputs, nb::handle c, nb::handle m, nb::handle cn)
      : RecurrenceCall("temporal_pool_scan", nb::str("lstm"), weight_hh, weight_hr, cu_seqlens, order, 0, step_starts,
                       bounds, false, nb::none(), c0, inputs) {
    args.shape = shape;
    args.inputs = of_inputs("inputs", inputs);
    args.c = arguments.result("c", c, work, {rows, shape.hidden});
    args.m = arguments.result("m", m, work, {rows, shape.hidden});
    args.cn = arguments.result("cn", cn, work, {shape.batch, shape.hidden});
  }
};

struct BackwardCall : RecurrenceCall {
  RecurrenceBackwardArgs args;

  BackwardCall(nb::handle cell, nb::handle weight_hh, nb::handle weight_hr, nb::handle cu_seqlens, nb::handle order,
               nb::handle step_starts, nb::handle bounds, bool reverse, nb::handle h0, nb::handle c0, nb::handle inputs,
               nb::handle hidden, nb::handle states, nb::handle c, nb::handle grad_states, nb::handle grad_every,
               nb::handle grad_first, nb::handle grad_last, nb::handle grad_hn, nb::handle grad_cn, nb::handle grad_h0,
               nb::handle grad_c0)
      : RecurrenceCall("temporal_pool_backward", cell, weight_hh, weight_hr, cu_seqlens, order, 0, step_starts, bounds,
                       reverse, h0, c0, inputs) {
    args.shape = shape;
    args.inputs = of_inputs("inputs", inputs);
    args.hidden = of_inputs("hidden", hidden);
    args.narrow_states = narrow(states);
    args.states = arguments.input("states", states, args.narrow_states ? shape.dtype : work,
                                  {steps_of("states", states), shape.state});
    args.c = arguments.input("c", c, work, {rows, shape.hidden});
    args.grad_states = arguments.input("grad_states", grad_states, work, {rows, shape.state});
    args.grad_every = arguments.input("grad_every", grad_every, work, {shape.batch, shape.state});
    args.grad_first = arguments.input("grad_first", grad_first, work, {shape.batch, shape.state});
    args.grad_last = arguments.input("grad_last", grad_last, work, {shape.batch, shape.state});
    args.grad_hn = arguments.input("grad_hn", grad_hn, work, {shape.batch, shape.state});
    args.grad_cn = arguments.input("grad_cn", grad_cn, work, {shape.batch, shape.hidden});
    args.grad_h0 = arguments.result("grad_h0", grad_h0, work, {shape.batch, shape.state});
    args.grad_c0 = arguments.result("grad_c0", grad_c0, work, {shape.batch, shape.hidden});
    const bool lstm = shape.cell == Cell::kLstm;
    check(hidden.is_none() == lstm && states.is_none() == lstm && c.is_none() != lstm, arguments.function(),
          ": c must be given for lstm, hidden and states for gru");
    check(weight_hr.is_none() || !grad_states.is_none(), arguments.function(),
          ": grad_states must be given with weight_hr");
  }
};

struct PoolCall {
  Arguments arguments;
  PoolStatesDeviceArgs args;
  bool weighs = false;
  int64_t weights = 0;  // how many

  PoolCall(const char* function, nb::handle x, nb::handle cu_seqlens, nb::handle pool, nb::handle pool_weights)
      : arguments(function) {
    PoolStatesArgs& states = args.pool;
    const DeviceArg& values = arguments.add("x", x);
    args.x_dtype = values.array().dtype;
    states.dtype = work_of(args.x_dtype);
    check(values.array().ndim == 2, function, ": x must have shape [S, F], got ", values.shape());
    args.rows = values.size(0);
    states.dim = values.size(1);
    states.x = arguments.input("x", x, args.x_dtype, {args.rows, states.dim});
    const DeviceArg& starts = arguments.add("cu_seqlens", cu_seqlens, Content::kInt64);
    check(starts.array().ndim == 1 && starts.size(0) >= 1, function, ": cu_seqlens must have shape [B + 1], got ",
          starts.shape());
    states.batch = starts.size(0) - 1;
    states.cu_seqlens = integers("cu_seqlens", cu_seqlens, {states.batch + 1});
    const Pool kind = states.pool.pool = parse_pool(function, string_arg(function, "pool", pool));
    const bool alone = kind == Pool::kMean || kind == Pool::kMax || kind == Pool::kMeanMax ||
                       kind == Pool::kAttention || kind == Pool::kGpo;
    check(alone, function, ": pool must be mean, max, meanmax, attention or gpo, got '", name_of(kind), "'");
    weighs = kind == Pool::kAttention || kind == Pool::kGpo;
    check(pool_weights.is_none() != weighs, function, ": pool_weights must be ", weighs ? "given" : "None",
          " for pool ", name_of(kind));
    weights = kind == Pool::kGpo ? args.rows : states.dim;
    states.pool.weights = arguments.input("pool_weights", pool_weights, states.dtype, {weights});
    width_ = width_of(kind) * states.dim;
  }
  int64_t* integers(const char* name, nb::handle object, std::initializer_list<int64_t> shape) {
    return static_cast<int64_t*>(arguments.input(name, object, DType::kFloat32, shape, Content::kInt64));
  }
  void out(nb::handle object) {
    args.out = arguments.result("out", object, args.pool.dtype, {args.pool.batch, width_});
  }
  void grad_out(nb::handle object) {
    args.grad_out = arguments.input("grad_out", object, args.pool.dtype, {args.pool.batch, width_});
  }
  // Written by one part of the backward pass, read by the other.
  void summary(nb::handle object, bool written) {
    const Pool kind = args.pool.pool.pool;
    const bool summed = kind == Pool::kMax || kind == Pool::kMeanMax || kind == Pool::kAttention;
    check(object.is_none() != summed, arguments.function(), ": summary must be ", summed ? "given" : "None",
          " for pool ", name_of(kind));
    Arrays& list = written ? arguments.results : arguments.inputs;
    if (kind == Pool::kAttention)
      args.summary = arguments.data("summary", object, args.pool.dtype, {2, args.rows}, Content::kFloat, list);
    else
      args.summary =
          arguments.data("summary", object, DType::kFloat32, {args.pool.batch, args.pool.dim}, Content::kInt64, list);
  }

 private:
  int64_t width_ = 0;
};

struct PoolForwardCall : PoolCall {
  PoolForwardCall(nb::handle x, nb::handle starts, nb::handle pool, nb::handle weights, nb::handle out_)
      : PoolCall("pool_states", x, starts, pool, weights) {
    out(out_);
  }
};

// grad_pool_weights is None where it is not wanted.
struct PoolSummaryCall : PoolCall {
  PoolSummaryCall(nb::handle x, nb::handle starts, nb::handle pool, nb::handle pool_weights, nb::handle grad,
                  nb::handle summary_, nb::handle grad_pool_weights)
      : PoolCall("pool_states_backward", x, starts, pool, pool_weights) {
    grad_out(grad);
    summary(summary_, true);
    check(weighs || grad_pool_weights.is_none(), arguments.function(), ": grad_pool_weights must be None for pool ",
          name_of(args.pool.pool.pool));
    args.grad_pool_weights = arguments.result("grad_pool_weights", grad_pool_weights, args.pool.dtype, {weights});
  }
};

struct PoolGradientCall : PoolCall {
  PoolGradientCall(nb::handle x, nb::handle starts, nb::handle pool, nb::handle pool_weights, nb::handle grad,
                   nb::handle summary_, nb::handle vectors, nb::handle rows_of, nb::handle grad_x)
      : PoolCall("pool_states_backward", x, starts, pool, pool_weights) {
    grad_out(grad);
    summary(summary_, false);
    const DeviceArg& chosen = arguments.add("vectors", vectors, Content::kInt64);
    check(chosen.array().ndim == 1, arguments.function(), ": vectors must have shape [C], got ", chosen.shape());
    args.count = chosen.size(0);
    args.vectors = integers("vectors", vectors, {args.count});
    args.rows_of = integers("rows_of", rows_of, {args.count});
    args.grad_x = arguments.input("grad_x", grad_x, args.pool.dtype, {args.count, args.pool.dim});
  }
};

template <class Call, class Args>
void queue(const Call& call, const Args& args, void (*operation)(const Args&, const CudaContext&),
           int64_t (*bytes)(const Args&), nb::handle workspace, uintptr_t stream) {
  run(call.arguments.function(), operation, args, bytes(args), workspace, stream, call.arguments.inputs,
      call.arguments.results);
}

constexpr const char* kForwardArguments =
    "cell: str, weight_hh: typing.Any, weight_hr: typing.Any, cu_seqlens: typing.Any, order: typing.Any, "
    "padded_steps: int, step_starts: typing.Any, bounds: typing.Any, reverse: bool, h0: typing.Any, c0: typing.Any, "
    "inputs: typing.Any, input_rows: typing.Any, hidden_bias: typing.Any, pool: str, out: typing.Any, states: "
    "typing.Any, hn: typing.Any, cn: "
    "typing.Any";
constexpr const char* kScanArguments =
    "weight_hh: typing.Any, weight_hr: typing.Any, cu_seqlens: typing.Any, order: typing.Any, step_starts: typing.Any, "
    "bounds: typing.Any, c0: typing.Any, inputs: typing.Any, c: typing.Any, m: typing.Any, cn: typing.Any";
constexpr const char* kBackwardArguments =
    "cell: str, weight_hh: typing.Any, weight_hr: typing.Any, cu_seqlens: typing.Any, order: typing.Any, "
    "step_starts: typing.Any, bounds: typing.Any, reverse: bool, h0: typing.Any, c0: typing.Any, inputs: typing.Any, "
    "hidden: typing.Any, states: typing.Any, c: typing.Any, grad_states: typing.Any, grad_every: typing.Any, "
    "grad_first: typing.Any, grad_last: typing.Any, grad_hn: typing.Any, grad_cn: "
    "typing.Any, grad_h0: typing.Any, "
    "grad_c0: typing.Any";
constexpr const char* kPoolArguments =
    "x: typing.Any, cu_seqlens: typing.Any, pool: str, pool_weights: typing.Any, out: typing.Any";
constexpr const char* kPoolSummaryArguments =
    "x: typing.Any, cu_seqlens: typing.Any, pool: str, pool_weights: typing.Any, grad_out: typing.Any, "
    "summary: typing.Any, grad_pool_weights: typing.Any";
constexpr const char* kPoolGradientArguments =
    "x: typing.Any, cu_seqlens: typing.Any, pool: str, pool_weights: typing.Any, grad_out: typing.Any, "
    "summary: typing.Any, vectors: typing.Any, rows_of: typing.Any, grad_x: typing.Any";

using H = nb::handle;

template <class Bytes, class Call, class... Extra>
void define(nb::module_& module, const char* name, const char* arguments, Bytes bytes, Call call,
            const Extra&... extra) {
  // nanobind copies the signatures.
  const std::string size = text("def ", name, "_workspace_bytes(", arguments, ") -> int");
  const std::string whole = text("def ", name, "(", arguments, ", workspace: typing.Any, stream: int) -> None");
  module.def(text(name, "_workspace_bytes").c_str(), bytes, nb::sig(size.c_str()), extra...);
  module.def(name, call, nb::sig(whole.c_str()), extra..., nb::arg("workspace"), nb::arg("stream"));
}

}  // namespace

void bind_cuda_temporal(nb::module_& module) {
  define(
      module, "cuda_temporal_recurrence", kForwardArguments,
      [](H cell, H hh, H hr, H starts, H order, int64_t padded, H step_starts, H bounds, bool reverse, H h0, H c0,
         H inputs, H input_rows, H bias, H pool, H out, H states, H hn, H cn) {
        return cuda::recurrence_workspace_bytes(ForwardCall(cell, hh, hr, starts, order, padded, step_starts, bounds,
                                                            reverse, h0, c0, inputs, input_rows, bias, pool, out,
                                                            states, hn, cn)
                                                    .args);
      },
      [](H cell, H hh, H hr, H starts, H order, int64_t padded, H step_starts, H bounds, bool reverse, H h0, H c0,
         H inputs, H input_rows, H bias, H pool, H out, H states, H hn, H cn, H workspace, uintptr_t stream) {
        const ForwardCall call(cell, hh, hr, starts, order, padded, step_starts, bounds, reverse, h0, c0, inputs,
                               input_rows, bias, pool, out, states, hn, cn);
        queue(call, call.args, &cuda::recurrence, &cuda::recurrence_workspace_bytes, workspace, stream);
      },
      nb::arg("cell"), nb::arg("weight_hh"), nb::arg("weight_hr").none(), nb::arg("cu_seqlens"), nb::arg("order"),
      nb::arg("padded_steps"), nb::arg("step_starts").none(), nb::arg("bounds").none(), nb::arg("reverse"),
      nb::arg("h0").none(), nb::arg("c0").none(), nb::arg("inputs"), nb::arg("input_rows").none(),
      nb::arg("hidden_bias").none(), nb::arg("pool"), nb::arg("out").none(), nb::arg("states").none(), nb::arg("hn"),
      nb::arg("cn").none());
  define(
      module, "cuda_temporal_scan", kScanArguments,
      [](H hh, H hr, H starts, H order, H step_starts, H bounds, H c0, H inputs, H c, H m, H cn) {
        return cuda::recurrence_scan_workspace_bytes(
            ScanCall(hh, hr, starts, order, step_starts, bounds, c0, inputs, c, m, cn).args);
      },
      [](H hh, H hr, H starts, H order, H step_starts, H bounds, H c0, H inputs, H c, H m, H cn, H workspace,
         uintptr_t stream) {
        const ScanCall call(hh, hr, starts, order, step_starts, bounds, c0, inputs, c, m, cn);
        queue(call, call.args, &cuda::recurrence_scan, &cuda::recurrence_scan_workspace_bytes, workspace, stream);
      },
      nb::arg("weight_hh"), nb::arg("weight_hr").none(), nb::arg("cu_seqlens"), nb::arg("order"),
      nb::arg("step_starts"), nb::arg("bounds"), nb::arg("c0").none(), nb::arg("inputs"), nb::arg("c"),
      nb::arg("m").none(), nb::arg("cn").none());
  define(
      module, "cuda_temporal_recurrence_backward", kBackwardArguments,
      [](H cell, H hh, H hr, H starts, H order, H step_starts, H bounds, bool reverse, H h0, H c0, H inputs, H hidden,
         H states, H c, H grad_states, H grad_every, H grad_first, H grad_last, H grad_hn, H grad_cn, H grad_h0,
         H grad_c0) {
        return cuda::recurrence_backward_workspace_bytes(
            BackwardCall(cell, hh, hr, starts, order, step_starts, bounds, reverse, h0, c0, inputs, hidden, states, c,
                         grad_states, grad_every, grad_first, grad_last, grad_hn, grad_cn, grad_h0, grad_c0)
                .args);
      },
      [](H cell, H hh, H hr, H starts, H order, H step_starts, H bounds, bool reverse, H h0, H c0, H inputs, H hidden,
         H states, H c, H grad_states, H grad_every, H grad_first, H grad_last, H grad_hn, H grad_cn, H grad_h0,
         H grad_c0, H workspace, uintptr_t stream) {
        const BackwardCall call(cell, hh, hr, starts, order, step_starts, bounds, reverse, h0, c0, inputs, hidden,
                                states, c, grad_states, grad_every, grad_first, grad_last, grad_hn, grad_cn, grad_h0,
                                grad_c0);
        queue(call, call.args, &cuda::recurrence_backward, &cuda::recurrence_backward_workspace_bytes, workspace,
              stream);
      },
      nb::arg("cell"), nb::arg("weight_hh"), nb::arg("weight_hr").none(), nb::arg("cu_seqlens"), nb::arg("order"),
      nb::arg("step_starts"), nb::arg("bounds"), nb::arg("reverse"), nb::arg("h0").none(), nb::arg("c0").none(),
      nb::arg("inputs"), nb::arg("hidden").none(), nb::arg("states").none(), nb::arg("c").none(),
      nb::arg("grad_states").none(), nb::arg("grad_every").none(), nb::arg("grad_first").none(),
      nb::arg("grad_last").none(), nb::arg("grad_hn").none(), nb::arg("grad_cn").none(), nb::arg("grad_h0").none(),
      nb::arg("grad_c0").none());
  define(
      module, "cuda_pool_states", kPoolArguments,
      [](H x, H starts, H pool, H weights, H out) {
        return cuda::pool_states_workspace_bytes(PoolForwardCall(x, starts, pool, weights, out).args);
      },
      [](H x, H starts, H pool, H weights, H out, H workspace, uintptr_t stream) {
        const PoolForwardCall call(x, starts, pool, weights, out);
        queue(call, call.args, &cuda::pool_states, &cuda::pool_states_workspace_bytes, workspace, stream);
      },
      nb::arg("x"), nb::arg("cu_seqlens"), nb::arg("pool"), nb::arg("pool_weights").none(), nb::arg("out"));
  define(
      module, "cuda_pool_states_summary", kPoolSummaryArguments,
      [](H x, H starts, H pool, H weights, H grad, H summary, H grad_weights) {
        return cuda::pool_states_summary_workspace_bytes(
            PoolSummaryCall(x, starts, pool, weights, grad, summary, grad_weights).args);
      },
      [](H x, H starts, H pool, H weights, H grad, H summary, H grad_weights, H workspace, uintptr_t stream) {
        const PoolSummaryCall call(x, starts, pool, weights, grad, summary, grad_weights);
        queue(call, call.args, &cuda::pool_states_summary, &cuda::pool_states_summary_workspace_bytes, workspace,
              stream);
      },
      nb::arg("x"), nb::arg("cu_seqlens"), nb::arg("pool"), nb::arg("pool_weights").none(), nb::arg("grad_out"),
      nb::arg("summary").none(), nb::arg("grad_pool_weights").none());
  define(
      module, "cuda_pool_states_gradient", kPoolGradientArguments,
      [](H x, H starts, H pool, H weights, H grad, H summary, H vectors, H rows, H grad_x) {
        return cuda::pool_states_gradient_workspace_bytes(
            PoolGradientCall(x, starts, pool, weights, grad, summary, vectors, rows, grad_x).args);
      },
      [](H x, H starts, H pool, H weights, H grad, H summary, H vectors, H rows, H grad_x, H workspace,
         uintptr_t stream) {
        const PoolGradientCall call(x, starts, pool, weights, grad, summary, vectors, rows, grad_x);
        queue(call, call.args, &cuda::pool_states_gradient, &cuda::pool_states_gradient_workspace_bytes, workspace,
              stream);
      },
      nb::arg("x"), nb::arg("cu_seqlens"), nb::arg("pool"), nb::arg("pool_weights").none(), nb::arg("grad_out"),
      nb::arg("summary").none(), nb::arg("vectors"), nb::arg("rows_of"), nb::arg("grad_x"));
}

}  // namespace pycm::bind
