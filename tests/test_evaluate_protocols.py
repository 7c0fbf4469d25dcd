"""Protocols against the originals' definitions, restated here from their scripts' meaning, on random data with ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pycm.evaluate import (
    CrossModalMetrics,
    RetrievalMetrics,
    coco_1k,
    coco_5k,
    five_captions,
    multi_caption_video,
    one_to_one,
    protocols,
    retrieval_metrics,
)

KS = (1, 5, 10)


def summary(ranks: Any, median: Callable[[Any], float]) -> dict[str, float]:
    ranks = np.asarray(ranks, np.float64)
    out = {f"R{k}": np.mean(ranks == 0) if k == 1 else np.mean(ranks < k) for k in KS}
    return {**out, "median": median(ranks), "mean": np.mean(ranks) + 1}


def of(metrics: RetrievalMetrics) -> dict[str, float]:
    out = {f"R{k}": metrics.recall_at_k[k] for k in KS}
    return {**out, "median": metrics.median_rank, "mean": metrics.mean_rank}


def floored(ranks: Any) -> float:
    return float(np.floor(np.median(ranks)) + 1)


def plain(ranks: Any) -> float:
    return float(np.median(ranks) + 1)


def assert_both(got: CrossModalMetrics, to_text: dict[str, float], to_visual: dict[str, float]) -> None:
    assert of(got.visual_to_text) == pytest.approx(to_text, abs=1e-12)
    assert of(got.text_to_visual) == pytest.approx(to_visual, abs=1e-12)


def scores_of(seed: int, shape: tuple[int, int], levels: int | None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) if levels is None else rng.integers(0, levels, shape).astype(np.float64)


# ---- the originals ----


def vsepp(sims: np.ndarray, captions: int) -> tuple[dict[str, float], dict[str, float]]:
    """i2t: where an image's best caption comes in the reversed argsort; t2i: where its image comes."""
    to_text, to_image = [], []
    for i, row in enumerate(sims):
        order = list(np.argsort(row)[::-1])
        to_text.append(min(order.index(j) for j in range(captions * i, captions * (i + 1))))
    for j, row in enumerate(sims.T):
        to_image.append(list(np.argsort(row)[::-1]).index(j // captions))
    return summary(to_text, floored), summary(to_image, floored)


@pytest.mark.parametrize("levels", [None, 6, 1])
@pytest.mark.parametrize("captions", [5, 3])
def test_vsepp(levels: int | None, captions: int) -> None:
    sims = scores_of(1, (24, 24 * captions), levels)
    got = five_captions(sims, captions=captions, strict_compat=True)
    assert_both(got, *vsepp(sims, captions))
    assert np.isnan(got.visual_to_text.map)
    named = multi_caption_video(sims, np.arange(24 * captions) // captions, strict_compat="vsepp")
    assert of(named.visual_to_text) == of(got.visual_to_text)


def test_five_captions_differ_from_vsepp_in_the_median_alone_without_ties() -> None:
    sims = scores_of(2, (24, 120), None)
    ours, theirs = five_captions(sims), five_captions(sims, strict_compat=True)
    for mine, its in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine.ranks, its.ranks)
        assert mine.recall_at_k == its.recall_at_k
        assert its.median_rank == np.floor(mine.median_rank)
    assert any(mine.median_rank != its.median_rank for mine, its in zip(ours, theirs, strict=True))
    assert ours.rsum == theirs.rsum
    assert ours.rsum == pytest.approx(100 * sum(sum(side.recall_at_k.values()) for side in ours))


@pytest.mark.parametrize("levels", [None, 4, 1])
def test_open_clip(levels: int | None) -> None:
    sims = scores_of(3, (31, 31), levels)

    def ranks(rows: np.ndarray) -> list[int]:
        return [int(np.flatnonzero(np.argsort(-row, kind="stable") == i)[0]) for i, row in enumerate(rows)]

    got = one_to_one(sims, strict_compat=True)
    assert_both(got, summary(ranks(sims), floored), summary(ranks(sims.T), floored))


@pytest.mark.parametrize("levels", [None, 4, 1])
def test_clip4clip_one_caption(levels: int | None) -> None:
    sims = scores_of(4, (20, 20), levels)

    def entries(rows: np.ndarray) -> np.ndarray:
        """Columns where the sorted row equals the diagonal: a tied query enters more than once."""
        return np.where(np.sort(-rows, axis=1) - np.diag(-rows)[:, None] == 0)[1]

    got = one_to_one(sims, strict_compat="clip4clip")
    assert_both(got, summary(entries(sims), plain), summary(entries(sims.T), plain))
    if levels == 1:
        assert len(got.visual_to_text.ranks) == 400


OWNER = np.array([0, 1, 1, 1, 2, 2, 3, 4, 4, 4, 4, 5, 6, 6, 7, 3, 0, 7])  # in any order, uneven


@pytest.mark.parametrize("levels", [None, 4, 1])
def test_clip4clip_several_captions(levels: int | None) -> None:
    torch = pytest.importorskip("torch")
    sims = scores_of(7, (8, len(OWNER)), levels)
    most = np.bincount(OWNER).max()
    padded = np.full((8, most, 8), -np.inf)  # video, caption, video
    for v in range(8):
        padded[v, : (v == OWNER).sum()] = sims[:, v == OWNER].T
    cube = torch.tensor(padded)
    order = torch.argsort(torch.argsort(cube, dim=-1, descending=True, stable=True), dim=-1)
    ranks = torch.stack([order[v, :, v] for v in range(8)])[~torch.isinf(cube[:, :, 0])]
    to_video = summary(ranks.numpy(), lambda r: float(torch.median(torch.tensor(r) + 1)))
    assert levels == 1 or to_video["median"] < np.median(ranks.numpy()) + 1  # it is the lower of the middle two
    best = cube.max(dim=1).values.T.numpy()  # video, best caption of a video
    entries = np.where(np.sort(-best, axis=1) - np.diag(-best)[:, None] == 0)[1]
    got = multi_caption_video(sims, OWNER, strict_compat="clip4clip")
    assert_both(got, summary(entries, plain), to_video)


@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("original", ["mmt", "frozen"])
def test_mmt_and_frozen(levels: int | None, original: Any) -> None:
    sims = scores_of(6, (8, len(OWNER)), levels)

    def places(row: np.ndarray, j: int) -> np.ndarray:
        return np.flatnonzero(np.sort(-row) == -row[j])

    pick = np.mean if original == "mmt" else np.min
    to_video = [pick(places(column, v)) for column, v in zip(sims.T, OWNER, strict=True)]
    to_text = [min(places(row, j).mean() for j in np.flatnonzero(v == OWNER)) for v, row in enumerate(sims)]
    got = multi_caption_video(sims, OWNER, strict_compat=original)
    assert_both(got, summary(to_text, plain), summary(to_video, plain))
    if original == "mmt":
        assert of(multi_caption_video(sims, OWNER, strict_compat=True).visual_to_text) == of(got.visual_to_text)
    elif levels == 1:
        assert got.text_to_visual.recall_at_k[1] == 1  # what the tie policy is for


def test_strict_embeddings_are_the_strict_matrix() -> None:
    rng = np.random.default_rng(7)
    videos, texts = (rng.integers(-2, 3, (n, 4)).astype(np.float32) for n in (8, len(OWNER)))
    for original in ("vsepp", "clip4clip", "mmt", "frozen"):
        got = multi_caption_video((videos, texts, "dot"), OWNER, strict_compat=original)
        expected = multi_caption_video(videos @ texts.T, OWNER, strict_compat=original)
        for mine, its in zip(got, expected, strict=True):
            np.testing.assert_array_equal(mine.ranks, its.ranks)


# ---- pycm's own ----


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
def test_directions_are_retrieval_metrics(metric: Any) -> None:
    rng = np.random.default_rng(8)
    videos, texts = (rng.integers(-2, 3, (n, 4)).astype(np.float32) for n in (8, len(OWNER)))
    matrix = videos @ texts.T if metric == "dot" else -((videos[:, None] - texts[None]) ** 2).sum(-1)
    positives = [np.flatnonzero(v == OWNER) for v in range(8)]
    for ties in ("realistic", "pessimistic"):
        expected = (
            retrieval_metrics(matrix, positives, (1, 3), ties=ties),
            retrieval_metrics(matrix.T, OWNER, (1, 3), ties=ties),
        )
        for given in (matrix, (videos, texts, metric)):
            got = multi_caption_video(given, OWNER, ks=(1, 3), ties=ties)
            for mine, its in zip(got, expected, strict=True):
                for name, column in its.per_query.items():
                    np.testing.assert_array_equal(mine.per_query[name], column)


def test_constant_scores_are_chance_in_every_protocol() -> None:
    for got, captions in (
        (one_to_one(np.zeros((40, 40))), 40),
        (five_captions(np.ones((40, 200))), 200),
        (multi_caption_video(np.ones((8, len(OWNER))), OWNER, ks=KS), len(OWNER)),
    ):
        n = len(got.visual_to_text.ranks)
        assert got.text_to_visual.recall_at_k == {k: pytest.approx(min(1.0, k / n)) for k in KS}
        assert got.text_to_visual.median_rank == pytest.approx((n + 1) / 2)
        several = len(got.text_to_visual.ranks) / n
        assert got.visual_to_text.recall_at_k[1] == pytest.approx(several / captions)


def test_folds() -> None:
    sims = scores_of(9, (60, 180), 9)
    got = protocols._captions("folds", sims, 3, 5, KS, "realistic", False)
    strict = protocols._captions("folds", sims, 3, 5, KS, "realistic", True)
    for given, compat in ((got, False), (strict, True)):
        parts = [
            five_captions(sims[12 * i : 12 * i + 12, 36 * i : 36 * i + 36], captions=3, strict_compat=compat)
            for i in range(5)
        ]
        for side in range(2):
            mean = {name: np.mean([of(part[side])[name] for part in parts]) for name in of(parts[0][side])}
            assert of(given[side]) == pytest.approx(mean)
            np.testing.assert_array_equal(given[side].ranks, np.concatenate([part[side].ranks for part in parts]))
            assert [of(fold) for fold in given[side].folds] == [of(part[side]) for part in parts]
        assert given.rsum == pytest.approx(np.mean([part.rsum for part in parts]))
    assert got.visual_to_text.map == pytest.approx(got.visual_to_text.per_query["map"].mean())
    assert got.visual_to_text.ndcg_at_k[5] == pytest.approx(got.visual_to_text.per_query["ndcg@5"].mean())


def test_coco() -> None:
    """5000 images by 25000 captions, which no matrix is made of; integers, so that any product is exact."""
    rng = np.random.default_rng(10)
    captions = rng.integers(-50, 51, (25000, 8)).astype(np.float32)
    images = captions.reshape(5000, 5, 8).sum(axis=1)

    def counts(rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """(above, level) of each caption's image among the images of the rows."""
        matrix = captions[columns] @ images[rows].T
        own = matrix[np.arange(len(matrix)), np.arange(len(matrix)) // 5][:, None]
        return (matrix > own).sum(1), (matrix == own).sum(1) - 1

    folds = [
        np.add(
            *(
                x / y
                for x, y in zip(
                    counts(slice(1000 * i, 1000 * i + 1000), slice(5000 * i, 5000 * i + 5000)), (1, 2), strict=True
                )
            )
        )
        for i in range(5)
    ]
    got = coco_1k((images, captions, "dot"))
    np.testing.assert_array_equal(got.text_to_visual.ranks, np.concatenate(folds))
    assert got.text_to_visual.median_rank == pytest.approx(np.mean([np.median(r) + 1 for r in folds]))
    whole = coco_5k((images, captions, "dot"))
    above, level = counts(slice(0, 5000), slice(0, 2000))
    np.testing.assert_array_equal(whole.text_to_visual.ranks[:2000], above + level / 2)
    assert whole.rsum < got.rsum


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: one_to_one(np.zeros((2, 3))), ValueError, "one_to_one: scores must have as many rows as columns"),
        (lambda: five_captions(np.zeros((2, 9))), ValueError, r"shape \[N, 5 N\], got \[2, 9\]"),
        (lambda: coco_1k(np.zeros((10, 50))), ValueError, r"coco_1k: scores must have shape \[5000, 25000\]"),
        (lambda: coco_5k(np.zeros((10, 50))), ValueError, r"coco_5k: scores must have shape \[5000, 25000\]"),
        (lambda: multi_caption_video(np.zeros((2, 3)), [0, 1]), ValueError, r"owner must have shape \[3\], got \[2\]"),
        (lambda: multi_caption_video(np.zeros((2, 3)), [0, 1, 2]), ValueError, r"owner must be in \[0, 1\]"),
        (lambda: multi_caption_video(np.zeros((2, 3)), [0, 0, 0]), ValueError, "1 has no caption"),
        (lambda: multi_caption_video(np.zeros((2, 3)), [0.0, 1, 1]), TypeError, "owner must be integers, got float64"),
        (lambda: five_captions(np.zeros((2, 10)), strict_compat="open_clip"), ValueError, "got 'open_clip'"),
        (lambda: five_captions(np.full((2, 10), np.nan)), ValueError, "five_captions: row 0 of the scores has a NaN"),
        (lambda: five_captions(np.full((2, 10), np.nan), strict_compat=True), ValueError, "row 0 .* has a NaN"),
        (lambda: one_to_one(np.eye(3), ks=(1,)).rsum, ValueError, "ks must include 1, 5 and 10"),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
