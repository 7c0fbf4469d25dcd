"""Scores of pairs by a classifier: all of them in blocks, or those that the embeddings propose."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..functional import Matches, Metric, topk
from .inputs import Inputs

Float32 = npt.NDArray[np.float32]
_PAIRS = 4096  # scored at a time


class PairScorer:
    """The classifier over items whose states are kept: O(N + M) towers, then one head a pair."""

    def __init__(self, network: Any, first: Inputs, second: Inputs, a: Float32, b: Float32) -> None:
        self.network, self.device = network, first.device
        self.counts = len(first), len(second)
        with torch.no_grad():
            rows = (torch.from_numpy(x).to(self.device) for x in (a, b))
            self.first, self.second = network.states(first, second, *rows)

    def __call__(self, i: npt.NDArray[np.int64], j: npt.NDArray[np.int64]) -> Float32:
        """Logits of the pairs (i[p], j[p])."""
        out = np.empty(len(i), np.float32)
        with torch.no_grad():
            for start in range(0, len(i), _PAIRS):
                at = slice(start, start + _PAIRS)
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
    n, m = score.counts
    if candidates is None:
        matrix = score(*np.divmod(np.arange(n * m), m)).reshape(n, m)
        everything = (np.broadcast_to(np.arange(size), (rows, size)) for rows, size in ((n, m), (m, n)))
        left, right = everything
        return _best(matrix, left, ks[0]), _best(matrix.T, right, ks[1])
    found = []
    for forward, queries, gallery, k in ((True, a, b, ks[0]), (False, b, a, ks[1])):
        near = topk(queries, gallery, min(max(candidates, k), len(gallery)), metric).indices
        rows = np.repeat(np.arange(len(queries)), near.shape[1])
        pairs = (rows, near.ravel()) if forward else (near.ravel(), rows)
        found.append(_best(score(*pairs).reshape(near.shape), near, k))
    return found[0], found[1]


def _best(scores: Float32, indices: npt.NDArray[np.int64], k: int) -> Matches:
    """The k best of each row, ties to the lower index."""
    order = np.lexsort((indices, -scores), axis=1)[:, :k]
    return Matches(np.take_along_axis(scores, order, 1), np.take_along_axis(indices, order, 1))
