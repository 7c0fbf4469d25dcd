"""What a gallery makes of unusual arguments."""

from __future__ import annotations

import copy
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pycm import Gallery

ROWS = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
QUERIES = ROWS[:3]


def test_foreign_byte_order(tmp_path: Path) -> None:
    foreign = ROWS.astype(ROWS.dtype.newbyteorder())
    gallery = Gallery(foreign)
    gallery.add(foreign[:2])
    assert gallery.dtype is not None
    assert gallery.dtype.str == np.dtype(np.float32).str
    expected = Gallery(np.concatenate([ROWS, ROWS[:2]])).topk(QUERIES, 5)
    for queries in (QUERIES, QUERIES.astype(foreign.dtype)):
        for got, want in zip(gallery.topk(queries, 5), expected, strict=True):
            np.testing.assert_array_equal(got, want)
    gallery.save(tmp_path / "g")
    Gallery.create(tmp_path / "batches", [foreign, foreign[:2]])
    for name in ("g", "batches"):
        with Gallery.open(tmp_path / name) as opened:
            np.testing.assert_array_equal(opened.get(opened.ids), np.concatenate([ROWS, ROWS[:2]]))


@pytest.mark.parametrize("id", [2**63, 2**70, -(2**63) - 1, -1, 1.0, None, True, "3", b"3", [3]])
def test_what_cannot_be_an_id_is_not_there(id: Any) -> None:
    assert id not in Gallery(ROWS)
    assert 3 in Gallery(ROWS)


def test_lists_of_tensors() -> None:
    torch = pytest.importorskip("torch")
    gallery, queries = Gallery(ROWS), torch.tensor(QUERIES)
    lists: list[Any] = [[0, 1], [2], []]
    tensors = [torch.tensor(x, dtype=torch.int64) for x in lists]
    for one, other in (
        (gallery.topk(queries, 4, exclude=lists), gallery.topk(queries, 4, exclude=tensors)),
        (gallery.rank(queries, lists), gallery.rank(queries, tensors)),
    ):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)
    scalars = [torch.tensor(x) for x in (4, 5, 6)]
    assert torch.equal(gallery.rank(queries, scalars).ranks, gallery.rank(queries, [4, 5, 6]).ranks)


def test_integers_in_object_arrays() -> None:
    gallery = Gallery(ROWS[:2], ids=np.array([7, 9], object))
    assert gallery.ids.dtype == np.int64
    assert gallery.ids.tolist() == [7, 9]
    with pytest.raises(ValueError, match=r"Gallery\.add: ids must fit into int64"):
        gallery.add(ROWS[:1], ids=[2**70])
    with pytest.raises(TypeError, match=r"ids must be integers or strings, got bool and int"):
        gallery.add(ROWS[:2], ids=np.array([True, 5], object))


def test_strings_that_no_file_can_hold() -> None:
    gallery = Gallery(ROWS[:1], ids=["a"])
    with pytest.raises(ValueError, match=r"Gallery\.add: ids must be valid Unicode, got '\\ud800'"):
        gallery.add(ROWS[:2], ids=["b", "\ud800"])
    assert len(gallery) == 1
    assert "\ud800" not in gallery


def test_uneven_metadata_names_the_function() -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=r"Gallery\.add: metadata cannot be read as a table: .*length"):
        Gallery(ROWS[:2], metadata={"a": [1, 2], "b": [1]})


def test_copies_are_refused(tmp_path: Path) -> None:
    Gallery(ROWS).save(tmp_path / "g")
    with Gallery.open(tmp_path / "g", "r+") as opened:
        for gallery in (Gallery(ROWS), Gallery(), opened):
            for function in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match=r"Gallery: must be saved to be copied"):
                    function(gallery)
        opened.add(ROWS[:1])  # the lock and the journal are still there
        with pytest.raises(BlockingIOError):
            Gallery.open(tmp_path / "g", "r+")


@pytest.mark.parametrize("columns", [False, True])
def test_no_interrupt_leaves_it_locked(columns: bool) -> None:
    """Ctrl-C at random moments of many small calls: none hangs afterwards, and each change is there or not."""
    if columns:
        pytest.importorskip("pyarrow")
    rng = np.random.default_rng(1)  # not that of ROWS: equal rows would tie
    gallery, hits = Gallery(ROWS), 0

    def add(row: Any, id: int) -> float:
        begin = time.perf_counter()
        gallery.add(row, ids=[id], metadata={"id": [id]} if columns else None)
        return time.perf_counter() - begin

    others = rng.standard_normal((50, 8), np.float32)
    usual = float(np.median([add(row[None], 100 + i) for i, row in enumerate(others)]))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def hung(*_: object) -> None:
        raise AssertionError("a call hangs")

    before = signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(1500):
            count, row = len(gallery), rng.standard_normal((1, 8)).astype(np.float32)
            try:
                signal.setitimer(signal.ITIMER_REAL, usual * 10 ** rng.uniform(-2, 1))
                add(row, 1000 + i)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
            signal.signal(signal.SIGALRM, hung)
            signal.setitimer(signal.ITIMER_REAL, 10)
            there = 1000 + i in gallery
            assert len(gallery) == count + there
            if there:
                assert np.array_equal(gallery.get(1000 + i), row[0])
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, interrupt)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits
    ids = gallery.ids
    if columns:
        assert gallery.metadata.column("id").to_pylist()[20:] == ids[20:].tolist()
    assert np.array_equal(gallery.topk(gallery.get(ids), 1).ids[:, 0], ids)
