"""Position changes: how what moves is displaced from one frame to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from .._optional import require
from ..encoders.base import Features
from ..encoders.fingerprint import digest_of
from ..encoders.store import Steps
from ..video import Clip
from .differences import gray
from .sequences import Sequences

_GRID = 4  # cells a side of "flow"


class Motion:
    """Displacement from frame to frame, by OpenCV; the first step is zero.

    Lengths are shares of the frame's width or height, x to the right and y down, whatever its resolution.

    Args:
        method: "phase", 8 features: the shift (dx, dy) of the picture and how sure it is, by phase correlation (Kuglin
            and Hines 1975); the growth (logarithm) and turn (radians, clockwise) about its middle and how sure they
            are, by phase correlation of the spectra's magnitudes in log-polar coordinates (Reddy and Chatterji 1996);
            the logarithm of the growth of the moving mass; the mean absolute change of grey levels.
            "flow", 35 features: the mean shift (dx, dy) in each cell of a 4 x 4 grid, by dense optical flow (Farneback
            2003), then its mean length, and the growth and turn (radians, clockwise) of what moves about its middle:
            the least-squares fit to the flow, weighted by its length.
        size: pixels a side to which frames are shrunk.
        name: what to call the stream.
    """

    needs_sound = False

    def __init__(self, method: Literal["phase", "flow"] = "phase", *, size: int = 64, name: str | None = None) -> None:
        require("cv2", "video", "Motion")
        if method not in ("phase", "flow"):
            raise ValueError(f'Motion: method must be "phase" or "flow", got {method!r}')
        if isinstance(size, bool) or not isinstance(size, int) or size < 16:
            raise ValueError(f"Motion: size must be an int of at least 16, got {size!r}")
        self.method: Literal["phase", "flow"] = method
        self.size = size
        self.name = name or ("motion" if method == "phase" else "flow")

    @property
    def dim(self) -> int:
        """Features of a step: 8 or 35."""
        return 8 if self.method == "phase" else 2 * _GRID**2 + 3

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over the settings and OpenCV's version."""
        return digest_of(type(self), self.method, self.size, require("cv2", "video", "Motion").__version__)

    def extract(self, clips: Sequence[Clip], *, batch_size: int = 32) -> Sequences:
        """One step a frame."""
        return Sequences.of([self._steps(clip) for clip in clips], self.dim)

    def _steps(self, clip: Clip) -> Steps:
        frames = [gray(frame, self.size, self.size) for frame in clip.frames]
        values = np.zeros((len(frames), self.dim), dtype=np.float32)
        measure = _Phase(frames) if self.method == "phase" else _flow
        for t in range(1, len(frames)):
            values[t] = measure(frames[t - 1], frames[t])
        return Steps(values, clip.times)

    def __repr__(self) -> str:
        return f"Motion({self.method!r}, size={self.size}, name={self.name!r})"


class _Phase:
    """Phase correlation of what moves: the frames less what stays, their median over time."""

    def __init__(self, frames: list[Features]) -> None:
        import cv2

        self.size = len(frames[0])
        self.still = np.median(np.stack(frames), axis=0).astype(np.float32)
        self.window = cv2.createHanningWindow((self.size, self.size), cv2.CV_32F)

    def __call__(self, before: Features, after: Features) -> list[float]:
        import cv2

        change = float(np.abs(after - before).mean())
        if change == 0:  # the correlation of two equal pictures is 0 / 0 where they are blank
            return [0.0] * 8
        first, second = before - self.still, after - self.still
        (dx, dy), sure = cv2.phaseCorrelate(first, second)
        (growth, turn), sure_of_growth = cv2.phaseCorrelate(self._polar(before), self._polar(after))
        mass = [float(np.abs(part).sum()) + 1.0 for part in (first, second)]
        radius = self.size / 2
        return [
            dx / self.size,
            dy / self.size,
            sure,
            -growth * float(np.log(radius)) / self.size,  # a spectrum shrinks as its picture grows
            (turn * 2 * np.pi / self.size + np.pi / 2) % np.pi - np.pi / 2,  # a spectrum is its own half turn
            sure_of_growth,
            float(np.log(mass[1] / mass[0])),
            change,
        ]

    def _polar(self, frame: Features) -> Features:
        import cv2

        n = self.size
        spectrum = np.abs(np.fft.fftshift(np.fft.fft2(frame * self.window))).astype(np.float32)
        flags = cv2.WARP_POLAR_LOG | cv2.INTER_LINEAR
        polar: Any = cv2.warpPolar(np.log1p(spectrum), (n, n), (n / 2, n / 2), n / 2, flags)
        return np.asarray(polar, dtype=np.float32)


def _flow(before: Features, after: Features) -> Features:
    import cv2

    size = len(before)
    first, second = ((255 * frame).astype(np.uint8) for frame in (before, after))
    start: Any = None
    flow = cv2.calcOpticalFlowFarneback(first, second, start, 0.5, 3, 15, 3, 5, 1.2, 0) / size
    cells = cv2.resize(flow, (_GRID, _GRID), interpolation=cv2.INTER_AREA)
    length = np.linalg.norm(flow, axis=2)
    weight = length / (length.sum() + 1e-12)
    y, x = np.mgrid[:size, :size] / size
    u, v = (flow[..., i] - (weight * flow[..., i]).sum() for i in (0, 1))
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    spread = (weight * (x * x + y * y)).sum() + 1e-12
    growth, turn = (weight * (u * x + v * y)).sum() / spread, (weight * (v * x - u * y)).sum() / spread
    return np.array([*cells.ravel(), length.mean(), growth, turn], dtype=np.float32)
