"""Runs of steps: how the CUDA side of temporal pooling divides what is held for each step by time, on the device.

The inputs' product, and what the backward pass computes again, take as much memory as 4 to 8 states a step. Held for
one run at a time this does not grow with T. Ragged arrays have as many rows as x has steps: how many of these belong to
a sequence is known on the device alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pycm._temporal_layers import GATES
from pycm._torch_arguments import _score_dtype

# What a run's steps may take, unless 8 steps of every row take more: of a forward pass alone, and of a training step.
_RUN_BYTES = 128 << 20
_TRAINING_RUN_BYTES = 27 << 20
# Whose gradient asks for no values of the states.
LINEAR = ("last", "first", "mean", "lastmean")


class Steps(NamedTuple):
    """Where the steps of x lie."""

    x: Tensor  # [N, I], the inputs' rows
    cu_seqlens: Tensor
    order: Tensor  # [B], longest first
    padded_steps: int  # T, or 0 for ragged x
    reverse: bool


class Run(NamedTuple):
    """The steps of all rows from one time to another, in the order "by step" of ops/temporal_recurrence.h."""

    bounds: Tensor  # [2], the times
    valid: Tensor  # [C, 1]; what is not is as if it were some step of x
    row: Tensor  # [C]
    first: Tensor  # [C, 1], whether it is the row's first to be run
    source: Tensor  # [C], its row in x
    state: Tensor  # [C], its row in ragged arrays


def most_steps(batch: int, bytes_a_step: int, run_bytes: int | None = None) -> int:
    return max((run_bytes or _RUN_BYTES) // bytes_a_step, 8 * batch)


class Division(NamedTuple):
    """Of the steps of x into runs, by shapes alone."""

    rows: int  # of a run's arrays
    # Run k begins at time k · stride of padded x; of ragged x with the first time before which there are so many steps.
    stride: int
    runs: int

    @staticmethod
    def of(x: Tensor, batch: int, most: int) -> Division:
        padded = x.ndim == 3
        steps = x.shape[0] * x.shape[1] if padded else x.shape[0]  # numel() would fix them in a trace
        length = x.shape[1] if padded else steps
        if steps <= most:
            return Division(steps, length, 1)
        # Of ragged x a run takes up to B steps, those of one time, more than its stride.
        stride = most // batch if padded else most - batch
        return Division(stride * batch if padded else most, stride, -(-length // stride))


def training_runs(x: Tensor, batch: int, cell: str, weight_hh: Tensor) -> Division:
    """For a step its gradient and the gates and c, or both shares of a GRU's gates: little else is there then."""
    numbers = weight_hh.shape[0] // GATES[cell] * (7 if cell == "gru" else 6)
    bytes_a_step = numbers * _score_dtype(weight_hh.dtype).itemsize
    return Division.of(x, batch, most_steps(batch, bytes_a_step, _TRAINING_RUN_BYTES))


def states_dtype(pool: str, dtype: torch.dtype) -> torch.dtype:
    """Of the states, for weights of this dtype: as products read them, unless they are the result."""
    return _score_dtype(dtype) if pool == "none" else dtype


def memory_shape(x: Tensor, batch: int, cell: str, weight_hh: Tensor, keep: bool = True) -> tuple[int, int, int]:
    """Of the memory before each run of a training step but the first. Without `keep` it asks for no size of x."""
    runs = training_runs(x, batch, cell, weight_hh).runs if keep and cell == "lstm" else 1
    return runs - 1, batch, weight_hh.shape[0] // GATES[cell]


class Runs:
    """All steps, divided by time. What the runs are is computed once, for all of them."""

    def __init__(self, steps: Steps, division: Division) -> None:
        self.rows, self.count, device = division.rows, division.runs, steps.x.device
        count, batch = steps.x.shape[0], steps.order.shape[0]
        self.lengths = lengths = steps.cu_seqlens.diff()
        times = torch.arange(steps.padded_steps or count, device=device)
        running = batch - torch.searchsorted(lengths[steps.order].flip(0), times, right=True)
        self.step_starts = starts = torch.nn.functional.pad(running.cumsum(0), (1, 0))
        begins = torch.arange(self.count + 1, device=device) * division.stride
        self.bounds = (begins if steps.padded_steps else torch.searchsorted(starts, begins)).clip(max=times.shape[0])
        edges = starts[self.bounds][:, None]
        position = edges[:-1] + torch.arange(self.rows, device=device)
        valid = position < edges[1:]
        step = (torch.searchsorted(starts, position, right=True) - 1).clip(max=starts.shape[0] - 2)
        row = steps.order[(position - starts[step]).clip(max=batch - 1)]
        time = lengths[row] - 1 - step if steps.reverse else step
        state = steps.cu_seqlens[row]
        base = row * steps.padded_steps if steps.padded_steps else state
        source, state = (torch.where(valid, start + time, 0) for start in (base, state))
        self.parts = (valid[..., None], row, (step == 0)[..., None], source, state)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Run:
        return Run(self.bounds[index : index + 2], *(part[index] for part in self.parts))

    def __iter__(self) -> Iterator[Run]:
        return map(self.__getitem__, range(self.count))
