"""Images and texts that stand in several pairs: encoded once, and the pairs are what they were."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

from test_matchers_region import Cells, Words, statements  # noqa: E402
from tuning_cases import CellEncoder, WordNet, quarters  # noqa: E402

from pycm.encoders import UnreadableInputError  # noqa: E402
from pycm.encoders.images import load_image  # noqa: E402
from pycm.matchers import Boxes, RegionTextClassifier, region_classifier  # noqa: E402

PICTURES, _, _ = statements(12, 0)
ROWS = np.random.default_rng(3).integers(0, 12, 60)
_, TEXTS, TRUTH = statements(60, 1)
HALVES = [[0, 0, 8, 4], [0, 4, 8, 8]]
FIT: dict[str, Any] = {"epochs": 3, "batch_size": 16, "validation": 0.2}
Form = Callable[[Path], list[Any]]


def as_arrays(folder: Path) -> list[Any]:
    return [PICTURES[i].copy() for i in ROWS]


def as_boxes(folder: Path) -> list[Any]:
    """Two for an image, of which every third pair has the second alone."""
    return [Boxes(PICTURES[i], HALVES[n % 3 == 2 :]) for n, i in enumerate(ROWS)]


def as_paths(folder: Path) -> list[Any]:
    for i, picture in enumerate(PICTURES):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return [folder / f"{i}.png" if n % 2 else str(folder / f"{i}.png") for n, i in enumerate(ROWS)]


class CountingCells(Cells):
    """More features than are standardised at a time."""

    dim = 77

    def __init__(self) -> None:
        self.counts: list[int] = []

    def encode(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> Any:
        self.counts.append(len(items))
        return self._wide(super().encode(items))

    def encode_grid(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> Any:
        self.counts.append(len(items))
        return self._wide(super().encode_grid([load_image(item) for item in items])).reshape(len(items), -1)

    def _wide(self, rows: Any) -> Any:
        return np.tanh(rows.reshape(-1, 3) @ np.random.default_rng(0).normal(size=(3, 77)).astype(np.float32))


class CountingWords(Words):
    def __init__(self) -> None:
        self.counts: list[int] = []

    def encode_tokens(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> Any:
        self.counts.append(len(items))
        return super().encode_tokens(items)


def classifier() -> RegionTextClassifier:
    return RegionTextClassifier(CountingCells(), CountingWords(), dim=8, progress=False)  # type: ignore[arg-type]


def weights(model: RegionTextClassifier) -> dict[str, Any]:
    assert model._network is not None
    return {name: weight.numpy() for name, weight in model._network.state_dict().items()}


@pytest.mark.parametrize("form", [as_arrays, as_boxes, as_paths])
def test_each_image_and_text_is_encoded_once(form: Form, tmp_path: Path) -> None:
    items, model = form(tmp_path), classifier()
    pictures = len(np.unique(ROWS))
    if form is as_boxes:
        alone = np.arange(60) % 3 == 2
        pictures = 2 * len(np.unique(ROWS[~alone])) + len(np.unique(ROWS[alone]))
    images: Any = model.image_encoder
    texts: Any = model.text_encoder
    for call in (
        lambda: model.fit(items, TEXTS, TRUTH, **FIT),
        lambda: model.predict_proba(items, TEXTS),
        lambda: model.score(items, TEXTS, TRUTH),
    ):
        call()
        assert images.counts == [pictures]
        assert texts.counts == [len(set(TEXTS))]
        images.counts, texts.counts = [], []


@pytest.mark.parametrize("form", [as_arrays, as_boxes])
def test_the_bits_are_those_of_pairs_encoded_apart(form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items, apart = form(tmp_path), classifier()
    once = classifier().fit(items, TEXTS, TRUTH, **FIT)
    found = once.predict_proba(items, TEXTS)
    with monkeypatch.context() as patch:
        each = np.arange(60), np.arange(60)
        patch.setattr(region_classifier, "distinct_regions", lambda function, items: each)
        patch.setattr(region_classifier, "distinct", lambda keys: each)
        expected = apart.fit(items, TEXTS, TRUTH, **FIT).predict_proba(items, TEXTS)
    assert apart.text_encoder.counts == [60, 60]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(found, expected)
    assert once.history_[1:] == apart.history_[1:]
    for name, weight in weights(apart).items():
        np.testing.assert_array_equal(weights(once)[name], weight, err_msg=name)
    # What is standardised by counts an item as often as pairs have it.
    assert np.ptp(weights(once)["regions.standardize.mean"]) > 0


def test_a_trained_encoder_sees_an_image_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    images, _, texts = quarters(4, 0)
    rows = np.arange(24) % 4
    passes: list[int] = []
    original = CellEncoder._steps
    monkeypatch.setattr(
        CellEncoder, "_steps", lambda self, method, batch: (passes.append(len(batch)), original(self, method, batch))[1]
    )
    model = RegionTextClassifier(CellEncoder(), WordNet(), dim=8, progress=False)
    model.fit(
        [images[i] for i in rows], [texts[i] for i in rows], np.arange(24) % 3 == 0, fine_tune="all", epochs=2,
        batch_size=12, validation=0.5,
    )  # fmt: skip
    # A batch an epoch, and the held-out half before the first and after each: all of four images.
    assert passes == [4] * 5
    trained = model.encoders["image"].module.conv.weight
    assert (trained != model.image_encoder.module.conv.weight).any()  # type: ignore[attr-defined]


def test_a_checkpoint_is_of_these_pairs(tmp_path: Path) -> None:
    items = as_arrays(tmp_path)
    short = FIT | {"epochs": 1, "checkpoint": tmp_path}
    classifier().fit(items, TEXTS, TRUTH, **short)
    other = [*items[:-2], items[-1], items[-2]]
    with pytest.raises(ValueError, match="of a training on other data or with other options"):
        classifier().fit(other, TEXTS, TRUTH, **short)
    classifier().fit(items, TEXTS, TRUTH, **short)


def test_errors_name_the_place_that_was_given() -> None:
    class Broken(CountingCells):
        def encode_grid(self, items: Any, **options: Any) -> Any:
            rows = super().encode_grid(items)
            rows[-1] = np.nan
            return rows

    model = RegionTextClassifier(Broken(), Words(), dim=8, progress=False)  # type: ignore[arg-type]
    items = [PICTURES[0]] * 5 + [PICTURES[1]]
    with pytest.raises(ValueError, match=r"the features of image 'items\[5\]' hold NaN"):
        model.fit(items, TEXTS[:6], TRUTH[:6])
    with pytest.raises(TypeError, match=r"RegionTextClassifier.fit: items\[5\] must be a path, a PIL image or uint8"):
        model.fit([*items[:5], 3], TEXTS[:6], TRUTH[:6])
    with pytest.raises(ValueError, match=r"images\[5\] has no boxes"):
        model.fit([Boxes(item, HALVES) for item in items[:5]] + items[5:], TEXTS[:6], TRUTH[:6])
    with pytest.raises(ValueError, match=r"boxes of image 'items\[5\]' must have shape \[R, 4\], got \[3\]"):
        model.fit([*[Boxes(item, HALVES) for item in items[:5]], Boxes(items[5], [0, 1, 2])], TEXTS[:6], TRUTH[:6])
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(data, "PNG")
    cut = Image.open(io.BytesIO(data.getvalue()[:2000]))
    real = RegionTextClassifier(CellEncoder(), WordNet(), dim=8, progress=False)
    large = [np.zeros((32, 32, 3), np.uint8)] * 5
    with pytest.raises(UnreadableInputError, match=r"1 of 6 images cannot be read: items\[5\]"):
        real.fit([*large, cut], TEXTS[:6], TRUTH[:6])
