"""similarity: as accurate as torch's own fp32 against long double, for every metric, dtype, level, batch and layout."""

from __future__ import annotations

import functools
import itertools
import math
import os
from fractions import Fraction
from typing import Any

import accuracy
import numpy as np
import oracles
import pytest
from oracles import METRICS, truth, widen
from tolerances import CLOSE_ROWS_RELATIVE, SPECIFICATION_ULPS

import pycm
from pycm import reference

torch = pytest.importorskip("torch")
F = torch.nn.functional

METRIC = pytest.mark.parametrize("metric", METRICS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


assert_accurate = functools.partial(accuracy.assert_accurate, pycm.similarity)

SHAPES = [
    (1, 1, 1),
    (1, 33, 5),
    (3, 4, 2),
    (5, 12, 31),
    (11, 15, 32),
    (12, 16, 33),
    (13, 17, 64),
    (16, 31, 65),
    (24, 32, 1),
    (31, 33, 127),
    (63, 65, 16),
    (65, 129, 20),
    (129, 257, 8),
    (257, 63, 9),
    (7, 40, 511),
    (6, 33, 512),
    (13, 20, 513),
    (5, 31, 1025),
    (4, 20, 4096),
]


@METRIC
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(level: str, metric: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for n, m, d in SHAPES:
        x = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randn(m, d, generator=generator, dtype=torch.float64).to(dtype)
        assert_accurate(x, y, metric, level)
        assert_accurate(x + 3, y + 3, metric, f"{level} with a common mean")


@METRIC
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(level: str, metric: str, dtype: torch.dtype) -> None:
    """Small integers leave no rounding in a sum, so that every level must give the rounded exact value."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-3, 4, (37, 45), generator=generator).to(dtype)
    y = torch.randint(-3, 4, (70, 45), generator=generator).to(dtype)
    if metric in ("dot", "sqeuclidean", "euclidean"):
        want = reference.similarity(widen(x), widen(y), metric).astype(pycm.similarity(x, y, metric).numpy().dtype)
        if metric == "dot":
            np.testing.assert_array_equal(pycm.similarity(x, y, metric).numpy(), want)
            return
    assert_accurate(x, y, metric, level)


# ---- batches and layouts ----

BATCHES = [
    ((4, 9, 17), (4, 21, 17)),
    ((3, 1, 5, 8), (1, 2, 6, 8)),
    ((5, 8), (2, 3, 6, 8)),
    ((2, 3, 5, 8), (6, 8)),
    ((1, 5, 8), (7, 6, 8)),
    ((40, 3, 2, 4), (40, 3, 2, 4)),
    ((2, 0, 3, 4), (2, 1, 5, 4)),
    ((0, 4), (3, 4)),
    ((3, 4), (2, 0, 4)),
    ((2, 1, 1, 2, 70, 33), (1, 2, 3, 1, 65, 33)),
]


@METRIC
@pytest.mark.parametrize(("x_shape", "y_shape"), BATCHES)
def test_batches(level: str, metric: str, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(x_shape, generator=generator), torch.randn(y_shape, generator=generator)
    ours = pycm.similarity(x, y, metric)
    batch = np.broadcast_shapes(x_shape[:-2], y_shape[:-2])
    assert ours.shape == (*batch, x_shape[-2], y_shape[-2])
    wide_x, wide_y = x.expand(*batch, *x_shape[-2:]), y.expand(*batch, *y_shape[-2:])
    for index in itertools.product(*map(range, batch)):
        single = pycm.similarity(wide_x[index], wide_y[index], metric)
        assert torch.equal(ours[index], single), f"matrix {index}"
    assert torch.equal(pycm.similarity(wide_x, wide_y, metric), ours), "stride-0 batch axes"
    np.testing.assert_array_equal(pycm.similarity(x.numpy(), y.numpy(), metric), ours.numpy())
    if ours.numel():
        assert_accurate(x, y, metric)


@METRIC
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(level: str, metric: str, dtype: torch.dtype) -> None:
    """A view gives the bits of its contiguous copy."""
    base = torch.randn(64, 90, generator=torch.Generator().manual_seed(4)).to(dtype)
    views = [
        base[:35, :29],
        base[::2, 3:32],
        base[:33, 1:59:2],
        base[:29].T[:50],
        base[7].expand(40, 90)[:, :29],
        base[:40, 5:6].expand(40, 29),
        base.flatten()[1 : 1 + 30 * 29].reshape(30, 29),
        base.flatten().unfold(0, 29, 7)[:44],
    ]
    for x, y in itertools.product(views[:8], views[::3]):
        want = pycm.similarity(x.contiguous(), y.contiguous(), metric)
        assert torch.equal(pycm.similarity(x, y, metric), want), (x.stride(), y.stride())
        flipped = pycm.similarity(widen(x)[::-1, ::-1], widen(y)[::-1, ::-1], metric)
        copied = pycm.similarity(widen(x)[::-1, ::-1].copy(), widen(y)[::-1, ::-1].copy(), metric)
        np.testing.assert_array_equal(flipped, copied)


@METRIC
@pytest.mark.usefixtures("threads")
def test_threads_do_not_change_bits(metric: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = (
        torch.randn(300, 100, generator=generator).numpy(),
        torch.randn(700, 100, generator=generator).numpy(),
    )
    results = []
    for count in (1, 2, 3, 4):
        pycm.set_num_threads(count)
        results.append(pycm.similarity(x, y, metric))
        assert pycm.backend_info()["cpu"]["threads"] == count
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


# ---- hard values ----


@METRIC
@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_rows(level: str, metric: str, dtype: torch.dtype) -> None:
    x = (torch.randn(50, 77, generator=torch.Generator().manual_seed(6)) * 100 + 1000).to(dtype)
    scores = pycm.similarity(x, x, metric)
    if metric in oracles.DISTANCES:
        assert torch.equal(scores.diagonal(), torch.zeros(50, dtype=scores.dtype))
        duplicates = pycm.similarity(x[:1].expand(40, 77), x[:1].contiguous(), metric)
        assert not duplicates.any()
        assert (scores[~torch.eye(50, dtype=torch.bool)] > 0).all()
    elif metric != "dot":
        eps = torch.finfo(scores.dtype).eps
        assert (scores.diagonal() - 1).abs().max() <= 4 * eps


@pytest.mark.parametrize("metric", oracles.DISTANCES)
@pytest.mark.parametrize("apart", [1e-4, 1e-2, 1.0])
def test_close_rows_of_large_norm(level: str, metric: str, apart: float) -> None:
    """|x| = 1000, apart by 1e-4: |x|^2 + |y|^2 - 2 x.y has no correct digit left, the difference has all."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((40, 64))
    x *= 1e3 / np.linalg.norm(x, axis=1, keepdims=True)
    step = rng.standard_normal((40, 64))
    y = (x + apart * step / np.linalg.norm(step, axis=1, keepdims=True)).astype(np.float32)
    x = x.astype(np.float32)
    want = truth(x, y, metric).diagonal()
    got = pycm.similarity(x, y, metric).diagonal()
    assert (np.abs(got - want) <= CLOSE_ROWS_RELATIVE * want).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", ["cosine", "pearson"])
def test_any_norm_is_normalised(level: str, metric: str, dtype: type) -> None:
    """Elements of 1e-40 (denormal) and 3e38 have a direction too."""
    rng = np.random.default_rng(8)
    x, y = rng.standard_normal((12, 33)), rng.standard_normal((50, 33))
    scales = 10.0 ** np.linspace(-36, 37, 50) if dtype is np.float32 else 10.0 ** np.linspace(-130, 130, 50)
    limit = 16 * np.finfo(dtype).eps
    x, y = x.astype(dtype), (y * scales[:, None]).astype(dtype)
    assert np.abs(pycm.similarity(x, y, metric) - truth(x, y, metric)).max() <= limit
    assert np.abs(pycm.similarity(y, x, metric) - truth(y, x, metric)).max() <= limit
    tiny = (rng.standard_normal((9, 33)) * 1e-40).astype(np.float32)
    huge = (rng.uniform(-1, 1, (9, 33)) * 3e38).astype(np.float32)
    for hard in (tiny, huge):
        ours = pycm.similarity(x[:5].astype(np.float32), hard, metric)
        limit = 16 * np.finfo(np.float32).eps
        assert np.abs(ours - truth(x[:5].astype(np.float32), hard, metric)).max() <= limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_direction_score_zero(level: str, dtype: torch.dtype) -> None:
    x = torch.randn(30, 41, generator=torch.Generator().manual_seed(9)).to(dtype)
    zero, constant = x.clone(), x.clone()
    zero[::3] = 0
    # 0.1 is no binary fraction: the rounded mean of a constant row need not equal its elements.
    constant[::3] = torch.tensor([0.1, 0.7, -1e-3, 3e4, 0.0, 1.0, -0.1, 77.7, 1e-7, 0.3]).to(dtype)[:, None]
    for metric, special in (("cosine", zero), ("pearson", constant)):
        for scores in (pycm.similarity(special, x, metric), pycm.similarity(x, special, metric).mT):
            assert torch.equal(scores[::3], torch.zeros_like(scores[::3])), metric
            assert (scores[1::3] != 0).all()


@METRIC
def test_nan_and_infinity_propagate(level: str, metric: str) -> None:
    """As the specification has it: the same pairs are NaN, the same are infinite."""
    rng = np.random.default_rng(10)
    x, y = rng.standard_normal((20, 9)).astype(np.float32), rng.standard_normal((40, 9)).astype(np.float32)
    x[3, 2], x[5, 0], x[7, 8], x[9] = np.nan, np.inf, -np.inf, 0
    y[1, 4], y[2, 0], y[6, 8], y[11], y[13, :2] = np.nan, np.inf, -np.inf, 0, np.inf
    y[15] = np.inf
    with np.errstate(all="ignore"):
        want = reference.similarity(x, y, metric)
    for got in (pycm.similarity(x, y, metric), pycm.similarity(y, x, metric).T):
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_array_equal(np.isposinf(got), np.isposinf(want))
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
        finite = np.isfinite(want)
        np.testing.assert_allclose(got[finite], want[finite], atol=1e-5)


@pytest.mark.parametrize("metric", oracles.DISTANCES)
def test_distances_beyond_the_range_of_squares(level: str, metric: str) -> None:
    rng = np.random.default_rng(11)
    for power in (18, 19, 19.5, 25, 37):
        x, y = ((rng.standard_normal((r, 8)) * 10.0**power).astype(np.float32) for r in (9, 40))
        with np.errstate(over="ignore"):
            want = reference.similarity(x, y, metric).astype(np.float32)
        np.testing.assert_allclose(pycm.similarity(x, y, metric), want, rtol=1e-5)


# ---- the specification itself ----


@METRIC
@pytest.mark.parametrize("dim", [1, 2, 5, 31, 32, 33, 64, 97])
def test_specification_against_rationals(metric: str, dim: int) -> None:
    rng = np.random.default_rng(12)
    x, y = rng.integers(-9, 10, (12, dim)), rng.integers(-9, 10, (15, dim))
    x[0], y[0], y[1] = 0, 4, x[1]
    got = reference.similarity(x.astype(np.float64), y.astype(np.float64), metric)
    for i, j in itertools.product(range(12), range(15)):
        square, sign = oracles.rational_square(x[i].tolist(), y[j].tolist(), metric)
        value = got[i, j].item()
        if metric in ("dot", "sqeuclidean"):
            assert Fraction(value) ** 2 == square
            assert math.copysign(1, value) == sign or value == 0
            continue
        # The correctly rounded square root is within half an ulp; integers hold it without a further rounding.
        root = Fraction(math.isqrt(square.numerator * square.denominator << 200), square.denominator << 100)
        scale = Fraction(np.spacing(max(float(root), 1.0)).item())
        assert abs(Fraction(value) - sign * root) <= Fraction(SPECIFICATION_ULPS) * scale
        assert (value == 0) == (root == 0)


def test_specification_order() -> None:
    """The order of additions, spelled out with loops."""
    rng = np.random.default_rng(13)
    for dim in (1, 31, 32, 33, 70, 100):
        terms = rng.standard_normal(dim) * 10.0 ** rng.integers(-8, 8, dim)
        lanes = [0.0] * 32
        for d, term in enumerate(terms.tolist()):
            lanes[d % 32] += term
        for half in (16, 8, 4, 2, 1):
            lanes = [lanes[lane] + lanes[lane + half] for lane in range(half)]
        assert reference.fixed_order_sum(terms) == lanes[0]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("PYCM_BIG") != "1", reason="PYCM_BIG=1 writes 8.9 GB")
def test_more_than_two_to_the_31_scores() -> None:
    rng = np.random.default_rng(14)
    x, y = rng.standard_normal((2, 47_000, 1)).astype(np.float32)
    scores: Any = pycm.similarity(x, y, "dot")
    assert scores.size > 1 << 31
    rows, columns = rng.integers(0, 47_000, (2, 100_000))
    np.testing.assert_array_equal(scores[rows, columns], x[rows, 0] * y[columns, 0])
    np.testing.assert_array_equal(scores[-1], x[-1] * y[:, 0])
