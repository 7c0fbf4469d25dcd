"""The k best pairs of one set of rows: (i, j, scores) with i < j, in any order."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cases import Case
from ..data import Data
from .base import Call, Provider, only, use

_BLOCK = 1024  # rows of torch's score matrix at a time


def pycm_pairs(case: Case, data: Data) -> Call:
    """one call of pycm.all_pairs_topk on raw rows"""
    import pycm

    def run() -> Any:
        found = pycm.all_pairs_topk(data.gallery, case.k, case.metric, progress=False)
        return found.query_rows, found.indices, found.scores

    return run


def sentence_transformers_pairs(case: Case, data: Data) -> Call:
    """sentence_transformers.util.paraphrase_mining_embeddings, which looks at the 100 best of each row"""
    only(case, "dot", "cosine")
    util, torch = use("sentence_transformers.util"), use("torch")
    rows = torch.from_numpy(data.gallery)

    def run() -> Any:
        found = util.paraphrase_mining_embeddings(rows, max_pairs=case.k, score_function=util.dot_score)[: case.k]
        i, j = (np.array([pair[place] for pair in found]) for place in (1, 2))
        return np.minimum(i, j), np.maximum(i, j), np.array([pair[0] for pair in found], np.float32)

    return run


def torch_pairs(case: Case, data: Data) -> Call:
    """torch: products of blocks above the diagonal, those that beat the k-th best pair so far"""
    only(case, "dot", "cosine")
    torch = use("torch")
    rows = torch.from_numpy(data.gallery)
    count = len(rows)

    def run() -> Any:
        scores, keys, threshold = torch.empty(0), torch.empty(0, dtype=torch.int64), -np.inf
        for begin in range(0, count, _BLOCK):
            block = rows[begin : begin + _BLOCK] @ rows[begin:].T
            block[torch.ones_like(block, dtype=torch.bool).tril_()] = -np.inf
            if threshold == -np.inf:
                values, flat = block.flatten().topk(min(case.k, block.numel()))
                i, j = flat // block.shape[1], flat % block.shape[1]
            else:
                i, j = (block > threshold).nonzero(as_tuple=True)
                values = block[i, j]
            scores = torch.cat([scores, values])
            keys = torch.cat([keys, (begin + i) * count + begin + j])
            scores, kept = scores.topk(min(case.k, len(scores)))
            keys = keys[kept]
            threshold = float(scores[-1]) if len(scores) == case.k else -np.inf
        return keys // count, keys % count, scores

    return run


PROVIDERS = (
    Provider("pycm", pycm_pairs),
    Provider("torch", torch_pairs, ("torch",)),
    Provider("sentence-transformers", sentence_transformers_pairs, ("sentence-transformers", "torch")),
)
