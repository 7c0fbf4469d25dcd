"""`pycm.temporal_pool` for NumPy arrays: the kernels without torch, and without gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pycm import _C
from pycm._temporal_arguments import (
    check_choices,
    check_extras,
    check_pool,
    check_pool_parameters,
    check_sequences,
    layers_of,
)
from pycm._temporal_layers import STATE_POOLS, Problem, Weights, padded, pool_only, run, width
from pycm.functional import _as_numpy, _int64, _like

_POOL = "temporal_pool"


class _NumPy:
    """The kernels on NumPy arrays."""

    xp: Any = np

    def cell(
        self,
        x: Any,
        cu_seqlens: Any,
        w: Weights,
        cell: str,
        reverse: bool,
        pool: str,
        pool_weights: Any,
        h0: Any,
        c0: Any,
    ) -> tuple[Any, Any, Any, Any]:
        packed = _C.TemporalCell(cell, *(None if part is None else np.ascontiguousarray(part) for part in w))  # type: ignore[arg-type]
        batch, steps, dtype = len(cu_seqlens) - 1, int(cu_seqlens[-1]), _work_dtype(w.weight_ih)
        most = x.shape[0] if x.ndim == 2 else x.shape[0] * x.shape[1]
        x = x[:steps] if x.ndim == 2 else x
        h_n = np.empty((batch, packed.state_size), dtype)
        c_n = np.empty((batch, packed.hidden_size), dtype) if cell == "lstm" else None
        pooled = None if pool == "none" else np.empty((batch, width(pool) * packed.state_size), dtype)
        states = np.zeros((most, packed.state_size), dtype) if pool == "none" else None
        _C.temporal_pool(
            packed,
            _unit_stride(x),
            cu_seqlens,
            reverse,
            pool,
            _cut(pool_weights, pool, steps),
            h0,
            c0,
            pooled,
            None if states is None else states[:steps],
            h_n,
            c_n,
        )
        return pooled, states, h_n, c_n

    def pool(self, x: Any, cu_seqlens: Any, pool: str, pool_weights: Any) -> Any:
        out = np.empty((len(cu_seqlens) - 1, width(pool) * x.shape[-1]), x.dtype)
        steps = int(cu_seqlens[-1])
        _C.pool_states(np.ascontiguousarray(x[:steps]), cu_seqlens, pool, _cut(pool_weights, pool, steps), out)
        return out

    def dropout(self, x: Any, p: float) -> Any:
        raise NotImplementedError(f"temporal_pool: dropout must be 0 for NumPy arrays, got {p}")

    def work(self, array: Any) -> Any:
        return np.ascontiguousarray(array, _work_dtype(array))

    def cast(self, array: Any, like: Any) -> Any:
        return array.astype(like.dtype)

    def double(self, array: Any) -> Any:
        return array.astype(np.float64)

    def arange(self, count: int, like: Any) -> Any:
        return np.arange(count, dtype=np.int64)

    def rows_of(self, cu_seqlens: Any, count: int) -> Any:
        rows = np.searchsorted(cu_seqlens[1:], np.arange(count), side="right")
        return rows.clip(0, max(len(cu_seqlens) - 2, 0))

    def distinct(self, lengths: Any) -> tuple[Any, Any]:
        return np.unique(lengths, return_inverse=True)


def _cut(pool_weights: Any, pool: str, steps: int) -> Any:
    return pool_weights[:steps] if pool == "gpo" else pool_weights


def _work_dtype(array: Any) -> Any:
    return np.float64 if array.dtype == np.float64 else np.float32


def _unit_stride(x: Any) -> Any:
    return x if x.strides[-1] == x.itemsize else np.ascontiguousarray(x)


def temporal_pool(
    x: Any, lengths: Any, weights: Any, cell: str, pool: str, *, cu_seqlens: Any, combine: str, h0: Any, c0: Any,
    attention: Any, gpo: Any, residual: bool, normalize_states: bool, normalize: bool, dropout: float,
    legacy_padding: bool, batch_first: bool, return_state: bool,
) -> Any:  # fmt: skip
    original = x
    x = _as_numpy(_POOL, "x", x)
    check_choices(_POOL, cell, pool, combine, attention, gpo, residual or normalize_states, dropout)
    check_sequences(_POOL, x, lengths, cu_seqlens, legacy_padding)
    if x.ndim == 3 and not batch_first:
        x = x.swapaxes(0, 1)
    single = x.ndim == 2 and lengths is None and cu_seqlens is None
    layers = layers_of(_POOL, _arrays(_POOL, "weights", weights), cell, x)
    gpo = None if gpo is None else _arrays(_POOL, "gpo", gpo)
    h0, c0, attention = (
        None if array is None else _as_numpy(_POOL, name, array)
        for name, array in (("h0", h0), ("c0", c0), ("attention", attention))
    )
    if single:
        h0, c0 = (None if state is None else state[:, None] for state in (h0, c0))
    starts = _cu_seqlens(_POOL, x, lengths, cu_seqlens)
    features = check_extras(_POOL, layers, cell, combine, x, len(starts) - 1, h0, c0, residual)
    check_pool_parameters(_POOL, features, attention, gpo)
    backend = _NumPy()
    problem = Problem(
        x=x,
        cu_seqlens=starts,
        steps=_steps(x, starts),
        layers=layers,
        cell=cell,
        pool=pool,
        combine=combine,
        h0=None if h0 is None else backend.work(h0),
        c0=None if c0 is None else backend.work(c0),
        attention=attention,
        gpo=gpo,
        residual=residual,
        normalize_states=normalize_states,
        normalize=normalize,
        dropout=dropout,
        run_seqlens=x.shape[1] * np.arange(x.shape[0] + 1, dtype=np.int64) if legacy_padding else None,
    )
    pooled, h_n, c_n = run(backend, problem)
    if pool == "none" and x.ndim == 3:
        full = pooled.reshape(*x.shape[:2], -1) if legacy_padding else padded(backend, pooled, starts, x.shape[1])
        pooled = full if batch_first else full.swapaxes(0, 1)
    elif pool != "none" and single:
        pooled = pooled[0]
    pooled, h_n, c_n = (
        None if part is None else _like(part.astype(x.dtype, copy=False), original) for part in (pooled, h_n, c_n)
    )
    if not return_state:
        return pooled
    if single:
        h_n, c_n = (None if state is None else state[:, 0] for state in (h_n, c_n))
    return pooled, h_n if c_n is None else (h_n, c_n)


def pool_states(x: Any, lengths: Any, pool: str, *, cu_seqlens: Any, attention: Any, gpo: Any) -> Any:
    function = "pool_states"
    array = _as_numpy(function, "x", x)
    check_pool(function, pool, attention, gpo, STATE_POOLS)
    check_sequences(function, array, lengths, cu_seqlens, legacy_padding=False)
    attention = None if attention is None else _as_numpy(function, "attention", attention)
    gpo = None if gpo is None else _arrays(function, "gpo", gpo)
    check_pool_parameters(function, array.shape[-1], attention, gpo)
    starts = _cu_seqlens(function, array, lengths, cu_seqlens)
    pooled = pool_only(_NumPy(), array, starts, _steps(array, starts), pool, attention, gpo).astype(array.dtype)
    return _like(pooled[0] if lengths is None and cu_seqlens is None else pooled, x)


def _steps(x: Any, cu_seqlens: Any) -> int:
    """Of the longest sequence, or a bound of it; at least 1."""
    return max(1, x.shape[1] if x.ndim == 3 else int(np.diff(cu_seqlens).max(initial=1)))


def _arrays(function: str, name: str, mapping: Any) -> Any:
    if not isinstance(mapping, Mapping):
        return mapping  # an error of the check that follows
    return {key: _as_numpy(function, f"{name}[{key!r}]", array) for key, array in mapping.items()}


def _cu_seqlens(function: str, x: npt.NDArray[Any], lengths: Any, cu_seqlens: Any) -> npt.NDArray[np.int64]:
    if cu_seqlens is not None:
        starts = _int64(function, "cu_seqlens", cu_seqlens)
        if starts.ndim != 1 or not len(starts):
            raise ValueError(f"{function}: cu_seqlens must have shape [B + 1], got {list(starts.shape)}")
        if starts[-1] != len(x):
            raise ValueError(f"{function}: cu_seqlens must end at the {len(x)} steps of x, got {starts[-1]}")
        return starts
    if lengths is None:
        return np.array([0, len(x)], np.int64)
    if isinstance(lengths, bool):
        raise TypeError(f"{function}: lengths must be integers, got bool")
    counts = _int64(function, "lengths", np.full(len(x), lengths) if np.ndim(lengths) == 0 else lengths)
    if counts.ndim != 1 or (x.ndim == 3 and len(counts) != len(x)):
        rows = f"[{len(x)}]" if x.ndim == 3 else "[B]"
        raise ValueError(f"{function}: lengths must have shape {rows}, got {list(counts.shape)}")
    most = x.shape[1] if x.ndim == 3 else len(x)
    wrong = (counts < 0) | (counts > most)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"{function}: lengths must be in [0, {most}], got {counts[row]} in row {row}")
    if x.ndim == 2 and counts.sum() != len(x):
        raise ValueError(f"{function}: lengths must sum to the {len(x)} steps of x, got {counts.sum()}")
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
