"""Bootstrap intervals against a plain loop of resamples and the normal approximation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pycm.evaluate import (
    Interval,
    bootstrap,
    bootstrap_difference,
    five_captions,
    intervals,
    protocols,
    retrieval_metrics,
)

RNG = np.random.default_rng(0)
SCORES = RNG.standard_normal((60, 40)) + 1.2 * np.eye(60, 40)
POSITIVES = np.arange(60) % 40
METRICS = retrieval_metrics(SCORES, POSITIVES, (1, 5))


def own_figures(metrics: Any) -> dict[str, float]:
    out = {"median_rank": metrics.median_rank, "mean_rank": metrics.mean_rank}
    for name in ("mrr", "map", "map_at_r", "r_precision"):
        out[name] = getattr(metrics, name)
    for k in (1, 5):
        out |= {f"recall@{k}": metrics.recall_at_k[k], f"ndcg@{k}": metrics.ndcg_at_k[k]}
        out[f"positives_recall@{k}"] = metrics.positives_recall_at_k[k]
    return out


def test_values_are_the_figures() -> None:
    got = bootstrap(METRICS, samples=20)
    assert {name: i.value for name, i in got.items()} == pytest.approx(own_figures(METRICS))
    assert all(isinstance(i, Interval) and i.low <= i.high for i in got.values())


def test_a_sample_is_the_metrics_of_the_queries_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights drawn are handed out, and every sample evaluated again from its scores."""
    drawn = []
    weights = intervals._weights

    def spy(*args: Any) -> Any:
        for w in weights(*args):
            drawn.append(w)
            yield w

    monkeypatch.setattr(intervals, "_weights", spy)
    monkeypatch.setattr(intervals, "_CHUNK_WEIGHTS", 60 * 7)  # several chunks
    got = bootstrap(METRICS, samples=50, confidence=0.9, seed=3)
    samples = np.concatenate(drawn)
    assert samples.shape == (50, 60)
    assert (samples.sum(axis=1) == 60).all()
    values = []
    for w in samples.astype(int):
        rows = np.repeat(np.arange(60), w)
        values.append(own_figures(retrieval_metrics(SCORES[rows], POSITIVES[rows], (1, 5))))
    for name, interval in got.items():
        low, high = np.quantile([v[name] for v in values], [0.05, 0.95])
        assert interval[1:] == pytest.approx((low, high)), name


def test_intervals_agree_with_the_normal_approximation() -> None:
    ranks = np.random.default_rng(1).integers(0, 10, 4000)
    metrics = retrieval_metrics(-np.arange(10.0)[None].repeat(4000, 0), ranks, (1,))
    got = bootstrap(metrics, samples=4000, seed=1)
    for name, column in (("recall@1", ranks < 1), ("mean_rank", ranks + 1)):
        half = 1.96 * column.std() / np.sqrt(4000)
        assert got[name].low == pytest.approx(column.mean() - half, abs=0.1 * half)
        assert got[name].high == pytest.approx(column.mean() + half, abs=0.1 * half)


def test_seeds() -> None:
    assert bootstrap(METRICS, seed=5) == bootstrap(METRICS, seed=5)
    assert bootstrap(METRICS, seed=5) != bootstrap(METRICS, seed=6)


def test_paired_difference() -> None:
    better = retrieval_metrics(SCORES + 0.3 * np.eye(60, 40), POSITIVES, (1, 5))
    got = bootstrap_difference(better, METRICS, samples=500)
    expected = {name: own_figures(better)[name] - value for name, value in own_figures(METRICS).items()}
    assert {name: i.value for name, i in got.items()} == pytest.approx(expected)
    # The same queries in both: far narrower than the two intervals taken apart.
    alone = bootstrap(METRICS, samples=500)["mrr"]
    assert got["mrr"].high - got["mrr"].low < 0.6 * (alone.high - alone.low)
    assert all(i == (0, 0, 0) for i in bootstrap_difference(METRICS, METRICS, samples=50).values())
    flipped = bootstrap_difference(METRICS, better, samples=500)
    for name, i in got.items():
        assert flipped[name] == pytest.approx((-i.value, -i.high, -i.low))


def test_groups_are_drawn_whole() -> None:
    image = np.repeat(np.arange(12), 5)
    doubled = np.repeat(METRICS.ranks[:12], 5)  # captions that succeed and fail together
    scores = -np.arange(40.0)[None].repeat(60, 0)
    metrics = retrieval_metrics(scores, doubled.astype(int), (1,))
    once = retrieval_metrics(scores[:12], METRICS.ranks[:12].astype(int), (1,))
    grouped, alone = bootstrap(metrics, groups=image), bootstrap(once)
    for name in grouped:
        assert grouped[name] == pytest.approx(alone[name]), name
    naive = bootstrap(metrics)["mrr"]
    assert naive.high - naive.low < 0.6 * (grouped["mrr"].high - grouped["mrr"].low)


def test_folds_are_drawn_apart() -> None:
    sims = np.random.default_rng(4).standard_normal((40, 120))
    side = protocols._captions("folds", sims, 3, 4, (1, 5), "realistic", False).text_to_visual
    got = bootstrap(side, samples=300)
    assert {name: i.value for name, i in got.items()} == pytest.approx(own_figures(side))
    assert got["median_rank"].low <= side.median_rank <= got["median_rank"].high
    strict = five_captions(sims, captions=3, strict_compat=True).visual_to_text
    assert set(bootstrap(strict, samples=5)) == {"recall@1", "recall@5", "recall@10", "mrr", "mean_rank", "median_rank"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be a positive int, got 0"),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), got 1.0"),
        ({"groups": [0, 1]}, r"groups must have shape \[60\], got \[2\]"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"bootstrap: {message}"):
        bootstrap(METRICS, **options)
    fewer = retrieval_metrics(SCORES[:30], POSITIVES[:30], (1, 5))
    with pytest.raises(ValueError, match=r"the same queries and figures, got \[60\] and \[30\]"):
        bootstrap_difference(METRICS, fewer)
