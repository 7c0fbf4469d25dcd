"""A peer for the comparison: an LSTM or GRU and the mean of its states in Triton, one block for each 16 rows.

A block runs its rows for all their steps and reads the recurrent matrix again each step, from the second cache: what
can be written in Triton, which has no clusters. States pass from step to step through global memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16  # the fewest that tl.dot takes
_UNITS = 64
_DEPTH = 64


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _kernel(
    inputs,
    weight,
    hidden_bias,
    lengths,
    states,
    memory,
    sums,
    batch,
    steps,
    H: tl.constexpr,
    IS_LSTM: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    GATES: tl.constexpr = 4 if IS_LSTM else 3
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows[:, None] < batch
    length = tl.load(lengths + rows, mask=rows < batch, other=0)
    buffer = tl.num_programs(0) * ROWS * H
    for t in range(tl.max(length, 0)):
        before = states + t % 2 * buffer
        runs = t < length[:, None]
        for first in range(0, H, UNITS):
            units = first + tl.arange(0, UNITS)
            x = inputs + ((rows.to(tl.int64) * steps + t) * GATES * H)[:, None] + units[None, :]
            a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(x + H, mask=inside, other=0.0).to(tl.float32)
            c = tl.zeros([ROWS, UNITS], tl.float32)
            d = tl.zeros([ROWS, UNITS], tl.float32)
            if IS_LSTM:
                c = tl.load(x + 2 * H, mask=inside, other=0.0).to(tl.float32)
                d = tl.load(x + 3 * H, mask=inside, other=0.0).to(tl.float32)
            else:
                c += tl.load(hidden_bias + units)[None, :].to(tl.float32)
                d = tl.load(x + 2 * H, mask=inside, other=0.0).to(tl.float32)
            for start in range(0, H, DEPTH):
                depth = start + tl.arange(0, DEPTH)
                h = tl.load(before + rows[:, None] * H + depth[None, :])
                w = weight + units[None, :] * H + depth[:, None]
                a = tl.dot(h, tl.load(w), a)
                b = tl.dot(h, tl.load(w + H * H), b)
                c = tl.dot(h, tl.load(w + 2 * H * H), c)
                if IS_LSTM:
                    d = tl.dot(h, tl.load(w + 3 * H * H), d)
            at = rows[:, None] * H + units[None, :]
            kept = tl.load(memory + at)
            if IS_LSTM:
                kept = _sigmoid(b) * kept + _sigmoid(a) * _tanh(c)
                h = _sigmoid(d) * _tanh(kept)
            else:
                n = _tanh(d + _sigmoid(a) * c)
                kept = n + _sigmoid(b) * (kept - n)
                h = kept
            tl.store(memory + at, kept)
            tl.store(states + (t + 1) % 2 * buffer + at, tl.where(runs, h, 0.0).to(states.dtype.element_ty))
            tl.store(sums + at, tl.load(sums + at) + tl.where(runs, h, 0.0))
        tl.debug_barrier()


def mean_pool(rnn: torch.nn.LSTM | torch.nn.GRU, x: Tensor, lengths: Tensor) -> Tensor:
    """The mean of the states of one layer and one direction; x [B, T, I] in half precision, H a multiple of 64."""
    batch, steps, _ = x.shape
    hidden, lstm = rnn.hidden_size, isinstance(rnn, torch.nn.LSTM)
    blocks = triton.cdiv(batch, _ROWS)
    bias = rnn.bias_ih_l0.clone()
    cut = 4 * hidden if lstm else 2 * hidden  # a GRU's candidate takes the state's share with its bias
    bias[:cut] += rnn.bias_hh_l0[:cut]
    inputs = torch.nn.functional.linear(x, rnn.weight_ih_l0, bias)
    states = x.new_zeros(2, blocks * _ROWS, hidden)
    memory, sums = x.new_zeros(2, blocks * _ROWS, hidden, dtype=torch.float32)
    _kernel[(blocks,)](
        inputs,
        rnn.weight_hh_l0,
        rnn.bias_hh_l0[2 * hidden :],
        lengths,
        states,
        memory,
        sums,
        batch,
        steps,
        H=hidden,
        IS_LSTM=lstm,
        ROWS=_ROWS,
        UNITS=_UNITS,
        DEPTH=_DEPTH,
        num_warps=4,
        num_stages=3,
    )
    return sums[:batch] / lengths[:, None]
