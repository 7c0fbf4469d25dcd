"""Temporal pooling as torch operators: one direction of one layer (`torch.ops.pycm.temporal_pool`), a pool alone
(`torch.ops.pycm.pool_states`), and their backward passes.

They trace (`torch.compile`, `torch.export`) and differentiate; a second derivative goes through
`pycm._torch_temporal_plain`, the same in torch's own operators.
"""

from __future__ import annotations

import atexit
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pycm import _C, _torch_temporal_cuda, _torch_temporal_runs
from pycm import _torch_temporal_plain as plain
from pycm._temporal_layers import GATES, RESERVE, width
from pycm._torch_arguments import _check_tangents
from pycm._torch_gradients import full_precision

_CELL = (
    "Tensor x, Tensor cu_seqlens, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
    "Tensor? weight_hr, Tensor? pool_weights, Tensor? h0, Tensor? c0, "
)
_CHOICES = "str cell, str pool, bool reverse"
# Pooled [B, W·P] (empty for the pool "none"), states [≥ S, P] (empty unless kept), h_n [B, P], c_n [B, H] (empty for a
# GRU), reserve [≥ S, R, H] (empty unless kept), in the working dtype. A gradient needs states and reserve. On CUDA the
# states are rounded to the weights' dtype, and the reserve is [runs - 1, B, H], as `_torch_temporal_runs` has it.
torch.library.define(
    "pycm::temporal_pool",
    f"({_CELL}{_CHOICES}, bool keep_states, bool keep_reserve) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
# The gradients of the tensors before, but of cu_seqlens, in the working dtype, on CUDA that of x in its own; empty
# where not needed.
torch.library.define(
    "pycm::temporal_pool_backward",
    f"({_CELL}Tensor states, Tensor reserve, Tensor? grad_pooled, Tensor? grad_states, Tensor? grad_h_n, "
    f"Tensor? grad_c_n, {_CHOICES}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("pycm::pool_states", "(Tensor x, Tensor cu_seqlens, Tensor? pool_weights, str pool) -> Tensor")
torch.library.define(
    "pycm::pool_states_backward",
    "(Tensor x, Tensor cu_seqlens, Tensor? pool_weights, Tensor grad, str pool, bool[] needs) -> (Tensor, Tensor)",
)

Optional = Tensor | None


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of states, sums and results."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- packed weights ----

# Compared beside the version counter, which a write through `.data` or through NumPy does not raise.
_SAMPLES = 512


class _Kept:
    """What was made of tensors and a choice, for as long as the tensors are what they were."""

    def __init__(self, choice: Any, tensors: Sequence[Optional], value: Any) -> None:
        self.choice, self.value = choice, value
        self.known = []
        for w in tensors:
            if w is not None:
                sample = _sample(w)
                # A view of the parameter is read again as it is; of what is not contiguous the sample is a copy.
                view = sample if w.is_contiguous() else None
                self.known.append((weakref.ref(w), w._version, w.data_ptr(), view, sample.clone()))

    def holds(self, choice: Any, tensors: Sequence[Optional]) -> bool:
        given = [w for w in tensors if w is not None]
        return (
            self.choice == choice
            and len(given) == len(self.known)
            and all(
                ref() is w
                and version == w._version
                and pointer == w.data_ptr()
                and torch.equal(_sample(w) if view is None else view, sample)
                for w, (ref, version, pointer, view, sample) in zip(given, self.known, strict=True)
            )
        )


def _cell(cell: str, weights: Sequence[Optional], int8: bool) -> Any:
    return _C.TemporalCell(cell, *[_dense(w) for w in weights], num_threads=torch.get_num_threads(), int8=int8)  # type: ignore[arg-type, misc]


# By the first of the weights; in their own dtype, and in 8 bits.
_packed: tuple[WeakTensorKeyDictionary, ...] = (WeakTensorKeyDictionary(), WeakTensorKeyDictionary())
_lowered: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
for _kept in _packed:
    atexit.register(_kept.clear)  # before the module's types go


def _pack(cell: str, weights: Sequence[Optional], int8: bool) -> Any:
    first = cast(Tensor, weights[0])
    if any(w is not None and w.is_inference() for w in weights):  # these have no version
        return _cell(cell, weights, int8)
    kept = packed(cell, weights, int8)
    if kept is None:
        kept = _cell(cell, weights, int8)
        _packed[int8][first] = _Kept(cell, weights, kept)
    return kept


def packed(cell: str, weights: Sequence[Optional], int8: bool) -> Any:
    """What `_pack` has kept of these, None where it has to pack."""
    kept = _packed[int8].get(cast(Tensor, weights[0]))  # type: ignore[no-untyped-call]
    return kept.value if kept is not None and kept.holds(cell, weights) else None


def lowered(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast for autocast, to the same tensor as before, so that its packed form is found again. Without a gradient."""
    if weight.is_inference() or weight.element_size() == 1:  # without a version, without a sample
        return weight.to(dtype)
    kept = _lowered.get(weight)  # type: ignore[no-untyped-call]
    if kept is None or not kept.holds(dtype, (weight,)):
        with torch.inference_mode(False), torch.no_grad():
            kept = _lowered[weight] = _Kept(dtype, (weight,), weight.to(dtype))
    return cast(Tensor, kept.value)


def forget(weights: Iterable[Tensor]) -> None:
    """Drop what is kept of them: `torch.utils.swap_tensors` refuses tensors with weak references."""
    for weight in weights:
        for kept in (*_packed, _lowered):
            kept.pop(weight, None)  # type: ignore[no-untyped-call]


def _sample(tensor: Tensor) -> Tensor:
    """Values of all rows and columns, as bits: a nan is unlike itself."""
    bits = tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    flat = bits.view(-1)
    step = max(1, flat.shape[0] // _SAMPLES)
    while math.gcd(step, tensor.shape[-1]) > 1:
        step += 1
    return flat[::step]


# ---- CPU kernels ----


def strided(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """As the kernels read it: the steps that belong to a sequence, neighbouring features."""
    x = x.detach().resolve_neg()
    x = x[: int(cu_seqlens[-1])] if x.ndim == 2 else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(tensor: Optional) -> Optional:
    return None if tensor is None else tensor.detach().resolve_neg().contiguous()


def temporal_pool_cpu(*args: Any, int8: bool = False) -> tuple[Tensor, ...]:
    x, cu_seqlens, *weights, pool_weights, h0, c0, cell, pool, reverse, keep_states, keep_reserve = args
    weight_ih, weight_hh, *_ = weights
    _check_tangents("temporal_pool", x=x, weight_ih=weight_ih, weight_hh=weight_hh)
    packed = _pack(cell, weights, int8)
    results = _results(x, cu_seqlens, weight_hh, cell, pool, keep_states, keep_reserve)
    pooled, states, h_n, c_n, reserve = results
    steps = int(cu_seqlens[-1])
    _C.temporal_pool(
        packed,
        strided(x, cu_seqlens),
        cu_seqlens.contiguous(),
        reverse,
        pool,
        _coefficients(pool_weights, pool, steps),
        _dense(h0),
        _dense(c0),
        None if pool == "none" else pooled,
        states[:steps] if keep_states else None,
        h_n,
        c_n if cell == "lstm" else None,
        reserve[:steps] if keep_reserve else None,
        torch.get_num_threads(),
    )
    return results


torch.library.impl("pycm::temporal_pool", "CPU")(temporal_pool_cpu)


def _coefficients(pool_weights: Optional, pool: str, steps: int) -> Optional:
    pool_weights = _dense(pool_weights)
    return pool_weights[:steps] if pool == "gpo" and pool_weights is not None else pool_weights


def _results(
    x: Tensor, cu_seqlens: Tensor, weight_hh: Tensor, cell: str, pool: str, keep_states: bool, keep_reserve: bool
) -> tuple[Tensor, ...]:
    batch, hidden, state = cu_seqlens.shape[0] - 1, weight_hh.shape[0] // GATES[cell], weight_hh.shape[1]
    most = x.shape[0] if x.ndim == 2 else x.shape[0] * x.shape[1]
    shapes = (
        (0,) if pool == "none" else (batch, width(pool) * state),
        (most if keep_states else 0, state),
        (batch, state),
        (batch, hidden) if cell == "lstm" else (0,),
        (most if keep_reserve else 0, RESERVE[cell], hidden),
    )
    return tuple(x.new_empty(shape, dtype=work_dtype(x.dtype)) for shape in shapes)


@torch.library.impl("pycm::temporal_pool_backward", "CPU")
def _temporal_pool_backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    x, cu_seqlens, *weights, pool_weights, h0, c0, states, reserve = args[:12]
    *incoming, cell, pool, reverse, needs = args[12:]
    steps = int(cu_seqlens[-1])
    inputs = (x, *weights, h0, c0, pool_weights)
    # Of x and of gpo's coefficients the kernels write the valid steps alone.
    partly = (True, *(False,) * 7, True)
    grads = tuple(
        _grad_like(tensor, x.dtype, need, zeros) for tensor, need, zeros in zip(inputs, needs, partly, strict=True)
    )
    wanted: list[Optional] = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    if needs[0] and x.ndim == 2:
        wanted[0] = grads[0][:steps]
    if needs[8] and pool == "gpo":
        wanted[8] = grads[8][:steps]
    if incoming[1] is not None:  # of the states
        incoming[1] = incoming[1][:steps]
    arguments: list[Any] = [
        *(cell, strided(x, cu_seqlens), cu_seqlens.contiguous(), *map(_dense, weights), reverse, pool),
        *(_coefficients(pool_weights, pool, steps), _dense(h0), _dense(c0)),
        *map(_dense, (states[:steps], reserve[:steps])),
        *map(_dense, incoming),
        *wanted,
        torch.get_num_threads(),
    ]
    _C.temporal_pool_backward(*arguments)
    return grads


def _grad_like(tensor: Optional, dtype: torch.dtype, need: bool, zeros: bool = True) -> Tensor:
    """Zeros or not yet written; a tensor without values for what nobody needs."""
    kind: dict[str, Any] = {"dtype": work_dtype(dtype), "device": None if tensor is None else tensor.device}
    if tensor is None or not need:
        return torch.empty(0, **kind)
    return torch.zeros(tensor.shape, **kind) if zeros else torch.empty(tensor.shape, **kind)


@torch.library.impl("pycm::pool_states", "CPU")
def _pool_states_cpu(x: Tensor, cu_seqlens: Tensor, pool_weights: Optional, pool: str) -> Tensor:
    _check_tangents("pool_states", x=x)
    out = x.new_empty((cu_seqlens.shape[0] - 1, width(pool) * x.shape[1]))
    steps = int(cu_seqlens[-1])
    weights = _coefficients(pool_weights, pool, steps)
    _C.pool_states(_dense(x[:steps]), cu_seqlens.contiguous(), pool, weights, out, torch.get_num_threads())
    return out


@torch.library.impl("pycm::pool_states_backward", "CPU")
def _pool_states_backward_cpu(
    x: Tensor, cu_seqlens: Tensor, pool_weights: Optional, grad: Tensor, pool: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    steps = int(cu_seqlens[-1])
    grad_x, grad_weights = (_grad_like(t, x.dtype, need) for t, need in zip((x, pool_weights), needs, strict=True))
    _C.pool_states_backward(
        _dense(x[:steps]),
        cu_seqlens.contiguous(),
        pool,
        _coefficients(pool_weights, pool, steps),
        _dense(grad),
        grad_x[:steps] if needs[0] else None,
        None if not needs[1] else grad_weights[:steps] if pool == "gpo" else grad_weights,
        torch.get_num_threads(),
    )
    return grad_x, grad_weights


for _op in ("temporal_pool", "temporal_pool_backward", "pool_states", "pool_states_backward"):
    torch.library.impl(f"pycm::{_op}", "CUDA", getattr(_torch_temporal_cuda, _op))


# ---- shapes without values ----


@torch.library.register_fake("pycm::temporal_pool")  # type: ignore[untyped-decorator]
def _temporal_pool_fake(*args: Any) -> tuple[Tensor, ...]:
    x, cu_seqlens, _, weight_hh, *_, cell, pool, _, keep_states, keep_reserve = args
    results = _results(x, cu_seqlens, weight_hh, cell, pool, keep_states, keep_reserve)
    if x.device.type != "cuda":
        return results
    pooled, states, h_n, c_n, _ = results
    batch = cu_seqlens.shape[0] - 1
    states = states.to(_torch_temporal_runs.states_dtype(pool, weight_hh.dtype))
    memory = _torch_temporal_runs.memory_shape(x, batch, cell, weight_hh, keep_reserve)
    return pooled, states, h_n, c_n, h_n.new_empty(memory)


@torch.library.register_fake("pycm::temporal_pool_backward")  # type: ignore[untyped-decorator]
def _temporal_pool_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, _, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, pool_weights, h0, c0, *_, needs = args
    inputs = (x, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, pool_weights)
    first, *others = (_grad_like(tensor, x.dtype, need) for tensor, need in zip(inputs, needs, strict=True))
    return first.to(x.dtype) if x.device.type == "cuda" and needs[0] else first, *others


@torch.library.register_fake("pycm::pool_states")  # type: ignore[untyped-decorator]
def _pool_states_fake(x: Tensor, cu_seqlens: Tensor, pool_weights: Optional, pool: str) -> Tensor:
    return x.new_empty((cu_seqlens.shape[0] - 1, width(pool) * x.shape[-1]))


@torch.library.register_fake("pycm::pool_states_backward")  # type: ignore[untyped-decorator]
def _pool_states_backward_fake(
    x: Tensor, cu_seqlens: Tensor, pool_weights: Optional, grad: Tensor, pool: str, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    return tuple(_grad_like(tensor, x.dtype, need) for tensor, need in zip((x, pool_weights), needs, strict=True))


# ---- gradients ----


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, cell, pool, reverse, keep_states, keep_reserve = inputs
    if not (keep_states and keep_reserve):
        raise ValueError("temporal_pool: keep_states and keep_reserve must be true where a gradient is wanted")
    ctx.set_materialize_grads(False)
    ctx.choices = cell, pool, reverse
    absent = (pool == "none", False, False, cell == "gru", True)
    ctx.mark_non_differentiable(*(out for out, none in zip(output, absent, strict=True) if none))
    ctx.save_for_backward(*tensors, output[1], output[4])


def _backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
    *tensors, states, reserve = ctx.saved_tensors
    grads = grads[:4]  # none of the reserve
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5, 6, 8, 9, 7)]
    if torch.is_grad_enabled():  # of a gradient that is itself to be differentiated
        found: Sequence[Optional] = _differentiable(plain.temporal_pool, (*tensors, *ctx.choices), needs_of(ctx), grads)
        return *found, *(None,) * 5
    with full_precision(states):
        gradients = torch.ops.pycm.temporal_pool_backward(*tensors, states, reserve, *grads, *ctx.choices, needs)
    cast_to = (tensors[i] for i in (0, 2, 3, 4, 5, 6, 8, 9, 7))
    x, *weights, h0, c0, pool_weights = (
        grad.to(tensor.dtype) if need else None for grad, tensor, need in zip(gradients, cast_to, needs, strict=True)
    )
    return x, None, *weights, pool_weights, h0, c0, *(None,) * 5


def needs_of(ctx: Any) -> list[bool]:
    return [bool(need) for need in ctx.needs_input_grad]


def _differentiable(
    function: Any, inputs: tuple[Any, ...], needs: Sequence[bool], grads: Sequence[Optional]
) -> list[Optional]:
    """The gradients of a function's tensors by autograd, with a graph of their own."""
    tensors = [tensor for tensor, need in zip(inputs, needs, strict=False) if need]
    with full_precision(inputs[0]):
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad
        ]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs], tensors, [grad for _, grad in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if need else None for _, need in zip(inputs, needs, strict=False)]


torch.library.register_autograd("pycm::temporal_pool", _backward, setup_context=_setup)


def _pool_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.pool = inputs[3]
    ctx.save_for_backward(*inputs[:3])


def _pool_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, cu_seqlens, pool_weights = ctx.saved_tensors
    if torch.is_grad_enabled():
        inputs = (x, cu_seqlens, pool_weights, ctx.pool)
        return tuple(_differentiable(plain.pool_states, inputs, needs_of(ctx), (grad,)))
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    found = torch.ops.pycm.pool_states_backward(x, cu_seqlens, pool_weights, grad, ctx.pool, needs)
    grad_x, grad_weights = (part if need else None for part, need in zip(found, needs, strict=True))
    return grad_x, None, grad_weights, None


torch.library.register_autograd("pycm::pool_states", _pool_backward, setup_context=_pool_setup)
