"""Corrections of a score matrix for hubs, the gallery items that come out near to everything (Radovanovic et al. 2010).

Each looks at a bank: scores of other queries with the same gallery. The bank is always an argument. Queries of a
training set make an honest bank. Passing the test scores themselves makes a transductive evaluation, in which a query's
result depends on the other test queries: say so where it is reported.

For embeddings instead of matrices, and queries that come one by one, see `pycm.spaces.HubnessCorrection`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._rows import as_numpy
from ._inputs import Float64


def inverted_softmax(scores: Any, bank: Any, *, beta: float = 30.0) -> Any:
    """Scores less how strongly the bank's queries are drawn to each gallery item (Smith et al. 2017).

    The published value is p = exp(beta s(q, g)) / (sum over bank queries b of exp(beta s(b, g))). Returned is

        log(p) / beta = s(q, g) - log(sum over b of exp(beta s(b, g))) / beta,

    which orders each query's items the same, cannot overflow, and stays in the units of the scores.

    Args:
        scores: [N, M], larger is better, NumPy or torch.
        bank: [B, M], scores of the bank's queries with the same gallery.
        beta: inverse temperature, > 0; for cosines, 30 is that of the word-translation literature.

    Returns:
        [N, M] like `scores`, float64 for float64, else float32.

    Raises:
        ValueError: shapes that do not fit, a NaN or an infinity (its row is named).
    """
    function = "inverted_softmax"
    s = _matrix(function, "scores", scores)
    b = _bank(function, "bank", bank, s)
    return _like(s - _log_mass(b, _beta(function, beta)), scores)


def qb_norm(scores: Any, bank: Any, *, beta: float = 20.0, k: int = 1, dynamic: bool = True) -> Any:
    """Query-bank normalisation (Bogolin et al. 2022): the inverted softmax, only for queries that it concerns.

    The activation set holds the gallery items that are among the k best of some query of the bank. With `dynamic`, a
    query whose best item is outside the set keeps its scores; the others are normalised. Without, all are: that is
    `inverted_softmax`.

    Kept and normalised rows are in different units, as in the original: compare scores within a row only.

    Args:
        scores: [N, M], larger is better, NumPy or torch.
        bank: [B, M], scores of the bank's queries with the same gallery.
        beta: inverse temperature, > 0; 20 as published.
        k: in [1, M]; 1 as published.
        dynamic: whether to use the activation set.

    Returns, raises: as `inverted_softmax`. Of equal best items that of the lowest index counts as best.
    """
    function = "qb_norm"
    s = _matrix(function, "scores", scores)
    b = _bank(function, "bank", bank, s)
    _check_k(function, k, s.shape[1])
    normalised = s - _log_mass(b, _beta(function, beta))
    if dynamic:
        active = np.zeros(s.shape[1], bool)
        active[b.argmax(axis=1) if k == 1 else np.argsort(-b, axis=1, kind="stable")[:, :k]] = True
        normalised = np.where(active[s.argmax(axis=1)][:, None], normalised, s)
    return _like(normalised, scores)


def dual_softmax(scores: Any, bank: Any, *, beta: float = 100.0) -> Any:
    """Scores times the softmax over queries (Cheng et al. 2021), the queries being the bank's:

        s(q, g) · B exp(beta s(q, g)) / (sum over bank queries b of exp(beta s(b, g))).

    With the test scores as the bank this is the published, transductive form.

    Args:
        scores: [N, M], larger is better, NumPy or torch; a negative score becomes the worse the likelier the pair, as
            published.
        bank: [B, M], scores of the bank's queries with the same gallery.
        beta: inverse temperature, > 0: 100 for cosines is 1 for CLIP's logits.

    Returns, raises: as `inverted_softmax`; also ValueError where the factor overflows, scores being far above the
        bank's.
    """
    function = "dual_softmax"
    s = _matrix(function, "scores", scores)
    b = _bank(function, "bank", bank, s)
    with np.errstate(over="ignore"):
        out = s * np.exp(_beta(function, beta) * (s - _log_mass(b, beta)) + np.log(len(b)))
    if not np.isfinite(out).all():
        raise ValueError(f"{function}: beta {beta} overflows: scores exceed the bank's by up to {_excess(s, b):.3g}")
    return _like(out, scores)


def csls(scores: Any, gallery_bank: Any, query_bank: Any, *, k: int = 10) -> Any:
    """Cross-domain similarity local scaling (Conneau et al. 2018): 2 s(q, g) - r(q) - r(g).

    r(q) is the mean of the query's k best scores with the bank of gallery-side items, r(g) that of the gallery item
    with the bank of queries. r(q) does not change a query's order; it makes rows comparable.

    Args:
        scores: [N, M], cosines, NumPy or torch.
        gallery_bank: [N, C], scores of the queries with C items of the gallery's side; `scores` itself where the
            gallery is the bank, which is no leak: the gallery is known beforehand.
        query_bank: [B, M], scores of the bank's queries with the gallery.
        k: items looked at, in [1, min(B, C)].

    Returns, raises: as `inverted_softmax`.
    """
    function = "csls"
    s = _matrix(function, "scores", scores)
    of_queries = _matrix(function, "gallery_bank", gallery_bank)
    of_gallery = _bank(function, "query_bank", query_bank, s)
    if len(of_queries) != len(s):
        raise ValueError(f"{function}: gallery_bank must have {len(s)} rows, got {len(of_queries)}")
    _check_k(function, k, min(of_queries.shape[1], len(of_gallery)))
    return _like(2 * s - mean_of_best(of_queries, k)[:, None] - mean_of_best(of_gallery.T, k), scores)


def mean_of_best(scores: Float64, k: int) -> Float64:
    """The mean of each row's k largest."""
    return np.asarray(np.partition(scores, -k, axis=1)[:, -k:].mean(axis=1))


def _log_mass(bank: Float64, beta: float) -> Float64:
    """log(sum of exp(beta s)) / beta over the bank, [M]."""
    peak = bank.max(axis=0)
    return np.asarray(peak + np.log(np.exp(beta * (bank - peak)).sum(axis=0)) / beta)


def _excess(scores: Float64, bank: Float64) -> float:
    return float((scores - bank.max(axis=0)).max())


def _matrix(function: str, name: str, x: Any) -> Float64:
    array = as_numpy(x)
    if array.dtype.kind != "f":
        raise TypeError(f"{function}: {name} must be floating point, got {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{function}: {name} must have shape [N, M], not empty, got {list(array.shape)}")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(f"{function}: {name} row {row} has {'a NaN' if np.isnan(array[row]).any() else 'an infinity'}")
    return array.astype(np.float64)


def _bank(function: str, name: str, bank: Any, scores: Float64) -> Float64:
    array = _matrix(function, name, bank)
    if array.shape[1] != scores.shape[1]:
        raise ValueError(
            f"{function}: {name} must have the {scores.shape[1]} columns of scores, got {list(array.shape)}"
        )
    return array


def _beta(function: str, beta: float) -> float:
    if not (np.isfinite(beta) and beta > 0):
        raise ValueError(f"{function}: beta must be positive, got {beta}")
    return float(beta)


def _check_k(function: str, k: int, most: int) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise TypeError(f"{function}: k must be an int, got {k!r}")
    if not 1 <= k <= most:
        raise ValueError(f"{function}: k must be in [1, {most}], got {k}")


def _like(result: Float64, given: Any) -> Any:
    """`result` as the kind of array that `given` is."""
    array: npt.NDArray[Any] = result if as_numpy(given).dtype == np.float64 else result.astype(np.float32)
    if not hasattr(given, "detach"):
        return array
    import torch

    return torch.from_numpy(array).to(given.device)
