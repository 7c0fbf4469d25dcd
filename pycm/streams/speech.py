"""`Speech`: what is said, whoever says it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .._optional import require
from ..audio import log_mel
from ..encoders.base import Features
from ..encoders.fingerprint import digest_of
from ..encoders.store import Steps
from ..video import Clip
from .sequences import Sequences


class Speech:
    """Mel-frequency cepstra of the sound track and their slopes, freed of the voice and the microphone.

    Of each window's log-mel bands the first cosine coefficients are kept (Davis and Mermelstein 1980), brought to mean
    0 and deviation 1 over the clip (Viikki and Laurila 1998), and their slopes in time joined to them. Silent windows
    are left out. A clip without a sound track, or with an empty one, is marked as not present.

    Args:
        cepstra: coefficients.
        bins: mel bands that they are made of.
        window, hop: seconds.
        band, warp: frequencies of the bands in Hz, and what frequencies are multiplied by first; see `log_mel`. Clips
            encoded with several warps and joined (`ClipFeatures.joined`) are other voices to learn from.
        silence: levels this far below the loudest are silence, as `pycm.audio.log_mel` scales them (0.25 is 10 dB).
        name: what to call the stream.
    """

    needs_sound = True

    def __init__(
        self,
        cepstra: int = 13,
        *,
        bins: int = 40,
        window: float = 0.025,
        hop: float = 0.010,
        band: tuple[float, float] | None = None,
        warp: float = 1.0,
        silence: float = 0.5,
        name: str = "speech",
    ) -> None:
        require("scipy.fft", "video", "Speech")
        if isinstance(cepstra, bool) or not isinstance(cepstra, int) or not 1 <= cepstra <= bins:
            raise ValueError(f"Speech: cepstra must be an int in [1, {bins}], got {cepstra!r}")
        if not 0 < hop <= window:
            raise ValueError(f"Speech: hop must be in (0, window], got hop {hop} and window {window}")
        if not silence > 0:
            raise ValueError(f"Speech: silence must be positive, got {silence}")
        self.cepstra, self.bins, self.window, self.hop, self.silence = cepstra, bins, window, hop, silence
        self.band, self.warp = band, warp
        self.name = name

    @property
    def dim(self) -> int:
        """Features of a step: the coefficients and their slopes."""
        return 2 * self.cepstra

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over the settings."""
        settings = self.cepstra, self.bins, self.window, self.hop, self.band, self.warp, self.silence
        return digest_of(type(self), *settings, log_mel)

    def extract(self, clips: Sequence[Clip], *, batch_size: int = 32) -> Sequences:
        """One step for each window that is not silent."""
        return Sequences.of([self._steps(clip) for clip in clips], self.dim)

    def _steps(self, clip: Clip) -> Steps:
        if clip.sound is None or not len(clip.sound):
            return Steps(np.empty((0, self.dim), np.float32), np.empty(0))
        levels, times = log_mel(
            clip.sound, sample_rate=clip.sample_rate, bins=self.bins, window=self.window, hop=self.hop, band=self.band,
            warp=self.warp,
        )  # fmt: skip
        loudest = levels.max(axis=1)
        heard = loudest > loudest.max() - self.silence
        return Steps(self._cepstra(levels, heard), times[heard])

    def _cepstra(self, levels: Features, heard: npt.NDArray[np.bool_]) -> Features:
        from scipy.fft import dct

        cepstra = dct(levels.astype(np.float64), axis=1, norm="ortho")[:, : self.cepstra]
        cepstra = (cepstra - cepstra[heard].mean(axis=0)) / (cepstra[heard].std(axis=0) + 0.02)
        slopes = np.gradient(cepstra, axis=0) if len(cepstra) > 1 else np.zeros_like(cepstra)
        return np.concatenate([cepstra, slopes], axis=1)[heard].astype(np.float32)

    def __repr__(self) -> str:
        settings = f"cepstra={self.cepstra}, bins={self.bins}, hop={self.hop}, band={self.band}, warp={self.warp}"
        return f"Speech({settings}, name={self.name!r})"
