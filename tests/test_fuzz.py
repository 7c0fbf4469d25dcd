"""Data made to break the screen: whatever comes in, topk gives the bits of the specification.

`PYCM_FUZZ_PAIRS=1e7 pytest tests/test_fuzz.py -m slow` goes on until that many pairs were compared.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from conftest import LEVELS, use_level
from oracles import METRICS, assert_exact

import pycm

Array = np.ndarray
Generator = np.random.Generator
Made = tuple[Array, Array]
Maker = Callable[[Generator, int, int, int], Made]
MAKERS: dict[str, Maker] = {}


def maker(function: Maker) -> Maker:
    MAKERS[function.__name__] = function
    return function


def normal(rng: Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def near(rng: Generator, rows: Array, count: int) -> Array:
    """Rows drawn from `rows`, each element moved by at most one ulp."""
    drawn = rows[rng.integers(0, len(rows), count)]
    towards = np.where(rng.random(drawn.shape) < 0.5, np.inf, -np.inf).astype(drawn.dtype)
    return np.where(rng.random(drawn.shape) < 0.2, np.nextafter(drawn, towards), drawn)


@maker
def gaussian(rng: Generator, n: int, m: int, d: int) -> Made:
    return normal(rng, n, d), normal(rng, m, d)


@maker
def duplicates(rng: Generator, n: int, m: int, d: int) -> Made:
    return normal(rng, n, d), normal(rng, 3, d)[rng.integers(0, 3, m)]


@maker
def all_equal(rng: Generator, n: int, m: int, d: int) -> Made:
    row = normal(rng, 1, d)
    return np.concatenate([row, normal(rng, n - 1, d)]), np.repeat(row, m, 0)


@maker
def one_ulp_neighbours(rng: Generator, n: int, m: int, d: int) -> Made:
    g = near(rng, normal(rng, 4, d), m)
    return near(rng, g, n), g


@maker
def permuted_elements(rng: Generator, n: int, m: int, d: int) -> Made:
    """Equal sums in exact arithmetic, unequal in any fixed order."""
    row = normal(rng, d)
    return np.ones((n, d), np.float32) * normal(rng, n, 1), np.stack([rng.permutation(row) for _ in range(m)])


@maker
def norms_over_sixty_orders(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = (normal(rng, r, d) * 10.0 ** rng.uniform(-38, 37, (r, 1)) for r in (n, m))
    return q.astype(np.float32), g.astype(np.float32)


@maker
def denormals(rng: Generator, n: int, m: int, d: int) -> Made:
    return normal(rng, n, d) * np.float32(1e-20), (normal(rng, m, d) * np.float32(3e-39)).astype(np.float32)


@maker
def products_below_denormals(rng: Generator, n: int, m: int, d: int) -> Made:
    return normal(rng, n, d) * np.float32(1e-22), normal(rng, m, d) * np.float32(1e-23)


@maker
def products_overflow(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = (normal(rng, r, d) * 10.0 ** rng.uniform(18, 38, (r, 1)) for r in (n, m))
    limit = np.finfo(np.float32).max
    return np.clip(q, -limit, limit).astype(np.float32), np.clip(g, -limit, limit).astype(np.float32)


@maker
def at_the_limit_of_fp32(rng: Generator, n: int, m: int, d: int) -> Made:
    """Squares, products and partial sums about the largest fp32 number: some overflow, either way."""
    q, g = (normal(rng, r, d) * 10.0 ** rng.uniform(18, 21, (r, 1)) for r in (n, m))
    return q.astype(np.float32), g.astype(np.float32)


@maker
def one_large_side(rng: Generator, n: int, m: int, d: int) -> Made:
    scale = 10.0 ** rng.uniform(0, 6)
    return (normal(rng, n, d) * scale).astype(np.float32), (normal(rng, m, d) * (1e39 / scale)).astype(np.float32)


@maker
def elements_over_sixty_orders(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = (normal(rng, r, d) * 10.0 ** rng.uniform(-30, 30, (r, d)) for r in (n, m))
    return q.astype(np.float32), g.astype(np.float32)


@maker
def infinities(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = normal(rng, n, d), normal(rng, m, d)
    g[rng.integers(0, m, m // 9), rng.integers(0, d, m // 9)] = np.inf
    g[rng.integers(0, m, m // 9), rng.integers(0, d, m // 9)] = -np.inf
    q[0, 0], q[1, d - 1] = np.inf, -np.inf
    q[2, 0] = 0
    return q, g


@maker
def nans(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = normal(rng, n, d), normal(rng, m, d)
    g[rng.random(m) < 0.7, rng.integers(0, d)] = np.nan
    q[n // 2] = np.nan
    return q, g


@maker
def almost_only_nans(rng: Generator, n: int, m: int, d: int) -> Made:
    g = normal(rng, m, d)
    g[np.arange(m) % (m // 5) != 3] = np.nan
    return normal(rng, n, d), g


@maker
def large_common_mean(rng: Generator, n: int, m: int, d: int) -> Made:
    mean = 100 * normal(rng, d)
    return mean + normal(rng, n, d) * np.float32(0.01), mean + normal(rng, m, d) * np.float32(0.01)


@maker
def huge_row_means(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = (normal(rng, r, d) + (10.0 ** rng.uniform(0, 8, (r, 1))) for r in (n, m))
    return q.astype(np.float32), g.astype(np.float32)


@maker
def one_hot(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = (np.eye(d, dtype=np.float32)[rng.integers(0, d, r)] for r in (n, m))
    return q * normal(rng, n, 1), g * rng.choice(np.float32([1, 1, 1, -1, 2]), (m, 1))


@maker
def zero_and_constant_rows(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = normal(rng, n, d), normal(rng, m, d)
    g[rng.random(m) < 0.5] = 0
    constant = rng.random(m) < 0.3
    g[constant] = normal(rng, int(constant.sum()), 1)
    q[0], q[1] = 0, 0.1
    return q, g


@maker
def ascending(rng: Generator, n: int, m: int, d: int) -> Made:
    """Each candidate beats the last: a threshold is always stale."""
    way = normal(rng, d)
    angle = np.linspace(2, 0.1, m, dtype=np.float32)[:, None]
    return way + normal(rng, n, d) * np.float32(1e-3), way + normal(rng, 1, d) * angle


@maker
def descending(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = ascending(rng, n, m, d)
    return q, np.ascontiguousarray(g[::-1])


@maker
def few_huge_rows(rng: Generator, n: int, m: int, d: int) -> Made:
    """A bound that some rows make useless must not hide the others."""
    g = normal(rng, m, d)
    g[rng.random(m) < 0.02] *= np.float32(1e30)
    g[rng.random(m) < 0.02] *= np.float32(1e-30)
    return normal(rng, n, d), g


@maker
def small_integers(rng: Generator, n: int, m: int, d: int) -> Made:
    return rng.integers(-1, 2, (n, d)).astype(np.float32), rng.integers(-1, 2, (m, d)).astype(np.float32)


@maker
def one_sided_rounding(rng: Generator, n: int, m: int, d: int) -> Made:
    """Every fp32 addition of a dot product rounds the same way, and the true best is the one the screen rates lowest.

    q = (1, s, s, ...) and g = (1, t, t, ...) with s t just below half an ulp of 1 are lost one by one; just above,
    each counts double. The first kind is made to win by a little: the screen's error is then 0.86 of its bound, and a
    bound shrunk to 0.85 loses matches here (measured; the other makers notice 0.25 to 0.05).
    """
    d = 128 if d < 100 else 512  # as long as the kernels' longest chain of additions, or several
    q = np.full((n, d), 2.0**-12, np.float32)
    q[:, 0] = 1
    below, above = np.float32(2.0**-12 * (1 - 2.0**-24)), np.float32(2.0**-12 * (1 + 2.0**-23))
    g = np.zeros((m, d), np.float32)
    best = rng.random(m) < 0.05
    best[rng.integers(0, m)] = True
    lengths = np.where(best, d - rng.integers(0, 2, m), d - 3 - rng.integers(0, 3, m))
    filled = np.arange(d) < lengths[:, None]
    g[filled] = np.where(best[:, None], below, above)[:, :1].repeat(d, 1)[filled]
    g[:, 0] = 1
    return q, g


@maker
def one_sided_underflow(rng: Generator, n: int, m: int, d: int) -> Made:
    """The same at the bottom of the range: products of half the least denormal."""
    q = np.full((n, d), 2.0**-75, np.float32)
    best = rng.random(m) < 0.05
    best[rng.integers(0, m)] = True
    g = np.where(best[:, None], 2.0**-75 * (1 - 2.0**-24), 2.0**-75 * (1 + 2.0**-23)) * np.ones((m, d))
    g[~best, : max(1, d // 8)] = 0
    return q, g.astype(np.float32)


@maker
def beyond_fp32(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = (rng.standard_normal((r, d)) * 10.0 ** rng.uniform(-60, 60, (r, 1)) for r in (n, m))
    return q, g


@maker
def fp64_edges(rng: Generator, n: int, m: int, d: int) -> Made:
    """Squares that underflow or overflow even in fp64: the specification's own arithmetic decides."""
    powers = np.float64([1e-320, 1e-162, 1e-161, 1e-158, 1e-100, 1, 1, 1, 1e100, 1e153, 1e155, 1e200, 1e300])
    q, g = (rng.standard_normal((r, d)) * rng.choice(powers, (r, 1)) for r in (n, m))
    return q, g


@maker
def fp64_below_fp32_resolution(rng: Generator, n: int, m: int, d: int) -> Made:
    """Rows that are all the same in fp32."""
    row = rng.standard_normal(d)
    q, g = (row * (1 + 1e-12 * rng.standard_normal((r, d))) for r in (n, m))
    return q, g


@maker
def fp64_huge_means(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = (rng.standard_normal((r, d)) + 10.0 ** rng.uniform(0, 16, (r, 1)) for r in (n, m))
    return q, g


def variants(name: str, rng: Generator, n: int, m: int, d: int) -> Made:
    """Also with columns in fp64, or with rows shuffled between the two sides."""
    with np.errstate(all="ignore"):
        q, g = MAKERS[name](rng, n, m, d)
        turn = rng.integers(0, 4)
        if turn == 0:
            q, g = q.astype(np.float64), g.astype(np.float64)
        elif turn == 1 and q.dtype == np.float32 and np.isfinite(q).all():
            q = near(rng, g, n)
    return q, g


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", MAKERS)
def test_adversarial(name: str, metric: str, every_level: list[str]) -> None:
    seed = zlib.crc32(f"{name} {metric}".encode())
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        q, g = MAKERS[name](rng, 37, 1300, 24)
    for k, simd in zip((1, 10, 60), every_level * 3, strict=False):
        use_level(simd)
        assert_exact(pycm.topk(q, g, k, metric), q, g, k, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", MAKERS)
def test_random_variants(name: str, metric: str, every_level: list[str]) -> None:
    rng = np.random.default_rng(zlib.crc32(f"variant {name} {metric}".encode()))
    for _ in range(3):
        random_round(rng, name, metric, every_level, pairs=12_000)


def random_round(rng: Generator, name: str, metric: str, levels: list[str], pairs: int) -> int:
    d = int(rng.choice([1, 2, 3, 5, 8, 16, 31, 33, 64, 65, 100]))
    m = int(rng.integers(16, max(17, pairs // 3)))
    n = max(3, min(pairs // m, 400))
    k = int(min(m, rng.choice([1, 2, 3, 10, 33, max(1, m // 4), m])))
    q, g = variants(name, rng, n, m, d)
    use_level(str(rng.choice(levels)))
    got = pycm.topk(q, g, k, metric)
    try:
        assert_exact(got, q, g, k, metric)
    except AssertionError as error:
        level = pycm.backend_info()["cpu"]["level"]
        raise AssertionError(f"{name} {q.shape} {g.shape} {q.dtype} k={k} {level}: {error}") from error
    return n * m


@pytest.mark.slow
@pytest.mark.skipif("PYCM_FUZZ_PAIRS" not in os.environ, reason="PYCM_FUZZ_PAIRS says how many pairs to try")
def test_many_pairs() -> None:
    budget = float(os.environ["PYCM_FUZZ_PAIRS"])
    seed = int(os.environ.get("PYCM_FUZZ_SEED", np.random.SeedSequence().entropy))
    print(f"PYCM_FUZZ_SEED={seed}")
    rng = np.random.default_rng(seed)
    before = pycm.backend_info()["cpu"]["level"]
    done, names = 0, list(MAKERS)
    try:
        while done < budget:
            name, metric = str(rng.choice(names)), str(rng.choice(METRICS))
            done += random_round(rng, name, metric, LEVELS, int(10 ** rng.uniform(3.5, 6)))
    finally:
        use_level(before)
