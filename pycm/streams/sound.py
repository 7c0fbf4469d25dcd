"""`Sound`: what is heard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..audio import log_mel
from ..encoders.fingerprint import digest_of
from ..encoders.store import Steps
from ..video import Clip
from .sequences import Sequences


class Sound:
    """The log-mel spectrogram of the sound track, one step a `hop`; see `pycm.audio.log_mel`.

    A clip without a sound track, or with an empty one, is marked as not present.

    Args:
        bins: mel bands.
        window, hop: seconds.
        name: what to call the stream.
    """

    needs_sound = True

    def __init__(self, bins: int = 64, *, window: float = 0.04, hop: float = 0.02, name: str = "sound") -> None:
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
            raise ValueError(f"Sound: bins must be a positive int, got {bins!r}")
        if not 0 < hop <= window:
            raise ValueError(f"Sound: hop must be in (0, window], got hop {hop} and window {window}")
        self.bins, self.window, self.hop = bins, window, hop
        self.name = name

    @property
    def dim(self) -> int:
        """Features of a step: the bands."""
        return self.bins

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over the settings."""
        return digest_of(type(self), self.bins, self.window, self.hop, log_mel)

    def extract(self, clips: Sequence[Clip], *, batch_size: int = 32) -> Sequences:
        """One step for each window."""
        return Sequences.of([self._steps(clip) for clip in clips], self.dim)

    def _steps(self, clip: Clip) -> Steps:
        if clip.sound is None or not len(clip.sound):
            return Steps(np.empty((0, self.bins), np.float32), np.empty(0))
        return Steps(
            *log_mel(clip.sound, sample_rate=clip.sample_rate, bins=self.bins, window=self.window, hop=self.hop)
        )

    def __repr__(self) -> str:
        return f"Sound(bins={self.bins}, window={self.window}, hop={self.hop}, name={self.name!r})"
