"""Sound: the track of a file as samples, and its log-mel spectrogram."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ._decode import DecodeError, Sound, decode_sound
from ._optional import require
from .video import MAX_BYTES, ClipReadError, clip_name

if TYPE_CHECKING:
    from .encoders.base import Features

__all__ = ["log_mel", "read_sound"]

_FLOOR = 1e-10  # of a band's power, before the logarithm
_RANGE = 8.0  # decades below a clip's loudest band that are told apart


def read_sound(
    source: str | os.PathLike[str] | bytes, *, sample_rate: int = 16000, max_bytes: int = MAX_BYTES
) -> Sound | None:
    """The first sound track of a sound or video file as mono float32 [S] in [-1, 1]; None where there is none.

    Args:
        source: a path or a file's bytes, in any format of libav.
        sample_rate: to which it is resampled, in Hz.
        max_bytes: limit of the result.

    Raises:
        ClipReadError: missing, empty, damaged, of an unknown format, or too long.
        ValueError: wrong arguments.
        ImportError: PyAV is missing; names the extra.
    """
    if sample_rate < 1:
        raise ValueError(f"read_sound: sample_rate must be positive, got {sample_rate}")
    data = source if isinstance(source, bytes) else str(os.fspath(source))
    try:
        return decode_sound(data, sample_rate, max_bytes)
    except DecodeError as error:
        raise ClipReadError(clip_name(source), str(error)) from error


def log_mel(
    sound: npt.NDArray[np.floating[Any]],
    *,
    sample_rate: int = 16000,
    bins: int = 64,
    window: float = 0.025,
    hop: float = 0.010,
    band: tuple[float, float] | None = None,
    warp: float = 1.0,
) -> tuple[Features, npt.NDArray[np.float64]]:
    """Log-mel spectrogram, and the times of its steps.

    Power of Hann windows in Slaney's mel bands (filters of `transformers.audio_utils`), as log10, cut off eight
    decades below the clip's loudest band, and brought near [-1, 1] by (x + 4) / 4: the scaling of Whisper (Radford et
    al. 2022).

    Args:
        sound: [S], mono in [-1, 1].
        sample_rate: in Hz.
        bins: mel bands.
        window, hop: seconds.
        band: (lowest, highest) frequency of the bands in Hz; None is 0 to half the sample rate.
        warp: frequencies are multiplied by this before the bands: above 1 as of a shorter vocal tract. Training sounds
            of several warps make a model care less whose voice it is (Jaitly and Hinton 2013).

    Returns:
        float32 [T, bins] and float64 [T], the middles of the windows in seconds. T = 1 + max(0, S - window) // hop:
        windows lie inside the sound; one that is shorter than a window is filled up with zeros.

    Cost: O(T n log n), n samples a window.
    """
    rate = float(sample_rate)
    n, step = round(window * rate), round(hop * rate)
    if n < 2 or step < 1:
        raise ValueError(f"log_mel: window and hop must be at least 2 and 1 samples, got {window} and {hop} s")
    if not warp > 0:
        raise ValueError(f"log_mel: warp must be positive, got {warp}")
    low, high = (0.0, rate * warp / 2) if band is None else band
    if not 0 <= low < high <= rate * warp / 2:
        raise ValueError(f"log_mel: band must rise within [0, {rate * warp / 2:g}] Hz, got {band}")
    samples = np.asarray(sound, dtype=np.float64)
    if samples.ndim != 1:
        raise ValueError(f"log_mel: sound must be [S], got {list(samples.shape)}")
    if len(samples) < n:
        samples = np.pad(samples, (0, n - len(samples)))
    size = 1 << (n - 1).bit_length()
    parts = np.lib.stride_tricks.sliding_window_view(samples, n)[::step]
    # The periodic Hann window: its shifts add up to a constant.
    spectrum = np.fft.rfft(parts * np.hanning(n + 1)[:-1], size, axis=1)
    power = (spectrum.real**2 + spectrum.imag**2) @ _filters(size // 2 + 1, bins, low, high, rate * warp)
    levels = np.log10(np.maximum(power, _FLOOR))
    levels = np.maximum(levels, levels.max() - _RANGE)
    times = (np.arange(len(parts), dtype=np.float64) * step + n / 2) / rate
    return np.asarray((levels + 4) / 4, dtype=np.float32), np.asarray(times)


@lru_cache(maxsize=32)
def _filters(frequencies: int, bins: int, low: float, high: float, rate: float) -> npt.NDArray[np.float64]:
    audio = require("transformers.audio_utils", "video", "log_mel")
    filters: npt.NDArray[np.float64] = audio.mel_filter_bank(
        frequencies, bins, low, high, rate, norm="slaney", mel_scale="slaney"
    )
    return filters
