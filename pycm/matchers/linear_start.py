"""The linear start: a closed-form ridge map to which a network adds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._rows import normalize_rows
from ..functional import Metric
from ..spaces import Ridge

Float64 = npt.NDArray[np.float64]
_FOLDS = 10


def fit_start(
    space: Ridge, first: Float64, second: Float64, pairs: npt.NDArray[np.int64], seed: int
) -> npt.NDArray[np.float32]:
    """Fit `space` to pairs [P, 2] of rows, and return what it says of each first row [N] that it was *not* fitted to.

    A network that learns what the map misses has to see the errors which the map makes on new items. Those on its own
    training items are far smaller, and would leave next to nothing to learn (stacking; Wolpert 1992). Hence ten folds,
    and for each the map fitted to the other nine.

    Raises ValueError as `Ridge.fit`. Cost: eleven fits.
    """
    space.fit(first, second, pairs)
    fold_of = np.random.default_rng(seed).permutation(len(first)) % _FOLDS
    out = np.empty((len(first), second.shape[1]), np.float32)
    for fold in range(_FOLDS):
        held = fold_of == fold
        if not held.any():
            continue
        part = Ridge(**space.get_params()).fit(first, second, pairs[~held[pairs[:, 0]]])
        out[held] = part.moved_to(space, part.transform_images(first[held]))
    return out


def start_rows(rows: Any, metric: Metric) -> npt.NDArray[np.float32]:
    """At unit length where lengths do not count, so that what the network adds is of one measure for all rows."""
    return (
        normalize_rows(rows, "l2").astype(np.float32)
        if metric not in ("dot", "pearson")
        else np.asarray(rows, np.float32)
    )
