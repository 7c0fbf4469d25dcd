"""Whole tables of exact scores, and what follows from them by definition: ranks, joins, best pairs, duplicates."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
from oracles import DISTANCES, Array

from pycm import reference


def table(queries: Any, gallery: Any, metric: str) -> Array:
    """The exact score of every pair, rounded as matches are ordered. [N, M]"""
    q, g = oracles.widen(queries), oracles.widen(gallery)
    scores = np.empty((len(q), len(g)), np.float64 if q.dtype == np.float64 else np.float32)
    for rows in oracles._row_chunks(len(q), g.shape) if len(g) else ():
        with np.errstate(all="ignore"):
            scores[rows] = reference.similarity(q[rows], g, metric).astype(scores.dtype)
    return scores


def costs(scores: Array, metric: str) -> Array:
    """Smaller is better."""
    return scores if metric in DISTANCES else -scores


def counts(
    scores: Array, rows: Array, positives: Array, metric: str, allowed: Array | None = None
) -> tuple[Array, Array, Array]:
    """(greater, equal, scores) of the pairs (rows, positives) in a table of scores; `allowed` is [M] or [N, M]."""
    own = scores[rows, positives]
    cost = costs(scores, metric)[rows]  # [P, M]
    counted = np.ones(cost.shape, bool) if allowed is None else np.broadcast_to(allowed, scores.shape)[rows].copy()
    counted[np.arange(len(rows)), positives] = False
    mine = costs(own, metric)[:, None]
    return ((cost < mine) & counted).sum(1), ((cost == mine) & counted).sum(1), own


def join(queries: Any, gallery: Any, threshold: float, metric: str) -> list[tuple[int, int, float]]:
    scores = table(queries, gallery, metric).astype(np.float64)
    found = scores <= threshold if metric in DISTANCES else scores >= threshold
    return [(int(i), int(j), float(scores[i, j])) for i, j in zip(*np.nonzero(found), strict=True)]


def self_join(x: Any, threshold: float, metric: str) -> list[tuple[int, int, float]]:
    return [pair for pair in join(x, x, threshold, metric) if pair[0] < pair[1]]


def best_pairs(x: Any, k: int, metric: str) -> list[tuple[int, int, float]]:
    """By score, then by rows; no NaN."""
    scores = table(x, x, metric)
    pairs = [(i, j, float(scores[i, j])) for i in range(len(scores)) for j in range(i + 1, len(scores))]
    sign = 1 if metric in DISTANCES else -1
    return sorted((p for p in pairs if p[2] == p[2]), key=lambda p: (sign * p[2], p[0], p[1]))[:k]


def greedy(x: Any, threshold: float, metric: str) -> list[int]:
    """For each row the kept row that it goes with."""
    partners = {pair[:2] for pair in self_join(x, threshold, metric)}
    first: list[int] = []
    for i in range(len(x)):
        first.append(next((j for j in range(i) if first[j] == j and (j, i) in partners), i))
    return first


def components(x: Any, threshold: float, metric: str) -> list[int]:
    """For each row the lowest row of its connected component."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = np.array([pair[:2] for pair in self_join(x, threshold, metric)], int).reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (len(x), len(x)))
    labels = connected_components(graph, directed=False)[1]
    return [int(np.flatnonzero(labels == label)[0]) for label in labels]
