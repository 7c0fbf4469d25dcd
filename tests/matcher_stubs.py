"""What the tests of the matcher share: encoders simple enough to compute by hand, and five images.

Test files import the fixture `images`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pycm import ImageTextMatcher
from pycm.encoders import UnreadableInputError, load_image

WORDS = ("red", "green", "blue", "dark")


class PixelEncoder:
    """The mean colour and the darkness of an image: float32 [N, 4]."""

    name, modality, dim = "pixels", "image", 4

    def __init__(self, salt: str = "") -> None:
        self.calls: list[int] = []
        self.fingerprint = hashlib.sha256(f"pixels{salt}".encode()).hexdigest()

    def encode(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> np.ndarray:
        self.calls.append(len(items))
        rows, errors = [], []
        for i, item in enumerate(items):
            try:
                mean = np.asarray(load_image(item), np.float64).mean(axis=(0, 1)) / 255
                rows.append([*mean, 1 - mean.mean()])
            except ValueError as error:
                errors.append((str(item), str(error) or str(i)))
        if errors:
            raise UnreadableInputError(errors, len(items))
        return np.array(rows, np.float32).reshape(-1, 4)


class WordEncoder:
    """How often each of `WORDS` occurs, and a little of each text's own: float32 [N, 4]."""

    name, modality, dim, fingerprint = "words", "text", 4, hashlib.sha256(b"words").hexdigest()

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> np.ndarray:
        self.calls.append(len(items))
        digests = [hashlib.sha256(text.encode()).digest() for text in items]
        rows = [
            [text.split().count(word) + own / 2000 for word, own in zip(WORDS, digest, strict=False)]
            for text, digest in zip(items, digests, strict=True)
        ]
        return np.array(rows, np.float32).reshape(-1, 4)


COLOURS = [(250, 20, 30), (10, 240, 20), (20, 30, 220), (15, 10, 12), (200, 190, 40)]
TEXTS = [
    "a red wall",
    "green green grass",
    "the deep blue sea",
    "a dark night",
    "a red and green leaf",
    "fog",
]


@pytest.fixture(name="images")
def images_fixture(tmp_path: Path) -> list[Path]:
    image = pytest.importorskip("PIL.Image")
    paths = []
    for i, colour in enumerate(COLOURS):
        path = tmp_path / f"image{i}.png"
        image.new("RGB", (8, 6), colour).save(path)
        paths.append(path)
    return paths


def make(**options: Any) -> ImageTextMatcher:
    return ImageTextMatcher(PixelEncoder(), WordEncoder(), **options)
