"""Gallery's journal, damaged and not; one writer and many readers of a file."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_cases import assert_holds, journaled, make

from pycm.gallery import Gallery


def test_a_journal_cut_anywhere_holds_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    _, ends = journaled(path)
    journal = Path(f"{path}.journal")
    data = journal.read_bytes()
    states = []
    for end in (32, *ends):
        journal.write_bytes(data[:end])
        with Gallery.open(path) as gallery:
            states.append(dict(gallery))
    for size in range(32, len(data)):
        whole = sum(size >= end - 8 for end in ends)  # an operation is whole before its mark
        for tail in (b"", b"\xee\xee\xee"):  # what a disk has not written may be anything
            journal.write_bytes(data[:size] + tail)
            with Gallery.open(path) as gallery:
                assert_holds(gallery, states[whole])
        if size % 7 and size + 8 not in ends:
            continue
        with Gallery.open(path, "r+") as gallery:
            assert_holds(gallery, states[whole])
        with Gallery.open(path, "r+") as gallery:
            assert_holds(gallery, states[whole])
            gallery.add(np.ones((1, 5), np.float32), [999])
        with Gallery.open(path) as gallery:
            assert_holds(gallery, states[whole] | {999: np.ones(5, np.float32)})


def test_a_flipped_bit_in_the_journal(tmp_path: Path) -> None:
    """It is an error, and if it is in the last mark it does not matter."""
    path = tmp_path / "g.safetensors"
    held, ends = journaled(path)
    journal = Path(f"{path}.journal")
    data = bytearray(journal.read_bytes())
    for place in range(len(data)):
        for bit in (place % 8, (place + 3) % 8):
            data[place] ^= 1 << bit
            journal.write_bytes(data)
            for mode in ("r", "r+"):
                if place >= ends[-1] - 8:
                    with Gallery.open(path, "r") as gallery:
                        assert_holds(gallery, held)
                    continue
                with pytest.raises(ValueError, match=rf"^Gallery\.open: {journal}: "):
                    Gallery.open(path, mode)  # type: ignore[arg-type]
                assert journal.read_bytes() == data  # nothing is lost
            data[place] ^= 1 << bit


def test_the_journal_of_another_gallery(tmp_path: Path) -> None:
    path, other = tmp_path / "g.safetensors", tmp_path / "h.safetensors"
    journaled(path)
    journaled(other)
    shutil.copy(f"{other}.journal", f"{path}.journal")
    with pytest.raises(
        ValueError, match=rf"^Gallery\.open: {path}\.journal: the journal of another gallery than {path}"
    ):
        Gallery.open(path, "r+")
    Path(f"{path}.journal").write_bytes(b"notes of another kind, and quite long")
    for call in (lambda: Gallery.open(path), lambda: Gallery.load(other).save(path)):
        with pytest.raises(ValueError, match="not the journal of a gallery"):
            call()


def test_without_waiting_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "g.safetensors"
    held = make(path)
    calls: list[int] = []
    with Gallery.open(path, "r+", sync=False) as gallery:
        gallery.add(np.ones((1, 5), np.float32), [70])
        monkeypatch.setattr(os, "fsync", calls.append)
        gallery.add(np.ones((1, 5), np.float32), [71])
        gallery.remove([70])
    assert not calls
    with Gallery.open(path) as gallery:
        assert_holds(gallery, held | {71: np.ones(5, np.float32)})


# ---- one writer, many readers ----


def _try_to_write(path: str, answer: Any) -> None:
    try:
        Gallery.open(path, "r+").close()
        answer.send("opened")
    except BlockingIOError as error:
        answer.send(str(error))


def _ask_another_process(path: Path) -> str:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_try_to_write, args=(str(path), there))
    process.start()
    try:
        return str(here.recv())
    finally:
        process.join()


def test_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    held = make(path)
    with Gallery.open(path, "r+") as writer:
        for step in range(2):
            with pytest.raises(BlockingIOError, match=f"Gallery.open: {path} is open for writing in another place"):
                Gallery.open(path, "r+")
            with pytest.raises(BlockingIOError, match=r"Gallery\.save: "):
                Gallery.load(path).save(path)
            if step:
                assert "is open for writing in another place" in _ask_another_process(path)
            writer.compact()  # a new file is locked as well
        with Gallery.open(path) as reader:
            writer.add(np.ones((1, 5), np.float32), [50])
            writer.remove([3])
            writer.compact()
            assert_holds(reader, held)  # as it was when it was opened
        with Gallery.open(path) as reader:
            assert 50 in reader
            assert 3 not in reader
    assert _ask_another_process(path) == "opened"
    Gallery.open(path, "r+").close()


def test_a_gallery_that_nobody_closes_gives_its_lock_back(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    make(path)
    before = len(os.listdir("/proc/self/fd"))
    for mode in ("r+", "r", "c", "r+"):
        Gallery.open(path, mode).topk(np.ones((1, 5), np.float32), 1)  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reader_beside_a_busy_writer(tmp_path: Path) -> None:
    """Operations come in pairs, so an odd number of rows would be a state that never was acknowledged last."""
    path = tmp_path / "g.safetensors"
    Gallery(np.zeros((2, 3), np.float32)).save(path)
    stop = threading.Event()

    def write() -> None:
        with Gallery.open(path, "r+", sync=False) as gallery:
            for i in range(60):
                gallery.add(np.full((2, 3), i, np.float32))
                if i % 3 == 0:
                    gallery.compact()
        stop.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = [0]
    try:
        while not stop.is_set():
            with Gallery.open(path, verify=True) as gallery:
                assert len(gallery) % 2 == 0
                seen.append(len(gallery))
                assert [row[0] for _, row in gallery][2::2] == list(range(len(gallery) // 2 - 1))
    finally:
        thread.join()
    assert seen == sorted(seen)


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    make(path)
    ours = [".g.safetensors.123-0123abcd.tmp", ".g.safetensors.journal.123-0123abcd.tmp"]
    others = [".g.safetensors2.123-0123abcd.tmp", "g.safetensors.tmp", ".g.safetensors.12.tmp"]
    for name in ours + others:
        (tmp_path / name).write_bytes(b"x")
    Gallery.open(path).close()
    assert len(list(tmp_path.iterdir())) == 6
    Gallery.open(path, "r+").close()
    assert {name.name for name in tmp_path.iterdir()} == {path.name, *others}
