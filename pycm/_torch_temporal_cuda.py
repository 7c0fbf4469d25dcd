"""Temporal pooling on CUDA: products over all steps by torch, what goes step by step by kernels. See `_torch_cuda`.

Ragged arrays have as many rows as x has steps: how many of these belong to a sequence is known on the device alone.
Inputs keep the form of x, [S, ...] or [B · T, ...]; states are always ragged.
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


class _Steps(NamedTuple):
    """Where the steps of x lie."""

    x: Tensor  # [N, I], the inputs' rows
    cu_seqlens: Tensor
    order: Tensor  # [B], longest first
    padded_steps: int  # T, or 0 for ragged x

    def row_and_time(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each of the N rows: its sequence, its step, whether it belongs to one."""
        starts, count = self.cu_seqlens, self.x.shape[0]
        position = torch.arange(count, device=starts.device)
        if self.padded_steps:
            row, time = position // self.padded_steps, position % self.padded_steps
        else:
            row = torch.searchsorted(starts[1:].contiguous(), position, right=True).clip(max=starts.shape[0] - 2)
            time = position - starts[row]
        return row, time, time < starts.diff()[row]


def _steps(function: str, x: Tensor, cu_seqlens: Tensor) -> _Steps:
    starts = cu_seqlens.contiguous()
    lengths = starts.diff()
    most = x.shape[1] if x.ndim == 3 else x.shape[0]
    inside = (lengths >= 0).all() & (starts[0] == 0) & (starts[-1] <= x.shape[:-1].numel()) & (lengths <= most).all()
    torch._assert_async(inside, f"{function}: lengths must be in [0, {most}], and cu_seqlens rise from 0")
    order = torch.argsort(lengths, descending=True, stable=True)
    return _Steps(_plain(x).reshape(-1, x.shape[-1]), starts, order, x.shape[1] if x.ndim == 3 else 0)


def _product(a: Tensor, b: Tensor, bias: Optional = None) -> Tensor:
    """a b' + bias in the working dtype; 16-bit operands are multiplied as such, and summed in fp32."""
    work = _score_dtype(b.dtype)
    if _WIDE_SUMS and a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16):
        out = torch.mm(a, b.T, out_dtype=work)
        return out if bias is None else out.add_(bias)
    return torch.nn.functional.linear(a.to(work), b.to(work), bias)


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


def temporal_pool(
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
    cell: str,
    pool: str,
    reverse: bool,
    keep_states: bool,
    keep_reserve: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator of the same name; attention and gpo are pooled from the states, by a second kernel.

    The reserve is always empty: the backward pass computes the gates again.
    """
    _check_devices("temporal_pool", x=x, cu_seqlens=cu_seqlens, weight_ih=weight_ih, weight_hh=weight_hh)
    _check_tangents("temporal_pool", x=x, weight_ih=weight_ih, weight_hh=weight_hh)
    work, batch, state = _score_dtype(weight_hh.dtype), cu_seqlens.shape[0] - 1, weight_hh.shape[1]
    hidden = weight_hh.shape[0] // GATES[cell]
    with _torch_cuda._on(x.device):
        steps = _steps("temporal_pool", x, cu_seqlens)

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
        arguments = (
            *(cell, _dense(weight_hh), _dense(weight_hr), steps.cu_seqlens, steps.order, steps.padded_steps, reverse),
            *(_dense(h0), _dense(c0), _product(steps.x, _plain(weight_ih), bias), hidden_bias),
            *(pool if streams else "none", pooled if streams and pool != "none" else None),
            *(states if keep_states or not streams else None, h_n, c_n if cell == "lstm" else None),
        )
        _call("temporal_recurrence", x, *arguments)
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
    hidden = weight_hh.shape[0] // GATES[cell]
    with _torch_cuda._on(x.device):
        steps = _steps("temporal_pool_backward", x, cu_seqlens)
        row, time, valid = steps.row_and_time()
        outside = ~valid[:, None]
        values = steps.x.masked_fill(outside, 0)
        before = _before(states, steps.cu_seqlens, row, time, outside, h0, reverse)

        # 1. What the forward pass computed of every step.
        bias, hidden_bias = _biases(cell, bias_ih, bias_hh, hidden)
        gates, of_state = _product(values, _plain(weight_ih), bias), None
        matrix = _plain(weight_hh).to(work)
        if cell == "lstm":
            gates.addmm_(before, matrix.T)
        else:
            of_state = before @ matrix.T
            if hidden_bias is not None:
                of_state[:, 2 * hidden :] += hidden_bias
        c = m = None
        if cell == "lstm":
            c = gates.new_empty(steps.x.shape[0], hidden)
            m = None if weight_hr is None else torch.empty_like(c)
            _call(
                "temporal_scan",
                x,
                *(_dense(weight_hh), _dense(weight_hr), steps.cu_seqlens, steps.order, steps.padded_steps, reverse),
                *(_dense(c0), gates, c, m),
            )

        # 2. What reaches the states from outside.
        grads = torch.zeros_like(states) if grad_states is None else _plain(grad_states).clone()
        grad_pool_weights = _like(pool_weights, work, needs[8])
        if grad_pooled is not None and pool != "none":
            grad_pool_weights = _pool_backward(
                states, steps.cu_seqlens, pool_weights, grad_pooled, pool, reverse, (True, needs[8]), grads
            )[1]

        # 3. Step by step, from the last.
        grad_h0, grad_c0 = (_like(state, work, need) for state, need in zip((h0, c0), needs[6:8], strict=True))
        _call(
            "temporal_recurrence_backward",
            x,
            *(cell, _dense(weight_hh), _dense(weight_hr), steps.cu_seqlens, steps.order, steps.padded_steps, reverse),
            *(_dense(h0), _dense(c0), gates, of_state, None if cell == "lstm" else states, c, grads),
            *(_dense(grad_h_n), _dense(grad_c_n), grad_h0 if needs[6] else None, grad_c0 if needs[7] else None),
        )

        # 4. Sums over all steps.
        gates.masked_fill_(outside, 0)
        if of_state is not None:
            of_state.masked_fill_(outside, 0)
        recurrent = gates if of_state is None else of_state
        none = x.new_empty(0, dtype=work)
        grad_x = none
        if needs[0]:
            grad_x = (gates @ _plain(weight_ih).to(work)).reshape(x.shape)
        grad_weight_hr = none
        if needs[5] and m is not None:
            beyond = (torch.arange(m.shape[0], device=m.device) >= steps.cu_seqlens[-1])[:, None]
            grad_weight_hr = grads.masked_fill(beyond, 0).T @ m.masked_fill(beyond, 0)
        return (
            grad_x,
            gates.T @ values.to(work) if needs[1] else none,
            recurrent.T @ before if needs[2] else none,
            gates.sum(0) if needs[3] else none,
            recurrent.sum(0) if needs[4] else none,
            grad_weight_hr,
            grad_h0,
            grad_c0,
            grad_pool_weights,
        )


def _before(
    states: Tensor, cu_seqlens: Tensor, row: Tensor, time: Tensor, outside: Tensor, h0: Optional, reverse: bool
) -> Tensor:
    """The state that each step started from, [N, P]; zeros outside of the sequences."""
    first = time == (cu_seqlens.diff()[row] - 1 if reverse else 0)
    earlier = cu_seqlens[row] + time + (1 if reverse else -1)
    found = states[earlier.clip(0, states.shape[0] - 1)]
    initial = found.new_zeros(()) if h0 is None else _plain(h0)[row]
    return torch.where(first[:, None], initial, found).masked_fill_(outside, 0)


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
