"""Bootstrap confidence intervals of retrieval metrics (Efron & Tibshirani 1993): percentile, over queries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._rows import as_numpy
from ._inputs import Float64, Int64
from .metrics import RetrievalMetrics

_CHUNK_WEIGHTS = 1 << 22


class Interval(NamedTuple):
    """A figure and the bounds of its percentile interval."""

    value: float
    low: float
    high: float


def bootstrap(
    metrics: RetrievalMetrics,
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: Any = None,
) -> dict[str, Interval]:
    """Percentile intervals of every figure of `metrics`.

    Queries are drawn with replacement, N in each sample; of a mean over folds, within each fold. The gallery stays as
    it is: the interval tells how the figure varies with the queries asked, not with what is searched.

    Args:
        metrics: from `retrieval_metrics` or a direction of a protocol.
        samples: number of samples drawn.
        confidence: share of the samples inside the interval, in (0, 1).
        seed: of the drawing; the same seed gives the same intervals.
        groups: [N], draw whole groups of queries instead, such as the captions of one image: captions of one image
            succeed and fail together, and drawn alone make the interval too narrow.

    Returns:
        An interval for each of "recall@K", "ndcg@K", "positives_recall@K", "median_rank", "mean_rank", "mrr", "map",
        "map_at_r" and "r_precision". The median is the plain one, of metrics under `strict_compat` too.

    O(samples · N) time for each figure; memory bounded.
    """
    return _intervals("bootstrap", [metrics], samples, confidence, seed, groups)


def bootstrap_difference(
    first: RetrievalMetrics,
    second: RetrievalMetrics,
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: Any = None,
) -> dict[str, Interval]:
    """Percentile intervals of `first` less `second`, on the same queries: both see every sample drawn (a paired
    bootstrap).

    An interval without 0 is a difference that does not hang on the queries asked. Arguments as `bootstrap`.

    Raises:
        ValueError: another number of queries, or other figures.
    """
    return _intervals("bootstrap_difference", [first, second], samples, confidence, seed, groups)


def _intervals(
    function: str, metrics: list[RetrievalMetrics], samples: int, confidence: float, seed: int, groups: Any
) -> dict[str, Interval]:
    if isinstance(samples, bool) or not isinstance(samples, (int, np.integer)) or samples < 1:
        raise ValueError(f"{function}: samples must be a positive int, got {samples!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"{function}: confidence must be in (0, 1), got {confidence}")
    shapes = [[len(f.ranks) for f in m.folds or (m,)] for m in metrics]
    if shapes[0] != shapes[-1] or metrics[0].per_query.keys() != metrics[-1].per_query.keys():
        raise ValueError(f"{function}: both must have the same queries and figures, got {shapes[0]} and {shapes[-1]}")
    count = sum(shapes[0])
    codes = np.arange(count) if groups is None else as_numpy(groups)
    if codes.shape != (count,):
        raise ValueError(f"{function}: groups must have shape [{count}], got {list(codes.shape)}")
    rng = np.random.default_rng(seed)
    ends = np.cumsum([0, *shapes[0]])
    values: dict[str, list[float]] = {}
    draws: dict[str, list[Float64]] = {}
    for i, (start, stop) in enumerate(itertools.pairwise(ends)):
        members = np.unique(codes[start:stop], return_inverse=True)[1].reshape(-1)
        figures = [_Figures((m.folds or (m,))[i]) for m in metrics]
        whole = _difference([f.of(np.ones((1, stop - start))) for f in figures])
        drawn = [_difference([f.of(w) for f in figures]) for w in _weights(rng, members, samples)]
        for name in whole:
            values.setdefault(name, []).append(float(whole[name][0]))
            draws.setdefault(name, []).append(np.concatenate([d[name] for d in drawn]))
    tail = (1 - confidence) / 2
    bounds = {name: np.quantile(np.mean(d, axis=0), [tail, 1 - tail]) for name, d in draws.items()}
    return {name: Interval(float(np.mean(v)), *map(float, bounds[name])) for name, v in values.items()}


def _weights(rng: np.random.Generator, members: Int64, samples: int) -> Iterator[npt.NDArray[np.float64]]:
    """How often each query is in each sample, [some, N]: as often as its group was drawn."""
    groups = int(members.max()) + 1
    step = max(1, _CHUNK_WEIGHTS // len(members))
    for start in range(0, samples, step):
        some = min(step, samples - start)
        drawn = rng.integers(0, groups, (some, groups)) + groups * np.arange(some)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=some * groups).reshape(some, groups)
        yield counts[:, members].astype(np.float64)


class _Figures:
    """The figures of one fold under weights of its queries."""

    def __init__(self, metrics: RetrievalMetrics) -> None:
        self.names = [name for name in metrics.per_query if name != "rank"]
        self.columns = np.stack([metrics.per_query[name] for name in ["rank", *self.names]], axis=1)
        self.order = np.argsort(metrics.ranks, kind="stable")
        self.sorted = metrics.ranks[self.order]

    def of(self, weights: Float64) -> dict[str, Float64]:
        total = weights.sum(axis=1)
        means = weights @ self.columns / total[:, None]
        below = np.cumsum(weights[:, self.order], axis=1)
        middle = [(below >= t[:, None]).argmax(axis=1) for t in ((total + 1) // 2, total // 2 + 1)]
        out = {name: means[:, i + 1] for i, name in enumerate(self.names)}
        out["mean_rank"] = means[:, 0] + 1
        out["median_rank"] = (self.sorted[middle[0]] + self.sorted[middle[1]]) / 2 + 1
        return out


def _difference(figures: list[dict[str, Float64]]) -> dict[str, Float64]:
    if len(figures) == 1:
        return figures[0]
    return {name: figures[0][name] - figures[1][name] for name in figures[0]}
