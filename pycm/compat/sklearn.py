"""scikit-learn's pairwise functions and `NearestNeighbors(algorithm="brute")`.

What pycm has no kernel for is handed to the original: sparse input, other metrics, given norms, trees, and whatever the
original raises an error for. scikit-learn 1.6 or newer. Differences in the last bits and in ties are listed in
docs/compat.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import pycm
from pycm import _C
from pycm._optional import require
from pycm._pairs import BLOCK, MAX_PAIRS, encode, stream

__all__ = ["NearestNeighbors", "cosine_similarity", "euclidean_distances", "pairwise_distances_argmin_min"]

# The originals, bound now: `pycm.compat.patch` changes the modules' attributes.
_pairwise = require("sklearn.metrics.pairwise", "text", "pycm.compat.sklearn")
_cosine_similarity, _euclidean_distances = _pairwise.cosine_similarity, _pairwise.euclidean_distances
_pairwise_distances_argmin_min = _pairwise.pairwise_distances_argmin_min
_NearestNeighbors = require("sklearn.neighbors", "text", "pycm.compat.sklearn").NearestNeighbors
_validate_data: Any = getattr(require("sklearn.utils.validation", "text", "pycm.compat.sklearn"), "validate_data", None)
if _validate_data is None:
    raise ImportError("pycm.compat.sklearn needs scikit-learn 1.6 or newer: pip install -U scikit-learn")

_METRICS: dict[Any, pycm.Metric] = {
    "euclidean": "euclidean",
    "l2": "euclidean",
    "sqeuclidean": "sqeuclidean",
    "cosine": "cosine",
}

Array = npt.NDArray[Any]


def cosine_similarity(X: Any, Y: Any = None, dense_output: bool = True) -> Any:
    """Cosine similarity of every row of X ``[N, D]`` with every row of Y ``[M, D]``: ``[N, M]``.

    Without Y scikit-learn computes half of a symmetric matrix, faster than pycm does all of it, so that is left to it.
    """
    rows = None if Y is None or Y is X else _rows(X, Y)
    if rows is None or not isinstance(dense_output, bool):
        return _cosine_similarity(X, Y, dense_output)
    return pycm.similarity(*rows, "cosine")


def euclidean_distances(
    X: Any, Y: Any = None, *, Y_norm_squared: Any = None, squared: bool = False, X_norm_squared: Any = None
) -> Any:
    """Distances of every row of X ``[N, D]`` to every row of Y ``[M, D]``, X itself by default: ``[N, M]``.

    Close rows are compared by their differences: equal ones are exactly 0 apart. With norms given, the original.
    """
    given = X_norm_squared is not None or Y_norm_squared is not None
    rows = None if given or not isinstance(squared, bool) else _rows(X, Y)
    if rows is None:
        return _euclidean_distances(X, Y, Y_norm_squared=Y_norm_squared, squared=squared, X_norm_squared=X_norm_squared)
    return pycm.similarity(*rows, "sqeuclidean" if squared else "euclidean")


def pairwise_distances_argmin_min(
    X: Any, Y: Any, *, axis: int = 1, metric: Any = "euclidean", metric_kwargs: dict[str, Any] | None = None
) -> tuple[Array, Array]:
    """For each row of X ``[N, D]`` the nearest row of Y ``[M, D]`` and its distance; with axis=0 the other way round.

    euclidean, l2, sqeuclidean and cosine by `pycm.topk`, other metrics by the original. Equal distances: lowest index.
    """
    ours = _METRICS.get(metric) if isinstance(metric, str) else None
    if ours == "euclidean" and metric_kwargs == {"squared": True}:
        ours, metric_kwargs = "sqeuclidean", None
    rows = None if ours is None or metric_kwargs or axis not in (0, 1) or Y is None else _rows(X, Y)
    if ours is None or rows is None:
        return _pairwise_distances_argmin_min(X, Y, axis=axis, metric=metric, metric_kwargs=metric_kwargs)  # type: ignore[no-any-return]
    x, y = rows if axis == 1 else rows[::-1]
    distances, indices = _nearest(x, y, 1, ours)
    return indices[:, 0], distances[:, 0]


class NearestNeighbors(_NearestNeighbors):  # type: ignore[misc, valid-type]
    """scikit-learn's `NearestNeighbors`, whose brute-force searches run on pycm.

    Parameters, attributes, validation, `clone` and pickling are the original's, of which this is a subclass.
    `kneighbors`, `radius_neighbors` and the graphs made of them use pycm when the search is by brute force
    (``algorithm="brute"``, or ``"auto"`` that chooses it) over dense rows, with metric euclidean, l2, minkowski of
    p = 2, sqeuclidean or cosine.
    Neighbours at equal distances come lowest index first. ``n_jobs`` is not needed: see `pycm.set_num_threads`.
    """

    _fit_X: Any  # noqa: N815
    _pycm_encoded: _C.EncodedGallery | None = None

    def fit(self, X: Any, y: Any = None) -> Any:
        """Keep the rows ``[M, D]``: a copy of them, encoded for every search that follows. Returns the estimator."""
        self._pycm_encoded = None
        super().fit(X, y)
        metric = self._pycm_metric()
        if metric is not None:
            self._fit_X = self._fit_X.copy()  # what is written to X later must not differ from the encoding
            self._pycm_encoding(metric)
        return self

    def __getstate__(self) -> Any:
        return {name: value for name, value in super().__getstate__().items() if name != "_pycm_encoded"}

    def kneighbors(self, X: Any = None, n_neighbors: Any = None, return_distance: bool = True) -> Any:
        """Distances ``[N, k]`` and rows ``[N, k]`` of the nearest neighbours; those of each fitted row without X."""
        k: Any = getattr(self, "n_neighbors", None) if n_neighbors is None else n_neighbors
        metric = self._pycm_metric()
        if metric is None or not isinstance(k, (int, np.integer)) or not 1 <= k <= self.n_samples_fit_ - (X is None):
            return super().kneighbors(X, n_neighbors, return_distance)
        rows = self._pycm_rows(X)
        if rows is None:
            return super().kneighbors(X, n_neighbors, return_distance)
        own = np.arange(len(rows[0])) if X is None else None
        encoded = self._pycm_encoding(metric) if rows[1].dtype == _searched_dtype(self._fit_X) else None
        distances, indices = _nearest(*rows, int(k), metric, own, encoded)
        return (distances, indices) if return_distance else indices

    def radius_neighbors(
        self, X: Any = None, radius: Any = None, return_distance: bool = True, sort_results: bool = False
    ) -> Any:
        """Distances and rows of the neighbours within the radius: object arrays ``[N]`` of vectors."""
        limit: Any = getattr(self, "radius", None) if radius is None else radius
        metric = self._pycm_metric()
        plain = (
            isinstance(limit, (int, float, np.number)) and 0 <= limit < 1e30 and (return_distance or not sort_results)
        )
        rows = self._pycm_rows(X) if metric is not None and plain else None
        if metric is None or rows is None:
            return super().radius_neighbors(X, radius, return_distance, sort_results)
        encoded = self._pycm_encoding(metric) if rows[1].dtype == _searched_dtype(self._fit_X) else None
        queries, indices, distances = _within(*rows, float(limit), metric, encoded)
        if X is None:
            other = queries != indices
            queries, indices, distances = queries[other], indices[other], distances[other]
        if sort_results:
            order = np.lexsort((distances, queries))
            queries, indices, distances = queries[order], indices[order], distances[order]
        ends = np.searchsorted(queries, np.arange(1, len(rows[0])))
        split = [_objects(np.split(values, ends)) for values in (distances, indices)]
        return tuple(split) if return_distance else split[1]

    def _pycm_metric(self) -> pycm.Metric | None:
        """None where the original has to be asked: not fitted, a tree, another metric."""
        brute = getattr(self, "_fit_method", None) == "brute" and isinstance(self._fit_X, np.ndarray)
        if not brute or self.effective_metric_params_ or not isinstance(self.effective_metric_, str):
            return None
        return _METRICS.get(self.effective_metric_)

    def _pycm_encoding(self, metric: pycm.Metric) -> _C.EncodedGallery:
        """The fitted rows, in the dtype that most queries have; encoded here only after unpickling."""
        encoded = self._pycm_encoded
        if encoded is None:
            encoded = self._pycm_encoded = encode(np.asarray(self._fit_X, _searched_dtype(self._fit_X)), metric)
        return encoded

    def _pycm_rows(self, X: Any) -> tuple[Array, Array] | None:
        gallery = self._fit_X
        if X is None:
            return _same_dtype(gallery, gallery)
        queries = _validate_data(self, X, accept_sparse="csr", reset=False, order="C")
        return _same_dtype(queries, gallery) if isinstance(queries, np.ndarray) else None


# (original, replacement): what `pycm.compat.patch` swaps.
REPLACEMENTS = (
    (_cosine_similarity, cosine_similarity),
    (_euclidean_distances, euclidean_distances),
    (_pairwise_distances_argmin_min, pairwise_distances_argmin_min),
    (_NearestNeighbors, NearestNeighbors),
)


def _nearest(
    x: Array,
    y: Array,
    k: int,
    metric: pycm.Metric,
    exclude: Array | None = None,
    encoded: _C.EncodedGallery | None = None,
) -> tuple[Array, Array]:
    if encoded is None:
        scores, indices = pycm.topk(x, y, k, metric, exclude=exclude)
    else:
        offsets = None if exclude is None else np.arange(len(exclude) + 1)
        scores, indices = encoded.topk(x, k, None, exclude, offsets)
    return _distances(scores, metric), indices


def _within(
    x: Array, y: Array, radius: float, metric: pycm.Metric, encoded: _C.EncodedGallery | None
) -> tuple[Array, Array, Array]:
    """(rows of x, rows of y, distances) of all pairs within the radius."""
    # Rounded like the distances, so that a pair on the boundary stays on it.
    radius = float(x.dtype.type(radius))
    # 1 - score is rounded once more: join a little more, and compare the distances themselves.
    threshold = 1 - radius - 1e-6 if metric == "cosine" else radius
    found = stream(x, y, lambda: threshold, metric, BLOCK, MAX_PAIRS, lambda _: None, encoded)
    none = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, x.dtype))
    queries, indices, scores = (
        np.concatenate(parts) for parts in zip(none, *(pairs for _, pairs in found), strict=True)
    )
    distances = _distances(scores, metric)
    near = distances <= radius
    return queries[near], indices[near], distances[near]


def _distances(scores: Array, metric: pycm.Metric) -> Array:
    """As the original gives them: float64, but cosine distances in the rows' dtype."""
    return np.clip(1 - scores, 0, 2) if metric == "cosine" else scores.astype(np.float64)


def _rows(X: Any, Y: Any) -> tuple[Array, Array] | None:
    """Both as dense floating-point matrices, checked by scikit-learn, or None where the original has to be asked."""
    try:
        x, y = _pairwise.check_pairwise_arrays(X, Y)
    except (TypeError, ValueError):  # the original raises it again, in its own words
        return None
    return (x, y) if isinstance(x, np.ndarray) and isinstance(y, np.ndarray) and x.dtype == y.dtype else None


def _searched_dtype(fitted: Array) -> Any:
    """What `_same_dtype` makes of the fitted rows with queries of their own dtype."""
    return np.float32 if fitted.dtype == np.float32 else np.float64


def _same_dtype(x: Array, y: Array) -> tuple[Array, Array]:
    """float32 if both are, float64 otherwise."""
    dtype = np.float32 if x.dtype == y.dtype == np.float32 else np.float64
    same = y is x
    x = np.asarray(x, dtype)
    return x, (x if same else np.asarray(y, dtype))


def _objects(parts: list[Array]) -> Array:
    out = np.empty(len(parts), dtype=object)
    out[:] = parts
    return out
