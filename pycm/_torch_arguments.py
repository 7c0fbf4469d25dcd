"""What the torch operators take: masks and rows of any kind as tensors, and checks that need no values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pycm import _C
from pycm.functional import METRICS, _as_mask, _check_shape, _compressed_rows, _sizes

# What the operators run on; asked once, since a trace cannot call the compiled module.
_DEVICES = ("cpu", "meta", "cuda") if _C.cuda_compiled() else ("cpu", "meta")


def _to_torch(array: Any, like: Tensor) -> Tensor:
    """From NumPy, to the device of `like`; not to the default device."""
    # torch has no negative strides, and warns of memory that may not be written.
    plain = array.flags.writeable and min(array.strides, default=0) >= 0
    return torch.from_numpy(array if plain else array.copy()).to(like.device)


def _filters(
    function: str, queries: Tensor, gallery: Tensor, mask: Any, exclude: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The mask, and `exclude` as compressed rows: mask, indices, offsets."""
    if mask is not None:
        if not isinstance(mask, Tensor):
            # A trace of NumPy has neither strides nor DLPack.
            compiling = torch.compiler.is_dynamo_compiling()
            mask = torch.as_tensor(mask) if compiling else _to_torch(_as_mask(function, mask), queries)
            mask = mask.to(queries.device)
        _check_devices(function, queries=queries, mask=mask)
    if exclude is None:
        return mask, None, None
    indices, offsets = _compressed_tensors(function, "exclude", exclude, queries, gallery)
    return mask, indices, _one_each(indices) if offsets is None else offsets


def _one_each(indices: Tensor) -> Tensor:
    """The offsets of compressed rows with one index each."""
    return torch.arange(indices.shape[0] + 1, device=indices.device)


def _compressed_tensors(
    function: str, name: str, value: Any, queries: Tensor, gallery: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Rows of the gallery for each query, as (indices, offsets); offsets are None where every query has one."""
    shape = _sizes(function, queries, gallery)
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, Tensor):
            _check_devices(function, **{"queries": queries, name: part})
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
        return _integers(function, name, value[1]), _integers(function, name, value[0])
    if not isinstance(value, Tensor):
        rows, offsets = _compressed_rows(function, name, value, *shape)
        if queries.is_cuda:  # the kernel could say it only later
            _check_values(function, name, rows, offsets, shape[1], lowest=0 if name == "positives" else -1)
        return _to_torch(rows, queries), None if offsets is None else _to_torch(offsets, queries)
    if value.layout == torch.sparse_csr:
        _check_shape(function, name, value.shape, *shape)
        return value.col_indices().long(), value.crow_indices().long()
    indices = _integers(function, name, value)
    _check_shape(function, name, indices.shape, shape[0])
    return indices, None


def _check_values(function: str, name: str, rows: Any, offsets: Any, limit: int, lowest: int) -> None:
    """What the CPU's kernels check of compressed rows in NumPy."""
    wrong = rows[(rows < lowest) | (rows >= limit)]
    if wrong.size:
        none = " or -1 for none" if lowest < 0 else ""
        raise ValueError(f"{function}: {name} must be in [0, {limit}){none}, got {wrong[0]}")
    if offsets is not None and (offsets[:1] != 0 or offsets[-1:] != rows.size or (offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"{function}: {name} offsets must rise from 0 to {rows.size}")


def _integers(function: str, name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{function}: {name} must hold integers, got {_name(tensor.dtype)}")
    return tensor.long()


# ---- for tensors without values too; the kernels' own checks say the same ----


def _check_devices(function: str, **tensors: Tensor | None) -> None:
    (first_name, first), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{function}: {name} must be on {first_name}'s device {first.device}, got {tensor.device}")
    if first.device.type not in _DEVICES:
        raise NotImplementedError(
            f"{function}: {first_name} is on {first.device}, and this build has kernels for "
            f"{'the CPU and CUDA' if 'cuda' in _DEVICES else 'the CPU'} only"
        )


def _check_tangents(function: str, **tensors: Tensor) -> None:
    """Forward-mode derivatives are not implemented, and must not be lost without a word."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                f"{function}: {name} has a forward-mode tangent, and only backward-mode gradients are implemented"
            )


def _require(condition: Any, message: Callable[[], str]) -> None:
    """A ValueError, or, of symbolic sizes, an assumption of the trace."""
    torch._check_value(condition, message)  # type: ignore[no-untyped-call]


def _plain(tensor: Tensor) -> Tensor:
    """Without torch's lazy negation, which its memory does not show."""
    return tensor.detach().resolve_neg()


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_pair(function: str, names: tuple[str, str], shapes: tuple[str, str], a: Tensor, b: Tensor) -> None:
    """Devices, dtypes and features."""
    _check_devices(function, **dict(zip(names, (a, b), strict=True)))
    _check_tangents(function, **dict(zip(names, (a, b), strict=True)))
    for name, tensor in zip(names, (a, b), strict=True):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise TypeError(
                f"{function}: {name} must be float32, float16, bfloat16 or float64, got {_name(tensor.dtype)}"
            )
    for name, shape, tensor in zip(names, shapes, (a, b), strict=True):
        batches = shape.startswith("[...")
        if tensor.ndim < 2 or (tensor.ndim > 2 and not batches):
            raise ValueError(f"{function}: {name} must have shape {shape}, got {list(tensor.shape)}")
    first = "x's" if names[0] == "x" else f"the {names[0]}'"
    if a.dtype != b.dtype:
        raise TypeError(f"{function}: {names[1]} must have {first} dtype {_name(a.dtype)}, got {_name(b.dtype)}")
    dim = a.shape[-1]
    _require(
        dim == b.shape[-1],
        lambda: f"{function}: {names[1]} must have {first} {dim} features, got shape {list(b.shape)}",
    )
    _require(dim > 0, lambda: f"{function}: {names[0]} must have at least one feature, got shape {list(a.shape)}")


def _check_screen(function: str, screen: str) -> None:
    if screen not in ("auto", "float32", "bfloat16", "int8"):
        raise ValueError(f"{function}: screen must be auto, float32, bfloat16 or int8, got '{screen}'")


def _check_metric(function: str, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"{function}: metric must be one of {', '.join(METRICS)}, got '{metric}'")


def _check_filters(
    function: str, rows: Any, columns: Any, mask: Tensor | None, exclude: Tensor | None, offsets: Tensor | None
) -> None:
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{function}: mask must be a boolean array, got {_name(mask.dtype)}")
        wants = (mask.ndim in (1, 2), mask.ndim != 2 or mask.shape[0] == rows, mask.ndim and mask.shape[-1] == columns)
        for want in wants:
            _require(
                want,
                lambda: f"{function}: mask must have shape [{columns}] or [{rows}, {columns}], got {list(mask.shape)}",
            )
    if (exclude is None) != (offsets is None):
        raise ValueError(f"{function}: exclude and exclude_offsets must be given together")
    if exclude is not None and offsets is not None:
        _check_rows(function, "exclude", rows, exclude, offsets)


def _check_rows(function: str, name: str, rows: Any, indices: Tensor, offsets: Tensor) -> None:
    """Compressed rows."""
    for part_name, part in ((name, indices), (f"{name} offsets", offsets)):
        if part.dtype != torch.int64:
            raise TypeError(f"{function}: {part_name} must be an int64 array, got {_name(part.dtype)}")
        if part.ndim != 1:
            raise ValueError(f"{function}: {part_name} must be a contiguous vector, got shape {list(part.shape)}")
    _require(
        offsets.shape[0] == rows + 1,
        lambda: f"{function}: {name} must have offsets of shape [{rows + 1}], got {list(offsets.shape)}",
    )


# ---- calls that need no operator ----

# Bound once: each lookup would cost as much as the answer. Some are private to torch: where one is missing,
# nobody can tell that nothing but the values is asked for.
_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_in_transform = getattr(torch._C, "_are_functorch_transforms_active", None)
_tracing_state = getattr(torch._C, "_get_tracing_state", None)
_profiling = getattr(getattr(torch._C, "_autograd", None), "_profiler_enabled", None)
_states_known = None not in (_dispatch_modes, _in_transform, _tracing_state, _profiling) and hasattr(
    forward_ad, "_current_level"
)


def _eager() -> bool:
    """Whether torch is in no state that sees operators: no trace, transform, mode, profile or forward-mode gradient."""
    return (
        not _is_compiling()
        and _states_known
        and forward_ad._current_level < 0
        and not _dispatch_modes()  # type: ignore[misc]
        and not _in_transform()  # type: ignore[misc]
        and _tracing_state() is None  # type: ignore[misc]
        and not _profiling()  # type: ignore[misc]
    )
