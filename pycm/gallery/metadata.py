"""Metadata columns, one row for each embedding, as Arrow tables; filters are pyarrow.compute expressions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._optional import require

Buffer = bytes | memoryview | npt.NDArray[np.uint8]


def _arrow(module: str = "pyarrow") -> Any:
    return require(module, "gallery", "Gallery metadata")


def as_table(function: str, metadata: Any, rows: int) -> Any:
    """`metadata` as a pyarrow.Table of `rows` rows; None where it has no columns.

    Raises:
        TypeError: neither a table, nor a dict of columns, nor anything that Arrow reads.
        ValueError: another number of rows.
    """
    arrow = _arrow()
    if not isinstance(metadata, (arrow.Table, arrow.RecordBatch, dict)) and not hasattr(metadata, "__arrow_c_stream__"):
        raise TypeError(
            f"{function}: metadata must be a pyarrow.Table, a dict of columns or an Arrow stream, "
            f"got {type(metadata).__name__}"
        )
    try:
        table = arrow.table(metadata)
    except (arrow.ArrowInvalid, arrow.ArrowTypeError, arrow.ArrowNotImplementedError) as error:
        raise ValueError(f"{function}: metadata cannot be read as a table: {error}") from error
    if not table.num_columns:
        return None
    if table.num_rows != rows:
        raise ValueError(f"{function}: metadata must have {rows} rows, got {table.num_rows}")
    return table


class Metadata:
    """The columns of all rows ever added since the file was written.

    They are kept as Arrow IPC bytes until someone asks for them: a file with metadata opens without pyarrow, and at
    once. Rows that came without have nulls.
    """

    def __init__(self, base: Buffer | None = None, rows: int = 0) -> None:
        self._base: Any = base  # bytes, then a table
        self._base_rows = rows
        self._tail: list[tuple[int, Any]] = []  # (rows, bytes or table or None)
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    @property
    def empty(self) -> bool:
        """Whether no row ever had metadata."""
        return self._base is None and all(table is None for _, table in self._tail)

    def check(self, function: str, table: Any) -> None:
        """Raise ValueError where `table` does not go under the columns that are there."""
        try:
            _concat([self.table().slice(0, 0), table.slice(0, 0)])
        except (_arrow().ArrowInvalid, _arrow().ArrowTypeError) as error:
            raise ValueError(f"{function}: metadata does not fit the columns that are there: {error}") from error

    def append(self, rows: int, table: Buffer | Any | None) -> None:
        """`rows` rows: a table, its IPC bytes, or None."""
        self._tail.append((rows, table))
        self._rows += rows

    def truncate(self, rows: int) -> None:
        """Forget the rows from `rows` on, which came last."""
        while self._base_rows + sum(count for count, _ in self._tail) > rows:  # an append may have been cut off
            self._tail.pop()
        self._rows = rows

    def table(self) -> Any:
        """The columns of every row, a pyarrow.Table."""
        base, tail = self._base, self._tail
        if self.empty:
            return _nulls(self._rows)
        base = _nulls(self._base_rows) if base is None else _decode(base)
        table = _concat([base, *(_nulls(rows) if part is None else _decode(part) for rows, part in tail)])
        if len(tail) > 1:  # many small additions become one, once
            added = table.slice(self._base_rows).combine_chunks()
            self._tail, table = [(added.num_rows, added)], _concat([base, added])
        self._base = None if self._base is None else base
        return table

    def where(self, function: str, expression: Any) -> npt.NDArray[np.bool_]:
        """Which rows the expression is true for, [rows]; null counts as false."""
        if self.empty:
            raise ValueError(f"{function}: where needs metadata, and this gallery has none")
        arrow, dataset = _arrow(), _arrow("pyarrow.dataset")
        if not isinstance(expression, _arrow("pyarrow.compute").Expression):
            raise TypeError(
                f'{function}: where must be a pyarrow.compute expression such as pyarrow.compute.field("year") > 2000, '
                f"got {type(expression).__name__}"
            )
        table = self.table()
        number = "row"
        while number in table.column_names:
            number += "_"
        numbered = table.append_column(number, arrow.array(np.arange(len(self))))
        try:
            found = dataset.dataset(numbered).scanner(columns=[number], filter=expression).to_table()
        except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError, arrow.ArrowKeyError, arrow.ArrowTypeError) as error:
            names = ", ".join(table.column_names) or "none"
            raise ValueError(f"{function}: where cannot be evaluated on the columns ({names}): {error}") from error
        allowed = np.zeros(len(self), bool)
        allowed[found.column(number).to_numpy()] = True
        return allowed

    def take(self, rows: npt.NDArray[Any]) -> Any:
        """The table of those rows: positions, or a boolean for each row."""
        arrow, table = _arrow(), self.table()
        return table.filter(arrow.array(rows)) if rows.dtype == bool else table.take(arrow.array(rows))


def _nulls(rows: int) -> Any:
    """A table of no columns."""
    arrow = _arrow()
    return arrow.table({"": arrow.nulls(rows)}).select([])


def _concat(tables: list[Any]) -> Any:
    return _arrow().concat_tables(tables, promote_options="default")


def encode_table(table: Any) -> bytes:
    """An Arrow IPC stream."""
    arrow = _arrow()
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _decode(table: Any) -> Any:
    arrow = _arrow()
    if isinstance(table, arrow.Table):
        return table
    return arrow.ipc.open_stream(arrow.py_buffer(table)).read_all()
