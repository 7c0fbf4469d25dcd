"""FAISS's exact search, without FAISS: `knn`, the flat indexes, their selectors and files (Douze et al., "The Faiss
Library", 2024). ``import pycm.compat.faiss as faiss`` serves code that uses no more than this.

Values are the exact ones of `pycm.topk` (FAISS's are fp32 sums); of equal values the smaller id comes first (FAISS
leaves it open). METRIC_L2 is the squared distance, as in FAISS.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pycm import _C
from pycm.compat._id_selectors import (
    IDSelector,
    IDSelectorAll,
    IDSelectorAnd,
    IDSelectorArray,
    IDSelectorBatch,
    IDSelectorNot,
    IDSelectorOr,
    IDSelectorRange,
    IDSelectorXOr,
    Members,
    SearchParameters,
)
from pycm.functional import topk

__all__ = [
    "METRIC_INNER_PRODUCT",
    "METRIC_L2",
    "IDSelector",
    "IDSelectorAll",
    "IDSelectorAnd",
    "IDSelectorArray",
    "IDSelectorBatch",
    "IDSelectorNot",
    "IDSelectorOr",
    "IDSelectorRange",
    "IDSelectorXOr",
    "IndexFlat",
    "IndexFlatIP",
    "IndexFlatL2",
    "SearchParameters",
    "knn",
    "read_index",
    "write_index",
]

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
A = TypeVar("A", bound=npt.NDArray[Any])

METRIC_INNER_PRODUCT = 0
METRIC_L2 = 1

_METRICS = {METRIC_INNER_PRODUCT: "dot", METRIC_L2: "sqeuclidean"}
_LARGEST = np.finfo(np.float32).max  # fills places without a neighbour, negated for inner products
_JOIN_PAIRS = 1 << 26  # pairs that range_search asks for at once


def knn(xq: Any, xb: Any, k: int, metric: int = METRIC_L2, metric_arg: float = 0.0) -> tuple[Float32, Int64]:
    """The k nearest rows of xb for each row of xq, without an index.

    Args:
        xq: queries ``[nq, d]``, converted to float32.
        xb: gallery ``[nb, d]``, converted to float32.
        k: places per query; may exceed nb.
        metric: METRIC_L2 (squared distances, smallest first) or METRIC_INNER_PRODUCT (largest first).
        metric_arg: not read.

    Returns:
        ``(D [nq, k] float32, I [nq, k] int64)``. Where fewer than k rows have a finite distance (an inner product
        that is neither NaN nor -inf) the id is -1 and the value the largest fp32 number (its negative).

    Raises:
        AssertionError: the dimensions differ.
        NotImplementedError: another metric.
        ValueError: k is negative, or an array is no matrix.
    """
    xq, xb = np.ascontiguousarray(xq, np.float32), np.ascontiguousarray(xb, np.float32)
    (nq, d), (nb, gallery_d) = xq.shape, xb.shape
    _expect(d == gallery_d, "knn", "xb", f"[nb, {d}]", list(xb.shape))
    name = _metric_name("knn", metric)
    distances, ids = _places(nq, k, metric)
    found = min(k, nb)
    if nq and found:
        _fill(distances, ids, topk(xq, xb, found, name), metric)
    return distances, ids


class IndexFlat:
    """Rows kept as they are and searched exactly. They are encoded once, as they are added.

    Args:
        d: dimension.
        metric: METRIC_L2 or METRIC_INNER_PRODUCT.

    Raises:
        NotImplementedError: another metric.
        ValueError: d is not positive.

    Searches may run in several threads at once; adding, removing and `reset` may not run beside anything else.
    """

    is_trained = True

    def __init__(self, d: int, metric: int = METRIC_L2) -> None:
        self._metric = _metric_name(type(self).__name__, metric)
        if d < 1:
            raise ValueError(f"{type(self).__name__}: d must be positive, got {d}")
        self.d, self.metric_type, self.metric_arg, self.verbose = d, metric, 0.0, False
        self.reset()

    def reset(self) -> None:
        """Remove every row."""
        self._keep(np.empty((0, self.d), np.float32))

    def _keep(self, rows: Float32) -> None:
        """Hold these rows and no others."""
        self._buffer, self.ntotal = rows, len(rows)
        self._encoded = _C.EncodedGallery(self._metric)
        if self.ntotal:
            self._encoded.extend(rows)

    @property
    def _rows(self) -> Float32:
        return self._buffer[: self.ntotal]

    def train(self, x: Any) -> None:
        """Nothing: there is nothing to train."""
        self._vectors("train", x)

    def add(self, x: Any) -> None:
        """Append rows ``[n, d]``; their ids go on from ntotal. Amortised O(n·d).

        Raises:
            AssertionError: the dimension differs.
        """
        x = self._vectors("add", x)
        total = self.ntotal + len(x)
        if total > len(self._buffer):
            buffer = np.empty((max(total, 2 * len(self._buffer)), self.d), np.float32)
            buffer[: self.ntotal] = self._rows
            self._buffer = buffer
        self._buffer[self.ntotal : total] = x
        self.ntotal = total
        if len(x):
            self._encoded.extend(self._rows)

    def search(
        self,
        x: Any,
        k: int,
        *,
        params: SearchParameters | None = None,
        D: Any = None,
        I: Any = None,  # noqa: E741
    ) -> tuple[Float32, Int64]:
        """The k nearest rows for each query ``[n, d]``.

        Args:
            x: queries, converted to float32.
            k: places per query, at least 1; may exceed ntotal.
            params: whose `sel` restricts what may be found.
            D, I: arrays ``[n, k]``, float32 and int64, to write to and return.

        Returns:
            ``(D, I)`` as `knn`.

        Raises:
            AssertionError: the dimension differs, k < 1, or D or I has another shape.
        """
        x = self._vectors("search", x)
        _expect(k > 0, "search", "k", "at least 1", k)
        distances, ids = _places(len(x), k, self.metric_type)
        found = min(k, self.ntotal)
        if len(x) and found:
            mask = self._members(params)
            _fill(distances, ids, self._encoded.topk(x, found, mask, None, None), self.metric_type)
        return _output("D", D, distances), _output("I", I, ids)

    def assign(self, x: Any, k: int, labels: Any = None) -> Int64:
        """The ids that `search` finds, ``[n, k]`` int64, written to `labels` when given."""
        return _output("labels", labels, self.search(x, k)[1])

    def search_and_reconstruct(
        self,
        x: Any,
        k: int,
        *,
        params: SearchParameters | None = None,
        D: Any = None,
        I: Any = None,  # noqa: E741
        R: Any = None,
    ) -> tuple[Float32, Int64, Float32]:
        """``(D, I)`` of `search`, and the rows found, ``[n, k, d]``; NaN where there is none."""
        D, I = self.search(x, k, params=params, D=D, I=I)  # noqa: E741
        found = np.full((*I.shape, self.d), np.nan, np.float32)
        found[I >= 0] = self._rows[I[I >= 0]]
        return D, I, _output("R", R, found)

    def range_search(
        self, x: Any, thresh: float, *, params: SearchParameters | None = None
    ) -> tuple[npt.NDArray[np.uint64], Float32, Int64]:
        """All rows closer than a distance, or of a larger inner product.

        Args:
            x: queries ``[n, d]``, converted to float32.
            thresh: squared distance or inner product, rounded to float32; a value equal to it is not found.
            params: whose `sel` restricts what may be found.

        Returns:
            ``(lims [n + 1] uint64, D [lims[n]] float32, I [lims[n]] int64)``: the values and ids of query i are those
            from lims[i] to lims[i + 1] - 1, by ascending id.

        Raises:
            AssertionError: the dimension differs.
        """
        x, limit, mask = self._vectors("range_search", x), np.float32(thresh), self._members(params)
        counts = np.zeros(len(x), np.int64)
        distances, ids = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
        step = max(1, _JOIN_PAIRS // max(1, self.ntotal))
        possible = limit > 0 if self.metric_type == METRIC_L2 else not np.isnan(limit)
        for start in range(0, len(x) if self.ntotal and possible else 0, step):
            block = x[start : start + step]
            queries, rows, values = self._encoded.join(block, float(limit), -1, len(block) * self.ntotal)
            kept = values < limit if self.metric_type == METRIC_L2 else values > limit
            if mask is not None:
                kept &= mask[rows]
            counts[start : start + step] = np.bincount(queries[kept], minlength=len(block))
            distances.append(values[kept])
            ids.append(rows[kept])
        lims = np.concatenate(([0], counts.cumsum())).astype(np.uint64)
        return lims, np.concatenate(distances), np.concatenate(ids)

    def reconstruct(self, key: int, x: Any = None) -> Float32:
        """Row `key`, ``[d]`` float32, written to x when given.

        Raises:
            RuntimeError: key is not in [0, ntotal).
        """
        return _output("x", x, self.reconstruct_batch([key])[0])

    def reconstruct_batch(self, key: Any, x: Any = None) -> Float32:
        """Rows of these ids, ``[n, d]`` float32, written to x when given.

        Raises:
            RuntimeError: an id is not in [0, ntotal).
        """
        key = np.asarray(key, np.int64)
        outside = key[(key < 0) | (key >= self.ntotal)]
        if outside.size:
            raise RuntimeError(f"reconstruct: key must be in [0, {self.ntotal}), got {outside[0]}")
        return _output("x", x, self._rows[key])

    def reconstruct_n(self, n0: int = 0, ni: int = -1, x: Any = None) -> Float32:
        """Rows n0 to n0 + ni - 1, or to the last, ``[ni, d]`` float32, written to x when given.

        Raises:
            RuntimeError: they are not all there.
        """
        count = self.ntotal - n0 if ni == -1 else ni
        if count and not (n0 >= 0 and count >= 0 and n0 + count <= self.ntotal):
            raise RuntimeError(f"reconstruct_n: rows must be in [0, {self.ntotal}), got {n0} to {n0 + count - 1}")
        return _output("x", x, self._rows[n0 : n0 + count].copy() if count else np.empty((0, self.d), np.float32))

    def remove_ids(self, x: Any) -> int:
        """Remove the ids of a selector or an array; the rows after them move up. O(ntotal·d).

        Returns:
            How many were removed.
        """
        if isinstance(x, IDSelector):
            selector = x
        else:
            _expect(x.ndim == 1, "remove_ids", "x", "one-dimensional", list(x.shape))
            selector = IDSelectorBatch(x)
        gone = selector.members(self.ntotal)
        removed = int(gone.sum())
        if removed:
            self._keep(self._rows[~gone])
        return removed

    def __getstate__(self) -> dict[str, Any]:
        return {"d": self.d, "metric": self.metric_type, "rows": self._rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        IndexFlat.__init__(self, state["d"], state["metric"])
        self.add(state["rows"])

    def _vectors(self, function: str, x: Any) -> Float32:
        _, d = x.shape
        _expect(d == self.d, function, "x", f"[n, {self.d}]", list(x.shape))
        return np.ascontiguousarray(x, np.float32)

    def _members(self, params: SearchParameters | None) -> Members | None:
        return None if params is None or params.sel is None else params.sel.members(self.ntotal)


class IndexFlatL2(IndexFlat):
    """`IndexFlat` of squared distances."""

    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_L2)


class IndexFlatIP(IndexFlat):
    """`IndexFlat` of inner products."""

    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_INNER_PRODUCT)


def write_index(index: IndexFlat, fname: str | os.PathLike[str]) -> None:
    """Write an index to a `pycm.Gallery` file: whole or not at all, checksummed. FAISS does not read it.

    Takes memory for a second copy of the index while it runs.

    Raises:
        RuntimeError: the file cannot be written; it is named.
    """
    from pycm.gallery import Gallery

    gallery = Gallery(dim=index.d, metric=_metric_name("write_index", index.metric_type), dtype="float32")
    gallery.add(index.reconstruct_n())
    try:
        gallery.save(fname)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"write_index: {os.fspath(fname)}: {error}") from error


def read_index(fname: str | os.PathLike[str]) -> IndexFlat:
    """Read what `write_index` wrote, into memory, and compare it with its checksums. It does not read FAISS's files.

    Returns:
        An IndexFlatL2 or IndexFlatIP.

    Raises:
        RuntimeError: there is no such file, or it is damaged or something else; it is named with the reason.
    """
    from pycm.gallery import Gallery

    name = os.fspath(fname)
    try:
        gallery = Gallery.open(name, verify=True)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"read_index: {name}: {error}") from error
    with gallery:
        kinds: dict[str, type[IndexFlatL2] | type[IndexFlatIP]] = {"sqeuclidean": IndexFlatL2, "dot": IndexFlatIP}
        ids, kind = gallery.ids, kinds.get(gallery.metric)
        if kind is None or gallery.dim is None or gallery.dtype != np.float32:
            raise RuntimeError(
                f"read_index: {name}: must hold float32 rows of metric sqeuclidean or dot, got {gallery!r}"
            )
        if not np.array_equal(ids, np.arange(len(ids))):
            raise RuntimeError(f"read_index: {name}: its ids must be 0, 1, ..., which are those of a flat index")
        index = kind(gallery.dim)
        if len(ids):
            index._keep(gallery.get(ids))
    return index


def _metric_name(function: str, metric: int) -> Any:
    if metric not in _METRICS:
        raise NotImplementedError(f"{function}: metric must be METRIC_L2 or METRIC_INNER_PRODUCT, got {metric}")
    return _METRICS[metric]


def _expect(met: bool, function: str, argument: str, expected: Any, got: Any) -> None:
    """FAISS's checks of its arguments are assertions; these hold under ``python -O`` too."""
    if not met:
        raise AssertionError(f"{function}: {argument} must be {expected}, got {got}")


def _places(n: int, k: int, metric: int) -> tuple[Float32, Int64]:
    """Values and ids ``[n, k]`` where nothing has been found."""
    return np.full((n, k), _LARGEST if metric == METRIC_L2 else -_LARGEST, np.float32), np.full((n, k), -1, np.int64)


def _fill(distances: Float32, ids: Int64, matches: Any, metric: int) -> None:
    """Write matches to the first places, those that FAISS would find: it takes what beats its filler."""
    values, rows = matches
    found = (rows >= 0) & (values < _LARGEST if metric == METRIC_L2 else values > -_LARGEST)
    columns = rows.shape[1]
    distances[:, :columns][found] = values[found]
    ids[:, :columns][found] = rows[found]


def _output(name: str, given: A | None, result: A) -> A:
    """`result`, in the array that the caller gave for it."""
    if given is None:
        return result
    _expect(given.shape == result.shape, "IndexFlat", name, f"of shape {list(result.shape)}", list(given.shape))
    given[...] = result
    return given
