"""Threshold joins: (query rows, indices) of every pair whose score reaches the threshold."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cases import Case
from ..data import Data
from .base import Call, Provider, chunk_buffer, chunks, encoded, only, use


def pycm_join(case: Case, data: Data) -> Call:
    """pycm.threshold_join of raw rows"""
    import pycm

    def run() -> Any:
        found = pycm.threshold_join(
            data.queries,
            data.gallery,
            case.threshold,
            case.metric,
            progress=False,
        )
        blocks = list(found)
        if not blocks:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate([b.query_rows for b in blocks]), np.concatenate([b.indices for b in blocks])

    return run


def pycm_gallery(case: Case, data: Data) -> Call:
    """pycm, the gallery encoded ahead"""
    gallery = encoded(case, data)
    most = case.queries * case.gallery
    return lambda: gallery.join(data.queries, case.threshold, -1, most)[:2]


def faiss_join(case: Case, data: Data) -> Call:
    """faiss.IndexFlatIP, range_search"""
    faiss = use("faiss")
    only(case, "dot", "cosine")
    index = faiss.IndexFlatIP(case.dim)
    x, y = data.as_dot
    index.add(y)

    def run() -> Any:
        limits, _, indices = index.range_search(x, case.threshold)
        return np.repeat(np.arange(case.queries), np.diff(limits.astype(np.int64))), indices

    return run


def torch_join(case: Case, data: Data) -> Call:
    """torch: product into a kept buffer, compare, nonzero"""
    torch = use("torch")
    only(case, "dot", "cosine")
    x, y = (torch.from_numpy(rows) for rows in data.as_dot)
    buffer = torch.from_numpy(chunk_buffer(case))

    def run() -> Any:
        found = []
        for rows in chunks(case):
            part = x[rows]
            scores = torch.mm(part, y.T, out=buffer[: len(part)])
            row, column = (scores >= case.threshold).nonzero(as_tuple=True)
            found.append((row + rows.start, column))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    return run


def numpy_join(case: Case, data: Data) -> Call:
    """NumPy: product into a kept buffer, compare, nonzero"""
    only(case, "dot", "cosine")
    x, y = data.as_dot
    buffer = chunk_buffer(case)

    def run() -> Any:
        found = []
        for rows in chunks(case):
            part = x[rows]
            row, column = np.nonzero(np.matmul(part, y.T, out=buffer[: len(part)]) >= case.threshold)
            found.append((row + rows.start, column))
        return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))

    return run


def sklearn_join(case: Case, data: Data) -> Call:
    """scikit-learn's NearestNeighbors(algorithm="brute").radius_neighbors"""
    only(case, "dot", "cosine")
    neighbors = use("sklearn.neighbors")
    radius = float(np.sqrt(2 - 2 * case.threshold))  # of rows of norm 1
    fitted = neighbors.NearestNeighbors(radius=radius, algorithm="brute", metric="euclidean").fit(data.gallery)

    def run() -> Any:
        found = fitted.radius_neighbors(data.queries, return_distance=False)
        return np.repeat(np.arange(case.queries), [len(row) for row in found]), np.concatenate(found)

    return run


PROVIDERS = (
    Provider("pycm", pycm_join),
    Provider("pycm-gallery", pycm_gallery),
    Provider("faiss-index", faiss_join, ("faiss-cpu",)),
    Provider("torch", torch_join, ("torch",)),
    Provider("numpy", numpy_join, ("threadpoolctl",)),
    Provider("scikit-learn", sklearn_join, ("scikit-learn",)),
)
