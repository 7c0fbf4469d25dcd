"""`Appearance`: what each frame looks like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..encoders import Encoder
from ..encoders.fingerprint import digest_of
from ..encoders.store import Steps
from ..video import Clip
from .sequences import Sequences


class Appearance:
    """The features of an image encoder, frame by frame.

    Args:
        encoder: any image `Encoder`.
        name: what to call the stream.

    Raises:
        ValueError: an encoder of texts.
    """

    needs_sound = False

    def __init__(self, encoder: Encoder, *, name: str = "appearance") -> None:
        if encoder.modality != "image":
            raise ValueError(
                f"Appearance: encoder must encode images, but {encoder.name!r} encodes {encoder.modality}s"
            )
        self.encoder = encoder
        self.name = name

    @property
    def dim(self) -> int:
        """Features of a frame: the encoder's."""
        return self.encoder.dim

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over this class and the encoder."""
        return digest_of(type(self), self.encoder.fingerprint)

    def extract(self, clips: Sequence[Clip], *, batch_size: int = 32) -> Sequences:
        """One step a frame; batches are filled across clips."""
        frames = [frame for clip in clips for frame in clip.frames]
        rows = self.encoder.encode(frames, batch_size=batch_size, progress=False)
        cuts = np.cumsum([len(clip.frames) for clip in clips])[:-1]
        parts = np.split(np.asarray(rows, dtype=np.float32), cuts) if clips else []
        return Sequences.of(
            [Steps(part, clip.times) for part, clip in zip(parts, clips, strict=True)], self.encoder.dim
        )

    def __repr__(self) -> str:
        return f"Appearance({self.encoder!r}, name={self.name!r})"
