"""Colour histograms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._optional import require
from .base import Features, Modality, check_batch_size, check_items, progress_bar
from .fingerprint import digest_of
from .images import UnreadableInputError, load_images


class ColorHistogram:
    """How much of an image has which colour: a joint histogram of hue, saturation and value.

    Networks trained for classes look past colour; names of things often do not. The image is shrunk to
    `size` x `size` pixels, distorted if need be, and each pixel falls into one of bins[0] * bins[1] * bins[2]
    cells of equal width (Swain and Ballard 1991, in HSV). Rows hold the square roots of the cells' shares:
    they have unit length, and their dot product is the Bhattacharyya coefficient of two histograms.

    Args:
        bins: of hue, saturation and value.
        size: pixels a side.
    """

    modality: Modality = "image"

    def __init__(self, bins: tuple[int, int, int] = (12, 3, 3), *, size: int = 48) -> None:
        require("PIL.Image", "image", "ColorHistogram")
        if len(bins) != 3 or not all(isinstance(b, int) and 1 <= b <= 256 for b in bins):
            raise ValueError(f"ColorHistogram: bins must be three ints in [1, 256], got {bins!r}")
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"ColorHistogram: size must be a positive int, got {size!r}")
        self.bins = (bins[0], bins[1], bins[2])
        self.size = size
        self.name = "color-histogram"

    @property
    def dim(self) -> int:
        """Features per row: the number of cells."""
        return self.bins[0] * self.bins[1] * self.bins[2]

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over the settings."""
        return digest_of(type(self), self.bins, self.size)

    def encode(self, items: Sequence[Any], *, batch_size: int = 32, progress: bool | None = None) -> Features:
        """Encode images to float32 [N, dim]; see `Encoder.encode`."""
        function = "ColorHistogram.encode"
        check_batch_size(function, batch_size)
        check_items(function, items)
        out = np.zeros((len(items), self.dim), dtype=np.float32)
        errors: list[tuple[str, str]] = []
        for start in progress_bar(range(0, len(items), batch_size), progress=progress, desc=self.name):
            images, kept, failed = load_images(function, items[start : start + batch_size], first=start)
            errors += failed
            for row, image in zip(kept, images, strict=True):
                out[row] = self._histogram(image)
        if errors:
            raise UnreadableInputError(errors, len(items))
        return out

    def _histogram(self, image: Any) -> Features:
        from PIL import Image

        small = image.resize((self.size, self.size), Image.Resampling.BICUBIC).convert("HSV")
        hsv = np.asarray(small, dtype=np.int64).reshape(-1, 3)
        h, s, v = (hsv[:, channel] * bins // 256 for channel, bins in enumerate(self.bins))
        cells = (h * self.bins[1] + s) * self.bins[2] + v
        return np.sqrt(np.bincount(cells, minlength=self.dim) / len(cells)).astype(np.float32)

    def __repr__(self) -> str:
        return f"ColorHistogram(bins={self.bins}, size={self.size})"
