"""Retrieval metrics against hand-computed cases, loops over all orders of ties, and scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pycm.evaluate import RetrievalMetrics, retrieval_metrics


def all_orders(scores: np.ndarray, positives: list[list[int]], ks: list[int]) -> tuple[list[float], dict[int, float]]:
    """Mean rank of each query's best positive, and recalls, over every order that the scores allow."""
    ranks, hits = [], {k: 0.0 for k in ks}
    for row, wanted in zip(scores, positives, strict=True):
        found = []
        for order in itertools.permutations(range(len(row))):
            ordered = [row[i] for i in order]
            if all(a >= b for a, b in itertools.pairwise(ordered)):
                found.append(min(order.index(i) for i in wanted))
        ranks.append(float(np.mean(found)))
        for k in ks:
            hits[k] += float(np.mean([rank < k for rank in found])) / len(scores)
    return ranks, hits


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
    assert got.recall_at_k == {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}
    assert got.median_rank == 2.5
    assert got.mean_rank == 2.5
    assert got.mrr == pytest.approx((1 + 1 / 3 + 1 / 4 + 1 / 2) / 4)
    assert str(got).startswith("R@1 25.0  R@2 50.0  R@3 75.0  R@4 100.0  median rank 2.5")


def test_best_of_several_positives_counts() -> None:
    scores = np.array([[0.1, 0.9, 0.5, 0.7], [0.4, 0.3, 0.2, 0.1]])
    got = retrieval_metrics(scores, [[0, 3], np.array([3, 2, 2])], ks=(1, 2, 3))
    assert got.ranks.tolist() == [1, 2]
    assert got.recall_at_k == {1: 0.0, 2: 0.5, 3: 1.0}


@pytest.mark.parametrize("shape", [(7, 2), (50, 50), (3, 1000)])
def test_constant_scores_are_chance(shape: tuple[int, int]) -> None:
    n, m = shape
    got = retrieval_metrics(np.full(shape, 0.3), np.arange(n) % m, ks=(1, 5, 10))
    assert got.recall_at_k == {k: pytest.approx(min(k / m, 1)) for k in (1, 5, 10)}
    assert got.median_rank == pytest.approx((m + 1) / 2)
    assert got.mean_rank == pytest.approx((m + 1) / 2)


@pytest.mark.parametrize("seed", range(8))
def test_ties_against_every_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, (6, 6)).astype(np.float64)
    positives = [sorted(rng.choice(6, rng.integers(1, 5), replace=False).tolist()) for _ in range(6)]
    ks = [1, 2, 3, 6]
    ranks, recalls = all_orders(scores, positives, ks)
    got = retrieval_metrics(scores, positives, ks)
    np.testing.assert_allclose(got.ranks, ranks, rtol=0, atol=1e-12)
    assert got.recall_at_k == {k: pytest.approx(recalls[k], abs=1e-12) for k in ks}
    np.testing.assert_allclose(got.mrr, np.mean([1 / (r + 1) for r in ranks]))


def test_one_positive_is_the_mean_of_optimistic_and_pessimistic() -> None:
    scores = np.random.default_rng(0).integers(0, 10, (40, 60)).astype(np.float32)
    positives = np.random.default_rng(1).integers(0, 60, 40)
    best = scores[np.arange(40), positives][:, None]
    optimistic, pessimistic = (scores > best).sum(1), (scores >= best).sum(1) - 1
    got = retrieval_metrics(scores, positives)
    np.testing.assert_array_equal(got.ranks, (optimistic + pessimistic) / 2)


def test_against_sklearn() -> None:
    from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score

    rng = np.random.default_rng(3)
    scores = rng.standard_normal((80, 30))
    labels = np.r_[np.arange(30), rng.integers(0, 30, 50)]
    got = retrieval_metrics(scores, labels, ks=(1, 3, 10))
    for k in (1, 3, 10):
        assert got.recall_at_k[k] == pytest.approx(top_k_accuracy_score(labels, scores, k=k))
    truth = np.eye(30)[labels]
    assert got.mrr == pytest.approx(label_ranking_average_precision_score(truth, scores))


@pytest.mark.parametrize("metric", ["dot", "cosine", "pearson", "euclidean", "sqeuclidean"])
def test_features_equal_the_matrix(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycm import evaluate, reference

    rng = np.random.default_rng(5)
    queries, gallery = (rng.standard_normal((n, 9)).astype(np.float32) for n in (37, 23))
    positives = rng.integers(0, 23, 37)
    matrix = reference.similarity(queries, gallery, metric).astype(np.float64)
    expected = retrieval_metrics(-matrix if "euclidean" in metric else matrix, positives)
    monkeypatch.setattr(evaluate, "_CHUNK_SCORES", 23 * 5)  # several chunks
    got = retrieval_metrics((queries, gallery, metric), positives)
    assert got.recall_at_k == expected.recall_at_k
    np.testing.assert_array_equal(got.ranks, expected.ranks)


def test_torch_scores() -> None:
    torch = pytest.importorskip("torch")
    scores = torch.tensor([[0.5, 0.25], [0.75, 0.5]], requires_grad=True)
    for given in (scores, scores.to(torch.bfloat16)):
        assert retrieval_metrics(given, torch.tensor([0, 1])).ranks.tolist() == [0, 1]


def test_infinities_are_values() -> None:
    scores = np.array([[np.inf, 1.0, -np.inf], [-np.inf, 0.0, -np.inf]])
    assert retrieval_metrics(scores, [1, 0]).ranks.tolist() == [1, 1.5]


@pytest.mark.parametrize("column", [0, 1, 2])
def test_nan_names_the_row(column: int) -> None:
    scores = np.zeros((5, 3), dtype=np.float32)
    scores[3, column] = np.nan
    with pytest.raises(ValueError, match="row 3 of the scores has a NaN"):
        retrieval_metrics(scores, [1] * 5)


def test_nan_names_the_row_of_features(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycm import evaluate

    queries = np.ones((6, 4), dtype=np.float32)
    queries[4, 2] = np.nan
    monkeypatch.setattr(evaluate, "_CHUNK_SCORES", 4)
    with pytest.raises(ValueError, match="row 4 of the scores has a NaN"):
        retrieval_metrics((queries, np.ones((2, 4), dtype=np.float32), "dot"), [0] * 6)


@pytest.mark.parametrize(
    ("scores", "positives", "ks", "error", "message"),
    [
        (np.zeros((2, 3), np.int64), [0, 0], (1,), TypeError, "scores must be floating point, got int64"),
        (np.zeros(3), [0], (1,), ValueError, r"scores must have shape \[N, M\], got \[3\]"),
        (np.zeros((0, 3)), [], (1,), ValueError, r"must not be empty, got \[0, 3\]"),
        (np.zeros((2, 0)), [0, 0], (1,), ValueError, r"must not be empty, got \[2, 0\]"),
        (np.zeros((2, 3)), [0], (1,), ValueError, "each of the 2 queries, got 1"),
        (np.zeros((2, 3)), [0, 3], (1,), ValueError, r"positives\[1\] must be in \[0, 2\], got 3"),
        (np.zeros((2, 3)), [0, -1], (1,), ValueError, r"positives\[1\] must be in \[0, 2\], got -1"),
        (np.zeros((2, 3)), [[0], []], (1,), ValueError, r"positives\[1\] is empty"),
        (np.zeros((2, 3)), [0.0, 1.0], (1,), TypeError, r"positives\[0\] must be integers"),
        (np.zeros((2, 3)), [0, 1], (0,), ValueError, "ks must be positive, got 0"),
        (np.zeros((2, 3)), [0, 1], (1.5,), TypeError, "ks must be ints, got 1.5"),
        ((np.zeros((2, 3)), np.zeros((2, 3))), [0, 1], (1,), ValueError, "got a tuple of 2"),
        ((np.zeros(3), np.zeros((2, 3)), "dot"), [0, 1], (1,), ValueError, r"queries must have shape"),
    ],
)
def test_wrong_arguments(
    scores: object, positives: list[object], ks: tuple[int, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        retrieval_metrics(scores, positives, ks)
