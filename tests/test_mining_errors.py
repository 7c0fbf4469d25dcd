"""Joins, best pairs and duplicates: errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pycm.mining import all_pairs_topk, deduplicate, threshold_join

X = np.ones((5, 4), np.float32)

ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no min_score": (lambda: threshold_join(X, X), TypeError, "threshold_join: min_score must be a number, got None"),
    "nan": (lambda: threshold_join(X, X, np.nan), ValueError, "threshold_join: min_score must be a number, got nan"),
    "score of a distance": (
        lambda: threshold_join(X, X, 0.5, "euclidean"),
        ValueError,
        "threshold_join: min_score must be None for the metric euclidean, which takes max_distance, got 0.5",
    ),
    "distance of a score": (
        lambda: threshold_join(X, X, 0.5, max_distance=1),
        ValueError,
        "threshold_join: max_distance must be None for the metric cosine, which takes min_score, got 1",
    ),
    "block": (
        lambda: threshold_join(X, X, 0.5, block=0),
        ValueError,
        "threshold_join: block must be at least 1, got 0",
    ),
    "max_pairs": (
        lambda: threshold_join(X, X, 0.5, max_pairs=1.5),  # type: ignore[arg-type]
        TypeError,
        "threshold_join: max_pairs must be an integer, got float",
    ),
    "gallery": (lambda: threshold_join(X, X[:0], 0.5), ValueError, "threshold_join: gallery must have .* [0, 4]"),
    "features": (lambda: threshold_join(X, X[:, :3], 0.5), ValueError, "threshold_join: gallery .* 4 features"),
    "dtypes": (
        lambda: threshold_join(X, X.astype("f8"), 0.5),
        TypeError,
        "threshold_join: gallery .* float32, got float64",
    ),
    "integers": (lambda: all_pairs_topk(X.astype(int), 1), TypeError, "all_pairs_topk: embeddings .* got int64"),
    "vector": (lambda: all_pairs_topk(X[0], 1), ValueError, r"all_pairs_topk: embeddings .* \[N, D\].* got \[4\]"),
    "no features": (lambda: deduplicate(X[:, :0], 1), ValueError, r"deduplicate: embeddings .* got \[5, 0\]"),
    "k": (lambda: all_pairs_topk(X, 0), ValueError, "all_pairs_topk: k must be at least 1, got 0"),
    "per_row": (
        lambda: all_pairs_topk(X, 1, per_row=-1),
        ValueError,
        "all_pairs_topk: per_row must be at least 1, got -1",
    ),
    "metric": (lambda: all_pairs_topk(X, 1, "l2"), ValueError, "all_pairs_topk: metric must be one of .*'l2'"),  # type: ignore[arg-type]
    "mode": (lambda: deduplicate(X, 1, mode="all"), ValueError, "deduplicate: mode must be greedy or .* got 'all'"),  # type: ignore[arg-type]
    "threshold": (lambda: deduplicate(X, "x"), TypeError, "deduplicate: threshold must be a number, got 'x'"),  # type: ignore[arg-type]
    "negative distance": (
        lambda: deduplicate(X, -1, "euclidean"),
        ValueError,
        "deduplicate: threshold must be a distance of at least 0, got -1",
    ),
    "list": (lambda: deduplicate(X.tolist(), 1), TypeError, "deduplicate: embeddings must be .* got list"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_was_wrong(name: str) -> None:
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message.replace("[0, 4]", r"\[0, 4\]")):
        call()  # a generator is not asked for its first block
