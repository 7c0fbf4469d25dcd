"""`pycm.temporal_pool` for NumPy arrays: the kernels without torch, and without gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pycm import _C
from pycm._temporal_arguments import (
    check_embedding,
    check_ids,
    check_lengths,
    check_sequences,
    evaluate,
    evaluate_pool,
    is_scalar,
    starts_of,
)
from pycm._temporal_layers import Direction, Options, Sequences, padded, width
from pycm.functional import _as_numpy, _int64, _like


class _NumPy:
    """The kernels on NumPy arrays."""

    xp: Any = np

    def cell(self, direction: Direction) -> tuple[Any, Any, Any, Any]:
        x, cu_seqlens, w, cell, reverse, pool, pool_weights, h0, c0, int8 = direction
        packed = _C.TemporalCell(cell, *(None if part is None else np.ascontiguousarray(part) for part in w), int8=int8)  # type: ignore[arg-type, misc]
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
            None,
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
        return array.astype(like.dtype, copy=False)

    def double(self, array: Any) -> Any:
        return array.astype(np.float64)

    def arange(self, count: int, like: Any) -> Any:
        return np.arange(count, dtype=np.int64)

    def rows_of(self, cu_seqlens: Any, count: int) -> Any:
        rows = np.searchsorted(cu_seqlens[1:], np.arange(count), side="right")
        return rows.clip(0, max(len(cu_seqlens) - 2, 0))

    def distinct(self, lengths: Any, count: int) -> tuple[Any, Any, int]:
        unique, which = np.unique(lengths, return_inverse=True)
        return unique, which, max(int(unique.sum()), min(count, 1))


_BACKEND = _NumPy()
_POOL = "temporal_pool"


def _cut(pool_weights: Any, pool: str, steps: int) -> Any:
    return pool_weights[:steps] if pool == "gpo" else pool_weights


def _work_dtype(array: Any) -> Any:
    return np.float64 if array.dtype == np.float64 else np.float32


def _unit_stride(x: Any) -> Any:
    return x if x.strides[-1] == x.itemsize else np.ascontiguousarray(x)


def temporal_pool(x: Any, lengths: Any, cu_seqlens: Any, weights: Any, options: Options) -> Any:
    def like(result: Any) -> Any:
        return tuple(map(like, result)) if isinstance(result, tuple) else _like(result, x)

    ids = None if options.embedding is None else _int64(_POOL, "x", x)
    array = _as_numpy(_POOL, "x", x) if ids is None else _vectors(ids, options.embedding)
    check_sequences(_POOL, array, lengths, cu_seqlens, options.legacy_padding)
    if array.ndim == 3 and not options.batch_first:
        array = array.swapaxes(0, 1)
    h0, c0, attention = (
        None if state is None else _as_numpy(_POOL, name, state)
        for name, state in (("h0", options.h0), ("c0", options.c0), ("attention", options.attention))
    )
    options = options._replace(h0=h0, c0=c0, attention=attention, gpo=_arrays(_POOL, "gpo", options.gpo))
    sequences = _sequences(_POOL, array, lengths, cu_seqlens, options.batch_first, options.legacy_padding)
    if ids is not None:
        if ids.ndim == 2 and not options.legacy_padding:
            ids = ids if options.batch_first else ids.T
            ids = ids[np.arange(ids.shape[1]) < np.diff(sequences.cu_seqlens)[:, None]]
        check_ids(_POOL, ids, len(options.embedding))
    return like(evaluate(_POOL, _BACKEND, sequences, _arrays(_POOL, "weights", weights), options))


def _vectors(ids: npt.NDArray[np.int64], embedding: Any) -> npt.NDArray[Any]:
    """Of ids that may be anything beyond the sequences."""
    matrix: npt.NDArray[Any] = _as_numpy(_POOL, "embedding", embedding)
    check_embedding(_POOL, matrix)
    vectors: npt.NDArray[Any] = matrix[ids.clip(0, len(matrix) - 1)]
    return vectors


def pool_states(x: Any, lengths: Any, cu_seqlens: Any, pool: str, attention: Any, gpo: Any) -> Any:
    function = "pool_states"
    array = _as_numpy(function, "x", x)
    check_sequences(function, array, lengths, cu_seqlens, legacy_padding=False)
    attention = None if attention is None else _as_numpy(function, "attention", attention)
    sequences = _sequences(function, array, lengths, cu_seqlens, batch_first=True, legacy_padding=False)
    return _like(evaluate_pool(function, _BACKEND, sequences, pool, attention, _arrays(function, "gpo", gpo)), x)


def _sequences(
    function: str, x: Any, lengths: Any, cu_seqlens: Any, batch_first: bool, legacy_padding: bool
) -> Sequences:
    starts = _cu_seqlens(function, x, lengths, cu_seqlens)
    if x.ndim == 2:
        steps = max(1, int(np.diff(starts).max(initial=1)))
        return Sequences(x, starts, steps, lambda states: states, single=lengths is None and cu_seqlens is None)

    def restore(states: Any) -> Any:
        full = states.reshape(*x.shape[:2], -1) if legacy_padding else padded(_BACKEND, states, starts, x.shape[1])
        return full if batch_first else full.swapaxes(0, 1)

    return Sequences(x, starts, max(1, x.shape[1]), restore)


def _arrays(function: str, name: str, mapping: Any) -> Any:
    if not isinstance(mapping, Mapping):
        return mapping  # None, or an error of the check that follows
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
    counts = _int64(function, "lengths", np.full(len(x), lengths) if is_scalar(lengths) else lengths)
    if counts.ndim != 1 or (x.ndim == 3 and len(counts) != len(x)):
        rows = f"[{len(x)}]" if x.ndim == 3 else "[B]"
        raise ValueError(f"{function}: lengths must have shape {rows}, got {list(counts.shape)}")
    most = x.shape[1] if x.ndim == 3 else len(x)
    check_lengths(function, counts, most)
    if x.ndim == 2 and counts.sum() != len(x):
        raise ValueError(f"{function}: lengths must sum to the {len(x)} steps of x, got {counts.sum()}")
    return starts_of(counts)
