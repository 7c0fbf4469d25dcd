"""Embeddings prepared once and searched many times, in memory or in a file."""

from .gallery import Gallery, Mode
from .search import GalleryMatches

__all__ = ["Gallery", "GalleryMatches", "Mode"]
