"""Gallery files: what is written comes back to the bit, and a file that is not whole says so."""

from __future__ import annotations

import itertools
import json
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import use_level
from gallery_cases import assert_holds, expected_topk, journaled, make
from oracles import METRICS

from pycm.gallery import Gallery

DTYPES = ("float32", "float16", "bfloat16", "float64")


# ---- round trips ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_what_is_saved_comes_back(tmp_path: Path, dtype: str, strings: bool, mode: Any) -> None:
    pytest.importorskip("pyarrow")
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    path = tmp_path / "g.safetensors"
    held = make(path, strings=strings, metadata=True, dtype=kind)
    queries = np.random.default_rng(2).standard_normal((3, 5)).astype(kind)
    tags = {name: f"t{i}" for i, name in enumerate(held)}
    with Gallery.open(path, mode, verify=True) as gallery:
        assert gallery.dtype == kind
        assert_holds(gallery, held, tags)
        got = gallery.topk(queries, 20)
        scores, ids = expected_topk(held, queries, 20, "cosine")
        assert got.scores.tobytes() == scores.tobytes()
        assert np.array_equal(got.ids, ids)
        assert gallery.get(list(held)[7]).tobytes() == list(held.values())[7].tobytes()
        assert all(name in gallery for name in held)


@pytest.mark.parametrize("strings", [False, True])
def test_what_is_journaled_comes_back(tmp_path: Path, strings: bool) -> None:
    path = tmp_path / "g.safetensors"
    held = make(path, strings=strings)
    tags: dict[Any, str | None] = dict.fromkeys(held)
    new: list[Any] = ["é1", "b"] if strings else [50, 40]
    queries = np.random.default_rng(3).standard_normal((3, 5)).astype(np.float32)
    with Gallery.open(path, "r+") as gallery:
        first = next(iter(held))
        gallery.remove([first, list(held)[5]])
        gallery.add(queries[:2], new, {"tag": ["p", "q"]})
        gallery.add(queries[2:], [first])
        gallery.remove([new[0]])
        inside = gallery.topk(queries, 5)
    for name in (first, list(held)[5]):
        del held[name]
    held |= {new[1]: queries[1], first: queries[2]}
    tags = {name: "q" if name == new[1] else None for name in held}
    for mode in ("r", "c", "r+"):
        with Gallery.open(path, mode) as gallery:
            assert_holds(gallery, held, tags)
            got = gallery.topk(queries, 5)
            assert got.scores.tobytes() == inside.scores.tobytes()
            assert np.array_equal(got.ids, inside.ids)
            if mode == "r+":
                gallery.compact()
                assert_holds(gallery, held, tags)
                assert np.array_equal(gallery.topk(queries, 5).ids, inside.ids)
    assert [name.name for name in tmp_path.iterdir()] == [path.name]
    with Gallery.open(path) as gallery:
        assert_holds(gallery, held, tags)
        assert np.array_equal(gallery.topk(queries, 5).ids, inside.ids)


def test_ids_go_on_where_they_were(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    row = np.ones((1, 2), np.float32)
    gallery = Gallery(np.ones((4, 2), np.float32))
    gallery.remove([3])
    gallery.save(path)
    with Gallery.open(path, "r+") as gallery:
        assert gallery.add(row).tolist() == [4]
        gallery.remove([4])
    with Gallery.open(path, "r+") as gallery:
        assert gallery.add(row).tolist() == [5]
        gallery.compact()
        assert gallery.add(row).tolist() == [6]


def test_an_empty_gallery(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    with pytest.raises(ValueError, match=r"^Gallery\.save: the gallery has no rows and no dim"):
        Gallery().save(path)
    assert not list(tmp_path.iterdir())
    Gallery(dim=3, metric="dot", dtype="float16").save(path)
    with Gallery.open(path, "r+", verify=True) as gallery:
        assert len(gallery) == 0
        assert (gallery.dim, gallery.dtype, gallery.metric) == (3, np.float16, "dot")
        assert list(gallery) == []
        gallery.add(np.ones((1, 3), np.float16), ["a"])
    with Gallery.open(path, "r+") as gallery:
        assert gallery.ids.tolist() == ["a"]
        gallery.remove(["a"])
        gallery.compact()
        assert len(gallery) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_any_metric(tmp_path: Path, metric: Any) -> None:
    path = tmp_path / "g.safetensors"
    rng = np.random.default_rng(4)
    rows, queries = rng.standard_normal((40, 7)).astype(np.float32), rng.standard_normal((3, 7)).astype(np.float32)
    Gallery(rows[:30], metric=metric).save(path)
    with Gallery.open(path, "r+") as gallery:
        gallery.add(rows[30:])
        assert (
            gallery.topk(queries, 9).ids.tolist()
            == expected_topk(dict(enumerate(rows)), queries, 9, metric)[1].tolist()
        )
        whole = Gallery(rows, metric=metric).rank(queries, [[3, 35], [], [39]], exclude=[[3], [1, 2], [31]])
        parts = gallery.rank(queries, [[3, 35], [], [39]], exclude=[[3], [1, 2], [31]])
        assert all(a.tobytes() == b.tobytes() for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("screen", ["auto", "float32", "bfloat16", "int8"])
def test_a_file_of_one_processor_on_another(tmp_path: Path, every_level: list[str], screen: Any) -> None:
    rng = np.random.default_rng(5)
    rows, queries = rng.standard_normal((900, 40)).astype(np.float32), rng.standard_normal((20, 40)).astype(np.float32)
    scores, ids = expected_topk(dict(enumerate(rows)), queries, 9, "cosine")
    for writer in every_level:
        use_level(writer)
        Gallery(rows, screen=screen).save(tmp_path / writer)
        for reader in every_level:
            use_level(reader)
            with Gallery.open(tmp_path / writer, verify=True) as gallery:
                got = gallery.topk(queries, 9)
                assert np.array_equal(got.ids, ids)
                assert got.scores.tobytes() == scores.tobytes()


def test_modes(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    held = make(path)
    row = np.ones((1, 5), np.float32)
    with Gallery.open(path) as gallery, pytest.raises(OSError, match=r"^Gallery\.add: the gallery is open for reading"):
        gallery.add(row)
    with Gallery.load(path) as gallery:
        gallery.add(row, [77])
        gallery.remove([0])
        gallery.compact()
        assert 77 in gallery
        assert [name.name for name in tmp_path.iterdir()] == [path.name]
        gallery.save(tmp_path / "other")
    with Gallery.open(path) as gallery:
        assert_holds(gallery, held)
    with Gallery.open(tmp_path / "other") as gallery:
        del held[0]
        assert_holds(gallery, held | {77: row[0]})
    with pytest.raises(ValueError, match=r"^Gallery\.open: mode must be one of r, r\+, c, got 'w'$"):
        Gallery.open(path, "w")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        Gallery.open(tmp_path / "none")


def test_saving_over_a_gallery(tmp_path: Path) -> None:
    path, other = tmp_path / "g.safetensors", tmp_path / "h.safetensors"
    held, _ = journaled(path)
    with Gallery.open(path) as gallery:
        gallery.save(other)
        assert_holds(gallery, held)
    row = np.ones((1, 5), np.float32)
    Gallery(row, ids=["only"]).save(path)  # its journal goes too
    assert sorted(name.name for name in tmp_path.iterdir()) == ["g.safetensors", "h.safetensors"]
    with Gallery.open(path) as gallery:
        assert_holds(gallery, {"only": row[0]})
    with Gallery.open(other) as gallery:
        assert_holds(gallery, held)
    path.write_bytes(b"something else")
    Gallery.load(other).save(path)
    with Gallery.open(path) as gallery:
        assert_holds(gallery, held)


# ---- the format ----


def test_the_safetensors_package_reads_it(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    numpy = pytest.importorskip("safetensors.numpy")
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "g.safetensors"
    held = make(path, strings=True, metadata=True)
    tensors = numpy.load_file(path)
    assert np.array_equal(tensors["rows"], np.stack(list(held.values())))
    offsets = tensors["ids.offsets"].tolist()
    text = tensors["ids"].tobytes()
    assert [text[a:b].decode() for a, b in itertools.pairwise(offsets)] == list(held)
    assert pa.ipc.open_stream(tensors["metadata"].tobytes()).read_all()["tag"].to_pylist()[:2] == ["t0", "t1"]
    assert any(name.startswith("encoded.") for name in tensors)
    with safetensors.safe_open(path, "np") as file:
        about = file.metadata()
    assert (about["format"], about["version"]) == ("pycm.gallery", "1")
    sums = json.loads(about["crc32"])
    assert sums == {name: f"{zlib.crc32(tensor.tobytes()):08x}" for name, tensor in tensors.items()}
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert all(
        (8 + length + tensor["data_offsets"][0]) % 64 == 0
        for name, tensor in header.items()
        if not name.startswith(("__metadata__", "padding"))
    )


def test_ten_gigabytes_open_at_once(tmp_path: Path) -> None:
    """A file with a hole for its rows, whose header was made right again."""
    path = tmp_path / "g.safetensors"
    rows, dim = 5_000_000, 512
    Gallery(np.ones((1, dim), np.float32)).save(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    stop = rows * dim * 4
    fields = header["__metadata__"]
    sums = json.loads(fields["crc32"])
    header = {
        "__metadata__": {**fields, "crc32": json.dumps({"rows": sums["rows"], "ids": "00000000"})},
        "rows": {"dtype": "F32", "shape": [rows, dim], "data_offsets": [0, stop]},
        "ids": {"dtype": "I64", "shape": [rows], "data_offsets": [stop, stop + 8 * rows]},
    }
    del header["__metadata__"]["checksum"]
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    header["__metadata__"]["checksum"] = f"{zlib.crc32(canonical):08x}"
    path.write_bytes(data[:8] + json.dumps(header).encode().ljust(length))
    try:
        os.truncate(path, 8 + length + stop + 8 * rows)
    except OSError as error:
        pytest.skip(f"no file of ten gigabytes with a hole here: {error}")
    assert path.stat().st_size > 10 * 2**30 * 0.95
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        with Gallery.open(path, memory=2**40) as gallery:
            seconds.append(time.perf_counter() - begin)
            assert len(gallery) == rows
            assert gallery._kept.store.take(np.array([rows - 1])).tolist() == [[0.0] * dim]
    assert min(seconds) < 0.1


# ---- damage ----


def test_a_truncated_file(tmp_path: Path) -> None:
    path, cut = tmp_path / "g.safetensors", tmp_path / "cut"
    make(path, metadata=True)
    data = path.read_bytes()
    for size in [*range(200), 16383, 16384, 16385, *range(16384, len(data), 7), len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"^Gallery\.open: {cut}: (truncated|not a safetensors file)"):
            Gallery.open(cut)
        assert cut.read_bytes() == data[:size]
    cut.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="truncated or extended"):
        Gallery.open(cut)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_flipped_bit_anywhere(tmp_path: Path, mode: Any) -> None:
    path, bad = tmp_path / "g.safetensors", tmp_path / "bad"
    make(path, strings=True, metadata=True)
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    text = len(data[8 : 8 + length].rstrip())
    places = [*range(0, 8 + text, 3), *range(8 + text, 8 + length, 997), *range(8 + length, len(data), 5)]
    for place in places:
        data[place] ^= 1 << place % 8
        bad.write_bytes(data)
        with pytest.raises(ValueError, match=rf"^Gallery\.open: {bad}: "):
            Gallery.open(bad, mode)
        assert bad.read_bytes() == data
        data[place] ^= 1 << place % 8
    bad.write_bytes(data)
    Gallery.open(bad, mode).close()


def test_a_flipped_bit_in_a_large_tensor(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    Gallery(np.zeros((3000, 1024), np.float32)).save(path)
    with open(path, "r+b") as file:
        file.seek(16384 + 5_000_000)
        file.write(b"\1")
    with (
        Gallery.open(path) as gallery,
        pytest.raises(ValueError, match=rf"^Gallery\.open: {path}: damaged: the checksum of 'rows' does not match$"),
    ):
        gallery.verify()
    with pytest.raises(ValueError, match="the checksum of 'rows'"):
        Gallery.open(path, verify=True)


def test_a_foreign_and_a_newer_file(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "g.safetensors"
    numpy.save_file({"x": np.ones(3)}, path)
    with pytest.raises(
        ValueError, match=rf"^Gallery\.open: {path}: a safetensors file, but not a gallery: its format is None"
    ):
        Gallery.open(path)
    for data in (
        b"",
        b"PK\3\4 something zipped",
        b"\x93NUMPY" + bytes(200),
        struct.pack("<Q", 4) + b"[[[]",
        b"{}" * 50,
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"^Gallery\.open: {path}: .*not a safetensors file"):
            Gallery.open(path)
    make(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"version":"1"', b'"version":"2"'))
    with pytest.raises(ValueError, match=rf"^Gallery\.open: {path}: its format has version '2', this pycm reads 1$"):
        Gallery.open(path)
