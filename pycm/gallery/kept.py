"""A store, and the file and journal that keep it: opened, changed by one at a time, saved, compacted, closed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._device import moved
from . import persist
from ._locks import ReadWriteLock, lock_file, overwriting, unlock
from .arguments import Array, Int64
from .ids import IdArray
from .journal import JournalWriter
from .storage import GalleryFile
from .store import Store

_MAX_WINDOW = 256 << 20


class Kept:
    """Without a path, a store in memory alone; with one, as `Gallery.open` says."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.mode = "c"
        self._lock = ReadWriteLock()
        self._file: GalleryFile | None = None
        self._journal: JournalWriter | None = None
        self._locked = -1
        self._window: int | None = None  # bytes; None where the whole file is mapped
        self._sync = True
        self._closed = False
        self._settled = True  # the store is as the journal says

    @classmethod
    def open(cls, path: Path, mode: str, stream: bool | None, memory: int | None, verify: bool, sync: bool) -> Kept:
        if memory is None:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        if stream is None:
            stream = os.stat(path).st_size > memory
        # Two windows are mapped at a time, one of them beside its encoding.
        window = max(1, min(memory // 4, _MAX_WINDOW)) if stream else None
        locked = lock_file("Gallery.open", path) if mode == "r+" else -1
        try:
            opened = persist.read("Gallery.open", path, verify, window)
        except BaseException:
            if locked >= 0:
                unlock(locked)
            raise
        kept = cls(opened.store)  # which gives file and lock back from here on
        kept.mode, kept._file, kept._locked, kept._window, kept._sync = mode, opened.file, locked, window, sync
        if mode == "r+":
            kept._journal = persist.journal_writer(opened, sync)
            persist.remove_leftovers(path)
        return kept

    @property
    def path(self) -> Path | None:
        return None if self._file is None else self._file.path

    @contextmanager
    def reading(self, function: str) -> Iterator[Store]:
        """The store, which does not change meanwhile."""
        with self._lock.read():
            self._check(function)
            yield self.store

    @contextmanager
    def changing(self, function: str) -> Iterator[Store]:
        """The store, for the only one who reads or changes it meanwhile."""
        with self._lock.write():
            self._check(function)
            if self.mode == "r":
                raise io.UnsupportedOperation(
                    f'{function}: the gallery is open for reading; open it with mode "r+" or "c"'
                )
            yield self.store

    def add(self, ids: IdArray, rows: Array, table: Any) -> None:
        """Checked rows, to the journal and the store, within `changing`."""
        if self._journal is not None:
            self._append(persist.add_record(self.store, ids, rows, table))
        self.store.add(ids, rows, table)
        self._settled = True

    def remove(self, rows: Int64) -> None:
        """Rows that are there, from the store, within `changing`."""
        if self._journal is not None:
            self._append(persist.remove_record(self.store, rows))
        self.store.remove(rows)
        self._settled = True

    def _append(self, record: tuple[dict[str, Any], list[Any]]) -> None:
        assert self._journal is not None
        self._settled = False  # until the store has followed
        try:
            self._journal.append(*record)
        except BaseException:
            self._journal.check()
            self._settled = True  # rolled back
            raise

    def to(self, device: Any) -> Kept:
        """The rows that are there, in memory of a CUDA device, or of the host for None."""
        with self.reading("Gallery.to") as store:
            return Kept(_gathered(store, device))

    def save(self, path: Path) -> None:
        if self.store.device is not None:
            raise NotImplementedError(f'Gallery.save: the rows are on {self.store.device}; save gallery.to("cpu")')
        if self._locked >= 0 and path.exists() and os.path.samestat(os.fstat(self._locked), os.stat(path)):
            self.compact()
            return
        with self.reading("Gallery.save") as store, overwriting("Gallery.save", path):
            unlock(persist.save("Gallery.save", path, store, self._window is None))

    def compact(self) -> None:
        with self.changing("Gallery.compact") as store:
            if self._file is None or self._journal is None:
                self.store = _gathered(store, store.device)
                return
            path = self._file.path
            self._settled = False
            try:
                locked = persist.save("Gallery.compact", path, store, self._window is None)
            except BaseException:
                self._settled = os.path.samestat(os.fstat(self._locked), os.stat(path))  # the old file is there
                raise
            unlock(self._locked)
            self._locked = locked
            self._journal.close()
            opened = persist.read("Gallery.compact", path, False, self._window)
            self._file.close()
            self.store, self._file = opened.store, opened.file
            self._journal = persist.journal_writer(opened, self._sync)
            self._settled = True

    def verify(self) -> None:
        with self.reading("Gallery.verify"):
            if self._file is not None:
                self._file.verify()

    def close(self) -> None:
        with self._lock.write():
            if self._closed:
                return
            self._closed = True
            self._release()
            self.store = Store(self.store.metric, self.store.screen, self.store.dim, self.store.dtype)

    def _release(self) -> None:
        if self._journal is not None:
            self._journal.close()
        if self._file is not None:
            self._file.close()
        if self._locked >= 0:
            unlock(self._locked)
            self._locked = -1

    def __del__(self) -> None:
        self._release()

    @property
    def closed(self) -> bool:
        return self._closed

    def _check(self, function: str) -> None:
        if self._closed:
            raise ValueError(f"{function}: the gallery is closed")
        if not self._settled:
            raise RuntimeError(f"{function}: a change was interrupted; close the gallery and open it again")


def _gathered(store: Store, device: Any) -> Store:
    """The rows that are there, in memory of the device, or of the host for None, without those removed."""
    fresh = Store(store.metric, store.screen, store.dim, store.dtype)
    rows = store.rows_at()
    if len(rows):
        table = None if store.metadata.empty else store.metadata.take(store.alive)
        fresh.fill(store.ids.take(rows), (moved(piece, device) for piece in store.pieces()), table)
    fresh.ids.next_id = store.ids.next_id
    return fresh
