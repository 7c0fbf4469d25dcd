"""Matchers: encoders, a common space and exact scores, from raw items to ranked matches."""

from .image_text import ImageTextMatcher, ImageTextMatches, ImageTextMetrics

__all__ = ["ImageTextMatcher", "ImageTextMatches", "ImageTextMetrics"]
