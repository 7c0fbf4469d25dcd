"""What the tests of the command line share: encoders without torch, a folder of inputs, a cache of its own.

Test files import the fixtures that they use.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pycm import ImageTextMatcher
from pycm.cli.main import run
from pycm.encoders import load_image

COLOURS = {"red": (250, 20, 30), "green": (10, 240, 20), "blue": (20, 30, 220), "black": (9, 8, 7)}
TEXTS = ["a red wall", "green grass", "the blue sea", "a black night", "a red and green leaf", "fog"]


class Pixels:
    """The mean colour of an image and its darkness."""

    name, modality, dim, fingerprint = "pixels", "image", 4, hashlib.sha256(b"p").hexdigest()

    def encode(self, items: Any, **_: Any) -> np.ndarray:
        means = [np.asarray(load_image(item), np.float64).mean(axis=(0, 1)) / 255 for item in items]
        return np.array([[*m, 1 - m.mean()] for m in means], np.float32).reshape(-1, 4)


class Words:
    """Which colours a text names."""

    name, modality, dim, fingerprint = "words", "text", 4, hashlib.sha256(b"w").hexdigest()

    def encode(self, items: Any, **_: Any) -> np.ndarray:
        rows = [
            [text.split().count(word) + len(text) / 500 * (i + 1) for i, word in enumerate(COLOURS)] for text in items
        ]
        return np.array(rows, np.float32).reshape(-1, 4)


@pytest.fixture(name="cache_home")
def cache_home_fixture(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own: nothing is written into the user's."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "pycm"


@pytest.fixture(name="folder")
def folder_fixture(tmp_path: Path) -> Path:
    """Four images, one of them in a subfolder, and six texts."""
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "photos/sub").mkdir(parents=True)
    for i, (name, colour) in enumerate(COLOURS.items()):
        image.new("RGB", (16, 12), colour).save(tmp_path / "photos" / ("sub" if i == 3 else "") / f"{name}.png")
    (tmp_path / "photos/notes.md").write_text("not an image")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture(name="stub")
def stub_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default matcher without torch."""
    monkeypatch.setattr(
        ImageTextMatcher,
        "default",
        classmethod(lambda cls, cache=None, metric="cosine", **_: cls(Pixels(), Words(), None, metric, cache=cache)),
    )


def match(folder: Path, *more: object) -> int:
    arguments = ["match", "--images", folder / "photos", "--texts", folder / "texts.txt", *more]
    return run([str(argument) for argument in arguments])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
