"""Late-interaction scores [N, M] of items with many vectors each."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cases import Case
from ..data import Data
from .base import CHUNK_SCORES, Call, Provider, use


def pycm_maxsim(case: Case, data: Data) -> Call:
    """pycm.maxsim of padded NumPy arrays"""
    import pycm

    queries, gallery = data.sets
    return lambda: pycm.maxsim(queries, gallery)


def torch_maxsim(case: Case, data: Data) -> Call:
    """torch's product, maximum and sum, in chunks of the gallery where the products take over 400 MB"""
    torch = use("torch")
    queries, gallery = (torch.from_numpy(sets) for sets in data.sets)
    tokens = queries.flatten(0, 1).T
    step = max(1, CHUNK_SCORES // (case.item_vectors * tokens.shape[1]))

    def scores() -> Any:
        parts = [(part @ tokens).amax(1).view(-1, case.queries, case.query_vectors) for part in gallery.split(step)]
        return torch.cat([part.sum(2) for part in parts]).T

    return scores


def maxsim_cpu(case: Case, data: Data) -> Call:
    """maxsim-cpu, one query after another"""
    score = use("maxsim_cpu").maxsim_scores
    queries, gallery = data.sets
    return lambda: np.stack([score(query, gallery) for query in queries])


PROVIDERS = (
    Provider("pycm", pycm_maxsim),
    Provider("torch", torch_maxsim, ("torch",)),
    Provider("maxsim-cpu", maxsim_cpu, ("maxsim-cpu",)),
)
