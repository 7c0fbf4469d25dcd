"""Retrieval metrics against scikit-learn, trec_eval's published output and code, torchmetrics and ranx."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pycm.evaluate import retrieval_metrics

KS = (1, 3, 5, 10)


def problem(seed: int, grades: int = 1) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Scores [30, 50] without ties, positives and their grades, and the grades as a matrix."""
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(50), (30, 1)), axis=1) / 64
    positives = [np.sort(rng.choice(50, rng.integers(1, 12), replace=False)) for _ in range(30)]
    relevance = [rng.integers(1, grades + 1, len(wanted)) for wanted in positives]
    truth = np.zeros((30, 50), np.int64)
    for i, (wanted, g) in enumerate(zip(positives, relevance, strict=True)):
        truth[i, wanted] = g
    return scores, positives, relevance, truth


def test_sklearn() -> None:
    from sklearn.metrics import average_precision_score, label_ranking_average_precision_score, top_k_accuracy_score

    scores, positives, _, truth = problem(0)
    got = retrieval_metrics(scores, positives, KS)
    expected = [average_precision_score(t, s) for t, s in zip(truth, scores, strict=True)]
    np.testing.assert_allclose(got.per_query["map"], expected, atol=1e-12)
    assert got.map == pytest.approx(label_ranking_average_precision_score(truth, scores))
    labels = np.r_[np.arange(30), np.random.default_rng(1).integers(0, 30, 50)]
    scores = np.random.default_rng(2).standard_normal((80, 30))
    got = retrieval_metrics(scores, labels, KS)
    for k in KS:
        assert got.recall_at_k[k] == pytest.approx(top_k_accuracy_score(labels, scores, k=k))


@pytest.mark.parametrize("levels", [4, 1000])
def test_sklearn_ndcg_averages_ties_too(levels: int) -> None:
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng(levels)
    _, positives, relevance, truth = problem(3, grades=4)
    scores = rng.integers(0, levels, truth.shape).astype(np.float64)
    got = retrieval_metrics(scores, positives, KS, relevance=relevance)
    for k in KS:
        expected = [ndcg_score(t[None], s[None], k=k) for t, s in zip(truth, scores, strict=True)]
        np.testing.assert_allclose(got.per_query[f"ndcg@{k}"], expected, atol=1e-12)


# Topic 302 of trec_eval's test collection (test/qrels-302.test, test/results-302.test): the ranks, from 1, of the 50
# relevant documents retrieved, of 77 relevant ones; and the figures that test/out.test.aq publishes for it.
TOPIC_302 = [
    *(1, 2, 4, 5, 6, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19, 21, 22, 24, 27, 28, 30, 31, 34, 36, 37, 39, 42, 43, 44),
    *(47, 48, 49, 50, 51, 53, 56, 58, 72, 79, 82, 84, 116, 154, 289, 301, 331, 353, 394, 458),
]
PUBLISHED = {"map": 0.4175, "r_precision": 0.5065, "mrr": 1.0}
PUBLISHED_RECALL = {5: 0.0519, 10: 0.0909, 15: 0.1558, 20: 0.2078, 30: 0.2857, 100: 0.5455, 200: 0.5714, 500: 0.6494}


def test_trec_eval_published_output() -> None:
    # trec_eval gives relevant documents that were not retrieved a precision of 0: here they stand behind all others.
    m = 2_000_000
    scores = -np.arange(m, dtype=np.float32)[None]
    missing = np.arange(m - 27, m)
    positives = [np.r_[np.array(TOPIC_302) - 1, missing]]
    got = retrieval_metrics(scores, positives, tuple(PUBLISHED_RECALL))
    assert len(TOPIC_302) == 50
    for name, value in PUBLISHED.items():
        assert getattr(got, name) == pytest.approx(value, abs=5.1e-5), name
    for k, value in PUBLISHED_RECALL.items():
        assert got.positives_recall_at_k[k] == pytest.approx(value, abs=5.1e-5)
    # 0.8, 0.7 and 0.8 are the published P5, P10 and P15
    assert [round(got.positives_recall_at_k[k] * 77 / k, 4) for k in (5, 10, 15)] == [0.8, 0.7, 0.8]


def test_trec_eval_by_hand() -> None:
    """Two topics small enough to follow: {d1 0, d2 1, d3 0} ranked d3 d1 d2, and {d2, d3} ranked d1 d2 d3."""
    scores = np.array([[1.0, 0.0, 1.5], [1.5, 0.2, 0.1]])
    got = retrieval_metrics(scores, [[1], [1, 2]], (1, 3))
    np.testing.assert_allclose(got.per_query["map"], [1 / 3, (1 / 2 + 2 / 3) / 2])
    np.testing.assert_allclose(
        got.per_query["ndcg@3"], [1 / np.log2(4), (1 / np.log2(3) + 1 / np.log2(4)) / (1 + 1 / np.log2(3))]
    )
    np.testing.assert_allclose(got.per_query["ndcg@3"], [0.5, 0.6934264036172708])  # as trec_eval prints them


@pytest.mark.parametrize("grades", [1, 4])
def test_trec_eval(grades: int) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec_eval (trec_eval's own code) is not installed")
    scores, positives, relevance, truth = problem(4, grades)
    names = [f"{i:02d}" for i in range(50)]
    qrels = {str(i): {names[j]: int(truth[i, j]) for j in range(50)} for i in range(30)}
    run = {str(i): dict(zip(names, map(float, scores[i]), strict=True)) for i in range(30)}
    cuts = ",".join(map(str, KS))
    wanted = {"map", "recip_rank", "Rprec", f"ndcg_cut.{cuts}", f"success.{cuts}", f"recall.{cuts}"}
    results = pytrec_eval.RelevanceEvaluator(qrels, wanted).evaluate(run)
    got = retrieval_metrics(scores, positives, KS, relevance=relevance)
    ours = {"map": "map", "recip_rank": "mrr", "Rprec": "r_precision"}
    for k in KS:
        ours |= {f"ndcg_cut_{k}": f"ndcg@{k}", f"success_{k}": f"recall@{k}", f"recall_{k}": f"positives_recall@{k}"}
    for theirs, name in ours.items():
        expected = [results[str(i)][theirs] for i in range(30)]
        np.testing.assert_allclose(got.per_query[name], expected, atol=1e-9, err_msg=theirs)


def test_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("torchmetrics.functional.retrieval", reason="torchmetrics is not installed")
    scores, positives, relevance, truth = problem(5, grades=3)
    scores = scores + 1  # it takes rows of a score <= 0 for not retrieved
    got = retrieval_metrics(scores, positives, KS, relevance=relevance)
    functions: dict[str, Any] = {
        "map": (peer.retrieval_average_precision, {}),
        "mrr": (peer.retrieval_reciprocal_rank, {}),
        "r_precision": (peer.retrieval_r_precision, {}),
    }
    for k in KS:
        functions[f"recall@{k}"] = (peer.retrieval_hit_rate, {"top_k": k})
        functions[f"positives_recall@{k}"] = (peer.retrieval_recall, {"top_k": k})
        functions[f"ndcg@{k}"] = (peer.retrieval_normalized_dcg, {"top_k": k})
    for name, (function, options) in functions.items():
        for i in range(30):
            target = torch.tensor(truth[i] if "ndcg" in name else truth[i] > 0)
            value = float(function(torch.tensor(scores[i], dtype=torch.float32), target, **options))
            assert got.per_query[name][i] == pytest.approx(value, abs=2e-6), (name, i)


def test_ranx() -> None:
    ranx = pytest.importorskip("ranx", reason="ranx is not installed", exc_type=ImportError)
    scores, positives, relevance, truth = problem(6, grades=3)
    qrels = {str(i): {str(j): int(truth[i, j]) for j in positives[i]} for i in range(30)}
    run = {str(i): {str(j): float(scores[i, j]) for j in range(50)} for i in range(30)}
    got = retrieval_metrics(scores, positives, KS, relevance=relevance)
    names = {"map": got.map, "mrr": got.mrr, "r-precision": got.r_precision}
    for k in KS:
        names |= {f"hit_rate@{k}": got.recall_at_k[k], f"recall@{k}": got.positives_recall_at_k[k]}
        names[f"ndcg@{k}"] = got.ndcg_at_k[k]
    results = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), list(names))
    for name, value in names.items():
        assert value == pytest.approx(results[name], abs=1e-9), name
