"""A gallery's file written from batches that need not fit into memory together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .._device import device_of
from . import persist
from ._locks import overwriting, unlock
from .arguments import as_batch
from .store import Array, Store

_FUNCTION = "Gallery.create"


def write_batches(path: Path, batches: Iterable[Any], store: Store) -> None:
    """See `Gallery.create`; the store is empty, and has the dtype to convert to, or none."""
    converts = store.dtype is not None

    def rows_of(batch: Any) -> Any:
        """The rows of a batch that fits what came before; the store notes the rest of it."""
        parts = batch if isinstance(batch, tuple) else (batch,)
        if not 1 <= len(parts) <= 3:
            raise ValueError(f"{_FUNCTION}: a batch must be (embeddings, ids, metadata), got {len(parts)} items")
        embeddings, ids, metadata = (*parts, None, None)[:3]
        if device_of(embeddings) is not None:
            raise ValueError(f"{_FUNCTION}: embeddings must be in CPU memory, got {embeddings.device}")
        names, rows, table = as_batch(_FUNCTION, store, embeddings, ids, metadata, converts)
        store.dim, store.dtype = rows.shape[1], rows.dtype
        store.note(names, table)
        return rows

    converted = map(rows_of, batches)
    waiting = list(itertools.islice(converted, 1))
    if not waiting:
        raise ValueError(f"{_FUNCTION}: batches must be one or more, got none")
    dtype, row = waiting[0].dtype, waiting[0].shape[1:]

    def pieces() -> Iterator[Array]:
        yield waiting.pop()  # so that no one holds it while the next is made
        yield from converted

    with overwriting(_FUNCTION, path):
        unlock(persist.write(_FUNCTION, path, store, lambda writer: writer.write("rows", dtype, row, pieces())))
