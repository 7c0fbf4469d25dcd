"""Gallery: rows, ids and metadata as they are kept, and errors that name what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_cases import assert_holds

from pycm.gallery import Gallery

ONE, TWO, THREE = (np.ones(shape, np.float32) for shape in ((1, 2), (2, 2), (1, 3)))
WIDE = np.ones((1, 2))


def test_rows_are_kept_as_they_came() -> None:
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((9, 3)).astype(np.float32)
    gallery = Gallery(rows[:4])
    assert gallery.add(rows[4:6]).tolist() == [4, 5]
    assert gallery.add(rows[6:7], [20]).tolist() == [20]
    assert gallery.add(rows[7:]).tolist() == [21, 22]
    held = dict(zip([0, 1, 2, 3, 4, 5, 20, 21, 22], rows.copy(), strict=True))
    rows[:] = 0  # they were copied
    assert_holds(gallery, held)
    gallery.remove([22, 0])
    gallery.remove([])
    for name in (22, 0):
        del held[name]
    assert_holds(gallery, held)
    assert gallery.add(rows[:1]).tolist() == [23]  # the id of a removed row does not come again by itself
    assert gallery.add(rows[:1], [22]).tolist() == [22]
    held |= {23: rows[0], 22: rows[0]}
    assert_holds(gallery, held)
    gallery.compact()
    assert_holds(gallery, held)
    assert gallery.add(rows[:1]).tolist() == [24]
    assert gallery.add(rows[:0]).tolist() == []
    assert gallery.get(20).tolist() == held[20].tolist()
    assert gallery.get([20, 22, 20]).tolist() == [held[20].tolist(), [0, 0, 0], held[20].tolist()]
    assert gallery.get([]).shape == (0, 3)
    assert 20 in gallery
    assert np.int64(20) in gallery
    assert all(name not in gallery for name in (0, -1, "20", True, None))
    assert gallery.ids.tolist() == [*held, 24]


def test_ids_of_many_kinds() -> None:
    import pyarrow

    torch = pytest.importorskip("torch")
    rows = np.ones((2, 2), np.float32)
    numbers = [[3, 4], (3, 4), np.array([3, 4], np.uint8), torch.tensor([3, 4]), pyarrow.array([3, 4])]
    for ids in numbers:
        assert Gallery(rows, ids=ids).ids.tolist() == [3, 4]
    for ids in (["é", ""], np.array(["é", ""]), np.array(["é", ""], object), pyarrow.array(["é", ""])):
        gallery = Gallery(rows, ids=ids)
        assert gallery.ids.tolist() == ["é", ""]
        assert "é" in gallery
        assert 3 not in gallery
    assert Gallery(rows, ids=[-(2**63), 2**63 - 3]).add(rows[:1]).tolist() == [2**63 - 2]


def test_dtype_converts_what_is_added() -> None:
    rows = np.random.default_rng(8).standard_normal((4, 3))
    gallery = Gallery(rows, dtype="float16")
    assert_holds(gallery, dict(enumerate(rows.astype(np.float16))))
    gallery.add(rows.astype(np.float32))
    assert gallery.dtype == np.float16


# ---- errors ----


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: g.add(ONE, [3]), ValueError, "ids must be new, already there: 3"),
        (lambda g: g.add(TWO, [9, 9]), ValueError, "ids must come once each, got more often: 9"),
        (lambda g: g.add(TWO, [9]), ValueError, "ids must be 2, one for each row, got 1"),
        (lambda g: g.add(ONE, [-1]), ValueError, "ids must not be -1"),
        (lambda g: g.add(ONE, ["a"]), TypeError, "ids must be int64, as the gallery's are, got str"),
        (lambda g: g.add(ONE, [1.5]), TypeError, "ids must be integers or strings, got float64"),
        (lambda g: g.add(TWO, [7, "a"]), TypeError, "got int and str"),
        (lambda g: g.add(ONE, [True]), TypeError, "got bool"),
        (lambda g: g.add(ONE, "a"), TypeError, "ids must be a sequence of ids, got str"),
        (lambda g: g.add(ONE, 5), TypeError, "ids must be a sequence of ids, got int"),
        (lambda g: g.add(ONE, [[5]]), ValueError, r"ids must have shape \[n\], got \[1, 1\]"),
        (lambda g: g.add(THREE), ValueError, r"embeddings must have shape \[n, 2\], got \[1, 3\]"),
        (lambda g: g.add(np.ones(2, np.float32)), ValueError, r"embeddings must have shape \[n, 2\], got \[2\]"),
        (lambda g: g.add(WIDE), TypeError, "embeddings must be float32, as the gallery is, got float64"),
        (lambda g: g.add(np.ones((1, 2), int)), TypeError, "embeddings must be one of float32, .* got int64"),
        (lambda g: g.remove([3, 8, 9]), KeyError, "ids must be in the gallery, not there: 8, 9"),
        (lambda g: g.remove([3, 3]), ValueError, "ids must come once each, got more often: 3"),
        (lambda g: g.get(8), KeyError, "ids must be in the gallery, not there: 8"),
        (lambda g: g.topk(ONE, 5), ValueError, r"k must be in \[1, 4\], got 5"),
        (lambda g: g.topk(ONE, 0), ValueError, r"k must be in \[1, 4\], got 0"),
        (lambda g: g.topk(ONE, 1.0), TypeError, "k must be an integer, got float"),
        (lambda g: g.topk(THREE, 1), ValueError, r"queries must have shape \[N, 2\], got \[1, 3\]"),
        (lambda g: g.topk(WIDE, 1), TypeError, "queries must be float32, as the gallery is, got float64"),
        (lambda g: g.topk(ONE, 1, ids=[8]), KeyError, "ids must be in the gallery, not there: 8"),
        (lambda g: g.topk(ONE, 1, mask=[True]), ValueError, r"mask must have shape \[4\] or \[1, 4\]"),
        (lambda g: g.topk(ONE, 1, mask=[1, 0, 1, 0]), TypeError, "mask must hold booleans"),
        (lambda g: g.topk(ONE, 1, exclude=[1, 2]), ValueError, "exclude must be for 1 queries, got 2"),
        (lambda g: g.topk(ONE, 1, exclude=([0, 2], [1])), ValueError, "offsets that rise from 0 to 1"),
        (lambda g: g.topk(ONE, 1, precision="x"), ValueError, "precision must be exact or fast"),
        (lambda g: g.rank(ONE, [8]), KeyError, "positives must be in the gallery, not there: 8"),
        (lambda g: g.rank(np.array([[1, 1], [np.nan, 1]], np.float32), [[], [0, 3]]), ValueError,
         "queries row 1 has a NaN score with its positive 0"),
        (lambda g: g.rank(ONE, [0], ties="x"), ValueError, "ties must be one of"),
        (lambda g: Gallery(metric="x"), ValueError, "metric must be one of dot, .* got 'x'"),
        (lambda g: Gallery(dim=0), ValueError, "dim must be at least 1, got 0"),
        (lambda g: Gallery(dtype="int8"), ValueError, "dtype must be one of"),
        (lambda g: Gallery(screen="x"), ValueError, "screen must be one of"),
        (lambda g: Gallery(ids=[1]), ValueError, "need embeddings"),
        (lambda g: Gallery(dim=2).topk(ONE, 1), ValueError, "must have rows, and has none"),
        (lambda g: Gallery(ONE, ids=["a"]).add(ONE), ValueError, "strings"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(call: Any, error: type[Exception], message: str) -> None:
    gallery = Gallery(np.arange(8, dtype=np.float32).reshape(4, 2))
    with pytest.raises(error, match=message) as raised:
        call(gallery)
    assert str(raised.value).strip("\"'").startswith("Gallery")
    assert_holds(gallery, dict(enumerate(np.arange(8, dtype=np.float32).reshape(4, 2))))


def test_closed() -> None:
    gallery = Gallery(ONE)
    gallery.close()
    gallery.close()
    assert repr(gallery) == "Gallery(closed)"
    with pytest.raises(ValueError, match=r"^Gallery\.topk: the gallery is closed$"):
        gallery.topk(ONE, 1)


def test_a_changed_gallery_ends_its_iteration() -> None:
    gallery = Gallery(np.ones((3000, 2), np.float32))
    pairs = iter(gallery)
    next(pairs)
    gallery.remove([2500])
    with pytest.raises(RuntimeError, match="changed during iteration"):
        list(pairs)


def test_interrupted_additions_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycm.gallery import ids, metadata

    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    gallery = Gallery(rows[:2])
    for owner in (ids.Ids, metadata.Metadata):
        append = owner.append

        def interrupt(*arguments: Any, append: Any = append) -> None:
            append(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(owner, "append", interrupt)
            with pytest.raises(KeyboardInterrupt):
                gallery.add(rows[2:])
        assert_holds(gallery, dict(enumerate(rows[:2])))
    gallery.add(rows[2:], [2, 3])
    assert_holds(gallery, dict(enumerate(rows)))


def test_errors_of_metadata() -> None:
    pc = pytest.importorskip("pyarrow.compute")
    rows = np.ones((2, 2), np.float32)
    gallery = Gallery(rows)
    assert gallery.metadata is None
    with pytest.raises(ValueError, match=r"^Gallery\.topk: where needs metadata, and this gallery has none$"):
        gallery.topk(rows, 1, where=pc.field("a") > 1)
    gallery.add(rows, metadata={"a": [1, 2]})
    with pytest.raises(ValueError, match=r"^Gallery\.add: metadata must have 2 rows, got 3$"):
        gallery.add(rows, metadata={"a": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"^Gallery\.add: metadata does not fit .* int64 vs string"):
        gallery.add(rows, metadata={"a": ["x", "y"]})
    with pytest.raises(TypeError, match=r"^Gallery\.add: metadata must be a pyarrow\.Table, .* got int$"):
        gallery.add(rows, metadata=3)
    assert len(gallery) == 4
    with pytest.raises(TypeError, match=r"^Gallery\.topk: where must be a pyarrow\.compute expression .* got str$"):
        gallery.topk(rows, 1, where="a > 1")
    for expression in (pc.field("b") > 1, pc.field("a") > "x", pc.field("a") + 1):
        with pytest.raises(ValueError, match=r"^Gallery\.topk: where cannot be evaluated on the columns \(a\): "):
            gallery.topk(rows, 1, where=expression)


def test_without_optional_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    Gallery(TWO, metadata={"a": [1, 2]}).save(tmp_path / "g")
    for name in ("pyarrow", "pyarrow.dataset", "ml_dtypes", "tqdm", "safetensors"):
        monkeypatch.setitem(sys.modules, name, None)
    with Gallery.open(tmp_path / "g", "r+", verify=True) as gallery:  # metadata are bytes until someone asks
        gallery.add(ONE)
        assert len(gallery.topk(ONE, 3).ids[0]) == 3
        for call in (lambda: gallery.metadata, lambda: gallery.add(ONE, [9], {"a": [1]}), gallery.compact):
            with pytest.raises(
                ImportError, match=r"^Gallery metadata needs pyarrow: pip install 'pycm-match\[gallery\]'$"
            ):
                call()
    with Gallery.open(tmp_path / "g") as gallery:
        assert len(gallery) == 3
    with pytest.raises(ImportError, match=r"pip install 'pycm-match\[gallery\]'$"):
        Gallery(dim=3, dtype="bfloat16")
