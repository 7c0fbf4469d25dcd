"""pycm.compat.patch: functions swapped in place, and back."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")

from sentence_transformers import util
from sklearn import cluster, neighbors
from sklearn.metrics import pairwise

import pycm.compat as compat
from pycm.compat import patch, unpatch

PACKAGES = ("sentence_transformers", "sklearn")
SWAPS = {package: importlib.import_module(f"pycm.compat.{package}").REPLACEMENTS for package in PACKAGES}
ORIGINAL, OURS = util.semantic_search, compat.sentence_transformers.semantic_search


def holders(package: str, which: int) -> set[tuple[str, str]]:
    """(module, attribute) of every name in the package that holds an original (0) or a replacement (1)."""
    wanted = {id(pair[which]) for pair in SWAPS[package]}
    return {
        (name, attribute)
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == package
        for attribute, value in list(vars(module).items())
        if id(value) in wanted
    }


@pytest.fixture(autouse=True)
def restored() -> Any:
    before = {package: holders(package, 0) for package in PACKAGES}
    yield
    unpatch()
    assert {package: holders(package, 0) for package in PACKAGES} == before


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_of_the_package(package: str) -> None:
    before = holders(package, 0)
    assert len({name for name, _ in before}) > 3
    assert holders(package, 1) == set()
    with patch(package) as handle:
        assert isinstance(handle, compat.Patch)
        assert holders(package, 1) == before
        assert holders(package, 0) == set()
    assert holders(package, 0) == before
    assert holders(package, 1) == set()


def test_the_packages_own_code_runs_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    search = compat.sentence_transformers.pycm.topk
    monkeypatch.setattr("pycm.topk", lambda *a, **o: calls.append("topk") or search(*a, **o))
    rows = np.random.default_rng(0).standard_normal((90, 20)).astype(np.float32)
    plain = util.information_retrieval(rows[:9], rows)
    assert not calls
    with patch("sentence_transformers"):
        swapped = util.information_retrieval(rows[:9], rows)
    assert calls == ["topk"]
    assert [[m["corpus_id"] for m in row] for row in swapped] == [[m["corpus_id"] for m in row] for row in plain]

    calls.clear()
    nearest = compat.sklearn._nearest
    monkeypatch.setattr(compat.sklearn, "_nearest", lambda *a: calls.append("nearest") or nearest(*a))
    mean_shift = cluster.estimate_bandwidth(rows)
    with patch("sklearn"):
        assert cluster.estimate_bandwidth(rows) == pytest.approx(mean_shift)
        assert isinstance(neighbors.NearestNeighbors(), compat.sklearn.NearestNeighbors)
        assert pairwise.euclidean_distances is compat.sklearn.euclidean_distances
    assert calls == ["nearest"]


def test_originals_still_serve_what_is_not_ours() -> None:
    rows = np.random.default_rng(0).standard_normal((30, 4))
    with patch("sentence_transformers"), patch("sklearn"):
        found = util.semantic_search(rows, rows, score_function=util.manhattan_sim, top_k=2)
        assert [row[0]["corpus_id"] for row in found] == list(range(30))
        assert neighbors.NearestNeighbors(metric="manhattan", algorithm="brute").fit(rows).kneighbors(rows, 1)[
            1
        ].tolist() == [[i] for i in range(30)]


def test_nested_and_repeated() -> None:
    first, second = patch("sentence_transformers"), patch("sentence_transformers")
    assert util.semantic_search is OURS
    first.restore()
    first.restore()
    assert util.semantic_search is OURS
    with patch("sentence_transformers"):
        assert util.semantic_search is OURS
    assert util.semantic_search is OURS
    second.restore()
    assert util.semantic_search is ORIGINAL
    second.restore()
    assert util.semantic_search is ORIGINAL


def test_restored_after_an_error() -> None:
    with pytest.raises(KeyError), patch("sentence_transformers"):
        raise KeyError
    assert util.semantic_search is ORIGINAL


def test_unpatch() -> None:
    handles = [patch("sentence_transformers"), patch("sentence_transformers"), patch("sklearn")]
    unpatch("sentence_transformers")
    assert util.semantic_search is ORIGINAL
    assert holders("sklearn", 1)
    again = patch("sentence_transformers")
    for handle in handles[:2]:  # of a patch that is over: they must not end the new one
        handle.restore()
    assert util.semantic_search is OURS
    unpatch()
    assert util.semantic_search is ORIGINAL
    assert not holders("sklearn", 1)
    again.restore()
    unpatch("sklearn")
    assert util.semantic_search is ORIGINAL


def test_modules_imported_while_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    late = ModuleType("sentence_transformers.late")
    with patch("sentence_transformers"):
        exec("from sentence_transformers.util import semantic_search as search", vars(late))
        monkeypatch.setitem(sys.modules, "sentence_transformers.late", late)
        assert late.search is OURS  # type: ignore[attr-defined]
    assert late.search is ORIGINAL  # type: ignore[attr-defined]


@pytest.mark.parametrize("package", ["torch", "faiss", "", "sentence_transformers.util"])
def test_other_packages(package: str) -> None:
    for function in (patch, unpatch):
        with pytest.raises(ValueError, match=f"package must be one of sentence_transformers, sklearn, got '{package}'"):
            function(package)


def test_another_version_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def semantic_search(query_embeddings: Any, corpus_embeddings: Any, *, device: str = "cpu") -> None: ...

    module = compat.sentence_transformers
    monkeypatch.setattr(module, "REPLACEMENTS", ((semantic_search, OURS), *module.REPLACEMENTS[1:]))
    with pytest.raises(ImportError, match=r"semantic_search must have parameters query_embeddings, .*, got .*device"):
        patch("sentence_transformers")
    assert not holders("sentence_transformers", 1)


def test_modules_are_found_by_name() -> None:
    assert {"patch", "sentence_transformers", "sklearn", "torch", "unpatch"} <= set(dir(compat))
    assert compat.torch is importlib.import_module("pycm.compat.torch")
    for name in ("nothing", "_patch_", "_nothing"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(compat, name)
