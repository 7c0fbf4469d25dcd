"""Clips made of numbers, for the tests of the matchers: a task in which nothing but the order of the steps tells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pycm.streams import ClipFeatures, Sequences

WORDS = ["it moves left", "it moves right", "it grows", "it shrinks"]


def sequences(clips: Sequence[np.ndarray]) -> Sequences:
    """One stream of these clips, [T, D] each."""
    return Sequences(
        np.concatenate(clips).astype(np.float32),
        np.cumsum([0, *map(len, clips)]).astype(np.int64),
        np.concatenate([np.arange(len(clip), dtype=np.float64) for clip in clips]),
        np.ones(len(clips), bool),
    )


def ramps(count: int, seed: int, noise: int = 2) -> tuple[ClipFeatures, np.ndarray]:
    """Clips and the row of WORDS that each is: one of two features goes steadily up or down, the other has the same
    values in a random order. In any other order of their steps all four are alike."""
    draw = np.random.default_rng(seed)
    kinds = draw.integers(0, 4, count)
    clips = []
    for kind in kinds:
        steps = int(draw.integers(6, 10))
        ramp = np.linspace(-1, 1, steps) * (1 if kind % 2 else -1)
        both = [ramp, draw.permutation(ramp)]
        columns = both if kind < 2 else both[::-1]
        clips.append(np.column_stack([*columns, draw.normal(0, 0.1, (steps, noise))]))
    return clip_features({"ramp": sequences(clips)}), kinds


def clip_features(streams: dict[str, Sequences], prefix: str = "clip") -> ClipFeatures:
    count = len(next(iter(streams.values())))
    return ClipFeatures(streams, [f"{prefix}{i}" for i in range(count)], np.arange(count))


class LetterEncoder:
    """A text encoder simple enough to compute by hand: how often each of ten letters occurs."""

    name, modality, dim, fingerprint = "letters", "text", 10, "letters-1"

    def encode(self, items: Sequence[str], *, batch_size: int = 32, progress: bool | None = None) -> np.ndarray:
        rows = [[text.count(letter) for letter in "eilmnorstv"] for text in items]
        return np.array(rows, np.float32).reshape(-1, 10)


class VectorImages:
    """An image encoder of images that are numbers already: uint8 arrays [1, D], each a picture of its own vector."""

    name, modality, dim, fingerprint = "vectors", "image", 6, "vectors-1"

    def encode(self, items: Sequence[np.ndarray], *, batch_size: int = 32, progress: bool | None = None) -> np.ndarray:
        return np.stack([np.asarray(item, np.float32).ravel() for item in items]) / 128 - 1


def shown(count: int, seed: int) -> tuple[list[np.ndarray], ClipFeatures]:
    """Images and clips of the same things: a clip's first step has three features of the image, its last the others."""
    draw = np.random.default_rng(seed)
    images = [draw.integers(0, 256, (1, 6), dtype=np.uint8) for _ in range(count)]
    clips = []
    for vector in VectorImages().encode(images):
        clip = draw.normal(0, 0.2, (int(draw.integers(3, 6)), 3))
        clip[0], clip[-1] = vector[:3], vector[3:]
        clips.append(clip)
    return images, clip_features({"ramp": sequences(clips)})
