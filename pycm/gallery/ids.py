"""The ids of a gallery's rows: int64 or str, each once among the rows that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
IdArray = npt.NDArray[Any]  # int64, or object holding str

NO_ID = -1  # marks "no match" among int64 ids, and so is not an id


def as_ids(function: str, argument: str, values: Any) -> IdArray:
    """`values` as int64 [n], or as str in an object array [n].

    Raises:
        TypeError: neither integers nor strings, or both.
        ValueError: not one-dimensional, beyond int64, or the id -1.
    """
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise TypeError(f"{function}: {argument} must be a sequence of ids, got {type(values).__name__}")
    if hasattr(values, "to_pylist"):  # Arrow
        values = values.to_pylist()
    elif hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    if not isinstance(values, np.ndarray) and any(isinstance(value, str) for value in values):
        array = np.empty(len(values), object)
        array[:] = list(values)
    else:
        array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{function}: {argument} must have shape [n], got {list(array.shape)}")
    if array.dtype == object and array.size and all(_is_integer(value) for value in array):
        array = np.asarray(array.tolist())
        if array.dtype.kind not in "iu":
            raise ValueError(f"{function}: {argument} must fit into int64, got {max(array.tolist(), key=abs)}")
    if array.dtype.kind in "iu" or not array.size:
        if array.dtype == np.uint64 and array.size and int(array.max()) >= 2**63:
            raise ValueError(f"{function}: {argument} must be below 2^63, got {array.max()}")
        array = array.astype(np.int64)
        if (array == NO_ID).any():
            raise ValueError(f"{function}: {argument} must not be -1, which marks a missing match")
        return array
    if array.dtype.kind in "UT":
        return array.astype(object)
    if array.dtype == object and all(type(value) is str for value in array):
        return array
    raise TypeError(f"{function}: {argument} must be integers or strings, got {_describe(array)}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_unicode(function: str, ids: IdArray) -> None:
    """Raise ValueError for strings that UTF-8, and so a file, cannot hold."""
    if ids.dtype != object:
        return
    try:
        "".join(ids).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{function}: ids must be valid Unicode, got {error.object[error.start]!r}") from None


def _describe(array: npt.NDArray[Any]) -> str:
    if array.dtype != object:
        return str(array.dtype)
    return " and ".join(sorted({type(value).__name__ for value in array}))


def name_some(ids: Iterable[Any]) -> str:
    """The first few, for a message."""
    values = [value.item() if isinstance(value, np.generic) else value for value in ids]
    return ", ".join(map(repr, values[:5])) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def kind_of(ids: IdArray) -> str:
    return "str" if ids.dtype == object else "int64"


def without_repeats(function: str, ids: IdArray) -> IdArray:
    """`ids` themselves. ValueError names those that come more than once."""
    values = ids.tolist()
    if len(set(values)) < len(values):
        twice = (value for value, times in Counter(values).items() if times > 1)
        raise ValueError(f"{function}: ids must come once each, got more often: {name_some(twice)}")
    return ids


# ---- as tensors ----


def encode_ids(ids: IdArray) -> dict[str, npt.NDArray[Any]]:
    """The ids as arrays of a file: `ids`, or for strings `ids` (their UTF-8) and `ids.offsets` [n + 1]."""
    if ids.dtype != object:
        return {"ids": ids}
    parts = [value.encode() for value in ids]
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return {"ids": np.frombuffer(b"".join(parts), np.uint8), "ids.offsets": offsets}


def decode_ids(arrays: Mapping[str, npt.NDArray[Any]]) -> IdArray | StringColumn:
    """What `encode_ids` encoded, without reading it."""
    return StringColumn(arrays["ids"], arrays["ids.offsets"]) if "ids.offsets" in arrays else arrays["ids"]


class StringColumn:
    """Strings one after another in a map, read when asked for."""

    def __init__(self, text: npt.NDArray[Any], offsets: npt.NDArray[Any]) -> None:
        self._text, self._offsets = text, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, rows: Any) -> IdArray:
        starts, stops = self._offsets[:-1][rows], self._offsets[1:][rows]
        found = np.empty(starts.shape, object)
        found[...] = [bytes(self._text[a:b]).decode() for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
        return found


# ---- the index ----


class Ids:
    """The ids of all rows ever added since the file was written, and where each is.

    The file's ids are a map, searched in place where they rise; those added since are in memory. A row that was
    removed keeps its id here, but is not found under it.
    """

    def __init__(self, column: IdArray | StringColumn | None = None, *, ordered: bool = True, next_id: int = 0) -> None:
        self.ordered = self._column_rises = ordered  # each id is above the one of the row before
        self.next_id = next_id
        self._column: IdArray | StringColumn = np.empty(0, np.int64) if column is None else column
        self._tail = np.empty(0, np.int64 if not isinstance(self._column, StringColumn) else object)
        self._tail_count = 0
        self._rows: dict[Any, int] = {}  # of the tail
        self._order: Int64 | None = None  # of the column, where it does not rise
        self._strings: dict[str, int] | None = None  # of the column

    def __len__(self) -> int:
        return len(self._column) + self._tail_count

    @property
    def kind(self) -> str | None:
        """ "int64" or "str"; None before the first."""
        if not len(self):
            return None
        return kind_of(self._tail)

    def take(self, rows: Any) -> IdArray:
        """The ids of `rows`, an int array of any shape; -1 (None for strings) where a row is negative."""
        flat = np.asarray(rows, np.int64).reshape(-1)
        found = np.full(len(flat), None if self._tail.dtype == object else NO_ID, self._tail.dtype)
        base = len(self._column)
        in_column = np.flatnonzero((flat >= 0) & (flat < base))
        found[in_column] = self._column[flat[in_column]]
        in_tail = np.flatnonzero(flat >= base)
        found[in_tail] = self._tail[flat[in_tail] - base]
        return found.reshape(np.shape(rows))

    def check_kind(self, function: str, argument: str, ids: IdArray) -> None:
        """Raise TypeError where `ids` are not of this gallery's kind."""
        if self.kind not in (None, kind_of(ids)) and len(ids):
            raise TypeError(f"{function}: {argument} must be {self.kind}, as the gallery's are, got {kind_of(ids)}")

    def find(self, ids: IdArray, alive: npt.NDArray[np.bool_]) -> Int64:
        """Their rows; -1 where there is none that is alive."""
        rows = np.fromiter((self._rows.get(value, -1) for value in ids.tolist()), np.int64, len(ids))
        missing = np.flatnonzero(rows < 0)
        if len(missing) and len(self._column):
            rows[missing] = self._find_in_column(ids[missing])
        there = rows >= 0
        there[there] = alive[rows[there]]
        return np.where(there, rows, -1)

    def append(self, ids: IdArray) -> None:
        """Ids that `find` does not find."""
        if not len(ids):
            return
        first = len(self)
        if self._tail.dtype != ids.dtype and not first:
            self._tail = np.empty(0, ids.dtype)
        previous = self.take([first - 1])[0] if first else None
        self.ordered = self.ordered and _rises(ids) and (previous is None or bool(previous < ids[0]))
        if self._tail_count + len(ids) > len(self._tail):
            grown = np.empty(max(2 * len(self._tail), self._tail_count + len(ids), 16), self._tail.dtype)
            grown[: self._tail_count] = self._tail[: self._tail_count]
            self._tail = grown
        self._tail[self._tail_count : self._tail_count + len(ids)] = ids
        self._tail_count += len(ids)
        self._rows.update(zip(ids.tolist(), range(first, first + len(ids)), strict=True))
        if ids.dtype != object:
            self.next_id = max(self.next_id, int(ids.max()) + 1)

    def truncate(self, count: int) -> None:
        """Forget the rows from `count` on."""
        self._tail_count = count - len(self._column)
        self._rows = {value: row for value, row in self._rows.items() if row < count}

    def _find_in_column(self, ids: IdArray) -> Int64:
        """Rows of the column, removed ones too; -1 for none."""
        if isinstance(self._column, StringColumn):
            if self._strings is None:
                every = self._column[np.arange(len(self._column))]
                self._strings = dict(zip(every.tolist(), range(len(every)), strict=True))
            strings = self._strings
            return np.fromiter((strings.get(value, -1) for value in ids.tolist()), np.int64, len(ids))
        column = self._column
        if self._column_rises:
            places = np.searchsorted(column, ids)
            rows = np.minimum(places, len(column) - 1)
        else:
            if self._order is None:
                self._order = np.argsort(column, kind="stable")
            places = np.searchsorted(column, ids, sorter=self._order)
            rows = self._order[np.minimum(places, len(column) - 1)]
        return np.where(column[rows] == ids, rows, -1)


def _rises(ids: IdArray) -> bool:
    return bool(np.all(ids[:-1] < ids[1:]))
