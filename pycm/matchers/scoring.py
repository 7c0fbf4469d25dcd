"""Embeddings in blocks, metrics both ways, and the pair classifier over all pairs or those that embeddings propose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..evaluate import RetrievalMetrics, retrieval_metrics
from ..functional import Matches, Metric, topk
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


def embedded(network: Any, first: Inputs, second: Inputs) -> tuple[Float32, Float32]:
    """Both sides' embeddings by the network."""
    return by_blocks(network.first, first), by_blocks(network.second, second)


def both_ways(
    network: Any, first: Inputs, second: Inputs, a: Float32, b: Float32, of_first: Any, of_second: Any,
    ks: Sequence[int], metric: Metric, candidates: int | None,
) -> tuple[RetrievalMetrics, RetrievalMetrics]:  # fmt: skip
    """Metrics of the ranking that `match` gives by the embeddings a and b, where both sides' positives are known."""
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
    """The best both ways by the classifier, of all pairs, or with `candidates` as `_re_ranked` has them."""
    if candidates is None:
        matrix = pair_matrix(network, first, second, a, b)
        n, m = matrix.shape
        left, right = (np.broadcast_to(np.arange(size), (rows, size)) for rows, size in ((n, m), (m, n)))
        return _best(matrix, left, ks[0]), _best(matrix.T, right, ks[1])
    score = PairScorer(network, first, second, a, b)
    there = _re_ranked(score, a, b, ks[0], metric, candidates, back=False)
    return there, _re_ranked(score, b, a, ks[1], metric, candidates, back=True)


def ranked_matrices(
    network: Any, first: Inputs, second: Inputs, a: Float32, b: Float32, metric: Metric, candidates: int | None
) -> tuple[Float32, Float32]:
    """Matrices [N, M] and [M, N] of the scores that `pair_matches` gives for all pairs."""
    if candidates is None:
        matrix = pair_matrix(network, first, second, a, b)
        return matrix, np.ascontiguousarray(matrix.T)
    out = []
    for found in pair_matches(network, first, second, a, b, (len(b), len(a)), metric, candidates):
        scores = np.full_like(found.scores, np.nan)
        np.put_along_axis(scores, found.indices, found.scores, 1)
        out.append(scores)
    return out[0], out[1]


def _re_ranked(
    score: PairScorer, queries: Float32, gallery: Float32, k: int, metric: Metric, candidates: int, *, back: bool
) -> Matches:
    """The k best of each query: its nearest `candidates` by their log-odds, then the others by their embeddings.

    The others' scores are whole numbers below the candidates' log-odds, lower by one for each different score of the
    embeddings: what comes first does not depend on k, and what ties there ties here. `back`: queries are the second
    side.
    """
    count = min(candidates, len(gallery))
    near = topk(queries, gallery, max(count, k), metric)
    proposed = near.indices[:, :count]
    best = _best(_proposed(score, proposed, back), proposed, count)
    changes = np.cumsum(np.diff(near.scores, axis=1) != 0, axis=1)[:, count - 1 :]
    below = np.floor(best.scores[:, -1:]) - 1 - (changes - changes[:, :1])
    scores = np.concatenate([best.scores, below.astype(np.float32)], 1)
    return Matches(scores[:, :k], np.concatenate([best.indices, near.indices[:, count:]], 1)[:, :k])


def _proposed(score: PairScorer, near: npt.NDArray[np.int64], back: bool) -> Float32:
    """The logits of each row's candidates; `back` where the rows are those of the second side."""
    rows, others = np.repeat(np.arange(len(near)), near.shape[1]), near.ravel()
    return (score(others, rows) if back else score(rows, others)).reshape(near.shape)


def _best(scores: Float32, indices: npt.NDArray[np.int64], k: int) -> Matches:
    """The k best of each row, ties to the lower index."""
    order = np.lexsort((indices, -scores), axis=1)[:, :k]
    return Matches(np.take_along_axis(scores, order, 1), np.take_along_axis(indices, order, 1))
