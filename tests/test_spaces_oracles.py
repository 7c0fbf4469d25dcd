"""Each space against scikit-learn, an explicit solution or a loop over its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pycm.spaces import CCA, ConSE, HubnessCorrection, Ridge
from pycm.spaces.base import BaseSpace

RNG = np.random.default_rng(0)
N, DI, DT = 60, 12, 7
LATENT = RNG.standard_normal((N, 5))
IMAGES = (LATENT @ RNG.standard_normal((5, DI)) + 0.3 * RNG.standard_normal((N, DI)) + 2).astype(np.float32)
TEXTS = (LATENT @ RNG.standard_normal((5, DT)) + 0.3 * RNG.standard_normal((N, DT)) - 1).astype(np.float32)
PROBABILITIES = RNG.dirichlet(np.ones(DI), N).astype(np.float32)

RAW: dict[str, Any] = {"image_norm": "none", "text_norm": "none"}

# Ridge


@pytest.mark.parametrize("n", [8, N])  # fewer and more rows than columns
@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_equals_sklearn(n: int, weighted: bool) -> None:
    from sklearn.linear_model import Ridge as Oracle

    weights = np.random.default_rng(2).uniform(0.1, 3, n) if weighted else None
    oracle = Oracle(alpha=2.5).fit(IMAGES[:n].astype(np.float64), TEXTS[:n], sample_weight=weights)
    space = Ridge(2.5, center=False, **RAW).fit(IMAGES[:n], TEXTS[:n], weights=weights)
    expected = oracle.predict(IMAGES.astype(np.float64))
    np.testing.assert_allclose(space.transform_images(IMAGES), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(space.transform_texts(TEXTS), TEXTS)

    centred = Ridge(2.5, **RAW).fit(IMAGES[:n], TEXTS[:n], weights=weights)
    mean = np.average(TEXTS[:n].astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(centred.transform_images(IMAGES), expected - mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(centred.transform_texts(TEXTS), TEXTS - mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_ridge_toward_the_identity_is_ridge_of_the_difference(kernel: Any) -> None:
    """Both sides standardised; what the one lacks of the other by scikit-learn's ridge of the difference."""
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.linear_model import Ridge as Oracle
    from sklearn.preprocessing import KernelCenterer

    draw = np.random.default_rng(3)
    x = draw.normal(size=(N, 9)) * draw.uniform(0.1, 4, 9) + 2
    y = 0.3 * x + 0.1 * x @ draw.normal(size=(9, 9)) - 1
    y[:, 4] = 7  # a constant feature divides nothing by zero
    space = Ridge(2.5, kernel=kernel, gamma=0.1, toward="identity", **RAW).fit(x[:40], y[:40])
    a, b = ((z - z[:40].mean(0)) / np.sqrt(z[:40].var(0) + 0.1 * z[:40].var(0).mean()) for z in (x, y))
    if kernel == "linear":
        more = Oracle(alpha=2.5).fit(a[:40], (b - a)[:40]).predict(a)
    else:
        gram = np.exp(-0.1 * ((a[:, None] - a[:40]) ** 2).sum(2))
        centre = KernelCenterer().fit(gram[:40])
        oracle = KernelRidge(alpha=2.5, kernel="precomputed").fit(centre.transform(gram[:40].copy()), (b - a)[:40])
        more = oracle.predict(centre.transform(gram.copy()))
    np.testing.assert_allclose(space.transform_images(x), a + more, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(space.transform_texts(y), b, rtol=1e-4, atol=1e-5)
    far = Ridge(1e9, toward="identity", **RAW).fit(x, x * 3 + 1)  # nothing but the identity is left
    np.testing.assert_allclose(far.transform_images(x), far.transform_texts(x * 3 + 1), atol=1e-5)


@pytest.mark.parametrize("toward", ["zero", "identity"])
def test_ridge_moves_rows_to_what_another_is_relative_to(toward: Any) -> None:
    one, other = (Ridge(toward=toward).fit(IMAGES[rows], IMAGES[rows] ** 2) for rows in (slice(0, 30), slice(20, N)))
    moved = one.moved_to(other, one.transform_texts(IMAGES))
    np.testing.assert_allclose(moved, other.transform_texts(IMAGES), rtol=1e-4, atol=1e-5)
    assert np.abs(moved - one.transform_texts(IMAGES)).max() > 1e-2


def test_ridge_rbf_equals_kernel_ridge_on_centred_kernel() -> None:
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.preprocessing import KernelCenterer

    x, new = IMAGES[:40].astype(np.float64), IMAGES[40:].astype(np.float64)
    gamma = 1 / x.var(axis=0).sum()
    kernel = lambda a, b: np.exp(-gamma * ((a[:, None] - b[None]) ** 2).sum(-1))  # noqa: E731
    centerer = KernelCenterer().fit(kernel(x, x))
    mean = TEXTS[:40].astype(np.float64).mean(axis=0)
    oracle = KernelRidge(alpha=0.1, kernel="precomputed")
    oracle.fit(centerer.transform(kernel(x, x)), TEXTS[:40] - mean)
    expected = oracle.predict(centerer.transform(kernel(new, x)))
    space = Ridge(0.1, kernel="rbf", **RAW).fit(IMAGES[:40], TEXTS[:40])
    np.testing.assert_allclose(space.transform_images(IMAGES[40:]), expected, rtol=1e-4, atol=1e-4)


def test_ridge_landmarks_span_the_kernel() -> None:
    """With landmarks the model is Nystroem's: ridge on k(x, L) K_LL^-1/2."""
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import Ridge as Oracle

    chosen = np.arange(9) * N // 9
    features = Nystroem(gamma=0.02, n_components=9).fit(IMAGES.astype(np.float64)[chosen])
    oracle = Oracle(alpha=0.3).fit(features.transform(IMAGES.astype(np.float64)), TEXTS)
    expected = oracle.predict(features.transform(IMAGES.astype(np.float64)))
    space = Ridge(0.3, kernel="rbf", gamma=0.02, landmarks=9, center=False, **RAW).fit(IMAGES, TEXTS)
    np.testing.assert_allclose(space.transform_images(IMAGES), expected, rtol=1e-4, atol=1e-4)


def test_ridge_pairs_and_weights_equal_repeated_rows() -> None:
    from sklearn.linear_model import Ridge as Oracle

    rng = np.random.default_rng(3)
    pairs = np.c_[rng.integers(0, 20, 90), rng.integers(0, N, 90)]
    weights = rng.uniform(0.5, 2, 90)
    oracle = Oracle(alpha=0.7).fit(IMAGES[pairs[:, 0]].astype(np.float64), TEXTS[pairs[:, 1]], sample_weight=weights)
    space = Ridge(0.7, center=False, **RAW).fit(IMAGES, TEXTS, pairs, weights=weights)
    expected = oracle.predict(IMAGES.astype(np.float64))
    np.testing.assert_allclose(space.transform_images(IMAGES), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [10, N])
@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_leave_one_out_is_really_leaving_out(n: int, weighted: bool) -> None:
    """The closed form against n fits, with two texts for image 0, which leave together."""
    pairs = np.r_[np.c_[np.arange(n), np.arange(n)], [[0, n - 1]]]
    weights = np.random.default_rng(4).uniform(0.5, 2, n + 1) if weighted else np.ones(n + 1)
    total = 0.0
    for i in range(n):
        kept, out = pairs[:, 0] != i, pairs[:, 0] == i
        fitted = Ridge(1.5, center=False, **RAW).fit(IMAGES, TEXTS, pairs[kept], weights=weights[kept])
        target = np.average(TEXTS[pairs[out, 1]].astype(np.float64), axis=0, weights=weights[out])
        error = ((fitted.transform_images(IMAGES[i : i + 1])[0] - target) ** 2).sum()
        total += weights[out].sum() * error
    space = Ridge(1.5, **RAW).fit(IMAGES, TEXTS, pairs, weights=weights)
    assert space.loo_error_ == pytest.approx(total / weights.sum(), rel=1e-5)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_ridge_auto_takes_the_least_leave_one_out_error(kernel: Any) -> None:
    auto = Ridge(kernel=kernel, **RAW).fit(IMAGES, TEXTS)
    for factor in (0.1, 0.5, 2, 10):
        other = Ridge(auto.alpha_ * factor, kernel=kernel, **RAW).fit(IMAGES, TEXTS)
        assert other.loo_error_ > auto.loo_error_
    again = Ridge(auto.alpha_, kernel=kernel, **RAW).fit(IMAGES, TEXTS)
    np.testing.assert_array_equal(again.transform_images(IMAGES), auto.transform_images(IMAGES))


def test_ridge_does_not_depend_on_units() -> None:
    one = Ridge(**RAW).fit(IMAGES, TEXTS).transform_images(IMAGES)
    two = Ridge(**RAW).fit(1000 * IMAGES, TEXTS).transform_images(1000 * IMAGES)
    np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-4)


def test_row_normalisations() -> None:
    from pycm._rows import normalize_rows

    x = np.array([[4.0, -9.0, 0.0], [0.0, 0.0, 0.0], [3e200, 4e200, 0.0]])
    np.testing.assert_allclose(normalize_rows(x, "power")[:2], [[2 / 13**0.5, -3 / 13**0.5, 0], [0, 0, 0]], rtol=1e-14)
    np.testing.assert_allclose(normalize_rows(x, "l2")[1:], [[0, 0, 0], [0.6, 0.8, 0]], rtol=1e-14)
    np.testing.assert_array_equal(normalize_rows(x, "none"), x)


# CCA


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(a[:, j], b[:, j])[0, 1] for j in range(a.shape[1])])


def test_cca_equals_sklearn_without_regularisation() -> None:
    from sklearn import cross_decomposition

    oracle = cross_decomposition.CCA(n_components=4, scale=False, tol=1e-10, max_iter=5000).fit(IMAGES, TEXTS)
    ox, oy = oracle.transform(IMAGES, TEXTS)
    space = CCA(4, reg=1e-12, power=0, **RAW).fit(IMAGES, TEXTS)
    x, y = space.transform_images(IMAGES), space.transform_texts(TEXTS)
    np.testing.assert_allclose(correlations(x, y), correlations(ox, oy), atol=1e-4)
    np.testing.assert_allclose(space.correlations_, correlations(ox, oy), atol=1e-4)
    np.testing.assert_allclose(np.abs(correlations(x, ox)), 1, atol=1e-3)
    np.testing.assert_allclose(np.abs(correlations(y, oy)), 1, atol=1e-3)
    np.testing.assert_allclose(np.cov(x.T, bias=True), np.eye(4), atol=1e-4)


def test_cca_solves_the_regularised_eigenproblem() -> None:
    """Hardoon et al.: Cxy Cyy^-1 Cyx w = rho^2 Cxx w, with regularised Cxx and Cyy; by scipy's eigh."""
    from scipy.linalg import eigh

    x, y = (a.astype(np.float64) - a.astype(np.float64).mean(axis=0) for a in (IMAGES, TEXTS))
    cxx, cyy, cxy = x.T @ x / N, y.T @ y / N, x.T @ y / N
    cxx += 0.05 * np.trace(cxx) * np.eye(DI)
    cyy += 0.2 * np.trace(cyy) * np.eye(DT)
    values, vectors = eigh(cxy @ np.linalg.solve(cyy, cxy.T), cxx)
    rho = np.sqrt(values[::-1][:DT])
    w = vectors[:, ::-1][:, :DT]  # scipy scales them so that w' Cxx w = 1
    space = CCA(reg=(0.05, 0.2), power=2, **RAW).fit(IMAGES, TEXTS)
    np.testing.assert_allclose(space.correlations_, rho, rtol=1e-6)
    got, expected = space.transform_images(IMAGES), x @ w * rho**2
    sign = np.sign((got * expected).sum(axis=0))
    np.testing.assert_allclose(got, expected * sign, rtol=1e-3, atol=1e-4)
    v = np.linalg.solve(cyy, cxy.T @ w) / rho
    np.testing.assert_allclose(space.transform_texts(TEXTS), y @ v * sign * rho**2, rtol=1e-3, atol=1e-4)


def test_cca_pairs_and_weights_equal_repeated_rows() -> None:
    rng = np.random.default_rng(5)
    pairs = np.c_[rng.integers(0, 25, 80), rng.integers(0, N, 80)]
    weights = rng.integers(1, 4, 80)
    repeated = np.repeat(pairs, weights, axis=0)
    direct = CCA(**RAW).fit(IMAGES[repeated[:, 0]], TEXTS[repeated[:, 1]])
    space = CCA(**RAW).fit(IMAGES, TEXTS, pairs, weights=weights)
    np.testing.assert_allclose(space.correlations_, direct.correlations_, rtol=1e-8)
    np.testing.assert_allclose(space.transform_images(IMAGES), direct.transform_images(IMAGES), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(space.transform_texts(TEXTS), direct.transform_texts(TEXTS), rtol=1e-4, atol=1e-5)


def test_cca_dim_is_a_prefix_and_power_a_weight() -> None:
    full, short = CCA().fit(IMAGES, TEXTS), CCA(3).fit(IMAGES, TEXTS)
    np.testing.assert_array_equal(short.correlations_, full.correlations_[:3])
    np.testing.assert_allclose(short.transform_images(IMAGES), full.transform_images(IMAGES)[:, :3], atol=1e-6)
    plain = CCA(power=0).fit(IMAGES, TEXTS)
    np.testing.assert_allclose(
        full.transform_texts(TEXTS), plain.transform_texts(TEXTS) * plain.correlations_, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"CCA.fit: dim must be at most 7 for these features, got 8"):
        CCA(8).fit(IMAGES, TEXTS)


# ConSE


def test_conse_is_the_formula() -> None:
    embeddings = np.random.default_rng(6).standard_normal((DI, DT))
    space = ConSE(embeddings, top=3)
    got = space.transform_images(PROBABILITIES)
    for row, p in zip(got, PROBABILITIES.astype(np.float64), strict=True):
        best = sorted(range(DI), key=lambda c: (-p[c], c))[:3]
        expected = sum(p[c] * embeddings[c] for c in best) / sum(p[c] for c in best)
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(space.transform_texts(TEXTS), TEXTS)


def test_conse_edges() -> None:
    space = ConSE(np.eye(4), top=2)
    p = np.array([[0.25, 0.25, 0.25, 0.25], [0, 0, 0, 0], [0, 1, 0, 0]])
    expected = [[0.5, 0.5, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    np.testing.assert_array_equal(space.transform_images(p), expected)
    all_classes = ConSE(np.eye(4), top=100).transform_images(p[:1])
    np.testing.assert_array_equal(all_classes, p[:1])
    with pytest.raises(ValueError, match="row 1 has a negative probability"):
        space.transform_images(np.array([[0.5, 0.5, 0, 0], [0.5, 0.6, -0.1, 0]]))


# Hubness


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None] for x in (a, b))
    return np.asarray(a @ b.T)


def test_hubness_correction_is_csls_with_the_training_items() -> None:
    inner = Ridge().fit(IMAGES[:40], TEXTS[:40])
    space = HubnessCorrection(Ridge(), k=5).fit(IMAGES[:40], TEXTS[:40])
    x, y = inner.transform_images(IMAGES), inner.transform_texts(TEXTS)
    near_images = np.sort(cosines(x, y[:40]), axis=1)[:, -5:].mean(axis=1)
    near_texts = np.sort(cosines(y, x[:40]), axis=1)[:, -5:].mean(axis=1)
    expected = cosines(x, y) - (near_images[:, None] + near_texts) / 2
    a, b = space.transform_images(IMAGES).astype(np.float64), space.transform_texts(TEXTS).astype(np.float64)
    np.testing.assert_allclose(a @ b.T, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 3**0.5, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), 3**0.5, rtol=1e-6)
    np.testing.assert_allclose(3 * cosines(a, b), expected, atol=1e-6)


def test_hubness_correction_uses_paired_rows_only() -> None:
    pairs = np.c_[np.arange(30), np.arange(30)]
    some = HubnessCorrection(Ridge(), k=5).fit(IMAGES, TEXTS, pairs)
    only = HubnessCorrection(Ridge(), k=5).fit(IMAGES[:30], TEXTS[:30])
    np.testing.assert_allclose(some.transform_images(IMAGES), only.transform_images(IMAGES), atol=1e-6)
    with pytest.raises(ValueError, match=r"HubnessCorrection.fit: k must be in \[1, 30\], got 31"):
        HubnessCorrection(Ridge(), k=31).fit(IMAGES, TEXTS, pairs)


def test_hubness_correction_takes_hubs_out() -> None:
    """Ten images lie at the texts' common mean, so that they are near to every text."""
    rng = np.random.default_rng(7)
    texts = (rng.standard_normal((300, 30)) + 1).astype(np.float32)
    gallery = texts[200:] + 1.5 * rng.standard_normal((100, 30)).astype(np.float32)
    hubs = 1 + 0.1 * rng.standard_normal((10, 30)).astype(np.float32)
    gallery = np.concatenate([gallery, hubs])

    def found(space: BaseSpace) -> tuple[float, float]:
        space.fit(texts[:200], texts[:200])  # an identity map, as good as
        best = cosines(space.transform_texts(texts[200:]), space.transform_images(gallery)).argmax(axis=1)
        return float((best == np.arange(100)).mean()), float((best >= 100).mean())

    inner = {"alpha": 1e-6, "center": False, **RAW}
    right, at_hubs = found(Ridge(**inner))
    corrected_right, corrected_at_hubs = found(HubnessCorrection(Ridge(**inner)))
    assert at_hubs > 0.2
    assert corrected_at_hubs < 0.25 * at_hubs
    assert corrected_right > right + 0.1
