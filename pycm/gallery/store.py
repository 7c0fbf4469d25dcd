"""The rows of a gallery with their ids and metadata, as they are in memory and in maps; no files, no locks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .._device import device_of, dtype_name
from .blocks import Block, Growable, RowsBlock
from .device import DeviceBlock, DeviceRows
from .ids import IdArray, Ids
from .metadata import Metadata
from .search import take
from .storage import dtype_of

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class Store:
    """Rows are numbered as they came; a removed row keeps its number, and its place, until the store is written anew.

    A *position* counts only the rows that are there.

    Args:
        metric, screen: of the searches.
        dim, dtype: of the rows; None until the first rows come.
        device: the CUDA device that the rows are on; None for the host's memory.
        base: rows that never change, those of a file, with their `ids` and `metadata`.
    """

    def __init__(
        self,
        metric: str,
        screen: str,
        dim: int | None,
        dtype: np.dtype[Any] | None,
        base: Block | None = None,
        ids: Ids | None = None,
        metadata: Metadata | None = None,
        device: Any = None,
    ) -> None:
        self.metric, self.screen = metric, screen
        self.dim, self.dtype, self.device = dim, dtype, device
        self._base = base
        self._added: Growable | DeviceRows | None = None
        self._tail: RowsBlock | DeviceBlock | None = None
        self.tables: Any = None  # what device.py keeps of a version
        self.ids = Ids() if ids is None else ids
        self.metadata = Metadata() if metadata is None else metadata
        self._alive = Growable(bool)  # extended last: where an addition is cut off, this tells
        self._alive.append(np.ones(0 if base is None else len(base), bool))
        self._count: int | None = None
        self._numbers: tuple[Int64, Int64] | None = None
        self.version = 0

    @property
    def rows(self) -> int:
        """How many rows there are, the removed ones too."""
        return len(self._alive)

    @property
    def count(self) -> int:
        """How many rows are there."""
        if self._count is None:
            self._count = int(np.count_nonzero(self.alive))
        return self._count

    @property
    def alive(self) -> Bool:
        """Whether each row is there."""
        return self._alive.values

    @property
    def blocks(self) -> list[Block]:
        """The runs of rows that hold any."""
        return [block for block in (self._base, self._tail) if block is not None and len(block)]

    @property
    def complete(self) -> bool:
        """Whether no row was removed."""
        return self.count == self.rows

    def add(self, ids: IdArray, rows: Any, table: Any) -> None:
        """Rows that were checked, with ids that are not there; a table, its IPC bytes, or None."""
        self.fill(ids, [rows], table)

    def fill(self, ids: IdArray, pieces: Iterable[Any], table: Any) -> None:
        """The same with the rows in pieces."""
        try:
            for rows in pieces:
                self._grown(rows, len(ids)).append(rows)
            self.note(ids, table)
        except BaseException:
            if self._added is not None:
                self._added.truncate(self.rows - (0 if self._base is None else len(self._base)))
            self.ids.truncate(self.rows)
            self.metadata.truncate(self.rows)
            raise

    def _grown(self, rows: Any, count: int) -> Any:
        """What rows are appended to; at the first of them with room for `count`."""
        if self._added is None:
            self.dim, self.device = rows.shape[1], device_of(rows)
            if self.device is None:
                self.dtype = rows.dtype
                self._added = Growable(rows.dtype, rows.shape[1:])
                self._tail = RowsBlock(self.metric, self.screen, self._added)
            else:
                self.dtype = dtype_of(dtype_name(rows))
                self._added = DeviceRows(self.dtype, rows.shape[1], self.device, count)
                self._tail = DeviceBlock(self.metric, self._added)
        return self._added

    def note(self, ids: IdArray, table: Any) -> None:
        """Rows that the caller keeps."""
        self.ids.append(ids)
        self.metadata.append(len(ids), table)
        self._changed()
        self._alive.append(np.ones(len(ids), bool))

    def remove(self, rows: Int64) -> None:
        """Rows that are there, each once."""
        self._changed()
        self.alive[rows] = False

    def find(self, ids: IdArray) -> Int64:
        """The rows of those ids; -1 where none is there."""
        return self.ids.find(ids, self.alive)

    @property
    def placed(self) -> bool:
        """Whether rows came, which say where the gallery is."""
        return self._base is not None or self._added is not None

    @property
    def device_block(self) -> DeviceBlock:
        """The rows, which are on a device."""
        assert isinstance(self._tail, DeviceBlock)
        return self._tail

    def take(self, rows: Int64) -> Any:
        """Copies of those rows, [n, D]; on the device where the rows are there."""
        if self._tail is not None and isinstance(self._tail, DeviceBlock):
            return self._tail.take(rows)
        if not len(rows):
            return np.empty((0, self.dim or 0), self.dtype or np.float32)
        return take(self.blocks, rows)

    def pieces(self) -> Iterator[Any]:
        """The rows that are there, in order, some megabytes at a time."""
        start = 0
        for block in self.blocks:
            for piece in block.pieces():
                alive = self.alive[start : start + len(piece)]
                yield piece if alive.all() else piece[alive]
                start += len(piece)

    def rows_at(self) -> Int64:
        """The row at each position, [count]."""
        return np.arange(self.rows) if self.complete else self._numbering()[0]

    def positions(self, rows: Int64) -> Int64:
        """The position of each row; negative ones stay."""
        return rows if self.complete else np.where(rows < 0, rows, self._numbering()[1][rows])

    def by_row(self, mask: Bool) -> Bool:
        """A mask over positions [..., count] as one over rows, False for those removed."""
        if self.complete:
            return mask
        wide = np.zeros((*mask.shape[:-1], self.rows), bool)
        wide[..., self.rows_at()] = mask
        return wide

    def _numbering(self) -> tuple[Int64, Int64]:
        if self._numbers is None:
            self._numbers = np.flatnonzero(self.alive), np.cumsum(self.alive) - 1
        return self._numbers

    def _changed(self) -> None:
        self._count = self._numbers = None
        self.version += 1
