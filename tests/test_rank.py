"""rank: the specification's counts, bit for bit, for every metric, dtype, level, mask and form of positives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import METRICS
from pair_oracles import counts, table
from test_properties import CHECK, Case, cases

import pycm
from pycm import reference
from pycm.ranking import Ranks, rank

METRIC = pytest.mark.parametrize("metric", METRICS)
SCREENS = ("auto", "float32", "bfloat16", "int8")


def random_rows(rng: np.random.Generator, n: int, m: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, indices): up to `most` distinct rows of m for each of n queries, unsorted."""
    lists = [rng.permutation(m)[: rng.integers(0, most + 1)] for _ in range(n)]
    offsets = np.cumsum([0, *(len(part) for part in lists)])
    return offsets, np.concatenate([np.zeros(0, int), *lists]).astype(np.int64)


def owners(offsets: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def split(offsets: np.ndarray, indices: np.ndarray) -> list[np.ndarray]:
    return [indices[begin:end] for begin, end in pairwise(offsets)]


def assert_counts(got: Ranks, want: Any, what: str = "") -> None:
    for name, ours, theirs in zip(("greater", "equal"), (got.greater, got.equal), want[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs, f"{what}: {name}")
        assert np.asarray(ours).dtype == np.int64
    scores = np.asarray(got.scores)
    assert scores.dtype == want[2].dtype
    assert scores.tobytes() == want[2].tobytes(), f"{what}: scores"
    ranks = np.asarray(got.ranks)
    assert ranks.dtype == np.float64
    np.testing.assert_array_equal(ranks, want[0] + want[1] / 2, f"{what}: ranks")


SHAPES = [
    (1, 1, 1),
    (1, 300, 7),
    (2, 65, 32),
    (3, 33, 33),
    (5, 129, 64),
    (17, 257, 31),
    (40, 1100, 24),
    (70, 513, 5),
    (13, 90, 1025),
]


@METRIC
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_one_positive_each(level: str, metric: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for n, m, d in SHAPES:
        q, g = rng.standard_normal((n, d)).astype(dtype), rng.standard_normal((m, d)).astype(dtype)
        positives = rng.integers(0, m, n)
        got = rank(q, g, positives, metric)
        assert got.offsets is None
        want = counts(table(q, g, metric), np.arange(n), positives, metric)
        assert_counts(got, want, f"{level} {metric} {n} {m} {d}")


@METRIC
def test_equals_the_written_specification(level: str, metric: str) -> None:
    """Integer rows, so that there are ties; several positives; masks and exclusions."""
    rng = np.random.default_rng(1)
    q, g = (rng.integers(-1, 2, (rows, 5)).astype(np.float32) for rows in (12, 200))
    offsets, indices = random_rows(rng, 12, 200, 6)
    without = random_rows(rng, 12, 200, 40)
    mask = rng.random((12, 200)) < 0.6
    for chosen, left in ((None, None), (mask, None), (mask[0], without), (None, without), (mask, without)):
        got = rank(q, g, (offsets, indices), metric, mask=chosen, exclude=left)
        lists = None if left is None else split(*left)
        want = reference.rank(q, g, split(offsets, indices), metric, chosen, lists)
        assert want.equal.max() > 3, "the case has no ties"
        assert_counts(got, want)
        np.testing.assert_array_equal(got.offsets, offsets)


@METRIC
def test_masks_and_exclusions(level: str, metric: str) -> None:
    """More rows than a block of any kernel; a positive that is masked or excluded keeps its score."""
    rng = np.random.default_rng(2)
    q, g = rng.standard_normal((30, 20)).astype(np.float32), rng.standard_normal((1500, 20)).astype(np.float32)
    scores = table(q, g, metric)
    offsets, indices = random_rows(rng, 30, 1500, 5)
    left = random_rows(rng, 30, 1500, 900)
    masks: dict[str, Any] = {
        "of the gallery": rng.random(1500) < 0.5,
        "by pair": rng.random((30, 1500)) < 0.1,
        "nothing": np.zeros(1500, bool),
        "transposed": (rng.random((1500, 30)) < 0.4).T,
        "none": None,
    }
    rows = owners(offsets)
    for name, mask in masks.items():
        allowed = np.ones((30, 1500), bool) if mask is None else np.broadcast_to(mask, (30, 1500)).copy()
        got = rank(q, g, (offsets, indices), metric, mask=mask)
        assert_counts(got, counts(scores, rows, indices, metric, allowed), name)
        allowed[owners(left[0]), left[1]] = False
        got = rank(q, g, (offsets, indices), metric, mask=mask, exclude=left)
        assert_counts(got, counts(scores, rows, indices, metric, allowed), f"{name}, exclude")
    own = rank(q, g, indices[:30], metric, exclude=indices[:30])
    assert_counts(own, counts(table(q, g, metric), np.arange(30), indices[:30], metric))


def test_forms_of_positives() -> None:
    from scipy import sparse

    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    q, g = rng.standard_normal((9, 6)).astype(np.float32), rng.standard_normal((50, 6)).astype(np.float32)
    offsets, indices = random_rows(rng, 9, 50, 4)
    want = rank(q, g, (offsets, indices))
    assert (np.diff(offsets) == 0).any()
    ones = np.ones(len(indices), np.float32)
    lists = split(offsets, indices)
    forms: dict[str, Any] = {
        "int32": (offsets.astype(np.int32), indices.astype(np.int32)),
        "strided": (np.repeat(offsets, 2)[::2], np.repeat(indices, 3)[::3]),
        "list of arrays": lists,
        "list of lists": [part.tolist() for part in lists],
        "list of tuples": [tuple(part) for part in lists],
        "list of tensors": [torch.from_numpy(part) for part in lists],
        "SciPy": sparse.csr_array((ones, indices, offsets), (9, 50)),
        "SciPy, stored zeros": sparse.csr_matrix((0 * ones, indices, offsets), (9, 50)),
        "torch pair": (torch.from_numpy(offsets), torch.from_numpy(indices)),
        "torch CSR": torch.sparse_csr_tensor(torch.tensor(offsets), torch.tensor(indices), torch.tensor(ones), (9, 50)),
    }
    for name, form in forms.items():
        for a, b in ((q, g), (torch.from_numpy(q), torch.from_numpy(g))):
            got = rank(a, b, form)
            for ours, theirs in zip(got, want, strict=True):
                np.testing.assert_array_equal(np.asarray(ours), theirs, name)
    single = rank(q, g, np.arange(9))
    for form in (np.arange(9, dtype=np.uint8), list(range(9)), torch.arange(9), range(9)):
        got = rank(q, g, form)
        assert got.offsets is None
        np.testing.assert_array_equal(got.ranks, single.ranks)
    # Lists of one each are lists, not a matrix.
    of_one = rank(q, g, [[i] for i in range(9)])
    np.testing.assert_array_equal(of_one.offsets, np.arange(10))
    np.testing.assert_array_equal(of_one.ranks, single.ranks)
    # topk excludes by the same forms.
    for form in forms.values():
        oracles.assert_same(pycm.topk(q, g, 3, exclude=form), pycm.topk(q, g, 3, exclude=(offsets, indices)))


# ---- ties ----


def test_tie_policies() -> None:
    rng = np.random.default_rng(4)
    q, g = (rng.integers(-1, 2, (rows, 4)).astype(np.float32) for rows in (20, 300))
    positives = rng.integers(0, 300, 20)
    greater, equal, _ = counts(table(q, g, "dot"), np.arange(20), positives, "dot")
    assert equal.min() > 0
    for ties, want in (("optimistic", greater), ("realistic", greater + equal / 2), ("pessimistic", greater + equal)):
        np.testing.assert_array_equal(rank(q, g, positives, "dot", ties=ties).ranks, want)


@METRIC
def test_a_constant_gallery_gives_no_good_rank(level: str, metric: str) -> None:
    """As a collapsed encoder makes it: every score ties, and the mean rank is that of chance."""
    x = np.full((100, 8), 0.3, np.float32)
    got = rank(x, x, np.arange(100), metric)
    assert (got.greater == 0).all()
    assert (got.equal == 99).all()
    assert (got.ranks == 49.5).all()


@METRIC
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_neighbours_one_ulp_apart(level: str, metric: str, dtype: str) -> None:
    """Rows that no low-precision pass can tell apart: the exact scores decide, and equal ones tie."""
    rng = np.random.default_rng(5)
    base = rng.standard_normal(48)
    g = np.tile(base, (3000, 1))
    g[::2] *= 1 + np.finfo(dtype).eps * rng.integers(-40, 41, (1500, 48))
    g = g.astype(dtype)
    q = (base + 0.5 * rng.standard_normal((6, 48))).astype(dtype)
    positives = 2 * rng.integers(0, 1500, 6) + 1
    want = counts(table(q, g, metric), np.arange(6), positives, metric)
    assert (want[0] > 100).any()
    assert (want[1] >= 1499).all()
    for screen in SCREENS:
        assert_counts(rank(q, g, positives, metric, screen=screen), want, screen)


# ---- NaN, infinities, empty ----


@METRIC
def test_nan_rows_do_not_count(level: str, metric: str) -> None:
    rng = np.random.default_rng(6)
    q, g = rng.standard_normal((4, 16)).astype(np.float32), rng.standard_normal((700, 16)).astype(np.float32)
    g[::3, 5] = np.nan
    g[1::9, 2] = np.inf
    positives = np.array([2, 5, 8, 11])
    assert_counts(rank(q, g, positives, metric), counts(table(q, g, metric), np.arange(4), positives, metric))


@METRIC
def test_infinite_scores(metric: str) -> None:
    g = np.array([[np.inf], [3e38], [1.0], [-np.inf]], np.float32)
    q = np.array([[3e38], [1.0]], np.float32)
    for positive in (1, 2):
        positives = np.array([positive, positive])
        assert_counts(rank(q, g, positives, metric), counts(table(q, g, metric), np.arange(2), positives, metric))


@METRIC
def test_a_nan_positive_is_an_error(metric: str) -> None:
    rng = np.random.default_rng(7)
    q, g = rng.standard_normal((5, 8)).astype(np.float32), rng.standard_normal((60, 8)).astype(np.float32)
    g[17] = np.nan
    with pytest.raises(ValueError, match=r"^rank: queries row 3 has a NaN score with its positive 17$"):
        rank(q, g, ([0, 2, 2, 4, 6, 6], [1, 2, 3, 4, 5, 17]), metric)
    rank(q, g, [[1], [2], [], [], []], metric)  # not a positive: not an error
    q[2] = np.nan
    rank(q, g, [[1], [2], [], [4], []], metric)
    with pytest.raises(ValueError, match=r"^rank: queries row 2 has a NaN score with its positive 2"):
        rank(q, g, [0, 1, 2, 3, 4], metric)
    with pytest.raises(ValueError, match=r"^rank: queries row 2 has a NaN score with its positive 2"):
        rank(q, g, [0, 1, 2, 3, 4], metric, mask=np.zeros(60, bool))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_empty(dtype: str) -> None:
    g = np.ones((4, 3), dtype)
    wide = np.float64 if dtype == "float64" else np.float32
    for positives in (np.zeros(0, int), ([0], np.zeros(0, int)), [], ([0], [])):
        got = rank(g[:0], g, positives)
        assert got.ranks.shape == got.greater.shape == got.equal.shape == got.scores.shape == (0,)
        assert (got.ranks.dtype, got.scores.dtype) == (np.float64, wide)
    got = rank(g, g, [[], [], [], []])
    assert got.ranks.shape == (0,)
    assert got.scores.dtype == wide
    np.testing.assert_array_equal(got.offsets, np.zeros(5))


# ---- what must not matter ----


def case_of_many_positives(metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(8)
    q = rng.standard_normal((150, 40)).astype(np.float32)
    g = (rng.standard_normal((1800, 40)) + (0 if metric == "dot" else 2)).astype(np.float32)
    g[900:] = g[:900]  # every row twice
    return q, g, *random_rows(rng, 150, 1800, 9)


@METRIC
def test_screens_levels_and_threads_do_not_matter(every_level: list[str], threads: None, metric: str) -> None:
    from conftest import use_level

    q, g, offsets, indices = case_of_many_positives(metric)
    want = counts(table(q, g, metric), owners(offsets), indices, metric)
    for name in every_level:
        use_level(name)
        for screen in SCREENS:
            assert_counts(rank(q, g, (offsets, indices), metric, screen=screen), want, f"{name} {screen}")
        for count in (1, 2, 4):
            pycm.set_num_threads(count)
            assert_counts(rank(q, g, (offsets, indices), metric), want, f"{name}, {count} threads")


@METRIC
def test_batches_do_not_matter(metric: str) -> None:
    q, g, offsets, indices = case_of_many_positives(metric)
    whole = rank(q, g, (offsets, indices), metric)
    lists = split(offsets, indices)
    for step in (1, 7, 149):
        parts = [rank(q[b : b + step], g, lists[b : b + step], metric) for b in range(0, 150, step)]
        for field in ("ranks", "greater", "equal", "scores"):
            np.testing.assert_array_equal(np.concatenate([getattr(p, field) for p in parts]), getattr(whole, field))


@METRIC
def test_ranks_are_places_in_topk(metric: str) -> None:
    q, g, offsets, indices = case_of_many_positives(metric)
    got = rank(q, g, (offsets, indices), metric)
    full = pycm.topk(q, g, len(g), metric)
    place = np.argmax(full.indices[owners(offsets)] == indices[:, None], axis=1)
    assert (got.greater <= place).all()
    assert (place <= got.greater + got.equal).all()
    assert (got.equal >= 1).all()
    found = full.scores[owners(offsets), place]
    assert found.tobytes() == got.scores.tobytes()


def test_layouts() -> None:
    rng = np.random.default_rng(9)
    q, g = rng.standard_normal((11, 37)).astype(np.float32), rng.standard_normal((400, 37)).astype(np.float32)
    positives = rng.integers(0, 400, 11)
    want = rank(q, g, positives, "euclidean")
    for a, b in ((np.asfortranarray(q), g), (q[::-1][::-1], np.repeat(g, 2, 0)[::2]), (q, g[:, ::-1].copy()[:, ::-1])):
        got = rank(a, b, positives, "euclidean")
        for field in ("ranks", "scores"):
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field))


@CHECK
@given(cases(), st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.sampled_from(SCREENS))
def test_rank_is_the_specification(case: Case, seed: int, masked: bool, excluded: bool, screen: str) -> None:
    rng = np.random.default_rng(seed)
    n, m = len(case.queries), len(case.gallery)
    offsets, indices = random_rows(rng, n, m, 4)
    rows = owners(offsets)
    # A positive without a score is an error; take those that have one.
    good = ~np.isnan(table(case.queries, case.gallery, case.metric)[rows, indices])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows[good], minlength=n))]).astype(np.int64)
    rows, indices = rows[good], indices[good]
    allowed = np.ones((n, m), bool)
    mask = left = None
    if masked:
        mask = rng.random((n, m) if seed % 2 else m) < rng.choice([0.1, 0.5, 0.9])
        allowed &= mask
    if excluded:
        left = random_rows(rng, n, m, m)
        allowed[owners(left[0]), left[1]] = False
    got = rank(case.queries, case.gallery, (offsets, indices), case.metric, mask=mask, exclude=left, screen=screen)
    assert_counts(got, counts(table(case.queries, case.gallery, case.metric), rows, indices, case.metric, allowed))


# ---- errors ----

Q, G = np.ones((3, 4), np.float32), np.ones((10, 4), np.float32)
P = [1, 2, 3]

ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "beyond M": (lambda: rank(Q, G, [1, 2, 10]), ValueError, ["positives must be in [0, 10), got 10"]),
    "negative": (lambda: rank(Q, G, [1, -1, 2]), ValueError, ["positives must be in [0, 10), got -1"]),
    "beyond M in a list": (lambda: rank(Q, G, [[1], [2, 77], []]), ValueError, ["positives", "[0, 10)", "77"]),
    "too few": (lambda: rank(Q, G, [1, 2]), ValueError, ["positives", "[3]", "[2]"]),
    "a matrix": (lambda: rank(Q, G, np.zeros((3, 2), int)), ValueError, ["positives", "[3]", "[3, 2]"]),
    "floats": (lambda: rank(Q, G, np.zeros(3)), TypeError, ["positives", "integers", "float64"]),
    "booleans": (lambda: rank(Q, G, np.zeros(3, bool)), TypeError, ["positives", "integers", "bool"]),
    "none": (lambda: rank(Q, G, None), TypeError, ["positives", "object"]),
    "floats in a list": (lambda: rank(Q, G, [[1], [2.5], []]), TypeError, ["positives[1]", "float64"]),
    "too few lists": (lambda: rank(Q, G, [[1], [2]]), ValueError, ["positives", "3 queries", "got 2"]),
    "lists of lists": (lambda: rank(Q, G, [[[1]], [2], [3]]), ValueError, ["positives[0]", "[1, 1]"]),
    "a triple": (lambda: rank(Q, G, ([0], [1], [2])), ValueError, ["positives", "pair", "3"]),
    "offsets too short": (lambda: rank(Q, G, ([0, 1, 1], [1])), ValueError, ["positives", "offsets", "[4]", "[3]"]),
    "offsets decrease": (lambda: rank(Q, G, ([0, 2, 1, 2], [1, 2])), ValueError, ["positives", "offsets", "row 1"]),
    "offsets beyond": (lambda: rank(Q, G, ([0, 1, 1, 9], [1, 2])), ValueError, ["positives", "offsets", "2"]),
    "offsets start late": (lambda: rank(Q, G, ([1, 1, 1, 2], [1, 2])), ValueError, ["positives", "offsets"]),
    "ties": (lambda: rank(Q, G, P, ties="random"), ValueError, ["ties", "realistic", "'random'"]),
    "screen": (lambda: rank(Q, G, P, screen="int4"), ValueError, ["screen", "int8", "'int4'"]),
    "metric": (lambda: rank(Q, G, P, "l2"), ValueError, ["metric", "sqeuclidean", "'l2'"]),
    "integers": (lambda: rank(Q.astype(int), G.astype(int), P), TypeError, ["queries", "int64"]),
    "dtypes differ": (lambda: rank(Q, G.astype("f8"), P), TypeError, ["gallery", "float32", "float64"]),
    "features differ": (lambda: rank(Q, G[:, :3], P), ValueError, ["gallery", "4", "[10, 3]"]),
    "a vector": (lambda: rank(Q[0], G, P), ValueError, ["queries", "[N, D]", "[4]"]),
    "empty gallery": (lambda: rank(Q, G[:0], P), ValueError, ["gallery", "at least one row", "[0, 4]"]),
    "a list": (lambda: rank(Q.tolist(), G, P), TypeError, ["queries", "__dlpack__", "list"]),
    "mask": (lambda: rank(Q, G, P, mask=np.ones(9, bool)), ValueError, ["mask", "[10]", "[9]"]),
    "mask of integers": (lambda: rank(Q, G, P, mask=np.ones(10, int)), TypeError, ["mask", "bool", "int64"]),
    "exclude": (lambda: rank(Q, G, P, exclude=[1, 2, 10]), ValueError, ["exclude", "10"]),
    "exclude too short": (lambda: rank(Q, G, P, exclude=[1]), ValueError, ["exclude", "[3]", "[1]"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_was_wrong(name: str) -> None:
    call, error, words = ERRORS[name]
    with pytest.raises(error, match=r"^rank: ") as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
