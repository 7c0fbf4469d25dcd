"""Temporal pooling on CUDA: products over many steps by torch, what goes step by step by kernels. See `_torch_cuda`.

The inputs' product, and what the backward pass computes again, take as much memory as 4 to 8 states a step. They are
held for one run of steps at a time, so that this does not grow with T: `_Runs` divides the steps of all rows by time,
on the device. A forward pass of one run reads x where it lies. Ragged arrays have as many rows as x has steps: how many
of these belong to a sequence is known on the device alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycm import _torch_cuda
from pycm._temporal_layers import GATES, RESERVE, width
from pycm._torch_arguments import _check_devices, _check_tangents, _plain, _score_dtype

Optional = Tensor | None
# Those that the recurrence computes as it goes.
_STREAMING = ("last", "first", "mean", "max", "meanmax", "lastmean", "none")
# Whether torch.mm takes out_dtype (torch 2.8); else 16-bit operands are widened, which gives the same sums more slowly.
_WIDE_SUMS = hasattr(torch.ops.aten.mm, "dtype")
# What a run's steps may take, unless 8 steps of every row take more.
_RUN_BYTES = 128 << 20


class _Steps(NamedTuple):
    """Where the steps of x lie."""

    x: Tensor  # [N, I], the inputs' rows
    cu_seqlens: Tensor
    order: Tensor  # [B], longest first
    padded_steps: int  # T, or 0 for ragged x
    reverse: bool


class _Run(NamedTuple):
    """The steps of all rows from one time to another, in the order "by step" of ops/temporal_recurrence.h."""

    bounds: Tensor  # [2], the times
    valid: Tensor  # [C, 1]; what is not is as if it were some step of x
    row: Tensor  # [C]
    first: Tensor  # [C, 1], whether it is the row's first to be run
    source: Tensor  # [C], its row in x
    state: Tensor  # [C], its row in ragged arrays


def most_steps(batch: int, bytes_a_step: int) -> int:
    return max(_RUN_BYTES // bytes_a_step, 8 * batch)


class _Runs:
    """All steps, divided by time into runs of at most `rows` steps."""

    def __init__(self, steps: _Steps, bytes_a_step: int) -> None:
        self.steps = steps
        count, batch = steps.x.shape[0], steps.order.shape[0]
        self.rows, self.count = min(count, most_steps(batch, bytes_a_step)), 1
        stride = count
        if self.rows < count:
            # Run k begins with the first time before which there are k · stride steps, and so has fewer than `rows`.
            stride = self.rows - batch
            self.count = -(-count // stride)
        self.lengths = steps.cu_seqlens.diff()
        times = torch.arange(steps.padded_steps or count, device=steps.x.device)
        running = batch - torch.searchsorted(self.lengths[steps.order].flip(0), times, right=True)
        self.step_starts = torch.nn.functional.pad(running.cumsum(0), (1, 0))
        begins = torch.arange(self.count + 1, device=steps.x.device) * stride
        self.bounds = torch.searchsorted(self.step_starts, begins).clip(max=times.shape[0])

    def __getitem__(self, index: int) -> _Run:
        steps, starts, bounds = self.steps, self.step_starts, self.bounds[index : index + 2]
        begin, end = starts[bounds]
        position = begin + torch.arange(self.rows, device=starts.device)
        valid = position < end
        step = (torch.searchsorted(starts, position, right=True) - 1).clip(max=starts.shape[0] - 2)
        row = steps.order[(position - starts[step]).clip(max=steps.order.shape[0] - 1)]
        time = self.lengths[row] - 1 - step if steps.reverse else step
        base = row * steps.padded_steps if steps.padded_steps else steps.cu_seqlens[row]
        source, state = (torch.where(valid, begins + time, 0) for begins in (base, steps.cu_seqlens[row]))
        return _Run(bounds, valid[:, None], row, (step == 0)[:, None], source, state)


def _steps(function: str, x: Tensor, cu_seqlens: Tensor, reverse: bool = False) -> _Steps:
    starts = cu_seqlens.contiguous()
    lengths = starts.diff()
    most = x.shape[1] if x.ndim == 3 else x.shape[0]
    inside = (lengths >= 0).all() & (starts[0] == 0) & (starts[-1] <= x.shape[:-1].numel()) & (lengths <= most).all()
    torch._assert_async(inside, f"{function}: lengths must be in [0, {most}], and cu_seqlens rise from 0")
    order = torch.argsort(lengths, descending=True, stable=True)
    return _Steps(_plain(x).reshape(-1, x.shape[-1]), starts, order, x.shape[1] if x.ndim == 3 else 0, reverse)


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

    The reserve is always empty: the backward pass computes the gates again.
    """
    _check_devices("temporal_pool", x=x, cu_seqlens=cu_seqlens, weight_ih=weight_ih, weight_hh=weight_hh)
    _check_tangents("temporal_pool", x=x, weight_ih=weight_ih, weight_hh=weight_hh)
    work, batch, state = _score_dtype(weight_hh.dtype), cu_seqlens.shape[0] - 1, weight_hh.shape[1]
    hidden = weight_hh.shape[0] // GATES[cell]
    with _torch_cuda._on(x.device):
        steps = _steps("temporal_pool", x, cu_seqlens, reverse)

        def new(*shape: int) -> Tensor:
            return x.new_empty(shape, dtype=work)

        streams = pool in _STREAMING
        pooled = new(0) if pool == "none" else new(batch, width(pool) * state)
        states = new(steps.x.shape[0] if keep_states or not streams else 0, state)
        h_n, c_n = new(batch, state), new(batch, hidden) if cell == "lstm" else new(0)
        reserve = new(0, RESERVE[cell], hidden)
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

        initial, gate_bytes = (_dense(h0), _dense(c0)), weight_hh.shape[0] * work.itemsize
        if table is not None:
            inputs = _inputs(_plain(table), weight_ih, bias)
            recur(inputs, steps.padded_steps, (None, None), initial, steps.x[:, 0].contiguous())
        elif steps.x.shape[0] <= most_steps(batch, gate_bytes):
            recur(_inputs(steps.x, weight_ih, bias), steps.padded_steps, (None, None), initial)
        else:
            runs = _Runs(steps, gate_bytes)
            for index in range(runs.count):
                run = runs[index]
                layout = runs.step_starts, run.bounds
                recur(_inputs(steps.x[run.source], weight_ih, bias), 0, layout, initial if index == 0 else last)
        if not streams:
            _call("pool_states", x, states, steps.cu_seqlens, pool, _dense(pool_weights), pooled)
    return pooled, states if keep_states else new(0, state), h_n, c_n, reserve


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
        return tuple(_like(tensor, work, need) for tensor, need in zip(inputs, needs, strict=True))
    state, hidden, dtype = weight_hh.shape[1], weight_hh.shape[0] // GATES[cell], weight_hh.dtype
    with _torch_cuda._on(x.device):
        steps = _steps("temporal_pool_backward", x, cu_seqlens, reverse)
        count, inputs_size = steps.x.shape
        # Of the gates (twice for a GRU), the memory, the states.
        runs = _Runs(steps, ((cell == "gru") * 3 * hidden + weight_hh.shape[0] + hidden + state) * work.itemsize)
        bias, hidden_bias = _biases(cell, bias_ih, bias_hh, hidden)
        w_ih, w_hh = _plain(weight_ih), _plain(weight_hh)
        recurrent = _dense(weight_hh), _dense(weight_hr), steps.cu_seqlens, steps.order, runs.step_starts

        def gates_of(run: _Run) -> tuple[Tensor, Tensor, Tensor, Optional]:
            """x and the states before, [C, I] and [C, P]; the gates, those of a GRU as the shares of both."""
            values = steps.x[run.source].masked_fill_(~run.valid, 0)
            before = _before(states, run, h0, reverse).to(dtype)
            if cell == "lstm":
                gates = _mm(torch.cat([values, before], 1), torch.cat([w_ih, w_hh], 1).T, dtype)
                return values, before, gates if bias is None else gates.add_(bias), None
            of_state = _mm(before, w_hh.T, dtype)
            if hidden_bias is not None:
                of_state[:, 2 * hidden :] += hidden_bias
            return values, before, _inputs(values, weight_ih, bias), of_state

        def scan(run: _Run, gates: Tensor, first: Optional, last: Optional) -> tuple[Tensor, Optional]:
            c = gates.new_empty(runs.rows, hidden)
            m = None if weight_hr is None else torch.empty_like(c)
            _call("temporal_scan", x, *recurrent, run.bounds, first, gates, c, m, last)
            return c, m

        # 1. The memory before each run but the first.
        memory = [_dense(c0)]
        for index in range(runs.count - 1 if cell == "lstm" else 0):
            run = runs[index]
            memory.append(x.new_empty((batch, hidden), dtype=work))
            scan(run, gates_of(run)[2], *memory[-2:])

        # 2. What reaches the states from outside.
        grads = torch.zeros_like(states) if grad_states is None else _plain(grad_states).clone()
        grad_pool_weights = _like(pool_weights, work, needs[8])
        if grad_pooled is not None and pool != "none":
            grad_pool_weights = _pool_backward(
                states, steps.cu_seqlens, pool_weights, grad_pooled, pool, reverse, (True, needs[8]), grads
            )[1]

        # 3. The runs, from the last: step by step, and sums over its steps.
        none = x.new_empty(0, dtype=work)
        grad_weights = [_like(w, work, need) for w, need in zip(inputs[1:6], needs[1:6], strict=True)]
        # What is no step goes to a row of its own.
        grad_x = x.new_zeros((count + 1, inputs_size), dtype=work) if needs[0] else none

        def back(index: int, grad_last: tuple[Optional, Optional]) -> tuple[Optional, Optional]:
            """From the gradients of the last h and c to those of what the run began with, where they are wanted."""
            run = runs[index]
            values, before, gates, of_state = gates_of(run)
            c, m = scan(run, gates, memory[index], None) if cell == "lstm" else (None, None)
            grad_h = x.new_empty((batch, state), dtype=work) if index > 0 or needs[6] else None
            grad_c = x.new_empty((batch, hidden), dtype=work) if cell == "lstm" and (index > 0 or needs[7]) else None
            _call(
                "temporal_recurrence_backward",
                x,
                *(cell, *recurrent, run.bounds, reverse, _dense(h0), memory[index] if cell == "lstm" else None),
                *(gates, of_state, None if cell == "lstm" else states, c, grads, *grad_last, grad_h, grad_c),
            )
            both = [part.masked_fill_(~run.valid, 0) for part in (gates, of_state) if part is not None]
            narrow = [part.to(dtype) for part in both]
            if needs[0]:
                grad_x.index_copy_(0, torch.where(run.valid[:, 0], run.source, count), _mm(narrow[0], w_ih, dtype))
            for slot, (part, operand) in enumerate(((narrow[0], values), (narrow[-1], before))):
                if needs[1 + slot]:
                    grad_weights[slot] += _mm(part.T, operand, dtype)
                if needs[3 + slot]:
                    grad_weights[2 + slot] += both[-slot].sum(0)
            if needs[5] and m is not None:
                reached = grads[run.state].masked_fill_(~run.valid, 0)
                grad_weights[4] += _mm(reached.T, m.masked_fill_(~run.valid, 0), dtype)
            return grad_h, grad_c

        carried: tuple[Optional, Optional] = _dense(grad_h_n), _dense(grad_c_n)
        for index in reversed(range(runs.count)):
            carried = back(index, carried)
        return (
            grad_x[:count].reshape(x.shape) if needs[0] else none,
            *grad_weights,
            *(part if need and part is not None else none for part, need in zip(carried, needs[6:8], strict=True)),
            grad_pool_weights,
        )


def _before(states: Tensor, run: _Run, h0: Optional, reverse: bool) -> Tensor:
    """The state that each step started from, [C, P]; zeros for what is no step."""
    earlier = states[(run.state + (1 if reverse else -1)).clip(0, states.shape[0] - 1)]
    initial = states.new_zeros(()) if h0 is None else _plain(h0)[run.row]
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


def pool_states_backward(
    x: Tensor, cu_seqlens: Tensor, pool_weights: Optional, grad: Tensor, pool: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """The operator of the same name."""
    with _torch_cuda._on(x.device):
        return _pool_backward(x, cu_seqlens, pool_weights, grad, pool, False, needs, torch.zeros_like(_plain(x)))


def _pool_backward(
    x: Tensor,
    cu_seqlens: Tensor,
    pool_weights: Optional,
    grad: Tensor,
    pool: str,
    reverse: bool,
    needs: Sequence[bool],
    grad_x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Adds to grad_x."""
    grad_weights = _like(pool_weights, x.dtype, needs[1])
    skips = not needs[0] and pool in ("attention", "gpo")
    _call(
        "pool_states_backward",
        x,
        *(_dense(x), cu_seqlens.contiguous(), pool, _dense(pool_weights), reverse, _dense(grad)),
        *(None if skips else grad_x, grad_weights if needs[1] else None),
    )
    return (grad_x if needs[0] else x.new_empty(0)), grad_weights
