"""Hard negatives: what a query would find, but must not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pycm import reference
from pycm._device import on_host
from pycm._pairs import (
    BLOCK,
    Int64,
    check_count,
    check_gallery,
    check_metric,
    check_number,
    check_rows,
    like,
    progress_bar,
    score_dtype,
)
from pycm._rows import as_numpy
from pycm.functional import DISTANCES, Matches, _as_mask, _compressed_rows, topk

if TYPE_CHECKING:
    from pycm.functional import Metric

_NAME = "mine_hard_negatives"
_CANDIDATES = 1 << 22  # looked at together
_TERMS = 1 << 22  # of positive pairs scored together


def mine_hard_negatives(
    queries: Any,
    gallery: Any,
    positives: Any,
    *,
    k: int,
    metric: Metric = "cosine",
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    min_score: float | None = None,
    max_score: float | None = None,
    range_min: int = 0,
    range_max: int | None = None,
    mask: Any = None,
    sampling: Literal["top", "random"] = "top",
    seed: int = 0,
    progress: bool | None = None,
) -> Matches:
    """For each query the k best rows of the gallery that are none of its positives and pass the filters.

    The options are those of sentence-transformers' function of this name. A query's candidates are all rows but its
    positives, ordered as by `topk`; a candidate's rank is its place among them.

    Args:
        queries: ``[N, D]`` float32, float16, bfloat16 or float64; torch, NumPy or DLPack.
        gallery: ``[M, D]``, M >= 1, of the same dtype and kind.
        positives: rows of the gallery that match a query, as for `rank`: integers ``[N]``, a list of N sequences, a
            pair ``(offsets [N + 1], indices)``, a SciPy or a torch CSR matrix ``[N, M]``.
        k: negatives wanted for each query, in [1, M].
        metric: as for `topk`.
        absolute_margin: a negative scores at most ``p - absolute_margin``, p being the score of the query's positive;
            for a distance p, at least ``p + absolute_margin``.
        relative_margin: a negative scores at most ``p - relative_margin * abs(p)``; for a distance p, at least
            ``p + relative_margin * p``. NV-Retriever (arXiv:2407.15831) takes 0.05. Of several positives the one that
            scores worst counts, and a query without positives has no margin. Evaluated in fp64 of the exact scores.
        min_score, max_score: negatives' scores lie between them, ends included; for a distance metric they bound the
            distance.
        range_min: candidates of a lower rank are skipped, since some may be unlabelled positives.
        range_max: candidates of this rank and above are not looked at; at least range_min + k. None has no limit:
            as deep as k negatives take.
        mask: booleans ``[M]`` or ``[N, M]``: rows that may be negatives at all, as in `topk`.
        sampling: ``top`` takes the first k that pass; ``random`` any k of those that pass, each set as likely as any
            other, and needs range_max. A query's sample depends on its candidates, its row number and the seed.
        seed: for ``random``, at least 0.
        progress: None shows a bar on a terminal only, True always, False never.

    Returns:
        ``Matches(scores [N, k], indices [N, k])``, best first; -1 and -inf (+inf for a distance) where fewer pass.

    Raises:
        TypeError, ValueError: for arguments that do not fit; with a margin also for a positive whose score is NaN.

    Two things differ from sentence-transformers: ranks are counted before anything is filtered, range_min as well as
    range_max, and without range_max the search goes on until k negatives pass where the original stops after some
    ten times k candidates.

    O(N·M·D) time for each time that a query's depth is quadrupled because too few candidates passed; memory is
    O((N + M)·D + N·k).
    """
    q = check_rows(_NAME, "queries", queries)
    g = check_gallery(_NAME, q, gallery)
    check_metric(_NAME, metric)
    n, m = len(q), len(g)
    k, range_min = check_count(_NAME, "k", k), check_count(_NAME, "range_min", range_min, 0)
    if k > m:
        raise ValueError(f"{_NAME}: k must be in [1, {m}], got {k}")
    if sampling not in ("top", "random"):
        raise ValueError(f"{_NAME}: sampling must be top or random, got {sampling!r}")
    if range_max is not None and check_count(_NAME, "range_max", range_max) < range_min + k:
        raise ValueError(f"{_NAME}: range_max must be at least range_min + k = {range_min + k}, got {range_max}")
    if sampling == "random" and range_max is None:
        raise ValueError(f"{_NAME}: range_max must be given for sampling='random', got None")
    seed = check_count(_NAME, "seed", seed, 0)
    masks = None if mask is None else _as_mask(_NAME, mask)
    if masks is not None and masks.dtype != np.bool_:
        raise TypeError(f"{_NAME}: mask must be a boolean array, got {masks.dtype}")
    if masks is not None and masks.shape not in ((m,), (n, m)):
        raise ValueError(f"{_NAME}: mask must have shape [{m}] or [{n}, {m}], got {list(masks.shape)}")
    positive_rows, offsets = _positive_rows(positives, n, m)

    # In gains, of which larger is better for distances too.
    sign = -1.0 if metric in DISTANCES else 1.0
    least = -math.inf if min_score is None else check_number(_NAME, "min_score", min_score)
    most = math.inf if max_score is None else check_number(_NAME, "max_score", max_score)
    low, high = (least, most) if sign > 0 else (-most, -least)
    ceiling = np.full(n, high)
    if absolute_margin is not None or relative_margin is not None:
        worst = _worst_gain(q, g, positive_rows, offsets, metric, sign)
        finite = np.where(np.isinf(worst), 0.0, worst)
        if absolute_margin is not None:
            margin = check_number(_NAME, "absolute_margin", absolute_margin)
            ceiling = np.minimum(ceiling, worst - margin)
        if relative_margin is not None:
            margin = check_number(_NAME, "relative_margin", relative_margin)
            ceiling = np.minimum(ceiling, worst - margin * np.abs(finite))

    scores = np.full((n, k), -sign * math.inf, score_dtype(q))
    indices = np.full((n, k), -1, np.int64)
    deepest = min(m, range_max or m)
    depth = min(deepest, range_min + k) if sampling == "top" else deepest
    todo = np.arange(n)
    with progress_bar(n, _NAME, progress) as update:
        while len(todo):
            step = max(1, min(BLOCK, _CANDIDATES // depth))
            unfinished = []
            for rows in np.split(todo, range(step, len(todo), step)):
                found = topk(
                    q[rows],
                    g,
                    depth,
                    metric,
                    mask=masks[rows] if masks is not None and masks.ndim == 2 else masks,
                    exclude=_take_rows(positive_rows, offsets, rows),
                )
                values, candidates = as_numpy(found.scores), as_numpy(found.indices)
                gains = sign * values.astype(np.float64)
                passing = (candidates >= 0) & (gains >= low) & (gains <= ceiling[rows, None])
                passing[:, :range_min] = False
                # What lies deeper is no better: it fails if the last candidate is missing or too easy.
                done = (passing.sum(1) >= k) | (candidates[:, -1] < 0) | (gains[:, -1] < low) | (depth == deepest)
                chosen = _chosen(passing[done], k, rows[done] if sampling == "random" else None, seed)
                take = np.take_along_axis(passing[done], chosen, 1)
                for out, of in ((scores, values), (indices, candidates)):
                    out[rows[done]] = np.where(take, np.take_along_axis(of[done], chosen, 1), out[rows[done]])
                unfinished.append(rows[~done])
                update(int(done.sum()))
            todo, depth = np.concatenate(unfinished), min(deepest, 4 * depth)
    return Matches(like(scores, queries), like(indices, queries))


def _positive_rows(positives: Any, n: int, m: int) -> tuple[Int64, Int64]:
    """`positives` as compressed rows (indices, offsets)."""
    indices, offsets = _compressed_rows(_NAME, "positives", on_host(positives), n, m)
    offsets = np.arange(n + 1) if offsets is None else offsets
    if offsets.shape != (n + 1,) or offsets[0] != 0 or offsets[-1] != indices.size or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"{_NAME}: positives must have {n + 1} offsets that run from 0 to {indices.size} and do not decrease"
        )
    wrong = (indices < 0) | (indices >= m)
    if wrong.any():
        raise ValueError(f"{_NAME}: positives must be in [0, {m}), got {indices[wrong][0]}")
    return indices, offsets


def _take_rows(indices: Int64, offsets: Int64, rows: Int64) -> tuple[Int64, Int64]:
    """Some of the compressed rows, as (offsets, indices)."""
    counts = np.diff(offsets)[rows]
    starts = np.concatenate([[0], np.cumsum(counts)])
    return starts, indices[np.repeat(offsets[rows] - starts[:-1], counts) + np.arange(starts[-1])]


def _worst_gain(q: Any, g: Any, indices: Int64, offsets: Int64, metric: str, sign: float) -> npt.NDArray[np.float64]:
    """Each query's worst positive, inf without one. Exact: pairs are scored as the specification does."""
    rows = np.repeat(np.arange(len(q)), np.diff(offsets))
    worst = np.full(len(q), math.inf)
    step = max(1, _TERMS // q.shape[1])
    for begin in range(0, len(rows), step):
        row, index = rows[begin : begin + step], indices[begin : begin + step]
        with np.errstate(all="ignore"):
            x, y = (np.asarray(as_numpy(part), np.float64) for part in (q[row], g[index]))
            scores = reference.METRICS[metric](x, y).astype(score_dtype(q))
        if np.isnan(scores).any():
            i = int(np.argmax(np.isnan(scores)))
            raise ValueError(f"{_NAME}: queries row {row[i]} has a NaN score with its positive {index[i]}")
        np.minimum.at(worst, row, sign * scores.astype(np.float64))
    return worst


def _chosen(passing: npt.NDArray[np.bool_], k: int, rows: Int64 | None, seed: int) -> Int64:
    """k places of each row, ascending, those that pass first: the first, or, with `rows`, any of them."""
    order = np.zeros(passing.shape)
    if rows is not None:
        order = np.array([np.random.default_rng([seed, row]).random(passing.shape[1]) for row in rows])
    order = np.where(passing, order.reshape(passing.shape), math.inf)
    chosen = np.argsort(order, axis=1, kind="stable")[:, :k]
    failing = ~np.take_along_axis(passing, chosen, 1)
    return np.take_along_axis(chosen, np.lexsort((chosen, failing)), 1)
