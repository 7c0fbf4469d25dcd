"""Ranks of known matches, without the N×M matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from pycm import _C
from pycm.functional import Screen, _as_mask, _as_numpy, _both_torch, _compressed_rows, _exclude_rows, _like, _sizes

if TYPE_CHECKING:
    from pycm.functional import A, Metric

__all__ = ["Ranks", "Screen", "Ties", "rank"]

Ties: TypeAlias = Literal["optimistic", "realistic", "pessimistic"]

# The share of the rows that score the same and stand before the positive.
_TIES_BEFORE = {"optimistic": 0.0, "realistic": 0.5, "pessimistic": 1.0}


class Ranks(NamedTuple):
    """Where the positives of each query stand.

    ``[N]`` where every query has one positive; else ``[P]``, the positives of all queries one after another.

    Attributes:
        ranks: float64, counted from 0: `greater` plus the share of `equal` that the tie policy asks for.
        greater: int64, gallery rows that score better than the positive.
        equal: int64, other gallery rows with exactly the positive's score.
        scores: the positives' exact scores, float32 (float64 for float64 inputs).
        offsets: int64 ``[N + 1]``: those of query i are ``offsets[i]`` to ``offsets[i + 1]``. None where every query
            has one.
    """

    ranks: Any
    greater: Any
    equal: Any
    scores: Any
    offsets: Any


def rank(
    queries: A,
    gallery: A,
    positives: Any,
    metric: Metric = "cosine",
    *,
    ties: Ties = "realistic",
    mask: Any = None,
    exclude: Any = None,
    screen: Screen = "auto",
) -> Ranks:
    """How many rows of the gallery stand before each query's positives.

    Args:
        queries: ``[N, D]`` float32, float16, bfloat16 or float64; torch, NumPy or DLPack.
        gallery: ``[M, D]``, M >= 1, of the same dtype and kind.
        positives: rows of the gallery that are to be found: integers ``[N]``, one for each query; or any number for
            each, possibly none: a list of N sequences, a pair ``(offsets [N + 1], indices [P])``, a SciPy or a torch
            CSR matrix ``[N, M]`` whose stored entries are positives. Other positives of a query count like any row.
        metric: ``dot``, ``cosine``, ``pearson``, ``euclidean`` or ``sqeuclidean``; nearer rows are better for the
            last two.
        ties: where a positive stands among the rows with exactly its score: ``optimistic`` before them,
            ``pessimistic`` behind them, ``realistic`` in the middle, the mean over all orders.
        mask, exclude: pairs that do not count, as in `topk`. A positive that is masked or excluded still has its
            score, and its rank among the rows that count.
        screen: the low-precision pass that decides the clear pairs: ``auto``, ``float32``, ``bfloat16`` or ``int8``.
            It changes the time alone.

    Returns:
        ``Ranks(ranks, greater, equal, scores, offsets)``, of the inputs' kind; no gradient flows through it. Scores
        are those of `topk`: fp64 in a fixed order, rounded to fp32 (not rounded for float64 inputs), and compared
        after rounding. A NaN score of another row is neither greater nor equal.

    Raises:
        TypeError: for integer arrays, differing dtypes, no array, or positives that are not integers.
        ValueError: for shapes that do not fit, an empty gallery, an index outside it, an unknown name, or a positive
            whose score is NaN; the query's row is named. On CUDA, where a call does not wait for its values, the rank
            of such a positive is NaN, and an index outside the gallery in a CUDA tensor fails a device-side assertion.
        NotImplementedError: for a tensor with a forward-mode tangent, or on a device that the build has no kernels for.

    O(N·M·D) time, O((N + M)·D + P) memory.
    """
    if ties not in _TIES_BEFORE:
        raise ValueError(f"rank: ties must be one of {', '.join(_TIES_BEFORE)}, got {ties!r}")
    if _both_torch("rank", "queries", queries, "gallery", gallery):
        import pycm._torch_ops as ops

        counted = ops.rank(queries, gallery, positives, metric, mask, exclude, screen)  # type: ignore[arg-type]
        ranks = counted[0].double().add(counted[1], alpha=_TIES_BEFORE[ties])
        if ranks.is_cuda:  # not looked at: that would wait for the device
            ranks = ranks.masked_fill_(counted[2].isnan(), np.nan)
        return Ranks(ranks, *counted)
    q, g = _as_numpy("rank", "queries", queries), _as_numpy("rank", "gallery", gallery)
    n, m = _sizes("rank", q, g)
    indices, starts = _compressed_rows("rank", "positives", positives, n, m)
    offsets = np.arange(n + 1, dtype=np.int64) if starts is None else starts
    left, left_offsets = (None, None) if exclude is None else _exclude_rows("rank", exclude, n, m)
    masked = None if mask is None else _as_mask("rank", mask)
    greater, equal, scores = _C.rank(q, g, indices, offsets, metric, masked, left, left_offsets, screen)
    _check_scores("rank", scores, indices, offsets)
    ranks = greater + _TIES_BEFORE[ties] * equal
    return Ranks(*(None if part is None else _like(part, queries) for part in (ranks, greater, equal, scores, starts)))


def _check_scores(function: str, scores: Any, positives: Any, offsets: Any) -> None:
    """No NaN among the positives' scores; NumPy arrays or CPU tensors."""
    missing = np.isnan(np.asarray(scores))
    if missing.any():
        first = int(np.argmax(missing))
        row, positive = int(np.searchsorted(np.asarray(offsets), first, side="right")) - 1, int(positives[first])
        raise ValueError(f"{function}: queries row {row} has a NaN score with its positive {positive}")
