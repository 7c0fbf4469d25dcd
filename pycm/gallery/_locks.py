"""Who may change a gallery: one writer of a file, and one change at a time in a process."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class ReadWriteLock:
    """Any number of searches, or one change. A waiting change goes before new searches. It is not to be nested.

    Ctrl-C may come between any two steps, those of leaving too, and `threading.Condition` would stay locked. So who is
    here is noted by thread, and a thread that comes anew has left whatever it held.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._readers: dict[object, int] = {}  # a mark of each stay, and its thread
        self._writers: dict[object, int] = {}  # the first one writes, as soon as nobody reads

    @contextmanager
    def read(self) -> Iterator[None]:
        mark, thread = self._arrive()

        def enter() -> bool:
            with self._mutex:
                if not self._writers:
                    self._readers[mark] = thread
                return not self._writers

        try:
            _wait_for(enter)
            yield
        finally:
            self._readers.pop(mark, None)

    @contextmanager
    def write(self) -> Iterator[None]:
        mark, thread = self._arrive()

        def enter() -> bool:
            with self._mutex:
                return not self._readers and next(iter(self._writers)) is mark

        try:
            self._writers[mark] = thread
            _wait_for(enter)
            yield
        finally:
            self._writers.pop(mark, None)

    def _arrive(self) -> tuple[object, int]:
        thread = threading.get_ident()
        for here in (self._readers, self._writers):
            for mark, owner in list(here.items()):
                if owner == thread:
                    here.pop(mark, None)
        return object(), thread


def _wait_for(enter: Callable[[], bool]) -> None:
    delay = 1e-5
    while not enter():
        time.sleep(delay)
        delay = min(2 * delay, 1e-3)


def lock_file(function: str, path: str | os.PathLike[str]) -> int:
    """Lock the file at `path` for writing; returns the descriptor that holds the lock, as long as it is open.

    The lock is on the file itself, so nothing but the gallery lies in the folder. A writer that puts a new file in
    its place locks the new one first (`lock_open_file`), hence whoever finds a file without a lock may write.

    Raises:
        BlockingIOError: another gallery, of this process or another, has it open for writing.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            lock_open_file(function, path, descriptor)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # replaced between opening and locking: that lock is of a file nobody sees any more


def lock_open_file(function: str, path: str | os.PathLike[str], descriptor: int) -> None:
    """Lock an open file, or raise BlockingIOError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno, f"{function}: {os.fspath(path)} is open for writing in another place; one writer at a time"
        ) from None


def unlock(descriptor: int) -> None:
    """Give the lock up at once, even where a forked child still has the descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def overwriting(function: str, path: Path) -> Iterator[None]:
    """Hold the lock of the file at `path`, if there is one."""
    descriptor = lock_file(function, path) if path.exists() else -1
    try:
        yield
    finally:
        if descriptor >= 0:
            unlock(descriptor)
