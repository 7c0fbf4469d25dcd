"""topk: bit for bit the specification, for every metric, dtype, level, shape and layout."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import oracles
import pytest
from conftest import use_level
from oracles import METRICS, assert_exact, assert_same

import pycm
from pycm import reference

torch = pytest.importorskip("torch")

DTYPES = ("float32", "float16", "bfloat16", "float64")
METRIC = pytest.mark.parametrize("metric", METRICS)
DTYPE = pytest.mark.parametrize("dtype", DTYPES)

# (N, M, D, k): every edge of tiles, panels, lanes and blocks, in the scan (N <= 2 or 4 k > M) and in the screen.
SHAPES = [
    (1, 1, 1, 1),
    (1, 257, 7, 3),
    (2, 33, 32, 33),
    (2, 129, 65, 5),
    (3, 4, 2, 1),
    (3, 17, 5, 4),
    (4, 16, 8, 4),
    (5, 15, 9, 3),
    (5, 31, 16, 31),
    (11, 12, 3, 3),
    (12, 13, 17, 1),
    (12, 32, 31, 8),
    (13, 31, 33, 7),
    (13, 33, 63, 1),
    (15, 63, 64, 15),
    (16, 64, 1, 16),
    (17, 65, 4, 16),
    (23, 127, 6, 31),
    (24, 128, 10, 2),
    (25, 129, 11, 10),
    (31, 255, 12, 1),
    (33, 257, 13, 10),
    (63, 129, 14, 32),
    (65, 257, 15, 64),
    (127, 33, 19, 8),
    (129, 65, 20, 1),
    (257, 17, 21, 2),
    (257, 129, 5, 129),
    (7, 1100, 24, 10),
    (40, 700, 48, 5),
    (3, 40, 511, 2),
    (4, 37, 512, 3),
    (5, 65, 513, 4),
    (3, 33, 1023, 8),
    (4, 36, 1024, 1),
    (6, 35, 1025, 2),
    (4, 70, 1537, 5),
    (5, 40, 4096, 10),
    (3, 20, 4099, 2),
]


def to(dtype: str, array: np.ndarray) -> Any:
    """NumPy where it has the dtype, else torch."""
    if dtype == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array, np.float32)).bfloat16()
    return array.astype(dtype)


@functools.cache
def shape_cases(metric: str, dtype: str) -> list[tuple[Any, Any, int, Any]]:
    """Inputs and expected results, computed once for all levels."""
    rng = np.random.default_rng(1)
    cases = []
    for n, m, d, k in SHAPES:
        q, g = to(dtype, rng.standard_normal((n, d))), to(dtype, rng.standard_normal((m, d)))
        cases.append((q, g, k, oracles.topk(q, g, k, metric)))
    return cases


@METRIC
@DTYPE
def test_shapes(level: str, metric: str, dtype: str) -> None:
    for q, g, k, want in shape_cases(metric, dtype):
        assert_same(pycm.topk(q, g, k, metric), want, f"{level} {metric} {tuple(q.shape)} {tuple(g.shape)} k={k}")


@functools.cache
def tie_case(metric: str, dtype: str) -> tuple[Any, Any, list[Any]]:
    rng = np.random.default_rng(2)
    q, g = (to(dtype, rng.integers(-1, 2, (rows, 6)).astype(np.float32)) for rows in (37, 1500))
    return q, g, [(k, oracles.topk(q, g, k, metric)) for k in (1, 7, 100, 375, 400, 1500)]


@METRIC
@DTYPE
def test_ties_go_to_the_lower_index(level: str, metric: str, dtype: str) -> None:
    q, g, cases = tie_case(metric, dtype)
    for k, want in cases:
        assert len(np.unique(want[0][0])) < k or k == 1, "the case has no ties"
        assert_same(pycm.topk(q, g, k, metric), want, f"{level} {metric} k={k}")


@METRIC
@pytest.mark.parametrize(("n", "m", "k"), [(2100, 300, 1), (4200, 70, 17), (800, 4100, 1000), (30, 9000, 2000)])
def test_several_chunks_of_queries(metric: str, n: int, m: int, k: int) -> None:
    """More queries than are worked on at a time: 2048, or fewer where k is large."""
    rng = np.random.default_rng(13)
    q, g = rng.standard_normal((n, 5)).astype(np.float32), rng.standard_normal((m, 5)).astype(np.float32)
    assert_exact(pycm.topk(q, g, k, metric), q, g, k, metric)


@METRIC
def test_equals_the_written_specification(metric: str) -> None:
    """The vectorised oracle of these tests is not the last word: reference.topk is."""
    rng = np.random.default_rng(3)
    q, g = rng.standard_normal((9, 33)).astype(np.float32), rng.integers(-1, 2, (300, 33)).astype(np.float32)
    mask, exclude = rng.random((9, 300)) < 0.5, rng.integers(-1, 300, 9)
    want = reference.topk(q, g, 12, metric, mask, exclude)
    assert_same(pycm.topk(q, g, 12, metric, mask=mask, exclude=exclude), want)
    allowed = mask.copy()
    allowed[np.flatnonzero(exclude >= 0), exclude[exclude >= 0]] = False
    assert_same(oracles.topk(q, g, 12, metric, allowed), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number(level: str, dtype: torch.dtype) -> None:
    """All 65536 bit patterns, subnormals, infinities and NaN included, widened in vectors and one by one."""
    numbers = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    one = torch.ones(4, 1, dtype=dtype)
    assert_exact(pycm.topk(one[:1], numbers[:, None], 65536, "dot"), one[:1], numbers[:, None], 65536, "dot")
    assert_exact(pycm.topk(one, numbers[:, None], 3000, "euclidean"), one, numbers[:, None], 3000, "euclidean")
    rows = numbers[torch.randperm(65536, generator=torch.Generator().manual_seed(0))].view(-1, 32)
    one = torch.ones(5, 32, dtype=dtype)
    for metric in ("dot", "sqeuclidean"):
        assert_exact(pycm.topk(one, rows, 40, metric), one, rows, 40, metric)
    finite = numbers[torch.isfinite(numbers)][:, None]
    product = pycm.similarity(torch.ones(1, 1, dtype=dtype), finite, "dot")
    assert torch.equal(product[0], finite[:, 0].float())


# ---- layouts ----


def layouts(rng: np.random.Generator, rows: int, dim: int, dtype: str) -> dict[str, np.ndarray]:
    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    frozen = values(rows, dim)
    frozen.flags.writeable = False
    return {
        "contiguous": values(rows, dim),
        "transposed": values(dim, rows).T,
        "reversed rows": values(rows, dim)[::-1],
        "reversed features": values(rows, dim)[:, ::-1],
        "every third row": values(3 * rows, dim)[1::3],
        "every second feature": values(rows, 2 * dim)[:, 1::2],
        "a column block": values(rows, dim + 9)[:, 5 : 5 + dim],
        "odd offset": values(rows * dim + 1)[1:].reshape(rows, dim),
        "one row for all": np.broadcast_to(values(dim), (rows, dim)),
        "one feature for all": np.broadcast_to(values(rows, 1), (rows, dim)),
        "overlapping rows": np.lib.stride_tricks.sliding_window_view(values(rows + dim - 1), dim),
        "read-only": frozen,
        "Fortran order": np.asfortranarray(values(rows, dim)),
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("metric", ["dot", "pearson", "euclidean"])
def test_layouts(level: str, metric: str, dtype: str) -> None:
    rng = np.random.default_rng(4)
    queries, galleries = layouts(rng, 7, 37, dtype), layouts(rng, 200, 37, dtype)
    plain_q, plain_g = queries["contiguous"], galleries["contiguous"]
    for name, g in galleries.items():
        assert_same(pycm.topk(plain_q, g, 9, metric), oracles.topk(plain_q, g, 9, metric), f"gallery {name}")
    for name, q in queries.items():
        assert_same(pycm.topk(q, plain_g, 9, metric), oracles.topk(q, plain_g, 9, metric), f"queries {name}")
        one = pycm.topk(q[:1], plain_g, 9, metric)
        assert_same(one, oracles.topk(q[:1], plain_g, 9, metric), f"one query {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_torch_layouts(level: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(37, 7, generator=generator).to(dtype).T
    base = torch.randn(400, 80, generator=generator).to(dtype)
    for g in (base[::2, 3:40], base[:200, 1:75:2], base[:37].T, base[5].expand(90, 80)[:, :37]):
        assert_exact(pycm.topk(q, g, 6, "cosine"), q, g, 6, "cosine")


def test_long_rows_far_apart(level: str) -> None:
    """Row strides beyond 2^31 bytes: the offsets are 64-bit."""
    stride = (1 << 29) + 3
    memory = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (5, 2), (0, 0))
    assert memory.shape == (5, 2)
    buffer = np.empty(4 * stride + 2, np.float32)  # 8.6 GB of address space, of which only 5 pages are touched
    view = np.lib.stride_tricks.as_strided(buffer, (5, 2), (4 * stride, 4))
    view[:] = np.arange(10, dtype=np.float32).reshape(5, 2)
    assert_exact(pycm.topk(view, view, 1, "euclidean"), view, view, 1, "euclidean")


# ---- masks and exclusions ----


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(6)
    return (
        rng.standard_normal((29, 20)).astype(np.float32),
        rng.standard_normal((450, 20)).astype(np.float32),
    )


@METRIC
def test_masks(level: str, metric: str, pair: tuple[np.ndarray, np.ndarray]) -> None:
    q, g = pair
    rng = np.random.default_rng(7)
    n, m = len(q), len(g)
    big = rng.random((2 * n, 3 * m)) < 0.5
    one_row_empty = rng.random((n, m)) < 0.3
    one_row_empty[[0, 13, n - 1]] = False
    masks = {
        "half of the gallery": rng.random(m) < 0.5,
        "three rows": np.isin(np.arange(m), [0, 200, m - 1]),
        "none": np.zeros(m, bool),
        "all": np.ones(m, bool),
        "by pair": rng.random((n, m)) < 0.1,
        "few a query": rng.random((n, m)) < 0.01,
        "queries with nothing": one_row_empty,
        "strided": big[::2, ::3],
        "transposed": (rng.random((m, n)) < 0.4).T,
        "reversed": big[::2, :m][:, ::-1],
        "strided vector": big[0, ::3],
        "broadcast": np.broadcast_to(rng.random(m) < 0.5, (n, m)),
        "broadcast down": np.broadcast_to(rng.random((n, 1)) < 0.5, (n, m)),
    }
    for name, mask in masks.items():
        for k in (1, 10, 200):
            got = pycm.topk(q, g, k, metric, mask=mask)
            assert_same(got, oracles.topk(q, g, k, metric, mask), f"{name} {metric} k={k}")


@METRIC
def test_missing_matches_are_filled(metric: str, pair: tuple[np.ndarray, np.ndarray]) -> None:
    q, g = pair
    mask = np.zeros(len(g), bool)
    mask[[4, 100]] = True
    scores, indices = pycm.topk(q, g, 5, metric, mask=mask)
    filler = np.inf if metric in oracles.DISTANCES else -np.inf
    assert (np.sort(indices[:, :2], axis=1) == [4, 100]).all()
    assert (indices[:, 2:] == -1).all()
    assert (scores[:, 2:] == filler).all()
    assert np.isfinite(scores[:, :2]).all()


def exclusion_forms(offsets: np.ndarray, indices: np.ndarray, columns: int) -> dict[str, Any]:
    from scipy import sparse

    shape = (len(offsets) - 1, columns)
    ones = np.ones(len(indices), np.float32)
    return {
        "pair of int64": (offsets, indices),
        "pair of int32": (offsets.astype(np.int32), indices.astype(np.int32)),
        "strided pair": (np.repeat(offsets, 2)[::2], np.repeat(indices, 3)[::3]),
        "scipy matrix": sparse.csr_matrix((ones, indices, offsets), shape),
        "scipy array": sparse.csr_array((ones, indices, offsets), shape),
        "torch": torch.sparse_csr_tensor(torch.tensor(offsets), torch.tensor(indices), torch.tensor(ones), shape),
    }


@METRIC
def test_exclusions(level: str, metric: str, pair: tuple[np.ndarray, np.ndarray]) -> None:
    q, g = pair
    rng = np.random.default_rng(8)
    n, m = len(q), len(g)
    single = rng.integers(-1, m, n)
    single[:3] = -1
    # What a query would otherwise find is what it must not.
    best = pycm.topk(q, g, 20, metric).indices
    single[3:] = best[3:, 0]
    allowed = np.ones((n, m), bool)
    allowed[np.arange(3, n), single[3:]] = False
    want = oracles.topk(q, g, 12, metric, allowed)
    for exclude in (single, single.astype(np.int16), single.tolist()):
        assert_same(pycm.topk(q, g, 12, metric, exclude=exclude), want)
    counts = rng.integers(0, 21, n)
    counts[5] = 0
    offsets = np.concatenate([[0], np.cumsum(counts)])
    indices = np.concatenate([np.sort(best[i, : counts[i]]) for i in range(n)]).astype(np.int64)
    mask = rng.random((n, m)) < 0.7
    allowed = mask.copy()
    for i in range(n):
        allowed[i, best[i, : counts[i]]] = False
    want = oracles.topk(q, g, 12, metric, allowed)
    tq, tg, tmask = torch.from_numpy(q), torch.from_numpy(g), torch.from_numpy(mask)
    for name, exclude in exclusion_forms(offsets, indices, m).items():
        assert_same(pycm.topk(tq, tg, 12, metric, mask=tmask, exclude=exclude), want, f"torch, {name}")
        assert_same(pycm.topk(q, g, 12, metric, mask=mask, exclude=exclude), want, f"NumPy, {name}")


def test_excluding_everything_or_nothing(pair: tuple[np.ndarray, np.ndarray]) -> None:
    q, g = pair
    n, m = len(q), len(g)
    everything = (np.arange(n + 1) * m, np.tile(np.arange(m), n))
    scores, indices = pycm.topk(q, g, 3, "dot", exclude=everything)
    assert (indices == -1).all()
    assert (scores == -np.inf).all()
    nothing = (np.zeros(n + 1, np.int64), np.zeros(0, np.int64))
    assert_same(pycm.topk(q, g, 3, "dot", exclude=nothing), oracles.topk(q, g, 3, "dot"))
    # Repeated and unsorted entries mean the same as sorted ones.
    twice = (np.arange(n + 1) * 4, np.tile([7, 3, 7, 3], n))
    allowed = ~np.isin(np.arange(m), [3, 7])
    assert_same(pycm.topk(q, g, 3, "dot", exclude=twice), oracles.topk(q, g, 3, "dot", allowed))


# ---- empty inputs, fast mode, large results ----


@METRIC
@DTYPE
def test_no_queries(metric: str, dtype: str) -> None:
    q, g = to(dtype, np.zeros((0, 5))), to(dtype, np.ones((9, 5)))
    scores, indices = (np.asarray(part) for part in pycm.topk(q, g, 4, metric))
    assert scores.shape == indices.shape == (0, 4)
    assert scores.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert indices.dtype == np.int64


@METRIC
@pytest.mark.parametrize("k", [1, 10, 300])
def test_fast_is_within_its_bound(level: str, metric: str, k: int) -> None:
    from tolerances import FAST_EXTRA

    rng = np.random.default_rng(9)
    q = rng.standard_normal((50, 96)).astype(np.float32)
    g = (rng.standard_normal((1500, 96)) + 0.5).astype(np.float32)
    mask = rng.random((50, 1500)) < 0.8
    scores, indices = pycm.topk(q, g, k, metric, mask=mask, precision="fast")
    assert mask[np.arange(50)[:, None], indices].all()
    assert all(len(set(row)) == k for row in indices.tolist())
    order = scores if metric in oracles.DISTANCES else -scores
    assert (np.diff(order, axis=1) >= 0).all()
    square = metric in oracles.DISTANCES
    exact = reference.similarity(q, g, metric)
    norms = np.linalg.norm(q.astype(float), axis=1)[:, None], np.linalg.norm(g.astype(float), axis=1)
    scale = (norms[0] + norms[1]) ** 2 if square else norms[0] * norms[1] if metric == "dot" else np.ones_like(exact)
    bound = (96 + FAST_EXTRA) * 2.0**-24 * scale
    chosen = np.take_along_axis(exact, indices, 1)
    power = 2 if metric == "euclidean" else 1
    error = np.abs(scores.astype(float) ** power - chosen**power)
    assert (error <= np.take_along_axis(bound, indices, 1)).all()
    # No pair left out is better than the last one chosen by more than both bounds.
    exact = exact**power if square else -exact
    left_out = np.where(mask, exact + 2 * bound, np.inf)
    np.put_along_axis(left_out, indices, np.inf, 1)
    last = np.take_along_axis(exact, indices, 1).max(axis=1) if k else None
    assert (left_out.min(axis=1) >= last - 2 * bound.max(axis=1)).all()


def test_fast_never_matches_nan() -> None:
    rng = np.random.default_rng(10)
    q, g = rng.standard_normal((5, 8)).astype(np.float32), rng.standard_normal((200, 8)).astype(np.float32)
    g[[3, 77, 199]] = np.nan
    q[2, 4] = np.nan
    for metric in METRICS:
        scores, indices = pycm.topk(q, g, 4, metric, precision="fast")
        assert not np.isin(indices, [3, 77, 199]).any(), metric
        assert (indices[2] == -1).all(), metric
        assert not np.isnan(scores).any(), metric


@pytest.mark.slow
@pytest.mark.skipif(__import__("os").environ.get("PYCM_BIG") != "1", reason="PYCM_BIG=1 runs 2.8e9 pairs")
def test_more_than_two_to_the_31_pairs() -> None:
    rng = np.random.default_rng(11)
    q = rng.standard_normal((70_000, 2)).astype(np.float32)
    g = rng.standard_normal((40_000, 2)).astype(np.float32)
    assert len(q) * len(g) > 1 << 31
    scores, indices = pycm.topk(q, g, 1, "euclidean")
    rows = np.concatenate([np.arange(20), rng.integers(0, len(q), 100), np.arange(len(q) - 20, len(q))])
    assert_same((scores[rows], indices[rows]), oracles.topk(q[rows], g, 1, "euclidean"))


def test_levels_agree_with_each_other(every_level: list[str]) -> None:
    rng = np.random.default_rng(12)
    q, g = rng.standard_normal((64, 100)), rng.standard_normal((3000, 100))
    for dtype in (np.float32, np.float64):
        results = []
        for name in every_level:
            use_level(name)
            results.append(pycm.topk(q.astype(dtype), g.astype(dtype), 25, "pearson"))
        for other in results[1:]:
            assert_same(other, results[0])
