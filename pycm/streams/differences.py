"""Differences between one frame and the next: of pixels, and of features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .._optional import require
from ..encoders import Encoder
from ..encoders.base import Features
from ..encoders.fingerprint import digest_of
from ..encoders.store import Steps
from ..video import Clip
from .appearance import Appearance
from .sequences import Sequences


class FeatureDifferences:
    """What changes in the features of an image encoder from frame to frame; the first step is zero.

    Args:
        encoder: any image `Encoder`.
        name: what to call the stream.

    Attributes:
        source: the `Appearance` whose steps are subtracted.
    """

    needs_sound = False

    def __init__(self, encoder: Encoder, *, name: str = "differences") -> None:
        self.source = Appearance(encoder)
        self.name = name

    @property
    def dim(self) -> int:
        """Features of a step: the encoder's."""
        return self.source.dim

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over this class and the encoder."""
        return digest_of(type(self), self.source.fingerprint)

    def derive(self, sequences: Sequences) -> Sequences:
        """The differences of `sequences`, at the same times."""
        values = np.diff(sequences.values, axis=0, prepend=sequences.values[:1])
        values[sequences.cu_seqlens[:-1]] = 0
        return Sequences(values, sequences.cu_seqlens, sequences.times, sequences.present)

    def extract(self, clips: Sequence[Clip], *, batch_size: int = 32) -> Sequences:
        """One step a frame."""
        return self.derive(self.source.extract(clips, batch_size=batch_size))

    def __repr__(self) -> str:
        return f"FeatureDifferences({self.source.encoder!r}, name={self.name!r})"


class PixelDifferences:
    """What changes in the picture from frame to frame: grey levels of a coarse grid, signed; the first step is zero.

    Args:
        grid: cells a side. Each holds the mean difference within it, of grey levels in [0, 1].
        name: what to call the stream.
    """

    needs_sound = False

    def __init__(self, grid: int = 16, *, name: str = "pixel-differences") -> None:
        require("cv2", "video", "PixelDifferences")
        if isinstance(grid, bool) or not isinstance(grid, int) or grid < 1:
            raise ValueError(f"PixelDifferences: grid must be a positive int, got {grid!r}")
        self.grid = grid
        self.name = name

    @property
    def dim(self) -> int:
        """Features of a step: the cells."""
        return self.grid**2

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over the settings."""
        return digest_of(type(self), self.grid)

    def extract(self, clips: Sequence[Clip], *, batch_size: int = 32) -> Sequences:
        """One step a frame."""
        return Sequences.of([self._steps(clip) for clip in clips], self.dim)

    def _steps(self, clip: Clip) -> Steps:
        cells = np.stack([gray(frame, self.grid, self.grid) for frame in clip.frames]).reshape(len(clip.frames), -1)
        return Steps(np.diff(cells, axis=0, prepend=cells[:1]), clip.times)

    def __repr__(self) -> str:
        return f"PixelDifferences(grid={self.grid}, name={self.name!r})"


def gray(frame: npt.NDArray[np.uint8], height: int, width: int) -> Features:
    """Grey levels in [0, 1], float32 [height, width]: means over areas where the frame is larger."""
    import cv2

    image = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    small: Any = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.float32)
