"""Queries and galleries made to break a screen: MAKERS[name](rng, n, m, d) -> (queries, gallery)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

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
def best_rows_first(rng: Generator, n: int, m: int, d: int) -> Made:
    """What a sample of the first rows promises, the rest does not keep."""
    way = 3 * normal(rng, d)
    g = normal(rng, m, d)
    g[:32] += way
    return way + normal(rng, n, d), g


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


# ---- what low precision makes of rows ----


@maker
def anisotropic(rng: Generator, n: int, m: int, d: int) -> Made:
    """Embeddings in a narrow cone: their mean is most of them."""
    mean = 5 * normal(rng, d)
    return mean + normal(rng, n, d), mean + normal(rng, m, d)


@maker
def anisotropic_with_other_queries(rng: Generator, n: int, m: int, d: int) -> Made:
    return 3 * normal(rng, d) + normal(rng, n, d), 5 * normal(rng, d) + normal(rng, m, d)


@maker
def queries_along_the_mean(rng: Generator, n: int, m: int, d: int) -> Made:
    """Nothing is left of a query beside its multiple of the centre."""
    g = 5 * normal(rng, d) + normal(rng, m, d)
    drawn = g[np.arange(min(m, 256)) * (m // min(m, 256))]
    return g.mean(0) * normal(rng, n, 1) if rng.random() < 0.5 else drawn.mean(0) * normal(rng, n, 1), g


@maker
def heavy_dimensions(rng: Generator, n: int, m: int, d: int) -> Made:
    weights = np.where(rng.random(d) < 0.1, 1000, 1).astype(np.float32)
    return normal(rng, n, d) * weights, normal(rng, m, d) * weights


@maker
def few_elements(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = (normal(rng, r, d) * (rng.random((r, d)) < 2 / d) for r in (n, m))
    return q.astype(np.float32), g.astype(np.float32)


@maker
def encoder_edges(rng: Generator, n: int, m: int, d: int) -> Made:
    """Largest elements and norms about the powers of two where an encoder gives up."""
    edges = np.float64([-150, -127, -76, -74, -61, -60, -59, -41, -40, -39, 0, 0, 0, 29, 30, 31, 59, 60, 61])

    def rows(count: int) -> Array:
        x = np.clip(rng.standard_normal((count, d)), -1, 1)
        x[np.arange(count), rng.integers(0, d, count)] = 1
        if rng.random() < 0.5:
            x /= np.linalg.norm(x, axis=1, keepdims=True)
        ulp = 1 + rng.integers(-1, 2, (count, 1)) * 2.0**-23
        return (x * ulp * 2.0 ** rng.choice(edges, (count, 1))).astype(np.float32)

    return rows(n), rows(m)


@maker
def tiny_queries(rng: Generator, n: int, m: int, d: int) -> Made:
    """Squares of the queries vanish in fp32; their products with the gallery do not."""
    return (normal(rng, n, d) * 2.0 ** rng.integers(-110, -60, (n, 1))).astype(np.float32), normal(rng, m, d)


@maker
def squares_of_rests_vanish(rng: Generator, n: int, m: int, d: int) -> Made:
    """Rows of one element of 2^-59 and others below 2^-75: int8 loses them, and their squares underflow in fp32.
    Queries that do not look at the first element find them all the same."""
    d = max(d, 4)
    g = np.zeros((m, d), np.float32)
    g[:, 1:3] = rng.choice(np.float32([1, -1]), (m, 1))
    best = rng.random(m) < 0.05
    best[rng.integers(0, m)] = True
    g[best] = 2.0**-75.02 * rng.uniform(0.99, 1, (int(best.sum()), 1))
    g[best, 0] = 2.0**-59
    q = np.ones((n, d), np.float32)
    q[:, 0], q[:, 2] = 0, -1 + 2.0**-20
    return q, g


@maker
def fp64_below_fp32_range(rng: Generator, n: int, m: int, d: int) -> Made:
    """Gallery rows that are 0 in fp32, among others that are not."""
    g = 0.49 * 2.0**-149 * rng.random((m, d))
    few = rng.random(m) < 0.15
    g[few] = 2.0**-150 * rng.standard_normal((int(few.sum()), d))
    return np.full((n, d), 2.0**20), g


@maker
def exact_in_int8(rng: Generator, n: int, m: int, d: int) -> Made:
    def rows(count: int) -> Array:
        x = rng.integers(-127, 128, (count, d))
        x[np.arange(count), rng.integers(0, d, count)] = rng.choice([-127, 127], count)
        return x.astype(np.float32)

    return rows(n), rows(m)


@maker
def exact_in_bfloat16(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = ((rng.integers(-255, 256, (r, d)) * 2.0 ** rng.integers(-3, 4, (r, d))).astype(np.float32) for r in (n, m))
    return q, g


@maker
def one_direction(rng: Generator, n: int, m: int, d: int) -> Made:
    """Multiples of one row: equal up to an ulp once they are normalised."""
    row = normal(rng, 1, d)
    return normal(rng, n, d), (row * rng.uniform(0.01, 100, (m, 1))).astype(np.float32)


@maker
def lost_along_the_query(rng: Generator, n: int, m: int, d: int) -> Made:
    """Rounding to int8 (or to bfloat16) takes 0.49 of a step from every element of the best rows, while the query is
    all ones: by Cauchy and Schwarz no worse can happen, so the error is its bound. Their rivals lose nothing."""
    low, high = (0, 126) if rng.random() < 0.5 else (128, 254)  # bfloat16 has 8 bits, the first one set
    codes = rng.permuted(np.tile(rng.integers(low, high, max(1, d - 1)), (m, 1)), axis=1).astype(np.float64)
    best = np.arange(m) % 100 == 0
    codes[best] += 0.49
    codes[~best, : int(0.46 * codes.shape[1])] += 1
    g = np.concatenate([codes, np.full((m, 1), high + 1)], 1)
    g[np.arange(m) // 2 % 2 == 1] *= -1  # the mean is near 0: rows are not centred
    return np.ones((n, g.shape[1]), np.float32), g.astype(np.float32)


@maker
def lost_along_the_row(rng: Generator, n: int, m: int, d: int) -> Made:
    """The same of the queries."""
    d = max(d, 2)
    low, high = (0, 126) if rng.random() < 0.5 else (128, 254)
    q = np.concatenate([rng.integers(low, high, (n, d - 1)) + 0.49, np.full((n, 1), high + 1)], 1)
    g = np.ones((m, d))
    rivals = np.flatnonzero(np.arange(m) % 100 != 0)
    g[rivals, rng.integers(0, d - 1, len(rivals))] = 126 / 127 if low == 0 else 255 / 256
    g[np.arange(m) // 2 % 2 == 1] *= -1
    return q.astype(np.float32), g.astype(np.float32)


@maker
def fp64_huge_common_mean(rng: Generator, n: int, m: int, d: int) -> Made:
    q, g = (1e8 + 1e-3 * rng.standard_normal((r, d)) for r in (n, m))
    return q, g


def variants(name: str, rng: Generator, n: int, m: int, d: int) -> Made:
    """Also in other dtypes, or with rows shuffled between the two sides."""
    with np.errstate(all="ignore"):
        q, g = MAKERS[name](rng, n, m, d)
        turn = rng.integers(0, 5)
        if turn == 0:
            q, g = q.astype(np.float64), g.astype(np.float64)
        elif turn == 1 and q.dtype == np.float32 and np.isfinite(q).all():
            q = near(rng, g, n)
        elif turn == 2:
            q, g = q.astype(np.float16), g.astype(np.float16)
    return q, g
