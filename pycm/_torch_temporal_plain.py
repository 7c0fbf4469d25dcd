"""Temporal pooling in torch's own operators, step by step: slow, and differentiable any number of times."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from pycm._temporal_layers import NO_SCORE


class _Grid(NamedTuple):
    """Sequences as rows of equal length."""

    lengths: Tensor  # [B]
    valid: Tensor  # [B, T]
    place: Tensor  # [B, T]: the ragged step; the row's first for what is not valid
    step: Tensor  # [B, T]: the same counted from the row's first


def _grid(cu_seqlens: Tensor, reverse: bool) -> _Grid:
    lengths = cu_seqlens.diff()
    step = torch.arange(max(1, int(lengths.max())) if len(lengths) else 1, device=cu_seqlens.device)
    valid = step < lengths[:, None]
    step = torch.where(valid, lengths[:, None] - 1 - step if reverse else step, 0)
    return _Grid(lengths, valid, cu_seqlens[:-1, None] + step, step)


def _rows(x: Tensor, grid: _Grid) -> Tensor:
    """[B, T, ...] of ragged or padded x, zeros where not valid."""
    found = x.new_zeros(*grid.valid.shape, x.shape[-1])
    index = (grid.place[grid.valid],) if x.ndim == 2 else (torch.nonzero(grid.valid)[:, 0], grid.step[grid.valid])
    return found.index_put((grid.valid,), x[index])


def temporal_pool(
    x: Tensor,
    cu_seqlens: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    pool_weights: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    cell: str,
    pool: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `torch.ops.pycm.temporal_pool` gives, states included; without a reserve."""
    grid = _grid(cu_seqlens, reverse)
    work = torch.float64 if weight_ih.dtype == torch.float64 else torch.float32
    weight_hh = weight_hh.to(work)
    bias_ih, bias_hh, weight_hr = (None if w is None else w.to(work) for w in (bias_ih, bias_hh, weight_hr))
    inputs = linear(_rows(x, grid).to(work), weight_ih.to(work), bias_ih)
    count, hidden = len(grid.lengths), weight_hh.shape[1] if weight_hr is None else weight_hr.shape[1]
    h = inputs.new_zeros(count, weight_hh.shape[1]) if h0 is None else h0
    c = inputs.new_zeros(count, hidden) if c0 is None else c0
    by_step = []
    for t in range(grid.valid.shape[1]):
        gates = linear(h, weight_hh, bias_hh)
        going = grid.valid[:, t, None]
        if cell == "lstm":
            i, f, g, o = (inputs[:, t] + gates).chunk(4, 1)
            c = torch.where(going, f.sigmoid() * c + i.sigmoid() * g.tanh(), c)
            h_next = o.sigmoid() * c.tanh()
            h_next = h_next if weight_hr is None else linear(h_next, weight_hr)
        else:
            (r_x, z_x, n_x), (r_h, z_h, n_h) = inputs[:, t].chunk(3, 1), gates.chunk(3, 1)
            z = (z_x + z_h).sigmoid()
            h_next = (1 - z) * torch.tanh(n_x + (r_x + r_h).sigmoid() * n_h) + z * h
        h = torch.where(going, h_next, h)
        by_step.append(h)
    rows = torch.stack(by_step, 1)
    beyond = x.shape[0] if x.ndim == 2 else x.shape[0] * x.shape[1]
    states = rows.new_zeros(beyond, rows.shape[2]).index_put((grid.place[grid.valid],), rows[grid.valid])
    pooled = inputs.new_zeros(0) if pool == "none" else _pool(rows, grid, cu_seqlens, pool, pool_weights)
    return pooled, states, h, c if cell == "lstm" else inputs.new_zeros(0)


def pool_states(x: Tensor, cu_seqlens: Tensor, pool_weights: Tensor | None, pool: str) -> Tensor:
    """What `torch.ops.pycm.pool_states` gives."""
    grid = _grid(cu_seqlens, reverse=False)
    return _pool(_rows(x, grid), grid, cu_seqlens, pool, pool_weights)


def _pool(rows: Tensor, grid: _Grid, cu_seqlens: Tensor, pool: str, weights: Tensor | None) -> Tensor:
    """[B, T, P] in the order of processing to [B, W·P]."""
    valid, some = grid.valid[..., None], (grid.lengths > 0)[:, None]
    rows = torch.where(valid, rows, 0.0)
    if pool in ("meanmax", "lastmean"):
        names = ("mean", "max") if pool == "meanmax" else ("last", "mean")
        return torch.cat([_pool(rows, grid, cu_seqlens, name, None) for name in names], 1)
    if pool == "last":
        return rows[torch.arange(len(rows), device=rows.device), (grid.lengths - 1).clip(min=0)]
    if pool == "first":
        return rows[:, 0]
    if pool == "mean":
        return rows.sum(1) / grid.lengths.clip(min=1)[:, None]
    if pool == "max":
        return torch.where(some, torch.where(valid, rows, -torch.inf).max(1).values, 0.0)
    if weights is None:
        raise ValueError(f"pool_states: pool_weights must be given for pool={pool!r}, got None")
    if pool == "attention":
        share = torch.where(grid.valid, rows @ weights, NO_SCORE).softmax(1)
        return (share[..., None] * rows).sum(1)
    # Sorted with all that is not valid at the end; every step's own place has the coefficient of that rank.
    ranked = torch.where(valid, rows, -torch.inf).sort(1, descending=True).values
    rank = torch.arange(valid.shape[1], device=rows.device)
    place = torch.where(grid.valid, cu_seqlens[:-1, None] + rank, 0)
    share = torch.where(grid.valid, weights[place], 0.0) if len(weights) else rows.new_zeros(grid.valid.shape)
    return (share[..., None] * torch.where(valid, ranked, 0.0)).sum(1)
