"""The kernels as torch operators: `torch.ops.pycm.similarity` and `torch.ops.pycm.topk`.

They trace (`torch.compile`, `torch.export`), differentiate, and widen under autocast. A plain eager call that
needs none of that goes from `pycm.functional` straight to the kernel: the dispatcher alone would cost more than a
small product.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pycm import _C, functional
from pycm._torch_gradients import full_precision, similarity_gradients, topk_gradients
from pycm.functional import METRICS, Matches, _as_mask, _check_exclude, _exclude_rows, _rows_of

torch.library.define("pycm::similarity", "(Tensor x, Tensor y, str metric) -> Tensor")
torch.library.define(
    "pycm::topk",
    "(Tensor queries, Tensor gallery, SymInt k, str metric, Tensor? mask, Tensor? exclude, "
    "Tensor? exclude_offsets, str precision) -> (Tensor, Tensor)",
)


# ---- the functions behind pycm.similarity and pycm.topk ----


def similarity(x: Tensor, y: Tensor, metric: str, out: Tensor | None = None) -> Tensor:
    _check_devices("similarity", x=x, y=y)
    if not _is_compiling():
        _check_tangents("similarity", x=x, y=y)  # here too: in torch.func.jvp the operator is past them
    scores = cast(Tensor, torch.ops.pycm.similarity(x, y, metric))
    if out is None:
        return scores
    if scores.requires_grad:
        raise ValueError("similarity: out must be None where a gradient is wanted")
    if out.shape != scores.shape or out.dtype != scores.dtype:
        raise ValueError(
            f"similarity: out must be {_name(scores.dtype)} of shape {list(scores.shape)}, "
            f"got {_name(out.dtype)} of shape {list(out.shape)}"
        )
    return out.copy_(scores)


def topk(queries: Tensor, gallery: Tensor, k: Any, metric: str, mask: Any, exclude: Any, precision: str) -> Matches:
    _check_devices("topk", queries=queries, gallery=gallery)
    if not _is_compiling():
        _check_tangents("topk", queries=queries, gallery=gallery)
        # A k being traced is left alone: to make it an integer would be a graph for each.
        k = k if isinstance(k, torch.SymInt) else _integer_k(k)
    if mask is not None:
        if not isinstance(mask, Tensor):
            # A trace of NumPy has neither strides nor DLPack.
            mask = (
                torch.as_tensor(mask, device=queries.device) if _is_compiling() else _to_torch(_as_mask(mask), queries)
            )
        _check_devices("topk", queries=queries, mask=mask)
    indices, offsets = (None, None) if exclude is None else _exclude_tensors(exclude, queries, gallery)
    return Matches(*torch.ops.pycm.topk(queries, gallery, k, metric, mask, indices, offsets, precision))


def _integer_k(k: Any) -> int:
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"topk: k must be an integer, got {type(k).__name__}") from None
    if abs(k) >= 2**63:  # what an operator cannot take
        raise ValueError(f"topk: k must be from 1 to the gallery's rows, got {k}")
    return cast(int, k)


# Bound once: each lookup would cost as much as the answer. Some are private to torch: where one is missing,
# nobody can tell that nothing but the values is asked for.
_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_in_transform = getattr(torch._C, "_are_functorch_transforms_active", None)
_tracing_state = getattr(torch._C, "_get_tracing_state", None)
_profiling = getattr(getattr(torch._C, "_autograd", None), "_profiler_enabled", None)
_grad_enabled = torch.is_grad_enabled
_num_threads = torch.get_num_threads
_states_known = None not in (_dispatch_modes, _in_transform, _tracing_state, _profiling) and hasattr(
    forward_ad, "_current_level"
)


def _direct(a: Tensor, b: Tensor) -> bool:
    """Whether nothing but the values is asked for: no gradient, trace, transform, cast or profile."""
    return (
        not _is_compiling()
        and _states_known
        and type(a) is Tensor
        and type(b) is Tensor
        and a.is_cpu
        and b.is_cpu
        and a.dtype is b.dtype
        and not ((a.requires_grad or b.requires_grad) and _grad_enabled())
        # torch negates lazily, which its memory does not show
        and not a.is_neg()
        and not b.is_neg()
        and forward_ad._current_level < 0
        and not _dispatch_modes()  # type: ignore[misc]
        and not _in_transform()  # type: ignore[misc]
        and _tracing_state() is None  # type: ignore[misc]
        and not _profiling()  # type: ignore[misc]
    )


functional._direct_tensors = _direct
functional._torch_threads = _num_threads


def _to_torch(array: Any, like: Tensor) -> Tensor:
    """From NumPy, to the device of `like`; not to the default device."""
    # torch has no negative strides, and warns of memory that may not be written.
    plain = array.flags.writeable and min(array.strides, default=0) >= 0
    return torch.from_numpy(array if plain else array.copy()).to(like.device)


def _exclude_tensors(exclude: Any, queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """`exclude` as compressed rows (indices, offsets)."""
    shape = _rows_of("queries", "N", queries.shape), _rows_of("gallery", "M", gallery.shape)
    for part in exclude if isinstance(exclude, tuple) else (exclude,):
        if isinstance(part, Tensor):
            _check_devices("topk", queries=queries, exclude=part)
    if isinstance(exclude, tuple) and len(exclude) == 2 and all(isinstance(part, Tensor) for part in exclude):
        return _integers(exclude[1]), _integers(exclude[0])
    if not isinstance(exclude, Tensor):
        rows, offsets = _exclude_rows(exclude, *shape)
        return _to_torch(rows, queries), _to_torch(offsets, queries)
    if exclude.layout == torch.sparse_csr:
        _check_exclude(exclude.shape, *shape)
        return exclude.col_indices().long(), exclude.crow_indices().long()
    indices = _integers(exclude)
    _check_exclude(exclude.shape, shape[0])
    return indices, torch.arange(shape[0] + 1, device=exclude.device)


def _integers(exclude: Tensor) -> Tensor:
    if exclude.is_floating_point() or exclude.is_complex() or exclude.dtype == torch.bool:
        raise TypeError(f"topk: exclude must hold integers, got {_name(exclude.dtype)}")
    return exclude.long()


# ---- what the arguments must be, for tensors without values; the kernels' own checks say the same ----


def _check_devices(function: str, **tensors: Tensor | None) -> None:
    (first_name, first), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{function}: {name} must be on {first_name}'s device {first.device}, got {tensor.device}")
    if first.device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"{function}: {first_name} is on {first.device}, and this version has kernels for the CPU only"
        )


def _check_tangents(function: str, **tensors: Tensor) -> None:
    """Forward-mode derivatives are not implemented, and must not be lost without a word."""
    for name, tensor in tensors.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                f"{function}: {name} has a forward-mode tangent, and only backward-mode gradients are implemented"
            )


def _require(condition: Any, message: Callable[[], str]) -> None:
    """A ValueError, or, of symbolic sizes, an assumption of the trace."""
    torch._check_value(condition, message)  # type: ignore[no-untyped-call]


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


def _check_metric(function: str, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"{function}: metric must be one of {', '.join(METRICS)}, got '{metric}'")


def _check_filters(
    rows: Any, columns: Any, mask: Tensor | None, exclude: Tensor | None, offsets: Tensor | None
) -> None:
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"topk: mask must be a boolean array, got {_name(mask.dtype)}")
        wants = (mask.ndim in (1, 2), mask.ndim != 2 or mask.shape[0] == rows, mask.ndim and mask.shape[-1] == columns)
        for want in wants:
            _require(
                want, lambda: f"topk: mask must have shape [{columns}] or [{rows}, {columns}], got {list(mask.shape)}"
            )
    if (exclude is None) != (offsets is None):
        raise ValueError("topk: exclude and exclude_offsets must be given together")
    for name, part in (("exclude", exclude), ("exclude offsets", offsets)):
        if part is not None and part.dtype != torch.int64:
            raise TypeError(f"topk: {name} must be an int64 array, got {_name(part.dtype)}")
        if part is not None and part.ndim != 1:
            raise ValueError(f"topk: {name} must be a contiguous vector, got shape {list(part.shape)}")
    if offsets is not None:
        _require(
            offsets.shape[0] == rows + 1,
            lambda: f"topk: exclude must have offsets of shape [{rows + 1}], got {list(offsets.shape)}",
        )


# ---- CPU kernels ----


@torch.library.impl("pycm::similarity", "CPU")
def _similarity_cpu(x: Tensor, y: Tensor, metric: str) -> Tensor:
    _check_tangents("similarity", x=x, y=y)
    return cast(Tensor, _C.similarity(_plain(x), _plain(y), metric, torch.get_num_threads()))


@torch.library.impl("pycm::topk", "CPU")
def _topk_cpu(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    metric: str,
    mask: Tensor | None,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    _check_tangents("topk", queries=queries, gallery=gallery)
    return _C.topk(
        _plain(queries),
        _plain(gallery),
        k,
        metric,
        precision,
        mask,
        None if exclude is None else exclude.contiguous(),
        None if exclude_offsets is None else exclude_offsets.contiguous(),
        torch.get_num_threads(),
    )


def _plain(tensor: Tensor) -> Tensor:
    """Without torch's lazy negation, which its memory does not show."""
    return tensor.detach().resolve_neg()


# ---- shapes without values ----


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("pycm::similarity")  # type: ignore[untyped-decorator]
def _similarity_fake(x: Tensor, y: Tensor, metric: str) -> Tensor:
    _check_pair("similarity", ("x", "y"), ("[..., N, D]", "[..., M, D]"), x, y)
    _check_metric("similarity", metric)
    try:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"similarity: batch axes of x {list(x.shape)} and y {list(y.shape)} do not broadcast"
        ) from None
    return x.new_empty((*batch, x.shape[-2], y.shape[-2]), dtype=_score_dtype(x.dtype))


@torch.library.register_fake("pycm::topk")  # type: ignore[untyped-decorator]
def _topk_fake(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    metric: str,
    mask: Tensor | None,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    _check_pair("topk", ("queries", "gallery"), ("[N, D]", "[M, D]"), queries, gallery)
    _check_devices("topk", queries=queries, mask=mask, exclude=exclude, exclude_offsets=exclude_offsets)
    _check_metric("topk", metric)
    rows, columns = queries.shape[0], gallery.shape[0]
    _require(columns > 0, lambda: f"topk: gallery must have at least one row, got shape {list(gallery.shape)}")
    for condition in (k >= 1, k <= columns):
        _require(condition, lambda: f"topk: k must be in [1, {columns}], got {k}")
    if precision not in ("exact", "fast"):
        raise ValueError(f"topk: precision must be exact or fast, got '{precision}'")
    _check_filters(rows, columns, mask, exclude, exclude_offsets)
    shape = (rows, k)
    return (
        queries.new_empty(shape, dtype=_score_dtype(queries.dtype)),
        queries.new_empty(shape, dtype=torch.int64),
    )


# ---- gradients ----


def _similarity_setup(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    x, y, ctx.metric = inputs
    ctx.save_for_backward(x, y, output)


def _similarity_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, y, scores = ctx.saved_tensors
    with full_precision(grad):
        return *similarity_gradients(x, y, scores, grad, ctx.metric, ctx.needs_input_grad), None


def _topk_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.metric = inputs[3]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], inputs[1], *output)


def _topk_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    queries, gallery, scores, indices = ctx.saved_tensors
    with full_precision(grad):
        both = topk_gradients(queries, gallery, scores, indices, grad, ctx.metric, ctx.needs_input_grad)
    return *both, *(None,) * 6


torch.library.register_autograd("pycm::similarity", _similarity_backward, setup_context=_similarity_setup)
torch.library.register_autograd("pycm::topk", _topk_backward, setup_context=_topk_setup)
for _op in ("pycm::similarity", "pycm::topk"):
    torch.library.register_autocast(_op, "cpu", torch.float32)
