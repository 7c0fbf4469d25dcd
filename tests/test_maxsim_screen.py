"""maxsim by way of bfloat16 (the level avx512_bf16): the maxima are those of fp32 products, whatever rounding does to
the rows. At every other level the same tests hold the fp32 tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from interaction_cases import make, maxsim_of, products, ways
from oracles import assert_same, best_of

import pycm


def widest_apart(halves: int = 512) -> tuple[Any, Any]:
    """A query vector and two rows of which rounding to bfloat16 exchanges the order, by 0.7 of what it possibly can:
    everything the better row is multiplied with rounds down, everything of the other rounds up."""
    down, up = 1 + 2**-8 - 2**-12, 1 + 2**-8 + 2**-12  # bfloat16 has 1 and 1 + 2^-7
    q = np.repeat([down, up], halves)
    better = np.repeat([down, 0], halves)
    other = np.repeat([0, up], halves)
    other[-1] = 0
    return q[None].astype(np.float32), np.stack([better, other] * 6).astype(np.float32)


@pytest.mark.parametrize("way", list(ways()), ids=lambda way: "-".join(way.values()))
def test_rounding_exchanges_rows(level: str, way: dict[str, str]) -> None:
    q, g = widest_apart()
    exact = g.astype(float) @ q[0].astype(float)
    assert exact[0] > exact[1]
    for items in ([g], [g[::-1]]):
        want = maxsim_of(products([q], items, way["metric"]), way["reduce"], way["direction"])
        np.testing.assert_allclose(pycm.maxsim([q], items, **way), want, rtol=2e-6)


@pytest.mark.parametrize("dim", [32, 33, 63, 128, 257])
def test_near_ties(level: str, dim: int) -> None:
    """Rows nearer to each other than bfloat16 can tell; the item is longer than a run of the screen."""
    rng = np.random.default_rng(dim)
    q = make([40, 3], dim, 20)
    g = [(row + 2**-10 * rng.standard_normal((count, dim))).astype(np.float32) for row, count in
         zip(make([1, 1, 1], dim, 21), (500, 9, 8), strict=True)]  # fmt: skip
    for way in ways():
        want = maxsim_of(products(q, g, way["metric"]), way["reduce"], way["direction"])
        scale = 1 if way["metric"] == "cosine" else dim
        count = 1 if way["reduce"] == "mean" else 500
        np.testing.assert_allclose(pycm.maxsim(q, g, **way), want, rtol=0, atol=4e-7 * scale * count)
        assert_same(pycm.maxsim_topk(q, g, 2, **way), best_of(want.astype(np.float32), 2, "dot"))


def test_rows_alike(level: str) -> None:
    """Every row is a candidate. Integers: to the bit."""
    q = make([33, 5], 48, 22, values="integers")
    g = [np.repeat(row, count, axis=0) for row, count in
         zip(make([1, 2, 1, 1], 48, 23, values="integers"), (800, 385, 384, 7), strict=True)]  # fmt: skip
    for way in ways(["dot"]):
        want = maxsim_of(products(q, g, "dot"), way["reduce"], way["direction"]).astype(np.float32)
        np.testing.assert_array_equal(pycm.maxsim(q, g, **way), want)


@pytest.mark.parametrize("scale", [1e-38, 1e-41, 1e-20, 1e18, 1e25])
def test_ranges(level: str, scale: float) -> None:
    """Numbers that bfloat16 flushes, products that leave fp32, and norms that a bound cannot hold."""
    q, g = make([9, 2], 40, 24), make([12, 30, 8], 40, 25)
    g[0], g[1][3:20] = g[0] * np.float32(scale), g[1][3:20] * np.float32(scale)
    q[1] = q[1] * np.float32(min(scale, 1e10))
    for way in ways():
        want = maxsim_of(products(q, g, way["metric"]), way["reduce"], way["direction"])
        np.testing.assert_allclose(pycm.maxsim(q, g, **way), want.astype(np.float32), rtol=1e-5, atol=1e-43)


def test_nan_and_infinity(level: str) -> None:
    q, g = make([9, 4], 40, 26), make([12, 30, 8, 16], 40, 27)
    q[1][2, 39], g[0][11, 0], g[1][3, 5] = np.nan, np.nan, np.inf
    with np.errstate(invalid="ignore"):
        pairs = products(q, g, "dot")
        want = maxsim_of(pairs, "sum", "t2i")
    got = pycm.maxsim(q, g)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isposinf(got), np.isposinf(want))
    np.testing.assert_allclose(got[np.isfinite(want)], want[np.isfinite(want)], rtol=1e-6)
    assert (np.isnan(want).sum(), np.isfinite(want).sum()) == (5, 2)


def test_queries_without_vectors(level: str) -> None:
    g = make([12, 30], 40, 28)
    np.testing.assert_array_equal(pycm.maxsim([g[0][:0]], g), [[0, 0]])
