"""The specification: every operation in NumPy, fp64, written to be read. The kernels agree with it to the bit.

A pair's score is a sum of fp64 terms in one fixed order: 32 lanes, lane l adding the terms l, l + 32, l + 64, ... in
turn from zero; then lane l adds lane l + 16, l + 8, l + 4, l + 2, l + 1. No product is fused with an addition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pycm._reference_temporal import temporal_pool as temporal_pool

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


# ---- late interaction: items are sets of vectors [T, D], T differing from item to item ----

Sets = Sequence[npt.NDArray[Any]]


def maxsim_pair(x: npt.NDArray[Any], y: npt.NDArray[Any], metric: str, reduce: str) -> float:
    """Sum or mean over the vectors of x of the most similar of y; 0 where either is empty, NaN where any pair is."""
    if not len(x) or not len(y):
        return 0.0
    best = similarity(x, y, metric).max(axis=-1)
    return float(fixed_order_sum(best)) / (len(x) if reduce == "mean" else 1)


def maxsim(queries: Sets, gallery: Sets, metric: str = "dot", reduce: str = "sum", direction: str = "t2i") -> Float64:
    """[N, M], unrounded. t2i sums over the queries' vectors, i2t over the gallery's, both adds the two."""
    scores = np.zeros((len(queries), len(gallery)))
    for i, query in enumerate(queries):
        for j, item in enumerate(gallery):
            forth = maxsim_pair(query, item, metric, reduce) if direction != "i2t" else 0.0
            back = maxsim_pair(item, query, metric, reduce) if direction != "t2i" else 0.0
            scores[i, j] = forth + back
    return scores


def maxsim_topk(
    queries: Sets, gallery: Sets, k: int, metric: str = "dot", reduce: str = "sum", direction: str = "t2i"
) -> Matches:
    """The k best items by rounded score, ties by lowest index; -1 and -inf where NaN leaves fewer."""
    dtype = np.float64 if gallery[0].dtype == np.float64 else np.float32
    table = maxsim(queries, gallery, metric, reduce, direction).astype(dtype)
    scores = np.full((len(queries), k), -np.inf, dtype)
    indices = np.full((len(queries), k), -1, np.int64)
    for i, row in enumerate(table):
        candidates = np.flatnonzero(~np.isnan(row))
        best = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
        scores[i, : len(best)] = row[best]
        indices[i, : len(best)] = best
    return Matches(scores, indices)


# SCAN's feature norms of s [context vectors, attending vectors], over the attending vectors.


def softmax(x: Float64, axis: int) -> Float64:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


def clip(s: Float64) -> Float64:
    return np.where(s > 0, s, 0.1 * s)


def l2norm(s: Float64, eps: float) -> Float64:
    return np.asarray(s / (np.sqrt((s * s).sum(axis=1, keepdims=True)) + eps))


def l1norm(s: Float64, eps: float) -> Float64:
    return np.asarray(s / (np.abs(s).sum(axis=1, keepdims=True) + eps))


FEATURE_NORMS: dict[str, Callable[[Float64, float], Float64]] = {
    "softmax": lambda s, eps: softmax(s, axis=1),
    "l2norm": l2norm,
    "clipped_l2norm": lambda s, eps: l2norm(clip(s), eps),
    "l1norm": l1norm,
    "clipped_l1norm": lambda s, eps: l1norm(clip(s), eps),
    "no_norm": lambda s, eps: s,
    "clipped": lambda s, eps: clip(s),
}

AGGREGATIONS: dict[str, Callable[[Float64, float], Any]] = {
    "LogSumExp": lambda r, scale: np.log(np.exp(scale * (r - r.max())).sum()) / scale + r.max(),
    "Max": lambda r, scale: r.max(),
    "Sum": lambda r, scale: r.sum(),
    "Mean": lambda r, scale: r.mean(),
}


def xattn_score(
    images: Sets,
    captions: Sets,
    direction: str = "t2i",
    feature_norm: str = "clipped_l2norm",
    aggregation: str = "LogSumExp",
    lambda_softmax: float = 9.0,
    lambda_lse: float = 6.0,
    eps: float = 1e-8,
) -> Float64:
    """[N, M]. t2i: each word attends to the regions; i2t: each region to the words. 0 where either has no vectors."""
    scores = np.zeros((len(images), len(captions)))
    for i, image in enumerate(images):
        for j, caption in enumerate(captions):
            x, y = (np.asarray(a, np.float64) for a in ((caption, image) if direction == "t2i" else (image, caption)))
            if not len(x) or not len(y):
                continue
            attention = softmax(lambda_softmax * FEATURE_NORMS[feature_norm](y @ x.T, eps), axis=0)
            context = attention.T @ y
            norms = np.linalg.norm(x, axis=1) * np.linalg.norm(context, axis=1)
            relevance = (x * context).sum(axis=1) / np.maximum(norms, eps)
            scores[i, j] = AGGREGATIONS[aggregation](relevance, lambda_lse)
    return scores
