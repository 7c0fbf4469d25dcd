"""FeatureCache with images: keys by content, files that cannot be read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pycm.encoders import FeatureCache, UnreadableInputError
from pycm.encoders import store as store_module


class Pixels:
    """An image encoder that keeps what it is asked for: mean colour, height and width."""

    modality = "image"
    name = "pixels"
    fingerprint = "p1"
    dim = 5

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def encode(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> np.ndarray:
        self.seen += items
        arrays = [np.asarray(image) for image in items]
        rows = [[*a.reshape(-1, 3).mean(0), *a.shape[:2]] for a in arrays]
        return np.array(rows, np.float32).reshape(len(items), 5)


def pictures(folder: Path) -> list[Path]:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    paths = []
    for i in range(4):
        paths.append(folder / f"{i}.png")
        image.fromarray(rng.integers(0, 256, (5 + i, 7, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def test_images_by_content(tmp_path: Path) -> None:
    paths = pictures(tmp_path)
    cache, encoder = FeatureCache(tmp_path / "cache"), Pixels()
    result = cache.encode(encoder, [*paths, str(paths[0])])
    np.testing.assert_array_equal(result.features[:, 3], [5, 6, 7, 8, 5])
    assert len(encoder.seen) == 4
    renamed = paths[1].rename(tmp_path / "renamed.png")
    shutil.copy(paths[2], paths[3])  # another picture under an old name
    again = cache.encode(encoder, [renamed, paths[3]])
    np.testing.assert_array_equal(again.features, result.features[[1, 2]])
    assert len(encoder.seen) == 4


def test_arrays_and_pil_images_by_their_pixels(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    cache, encoder = FeatureCache(tmp_path), Pixels()
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    flat = pixels.reshape(5, 4, 3)  # the same bytes in another shape
    result = cache.encode(encoder, [pixels, image.fromarray(pixels), flat])
    np.testing.assert_array_equal(result.features[:, 3], [4, 4, 5])
    assert len(encoder.seen) == 2


def test_unreadable_images(tmp_path: Path) -> None:
    paths = pictures(tmp_path)
    paths[1].write_text("this is text")
    paths[2].write_bytes(paths[2].read_bytes()[:60])
    items: list[Any] = [*paths, tmp_path / "gone.png", paths[1]]
    cache, encoder = FeatureCache(tmp_path / "cache"), Pixels()
    with pytest.raises(UnreadableInputError) as info:
        cache.encode(encoder, items, batch_size=2)
    names = [name for name, _ in info.value.errors]
    assert names == [str(item) for item in (paths[1], paths[2], tmp_path / "gone.png", paths[1])]
    assert "No such file" in info.value.errors[2][1]
    assert len(encoder.seen) == 2
    result = cache.encode(encoder, items, on_error="skip")
    np.testing.assert_array_equal(result.kept, [0, 3])
    np.testing.assert_array_equal(result.features[:, 3], [5, 8])
    assert result.errors == info.value.errors
    assert len(encoder.seen) == 2
    nothing = cache.encode(encoder, items[1:3], on_error="skip")
    assert nothing.features.shape == (0, 5)
    assert len(nothing.errors) == 2


def test_a_file_that_changes_under_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    paths = pictures(tmp_path)
    own = store_module.ShardStore.prepare

    def changed_meanwhile(self: Any, about: Any) -> None:
        shutil.copy(paths[0], paths[1])
        own(self, about)

    monkeypatch.setattr(store_module.ShardStore, "prepare", changed_meanwhile)
    with pytest.raises(UnreadableInputError, match=r"1\.png \(it changed while it was being read\)"):
        FeatureCache(tmp_path / "cache").encode(Pixels(), paths)
