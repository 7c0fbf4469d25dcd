"""Rows of a gallery on a CUDA device: kept, encoded and searched there.

Ids, metadata and what was removed stay in the host's memory; the device has copies of what a search asks of them. Rows
never leave it, but by `Gallery.to`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from .search import Filter
from .storage import dtype_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .store import Store

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]
T = TypeVar("T")

_DEVICES: tuple[str, ...] = ("cuda",)  # for tests/simt the CPU's tensors are on a device too
_PIECE_BYTES = 256 << 20


def is_tensor(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def device_of(array: Any) -> Any:
    """The CUDA device that an array is on; None for the host's memory, and for what is no tensor."""
    return array.device if is_tensor(array) and array.device.type in _DEVICES else None


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def to_device(array: Array, device: Any) -> Tensor:
    """A host array, copied to the device."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(np.array(array)).to(device)


def to_host(tensor: Tensor) -> Array:
    """A tensor of any device as a host array."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.cpu().view(torch.int16).numpy().view(dtype_of("bfloat16")))
    return np.asarray(tensor.cpu().numpy())


def moved(rows: Any, device: Any) -> Any:
    """Rows of the host or of a device on another; None is the host."""
    if device is None:
        return to_host(rows) if is_tensor(rows) else rows
    return rows.to(device) if is_tensor(rows) else to_device(rows, device)


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
        from .._torch_cuda import EncodedGallery

        self._rows = rows
        self._encoded = EncodedGallery(metric)
        self._encoding = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: Int64) -> Tensor:
        return self._rows.values[to_device(rows, self._rows.values.device)]

    def pieces(self, size: int = _PIECE_BYTES) -> Iterator[Tensor]:
        values = self._rows.values
        step = max(1, size // (values.element_size() * values.shape[1]))
        for start in range(0, len(values), step):
            yield values[start : start + step]

    def search(self, function: Callable[[int, int, Any], T]) -> Iterator[T]:
        yield function(0, len(self), self.encoded())

    def encoded(self) -> HostResults:
        """For the searches of `search.py`, which work on host arrays."""
        return HostResults(self.tensors())

    def tensors(self) -> Any:
        with self._encoding:
            if len(self._encoded) < len(self):
                self._encoded.extend(self._rows.values)
            return self._encoded


class HostResults:
    """An encoded gallery on a device whose results, and excluded rows, are arrays of the host."""

    def __init__(self, encoded: Any) -> None:
        self._encoded = encoded

    def topk(
        self, queries: Tensor, k: int, mask: Any, excluded: Any, offsets: Any, *, precision: str, num_threads: int
    ) -> tuple[Array, Int64]:
        exclude = compressed(excluded, offsets, queries.device)
        scores, rows = self._encoded.topk(queries, k, mask, *exclude, precision)
        return to_host(scores), to_host(rows)

    def rank(
        self,
        queries: Tensor,
        positives: Int64,
        offsets: Int64,
        mask: Any,
        excluded: Any,
        excluded_offsets: Any,
        *,
        num_threads: int,
    ) -> tuple[Array, ...]:
        some = compressed(positives, offsets, queries.device)
        exclude = compressed(excluded, excluded_offsets, queries.device)
        return tuple(to_host(part) for part in self._encoded.rank(queries, *some, mask, *exclude))


def compressed(rows: Int64 | None, offsets: Int64 | None, device: Any) -> tuple[Any, Any]:
    """Compressed rows on the device, or twice None."""
    return (None, None) if rows is None or offsets is None else (to_device(rows, device), to_device(offsets, device))


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
    return kept


def topk(store: Store, queries: Tensor, k: int, allowed: Filter, precision: str) -> tuple[Tensor, Any, Tensor]:
    """Scores, ids and positions, where ids rise and so order ties as rows do. Waits for nothing but string ids."""
    known = tables(store)
    excluded = allowed.exclude or (None, None)
    exclude = compressed(excluded[1], excluded[0], queries.device)
    scores, rows = store.device_block.tensors().topk(queries, k, allowed.mask, *exclude, precision)
    ids = store.ids.take(to_host(rows)) if known.ids is None else known.ids[rows]
    return scores, ids, rows if known.positions is None else known.positions[rows]
