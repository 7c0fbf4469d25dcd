"""Pairs that nobody labelled, for a space that was fitted to pairs that somebody did."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..encoders.base import Features
from ..functional import DISTANCES, Metric
from ..mining import Pairs, mutual_neighbours
from ..spaces import Space


def fit_pseudo_pairs(
    space: Space,
    labelled: tuple[Features, Features],
    pairs: npt.NDArray[np.int64],
    unlabelled: tuple[Features, Features],
    threshold: float,
    metric: Metric,
) -> Pairs:
    """Fit a fitted `space` again, to its pairs and to those it finds itself: mutual nearest neighbours among the
    unlabelled images and texts that score `threshold` or better (are as near, for a distance).

    Self-training, with one round. Returns the pairs found, rows of the unlabelled images and texts.
    """
    rows = space.transform_images(unlabelled[0]), space.transform_texts(unlabelled[1])
    limit: dict[str, Any] = {"max_distance" if metric in DISTANCES else "min_score": threshold}
    found = mutual_neighbours(*rows, metric=metric, **limit)
    if len(found.indices):
        more = np.stack([found.query_rows + len(labelled[0]), found.indices + len(labelled[1])], 1)
        images, texts = (np.concatenate(sides) for sides in zip(labelled, unlabelled, strict=True))
        space.fit(images, texts, np.concatenate([pairs, more]))
    return found
