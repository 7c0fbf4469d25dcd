"""What `ImageTextMatcher` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..evaluate import RetrievalMetrics
from ..functional import Matches, Metric


class ImageTextMetrics(NamedTuple):
    """What `ImageTextMatcher.evaluate` returns: images as queries, and texts as queries."""

    image_to_text: RetrievalMetrics
    text_to_image: RetrievalMetrics


@dataclass(frozen=True)
class ImageTextMatches:
    """What `ImageTextMatcher.match` returns.

    Attributes:
        image_to_text: for each image the best texts: scores float32 and indices int64, [N, k], into `texts`.
        text_to_image: for each text the best images, [M, k], into `images`.
        images: the names of the N images that could be read: their paths, or "items[i]".
        texts: the M texts.
        metric: of the scores; for "euclidean" and "sqeuclidean" they are distances, smallest first.
        kept: int64 [N], which of the given images `images` are.
        errors: (name, reason) of each image left out; empty unless on_error="skip".
        seconds: what took how long: "encode images", "encode texts", "score".
    """

    image_to_text: Matches
    text_to_image: Matches
    images: list[str]
    texts: list[str]
    metric: Metric
    kept: npt.NDArray[np.int64]
    errors: list[tuple[str, str]] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=dict)
