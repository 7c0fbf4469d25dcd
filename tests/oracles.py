"""Independent answers to compare with: an exact one in rationals, a wide one in long double, a fast one in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

import pycm
from pycm import reference

Array = npt.NDArray[Any]
METRICS = pycm.METRICS
DISTANCES = pycm.DISTANCES
_CHUNK_TERMS = 1 << 22  # fp64 terms held at a time
_TINY = np.finfo(np.longdouble).tiny


def widen(array: Any) -> Array:
    """NumPy, or a torch tensor of any dtype, as the NumPy array that holds its values exactly."""
    if isinstance(array, np.ndarray):
        return array
    import torch

    array = array.detach().resolve_neg()
    return array.float().numpy() if array.dtype == torch.bfloat16 else array.numpy()


def topk(queries: Any, gallery: Any, k: int, metric: str, allowed: Array | None = None) -> tuple[Array, Array]:
    """reference.topk with whole matrices instead of a loop over queries; `allowed` is [M] or [N, M]."""
    q, g = widen(queries), widen(gallery)
    dtype = np.float64 if q.dtype == np.float64 else np.float32
    scores, indices = np.empty((len(q), k), dtype), np.empty((len(q), k), np.int64)
    if allowed is not None:
        allowed = np.broadcast_to(allowed, (len(q), len(g)))
    for rows in _row_chunks(len(q), g.shape):
        with np.errstate(all="ignore"):
            table = reference.similarity(q[rows], g, metric).astype(dtype)
        if allowed is not None:
            table[~allowed[rows]] = np.nan
        scores[rows], indices[rows] = best_of(table, k, metric)
    return scores, indices


def best_of(table: Array, k: int, metric: str) -> tuple[Array, Array]:
    """The k best of each row of a table of scores, NaN for none."""
    order = np.argsort(table if metric in DISTANCES else -table, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(table, order, 1)
    missing = np.isnan(best)
    filler = best.dtype.type(np.inf if metric in DISTANCES else -np.inf)
    return np.where(missing, filler, best), np.where(missing, -1, order)


def _row_chunks(rows: int, gallery: tuple[int, ...]) -> Iterator[slice]:
    per_row = gallery[0] * -(-gallery[1] // 32) * 32
    step = max(1, _CHUNK_TERMS // per_row)
    return (slice(begin, begin + step) for begin in range(0, rows, step))


def assert_exact(
    got: pycm.Matches, queries: Any, gallery: Any, k: int, metric: str, allowed: Array | None = None
) -> None:
    """Bit for bit the specification's matches."""
    assert_same(got, topk(queries, gallery, k, metric, allowed), f"{metric} k={k}")


def assert_same(got: Any, want: Any, what: str = "") -> None:
    """Two results agree in every bit of scores and indices."""
    scores, indices = np.asarray(got[0]), np.asarray(got[1])
    want_scores, want_indices = np.asarray(want[0]), np.asarray(want[1])
    assert scores.dtype == want_scores.dtype
    assert indices.dtype == np.int64
    assert scores.shape == want_scores.shape == indices.shape
    if scores.tobytes() == want_scores.tobytes() and np.array_equal(indices, want_indices):
        return
    bits = np.dtype(f"u{scores.itemsize}")
    wrong = (np.ascontiguousarray(scores).view(bits) != np.ascontiguousarray(want_scores).view(bits)) | (
        indices != want_indices
    )
    row, column = np.argwhere(wrong)[0]
    raise AssertionError(
        f"{what}: {wrong.sum()} of {wrong.size} matches differ; first at query {row}, place {column}: got "
        f"{scores[row, column]!r} of row {indices[row, column]}, expected {want_scores[row, column]!r} of row "
        f"{want_indices[row, column]}"
    )


def truth(x: Any, y: Any, metric: str) -> Array:
    """Scores in long double (64 bits of mantissa on x86), for measuring errors of fp32 and fp64 results."""
    a, b = widen(x).astype(np.longdouble), widen(y).astype(np.longdouble)
    if metric in DISTANCES:
        square = ((a[..., :, None, :] - b[..., None, :, :]) ** 2).sum(-1)
        return np.asarray(np.sqrt(square) if metric == "euclidean" else square)
    if metric == "pearson":
        a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    if metric != "dot":
        a, b = (m / np.maximum(np.sqrt((m * m).sum(-1, keepdims=True)), _TINY) for m in (a, b))
    return np.asarray((a[..., :, None, :] * b[..., None, :, :]).sum(-1))


def rational_square(x: list[int], y: list[int], metric: str) -> tuple[Fraction, int]:
    """(|score|^2, sign of the score) of two rows of integers, with no rounding at all."""
    if metric in DISTANCES:
        total = Fraction(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)))
        return (total if metric == "euclidean" else total**2), 1
    if metric == "pearson":
        n = len(x)
        x, y = [n * a - sum(x) for a in x], [n * b - sum(y) for b in y]
    product = sum(a * b for a, b in zip(x, y, strict=True))
    sign = (product > 0) - (product < 0)
    if metric == "dot":
        return Fraction(product**2), sign
    norms = sum(a * a for a in x) * sum(b * b for b in y)
    return (Fraction(product**2, norms), sign) if norms else (Fraction(0), 0)
