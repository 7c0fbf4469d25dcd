"""Retrieval metrics of scores and known positives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import _ties
from ._inputs import Counts, Float64, Positives, Scores, read_exclude, read_ks, read_positives, read_scores

if TYPE_CHECKING:
    from ..ranking import Ties


@dataclass(frozen=True, eq=False)
class RetrievalMetrics:
    """Means over the queries. Shares are in [0, 1]; ranks are counted from 1 here and from 0 in `ranks`.

    Attributes:
        recall_at_k: for each k, the share of queries with a positive among the k best (what cross-modal papers call
            recall; trec_eval's success, torchmetrics' hit rate).
        median_rank, mean_rank: of the best positive; 1 is perfect.
        mrr: mean reciprocal rank of the best positive.
        ranks: float64 [N], each query's rank of its best positive, from 0; the expected one when scores tie.
        map: mean average precision.
        map_at_r: mean average precision over the first R places, R the number of a query's positives (Musgrave et al.
            2020).
        r_precision: precision of the first R places.
        ndcg_at_k: normalised discounted cumulative gain of the k best, gain the grade, discount 1 / log2(1 + rank).
        positives_recall_at_k: the share of a query's positives that are among the k best (trec_eval's and torchmetrics'
            recall). The same as recall_at_k where every query has one positive.
        per_query: float64 [N] for each of "rank", "mrr", "map", "map_at_r", "r_precision", "recall@K", "ndcg@K" and
            "positives_recall@K": what the means are taken of.
        folds: where the figures are means over folds, the folds' own.

    Under `strict_compat` (see `pycm.evaluate.protocols`) there are ranks and recalls only: the rest is NaN or empty.
    """

    recall_at_k: dict[int, float]
    median_rank: float
    mean_rank: float
    mrr: float
    ranks: Float64
    map: float
    map_at_r: float
    r_precision: float
    ndcg_at_k: dict[int, float]
    positives_recall_at_k: dict[int, float]
    per_query: Mapping[str, Float64] = field(repr=False)
    folds: tuple[RetrievalMetrics, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        recalls = "  ".join(f"R@{k} {100 * recall:.1f}" for k, recall in self.recall_at_k.items())
        text = f"{recalls}  median rank {self.median_rank:g}  mean rank {self.mean_rank:.1f}  MRR {self.mrr:.3f}"
        return text if np.isnan(self.map) else f"{text}  mAP {self.map:.3f}"


def retrieval_metrics(
    scores: Any,
    positives: Sequence[Any] | npt.NDArray[Any],
    ks: Sequence[int] = (1, 5, 10),
    *,
    ties: Ties = "realistic",
    relevance: Any = None,
    exclude: Any = None,
) -> RetrievalMetrics:
    """Metrics of a ranking whose matches are known.

    Ties are neither for nor against a query: by default every metric is its expectation over all orders of equal scores
    (McSherry & Najork 2008), so that a constant matrix gives chance, recall k / M, and not 1. The median is that of the
    expected ranks.

    Args:
        scores: floating point [N, M], larger is better; or (queries [N, D], gallery [M, D], metric), ranked by
            `pycm.rank` without the N x M matrix; metrics that are distances count smaller as better. NumPy or torch.
            Infinities are ordinary values in a matrix.
        positives: the gallery rows that match each query, at least one: integers [N]; or N index arrays; or compressed
            rows (offsets [N + 1], indices) or a SciPy or torch CSR matrix. Repeated indices count once.
        ks: cutoffs, positive ints; a k beyond M is allowed.
        ties: "realistic": expectation over the orders of equal scores; "optimistic": positives first, the most relevant
            before the others; "pessimistic": positives last.
        relevance: grades of the positives for nDCG, in their order, flat or nested, > 0; 1 when not given. Gain is the
            grade itself: pass 2**grade - 1 for the exponential gain.
        exclude: ints [N], a gallery row that counts for nothing, such as the query itself; -1 for none.

    Raises:
        ValueError: a NaN (its row is named), N = 0, no positive for a query, an index outside [0, M), shapes that do
            not fit.
        TypeError: scores that are not floating point, positives or ks that are not integers.

    Time O(N M), or that of `pycm.rank`; memory O(N + P + M) beyond the scores, P the number of positives.
    """
    return metrics_of(read_scores("retrieval_metrics", scores), positives, ks, ties, relevance, exclude)


def metrics_of(
    scores: Scores, positives: Any, ks: Sequence[int], ties: Ties, relevance: Any = None, exclude: Any = None
) -> RetrievalMetrics:
    """`retrieval_metrics`, of scores that have been read."""
    n, m = scores.shape
    known = read_positives(scores.function, positives, relevance, n, m)
    cutoffs = read_ks(scores.function, ks)
    excluded = read_exclude(scores.function, exclude, known, m)
    return _metrics(scores.function, scores.counts(known, excluded), known, cutoffs, ties)


def metrics_of_ranks(
    ranks: Any, ks: Sequence[int] = (1, 5, 10), *, ties: Ties = "realistic", relevance: Any = None
) -> RetrievalMetrics:
    """The metrics of what `pycm.rank` or `Gallery.rank` returned: its `greater`, `equal` and `offsets`.

    Arguments, ties and errors as `retrieval_metrics`. `ties` acts on the counts, whatever policy `ranks.ranks` follows.
    """
    function = "metrics_of_ranks"
    greater, equal = (np.asarray(x, np.int64) for x in (ranks.greater, ranks.equal))
    offsets = np.arange(len(greater) + 1) if ranks.offsets is None else np.asarray(ranks.offsets, np.int64)
    if len(offsets) < 2:
        raise ValueError(f"{function}: ranks must not be empty")
    # Any distinct numbers do for the gallery rows.
    known = read_positives(function, (offsets, np.arange(len(greater))), relevance, len(offsets) - 1, len(greater))
    return _metrics(function, Counts(greater, equal), known, read_ks(function, ks), ties)


def _metrics(function: str, counts: Counts, known: Positives, ks: list[int], ties: Ties) -> RetrievalMetrics:
    blocks = _ties.tie_blocks(function, *counts, known.rows, known.offsets, known.relevance, ties)
    columns = {
        "rank": _ties.first_rank(blocks),
        "mrr": _ties.reciprocal_rank(blocks),
        "map": _ties.average_precision(blocks),
        "map_at_r": _ties.average_precision(blocks, at_r=True),
        "r_precision": _ties.precision_at_r(blocks),
    }
    for k in ks:
        columns[f"recall@{k}"] = _ties.hit(blocks, k)
        columns[f"ndcg@{k}"] = _ties.ndcg(blocks, k, known.relevance, known.rows, known.offsets)
        columns[f"positives_recall@{k}"] = _ties.recall_of_positives(blocks, k)
    means = {name: float(column.mean()) for name, column in columns.items()}
    return RetrievalMetrics(
        recall_at_k={k: means[f"recall@{k}"] for k in ks},
        median_rank=float(np.median(columns["rank"])) + 1,
        mean_rank=means["rank"] + 1,
        mrr=means["mrr"],
        ranks=columns["rank"],
        map=means["map"],
        map_at_r=means["map_at_r"],
        r_precision=means["r_precision"],
        ndcg_at_k={k: means[f"ndcg@{k}"] for k in ks},
        positives_recall_at_k={k: means[f"positives_recall@{k}"] for k in ks},
        per_query=columns,
    )


def mean_of_folds(folds: Sequence[RetrievalMetrics]) -> RetrievalMetrics:
    """Every figure the mean of the folds', the median rank too; ranks and columns one after another."""

    def mean(name: str) -> Any:
        values = [getattr(fold, name) for fold in folds]
        if isinstance(values[0], dict):
            return {k: float(np.mean([value[k] for value in values])) for k in values[0]}
        return float(np.mean(values))

    names = ("recall_at_k", "median_rank", "mean_rank", "mrr", "map", "map_at_r", "r_precision", "ndcg_at_k")
    columns = {key: np.concatenate([fold.per_query[key] for fold in folds]) for key in folds[0].per_query}
    return RetrievalMetrics(
        **{name: mean(name) for name in names},
        positives_recall_at_k=mean("positives_recall_at_k"),
        ranks=columns["rank"],
        per_query=columns,
        folds=tuple(folds),
    )
