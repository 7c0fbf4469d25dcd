"""pycm.compat's image–text metrics against their published definitions, restated in compat_oracles.py."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from compat_oracles import five_numbers, image_to_text, text_to_image

from pycm.compat import scan, vse_infty, vsepp

KINDS = ["random", "few values", "duplicates", "constant"]


def embeddings(kind: str, images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """[5N, D] images, each five times, and [5N, D] captions; sums of small integers are exact in any order."""
    rng = np.random.default_rng(seed)
    if kind == "random":
        pictures = rng.standard_normal((images, 12))
        return np.repeat(pictures, 5, axis=0), np.repeat(pictures, 5, axis=0) + 1.5 * rng.standard_normal(
            (5 * images, 12)
        )
    if kind == "few values":  # many ties of rows that differ
        return np.repeat(rng.integers(-1, 2, (images, 4)), 5, axis=0) * 1.0, rng.integers(-1, 2, (5 * images, 4)) * 1.0
    if kind == "duplicates":
        pictures = rng.integers(-3, 4, (images // 3 + 1, 6))[rng.integers(0, images // 3 + 1, images)]
        noise = rng.integers(-2, 3, (5 * images // 2 + 1, 6))[rng.integers(0, 5 * images // 2 + 1, 5 * images)]
        return np.repeat(pictures, 5, axis=0) * 1.0, np.repeat(pictures, 5, axis=0) * 1.0 + noise
    return np.ones((5 * images, 3)), np.ones((5 * images, 3))


def order_scores(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """[N, M]: minus the norm of what a caption has beyond an image."""
    beyond = np.maximum(captions[None] - images[:, None], 0).astype(np.float32)
    return -np.sqrt((beyond * beyond).sum(axis=2))


def check(found: Any, ranks: list[int], tops: list[int]) -> None:
    summary, (found_ranks, found_tops) = found
    assert isinstance(summary, tuple)
    assert len(summary) == 5
    assert found_ranks.dtype == found_tops.dtype == np.float64
    np.testing.assert_array_equal(found_ranks, ranks)
    np.testing.assert_array_equal(found_tops, tops)
    np.testing.assert_allclose(summary, five_numbers(ranks), rtol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("images", [1, 7, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vsepp(kind: str, images: int, dtype: type) -> None:
    pictures, captions = (x.astype(dtype) for x in embeddings(kind, images))
    scores = pictures[::5] @ captions.T
    check(vsepp.i2t(pictures, captions, return_ranks=True), *image_to_text(scores))
    check(vsepp.t2i(pictures, captions, return_ranks=True), *text_to_image(scores.T))
    assert vsepp.i2t(pictures, captions) == vsepp.i2t(pictures, captions, return_ranks=True)[0]
    assert vsepp.t2i(pictures, captions) == vsepp.t2i(pictures, captions, return_ranks=True)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_vsepp_order_embeddings(kind: str) -> None:
    pictures, captions = (np.abs(x) for x in embeddings(kind, 23))
    scores = order_scores(pictures[::5], captions)
    check(vsepp.i2t(pictures, captions, measure="order", return_ranks=True), *image_to_text(scores))
    check(vsepp.t2i(pictures, captions, measure="order", return_ranks=True), *text_to_image(scores.T))


@pytest.mark.parametrize("measure", ["cosine", "order"])
def test_vsepp_first_images_only(measure: str) -> None:
    pictures, captions = embeddings("random", 20)
    scores = pictures[::5] @ captions.T if measure == "cosine" else order_scores(pictures[::5], captions)
    check(vsepp.i2t(pictures, captions, 8, measure, True), *image_to_text(scores[:8]))
    check(vsepp.t2i(pictures, captions, 8, measure, True), *text_to_image(scores.T[:40]))


def test_vsepp_on_numpys_own_sort() -> None:
    # Without ties the published argsort()[::-1] has one answer, whatever NumPy's algorithm.
    pictures, captions = embeddings("random", 60, seed=3)
    ranks = [
        min(np.flatnonzero(np.argsort(pictures[5 * i] @ captions.T)[::-1] == c)[0] for c in range(5 * i, 5 * i + 5))
        for i in range(60)
    ]
    np.testing.assert_array_equal(vsepp.i2t(pictures, captions, return_ranks=True)[1][0], ranks)


def test_a_collapsed_model_gets_no_good_number() -> None:
    pictures, captions = embeddings("constant", 50)
    assert vsepp.i2t(pictures, captions)[0] == 2  # the last image's caption comes first for everyone
    assert vsepp.t2i(pictures, captions)[0] == 2


@pytest.mark.parametrize("function", [vsepp.i2t, vsepp.t2i])
@pytest.mark.parametrize("measure", ["cosine", "order"])
@pytest.mark.parametrize("side", [0, 1])
def test_vsepp_nan(function: Any, measure: str, side: int) -> None:
    pair = embeddings("random", 10)
    pair[side][5, 3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        function(*pair, measure=measure)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("images", [1, 30])
def test_scan_and_vse_infty(kind: str, images: int) -> None:
    pictures, captions = embeddings(kind, images, seed=1)
    scores = pictures[::5] @ captions.T
    before = scores.copy()
    expected_i2t, expected_t2i = image_to_text(scores), text_to_image(scores.T)
    regions, words = np.zeros((images, 36, 2)), np.zeros((5 * images, 9, 2))
    check(scan.i2t(regions, words, [9] * 5 * images, scores, return_ranks=True), *expected_i2t)
    check(scan.t2i(regions, words, [9] * 5 * images, scores, return_ranks=True), *expected_t2i)
    check(vse_infty.i2t(images, scores, return_ranks=True), *expected_i2t)
    check(vse_infty.t2i(images, scores, return_ranks=True), *expected_t2i)
    assert scan.i2t(regions, words, None, scores) == vse_infty.i2t(images, scores) == vsepp.i2t(pictures, captions)
    assert scan.t2i(regions, words, None, scores) == vse_infty.t2i(images, scores) == vsepp.t2i(pictures, captions)
    np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize("kind", ["random", "few values", "constant"])
def test_vse_infty_one_caption_per_image(kind: str) -> None:
    pictures, captions = embeddings(kind, 30, seed=2)
    scores = pictures[::5] @ captions[::5].T
    check(vse_infty.i2t(30, scores, return_ranks=True, mode="f30k"), *image_to_text(scores, 1))
    check(vse_infty.t2i(30, scores, True, "f30k"), *text_to_image(scores.T, 1))
    check(vse_infty.i2t(12, scores, True, "f30k"), *image_to_text(scores[:12], 1))


def test_infinite_and_missing_scores() -> None:
    scores = np.random.default_rng(4).standard_normal((6, 30))
    scores[0, :] = -np.inf
    scores[1, 7], scores[2, :10] = np.inf, np.inf
    check(vse_infty.i2t(6, scores, True), *image_to_text(scores))
    check(vse_infty.t2i(6, scores, True), *text_to_image(scores.T))
    scores[3, 20] = np.nan
    for call in (lambda: vse_infty.i2t(6, scores), lambda: scan.t2i(np.zeros(6), None, None, scores)):
        with pytest.raises(ValueError, match=r"NaN for query (3|20)"):
            call()


def test_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, captions = embeddings("few values", 33)
    scores = pictures[::5] @ captions.T

    def every() -> list[Any]:
        return [
            vse_infty.i2t(33, scores, True),
            vsepp.i2t(pictures, captions, return_ranks=True),
            vsepp.t2i(pictures, captions, measure="order", return_ranks=True),
        ]

    whole = every()
    monkeypatch.setattr("pycm.compat._retrieval._BLOCK_SCORES", 500)
    parts = every()
    for one, other in zip(whole, parts, strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (vsepp.i2t, "images captions npts measure return_ranks"),
        (vsepp.t2i, "images captions npts measure return_ranks"),
        (scan.i2t, "images captions caplens sims npts return_ranks"),
        (scan.t2i, "images captions caplens sims npts return_ranks"),
        (vse_infty.i2t, "npts sims return_ranks mode"),
        (vse_infty.t2i, "npts sims return_ranks mode"),
    ],
)
def test_signatures(function: Any, names: str) -> None:
    assert list(inspect.signature(function).parameters) == names.split()
