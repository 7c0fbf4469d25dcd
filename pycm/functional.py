"""Scores and matches: the functions most users need."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from pycm import _C

if TYPE_CHECKING:
    import torch

    Array: TypeAlias = npt.NDArray[Any] | torch.Tensor
    A = TypeVar("A", npt.NDArray[Any], torch.Tensor)

Metric: TypeAlias = Literal["dot", "cosine", "pearson", "euclidean", "sqeuclidean"]
Precision: TypeAlias = Literal["exact", "fast"]
Screen: TypeAlias = Literal["auto", "float32", "bfloat16", "int8"]

METRICS: tuple[Metric, ...] = ("dot", "cosine", "pearson", "euclidean", "sqeuclidean")
DISTANCES: tuple[Metric, ...] = ("euclidean", "sqeuclidean")


class Matches(NamedTuple):
    """The best matches of each query, best first.

    Attributes:
        scores: ``[N, k]``, float32 (float64 for float64 inputs); distances, smallest first, for distance
            metrics.
        indices: ``[N, k]`` int64 rows of the gallery; -1 where fewer than k rows could match, with score -inf
            (+inf for a distance).
    """

    scores: Any
    indices: Any


# What Matches(...) does, without the call of a Python function.
_new = tuple.__new__

# Set by pycm._torch_ops once tensors have come: whether two arguments are tensors of which nothing but the values is
# asked for, and torch's number of threads. Asking here saves a small product two calls.
_direct_tensors: Any = None
_torch_threads: Any = None


def similarity(x: A, y: A, metric: Metric = "cosine", *, out: A | None = None) -> A:
    """Every score of ``x`` against ``y``.

    Args:
        x: ``[..., N, D]`` float32, float16, bfloat16 or float64; torch tensor, NumPy array (bfloat16 of
            ml_dtypes) or anything in CPU memory with DLPack (but bfloat16, which NumPy does not read from it). Any
            strides: rows are read where they lie.
        y: ``[..., M, D]``, of x's dtype and kind. Batch axes broadcast.
        metric: ``dot``, ``cosine``, ``pearson`` (larger is better), ``euclidean`` or ``sqeuclidean`` (smaller
            is). Cosine with a zero row, and Pearson with a constant row, are 0.
        out: where to write the result: contiguous, of its kind, dtype and shape, apart from x and y. A large result
            written into memory that is in use already costs less than one in fresh memory. No gradient then.

    Returns:
        ``[..., N, M]``, float32 (float64 for float64 inputs), of x's kind and device. Distances that cancel are
        evaluated again from differences, so identical rows are exactly 0 apart.

    Raises:
        TypeError: for an array of integers, differing dtypes, or no array.
        ValueError: for shapes that do not fit, or an unknown metric.
        NotImplementedError: for a tensor with a forward-mode tangent, or on a device that the build has no kernels for.

    Differentiable (in backward mode, twice and more) in both inputs for torch tensors. O(N·M·D) time; beside the
    result it keeps a packed copy of at most 4096 rows of x and a few cache-sized blocks of y.
    """
    if type(x) is np.ndarray and type(y) is np.ndarray:
        return _C.similarity(x, y, metric, 0, out)  # type: ignore[no-any-return]
    if _direct_tensors is not None and _direct_tensors(x, y):
        return _C.similarity(x, y, metric, _torch_threads(), out)  # type: ignore[no-any-return]
    return _similarity(x, y, metric, out)  # type: ignore[no-any-return]


def topk(
    queries: A,
    gallery: A,
    k: int,
    metric: Metric = "cosine",
    *,
    mask: Any = None,
    exclude: Any = None,
    precision: Precision = "exact",
    screen: Screen = "auto",
) -> Matches:
    """The k best rows of the gallery for each query, without the N×M matrix.

    Args:
        queries: ``[N, D]`` float32, float16, bfloat16 or float64; torch, NumPy or DLPack.
        gallery: ``[M, D]``, M >= 1, of the same dtype and kind.
        k: from 1 to M.
        metric: ``dot``, ``cosine``, ``pearson``, ``euclidean`` or ``sqeuclidean``.
        mask: booleans ``[M]`` or ``[N, M]``, an array or a list; only pairs where it is true may match.
        exclude: rows of the gallery a query must not match, such as itself or its known positives: an int array
            ``[N]`` (-1 for none), or several per query: a list of N sequences, or compressed rows, which are a pair
            ``(offsets [N + 1], indices)``, a SciPy or a torch CSR matrix ``[N, M]`` whose stored entries are excluded.
        precision: ``exact``: the score of a pair is its fp64 value in a fixed order of operations, rounded to
            fp32 (not rounded for float64 inputs); matches are ordered by score, then by index, lowest first. The
            same bits come out for any batch size, thread count and processor. ``fast``: the screen's own scores,
            within its bound of docs/exactness.md.
        screen: the low-precision pass that proposes candidates: ``float32``, ``bfloat16``, ``int8``, or ``auto``: what
            is quickest on this processor for these sizes, changed for a finer one where its bound leaves too many pairs
            undecided (float32 for ``precision="fast"``). It never changes an exact result, only its time.

    Returns:
        ``Matches(scores [N, k], indices [N, k])``. A NaN score is never a match.

    Raises:
        TypeError: for integer arrays, differing dtypes, or no array.
        ValueError: for shapes that do not fit, k outside [1, M], an empty gallery, or an index outside it.
        NotImplementedError: for a tensor with a forward-mode tangent, or on a device that the build has no kernels for.

    A call does not wait for a CUDA device, where an index outside the gallery fails a device-side assertion. The scores
    are differentiable for torch tensors, in backward mode. O(N·M·D) time, O((N + M)·D + N·k) memory; see
    `workspace_bytes`.
    """
    if mask is None and exclude is None:
        if type(queries) is np.ndarray and type(gallery) is np.ndarray:
            return _new(Matches, _C.topk(queries, gallery, k, metric, precision, None, None, None, screen))
        if _direct_tensors is not None and _direct_tensors(queries, gallery):
            threads = _torch_threads()
            return _new(Matches, _C.topk(queries, gallery, k, metric, precision, None, None, None, screen, threads))
    return _topk(queries, gallery, k, metric, mask, exclude, precision, screen)


def workspace_bytes(
    queries: int, gallery: int, dim: int, k: int, device: str | torch.device = "cpu", *, prepared: bool = False
) -> int:
    """Bytes of scratch that `topk` takes beyond its inputs and outputs, for these sizes and the threads set.

    An upper bound but for rows in a strided or half-precision layout, which are converted a panel at a time. On a CUDA
    device (``"cuda"``, ``"cuda:1"``, a torch.device) it is the most of any metric and dtype, for dense rows, and comes
    from torch's caching allocator. `prepared`: in a `Gallery`, which keeps its encoding; no less on the CPU.
    """
    if str(device).startswith("cuda"):
        import torch

        from pycm import _torch_cuda

        return _torch_cuda.workspace_bytes(queries, gallery, dim, k, torch.device(device), prepared)
    if str(device) != "cpu":
        raise ValueError(f"workspace_bytes: device must be cpu or a CUDA device, got {device}")
    return int(_C.topk_workspace_bytes(queries, gallery, dim, k))


def set_num_threads(count: int) -> None:
    """Use `count` threads for CPU kernels; 0 returns to the default.

    The environment variable ``PYCM_NUM_THREADS`` wins over this. Without either, torch tensors use
    ``torch.get_num_threads()`` and NumPy arrays every processor this process may run on.
    """
    _C.set_num_threads(count)


# ---- other kinds of arrays ----


def _both_torch(function: str, a_name: str, a: Any, b_name: str, b: Any) -> bool:
    """Whether both are torch tensors; an error when only one is."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    a_torch, b_torch = isinstance(a, torch.Tensor), isinstance(b, torch.Tensor)
    if a_torch != b_torch:
        raise TypeError(
            f"{function}: {a_name} and {b_name} must be of one kind, got {type(a).__name__} and {type(b).__name__}"
        )
    return a_torch


# DLPack's numbers of the devices whose memory a CPU reads: CPU, and host memory pinned by CUDA or ROCm.
_HOST_DEVICES = (1, 3, 11)


def _as_numpy(function: str, name: str, array: Any) -> npt.NDArray[Any]:
    """A NumPy array of the same memory where its dtype allows."""
    if isinstance(array, np.ndarray):
        return np.asarray(array)
    if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
        raise TypeError(
            f"{function}: {name} must be a torch tensor, a NumPy array or have __dlpack__, got {type(array).__name__}"
        )
    device = int(array.__dlpack_device__()[0])
    if device not in _HOST_DEVICES:
        raise NotImplementedError(
            f"{function}: {name} is on DLPack device type {device}, and arrays through DLPack must be in CPU memory"
        )
    try:
        return np.asarray(np.from_dlpack(array))
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        # NumPy takes no bfloat16 this way, and its message names neither the argument nor the dtype.
        dtype = getattr(array, "dtype", None)
        raise TypeError(
            f"{function}: {name} must be an array that NumPy reads through DLPack, got {type(array).__name__}"
            f"{'' if dtype is None else f' of {dtype}'} ({error}); convert it to float32 or to a torch tensor"
        ) from error


def _as_mask(function: str, mask: Any) -> npt.NDArray[Any]:
    """Any array-like; whether it holds booleans is for the kernel to say."""
    if hasattr(mask, "__dlpack__") and not isinstance(mask, (np.ndarray, np.generic)):
        return _as_numpy(function, "mask", mask)
    try:
        return np.asarray(mask)
    except ValueError:
        raise ValueError(
            f"{function}: mask must be an array of booleans, got a {type(mask).__name__} of uneven rows"
        ) from None


def _like(result: npt.NDArray[Any], array: Any) -> Any:
    """`result` as the kind of array that came in."""
    namespace = None if isinstance(array, np.ndarray) else getattr(array, "__array_namespace__", None)
    return result if namespace is None else namespace().from_dlpack(result)


def _similarity(x: Any, y: Any, metric: str, out: Any) -> Any:
    if _both_torch("similarity", "x", x, "y", y):
        import pycm._torch_ops as ops  # the cheapest form of import once it is loaded

        return ops.similarity(x, y, metric, out)
    target = None if out is None else _as_numpy("similarity", "out", out)
    result = _C.similarity(_as_numpy("similarity", "x", x), _as_numpy("similarity", "y", y), metric, 0, target)
    return _like(result, x) if out is None else out


def _topk(
    queries: Any, gallery: Any, k: int, metric: str, mask: Any, exclude: Any, precision: str, screen: str
) -> Matches:
    if _both_torch("topk", "queries", queries, "gallery", gallery):
        import pycm._torch_ops as ops

        return ops.topk(queries, gallery, k, metric, mask, exclude, precision, screen)
    q, g = _as_numpy("topk", "queries", queries), _as_numpy("topk", "gallery", gallery)
    indices, offsets = None, None
    if exclude is not None:
        indices, offsets = _exclude_rows("topk", exclude, *_sizes("topk", q, g))
    scores, found = _C.topk(
        q,
        g,
        k,
        metric,
        precision,
        None if mask is None else _as_mask("topk", mask),
        indices,
        offsets,
        screen,
    )
    return Matches(_like(scores, queries), _like(found, queries))


def _int64(function: str, name: str, values: Any) -> npt.NDArray[np.int64]:
    try:
        array = np.asarray(values)
    except ValueError as error:  # of NumPy, which names no argument
        raise ValueError(f"{function}: {name} must be an array of integers, got rows of different lengths") from error
    if not array.size and not hasattr(values, "dtype"):  # an empty list
        return np.zeros(array.shape, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{function}: {name} must hold integers, got {array.dtype}")
    if array.dtype == np.uint64 and array.size and int(array.max()) >= 2**63:
        raise ValueError(f"{function}: {name} must be below 2^63, got {array.max()}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _sizes(function: str, queries: Any, gallery: Any) -> tuple[int, int]:
    """N and M."""
    for name, letter, array in (("queries", "N", queries), ("gallery", "M", gallery)):
        if len(array.shape) != 2:
            raise ValueError(f"{function}: {name} must have shape [{letter}, D], got {list(array.shape)}")
    return queries.shape[0], gallery.shape[0]


def _check_shape(function: str, name: str, shape: Sequence[int], *expected: int) -> None:
    if tuple(shape) != expected:
        raise ValueError(f"{function}: {name} must have shape {list(expected)}, got {list(shape)}")


_Int64: TypeAlias = npt.NDArray[np.int64]


def _compressed_rows(function: str, name: str, value: Any, rows: int, columns: int) -> tuple[_Int64, _Int64 | None]:
    """Rows of the gallery for each query, as (indices, offsets); offsets are None where every query has one."""
    if hasattr(value, "indptr") and hasattr(value, "indices"):
        if getattr(value, "format", "csr") != "csr":
            raise TypeError(f"{function}: {name} must be in CSR format, got {value.format}")
        _check_shape(function, name, value.shape, rows, columns)
        return _int64(function, name, value.indices), _int64(function, name, value.indptr)
    if getattr(value, "is_sparse_csr", False):
        _check_shape(function, name, value.shape, rows, columns)
        return _int64(function, name, value.col_indices()), _int64(function, name, value.crow_indices())
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ValueError(f"{function}: {name} must be a pair (offsets, indices), got {len(value)} items")
        return _int64(function, name, value[1]), _int64(function, name, value[0])
    if isinstance(value, list) and any(np.ndim(row) for row in value):
        return _joined_rows(function, name, value, rows)
    indices = _int64(function, name, value)
    _check_shape(function, name, indices.shape, rows)
    return indices, None


def _joined_rows(function: str, name: str, lists: list[Any], rows: int) -> tuple[_Int64, _Int64]:
    """A list of sequences as (indices, offsets)."""
    if len(lists) != rows:
        raise ValueError(f"{function}: {name} must have a sequence for each of the {rows} queries, got {len(lists)}")
    parts = [np.zeros(0, np.int64)]
    for i, row in enumerate(lists):
        part = np.atleast_1d(_int64(function, f"{name}[{i}]", row))
        if part.ndim != 1:
            raise ValueError(f"{function}: {name}[{i}] must be one sequence, got shape {list(part.shape)}")
        parts.append(part)
    return np.concatenate(parts), np.cumsum([len(part) for part in parts], dtype=np.int64)


def _exclude_rows(function: str, exclude: Any, rows: int, columns: int) -> tuple[_Int64, _Int64]:
    """`exclude` as compressed rows (indices, offsets)."""
    indices, offsets = _compressed_rows(function, "exclude", exclude, rows, columns)
    return indices, np.arange(rows + 1, dtype=np.int64) if offsets is None else offsets
