"""The image side that Ridge and CCA share: row normalisation, then a linear or a Gaussian feature map.

A Gaussian kernel becomes a finite feature map through L landmark rows (Williams and Seeger 2001, Nystroem):
phi(x) = k(x, landmarks) K^(-1/2). With every training row a landmark this is exact: ridge regression on
phi is kernel ridge regression, and CCA on phi is kernel CCA.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .._rows import Float64, RowNorm, check_row_norm, normalize_rows
from .base import is_count, is_positive

Kernel: TypeAlias = Literal["linear", "rbf"]
_CHUNK_BYTES = 64 << 20


def check_kernel(function: str, kernel: str, gamma: Any, landmarks: Any, image_norm: str) -> None:
    """Raise ValueError for a wrong argument."""
    check_row_norm(function, "image_norm", image_norm)
    if kernel not in ("linear", "rbf"):
        raise ValueError(f"{function}: kernel must be linear or rbf, got {kernel!r}")
    if gamma != "scale" and not is_positive(gamma):
        raise ValueError(f'{function}: gamma must be "scale" or a positive number, got {gamma!r}')
    if landmarks is not None and not is_count(landmarks):
        raise ValueError(f"{function}: landmarks must be None or a positive int, got {landmarks!r}")


def fit_map(
    rows: npt.NDArray[Any],
    norm: RowNorm,
    kernel: Kernel,
    gamma: float | Literal["scale"],
    landmarks: int | None,
) -> tuple[Float64, dict[str, npt.NDArray[Any]], Float64]:
    """Features [N, F] of training rows [N, D], the arrays that `apply_map` needs, and a matrix R [F', F].

    A linear model W on the features is stored as R @ W [F', d] and applied by `apply_map`; for the linear
    kernel R is the identity (returned as an empty array: nothing to multiply). Time O(N L D + L^3), L
    landmarks.
    """
    x = normalize_rows(rows, norm)
    if kernel == "linear":
        return x, {}, np.empty((0, 0))
    if gamma == "scale":  # 1 / the total variance
        total = float(x.var(axis=0).sum())
        value = 1.0 / total if total > 0 else 1.0
    else:
        value = float(gamma)
    count = len(x) if landmarks is None else min(landmarks, len(x))
    # Evenly spaced rows: deterministic, and fair to data sorted by kind.
    chosen = np.arange(count, dtype=np.int64) * len(x) // count
    support = x[chosen].astype(np.float32)
    arrays: dict[str, npt.NDArray[Any]] = {"support": support, "gamma": np.array([value])}
    k = _gaussian(support.astype(np.float64), support, value)
    values, vectors = np.linalg.eigh(k)
    kept = values > 1e-10 * values[-1]  # duplicate landmarks give zeros, and rounding around them
    root = vectors[:, kept] / np.sqrt(values[kept])
    return _gaussian(x, support, value) @ root, arrays, root


def apply_map(rows: npt.NDArray[Any], norm: RowNorm, arrays: dict[str, npt.NDArray[Any]], weights: Float64) -> Float64:
    """phi(rows) @ weights for weights [F', d], in chunks of rows. O(N L (D + d))."""
    if "support" not in arrays:
        return np.asarray(normalize_rows(rows, norm) @ weights, dtype=np.float64)
    support, gamma = arrays["support"], float(arrays["gamma"][0])
    out = np.empty((len(rows), weights.shape[1]))
    step = max(1, _CHUNK_BYTES // (8 * len(support)))
    for start in range(0, len(rows), step):
        part = normalize_rows(rows[start : start + step], norm)
        out[start : start + step] = _gaussian(part, support, gamma) @ weights
    return out


def _gaussian(x: Float64, support: npt.NDArray[Any], gamma: float) -> Float64:
    s = support.astype(np.float64)
    squares = (x * x).sum(axis=1)[:, None] + (s * s).sum(axis=1) - 2.0 * (x @ s.T)
    return np.asarray(np.exp(-gamma * np.maximum(squares, 0.0)), dtype=np.float64)
