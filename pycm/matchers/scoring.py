"""Embeddings in blocks, metrics both ways, and the pair classifier over all pairs or those that embeddings propose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..evaluate import RetrievalMetrics, retrieval_metrics
from ..functional import DISTANCES, Matches, Metric, similarity, topk
from .heads import PairClassifier
from .inputs import Inputs

Float32 = npt.NDArray[np.float32]
_ITEMS, _PAIRS = 512, 4096  # embedded, and scored, at a time
_FLOATS = 1 << 24  # that the pairs of a block may hold


def by_blocks(function: Any, inputs: Inputs) -> Float32:
    """What a side, or a part of a network, gives for all items, a block at a time, without gradients: [N, ...]."""
    out = []
    with torch.no_grad():
        for start in range(0, len(inputs), _ITEMS):
            rows = np.arange(start, min(start + _ITEMS, len(inputs)))
            out.append(function(inputs.take(rows)).float().cpu().numpy())
    return np.concatenate(out)


def both_ways(
    network: Any, first: Inputs, second: Inputs, of_first: Any, of_second: Any, ks: Sequence[int], metric: Metric,
    candidates: int | None,
) -> tuple[RetrievalMetrics, RetrievalMetrics]:  # fmt: skip
    """Metrics of the ranking that `match` gives, where the positives of both sides' rows are known."""
    a, b = by_blocks(network.first, first), by_blocks(network.second, second)
    there: Any = (a, b, metric)
    back: Any = (b, a, metric)
    if isinstance(network, PairClassifier):
        there, back = ranked_matrices(network, first, second, a, b, metric, candidates)
    return retrieval_metrics(there, of_first, ks), retrieval_metrics(back, of_second, ks)


class PairScorer:
    """The classifier over items whose states are kept: O(N + M) towers, then one head a pair."""

    def __init__(self, network: Any, first: Inputs, second: Inputs, a: Float32, b: Float32) -> None:
        self.network, self.device = network, first.device
        self.counts = len(first), len(second)
        with torch.no_grad():
            rows = (torch.from_numpy(x).to(self.device) for x in (a, b))
            self.first, self.second = network.states(first, second, *rows)
        self.block = max(1, min(_PAIRS, _FLOATS // network.floats(self.second)))

    def __call__(self, i: npt.NDArray[np.int64], j: npt.NDArray[np.int64]) -> Float32:
        """Logits of the pairs (i[p], j[p])."""
        out = np.empty(len(i), np.float32)
        with torch.no_grad():
            for start in range(0, len(i), self.block):
                at = slice(start, start + self.block)
                index = (torch.from_numpy(np.ascontiguousarray(x[at])).to(self.device) for x in (i, j))
                out[at] = self.network.logits(self.first, self.second, *index).cpu().numpy()
        return out


def pair_matrix(network: Any, first: Inputs, second: Inputs, a: Float32, b: Float32) -> Float32:
    """Logits of all pairs, [N, M]."""
    n, m = len(first), len(second)
    i, j = np.divmod(np.arange(n * m), m)
    return PairScorer(network, first, second, a, b)(i, j).reshape(n, m)


def pair_matches(
    network: Any, first: Inputs, second: Inputs, a: Float32, b: Float32, ks: tuple[int, int], metric: Metric,
    candidates: int | None,
) -> tuple[Matches, Matches]:  # fmt: skip
    """The best by the classifier, both ways: of all pairs, or of the `candidates` nearest embeddings of each item."""
    score = PairScorer(network, first, second, a, b)
    if candidates is None:
        n, m = score.counts
        matrix = score(*np.divmod(np.arange(n * m), m)).reshape(n, m)
        everything = (np.broadcast_to(np.arange(size), (rows, size)) for rows, size in ((n, m), (m, n)))
        left, right = everything
        return _best(matrix, left, ks[0]), _best(matrix.T, right, ks[1])
    near = [nearest(a, b, max(candidates, ks[0]), metric), nearest(b, a, max(candidates, ks[1]), metric)]
    scores = [_proposed(score, indices, back) for indices, back in zip(near, (False, True), strict=True)]
    return _best(scores[0], near[0], ks[0]), _best(scores[1], near[1], ks[1])


def ranked_matrices(
    network: Any, first: Inputs, second: Inputs, a: Float32, b: Float32, metric: Metric, candidates: int | None
) -> tuple[Float32, Float32]:
    """Matrices [N, M] and [M, N] whose rows have the order of `pair_matches`.

    Candidates have their logits; the others lie below, in the order of their embeddings.
    """
    if candidates is None:
        matrix = pair_matrix(network, first, second, a, b)
        return matrix, np.ascontiguousarray(matrix.T)
    score = PairScorer(network, first, second, a, b)
    out = []
    for queries, gallery, back in ((a, b, False), (b, a, True)):
        near = nearest(queries, gallery, candidates, metric)
        logits = _proposed(score, near, back)
        sign = -1 if metric in DISTANCES else 1
        rest = sign * np.asarray(similarity(queries, gallery, metric), np.float32)
        rest += logits.min(axis=1, keepdims=True) - rest.max(axis=1, keepdims=True) - 1
        np.put_along_axis(rest, near, logits, 1)
        out.append(rest)
    return out[0], out[1]


def nearest(queries: Float32, gallery: Float32, candidates: int, metric: Metric) -> npt.NDArray[np.int64]:
    """The gallery rows that each query proposes, [N, C]."""
    return topk(queries, gallery, min(candidates, len(gallery)), metric).indices  # type: ignore[no-any-return]


def _proposed(score: PairScorer, near: npt.NDArray[np.int64], back: bool) -> Float32:
    """The logits of each row's candidates; `back` where the rows are those of the second side."""
    rows, others = np.repeat(np.arange(len(near)), near.shape[1]), near.ravel()
    return (score(others, rows) if back else score(rows, others)).reshape(near.shape)


def _best(scores: Float32, indices: npt.NDArray[np.int64], k: int) -> Matches:
    """The k best of each row, ties to the lower index."""
    order = np.lexsort((indices, -scores), axis=1)[:, :k]
    return Matches(np.take_along_axis(scores, order, 1), np.take_along_axis(indices, order, 1))
