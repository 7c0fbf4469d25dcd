"""`pycm.Gallery` on a device: bit for bit what it finds in the host's memory, whatever was added and removed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import pycm
from pycm.gallery import Gallery

Place = Any  # the fixture: takes an array to the device


def draw(rng: np.random.Generator, rows: int, dim: int = 5) -> Any:
    """Small integers, so that scores tie."""
    return rng.integers(-2, 3, (rows, dim)).astype(np.float32)


def assert_same(there: Any, here: Any) -> None:
    for name, part, expected in zip(here._fields, there, here, strict=True):
        if expected is None:
            assert part is None
            continue
        if expected.dtype != object:
            assert isinstance(part, torch.Tensor)
            part = part.cpu().numpy()
        assert part.dtype == expected.dtype, name
        if expected.dtype == object:
            assert part.tolist() == expected.tolist(), name
        else:
            assert part.tobytes() == expected.tobytes(), name


class Both:
    """The same gallery on the device and in the host's memory; every search is asked of both."""

    def __init__(self, place: Place, rows: Any, **arguments: Any) -> None:
        self.place = place
        self.there, self.here = Gallery(place(rows), **arguments), Gallery(rows, **arguments)

    def add(self, rows: Any, *arguments: Any) -> None:
        assert self.there.add(self.place(rows), *arguments).tolist() == self.here.add(rows, *arguments).tolist()

    def remove(self, ids: Any) -> None:
        self.there.remove(ids)
        self.here.remove(ids)

    def check(self, queries: Any, k: int, **filters: Any) -> None:
        k = min(k, len(self.here))
        assert_same(self.there.topk(self.place(queries), k, **filters), self.here.topk(queries, k, **filters))
        positives = self.here.ids[np.arange(len(queries)) % len(self.here)].tolist()
        assert_same(
            self.there.rank(self.place(queries), positives, **filters), self.here.rank(queries, positives, **filters)
        )


@pytest.mark.parametrize("kind", ["rising", "shuffled", "strings"])
def test_what_was_added_and_removed(place: Place, kind: str) -> None:
    rng = np.random.default_rng(0)
    order = np.arange(400) if kind == "rising" else rng.permutation(400)
    names: list[Any] = [f"name {i}" if kind == "strings" else int(i) for i in order]
    both, queries = Both(place, draw(rng, 300), ids=names[:300], metric="dot"), draw(rng, 3)
    both.check(queries, 40)
    both.remove(names[5:60])
    both.check(queries, 40)
    both.add(draw(rng, 100), names[300:])
    both.check(queries, 9, ids=names[70:350:3], exclude=[names[:90], [], names[91:100]])
    if kind != "strings":
        some = place(np.asarray(names[70:73]))
        assert_same(both.there.rank(place(queries), some), both.here.rank(queries, names[70:73]))
        pair = place(np.array([0, 0, 2, 3])), some
        assert_same(both.there.rank(place(queries), pair), both.here.rank(queries, ([0, 0, 2, 3], names[70:73])))
    both.there.compact()
    both.here.compact()
    both.check(queries, 345)  # all


@pytest.mark.parametrize("metric", pycm.METRICS)
def test_metrics(place: Place, metric: Any) -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((260, 7)).astype(np.float32)
    rows[3] = rows[200]
    rows[9] = 0
    both = Both(place, rows, metric=metric)
    both.remove([0, 259])
    both.check(rows[100:102], 6)


def test_masks(place: Place) -> None:
    rng = np.random.default_rng(2)
    both, queries = Both(place, draw(rng, 120), metadata={"year": np.arange(120)}), draw(rng, 3)
    both.remove([7, 8, 100])
    for shape in ((117,), (3, 117)):
        mask = rng.random(shape) < 0.3
        both.check(queries, 20, mask=mask)  # the host's mask
        for ids in (None, range(20, 90)):
            found = both.there.topk(place(queries), 20, mask=place(mask), ids=ids)
            assert_same(found, both.here.topk(queries, 20, mask=mask, ids=ids))
    fields = pytest.importorskip("pyarrow.compute")
    both.check(queries, 5, where=fields.field("year") > 60)


def test_fast_is_near(place: Place) -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((300, 40)).astype(np.float32)
    for metric in ("cosine", "sqeuclidean"):
        both = Both(place, rows, metric=metric)
        found = both.there.topk(place(rows[:2]), 300, precision="fast")
        exact = both.here.topk(rows[:2], 300)
        order = np.argsort(found.indices.cpu().numpy(), axis=1)
        scores = np.take_along_axis(found.scores.cpu().numpy(), order, 1)
        expected = np.take_along_axis(exact.scores, np.argsort(exact.indices, axis=1), 1)
        assert np.abs(scores - expected).max() < (0.002 if metric == "cosine" else 1.0)
        assert not np.array_equal(scores, expected)


def test_rows_stay_where_they_are(place: Place, arch: str) -> None:
    rng = np.random.default_rng(4)
    rows = draw(rng, 30)
    gallery = Gallery(place(rows), metadata={"tag": [f"t{i}" for i in range(30)]})
    gallery.remove([3])
    assert torch.equal(gallery.get([5, 2]).cpu(), torch.from_numpy(rows[[5, 2]]))
    assert torch.equal(gallery.get(4).cpu(), torch.from_numpy(rows[4]))
    names, embeddings = zip(*gallery, strict=True)
    assert list(names) == [i for i in range(30) if i != 3]
    assert torch.equal(torch.stack(embeddings).cpu(), torch.from_numpy(rows[list(names)]))
    assert gallery.device.startswith("cuda" if arch == "chip" else "cpu")
    host = gallery.to("cpu")
    assert isinstance(host.get(4), np.ndarray)
    assert np.array_equal(host.ids, gallery.ids)
    assert host.metadata.equals(gallery.metadata)
    assert host.add(rows[:1]).tolist() == [30]
    assert len(gallery) == 29
    back = Gallery.__new__(Gallery)
    back._kept, back._converts = host._kept.to(place(rows).device), False
    assert_same(back.topk(place(rows), 4), host.topk(rows, 4))


def test_what_is_refused(place: Place, tmp_path: Any) -> None:
    rows = draw(np.random.default_rng(5), 10)
    gallery, host = Gallery(place(rows)), Gallery(rows)
    name = str(place(rows).device)
    with pytest.raises(ValueError, match=f"Gallery.topk: queries must be on the gallery's device {name}, got cpu"):
        gallery.topk(rows, 2)
    with pytest.raises(ValueError, match=f"Gallery.rank: queries must be on the gallery's device cpu, got {name}"):
        host.rank(place(rows), range(10))
    with pytest.raises(ValueError, match=f"Gallery.add: embeddings must be on the gallery's device {name}, got cpu"):
        gallery.add(rows)
    with pytest.raises(TypeError, match=r"Gallery\.topk: queries must be float32, as the gallery is, got float64"):
        gallery.topk(place(rows.astype(np.float64)), 2)
    with pytest.raises(ValueError, match=r"Gallery.topk: mask must have shape \[10\] or \[10, 10\], got \[9\]"):
        gallery.topk(place(rows), 2, mask=place(np.ones(9, bool)))
    with pytest.raises(NotImplementedError, match=r"Gallery.save: the rows are on .*; save gallery.to\(\"cpu\"\)"):
        gallery.save(tmp_path / "rows.safetensors")
    with pytest.raises(ValueError, match=r"Gallery\.create: embeddings must be in CPU memory"):
        Gallery.create(tmp_path / "rows.safetensors", [place(rows)])
    with pytest.raises(ValueError, match=r"Gallery\.to: device must be cpu or a CUDA device, got meta"):
        gallery.to("meta")
