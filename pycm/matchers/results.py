"""What the matchers return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

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


class VideoTextMetrics(NamedTuple):
    """What `VideoTextMatcher.evaluate` returns: clips as queries, and texts as queries."""

    video_to_text: RetrievalMetrics
    text_to_video: RetrievalMetrics


@dataclass(frozen=True)
class VideoTextMatches:
    """What `VideoTextMatcher.match` returns.

    Attributes:
        video_to_text: for each clip the best texts: scores float32 and indices int64, [N, k], into `texts`.
        text_to_video: for each text the best clips, [M, k], into `clips`.
        clips: the names of the N clips that could be read.
        texts: the M texts.
        metric: of the scores; for "euclidean" and "sqeuclidean" they are distances, smallest first. "logit" with
            head="pairs": the classifier's log-odds, largest first.
        kept: int64 [N], which of the given clips `clips` are.
        errors: (name, reason) of each clip left out; empty unless on_error="skip".
        seconds: what took how long: "decode", "encode" of the clips, "encode texts", "score" (networks included).
    """

    video_to_text: Matches
    text_to_video: Matches
    clips: list[str]
    texts: list[str]
    metric: Metric | Literal["logit"]
    kept: npt.NDArray[np.int64]
    errors: list[tuple[str, str]] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=dict)


class ImageVideoMetrics(NamedTuple):
    """What `ImageVideoMatcher.evaluate` returns: images as queries, and clips as queries."""

    image_to_video: RetrievalMetrics
    video_to_image: RetrievalMetrics


@dataclass(frozen=True)
class ImageVideoMatches:
    """What `ImageVideoMatcher.match` returns.

    Attributes:
        image_to_video: for each image the best clips: scores float32 and indices int64, [N, k], into `clips`.
        video_to_image: for each clip the best images, [M, k], into `images`.
        images, clips: the names of those that could be read.
        metric, seconds: as in `VideoTextMatches`.
        kept_images, kept_clips: int64, which of the given items they are.
        errors: (name, reason) of each item left out; empty unless on_error="skip".
    """

    image_to_video: Matches
    video_to_image: Matches
    images: list[str]
    clips: list[str]
    metric: Metric | Literal["logit"]
    kept_images: npt.NDArray[np.int64]
    kept_clips: npt.NDArray[np.int64]
    errors: list[tuple[str, str]] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=dict)
