"""Canonical correlation analysis of image features and text features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._rows import Float64, RowNorm, check_features, check_row_norm, normalize_rows
from .base import Arrays, BaseSpace, Features, check_pairs, is_count, is_positive
from .kernel import Kernel, apply_map, check_kernel, fit_map
from .ridge import mean_texts

if TYPE_CHECKING:
    from typing_extensions import Self


class CCA(BaseSpace):
    """Regularised canonical correlation analysis (Hotelling 1936; Hardoon et al. 2004).

    Finds the directions u_j of the image features and v_j of the text features whose projections correlate
    most, each scaled to unit (regularised) variance and uncorrelated with the earlier ones. Component j of
    both sides is then multiplied by rho_j ** power, rho_j its canonical correlation, so that directions which
    the two sides share weigh more (Gong et al. 2014).

    Args:
        dim: components kept; None keeps all min(Di, Dt).
        reg: what is added to the covariances' diagonals, as a share of the total variance of that side (so it
            does not depend on units); one number or (image, text).
        power: exponent of the correlations; 0 is classical CCA, Gong et al. use 4.
        kernel, gamma, landmarks: of the image side, as in `Ridge`; "rbf" is kernel CCA.
        image_norm, text_norm: what is done to each row first, as in `Ridge`.

    Attributes after `fit`:
        correlations_: float64 [dim], the regularised canonical correlations, descending.

    Cost: fit O(N F^2 + F^3), F the larger feature dimension (rbf: the number of landmarks).
    """

    def __init__(
        self,
        dim: int | None = None,
        reg: float | tuple[float, float] = (1e-3, 1e-2),
        *,
        power: float = 1.0,
        kernel: Kernel = "linear",
        gamma: float | Literal["scale"] = "scale",
        landmarks: int | None = None,
        image_norm: RowNorm = "l2",
        text_norm: RowNorm = "l2",
    ) -> None:
        super().__init__()
        if dim is not None and not is_count(dim):
            raise ValueError(f"CCA: dim must be None or a positive int, got {dim!r}")
        both = _pair(reg)
        if len(both) != 2 or not all(is_positive(r) for r in both):
            raise ValueError(f"CCA: reg must be a positive number or a pair of them, got {reg!r}")
        if not 0 <= power < float("inf"):
            raise ValueError(f"CCA: power must be at least 0, got {power!r}")
        check_kernel("CCA", kernel, gamma, landmarks, image_norm)
        check_row_norm("CCA", "text_norm", text_norm)
        self.dim = dim
        self.reg = reg
        self.power = power
        self.kernel: Kernel = kernel
        self.gamma: float | Literal["scale"] = gamma
        self.landmarks = landmarks
        self.image_norm: RowNorm = image_norm
        self.text_norm: RowNorm = text_norm

    @classmethod
    def _from_state(cls, params: Mapping[str, Any], arrays: Arrays) -> Self:
        reg = params["reg"]  # JSON has no tuples
        return super()._from_state({**params, "reg": tuple(reg) if isinstance(reg, list) else reg}, arrays)

    def fit(self, image_features: Any, text_features: Any, pairs: Any = None, *, weights: Any = None) -> Self:
        images = check_features("CCA.fit", "image_features", image_features)
        texts = check_features("CCA.fit", "text_features", text_features)
        index, w = check_pairs("CCA.fit", len(images), len(texts), pairs, weights)
        all_texts = normalize_rows(texts, self.text_norm)
        rows, y, image_weights = mean_texts(all_texts, index, w)
        x, arrays, root = fit_map(images[rows], self.image_norm, self.kernel, self.gamma, self.landmarks)

        # Every pair counts: image rows by their total weight, each text of its own, products by mean texts.
        share = image_weights / image_weights.sum()
        x_mean, y_mean = share @ x, share @ y
        xc, yc = x - x_mean, y - y_mean
        every = all_texts[index[:, 1]] - y_mean
        covariance_x = (share[:, None] * xc).T @ xc
        covariance_y = ((w / w.sum())[:, None] * every).T @ every
        white_x = _inverse_root(covariance_x, float(_pair(self.reg)[0]), "image_features")
        white_y = _inverse_root(covariance_y, float(_pair(self.reg)[1]), "text_features")
        u, rho, vt = np.linalg.svd(white_x @ ((share[:, None] * xc).T @ yc) @ white_y, full_matrices=False)
        limit = len(rho)
        dim = limit if self.dim is None else self.dim
        if dim > limit:
            raise ValueError(f"CCA.fit: dim must be at most {limit} for these features, got {dim}")
        u, rho, v = u[:, :dim], rho[:dim], vt[:dim].T
        # A singular vector's sign is arbitrary; the largest entry of v is made positive.
        sign = np.where(v[np.abs(v).argmax(axis=0), np.arange(dim)] < 0, -1.0, 1.0)
        scale = sign * rho**self.power
        image_weights_, text_weights = white_x @ (u * scale), white_y @ (v * scale)
        self._arrays = {
            **arrays,
            "image_weights": root @ image_weights_ if root.size else image_weights_,
            "image_offset": -(x_mean @ image_weights_),
            "text_weights": text_weights,
            "text_mean": y_mean,
            "image_dim": np.array([images.shape[1]], dtype=np.int64),
            "correlations": rho,
        }
        return self

    @property
    def correlations_(self) -> Float64:
        """The canonical correlations, float64 [dim], descending. RuntimeError before `fit`."""
        self._check_fitted("correlations_")
        return np.array(self._arrays["correlations"])

    def transform_images(self, image_features: Any) -> Features:
        """The image side's weighted canonical variates, float32 [N, dim]."""
        self._check_fitted("transform_images")
        arrays = self._arrays
        x = self._input("transform_images", "image_features", image_features, int(arrays["image_dim"][0]))
        out = apply_map(x, self.image_norm, arrays, arrays["image_weights"]) + arrays["image_offset"]
        return out.astype(np.float32)

    def transform_texts(self, text_features: Any) -> Features:
        """The text side's weighted canonical variates, float32 [N, dim]."""
        self._check_fitted("transform_texts")
        mean = self._arrays["text_mean"]
        y = self._input("transform_texts", "text_features", text_features, len(mean))
        out = (normalize_rows(y, self.text_norm) - mean) @ self._arrays["text_weights"]
        return np.asarray(out, dtype=np.float32)


def _pair(reg: Any) -> Any:
    return reg if isinstance(reg, (tuple, list)) else (reg, reg)


def _inverse_root(covariance: Float64, reg: float, argument: str) -> Float64:
    total = float(np.trace(covariance))
    if total <= 0:
        raise ValueError(f"CCA.fit: {argument} are all the same row")
    values, vectors = np.linalg.eigh(covariance)
    root: Float64 = (vectors / np.sqrt(np.maximum(values, 0.0) + reg * total)) @ vectors.T
    return root
