"""What the retrieval codebases' metrics are made of: how many scores of a query lie above its positive's, and how many
tie with it, before and after it in the gallery. Every tie rule in use is a function of these three counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pycm.functional import topk
from pycm.ranking import rank

Int64: TypeAlias = npt.NDArray[np.int64]
Float64: TypeAlias = npt.NDArray[np.float64]

_BLOCK_SCORES = 1 << 22  # scores compared at once, 32 MB of fp64


class Counts(NamedTuple):
    """Per query, ``[N]`` each, about its best positive (of equals the one with the largest gallery index).

    Attributes:
        greater: gallery rows that score higher.
        before: other gallery rows of the same score with a smaller index.
        after: the same with a larger index.
        scores: the positive's score.
        last_best: the best gallery row, of equals the one with the largest index; None where it was not asked for.
    """

    greater: Int64
    before: Int64
    after: Int64
    scores: npt.NDArray[Any]
    last_best: Int64 | None

    @property
    def stable_rank(self) -> Int64:
        """Ranks in a stable sort by falling score: of equals, the smaller index comes first."""
        return self.greater + self.before

    @property
    def reversed_rank(self) -> Int64:
        """Ranks in ``argsort(scores, kind="stable")[::-1]``: of equals, the larger index comes first."""
        return self.greater + self.after

    @property
    def mean_rank(self) -> Float64:
        """The mean over all orders of equals."""
        return self.greater + 0.5 * (self.before + self.after)


def _last_best(scores: npt.NDArray[Any]) -> Int64:
    """Per row the column of the largest score, of equals the last."""
    return np.asarray(scores.shape[1] - 1 - scores[:, ::-1].argmax(axis=1), np.int64)


def count_blocks(
    function: str,
    block: Callable[[int, int], npt.NDArray[Any]],
    positives: Int64,
    columns: int,
) -> Counts:
    """Counts from a matrix of scores that is made, or read, a block of rows at a time.

    Args:
        function: named in errors.
        block: ``block(start, stop)`` gives the scores ``[stop - start, columns]`` of these queries.
        positives: ``[N, P]`` columns of each query's positives.
        columns: size of the gallery.

    Raises:
        ValueError: a score is NaN.
    """
    rows = len(positives)
    parts = []
    step = max(1, _BLOCK_SCORES // max(1, columns))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        scores = block(start, stop)
        missing = np.isnan(scores).any(axis=1)
        if missing.any():
            raise ValueError(f"{function}: scores must be numbers, got a NaN for query {start + missing.argmax()}")
        candidates = positives[start:stop]
        best = np.take_along_axis(
            candidates, _last_best(np.take_along_axis(scores, candidates, axis=1))[:, None], axis=1
        )
        own = np.take_along_axis(scores, best, axis=1)
        equal = scores == own
        before = (equal & (np.arange(columns) < best)).sum(axis=1)
        parts.append(
            ((scores > own).sum(axis=1), before, equal.sum(axis=1) - before - 1, own[:, 0], _last_best(scores))
        )
    if not parts:
        none = np.zeros(0, np.int64)
        return Counts(none, none, none, np.zeros(0), none)
    return Counts(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def count_matrix(function: str, scores: npt.NDArray[Any], positives: Int64) -> Counts:
    """Counts from scores ``[N, M]``; see `count_blocks`."""
    return count_blocks(function, lambda start, stop: scores[start:stop], positives, scores.shape[1])


def count_embeddings(function: str, queries: Any, gallery: Any, positives: Int64, *, last_best: bool = False) -> Counts:
    """Counts from embeddings, by exact dot products and without the N×M matrix.

    Args:
        function: named in errors.
        queries: ``[N, D]``; NumPy or torch, of a dtype of `pycm.rank`.
        gallery: ``[M, D]``, of its kind and dtype.
        positives: ``[N, P]`` gallery rows of each query's positives.
        last_best: whether to find the best row of each query too; NumPy only.

    Raises:
        ValueError: an embedding is NaN.

    O(N·M·D) time: one pass over the gallery, and a second one for the queries whose positive ties with another row.
    """
    for name, rows in (("queries", queries), ("gallery", gallery)):
        missing = np.asarray((rows != rows).any(1))  # a row with a NaN, of an array or a tensor
        if missing.any():
            raise ValueError(f"{function}: {name} must be numbers, got a NaN in row {missing.argmax()}")

    n, per_query = positives.shape
    offsets = np.arange(0, n * per_query + 1, per_query, dtype=np.int64)
    ranks = rank(queries, gallery, (offsets, positives.ravel()), "dot")
    scores = np.asarray(ranks.scores).reshape(positives.shape)
    best = np.arange(n) * per_query + (_last_best(scores) if n else 0)
    greater, equal = np.asarray(ranks.greater)[best], np.asarray(ranks.equal)[best]
    own, before = positives.ravel()[best], np.zeros_like(equal)
    tied, columns = np.flatnonzero(equal), np.arange(len(gallery))
    step = max(1, _BLOCK_SCORES // len(gallery))
    for start in range(0, len(tied), step):
        part = tied[start : start + step]
        earlier = columns < own[part, None]
        before[part] = np.asarray(rank(queries[part], gallery, own[part], "dot", mask=earlier).equal)
    top = None
    if last_best:  # topk prefers the smaller index, hence the gallery from its end
        top = len(gallery) - 1 - topk(queries, gallery[::-1], 1, "dot").indices[:, 0]
    return Counts(greater, before, equal - before, scores.ravel()[best], top)


def recall(ranks: npt.NDArray[Any], k: float) -> float:
    """Percentage of ranks below k."""
    return 100.0 * int((ranks < k).sum()) / len(ranks)


Summary: TypeAlias = tuple[float, float, float, float, float]
Ranked: TypeAlias = tuple[Summary, tuple[Float64, Float64]]


def five_numbers(ranks: Float64) -> Summary:
    """R@1, R@5, R@10 in per cent, the median rank rounded down, the mean rank; ranks count from 1 in the last two."""
    return recall(ranks, 1), recall(ranks, 5), recall(ranks, 10), np.floor(np.median(ranks)) + 1, ranks.mean() + 1


def caption_summary(counts: Counts, return_ranks: bool) -> Summary | Ranked:
    """What ``i2t`` and ``t2i`` of VSE++ and its descendants return."""
    ranks = counts.reversed_rank.astype(np.float64)
    if not return_ranks:
        return five_numbers(ranks)
    assert counts.last_best is not None
    return five_numbers(ranks), (ranks, counts.last_best.astype(np.float64))


def captions_of_images(images: int) -> Int64:
    """``[images, 5]``: the captions of image i are 5i, ..., 5i + 4."""
    return np.arange(5 * images, dtype=np.int64).reshape(images, 5)


def images_of_captions(images: int) -> Int64:
    """``[5 * images, 1]``: the image of each caption."""
    return np.repeat(np.arange(images, dtype=np.int64), 5)[:, None]
