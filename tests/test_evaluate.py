"""Retrieval metrics against textbook definitions over every order of ties, hand-computed cases and the exact ranks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from pycm import reference
from pycm.evaluate import RetrievalMetrics, _inputs, metrics_of_ranks, retrieval_metrics

KS = (1, 2, 3, 6, 9)


def figures(ranked: list[float], ks: tuple[int, ...]) -> dict[str, float]:
    """Textbook metrics of one ranked list of grades, 0 for what is no positive."""
    hits = [grade > 0 for grade in ranked]
    total = sum(hits)
    first = hits.index(True)
    precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
    out = {
        "rank": float(first),
        "mrr": 1 / (first + 1),
        "map": sum(p for p, hit in zip(precision, hits, strict=True) if hit) / total,
        "map_at_r": sum(p for p, hit in zip(precision[:total], hits, strict=False) if hit) / total,
        "r_precision": sum(hits[:total]) / total,
    }
    for k in ks:
        gain = [sum(g / np.log2(i + 2) for i, g in enumerate(x[:k])) for x in (ranked, sorted(ranked, reverse=True))]
        out[f"recall@{k}"] = float(first < k)
        out[f"positives_recall@{k}"] = sum(hits[:k]) / total
        out[f"ndcg@{k}"] = gain[0] / gain[1]
    return out


def over_orders(row: np.ndarray, grades: dict[int, float], ties: str) -> dict[str, float]:
    """The mean, the best or the worst of each metric over every order that the scores allow."""
    seen = []
    for order in itertools.permutations(range(len(row))):
        if all(row[a] >= row[b] for a, b in itertools.pairwise(order)):
            seen.append(figures([grades.get(i, 0.0) for i in order], KS))
    pick = {"realistic": np.mean, "optimistic": np.max, "pessimistic": np.min}[ties]
    worst = {"optimistic": np.min, "pessimistic": np.max}.get(ties, np.mean)
    return {name: float((worst if name == "rank" else pick)([s[name] for s in seen])) for name in seen[0]}


def assert_columns(got: RetrievalMetrics, expected: list[dict[str, float]]) -> None:
    assert set(got.per_query) == set(expected[0])
    for name, column in got.per_query.items():
        np.testing.assert_allclose(column, [e[name] for e in expected], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("ties", ["realistic", "optimistic", "pessimistic"])
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_ties_against_every_order(seed: int, graded: bool, ties: Any) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, (7, 6)).astype(np.float64)
    scores[0] = 1.0
    positives = [sorted(rng.choice(6, rng.integers(1, 6), replace=False).tolist()) for _ in range(7)]
    grades = [rng.integers(1, 4, len(wanted)).tolist() if graded else [1] * len(wanted) for wanted in positives]
    got = retrieval_metrics(scores, positives, KS, ties=ties, relevance=grades if graded else None)
    assert_columns(
        got,
        [
            over_orders(row, dict(zip(wanted, g, strict=True)), ties)
            for row, wanted, g in zip(scores, positives, grades, strict=True)
        ],
    )
    assert got.recall_at_k == {k: pytest.approx(got.per_query[f"recall@{k}"].mean()) for k in KS}
    assert got.ndcg_at_k == {k: pytest.approx(got.per_query[f"ndcg@{k}"].mean()) for k in KS}
    assert got.positives_recall_at_k == {k: pytest.approx(got.per_query[f"positives_recall@{k}"].mean()) for k in KS}
    for name in ("mrr", "map", "map_at_r", "r_precision"):
        assert getattr(got, name) == pytest.approx(got.per_query[name].mean())
    assert got.median_rank == np.median(got.ranks) + 1
    assert got.mean_rank == pytest.approx(got.ranks.mean() + 1)


@pytest.mark.parametrize("most", [3, 40])  # few positives are compared with their row, many searched in it sorted
def test_without_ties_against_sorting(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_inputs, "_CHUNK_SCORES", 60 * 7)  # several chunks
    rng = np.random.default_rng(most)
    scores = rng.standard_normal((40, 60))
    positives = [rng.choice(60, rng.integers(1, most), replace=False) for _ in range(40)]
    expected = []
    for row, wanted in zip(scores, positives, strict=True):
        ranked = np.isin(np.argsort(-row), wanted).astype(float).tolist()
        expected.append(figures(ranked, KS))
    for ties in ("realistic", "optimistic", "pessimistic"):
        assert_columns(retrieval_metrics(scores, positives, KS, ties=ties), expected)


def test_hand_computed() -> None:
    scores = np.array(
        [
            [0.9, 0.1, 0.2, 0.0],  # positive 0: rank 0
            [0.5, 0.4, 0.3, 0.2],  # positive 2: rank 2
            [0.1, 0.2, 0.3, 0.4],  # positive 0: rank 3
            [0.7, 0.2, 0.6, 0.1],  # positive 2: rank 1
        ],
        dtype=np.float32,
    )
    got = retrieval_metrics(scores, [0, 2, 0, 2], ks=(1, 2, 3, 4))
    assert isinstance(got, RetrievalMetrics)
    assert got.ranks.tolist() == [0, 2, 3, 1]
    assert got.recall_at_k == got.positives_recall_at_k == {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}
    assert got.median_rank == 2.5
    assert got.mean_rank == 2.5
    assert got.mrr == pytest.approx((1 + 1 / 3 + 1 / 4 + 1 / 2) / 4)
    assert got.map == got.mrr
    assert got.r_precision == got.map_at_r == 0.25
    assert str(got).startswith("R@1 25.0  R@2 50.0  R@3 75.0  R@4 100.0  median rank 2.5")


def test_best_of_several_positives_counts() -> None:
    scores = np.array([[0.1, 0.9, 0.5, 0.7], [0.4, 0.3, 0.2, 0.1]])
    got = retrieval_metrics(scores, [[0, 3], np.array([3, 2, 2])], ks=(1, 2, 3))
    assert got.ranks.tolist() == [1, 2]
    assert got.recall_at_k == {1: 0.0, 2: 0.5, 3: 1.0}
    assert got.positives_recall_at_k == {1: 0.0, 2: 0.25, 3: 0.5}


@pytest.mark.parametrize("shape", [(7, 2), (50, 50), (3, 1000)])
def test_constant_scores_are_chance(shape: tuple[int, int]) -> None:
    n, m = shape
    got = retrieval_metrics(np.full(shape, 0.3), np.arange(n) % m, ks=(1, 5, 10))
    harmonic = (1 / np.arange(1, m + 1)).sum()
    assert got.recall_at_k == {k: pytest.approx(min(k / m, 1)) for k in (1, 5, 10)}
    assert got.median_rank == pytest.approx((m + 1) / 2)
    assert got.mean_rank == pytest.approx((m + 1) / 2)
    assert got.mrr == pytest.approx(harmonic / m)
    assert got.map == pytest.approx(harmonic / m)
    assert got.r_precision == pytest.approx(1 / m)


def test_a_large_constant_matrix_of_several_positives_is_chance() -> None:
    """Against random orders: the closed forms at a size where no permutation can be listed."""
    m, p = 400, 7
    rng = np.random.default_rng(0)
    orders = rng.permuted(np.tile(np.arange(m), (20000, 1)), axis=1).astype(np.float64)
    drawn = retrieval_metrics(orders, [range(p)] * len(orders), ks=(1, 10))
    got = retrieval_metrics(np.zeros((1, m)), [range(p)], ks=(1, 10))
    for name, column in drawn.per_query.items():
        error = column.std() / np.sqrt(len(column))
        assert abs(got.per_query[name][0] - column.mean()) < 5 * error, name


def test_one_positive_is_the_mean_of_optimistic_and_pessimistic() -> None:
    scores = np.random.default_rng(0).integers(0, 10, (40, 60)).astype(np.float32)
    positives = np.random.default_rng(1).integers(0, 60, 40)
    best = scores[np.arange(40), positives][:, None]
    optimistic, pessimistic = (scores > best).sum(1), (scores >= best).sum(1) - 1
    for ties, expected in (
        ("realistic", (optimistic + pessimistic) / 2),
        ("optimistic", optimistic),
        ("pessimistic", pessimistic),
    ):
        np.testing.assert_array_equal(retrieval_metrics(scores, positives, ties=ties).ranks, expected)


def test_excluded_rows_do_not_count() -> None:
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 4, (30, 30)).astype(np.float32)
    labels = rng.integers(0, 5, 30)
    exclude = np.arange(30)
    exclude[3] = -1
    positives = [np.flatnonzero((labels == labels[i]) & (np.arange(30) != i)) for i in range(30)]
    got = retrieval_metrics(scores, positives, KS, exclude=exclude)
    expected = []
    for i, wanted in enumerate(positives):
        kept = np.flatnonzero(np.arange(30) != exclude[i])
        known = np.flatnonzero(np.isin(kept, wanted))
        expected.append(retrieval_metrics(scores[i : i + 1, kept], [known], KS).per_query)
    for name in got.per_query:
        np.testing.assert_allclose(got.per_query[name], [e[name][0] for e in expected], atol=1e-12)


# ---- inputs ----


@pytest.mark.filterwarnings("ignore:Sparse")
def test_every_form_of_positives() -> None:
    from scipy import sparse

    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    scores = rng.standard_normal((9, 12))
    lists = [sorted(rng.choice(12, rng.integers(1, 5), replace=False).tolist()) for _ in range(9)]
    offsets = np.cumsum([0, *map(len, lists)])
    flat = np.concatenate(lists)
    csr = sparse.csr_matrix((np.ones(len(flat)), flat, offsets), (9, 12))
    tensor = torch.sparse_csr_tensor(torch.tensor(offsets), torch.tensor(flat), torch.ones(len(flat)), (9, 12))
    expected = retrieval_metrics(scores, lists)
    for given in (
        (offsets, flat),
        (torch.tensor(offsets), torch.tensor(flat)),
        csr,
        tensor,
        list(map(np.array, lists)),
    ):
        got = retrieval_metrics(scores, given)
        for name, column in expected.per_query.items():
            np.testing.assert_array_equal(got.per_query[name], column)


def test_grades_follow_their_positives() -> None:
    scores = np.array([[4.0, 3.0, 2.0, 1.0]])
    for positives, grades in (([[3, 0]], [1.0, 5.0]), ([[0, 3]], [[5.0, 1.0]]), ((np.array([0, 2]), [3, 0]), [1, 5])):
        got = retrieval_metrics(scores, positives, (4,), relevance=grades)
        assert got.ndcg_at_k[4] == pytest.approx((5 + 1 / np.log2(5)) / (5 + 1 / np.log2(3)))


@pytest.mark.parametrize("metric", ["dot", "cosine", "pearson", "euclidean", "sqeuclidean"])
@pytest.mark.parametrize("several", [False, True])
def test_features_equal_the_matrix(metric: Any, several: bool) -> None:
    rng = np.random.default_rng(5)
    queries, gallery = (rng.integers(-1, 2, (n, 5)).astype(np.float32) for n in (37, 23))  # with ties
    positives: Any = rng.integers(0, 23, 37)
    if several:
        positives = [rng.choice(23, rng.integers(1, 6), replace=False) for _ in range(37)]
    exclude = np.array([next(j for j in range(23) if j not in np.atleast_1d(p)) for p in positives])
    exclude[::2] = -1
    matrix = reference.similarity(queries, gallery, metric).astype(np.float32)
    expected = retrieval_metrics(-matrix if "euclidean" in metric else matrix, positives, exclude=exclude)
    got = retrieval_metrics((queries, gallery, metric), positives, exclude=exclude)
    for name, column in expected.per_query.items():
        np.testing.assert_array_equal(got.per_query[name], column, err_msg=name)


def test_metrics_of_ranks() -> None:
    import pycm.ranking

    rng = np.random.default_rng(6)
    queries, gallery = (rng.integers(-1, 2, (n, 5)).astype(np.float32) for n in (11, 23))
    lists = [sorted(rng.choice(23, rng.integers(1, 6), replace=False).tolist()) for _ in range(11)]
    for positives in (rng.integers(0, 23, 11), (np.cumsum([0, *map(len, lists)]), np.concatenate(lists))):
        ranks = pycm.ranking.rank(queries, gallery, positives, "dot", ties="pessimistic")
        for ties in ("realistic", "optimistic"):
            got = metrics_of_ranks(ranks, (1, 3), ties=ties)
            expected = retrieval_metrics((queries, gallery, "dot"), positives, (1, 3), ties=ties)
            for name, column in expected.per_query.items():
                np.testing.assert_array_equal(got.per_query[name], column)
    with pytest.raises(ValueError, match="positives of query 0 repeat"):
        metrics_of_ranks(pycm.ranking.Ranks(None, [1, 1], [0, 0], None, np.array([0, 2])))
    with pytest.raises(ValueError, match=r"positives\[1\] is empty"):
        metrics_of_ranks(pycm.ranking.Ranks(None, [1], [0], None, np.array([0, 1, 1])))


def test_torch_scores_and_features() -> None:
    torch = pytest.importorskip("torch")
    scores = torch.tensor([[0.5, 0.25], [0.75, 0.5]], requires_grad=True)
    for given in (scores, scores.to(torch.bfloat16), scores.to(torch.float16)):
        assert retrieval_metrics(given, torch.tensor([0, 1])).ranks.tolist() == [0, 1]
    rows = torch.eye(3)
    for given in (rows, rows.to(torch.bfloat16)):
        assert retrieval_metrics((given, given, "cosine"), torch.tensor([0, 1, 0])).ranks.tolist() == [0, 0, 1.5]


def test_infinities_are_values() -> None:
    scores = np.array([[np.inf, 1.0, -np.inf], [-np.inf, 0.0, -np.inf]])
    assert retrieval_metrics(scores, [1, 0]).ranks.tolist() == [1, 1.5]


@pytest.mark.parametrize("column", [0, 1, 2])
def test_nan_names_the_row(column: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.zeros((5, 3), dtype=np.float32)
    scores[3, column] = np.nan
    for size in (3, 1000):
        monkeypatch.setattr(_inputs, "_CHUNK_SCORES", size)
        with pytest.raises(ValueError, match="row 3 of the scores has a NaN"):
            retrieval_metrics(scores, [1] * 5)


@pytest.mark.parametrize(("value", "what"), [(np.nan, "a NaN"), (np.inf, "an infinity")])
def test_nan_names_the_row_of_features(value: float, what: str) -> None:
    good = np.ones((6, 4), dtype=np.float32)
    bad = good.copy()
    bad[4, 2] = value
    with pytest.raises(ValueError, match=f"queries row 4 has {what}"):
        retrieval_metrics((bad, good, "dot"), [0] * 6)
    with pytest.raises(ValueError, match=f"gallery row 4 has {what}"):
        retrieval_metrics((good, bad, "dot"), [0] * 6)
    with pytest.raises(ValueError, match="gallery must be within"):
        retrieval_metrics((good.astype(np.float64), 1e200 * good.astype(np.float64), "dot"), [0] * 6)


ROWS = np.zeros((2, 3))


@pytest.mark.parametrize(
    ("scores", "positives", "options", "error", "message"),
    [
        (np.zeros((2, 3), np.int64), [0, 0], {}, TypeError, "scores must be floating point, got int64"),
        (np.zeros(3), [0], {}, ValueError, r"scores must have shape \[N, M\], got \[3\]"),
        (np.zeros((0, 3)), [], {}, ValueError, r"must not be empty, got \[0, 3\]"),
        (np.zeros((2, 0)), [0, 0], {}, ValueError, r"must not be empty, got \[2, 0\]"),
        (ROWS, [0], {}, ValueError, r"positives must have shape \[2\], got \[1\]"),
        (ROWS, [0, 3], {}, ValueError, r"positives\[1\] must be in \[0, 2\], got 3"),
        (ROWS, [0, -1], {}, ValueError, r"positives\[1\] must be in \[0, 2\], got -1"),
        (ROWS, [[0], []], {}, ValueError, r"positives\[1\] is empty"),
        (ROWS, [0.0, 1.0], {}, TypeError, "positives must hold integers, got float64"),
        (ROWS, ([0, 2], [0, 1]), {}, ValueError, "offsets of positives must be 3 numbers, from 0 to 2"),
        (ROWS, ([0, 1, 1], [0, 1]), {}, ValueError, "offsets of positives must be 3 numbers, from 0 to 2"),
        (ROWS, [0, 1], {"ks": (0,)}, ValueError, "ks must be positive, got 0"),
        (ROWS, [0, 1], {"ks": (1.5,)}, TypeError, "ks must be ints, got 1.5"),
        (ROWS, [0, 1], {"ties": "random"}, ValueError, "ties must be one of realistic, .*, got 'random'"),
        (ROWS, [0, 1], {"relevance": [1.0]}, ValueError, r"one grade for each of the 2 positives, got \[1\]"),
        (ROWS, [0, 1], {"relevance": [1.0, 0.0]}, ValueError, "relevance must be positive and finite"),
        (ROWS, [[0, 0], [1]], {"relevance": [1, 2, 3]}, ValueError, "positives must not repeat"),
        (ROWS, [0, 1], {"exclude": [0]}, ValueError, r"exclude must have shape \[2\], got \[1\]"),
        (ROWS, [0, 1], {"exclude": [1, 3]}, ValueError, r"exclude must be in \[-1, 2\], got 3"),
        (ROWS, [0, 1], {"exclude": [-1, 1]}, ValueError, r"exclude\[1\] is a positive of query 1: 1"),
        ((ROWS, ROWS), [0, 1], {}, ValueError, "got a tuple of 2"),
        ((ROWS, ROWS, "l3"), [0, 1], {}, ValueError, "metric must be one of dot, .*, got 'l3'"),
        ((np.zeros(3), ROWS, "dot"), [0, 1], {}, ValueError, "queries must have shape"),
        ((ROWS, np.zeros((2, 4)), "dot"), [0, 1], {}, ValueError, "gallery must have 3 columns, got 4"),
        ((ROWS, ROWS.astype(np.float32), "dot"), [0, 1], {}, TypeError, "must have one dtype, got float64, float32"),
    ],
)
def test_wrong_arguments(
    scores: Any, positives: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        retrieval_metrics(scores, positives, **options)
