"""The libraries measured, each in its best configuration.

A provider prepares whatever it may keep between calls (normalised rows, an index, output buffers) outside
the timing and returns the function that is timed. pycm takes the raw arrays, and like its peers an output buffer
where it has that argument; "(fresh)" returns a new result each time.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from benchmarks.cases import Case, Data

# Returns scores [N, M], or for topk (scores or distances [N, k], indices [N, k]).
Call: TypeAlias = Callable[[], Any]
Prepare: TypeAlias = Callable[[Case, Data], Call | None]

# The scores that torch's product may write at once; more queries are taken in chunks.
CHUNK_SCORES = 100_000_000


def available(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# ---- pycm ----


def pycm_similarity(case: Case, data: Data) -> Call:
    """Writes into a buffer kept from call to call, as the peers that can."""
    import pycm

    out = np.empty((case.rows, case.columns), np.float32)
    return lambda: pycm.similarity(data.queries, data.gallery, case.metric, out=out)  # type: ignore[arg-type]


def pycm_fresh_similarity(case: Case, data: Data) -> Call:
    """Returns a new matrix."""
    import pycm

    return lambda: pycm.similarity(data.queries, data.gallery, case.metric)  # type: ignore[arg-type]


def pycm_topk(case: Case, data: Data) -> Call:
    import pycm

    return lambda: pycm.topk(data.queries, data.gallery, case.k, case.metric)  # type: ignore[arg-type]


# ---- similarity ----


def numpy_similarity(case: Case, data: Data) -> Call:
    out = np.empty((case.rows, case.columns), np.float32)
    x, y = data.as_dot(case.metric)
    if case.metric != "euclidean":
        return lambda: np.matmul(x, y.T, out=out)
    x_squares, y_squares = data.query_squares[:, None], data.gallery_squares[None]

    def euclidean() -> Any:
        np.matmul(x, y.T, out=out)
        np.multiply(out, -2, out=out)
        np.add(out, x_squares, out=out)
        np.add(out, y_squares, out=out)
        np.maximum(out, 0, out=out)
        return np.sqrt(out, out=out)

    return euclidean


def torch_similarity(case: Case, data: Data) -> Call:
    """Writes into a buffer kept from call to call where torch allows it."""
    import torch

    x, y = (torch.from_numpy(rows) for rows in data.as_dot(case.metric))
    if case.metric == "euclidean":
        return lambda: torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")
    out = torch.empty(case.rows, case.columns)
    return lambda: torch.mm(x, y.T, out=out)


def torch_fresh_similarity(case: Case, data: Data) -> Call | None:
    """Returns a new matrix, as pycm does."""
    import torch

    if case.metric == "euclidean":
        return None  # the same as torch_similarity
    x, y = (torch.from_numpy(rows) for rows in data.as_dot(case.metric))
    return lambda: x @ y.T


def sklearn_similarity(case: Case, data: Data) -> Call | None:
    from sklearn.metrics import pairwise

    if case.metric == "euclidean":
        x_squares, y_squares = data.query_squares[:, None], data.gallery_squares[None]
        return lambda: pairwise.euclidean_distances(
            data.queries, data.gallery, X_norm_squared=x_squares, Y_norm_squared=y_squares
        )
    if case.metric == "cosine":
        return lambda: pairwise.cosine_similarity(data.queries, data.gallery)
    if case.metric == "dot":
        return lambda: pairwise.linear_kernel(data.queries, data.gallery)
    return None


# ---- topk ----


def _faiss_metric(case: Case) -> int:
    import faiss

    return int(faiss.METRIC_L2 if case.metric == "euclidean" else faiss.METRIC_INNER_PRODUCT)


def faiss_knn(case: Case, data: Data) -> Call:
    import faiss

    metric = _faiss_metric(case)
    x, y = data.as_dot(case.metric)
    return lambda: faiss.knn(x, y, case.k, metric=metric)


def faiss_index(case: Case, data: Data) -> Call:
    import faiss

    index = faiss.IndexFlat(case.dim, _faiss_metric(case))  # IndexFlatIP, or IndexFlatL2
    x, y = data.as_dot(case.metric)
    index.add(y)
    scores, indices = np.empty((case.rows, case.k), np.float32), np.empty((case.rows, case.k), np.int64)
    return lambda: index.search(x, case.k, D=scores, I=indices)


def torch_topk(case: Case, data: Data) -> Call:
    import torch

    x, y = (torch.from_numpy(rows) for rows in data.as_dot(case.metric))
    largest = case.metric != "euclidean"
    chunk = max(1, min(case.rows, CHUNK_SCORES // case.columns))
    buffer = torch.empty(chunk, case.columns)
    scores = torch.empty(case.rows, case.k)
    indices = torch.empty(case.rows, case.k, dtype=torch.int64)
    # |q - g|^2 less |q|^2, which orders no pair otherwise: one pass fewer than torch.cdist.
    bias = torch.from_numpy(data.gallery_squares) if not largest else None

    def run() -> Any:
        for begin in range(0, case.rows, chunk):
            rows = x[begin : begin + chunk]
            out = buffer[: len(rows)]
            if bias is None:
                torch.mm(rows, y.T, out=out)
            else:
                torch.addmm(bias, rows, y.T, alpha=-2, out=out)
            end = begin + len(rows)
            torch.topk(out, case.k, largest=largest, out=(scores[begin:end], indices[begin:end]))
        return scores, indices

    return run


def sklearn_topk(case: Case, data: Data) -> Call:
    """Distances order rows of norm 1 as their products do."""
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=case.k, algorithm="brute", metric="euclidean").fit(data.gallery)
    return lambda: neighbours.kneighbors(data.queries)


# ---- one small call ----


def _latency(kind: str) -> Prepare:
    def prepare(case: Case, data: Data) -> Call | None:
        import torch

        import pycm

        x, y = data.queries, data.gallery
        tx, ty = torch.from_numpy(x), torch.from_numpy(y)
        k = case.k
        calls: dict[str, Call]
        if k:
            calls = {
                "pycm (torch)": lambda: pycm.topk(tx, ty, k, "dot"),
                "pycm (numpy)": lambda: pycm.topk(x, y, k, "dot"),
                "torch.mm + topk": lambda: torch.topk(tx @ ty.T, k),
            }
        else:
            calls = {
                "pycm (torch)": lambda: pycm.similarity(tx, ty, "dot"),
                "pycm (numpy)": lambda: pycm.similarity(x, y, "dot"),
                "torch.mm": lambda: tx @ ty.T,
                "numpy matmul": lambda: x @ y.T,
            }
        calls["torch.add"] = lambda: torch.add(tx, ty)
        return calls.get(kind)

    return prepare


LATENCY_NAMES = (
    "pycm (torch)",
    "pycm (numpy)",
    "torch.add",
    "torch.mm",
    "torch.mm + topk",
    "numpy matmul",
)

# op -> provider -> (the package it needs, its preparation). The first of each op is pycm.
PROVIDERS: dict[str, dict[str, tuple[str, Prepare]]] = {
    "similarity": {
        "pycm": ("numpy", pycm_similarity),
        "torch": ("torch", torch_similarity),
        "numpy": ("numpy", numpy_similarity),
        "pycm (fresh)": ("numpy", pycm_fresh_similarity),
        "torch (fresh)": ("torch", torch_fresh_similarity),
        "scikit-learn (fresh)": ("scikit-learn", sklearn_similarity),
    },
    "topk": {
        "pycm": ("numpy", pycm_topk),
        "faiss.knn": ("faiss-cpu", faiss_knn),
        "faiss.IndexFlat": ("faiss-cpu", faiss_index),
        "torch mm + topk": ("torch", torch_topk),
        "scikit-learn": ("scikit-learn", sklearn_topk),
    },
    "latency": {name: ("torch", _latency(name)) for name in LATENCY_NAMES},
}


def set_threads(threads: int) -> None:
    """The same number of threads for every library."""
    import threadpoolctl

    import pycm

    pycm.set_num_threads(threads)
    if available("torch"):
        import torch

        torch.set_num_threads(threads)
    if available("faiss-cpu"):
        import faiss

        faiss.omp_set_num_threads(threads)
    if available("scikit-learn"):
        import sklearn.metrics  # noqa: F401  (loads its OpenMP before the limit is set)
    threadpoolctl.threadpool_limits(limits=threads)
