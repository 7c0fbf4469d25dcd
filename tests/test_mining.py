"""Joins, best pairs and duplicates: what the definitions give on whole tables of exact scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pair_oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import DISTANCES, METRICS
from pair_oracles import table
from test_functional import OnlyDLPack
from test_properties import CHECK, Case, cases

from pycm import _pairs, mining, reference
from pycm.mining import Pairs, all_pairs_topk, deduplicate, threshold_join

METRIC = pytest.mark.parametrize("metric", METRICS)


def listed(pairs: Pairs) -> list[tuple[int, int, float]]:
    rows, indices, scores = (np.asarray(part) for part in pairs)
    assert rows.dtype == indices.dtype == np.int64
    return list(zip(rows.tolist(), indices.tolist(), scores.astype(np.float64).tolist(), strict=True))


def joined(blocks: Iterator[Pairs]) -> list[tuple[int, int, float]]:
    return [pair for block in blocks for pair in listed(block)]


def bound(metric: str, value: float) -> dict[str, float]:
    return {"max_distance": value} if metric in DISTANCES else {"min_score": value}


def middle(scores: np.ndarray, share: float = 0.9) -> float:
    """A score that occurs, with about 1 - `share` of the pairs at or above it."""
    finite = np.sort(scores[np.isfinite(scores)])
    return float(finite[int(share * (len(finite) - 1))])


def features(n: int, d: int = 12, seed: int = 0) -> np.ndarray:
    """Half of the rows near another one, some the same."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    x[n // 2 :] = x[: n - n // 2] + rng.choice([0, 0.1, 0.5], (n - n // 2, 1)) * rng.standard_normal((n - n // 2, d))
    return x[rng.permutation(n)].astype(np.float32)


def threshold_of(x: np.ndarray, metric: str, share: float = 0.95) -> float:
    scores = table(x, x, metric)[np.triu_indices(len(x), 1)]
    return middle(scores, 1 - share if metric in DISTANCES else share)


# ---- joins ----


@METRIC
def test_join_is_the_specification(level: str, metric: str) -> None:
    rng = np.random.default_rng(0)
    q, g = rng.standard_normal((40, 9)).astype(np.float32), rng.standard_normal((700, 9)).astype(np.float32)
    value = middle(table(q, g, metric))  # at a score that occurs: it belongs to the result
    want = pair_oracles.join(q, g, value, metric)
    assert any(pair[2] == value for pair in want)
    assert 100 < len(want) < 28000
    assert joined(threshold_join(q, g, metric=metric, **bound(metric, value))) == want
    again = reference.join(q, g, value, metric)
    assert listed(Pairs(*again)) == want


@METRIC
def test_blocks_do_not_matter(metric: str) -> None:
    x = features(150)
    value = threshold_of(x, metric)
    want = pair_oracles.join(x, x, value, metric)
    alone = pair_oracles.self_join(x, value, metric)
    for block, most in ((1, 1), (7, 50), (64, 3), (4096, 1 << 22), (150, len(want)), (150, len(want) - 1)):
        options: Any = {"metric": metric, "block": block, "max_pairs": most, **bound(metric, value)}
        for gallery, expected in ((x, want), (None, alone)):
            blocks = [listed(pairs) for pairs in threshold_join(x, gallery, **options)]
            assert [pair for pairs in blocks for pair in pairs] == expected, (block, most)
            assert all(blocks), "a block without a pair"
            for pairs in blocks:
                assert len(pairs) <= most or len({pair[0] for pair in pairs}) == 1
    assert len(list(threshold_join(x, x, metric=metric, **bound(metric, value)))) == 1


def test_a_row_with_too_many_pairs_is_delivered() -> None:
    x = np.ones((50, 3), np.float32)
    blocks = list(threshold_join(x, x, 0.5, max_pairs=10))
    assert [len(block.scores) for block in blocks] == [50] * 50
    assert joined(iter(blocks)) == [(i, j, 1.0) for i in range(50) for j in range(50)]


def test_the_threshold_is_not_rounded() -> None:
    """Halfway between two fp32 scores: the one below is not a pair, though rounding would make it one."""
    below, above = np.float32(0.3), np.nextafter(np.float32(0.3), np.float32(1))
    g = np.array([[below], [above]], np.float32)
    between = (float(below) + float(above)) / 2
    assert np.float32(between) in (below, above)
    assert joined(threshold_join(np.ones((1, 1), np.float32), g, between, "dot")) == [(0, 1, float(above))]
    nearer = joined(threshold_join(np.zeros((1, 1), np.float32), g, metric="euclidean", max_distance=between))
    assert nearer == [(0, 0, float(below))]


@METRIC
def test_nan_and_infinite_rows(metric: str) -> None:
    x = features(60)
    x[5, 3], x[20], x[30, 0], x[31, 0] = np.nan, np.nan, np.inf, -np.inf
    for value in (threshold_of(x[:5], metric), np.inf, 0.0, *(() if metric in DISTANCES else (-np.inf, -1.0))):
        got = joined(threshold_join(x, None, metric=metric, **bound(metric, value)))
        assert got == pair_oracles.self_join(x, value, metric), value
    for k in (10, 5000):
        assert listed(all_pairs_topk(x, k, metric)) == pair_oracles.best_pairs(x, k, metric)
    kept, groups = deduplicate(x, threshold_of(x[:5], metric), metric)
    assert {5, 20} <= set(kept.tolist())
    assert (np.bincount(groups)[np.searchsorted(kept, [5, 20])] == 1).all()


# ---- the best pairs ----


@METRIC
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_best_pairs(metric: str, dtype: str) -> None:
    x = features(130).astype(dtype)
    want = pair_oracles.best_pairs(x, 10**9, metric)
    for k in (1, 2, 50, 1000, len(want), len(want) + 7):
        got = all_pairs_topk(x, k, metric)
        assert got.scores.dtype == (np.float64 if dtype == "float64" else np.float32)
        assert listed(got) == want[:k], k


@METRIC
def test_best_pairs_of_ties(metric: str) -> None:
    """Integer rows: scores tie by the thousand, and the order of the rows decides."""
    x = np.random.default_rng(1).integers(-1, 2, (120, 4)).astype(np.float32)
    want = pair_oracles.best_pairs(x, 10**9, metric)
    for k in (1, 37, 500, 5000):
        assert want[k - 1][2] == want[k][2], "the case has no tie at k"
        assert listed(all_pairs_topk(x, k, metric)) == want[:k], k


@METRIC
def test_best_pairs_in_small_blocks(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, and the threshold rises between them; a sample that misses the best rows."""
    monkeypatch.setattr(mining, "BLOCK", 16)
    monkeypatch.setattr(mining, "MAX_PAIRS", 40)
    monkeypatch.setattr(mining, "_SAMPLE", 64)
    x = features(400, 4)
    x[::6] *= 1 + np.arange(67, dtype=np.float32)[:, None] / 30  # every sixth row is in the sample
    want = pair_oracles.best_pairs(x, 300, metric)
    for k in (1, 20, 300):
        assert listed(all_pairs_topk(x, k, metric)) == want[:k]


def test_the_threshold_rises_by_one_ulp_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best pair comes in a later block, one ulp above the first, and neither of its rows is in the sample."""
    monkeypatch.setattr(mining, "BLOCK", 1)
    monkeypatch.setattr(mining, "_SAMPLE", 2)
    low = np.float32(0.3)
    high = np.nextafter(low, np.float32(1))
    x = np.array([[1, 0], [0, 1], [low, 0], [0, high]], np.float32)
    assert listed(all_pairs_topk(x, 1, "dot")) == [(1, 3, float(high))]


def test_a_cluster_needs_more_than_a_few_best_of_each_row() -> None:
    """Where the original's top_k misses pairs: 40 rows near each other, and 5 best matches looked at."""
    x = features(200, 16)
    x[:40] = x[0] + 0.01 * np.random.default_rng(2).standard_normal((40, 16)).astype(np.float32)
    want = pair_oracles.best_pairs(x, 600, "cosine")
    assert listed(all_pairs_topk(x, 600)) == want
    few = listed(all_pairs_topk(x, 600, per_row=5))
    assert set(few) != set(want)
    assert listed(all_pairs_topk(x, 600, per_row=199)) == want
    assert listed(all_pairs_topk(x, 600, per_row=500)) == want
    # By definition: the pairs that some row's five best matches make.
    scores = table(x, x, "cosine").astype(np.float64)
    np.fill_diagonal(scores, -np.inf)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    pairs = {(min(i, int(j)), max(i, int(j))) for i in range(200) for j in best[i]}
    ordered = sorted(((i, j, float(scores[i, j])) for i, j in pairs), key=lambda p: (-p[2], p[0], p[1]))
    assert few == ordered[:600]


def test_paraphrase_mining_of_sentence_transformers() -> None:
    util = pytest.importorskip("sentence_transformers.util")
    torch = pytest.importorskip("torch")
    x = torch.randn(300, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # without ties
    for k, per_row in ((400, 3), (400, 1), (2000, 100)):
        theirs = util.paraphrase_mining_embeddings(x, max_pairs=k, top_k=per_row)
        ours = listed(all_pairs_topk(x, k, per_row=per_row))
        assert [pair[:2] for pair in ours] == [tuple(pair[1:]) for pair in theirs]
        np.testing.assert_allclose([pair[2] for pair in ours], [pair[0] for pair in theirs], rtol=1e-12)


# ---- duplicates ----


@METRIC
@pytest.mark.parametrize("share", [0.5, 0.95, 0.995])
def test_duplicates(metric: str, share: float) -> None:
    x = features(140)
    value = threshold_of(x, metric, share)
    for mode, oracle in (("greedy", pair_oracles.greedy), ("components", pair_oracles.components)):
        want = oracle(x, value, metric)
        for block in (4096, 13, 1):
            kept, groups = deduplicate(x, value, metric, mode=mode, block=block)  # type: ignore[arg-type]
            assert kept.dtype == groups.dtype == np.int64
            assert kept.tolist() == sorted(set(want)), (mode, block)
            assert kept[groups].tolist() == want, (mode, block)


def test_greedy_keeps_what_only_matches_a_duplicate() -> None:
    """A chain 0 - 1 - 2: row 1 goes with row 0, and row 2, which matches row 1 alone, is kept."""
    x = np.array([[0.0], [1.0], [2.0], [3.0]], np.float32)
    kept, groups = deduplicate(x, 1.0, "euclidean")
    assert (kept.tolist(), groups.tolist()) == ([0, 2], [0, 0, 1, 1])
    kept, groups = deduplicate(x, 1.0, "euclidean", mode="components")
    assert (kept.tolist(), groups.tolist()) == ([0], [0, 0, 0, 0])


def test_many_copies_are_not_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 rows of which 30 differ: far fewer than their 200 million pairs are met."""
    rng = np.random.default_rng(3)
    distinct = rng.standard_normal((30, 8)).astype(np.float32)
    which = rng.integers(0, 30, 20_000)
    met = [0]
    encode = _pairs.encode

    class Counting:
        def __init__(self, rows: Any, metric: str) -> None:
            self.rows, self.encoded = rows, encode(rows, metric)

        def join(self, queries: Any, threshold: float, after: int, *others: Any) -> Any:
            met[0] += len(queries) * (len(self.rows) - after)
            return self.encoded.join(queries, threshold, after, *others)

    monkeypatch.setattr(mining, "MAX_PAIRS", 20_000)
    monkeypatch.setattr(_pairs, "encode", Counting)
    kept, groups = deduplicate(distinct[which], 0.9999, block=64)
    first = np.array([np.flatnonzero(which == row)[0] for row in range(30)])
    assert kept.tolist() == sorted(first)
    np.testing.assert_array_equal(kept[groups], first[which])
    assert 0 < met[0] < 10_000_000


def test_foreign_byte_order() -> None:
    x = features(60)
    foreign = x.astype(x.dtype.newbyteorder())
    assert joined(threshold_join(foreign, x, 0.5, block=7)) == joined(threshold_join(x, x, 0.5))
    assert listed(all_pairs_topk(foreign, 9)) == listed(all_pairs_topk(x, 9))


def test_the_gallery_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = _pairs.encode

    def counting(rows: Any, metric: str) -> Any:
        encoded.append(len(rows))
        return encode(rows, metric)

    for module in (_pairs, mining):
        monkeypatch.setattr(module, "encode", counting)
    x = features(150)
    list(threshold_join(x[:60], x, 0.5, block=7))
    list(threshold_join(x, None, 0.5, block=7))
    assert encoded == [150, 150]
    monkeypatch.setattr(mining, "BLOCK", 16)
    all_pairs_topk(x, 20, per_row=3)
    assert encoded == [150, 150, 150]


@CHECK
@given(cases(), st.data())
def test_definitions_hold_for_every_input(case: Case, data: st.DataObject) -> None:
    x = np.ascontiguousarray(case.gallery[: data.draw(st.integers(0, 60))])
    metric = case.metric
    scores = table(x, x, metric)[np.triu_indices(len(x), 1)]
    scores = scores[~np.isnan(scores)]
    value = float(data.draw(st.sampled_from(sorted(set(scores.tolist()))))) if len(scores) else 0.5
    block, most = data.draw(st.sampled_from([1, 5, 64])), data.draw(st.sampled_from([1, 30, 10000]))
    options: Any = {"metric": metric, "block": block, "max_pairs": most, **bound(metric, value)}
    assert joined(threshold_join(x, **options)) == pair_oracles.self_join(x, value, metric)
    if len(x):
        assert joined(threshold_join(case.queries, x, **options)) == pair_oracles.join(case.queries, x, value, metric)
    k = data.draw(st.sampled_from([1, 3, 40, 1000]))
    assert listed(all_pairs_topk(x, k, metric)) == pair_oracles.best_pairs(x, k, metric)
    for mode, oracle in (("greedy", pair_oracles.greedy), ("components", pair_oracles.components)):
        kept, groups = deduplicate(x, value, metric, mode=mode, block=block)  # type: ignore[arg-type]
        assert kept[groups].tolist() == oracle(x, value, metric)
        assert kept.tolist() == sorted(set(kept[groups].tolist()))


# ---- kinds of arrays, empty inputs, errors ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(features(60)).to(getattr(torch, dtype)).requires_grad_()
    wide = x.detach().to(torch.float64 if dtype == "float64" else torch.float32).numpy()
    blocks = list(threshold_join(x, x[:30], 0.6, block=17))
    best, few, groups = all_pairs_topk(x, 9), all_pairs_topk(x, 9, per_row=2), deduplicate(x, 0.6)
    for result in (*blocks, best, few, groups):
        assert all(isinstance(part, torch.Tensor) and not part.requires_grad for part in result)
    assert joined(iter(blocks)) == joined(threshold_join(wide, wide[:30], 0.6))
    assert listed(best) == listed(all_pairs_topk(wide, 9))
    assert listed(few) == listed(all_pairs_topk(wide, 9, per_row=2))
    for ours, theirs in zip(groups, deduplicate(wide, 0.6), strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


def test_dlpack_and_layouts() -> None:
    x = features(60)
    want = listed(all_pairs_topk(x, 20)), deduplicate(x, 0.6), joined(threshold_join(x, min_score=0.6))
    kinds: tuple[Any, ...] = (OnlyDLPack(x), np.asfortranarray(x), np.repeat(x, 2, 0)[::2], x[::-1].copy()[::-1])
    for kind in kinds:
        got = listed(all_pairs_topk(kind, 20)), deduplicate(kind, 0.6), joined(threshold_join(kind, min_score=0.6))
        assert (got[0], got[2]) == (want[0], want[2])
        np.testing.assert_array_equal(got[1].groups, want[1].groups)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_pairs(n: int, dtype: str) -> None:
    x = np.ones((n, 3), dtype)
    assert list(threshold_join(x, min_score=0.5)) == []
    assert list(threshold_join(x[:0], np.ones((5, 3), dtype), 0.5)) == []
    for per_row in (None, 3):
        best = all_pairs_topk(x, 4, per_row=per_row)
        assert [part.shape for part in best] == [(0,)] * 3
        assert best.scores.dtype == dtype
    for mode in ("greedy", "components"):
        kept, groups = deduplicate(x, 0.5, mode=mode)  # type: ignore[arg-type]
        assert kept.tolist() == groups.tolist() == list(range(n))
        assert kept.dtype == groups.dtype == np.int64


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    x = features(50)
    for progress, shown in ((None, False), (False, False), (True, True)):
        list(threshold_join(x, min_score=0.5, block=10, progress=progress))
        all_pairs_topk(x, 5, progress=progress)
        deduplicate(x, 0.5, progress=progress)
        captured = capsys.readouterr()
        assert captured.out == ""
        for name in ("threshold_join", "all_pairs_topk", "deduplicate"):
            assert (name in captured.err) == shown
