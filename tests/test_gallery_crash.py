"""Gallery files survive a writer that is killed: every acknowledged operation is there, and none is half there."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gallery_cases
import numpy as np
import pytest
from gallery_cases import DIM, apply, plan, rows_of

from pycm.gallery import Gallery

KILLS = int(os.environ.get("PYCM_GALLERY_KILLS", "0"))


def holds(path: Path, present: list[int], mode: str = "r") -> bool:
    """Whether the file has just these rows; where the ids are right the rows must be."""
    with Gallery.open(path, mode, verify=True) as gallery:
        if gallery.ids.tolist() != present:
            return False
        assert gallery.get(present).tobytes() == rows_of(present).tobytes()
        return True


# ---- killed by another process, at any time ----


@pytest.fixture
def workers() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, gallery_cases.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield process
        process.kill()


def kill_often(workers: subprocess.Popen[str], path: Path, times: int) -> int:
    """Start a worker, kill it, see what is there, and so on; returns how many operations were acknowledged."""
    assert workers.stdin is not None
    assert workers.stdout is not None
    seed = int(os.environ.get("PYCM_GALLERY_SEED", np.random.SeedSequence().entropy)) % 2**32
    print(f"PYCM_GALLERY_SEED={seed}")  # of the operations; the moments are the clock's
    rng = np.random.default_rng(seed)
    Gallery(dim=DIM).save(path)
    present: list[int] = []
    fresh, acknowledged, compacted = 0, 0, 0
    for round_ in range(20 * times):
        if round_ >= times and compacted:  # a machine that is busy with other things needs more rounds
            break
        workers.stdin.write(f"{path} {seed + round_} {fresh}\n")
        child = int(workers.stdout.readline().removeprefix("child "))
        if round_ % 3:  # at work, and not while it opens the file and repairs what the last one left
            assert workers.stdout.readline() == "open\n"
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        operations = np.random.default_rng(seed + round_)
        while (line := workers.stdout.readline()) != f"dead {signal.SIGKILL.value}\n":
            assert line in ("open\n", "done\n"), line
            if line == "done\n":
                operation = plan(operations, present, fresh)
                fresh += len(operation[1]) if operation[0] == "add" else 0
                present = apply(operation, present)
                acknowledged, compacted = acknowledged + 1, compacted + (operation[0] == "compact")
        # The one under way when it was killed is there as a whole or not at all.
        operation = plan(operations, present, fresh)
        if not holds(path, present):
            present = apply(operation, present)
            assert holds(path, present), operation[0]
        fresh += len(operation[1]) if operation[0] == "add" else 0
    assert holds(path, present, "r+")
    assert {name.name for name in path.parent.iterdir()} <= {path.name, f"{path.name}.journal"}  # no leftovers
    assert compacted
    return acknowledged


def test_killed_now_and_then(workers: subprocess.Popen[str], tmp_path: Path) -> None:
    assert kill_often(workers, tmp_path / "g.safetensors", 15) > 15


@pytest.mark.slow
@pytest.mark.skipif(not KILLS, reason="PYCM_GALLERY_KILLS says how often to kill")
def test_killed_often(workers: subprocess.Popen[str], tmp_path: Path) -> None:
    assert kill_often(workers, tmp_path / "g.safetensors", KILLS) > KILLS


# ---- cut off before each call to the system, one after another ----


class Recorder:
    """Copies the folder before each call that changes the disk, and after half of each write."""

    def __init__(self, folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.copies, self.count = folder, copies, 0
        for name in ("fsync", "replace", "unlink", "ftruncate"):
            monkeypatch.setattr(os, name, self.before(getattr(os, name)))
        write = os.write

        def write_in_halves(descriptor: int, data: Any) -> int:
            self.copy()
            done = write(descriptor, data[: len(data) // 2])
            self.copy()
            return done + write(descriptor, data[done:])

        monkeypatch.setattr(os, "write", write_in_halves)

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            self.copy()
            return function(*arguments, **options)

        return wrapper

    def copy(self) -> None:
        shutil.copytree(self.folder, self.copies / f"{self.count:04}")
        self.count += 1


def test_cut_off_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, copies = tmp_path / "g", tmp_path / "copies"
    folder.mkdir()
    path = folder / "g.safetensors"
    Gallery(dim=DIM).save(path)
    operations: list[gallery_cases.Operation] = [
        ("add", range(5)),  # makes the journal
        ("add", range(5, 9)),
        ("remove", [0, 7]),
        ("compact", ()),
        ("add", [10]),
        ("remove", [10, 3]),
        ("compact", ()),
        ("save", ()),  # over itself
        ("add", [11, 12]),
    ]
    states: list[list[int]] = [[]]
    began: list[int] = []
    with monkeypatch.context() as patched, Gallery.open(path, "r+") as gallery:
        recorder = Recorder(folder, copies, patched)
        for kind, names in operations:
            began.append(recorder.count)
            if kind == "add":
                gallery.add(rows_of(names), list(names))
            elif kind == "remove":
                gallery.remove(names)
            elif kind == "compact":
                gallery.compact()
            else:
                gallery.save(path)
            states.append(apply((kind, names), states[-1]))
        recorder.copy()
    began.append(recorder.count - 1)
    assert all(a < b for a, b in itertools.pairwise(began))
    for i, (first, end) in enumerate(itertools.pairwise(began)):
        for number in range(first, end):
            copy = copies / f"{number:04}" / path.name
            both = [states[i]] if number == first else [states[i], states[i + 1]]
            found = [state for state in both if holds(copy, state)]
            assert found, (operations[i], number)
            assert holds(copy, found[0], "r+")  # which repairs
            with Gallery.open(copy, "r+") as repaired:
                assert {name.name for name in copy.parent.iterdir()} <= {path.name, f"{path.name}.journal"}
                repaired.add(rows_of([99]), [99])
            assert holds(copy, [*found[0], 99])
            shutil.rmtree(copy.parent)
    assert holds(copies / f"{recorder.count - 1:04}" / path.name, states[-1])


# ---- calls that fail ----


@pytest.mark.parametrize("name", ["write", "fsync"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("nth", [0, 1, 2, 3, 4])
def test_a_failed_change_has_not_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[BaseException], nth: int
) -> None:
    path = tmp_path / "g.safetensors"
    Gallery(dim=DIM).save(path)
    with Gallery.open(path, "r+") as gallery:
        gallery.add(rows_of([0, 1]), [0, 1])
        calls = iter(range(100))
        function = getattr(os, name)

        def fail(*arguments: Any) -> Any:
            if next(calls) == nth:
                raise error(28, "No space left on device")
            return function(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(os, name, fail)
            failed = False
            try:
                gallery.add(rows_of([2]), [2])
            except error:
                failed = True
        present = [0, 1] if failed else [0, 1, 2]
        assert failed == (next(calls) > nth)
        assert gallery.ids.tolist() == present
        assert holds(path, present)
        gallery.remove([0])  # and it goes on
        assert holds(path, present[1:])
    assert holds(path, present[1:], "r+")


def test_an_interrupted_compaction_leaves_the_gallery_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "g.safetensors"
    Gallery(rows_of([0, 1])).save(path)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with Gallery.open(path, "r+") as gallery:
        gallery.remove([0])
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", fail)
            with pytest.raises(OSError, match="No space"):
                gallery.compact()
        assert sorted(name.name for name in tmp_path.iterdir()) == ["g.safetensors", "g.safetensors.journal"]
        gallery.add(rows_of([5]), [5])
        assert holds(path, [1, 5])
        with monkeypatch.context() as patched:  # the new file is there, and the journal is still to be removed
            patched.setattr(os, "unlink", fail)
            with pytest.raises(OSError, match="No space"):
                gallery.compact()
        with pytest.raises(
            RuntimeError, match=r"^Gallery\.add: a change was interrupted; close the gallery and open it"
        ):
            gallery.add(rows_of([6]), [6])
    with Gallery.open(path, "r+") as gallery:
        assert holds(path, [1, 5])
        gallery.compact()
        assert [name.name for name in tmp_path.iterdir()] == ["g.safetensors"]
    assert holds(path, [1, 5])
