"""Matchers: encoders, a common space and exact scores, from raw items to ranked matches."""

from .image_text import ImageTextMatcher
from .results import ImageTextMatches, ImageTextMetrics

__all__ = ["ImageTextMatcher", "ImageTextMatches", "ImageTextMetrics"]
