"""What the evaluation functions take: scores, as a matrix or as embeddings, and known positives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from .._rows import as_numpy, check_features
from ..functional import DISTANCES, METRICS, Metric, _compressed_rows, similarity

Int64: TypeAlias = npt.NDArray[np.int64]
Float64: TypeAlias = npt.NDArray[np.float64]

_CHUNK_SCORES = 1 << 22
# Up to here one comparison of the row with each positive is faster than sorting the row.
_COMPARED_POSITIVES = 16
_LIMIT = 1e140


class Positives(NamedTuple):
    """Known matches, query by query, each gallery row once for a query, in ascending order.

    Attributes:
        rows: int64 [P], the query of each.
        indices: int64 [P], gallery rows.
        offsets: int64 [N + 1], where each query's begin.
        relevance: float64 [P], their grades.
    """

    rows: Int64
    indices: Int64
    offsets: Int64
    relevance: Float64


class Counts(NamedTuple):
    """What `pycm.rank` returns of it: gallery rows above each positive, and others level with it, int64 [P]."""

    greater: Int64
    equal: Int64


@dataclass(frozen=True)
class Scores:
    """Scores [N, M], larger is better: a matrix, or embeddings and a metric. `function` opens error messages."""

    function: str
    queries: npt.NDArray[Any]
    gallery: npt.NDArray[Any]
    metric: Metric | None  # None: `queries` is the matrix itself, `gallery` its transpose

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.queries), len(self.gallery)

    @property
    def transposed(self) -> Scores:
        return Scores(self.function, self.gallery, self.queries, self.metric)

    def block(self, rows: slice, columns: slice) -> Scores:
        if self.metric is not None:
            return Scores(self.function, self.queries[rows], self.gallery[columns], self.metric)
        matrix = self.queries[rows, columns]
        return Scores(self.function, matrix, matrix.T, None)

    def chunks(self) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """(first row, contiguous rows of scores), without a NaN."""
        n, m = self.shape
        step = max(1, _CHUNK_SCORES // m)
        for start in range(0, n, step):
            chunk = self.queries[start : start + step]
            if self.metric is not None:
                chunk = similarity(chunk, self.gallery, self.metric)
                chunk = -chunk if self.metric in DISTANCES else chunk
            chunk = np.ascontiguousarray(chunk, np.float32 if chunk.dtype == np.float16 else None)
            wrong = np.isnan(chunk).any(axis=1)
            if wrong.any():
                raise ValueError(f"{self.function}: row {start + int(np.argmax(wrong))} of the scores has a NaN")
            yield start, chunk

    def counts(self, positives: Positives, exclude: Int64 | None = None) -> Counts:
        if self.metric is not None:
            return self._counts_of_embeddings(self.metric, positives, exclude)
        greater, equal = (np.empty(len(positives.indices), np.int64) for _ in range(2))
        for start, chunk in self.chunks():
            stop = start + len(chunk)
            first, last = positives.offsets[start], positives.offsets[stop]
            rows = positives.rows[first:last] - start
            values = chunk[rows, positives.indices[first:last]]
            above, level = _count(chunk, values, positives.offsets[start : stop + 1] - first)
            if exclude is not None:
                excluded = exclude[start:stop][rows]
                others = chunk[rows, np.maximum(excluded, 0)]
                above -= (excluded >= 0) & (others > values)
                level -= (excluded >= 0) & (others == values)
            greater[first:last], equal[first:last] = above, level
        return Counts(greater, equal)

    def _counts_of_embeddings(self, metric: Metric, positives: Positives, exclude: Int64 | None) -> Counts:
        from ..ranking import rank

        single = len(positives.indices) == len(self.queries)
        known = positives.indices if single else (positives.offsets, positives.indices)
        ranks = rank(self.queries, self.gallery, known, metric, exclude=exclude)
        return Counts(np.asarray(ranks.greater), np.asarray(ranks.equal))


def _count(chunk: npt.NDArray[Any], values: npt.NDArray[Any], offsets: Int64) -> Counts:
    """For each positive's score, how many of its row are greater, and how many others are equal."""
    greater, equal = (np.empty(len(values), np.int64) for _ in range(2))
    sizes = np.diff(offsets)
    if sizes.max(initial=0) <= _COMPARED_POSITIVES:
        for j in range(int(sizes.max(initial=0))):
            some = np.flatnonzero(sizes > j)
            at = offsets[some] + j
            scores = chunk if len(some) == len(chunk) else chunk[some]
            greater[at] = np.count_nonzero(scores > values[at, None], axis=1)
            equal[at] = np.count_nonzero(scores == values[at, None], axis=1) - 1
        return Counts(greater, equal)
    for i, row in enumerate(np.sort(chunk, axis=1)):
        own = slice(offsets[i], offsets[i + 1])
        right = np.searchsorted(row, values[own], "right")
        greater[own] = len(row) - right
        equal[own] = right - np.searchsorted(row, values[own], "left") - 1
    return Counts(greater, equal)


def read_scores(function: str, scores: Any) -> Scores:
    """`scores` as it comes from the user: [N, M], or (queries, gallery, metric)."""
    if isinstance(scores, tuple):
        if len(scores) != 3:
            raise ValueError(
                f"{function}: scores must be [N, M] or (queries, gallery, metric), got a tuple of {len(scores)}"
            )
        if scores[2] not in METRICS:
            raise ValueError(f"{function}: metric must be one of {', '.join(METRICS)}, got {scores[2]!r}")
        queries = check_features(function, "queries", _floating(scores[0]))
        gallery = check_features(function, "gallery", _floating(scores[1]), dim=queries.shape[1])
        if queries.dtype != gallery.dtype:
            raise TypeError(
                f"{function}: queries and gallery must have one dtype, got {queries.dtype}, {gallery.dtype}"
            )
        for name, rows in (("queries", queries), ("gallery", gallery)):
            # Scores of finite float32 rows are never NaN; those of float64 rows may overflow to one.
            if rows.dtype == np.float64 and max(rows.max(initial=0), -rows.min(initial=0)) > _LIMIT:
                raise ValueError(f"{function}: {name} must be within ±{_LIMIT:g}, beyond which scores overflow")
        out = Scores(function, queries, gallery, scores[2])
    else:
        matrix = _floating(scores)
        if matrix.dtype.kind != "f":
            raise TypeError(f"{function}: scores must be floating point, got {matrix.dtype}")
        if matrix.ndim != 2:
            raise ValueError(f"{function}: scores must have shape [N, M], got {list(matrix.shape)}")
        out = Scores(function, matrix, matrix.T, None)
    if 0 in out.shape:
        raise ValueError(f"{function}: scores must not be empty, got {list(out.shape)}")
    return out


def _floating(x: Any) -> npt.NDArray[Any]:
    array = as_numpy(x)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array  # NumPy cannot compare ml_dtypes' own


def read_positives(function: str, positives: Any, relevance: Any, n: int, m: int) -> Positives:
    """The positives of N queries among M gallery rows, in any of the forms that `pycm.rank` takes."""
    indices, offsets = _compressed(function, positives, n, m)
    sizes = np.diff(offsets)
    if (sizes <= 0).any():
        raise ValueError(f"{function}: positives[{int(np.argmax(sizes <= 0))}] is empty")
    rows = np.repeat(np.arange(n), sizes)
    wrong = np.flatnonzero((indices < 0) | (indices >= m))
    if len(wrong):
        at = wrong[0]
        raise ValueError(f"{function}: positives[{rows[at]}] must be in [0, {m - 1}], got {indices[at]}")
    keys, first = np.unique(rows * m + indices, return_index=True)
    if len(keys) < len(rows):
        if relevance is not None:
            raise ValueError(f"{function}: positives must not repeat where relevance grades them")
        rows, offsets = rows[first], np.searchsorted(rows[first], np.arange(n + 1))
    grades = np.ones(len(first))
    if relevance is not None:
        grades = _relevance(function, relevance, len(first))[first]
    return Positives(rows, keys % m, offsets, grades)


def _compressed(function: str, positives: Any, n: int, m: int) -> tuple[Int64, Int64]:
    """(indices, offsets), the forms being those of `pycm.rank`."""
    dense = hasattr(positives, "detach") and not getattr(positives, "is_sparse_csr", False)
    given = as_numpy(positives) if dense else positives
    indices, offsets = _compressed_rows(function, "positives", given, n, m)
    if offsets is None:
        return indices, np.arange(n + 1)
    if offsets.shape != (n + 1,) or offsets[0] != 0 or offsets[-1] != len(indices):
        raise ValueError(f"{function}: offsets of positives must be {n + 1} numbers, from 0 to {len(indices)}")
    return indices, offsets


def _integers(function: str, name: str, values: Any) -> Int64:
    array = np.atleast_1d(as_numpy(values))
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{function}: {name} must be integers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{function}: {name} must be an int or 1-D, got {array.ndim}-D")
    return array.astype(np.int64)


def _relevance(function: str, relevance: Any, count: int) -> Float64:
    """Grades aligned with the flat positives, given flat or nested as they are."""
    nested = isinstance(relevance, Sequence) and len(relevance) > 0 and np.ndim(as_numpy(relevance[0])) == 1
    parts = [as_numpy(x) for x in relevance] if nested else [as_numpy(relevance)]
    grades = np.concatenate(parts).astype(np.float64) if parts[0].ndim == 1 else parts[0]
    if grades.shape != (count,):
        raise ValueError(
            f"{function}: relevance must have one grade for each of the {count} positives, got {list(grades.shape)}"
        )
    if not (grades > 0).all() or not np.isfinite(grades).all():
        raise ValueError(f"{function}: relevance must be positive and finite; leave out what is not relevant")
    return grades


def read_exclude(function: str, exclude: Any, positives: Positives, m: int) -> Int64 | None:
    """Rows [N] that count for nothing, -1 for none; none of them a positive."""
    if exclude is None:
        return None
    n = len(positives.offsets) - 1
    array = _integers(function, "exclude", exclude)
    if array.shape != (n,):
        raise ValueError(f"{function}: exclude must have shape [{n}], got {list(array.shape)}")
    if (array < -1).any() or (array >= m).any():
        raise ValueError(f"{function}: exclude must be in [-1, {m - 1}], got {array[(array < -1) | (array >= m)][0]}")
    both = positives.indices == array[positives.rows]
    if both.any():
        row = positives.rows[np.argmax(both)]
        raise ValueError(f"{function}: exclude[{row}] is a positive of query {row}: {array[row]}")
    return array


def read_ks(function: str, ks: Sequence[int]) -> list[int]:
    out = []
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
            raise TypeError(f"{function}: ks must be ints, got {k!r}")
        if k < 1:
            raise ValueError(f"{function}: ks must be positive, got {k}")
        out.append(int(k))
    return out
