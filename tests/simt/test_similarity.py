"""similarity's CUDA kernels on the host executor: as accurate as torch's own fp32, by the rule of tolerances.py."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_accurate, score_scale
from oracles import DISTANCES, METRICS, truth, widen
from tolerances import CLOSE_ROWS_RELATIVE

from pycm import reference

METRIC = pytest.mark.parametrize("metric", METRICS)
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES, torch.float64)
DTYPE = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def arch(monkeypatch: pytest.MonkeyPatch) -> str:
    """One will do: the kernels are the same on all."""
    monkeypatch.setenv("PYCM_SIMT_ARCH", "80")
    return "80"


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Around the edges of a warp, a tile and a stage; rows short (fp64), of several stages, and of several runs. Rows of 16
# bytes times n are copied asynchronously: more stages of them than are in flight at once.
SHAPES = [
    (1, 1, 1),
    (1, 33, 5),
    (15, 16, 17),
    (17, 31, 33),
    (33, 63, 127),
    (63, 2, 65),
    (2, 40, 511),
    (5, 9, 1025),
    (18, 35, 328),
]
LARGE_SHAPES = [(65, 129, 20), (129, 66, 129), (66, 65, 513), (70, 130, 264)]


@METRIC
@DTYPE
def test_accuracy(cuda: Any, metric: str, dtype: torch.dtype) -> None:
    for i, (n, m, d) in enumerate(SHAPES):
        shift = 3 * (i % 2)  # a common mean
        assert_accurate(
            cuda.similarity, rows(n, n, d, dtype=dtype) + shift, rows(n + 1, m, d, dtype=dtype) + shift, metric
        )


@pytest.mark.parametrize(("metric", "dtype"), [*zip(METRICS, DTYPES, strict=False), ("euclidean", torch.float32)])
def test_large_tiles(cuda: Any, metric: str, dtype: torch.dtype) -> None:
    for n, m, d in LARGE_SHAPES:
        assert_accurate(cuda.similarity, rows(n, n, d, dtype=dtype), rows(n + 1, m, d, dtype=dtype), metric)


def test_many_tiles(cuda: Any) -> None:
    """More than there are blocks, in groups of 16 and a rest: every block takes several."""
    x, y = rows(1, 18 * 128 - 5, 3, dtype=torch.bfloat16), rows(2, 4 * 128 + 1, 3, dtype=torch.bfloat16)
    assert_accurate(cuda.similarity, x, y, "dot")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_sign(cuda: Any, dtype: torch.dtype) -> None:
    """Roundings of long sums of one sign pile up; in rows of equal elements so do those of the elements."""
    for d in (64, 4096):
        x, y = rows(1, 9, d, dtype=dtype).abs(), rows(2, 30, d, dtype=dtype).abs()
        assert_accurate(cuda.similarity, x, y, "dot")
        equal = rows(3, 20, 1, dtype=dtype).abs().expand(20, d)
        assert_accurate(cuda.similarity, equal, equal + 1, "dot", "equal elements")


def test_equal_elements(cuda: Any) -> None:
    """Halves of ties are rounded to either side, so that what an element loses is not lost 64 times over."""
    c = 1 + torch.rand(40, 1, generator=torch.Generator().manual_seed(3)) * 0.1
    want = 64 * c.double() @ c.double().T
    got = cuda.similarity(c.expand(40, 64), c.expand(40, 64), "dot")
    assert ((got - want).abs() / want).max() <= 2 * torch.finfo(torch.float32).eps


@METRIC
def test_tf32_where_it_is_allowed(cuda: Any, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven bits an element: no fewer, and no more."""
    x, y = rows(5, 70, 100), rows(6, 66, 100)
    want, limit = truth(x, y, metric), score_scale(x, y, metric) * 2.0**-11
    full = np.abs(cuda.similarity(x, y, metric).numpy() - want).max()
    monkeypatch.setattr(cuda, "_allows_tf32", lambda: True)
    error = np.abs(cuda.similarity(x, y, metric).numpy() - want).max()
    assert 16 * full < error <= limit


@DTYPE
def test_integers_are_exact(cuda: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randint(-3, 4, (n, 45), generator=generator).to(dtype) for n in (37, 70))
    want = reference.similarity(widen(x), widen(y), "dot")
    np.testing.assert_array_equal(cuda.similarity(x, y, "dot").numpy(), want)


# ---- batches and layouts ----

BATCHES = [
    ((4, 9, 17), (4, 21, 17)),
    ((3, 1, 5, 18), (1, 2, 6, 18)),
    ((5, 8), (2, 3, 6, 8)),
    ((2, 3, 5, 20), (6, 20)),
    ((7, 1, 20), (6, 20)),
    ((1, 5, 18), (7, 6, 18)),
    ((67, 2, 2, 4), (67, 2, 2, 4)),
    ((2, 0, 3, 4), (2, 1, 5, 4)),
    ((0, 4), (3, 4)),
    ((2, 1, 1, 2, 3, 33), (1, 2, 3, 1, 65, 33)),
]


@pytest.mark.parametrize(
    ("metric", "dtype"),
    [
        ("cosine", torch.bfloat16),
        ("euclidean", torch.float32),
        ("pearson", torch.float32),
        ("euclidean", torch.float64),
    ],
)
@pytest.mark.parametrize(("x_shape", "y_shape"), BATCHES)
def test_batches(
    cuda: Any, metric: str, dtype: torch.dtype, x_shape: tuple[int, ...], y_shape: tuple[int, ...]
) -> None:
    x, y = rows(3, *x_shape, dtype=dtype), rows(4, *y_shape, dtype=dtype)
    batch = np.broadcast_shapes(x_shape[:-2], y_shape[:-2])
    ours: torch.Tensor = cuda.similarity(x, y, metric)
    assert ours.shape == (*batch, x_shape[-2], y_shape[-2])
    if not ours.numel():
        return
    wide_x, wide_y = x.expand(*batch, *x_shape[-2:]), y.expand(*batch, *y_shape[-2:])
    assert_accurate(cuda.similarity, x, y, metric)
    for index in itertools.islice(np.ndindex(*batch), 0, 40, 17):
        assert_accurate(cuda.similarity, wide_x[index], wide_y[index], metric)
    assert torch.equal(cuda.similarity(wide_x.contiguous(), wide_y.contiguous(), metric), cuda.similarity(x, y, metric))


@METRIC
@DTYPE
def test_layouts(cuda: Any, metric: str, dtype: torch.dtype) -> None:
    """A view gives the bits of its contiguous copy."""
    base = rows(4, 64, 90, dtype=dtype)
    views = [
        base[:35, :29],
        base[::2, 3:32],
        base[:33, 1:59:2],
        base[:29].T[:50],
        base[7].expand(40, 90)[:, :29],
        base[:40, 5:6].expand(40, 29),
        base.flatten()[1 : 1 + 30 * 29].reshape(30, 29),
    ]
    want = [view.contiguous() for view in views]
    for i in range(len(views)):
        j = (i + 3) % len(views)
        ours = cuda.similarity(views[i], views[j], metric)
        assert torch.equal(ours, cuda.similarity(want[i], want[j], metric)), (views[i].stride(), views[j].stride())


# ---- hard values ----


@METRIC
@DTYPE
def test_identical_rows(cuda: Any, metric: str, dtype: torch.dtype) -> None:
    x = (rows(6, 33, 77) * 100 + 1000).to(dtype)
    scores = cuda.similarity(x, x, metric)
    if metric in DISTANCES:
        assert torch.equal(scores.diagonal(), torch.zeros(33, dtype=scores.dtype))
        assert (scores[~torch.eye(33, dtype=torch.bool)] > 0).all()
    elif metric != "dot":
        assert (scores.diagonal() - 1).abs().max() <= 4 * torch.finfo(scores.dtype).eps


@pytest.mark.parametrize("metric", DISTANCES)
@pytest.mark.parametrize("apart", [1e-4, 1e-2, 1.0])
def test_close_rows_of_large_norm(cuda: Any, metric: str, apart: float) -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((20, 64))
    x *= 1e3 / np.linalg.norm(x, axis=1, keepdims=True)
    step = rng.standard_normal((20, 64))
    y = (x + apart * step / np.linalg.norm(step, axis=1, keepdims=True)).astype(np.float32)
    x = x.astype(np.float32)
    want = truth(x, y, metric).diagonal()
    got = cuda.similarity(torch.from_numpy(x), torch.from_numpy(y), metric).numpy().diagonal()
    assert (np.abs(got - want) <= CLOSE_ROWS_RELATIVE * want).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", ["cosine", "pearson"])
def test_any_norm_is_normalised(cuda: Any, metric: str, dtype: type) -> None:
    rng = np.random.default_rng(8)
    x, y = rng.standard_normal((12, 33)), rng.standard_normal((50, 33))
    scales = 10.0 ** np.linspace(-36, 37, 50) if dtype is np.float32 else 10.0 ** np.linspace(-130, 130, 50)
    x, y = x.astype(dtype), (y * scales[:, None]).astype(dtype)
    tiny, huge = rng.standard_normal((9, 33)) * 1e-40, rng.uniform(-1, 1, (9, 33)) * 3e38
    for hard in (y, tiny.astype(dtype), huge.astype(dtype)):
        for a, b in ((x, hard), (hard, x)):
            got = cuda.similarity(torch.from_numpy(a), torch.from_numpy(b), metric).numpy()
            assert np.abs(got - truth(a, b, metric)).max() <= 16 * np.finfo(dtype).eps


def test_any_scale_of_dot(cuda: Any) -> None:
    """Powers of two only move the exponent, as far as fp32 goes."""
    x, y = rows(9, 10, 50), rows(10, 40, 50)
    want = cuda.similarity(x, y, "dot")
    for power in (-100, -40, 40, 100):
        assert torch.equal(cuda.similarity(x * 2.0**power, y * 2.0**-power, "dot"), want)
    assert_accurate(cuda.similarity, x * 1e-37, y, "dot")


@DTYPE
def test_rows_without_direction_score_zero(cuda: Any, dtype: torch.dtype) -> None:
    x = rows(9, 30, 41, dtype=dtype)
    zero, constant = x.clone(), x.clone()
    zero[::3] = 0
    constant[::3] = torch.tensor([0.1, 0.7, -1e-3, 3e4, 0.0, 1.0, -0.1, 77.7, 1e-7, 0.3]).to(dtype)[:, None]
    for metric, special in (("cosine", zero), ("pearson", constant)):
        for scores in (cuda.similarity(special, x, metric), cuda.similarity(x, special, metric).mT):
            assert torch.equal(scores[::3], torch.zeros_like(scores[::3])), metric
            assert (scores[1::3] != 0).all()


def test_pearson_of_small_deviations(cuda: Any) -> None:
    """Deviations of a few ulps about a mean: what subtracting a rounded mean would destroy."""
    x, y = 1000 + rows(11, 20, 64) * 1e-4, 1000 + rows(12, 30, 64) * 1e-4
    want = reference.similarity(x.numpy(), y.numpy(), "pearson")
    assert np.abs(cuda.similarity(x, y, "pearson").numpy() - want).max() <= 4 * np.finfo(np.float32).eps


@METRIC
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("d", [9, 40])
def test_nan_and_infinity_propagate(cuda: Any, metric: str, dtype: torch.dtype, d: int) -> None:
    x, y = rows(10, 20, d, dtype=dtype), rows(11, 40, d, dtype=dtype)
    x[3, 2], x[5, 0], x[7, 8], x[9] = np.nan, np.inf, -np.inf, 0
    y[1, 4], y[2, 0], y[6, 8], y[11], y[13, :2] = np.nan, np.inf, -np.inf, 0, np.inf
    y[15] = np.inf
    with np.errstate(all="ignore"):
        want = reference.similarity(widen(x), widen(y), metric)
    for got in (cuda.similarity(x, y, metric).numpy(), cuda.similarity(y, x, metric).numpy().T):
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_array_equal(np.isposinf(got), np.isposinf(want))
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
        finite = np.isfinite(want)
        np.testing.assert_allclose(got[finite], want[finite], atol=2e-5)


@pytest.mark.parametrize("metric", DISTANCES)
@pytest.mark.parametrize("d", [8, 24])
def test_distances_beyond_the_range_of_squares(cuda: Any, metric: str, d: int) -> None:
    rng = np.random.default_rng(11)
    for power in (18, 19, 19.5, 25, 37):
        x, y = ((rng.standard_normal((r, d)) * 10.0**power).astype(np.float32) for r in (9, 40))
        with np.errstate(over="ignore"):
            want = reference.similarity(x, y, metric).astype(np.float32)
        got = cuda.similarity(torch.from_numpy(x), torch.from_numpy(y), metric).numpy()
        np.testing.assert_allclose(got, want, rtol=1e-5)
