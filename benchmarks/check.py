"""Whether the providers of a case computed the same thing. A time without this says nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

import pycm.reference
from benchmarks.cases import Case, Data

SAMPLE_ROWS = 2
SAMPLE_COLUMNS = 256
# Of |q| |g|: fp32 sums of the longest rows measured, in any order, stay well inside.
TOLERANCE = 2e-5


def disagreement(case: Case, data: Data, provider: str, result: Any) -> str | None:
    """None when the result is right, else what is wrong with it."""
    if case.op == "similarity":
        return _similarity(case, data, np.asarray(result))
    if case.op == "topk":
        scores, indices = (np.asarray(part)[:SAMPLE_ROWS] for part in result)
        return _exact(case, data, scores, indices) if provider == "pycm" else _matches(case, data, indices)
    return None


def _similarity(case: Case, data: Data, scores: Any) -> str | None:
    if scores.shape != (case.rows, case.columns):
        return f"shape {scores.shape}"
    columns = np.linspace(0, case.columns - 1, min(SAMPLE_COLUMNS, case.columns)).astype(int)
    rows = np.array([0, case.rows - 1])
    expected = pycm.reference.similarity(data.queries[rows], data.gallery[columns], case.metric)
    scale = _scale(case, data.queries[rows], data.gallery[columns])
    error = float(np.max(np.abs(scores[np.ix_(rows, columns)] - expected) / scale))
    return None if error <= TOLERANCE else f"off by {error:.1e} of |q| |g|"


def _scale(case: Case, queries: Any, gallery: Any) -> Any:
    if case.metric in ("cosine", "pearson"):
        return 1.0
    product = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(gallery, axis=1)[None]
    return np.sqrt(product) if case.metric == "euclidean" else product


def _exact(case: Case, data: Data, scores: Any, indices: Any) -> str | None:
    """pycm's matches are the specification's, to the bit."""
    expected = pycm.reference.topk(data.queries[:SAMPLE_ROWS], data.gallery, case.k, case.metric)
    if not np.array_equal(indices, expected.indices):
        return "indices differ from pycm.reference"
    return None if np.array_equal(scores, expected.scores) else "scores differ from pycm.reference"


def _matches(case: Case, data: Data, indices: Any) -> str | None:
    """A peer may order near-ties otherwise: the fp64 scores of what it found must be the best within fp32."""
    if indices.min() < 0 or indices.max() >= case.columns:
        return "an index outside the gallery"
    expected = pycm.reference.topk(data.queries[:SAMPLE_ROWS], data.gallery, case.k, case.metric)
    for row, found in enumerate(indices):
        if len(set(found.tolist())) != case.k:
            return "a match twice"
        query = data.queries[row : row + 1]
        scores = pycm.reference.similarity(query, data.gallery[found], case.metric)[0]
        error = float(np.max(np.abs(np.sort(scores) - np.sort(expected.scores[row].astype(np.float64)))))
        # Rows have norm 1, but a distance is a root: near 0 it magnifies what its square lost.
        if error > (1e-3 if case.metric == "euclidean" else TOLERANCE):
            return f"a match is worse by {error:.1e}"
    return None
