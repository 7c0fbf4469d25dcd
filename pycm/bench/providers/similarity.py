"""Score matrices [N, M]."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cases import Case
from ..data import Data
from ..features import UnavailableError
from .base import Call, Provider, only, use
from .topk import numkong_product


def _matrix(case: Case) -> Any:
    return np.empty((case.queries, case.gallery), np.float32)


def pycm_similarity(case: Case, data: Data) -> Call:
    """pycm.similarity of raw rows, into a buffer kept from call to call"""
    import pycm

    out = _matrix(case)
    return lambda: pycm.similarity(data.queries, data.gallery, case.metric, out=out)


def pycm_fresh(case: Case, data: Data) -> Call:
    """pycm.similarity of raw rows, returning a new matrix"""
    import pycm

    return lambda: pycm.similarity(data.queries, data.gallery, case.metric)


def torch_similarity(case: Case, data: Data) -> Call:
    """torch.mm of prepared rows into a kept buffer, or torch.cdist"""
    torch = use("torch")
    x, y = (torch.from_numpy(rows) for rows in data.as_dot)
    if case.metric == "euclidean":
        return lambda: torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")
    out = torch.from_numpy(_matrix(case))
    return lambda: torch.mm(x, y.T, out=out)


def torch_fresh(case: Case, data: Data) -> Call:
    """torch.mm of prepared rows, returning a new matrix"""
    only(case, "dot", "cosine", "pearson")  # torch.cdist returns a new one anyway
    torch = use("torch")
    x, y = (torch.from_numpy(rows) for rows in data.as_dot)
    return lambda: x @ y.T


def numpy_similarity(case: Case, data: Data) -> Call:
    """NumPy's product of prepared rows into a kept buffer, finished in place"""
    out = _matrix(case)
    x, y = data.as_dot
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


def sklearn_similarity(case: Case, data: Data) -> Call:
    """scikit-learn's pairwise functions, returning a new matrix"""
    pairwise = use("sklearn.metrics.pairwise")
    if case.metric == "euclidean":
        x_squares, y_squares = data.query_squares[:, None], data.gallery_squares[None]
        return lambda: pairwise.euclidean_distances(
            data.queries, data.gallery, X_norm_squared=x_squares, Y_norm_squared=y_squares
        )
    functions = {"cosine": pairwise.cosine_similarity, "dot": pairwise.linear_kernel}
    only(case, *functions)
    return lambda: functions[case.metric](data.queries, data.gallery)


def numkong_similarity(case: Case, data: Data) -> Call:
    """numkong's product of fp32 rows packed ahead, returning a new matrix"""
    if case.metric == "euclidean":
        raise UnavailableError("numkong's product is measured, not its distances")
    product = numkong_product(case, data)
    return lambda: product(slice(None))


PROVIDERS = (
    Provider("pycm", pycm_similarity),
    Provider("pycm-fresh", pycm_fresh),
    Provider("torch", torch_similarity, ("torch",)),
    Provider("torch-fresh", torch_fresh, ("torch",)),
    Provider("numpy", numpy_similarity, ("threadpoolctl",)),
    Provider("scikit-learn", sklearn_similarity, ("scikit-learn",)),
    Provider("numkong", numkong_similarity, ("numkong",)),
)
