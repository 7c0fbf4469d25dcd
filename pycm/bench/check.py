"""Whether the providers of a case computed the same thing. A time without this says nothing.

pycm's exact results must be those of `pycm.reference` for a sample of the queries, and the same to the bit from each
of its variants for all. A peer may decide otherwise only where fp64 scores nearly tie; where it is right and pycm is
not, pycm is the one accused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .. import reference
from .cases import Case
from .data import Data, chunks
from .providers import loss, temporal_pool

SAMPLE_ROWS = 2
SAMPLE_COLUMNS = 256
SAMPLE_ITEMS = 8
# Peers compared in full where they differ from pycm.
MOST_PAIRS = 10_000
MOST_RANKS = 8
# Of |q| |g|: fp32 sums of the longest rows measured, in any order, stay well inside. A distance is a root: near 0 it
# magnifies what its square lost.
TOLERANCE = 2e-5
DISTANCE_TOLERANCE = 1e-3
RANK_TOLERANCE = 5e-6
RECIPROCAL_TOLERANCE = 1e-3


class Checker:
    """Takes the results of a case one by one; pycm's first, since the others are held against it."""

    def __init__(self, case: Case, data: Data) -> None:
        self.case = case
        self.data = data
        self.wrong: dict[str, str] = {}
        self._first: str | None = None  # the pycm variant whose result is `_expected`
        self._expected: Any = None
        self._rows = np.unique(np.linspace(0, case.queries - 1, SAMPLE_ROWS).astype(int))

    def check(self, name: str, result: Any) -> None:
        """Enter what is wrong with `result`, if anything, into `wrong`."""
        if self.case.op == "call":
            return
        if self.case.op == "temporal_pool":
            self._note(name, temporal_pool.check(self.case, self.data, result, self._expected))
            self._expected = result if self._expected is None else self._expected
            return
        if self.case.op == "loss":
            self._note(name, loss.check(self.case, self.data, result, self._expected))
            self._expected = result if self._expected is None else self._expected
            return
        if self.case.op in ("similarity", "maxsim"):
            self._note(name, getattr(self, f"_{self.case.op}")(np.asarray(result)))
            return
        if not isinstance(result, float):
            result = tuple(np.asarray(part) for part in result)
        if not name.startswith("pycm"):
            self._note(name, getattr(self, f"_peer_{self.case.op}")(result))
        elif self._first is None:
            self._first, self._expected = name, result
            self._note(name, getattr(self, f"_exact_{self.case.op}")(result))
        elif not all(np.array_equal(a, b) for a, b in zip(result, self._expected, strict=True)):
            self._note(name, f"differs from {self._first}")

    def _note(self, name: str, problem: str | None) -> None:
        if problem is not None:
            self.wrong.setdefault(name, problem)

    def _exact_scores(self, row: int) -> npt.NDArray[np.float32]:
        """Every score of a query, by the specification, in parts: its arrays are fp64 and have an axis more."""
        query = self.data.queries[row : row + 1]
        parts = [reference.similarity(query, chunk, self.case.metric)[0] for chunk in chunks(self.data.gallery)]
        return np.concatenate(parts).astype(np.float32)

    def _pair_scores(self, rows: Any, columns: Any) -> npt.NDArray[np.float64]:
        x, y = self.data.queries[rows].astype(np.float64), self.data.gallery[columns].astype(np.float64)
        return reference.METRICS[self.case.metric](x, y)

    def _extra(self, rows: Any, columns: Any, other_rows: Any, other_columns: Any) -> Any:
        """The pairs that are not among the others, at most MOST_PAIRS."""
        m = self.case.gallery
        keys = np.setdiff1d(rows.astype(np.int64) * m + columns, other_rows.astype(np.int64) * m + other_columns)
        return np.divmod(keys[:MOST_PAIRS], m)

    # ---- topk ----

    def _exact_topk(self, result: Any) -> str | None:
        scores, indices = result
        for row in self._rows:
            exact = self._exact_scores(row)
            keys = exact if self.case.metric in reference.DISTANCES else -exact
            best = np.argsort(keys, kind="stable")[: self.case.k]
            if not np.array_equal(indices[row], best):
                return f"indices of query {row} differ from pycm.reference"
            if not np.array_equal(scores[row], exact[best]):
                return f"scores of query {row} differ from pycm.reference"
        return None

    def _peer_topk(self, result: Any) -> str | None:
        indices, (scores, expected) = result[1], self._expected
        if indices.shape != expected.shape:
            return f"shape {indices.shape}"
        if indices.min() < 0 or indices.max() >= self.case.gallery:
            return "an index outside the gallery"
        if (np.diff(np.sort(indices, axis=1), axis=1) == 0).any():
            return "a match twice"
        owner = np.repeat(np.arange(len(indices)), self.case.k)
        rows, columns = self._extra(owner, indices.ravel(), owner, expected.ravel())
        found, last = self._pair_scores(rows, columns), scores[rows, -1]
        distance = self.case.metric in reference.DISTANCES
        behind = (found - last) if distance else (last - found)
        rounded = found.astype(np.float32)
        missed = rounded < last if distance else rounded > last
        if missed.any():
            self._note(
                str(self._first), f"missed matches, such as row {columns[missed][0]} for query {rows[missed][0]}"
            )
        error = float(behind.max(initial=0))
        return f"a match is worse by {error:.1e}" if error > self._tolerance else None

    @property
    def _tolerance(self) -> float:
        return DISTANCE_TOLERANCE if self.case.metric == "euclidean" else TOLERANCE

    # ---- rank ----

    def _exact_rank(self, result: Any) -> str | None:
        greater, equal = result
        for row in self._rows:
            exact = self._exact_scores(row)
            own = exact[self.data.positives[row]][:, None]
            if not np.array_equal(greater[row], (exact > own).sum(1)):
                return f"ranks of query {row} differ from pycm.reference"
            if not np.array_equal(equal[row], (exact == own).sum(1) - 1):
                return f"ties of query {row} differ from pycm.reference"
        return None

    def _peer_rank(self, result: Any) -> str | None:
        expected = self._expected[0]
        if isinstance(result, float):
            mean = float(np.mean(1 / (1 + expected)))
            return None if abs(result - mean) <= RECIPROCAL_TOLERANCE else f"mean reciprocal rank {result}, not {mean}"
        difference = np.abs(result[0] - expected)
        for place in np.argsort(-difference, axis=None)[:MOST_RANKS]:
            row, j = np.unravel_index(place, difference.shape)
            if difference[row, j] and difference[row, j] > self._near(int(row), int(self.data.positives[row, j])):
                return f"a rank of query {row} is {result[0][row, j]}, not {expected[row, j]}"
        return None

    def _near(self, row: int, positive: int) -> int:
        """How many other rows nearly tie with the positive."""
        query = self.data.queries[row].astype(np.float64)
        scores = np.concatenate([chunk.astype(np.float64) @ query for chunk in chunks(self.data.gallery)])
        return int(np.count_nonzero(np.abs(scores - scores[positive]) <= RANK_TOLERANCE)) - 1

    # ---- join ----

    def _exact_join(self, result: Any) -> str | None:
        rows, indices = result
        for row in self._rows:
            if not np.array_equal(indices[rows == row], np.flatnonzero(self._exact_scores(row) >= self.case.threshold)):
                return f"pairs of query {row} differ from pycm.reference"
        return None

    def _peer_join(self, result: Any) -> str | None:
        for pairs, others, what in ((result, self._expected, "too many"), (self._expected, result, "missed")):
            rows, columns = self._extra(*pairs, *others)
            off = float(np.abs(self._pair_scores(rows, columns) - self.case.threshold).max(initial=0))
            if off > TOLERANCE:
                return f"a pair {what}, {off:.1e} from the threshold"
        return None

    # ---- pairs ----

    def _exact_pairs(self, result: Any) -> str | None:
        i, j, scores = result
        exact = self._pair_scores(i, j).astype(np.float32)
        if len(i) != self.case.k or not (i < j).all() or len(np.unique(i * self.case.gallery + j)) != self.case.k:
            return f"not {self.case.k} different pairs"
        if not np.array_equal(scores, exact):
            return "scores differ from pycm.reference"
        for row in self._rows:
            better = set(np.flatnonzero(self._exact_scores(row) > exact.min()).tolist()) - {int(row)}
            if better - set(j[i == row].tolist()) - set(i[j == row].tolist()):
                return f"a better pair of row {row} is missing"
        return None

    def _peer_pairs(self, result: Any) -> str | None:
        expected = self._expected
        if len(result[0]) != self.case.k or not (result[0] < result[1]).all():
            return f"not {self.case.k} pairs"
        found = self._pair_scores(*self._extra(*result[:2], *expected[:2]))
        error = float((expected[2].min() - found).max(initial=0))
        return f"a pair is worse by {error:.1e}" if error > TOLERANCE else None

    # ---- similarity ----

    def _similarity(self, scores: Any) -> str | None:
        case, data = self.case, self.data
        if scores.shape != (case.queries, case.gallery):
            return f"shape {scores.shape}"
        columns = np.linspace(0, case.gallery - 1, min(SAMPLE_COLUMNS, case.gallery)).astype(int)
        queries, gallery = data.queries[self._rows], data.gallery[columns]
        expected = reference.similarity(queries, gallery, case.metric)
        scale: Any = 1.0
        if case.metric in ("dot", "euclidean"):
            scale = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(gallery, axis=1)[None]
            scale = np.sqrt(scale) if case.metric == "euclidean" else scale
        error = float(np.max(np.abs(scores[np.ix_(self._rows, columns)] - expected) / scale))
        return None if error <= TOLERANCE else f"off by {error:.1e} of |q| |g|"

    # ---- maxsim ----

    def _maxsim(self, scores: Any) -> str | None:
        case, (queries, gallery) = self.case, self.data.sets
        if scores.shape != (case.queries, case.gallery):
            return f"shape {scores.shape}"
        columns = np.linspace(0, case.gallery - 1, min(SAMPLE_ITEMS, case.gallery)).astype(int)
        expected = reference.maxsim(list(queries[self._rows]), list(gallery[columns]), case.metric)
        error = float(np.max(np.abs(scores[np.ix_(self._rows, columns)] - expected))) / case.query_vectors
        return None if error <= TOLERANCE else f"off by {error:.1e} a vector"
