"""Rows of a gallery on a CUDA device: kept, encoded and searched there.

Ids, metadata and what was removed stay in the host's memory; the device has copies of what a search asks of them. Rows
never leave it, but by `Gallery.to`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from .._device import compressed, to_device, to_host
from .search import Filter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .._torch_cuda_encoded import EncodedGallery, HostResults
    from .store import Store

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]
T = TypeVar("T")

_PIECE_BYTES = 256 << 20


class DeviceRows:
    """A tensor that rows are appended to; `blocks.Growable` on a device."""

    def __init__(self, dtype: np.dtype[Any], dim: int, device: torch.device, room: int = 0) -> None:
        import torch

        self._data = torch.empty((room, dim), dtype=getattr(torch, dtype.name), device=device)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def values(self) -> Tensor:
        return self._data[: self._count]

    def append(self, rows: Tensor) -> None:
        from .._torch_cuda import wait_for

        count = self._count + len(rows)
        if count > len(self._data):
            grown = self._data.new_empty((max(2 * len(self._data), count), self._data.shape[1]))
            grown[: self._count] = self.values
            self._data = grown
        self._data[self._count : count] = rows
        wait_for(self._data)  # a search may come on another stream
        self._count = count

    def truncate(self, count: int) -> None:
        self._count = count


class DeviceFilter(Filter):
    """`mask` is a tensor on the device. A gallery there is one block, whose part is all of it."""

    def part(self, start: int, stop: int) -> Filter:
        return self


class DeviceBlock:
    """Rows on a device, encoded at the first search after they came."""

    def __init__(self, metric: str, rows: DeviceRows) -> None:
        from .._torch_cuda_encoded import EncodedGallery

        self._rows = rows
        self._encoded = EncodedGallery(metric)
        self._encoding = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: Int64) -> Tensor:
        values = self._rows.values
        _in_use(values)
        return values[to_device(rows, values.device)]

    def pieces(self, size: int = _PIECE_BYTES) -> Iterator[Tensor]:
        values = self._rows.values
        _in_use(values)
        step = max(1, size // (values.element_size() * values.shape[1]))
        for start in range(0, len(values), step):
            yield values[start : start + step]

    def search(self, function: Callable[[int, int, Any], T]) -> Iterator[T]:
        yield function(0, len(self), self.encoded())

    def encoded(self) -> HostResults:
        """For the searches of `search.py`, which work on host arrays."""
        from .._torch_cuda_encoded import HostResults

        return HostResults(self.tensors())

    def tensors(self) -> EncodedGallery:
        with self._encoding:
            if len(self._encoded) < len(self):
                self._encoded.extend(self._rows.values)
            return self._encoded


class _Tables(NamedTuple):
    """What a search on the device asks of the ids and of what was removed; of one version of the store."""

    version: int
    alive: Any  # [rows] booleans; None where every row is there
    positions: Any  # [rows + 1]; None likewise. The last one is of row -1
    ids: Any  # [rows + 1] int64; None where ids are strings


def tables(store: Store) -> _Tables:
    """Uploaded at the first search after a change."""
    from .._torch_cuda import wait_for

    kept: _Tables | None = store.tables
    if kept is None or kept.version != store.version:
        alive = positions = ids = None
        if not store.complete:
            alive = to_device(store.alive, store.device)
            positions = to_device(np.append(np.cumsum(store.alive) - 1, -1), store.device)
        if store.ids.kind == "int64":
            ids = to_device(store.ids.take(np.append(np.arange(store.rows), -1)), store.device)
        for table in (alive, positions, ids):
            if table is not None:
                wait_for(table)
        kept = store.tables = _Tables(store.version, alive, positions, ids)
    for table in (kept.alive, kept.positions, kept.ids):
        _in_use(table)
    return kept


def _in_use(tensor: Tensor | None) -> None:
    """Its memory outlives what the current stream does with it, though the gallery let go of it meanwhile."""
    if tensor is not None and tensor.is_cuda:
        import torch

        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def topk(store: Store, queries: Tensor, k: int, allowed: Filter, precision: str) -> tuple[Tensor, Any, Tensor]:
    """Scores, ids and positions, where ids rise and so order ties as rows do. Waits for nothing but string ids."""
    known = tables(store)
    excluded = allowed.exclude or (None, None)
    exclude = compressed(excluded[1], excluded[0], queries.device)
    scores, rows = store.device_block.tensors().topk(queries, k, allowed.mask, *exclude, precision)
    ids = store.ids.take(to_host(rows)) if known.ids is None else known.ids[rows]
    return scores, ids, rows if known.positions is None else known.positions[rows]
