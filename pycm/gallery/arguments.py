"""What callers pass to a gallery, as NumPy arrays, or tensors of its device; and results as what they passed."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._device import device_of, dtype_name, is_tensor, on_host, to_device
from .._optional import require
from ..functional import METRICS, _as_mask, _as_numpy, _like
from .device import DeviceFilter, tables
from .ids import NO_ID, IdArray, as_ids, check_unicode, name_some, without_repeats
from .metadata import as_table
from .search import Filter
from .storage import dtype_of
from .store import Store

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]
DTYPES = ("float32", "float16", "bfloat16", "float64")
_SCREENS = ("auto", "float32", "bfloat16", "int8")


def check_names(metric: str, screen: str, dtype: str | None) -> None:
    for name, value, known in (("metric", metric, METRICS), ("screen", screen, _SCREENS)):
        if value not in known:
            raise ValueError(f"Gallery: {name} must be one of {', '.join(known)}, got {value!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"Gallery: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def as_device(function: str, device: Any) -> Any:
    """A CUDA device, with its number; None for the CPU."""
    if str(device) == "cpu":
        return None
    torch = require("torch", "torch", f"{function} to {device}")
    wanted = torch.device(device)
    if wanted.type != "cuda":
        raise ValueError(f"{function}: device must be cpu or a CUDA device, got {device}")
    return torch.device("cuda", torch.cuda.current_device() if wanted.index is None else wanted.index)


def as_rows(function: str, argument: str, letter: str, array: Any, store: Store) -> Any:
    """Embeddings [n, D] as a NumPy array of the same memory where that can be; on a CUDA device as a tensor.

    Raises:
        TypeError: not floating point, or no array.
        ValueError: another shape than [n, D of the store], or another device than that of its rows.
        NotImplementedError: neither on the CPU nor on a CUDA device.
    """
    device, dim = device_of(array), store.dim
    if store.placed and device != store.device:
        raise ValueError(
            f"{function}: {argument} must be on the gallery's device {store.device or 'cpu'}, got {device or 'cpu'}"
        )
    if device is not None:
        rows = array.detach().resolve_neg()
    else:
        rows = _from_tensor(function, argument, array) if is_tensor(array) else _as_numpy(function, argument, array)
    if _dtype_name(rows) not in DTYPES:
        raise TypeError(f"{function}: {argument} must be one of {', '.join(DTYPES)}, got {_dtype_name(rows)}")
    if rows.ndim != 2 or rows.shape[1] == 0 or dim not in (None, rows.shape[1]):
        raise ValueError(f"{function}: {argument} must have shape [{letter}, {dim or 'D'}], got {list(rows.shape)}")
    if device is not None:
        return rows
    # Files, and the encoding, hold the machine's byte order.
    return rows if rows.dtype.isnative else rows.astype(rows.dtype.newbyteorder("="))


def _dtype_name(rows: Any) -> str:
    return dtype_name(rows) if is_tensor(rows) else str(rows.dtype.name)


def _from_tensor(function: str, argument: str, tensor: Any) -> Array:
    torch = sys.modules["torch"]
    if tensor.device.type != "cpu":
        raise NotImplementedError(f"{function}: {argument} must be on the CPU or a CUDA device, got {tensor.device}")
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy has it from ml_dtypes alone
        words = tensor.view(torch.int16).numpy()
        return np.asarray(words.view(require("ml_dtypes", "gallery", f"{function} of bfloat16 tensors").bfloat16))
    return np.asarray(tensor.numpy())


def like(result: Any, queries: Any) -> Any:
    """`result` as the queries' kind of array, on their device; strings stay NumPy."""
    if result is None or result.dtype == object or is_tensor(result):
        return result
    if is_tensor(queries):
        return sys.modules["torch"].from_numpy(result).to(queries.device)
    return _like(result, queries)


def threads_of(queries: Any) -> int:
    """torch's number of threads for tensors; 0, the library's own, for others."""
    return int(sys.modules["torch"].get_num_threads()) if is_tensor(queries) else 0


def as_mask(function: str, mask: Any, queries: int, count: int) -> npt.NDArray[np.bool_]:
    """Booleans [M] or [N, M]."""
    array = _as_mask(function, mask)
    return np.asarray(_check_mask(function, array, str(array.dtype), queries, count))


def _check_mask(function: str, mask: Any, dtype: str, queries: int, count: int) -> Any:
    if dtype != "bool":
        raise TypeError(f"{function}: mask must hold booleans, got {dtype}")
    if tuple(mask.shape) not in ((count,), (queries, count)):
        raise ValueError(f"{function}: mask must have shape [{count}] or [{queries}, {count}], got {list(mask.shape)}")
    return mask


class IdLists(NamedTuple):
    """Some ids for each query: those of query i from offsets[i] to offsets[i + 1].

    Attributes:
        single: whether they came as one for each query.
    """

    ids: IdArray
    offsets: Int64
    single: bool


def as_id_lists(function: str, argument: str, value: Any, queries: int, *, optional: bool) -> IdLists:
    """One id for each query (None or -1 for none, where `optional`), a list of ids for each, or (offsets, ids)."""
    value = on_host(value)
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ValueError(f"{function}: {argument} must be a pair (offsets, ids), got {len(value)} items")
        offsets, ids = np.asarray(value[0]), as_ids(function, argument, value[1])
        if offsets.dtype.kind not in "iu" or offsets.shape != (queries + 1,):
            raise ValueError(
                f"{function}: {argument} must have integer offsets [{queries + 1}], "
                f"got {offsets.dtype} {list(offsets.shape)}"
            )
        if offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
            raise ValueError(f"{function}: {argument} must have offsets that rise from 0 to {len(ids)}")
        return IdLists(ids, offsets.astype(np.int64), False)
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise TypeError(f"{function}: {argument} must be a sequence of ids, got {type(value).__name__}")
    if len(value) != queries:
        raise ValueError(f"{function}: {argument} must be for {queries} queries, got {len(value)}")
    if isinstance(value, list) and any(isinstance(item, set) or np.ndim(item) for item in value):
        lists = [_items(function, argument, item) for item in value]
        flat = as_ids(function, argument, [one for item in lists for one in item])
        return IdLists(flat, np.cumsum([0, *map(len, lists)], dtype=np.int64), False)
    present = np.ones(queries, bool)
    if optional:
        items = value.tolist() if hasattr(value, "tolist") else list(value)
        present = np.array([item is not None and item != NO_ID for item in items], bool)
        value = [item for item, kept in zip(items, present.tolist(), strict=True) if kept]
    return IdLists(as_ids(function, argument, value), np.concatenate([[0], np.cumsum(present)]).astype(np.int64), True)


def _items(function: str, argument: str, ids: Any) -> list[Any]:
    """The ids of one query."""
    if ids is None:
        return []
    if not isinstance(ids, set) and np.ndim(ids) != 1:
        raise TypeError(f"{function}: {argument} must be a list of ids for each query, got {type(ids).__name__}")
    return list(ids.tolist() if hasattr(ids, "tolist") else ids)


def as_queries(function: str, queries: Any, store: Store) -> Any:
    """Queries [N, D] that may be searched for in the store, which has rows."""
    rows = as_rows(function, "queries", "N", queries, store)
    if not store.count:
        raise ValueError(f"{function}: the gallery must have rows, and has none")
    if store.dtype is not None and _dtype_name(rows) != store.dtype.name:
        raise TypeError(f"{function}: queries must be {store.dtype}, as the gallery is, got {_dtype_name(rows)}")
    return rows


def rows_of(function: str, argument: str, store: Store, ids: IdArray) -> Int64:
    """The rows of those ids. KeyError names those that are not there."""
    store.ids.check_kind(function, argument, ids)
    rows = store.find(ids)
    if (rows < 0).any():
        raise KeyError(f"{function}: {argument} must be in the gallery, not there: {name_some(ids[rows < 0])}")
    return rows


def as_batch(
    function: str, store: Store, embeddings: Any, ids: Any, metadata: Any, converts: bool
) -> tuple[IdArray, Any, Any]:
    """Ids, rows and a table, or None, that may be added to the store."""
    rows = as_rows(function, "embeddings", "n", embeddings, store)
    wanted = dtype_of(_dtype_name(rows)) if store.dtype is None else store.dtype
    if _dtype_name(rows) != wanted.name and not converts:
        raise TypeError(f"{function}: embeddings must be {wanted}, as the gallery is, got {_dtype_name(rows)}")
    if device_of(rows) is None:
        rows = np.ascontiguousarray(rows, wanted)
    else:
        rows = rows.to(getattr(sys.modules["torch"], wanted.name))
    names = new_ids(function, store, ids, len(rows))
    table = None if metadata is None else as_table(function, metadata, len(rows))
    if table is not None:
        store.metadata.check(function, table)
    return names, rows, table


def new_ids(function: str, store: Store, ids: Any, count: int) -> IdArray:
    """The ids of `count` rows to add: those given, or integers that were never there."""
    if ids is None:
        if store.ids.kind == "str":
            raise ValueError(f"{function}: ids must be given, since the gallery's are strings")
        if store.ids.next_id + count > 2**63 - 1:
            raise ValueError(f"{function}: ids must be given, since the highest integer is taken")
        return np.arange(store.ids.next_id, store.ids.next_id + count, dtype=np.int64)
    names = as_ids(function, "ids", ids)
    if len(names) != count:
        raise ValueError(f"{function}: ids must be {count}, one for each row, got {len(names)}")
    store.ids.check_kind(function, "ids", names)
    check_unicode(function, names)
    there = store.find(without_repeats(function, names)) >= 0
    if there.any():
        raise ValueError(f"{function}: ids must be new, already there: {name_some(names[there])}")
    return names


def as_filter(function: str, store: Store, queries: int, mask: Any, ids: Any, where: Any, exclude: Any) -> Filter:
    """Which rows each of so many queries may match: those that are there and that everything given allows."""
    allowed = [] if store.complete else [store.alive]
    if mask is not None:
        allowed.append(store.by_row(as_mask(function, mask, queries, store.count)))
    if ids is not None:
        listed = np.zeros(store.rows, bool)
        listed[rows_of(function, "ids", store, as_ids(function, "ids", ids))] = True
        allowed.append(listed)
    if where is not None:
        allowed.append(store.metadata.where(function, where))
    merged = None
    for one in allowed:
        merged = one if merged is None else merged & one
    if exclude is None:
        return Filter(merged, None)
    lists = as_id_lists(function, "exclude", exclude, queries, optional=True)
    store.ids.check_kind(function, "exclude", lists.ids)
    rows = store.find(lists.ids)
    kept = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows >= 0)])
    return Filter(merged, (kept[lists.offsets], rows[rows >= 0]))


def as_device_filter(
    function: str, store: Store, queries: int, mask: Any, ids: Any, where: Any, exclude: Any
) -> DeviceFilter:
    """The same for a store whose rows are on a device, where a mask may be too."""
    there = None
    if mask is not None and device_of(mask) is not None:
        if mask.device != store.device:
            raise ValueError(f"{function}: mask must be on the gallery's device {store.device}, got {mask.device}")
        there, mask = _check_mask(function, mask, str(mask.dtype).removeprefix("torch."), queries, store.count), None
    host = as_filter(function, store, queries, mask, ids, where, exclude)
    allowed = None
    if mask is not None or ids is not None or where is not None:
        allowed = to_device(host.mask, store.device)
    elif not store.complete:
        allowed = tables(store).alive
    if there is not None and not store.complete:  # removed rows have any position; they are not in `allowed`
        there = there[..., tables(store).positions[:-1]]
    if allowed is None or there is None:
        return DeviceFilter(there if allowed is None else allowed, host.exclude)
    return DeviceFilter(allowed & there, host.exclude)
