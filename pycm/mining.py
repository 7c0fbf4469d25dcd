"""Pairs worth knowing, exactly and in bounded memory: hard negatives, the best pairs of all, joins, duplicates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pycm._mutual import mutual_neighbours
from pycm._negatives import mine_hard_negatives
from pycm._pairs import (
    BLOCK,
    MAX_PAIRS,
    Int64,
    Pairs,
    Update,
    as_queries,
    check_count,
    check_gallery,
    check_metric,
    check_rows,
    check_threshold,
    encode,
    like,
    progress_bar,
    score_dtype,
    stream,
    threads_of,
)
from pycm.functional import DISTANCES

if TYPE_CHECKING:
    from pycm.functional import Metric

__all__ = [
    "Groups",
    "Pairs",
    "all_pairs_topk",
    "deduplicate",
    "mine_hard_negatives",
    "mutual_neighbours",
    "threshold_join",
]

_SAMPLE = 1024  # at least so many rows are looked at for a threshold


class Groups(NamedTuple):
    """Rows that stay, and which of them each row goes with.

    Attributes:
        kept: int64 ``[K]``, the rows that stay, in order.
        groups: int64 ``[N]``: row i goes with row ``kept[groups[i]]``, which is i itself for a row that stays.
    """

    kept: Any
    groups: Any


def threshold_join(
    queries: Any,
    gallery: Any = None,
    min_score: float | None = None,
    metric: Metric = "cosine",
    *,
    max_distance: float | None = None,
    block: int = BLOCK,
    max_pairs: int = MAX_PAIRS,
    progress: bool | None = None,
) -> Iterator[Pairs]:
    """Every pair of a query and a gallery row that scores `min_score` or better, block by block.

    Args:
        queries: ``[N, D]`` float32, float16, bfloat16 or float64; torch, NumPy or DLPack.
        gallery: ``[M, D]``, M >= 1, of the same dtype and kind. None compares the queries with each other: each
            unordered pair of two rows comes once, with its lower row in `query_rows`.
        min_score: for ``dot``, ``cosine`` and ``pearson``: a pair comes if its exact score is at least this number.
            The score has been rounded to fp32 (unless the inputs are float64), the number is not.
        metric: as for `topk`.
        max_distance: takes the place of min_score for ``euclidean`` and ``sqeuclidean``.
        block: queries worked on at a time.
        max_pairs: the most pairs in a block; a block that would have more is halved, down to a single query, whose
            pairs come together however many they are.
        progress: None shows a bar on a terminal only, True always, False never.

    Yields:
        ``Pairs(query_rows, indices, scores)`` of the inputs' kind, ordered by query, then by index, over all
        blocks. Blocks without a pair are left out. A NaN score is never a pair.

    Raises:
        TypeError, ValueError: for arguments that do not fit; at the call, not at the first block.

    O(N·M·D) time, half of it without a gallery; O((N + M)·D + max_pairs) memory. The pairs and their order depend on
    the inputs alone; how they are cut into blocks depends on `block` and `max_pairs` too.
    """
    name = "threshold_join"
    q = check_rows(name, "queries", queries)
    g = None if gallery is None else check_gallery(name, q, gallery)
    check_metric(name, metric)
    distance = metric in DISTANCES
    value, other = (max_distance, min_score) if distance else (min_score, max_distance)
    wanted, unwanted = ("max_distance", "min_score") if distance else ("min_score", "max_distance")
    if other is not None:
        raise ValueError(f"{name}: {unwanted} must be None for the metric {metric}, which takes {wanted}, got {other}")
    threshold = check_threshold(name, wanted, value, metric)
    block, max_pairs = check_count(name, "block", block), check_count(name, "max_pairs", max_pairs)

    def blocks() -> Iterator[Pairs]:
        with progress_bar(len(q), name, progress) as update:
            for _, pairs in stream(q, g, lambda: threshold, metric, block, max_pairs, update):
                if len(pairs.scores):
                    yield Pairs(*(like(part, queries) for part in pairs))

    return blocks()


def all_pairs_topk(
    embeddings: Any,
    k: int,
    metric: Metric = "cosine",
    *,
    per_row: int | None = None,
    progress: bool | None = None,
) -> Pairs:
    """The k best pairs of all pairs of rows, each unordered pair once (as in paraphrase mining).

    Args:
        embeddings: ``[N, D]`` float32, float16, bfloat16 or float64; torch, NumPy or DLPack.
        k: pairs wanted, at least 1. Fewer come where there are fewer, or their scores are NaN.
        metric: as for `topk`.
        per_row: None is exact. A number looks at so many best matches of each row only, as the `top_k` of
            sentence-transformers' `paraphrase_mining` does (100 there): of a row with more good partners than
            that, some pairs are missed, unless the partner has the row among its own best.
        progress: None shows a bar on a terminal only, True always, False never.

    Returns:
        ``Pairs(query_rows, indices, scores)``, query_rows below indices, ordered by score, best first, then by
        query_rows, then by indices.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Why nothing is missed: the k-th best of some pairs, those of every 16th row, is no better than the k-th best of all,
    so every wanted pair reaches it. A join by that threshold meets all pairs that reach it, in the order of
    (query_rows, indices). A pair is dropped only for k others that come before it: they score better, or the same and
    were met earlier. For the same reason the threshold may rise, as soon as k pairs are held, above the worst of them.

    O(N²·D) time, of which the first pass takes an eighth; O(N·D + k) memory, with `per_row` O(N·(D + per_row)).
    """
    name = "all_pairs_topk"
    x = check_rows(name, "embeddings", embeddings)
    check_metric(name, metric)
    k = check_count(name, "k", k)
    per_row = None if per_row is None else check_count(name, "per_row", per_row)
    n = len(x)
    with progress_bar(n, name, progress) as update:
        if n < 2:
            none = np.zeros(0, np.int64)
            best = Pairs(none, none, none.astype(score_dtype(x)))
        elif per_row is not None:
            best = _first(_neighbours(x, np.arange(n), min(per_row, n - 1), metric, update), k, metric)
        else:
            best = _best_pairs(x, k, metric, update)
    order = np.argsort(_cost(best.scores, metric), kind="stable")
    return Pairs(*(like(part[order], embeddings) for part in best))


def deduplicate(
    embeddings: Any,
    threshold: float,
    metric: Metric = "cosine",
    *,
    mode: Literal["greedy", "components"] = "greedy",
    block: int = BLOCK,
    progress: bool | None = None,
) -> Groups:
    """Which rows to keep so that no duplicates remain, and what the others are duplicates of.

    Two rows match when their exact score is at least `threshold` (a distance: at most).

    Args:
        embeddings: ``[N, D]`` float32, float16, bfloat16 or float64; torch, NumPy or DLPack.
        threshold: a score, or for ``euclidean`` and ``sqeuclidean`` a distance.
        metric: as for `topk`.
        mode: ``greedy``: rows are taken in order, and a row is kept unless it matches one kept before; it goes with
            the first such row. So no two kept rows match, and every other row matches its own. ``components``: rows
            joined by a chain of matches form a group, of which the first row is kept; the ends of a chain need not
            match.
        block: rows compared with the others at a time.
        progress: None shows a bar on a terminal only, True always, False never.

    Returns:
        ``Groups(kept [K], groups [N])``. A row with a NaN matches nothing and is kept. The result depends on the
        rows, their order and the threshold alone.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    O(N²·D) time at worst, O(N·D) memory. Greedy, rows found to be duplicates are compared no further: O(N·K·D).
    """
    name = "deduplicate"
    x = check_rows(name, "embeddings", embeddings)
    check_metric(name, metric)
    threshold, block = check_threshold(name, "threshold", threshold, metric), check_count(name, "block", block)
    if mode not in ("greedy", "components"):
        raise ValueError(f"{name}: mode must be greedy or components, got {mode!r}")
    first = np.arange(len(x))  # the row that each row goes with
    with progress_bar(len(x), name, progress) as update:
        if mode == "greedy":
            _claim(first, x, threshold, metric, block, update)
        else:
            for _, pairs in stream(x, None, lambda: threshold, metric, block, MAX_PAIRS, update):
                _unite(first, pairs.query_rows, pairs.indices)
    kept, groups = np.unique(first, return_inverse=True)
    return Groups(like(kept, embeddings), like(groups.astype(np.int64, copy=False), embeddings))


# ---- duplicates ----


def _claim(first: Int64, x: Any, threshold: float, metric: str, block: int, update: Update) -> None:
    """Greedy: every row that is kept claims the later rows that match it and are unclaimed."""
    rows, x_rows = np.arange(len(x)), x
    done = 0
    while len(rows) > done:
        rows, x_rows, done = rows[done:], x_rows[done:], 0
        unclaimed = first[rows] == rows
        if 2 * unclaimed.sum() <= len(rows):
            update(int(len(rows) - unclaimed.sum()))
            rows, x_rows = rows[unclaimed], x_rows[unclaimed]
        for done, pairs in stream(x_rows, None, lambda: threshold, metric, block, MAX_PAIRS, update):
            queries, starts = np.unique(pairs.query_rows, return_index=True)
            for query, matches in zip(rows[queries], np.split(rows[pairs.indices], starts[1:]), strict=False):
                if first[query] == query:
                    first[matches[first[matches] == matches]] = query
            left = rows[done:]
            if 2 * (first[left] == left).sum() <= len(left):
                break


def _unite(first: Int64, a: Int64, b: Int64) -> None:
    """Join the components of the pairs (a, b); `first` holds the lowest row of each row's component."""
    while True:
        a, b = first[a], first[b]
        apart = a != b
        if not apart.any():
            return
        a, b = a[apart], b[apart]
        np.minimum.at(first, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(up := first[first], first):
            first[:] = up


# ---- the best pairs ----


def _best_pairs(x: Any, k: int, metric: str, update: Update) -> Pairs:
    """The k best pairs, in the order of their rows."""
    sign = 1.0 if metric in DISTANCES else -1.0  # of the cost
    sample = np.arange(0, len(x), max(1, min(16, len(x) // _SAMPLE)))
    # With twice as many matches as pairs are wanted there are enough, though a pair of the sample be met from both.
    seen = _neighbours(x, sample, min(len(x) - 1, 2 * k // len(sample) + 2), metric, lambda _: None)
    worst = math.inf if len(seen.scores) < k else float(_kth(_cost(seen.scores, metric), k))
    best = Pairs(seen.query_rows[:0], seen.indices[:0], seen.scores[:0])
    # The threshold is asked for before every block, and is the worst of the moment.
    for _, pairs in stream(x, None, lambda: sign * worst, metric, BLOCK, MAX_PAIRS, update):  # noqa: B023
        best = _first(Pairs(*(np.concatenate(parts) for parts in zip(best, pairs, strict=True))), k, metric)
        if len(best.scores) == k:
            last = _cost(best.scores, metric).max()
            worst = float(np.nextafter(last, last.dtype.type(-math.inf)))
            if metric in DISTANCES and worst < 0:
                break  # nothing is nearer than 0
    return best


def _neighbours(x: Any, rows: Int64, per_row: int, metric: Any, update: Update) -> Pairs:
    """The distinct unordered pairs that the best matches of `rows` make, in the order of their rows."""
    keys, scores = [], []
    encoded = encode(x, metric)
    for begin in range(0, len(rows), BLOCK):
        some = rows[begin : begin + BLOCK]
        own = np.arange(len(some) + 1)
        found, indices = encoded.topk(as_queries(x[some]), per_row, None, some, own, num_threads=threads_of(x))
        pairs = np.minimum(indices, some[:, None]) * len(x) + np.maximum(indices, some[:, None])
        keys.append(pairs[indices >= 0])
        scores.append(found[indices >= 0])
        update(len(some))
    key, first = np.unique(np.concatenate(keys), return_index=True)
    return Pairs(key // len(x), key % len(x), np.concatenate(scores)[first])


def _first(pairs: Pairs, k: int, metric: str) -> Pairs:
    """The k best; of pairs that score the same, those that come first. Their order stays."""
    if len(pairs.scores) <= k:
        return pairs
    cost = _cost(pairs.scores, metric)
    last = _kth(cost, k)
    keep = cost < last
    keep[np.flatnonzero(cost == last)[: k - keep.sum()]] = True
    return Pairs(*(part[keep] for part in pairs))


def _cost(scores: npt.NDArray[Any], metric: str) -> npt.NDArray[Any]:
    """Smaller is better."""
    return scores if metric in DISTANCES else -scores


def _kth(cost: npt.NDArray[Any], k: int) -> Any:
    return np.partition(cost, k - 1)[k - 1]
