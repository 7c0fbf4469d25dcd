"""Screens and galleries encoded beforehand: nothing but time depends on which screen, level, number of threads,
split of the queries or history of a gallery led to a result."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from conftest import use_level
from fuzz_makers import MAKERS
from hypothesis import given
from hypothesis import strategies as st
from oracles import DISTANCES, METRICS, assert_same, best_of
from pair_oracles import counts, table
from test_properties import CHECK

import pycm
from pycm import _C

Array = np.ndarray
METRIC = pytest.mark.parametrize("metric", METRICS)
SCREENS = ("float32", "bfloat16", "int8")
SCREEN = pytest.mark.parametrize("screen", SCREENS)
PARTS = ("panels", "columns", "stats", "centre", "info")


def data(n: int, m: int, d: int, maker: str = "anisotropic", seed: int = 0) -> tuple[Array, Array]:
    return MAKERS[maker](np.random.default_rng(seed), n, m, d)


def encoded(rows: Array, metric: str, screen: str = "auto") -> _C.EncodedGallery:
    gallery = _C.EncodedGallery(metric, screen)
    gallery.extend(rows)
    return gallery


def copied(gallery: _C.EncodedGallery) -> dict[str, Any]:
    return {name: np.array(part, order="C") for name, part in gallery.state().items()}


def everything(
    search: Any, gallery: tuple[Array, ...], q: Array, metric: str, m: int, screen: tuple[str, ...]
) -> list[Array]:
    """topk, rank and join, of _C or of an encoded gallery."""
    rng = np.random.default_rng(7)
    positives, offsets = rng.integers(0, m, len(q)), np.arange(len(q) + 1)
    named = (metric,) if gallery else ()
    exact = ("exact", None, None, None) if gallery else (None, None, None, "exact")
    threshold = {"euclidean": 6.0, "sqeuclidean": 36.0, "dot": 700.0}.get(metric, 0.95)
    return [
        *search.topk(q, *gallery, 7, *named, *exact, *screen),
        *search.rank(q, *gallery, positives, offsets, *named, None, None, None, *screen),
        *search.join(q, *gallery, threshold, *named, -1, len(q) * m, *screen),
    ]


def assert_all_same(results: list[list[Array]]) -> None:
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.tobytes() == theirs.tobytes()


# ---- what must not matter ----


@METRIC
def test_levels_threads_screens_and_forms(metric: str, every_level: list[str]) -> None:
    q, g = data(33, 2100, 40)
    results = []
    for level in every_level:
        use_level(level)
        for threads in (1, 2, 3, 4):
            for screen in (*SCREENS, "auto"):
                results.append(everything(_C, (g,), q, metric, len(g), (screen, threads)))
        for screen in (*SCREENS, "auto"):
            results.append(everything(encoded(g, metric, screen), (), q, metric, len(g), (2,)))
    assert len(results[0][5]) > 0, "the join finds nothing"
    assert_all_same(results)
    assert_same(results[0][:2], best_of(table(q, g, metric), 7, metric))


@METRIC
def test_auto_takes_low_precision_and_agrees(metric: str) -> None:
    """Large enough for the choice to be int8 where the processor has it."""
    q, g = data(60, 20_000, 64)
    auto, forced = (pycm.topk(q, g, 10, metric, screen=screen) for screen in ("auto", "float32"))
    assert_same(auto, forced)
    few = slice(0, 5)
    assert_same((auto[0][few], auto[1][few]), best_of(table(q[few], g, metric), 10, metric))


@SCREEN
@METRIC
def test_splits_of_queries_and_chunks_of_the_gallery(metric: str, screen: str) -> None:
    q, g = data(50, 1900, 33, "heavy_dimensions")
    whole = pycm.topk(q, g, 6, metric, screen=screen)
    for step in (1, 7, 24):
        for begin in range(0, len(q), step):
            part = slice(begin, begin + step)
            assert_same(pycm.topk(q[part], g, 6, metric, screen=screen), (whole[0][part], whole[1][part]), f"{part}")
    # The best of the best of the chunks are the best.
    for step in (100, 641):
        scores, indices = [], []
        for begin in range(0, len(g), step):
            found = pycm.topk(q, g[begin : begin + step], 6, metric, screen=screen)
            scores.append(np.asarray(found[0]))
            indices.append(np.asarray(found[1]) + begin)
        joined, rows = np.concatenate(scores, 1), np.concatenate(indices, 1)
        order = np.lexsort((rows, joined if metric in DISTANCES else -joined))[:, :6]
        assert_same((np.take_along_axis(joined, order, 1), np.take_along_axis(rows, order, 1)), whole)


@SCREEN
@METRIC
def test_history_of_a_gallery(metric: str, screen: str, every_level: list[str]) -> None:
    """Rows in one go, one by one, in uneven steps, at changing levels, from a moved array, restored in between."""
    q, g = data(20, 700, 40)
    want = everything(_C, (g,), q, metric, len(g), ("float32",))
    for ends in ([700], [1, 2, 3, 31, 32, 33, 64, 700], [5, 699, 700], [32, 64, 320, 321, 700, 700]):
        gallery = _C.EncodedGallery(metric, screen)
        for turn, end in enumerate(ends):
            use_level(every_level[turn % len(every_level)])
            gallery.extend(g[:end].copy(), 1 + turn % 3)
            assert len(gallery) == end
            if turn % 2 == 1:
                state = copied(gallery)
                gallery = _C.EncodedGallery(metric, screen)
                gallery.restore(g[:end], state)
        assert_all_same([want, everything(gallery, (), q, metric, len(g), ())])


def test_what_a_gallery_says() -> None:
    gallery = _C.EncodedGallery("dot", "int8")
    assert (len(gallery), gallery.dim, gallery.metric) == (0, 0, "dot")
    gallery.extend(np.ones((3, 5)))
    assert (len(gallery), gallery.dim, gallery.metric, gallery.screen) == (3, 5, "dot", "int8")
    assert encoded(np.ones((2, 70_000), np.float32), "dot", "int8").screen == "float32"  # sums would leave 32 bits


@pytest.mark.parametrize("d", [65_984, 66_016])
def test_rows_too_long_for_low_precision(d: int) -> None:
    """Beyond 66000 dimensions int8 gives way; just below, its largest sums still fit."""
    g = np.full((200, d), 127, np.float32)
    g[1::2] *= -1
    g[np.arange(200), np.arange(200)] = 3
    q = np.full((3, d), 127, np.float32)
    want = best_of(table(q, g, "dot"), 4, "dot")
    for screen in SCREENS:
        assert_same(pycm.topk(q, g, 4, "dot", screen=screen), want)
        assert_same(encoded(g, "dot", screen).topk(q, 4), want)


# ---- threads ----


def run_all(*tasks: Any) -> None:
    errors: list[BaseException] = []

    def guard(task: Any) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guard, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "two threads wait for each other"
    if errors:
        raise errors[0]


@SCREEN
def test_searches_while_rows_are_added(screen: str) -> None:
    """Each search sees one of the galleries there were, whole."""
    q, g = data(8, 6000, 64)
    sizes = [500, 1000, 2500, 6000]
    wants = [best_of(table(q, g[:size], "cosine"), 5, "cosine") for size in sizes]
    gallery = encoded(g[:500], "cosine", screen)
    done = threading.Event()

    def add() -> None:
        try:
            for size in sizes[1:]:
                for end in range(len(gallery), size, 250):
                    gallery.state()
                    del end
                gallery.extend(g[:size])
        finally:
            done.set()

    def look() -> None:
        last = 0
        while True:
            stop = done.is_set()
            scores, indices = gallery.topk(q, 5)
            seen = [i for i, want in enumerate(wants) if scores.tobytes() == want[0].tobytes()]
            assert seen, "the matches are those of no state of the gallery"
            assert np.array_equal(indices, wants[seen[0]][1])
            assert seen[-1] >= last
            last = seen[0]
            if stop:
                assert last == len(sizes) - 1
                return

    def read() -> None:
        while not done.is_set():
            state = gallery.state()
            assert len(state["stats"]) in sizes

    run_all(add, look, look, read)


def test_extensions_at_the_same_time() -> None:
    """The shape is checked against the rows there are when it is this extension's turn."""
    tall, other = np.ones((20_000, 64), np.float32), np.ones((30_000, 16), np.float32)
    for _ in range(3):
        gallery = _C.EncodedGallery("cosine", "int8")
        refused: list[str] = []

        def extend(rows: Array, gallery: Any = gallery, refused: list[str] = refused) -> None:
            try:
                gallery.extend(rows, 1)
            except ValueError as error:
                refused.append(str(error))

        run_all(lambda: extend(tall), lambda: extend(other), lambda: extend(tall[:50]))
        assert refused, "rows of two widths in one gallery"
        assert (len(gallery), gallery.dim) in ((20_000, 64), (30_000, 16))


# ---- rank and join at the edges ----


@SCREEN
def test_queries_without_positives(screen: str) -> None:
    """They look for nothing, so they cost no verification and change nothing."""
    q, g = data(30, 3000, 32)
    offsets = np.minimum(np.arange(31), 4)
    positives = np.arange(4)
    got = _C.rank(q, g, positives, offsets, "cosine", None, None, None, screen)
    want = counts(table(q[:4], g, "cosine"), np.arange(4), positives, "cosine")
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@SCREEN
@METRIC
def test_join_at_infinite_and_zero_thresholds(metric: str, screen: str) -> None:
    rng = np.random.default_rng(3)
    q = rng.integers(-1, 2, (12, 6)).astype(np.float32)
    g = rng.integers(-1, 2, (150, 6)).astype(np.float32)
    g[3, 0], g[4, 1], g[5, 2], q[0, 0] = np.inf, -np.inf, np.nan, np.inf
    with np.errstate(all="ignore"):
        scores = table(q, g, metric).astype(np.float64)
    thresholds = [np.inf, 0.0, -0.0, 1.0, 1e300, 5e-324]
    if metric not in DISTANCES:
        thresholds += [-np.inf, -1.0, -1e300]
    for threshold in thresholds:
        found = scores <= threshold if metric in DISTANCES else scores >= threshold
        rows, columns = np.nonzero(found)
        for gallery in (None, encoded(g, metric, screen)):
            got = (
                _C.join(q, g, threshold, metric, -1, 1800, screen)
                if gallery is None
                else gallery.join(q, threshold, -1, 1800)
            )
            np.testing.assert_array_equal(got[0], rows, f"{threshold}")
            np.testing.assert_array_equal(got[1], columns)
            np.testing.assert_array_equal(got[2], scores[rows, columns])
    with pytest.raises(ValueError, match="nan"):
        _C.join(q, g, np.nan, metric, -1, 1800, screen)
    with pytest.raises(ValueError, match="more than 3 pairs"):
        _C.join(q, g, 1e300 if metric in DISTANCES else -1e300, metric, -1, 3, screen)


# ---- precision="fast" ----


@SCREEN
@METRIC
def test_fast_is_near(level: str, metric: str, screen: str) -> None:
    """The error of a value is a share of the lengths of both rows: 1e-5 in float32, 2^-8 in bfloat16; in int8 half a
    step of 1/127 of the largest element for each side's dimensions, added as independent errors with ample room."""
    for maker in ("gaussian", "anisotropic", "heavy_dimensions", "large_common_mean"):
        q, g = data(13, 900, 64, maker)
        if metric in DISTANCES and maker == "large_common_mean":
            continue  # differences cancel, and the share is of the lengths from the gallery's mean
        exact = table(q, g, metric).astype(np.float64)
        scores, indices = (np.asarray(part) for part in pycm.topk(q, g, 5, metric, precision="fast", screen=screen))
        share = {"float32": 1e-5, "bfloat16": 2.0**-8, "int8": 0.04}[screen]
        lengths = np.linalg.norm(q.astype(np.float64), axis=1)[:, None] * np.linalg.norm(g.astype(np.float64), axis=1)
        bound = share * (lengths if metric in ("dot", *DISTANCES) else np.ones_like(lengths))
        found = np.take_along_axis(exact, indices, 1)
        room = np.take_along_axis(bound, indices, 1)
        if metric == "euclidean":
            assert (np.abs(scores.astype(np.float64) ** 2 - found**2) <= 4 * room).all(), maker
            continue
        assert (np.abs(scores - found) <= 4 * room).all(), f"{maker} {np.abs(scores - found).max()}"
        # A match that was left out is better by twice the bound at most.
        best = best_of(table(q, g, metric), 5, metric)[0].astype(np.float64)
        worse = (found - best) if metric in DISTANCES else (best - found)
        assert (worse.max(1) <= 8 * bound.max(1)).all(), maker


@SCREEN
@METRIC
def test_fast_does_not_depend_on_threads_or_batches(metric: str, screen: str) -> None:
    """Also where the best matches come first, so that what the first rows promise is not kept."""
    for maker in ("best_rows_first", "anisotropic"):
        q, g = data(70, 1500, 40, maker)
        for k in (3, 60):
            want = _C.topk(q, g, k, metric, "fast", None, None, None, screen, 1)
            for threads in (2, 3, 9):
                got = _C.topk(q, g, k, metric, "fast", None, None, None, screen, threads)
                assert_same(got, want, f"{maker} k={k} threads={threads}")
            for begin in range(0, 70, 17):
                part = slice(begin, begin + 17)
                got = _C.topk(q[part], g, k, metric, "fast", None, None, None, screen, 2)
                assert_same(got, (want[0][part], want[1][part]), f"{maker} k={k} {part}")


# ---- properties ----


@CHECK
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 130), st.integers(1, 70)),
    st.sampled_from(METRICS),
    st.sampled_from([*SCREENS, "auto"]),
    st.sampled_from(["float32", "float16", "float64"]),
    st.sampled_from(["none", "row", "pairs"]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_any_search(
    shape: tuple[int, int, int], metric: str, screen: str, dtype: str, masked: str, excluded: bool, seed: int
) -> None:
    n, m, d = shape
    rng = np.random.default_rng(seed)
    whole = rng.random() < 0.5
    q, g = ((rng.integers(-2, 3, (r, d)) if whole else rng.standard_normal((r, d))).astype(dtype) for r in (n, m))
    mask = {"none": None, "row": rng.random(m) < 0.6, "pairs": rng.random((n, m)) < 0.6}[masked]
    lists = [rng.integers(-1, m, rng.integers(0, 4)) for _ in range(n)]
    exclude = (np.concatenate(lists).astype(np.int64), np.cumsum([0, *map(len, lists)])) if excluded else (None, None)
    allowed = np.ones((n, m), bool) if mask is None else np.broadcast_to(mask, (n, m)).copy()
    for i, rows in enumerate(lists if excluded else []):
        allowed[i, rows[rows >= 0]] = False
    scores = table(q, g, metric)
    k = int(rng.integers(1, m + 1))
    want = best_of(np.where(allowed, scores, np.nan).astype(scores.dtype), k, metric)
    positives, offsets = rng.integers(0, m, n), np.arange(n + 1)
    ranks = counts(scores, np.arange(n), positives, metric, allowed)
    gallery = encoded(g, metric, screen)
    for got in (
        _C.topk(q, g, k, metric, "exact", mask, *exclude, screen),
        gallery.topk(q, k, mask, *exclude),
    ):
        assert_same(got, want)
    for got in (
        _C.rank(q, g, positives, offsets, metric, mask, *exclude, screen),
        gallery.rank(q, positives, offsets, mask, *exclude),
    ):
        for ours, theirs in zip(got, ranks, strict=True):
            np.testing.assert_array_equal(ours, theirs)
