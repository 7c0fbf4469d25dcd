"""Correlation alignment: one domain's features with another's mean and covariance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._rows import Float64, check_features
from .base import Features, is_positive

if TYPE_CHECKING:
    from typing_extensions import Self

_METHODS = ("covariance", "mean")


class CORAL:
    """Aligns source features to a target domain without labels there (Sun, Feng and Saenko 2016).

    A model fitted to the aligned source features is then used on the target's own: a space trained on photographs, for
    drawings. ``x -> (x - mean_s) C_s^(-1/2) C_t^(1/2) + mean_t``.

    Args:
        method: "covariance", or "mean" for the means alone.
        reg: what is added to both covariances, in units of their mean variance: with fewer rows than dimensions the
            source's has no inverse.

    Raises:
        ValueError: an unknown method, or `reg` not positive.

    Cost: O((N + M) D^2 + D^3), in float64.
    """

    def __init__(self, method: Literal["covariance", "mean"] = "covariance", reg: float = 0.1) -> None:
        if method not in _METHODS:
            raise ValueError(f"CORAL: method must be one of {', '.join(_METHODS)}, got {method!r}")
        if not is_positive(reg):
            raise ValueError(f"CORAL: reg must be a positive number, got {reg!r}")
        self.method, self.reg = method, reg
        self._maps: tuple[Float64, Float64, Float64] | None = None  # source mean, matrix, target mean

    def __repr__(self) -> str:
        return f"CORAL(method={self.method!r}, reg={self.reg!r})"

    def fit(self, source: Any, target: Any) -> Self:
        """Learn the map from source rows [N, D] and target rows [M, D], floating point, N and M at least 2.

        Raises:
            TypeError, ValueError: wrong types or shapes, NaN (the row is named).
        """
        a = check_features("CORAL.fit", "source", source).astype(np.float64)
        b = check_features("CORAL.fit", "target", target, a.shape[1]).astype(np.float64)
        for name, rows in (("source", a), ("target", b)):
            if len(rows) < 2:
                raise ValueError(f"CORAL.fit: {name} must have at least 2 rows, got {len(rows)}")
        mean_a, mean_b = a.mean(0), b.mean(0)
        matrix = np.eye(a.shape[1])
        if self.method == "covariance":
            matrix = self._root(a - mean_a, -0.5) @ self._root(b - mean_b, 0.5)
        self._maps = mean_a, matrix, mean_b
        return self

    def _root(self, centred: Float64, power: float) -> Float64:
        """The power of the covariance, a constant feature's variance being what `reg` adds."""
        covariance = centred.T @ centred / (len(centred) - 1)
        scale = np.trace(covariance) / len(covariance)
        values, vectors = np.linalg.eigh(covariance + self.reg * (scale or 1.0) * np.eye(len(covariance)))
        root: Float64 = (vectors * values**power) @ vectors.T
        return root

    def transform(self, x: Any) -> Features:
        """Source rows [N, D] where the target's are, float32. RuntimeError before `fit`, ValueError as `fit`."""
        if self._maps is None:
            raise RuntimeError("CORAL.transform: not fitted, call fit(source, target) first")
        mean_a, matrix, mean_b = self._maps
        rows = check_features("CORAL.transform", "x", x, len(mean_a)).astype(np.float64)
        return ((rows - mean_a) @ matrix + mean_b).astype(np.float32)

    def fit_transform(self, source: Any, target: Any) -> Features:
        """``fit(source, target).transform(source)``."""
        return self.fit(source, target).transform(source)
