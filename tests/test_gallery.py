"""Gallery in memory: what a search finds depends on the (id, row) pairs alone, and is what the specification says."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from gallery_cases import expected_topk
from oracles import METRICS

import pycm
from pycm import reference
from pycm.gallery import Gallery

DTYPES = ("float32", "float16", "bfloat16", "float64")


def draw(rng: np.random.Generator, shape: tuple[int, int], dtype: Any = np.float32) -> Any:
    """Rows of small integers, so that scores tie often."""
    return rng.integers(-2, 3, shape).astype(dtype)


def numpy_dtype(name: str) -> Any:
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)


# ---- searches ----


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_is_the_specification(metric: Any, dtype: str) -> None:
    rng = np.random.default_rng(1)
    rows, queries = (draw(rng, shape, numpy_dtype(dtype)) for shape in ((70, 9), (6, 9)))
    ids = rng.permutation(1000)[:70].tolist()
    gallery = Gallery(rows, ids=ids, metric=metric)
    for k in (1, 5, 69, 70):
        got = gallery.topk(queries, k)
        scores, expected = expected_topk(dict(zip(ids, rows, strict=True)), queries, k, metric)
        assert np.array_equal(got.ids, expected)
        assert got.scores.dtype == scores.dtype
        assert got.scores.tobytes() == scores.tobytes()
        assert [[ids[i] for i in row] for row in got.indices] == got.ids.tolist()


@pytest.mark.parametrize("strings", [False, True])
def test_the_order_and_number_of_additions_change_nothing(strings: bool) -> None:
    rng = np.random.default_rng(2)
    rows, queries = draw(rng, (200, 4)), draw(rng, (20, 4))
    names: list[Any] = [f"name {i}" if strings else 3 * i for i in range(200)]
    rounds = []
    for _ in range(5):
        order = rng.permutation(200)
        gallery = Gallery(dim=4)
        for some in np.split(order, np.sort(rng.integers(0, 200, 4))):
            gallery.add(rows[some], [names[i] for i in some])
        rounds.append(gallery.topk(queries, 17))
    others = [name for name in names if rng.random() < 0.3]
    gallery = Gallery(rows, ids=names)  # and removals that are taken back
    again = gallery.get(others)
    gallery.remove(others)
    gallery.topk(queries, 5)
    gallery.add(again, others)
    rounds.append(gallery.topk(queries, 17))
    gallery.compact()
    rounds.append(gallery.topk(queries, 17))
    for got in rounds[1:]:
        assert np.array_equal(got.ids, rounds[0].ids)
        assert got.scores.tobytes() == rounds[0].scores.tobytes()


def test_all_rows_equal() -> None:
    gallery = Gallery(np.ones((500, 3), np.float32), ids=np.arange(500)[::-1])
    assert gallery.topk(np.ones((2, 3), np.float32), 4).ids.tolist() == [[0, 1, 2, 3]] * 2
    assert gallery.topk(np.ones((2, 3), np.float32), 4, ids=[7, 400, 6, 2, 3]).ids.tolist() == [[2, 3, 6, 7]] * 2


def test_zeros_of_both_signs_tie_and_keep_their_signs() -> None:
    rows, query = np.array([[1e-30], [-1e-30], [1e-30]], np.float32), np.array([[1e-30]], np.float32)
    got = Gallery(rows, ids=[1, 0, 2], metric="dot").topk(query, 3)  # products below every float32
    assert got.ids.tolist() == [[0, 1, 2]]
    assert np.signbit(got.scores).tolist() == [[True, False, False]]


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_fewer_matches_than_k(metric: Any) -> None:
    rows = np.array([[np.nan], [1], [-np.inf if metric == "dot" else np.inf]], np.float32)
    worst = -np.inf if metric == "dot" else np.inf
    for ids, missing in ((["b", "c", "a"], None), ([5, 6, 4], -1)):
        got = Gallery(rows, ids=ids, metric=metric).topk(np.ones((1, 1), np.float32), 3)
        assert got.ids.tolist() == [[ids[1], ids[2], missing]]
        assert got.indices.tolist() == [[1, 2, -1]]
        assert got.scores[0, 1:].tolist() == [worst, worst]


def test_filters() -> None:
    rng = np.random.default_rng(3)
    rows, queries = draw(rng, (60, 5)), draw(rng, (8, 5))
    names = rng.permutation(100)[:60].tolist()
    gallery = Gallery(rows, ids=names, metric="dot")
    gone = [names[i] for i in (0, 13, 59)]
    gallery.remove(gone)
    held = {name: row for name, row in zip(names, rows, strict=True) if name not in gone}
    left = list(held)

    def check(got: Any, allowed: Any) -> None:
        scores, ids = expected_topk(held, queries, 9, "dot", np.asarray(allowed))
        assert np.array_equal(got.ids, ids)
        assert got.scores.tobytes() == scores.tobytes()
        assert [[left[i] if i >= 0 else -1 for i in row] for row in got.indices.tolist()] == got.ids.tolist()

    one, each = rng.random(57) < 0.4, rng.random((8, 57)) < 0.4
    some = rng.permutation(left)[:20].tolist()
    listed = np.isin(left, some)
    check(gallery.topk(queries, 9), np.ones(57, bool))
    check(gallery.topk(queries, 9, mask=one), one)
    check(gallery.topk(queries, 9, mask=each.tolist()), each)
    check(gallery.topk(queries, 9, ids=some), listed)
    check(gallery.topk(queries, 9, ids=some, mask=each), listed & each)
    check(gallery.topk(queries, 9, mask=np.zeros(57, bool)), np.zeros(57, bool))
    known = [rng.permutation([*left, *gone, 1000])[: rng.integers(0, 30)].tolist() for _ in queries]
    open_to = np.array([[name not in lists for name in left] for lists in known])
    check(gallery.topk(queries, 9, exclude=known), open_to)
    flat, offsets = np.concatenate(known).astype(np.int64), np.cumsum([0, *map(len, known)])
    check(gallery.topk(queries, 9, exclude=(offsets, flat), mask=one), open_to & one)
    own = [left[3], -1, None, 1000, *left[:4]]
    check(gallery.topk(queries, 9, exclude=own), np.array([[name != x for name in left] for x in own]))


@pytest.mark.parametrize("ids", [[0, 1, 2], [2, 1, 0]])
def test_no_queries(ids: list[int]) -> None:
    gallery, none = Gallery(np.eye(3, dtype=np.float32), ids=ids), np.empty((0, 3), np.float32)
    assert [part.shape for part in gallery.topk(none, 2, exclude=[])] == [(0, 2)] * 3
    assert gallery.rank(none, []).ranks.shape == (0,)
    ranks = gallery.rank(np.eye(3, dtype=np.float32), [[], [], []])
    assert (ranks.ranks.shape, ranks.offsets.tolist()) == ((0,), [0, 0, 0, 0])


def test_exclude_by_strings() -> None:
    gallery = Gallery(np.eye(3, dtype=np.float32), ids=["a", "b", "c"])
    got = gallery.topk(np.eye(3, dtype=np.float32), 1, exclude=["a", None, "x"])
    assert got.ids.tolist() == [["b"], ["b"], ["c"]]
    got = gallery.topk(np.eye(3, dtype=np.float32), 1, exclude=[["a", "b"], [], ("c",)])
    assert got.ids.tolist() == [["c"], ["b"], ["a"]]


def test_fast_scores_are_near() -> None:
    rng = np.random.default_rng(4)
    rows, queries = rng.standard_normal((2, 300, 32)).astype(np.float32)
    gallery = Gallery(rows, ids=np.arange(300)[::-1])
    fast, exact = gallery.topk(queries, 5, precision="fast"), gallery.topk(queries, 5)
    assert np.abs(fast.scores - exact.scores).max() < 0.1
    assert np.array_equal(fast.indices, 299 - fast.ids)


@pytest.mark.parametrize("ties", ["optimistic", "realistic", "pessimistic"])
def test_rank_is_the_specification(ties: Any) -> None:
    rng = np.random.default_rng(5)
    rows, queries = draw(rng, (50, 4)), draw(rng, (7, 4))
    names = rng.permutation(90)[:50].tolist()
    gallery = Gallery(rows, ids=names, metric="cosine")
    gallery.remove(names[:5])
    held, left = rows[5:], names[5:]
    share = {"optimistic": 0, "realistic": 0.5, "pessimistic": 1}[ties]
    mask = rng.random((7, 45)) < 0.7
    for single in (True, False):
        positives: Any = [rng.permutation(left)[: 1 if single else rng.integers(0, 4)].tolist() for _ in queries]
        places = [[left.index(name) for name in one] for one in positives]
        counts = reference.rank(queries, held, places, "cosine", mask)
        got = gallery.rank(queries, [one[0] for one in positives] if single else positives, ties=ties, mask=mask)
        assert got.greater.tolist() == counts.greater.tolist()
        assert got.equal.tolist() == counts.equal.tolist()
        assert got.scores.tobytes() == counts.scores.tobytes()
        assert got.ranks.tolist() == (counts.greater + share * counts.equal).tolist()
        assert (got.offsets is None) == single
        if not single:
            assert got.offsets.tolist() == np.cumsum([0, *map(len, positives)]).tolist()


def test_tensors_in_tensors_out() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(7)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        rows, queries = torch.from_numpy(draw(rng, (30, 6))).to(dtype), torch.from_numpy(draw(rng, (4, 6))).to(dtype)
        gallery = Gallery(rows[:20].t().contiguous().t())
        gallery.add(rows[20:].requires_grad_())
        got, expected = gallery.topk(queries, 5), pycm.topk(queries, rows, 5)
        assert all(isinstance(part, torch.Tensor) for part in got)
        assert torch.equal(got.indices, expected.indices)
        assert torch.equal(got.ids, expected.indices)
        assert torch.equal(got.scores, expected.scores)
        ranks = gallery.rank(queries, got.ids[:, 2])
        assert isinstance(ranks.ranks, torch.Tensor)
        assert (ranks.greater <= 2).all()
    named = Gallery(rows, ids=[str(i) for i in range(30)]).topk(queries, 2)
    assert isinstance(named.ids, np.ndarray)


# ---- metadata ----


def test_where() -> None:
    pa = pytest.importorskip("pyarrow")
    pc = pytest.importorskip("pyarrow.compute")
    rng = np.random.default_rng(9)
    rows, queries = draw(rng, (30, 4)), draw(rng, (5, 4))
    gallery = Gallery(rows[:10], metadata={"year": list(range(2000, 2010)), "tag": ["a", "b"] * 5})
    gallery.add(rows[10:14])
    for i in range(14, 20):
        gallery.add(rows[i : i + 1], metadata=pa.table({"tag": ["c"], "row": [i]}))
    gallery.add(rows[20:], metadata=pa.record_batch({"year": pa.array([1999] * 10)}))
    gallery.remove([2, 15])
    held = {i: row for i, row in enumerate(rows) if i not in (2, 15)}
    year = [*range(2000, 2010), *[None] * 10, *[1999] * 10]
    tag = [*["a", "b"] * 5, *[None] * 4, *"cccccc", *[None] * 10]
    for expression, allowed in (
        (pc.field("year") > 2004, [y is not None and y > 2004 for y in year]),
        (
            pc.field("year").is_null() | (pc.field("tag") == "b"),
            [y is None or t == "b" for y, t in zip(year, tag, strict=True)],
        ),
        (
            pc.field("tag").isin(["c", "b"]) & ~(pc.field("year") < 2005),
            [t == "b" and y > 2004 for y, t in zip(year, tag, strict=True)],
        ),
        (pc.field("row") >= 16, [16 <= i < 20 for i in range(30)]),
        (pc.scalar(True), [True] * 30),
    ):
        there = np.array([one for i, one in enumerate(allowed) if i in held])
        for gallery_now in (gallery, _compacted(gallery)):
            got = gallery_now.topk(queries, 6, where=expression)
            scores, ids = expected_topk(held, queries, 6, "cosine", there)
            assert np.array_equal(got.ids, ids)
            assert got.scores.tobytes() == scores.tobytes()
    assert gallery.metadata.to_pydict() == {
        "year": [y for i, y in enumerate(year) if i in held],
        "tag": [t for i, t in enumerate(tag) if i in held],
        "row": [i if 14 <= i < 20 else None for i in held],
    }


def _compacted(gallery: Gallery) -> Gallery:
    gallery = Gallery(np.stack([row for _, row in gallery]), ids=gallery.ids, metadata=gallery.metadata)
    gallery.add(np.ones((1, 4), np.float32), [1000])
    gallery.remove([1000])
    gallery.compact()
    return gallery


# ---- threads ----


def test_searches_and_changes_at_once() -> None:
    """Rows come and go together in fours: a search must see all four or none."""
    rows = np.repeat(np.eye(8, dtype=np.float32), 4, axis=0)
    gallery = Gallery(rows)
    failures: list[Any] = []
    stop = threading.Event()

    def search() -> None:
        while not stop.is_set():
            ids = gallery.topk(np.eye(8, dtype=np.float32), 4).ids
            if not all(len({name // 4 for name in row}) == 1 for row in ids.tolist()):
                failures.append(ids)

    def change(first: int) -> None:
        names = list(range(first, first + 4))
        for _ in range(60):
            gallery.remove(names)
            gallery.add(rows[names], names)
            gallery.compact()

    searchers = [threading.Thread(target=search) for _ in range(3)]
    changers = [threading.Thread(target=change, args=(first,)) for first in (0, 16)]
    for thread in searchers + changers:
        thread.start()
    for thread in changers:
        thread.join()
    stop.set()
    for thread in searchers:
        thread.join()
    assert not failures
    assert sorted(gallery.ids.tolist()) == list(range(32))
