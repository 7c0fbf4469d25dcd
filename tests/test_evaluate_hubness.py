"""Corrections for hubs against the published formulas, and their effect on planted hubs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pycm.evaluate import csls, dual_softmax, inverted_softmax, qb_norm, retrieval_metrics
from pycm.spaces import HubnessCorrection, Ridge

RNG = np.random.default_rng(0)


def unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


GALLERY = unit(RNG.standard_normal((30, 12)) + np.array([1.0] + 11 * [0.0]))
QUERIES, BANK_QUERIES = (unit(GALLERY[RNG.integers(0, 30, n)] + 0.4 * RNG.standard_normal((n, 12))) for n in (25, 80))
SCORES, BANK = QUERIES @ GALLERY.T, BANK_QUERIES @ GALLERY.T


def test_inverted_softmax() -> None:
    for beta in (1.0, 30.0):
        published = np.exp(beta * SCORES) / np.exp(beta * BANK).sum(axis=0)
        got = inverted_softmax(SCORES, BANK, beta=beta)
        np.testing.assert_allclose(np.exp(beta * got), published, rtol=1e-12)
        np.testing.assert_array_equal(np.argsort(got, axis=1), np.argsort(published, axis=1))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dynamic", [False, True])
def test_qb_norm(k: int, dynamic: bool) -> None:
    bank = BANK[:6]  # so that the activation set is not everything
    normalised = np.exp(20 * SCORES) / np.exp(20 * bank).sum(axis=0)
    active = {j for row in bank for j in np.argsort(-row)[:k]}
    got = qb_norm(SCORES, bank, k=k, dynamic=dynamic)
    kept = 0
    for row, before, after in zip(got, SCORES, normalised, strict=True):
        if dynamic and int(np.argmax(before)) not in active:
            kept += 1
            np.testing.assert_array_equal(row, before)
        else:
            np.testing.assert_allclose(np.exp(20 * row), after, rtol=1e-12)
    assert (0 < kept < len(SCORES)) == dynamic
    if not dynamic:
        np.testing.assert_array_equal(got, inverted_softmax(SCORES, bank, beta=20))


def test_dual_softmax() -> None:
    """Transductive, as published: times the softmax over the queries, times their number."""
    torch = pytest.importorskip("torch")
    logits = torch.tensor(100 * SCORES)
    published = logits * torch.softmax(logits, dim=0) * len(logits)
    np.testing.assert_allclose(100 * dual_softmax(SCORES, SCORES), published.numpy(), rtol=1e-10)
    np.testing.assert_allclose(dual_softmax(100 * SCORES, 100 * SCORES, beta=1), published.numpy(), rtol=1e-10)
    prior = 80 * np.exp(10 * SCORES) / np.exp(10 * BANK).sum(axis=0)
    np.testing.assert_allclose(dual_softmax(SCORES, BANK, beta=10), SCORES * prior, rtol=1e-12)
    with pytest.raises(ValueError, match="beta 1000 overflows: scores exceed the bank's by up to 1"):
        dual_softmax(SCORES + 1.0, SCORES[:1] * 0, beta=1000)


def test_csls() -> None:
    items = unit(RNG.standard_normal((40, 12)))
    of_query = [np.sort(row)[-7:].mean() for row in QUERIES @ items.T]
    of_item = [np.sort(column)[-7:].mean() for column in BANK.T]
    expected = 2 * SCORES - np.array(of_query)[:, None] - np.array(of_item)
    np.testing.assert_allclose(csls(SCORES, QUERIES @ items.T, BANK, k=7), expected, atol=1e-12)


def test_csls_is_what_hubness_correction_gives() -> None:
    images, texts = (RNG.standard_normal((50, d)).astype(np.float32) for d in (10, 8))
    space = HubnessCorrection(Ridge(3.0), k=4).fit(images[:40], texts[:40])
    rows, columns = (
        unit(x.astype(np.float64)) for x in (space.space.transform_images(images), space.space.transform_texts(texts))
    )
    cosines = rows @ columns.T
    corrected = space.transform_images(images).astype(np.float64) @ space.transform_texts(texts).T
    np.testing.assert_allclose(csls(cosines, cosines[:, :40], cosines[:40], k=4) / 2, corrected, atol=1e-5)


def test_a_hub_is_taken_out() -> None:
    rng = np.random.default_rng(1)
    gallery = unit(rng.standard_normal((200, 24)))
    mean = np.r_[1.0, np.zeros(23)]
    gallery[:5] = unit(mean + 0.02 * rng.standard_normal((5, 24)))  # near to everything
    of, of_bank = rng.integers(5, 200, 300), rng.integers(5, 200, 600)
    queries, bank = (unit(gallery[i] + mean + 0.15 * rng.standard_normal((len(i), 24))) for i in (of, of_bank))
    scores, bank_scores = queries @ gallery.T, bank @ gallery.T
    before = retrieval_metrics(scores, of).recall_at_k[1]
    for corrected in (
        inverted_softmax(scores, bank_scores),
        qb_norm(scores, bank_scores),
        dual_softmax(scores, bank_scores, beta=20),
        csls(scores, scores, bank_scores),
    ):
        assert retrieval_metrics(corrected, of).recall_at_k[1] > before + 0.1


def test_the_bank_is_required() -> None:
    for function in (inverted_softmax, qb_norm, dual_softmax, csls):
        with pytest.raises(TypeError, match="bank"):
            function(SCORES)  # type: ignore[operator]


def test_a_query_does_not_depend_on_the_others() -> None:
    for function in (inverted_softmax, qb_norm, dual_softmax):
        np.testing.assert_array_equal(function(SCORES, BANK)[:3], function(SCORES[:3], BANK))
    np.testing.assert_array_equal(csls(SCORES, SCORES, BANK)[:3], csls(SCORES[:3], SCORES[:3], BANK))


def test_kinds() -> None:
    torch = pytest.importorskip("torch")
    calls: list[Callable[[Any, Any], Any]] = [inverted_softmax, qb_norm, dual_softmax, lambda s, b: csls(s, s, b)]
    for function in calls:
        exact = function(SCORES, BANK)
        assert exact.dtype == np.float64
        for dtype, given in (
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.float32, torch.bfloat16),
        ):
            scores = torch.tensor(SCORES, requires_grad=True).to(given)
            got = function(scores, torch.tensor(BANK).to(given))
            assert isinstance(got, torch.Tensor)
            assert got.dtype == dtype
            if given != torch.bfloat16:
                np.testing.assert_allclose(got.numpy(), exact, rtol=2e-4, atol=1e-5)
        assert function(SCORES.astype(np.float32), BANK.astype(np.float32)).dtype == np.float32


def spoiled(value: float) -> np.ndarray:
    out = SCORES.copy()
    out[3, 4] = value
    return out


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: qb_norm(spoiled(np.nan), BANK), ValueError, "qb_norm: scores row 3 has a NaN"),
        (lambda: dual_softmax(SCORES, spoiled(np.inf)), ValueError, "dual_softmax: bank row 3 has an infinity"),
        (lambda: inverted_softmax(SCORES, BANK[:, :5]), ValueError, r"bank must have the 30 columns .* got \[80, 5\]"),
        (lambda: inverted_softmax(SCORES, BANK, beta=0), ValueError, "beta must be positive, got 0"),
        (lambda: inverted_softmax(SCORES.astype(int), BANK), TypeError, "scores must be floating point, got int64"),
        (lambda: qb_norm(SCORES[0], BANK), ValueError, r"scores must have shape \[N, M\], not empty, got \[30\]"),
        (lambda: qb_norm(SCORES, BANK, k=31), ValueError, r"k must be in \[1, 30\], got 31"),
        (lambda: csls(SCORES, SCORES[:4], BANK), ValueError, "gallery_bank must have 25 rows, got 4"),
        (lambda: csls(SCORES, SCORES[:, :4], BANK, k=5), ValueError, r"k must be in \[1, 4\], got 5"),
        (lambda: csls(SCORES, SCORES, BANK, k=2.0), TypeError, "k must be an int, got 2.0"),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
