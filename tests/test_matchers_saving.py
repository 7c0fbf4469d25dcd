"""Saved matchers: what comes back, what is refused, and that an older one is never lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

from matcher_stubs import TEXTS, PixelEncoder, WordEncoder, images_fixture, make  # noqa: F401

from pycm import ImageTextMatcher
from pycm.spaces import Ridge


class TestSaving:
    nested = (["a red wall", "red"], "green grass", ["blue sea"], ["dark", "fog"], "a leaf")

    def test_a_fitted_text_encoder_and_space_come_back_bit_for_bit(self, images: list[Path], tmp_path: Path) -> None:
        pytest.importorskip("sklearn")
        pytest.importorskip("safetensors")
        matcher = ImageTextMatcher(PixelEncoder(), "tfidf", Ridge(alpha=0.1), "euclidean")
        matcher.fit(images, list(self.nested)).save(tmp_path / "saved")
        loaded = ImageTextMatcher.load(tmp_path / "saved", image_encoder=PixelEncoder())
        assert loaded.metric == "euclidean"
        np.testing.assert_array_equal(loaded.scores(images, TEXTS), matcher.scores(images, TEXTS))
        assert not list(tmp_path.rglob("*.tmp"))
        code = "import sys; from pycm.matchers import storage; storage.load_text_encoder(sys.argv[1])"
        (path,) = tmp_path.glob("saved/parts-*/text_encoder")  # in a process that has not made a Tfidf before
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=120)
        loaded.save(tmp_path / "again")
        documents = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "again")]
        parts = [document.pop("parts") for document in documents]
        assert documents[0] == documents[1]
        for name in ("space", "text_encoder"):
            for file in (tmp_path / "saved" / parts[0] / name).iterdir():
                assert file.read_bytes() == (tmp_path / "again" / parts[1] / name / file.name).read_bytes()

    def test_encoders_of_ones_own_are_asked_for(self, images: list[Path], tmp_path: Path) -> None:
        make().save(tmp_path / "saved")
        with pytest.raises(ValueError, match=r"image encoder 'pixels'.*load\(folder, image_encoder=\.\.\.\)"):
            ImageTextMatcher.load(tmp_path / "saved")
        with pytest.raises(ValueError, match=r"text encoder 'words'.*load\(folder, text_encoder=\.\.\.\)"):
            ImageTextMatcher.load(tmp_path / "saved", image_encoder=PixelEncoder())
        parts = {"image_encoder": PixelEncoder(), "text_encoder": WordEncoder()}
        loaded = ImageTextMatcher.load(tmp_path / "saved", **parts)
        np.testing.assert_array_equal(loaded.scores(images, TEXTS), make().scores(images, TEXTS))

    def test_another_encoder_than_the_saved_one_is_refused(self, tmp_path: Path) -> None:
        make().save(tmp_path / "saved")
        parts = {"image_encoder": PixelEncoder("other"), "text_encoder": WordEncoder()}
        with pytest.raises(ValueError, match=r"image_encoder 'pixels' is not the one.*strict=False"):
            ImageTextMatcher.load(tmp_path / "saved", **parts)
        ImageTextMatcher.load(tmp_path / "saved", **parts, strict=False)

    @pytest.mark.parametrize("text", ["{", "[]", '{"class": "Ridge", "format": 1}', "\xff"])
    def test_what_is_no_saved_matcher_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match="not a saved matcher"):
            ImageTextMatcher.load(tmp_path)
        with pytest.raises(FileNotFoundError):
            ImageTextMatcher.load(tmp_path / "nowhere")

    def test_a_newer_format_is_refused(self, tmp_path: Path) -> None:
        make().save(tmp_path)
        document = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(document | {"format": 99}))
        with pytest.raises(ValueError, match="format 99"):
            ImageTextMatcher.load(tmp_path)

    def test_an_unfitted_space_leaves_nothing_behind(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match=r"ImageTextMatcher\.save: Ridge is not fitted"):
            make(space=Ridge()).save(tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestSavingOverAnOlderMatcher:
    @pytest.fixture
    def saved(self, images: list[Path], tmp_path: Path) -> Path:
        pytest.importorskip("sklearn")
        pytest.importorskip("safetensors")
        folder = tmp_path / "saved"
        matcher = ImageTextMatcher(PixelEncoder(), "tfidf", Ridge(alpha=0.1))
        matcher.fit(images, list(TestSaving.nested)).save(folder)
        (folder / "notes.txt").write_text("the user's own")
        return folder

    def other(self, images: list[Path]) -> ImageTextMatcher:
        matcher = ImageTextMatcher(PixelEncoder(), "bag-of-words", Ridge(alpha=9.0), "dot")
        return matcher.fit(images, list(TestSaving.nested))

    def test_it_is_replaced(self, images: list[Path], saved: Path) -> None:
        new = self.other(images)
        new.save(saved)
        loaded = ImageTextMatcher.load(saved, image_encoder=PixelEncoder())
        assert loaded.metric == "dot"
        np.testing.assert_array_equal(loaded.scores(images, TEXTS), new.scores(images, TEXTS))
        assert len(list(saved.iterdir())) == 3  # config.json, one folder of parts, and the user's file

    def test_it_survives_one_that_is_not_fitted(self, images: list[Path], saved: Path) -> None:
        before = tree(saved)
        with pytest.raises(RuntimeError, match="not fitted"):
            make(space=Ridge()).save(saved)
        with pytest.raises(RuntimeError, match="fit"):
            ImageTextMatcher(PixelEncoder(), "tfidf", Ridge()).save(saved)
        assert tree(saved) == before

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_it_survives_an_error_at_every_step(
        self, images: list[Path], saved: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        before, new = tree(saved), self.other(images)
        replace, steps = os.replace, 0
        for fail_at in range(100):
            done = 0

            def failing(source: Any, target: Any) -> None:
                nonlocal done
                done += 1
                if done > fail_at:  # noqa: B023
                    raise error
                replace(source, target)

            monkeypatch.setattr(os, "replace", failing)
            try:
                new.save(saved)
                break
            except type(error):
                steps += 1
                assert tree(saved) == before
                assert len(list(saved.iterdir())) == 3
        assert steps == 5 - 1  # two files of the space, one of the text encoder, and config.json
        assert ImageTextMatcher.load(saved, image_encoder=PixelEncoder()).metric == "dot"

    def test_an_interrupt_after_the_swap_leaves_the_new_one(
        self, images: list[Path], saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replace = os.replace

        def late(source: Any, target: Any) -> None:
            replace(source, target)
            if Path(target) == saved / "config.json":
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", late)
        with pytest.raises(KeyboardInterrupt):
            self.other(images).save(saved)
        assert ImageTextMatcher.load(saved, image_encoder=PixelEncoder()).metric == "dot"

    def test_only_folders_of_parts_are_ever_removed(self, images: list[Path], saved: Path) -> None:
        document = json.loads((saved / "config.json").read_text())
        victim = saved.parent / "victim"
        victim.mkdir()
        for name in ("../victim", ".", "", "parts-/../../victim", None):
            (saved / "config.json").write_text(json.dumps(document | {"parts": name}))
            with pytest.raises(ValueError, match="does not name the folder of its parts"):
                ImageTextMatcher.load(saved, image_encoder=PixelEncoder())
            self.other(images).save(saved)
            assert victim.is_dir()
            assert (saved / "notes.txt").exists()


class OwnSpace:
    """A space that is not derived from the package's."""

    def fit(self, image_features: Any, text_features: Any, pairs: Any = None, *, weights: Any = None) -> Any:
        return self

    def transform_images(self, image_features: Any) -> np.ndarray:
        return np.asarray(image_features, np.float32) * 2

    def transform_texts(self, text_features: Any) -> np.ndarray:
        return np.asarray(text_features, np.float32)

    def save(self, folder: Any) -> None:
        raise AssertionError("it could not be loaded")


def test_a_space_of_ones_own_is_asked_for(images: list[Path], tmp_path: Path) -> None:
    matcher = make(space=OwnSpace(), metric="dot")
    matcher.save(tmp_path / "saved")
    parts: dict[str, Any] = {"image_encoder": PixelEncoder(), "text_encoder": WordEncoder()}
    with pytest.raises(ValueError, match=r"a OwnSpace, which is not saved.*load\(folder, space=\.\.\.\)"):
        ImageTextMatcher.load(tmp_path / "saved", **parts)
    loaded = ImageTextMatcher.load(tmp_path / "saved", space=OwnSpace(), **parts)
    np.testing.assert_array_equal(loaded.scores(images, TEXTS), matcher.scores(images, TEXTS))
    assert (
        ImageTextMatcher.load(tmp_path / "saved", space=OwnSpace(), metric="euclidean", **parts).metric == "euclidean"
    )
