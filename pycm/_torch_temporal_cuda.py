"""Temporal pooling on CUDA: products over many steps by torch, what goes step by step by kernels. See `_torch_cuda`.

The inputs' product, and what the backward pass computes again, is held for one run of steps at a time: see
`_torch_temporal_runs`. A forward pass of one run reads x where it lies. What a training step holds for each step of T
is the states, in the weights' type unless they are the result, and the gradient of x in x's; between runs, c.
CONTRIBUTING.md counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pycm import _torch_cuda
from pycm._temporal_layers import GATES, width
from pycm._torch_arguments import _check_devices, _check_tangents, _plain, _score_dtype
from pycm._torch_temporal_runs import (
    LINEAR,
    Division,
    Run,
    Runs,
    Steps,
    memory_shape,
    most_steps,
    states_dtype,
    training_runs,
)

Optional = Tensor | None
# Those that the recurrence computes as it goes.
_STREAMING = ("last", "first", "mean", "max", "meanmax", "lastmean", "none")
# Whether torch.mm takes out_dtype (torch 2.8); else 16-bit operands are widened, which gives the same sums more slowly.
_WIDE_SUMS = hasattr(torch.ops.aten.mm, "dtype")


def _steps(function: str, x: Tensor, cu_seqlens: Tensor, reverse: bool = False) -> Steps:
    starts = cu_seqlens.contiguous()
    lengths = starts.diff()
    most = x.shape[1] if x.ndim == 3 else x.shape[0]
    inside = (lengths >= 0).all() & (starts[0] == 0) & (starts[-1] <= x.shape[:-1].numel()) & (lengths <= most).all()
    torch._assert_async(inside, f"{function}: lengths must be in [0, {most}], and cu_seqlens rise from 0")
    order = torch.argsort(lengths, descending=True, stable=True)
    return Steps(_plain(x).reshape(-1, x.shape[-1]), starts, order, x.shape[1] if x.ndim == 3 else 0, reverse)


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b of operands rounded to `dtype`, in the working dtype: products of 16-bit numbers are summed in fp32."""
    work = _score_dtype(dtype)
    a, b = a.to(dtype), b.to(dtype)
    if _WIDE_SUMS and a.is_cuda and dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=work)
    return a.to(work) @ b.to(work)


def _inputs(x: Tensor, weight_ih: Tensor, bias: Optional) -> Tensor:
    """The inputs' share of the gates, [rows of x, G·H]."""
    product = _mm(x, _plain(weight_ih).T, weight_ih.dtype)
    return product if bias is None else product.add_(bias)


def _biases(cell: str, bias_ih: Optional, bias_hh: Optional, hidden: int) -> tuple[Optional, Optional]:
    """Of the inputs' product, and what a GRU adds to the state's share of its candidate."""
    if bias_ih is None or bias_hh is None:
        return None, None
    work = _score_dtype(bias_ih.dtype)
    first, second = _plain(bias_ih).to(work), _plain(bias_hh).to(work)
    if cell == "lstm":
        return first + second, None
    gates = 2 * hidden
    return torch.cat([first[:gates] + second[:gates], first[gates:]]), second[gates:].contiguous()


def _dense(tensor: Optional) -> Optional:
    return None if tensor is None else _plain(tensor).contiguous()


def temporal_pool(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator of the same name; attention and gpo are pooled from the states, by a second kernel."""
    return forward(x, None, *arguments)


def forward(
    x: Tensor,
    table: Optional,
    cu_seqlens: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Optional,
    bias_hh: Optional,
    weight_hr: Optional,
    pool_weights: Optional,
    h0: Optional,
    c0: Optional,
    cell: str,
    pool: str,
    reverse: bool,
    keep_states: bool,
    keep_reserve: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of x, or of the rows of the table that x, [B, T, 1] or [S, 1], names.

    The backward pass computes the gates again, run by run. The reserve is the memory c before each run but the first,
    [runs - 1, B, H].
    """
    _check_devices("temporal_pool", x=x, cu_seqlens=cu_seqlens, weight_ih=weight_ih, weight_hh=weight_hh)
    _check_tangents("temporal_pool", x=x, weight_ih=weight_ih, weight_hh=weight_hh)
    work, batch, state = _score_dtype(weight_hh.dtype), cu_seqlens.shape[0] - 1, weight_hh.shape[1]
    hidden = weight_hh.shape[0] // GATES[cell]
    with _torch_cuda._on(x.device):
        steps = _steps("temporal_pool", x, cu_seqlens, reverse)

        def new(*shape: int) -> Tensor:
            return x.new_empty(shape, dtype=work)

        streams, count = pool in _STREAMING, steps.x.shape[0]
        pooled = new(0) if pool == "none" else new(batch, width(pool) * state)
        kept_steps = count if keep_states or not streams else 0
        states = x.new_empty((kept_steps, state), dtype=states_dtype(pool, weight_hh.dtype))
        h_n, c_n = new(batch, state), new(batch, hidden) if cell == "lstm" else new(0)
        reserve = new(*memory_shape(x, batch, cell, weight_hh, keep_reserve))
        if batch == 0:
            return pooled, states, h_n, c_n, reserve
        bias, hidden_bias = _biases(cell, bias_ih, bias_hh, hidden)
        last = (h_n, c_n if cell == "lstm" else None)

        def recur(inputs: Tensor, padded_steps: int, layout: Any, before: Any, rows: Optional = None) -> None:
            _call(
                "temporal_recurrence",
                x,
                *(cell, _dense(weight_hh), _dense(weight_hr), steps.cu_seqlens, steps.order, padded_steps, *layout),
                *(reverse, *before, inputs, rows, hidden_bias),
                *(pool if streams else "none", pooled if streams and pool != "none" else None),
                *(states if keep_states or not streams else None, *last),
            )

        initial, most = (_dense(h0), _dense(c0)), most_steps(batch, weight_hh.shape[0] * work.itemsize)
        division = training_runs(x, batch, cell, weight_hh) if keep_reserve else Division.of(x, batch, most)
        if table is not None:
            inputs = _inputs(_plain(table), weight_ih, bias)
            recur(inputs, steps.padded_steps, (None, None), initial, steps.x[:, 0].contiguous())
        elif division.runs == 1:
            recur(_inputs(steps.x, weight_ih, bias), steps.padded_steps, (None, None), initial)
        else:
            runs = Runs(steps, division)
            for index, run in enumerate(runs):
                if index > 0 and reserve.numel():
                    reserve[index - 1] = c_n
                layout = runs.step_starts, run.bounds
                recur(_inputs(steps.x[run.source], weight_ih, bias), 0, layout, initial if index == 0 else last)
        if not streams:
            _call("pool_states", x, states, steps.cu_seqlens, pool, _dense(pool_weights), pooled)
    return pooled, states if keep_states else states[:0], h_n, c_n, reserve


def _call(name: str, like: Tensor, *arguments: Any) -> None:
    kernels = _torch_cuda._kernels
    workspace = _torch_cuda._workspace(like, getattr(kernels, f"cuda_{name}_workspace_bytes")(*arguments))
    getattr(kernels, f"cuda_{name}")(*arguments, workspace, _torch_cuda._stream())


def temporal_pool_backward(
    x: Tensor,
    cu_seqlens: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Optional,
    bias_hh: Optional,
    weight_hr: Optional,
    pool_weights: Optional,
    h0: Optional,
    c0: Optional,
    states: Tensor,
    reserve: Tensor,
    grad_pooled: Optional,
    grad_states: Optional,
    grad_h_n: Optional,
    grad_c_n: Optional,
    cell: str,
    pool: str,
    reverse: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The operator of the same name."""
    work, batch = _score_dtype(weight_hh.dtype), cu_seqlens.shape[0] - 1
    inputs = (x, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, pool_weights)
    if batch == 0:
        first, *others = (_like(tensor, work, need) for tensor, need in zip(inputs, needs, strict=True))
        return first.to(x.dtype) if needs[0] else first, *others
    state, hidden, dtype = weight_hh.shape[1], weight_hh.shape[0] // GATES[cell], weight_hh.dtype
    with _torch_cuda._on(x.device):
        steps = _steps("temporal_pool_backward", x, cu_seqlens, reverse)
        count, inputs_size = steps.x.shape
        runs = Runs(steps, training_runs(x, batch, cell, weight_hh))
        bias, hidden_bias = _biases(cell, bias_ih, bias_hh, hidden)
        w_ih, w_hh = _plain(weight_ih), _plain(weight_hh)
        recurrent = _dense(weight_hh), _dense(weight_hr), steps.cu_seqlens, steps.order, runs.step_starts
        # The memory before each run.
        memory = [_dense(c0), *reserve] if cell == "lstm" else [None] * runs.count

        def inputs_of(run: Run) -> Tensor:
            return steps.x[run.source].masked_fill_(~run.valid, 0)

        def before(run: Run) -> Tensor:
            return _before(states, run, h0, reverse, dtype)

        def gates_of(run: Run) -> tuple[Tensor, Optional]:
            """Those of a GRU as the shares of x and of the state before, [C, 3 · H] each."""
            gates = _inputs(inputs_of(run), weight_ih, bias)
            earlier = before(run)
            if cell == "gru":
                of_state = _mm(earlier, w_hh.T, dtype)
                if hidden_bias is not None:
                    of_state[:, 2 * hidden :] += hidden_bias
                return gates, of_state
            for gate, weight in zip(gates.chunk(4, 1), w_hh.chunk(4), strict=True):  # as all at once, in less memory
                gate += _mm(earlier, weight.T, dtype)
            return gates, None

        # What reaches the states from outside: of linear pools the kernel finds it, of others a run's is held.
        grad_pool_weights = _like(pool_weights, work, needs[8])
        given = None if grad_states is None else _plain(grad_states)
        pooled = None if pool == "none" else _dense(grad_pooled)
        pool_gradient = None
        if pooled is not None and pool not in LINEAR:
            pool_gradient = _PoolGradient(states, steps.cu_seqlens, pool_weights, pooled, pool, needs[8])
            grad_pool_weights = pool_gradient.of_weights
        of_rows = _of_rows(pool, pooled, runs.lengths)

        # The runs, from the last: step by step, and sums over its steps.
        none = x.new_empty(0, dtype=work)
        grad_weights = [_like(w, work, need) for w, need in zip(inputs[1:6], needs[1:6], strict=True)]
        # What is no step goes to a row of its own.
        grad_x = x.new_zeros((count + 1, inputs_size)) if needs[0] else none

        # Of h and c between the runs, each in the place of the last.
        grad_h = x.new_empty((batch, state), dtype=work) if runs.count > 1 or needs[6] else None
        grad_c = x.new_empty((batch, hidden), dtype=work) if cell == "lstm" and (runs.count > 1 or needs[7]) else None

        def back(index: int) -> None:
            run = runs[index]
            gates, of_state = gates_of(run)
            c = m = None
            if cell == "lstm":
                c = gates.new_empty(runs.rows, hidden)
                m = None if weight_hr is None else torch.empty_like(c)
                _call("temporal_scan", x, *recurrent, run.bounds, memory[index], gates, c, m, None)
            ends = (_dense(grad_h_n), _dense(grad_c_n)) if index + 1 == runs.count else (grad_h, grad_c)
            begins = (grad_h if index > 0 or needs[6] else None, grad_c if index > 0 or needs[7] else None)
            grads = None if given is None else given[run.state].to(work)
            if grads is None and (m is not None or pool_gradient is not None):
                grads = x.new_zeros((runs.rows, state), dtype=work)
            if pool_gradient is not None and grads is not None:
                pool_gradient.add(run.state, run.row, grads)
            _call(
                "temporal_recurrence_backward",
                x,
                *(cell, *recurrent, run.bounds, reverse, _dense(h0), memory[index]),
                *(gates, of_state, None if cell == "lstm" else states, c, grads, *of_rows, *ends, *begins),
            )
            if needs[5] and m is not None and grads is not None:
                grad_weights[4] += _mm(grads.masked_fill_(~run.valid, 0).T, m.masked_fill_(~run.valid, 0), dtype)
            del c, m, grads  # what follows takes their place
            shares = [gates] if of_state is None else [gates, of_state]
            del gates, of_state
            sums = [share.masked_fill_(~run.valid, 0).sum(0) for share in shares]
            for slot in (0, 1):
                if needs[3 + slot]:
                    grad_weights[2 + slot] += sums[-slot]
            # Rounded one after the other, each in the place of what it was.
            for slot in range(len(shares)):
                shares[slot] = shares[slot].to(dtype)
            for slot, operand in enumerate((inputs_of, before)):
                if needs[1 + slot]:
                    grad_weights[slot] += _mm(shares[-slot].T, operand(run), dtype)
            if needs[0]:
                found = _mm(shares[0], w_ih, dtype).to(x.dtype)
                grad_x.index_copy_(0, torch.where(run.valid[:, 0], run.source, count), found)

        for index in reversed(range(runs.count)):
            back(index)
        return (
            grad_x[:count].reshape(x.shape) if needs[0] else none,
            *grad_weights,
            *(
                part if need and part is not None else none
                for part, need in zip((grad_h, grad_c), needs[6:8], strict=True)
            ),
            grad_pool_weights,
        )


def _of_rows(pool: str, grad: Optional, lengths: Tensor) -> tuple[Optional, Optional, Optional]:
    """What a pool's gradient gives to every state of a row, to the first that is run, and to the last."""
    if grad is None or pool not in LINEAR:
        return None, None, None
    if pool in ("first", "last"):
        return None, *((grad, None) if pool == "first" else (None, grad))
    parts = grad.chunk(width(pool), 1)
    last = parts[0].contiguous() if pool == "lastmean" else None
    return (parts[-1] / lengths.clip(min=1)[:, None]).contiguous(), None, last


def _before(states: Tensor, run: Run, h0: Optional, reverse: bool, dtype: torch.dtype) -> Tensor:
    """The state that each step started from, [C, P], as products read it; zeros for what is no step."""
    earlier = states[(run.state + (1 if reverse else -1)).clip(0, states.shape[0] - 1)].to(dtype)
    initial = earlier.new_zeros(()) if h0 is None else _plain(h0)[run.row].to(dtype)
    return torch.where(run.first, initial, earlier).masked_fill_(~run.valid, 0)


def _like(tensor: Optional, dtype: torch.dtype, need: bool) -> Tensor:
    """For a gradient: zeros, or a tensor without values for what nobody needs."""
    if tensor is None or not need:
        return torch.empty(0, dtype=dtype, device=None if tensor is None else tensor.device)
    return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)


def pool_states(x: Tensor, cu_seqlens: Tensor, pool_weights: Optional, pool: str) -> Tensor:
    """The operator of the same name."""
    _check_devices("pool_states", x=x, cu_seqlens=cu_seqlens, pool_weights=pool_weights)
    _check_tangents("pool_states", x=x)
    with _torch_cuda._on(x.device):
        out = x.new_empty((cu_seqlens.shape[0] - 1, width(pool) * x.shape[1]))
        steps = _steps("pool_states", x, cu_seqlens)
        _call("pool_states", x, _dense(x), steps.cu_seqlens, pool, _dense(pool_weights), out)
    return out


class _PoolGradient:
    """That of a pool's weights, and of any of the states x, which are stored in 16 bits or as the gradients are."""

    def __init__(
        self, x: Tensor, cu_seqlens: Tensor, pool_weights: Optional, grad: Tensor, pool: str, needs_weights: bool
    ) -> None:
        self.x = x
        self.of_weights = _like(pool_weights, grad.dtype, needs_weights)
        summary = None
        if pool == "attention":
            summary = grad.new_empty(2, x.shape[0])
        elif pool in ("max", "meanmax"):
            summary = grad.new_empty(cu_seqlens.shape[0] - 1, x.shape[1], dtype=torch.int64)
        self.arguments = _dense(x), cu_seqlens.contiguous(), pool, _dense(pool_weights), _dense(grad), summary
        _call("pool_states_summary", x, *self.arguments, self.of_weights if needs_weights else None)

    def add(self, vectors: Tensor, rows: Tensor, grad_x: Tensor) -> None:
        """Adds that of x[vectors], each of its row, to grad_x."""
        _call("pool_states_gradient", self.x, *self.arguments, vectors, rows, grad_x)


def pool_states_backward(
    x: Tensor, cu_seqlens: Tensor, pool_weights: Optional, grad: Tensor, pool: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """The operator of the same name."""
    with _torch_cuda._on(x.device):
        gradient = _PoolGradient(x, cu_seqlens, pool_weights, grad, pool, needs[1])
        if not needs[0]:
            return x.new_empty(0), gradient.of_weights
        grad_x = x.new_zeros(x.shape)
        vectors = torch.arange(x.shape[0], device=x.device)
        # A row that is empty ends where it begins, so this is the row that has the vector; past the last it is none.
        gradient.add(vectors, torch.searchsorted(cu_seqlens, vectors, right=True) - 1, grad_x)
        return grad_x, gradient.of_weights
