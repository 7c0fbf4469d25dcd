"""Gallery against a plain dict: whatever is done to it in whatever order, it holds and finds the same."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from gallery_cases import Array, assert_holds, expected_topk
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pycm.gallery import Gallery

pc = pytest.importorskip("pyarrow.compute")

DIM = 3
TAGS = st.sampled_from(["a", "b", None])
SEEDS = st.integers(0, 2**32 - 1)


class Model(RuleBasedStateMachine):
    """Rows of small integers, so that scores tie; ids in any order, reused after removal."""

    @initialize(strings=st.booleans(), metric=st.sampled_from(["dot", "cosine", "euclidean"]), stream=st.booleans())
    def begin(self, strings: bool, metric: Any, stream: bool) -> None:
        self.strings, self.metric, self.stream = strings, metric, stream
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "g.safetensors"
        self.rows: dict[Any, Array] = {}
        self.tags: dict[Any, str | None] = {}
        self.tagged = False
        Gallery(dim=DIM, metric=metric).save(self.path)
        self.gallery = self.reopened("r+")

    def reopened(self, mode: Any) -> Gallery:
        return Gallery.open(self.path, mode, stream=self.stream, memory=60, sync=False)

    def name(self, number: int) -> Any:
        return f"é{number}" if self.strings else number

    @rule(numbers=st.lists(st.integers(0, 30), max_size=6, unique=True), seed=SEEDS, tag=TAGS)
    def add(self, numbers: list[int], seed: int, tag: str | None) -> None:
        names = [self.name(number) for number in numbers]
        rows = np.random.default_rng(seed).integers(-1, 2, (len(names), DIM)).astype(np.float32)
        metadata = None if tag is None else {"tag": [tag] * len(names)}
        if any(name in self.rows for name in names):
            with pytest.raises(ValueError, match="already there"):
                self.gallery.add(rows, names, metadata)
            return
        self.gallery.add(rows, names, metadata)
        self.rows |= zip(names, rows, strict=True)
        self.tags |= dict.fromkeys(names, tag)
        self.tagged |= tag is not None and bool(names)

    @rule(numbers=st.lists(st.integers(0, 30), max_size=6, unique=True), strict=st.booleans())
    def remove(self, numbers: list[int], strict: bool) -> None:
        names = [name for name in map(self.name, numbers) if strict or name in self.rows]
        if any(name not in self.rows for name in names):
            with pytest.raises((KeyError, TypeError)):
                self.gallery.remove(names)
            return
        self.gallery.remove(names)
        for name in names:
            del self.rows[name], self.tags[name]

    @rule()
    def compact(self) -> None:
        self.gallery.compact()

    @rule(closed=st.booleans())
    def reopen(self, closed: bool) -> None:
        """A reader sees what the writer holds; and so does the next writer."""
        with self.reopened("r") as reader:
            assert_holds(reader, self.rows, self.tags if self.tagged else None)
        if closed:
            self.gallery.close()
            self.gallery = self.reopened("r+")

    @rule()
    def save(self) -> None:
        copy = self.folder / "copy"
        self.gallery.save(copy)
        with Gallery.open(copy, verify=True) as other:
            assert_holds(other, self.rows, self.tags if self.tagged else None)

    @precondition(lambda self: self.rows)
    @rule(seed=SEEDS, k=st.integers(1, 12), filters=st.sets(st.sampled_from(["mask", "ids", "where", "exclude"])))
    def topk(self, seed: int, k: int, filters: set[str]) -> None:
        rng = np.random.default_rng(seed)
        queries = rng.integers(-1, 2, (3, DIM)).astype(np.float32)
        names = list(self.rows)
        allowed, options = np.ones((3, len(names)), bool), {}
        if "mask" in filters:
            options["mask"] = rng.random((3, len(names)) if seed % 2 else len(names)) < 0.6
            allowed &= options["mask"]
        if "ids" in filters:
            options["ids"] = [name for name in names if rng.random() < 0.6]
            allowed &= np.array([name in options["ids"] for name in names])
        if "where" in filters and self.tagged:
            options["where"] = pc.field("tag") == "a"
            allowed &= np.array([self.tags[name] == "a" for name in names])
        if "exclude" in filters:
            options["exclude"] = [[self.name(int(i)) for i in rng.integers(0, 31, 5)] for _ in queries]
            allowed &= np.array([[name not in one for name in names] for one in options["exclude"]])
        k = min(k, len(names))
        got = self.gallery.topk(queries, k, **options)
        scores, ids = expected_topk(self.rows, queries, k, self.metric, allowed)
        assert np.array_equal(got.ids, ids)
        assert got.scores.tobytes() == scores.tobytes()
        for name, index in zip(got.ids.reshape(-1).tolist(), got.indices.reshape(-1).tolist(), strict=True):
            assert index == (-1 if name in (-1, None) else names.index(name))

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "gallery"):
            assert_holds(self.gallery, self.rows, self.tags if self.tagged else None)
            assert all((self.name(number) in self.gallery) == (self.name(number) in self.rows) for number in range(31))

    def teardown(self) -> None:
        if hasattr(self, "gallery"):
            self.gallery.close()
            shutil.rmtree(self.folder)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
