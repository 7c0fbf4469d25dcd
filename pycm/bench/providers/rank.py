"""Ranks of known positives: (greater [N, P], equal [N, P]), the other gallery rows that score more, or the same.

Libraries that report no ranks give the mean reciprocal rank, with one positive per query.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cases import Case
from ..data import Data
from ..features import UnavailableError
from .base import Call, Provider, chunk_buffer, chunks, encoded, only, use

# Above so many scores a library that wants them all as one flat list would take minutes and the machine's memory.
MOST_FLAT_SCORES = 10_000_000


def _compressed(case: Case, data: Data) -> tuple[Any, Any]:
    """(offsets, indices)"""
    return np.arange(case.queries + 1, dtype=np.int64) * case.positives, data.positives.ravel()


def pycm_rank(case: Case, data: Data) -> Call:
    """one call of pycm.rank on raw rows"""
    import pycm

    positives = _compressed(case, data)

    def run() -> Any:
        found = pycm.rank(data.queries, data.gallery, positives, case.metric)
        return found.greater.reshape(data.positives.shape), found.equal.reshape(data.positives.shape)

    return run


def pycm_gallery(case: Case, data: Data) -> Call:
    """pycm, the gallery encoded ahead"""
    gallery = encoded(case, data)
    offsets, indices = _compressed(case, data)

    def run() -> Any:
        greater, equal, _ = gallery.rank(data.queries, indices, offsets, None, None, None)
        return greater.reshape(data.positives.shape), equal.reshape(data.positives.shape)

    return run


def _torch_counts(torch: Any, scores: Any, positives: Any) -> Any:
    own = scores.gather(1, positives)
    greater = torch.stack([(scores > column).sum(1) for column in own.split(1, dim=1)], 1)
    equal = torch.stack([(scores == column).sum(1) for column in own.split(1, dim=1)], 1)
    return greater, equal - 1


def torch_rank(case: Case, data: Data) -> Call:
    """torch: product, gather, compare, count"""
    torch = use("torch")
    only(case, "dot", "cosine")
    x, y = (torch.from_numpy(rows) for rows in data.as_dot)
    positives = torch.from_numpy(data.positives)
    buffer = torch.from_numpy(chunk_buffer(case))

    def run() -> Any:
        parts = []
        for rows in chunks(case):
            part = x[rows]
            parts.append(_torch_counts(torch, torch.mm(part, y.T, out=buffer[: len(part)]), positives[rows]))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    return run


def torch_compile_rank(case: Case, data: Data) -> Call:
    """the same under torch.compile, which fuses comparison and count"""
    torch = use("torch")
    only(case, "dot", "cosine")
    if case.operations < 1e7:
        raise UnavailableError("compiling takes longer than tiny cases are worth")
    x, y = (torch.from_numpy(rows) for rows in data.as_dot)
    positives = torch.from_numpy(data.positives)
    compiled = torch.compile(lambda part, chosen: _torch_counts(torch, part @ y.T, chosen), dynamic=False)

    def run() -> Any:
        parts = [compiled(x[rows], positives[rows]) for rows in chunks(case)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    return run


def numpy_rank(case: Case, data: Data) -> Call:
    """NumPy: product, gather, compare, count"""
    only(case, "dot", "cosine")
    x, y = data.as_dot
    buffer = chunk_buffer(case)

    def run() -> Any:
        greater, equal = np.empty_like(data.positives), np.empty_like(data.positives)
        for rows in chunks(case):
            part = x[rows]
            scores = np.matmul(part, y.T, out=buffer[: len(part)])
            own = np.take_along_axis(scores, data.positives[rows], 1)
            for j in range(case.positives):
                greater[rows, j] = np.count_nonzero(scores > own[:, j : j + 1], axis=1)
                equal[rows, j] = np.count_nonzero(scores == own[:, j : j + 1], axis=1) - 1
        return greater, equal

    return run


def argsort_rank(case: Case, data: Data) -> Call:
    """what published evaluations do: NumPy's argsort of each query's scores, then search for the positives"""
    only(case, "dot", "cosine")
    x, y = data.as_dot

    def run() -> Any:
        greater = np.empty_like(data.positives)
        places = np.empty(case.gallery, np.int64)
        for row, query in enumerate(x):
            places[np.argsort(query @ y.T)[::-1]] = np.arange(case.gallery)
            greater[row] = places[data.positives[row]]
        return greater, np.zeros_like(greater)

    return run


def sklearn_rank(case: Case, data: Data) -> Call:
    """NumPy's product, scikit-learn's label_ranking_average_precision_score"""
    metrics = use("sklearn.metrics")
    x, y = _for_reciprocal(case, data)
    truth = np.zeros((case.queries, case.gallery), bool)
    np.put_along_axis(truth, data.positives, True, 1)
    return lambda: float(metrics.label_ranking_average_precision_score(truth, x @ y.T))


def torchmetrics_rank(case: Case, data: Data) -> Call:
    """torch's product, torchmetrics' retrieval_reciprocal_rank of each query"""
    torch, retrieval = use("torch"), use("torchmetrics.functional.retrieval")
    x, y = (torch.from_numpy(rows) for rows in _for_reciprocal(case, data))
    # It wants probabilities, and takes a positive whose score is 0 or less for no positive.
    truth = torch.zeros(case.queries, case.gallery, dtype=torch.bool)
    truth.scatter_(1, torch.from_numpy(data.positives), True)

    def run() -> Any:
        pairs = zip((x @ y.T).add_(1), truth, strict=True)
        return float(torch.stack([retrieval.retrieval_reciprocal_rank(s, t) for s, t in pairs]).mean())

    return run


def ranx_rank(case: Case, data: Data) -> Call:
    """NumPy's product, ranx.evaluate(..., "mrr")"""
    ranx = use("ranx")
    x, y = _for_reciprocal(case, data)
    truth = np.stack([data.positives, np.ones_like(data.positives)], axis=-1)
    names = np.broadcast_to(np.arange(case.gallery, dtype=np.float64), (case.queries, case.gallery))

    def run() -> Any:
        listed = np.stack([names, x @ y.T], axis=-1)
        order = np.argsort(-listed[..., 1], axis=1, kind="stable")
        return float(ranx.evaluate(truth, np.take_along_axis(listed, order[..., None], 1), "mrr"))

    return run


def _for_reciprocal(case: Case, data: Data) -> Any:
    only(case, "dot", "cosine")
    if case.positives != 1:
        raise UnavailableError("a mean reciprocal rank says nothing of several positives")
    if case.queries * case.gallery > MOST_FLAT_SCORES:
        raise UnavailableError(f"more than {MOST_FLAT_SCORES:,} scores")
    return data.as_dot


PROVIDERS = (
    Provider("pycm", pycm_rank),
    Provider("pycm-gallery", pycm_gallery),
    Provider("torch", torch_rank, ("torch",)),
    Provider("torch-compile", torch_compile_rank, ("torch",)),
    Provider("numpy", numpy_rank, ("threadpoolctl",)),
    Provider("numpy-argsort", argsort_rank, ("threadpoolctl",)),
    Provider("scikit-learn", sklearn_rank, ("scikit-learn", "threadpoolctl")),
    Provider("torchmetrics", torchmetrics_rank, ("torchmetrics", "torch")),
    Provider("ranx", ranx_rank, ("ranx", "threadpoolctl")),
)
