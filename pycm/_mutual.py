"""Pairs by mutual nearest neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pycm._pairs import Pairs, check_count, check_gallery, check_metric, check_rows, check_threshold, like
from pycm.functional import DISTANCES, topk

if TYPE_CHECKING:
    from pycm.functional import Metric

_NAME = "mutual_neighbours"


def mutual_neighbours(
    queries: Any,
    gallery: Any,
    k: int = 1,
    *,
    metric: Metric = "cosine",
    min_score: float | None = None,
    max_distance: float | None = None,
) -> Pairs:
    """Every pair in which each is among the other's k best, and good enough: pairs to train on that nobody labelled.

    Args:
        queries: ``[N, D]`` float32, float16, bfloat16 or float64; torch (CPU), NumPy or DLPack.
        gallery: ``[M, D]``, M >= 1, of the same dtype and kind.
        k: of the neighbours, at most the smaller of N and M. 1 gives each row at most one partner.
        metric: as for `topk`.
        min_score: for ``dot``, ``cosine`` and ``pearson``: the least score of a pair; None takes any.
        max_distance: the same for distances.

    Returns:
        ``Pairs(query_rows, indices, scores)``, ordered by query, then by index. Exact: ties are as in `topk`, a NaN
        score is no pair.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Two searches: O(N·M·D) time, O((N + M)·(D + k)) memory.
    """
    q = check_rows(_NAME, "queries", queries)
    g = check_gallery(_NAME, q, gallery)
    check_metric(_NAME, metric)
    if check_count(_NAME, "k", k) > min(len(q), len(g)):
        raise ValueError(f"{_NAME}: k must be in [1, {min(len(q), len(g))}], got {k}")
    distance = metric in DISTANCES
    threshold, other = (max_distance, min_score) if distance else (min_score, max_distance)
    if other is not None:
        wanted, unwanted = ("max_distance", "min_score") if distance else ("min_score", "max_distance")
        raise ValueError(f"{_NAME}: {unwanted} must be None for the metric {metric}, which takes {wanted}, got {other}")
    there, back = topk(q, g, k, metric), topk(g, q, k, metric)
    indices, scores, owners = (np.asarray(part) for part in (there.indices, there.scores, back.indices))
    rows = np.repeat(np.arange(len(indices)), k)
    chosen, values = indices.ravel(), scores.ravel()
    keep = chosen >= 0
    keep[keep] = (owners[chosen[keep]] == rows[keep, None]).any(1)
    if threshold is not None:
        least = check_threshold(_NAME, "max_distance" if distance else "min_score", threshold, metric)
        keep &= values <= least if distance else values >= least
    order = np.flatnonzero(keep)[np.lexsort((chosen[keep], rows[keep]))]
    return Pairs(*(like(part[order], queries) for part in (rows, chosen, values)))
