"""`Voice`: the sound track through an LSTM that was trained to tell speakers."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

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
_QUIET = 25  # windows of silence that the network reads before an utterance
_NOTHING: Features = np.empty((0, _UNITS), np.float32)


class Voice:
    """States of a pretrained LSTM speaker encoder: who speaks, and on the way there what is said.

    The network of Wan et al. 2018 ("Generalized End-to-End Loss for Speaker Verification", arXiv:1710.10467), with the
    weights of the package resemblyzer: 40 mel bands every 10 ms, three layers of 256 units. States of the second layer
    hold the sounds of speech with little of the speaker, those of the third the speaker.

    Utterances are what pauses part. Each is brought to one level and read anew, after a quarter of a second of silence,
    so that its states do not depend on what was said before. Silent windows within an utterance are read by the network
    and left out. A clip without a sound track, or with an empty one, is marked as not present.

    Args:
        layer: whose states are the steps, 1 to 3.
        stride: every how many of an utterance's windows a state is kept; 2 is every 20 ms.
        silence: decades of power below the loudest window of the clip that are silence.
        pause: seconds of silence above which it is a pause; inf reads each clip as one utterance.
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
        silence: float = 3.0,
        pause: float = 0.15,
        weights: str | os.PathLike[str] | None = None,
        name: str = "voice",
    ) -> None:
        for what, value, most in (("layer", layer, _LAYERS), ("stride", stride, None)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most and value > most):
                raise ValueError(f"Voice: {what} must be an int from 1{f' to {most}' if most else ''}, got {value!r}")
        for what, limit in (("silence", silence), ("pause", pause)):
            if not limit > 0:
                raise ValueError(f"Voice: {what} must be positive, got {limit}")
        require("transformers.audio_utils", "video", "Voice")
        require("torch", "torch", "Voice")
        self.layer, self.stride, self.silence, self.pause = layer, stride, silence, pause
        self.name = name
        path = _package_weights() if weights is None else Path(weights)
        self._network = _network(path, layer)
        self._weights_digest = hashlib.sha256(path.read_bytes()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over the settings and the weights."""
        settings = self.layer, self.stride, self.silence, self.pause
        return digest_of(type(self), *settings, self._weights_digest, mel_power)

    def extract(self, clips: Sequence[Clip], *, batch_size: int = 32) -> Sequences:
        """One step for every `stride` windows that are not silent; sounds of another rate are resampled."""
        parts: list[Steps] = []
        for begin in range(0, len(clips), batch_size):
            parts += self._encode(clips[begin : begin + batch_size])
        return Sequences.of(parts, self.dim)

    def _encode(self, clips: Sequence[Clip]) -> list[Steps]:
        import torch

        heard = [self._utterances(clip) for clip in clips]
        power = [utterance.power for utterances in heard for utterance in utterances]
        if not power:
            return [Steps(_NOTHING, np.empty(0)) for _ in clips]
        lengths = [len(windows) for windows in power]
        with torch.inference_mode():
            states = self._network(torch.from_numpy(np.concatenate(power)), lengths).numpy()
        own = iter(np.split(states, np.cumsum(lengths)[:-1]))
        steps = []
        for utterances in heard:
            values = [next(own)[utterance.kept] for utterance in utterances]
            times = [utterance.times for utterance in utterances]
            steps.append(Steps(np.concatenate([_NOTHING, *values]), np.concatenate([np.empty(0), *times])))
        return steps

    def _utterances(self, clip: Clip) -> list[_Utterance]:
        if clip.sound is None or not len(clip.sound):
            return []
        sound = np.asarray(clip.sound, dtype=np.float64)
        if clip.sample_rate != _RATE:
            resample = require("scipy.signal", "video", "Voice").resample_poly
            common = int(np.gcd(clip.sample_rate, _RATE))
            sound = resample(sound, _RATE // common, clip.sample_rate // common)
        power, times = mel_power(sound, _RATE, _BINS, _WINDOW, _HOP, _WINDOW, (0.0, _RATE / 2))
        loudness = np.log10(power.sum(axis=1) + 1e-20)
        heard = np.flatnonzero(loudness > loudness.max() - self.silence)
        found = []
        for own in np.split(heard, np.flatnonzero(np.diff(heard) * _HOP > self.pause * _RATE) + 1):
            first, last = own[0], own[-1]
            level = np.mean(sound[first * _HOP : last * _HOP + _WINDOW] ** 2)
            windows = power[first : last + 1] * (_LEVEL**2 / level if level > 0 else 1.0)
            windows = np.concatenate([np.zeros((_QUIET, _BINS)), windows]).astype(np.float32)
            kept = own[:: self.stride]
            found.append(_Utterance(windows, _QUIET + kept - first, times[kept]))
        return found

    def __repr__(self) -> str:
        settings = f"layer={self.layer}, stride={self.stride}, silence={self.silence}, pause={self.pause}"
        return f"Voice({settings}, name={self.name!r})"


class _Utterance(NamedTuple):
    """What the network reads of it, float32 [T, 40], and the windows among them that are steps, with their times."""

    power: Features
    kept: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]


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
