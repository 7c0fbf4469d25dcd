"""Runs of a gallery's rows that are searched as one: in memory or mapped whole, or window by window.

A gallery is the rows of its file, which never change, and those added since. Each is a block; a search is asked of
each part of each block, every part an `_C.EncodedGallery`, and `search.py` merges what they find.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from pycm import _C

from .storage import GalleryFile

Array = npt.NDArray[Any]
_PIECE_BYTES = 16 << 20


T = TypeVar("T")


class Block(Protocol):
    """What a search and a writer need of some rows."""

    def __len__(self) -> int: ...
    def take(self, rows: npt.NDArray[np.int64]) -> Any:
        """Copies of those rows."""

    def search(self, function: Callable[[int, int, Any], T]) -> Iterator[T]:
        """What the function gives for each part in turn: rows start to stop, and them as an EncodedGallery."""

    def pieces(self, size: int = _PIECE_BYTES) -> Iterator[Any]:
        """All rows, in order, some megabytes at a time."""


@runtime_checkable
class WholeBlock(Block, Protocol):
    """Rows that are searched as one."""

    def encoded(self) -> Any:
        """All of them, as an EncodedGallery."""


class Growable:
    """An array that rows are appended to."""

    def __init__(self, dtype: Any, row: tuple[int, ...] = ()) -> None:
        self._data: Array = np.empty((0, *row), dtype)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def values(self) -> Array:
        return self._data[: self._count]

    def append(self, rows: Array) -> None:
        count = self._count + len(rows)
        if count > len(self._data):  # the first rows, often the only ones, are given no more room than they need
            grown = np.empty((max(2 * len(self._data), count), *self._data.shape[1:]), self._data.dtype)
            grown[: self._count] = self.values
            self._data = grown
        self._data[self._count : count] = rows
        self._count = count

    def truncate(self, count: int) -> None:
        self._count = count


class RowsBlock:
    """Rows in memory or in a map, encoded at the first search after they came.

    Args:
        rows: an array, or the rows in memory that more are appended to.
        state: the encoding of `rows`, where there is one.
    """

    def __init__(
        self, metric: str, screen: str, rows: Array | Growable, state: Mapping[str, Array] | None = None
    ) -> None:
        self._rows = rows
        self._encoded = _C.EncodedGallery(metric, screen)
        self._encoding = threading.Lock()
        if state is not None:
            self._encoded.restore(rows, dict(state))

    @property
    def rows(self) -> Array:
        return self._rows.values if isinstance(self._rows, Growable) else self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        return self.rows[rows]

    def search(self, function: Callable[[int, int, Any], T]) -> Iterator[T]:
        if len(self):
            yield function(0, len(self), self.encoded())

    def pieces(self, size: int = _PIECE_BYTES) -> Iterator[Array]:
        rows = self.rows
        step = max(1, size // (rows.itemsize * rows.shape[1]))
        for start in range(0, len(rows), step):
            yield rows[start : start + step]

    def encoded(self) -> Any:
        with self._encoding:
            if len(self._encoded) < len(self):
                self._encoded.extend(self.rows)
            return self._encoded


class StreamBlock:
    """Rows of a file that is larger than the memory for it: two windows of it are mapped at a time."""

    def __init__(self, metric: str, screen: str, file: GalleryFile, window_bytes: int) -> None:
        self._metric, self._screen, self._file = metric, screen, file
        tensor = file.tensors["rows"]
        self._count, self._row_bytes = tensor.shape[0], (tensor.stop - tensor.start) // max(1, tensor.shape[0])
        self._step = max(1, window_bytes // max(1, self._row_bytes))

    def __len__(self) -> int:
        return self._count

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        tensor = self._file.tensors["rows"]
        empty = self._file.window("rows", 0, 0, ahead=False)
        data = (
            os.pread(self._file.descriptor, self._row_bytes, tensor.start + r * self._row_bytes) for r in rows.tolist()
        )
        return np.frombuffer(bytearray().join(data), empty.dtype).reshape(len(rows), *tensor.shape[1:])

    def search(self, function: Callable[[int, int, Any], T]) -> Iterator[T]:
        for start, rows in self._windows(self._step):
            encoded = _C.EncodedGallery(self._metric, self._screen)
            encoded.extend(rows)
            result = function(start, start + len(rows), encoded)
            del rows, encoded  # a window is unmapped when nobody holds it
            yield result

    def pieces(self, size: int = _PIECE_BYTES) -> Iterator[Array]:
        for _, rows in self._windows(min(self._step, max(1, size // max(1, self._row_bytes)))):
            yield rows

    def _windows(self, step: int) -> Iterator[tuple[int, Array]]:
        """The disk reads one window while another is searched."""
        starts = range(0, self._count, step)
        ahead = [self._map(start, step) for start in starts[:1]]
        for i, start in enumerate(starts):
            rows, ahead = ahead[0], [self._map(following, step) for following in starts[i + 1 : i + 2]]
            yield start, rows
            del rows

    def _map(self, start: int, step: int) -> Array:
        return self._file.window("rows", start, min(start + step, self._count), ahead=True)
