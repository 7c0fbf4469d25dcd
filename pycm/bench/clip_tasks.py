"""Clips in which only time tells, or only sound: made of scikit-learn's digits and of recorded ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pycm._optional import require
from pycm.audio import read_sound
from pycm.encoders.base import Features, Modality, check_items
from pycm.encoders.fingerprint import digest_of
from pycm.encoders.images import load_image
from pycm.video import Clip, write_clip

#: Each motion and the one that the reversed clip shows.
OPPOSITES = {
    "moves to the left": "moves to the right",
    "moves to the right": "moves to the left",
    "moves up": "moves down",
    "moves down": "moves up",
    "grows": "shrinks",
    "shrinks": "grows",
}
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 64  # pixels of the frames


class Thumbnail:
    """An image encoder that costs nothing: the grey levels of a `side` x `side` picture, in [0, 1]."""

    modality: Modality = "image"

    def __init__(self, side: int = 16) -> None:
        self.side = side
        self.name = f"thumbnail-{side}"

    @property
    def dim(self) -> int:
        return self.side**2

    @property
    def fingerprint(self) -> str:
        return digest_of(type(self), self.side)

    def encode(self, items: Sequence[Any], *, batch_size: int = 32, progress: bool | None = None) -> Features:
        check_items("Thumbnail.encode", items)
        from PIL import Image

        small = [load_image(item).convert("L").resize((self.side,) * 2, Image.Resampling.BOX) for item in items]
        rows = [np.asarray(image, dtype=np.float32).ravel() / 255 for image in small]
        return np.stack(rows) if rows else np.empty((0, self.dim), np.float32)


def backwards(clip: Clip) -> Clip:
    """The clip played backwards, at the same times."""
    name = f"{clip.name} backwards"
    return replace(clip, frames=np.ascontiguousarray(clip.frames[::-1]), sound=None, name=name)


def moving_digits(count: int, seed: int, steps: int = 12) -> tuple[list[Clip], list[str]]:
    """`count` clips of a handwritten digit that moves, each followed by the same clip backwards, and their captions.

    Both have the same frames: without their order nothing tells one caption from the other.
    """
    cv2 = require("cv2", "video", "moving_digits")
    images = require("sklearn.datasets", "text", "moving_digits").load_digits().images
    draw = np.random.default_rng(seed)
    clips: list[Clip] = []
    captions: list[str] = []
    for i in range(count):
        image = images[draw.integers(len(images))].astype(np.float32) * (255 / 16)
        motion = ("moves to the right", "moves down", "grows")[i % 3]
        way = np.linspace(-1, 1, steps) * draw.uniform(0.6, 1.0)  # how far each frame is on its way
        x, y = draw.uniform(-6, 6, 2)
        scale = np.full(steps, draw.uniform(2.5, 3.5))
        if motion == "grows":
            scale = 3.0 * 1.6**way
        xs = SIDE / 2 + x + (18 * way if motion == "moves to the right" else 0 * way)
        ys = SIDE / 2 + y + (18 * way if motion == "moves down" else 0 * way)
        frames = []
        for t in range(steps):
            matrix = np.array([[scale[t], 0, xs[t] - 4 * scale[t]], [0, scale[t], ys[t] - 4 * scale[t]]])
            drawn = cv2.warpAffine(image, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR)
            frames.append(np.repeat(np.clip(drawn, 0, 255).astype(np.uint8)[..., None], 3, axis=2))
        clip = Clip.from_frames(np.stack(frames), fps=12.5, name=f"digit {seed}-{i}")
        clips += [clip, backwards(clip)]
        captions += [f"a digit {motion}", f"a digit {OPPOSITES[motion]}"]
    return clips, captions


def spoken_clips(
    recordings: Sequence[Path],
    folder: Path,
    *,
    speeds: Sequence[float] = (1.0,),
    calls: int = 3,
    pause: float = 0.25,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[list[Path], list[str], list[str]]:
    """MP4 files of a digit that is called out, while a card behind which it cannot be seen moves about.

    Args:
        recordings: files named {digit}_{speaker}_{n}.wav.
        folder: where the MP4 files are written.
        speeds: the digit is called at each of these speeds, pitch and all: other voices, for training.
        calls: how many of a speaker's recordings of the digit follow each other in a clip.
        pause: seconds of silence between them.
        limit: of the clips of each speaker, digit and speed; None is every choice of `calls` recordings.
        seed: of the choice and of the card's way.

    Returns:
        The files, their captions and their speakers.
    """
    draw = np.random.default_rng(seed)
    silence = np.zeros(round(16000 * pause), np.float32)
    takes: dict[tuple[str, str], list[Path]] = {}
    for recording in sorted(recordings):
        digit, speaker, _ = recording.stem.split("_")
        takes.setdefault((digit, speaker), []).append(recording)
    files: list[Path] = []
    captions: list[str] = []
    speakers: list[str] = []
    for (digit, speaker), own in takes.items():
        for speed in speeds:
            # Resampled for another rate than the one it is played at, it sounds faster or slower.
            heard = [read_sound(recording, sample_rate=round(16000 / speed)) for recording in own]
            choices = list(combinations(range(len(own)), calls))
            for n in draw.permutation(len(choices))[:limit]:
                called = [part for take in draw.permutation(choices[n]) for part in (silence, heard[take])]
                sound = np.concatenate(called[1:])
                path = folder / f"{digit}_{speaker}_{speed:g}_{n}.mp4"
                write_clip(path, card(draw, max(2, round(12.5 * len(sound) / 16000))), fps=12.5, sound=sound)
                files.append(path)
                captions.append(f"the digit {NAMES[int(digit)]}")
                speakers.append(speaker)
    return files, captions, speakers


def card(draw: np.random.Generator, steps: int) -> npt.NDArray[np.uint8]:
    """Frames [T, SIDE, SIDE, 3] of a grey card on its way from one random place to another."""
    frames = np.full((steps, SIDE, SIDE, 3), 255, np.uint8)
    start, end = draw.integers(0, SIDE - 24, (2, 2))
    for t in range(steps):
        x, y = np.rint(start + (end - start) * t / max(1, steps - 1)).astype(int)
        frames[t, y : y + 24, x : x + 24] = 128
    return frames
