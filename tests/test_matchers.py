"""ImageTextMatcher against the reference. Saving: test_matchers_saving.py; the default: test_matchers_default.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")
from matcher_stubs import COLOURS, TEXTS, PixelEncoder, WordEncoder, images_fixture, make  # noqa: F401
from PIL import Image

import pycm
from pycm import ImageTextMatcher, reference
from pycm.encoders import UnreadableInputError
from pycm.spaces import ConSE, HubnessCorrection, Ridge


@pytest.fixture
def broken(tmp_path: Path, images: list[Path]) -> list[Path]:
    """A text file under an image's name, a truncated PNG, an empty and a missing file."""
    names = ["text.png", "truncated.png", "empty.png", "missing.png"]
    (tmp_path / names[0]).write_text("these are words, not pixels")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / names[1])
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:4000])
    (tmp_path / names[2]).touch()
    return [tmp_path / name for name in names]


@pytest.mark.parametrize("metric", pycm.METRICS)
def test_match_is_the_reference_in_both_directions(images: list[Path], metric: Any) -> None:
    x, y = PixelEncoder().encode(images), WordEncoder().encode(TEXTS)
    found = make(metric=metric).match(images, TEXTS, k=(4, 3))
    for got, want in (
        (found.image_to_text, reference.topk(x, y, 4, metric)),
        (found.text_to_image, reference.topk(y, x, 3, metric)),
    ):
        np.testing.assert_array_equal(got.indices, want.indices)
        np.testing.assert_array_equal(got.scores, np.asarray(want.scores, np.float32))
    assert found.images == [str(path) for path in images]
    assert found.texts == TEXTS
    assert found.errors == []
    np.testing.assert_allclose(
        make(metric=metric).scores(images, TEXTS), reference.similarity(x, y, metric), rtol=1e-5, atol=1e-6
    )


def test_pixels_and_names_of_images_without_a_file() -> None:
    arrays = [np.full((4, 4, 3), colour, np.uint8) for colour in COLOURS]
    best = make().match(arrays[:4], TEXTS[:4], k=1).image_to_text.indices[:, 0]
    assert best.tolist() == [0, 1, 2, 3]
    found = make().match(arrays, TEXTS)
    assert found.images == [f"items[{i}]" for i in range(5)]
    assert found.image_to_text.indices.shape == (5, 5)  # five by default
    assert found.text_to_image.indices.shape == (6, 5)
    assert make().match(arrays[:2], TEXTS).text_to_image.indices.shape == (6, 2)  # or all there are


@pytest.mark.parametrize(
    ("k", "limit"),
    [(0, r"\[1, 5\]"), (6, r"\[1, 5\]"), (-1, r"\[1, 5\]"), ((7, 1), r"\[1, 6\]"), ((6, 6), r"\[1, 5\]")],
)
def test_k_out_of_range_raises_before_anything_is_encoded(images: list[Path], k: Any, limit: str) -> None:
    matcher = make()
    with pytest.raises(ValueError, match=rf"ImageTextMatcher.match: k must be in {limit}.*got -?\d"):
        matcher.match(images, TEXTS, k)
    assert matcher.image_encoder.calls == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("k", [2.0, True, "3", (1, 2, 3)])
def test_k_of_another_type_raises(images: list[Path], k: Any) -> None:
    with pytest.raises(TypeError, match="k must be an int or a pair"):
        make().match(images, TEXTS, k)


@pytest.mark.parametrize(("n", "m", "what"), [(0, 6, "images is empty"), (5, 0, "texts is empty")])
def test_nothing_to_match_raises(images: list[Path], n: int, m: int, what: str) -> None:
    for method in ("match", "scores"):
        with pytest.raises(ValueError, match=what):
            getattr(make(), method)(images[:n], TEXTS[:m])


def test_a_lone_text_is_refused(images: list[Path]) -> None:
    with pytest.raises(TypeError, match="items must be a sequence"):
        make().match(images, "a red wall")  # type: ignore[arg-type]


def test_every_unreadable_image_is_named(images: list[Path], broken: list[Path]) -> None:
    mixed = [images[0], broken[0], images[1], *broken[1:], images[2]]
    for cache in (None, images[0].parent / "cache"):
        with pytest.raises(UnreadableInputError) as caught:
            make(cache=cache).match(mixed, TEXTS, 2)
        assert [name for name, _ in caught.value.errors] == [str(path) for path in broken]
        assert all(path.name in str(caught.value) for path in broken)


@pytest.mark.parametrize("cached", [False, True])
def test_skipping_leaves_the_rest_as_if_the_unreadable_were_not_there(
    images: list[Path], broken: list[Path], cached: bool
) -> None:
    cache = images[0].parent / "cache" if cached else None
    mixed = [broken[0], images[0], images[1], *broken[1:], images[2], images[3], images[4]]
    matcher = make(cache=cache, batch_size=2)
    found, want = matcher.match(mixed, TEXTS, 3, on_error="skip"), make().match(images, TEXTS, 3)
    assert found.images == want.images
    assert [mixed[i] for i in found.kept] == images
    assert [name for name, _ in found.errors] == [str(path) for path in broken]
    for got, expected in zip(found.image_to_text, want.image_to_text, strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(found.text_to_image, want.text_to_image, strict=True):
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(UnreadableInputError):
        make(cache=cache).match(broken, TEXTS, 1, on_error="skip")  # none left
    fewer = make(cache=cache).match(mixed, TEXTS, 6, on_error="skip")  # 6 texts, but 5 images left
    everything = make().match(images, TEXTS, (6, 5))
    np.testing.assert_array_equal(fewer.image_to_text.indices, everything.image_to_text.indices)
    np.testing.assert_array_equal(fewer.text_to_image.indices, everything.text_to_image.indices)
    with pytest.raises(ValueError, match="on_error"):
        make().match(images, TEXTS, on_error="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_features_raise_and_name_the_item(images: list[Path], value: float) -> None:
    matcher = make()
    clean = matcher.image_encoder.encode

    def spoiled(items: Any, **options: Any) -> np.ndarray:
        features = clean(items, **options)
        features[2, 1] = value
        return features

    matcher.image_encoder.encode = spoiled  # type: ignore[method-assign]
    for call in (matcher.match, matcher.scores, matcher.evaluate):
        with pytest.raises(ValueError, match=r"features of image '.*image2\.png' hold NaN"):
            call(images, TEXTS[:5])


def test_evaluate_is_brute_force(images: list[Path]) -> None:
    nested = [["a red wall", "red"], "green grass", ["blue sea"], ["dark", "night", "fog"], "a leaf"]
    flat = ["a red wall", "red", "green grass", "blue sea", "dark", "night", "fog", "a leaf"]
    owner = [0, 0, 1, 2, 3, 3, 3, 4]
    scores = reference.similarity(PixelEncoder().encode(images), WordEncoder().encode(flat), "cosine")
    image_ranks = [min(int((row > row[j]).sum()) for j in range(8) if owner[j] == i) for i, row in enumerate(scores)]
    text_ranks = [int((column > column[owner[j]]).sum()) for j, column in enumerate(scores.T)]
    metrics = make().evaluate(images, nested, ks=(1, 2))
    for got, ranks in ((metrics.image_to_text, image_ranks), (metrics.text_to_image, text_ranks)):
        np.testing.assert_array_equal(got.ranks, ranks)
        assert got.recall_at_k == {k: pytest.approx(np.mean(np.array(ranks) < k)) for k in (1, 2)}


def test_fit_gives_the_space_the_pairs(images: list[Path], broken: list[Path]) -> None:
    nested = [["a red wall", "red"], "green grass", ["blue sea"], ["dark", "fog"], "a leaf"]
    flat = ["a red wall", "red", "green grass", "blue sea", "dark", "fog", "a leaf"]
    pairs = np.array([[0, 0], [0, 1], [1, 2], [2, 3], [3, 4], [3, 5], [4, 6]])
    x, y = PixelEncoder().encode(images), WordEncoder().encode(flat)
    want = Ridge(alpha=0.1).fit(x, y, pairs).transform_images(x)
    matcher = make(space=Ridge(alpha=0.1))
    with pytest.raises(RuntimeError, match="fit"):
        matcher.match(images, TEXTS)
    assert matcher.fit(images, nested) is matcher
    np.testing.assert_array_equal(matcher.embed_images(images), want)
    # An unreadable image takes its own texts along, and nobody else's.
    mixed, texts = [*images[:2], broken[1], *images[2:]], [*nested[:2], ["lost", "words"], *nested[2:]]
    other = make(space=Ridge(alpha=0.1)).fit(mixed, texts, on_error="skip")
    np.testing.assert_array_equal(other.embed_images(images), want)
    with pytest.raises(UnreadableInputError):
        make(space=Ridge()).fit(mixed, texts)


def test_fit_refuses_what_does_not_belong_together(images: list[Path]) -> None:
    with pytest.raises(ValueError, match="one entry for each of 5 images, got 2"):
        make(space=Ridge()).fit(images, TEXTS[:2])
    with pytest.raises(ValueError, match=r"texts\[1\] is empty: image '.*image1.png'"):
        make(space=Ridge()).fit(images, ["a", [], "b", "c", "d"])
    with pytest.raises(ValueError, match="space is None"):
        make().fit(images, TEXTS[:5])


def test_wrong_parts_are_refused(images: list[Path]) -> None:
    with pytest.raises(ValueError, match="image_encoder must encode images, but 'words'"):
        ImageTextMatcher(WordEncoder(), WordEncoder())
    with pytest.raises(TypeError, match="text_encoder must be an encoder"):
        ImageTextMatcher(PixelEncoder(), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="metric must be one of"):
        make(metric="manhattan")
    with pytest.raises(TypeError, match="space must be"):
        make(space="ridge")
    with pytest.raises(TypeError, match="'pixels' has no classify"):
        make(space=ConSE(np.eye(4, dtype=np.float32)))
    narrow = WordEncoder()
    narrow.encode = lambda items, **_: np.ones((len(items), 3), np.float32)  # type: ignore[method-assign,assignment]
    with pytest.raises(ValueError, match=r"4 dimensions \(pixels\) and texts 3 \(words\): pass a space"):
        ImageTextMatcher(PixelEncoder(), narrow).match(images, TEXTS)


def test_conse_gets_probabilities(images: list[Path]) -> None:
    class Classifier(PixelEncoder):
        def classify(self, items: Any, **options: Any) -> np.ndarray:
            features = self.encode(items) + 0.1
            return np.asarray(features / features.sum(axis=1, keepdims=True), np.float32)

    embeddings = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
    matcher = ImageTextMatcher(Classifier(), WordEncoder(), ConSE(embeddings, top=4))
    want = Classifier().classify(images).astype(np.float64) @ embeddings
    np.testing.assert_allclose(matcher.embed_images(images), want, rtol=1e-5, atol=1e-6)


def test_a_second_run_encodes_nothing_and_an_interrupted_one_goes_on(images: list[Path]) -> None:
    cache = images[0].parent / "cache"

    class Interrupted(PixelEncoder):
        def encode(self, items: Any, **options: Any) -> np.ndarray:
            if sum(self.calls) >= 4:
                raise KeyboardInterrupt
            return super().encode(items, **options)

    with pytest.raises(KeyboardInterrupt):
        ImageTextMatcher(Interrupted(), WordEncoder(), cache=cache, batch_size=2).match(images, TEXTS)
    resumed = make(cache=cache, batch_size=2)
    found = resumed.match(images, TEXTS)
    assert sum(resumed.image_encoder.calls) == 1  # type: ignore[attr-defined]  # the fifth
    again = make(cache=cache)
    want = again.match(images, TEXTS)
    assert again.image_encoder.calls == []  # type: ignore[attr-defined]
    assert again.text_encoder.calls == []  # type: ignore[attr-defined]
    np.testing.assert_array_equal(found.image_to_text.scores, want.image_to_text.scores)
    np.testing.assert_array_equal(want.image_to_text.scores, make().match(images, TEXTS).image_to_text.scores)


def test_fit_leaves_a_text_encoder_that_was_fitted_already(images: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("safetensors")
    from pycm.text import BagOfWords

    words = BagOfWords().fit(["red green blue dark", "another corpus"])
    before = list(words.words)
    matcher = ImageTextMatcher(PixelEncoder(), words, Ridge()).fit(images, TEXTS[:5])
    assert words.words == before
    fresh = BagOfWords()
    other = ImageTextMatcher(PixelEncoder(), fresh, Ridge()).fit(images, TEXTS[:5])
    assert "wall" in fresh.words
    other.fit(images, ["one", "two", "three", "four", "five"])  # its own to fit: again
    assert "wall" not in fresh.words
    for name, one in (("kept", matcher), ("own", other)):
        one.save(tmp_path / name)
        loaded = ImageTextMatcher.load(tmp_path / name, image_encoder=PixelEncoder())
        loaded.fit(images, ["six", "seven", "eight", "nine", "ten"])
        assert ("ten" in loaded.text_encoder.words) == (name == "own")  # type: ignore[attr-defined]


def test_hubness_correction_does_not_go_with_pearson() -> None:
    with pytest.raises(ValueError, match="'pearson' does not keep the order of HubnessCorrection"):
        make(space=HubnessCorrection(Ridge()), metric="pearson")
