"""Ridge regression from image features to text features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .._rows import Float64, RowNorm, check_features, check_row_norm, normalize_rows
from .base import BaseSpace, Features, check_pairs, is_positive
from .kernel import Kernel, apply_map, check_kernel, fit_map

if TYPE_CHECKING:
    from typing_extensions import Self

# Shares of the features' total squared length that "auto" tries: from next to no shrinkage to a lot.
_AUTO = np.logspace(-6, 1, 29)
_REG = 0.1  # what is added to each feature's variance, in units of the mean variance, as in `CORAL`


class Ridge(BaseSpace):
    """Predicts text features from image features by (kernel) ridge regression; texts stay what they are.

    Minimises sum_p w_p |y_p - phi(x_p) W - b|^2 + alpha |W|^2 over the pairs p, exactly, in float64. With
    `kernel="linear"` phi is the identity and the result is that of `sklearn.linear_model.Ridge`; with "rbf"
    it is Gaussian kernel ridge regression, k(x, z) = exp(-gamma |x - z|^2), with an intercept.

    Args:
        alpha: the penalty, or "auto": of 29 values between 1e-6 and 10 times the total squared length of the
            centred features, the one of least leave-one-image-out error. This is computed in closed form
            (Allen 1974); an image with its texts is left out as one.
        kernel: "linear" or "rbf". The latter is worth trying where there are up to some 10,000 images.
        gamma: of the rbf kernel; "scale" is 1 / the total variance of the (normalised) features.
        landmarks: rbf only: use this many evenly spaced training images to span the space, where an
            N x N matrix is too much (Nystroem). None uses all: exact.
        image_norm, text_norm: what is done to each row first: "none", "l2" (unit length), or "power"
            (signed square root, then unit length: for activations of a CNN and for histograms).
        center: both transforms give positions relative to the mean training text. What all texts share
            would otherwise take part in every cosine. False gives the plain prediction, and the text itself.
        toward: what the prediction shrinks to: "zero", or "identity" for two domains of one encoder (photographs and
            the frames of drawn clips, say), whose features mean the same up to the look of their domain. Each side is
            then brought to mean 0 and deviation 1, and W predicts only how y_p differs from x_p:
            sum_p w_p |y_p - x_p - phi(x_p) W - b|^2 + alpha |W|^2. Where pairs are few, new items gain a lot.

    Attributes after `fit`:
        alpha_: the penalty in use.
        loo_error_: the mean squared leave-one-image-out error of a text vector at that penalty.

    Cost: fit O(N F min(N, F)), F = Di (linear) or the number of landmarks (rbf); transform O(Di d) an image
    (linear), O(L (Di + d)) (rbf).
    """

    def __init__(
        self,
        alpha: float | Literal["auto"] = "auto",
        *,
        kernel: Kernel = "linear",
        gamma: float | Literal["scale"] = "scale",
        landmarks: int | None = None,
        image_norm: RowNorm = "l2",
        text_norm: RowNorm = "l2",
        center: bool = True,
        toward: Literal["zero", "identity"] = "zero",
    ) -> None:
        super().__init__()
        if alpha != "auto" and not is_positive(alpha):
            raise ValueError(f'Ridge: alpha must be "auto" or a positive number, got {alpha!r}')
        check_kernel("Ridge", kernel, gamma, landmarks, image_norm)
        check_row_norm("Ridge", "text_norm", text_norm)
        if toward not in ("zero", "identity"):
            raise ValueError(f"Ridge: toward must be zero or identity, got {toward!r}")
        if toward == "identity" and not center:
            raise ValueError('Ridge: center must be True with toward="identity", got False')
        self.alpha: float | Literal["auto"] = alpha
        self.kernel: Kernel = kernel
        self.gamma: float | Literal["scale"] = gamma
        self.landmarks = landmarks
        self.image_norm: RowNorm = image_norm
        self.text_norm: RowNorm = text_norm
        self.center = center
        self.toward: Literal["zero", "identity"] = toward

    def fit(self, image_features: Any, text_features: Any, pairs: Any = None, *, weights: Any = None) -> Self:
        images = check_features("Ridge.fit", "image_features", image_features)
        texts = check_features("Ridge.fit", "text_features", text_features)
        index, w = check_pairs("Ridge.fit", len(images), len(texts), pairs, weights)
        rows, y, w = mean_texts(normalize_rows(texts, self.text_norm), index, w)
        if len(rows) < 2:
            raise ValueError(f"Ridge.fit: at least 2 different images are needed, got {len(rows)}")
        share = w / w.sum()
        x = images[rows]
        scales: dict[str, Float64] = {}
        if self.toward == "identity":
            if x.shape[1] != y.shape[1]:
                raise ValueError(
                    f'Ridge.fit: toward="identity" needs image_features and text_features of one size, '
                    f"got {x.shape[1]} and {y.shape[1]}"
                )
            x = normalize_rows(x, self.image_norm)
            for side, values in (("image", x), ("text", y)):
                scales |= {f"{side}_mean": share @ values, f"{side}_scale": _scale(values, share)}
            x, y = ((v - scales[f"{side}_mean"]) * scales[f"{side}_scale"] for side, v in (("image", x), ("text", y)))
            y = y - x
        phi, arrays, root = fit_map(x, self._norm, self.kernel, self.gamma, self.landmarks)

        # Centring by the weighted means takes the intercept out; sqrt(w) makes the weights plain squares.
        phi_mean, y_mean = share @ phi, share @ y
        scale = np.sqrt(w)[:, None]
        a, b = scale * (phi - phi_mean), scale * (y - y_mean)
        alpha, coefficients, error = _solve(a, b, share, self.alpha)

        stored = root @ coefficients if root.size else coefficients
        self._arrays = {
            **arrays,
            "weights": stored,
            "offset": -(phi_mean @ coefficients),
            "text_mean": y_mean,
            **scales,
            "image_dim": np.array([images.shape[1]], dtype=np.int64),
            "alpha": np.array([alpha]),
            "loo_error": np.array([error / w.sum()]),
        }
        return self

    @property
    def _norm(self) -> RowNorm:
        """What `phi` does to its rows: those that were brought to deviation 1 have their norm behind them."""
        return "none" if self.toward == "identity" else self.image_norm

    @property
    def alpha_(self) -> float:
        """The penalty in use. RuntimeError before `fit`."""
        self._check_fitted("alpha_")
        return float(self._arrays["alpha"][0])

    @property
    def loo_error_(self) -> float:
        """Mean squared leave-one-image-out error. RuntimeError before `fit`."""
        self._check_fitted("loo_error_")
        return float(self._arrays["loo_error"][0])

    def transform_images(self, image_features: Any) -> Features:
        """The predicted text features, float32 [N, Dt], less the mean training text if `center`.

        With toward="identity" in units of the training texts' deviations; so are those of `transform_texts`.
        """
        self._check_fitted("transform_images")
        arrays = self._arrays
        x: npt.NDArray[Any] = self._input(
            "transform_images", "image_features", image_features, int(arrays["image_dim"][0])
        )
        if self.toward == "identity":
            x = (normalize_rows(x, self.image_norm) - arrays["image_mean"]) * arrays["image_scale"]
        out = apply_map(x, self._norm, arrays, arrays["weights"]) + arrays["offset"]
        if self.toward == "identity":
            return np.asarray(x + out, dtype=np.float32)
        return (out if self.center else out + arrays["text_mean"]).astype(np.float32)

    def transform_texts(self, text_features: Any) -> Features:
        """The (normalised) text features, float32 [N, Dt], less the mean training text if `center`."""
        self._check_fitted("transform_texts")
        mean = self._arrays["text_mean"]
        out = normalize_rows(self._input("transform_texts", "text_features", text_features, len(mean)), self.text_norm)
        if self.toward == "identity":
            return np.asarray((out - mean) * self._arrays["text_scale"], dtype=np.float32)
        return (out - mean if self.center else out).astype(np.float32)

    def moved_to(self, other: Ridge, rows: Features) -> Features:
        """What the transforms gave, relative to the mean (and in the deviations) of `other`'s training texts."""
        if not self.center:
            return rows
        mine, theirs = self._arrays, other._arrays
        texts = rows.astype(np.float64) / mine.get("text_scale", 1.0) + mine["text_mean"]
        return np.asarray((texts - theirs["text_mean"]) * theirs.get("text_scale", 1.0), dtype=np.float32)


def _scale(rows: Float64, share: Float64) -> Float64:
    """1 / the deviation of each feature of rows [N, D] that weigh `share` [N]; 1 where all rows are the same."""
    variance = share @ (rows - share @ rows) ** 2
    mean = float(variance.mean())
    scale: Float64 = 1 / np.sqrt(variance + _REG * (mean or 1.0 / _REG))
    return scale


def mean_texts(
    texts: Float64, pairs: npt.NDArray[np.int64], weights: Float64
) -> tuple[npt.NDArray[np.int64], Float64, Float64]:
    """(image rows [R] ascending, the weighted mean of each one's texts [R, Dt], its total weight [R]).

    A least-squares fit to these is the fit to all pairs: sum_p w_p |y_p - f|^2 = w |mean - f|^2 + a constant.
    """
    rows, inverse = np.unique(pairs[:, 0], return_inverse=True)
    total = np.bincount(inverse, weights=weights).astype(np.float64)
    sums = np.zeros((len(rows), texts.shape[1]))
    np.add.at(sums, inverse, weights[:, None] * texts[pairs[:, 1]])
    return rows, sums / total[:, None], total


def _solve(a: Float64, b: Float64, share: Float64, alpha: float | Literal["auto"]) -> tuple[float, Float64, float]:
    """The penalty, W = (a'a + alpha)^-1 a'b, and the summed squared leave-one-out error.

    One eigendecomposition of the smaller of a'a and aa' serves every alpha. Leave-one-out residuals are
    r_i / (1 - h_i), where h is the diagonal of the hat matrix; the intercept adds `share` to it.
    """
    if a.shape[0] <= a.shape[1]:
        values, left = np.linalg.eigh(a @ a.T)
    else:
        values, right = np.linalg.eigh(a.T @ a)
    values = np.maximum(values, 0.0)
    total = float(values.sum())
    if total <= 0:
        raise ValueError("Ridge.fit: image_features are all the same row")
    kept = values > 1e-13 * values[-1]
    values = values[kept]
    if a.shape[0] <= a.shape[1]:
        left = left[:, kept]
        right = (a.T @ left) / np.sqrt(values)
    else:
        right = right[:, kept]
        left = (a @ right) / np.sqrt(values)
    projected = left.T @ b

    candidates = _AUTO * total if alpha == "auto" else np.array([alpha], dtype=np.float64)
    errors = []
    for candidate in candidates:
        shrink = values / (values + candidate)
        residual = b - left @ (shrink[:, None] * projected)
        hat = (left * left) @ shrink + share
        # An image that alone decides a direction has h = 1 and says nothing about the error there.
        rest = np.maximum(1.0 - hat, 1e-10)
        errors.append(float(((residual / rest[:, None]) ** 2).sum()))
    best = int(np.argmin(errors))
    shrink = np.sqrt(values) / (values + candidates[best])
    return float(candidates[best]), right @ (shrink[:, None] * projected), errors[best]
