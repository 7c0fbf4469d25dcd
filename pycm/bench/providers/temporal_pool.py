"""Mean of an LSTM's or GRU's states over sequences of different lengths; with `train` its gradients too."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..cases import Case
from ..features import UnavailableError
from ..sequences import GATES, Frames
from .base import Call, Provider, use


def _tensors(case: Any, data: Any) -> tuple[Any, Any, dict[str, Any]]:
    """x, lengths and parameters in the case's dtype."""
    torch = use("torch")
    dtype = torch.float32 if case.dtype == "int8" else getattr(torch, case.dtype)
    frames: Frames = data.frames
    weights = {name: torch.from_numpy(w).to(dtype).requires_grad_(case.train) for name, w in frames.weights.items()}
    return torch.from_numpy(frames.x).to(dtype).requires_grad_(case.train), torch.from_numpy(frames.lengths), weights


def _timed(case: Any, pool: Callable[[], Any], inputs: list[Any]) -> Call:
    """The pooled rows; in training also the gradients of x and of the recurrent weights."""
    torch = use("torch")

    def forward() -> Any:
        with torch.no_grad():
            return pool().float().numpy()

    def step() -> Any:
        pooled = pool()
        grads = torch.autograd.grad(pooled.float().square().sum(), inputs)
        return pooled.detach().float().numpy(), grads[0].float().numpy(), grads[2].float().numpy()

    return step if case.train else forward


def pycm_pool(case: Case, data: Any) -> Call:
    """pycm.temporal_pool of padded frames and their lengths"""
    import pycm

    x, lengths, weights = _tensors(case, data)
    cell, int8 = case.cell, case.dtype == "int8"  # type: ignore[attr-defined]
    return _timed(
        case,
        lambda: pycm.temporal_pool(x, lengths, weights, cell, "mean", int8_weights=int8),
        [x, *weights.values()],
    )


def _rnn(case: Any, weights: dict[str, Any]) -> Any:
    torch = use("torch")
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[case.cell]
    rnn = kind(case.frame_size, case.dim, case.layers, batch_first=True)
    for name, weight in weights.items():
        setattr(rnn, name, torch.nn.Parameter(weight.detach(), requires_grad=case.train))
    if case.dtype != "int8":
        return rnn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(rnn), {kind})[0]


def _mean(states: Any, lengths: Any) -> Any:
    torch = use("torch")
    valid = (torch.arange(states.shape[1]) < lengths[:, None]).unsqueeze(-1)
    return (states * valid).sum(1) / lengths[:, None]


def torch_padded(case: Case, data: Any) -> Call:
    """nn.LSTM or nn.GRU over all T steps, then the masked mean; 8-bit weights by quantize_dynamic"""
    x, lengths, weights = _tensors(case, data)
    rnn = _rnn(case, weights)
    inputs = [x, *(getattr(rnn, name) for name in weights)] if case.train else []  # type: ignore[attr-defined]
    return _timed(case, lambda: _mean(rnn(x)[0], lengths), inputs)


def torch_packed(case: Case, data: Any) -> Call:
    """the same of a packed sequence; packing and unpacking are part of it, sorting is not"""
    if not case.ragged:  # type: ignore[attr-defined]
        raise UnavailableError("nothing to pack: rows of one length")
    torch = use("torch")
    utils = use("torch.nn.utils.rnn")
    x, lengths, weights = _tensors(case, data)
    rnn = _rnn(case, weights)
    order = torch.argsort(lengths, descending=True)
    back, ordered, falling = torch.argsort(order), x.detach()[order].requires_grad_(x.requires_grad), lengths[order]

    def pool() -> Any:
        packed = rnn(utils.pack_padded_sequence(ordered, falling, batch_first=True))[0]
        return _mean(utils.pad_packed_sequence(packed, batch_first=True)[0], falling)[back]

    if not case.train:  # type: ignore[attr-defined]
        return _timed(case, pool, [])
    timed = _timed(case, pool, [ordered, *(getattr(rnn, name) for name in weights)])

    def step() -> Any:
        pooled, grad_x, grad_hh = timed()
        return pooled, grad_x[back.numpy()], grad_hh

    return step


def onnx_runtime(case: Case, data: Any) -> Call:
    """ONNX Runtime's LSTM or GRU with sequence_lens, then the mean; an LSTM's 8-bit weights by quantize_dynamic"""
    cell, int8 = case.cell, case.dtype == "int8"  # type: ignore[attr-defined]
    if case.train or case.dtype not in ("float32", "int8"):  # type: ignore[attr-defined]
        raise UnavailableError("runs inference in float32, or with 8-bit weights")
    if int8 and cell == "gru":
        raise UnavailableError("has no 8-bit GRU")
    onnx, runtime = use("onnx"), use("onnxruntime")
    frames: Frames = data.frames
    # Its gates are i o f c, and z r h.
    order = [0, 3, 1, 2] if cell == "lstm" else [1, 0, 2]
    w = {
        name: np.concatenate([np.split(array, GATES[cell])[gate] for gate in order])
        for name, array in frames.weights.items()
    }
    helper, kinds = onnx.helper, onnx.TensorProto
    extra = {"linear_before_reset": 1} if cell == "gru" else {}
    tensors, nodes, steps = {"time": np.array([0]), "direction": np.array([1])}, [], "X"
    for layer in range(len(w) // 4):
        names = [f"{name}{layer}" for name in ("W", "R", "B")]
        biases = np.concatenate([w[f"bias_ih_l{layer}"], w[f"bias_hh_l{layer}"]])
        values = (w[f"weight_ih_l{layer}"][None], w[f"weight_hh_l{layer}"][None], biases[None])
        tensors.update(zip(names, values, strict=True))
        states, after = f"Y{layer}", f"X{layer + 1}"
        nodes += [
            helper.make_node(cell.upper(), [steps, *names, "lengths"], [states], hidden_size=case.dim, **extra),
            helper.make_node("Squeeze", [states, "direction"], [after]),
        ]
        steps = after
    nodes += [
        helper.make_node("ReduceSum", [steps, "time"], ["sum"], keepdims=0),
        helper.make_node("Div", ["sum", "counts"], ["mean"]),
    ]
    inputs = [
        helper.make_tensor_value_info("X", kinds.FLOAT, [case.gallery, case.queries, frames.x.shape[2]]),
        helper.make_tensor_value_info("lengths", kinds.INT32, [case.queries]),
        helper.make_tensor_value_info("counts", kinds.FLOAT, [case.queries, 1]),
    ]
    output = helper.make_tensor_value_info("mean", kinds.FLOAT, [case.queries, case.dim])
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "pool", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = use("torch").get_num_threads()
    if int8:
        model = _quantized(model)
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {
        "X": np.ascontiguousarray(frames.x.swapaxes(0, 1)),
        "lengths": frames.lengths.astype(np.int32),
        "counts": frames.lengths.astype(np.float32)[:, None],
    }
    return lambda: session.run(None, feed)[0]


def _quantized(model: Any) -> Any:
    """An ONNX model with weights of 8 bits, a scale for each row."""
    onnx, quantization = use("onnx"), use("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        quantization.quantize_dynamic(model, path, per_channel=True, weight_type=quantization.QuantType.QInt8)
        return onnx.load(path)


def check(case: Any, data: Any, result: Any, first: Any) -> str | None:
    """What is wrong with a result: pooled rows against the specification, gradients against the first provider's."""
    from ... import reference

    pooled, *grads = result if case.train else (result,)
    frames: Frames = data.frames
    rows = [0, case.queries - 1]
    want = reference.temporal_pool(
        [frames.x[row, : frames.lengths[row]] for row in rows], frames.weights, case.cell, "mean"
    ).pooled
    error = float(np.abs(pooled[rows] - want).max())
    tolerance = 1e-4 if case.dtype == "float32" else 3e-2
    if error > tolerance:
        return f"off by {error:.1e}"
    for ours, theirs in zip(grads, () if first is None else first[1:], strict=False):
        error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        if error > tolerance:
            return f"a gradient is off by {error:.1e} of the largest"
    return None


PROVIDERS = (
    Provider("pycm", pycm_pool),
    Provider("torch-padded", torch_padded, ("torch",)),
    Provider("torch-packed", torch_packed, ("torch",)),
    Provider("onnxruntime", onnx_runtime, ("onnxruntime", "onnx")),
)
