"""Row normalisations and checks of feature matrices, shared by spaces and encoders. NumPy only."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Float64: TypeAlias = npt.NDArray[np.float64]
RowNorm: TypeAlias = Literal["none", "l2", "power"]
ROW_NORMS = ("none", "l2", "power")


def as_numpy(x: Any) -> npt.NDArray[Any]:
    """`x` as a NumPy array; torch tensors of any device, with or without a gradient, are copied."""
    if hasattr(x, "detach"):  # np.asarray takes neither a gradient, nor a GPU's memory, nor bfloat16
        x = x.detach().cpu()
        x = (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()
    return np.asarray(x)


def normalize_rows(x: npt.NDArray[Any], how: RowNorm) -> Float64:
    """Normalise each row of x [N, D] on its own; returns float64.

    "l2" divides by the Euclidean norm. "power" first takes signed square roots, which keeps a few large
    activations from deciding every distance (Perronnin et al. 2010; on histograms it is the Hellinger
    map). "none" only converts. A zero row stays zero.
    """
    out = np.asarray(x, dtype=np.float64)
    if how == "none":
        return out
    if how == "power":
        out = np.sign(out) * np.sqrt(np.abs(out))
    peak = np.abs(out).max(axis=1, keepdims=True, initial=0.0)
    out = out / np.where(peak > 0, peak, 1.0)  # so that squares neither overflow nor vanish
    norms = np.linalg.norm(out, axis=1, keepdims=True)
    return np.asarray(out / np.where(norms > 0, norms, 1.0), dtype=np.float64)


def check_row_norm(function: str, argument: str, how: str) -> None:
    """Raise ValueError for an unknown normalisation."""
    if how not in ROW_NORMS:
        raise ValueError(f"{function}: {argument} must be one of {', '.join(ROW_NORMS)}, got {how!r}")


def check_features(function: str, argument: str, x: Any, dim: int | None = None) -> npt.NDArray[Any]:
    """`x` as a floating-point matrix [N, D] of finite numbers.

    Raises:
        TypeError: not of a floating-point type.
        ValueError: not two-dimensional, another width than `dim`, or a NaN or infinity (the row is named).
    """
    array = as_numpy(x)
    if array.dtype.kind != "f":
        raise TypeError(f"{function}: {argument} must be floating point, got {array.dtype}")
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{function}: {argument} must have shape [N, D], D >= 1, got {list(array.shape)}")
    if dim is not None and array.shape[1] != dim:
        raise ValueError(f"{function}: {argument} must have {dim} columns, got {array.shape[1]}")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        value = "a NaN" if np.isnan(array[row]).any() else "an infinity"
        raise ValueError(f"{function}: {argument} row {row} has {value}")
    return array
