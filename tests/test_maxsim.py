"""maxsim and maxsim_topk: against the specification, in every form, dtype, level and number of threads."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from interaction_cases import (
    COUNTS,
    OTHER_COUNTS,
    Sets,
    best_items,
    case,
    forms,
    make,
    maxsim_of,
    padded,
    products,
    ragged,
    ways,
)
from oracles import assert_same
from tolerances import SLACK

import pycm
from pycm import reference

WAYS = list(ways())
DTYPES = [np.float32, np.float16, np.float64]
WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))


def largest_score(queries: Sets, gallery: Sets, way: dict[str, str]) -> float:
    """The largest magnitude a score can have."""
    unit = way["metric"] == "cosine"
    norms = [
        [np.ones(len(x)) if unit else np.linalg.norm(x.astype(float), axis=1) for x in s] for s in (queries, gallery)
    ]
    most = [max((float(n.max(initial=0)) for n in side), default=0.0) for side in norms]
    fold = np.mean if way["reduce"] == "mean" else np.sum
    sums = [max((float(fold(n)) for n in side if len(n)), default=0.0) for side in norms]
    forth, back = sums[0] * most[1], sums[1] * most[0]
    return {"t2i": forth, "i2t": back, "both": forth + back}[way["direction"]]


@functools.cache
def in_float32(dim: int, input_dtype: Any, metric: str, reduce: str, direction: str) -> Any:
    """NumPy's own arithmetic in the inputs' dtype, fp32 for halves: what a user writes."""
    queries, gallery = case(dim, input_dtype).queries, case(dim, input_dtype).gallery
    dtype = np.float64 if input_dtype == np.float64 else np.float32
    scores = np.zeros((len(queries), len(gallery)), dtype)
    for i, x in enumerate(queries):
        for j, y in enumerate(gallery):
            if not len(x) or not len(y):
                continue
            a, b = x.astype(dtype), y.astype(dtype)
            if metric == "cosine":
                a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
            s = a @ b.T
            fold = np.mean if reduce == "mean" else np.sum
            if direction != "i2t":
                scores[i, j] += fold(s.max(1))
            if direction != "t2i":
                scores[i, j] += fold(s.max(0))
    return scores


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(level: str, dtype: Any) -> None:
    """The rule of tolerances.py, with NumPy as the peer."""
    for dim in (1, 33, 129):
        known = case(dim, dtype)
        (q, q_lengths), (g, g_lengths) = padded(known.queries), padded(known.gallery)
        for way in ways():
            want = known.want(**way)
            got = pycm.maxsim(q, g, q_lengths, g_lengths, **way)
            assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
            peer = np.abs(in_float32(dim, dtype, *way.values()) - want).max()
            slack = SLACK[way["metric"]] * np.finfo(got.dtype).eps * largest_score(known.queries, known.gallery, way)
            assert np.abs(got - want).max() <= peer + slack, (dim, way)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(level: str, dtype: Any) -> None:
    """No rounding in a sum of small integers: every level gives the rounded exact value."""
    for dim in (2, 45, 200):
        known = case(dim, dtype, values="integers")
        for way in ways(["dot"]):
            got, want = pycm.maxsim(known.queries, known.gallery, **way), known.want(**way)
            if way["direction"] == "both":  # the sum of both directions is rounded twice
                np.testing.assert_allclose(got, want, rtol=2 * np.finfo(got.dtype).eps)
            else:
                np.testing.assert_array_equal(got, want.astype(got.dtype))


def test_the_quick_specification_is_the_specification() -> None:
    known = case(33, np.float32)
    for way in ways():
        np.testing.assert_array_equal(
            reference.maxsim(known.queries[:4], known.gallery[:5], **way), known.want(**way)[:4, :5]
        )
    want = reference.maxsim_topk(known.queries[:3], known.gallery[:6], 4)
    assert_same(want, best_items(known.want("dot", "sum", "t2i")[:3, :6], 4, np.float32))


@WAY
def test_forms_give_the_same_bits(level: str, way: dict[str, str]) -> None:
    q, g = make(COUNTS, 37), make(OTHER_COUNTS, 37)
    want = pycm.maxsim(list(q), list(g), **way)
    found = pycm.maxsim_topk(list(q), list(g), 5, **way)
    assert np.isfinite(want).all()
    for (name, a, a_lengths), (other, b, b_lengths) in zip(forms(q), forms(g), strict=True):
        np.testing.assert_array_equal(pycm.maxsim(a, b, a_lengths, b_lengths, **way), want, name)
        assert_same(pycm.maxsim_topk(a, b, 5, a_lengths, b_lengths, **way), found, other)


def test_without_lengths_every_vector_counts() -> None:
    x = make([9, 9, 9], 20)
    q = np.stack(x)
    np.testing.assert_array_equal(pycm.maxsim(q, q), pycm.maxsim(x, x))
    np.testing.assert_allclose(pycm.maxsim(q, q), reference.maxsim(x, x), rtol=1e-6)


@WAY
def test_neighbours_change_no_bit(level: str, way: dict[str, str]) -> None:
    """Many chunks and blocks: a pair's score is that of the pair alone, wherever its items stand."""
    rng = np.random.default_rng(3)
    q, g = make(rng.integers(0, 70, 60).tolist(), 24, 4), make(rng.integers(0, 40, 150).tolist(), 24, 5)
    scores = pycm.maxsim(q, g, **way)
    orders = rng.permutation(60), rng.permutation(150)
    shuffled = pycm.maxsim([q[i] for i in orders[0]], [g[j] for j in orders[1]], **way)
    np.testing.assert_array_equal(shuffled, scores[orders[0]][:, orders[1]])
    for i, j in zip(range(0, 60, 7), range(149, 0, -15), strict=False):
        np.testing.assert_array_equal(pycm.maxsim([q[i]], [g[j]], **way), scores[i : i + 1, j : j + 1])


@WAY
@pytest.mark.usefixtures("threads")
def test_threads_change_no_bit(way: dict[str, str]) -> None:
    q, g = make([20] * 40, 64, 6), make([30] * 300, 64, 7)
    results = []
    for count in (1, 2, 5):
        pycm.set_num_threads(count)
        results.append((pycm.maxsim(q, g, **way), *pycm.maxsim_topk(q, g, 7, **way)))
        results.append((pycm.maxsim(q[:1], g, **way), *pycm.maxsim_topk(q[:1], g, 7, **way)))
    for other in results[2:]:
        for a, b in zip(other, results[0 if len(other[0]) > 1 else 1], strict=True):
            np.testing.assert_array_equal(a, b)


@functools.cache
def long_items() -> tuple[Sets, Sets, dict[str, Any]]:
    q, g = make([1100, 4], 3, 8), make([5, 1030, 1], 3, 9)
    return q, g, {metric: products(q, g, metric) for metric in ("dot", "cosine")}


def test_items_longer_than_a_chunk(level: str) -> None:
    q, g, pairs = long_items()
    for way in ways():
        want = maxsim_of(pairs[way["metric"]], way["reduce"], way["direction"])
        np.testing.assert_allclose(pycm.maxsim(q, g, **way), want, rtol=1e-5)
        assert_same(pycm.maxsim_topk(q, g, 2, **way), best_items(want, 2, np.float32))


# ---- hard values ----


@functools.cache
def hard(dtype: Any) -> tuple[Sets, Sets, dict[str, Any]]:
    """NaN, infinities, zeros, subnormals, overflow."""
    q, g = make([4, 7, 2, 5, 3, 6], 19, 10, dtype), make([3, 8, 5, 1, 20, 6, 2, 9], 19, 11, dtype)
    huge, tiny = (1e30, 1e-41) if dtype == np.float32 else (1e200, 1e-312)
    q[1][3, 2], q[2][0, 0], q[3][:], q[4] = np.nan, np.inf, 0, q[4] * dtype(huge)
    g[1][7, 18], g[2][1, 1], g[3][:], g[4][5], g[5] = np.nan, -np.inf, 0, 0, g[5] * dtype(huge)
    g[6] = g[6] * dtype(tiny)
    return q, g, {metric: products(q, g, metric) for metric in ("dot", "cosine")}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hard_values(level: str, dtype: Any) -> None:
    """As the specification has it, among ordinary items."""
    q, g, pairs = hard(dtype)
    for way in ways():
        with np.errstate(all="ignore"):
            want = maxsim_of(pairs[way["metric"]], way["reduce"], way["direction"])
            rounded = want.astype(dtype)
        got = pycm.maxsim(q, g, **way)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want), str(way))
        for sign in (1, -1):
            np.testing.assert_array_equal(got == sign * np.inf, rounded == sign * np.inf, str(way))
        finite = np.isfinite(rounded)
        assert finite.sum() > 15
        scale = np.abs(want[finite])
        assert (np.abs(got[finite] - want[finite]) <= 1e-4 * scale + 1e-4 * (scale < 1e3)).all(), way
        with np.errstate(all="ignore"):
            assert_same(pycm.maxsim_topk(q, g, len(g), **way), best_items(want, len(g), dtype), str(way))


def test_empty() -> None:
    x, y = make([3, 0, 2], 5), make([4, 0], 5)
    for way in ways():
        scores = pycm.maxsim(x, y, **way)
        assert not scores[1].any()
        assert not scores[:, 1].any()
        assert scores[0, 0] != 0
    none = np.zeros((0, 4, 5), np.float32)
    some = np.zeros((3, 4, 5), np.float32)
    assert pycm.maxsim(none, some).shape == (0, 3)
    assert pycm.maxsim(some, none).shape == (3, 0)
    assert pycm.maxsim_topk(none, some, 2).scores.shape == (0, 2)
    short = np.zeros((3, 0, 5), np.float32)
    np.testing.assert_array_equal(pycm.maxsim(short, some), np.zeros((3, 3)))
    empty = (np.zeros((0, 5), np.float32), np.zeros(1, np.int64))
    assert pycm.maxsim(empty, some).shape == (0, 3)


# ---- top-k ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_is_exact(level: str, dtype: Any) -> None:
    for dim, k in ((1, 1), (33, 5), (129, 14)):
        known = case(dim, dtype)
        for way in ways():
            found = pycm.maxsim_topk(known.queries, known.gallery, k, **way)
            assert_same(found, best_items(known.want(**way), k, dtype), f"{dim} {k} {way}")


@functools.cache
def near_ties() -> tuple[Sets, Sets, dict[str, Any]]:
    """Copies, copies with some elements moved by one ulp, and copies with their vectors in another order."""
    rng = np.random.default_rng(14)
    base = make([11], 96, 15)[0]
    gallery = []
    for i in range(40):
        item = base.copy()
        if i % 3:
            for row, column in rng.integers(0, (11, 96), (i % 5, 2)):
                item[row, column] = np.nextafter(item[row, column], np.float32(rng.choice([-9, 9])))
        gallery.append(item[rng.permutation(11)] if i % 4 == 3 else item)
    queries = [*make([6, 20], 96, 16), base]
    return queries, gallery, {metric: products(queries, gallery, metric) for metric in ("dot", "cosine")}


def test_topk_of_near_ties(level: str) -> None:
    queries, gallery, pairs = near_ties()
    for way in ways():
        want = maxsim_of(pairs[way["metric"]], way["reduce"], way["direction"])
        for k in (1, 7, 40):
            found = pycm.maxsim_topk(queries, gallery, k, **way)
            assert_same(found, best_items(want, k, np.float32), f"{way} k={k}")


def test_topk_beyond_one_chunk_of_queries() -> None:
    """More than 2^23 scores are screened in several chunks."""
    q, g = make([1] * 700, 1, 17), make([1] * 13_000, 1, 18)
    found = pycm.maxsim_topk(q, g, 3)
    table = np.concatenate(q).astype(float) * np.concatenate(g).astype(float).T
    assert_same(found, best_items(table, 3, np.float32))


def test_fast_topk_orders_maxsims_own_scores(level: str) -> None:
    q, g = make(COUNTS, 50, 19), make(OTHER_COUNTS, 50, 20)
    for way in ways():
        if way["direction"] == "both":  # rounded once less than maxsim's
            continue
        table = pycm.maxsim(q, g, **way)
        order = np.argsort(-table, axis=1, kind="stable")[:, :6]
        found = pycm.maxsim_topk(q, g, 6, precision="fast", **way)
        assert_same(found, (np.take_along_axis(table, order, 1), order))


# ---- kinds of arrays ----


class Exporter:
    """An array of another library, known by DLPack alone."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        class Namespace:
            @staticmethod
            def from_dlpack(array: Any) -> Exporter:
                return Exporter(np.from_dlpack(array))

        return Namespace


def test_dlpack() -> None:
    x, lengths = padded(make([3, 4, 5], 8))
    want = pycm.maxsim(x, x, lengths, lengths)
    got = pycm.maxsim(Exporter(x), Exporter(x), lengths, lengths)
    assert isinstance(got, Exporter)
    np.testing.assert_array_equal(got.array, want)


# ---- errors ----

ONES = np.ones((2, 3, 4), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, "queries must have shape [items, T, D], got [3, 4]", (ONES[0], ONES), {}),
        (ValueError, "gallery must have shape [items, T, D], got [3, 4]", (ONES, ONES[0]), {}),
        (ValueError, "gallery must have the queries' 4 features, got shape [2, 3, 3]", (ONES, ONES[:, :, :3]), {}),
        (ValueError, "queries must have at least one feature, got shape [2, 3, 0]", (ONES[..., :0], ONES[..., :0]), {}),
        (TypeError, "gallery must have the queries' dtype float32, got float64", (ONES, ONES.astype(float)), {}),
        (TypeError, "queries must be float32, float16, bfloat16 or float64", (ONES.astype(int), ONES), {}),
        (TypeError, "queries must be a torch tensor, a NumPy array", ("no", ONES), {}),
        (ValueError, "query_lengths must be in [0, 3], got 4", (ONES, ONES, [1, 4]), {}),
        (ValueError, "gallery_lengths must be in [0, 3], got -1", (ONES, ONES, None, [-1, 2]), {}),
        (ValueError, "query_lengths must have shape [2], got [3]", (ONES, ONES, [1, 1, 1]), {}),
        (TypeError, "query_lengths must hold integers", (ONES, ONES, [1.0, 2.0]), {}),
        (ValueError, "query_lengths must be None where queries are ragged", ((ONES[0], [0, 3]), ONES, [3]), {}),
        (ValueError, "query_offsets must run from 0 to 3, got 0 to 2", ((ONES[0], [0, 2]), ONES), {}),
        (ValueError, "gallery_offsets must not decrease, got 2 before 1", (ONES, (ONES[0], [0, 2, 1, 3])), {}),
        (ValueError, "queries must be a pair (values, offsets), got 3 items", ((ONES[0], [0, 3], 1), ONES), {}),
        (ValueError, "queries[1] must have shape [T, 4], got [2, 3]", ([ONES[0], ONES[0, :2, :3]], ONES), {}),
        (ValueError, "gallery must hold arrays, at least one", (ONES, []), {}),
        (ValueError, "metric must be dot or cosine, got 'euclidean'", (ONES, ONES), {"metric": "euclidean"}),
        (ValueError, "metric must be dot or cosine, got 'no'", (ONES, ONES), {"metric": "no"}),
        (ValueError, "reduce must be sum or mean, got 'max'", (ONES, ONES), {"reduce": "max"}),
        (ValueError, "direction must be t2i, i2t or both, got 'i2i'", (ONES, ONES), {"direction": "i2i"}),
        (TypeError, "direction must be a string, got int", (ONES, ONES), {"direction": 1}),
    ],
)
def test_errors(error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(error) as caught:
        pycm.maxsim(*arguments, **options)
    assert str(caught.value).startswith("maxsim: ")
    assert message in str(caught.value)
    padding: list[Any] = [None] * (4 - len(arguments))
    with pytest.raises(error) as caught:
        pycm.maxsim_topk(*arguments[:2], 1, *[*arguments, *padding][2:], **options)
    assert str(caught.value).startswith("maxsim_topk: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message", "k", "options"),
    [
        (ValueError, "k must be in [1, 2], got 3", 3, {}),
        (ValueError, "k must be in [1, 2], got 0", 0, {}),
        (TypeError, "k must be an integer, got float", 1.5, {}),
        (ValueError, "precision must be exact or fast, got 'quick'", 1, {"precision": "quick"}),
    ],
)
def test_topk_errors(error: type[Exception], message: str, k: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error) as caught:
        pycm.maxsim_topk(ONES, ONES, k, **options)
    assert f"maxsim_topk: {message}" in str(caught.value)
    with pytest.raises(ValueError, match="gallery must have at least one item"):
        pycm.maxsim_topk(ONES, ONES[:0], 1)


def test_ragged_helper_is_what_it_says() -> None:
    values, offsets = ragged(make([2, 0, 3], 4))
    assert values.shape == (5, 4)
    assert offsets.tolist() == [0, 2, 2, 5]
