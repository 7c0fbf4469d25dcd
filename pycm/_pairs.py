"""What the functions of pycm.mining share: their arguments, and joins streamed block by block."""

from __future__ import annotations

import importlib.util
import math
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pycm import _C
from pycm._device import device_of
from pycm._optional import require
from pycm._rows import as_numpy
from pycm.functional import DISTANCES, METRICS, _as_numpy, _both_torch, _like

Int64: TypeAlias = npt.NDArray[np.int64]
Update: TypeAlias = Callable[[int], object]

BLOCK = 4096  # queries worked on at a time
MAX_PAIRS = 1 << 22  # held at a time: 80 MB

_DTYPES = ("float32", "float16", "bfloat16", "float64")


class Pairs(NamedTuple):
    """Pairs of rows.

    Attributes:
        query_rows: int64 ``[P]``, rows of the queries.
        indices: int64 ``[P]``, rows of the gallery. Where rows are compared with each other, each unordered pair
            comes once, and its index is above its query's row.
        scores: ``[P]`` float32 (float64 for float64 inputs), exact; distances for distance metrics.
    """

    query_rows: Any
    indices: Any
    scores: Any


def stream(
    queries: Any,
    gallery: Any,
    threshold: Callable[[], float],
    metric: str,
    block: int,
    max_pairs: int,
    update: Update,
    encoded: Any = None,
) -> Iterator[tuple[int, Pairs]]:
    """Join block by block, in the order of (query, index): (queries done, the last block's pairs in NumPy).

    Without a gallery the queries are joined with each other. `threshold` is asked before every block. The arguments
    must have been checked; `encoded` are the rows of the gallery, where somebody has encoded them. Rows on a CUDA
    device are searched there, and pairs put together on the host.
    """
    begin, size, n, threads = 0, block, len(queries), threads_of(queries)
    while begin < n:
        end = min(begin + size, n)
        if encoded is None and (end < n or device_of(queries) is not None):  # there will be more calls
            encoded = encode(queries if gallery is None else gallery, metric)
        # Each unordered pair once: a block is compared with itself and with what comes after it.
        rows, after = (queries, begin) if gallery is None else (gallery, -1)
        limit = max_pairs if end - begin > 1 else max(max_pairs, len(rows))
        try:
            if encoded is None:
                found = _C.join(queries, rows, threshold(), metric, after, limit, "auto", threads)
            else:
                found = encoded.join(as_queries(queries[begin:end]), threshold(), after, limit, threads)
        except ValueError:  # more pairs than the limit, which a single row cannot have
            if end - begin == 1:
                raise
            size = (end - begin) // 2
            continue
        pairs = Pairs(*(np.asarray(part) for part in found))
        update(end - begin)
        yield end, Pairs(pairs.query_rows + begin, pairs.indices, pairs.scores)
        begin = end
        if 2 * len(pairs.scores) <= max_pairs:
            size = min(block, 2 * size)


def encode(rows: Any, metric: str) -> Any:
    """Checked rows, encoded for many searches, which take their queries through `as_queries`."""
    if device_of(rows) is not None:
        from pycm._torch_cuda_encoded import EncodedGallery, HostResults

        there = EncodedGallery(metric)
        there.extend(rows)
        return HostResults(there)
    encoded = _C.EncodedGallery(metric)
    encoded.extend(as_numpy(rows), threads_of(rows))
    return encoded


def as_queries(rows: Any) -> Any:
    """Checked rows as their encoding's searches take them: a tensor on its device, else in NumPy."""
    return as_numpy(rows) if device_of(rows) is None else rows


# ---- arguments and results ----


def check_rows(function: str, name: str, array: Any) -> Any:
    """Rows ``[N, D]`` in NumPy, or a torch tensor without its gradient, on the CPU or a CUDA device."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.device.type != "cpu" and device_of(array) is None:
            raise NotImplementedError(f"{function}: {name} must be on the CPU or a CUDA device, got {array.device}")
        rows = array.detach().resolve_neg()
    else:
        rows = _as_numpy(function, name, array)
        if not rows.dtype.isnative:
            rows = rows.astype(rows.dtype.newbyteorder("="))
    if _dtype(rows) not in _DTYPES:
        raise TypeError(f"{function}: {name} must be float32, float16, bfloat16 or float64, got {_dtype(rows)}")
    if len(rows.shape) != 2 or rows.shape[1] == 0:
        raise ValueError(f"{function}: {name} must have shape [N, D], D >= 1, got {list(rows.shape)}")
    return rows


def check_gallery(function: str, queries: Any, gallery: Any) -> Any:
    """Rows ``[M, D]``, M >= 1, that fit the queries."""
    rows = check_rows(function, "gallery", gallery)
    if _both_torch(function, "queries", queries, "gallery", rows) and rows.device != queries.device:
        raise ValueError(f"{function}: gallery must be on the queries' device {queries.device}, got {rows.device}")
    if _dtype(rows) != _dtype(queries):
        raise TypeError(f"{function}: gallery must have the queries' dtype {_dtype(queries)}, got {_dtype(rows)}")
    if rows.shape[1] != queries.shape[1] or rows.shape[0] == 0:
        raise ValueError(
            f"{function}: gallery must have at least one row of the queries' {queries.shape[1]} features, "
            f"got shape {list(rows.shape)}"
        )
    return rows


def check_metric(function: str, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"{function}: metric must be one of {', '.join(METRICS)}, got {metric!r}")


def check_number(function: str, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{function}: {name} must be a number, got {value!r}") from None
    if math.isnan(number):
        raise ValueError(f"{function}: {name} must be a number, got nan")
    return number


def check_threshold(function: str, name: str, value: Any, metric: str) -> float:
    threshold = check_number(function, name, value)
    if metric in DISTANCES and threshold < 0:
        raise ValueError(f"{function}: {name} must be a distance of at least 0, got {value}")
    return threshold


def check_count(function: str, name: str, value: Any, least: int = 1) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{function}: {name} must be an integer, got {type(value).__name__}") from None
    if count < least:
        raise ValueError(f"{function}: {name} must be at least {least}, got {count}")
    return count


def like(result: npt.NDArray[Any], array: Any) -> Any:
    """`result` as the kind of array that came in, on its device."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return torch.from_numpy(result).to(array.device)
    return _like(result, array)


def score_dtype(rows: Any) -> Any:
    return np.float64 if _dtype(rows) == "float64" else np.float32


def _dtype(rows: Any) -> str:
    return str(rows.dtype).removeprefix("torch.")


def threads_of(rows: Any) -> int:
    return 0 if isinstance(rows, np.ndarray) else sys.modules["torch"].get_num_threads()


@contextmanager
def progress_bar(total: int, function: str, progress: bool | None) -> Iterator[Update]:
    """A bar's update: None shows it on a terminal only, True always, False never."""
    if progress is False or (progress is None and importlib.util.find_spec("tqdm") is None):
        yield lambda _: None
        return
    tqdm = require("tqdm", "cli", f"{function}: progress=True").tqdm
    with tqdm(total=total, desc=function, unit="row", disable=None if progress is None else False, leave=False) as bar:
        yield bar.update
