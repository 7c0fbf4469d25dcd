"""pycm.compat.faiss against FAISS itself: the same calls on both."""

from __future__ import annotations

import copy
import pickle
import threading
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import pycm
import pycm.compat.faiss as ours

theirs: Any = pytest.importorskip("faiss")

L2, IP = ours.METRIC_L2, ours.METRIC_INNER_PRODUCT
MODULES = pytest.mark.parametrize("faiss", [theirs, ours], ids=["faiss", "pycm"])
METRICS = pytest.mark.parametrize("metric", [L2, IP], ids=["l2", "ip"])


def data(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact(queries: np.ndarray, rows: np.ndarray, metric: int) -> np.ndarray:
    """[N, M] values in fp64, by their definition."""
    q, x = queries.astype(np.float64)[:, None], rows.astype(np.float64)[None]
    return ((q - x) ** 2).sum(-1) if metric == L2 else (q * x).sum(-1)


def tolerance(values: np.ndarray) -> np.ndarray:
    """What FAISS's fp32 sums may be off by."""
    return 2e-5 * (1 + np.abs(values))


def assert_same_neighbours(found: Any, expected: Any, queries: np.ndarray, rows: np.ndarray, metric: int) -> None:
    """Values agree; ids do, or are as good as FAISS's within its rounding."""
    (d, i), (d_faiss, i_faiss) = found, expected
    assert (d.dtype, i.dtype, d.shape, i.shape) == (d_faiss.dtype, i_faiss.dtype, d_faiss.shape, i_faiss.shape)
    np.testing.assert_array_equal(i == -1, i_faiss == -1)
    np.testing.assert_array_equal(d[i == -1], d_faiss[i == -1])
    assert (np.abs(d - d_faiss) <= tolerance(d_faiss))[i >= 0].all()
    truth = exact(queries, rows, metric)
    for q in range(len(i)):
        real = i[q] >= 0
        assert len(set(i[q][real])) == real.sum()
        np.testing.assert_array_equal(d[q][real], truth[q][i[q][real]].astype(np.float32))
        differ = real & (i[q] != i_faiss[q])
        a, b = truth[q][i[q][differ]], truth[q][i_faiss[q][differ]]
        assert (np.abs(a - b) <= tolerance(a)).all()


@METRICS
@pytest.mark.parametrize(
    ("nq", "nb", "d", "k"), [(7, 300, 24, 10), (40, 50, 3, 50), (3, 6, 4, 9), (2, 0, 4, 3), (0, 5, 4, 2), (5, 1, 1, 1)]
)
def test_knn(metric: int, nq: int, nb: int, d: int, k: int) -> None:
    queries, rows = data(1, nq, d), data(2, nb, d)
    assert_same_neighbours(
        ours.knn(queries, rows, k, metric), theirs.knn(queries, rows, k, metric), queries, rows, metric
    )


def test_knn_is_exact_where_faiss_cancels() -> None:
    # ‖x‖² - 2xy + ‖y‖², which FAISS uses for 20 queries and more, cannot tell these rows apart.
    rows = np.full((50, 64), 1000, np.float32)
    rows[:, 0] += np.arange(50) / 64
    d, i = ours.knn(rows, rows, 2)
    np.testing.assert_array_equal(i[:, 0], np.arange(50))
    np.testing.assert_array_equal(d[:, 0], 0)
    np.testing.assert_array_equal(d[:, 1], np.float32(1 / 64) ** 2)


@METRICS
def test_knn_ties_go_to_the_smaller_id(metric: int) -> None:
    rows = np.repeat(data(3, 4, 8), 5, axis=0)
    d, i = ours.knn(data(4, 6, 8), rows, 20, metric)
    assert ((i[:, 1:] > i[:, :-1]) | (d[:, 1:] != d[:, :-1])).all()


@METRICS
def test_knn_values_that_are_not_finite(metric: int) -> None:
    queries, rows = data(5, 3, 4), data(6, 8, 4)
    rows[1, 0], rows[2, 0], rows[3, 0], rows[4] = np.nan, np.inf, -np.inf, 1e37
    queries[1, 2] = np.nan
    d, i = ours.knn(queries, rows, 8, metric)
    d_faiss, i_faiss = theirs.knn(queries, rows, 8, metric)
    np.testing.assert_array_equal(i, i_faiss)
    np.testing.assert_allclose(d, d_faiss, rtol=2e-5)


@METRICS
def test_converts_what_faiss_converts(metric: int) -> None:
    queries, rows = data(7, 2, 3).astype(np.float64), data(8, 5, 3).astype(np.float16)
    for faiss in (ours, theirs):
        d, i = faiss.knn(queries.tolist(), rows.tolist(), 2, metric)
        index = faiss.IndexFlat(3, metric)
        index.add(rows[::-1][::-1])
        d_index, i_index = index.search(np.asfortranarray(queries), 2)
        assert d.dtype == d_index.dtype == np.float32
        np.testing.assert_array_equal(i, i_index)
        np.testing.assert_allclose(d, d_index, rtol=1e-6)


def errors_of(call: Any) -> type[BaseException]:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (the type is what is compared)
        call()
    return caught.type


def test_errors_are_of_the_same_type() -> None:
    queries, rows = data(9, 2, 4), data(10, 6, 4)

    def calls(faiss: ModuleType) -> list[Any]:
        index = faiss.IndexFlatL2(4)
        index.add(rows)
        return [
            lambda: faiss.knn(queries, rows[:, :3], 2),
            lambda: faiss.knn(queries, rows, -1),
            lambda: faiss.knn(queries[0], rows, 2),
            lambda: index.add(rows[:, :3]),
            lambda: index.add(rows[0]),
            lambda: index.add(rows.tolist()),
            lambda: index.search(queries, 0),
            lambda: index.search(queries[:, :2], 1),
            lambda: index.search(queries[0], 1),
            lambda: index.search(queries, 2.0),
            lambda: index.search(queries, 3, D=np.empty((2, 2), np.float32)),
            lambda: index.range_search(queries[:, :2], 1.0),
            lambda: index.reconstruct(6),
            lambda: index.reconstruct(0, np.empty(3, np.float32)),
            lambda: index.reconstruct_n(4, 5),
            lambda: index.reconstruct_n(0, 2, np.empty((3, 4), np.float32)),
            lambda: index.reconstruct_batch([0, 9]),
            lambda: index.remove_ids([0]),
            lambda: index.remove_ids(np.zeros((1, 1), np.int64)),
            lambda: index.assign(queries, 2, np.empty((2, 3), np.int64)),
            lambda: faiss.read_index("/nonexistent/index"),
        ]

    for number, (mine, reference) in enumerate(zip(calls(ours), calls(theirs), strict=True)):
        assert issubclass(errors_of(mine), errors_of(reference)), number


def test_what_faiss_reads_out_of_bounds_raises() -> None:
    index = ours.IndexFlatL2(4)
    index.add(data(11, 3, 4))
    with pytest.raises(RuntimeError, match=r"reconstruct: key must be in \[0, 3\), got -1"):
        index.reconstruct(-1)
    with pytest.raises(NotImplementedError, match="metric"):
        ours.IndexFlat(4, 2)
    with pytest.raises(NotImplementedError, match="metric"):
        ours.knn(data(1, 2, 4), data(2, 3, 4), 1, 3)
    with pytest.raises(ValueError, match="d must be positive"):
        ours.IndexFlatIP(0)


@METRICS
def test_search_through_additions_and_removals(metric: int) -> None:
    rng, queries = np.random.default_rng(12), data(13, 5, 16)
    mine, reference = ours.IndexFlat(16, metric), theirs.IndexFlat(16, metric)
    for step in range(30):
        if rng.random() < 0.7:
            rows = data(100 + step, int(rng.integers(0, 40)), 16)
            for index in (mine, reference):
                index.add(rows)
        else:
            ids = rng.integers(-2, reference.ntotal + 3, 7)
            assert mine.remove_ids(ids) == reference.remove_ids(ids)
        assert mine.ntotal == reference.ntotal
        rows = reference.reconstruct_n()
        np.testing.assert_array_equal(mine.reconstruct_n(), rows)
        k = int(rng.integers(1, 20))
        assert_same_neighbours(mine.search(queries, k), reference.search(queries, k), queries, rows, metric)
    assert mine.ntotal > 50
    mine.reset()
    assert mine.ntotal == 0
    assert (mine.search(queries, 2)[1] == -1).all()


@MODULES
def test_attributes(faiss: Any) -> None:
    for index, metric in ((faiss.IndexFlatL2(5), L2), (faiss.IndexFlatIP(5), IP), (faiss.IndexFlat(5), L2)):
        assert (index.d, index.ntotal, index.is_trained, index.metric_type) == (5, 0, True, metric)
        index.train(data(1, 3, 5))
        assert index.ntotal == 0
    assert (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2) == (0, 1)


@MODULES
def test_reconstruct(faiss: Any) -> None:
    rows, index = data(14, 9, 6), faiss.IndexFlatIP(6)
    index.add(rows)
    place = np.empty(6, np.float32)
    assert index.reconstruct(3, place) is place
    np.testing.assert_array_equal(place, rows[3])
    np.testing.assert_array_equal(index.reconstruct(8), rows[8])
    np.testing.assert_array_equal(index.reconstruct_n(2, 4), rows[2:6])
    np.testing.assert_array_equal(index.reconstruct_n(5), rows[5:])
    assert index.reconstruct_n(9, 0).shape == (0, 6)
    np.testing.assert_array_equal(index.reconstruct_batch([7, 0, 7]), rows[[7, 0, 7]])
    index.reconstruct_n(0, 1)[:] = 0  # a copy
    np.testing.assert_array_equal(index.reconstruct(0), rows[0])


@MODULES
def test_the_index_copies_its_rows(faiss: Any) -> None:
    rows, index = data(15, 4, 3), faiss.IndexFlatL2(3)
    index.add(rows)
    kept = rows.copy()
    rows[:] = 0
    np.testing.assert_array_equal(index.reconstruct_n(), kept)
    np.testing.assert_array_equal(index.search(kept, 1)[1][:, 0], np.arange(4))


@METRICS
def test_search_writes_where_it_is_told(metric: int) -> None:
    queries, rows = data(16, 3, 4), data(17, 8, 4)
    for faiss in (ours, theirs):
        index = faiss.IndexFlat(4, metric)
        index.add(rows)
        d, i = np.empty((3, 2), np.float32), np.empty((3, 2), np.int64)
        found = index.search(queries, 2, D=d, I=i)
        assert found[0] is d
        assert found[1] is i
        np.testing.assert_array_equal(index.assign(queries, 2), i)
        d_again, i_again, found_rows = index.search_and_reconstruct(queries, 9)
        np.testing.assert_array_equal(d_again[:, :2], d)
        np.testing.assert_array_equal(found_rows[:, :8], rows[i_again[:, :8]])
        assert np.isnan(found_rows[:, 8]).all()


def selectors(faiss: Any) -> list[Any]:
    """Keep the list: FAISS's combined selectors do not keep what they combine."""
    band, some = faiss.IDSelectorRange(10, 30), faiss.IDSelectorBatch([3, 12, 25, 25, 70, 10**9])
    return [
        band,
        some,
        faiss.IDSelectorArray(np.array([5, 1, 60])),  # FAISS finds an id that is given twice twice
        faiss.IDSelectorNot(band),
        faiss.IDSelectorAnd(band, some),
        faiss.IDSelectorOr(band, some),
        faiss.IDSelectorXOr(band, some),
        faiss.IDSelectorAll(),
        faiss.IDSelectorRange(50, 50),
        some,
    ]


@METRICS
@pytest.mark.parametrize("number", range(9))
def test_selectors(metric: int, number: int) -> None:
    queries, rows = data(18, 4, 8), data(19, 80, 8)
    mine, reference = ours.IndexFlat(8, metric), theirs.IndexFlat(8, metric)
    results, chosen = [], []
    for faiss, index in ((ours, mine), (theirs, reference)):
        every = selectors(faiss)
        index.add(rows)
        params = faiss.SearchParameters(sel=every[number])
        results.append((index.search(queries, 12, params=params), index.range_search(queries, 5.0, params=params)))
        chosen.append([every[number].is_member(i) for i in range(80)])
        results[-1] += (index.remove_ids(every[number]),)
    assert chosen[0] == chosen[1]
    assert_same_neighbours(results[0][0], results[1][0], queries, rows, metric)
    assert_same_ranges(results[0][1], results[1][1], queries, rows, 5.0, metric)
    assert results[0][2] == results[1][2] == sum(chosen[1])
    np.testing.assert_array_equal(mine.reconstruct_n(), reference.reconstruct_n())


def assert_same_ranges(
    found: Any, expected: Any, queries: np.ndarray, rows: np.ndarray, limit: float, metric: int
) -> None:
    """The same sets, but for pairs whose value FAISS's rounding could carry over the limit."""
    truth = exact(queries, rows, metric)
    (lims, d, i), (lims_faiss, d_faiss, i_faiss) = found, expected
    assert (lims.dtype, d.dtype, i.dtype, lims.shape) == (lims_faiss.dtype, d_faiss.dtype, np.int64, lims_faiss.shape)
    assert lims[-1] == len(d) == len(i)
    for q in range(len(queries)):
        mine = dict(zip(i[lims[q] : lims[q + 1]], d[lims[q] : lims[q + 1]], strict=True))
        reference = dict(
            zip(i_faiss[lims_faiss[q] : lims_faiss[q + 1]], d_faiss[lims_faiss[q] : lims_faiss[q + 1]], strict=True)
        )
        assert list(mine) == sorted(mine)
        for row, value in mine.items():
            assert value == np.float32(truth[q, row])
        for row in mine.keys() & reference.keys():
            assert abs(mine[row] - reference[row]) <= tolerance(reference[row])
        for row in mine.keys() ^ reference.keys():
            assert abs(truth[q, row] - limit) <= tolerance(np.float64(limit))


@METRICS
@pytest.mark.parametrize("limit", [-3.0, 0.0, 4.0, 20.0, np.inf, -np.inf, np.nan])
def test_range_search(metric: int, limit: float) -> None:
    queries, rows = data(20, 25, 12), data(21, 150, 12)
    rows[:25] = queries
    mine, reference = ours.IndexFlat(12, metric), theirs.IndexFlat(12, metric)
    for index in (mine, reference):
        index.add(rows)
    assert_same_ranges(
        mine.range_search(queries, limit), reference.range_search(queries, limit), queries, rows, limit, metric
    )


@METRICS
def test_range_search_leaves_the_limit_out(metric: int) -> None:
    rows = np.arange(6, dtype=np.float32)[:, None]
    results = []
    for faiss in (ours, theirs):
        index = faiss.IndexFlat(1, metric)
        index.add(rows)
        results.append(index.range_search(np.array([[1.0], [2.0]], np.float32), 4.0))
    for mine, reference in zip(*results, strict=True):
        np.testing.assert_array_equal(mine, reference)


def test_range_search_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, index = data(22, 23, 6), ours.IndexFlatL2(6)
    index.add(data(23, 40, 6))
    whole = index.range_search(queries, 6.0)
    monkeypatch.setattr(ours, "_JOIN_PAIRS", 100)
    for part, expected in zip(index.range_search(queries, 6.0), whole, strict=True):
        np.testing.assert_array_equal(part, expected)
    assert whole[0][-1] > 100
    empty = index.range_search(queries[:0], 6.0)
    assert [len(part) for part in empty] == [1, 0, 0]
    assert ours.IndexFlatL2(6).range_search(queries, 6.0)[0].tolist() == [0] * 24


@METRICS
def test_index_and_knn_give_the_same_bits(metric: int) -> None:
    queries, rows = data(24, 60, 32), data(25, 900, 32)
    index = ours.IndexFlat(32, metric)
    for start in range(0, 900, 123):
        index.add(rows[start : start + 123])
    for found, expected in zip(index.search(queries, 15), ours.knn(queries, rows, 15, metric), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
        index.search(queries, 15)[1], pycm.topk(queries, rows, 15, "sqeuclidean" if metric == L2 else "dot").indices
    )


def test_searches_in_threads() -> None:
    queries, index = data(26, 40, 16), ours.IndexFlatIP(16)
    index.add(data(27, 500, 16))
    expected, found = index.search(queries, 5)[1], []
    threads = [threading.Thread(target=lambda: found.append(index.search(queries, 5)[1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for ids in found:
        np.testing.assert_array_equal(ids, expected)


@METRICS
def test_pickles_and_copies(metric: int) -> None:
    queries, index = data(28, 3, 4), ours.IndexFlat(4, metric)
    index.add(data(29, 30, 4))
    for other in (pickle.loads(pickle.dumps(index)), copy.deepcopy(index)):
        other.add(data(30, 1, 4))
        assert (other.ntotal, index.ntotal, other.metric_type) == (31, 30, metric)
        np.testing.assert_array_equal(
            other.search(queries, 2, params=ours.SearchParameters(sel=ours.IDSelectorRange(0, 30)))[1],
            index.search(queries, 2)[1],
        )
