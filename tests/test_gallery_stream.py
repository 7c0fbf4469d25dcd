"""Galleries larger than memory: searched in windows, with the same bits, in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_cases import assert_holds, expected_topk
from oracles import METRICS

from pycm.gallery import Gallery

DIM = 256

# Searches a gallery with `allowed` bytes of address space above what Python and the library take by themselves.
_SEARCH = """
import os, resource, sys
import numpy as np
from pycm.gallery import Gallery

path, allowed, memory, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
queries = np.load(out + "/queries.npy")
warm = Gallery(np.random.default_rng(0).standard_normal((500, queries.shape[1])).astype(np.float32))
warm.topk(queries, 10)
warm.rank(queries, [0] * len(queries))
del warm
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + allowed, size + allowed))
try:
    np.empty(2 * allowed, np.uint8)
    raise SystemExit("the limit does not hold")
except MemoryError:
    pass
with Gallery.open(path, memory=memory) as gallery:
    got = gallery.topk(queries, 10)
    mask = np.arange(len(gallery)) % 3 == 0
    some = gallery.topk(queries, 10, mask=mask, exclude=got.ids[:, 0])
    ranks = gallery.rank(queries, got.ids[:, [2, 9]].tolist())
    np.savez(out + "/got.npz", scores=got.scores, ids=got.ids, indices=got.indices, some=some.ids,
             some_scores=some.scores, ranks=ranks.ranks, rank_scores=ranks.scores)
"""


def test_four_times_the_allowed_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((200_000, DIM), np.float32)
    queries = rng.standard_normal((6, DIM), np.float32)
    path = tmp_path / "g.safetensors"
    whole = Gallery(rows, metric="cosine")
    expected = whole.topk(queries, 10)
    some = whole.topk(queries, 10, mask=np.arange(len(rows)) % 3 == 0, exclude=expected.ids[:, 0])
    ranks = whole.rank(queries, expected.ids[:, [2, 9]].tolist())
    whole.save(path)
    allowed = rows.nbytes // 4
    np.save(tmp_path / "queries.npy", queries)
    command = [sys.executable, "-c", _SEARCH, str(path), str(allowed), str(allowed // 3), str(tmp_path)]
    one_thread = {"PYCM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    child = subprocess.run(command, env={**os.environ, **one_thread}, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    got = np.load(tmp_path / "got.npz")
    for name, array in (
        ("scores", expected.scores),
        ("ids", expected.ids),
        ("indices", expected.indices),
        ("some", some.ids),
        ("some_scores", some.scores),
        ("ranks", ranks.ranks),
        ("rank_scores", ranks.scores),
    ):
        assert got[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_windows_change_nothing(tmp_path: Path, metric: Any, dtype: Any) -> None:
    """Windows of every size, down to a row, with removed rows, additions, filters and ids that do not rise."""
    rng = np.random.default_rng(2)
    rows, queries = rng.integers(-2, 3, (60, 6)).astype(dtype), rng.integers(-2, 3, (5, 6)).astype(dtype)
    names = rng.permutation(200)[:60].tolist()
    path = tmp_path / "g.safetensors"
    Gallery(rows[:50], ids=names[:50], metric=metric).save(path)
    plain = Gallery(rows, ids=names, metric=metric)
    plain.remove([names[7], names[55]])
    mask, each = rng.random(58) < 0.5, rng.random((5, 58)) < 0.5
    exclude = [rng.permutation(names)[: rng.integers(0, 20)].tolist() for _ in queries]
    left = [name for name in names if name in plain]
    positives = [rng.permutation(left)[: rng.integers(0, 4)].tolist() for _ in queries]
    for memory in (1, 4 * 6 * rows.itemsize * 7, 1 << 20):
        with Gallery.open(path, "c", stream=True, memory=memory) as gallery:
            gallery.add(rows[50:], names[50:])
            gallery.remove([names[55], names[7]])
            for options in ({}, {"mask": mask}, {"mask": each, "exclude": exclude}, {"ids": left[:9]}):
                for one, other in (
                    (gallery.topk(queries, 11, **options), plain.topk(queries, 11, **options)),
                    (gallery.rank(queries, positives, **options), plain.rank(queries, positives, **options)),
                ):
                    for a, b in zip(one, other, strict=True):
                        assert a.tobytes() == b.tobytes()
            assert_holds(gallery, dict(plain))
            assert gallery.get(left[::-3]).tobytes() == plain.get(left[::-3]).tobytes()


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
def test_ties_across_windows(tmp_path: Path, metric: Any) -> None:
    """By id, also where the worst score there is ties with the filler, and where NaN and the mask leave too few."""
    rng = np.random.default_rng(5)
    rows, queries = rng.integers(-1, 2, (90, 2)).astype(np.float32), np.ones((3, 2), np.float32)
    rows[rng.permutation(90)[:60]] = [-np.inf, 0]
    rows[rng.permutation(90)[:9]] = np.nan
    path = tmp_path / "g.safetensors"
    Gallery(rows, metric=metric).save(path)
    held = dict(enumerate(rows))
    mask = rng.random((3, 90)) < 0.5
    with Gallery.open(path, stream=True, memory=4 * 8 * 7) as gallery:
        for k in (1, 30, 89, 90):
            for allowed in (None, mask):
                got = gallery.topk(queries, k, mask=allowed)
                scores, ids = expected_topk(held, queries, k, metric, allowed)
                assert np.array_equal(got.ids, ids)
                assert got.scores.tobytes() == scores.tobytes()


def test_a_streamed_gallery_is_written_and_compacted(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((90, 6)).astype(np.float32)
    path = tmp_path / "g.safetensors"
    Gallery(rows[:60]).save(path)
    held = dict(enumerate(rows))
    with Gallery.open(path, "r+", memory=100) as gallery:
        gallery.add(rows[60:])
        gallery.remove([3, 70])
        del held[3], held[70]
        gallery.save(tmp_path / "copy")
        gallery.compact()
        assert_holds(gallery, held)
        gallery.add(rows[:1], [3])
    for name in (path, tmp_path / "copy"):
        with Gallery.open(name, verify=True) as gallery:  # which maps the whole, and encodes it at the first search
            some = held if name != path else held | {3: rows[0]}
            assert_holds(gallery, some)
            plain = Gallery(np.stack(list(some.values())), ids=list(some))
            a, b = gallery.topk(rows[:4], 9), plain.topk(rows[:4], 9)
            assert all(one.tobytes() == other.tobytes() for one, other in zip(a, b, strict=True))


def test_memory_decides_whether_to_stream(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    Gallery(np.ones((10, 6), np.float32)).save(path)
    size = path.stat().st_size
    for memory, streamed in ((size - 1, True), (size, False), (None, False)):
        with Gallery.open(path, memory=memory) as gallery:
            assert (gallery._kept._window is not None) == streamed
    with pytest.raises(ValueError, match=r"^Gallery\.open: memory must be at least 1 byte, got 0$"):
        Gallery.open(path, memory=0)


def test_a_file_from_batches(tmp_path: Path) -> None:
    """Bounded memory is seen from batches that are there one at a time."""
    rng = np.random.default_rng(4)
    rows = rng.standard_normal((70, 6)).astype(np.float32)
    path = tmp_path / "g.safetensors"
    names = rng.permutation(500)[:70].tolist()
    references: list[Any] = []

    def batches() -> Any:
        for start in range(0, 70, 20):
            part = slice(start, start + 20)
            array = rows[part].copy()
            references.append(weakref.ref(array))
            yield array, names[part], {"at": list(range(70))[part]} if start else None
            del array
            assert sum(reference() is not None for reference in references) <= 1

    Gallery.create(path, batches(), metric="dot")
    with Gallery.open(path, "r+", verify=True) as gallery:
        assert_holds(gallery, dict(zip(names, rows, strict=True)))
        assert gallery.metadata["at"].to_pylist() == [None] * 20 + list(range(20, 70))
        expected = Gallery(rows, ids=names, metric="dot").topk(rows[:3], 5)
        assert np.array_equal(gallery.topk(rows[:3], 5).ids, expected.ids)
        with pytest.raises(BlockingIOError, match=r"^\[Errno 11\] Gallery\.create: "):
            Gallery.create(path, [rows])
    Gallery.create(path, [rows[:5], (rows[5:7].astype(np.float64),)], dtype="float16")
    with Gallery.open(path) as gallery:
        assert_holds(gallery, dict(enumerate(rows[:7].astype(np.float16))))
    before = path.read_bytes()
    for some, message in (
        ([], "batches must be one or more, got none"),
        ([(rows, None, None, None)], "a batch must be .* got 4 items"),
        ([(rows[:2], [1, 2]), (rows[:2], [3, 1])], "ids must be new, already there: 1"),
        ([rows, rows[:, :3]], "embeddings must have shape"),
    ):
        with pytest.raises(ValueError, match=rf"^Gallery\.create: {message}"):
            Gallery.create(path, some)
        assert path.read_bytes() == before
    assert [name.name for name in tmp_path.iterdir()] == [path.name]
