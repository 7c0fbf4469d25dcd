"""Retrieval metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ._rows import as_numpy

if TYPE_CHECKING:
    from .functional import Metric

Int64: TypeAlias = npt.NDArray[np.int64]
Float64: TypeAlias = npt.NDArray[np.float64]

_CHUNK_SCORES = 1 << 22


class RetrievalMetrics(NamedTuple):
    """What `retrieval_metrics` returns.

    Attributes:
        recall_at_k: for each k, the share of queries with a positive among the k best, in [0, 1].
        median_rank, mean_rank: of the best positive, counted from 1 as papers do (1 is perfect).
        mrr: mean reciprocal rank, 1 / (rank from 1).
        ranks: float64 [N], each query's rank, counted from 0; ties give fractions.
    """

    recall_at_k: dict[int, float]
    median_rank: float
    mean_rank: float
    mrr: float
    ranks: Float64

    def __str__(self) -> str:
        recalls = "  ".join(f"R@{k} {100 * recall:.1f}" for k, recall in self.recall_at_k.items())
        return f"{recalls}  median rank {self.median_rank:g}  mean rank {self.mean_rank:.1f}  MRR {self.mrr:.3f}"


def retrieval_metrics(
    scores: Any,
    positives: Sequence[Any] | npt.NDArray[Any],
    ks: Sequence[int] = (1, 5, 10),
) -> RetrievalMetrics:
    """Recall at k, median and mean rank, and mean reciprocal rank of known matches.

    A query's rank is that of its best positive: how many other items score higher. Ties are neither for nor
    against it: ranks and recalls are expectations over all orders of the tied items. So the rank of a single
    positive is the mean of its optimistic and its pessimistic rank, and a matrix of one constant gives
    recall k / M, chance, not 1. `mrr` is that of the expected ranks.

    Args:
        scores: floating point [N, M], larger is better; or a tuple (queries [N, D], gallery [M, D], metric),
            scored by `pycm.similarity` in chunks, so that the N x M matrix is never held. Metrics that are
            distances count smaller as better. Infinities are ordinary values.
        positives: integers [N], one for each query, or N index arrays: gallery items that match query i.
            Repeated indices count once.
        ks: positive ints; a k beyond M is allowed and gives 1.

    Raises:
        ValueError: a NaN score (its row is named), N = 0, no positive for a query, an index outside [0, M),
            shapes that do not fit.
        TypeError: scores that are not floating point, positives or ks that are not integers.

    Time O(N M); memory O(N) beyond the scores.
    """
    if isinstance(scores, tuple):
        n, m, rows = _from_features(scores)
    else:
        n, m, rows = _from_matrix(scores)
    if n == 0 or m == 0:
        raise ValueError(f"retrieval_metrics: scores must not be empty, got [{n}, {m}]")
    wanted = _positives(positives, n, m)
    cutoffs = _cutoffs(ks)
    ranks = np.empty(n)
    hits = np.zeros(len(cutoffs))
    for start, chunk in rows:
        for i, row in enumerate(chunk, start=start):
            above, tied, tied_positives = _counts(row, wanted[i], i)
            # The first of p positives among t + p tied items stands behind t / (p + 1) of the others.
            ranks[i] = above + tied / (tied_positives + 1)
            hits += [_chance(k - above, tied, tied_positives) for k in cutoffs]
    recalls = {k: float(hit) / n for k, hit in zip(cutoffs, hits, strict=True)}
    return RetrievalMetrics(
        recall_at_k=recalls,
        median_rank=float(np.median(ranks)) + 1,
        mean_rank=float(ranks.mean()) + 1,
        mrr=float((1 / (ranks + 1)).mean()),
        ranks=ranks,
    )


def _counts(row: npt.NDArray[Any], positives: Int64, i: int) -> tuple[int, int, int]:
    """(items above the best positive, other items equal to it, positives equal to it)."""
    best = row[positives].max()
    above, equal = int((row > best).sum()), int((row == best).sum())
    if np.isnan(row).any():
        raise ValueError(f"retrieval_metrics: row {i} of the scores has a NaN")
    tied_positives = int((row[positives] == best).sum())
    return above, equal - tied_positives, tied_positives


def _chance(places: int, tied: int, tied_positives: int) -> float:
    """Probability that one of the tied positives gets one of the next `places` places, in a random order."""
    if places <= 0:
        return 0.0
    if places > tied:
        return 1.0
    # All positives land behind: a product of (n - places - i) / (n - i) over the positives.
    i = np.arange(tied_positives, dtype=np.float64)
    n = tied + tied_positives
    return 1.0 - float(np.prod((n - places - i) / (n - i)))


def _from_matrix(scores: Any) -> tuple[int, int, Iterator[tuple[int, npt.NDArray[Any]]]]:
    matrix = as_numpy(scores)
    if matrix.dtype.kind != "f":
        raise TypeError(f"retrieval_metrics: scores must be floating point, got {matrix.dtype}")
    if matrix.ndim != 2:
        raise ValueError(f"retrieval_metrics: scores must have shape [N, M], got {list(matrix.shape)}")
    return matrix.shape[0], matrix.shape[1], iter([(0, matrix)])


def _from_features(given: tuple[Any, ...]) -> tuple[int, int, Iterator[tuple[int, npt.NDArray[Any]]]]:
    if len(given) != 3:
        raise ValueError(
            f"retrieval_metrics: scores must be [N, M] or (queries, gallery, metric), got a tuple of {len(given)}"
        )
    queries, gallery, metric = as_numpy(given[0]), as_numpy(given[1]), given[2]
    for name, array in (("queries", queries), ("gallery", gallery)):
        if array.ndim != 2:
            raise ValueError(f"retrieval_metrics: {name} must have shape [N, D], got {list(array.shape)}")
    return len(queries), len(gallery), _chunks(queries, gallery, metric)


def _chunks(
    queries: npt.NDArray[Any], gallery: npt.NDArray[Any], metric: str
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    from .functional import DISTANCES, similarity

    step = max(1, _CHUNK_SCORES // len(gallery))
    for start in range(0, len(queries), step):
        values = np.asarray(similarity(queries[start : start + step], gallery, cast("Metric", metric)))
        yield start, -values if metric in DISTANCES else values


def _positives(positives: Sequence[Any] | npt.NDArray[Any], n: int, m: int) -> list[Int64]:
    if len(positives) != n:
        raise ValueError(
            f"retrieval_metrics: positives must have one entry for each of the {n} queries, got {len(positives)}"
        )
    out = []
    for i, entry in enumerate(as_numpy(positives) if hasattr(positives, "detach") else positives):
        indices = np.atleast_1d(as_numpy(entry))
        if indices.size == 0:
            raise ValueError(f"retrieval_metrics: positives[{i}] is empty")
        if indices.dtype.kind not in "iu":
            raise TypeError(f"retrieval_metrics: positives[{i}] must be integers, got {indices.dtype}")
        if indices.ndim != 1:
            raise ValueError(f"retrieval_metrics: positives[{i}] must be an int or 1-D, got {indices.ndim}-D")
        wrong = (indices < 0) | (indices >= m)
        if wrong.any():
            raise ValueError(f"retrieval_metrics: positives[{i}] must be in [0, {m - 1}], got {indices[wrong][0]}")
        out.append(np.unique(indices).astype(np.int64))
    return out


def _cutoffs(ks: Sequence[int]) -> list[int]:
    out = []
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
            raise TypeError(f"retrieval_metrics: ks must be ints, got {k!r}")
        if k < 1:
            raise ValueError(f"retrieval_metrics: ks must be positive, got {k}")
        out.append(int(k))
    return out
