"""Matchers: encoders, a common space and exact scores, from raw items to ranked matches.

`base` shows the shape that all systems share. Those that train a network need torch, and are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .base import Head, Matcher, load
from .image_text import ImageTextMatcher
from .results import (
    ImageTextMatches,
    ImageTextMetrics,
    ImageVideoMatches,
    ImageVideoMetrics,
    VideoTextMatches,
    VideoTextMetrics,
)

if TYPE_CHECKING:
    from .image_video import ImageVideoMatcher
    from .mean_frame import MeanFrameMatcher
    from .region_classifier import RegionTextClassifier
    from .region_text import RegionTextMatcher
    from .regions import Boxes
    from .training import Training
    from .video_text import VideoTextMatcher

__all__ = [
    "Boxes",
    "Head",
    "ImageTextMatcher",
    "ImageTextMatches",
    "ImageTextMetrics",
    "ImageVideoMatcher",
    "ImageVideoMatches",
    "ImageVideoMetrics",
    "Matcher",
    "MeanFrameMatcher",
    "RegionTextClassifier",
    "RegionTextMatcher",
    "Training",
    "VideoTextMatcher",
    "VideoTextMatches",
    "VideoTextMetrics",
    "load",
]

_TRAINED = {
    "Boxes": "regions",
    "ImageVideoMatcher": "image_video",
    "MeanFrameMatcher": "mean_frame",
    "RegionTextClassifier": "region_classifier",
    "RegionTextMatcher": "region_text",
    "Training": "training",
    "VideoTextMatcher": "video_text",
}


def __getattr__(name: str) -> Any:
    if name in _TRAINED:
        return getattr(importlib.import_module(f"pycm.matchers.{_TRAINED[name]}"), name)
    raise AttributeError(f"module 'pycm.matchers' has no attribute {name!r}")
