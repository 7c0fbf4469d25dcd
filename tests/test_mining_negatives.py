"""mine_hard_negatives: what its definition gives on whole tables of exact scores."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import DISTANCES, METRICS
from pair_oracles import costs, table
from test_functional import OnlyDLPack
from test_properties import CHECK, Case, cases
from test_rank import owners, random_rows, split

import pycm
from pycm import _negatives, reference
from pycm.mining import mine_hard_negatives
from pycm.ranking import rank

METRIC = pytest.mark.parametrize("metric", METRICS)


def passing(
    scores: np.ndarray,
    positives: list[np.ndarray],
    metric: str,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    min_score: float = -np.inf,
    max_score: float = np.inf,
    range_min: int = 0,
    range_max: int | None = None,
    mask: np.ndarray | None = None,
) -> list[list[int]]:
    """For each query all negatives that pass, best first."""
    found = []
    for i, row in enumerate(scores.astype(np.float64)):
        wrong = set(np.asarray(positives[i]).tolist())
        allowed = np.ones(scores.shape, bool) if mask is None else np.broadcast_to(mask, scores.shape)
        order = np.argsort(costs(row, metric), kind="stable")
        candidates = [j for j in order.tolist() if j not in wrong and allowed[i, j] and row[j] == row[j]]
        candidates = candidates[range_min:range_max]
        candidates = [j for j in candidates if min_score <= row[j] <= max_score]
        if wrong:
            if metric in DISTANCES:
                hardest = max(row[j] for j in wrong)
                if absolute_margin is not None:
                    candidates = [j for j in candidates if row[j] >= hardest + absolute_margin]
                if relative_margin is not None:
                    candidates = [j for j in candidates if row[j] >= hardest + relative_margin * hardest]
            else:
                hardest = min(row[j] for j in wrong)
                if absolute_margin is not None:
                    candidates = [j for j in candidates if row[j] <= hardest - absolute_margin]
                if relative_margin is not None:
                    candidates = [j for j in candidates if row[j] <= hardest - relative_margin * abs(hardest)]
        found.append(candidates)
    return found


def matches(scores: np.ndarray, found: list[list[int]], k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    values = np.full((len(found), k), np.inf if metric in DISTANCES else -np.inf, scores.dtype)
    indices = np.full((len(found), k), -1, np.int64)
    for i, candidates in enumerate(found):
        indices[i, : len(candidates[:k])] = candidates[:k]
        values[i, : len(candidates[:k])] = scores[i, candidates[:k]]
    return values, indices


def data(metric: str = "cosine", n: int = 30, m: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Queries near some of their positives."""
    rng = np.random.default_rng(0)
    g = rng.standard_normal((m, 12)).astype(np.float32)
    offsets, indices = random_rows(rng, n, m, 3)
    q = rng.standard_normal((n, 12)).astype(np.float32)
    np.add.at(q, owners(offsets), g[indices])
    g[m // 2 :] = g[: m // 2]  # ties
    return q, g, offsets, indices


def filters(scores: np.ndarray) -> dict[str, dict[str, Any]]:
    low, high = np.quantile(scores[np.isfinite(scores)], [0.3, 0.8]).tolist()
    rng = np.random.default_rng(1)
    return {
        "none": {},
        "absolute margin": {"absolute_margin": 0.1},
        "no margin at all": {"absolute_margin": 0.0},
        "negative margin": {"absolute_margin": -0.2},
        "relative margin": {"relative_margin": 0.05},
        "both margins": {"absolute_margin": 0.05, "relative_margin": 0.3},
        "bounds": {"min_score": low, "max_score": high},
        "tight bounds": {"min_score": low, "max_score": low + 0.02 * (high - low)},
        "range": {"range_min": 5, "range_max": 40},
        "narrow range": {"range_min": 3, "range_max": 7, "max_score": high},
        "far away": {"range_min": 395},
        "mask": {"mask": rng.random(scores.shape) < 0.1, "relative_margin": 0.1},
        "mask of rows": {"mask": rng.random(scores.shape[1]) < 0.5, "range_min": 2},
        "nothing": {"mask": np.zeros(scores.shape[1], bool)},
        "all": {"absolute_margin": 0.01, "relative_margin": 0.01, "min_score": low, "max_score": high, "range_min": 1},
    }


@METRIC
def test_negatives_are_what_the_definition_gives(metric: str) -> None:
    q, g, offsets, indices = data()
    scores = table(q, g, metric)
    positives = split(offsets, indices)
    sizes = set()
    for name, options in filters(scores).items():
        found = passing(scores, positives, metric, **options)
        sizes |= {min(len(candidates), 5) for candidates in found}
        for k in (1, 4):
            got = mine_hard_negatives(q, g, (offsets, indices), k=k, metric=metric, **options)
            oracles.assert_same(got, matches(scores, found, k, metric), f"{name} k={k}")
    assert sizes == {0, 1, 2, 3, 4, 5}, "the filters are too strict or too lax"


@METRIC
def test_margins_are_taken_of_the_exact_scores_of_topk(metric: str) -> None:
    """A candidate exactly at the margin passes: the positive's score must be right in its last bit."""
    q, g, offsets, indices = data()
    counted = rank(q, g, (offsets, indices), metric)
    sign = -1.0 if metric in DISTANCES else 1.0
    worst = _negatives._worst_gain(q, g, indices, offsets, metric, sign)
    for i, part in enumerate(split(offsets, counted.scores)):
        assert worst[i] == (min(sign * part.astype(float)) if len(part) else np.inf)
    # Row 7 twice: one the positive, the other a negative with exactly its score.
    twin = mine_hard_negatives(q[:1], g, [7], k=1, metric=metric, absolute_margin=0)
    assert (twin.indices[0, 0], twin.scores[0, 0]) == (207, table(q[:1], g, metric)[0, 7])


@METRIC
def test_blocks_do_not_matter(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, g, offsets, indices = data()
    options: Any = {"k": 6, "metric": metric, "relative_margin": 0.1}
    sample: Any = {**options, "sampling": "random", "range_max": 60}
    want = mine_hard_negatives(q, g, (offsets, indices), **options)
    drawn = mine_hard_negatives(q, g, (offsets, indices), **sample)
    monkeypatch.setattr(_negatives, "_CANDIDATES", 100)
    monkeypatch.setattr(_negatives, "_TERMS", 13)
    oracles.assert_same(mine_hard_negatives(q, g, (offsets, indices), **options), want)
    oracles.assert_same(mine_hard_negatives(q, g, (offsets, indices), **sample), drawn)


def test_random_samples() -> None:
    q, g, offsets, indices = data()
    scores = table(q, g, "cosine")
    pool = passing(scores, split(offsets, indices), "cosine", relative_margin=0.1, range_max=20)
    options: Any = {"k": 5, "relative_margin": 0.1, "range_max": 20, "sampling": "random"}
    draws = [mine_hard_negatives(q, g, (offsets, indices), seed=seed, **options) for seed in range(200)]
    oracles.assert_same(mine_hard_negatives(q, g, (offsets, indices), seed=0, **options), draws[0])
    full = next(i for i in range(len(q)) if len(pool[i]) == 20)
    times = np.zeros(len(g), int)
    for found in draws:
        for i, row in enumerate(found.indices):
            chosen = row[row >= 0].tolist()
            assert len(chosen) == min(5, len(pool[i]))
            places = [pool[i].index(j) for j in chosen]
            assert places == sorted(set(places))  # of the pool, no row twice, best first
        times[found.indices[full]] += 1
    # 1000 draws from 20: 50 each. Seven standard deviations of a binomial count.
    assert np.abs(times[pool[full]] - 50).max() < 7 * np.sqrt(200 * 0.25 * 0.75)
    short = next(i for i in range(len(q)) if 0 < len(pool[i]) < 5) if any(0 < len(p) < 5 for p in pool) else None
    assert short is None or draws[0].indices[short][: len(pool[short])].tolist() == pool[short]


class Columns:
    """As much of a datasets.Dataset as the original uses."""

    def __init__(self, columns: dict[str, list[str]]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    from_dict = classmethod(lambda cls, columns: cls(columns))

    def __getitem__(self, name: str) -> list[str]:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns[self.column_names[0]])

    def to_pandas(self) -> Any:
        """Only ever asked for the number of positives of each query."""
        counts = dict.fromkeys(self["anchor"], 1)
        grouped = SimpleNamespace(count=lambda: SimpleNamespace(to_dict=lambda: {"positive": counts}))
        return SimpleNamespace(groupby=lambda name: grouped)


def test_negatives_of_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original, on embeddings handed to it by a model that only looks them up."""
    hard_negatives = pytest.importorskip("sentence_transformers.util.hard_negatives")
    torch = pytest.importorskip("torch")
    from sentence_transformers.util import cos_sim, pairwise_cos_sim

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=Columns))
    monkeypatch.setattr(hard_negatives, "is_datasets_available", lambda: True)
    rng = np.random.default_rng(3)
    g = rng.standard_normal((100, 12))
    q = g[3 * np.arange(25)] + rng.standard_normal((25, 12))
    model = SimpleNamespace(
        device=torch.device("cpu"),
        similarity=cos_sim,
        similarity_pairwise=pairwise_cos_sim,
        prompts={},
        encode_query=lambda texts, **options: q[[int(text) for text in texts]],
        encode_document=lambda texts, **options: g[[int(text) for text in texts]],
    )
    model.similarity_pairwise = lambda x, y: pairwise_cos_sim(torch.from_numpy(x), torch.as_tensor(y))
    pairs = Columns({"anchor": [str(i) for i in range(25)], "positive": [str(3 * i) for i in range(25)]})
    counts = set()
    for options in (
        {},
        {"relative_margin": 0.05},
        {"absolute_margin": 0.1, "max_score": 0.5},
        {"range_min": 4},
        {"min_score": 0.5},
    ):
        theirs = hard_negatives.mine_hard_negatives(
            pairs,
            model,
            corpus=[str(j) for j in range(100)],
            num_negatives=3,
            range_max=90,
            output_format="labeled-pair",
            verbose=False,
            **options,
        )
        ours = mine_hard_negatives(q, g, 3 * np.arange(25), k=3, range_max=90, **options)  # type: ignore[arg-type]
        listed = [(str(i), str(j)) for i, row in enumerate(ours.indices) for j in row if j >= 0]
        labelled = zip(theirs["anchor"], theirs["positive"], theirs["label"], strict=True)
        assert listed == [(anchor, text) for anchor, text, label in labelled if label == 0], options
        counts.add(len(listed))
    assert len(counts) > 1


@CHECK
@given(cases(), st.data())
def test_definition_holds_for_every_input(case: Case, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    n, m = len(case.queries), len(case.gallery)
    scores = table(case.queries, case.gallery, case.metric)
    offsets, indices = random_rows(rng, n, m, 2)
    finite = np.isfinite(scores[owners(offsets), indices])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owners(offsets)[finite], minlength=n))]).astype(np.int64)
    indices = indices[finite]
    k, first = data.draw(st.integers(1, min(m, 6))), data.draw(st.sampled_from([0, 0, 1, 5]))
    options: dict[str, Any] = {"range_min": first}
    if data.draw(st.booleans()):
        options["range_max"] = first + k + data.draw(st.integers(0, 9))
    if data.draw(st.booleans()):
        options["absolute_margin"] = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    if data.draw(st.booleans()):
        options["relative_margin"] = data.draw(st.sampled_from([0.0, 0.05, 0.5]))
    values = scores[np.isfinite(scores)]
    if len(values) and data.draw(st.booleans()):
        options["max_score" if data.draw(st.booleans()) else "min_score"] = float(rng.choice(values))
    if data.draw(st.booleans()):
        options["mask"] = rng.random((n, m) if seed % 2 else m) < 0.5
    got = mine_hard_negatives(case.queries, case.gallery, (offsets, indices), k=k, metric=case.metric, **options)
    found = passing(scores, split(offsets, indices), case.metric, **options)
    oracles.assert_same(got, matches(scores, found, k, case.metric))


# ---- kinds of arrays, empty inputs, errors ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    plain, rows, offsets, indices = data()
    q, g = (torch.from_numpy(part).to(getattr(torch, dtype)).requires_grad_() for part in (plain, rows))
    wide = [oracles.widen(part) for part in (q, g)]
    mask = np.random.default_rng(2).random((len(q), len(g))) < 0.5
    want = mine_hard_negatives(*wide, (offsets, indices), k=3, relative_margin=0.05, mask=mask)
    tensors = torch.from_numpy(offsets), torch.from_numpy(indices)
    got = mine_hard_negatives(q, g, tensors, k=3, relative_margin=0.05, mask=torch.from_numpy(mask))
    assert type(got) is pycm.Matches
    assert all(isinstance(part, torch.Tensor) and not part.requires_grad for part in got)
    oracles.assert_same(got, want)


def test_forms_of_positives() -> None:
    from scipy import sparse

    q, g, offsets, indices = data()
    want = mine_hard_negatives(q, g, (offsets, indices), k=3)
    csr = sparse.csr_array((np.ones(len(indices)), indices, offsets), (len(q), len(g)))
    for positives in (split(offsets, indices), [part.tolist() for part in split(offsets, indices)], csr):
        oracles.assert_same(mine_hard_negatives(q, g, positives, k=3), want)
    oracles.assert_same(mine_hard_negatives(OnlyDLPack(q), OnlyDLPack(g), csr, k=3), want)
    single = mine_hard_negatives(q, g, np.arange(30), k=3)
    oracles.assert_same(single, pycm.topk(q, g, 3, exclude=np.arange(30)))


def test_empty() -> None:
    g = np.ones((4, 3), np.float32)
    found = mine_hard_negatives(g[:0], g, [], k=2, relative_margin=0.1)
    assert found.scores.shape == found.indices.shape == (0, 2)
    found = mine_hard_negatives(g[:1], g, [[0, 1, 2, 3]], k=4)
    assert (found.indices == -1).all()
    assert (found.scores == -np.inf).all()


def test_nan_positives_matter_to_margins_alone() -> None:
    q, g, _, _ = data()
    g[7] = np.nan
    positives = [7 if i == 4 else i for i in range(30)]
    scores = table(q, g, "cosine")
    found = passing(scores, [np.array([p]) for p in positives], "cosine")
    oracles.assert_same(mine_hard_negatives(q, g, positives, k=3), matches(scores, found, 3, "cosine"))
    with pytest.raises(ValueError, match="mine_hard_negatives: queries row 4 has a NaN score with its positive 7"):
        mine_hard_negatives(q, g, positives, k=3, absolute_margin=0.1)


def test_specification_scores_pairs() -> None:
    """The margin's scores are the specification's, pair by pair."""
    q, g, _, _ = data()
    for metric in METRICS:
        pairs = reference.METRICS[metric](q.astype(float), g[:30].astype(float)).astype(np.float32)
        assert pairs.tobytes() == np.diagonal(table(q, g[:30], metric)).tobytes()


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    q, g, offsets, indices = data()
    for progress, shown in ((None, False), (False, False), (True, True)):
        mine_hard_negatives(q, g, (offsets, indices), k=2, max_score=0.1, progress=progress)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("mine_hard_negatives" in captured.err) == shown


Q, G, P = np.ones((3, 4), np.float32), np.ones((10, 4), np.float32), [1, 2, 3]


def call(**changed: Any) -> Callable[[], Any]:
    options: dict[str, Any] = {"queries": Q, "gallery": G, "positives": P, "k": 2, **changed}
    return lambda: mine_hard_negatives(
        options.pop("queries"), options.pop("gallery"), options.pop("positives"), **options
    )


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "k of zero": (call(k=0), ValueError, "k must be at least 1, got 0"),
    "k above M": (call(k=11), ValueError, r"k must be in \[1, 10\], got 11"),
    "k a float": (call(k=2.0), TypeError, "k must be an integer, got float"),
    "positives": (call(positives=[1, 2, 10]), ValueError, r"positives must be in \[0, 10\), got 10"),
    "no positive": (call(positives=[1, 2, -1]), ValueError, r"positives must be in \[0, 10\), got -1"),
    "positives too few": (call(positives=[1, 2]), ValueError, r"positives must have shape \[3\], got \[2\]"),
    "offsets": (
        call(positives=([0, 2, 1, 2], [1, 2])),
        ValueError,
        "positives must have 4 offsets that run from 0 to 2",
    ),
    "range_min": (call(range_min=-1), ValueError, "range_min must be at least 0, got -1"),
    "range_max": (call(range_min=3, range_max=4), ValueError, r"range_max must be at least range_min \+ k = 5, got 4"),
    "sampling": (call(sampling="best"), ValueError, "sampling must be top or random, got 'best'"),
    "no range_max": (call(sampling="random"), ValueError, "range_max must be given for sampling='random'"),
    "seed": (call(seed=-1), ValueError, "seed must be at least 0, got -1"),
    "margin": (call(absolute_margin="x"), TypeError, "absolute_margin must be a number, got 'x'"),
    "margin nan": (call(relative_margin=float("nan")), ValueError, "relative_margin must be a number, got nan"),
    "max_score": (call(max_score=float("nan")), ValueError, "max_score must be a number, got nan"),
    "mask": (call(mask=np.ones(9, bool)), ValueError, r"mask must have shape \[10\] or \[3, 10\], got \[9\]"),
    "mask of integers": (call(mask=np.ones(10, int)), TypeError, "mask must be a boolean array, got int64"),
    "metric": (call(metric="l2"), ValueError, "metric must be one of .*, got 'l2'"),
    "dtypes": (call(gallery=G.astype("f8")), TypeError, "gallery must have the queries' dtype float32, got float64"),
    "integers": (call(queries=Q.astype(int)), TypeError, "queries must be float32, .* got int64"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_was_wrong(name: str) -> None:
    function, error, message = ERRORS[name]
    with pytest.raises(error, match=f"^mine_hard_negatives: {message}"):
        function()
