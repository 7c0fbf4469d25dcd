"""The specification: every operation in NumPy, fp64, written to be read. The kernels agree with it to the bit.

A pair's score is a sum of fp64 terms in one fixed order: 32 lanes, lane l adding the terms l, l + 32, l + 64, ... in
turn from zero; then lane l adds lane l + 16, l + 8, l + 4, l + 2, l + 1. No product is fused with an addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

LANES = 32

Float64 = npt.NDArray[np.float64]


class Matches(NamedTuple):
    scores: npt.NDArray[Any]
    indices: npt.NDArray[np.int64]


class Counts(NamedTuple):
    greater: npt.NDArray[np.int64]
    equal: npt.NDArray[np.int64]
    scores: npt.NDArray[Any]


class Pairs(NamedTuple):
    query_rows: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    scores: npt.NDArray[Any]


def fixed_order_sum(terms: Float64) -> Float64:
    """The sum over the last axis, in the library's order."""
    dim = terms.shape[-1]
    steps = -(-dim // LANES)
    padded = np.zeros((*terms.shape[:-1], steps * LANES))
    padded[..., :dim] = terms
    padded = padded.reshape(*terms.shape[:-1], steps, LANES)
    lanes = np.zeros((*terms.shape[:-1], LANES))
    for step in range(steps):
        lanes = lanes + padded[..., step, :]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def norm(x: Float64) -> Float64:
    return np.asarray(np.sqrt(fixed_order_sum(x * x)))


def ratio(total: Float64, norms: Float64) -> Float64:
    """total / norms, and 0 where the norms vanish."""
    return np.where(norms == 0, 0.0, total / np.where(norms == 0, 1.0, norms))


def centre(x: Float64) -> Float64:
    """Rows minus their mean; a constant finite row becomes exactly zero."""
    mean = fixed_order_sum(x) / x.shape[-1]
    constant = (x == x[..., :1]).all(axis=-1) & np.isfinite(x[..., 0])
    return np.where(constant[..., None], 0.0, x - mean[..., None])


# One line a metric: the score of rows x [..., D] with rows y [..., D].


def dot(x: Float64, y: Float64) -> Float64:
    return fixed_order_sum(x * y)


def cosine(x: Float64, y: Float64) -> Float64:
    return ratio(fixed_order_sum(x * y), norm(x) * norm(y))


def pearson(x: Float64, y: Float64) -> Float64:
    return cosine(centre(x), centre(y))


def sqeuclidean(x: Float64, y: Float64) -> Float64:
    return fixed_order_sum((x - y) * (x - y))


def euclidean(x: Float64, y: Float64) -> Float64:
    return np.asarray(np.sqrt(sqeuclidean(x, y)))


METRICS = {
    "dot": dot,
    "cosine": cosine,
    "pearson": pearson,
    "euclidean": euclidean,
    "sqeuclidean": sqeuclidean,
}
DISTANCES = {"euclidean", "sqeuclidean"}


def similarity(x: npt.ArrayLike, y: npt.ArrayLike, metric: str = "cosine") -> Float64:
    """[..., N, D] and [..., M, D] to [..., N, M], in fp64, unrounded."""
    x64, y64 = np.asarray(x, np.float64), np.asarray(y, np.float64)
    with np.errstate(all="ignore"):
        return METRICS[metric](x64[..., :, None, :], y64[..., None, :, :])


def topk(
    queries: npt.NDArray[Any],
    gallery: npt.NDArray[Any],
    k: int,
    metric: str = "cosine",
    mask: npt.NDArray[np.bool_] | None = None,
    exclude: npt.NDArray[np.int64] | None = None,
) -> Matches:
    """Exact matches, best first, ties by lowest index; -1 and -inf (+inf for distances) where too few may match."""
    dtype = np.float64 if queries.dtype == np.float64 else np.float32
    distance = metric in DISTANCES
    scores = np.full((len(queries), k), np.inf if distance else -np.inf, dtype)
    indices = np.full((len(queries), k), -1, np.int64)
    for i, query in enumerate(queries):
        with np.errstate(all="ignore"):
            row = similarity(query[None], gallery, metric)[0].astype(dtype)
        allowed = ~np.isnan(row)
        if mask is not None:
            allowed &= np.broadcast_to(mask, (len(queries), len(gallery)))[i]
        if exclude is not None and exclude[i] >= 0:
            allowed[exclude[i]] = False
        candidates = np.flatnonzero(allowed)
        keys = row[candidates] if distance else -row[candidates]
        best = candidates[np.argsort(keys, kind="stable")[:k]]
        scores[i, : len(best)] = row[best]
        indices[i, : len(best)] = best
    return Matches(scores, indices)


def score_row(query: npt.NDArray[Any], gallery: npt.NDArray[Any], metric: str) -> npt.NDArray[Any]:
    """One query's scores, rounded: what matches are ordered by. [D] and [M, D] to [M]."""
    with np.errstate(all="ignore"):
        scores = similarity(query[None], gallery, metric)[0]
        return np.asarray(scores, np.float64 if query.dtype == np.float64 else np.float32)


def rank(
    queries: npt.NDArray[Any],
    gallery: npt.NDArray[Any],
    positives: Sequence[npt.ArrayLike],
    metric: str = "cosine",
    mask: npt.NDArray[np.bool_] | None = None,
    exclude: Sequence[npt.ArrayLike] | None = None,
) -> Counts:
    """For each of a query's positives, in turn: how many other rows score better, how many the same, and its score.

    Masked and excluded rows are not counted, nor is a NaN; a positive that is masked still has its score.
    """
    greater, equal, scores = [], [], []
    for i, query in enumerate(queries):
        row = score_row(query, gallery, metric)
        allowed = np.ones(len(gallery), bool)
        if mask is not None:
            allowed &= np.broadcast_to(mask, (len(queries), len(gallery)))[i]
        if exclude is not None:
            excluded = np.asarray(exclude[i], np.int64)
            allowed[excluded[excluded >= 0]] = False
        for positive in np.atleast_1d(np.asarray(positives[i], np.int64)):
            others = row[allowed & (np.arange(len(gallery)) != positive)]
            better = others < row[positive] if metric in DISTANCES else others > row[positive]
            greater.append(better.sum())
            equal.append((others == row[positive]).sum())
            scores.append(row[positive])
    dtype = np.float64 if queries.dtype == np.float64 else np.float32
    return Counts(np.array(greater, np.int64), np.array(equal, np.int64), np.array(scores, dtype))


def join(
    queries: npt.NDArray[Any], gallery: npt.NDArray[Any], threshold: float, metric: str = "cosine", after: int = -1
) -> Pairs:
    """Every pair that scores `threshold` or better, by query, then by index; no NaN. The threshold is not rounded.

    With `after` >= 0 only pairs whose index is above `after` + the query's row: each unordered pair of rows once.
    """
    table = np.array([score_row(query, gallery, metric) for query in queries])
    table = table.reshape(len(queries), len(gallery))
    wide = table.astype(np.float64)
    found = wide <= threshold if metric in DISTANCES else wide >= threshold
    if after >= 0:
        found &= np.arange(len(gallery)) > after + np.arange(len(queries))[:, None]
    rows, indices = np.nonzero(found)
    dtype = np.float64 if queries.dtype == np.float64 else np.float32
    return Pairs(rows, indices, table[rows, indices].astype(dtype))
