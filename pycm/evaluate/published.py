"""Ranks and medians as the original evaluation scripts define them, ties included. See docs/evaluation.md for what
differs.

Scores have a row for each image or video ("visual") and a column for each text; owner[j] is the visual that text j
describes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ._inputs import Counts, Float64, Int64, Scores, read_positives
from .metrics import RetrievalMetrics

Original: TypeAlias = Literal["vsepp", "open_clip", "clip4clip", "mmt", "frozen"]


class Ranking(NamedTuple):
    """Ranks from 0, one a query but for CLIP4Clip's, and how their median is taken."""

    ranks: Float64
    median: Callable[[Float64], float]


def _median(ranks: Float64) -> float:
    return float(np.median(ranks))


def _floored(ranks: Float64) -> float:
    return float(np.floor(np.median(ranks)))


def _lower(ranks: Float64) -> float:
    return float(np.sort(ranks)[(len(ranks) - 1) // 2])


def published_metrics(ranking: Ranking, ks: Sequence[int]) -> RetrievalMetrics:
    """The figures the originals print; what they do not define is NaN or left out."""
    ranks = ranking.ranks
    # A tie at the top has a fractional rank below 1, and is no hit at 1 for those that average ties.
    columns = {f"recall@{k}": (ranks <= 0 if k == 1 else ranks < k).astype(np.float64) for k in ks}
    columns |= {"rank": ranks, "mrr": 1 / (ranks + 1)}
    return RetrievalMetrics(
        recall_at_k={k: float(columns[f"recall@{k}"].mean()) for k in ks},
        median_rank=ranking.median(ranks) + 1,
        mean_rank=float(ranks.mean()) + 1,
        mrr=float(columns["mrr"].mean()),
        ranks=ranks,
        map=np.nan,
        map_at_r=np.nan,
        r_precision=np.nan,
        ndcg_at_k={},
        positives_recall_at_k={},
        per_query=columns,
    )


def rank_as(original: Original, scores: Scores, owner: Int64) -> tuple[Ranking, Ranking]:
    """(visual -> text, text -> visual)."""
    return _ORIGINALS[original](scores, owner)


def _vsepp(scores: Scores, owner: Int64) -> tuple[Ranking, Ranking]:
    """VSE++, SCAN, VSE∞: an unstable ascending argsort, reversed; an image's rank is its best caption's."""
    to_text = np.empty(scores.shape[0])
    for start, chunk in scores.chunks():
        places = _reversed_argsort_places(chunk)
        for i, row in enumerate(places):
            to_text[start + i] = row[owner == start + i].min()
    to_visual = np.empty(scores.shape[1])
    for start, chunk in scores.transposed.chunks():
        rows = np.arange(len(chunk))
        to_visual[start + rows] = _reversed_argsort_places(chunk)[rows, owner[start + rows]]
    return Ranking(to_text, _floored), Ranking(to_visual, _floored)


def _reversed_argsort_places(chunk: npt.NDArray[Any]) -> Int64:
    order = np.argsort(chunk, axis=1)[:, ::-1]
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(chunk.shape[1])[None], axis=1)
    return places


def _open_clip(scores: Scores, owner: Int64) -> tuple[Ranking, Ranking]:
    """Pair i with i; equal scores go to the lower index."""
    return Ranking(_places(scores, owner), _floored), Ranking(_places(scores.transposed, owner), _floored)


def _places(scores: Scores, known: Int64) -> Float64:
    """The place of row i's item `known[i]`, equal scores in order of index."""
    out = np.empty(len(known))
    for start, chunk in scores.chunks():
        own = known[start : start + len(chunk)]
        values = chunk[np.arange(len(chunk)), own][:, None]
        earlier = (chunk == values) & (np.arange(chunk.shape[1]) < own[:, None])
        out[start : start + len(chunk)] = np.count_nonzero((chunk > values) | earlier, axis=1)
    return out


def _clip4clip(scores: Scores, owner: Int64) -> tuple[Ranking, Ranking]:
    """One text each: every place with a score equal to the match's enters the list of ranks. Several: texts rank
    videos by a double argsort with the lower median; videos rank videos, each standing for the best of its texts.
    """
    n = scores.shape[0]
    if np.array_equal(owner, np.arange(n)):
        every = np.arange(n)
        to_text, to_visual = (_tied_places(_count(s, every)) for s in (scores, scores.transposed))
        return Ranking(to_text, _median), Ranking(to_visual, _median)
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(n))
    best = np.empty((n, n))
    for start, chunk in scores.chunks():
        best[start : start + len(chunk)] = np.maximum.reduceat(chunk[:, order], starts, axis=1)
    grouped = _count(Scores(scores.function, best, best.T, None), np.arange(n))
    return Ranking(_tied_places(grouped), _median), Ranking(_places(scores.transposed, owner), _lower)


def _tied_places(counts: Counts) -> Float64:
    sizes = counts.equal + 1
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.asarray(np.repeat(counts.greater, sizes) + within, np.float64)


def _mmt(scores: Scores, owner: Int64) -> tuple[Ranking, Ranking]:
    """Places of equal scores are averaged; a video's rank is its best caption's."""
    texts = _count(scores.transposed, owner)
    return _best_average(scores, owner), Ranking(texts.greater + texts.equal / 2, _median)


def _frozen(scores: Scores, owner: Int64) -> tuple[Ranking, Ranking]:
    """As MMT, but a text's match comes first among equals."""
    return _best_average(scores, owner), Ranking(_count(scores.transposed, owner).greater.astype(np.float64), _median)


def _best_average(scores: Scores, owner: Int64) -> Ranking:
    order = np.argsort(owner, kind="stable")
    offsets = np.searchsorted(owner[order], np.arange(scores.shape[0] + 1))
    counts = _count(scores, (offsets, order))
    return Ranking(np.minimum.reduceat(counts.greater + counts.equal / 2, offsets[:-1]), _median)


def _count(scores: Scores, known: Any) -> Counts:
    return scores.counts(read_positives(scores.function, known, None, *scores.shape))


_ORIGINALS: dict[str, Callable[[Scores, Int64], tuple[Ranking, Ranking]]] = {
    "vsepp": _vsepp,
    "open_clip": _open_clip,
    "clip4clip": _clip4clip,
    "mmt": _mmt,
    "frozen": _frozen,
}
