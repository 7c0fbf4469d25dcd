"""`Voice`: the sound track through an LSTM that was trained to tell speakers."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._optional import require
from ..audio import mel_power
from ..encoders.base import Features
from ..encoders.fingerprint import digest_of
from ..encoders.store import Steps
from ..video import Clip
from .sequences import Sequences

_RATE = 16000
_BINS, _WINDOW, _HOP = 40, 400, 160  # samples: 25 and 10 ms
_LAYERS, _UNITS = 3, 256
_LEVEL = 10 ** (-30 / 20)  # root mean square that the network was trained at


class Voice:
    """States of a pretrained LSTM speaker encoder: who speaks, and on the way there what is said.

    The network of Wan et al. 2018 ("Generalized End-to-End Loss for Speaker Verification", arXiv:1710.10467), with the
    weights of the package resemblyzer: 40 mel bands every 10 ms, three layers of 256 units. States of the second layer
    hold the sounds of speech with little of the speaker, those of the third the speaker. Silent windows are read by the
    network and left out. A clip without a sound track, or with an empty one, is marked as not present.

    Args:
        layer: whose states are the steps, 1 to 3.
        stride: every how many windows a state is kept; 2 is every 20 ms.
        silence: decades of power below the loudest window that are silence.
        weights: file of the weights; None is that of the package, which need not be importable
            (`pip install --no-deps resemblyzer`).
        name: what to call the stream.

    Raises:
        ImportError: the package is not there, or torch.
        ValueError: bad settings, or a file of other weights.
    """

    needs_sound = True
    dim = _UNITS

    def __init__(
        self,
        layer: int = 2,
        *,
        stride: int = 2,
        silence: float = 2.4,
        weights: str | os.PathLike[str] | None = None,
        name: str = "voice",
    ) -> None:
        for what, value, most in (("layer", layer, _LAYERS), ("stride", stride, None)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most and value > most):
                raise ValueError(f"Voice: {what} must be an int from 1{f' to {most}' if most else ''}, got {value!r}")
        if not silence > 0:
            raise ValueError(f"Voice: silence must be positive, got {silence}")
        require("transformers.audio_utils", "video", "Voice")
        require("torch", "torch", "Voice")
        self.layer, self.stride, self.silence = layer, stride, silence
        self.name = name
        path = _package_weights() if weights is None else Path(weights)
        self._network = _network(path, layer)
        self._weights_digest = hashlib.sha256(path.read_bytes()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over the settings and the weights."""
        return digest_of(type(self), self.layer, self.stride, self.silence, self._weights_digest, mel_power)

    def extract(self, clips: Sequence[Clip], *, batch_size: int = 32) -> Sequences:
        """One step for every `stride` windows that are not silent; sounds of another rate are resampled."""
        parts: list[Steps] = []
        for begin in range(0, len(clips), batch_size):
            parts += self._encode(clips[begin : begin + batch_size])
        return Sequences.of(parts, self.dim)

    def _encode(self, clips: Sequence[Clip]) -> list[Steps]:
        import torch

        heard = [_windows(clip) for clip in clips]
        lengths = [len(power) for power, _ in heard]
        with torch.inference_mode():
            states = self._network(torch.from_numpy(np.concatenate([power for power, _ in heard])), lengths).numpy()
        steps = []
        for (power, times), own in zip(heard, np.split(states, np.cumsum(lengths)[:-1]), strict=True):
            loudness = np.log10(power.sum(axis=1) + 1e-20)
            kept = np.flatnonzero(loudness > loudness.max(initial=-20.0) - self.silence)[:: self.stride]
            steps.append(Steps(own[kept], times[kept]))
        return steps

    def __repr__(self) -> str:
        return f"Voice(layer={self.layer}, stride={self.stride}, silence={self.silence}, name={self.name!r})"


def _windows(clip: Clip) -> tuple[Features, Any]:
    if clip.sound is None or not len(clip.sound):
        return np.empty((0, _BINS), np.float32), np.empty(0)
    sound = np.asarray(clip.sound, dtype=np.float64)
    if clip.sample_rate != _RATE:
        resample = require("scipy.signal", "video", "Voice").resample_poly
        common = int(np.gcd(clip.sample_rate, _RATE))
        sound = resample(sound, _RATE // common, clip.sample_rate // common)
    level = float(np.sqrt(np.mean(sound**2)))
    sound = sound * (_LEVEL / level) if level > 0 else sound
    power, times = mel_power(sound, _RATE, _BINS, _WINDOW, _HOP, _WINDOW, (0.0, _RATE / 2))
    return power.astype(np.float32), times


def _package_weights() -> Path:
    # Looked for, not imported: importing it takes packages that read files and detect speech.
    package = importlib.util.find_spec("resemblyzer")
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "Voice: its weights come with the package resemblyzer: pip install --no-deps resemblyzer, or weights="
        )
    return Path(package.submodule_search_locations[0]) / "pretrained.pt"


def _network(path: Path, layers: int) -> Any:
    import torch

    from ..nn import TemporalPool

    network = TemporalPool(_BINS, _UNITS, "lstm", "none", num_layers=layers)
    try:
        known = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
        network.load_state_dict({name: known[f"lstm.{name}"] for name in network.state_dict()})
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"Voice: {path} does not hold the weights of a speaker encoder: {error}") from error
    return network.eval().requires_grad_(False)
