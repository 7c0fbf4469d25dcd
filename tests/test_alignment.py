"""CORAL, ITQ and mutual neighbours against their definitions, and in ImageTextMatcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import DISTANCES, METRICS

import pycm
from pycm import ImageTextMatcher, mining, reference
from pycm.spaces import CORAL, ITQ, Ridge, load_space, pack_codes, unpack_codes


def rows(seed: int, n: int, dim: int) -> Any:
    return np.random.default_rng(seed).standard_normal((n, dim))


# ---- CORAL ----


def test_coral_gives_the_source_the_targets_moments() -> None:
    source = rows(0, 500, 6) @ rows(1, 6, 6) + 3
    target = rows(2, 400, 6) @ rows(3, 6, 6) - 1
    moved = CORAL(reg=1e-9).fit(source, target).transform(source)
    assert moved.dtype == np.float32
    np.testing.assert_allclose(moved.mean(0), target.mean(0), atol=1e-5)
    np.testing.assert_allclose(np.cov(moved.T), np.cov(target.T), rtol=1e-4, atol=1e-4)
    shifted = CORAL("mean").fit(source, target).transform(source)
    np.testing.assert_allclose(shifted, source - source.mean(0) + target.mean(0), rtol=1e-5, atol=1e-5)


def test_coral_is_the_formula() -> None:
    from scipy.linalg import fractional_matrix_power

    source, target, reg = rows(0, 9, 12), 2 * rows(1, 15, 12), 0.3  # fewer rows than dimensions
    roots = []
    for x, power in ((source, -0.5), (target, 0.5)):
        covariance = np.cov(x.T)
        regular = covariance + reg * np.trace(covariance) / 12 * np.eye(12)
        roots.append(fractional_matrix_power(regular, power))
    wanted = (rows(2, 5, 12) - source.mean(0)) @ roots[0] @ roots[1] + target.mean(0)
    np.testing.assert_allclose(CORAL(reg=reg).fit(source, target).transform(rows(2, 5, 12)), wanted, rtol=1e-5)


def test_coral_of_equal_domains_changes_nothing() -> None:
    x = rows(0, 50, 5)
    np.testing.assert_allclose(CORAL().fit_transform(x, x), x, rtol=1e-5, atol=1e-6)
    constant = np.ones((4, 3))
    assert np.isfinite(CORAL().fit_transform(constant, constant)).all()


# ---- ITQ ----


def paired(seed: int, n: int = 300) -> tuple[Any, Any]:
    hidden = rows(seed, n, 8)
    maps = [rows(100 + i, 8, 16) for i in range(2)]
    return tuple(hidden @ m + 0.1 * rows(seed + 10 * i, n, 16) for i, m in enumerate(maps))  # type: ignore[return-value]


def test_itq_codes_rank_by_hamming_distance(tmp_path: Path) -> None:
    images, texts = paired(0)
    space = ITQ(Ridge(), bits=12).fit(images, texts)
    a, b = space.transform_images(images), space.transform_texts(texts)
    assert set(np.unique(a)) == {-1.0, 1.0}
    assert a.shape == (300, 12)
    hamming = np.unpackbits(pack_codes(a)[:, None] ^ pack_codes(b), axis=2).sum(2)
    wanted = np.argsort(hamming, axis=1, kind="stable")[:, :7]
    found = pycm.topk(a, b, 7, "dot")
    np.testing.assert_array_equal(found.indices, wanted)
    np.testing.assert_array_equal((12 - found.scores) / 2, np.take_along_axis(hamming, wanted, 1))
    np.testing.assert_array_equal(pycm.Gallery(b, metric="dot").topk(a, 7).ids, wanted)
    np.testing.assert_array_equal(unpack_codes(pack_codes(a), 12), a)
    space.save(tmp_path / "space")
    np.testing.assert_array_equal(load_space(tmp_path / "space").transform_images(images), a)


def test_itq_keeps_what_the_space_knows() -> None:
    images, texts = paired(0)
    space = ITQ(Ridge(), bits=16).fit(images[:200], texts[:200])
    a, b = space.transform_images(images[200:]), space.transform_texts(texts[200:])
    ranks = pycm.rank(a, b, np.arange(100), "dot")
    assert np.mean(np.asarray(ranks.ranks) < 10) > 0.9  # 0.1 by chance


def test_itq_rotation_lowers_the_loss() -> None:
    images, texts = paired(1)

    def loss(iterations: int) -> float:
        space = ITQ(Ridge(), bits=8, iterations=iterations).fit(images, texts)
        projection = space._arrays["projection"]
        np.testing.assert_allclose(projection.T @ projection, np.eye(8), atol=1e-9)
        x = space.space.transform_images(images)
        x = x / np.linalg.norm(x, axis=1, keepdims=True) - space._arrays["image_mean"]
        return float(((np.where(x @ projection >= 0, 1, -1) - x @ projection) ** 2).sum())

    assert loss(50) < 0.99 * loss(1)


# ---- mutual neighbours ----


@pytest.mark.parametrize("metric", METRICS)
def test_mutual_neighbours(metric: Any) -> None:
    random = np.random.default_rng(0)
    for n, m, k in ((1, 1, 1), (40, 30, 1), (40, 30, 4), (8, 50, 8)):
        x, y = (random.integers(-2, 3, (size, 3)).astype(np.float32) for size in (n, m))  # ties
        if n > 5:
            x[3] = np.nan
        scores = reference.similarity(x, y, metric).astype(np.float32)
        there, back = reference.topk(x, y, k, metric), reference.topk(y, x, k, metric)
        limit = float(np.nanmedian(scores))
        wanted = [
            (i, j)
            for i in range(n)
            for j in range(m)
            if j in there.indices[i] and i in back.indices[j]
            and (scores[i, j] <= limit if metric in DISTANCES else scores[i, j] >= limit)
        ]  # fmt: skip
        found = mining.mutual_neighbours(
            x, y, k, metric=metric, **{"max_distance" if metric in DISTANCES else "min_score": limit}
        )
        assert list(zip(found.query_rows.tolist(), found.indices.tolist(), strict=True)) == wanted
        np.testing.assert_array_equal(found.scores, [scores[pair] for pair in wanted])


def test_mutual_neighbours_of_tensors() -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    found = mining.mutual_neighbours(x, x)
    assert torch.equal(found.query_rows, torch.arange(20))
    assert torch.equal(found.indices, torch.arange(20))


# ---- in the matcher ----


class Fixed:
    """Features by name."""

    fingerprint = "0" * 64

    def __init__(self, modality: Any, table: dict[str, Any]) -> None:
        self.modality, self.table, self.name = modality, table, f"fixed {modality}s"
        self.dim = len(next(iter(table.values())))

    def encode(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> Any:
        return np.array([self.table[item] for item in items], np.float32)


def named(letter: str, features: Any) -> dict[str, Any]:
    return {f"{letter}{i}": row for i, row in enumerate(features)}


def recall(matcher: Any, images: list[str], texts: list[str]) -> float:
    return float(matcher.evaluate(images, texts, ks=(1,)).image_to_text.recall_at_k[1])


def test_target_images_align_the_training_features() -> None:
    images, texts = paired(2)
    shifted = images @ np.diag(np.linspace(0.2, 3, 16)) + 4  # the other domain
    encoders = Fixed("image", named("s", images) | named("t", shifted)), Fixed("text", named("x", texts))
    names = {letter: [f"{letter}{i}" for i in range(300)] for letter in "stx"}
    test = [names[letter][200:] for letter in "tx"]
    found = []
    for target in (None, names["t"][100:200]):
        matcher = ImageTextMatcher(*encoders, Ridge())
        matcher.fit(names["s"][:100], names["x"][:100], target_images=target)
        found.append(recall(matcher, *test))
    assert found[1] > found[0] + 0.2


def test_pseudo_pairs_help_where_few_are_labelled() -> None:
    images, texts = paired(3)
    encoders = Fixed("image", named("i", images)), Fixed("text", named("x", texts))
    i, x = ([f"{letter}{n}" for n in range(300)] for letter in "ix")
    shuffled = list(np.random.default_rng(0).permutation(x[12:200]))
    found = []
    for options in ({}, {"unlabelled": (i[12:200], shuffled), "threshold": 0.6}):
        matcher = ImageTextMatcher(*encoders, Ridge())
        matcher.fit(i[:12], x[:12], **options)  # type: ignore[arg-type]
        found.append(recall(matcher, i[200:], x[200:]))
    assert found[1] > found[0] + 0.1


# ---- errors ----

X = np.zeros((3, 4), np.float32)
WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: CORAL("whiten"), ValueError, "CORAL: method must be one of covariance, mean, got 'whiten'"),  # type: ignore[arg-type]
    (lambda: CORAL(reg=0), ValueError, "CORAL: reg must be a positive number, got 0"),
    (lambda: CORAL().fit(X, X[:, :2]), ValueError, "CORAL.fit: target must have 4 columns, got 2"),
    (lambda: CORAL().fit(X[:1], X), ValueError, "CORAL.fit: source must have at least 2 rows, got 1"),
    (lambda: CORAL().transform(X), RuntimeError, "CORAL.transform: not fitted"),
    (lambda: ITQ(None), TypeError, "ITQ: space must be a space of pycm, got NoneType"),  # type: ignore[arg-type]
    (lambda: ITQ(Ridge(), bits=0), ValueError, "ITQ: bits must be a positive int, got 0"),
    (lambda: ITQ(Ridge(), bits=99).fit(*paired(0)), ValueError, "bits must be at most the space's 16 dimensions"),
    (lambda: ITQ(Ridge()).transform_texts(X), RuntimeError, "ITQ.transform_texts: not fitted"),
    (lambda: mining.mutual_neighbours(X, X, 4), ValueError, r"mutual_neighbours: k must be in \[1, 3\], got 4"),
    (lambda: mining.mutual_neighbours(X, X, metric="no"), ValueError, "mutual_neighbours: metric must be one of"),  # type: ignore[arg-type]
    (lambda: mining.mutual_neighbours(X, X, max_distance=1), ValueError, "max_distance must be None for the metric"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_errors(case: int) -> None:
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()
