"""FeatureCache: nothing is encoded twice, nothing wrong is ever returned."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pycm.cache
from pycm.encoders import FeatureCache
from pycm.encoders import store as store_module


class Letters:
    """A text encoder that counts what it is asked for; a row is known from the text alone."""

    modality = "text"
    name = "letters"

    def __init__(self, fingerprint: str = "f1", dim: int = 6) -> None:
        self.fingerprint, self.dim = fingerprint, dim
        self.seen: list[str] = []
        self.batches: list[int] = []

    def row(self, text: str) -> np.ndarray:
        digest = hashlib.sha256((self.fingerprint + text).encode()).digest()
        return np.frombuffer(digest[: self.dim], np.uint8).astype(np.float32) / 7

    def encode(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> np.ndarray:
        self.seen += items
        self.batches.append(len(items))
        return np.array([self.row(text) for text in items], np.float32).reshape(len(items), self.dim)

    def classify(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> np.ndarray:
        return -self.encode(items)[:, :2]


TEXTS = [f"text {i}" for i in range(10)]


def expected(texts: list[str], encoder: Letters | None = None) -> np.ndarray:
    encoder = encoder or Letters()
    return np.stack([encoder.row(text) for text in texts])


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.npz"))


def test_the_second_run_does_not_call_the_encoder(tmp_path: Path) -> None:
    first, second = Letters(), Letters()
    one = FeatureCache(tmp_path).encode(first, TEXTS, batch_size=4)
    assert first.batches == [4, 4, 2]
    assert first.seen == TEXTS
    two = FeatureCache(tmp_path).encode(second, TEXTS, batch_size=3)
    assert second.batches == []
    for result in (one, two):
        np.testing.assert_array_equal(result.features, expected(TEXTS))
        np.testing.assert_array_equal(result.kept, np.arange(10))
        assert result.features.dtype == np.float32
        assert result.kept.dtype == np.int64
        assert result.errors == []


def test_only_what_is_new_is_encoded_and_once(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.encode(Letters(), TEXTS[:5])
    encoder = Letters()
    items = ["new", TEXTS[3], "new", TEXTS[0], "other", "new"]
    np.testing.assert_array_equal(cache.encode(encoder, items, batch_size=2).features, expected(items))
    assert encoder.seen == ["new", "other"]


def test_fingerprint_and_method_are_part_of_the_key(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.encode(Letters("f1"), TEXTS)
    other = Letters("f2")
    np.testing.assert_array_equal(cache.encode(other, TEXTS).features, expected(TEXTS, other))
    assert other.seen == TEXTS
    again = Letters("f1")
    np.testing.assert_array_equal(cache.encode(again, TEXTS, method="classify").features, -expected(TEXTS)[:, :2])
    assert again.seen == TEXTS
    about = [json.loads(path.read_text()) for path in tmp_path.glob("*/about.json")]
    assert sorted((a["fingerprint"], a["method"]) for a in about) == [
        ("f1", "classify"), ("f1", "encode"), ("f2", "encode"),
    ]  # fmt: skip


def test_no_items(tmp_path: Path) -> None:
    result = FeatureCache(tmp_path).encode(Letters(), [])
    assert result.features.shape == (0, 6)
    assert result.kept.shape == (0,)
    assert result.errors == []


# Interruptions and damage


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_goes_on_from_its_last_batch(tmp_path: Path, error: type[BaseException]) -> None:
    class Stops(Letters):
        def encode(self, items: Any, **options: Any) -> np.ndarray:
            if len(self.batches) == 2:
                raise error
            return super().encode(items, **options)

    with pytest.raises(error):
        FeatureCache(tmp_path).encode(Stops(), TEXTS, batch_size=3)
    assert len(shards(tmp_path)) == 2
    encoder = Letters()
    np.testing.assert_array_equal(FeatureCache(tmp_path).encode(encoder, TEXTS).features, expected(TEXTS))
    assert encoder.seen == TEXTS[6:]


def test_a_write_that_is_cut_off_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def half(file: Any, **arrays: np.ndarray) -> None:
        file.write(b"PK\x03\x04 half of a shard")
        file.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path).encode(Letters(), TEXTS)
    assert [path.name for path in tmp_path.glob("*/*")] == ["about.json"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_killed_at_any_moment(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from pycm.encoders import FeatureCache
        sys.path.insert(0, sys.argv[2])
        from test_cache import Letters
        print("go", flush=True)
        n = 0
        while True:
            FeatureCache(sys.argv[1]).encode(Letters(), [f"text {n + i}" for i in range(40)], batch_size=1)
            n += 20
        """
    )
    folder = Path(__file__).parent
    for delay in (0.01, 0.03, 0.08, 0.15):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        texts = [f"text {i}" for i in range(100)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing that is damaged may be left
            result = FeatureCache(tmp_path).encode(Letters(), texts)
        np.testing.assert_array_equal(result.features, expected(texts))


def test_every_damaged_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    FeatureCache(tmp_path / "whole").encode(Letters(), TEXTS[:3])
    [shard] = shards(tmp_path / "whole")
    data = shard.read_bytes()
    noticed = 0
    for position in range(0, len(data), 3):
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", folder)
        broken = bytearray(data)
        broken[position] ^= 0x24
        [path] = shards(folder)
        path.write_bytes(broken)
        encoder = Letters()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = FeatureCache(folder).encode(encoder, TEXTS[:3])
        np.testing.assert_array_equal(result.features, expected(TEXTS[:3]))
        if encoder.seen:
            noticed += 1
            assert any(str(path) in str(w.message) and "is damaged" in str(w.message) for w in caught)
        shutil.rmtree(folder)
    assert noticed > len(range(0, len(data), 3)) // 2


@pytest.mark.parametrize("length", [0, 10, 100, -30])
def test_cut_off_files_are_encoded_again(tmp_path: Path, length: int) -> None:
    FeatureCache(tmp_path).encode(Letters(), TEXTS)
    [shard] = shards(tmp_path)
    shard.write_bytes(shard.read_bytes()[:length])
    encoder = Letters()
    with pytest.warns(RuntimeWarning, match=f"{shard.name} is damaged"):
        result = FeatureCache(tmp_path).encode(encoder, TEXTS)
    np.testing.assert_array_equal(result.features, expected(TEXTS))
    assert encoder.seen == TEXTS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeatureCache(tmp_path).encode(Letters(), TEXTS)


@pytest.mark.parametrize("arrays", [{"keys": np.zeros((2, 32), np.uint8)}, {
    "keys": np.zeros((2, 32), np.uint8), "features": np.zeros((3, 6), np.float32)
}, {"keys": np.zeros((2, 32), np.uint8), "features": np.zeros((2, 6), np.float64)}])  # fmt: skip
def test_wrong_shapes_are_damage(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    FeatureCache(tmp_path).encode(Letters(), TEXTS[:1])
    [shard] = shards(tmp_path)
    arrays["keys"][0] = np.load(shard)["keys"][0]
    np.savez(shard, **arrays)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        result = FeatureCache(tmp_path).encode(Letters(), TEXTS[:1])
    np.testing.assert_array_equal(result.features, expected(TEXTS[:1]))


def test_old_temporary_files_are_removed(tmp_path: Path) -> None:
    FeatureCache(tmp_path).encode(Letters(), TEXTS[:1])
    folder = shards(tmp_path)[0].parent
    old, fresh = folder / ".a.npz.1-00.tmp", folder / ".b.npz.1-00.tmp"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    FeatureCache(tmp_path).encode(Letters(), TEXTS)
    assert not old.exists()
    assert fresh.exists()


# Many files, many processes


def test_small_files_are_merged_and_nothing_is_lost(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(100)]
    FeatureCache(tmp_path).encode(Letters(), texts, batch_size=2)
    assert len(shards(tmp_path)) == 1
    encoder = Letters()
    np.testing.assert_array_equal(FeatureCache(tmp_path).encode(encoder, texts).features, expected(texts))
    assert encoder.seen == []


def test_a_file_merged_away_while_reading_is_found_again(tmp_path: Path, monkeypatch: Any) -> None:
    FeatureCache(tmp_path).encode(Letters(), TEXTS, batch_size=2)
    [folder] = {path.parent for path in shards(tmp_path)}
    own, calls = store_module.RowStore._read_shard, []

    def merged_meanwhile(store: Any, path: Path, wanted: Any) -> Any:
        if not calls:
            calls.append(path)
            monkeypatch.setattr(store_module, "_MERGE_AT", 2)
            store_module.RowStore(folder).merge()
        return own(store, path, wanted)

    monkeypatch.setattr(store_module.RowStore, "_read_shard", merged_meanwhile)
    encoder = Letters()
    np.testing.assert_array_equal(FeatureCache(tmp_path).encode(encoder, TEXTS).features, expected(TEXTS))
    assert encoder.seen == []
    assert len(shards(tmp_path)) == 1


def _work(folder: str, seed: int) -> bool:
    rng = np.random.default_rng(seed)
    for _ in range(4):
        texts = [f"text {i}" for i in rng.integers(0, 80, 50)]
        result = FeatureCache(folder).encode(Letters(), texts, batch_size=1, progress=False)
        if not np.array_equal(result.features, expected(texts)):
            return False
    return True


def test_concurrent_processes(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with multiprocessing.get_context("spawn").Pool(3) as pool:
            assert all(pool.starmap(_work, [(str(tmp_path), seed) for seed in range(3)]))
        encoder = Letters()
        texts = [f"text {i}" for i in range(80)]
        np.testing.assert_array_equal(FeatureCache(tmp_path).encode(encoder, texts).features, expected(texts))
    assert len(encoder.seen) < 10


# Folders that cannot be used


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"FeatureCache: cannot write to .*file"):
        FeatureCache(tmp_path / "file")
    with pytest.raises(OSError, match=r"FeatureCache: cannot write to .*file/deeper: Not a directory"):
        FeatureCache(tmp_path / "file" / "deeper")


def test_a_read_only_folder_is_reported_before_any_work(tmp_path: Path, monkeypatch: Any) -> None:
    cache = FeatureCache(tmp_path)
    cache.encode(Letters(), TEXTS[:2])

    def read_only(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store_module, "atomic_write", read_only)
    encoder = Letters()
    with pytest.raises(PermissionError, match=f"cannot write to {tmp_path}: Permission denied"):
        cache.encode(encoder, TEXTS)
    assert encoder.seen == []
    np.testing.assert_array_equal(cache.encode(encoder, TEXTS[:2]).features, expected(TEXTS[:2]))


# Wrong arguments, wrong encoders


@pytest.mark.parametrize(
    ("items", "options", "error", "message"),
    [
        ("text", {}, TypeError, "got a single str"),
        ([1], {}, TypeError, r"items\[0\] must be a str, got int"),
        (TEXTS, {"batch_size": 0}, ValueError, "positive int"),
        (TEXTS, {"on_error": "ignore"}, ValueError, 'on_error must be "raise" or "skip"'),
        (TEXTS, {"method": "embed"}, TypeError, "Letters has no method 'embed'"),
    ],
)
def test_wrong_arguments(tmp_path: Path, items: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        FeatureCache(tmp_path).encode(Letters(), items, **options)


def test_encoders_that_break_their_promise(tmp_path: Path) -> None:
    class Short(Letters):
        def encode(self, items: Any, **options: Any) -> np.ndarray:
            return super().encode(items)[:-1]

    with pytest.raises(ValueError, match=r"must return \[4, dim\], got \[3, 6\]"):
        FeatureCache(tmp_path).encode(Short(), TEXTS[:4])
    FeatureCache(tmp_path).encode(Letters(), TEXTS[:4])
    with pytest.raises(ValueError, match=r"must return \[6, 6\], got \[6, 3\]"):
        FeatureCache(tmp_path).encode(Letters(dim=3), TEXTS)
    silent = Letters()
    silent.modality = "sound"
    with pytest.raises(TypeError, match=r'Letters\.modality must be "image" or "text"'):
        FeatureCache(tmp_path).encode(silent, TEXTS)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE])
def test_a_failing_disk_does_not_cost_a_file(tmp_path: Path, monkeypatch: Any, number: int) -> None:
    cache = FeatureCache(tmp_path)
    cache.encode(Letters(), TEXTS)
    before = shards(tmp_path)

    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(store_module.np, "load", fail)
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            cache.encode(Letters(), TEXTS)
    assert shards(tmp_path) == before
    again = Letters()
    cache.encode(again, TEXTS)
    assert again.seen == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_not_kept(tmp_path: Path, bad: float) -> None:
    class Glitch(Letters):
        def encode(self, items: Any, **options: Any) -> np.ndarray:
            rows = super().encode(items)
            rows[[item == TEXTS[5] for item in items], 2] = bad
            return rows

    message = r"letters gives NaN or infinity for 1 of [34] items of a batch, the first being items\[5\] 'text 5'"
    for _ in range(2):  # it stays an error for as long as the encoder does it
        with pytest.raises(ValueError, match=message):
            FeatureCache(tmp_path).encode(Glitch(), TEXTS, batch_size=4)
    for path in shards(tmp_path):
        with np.load(path) as shard:
            assert np.isfinite(shard["features"]).all()
    healed = Letters()
    out = FeatureCache(tmp_path).encode(healed, TEXTS)
    np.testing.assert_array_equal(out.features, expected(TEXTS))
    assert TEXTS[5] in healed.seen
    assert TEXTS[4] not in healed.seen  # the rest of the batch was kept


def test_rows_that_are_not_finite_in_the_folder_are_encoded_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.encode(Letters(), TEXTS[:4])
    (path,) = shards(tmp_path)
    with np.load(path) as shard:
        keys, features = shard["keys"], shard["features"]
    features[1, 0] = np.nan
    np.savez(path, keys=keys, features=features)
    healed = Letters()
    np.testing.assert_array_equal(cache.encode(healed, TEXTS[:4]).features, expected(TEXTS[:4]))
    assert healed.seen == [TEXTS[1]]
    again = Letters()
    np.testing.assert_array_equal(cache.encode(again, TEXTS[:4]).features, expected(TEXTS[:4]))
    assert again.seen == []


def test_it_is_where_the_documentation_says() -> None:
    assert pycm.cache.FeatureCache is FeatureCache
